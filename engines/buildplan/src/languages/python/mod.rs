//! Python: pip, uv, poetry, pdm, pipenv, hatch, conda.

mod manifests;

use std::collections::BTreeSet;
use std::rc::Rc;

use super::{Pin, pinned, version};
use crate::dependencies::Dependencies;
use crate::frameworks::{self, Found, Type};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Repo, join, line_of};
use manifests::{conda_version, declared, normal, requirement, setup};

const REQUIREMENTS: &str = "requirements.txt";
const PYPROJECT: &str = "pyproject.toml";
const CONDA: [&str; 2] = ["environment.yml", "environment.yaml"];

/// Files that usually hold the application object or start the program, most usual first.
const ENTRIES: [&str; 22] = [
    "main.py",
    "app.py",
    "app/main.py",
    "src/main.py",
    "src/app.py",
    "api.py",
    "server.py",
    "run.py",
    "wsgi.py",
    "asgi.py",
    "application.py",
    "app/app.py",
    "app/__init__.py",
    "src/__init__.py",
    "api/main.py",
    "api/index.py",
    "backend/main.py",
    "server/main.py",
    "bot.py",
    "index.py",
    "hello.py",
    "streamlit_app.py",
];

/// The constructors of each framework's application object.
const CONSTRUCTORS: [(&str, &[&str]); 22] = [
    ("fastapi", &["FastAPI("]),
    ("langserve", &["FastAPI("]),
    ("starlette", &["Starlette("]),
    ("litestar", &["Litestar(", "Starlite("]),
    ("flask", &["Flask("]),
    ("quart", &["Quart("]),
    ("sanic", &["Sanic("]),
    ("dash", &["Dash(", "dash.Dash("]),
    ("fasthtml", &["FastHTML(", "fast_app("]),
    ("blacksheep", &["Application("]),
    ("falcon", &["falcon.App(", "falcon.asgi.App(", "App(", "falcon.API("]),
    ("emmett", &["App("]),
    ("connexion", &["connexion.AsyncApp(", "connexion.FlaskApp(", "AsyncApp(", "FlaskApp(", "connexion.App("]),
    ("eve", &["Eve("]),
    ("celery", &["Celery("]),
    ("faust", &["faust.App(", "App("]),
    ("huey", &["RedisHuey(", "SqliteHuey(", "Huey("]),
    ("dramatiq", &["RedisBroker(", "RabbitmqBroker("]),
    ("mesop", &["me.page("]),
    ("arq", &["WorkerSettings"]),
    ("masonite", &["Application("]),
    ("hug", &["hug.API("]),
];

pub fn is_there(repo: &Repo<'_>) -> Option<String> {
    let marker = repo.first(&[
        REQUIREMENTS,
        PYPROJECT,
        "Pipfile",
        "setup.py",
        "uv.lock",
        "poetry.lock",
        "pdm.lock",
        "manage.py",
        CONDA[0],
        CONDA[1],
        "requirements/production.txt",
        "requirements/prod.txt",
        "requirements/base.txt",
        "mkdocs.yml",
        "pelicanconf.py",
        "setup.cfg",
    ]);
    let marker = marker.map(str::to_owned).or_else(|| repo.ending("", "requirements.in"));
    marker.or_else(|| repo.first(&ENTRIES[..10]).filter(|_| !repo.has("package.json")).map(str::to_owned))
}

pub fn detect(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = is_there(repo).unwrap_or_default();
    draft.language("python", Source::file(&marker));
    let project = Project::read(repo)?;
    project.version(repo, draft);
    project.install(repo, draft);
    let dependencies = &project.dependencies;
    let found = frameworks::find("python", dependencies, repo);
    match &found {
        Some(found) => project.framework(repo, draft, found),
        None => project.plain(repo, draft),
    }
    if draft.plan.processes.contains_key("web") {
        let at = found.as_ref().map_or_else(|| Source::file(&marker), Found::source);
        draft.default_port(found.as_ref(), 8000, at);
    }
    dependencies.conclude("python", draft);
    if draft.plan.build.release.is_none() && dependencies.has("alembic") && repo.has("alembic.ini") {
        draft.release("alembic upgrade head", Source::file("alembic.ini"), "Alembic's migrations");
    }
    Ok(())
}

