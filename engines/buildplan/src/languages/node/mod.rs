//! JavaScript and TypeScript: Node.js with npm, yarn, pnpm; Bun.

mod start;

use std::collections::BTreeSet;
use std::rc::Rc;

use serde_json::Value;

use super::{Pin, pinned, version};
use crate::dependencies::Dependencies;
use crate::frameworks::{self, Found};
use crate::plan::{Draft, PlanError, Source};
use crate::tree::{Repo, line_of};
use start::Start;

pub const FILE: &str = "package.json";

const LOCKS: [(&str, &str); 6] = [
    ("pnpm-lock.yaml", "pnpm"),
    ("yarn.lock", "yarn"),
    ("bun.lock", "bun"),
    ("bun.lockb", "bun"),
    ("package-lock.json", "npm"),
    ("npm-shrinkwrap.json", "npm"),
];

pub fn is_there(repo: &Repo<'_>) -> Option<String> {
    let file = repo.first(&[FILE, "bunfig.toml", "rush.json"]);
    file.or_else(|| repo.first(&["server.js", "index.ts"]).filter(|_| super::deno::is_there(repo).is_none())).map(str::to_owned)
}

pub fn detect(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let json = repo.json(FILE)?.unwrap_or(Value::Null);
    let package = Package { text: repo.text(FILE), json: &json };
    draft.language("javascript", Source::file(is_there(repo).as_deref().unwrap_or(FILE)));
    if repo.has("tsconfig.json") {
        draft.plan.detection.languages.push("typescript".into());
    }
    let manager = if json.is_null() { None } else { Some(package.manager(repo, draft)) };
    let runs_on_bun = manager == Some("bun") || repo.has("bunfig.toml");
    package.versions(repo, draft, runs_on_bun);
    let dependencies = package.dependencies();
    let found = frameworks::find("javascript", &dependencies, repo);
    if let Some(found) = &found {
        draft.found(found);
    }
    package.build_tool(repo, &dependencies, draft);
    let manager = manager.unwrap_or("npm");
    package.build(repo, manager, found.as_ref(), draft);
    let start = Start { repo, package: &package, dependencies: &dependencies, manager, runs_on_bun };
    start.decide(found.as_ref(), draft);
    dependencies.conclude("javascript", draft);
    package.migrations(repo, &dependencies, draft);
    Ok(())
}

struct Package<'a> {
    text: Rc<str>,
    json: &'a Value,
}

/// The scripts of a `package.json`.
fn scripts_of(json: &Value) -> impl Iterator<Item = (&String, &str)> {
    let scripts = json.get("scripts").and_then(Value::as_object).into_iter().flatten();
    scripts.filter_map(|(name, command)| Some((name, command.as_str()?)))
}

