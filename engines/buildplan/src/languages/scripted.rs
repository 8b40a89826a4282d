//! Smaller families of scripted languages: Lua, Perl, R, Julia, Scheme, shell.

use super::{Pin, pinned, version};
use crate::dependencies::{Dependencies, Dependency};
use crate::frameworks::{self, Found, Type};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Repo, line_of};

/// A framework's usual command with the file that starts it, or that file by itself.
fn start(repo: &Repo<'_>, draft: &mut Draft, found: Option<&Found>, files: &[&str], run: &str) {
    let file = repo.first(files);
    let Some(found) = found else {
        if let Some(file) = file {
            let command = format!("{run} {file}");
            draft.process("worker", &command, Source::file(file), "a file of this name usually starts it", 0.5);
            draft.add_question(
                "processes.web",
                &format!("{file} is treated as a worker"),
                &format!("[processes]\nweb = \"{command}\""),
            );
        } else {
            draft.kind(Kind::Library);
        }
        return;
    };
    draft.found(found);
    if found.framework.kind == Type::Tool {
        return draft.kind(Kind::Library);
    }
    let template = found.framework.start.unwrap_or(run);
    let command = match file {
        Some(file) => template.replace("{file}", file),
        None if template.contains("{file}") => {
            let given = template.replace("{file}", files.first().copied().unwrap_or("app"));
            draft.add_question(
                "processes.web",
                "no file that starts the program was found",
                &format!("[processes]\nweb = \"{given}\""),
            );
            return;
        }
        None => template.to_owned(),
    };
    draft.process("web", &command, found.source(), &format!("how {} is started", found.framework.title), 0.85);
    draft.default_port(Some(found), 8080, found.source());
}

pub fn lua_is_there(repo: &Repo<'_>) -> Option<String> {
    let rocks = repo.ending("", ".rockspec");
    rocks
        .or_else(|| repo.first(&["main.lua", "app.lua", "server.lua"]).map(str::to_owned))
        .or_else(|| repo.first(&["nginx.conf"]).filter(|_| repo.has_folder("lua")).map(str::to_owned))
}

pub fn lua(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = lua_is_there(repo).unwrap_or_default();
    draft.language("lua", Source::file(&marker));
    version(draft, "lua", pinned(repo, &["lua"], &[(".lua-version", "")]));
    let mut dependencies = Dependencies::default();
    if let Some(rocks) = repo.ending("", ".rockspec") {
        draft.package_manager("luarocks", Source::file(&rocks), "a rockspec exists");
        draft.install(
            &format!("luarocks install --tree lua_modules --only-deps {rocks}"),
            Source::file(&rocks),
            "the rocks it names",
        );
        // Where Lua finds them.
        let path = "./?.lua;./?/init.lua;./lua_modules/share/lua/5.1/?.lua;./lua_modules/share/lua/5.1/?/init.lua;;";
        draft.plan.build.env.insert("LUA_PATH".into(), path.into());
        draft.plan.build.env.insert("LUA_CPATH".into(), "./lua_modules/lib/lua/5.1/?.so;;".into());
        for (index, line) in repo.text(&rocks).lines().enumerate() {
            for word in line.split(['"', '\'']).skip(1).step_by(2) {
                dependencies.add(word.split_whitespace().next().unwrap_or_default(), &rocks, Some(index + 1));
            }
        }
    }
    for file in ["app.lua", "main.lua", "server.lua"] {
        for (index, line) in repo.text(file).lines().enumerate() {
            if let Some((_, rest)) = line.split_once("require") {
                let name = rest.trim_start_matches(['(', ' ', '"', '\'']).split(['"', '\'', '.']).next().unwrap_or_default();
                dependencies.add(name, file, Some(index + 1));
            }
        }
    }
    let found = frameworks::find("lua", &dependencies, repo);
    start(repo, draft, found.as_ref(), &["server.lua", "app.lua", "main.lua"], "lua");
    dependencies.conclude("lua", draft);
    Ok(())
}

pub fn perl_is_there(repo: &Repo<'_>) -> Option<String> {
    let marker = repo.first(&["cpanfile", "Makefile.PL", "Build.PL", "dist.ini", "app.psgi"]).map(str::to_owned);
    marker
        .or_else(|| repo.ending("", ".psgi"))
        .or_else(|| repo.first(&["app.pl", "main.pl", "server.pl", "index.pl"]).map(str::to_owned))
}