struct Project {
    pyproject: Option<toml::Table>,
    pyproject_text: Rc<str>,
    dependencies: Dependencies,
    requirements: Option<String>,
}

impl Project {
    fn read(repo: &Repo<'_>) -> Result<Self, PlanError> {
        let pyproject = repo.toml(PYPROJECT)?;
        let mut all = Dependencies::default();
        let requirements =
            repo.first(&[REQUIREMENTS, "requirements/production.txt", "requirements/prod.txt", "requirements/base.txt"]);
        let mut waiting: Vec<String> = requirements.map(str::to_owned).into_iter().collect();
        let mut seen = BTreeSet::new();
        while let Some(file) = waiting.pop().filter(|_| seen.len() < 10) {
            // Files may name each other, and themselves.
            if !seen.insert(file.clone()) {
                continue;
            }
            for (index, line) in repo.text(&file).lines().enumerate() {
                let line = line.trim();
                if let Some(other) = line.strip_prefix("-r ").or_else(|| line.strip_prefix("--requirement ")) {
                    let folder = file.rsplit_once('/').map_or("", |(folder, _)| folder);
                    waiting.push(join(folder, other.trim().trim_start_matches("./")));
                } else {
                    requirement(&mut all, line, &file, Some(index + 1));
                }
            }
        }
        let text = repo.text(PYPROJECT);
        if let Some(table) = &pyproject {
            declared(table, &text, &mut all);
        }
        if let Some(table) = repo.toml("Pipfile")? {
            let text = repo.text("Pipfile");
            for name in table.get("packages").and_then(toml::Value::as_table).into_iter().flat_map(|all| all.keys()) {
                all.add(&normal(name), "Pipfile", line_of(&text, name));
            }
        }
        for file in CONDA {
            let text = repo.text(file);
            for (index, line) in text.lines().enumerate() {
                if let Some(item) = line.trim().strip_prefix("- ") {
                    requirement(&mut all, item.trim_matches(['"', '\'']), file, Some(index + 1));
                }
            }
        }
        for file in ["setup.py", "setup.cfg"] {
            setup(&repo.text(file), file, &mut all);
        }
        Ok(Self { pyproject, pyproject_text: text, dependencies: all, requirements: requirements.map(str::to_owned) })
    }

    fn get(&self, path: &[&str]) -> Option<&toml::Value> {
        let (first, rest) = path.split_first()?;
        rest.iter().try_fold(self.pyproject.as_ref()?.get(*first)?, |value, name| value.get(name))
    }

    fn version(&self, repo: &Repo<'_>, draft: &mut Draft) {
        let at = |text: &str| (PYPROJECT, line_of(&self.pyproject_text, text));
        let pin = pinned(repo, &["python"], &[(".python-version", ""), ("runtime.txt", "python-")]).or_else(|| {
            let pipfile = repo.toml("Pipfile").ok().flatten()?;
            let requires = pipfile.get("requires")?;
            let version = requires.get("python_full_version").or_else(|| requires.get("python_version"))?.as_str()?;
            Some(Pin::new(version, "Pipfile", line_of(&repo.text("Pipfile"), "python_")))
        });
        let pin = pin.or_else(|| conda_version(repo)).or_else(|| {
            let (value, (file, line)) = self
                .get(&["project", "requires-python"])
                .map(|value| (value, at("requires-python")))
                .or_else(|| self.get(&["tool", "poetry", "dependencies", "python"]).map(|value| (value, at("python ="))))?;
            Some(Pin::new(value.as_str()?, file, line))
        });
        version(draft, "python", pin);
    }

