//! Finds the start command of a Node.js program: from its scripts, its framework, or a file with a usual name.

use serde_json::Value;

use super::super::port_in;
use super::{FILE, Package, scripts_of};
use crate::dependencies::Dependencies;
use crate::frameworks::{Found, Type};
use crate::plan::{Draft, Kind, Source};
use crate::tree::{Repo, line_of};

/// Files that usually start a program, most usual first; TypeScript where it is run as it is.
const ENTRIES: [&str; 14] = [
    "server.js",
    "index.js",
    "app.js",
    "main.js",
    "server.mjs",
    "index.mjs",
    "app.mjs",
    "src/server.js",
    "src/index.js",
    "src/app.js",
    "src/main.js",
    "bot.js",
    "server.cjs",
    "index.cjs",
];
const TYPED: [&str; 8] =
    ["server.ts", "index.ts", "src/index.ts", "src/server.ts", "main.ts", "src/main.ts", "app.ts", "src/app.ts"];

/// The start command of a program.
pub struct Start<'a> {
    pub repo: &'a Repo<'a>,
    pub package: &'a Package<'a>,
    pub dependencies: &'a Dependencies,
    pub manager: &'a str,
    pub runs_on_bun: bool,
}

impl Start<'_> {
    pub fn decide(&self, found: Option<&Found>, draft: &mut Draft) {
        let name = found.map(|found| found.framework.name);
        if let Some(found) = found
            && self.exports_files(found, draft)
        {
            return;
        }
        let files = found.filter(|found| found.framework.kind.is_files() && name != Some("astro"));
        let usual = found.is_some_and(|found| found.framework.start.is_some());
        if let Some((script, command)) = self.script(files.is_some()).filter(|(script, _)| *script != "preview" || !usual) {
            // A server of its own is worth more than where a bundler puts its files.
            if let Some(files) = files.filter(|files| self.is_preview(command, files)) {
                return self.files(files, draft);
            }
            self.by_script(script, command, found, draft);
        } else if let Some(files) = files {
            return self.files(files, draft);
        } else if let Some((found, command)) =
            found.and_then(|found| Some((found, self.usual(found, draft.plan.build.build.is_some())?)))
        {
            let process = if found.framework.kind == Type::Worker { "worker" } else { "web" };
            draft.process(process, &command, found.source(), &format!("how {} is started", found.framework.title), 0.9);
        } else if let Some((command, file, line, reason)) = self.entry() {
            let process = if found.is_some_and(|found| found.framework.kind == Type::Worker) { "worker" } else { "web" };
            if found.is_none() {
                draft.kind(Kind::Web);
            }
            draft.process(process, &command, Source { file: &file, line }, reason, 0.7);
        } else {
            if found.is_some_and(|found| !found.framework.kind.is_files() && found.framework.kind != Type::Tool) {
                draft.add_question(
                    "processes.web",
                    "no \"start\" script and no file that usually starts a server was found",
                    "[processes]\nweb = \"node server.js\"",
                );
            } else if ["main", "exports", "module", "bin"].iter().any(|member| self.package.json.get(member).is_some()) {
                draft.kind(Kind::Library);
            }
            return;
        }
        if draft.plan.processes.contains_key("web") {
            self.port(found, draft);
        }
        let by_itself = draft.plan.processes.get("web").is_some_and(|command| command == "node build");
        if name == Some("sveltekit") && by_itself && !self.dependencies.has("@sveltejs/adapter-node") {
            draft.add_question(
                "processes.web",
                "@sveltejs/adapter-node is not among the dependencies; without it (or adapter-static) the build makes no server",
                "[processes]\nweb = \"node build\"",
            );
        }
    }

    fn script(&self, of_files: bool) -> Option<(&'static str, &str)> {
        let names: &[&str] = if of_files {
            &["start", "serve"]
        } else {
            &["start", "start:prod", "production", "prod", "serve", "server", "preview"]
        };
        names.iter().find_map(|name| Some((*name, self.package.script(name)?)))
    }

    fn by_script(&self, script: &'static str, command: &str, found: Option<&Found>, draft: &mut Draft) {
        let is_worker = found.is_some_and(|found| found.framework.kind == Type::Worker);
        let process = if is_worker { "worker" } else { "web" };
        if !is_worker && found.is_none_or(|found| found.framework.kind.is_files()) {
            draft.kind(Kind::Web);
        }
        // NestJS's own "start" compiles anew; there is another for production.
        let (script, command) = match self.package.script("start:prod") {
            Some(production)
                if script == "start"
                    && ["nest start", "ts-node", "nodemon", "ng serve"].iter().any(|tool| command.contains(tool)) =>
            {
                ("start:prod", production)
            }
            _ => (script, command),
        };
        let source = self.package.at(&format!("\"{script}\""));
        let reason = format!("script \"{script}\"");
        let runs_others =
            ["npm ", "yarn ", "pnpm ", "run-s ", "run-p ", "turbo ", "nx "].iter().any(|tool| command.starts_with(tool));
        // The script's own command: the package manager would only stand between it and its signals.
        if self.package.script(&format!("pre{script}")).is_some() || runs_others {
            let run =
                if script == "start" { format!("{} start", self.manager) } else { format!("{} run {script}", self.manager) };
            draft.process(process, &run, source, &reason, 1.0);
        } else {
            draft.process(process, command, source, &reason, 1.0);
        }
        for tool in ["nodemon", "ts-node-dev", "tsx watch", "vite dev", "next dev", "nuxt dev", "astro dev", "node --watch"] {
            if command.contains(tool) {
                draft.add_question(
                    &format!("processes.{process}"),
                    &format!("script \"{script}\" runs `{tool}`, which is for development"),
                    &format!("[processes]\n{process} = \"node server.js\""),
                );
                break;
            }
        }
        for (name, _) in
            scripts_of(self.package.json).filter(|(name, _)| matches!(name.as_str(), "worker" | "start:worker" | "queue"))
        {
            if !is_worker {
                let command = format!("{} run {name}", self.manager);
                draft.process("worker", &command, self.package.at(&format!("\"{name}\"")), &format!("script \"{name}\""), 0.8);
                break;
            }
        }
    }

    /// `vite preview` is for development, and `serve dist` for files that Capsule serves itself.
    fn is_preview(&self, command: &str, found: &Found) -> bool {
        let first = command
            .split_whitespace()
            .find(|word| !word.contains('=') && !matches!(*word, "cross-env" | "npx"))
            .unwrap_or_default();
        let tools = [
            "vite",
            "react-scripts",
            "vue-cli-service",
            "parcel",
            "serve",
            "http-server",
            "ng",
            "gatsby",
            "eleventy",
            "@11ty/eleventy",
            "docusaurus",
            "vitepress",
            "vuepress",
            "astro",
            "hexo",
            "gridsome",
            "ember",
            "stencil",
            "quasar",
            "ionic",
            "expo",
            "webpack",
            "webpack-dev-server",
            "rspack",
            "rsbuild",
            "rollup",
            "preact",
            "craco",
            "react-app-rewired",
            "umi",
            "max",
            "storybook",
            "start-storybook",
            "sirv",
            "slidev",
            "rspress",
            "observable",
            "live-server",
            "snowpack",
            "wmr",
            "elm-app",
            "elm-spa",
            "elm-land",
            "brunch",
            "polymer",
            "au",
            "nx",
            "sanity",
            "farm",
            "ice",
            "antora",
            "evidence",
        ];
        tools.contains(&first)
            || (first == found.framework.name)
            || ["npm", "yarn", "pnpm"].contains(&first)
                && ["dev", "develop", "preview", "serve"].iter().any(|word| command.ends_with(word))
    }

    /// The usual command of a framework, where it can be run as things stand.
    fn usual(&self, found: &Found, is_built: bool) -> Option<String> {
        let command = found.framework.start?;
        let needs = command.strip_prefix("node ").filter(|file| !is_built && !file.is_empty());
        needs
            .is_none_or(|file| self.repo.has(file.split(' ').next().unwrap_or(file)) || found.framework.kind == Type::Ssr)
            .then(|| command.to_owned())
    }

    fn entry(&self) -> Option<(String, String, Option<usize>, &'static str)> {
        let run = if self.runs_on_bun { "bun" } else { "node" };
        if let Some(main) = self.package.text_at("/main")
            && self.repo.has(main.trim_start_matches("./"))
            && (self.runs_on_bun || !main.ends_with(".ts"))
        {
            let is_program = self.package.json.get("bin").is_none() && self.is_program(main.trim_start_matches("./"));
            let usual = ENTRIES.contains(&main.trim_start_matches("./"));
            return (is_program || usual && self.package.json.get("exports").is_none()).then(|| {
                let at = self.package.at("\"main\"");
                (format!("{run} {main}"), FILE.to_owned(), at.line, "\"main\" names it")
            });
        }
        let usual = self
            .repo
            .first(&ENTRIES)
            .or_else(|| self.repo.first(&TYPED).filter(|_| self.runs_on_bun || self.package.json.is_null()));
        let file = usual.filter(|_| self.package.json.get("exports").is_none())?;
        Some((format!("{run} {file}"), file.to_owned(), None, "a file of this name usually starts it"))
    }

    /// Whether a file has top-level statements that do something.
    fn is_program(&self, file: &str) -> bool {
        let text = self.repo.text(file);
        [".listen(", "createServer(", "serve(", ".login(", ".launch("].iter().any(|sign| text.contains(sign))
    }

    fn files(&self, found: &Found, draft: &mut Draft) {
        let row = found.framework;
        draft.files(found, row.output.unwrap_or("dist"));
        let configured = match row.name {
            "angular" => angular_output(self.repo),
            "vitepress" | "vuepress" if self.repo.has_folder("docs") => {
                Some((format!("docs/{}", row.output.unwrap_or_default()), "docs".to_owned(), None))
            }
            "eleventy" => configured(
                self.repo,
                &[".eleventy.js", "eleventy.config.js", "eleventy.config.mjs", "eleventy.config.cjs"],
                "output:",
            ),
            "vite" | "rollup-svelte" => {
                configured(self.repo, &["vite.config.ts", "vite.config.js", "vite.config.mjs", "vite.config.mts"], "outDir:")
            }
            "astro" | "starlight" => {
                configured(self.repo, &["astro.config.mjs", "astro.config.ts", "astro.config.js"], "outDir:")
            }
            "vue-cli" => configured(self.repo, &["vue.config.js"], "outputDir:"),
            _ => None,
        };
        if let Some((folder, file, line)) = configured {
            draft.output(&folder, Source { file: &file, line }, "set in this file", 1.0);
        }
    }

    /// Frameworks with a server that make files when they are told to.
    fn exports_files(&self, found: &Found, draft: &mut Draft) -> bool {
        let has = |name: &str| self.dependencies.find(name);
        let (row, repo) = (found.framework, self.repo);
        let exported = match row.name {
            "next" | "nextra" | "fumadocs" => {
                let set = line_with(
                    repo,
                    &["next.config.js", "next.config.mjs", "next.config.ts", "next.config.cjs"],
                    "output:\"export\"",
                );
                let set = set.map(|(file, line)| (file, line, "output: \"export\"".to_owned()));
                let old = || {
                    self.package.script("build").filter(|build| build.contains("next export")).map(|_| {
                        (FILE.to_owned(), line_of(&self.package.text, "next export").unwrap_or(1), "next export".to_owned())
                    })
                };
                set.or_else(old).map(|at| ("out", at))
            }
            "nuxt" => {
                let generated = self
                    .package
                    .script("build")
                    .is_some_and(|build| build.contains("nuxt generate") || build.contains("nuxi generate"))
                    || (self.package.script("build").is_none() && self.package.script("generate").is_some());
                let by_script = generated.then(|| {
                    (FILE.to_owned(), line_of(&self.package.text, "generate").unwrap_or(1), "it is generated".to_owned())
                });
                let off = line_with(repo, &["nuxt.config.ts", "nuxt.config.js"], "ssr:false")
                    .map(|(file, line)| (file, line, "ssr: false".to_owned()));
                by_script.or(off).map(|at| (".output/public", at))
            }
            "astro" => {
                let adapter =
                    ["@astrojs/node", "@astrojs/vercel", "@astrojs/netlify", "@astrojs/cloudflare", "astro-bun-adapter"]
                        .iter()
                        .find_map(|name| has(name));
                match adapter {
                    Some(adapter) if adapter.name == "@astrojs/node" => {
                        draft.kind(Kind::Web);
                        if self.package.script("start").is_none_or(|start| start.starts_with("astro ")) {
                            draft.process(
                                "web",
                                "node ./dist/server/entry.mjs",
                                Source { file: &adapter.file, line: adapter.line },
                                "Astro's server for Node.js",
                                0.95,
                            );
                            draft.plan.build.env.insert("HOST".into(), "0.0.0.0".into());
                            self.port(Some(found), draft);
                            return true;
                        }
                        return false;
                    }
                    _ => {
                        let start = self.package.script("start");
                        if start.is_none_or(|start| self.is_preview(start, found)) {
                            self.files(found, draft);
                            draft.plan.networking.single_page = false;
                            return true;
                        }
                        return false;
                    }
                }
            }
            "sveltekit" => has("@sveltejs/adapter-static").map(|found| {
                ("build", (found.file.clone(), found.line.unwrap_or(1), "dependency \"@sveltejs/adapter-static\"".to_owned()))
            }),
            "react-router" => line_with(repo, &["react-router.config.ts", "react-router.config.js"], "ssr:false")
                .map(|(file, line)| ("build/client", (file, line, "ssr: false".to_owned()))),
            "remix" => line_with(repo, &["vite.config.ts", "vite.config.js"], "ssr:false")
                .map(|(file, line)| ("build/client", (file, line, "ssr: false".to_owned()))),
            "qwik" => has("@builder.io/qwik-city")
                .is_none_or(|_| self.package.script("build.server").is_some_and(|script| script.contains("static")))
                .then(|| ("dist", (FILE.to_owned(), found.line.unwrap_or(1), "pages that are made once".to_owned()))),
            "angular" if has("@angular/ssr").is_some() || has("@nguniversal/express-engine").is_some() => {
                let script = scripts_of(self.package.json).find(|(name, _)| name.starts_with("serve:ssr"));
                if let Some((name, command)) = script {
                    draft.kind(Kind::Web);
                    draft.process("web", command, self.package.at(&format!("\"{name}\"")), &format!("script \"{name}\""), 0.95);
                    draft.port(
                        4000,
                        self.package.at(&format!("\"{name}\"")),
                        "default port of Angular's server, passed as PORT",
                        0.7,
                    );
                    return true;
                }
                None
            }
            _ => None,
        };
        let Some((folder, (file, line, reason))) = exported else { return false };
        draft.kind(Kind::Static);
        let source = Source { file: &file, line: Some(line) };
        draft.output(folder, source, &reason, 1.0);
        draft.plan.networking.single_page = reason == "ssr: false";
        true
    }

    fn port(&self, found: Option<&Found>, draft: &mut Draft) {
        let command = draft.plan.processes.get("web").cloned().unwrap_or_default();
        let named = command
            .split_whitespace()
            .find(|word| word.ends_with(".js") || word.ends_with(".mjs") || word.ends_with(".ts") || word.ends_with(".cjs"));
        let files = named.into_iter().map(|file| file.trim_start_matches("./")).chain(ENTRIES).chain(TYPED);
        for file in files {
            if let Some((port, line)) = self.repo.read(file).and_then(|text| port_in(&text)) {
                return draft.port(port, Source { file, line: Some(line) }, "default beside PORT in this file", 0.9);
            }
        }
        draft.default_port(found, 3000, found.map_or_else(|| Source::file(FILE), Found::source));
    }
}