impl Package<'_> {
    fn at(&self, needle: &str) -> Source<'static> {
        Source::line(FILE, &self.text, needle)
    }

    fn text_at(&self, pointer: &str) -> Option<&str> {
        self.json.pointer(pointer)?.as_str().filter(|text| !text.trim().is_empty())
    }

    fn script(&self, name: &str) -> Option<&str> {
        self.json.get("scripts")?.get(name)?.as_str().filter(|command| !command.trim().is_empty())
    }

    fn dependencies(&self) -> Dependencies {
        let mut all = Dependencies::default();
        for section in ["dependencies", "devDependencies", "optionalDependencies"] {
            for (name, _) in self.json.get(section).and_then(Value::as_object).into_iter().flatten() {
                all.add(name, FILE, line_of(&self.text, &format!("\"{name}\"")));
            }
        }
        all
    }

    fn manager(&self, repo: &Repo<'_>, draft: &mut Draft) -> &'static str {
        let present: Vec<(&'static str, &'static str)> = LOCKS.into_iter().filter(|(file, _)| repo.has(file)).collect();
        let declared = self.text_at("/packageManager").map(|text| text.split_once('@').unwrap_or((text, "")));
        let engine = ["pnpm", "yarn", "bun"].into_iter().find(|name| self.text_at(&format!("/engines/{name}")).is_some());
        let manager = if let Some((name, wanted)) = declared {
            let known = ["npm", "pnpm", "yarn", "bun"].into_iter().find(|known| *known == name).unwrap_or("npm");
            draft.package_manager(known, self.at("\"packageManager\""), "\"packageManager\" names it");
            if !wanted.is_empty() {
                draft.version(known, wanted.split('+').next().unwrap_or(wanted), self.at("\"packageManager\""));
            }
            known
        } else if let Some((file, name)) = present.first() {
            draft.package_manager(name, Source::file(file), "its lockfile exists");
            name
        } else if let Some(name) = engine {
            draft.package_manager(name, self.at(&format!("\"{name}\"")), "\"engines\" names it");
            name
        } else if let Some(file) = repo.first(&["pnpm-workspace.yaml", ".yarnrc.yml", "bunfig.toml"]) {
            let name = match file {
                "pnpm-workspace.yaml" => "pnpm",
                ".yarnrc.yml" => "yarn",
                _ => "bun",
            };
            draft.package_manager(name, Source::file(file), "its settings exist");
            name
        } else {
            draft.package_manager("npm", Source::file(FILE), "no lockfile; npm comes with Node.js");
            "npm"
        };
        let lock = present.iter().find(|(_, name)| *name == manager).map(|(file, _)| *file);
        let command = install_command(repo, manager, lock, draft);
        let distinct: BTreeSet<_> = present.iter().map(|(_, name)| *name).collect();
        if declared.is_none() && distinct.len() > 1 {
            let files: Vec<_> = present.iter().map(|(file, _)| *file).collect();
            draft.add_question(
                "detection.package_manager",
                &format!("found lockfiles of several package managers ({}); using {manager}", files.join(", ")),
                &format!("[build]\ninstall = \"{command}\""),
            );
        }
        let reason = if lock.is_some() { "the versions in the lockfile" } else { "no lockfile: versions are not pinned" };
        draft.install(command, Source::file(lock.unwrap_or(FILE)), reason);
        manager
    }

    fn versions(&self, repo: &Repo<'_>, draft: &mut Draft, runs_on_bun: bool) {
        let engines = |name: &str| {
            let wanted = self.text_at(&format!("/engines/{name}"))?;
            let line = line_of(&self.text, "\"engines\"").map_or(0, |line| line - 1);
            let within = self.text.lines().skip(line).position(|text| text.contains(&format!("\"{name}\"")));
            Some(Pin::new(wanted, FILE, within.map(|more| line + more + 1)))
        };
        let volta = self.text_at("/volta/node").map(|wanted| Pin::new(wanted, FILE, line_of(&self.text, "\"volta\"")));
        let files = [(".nvmrc", "v"), (".node-version", "v"), (".n-node-version", "v")];
        version(draft, "node", engines("node").or(volta).or_else(|| pinned(repo, &["node", "nodejs"], &files)));
        for name in ["pnpm", "yarn", "npm"] {
            if !draft.plan.detection.versions.contains_key(name) {
                version(draft, name, engines(name).or_else(|| pinned(repo, &[name], &[])));
            }
        }
        if runs_on_bun && !draft.plan.detection.versions.contains_key("bun") {
            version(draft, "bun", engines("bun").or_else(|| pinned(repo, &["bun"], &[(".bun-version", "v")])));
        }
    }

    fn build_tool(&self, repo: &Repo<'_>, dependencies: &Dependencies, draft: &mut Draft) {
        let files = [
            ("nx.json", "nx"),
            ("turbo.json", "turbo"),
            ("lerna.json", "lerna"),
            ("rush.json", "rush"),
            (".moon/workspace.yml", "moon"),
        ];
        if let Some((file, tool)) = files.into_iter().find(|(file, _)| repo.has(file)) {
            return draft.build_tool(tool, Source::file(file), "its settings exist");
        }
        let tools =
            ["vite", "@rsbuild/core", "@rspack/cli", "webpack", "parcel", "rollup", "esbuild", "tsup", "@swc/cli", "typescript"];
        if let Some(found) = tools.iter().find_map(|tool| dependencies.find(tool)) {
            let name = match found.name.as_str() {
                "@rsbuild/core" => "rsbuild",
                "@rspack/cli" => "rspack",
                "@swc/cli" => "swc",
                "typescript" => "tsc",
                name => name,
            };
            draft.build_tool(name, Source { file: &found.file, line: found.line }, &format!("dependency \"{}\"", found.name));
        }
    }

    fn build(&self, repo: &Repo<'_>, manager: &str, found: Option<&Found>, draft: &mut Draft) {
        for (script, reason) in
            [("build", "script \"build\""), ("build:prod", "script \"build:prod\""), ("compile", "script \"compile\"")]
        {
            if self.script(script).is_some() {
                return draft.build(&format!("{manager} run {script}"), self.at(&format!("\"{script}\"")), reason);
            }
        }
        let name = found.map(|found| found.framework.name);
        let without = match name {
            Some("next" | "payload" | "nextra" | "fumadocs") => "next build",
            Some("nuxt") => "nuxt build",
            Some("gatsby") => "gatsby build",
            Some("astro" | "starlight") => "astro build",
            Some("vite") if repo.has("index.html") => "vite build",
            Some("eleventy") => "eleventy",
            Some("docusaurus") => "docusaurus build",
            Some("hexo") => "hexo generate",
            Some("vitepress") => "vitepress build",
            Some("angular") => "ng build",
            Some("nestjs") => "nest build",
            Some("remix") => "remix vite:build",
            Some("react-router") => "react-router build",
            Some("create-react-app") => "react-scripts build",
            Some("vue-cli") => "vue-cli-service build",
            Some("parcel") if repo.has("index.html") => "parcel build index.html",
            Some("storybook") => "storybook build",
            Some("meteor") => {
                "meteor build --server-only --directory .output && npm --prefix .output/bundle/programs/server install"
            }
            _ => return,
        };
        if let Some(found) = found {
            draft.build(without, found.source(), &format!("how {} is built", found.framework.title));
        }
    }

    fn migrations(&self, repo: &Repo<'_>, dependencies: &Dependencies, draft: &mut Draft) {
        if draft.plan.build.release.is_some() || !draft.plan.processes.contains_key("web") {
            return;
        }
        if repo.has_folder("prisma/migrations") && (dependencies.has("prisma") || dependencies.has("@prisma/client")) {
            draft.release("prisma migrate deploy", Source::file("prisma/migrations"), "Prisma's migrations");
        }
    }
}