    fn install(&self, repo: &Repo<'_>, draft: &mut Draft) {
        let tool = |name: &str| self.get(&["tool", name]).is_some();
        let locks = [("uv.lock", "uv"), ("poetry.lock", "poetry"), ("pdm.lock", "pdm"), ("Pipfile.lock", "pipenv")];
        let locks: Vec<_> = locks.into_iter().filter(|(file, _)| repo.has(file)).collect();
        let declared = [("Pipfile", "pipenv", repo.has("Pipfile"))]
            .into_iter()
            .chain(["uv", "poetry", "pdm"].map(|name| (PYPROJECT, name, tool(name))))
            .find_map(|(file, name, there)| there.then_some((file, name)));
        let conda = repo.first(&CONDA);
        let (file, manager, reason) = match (locks.first(), declared, conda, &self.requirements) {
            (Some((file, name)), ..) => (*file, *name, "its lockfile exists"),
            (None, Some((file, name)), ..) => (file, name, "set up in this file"),
            (None, None, Some(file), _) => (file, "conda", "a conda environment"),
            (None, None, None, Some(file)) => (file.as_str(), "pip", "lists the dependencies"),
            _ if tool("hatch") || repo.has("hatch.toml") => (PYPROJECT, "hatch", "set up in this file"),
            _ => match repo.first(&[PYPROJECT, "setup.py", "setup.cfg"]) {
                Some(file) if file != PYPROJECT || self.get(&["project"]).is_some() => {
                    (file, "pip", "a package without a lockfile")
                }
                _ => return,
            },
        };
        draft.package_manager(manager, Source::file(file), reason);
        if locks.len() > 1 {
            let files: Vec<_> = locks.iter().map(|(file, _)| *file).collect();
            draft.add_question(
                "detection.package_manager",
                &format!("found lockfiles of several package managers ({}); using {manager}", files.join(", ")),
                &format!("[build]\ninstall = \"{}\"", command(locks[1].1, true, "")),
            );
        }
        let is_locked = !locks.is_empty();
        draft.install(
            &command(manager, is_locked, file),
            Source::file(file),
            if is_locked { "the versions in the lockfile" } else { "the dependencies it names" },
        );
        match manager {
            "poetry" => draft.plan.build.env.insert("POETRY_VIRTUALENVS_IN_PROJECT".into(), "true".into()),
            "pipenv" => draft.plan.build.env.insert("PIPENV_VENV_IN_PROJECT".into(), "1".into()),
            _ => None,
        };
    }

    fn framework(&self, repo: &Repo<'_>, draft: &mut Draft, found: &Found) {
        draft.found(found);
        let row = found.framework;
        match row.name {
            "django" | "wagtail" => return self.django(repo, draft),
            "mkdocs" => {
                draft.build("mkdocs build", found.source(), "how MkDocs makes the pages");
                return draft.files(found, "site");
            }
            "sphinx" => {
                let folder = if repo.has("docs/conf.py") { "docs" } else { "." };
                draft.build(&format!("sphinx-build -b html {folder} _build/html"), found.source(), "how Sphinx makes the pages");
                return draft.files(found, "_build/html");
            }
            "pelican" | "nikola" | "lektor" => {
                let command = match row.name {
                    "pelican" => "pelican content",
                    "nikola" => "nikola build",
                    _ => "lektor build --output-path output",
                };
                draft.build(command, found.source(), "how it makes the pages");
                return draft.files(found, row.output.unwrap_or("output"));
            }
            _ => {}
        }
        let constructors = CONSTRUCTORS.iter().find(|(name, _)| *name == row.name).map_or(&[][..], |(_, all)| *all);
        let object = self.object(repo, constructors);
        let template = self.template(row.name, object.as_ref()).unwrap_or_else(|| row.start.unwrap_or_default().to_owned());
        let process = if row.kind == Type::Worker { "worker" } else { "web" };
        let reason = format!("how {} is started", row.title);
        if template.contains("{object}") || (template.contains("{module}") && !constructors.is_empty()) {
            let Some(object) = object else {
                let names = constructors.first().copied().unwrap_or("an application object");
                draft.add_question(
                    &format!("processes.{process}"),
                    &format!("no file with an object made by {names}…) was found among {} and others", ENTRIES[..6].join(", ")),
                    &format!(
                        "[processes]\n{process} = \"{}\"",
                        template.replace("{object}", "module:app").replace("{module}", "module")
                    ),
                );
                return;
            };
            let command = template.replace("{object}", &object.name()).replace("{module}", &object.module);
            let source = Source { file: &object.file, line: Some(object.line) };
            if object.file.starts_with("src/") {
                draft.plan.build.env.insert("PYTHONPATH".into(), "src".into());
            }
            draft.process(process, &command, source, "the application object", 0.95);
        } else if template.contains("{file}") || template.contains("{module}") {
            let import = format!("import {}", row.signs.first().and_then(|parts| parts.first()).copied().unwrap_or(row.name));
            let Some((file, line)) = entry(repo, &import) else {
                draft.add_question(
                    &format!("processes.{process}"),
                    "no file that starts the program was found",
                    &format!(
                        "[processes]\n{process} = \"{}\"",
                        template.replace("{file}", "main.py").replace("{module}", "main")
                    ),
                );
                return;
            };
            let command = template.replace("{file}", &file).replace("{module}", &module(&file));
            draft.process(process, &command, Source { file: &file, line }, "a file of this name usually starts it", 0.8);
        } else if template.is_empty() {
            self.plain(repo, draft);
        } else {
            draft.process(process, &template, found.source(), &reason, 0.9);
        }
    }