pub fn perl(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = perl_is_there(repo).unwrap_or_default();
    draft.language("perl", Source::file(&marker));
    version(draft, "perl", pinned(repo, &["perl"], &[(".perl-version", "")]));
    let mut dependencies = Dependencies::default();
    let text = repo.text("cpanfile");
    for (index, line) in text.lines().enumerate() {
        if let Some(rest) = line.trim().strip_prefix("requires") {
            let name = rest.trim_start_matches([' ', '(', '\'', '"']).split(['\'', '"']).next().unwrap_or_default();
            dependencies.add(name, "cpanfile", Some(index + 1));
        }
    }
    if repo.has("cpanfile") {
        draft.package_manager("cpanm", Source::file("cpanfile"), "a cpanfile exists");
        draft.install(
            "cpanm --local-lib-contained local --notest --installdeps .",
            Source::file("cpanfile"),
            "the modules it names",
        );
    }
    let psgi = repo.ending("", ".psgi");
    let script = repo.ending("script", "");
    let files: Vec<&str> = [
        psgi.as_deref(),
        Some("bin/app.psgi"),
        Some("app.pl"),
        Some("main.pl"),
        Some("server.pl"),
        Some("myapp.pl"),
        script.as_deref(),
    ]
    .into_iter()
    .flatten()
    .collect();
    for file in &files {
        for (index, line) in repo.text(file).lines().enumerate().take(60) {
            if let Some(rest) = line.trim().strip_prefix("use ") {
                dependencies.add(rest.split([' ', ';']).next().unwrap_or_default(), file, Some(index + 1));
            }
        }
    }
    let found = frameworks::find("perl", &dependencies, repo);
    start(repo, draft, found.as_ref(), &files, "perl");
    draft.plan.build.env.insert("PERL5LIB".into(), "/app/local/lib/perl5:/app/lib".into());
    dependencies.conclude("perl", draft);
    Ok(())
}

/// Where the packages of R are, beside the program.
const R_LIBRARY: &str = ".library";
/// Packages that R brings.
const R_ITSELF: [&str; 14] = [
    "base",
    "compiler",
    "datasets",
    "graphics",
    "grDevices",
    "grid",
    "methods",
    "parallel",
    "splines",
    "stats",
    "stats4",
    "tcltk",
    "tools",
    "utils",
];

/// A step that fetches packages of R, and does more. Images of R say in `CRAN` where from.
fn fetched_by_r(packages: &str, more: &str) -> String {
    format!(
        "mkdir -p {R_LIBRARY} && Rscript -e \"install.packages({packages}, lib = '{R_LIBRARY}', repos = Sys.getenv('CRAN', 'https://cloud.r-project.org')){more}\""
    )
}

pub fn r_is_there(repo: &Repo<'_>) -> Option<String> {
    let marker = repo.first(&["renv.lock", "app.R", "server.R", "plumber.R", "DESCRIPTION", "main.R", "run.R"]);
    marker.filter(|file| *file != "DESCRIPTION" || repo.text(file).contains("Package:")).map(str::to_owned)
}

pub fn r(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = r_is_there(repo).unwrap_or_default();
    draft.language("r", Source::file(&marker));
    let mut dependencies = Dependencies::default();
    if let Some(lock) = repo.json("renv.lock")? {
        let text = repo.text("renv.lock");
        draft.package_manager("renv", Source::file("renv.lock"), "its lockfile exists");
        draft.install(
            &fetched_by_r("'renv'", "; renv::restore(prompt = FALSE)"),
            Source::file("renv.lock"),
            "the versions in the lockfile",
        );
        if let Some(wanted) = lock.pointer("/R/Version").and_then(serde_json::Value::as_str) {
            version(draft, "r", Some(Pin::new(wanted, "renv.lock", line_of(&text, "\"Version\""))));
        }
        for (name, _) in lock.get("Packages").and_then(serde_json::Value::as_object).into_iter().flatten() {
            dependencies.add(name, "renv.lock", line_of(&text, &format!("\"{name}\"")));
        }
    }
    for file in ["app.R", "server.R", "plumber.R", "main.R", "run.R", "DESCRIPTION"] {
        for (index, line) in repo.text(file).lines().enumerate() {
            let line = line.trim();
            let names = match line.strip_prefix("library(").or_else(|| line.strip_prefix("require(")) {
                Some(rest) => rest.split(')').next().unwrap_or_default().trim_matches(['"', '\'']).to_owned(),
                None if line.starts_with("#*") => "plumber".to_owned(),
                None if file == "DESCRIPTION" => {
                    line.trim_end_matches(',').split([' ', '(']).next().unwrap_or_default().to_owned()
                }
                None => continue,
            };
            dependencies.add(&names, file, Some(index + 1));
        }
    }
    let found = frameworks::find("r", &dependencies, repo);
    if found.is_none() && marker == "DESCRIPTION" {
        draft.kind(Kind::Library);
        return Ok(());
    }
    let fetched: Vec<&Dependency> = dependencies.0.iter().filter(|dependency| dependency.file != "DESCRIPTION").collect();
    let mut names: Vec<&str> = fetched.iter().map(|dependency| dependency.name.as_str()).collect();
    names.retain(|name| !R_ITSELF.contains(name) && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '.'));
    names.sort_unstable();
    names.dedup();
    if draft.plan.build.install.is_none() && !names.is_empty() {
        let source = Source { file: &fetched[0].file, line: fetched[0].line };
        draft.install(
            &fetched_by_r(&format!("c('{}')", names.join("', '")), ""),
            source,
            "what it loads; no lockfile: versions are not pinned",
        );
    }
    if draft.plan.build.install.is_some() {
        draft.plan.build.env.insert("R_LIBS".into(), R_LIBRARY.into());
        // Its cache lies where the finished image has it not.
        draft.plan.build.env.insert("RENV_CONFIG_CACHE_ENABLED".into(), "FALSE".into());
    }
    start(repo, draft, found.as_ref(), &["app.R", "main.R", "run.R"], "Rscript");
    dependencies.conclude("r", draft);
    Ok(())
}

