//! JavaScript and TypeScript on Node.js: npm, yarn, pnpm.

use serde_json::Value;

use super::{first_of, required};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::Tree;

pub const FILE: &str = "package.json";

/// Frameworks by the dependency that gives them away; the more particular first.
const FRAMEWORKS: [(&str, &str); 18] = [
    ("next", "next"),
    ("nuxt", "nuxt"),
    ("@remix-run/node", "remix"),
    ("@sveltejs/kit", "sveltekit"),
    ("astro", "astro"),
    ("gatsby", "gatsby"),
    ("@nestjs/core", "nestjs"),
    ("@angular/core", "angular"),
    ("fastify", "fastify"),
    ("koa", "koa"),
    ("hono", "hono"),
    ("@hapi/hapi", "hapi"),
    ("express", "express"),
    ("vite", "vite"),
    ("@vue/cli-service", "vue-cli"),
    ("react-scripts", "create-react-app"),
    ("parcel", "parcel"),
    ("@11ty/eleventy", "eleventy"),
];

/// Frameworks whose build is a folder of files, unless a server is started: framework, folder,
/// whether unknown paths are its own affair.
const SITES: [(&str, &str, bool); 6] = [
    ("vite", "dist", true),
    ("create-react-app", "build", true),
    ("vue-cli", "dist", true),
    ("parcel", "dist", true),
    ("gatsby", "public", false),
    ("eleventy", "_site", false),
];

pub fn detect(tree: &dyn Tree, draft: &mut Draft) -> Result<(), PlanError> {
    let text = required(tree, FILE)?;
    let package: Value = serde_json::from_str(&text).map_err(|error| PlanError {
        file: FILE.into(),
        line: Some(error.line()),
        message: format!("it is not valid JSON: {error}"),
    })?;
    let package = Package { text: &text, json: &package };
    draft.language("javascript", Source::file(FILE));
    if let Some(version) = package.json.pointer("/engines/node").and_then(Value::as_str) {
        draft.version("node", version, package.at("\"node\""));
    } else if let Some((file, version)) = [".nvmrc", ".node-version"].iter().find_map(|file| Some((*file, tree.read(file)?))) {
        draft.version("node", version.trim().trim_start_matches('v'), Source { file, line: Some(1) });
    }
    let manager = manager(tree, &package, draft);
    let framework = framework(&package, draft);
    build(&package, manager, draft);
    start(tree, &package, framework, manager, draft);
    for (dependency, need) in [
        ("pg", "postgresql"),
        ("mysql2", "mysql"),
        ("redis", "redis"),
        ("ioredis", "redis"),
        ("mongoose", "mongodb"),
        ("mongodb", "mongodb"),
        ("amqplib", "rabbitmq"),
    ] {
        if package.has_dependency(dependency) {
            draft.need(need, package.at(&format!("\"{dependency}\"")), &format!("dependency \"{dependency}\""));
        }
    }
    Ok(())
}

struct Package<'a> {
    text: &'a str,
    json: &'a Value,
}

impl Package<'_> {
    fn at(&self, needle: &str) -> Source<'static> {
        Source::line(FILE, self.text, needle)
    }

    fn script(&self, name: &str) -> Option<&str> {
        self.json.get("scripts")?.get(name)?.as_str().filter(|command| !command.trim().is_empty())
    }

    fn has_dependency(&self, name: &str) -> bool {
        ["dependencies", "devDependencies"]
            .iter()
            .any(|section| self.json.get(section).is_some_and(|all| all.get(name).is_some()))
    }
}