    /// A command that follows from a server among the dependencies, or from how the object is made.
    fn template(&self, framework: &str, object: Option<&Object>) -> Option<String> {
        let has = |name: &str| self.dependencies.has(name);
        let factory = object.is_some_and(|object| object.is_factory);
        let wsgi = matches!(framework, "flask" | "falcon" | "eve" | "mesop");
        let asgi = matches!(framework, "fastapi" | "starlette" | "litestar" | "quart" | "blacksheep" | "langserve" | "connexion");
        let of = "{object}";
        // Dash's own server is a variable beside the application.
        if framework == "dash" {
            let server = object.filter(|object| object.has_server)?;
            return has("gunicorn").then(|| format!("gunicorn --bind 0.0.0.0:$PORT {}:server", server.module));
        }
        if wsgi && has("gunicorn") {
            return Some(
                format!("gunicorn --bind 0.0.0.0:$PORT '{of}{}'", if factory { "()" } else { "" })
                    .replace('\'', if factory { "'" } else { "" }),
            );
        }
        if wsgi && has("waitress") {
            return Some(format!("waitress-serve --host 0.0.0.0 --port $PORT {}{of}", if factory { "--call " } else { "" }));
        }
        if asgi && !has("uvicorn") {
            for (server, command) in [
                ("hypercorn", "hypercorn --bind 0.0.0.0:$PORT {object}"),
                ("granian", "granian --interface asgi --host 0.0.0.0 --port $PORT {object}"),
                ("daphne", "daphne -b 0.0.0.0 -p $PORT {object}"),
            ] {
                if has(server) {
                    return Some(command.into());
                }
            }
        }
        (factory && asgi).then(|| "uvicorn --factory {object} --host 0.0.0.0 --port $PORT".into())
    }

    /// Where an application object is made: in the usual files first, then anywhere near the top.
    fn object(&self, repo: &Repo<'_>, constructors: &[&str]) -> Option<Object> {
        if constructors.is_empty() {
            return None;
        }
        let usual = ENTRIES.iter().filter(|file| repo.has(file)).map(|file| (*file).to_owned());
        let packages = repo.folders("").into_iter().chain(repo.folders("src")).filter(|folder| !is_beside(folder));
        let near = repo.all_ending("", ".py").into_iter().chain(packages.take(12).flat_map(|folder| {
            [
                "main.py",
                "app.py",
                "__init__.py",
                "server.py",
                "api.py",
                "wsgi.py",
                "asgi.py",
                "worker.py",
                "celery.py",
                "tasks.py",
            ]
            .map(|name| join(&folder, name))
        }));
        let files: Vec<String> = usual.chain(near).take(80).collect();
        files
            .iter()
            .find_map(|file| object_in(file, &repo.text(file), constructors, false))
            .or_else(|| files.iter().find_map(|file| object_in(file, &repo.text(file), constructors, true)))
    }

    /// Without a framework: a script that is declared, or a file that usually starts a program.
    fn plain(&self, repo: &Repo<'_>, draft: &mut Draft) {
        if let Some((file, line)) = entry(repo, "import") {
            let text = repo.text(&file);
            let serves = [
                "http.server",
                "HTTPServer",
                "aiohttp",
                "socketserver",
                "wsgiref",
                "asyncio.start_server",
                "uvicorn.run",
                ".serve_forever(",
            ]
            .iter()
            .find_map(|module| line_of(&text, module));
            let name = if serves.is_some() { "web" } else { "worker" };
            let command = match file.strip_suffix("/__main__.py") {
                Some(package) => format!("python -m {}", package.trim_start_matches("src/").replace('/', ".")),
                None => format!("python {file}"),
            };
            draft.process(
                name,
                &command,
                Source { file: &file, line: serves.or(line) },
                "a file of this name usually starts it",
                0.6,
            );
            if serves.is_none() {
                draft.add_question(
                    "processes.web",
                    &format!("{file} does not look like a server; treated as a worker"),
                    &format!("[processes]\nweb = \"{command}\""),
                );
            }
            return;
        }
        let scripts = self.get(&["project", "scripts"]).or_else(|| self.get(&["tool", "poetry", "scripts"]));
        if let Some(name) = scripts.and_then(toml::Value::as_table).and_then(|scripts| scripts.keys().next()) {
            let source = Source::line(PYPROJECT, &self.pyproject_text, name);
            draft.process("worker", name, source, "a script of the project", 0.5);
            draft.add_question(
                "processes.web",
                &format!("the script `{name}` is treated as a worker"),
                &format!("[processes]\nweb = \"{name}\""),
            );
        } else if repo.first(&[PYPROJECT, "setup.py", "setup.cfg"]).is_some() {
            draft.kind(Kind::Library);
        }
    }