/// The first line of these files that says so, whatever its spaces and quotes.
fn line_with(repo: &Repo<'_>, files: &[&str], wanted: &str) -> Option<(String, usize)> {
    files.iter().find_map(|file| {
        let text = repo.read(file)?;
        let index = text.lines().position(|line| {
            let line: String = line.chars().filter(|c| !c.is_whitespace()).map(|c| if c == '\'' { '"' } else { c }).collect();
            !line.starts_with("//") && line.contains(wanted)
        })?;
        Some(((*file).to_owned(), index + 1))
    })
}

/// A folder that a configuration sets: `outDir: "build"`.
fn configured(repo: &Repo<'_>, files: &[&str], key: &str) -> Option<(String, String, Option<usize>)> {
    for file in files {
        let Some(text) = repo.read(file) else { continue };
        for (index, line) in text.lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with("//")) {
            let Some((_, rest)) = line.split_once(key) else { continue };
            let folder = rest.trim().trim_start_matches(['"', '\'', '`']).split(['"', '\'', '`']).next().unwrap_or_default();
            let folder = folder.trim_start_matches("./").trim_end_matches('/');
            let plain = folder.chars().all(|c| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '/'));
            if !folder.is_empty() && plain && !folder.starts_with("..") && !folder.starts_with('/') {
                return Some((folder.to_owned(), (*file).to_owned(), Some(index + 1)));
            }
        }
    }
    None
}

/// Where Angular's builder puts its files: `outputPath`, with `browser/` behind since version 17.
fn angular_output(repo: &Repo<'_>) -> Option<(String, String, Option<usize>)> {
    let json = repo.json("angular.json").ok()??;
    let text = repo.text("angular.json");
    let projects = json.get("projects")?.as_object()?;
    let default = json.get("defaultProject").and_then(Value::as_str);
    let (name, project) = default.and_then(|name| projects.get_key_value(name)).or_else(|| projects.iter().next())?;
    let build = project.pointer("/architect/build").or_else(|| project.pointer("/targets/build"))?;
    let path = build.pointer("/options/outputPath");
    let base = path.and_then(|path| path.as_str().or_else(|| path.get("base")?.as_str()));
    let builder = build.get("builder").and_then(Value::as_str).unwrap_or_default();
    let folder = base.map_or_else(|| format!("dist/{name}"), str::to_owned);
    let folder = if builder.ends_with(":application") { format!("{folder}/browser") } else { folder };
    Some((folder, "angular.json".to_owned(), line_of(&text, "\"outputPath\"").or_else(|| line_of(&text, "\"builder\""))))
}