fn manager(tree: &dyn Tree, package: &Package<'_>, draft: &mut Draft) -> &'static str {
    let locks = [("pnpm-lock.yaml", "pnpm"), ("yarn.lock", "yarn"), ("package-lock.json", "npm"), ("npm-shrinkwrap.json", "npm")];
    let present: Vec<(&'static str, &'static str)> = locks.into_iter().filter(|(file, _)| tree.has(file)).collect();
    let declared = package.json.get("packageManager").and_then(Value::as_str);
    let manager = if let Some(declared) = declared {
        let (name, version) = declared.split_once('@').unwrap_or((declared, ""));
        let known = ["npm", "pnpm", "yarn"].into_iter().find(|known| *known == name).unwrap_or("npm");
        draft.package_manager(known, package.at("\"packageManager\""), "\"packageManager\" names it");
        if !version.is_empty() {
            draft.version(known, version.split('+').next().unwrap_or(version), package.at("\"packageManager\""));
        }
        known
    } else if let Some((file, name)) = present.first() {
        draft.package_manager(name, Source::file(file), "its lockfile is there");
        name
    } else {
        draft.package_manager("npm", Source::file(FILE), "no lockfile is there; npm comes with Node.js");
        "npm"
    };
    let distinct: std::collections::BTreeSet<_> = present.iter().map(|(_, name)| *name).collect();
    if declared.is_none() && distinct.len() > 1 {
        let files: Vec<_> = present.iter().map(|(file, _)| *file).collect();
        draft.ask(
            "detection.package_manager",
            &format!("lockfiles of several package managers are here ({}); {manager} was taken", files.join(", ")),
            "[build]\ninstall = \"npm ci\"",
        );
    }
    let lock = present.iter().find(|(_, name)| *name == manager).map(|(file, _)| *file);
    let berry = manager == "yarn"
        && (tree.has(".yarnrc.yml") || lock.and_then(|file| tree.read(file)).is_some_and(|text| text.contains("__metadata:")));
    let command = match (manager, lock) {
        ("pnpm", Some(_)) => "pnpm install --frozen-lockfile",
        ("pnpm", None) => "pnpm install",
        ("yarn", Some(_)) if berry => "yarn install --immutable",
        ("yarn", Some(_)) => "yarn install --frozen-lockfile",
        ("yarn", None) => "yarn install",
        (_, Some(_)) => "npm ci",
        (_, None) => "npm install",
    };
    let reason = if lock.is_some() { "exactly what the lockfile says" } else { "there is no lockfile: versions are not fixed" };
    draft.install(command, Source::file(lock.unwrap_or(FILE)), reason);
    manager
}

fn framework(package: &Package<'_>, draft: &mut Draft) -> Option<&'static str> {
    let (dependency, framework) = FRAMEWORKS.into_iter().find(|(dependency, _)| package.has_dependency(dependency))?;
    draft.framework(framework, package.at(&format!("\"{dependency}\"")), &format!("dependency \"{dependency}\""));
    if package.has_dependency("vite") {
        draft.plan.detection.build_tool = Some("vite".into());
    }
    Some(framework)
}

fn build(package: &Package<'_>, manager: &str, draft: &mut Draft) {
    if package.script("build").is_some() {
        draft.build(&format!("{manager} run build"), package.at("\"build\""), "script \"build\"");
    }
}

fn start(tree: &dyn Tree, package: &Package<'_>, framework: Option<&str>, manager: &str, draft: &mut Draft) {
    if framework == Some("next") && exports_statically(tree, draft) {
        return;
    }
    let site = SITES.into_iter().find(|(name, ..)| Some(*name) == framework);
    // `vite preview` and the like are for a look during development.
    let preview = |command: &str| {
        ["vite", "react-scripts", "vue-cli-service", "parcel", "serve "].iter().any(|tool| command.starts_with(tool))
    };
    let script = package.script("start").filter(|command| site.is_none() || !preview(command));
    if let Some(command) = script {
        draft.kind(Kind::Web);
        // The script's own command: the package manager would only stand between it and its signals.
        if package.script("prestart").is_some() {
            draft.process("web", &format!("{manager} start"), package.at("\"start\""), "scripts \"prestart\" and \"start\"", 1.0);
        } else {
            draft.process("web", command, package.at("\"start\""), "script \"start\"", 1.0);
        }
    } else if let Some((name, folder, single_page)) = site {
        draft.kind(Kind::Static);
        let (folder, source, confidence) = configured_output(tree).unwrap_or((folder.into(), Source::file(FILE), 0.9));
        draft.output(&folder, source, &format!("where {name} puts its build"), confidence);
        draft.plan.networking.single_page = single_page;
    } else if framework == Some("next") {
        draft.kind(Kind::Web);
        draft.process("web", "next start", package.at("\"next\""), "how Next.js is started", 0.9);
    } else if let Some((file, reason, source)) = entry(tree, package) {
        draft.kind(Kind::Web);
        draft.process("web", &format!("node {file}"), source, reason, 0.7);
    } else if package.json.get("main").is_some() || package.json.get("exports").is_some() {
        draft.kind(Kind::Library);
    }
    if draft.plan.kind == Kind::Web {
        draft.port(3000, Source::file(FILE), "the usual port of Node.js servers; PORT says the same", 0.7);
    }
}

fn entry(tree: &dyn Tree, package: &Package<'_>) -> Option<(String, &'static str, Source<'static>)> {
    if let Some(main) = package.json.get("main").and_then(Value::as_str)
        && tree.has(main.trim_start_matches("./"))
    {
        return Some((main.to_owned(), "\"main\" names it", package.at("\"main\"")));
    }
    let file = first_of(tree, &["server.js", "index.js", "app.js", "main.js", "server.mjs", "index.mjs"])?;
    Some((file.into(), "a file of this name usually starts it", Source::file(file)))
}

/// `output: "export"` in Next's configuration makes it a folder of files.
fn exports_statically(tree: &dyn Tree, draft: &mut Draft) -> bool {
    for file in ["next.config.js", "next.config.mjs", "next.config.ts"] {
        let Some(text) = tree.read(file) else { continue };
        let exported = text.lines().position(|line| {
            let line: String = line.chars().filter(|c| !c.is_whitespace()).map(|c| if c == '\'' { '"' } else { c }).collect();
            !line.starts_with("//") && line.contains("output:\"export\"")
        });
        if let Some(index) = exported {
            draft.kind(Kind::Static);
            draft.output("out", Source { file, line: Some(index + 1) }, "output: \"export\"", 1.0);
            return true;
        }
    }
    false
}

/// `outDir` in Vite's configuration.
fn configured_output(tree: &dyn Tree) -> Option<(String, Source<'static>, f32)> {
    for file in ["vite.config.ts", "vite.config.js", "vite.config.mjs"] {
        let Some(text) = tree.read(file) else { continue };
        for (index, line) in text.lines().enumerate() {
            if let Some((_, rest)) = line.split_once("outDir:") {
                let folder = rest.trim().trim_start_matches(['"', '\'', '`']).split(['"', '\'', '`']).next()?;
                let folder = folder.trim_start_matches("./");
                if !folder.is_empty() && !folder.starts_with("..") && !folder.starts_with('/') {
                    return Some((folder.to_owned(), Source { file, line: Some(index + 1) }, 1.0));
                }
            }
        }
    }
    None
}