    fn django(&self, repo: &Repo<'_>, draft: &mut Draft) {
        let has = |name: &str| self.dependencies.find(name);
        // The package that holds wsgi.py is the project's.
        let project = repo
            .folders("")
            .into_iter()
            .chain(repo.folders("src"))
            .find(|folder| repo.has(&join(folder, "wsgi.py")) || repo.has(&join(folder, "asgi.py")));
        let name = project.as_ref().map(|project| project.trim_start_matches("src/").replace('/', "."));
        let servers = [
            ("daphne", "daphne -b 0.0.0.0 -p $PORT {}.asgi:application", "Django's ASGI application under daphne"),
            ("gunicorn", "gunicorn --bind 0.0.0.0:$PORT {}.wsgi", "Django's WSGI application under gunicorn"),
            (
                "granian",
                "granian --interface wsgi --host 0.0.0.0 --port $PORT {}.wsgi:application",
                "Django's WSGI application under granian",
            ),
            ("uvicorn", "uvicorn {}.asgi:application --host 0.0.0.0 --port $PORT", "Django's ASGI application under uvicorn"),
            (
                "waitress",
                "waitress-serve --host 0.0.0.0 --port $PORT {}.wsgi:application",
                "Django's WSGI application under waitress",
            ),
            ("uwsgi", "uwsgi --http-socket 0.0.0.0:$PORT --module {}.wsgi", "Django's WSGI application under uWSGI"),
        ];
        let server = servers.iter().find_map(|(package, command, reason)| Some((has(package)?, command, reason)));
        match (&name, server) {
            (Some(name), Some((dependency, command, reason))) => {
                let source = Source { file: &dependency.file, line: dependency.line };
                draft.process("web", &command.replace("{}", name), source, reason, 0.95);
            }
            _ => {
                draft.process(
                    "web",
                    "python manage.py runserver --noreload 0.0.0.0:$PORT",
                    Source::file("manage.py"),
                    "Django's own server",
                    0.6,
                );
                let name = name.as_deref().unwrap_or("project");
                draft.add_question(
                    "processes.web",
                    "Django's own server is for development; no gunicorn is among the dependencies",
                    &format!("[processes]\nweb = \"gunicorn --bind 0.0.0.0:$PORT {name}.wsgi\""),
                );
            }
        }
        if let (Some(name), Some(celery)) = (&name, has("celery"))
            && project.as_ref().is_some_and(|project| repo.has(&join(project, "celery.py")))
        {
            let source = Source { file: &celery.file, line: celery.line };
            draft.process("worker", &format!("celery --app {name} worker"), source, "Celery beside Django", 0.8);
        }
        if repo.has("manage.py") {
            draft.release("python manage.py migrate --noinput", Source::file("manage.py"), "Django's migrations");
        }
        for file in ["settings.py", "settings/base.py", "settings/production.py"] {
            let Some(file) = project.as_ref().map(|project| join(project, file)) else { break };
            if let Some(line) = repo.text(&file).lines().position(|line| line.starts_with("STATIC_ROOT")) {
                let source = Source { file: &file, line: Some(line + 1) };
                draft.build("python manage.py collectstatic --noinput", source, "STATIC_ROOT is set");
                break;
            }
        }
    }
}