pub fn julia_is_there(repo: &Repo<'_>) -> Option<String> {
    repo.first(&["Project.toml", "JuliaProject.toml"]).map(str::to_owned)
}

pub fn julia(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let file = repo.first(&["Project.toml", "JuliaProject.toml"]).unwrap_or("Project.toml");
    let table = repo.toml(file)?.unwrap_or_default();
    let text = repo.text(file);
    draft.language("julia", Source::file(file));
    draft.package_manager("pkg", Source::file(file), "its project file exists");
    let compat = table
        .get("compat")
        .and_then(|compat| compat.get("julia")?.as_str())
        .map(|wanted| Pin::new(wanted, file, line_of(&text, "julia =")));
    version(draft, "julia", pinned(repo, &["julia"], &[]).or(compat));
    draft.install(
        "julia --project -e 'using Pkg; Pkg.instantiate(); Pkg.precompile()'",
        Source::file(file),
        "the packages it names",
    );
    let mut dependencies = Dependencies::default();
    for name in table.get("deps").and_then(toml::Value::as_table).into_iter().flat_map(|all| all.keys()) {
        dependencies.add(name, file, line_of(&text, &format!("{name} =")));
    }
    let found = frameworks::find("julia", &dependencies, repo);
    start(
        repo,
        draft,
        found.as_ref(),
        &["server.jl", "app.jl", "main.jl", "src/main.jl", "bootstrap.jl", "routes.jl"],
        "julia --project",
    );
    dependencies.conclude("julia", draft);
    Ok(())
}

pub fn scheme_is_there(repo: &Repo<'_>) -> Option<String> {
    repo.first(&["haunt.scm"]).map(str::to_owned)
}

pub fn scheme(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    draft.language("scheme", Source::file("haunt.scm"));
    if let Some(found) = frameworks::find("scheme", &Dependencies::default(), repo) {
        draft.found(&found);
        draft.system_package("haunt", found.source(), "the program that makes the pages");
        draft.build("haunt build", found.source(), "how Haunt makes the pages");
        draft.files(&found, "site");
    }
    Ok(())
}

pub fn shell_is_there(repo: &Repo<'_>) -> Option<String> {
    repo.first(&["start.sh", "run.sh", "entrypoint.sh"]).map(str::to_owned)
}

pub fn shell(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let file = shell_is_there(repo).unwrap_or_default();
    let text = repo.text(&file);
    draft.language("shell", Source::file(&file));
    let shell = text
        .lines()
        .next()
        .and_then(|line| line.strip_prefix("#!"))
        .map_or("sh", |line| if line.contains("bash") { "bash" } else { "sh" });
    draft.kind(Kind::Web);
    let line = line_of(&text, "PORT");
    draft.process(
        "web",
        &format!("{shell} {file}"),
        Source { file: &file, line },
        "a script of this name usually starts it",
        0.6,
    );
    if line.is_none() {
        draft.add_question(
            "processes.web",
            &format!("{file} does not read PORT; treated as a server"),
            &format!("[processes]\nweb = \"{shell} {file}\""),
        );
    }
    draft.default_port(None, 3000, Source::file(&file));
    Ok(())
}