fn install_command(repo: &Repo<'_>, manager: &str, lock: Option<&str>, draft: &mut Draft) -> &'static str {
    let lock_text = lock.filter(|file| file.ends_with(".lock") || file.ends_with(".yaml")).map(|file| (file, repo.text(file)));
    let berry = manager == "yarn"
        && (repo.has(".yarnrc.yml")
            || draft.plan.detection.versions.get("yarn").is_some_and(|version| !version.starts_with(['0', '1']))
            || lock_text.as_ref().is_some_and(|(_, text)| text.contains("__metadata:")));
    if manager == "pnpm"
        && !draft.plan.detection.versions.contains_key("pnpm")
        && let Some((file, text)) = &lock_text
        && let Some(line) = text.lines().find(|line| line.starts_with("lockfileVersion:"))
    {
        let format = line.trim_start_matches("lockfileVersion:").trim().trim_matches(['\'', '"']);
        let major = match format.split('.').next().unwrap_or_default() {
            "5" => "7",
            "6" => "8",
            _ => "9",
        };
        draft.version("pnpm", major, Source::line(file, text, "lockfileVersion:"));
    }
    match (manager, lock) {
        ("pnpm", Some(_)) => "pnpm install --frozen-lockfile",
        ("pnpm", None) => "pnpm install",
        ("yarn", Some(_)) if berry => "yarn install --immutable",
        ("yarn", Some(_)) => "yarn install --frozen-lockfile",
        ("yarn", None) => "yarn install",
        ("bun", Some(_)) => "bun install --frozen-lockfile",
        ("bun", None) => "bun install",
        (_, Some(_)) => "npm ci",
        (_, None) => "npm install",
    }
}
