//! What an image of Node.js takes besides, and what of its dependencies it can do without.

use std::collections::BTreeSet;

use super::recipes::{Recipe, commands};
use crate::plan::Plan;
use crate::tree::Repo;

/// Puppeteer takes the browser of the finished image, in place of one that it would fetch for the build alone.
pub fn extend(recipe: &mut Recipe) {
    if recipe.system_packages.iter().any(|package| package == "chromium") {
        recipe.environment.push(("PUPPETEER_EXECUTABLE_PATH", "/usr/bin/chromium".into()));
        recipe.environment.push(("PUPPETEER_SKIP_DOWNLOAD", "true".into()));
    }
}

/// Whether there is what only development takes, and neither what runs nor the release command may call it: they are
/// plainly Node.js itself or programs of the dependencies proper.
pub fn drops_development(repo: &Repo<'_>, plan: &Plan) -> bool {
    let manifest = repo.json("package.json").ok().flatten().unwrap_or_default();
    let names =
        |table: &str| manifest[table].as_object().into_iter().flatten().map(|(name, _)| name.as_str()).collect::<Vec<_>>();
    let has_members = !manifest["workspaces"].is_null() || repo.has("pnpm-workspace.yaml");
    let development = names("devDependencies");
    // What Prisma generates lies beside it.
    if development.is_empty() && !has_members || development.contains(&"prisma") {
        return false;
    }
    let dependencies = names("dependencies");
    // `remix-serve` is of `@remix-run/serve`.
    let is_of_one = |program: &str| dependencies.iter().any(|name| program.ends_with(name.rsplit('/').next().unwrap_or(name)));
    let is_well = |command: &str| {
        let mut words =
            command.split_whitespace().skip_while(|word| word.contains('=') || matches!(*word, "exec" | "npx" | "bunx"));
        let program = words.next().unwrap_or_default();
        if !matches!(program, "node" | "bun") {
            return matches!(program, "" | "cd" | "echo") || is_of_one(program);
        }
        // `-r dotenv/config` and `--import=tsx` are of packages, too.
        let words: Vec<&str> = words.flat_map(|word| word.split('=')).collect();
        words.windows(2).all(|pair| {
            let loads = matches!(pair[0], "-r" | "--require" | "--import" | "--loader" | "--experimental-loader");
            let name = pair[1].split('/').take(if pair[1].starts_with('@') { 2 } else { 1 }).collect::<Vec<_>>().join("/");
            !loads || pair[1].starts_with('.') || dependencies.contains(&name.as_str())
        })
    };
    let mut all: Vec<&str> = plan.processes.values().chain(&plan.build.release).flat_map(|text| commands(text)).collect();
    let (mut at, mut seen) = (0, BTreeSet::new());
    while let Some(command) = all.get(at).copied() {
        let mut words = command.split_whitespace().filter(|word| *word != "run" && !word.starts_with('-'));
        if words.next().is_some_and(|word| matches!(word, "npm" | "pnpm" | "yarn" | "bun"))
            && let Some(name) = words.next()
            && let Some(script) = manifest["scripts"][name].as_str()
        {
            // The script in the manager's place, once: one may call itself.
            let found: Vec<&str> = if seen.insert(name) { commands(script).collect() } else { Vec::new() };
            all.splice(at..=at, found);
        } else {
            at += 1;
        }
    }
    all.iter().all(|command| is_well(command))
}

#[cfg(test)]
mod tests {
    use crate::dockerfile::recipes::recipe;
    use crate::tree::{Memory, Repo};

    #[test]
    fn what_only_development_takes_is_dropped_where_nothing_runs_it() {
        let of = |dependencies: &str, development: &str, start: &str| {
            let scripts = format!(r#"{{"build": "tsc", "start": "{start}", "a": "npm run b", "b": "npm run a"}}"#);
            let manifest =
                format!(r#"{{"scripts": {scripts}, "dependencies": {{{dependencies}}}, "devDependencies": {{{development}}}}}"#);
            let tree = Memory::new([("package.json", manifest.as_str()), ("package-lock.json", "{}"), ("server.js", "")]);
            let plan = crate::plan(&tree).expect("a plan");
            recipe(&Repo::new(&tree), "javascript", &plan).prune
        };
        let typescript = r#""typescript": "5""#;
        for (dependencies, development, start, drops) in [
            (r#""express": "4""#, typescript, "node dist/server.js", true),
            (r#""express": "4""#, r#""nodemon": "3""#, "nodemon server.js", false),
            (r#""express": "4""#, r#""ts-node": "10""#, "node -r ts-node/register server.ts", false),
            (r#""express": "4", "dotenv": "16""#, typescript, "node -r dotenv/config dist/server.js", true),
            (r#""express": "4""#, r#""tsx": "4""#, "node --import=tsx server.ts", false),
            (r#""@remix-run/serve": "2""#, typescript, "NODE_ENV=production remix-serve build/index.js", true),
            (r#""express": "4""#, r#""prisma": "6""#, "npx prisma migrate deploy && node server.js", false),
            (r#""express": "4", "prisma": "6""#, typescript, "npx prisma migrate deploy && node server.js", true),
            (r#""express": "4""#, typescript, "npm run a && node server.js", true),
        ] {
            assert_eq!(!of(dependencies, development, start).is_empty(), drops, "{start} with {dependencies}, {development}");
        }
    }
}