/// The install command of a package manager.
fn command(manager: &str, is_locked: bool, file: &str) -> String {
    match (manager, is_locked) {
        ("uv", true) => "uv sync --frozen --no-dev".into(),
        ("uv", false) => "uv sync --no-dev".into(),
        ("poetry", _) => "poetry install --only main --no-root --no-interaction".into(),
        ("pdm", true) => "pdm install --prod --frozen-lockfile --no-editable".into(),
        ("pdm", false) => "pdm install --prod --no-editable".into(),
        ("pipenv", true) => "pipenv install --deploy".into(),
        ("pipenv", false) => "pipenv install".into(),
        ("conda", _) => format!("conda env create --yes --prefix ./.venv --file {file}"),
        _ if file.ends_with(".txt") => format!("python3 -m venv .venv && .venv/bin/pip install -r {file}"),
        _ => "python3 -m venv .venv && .venv/bin/pip install .".into(),
    }
}

/// An application object: `file:line` makes `name`.
struct Object {
    file: String,
    line: usize,
    module: String,
    variable: String,
    is_factory: bool,
    /// Whether its file names a WSGI server beside it.
    has_server: bool,
}

impl Object {
    /// `package.module:name`
    fn name(&self) -> String {
        format!("{}:{}", self.module, self.variable)
    }
}

/// Finds `name = Constructor(`, or `def create_app(` in a file that uses the constructor.
fn object_in(file: &str, text: &str, constructors: &[&str], factories: bool) -> Option<Object> {
    let made = |line: usize, variable: &str, is_factory| Object {
        file: file.to_owned(),
        line,
        module: module(file),
        variable: variable.to_owned(),
        is_factory,
        has_server: text.lines().any(|line| line.starts_with("server = ") || line.starts_with("server=")),
    };
    let plain = |name: &str| !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_');
    let is_made_here = factories && constructors.iter().any(|constructor| text.contains(constructor));
    for (index, line) in text.lines().enumerate() {
        if line.starts_with([' ', '\t', '#']) {
            continue;
        }
        if factories {
            let function =
                line.strip_prefix("def ").or_else(|| line.strip_prefix("async def ")).and_then(|rest| rest.split('(').next());
            if let Some(name) = function.filter(|name| ["create_app", "make_app", "get_app", "app_factory"].contains(name))
                && is_made_here
            {
                return Some(made(index + 1, name, true));
            }
            continue;
        }
        let Some((name, rest)) = line.split_once('=') else { continue };
        let name = name.split([':', ',']).next().unwrap_or_default().trim();
        if plain(name) && constructors.iter().any(|constructor| rest.trim_start().starts_with(constructor)) {
            return Some(made(index + 1, name, false));
        }
    }
    None
}

fn module(file: &str) -> String {
    file.trim_end_matches(".py").trim_end_matches("/__init__").trim_start_matches("src/").replace('/', ".")
}

/// The file that starts the program: a usual one that has the sign in it, else the first usual one.
fn entry(repo: &Repo<'_>, sign: &str) -> Option<(String, Option<usize>)> {
    let there: Vec<&str> = ENTRIES.iter().copied().filter(|file| repo.has(file) && !file.ends_with("__init__.py")).collect();
    let signed = |file: &str| line_of(&repo.text(file), sign).map(|line| (file.to_owned(), Some(line)));
    let usual = there.iter().find_map(|file| signed(file)).or_else(|| there.first().map(|file| ((*file).to_owned(), None)));
    usual
        .or_else(|| {
            let packages = repo.folders("src").into_iter().chain(repo.folders(""));
            packages
                .filter(|folder| !is_beside(folder))
                .map(|folder| join(&folder, "__main__.py"))
                .find(|file| repo.has(file))
                .map(|file| (file, None))
        })
        .or_else(|| {
            let files = repo.all_ending("", ".py");
            let programs: Vec<_> = files
                .iter()
                .filter(|file| !matches!(file.as_str(), "setup.py" | "conftest.py" | "noxfile.py" | "tasks.py"))
                .collect();
            match programs.as_slice() {
                [only] => Some(((*only).clone(), None)),
                many => {
                    many.iter().find_map(|file| line_of(&repo.text(file), "__main__").map(|line| ((*file).clone(), Some(line))))
                }
            }
        })
}

/// Folders that never contain an application.
fn is_beside(folder: &str) -> bool {
    ["test", "doc", "example", "script", "static", "template", "migration"]
        .iter()
        .any(|word| folder.rsplit('/').next().unwrap_or(folder).starts_with(word))
}
