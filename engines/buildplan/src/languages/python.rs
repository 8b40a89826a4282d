//! Python: pip, uv, poetry; Django, FastAPI, Flask.

use super::{first_of, toml_table};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Tree, line_of};

const REQUIREMENTS: &str = "requirements.txt";
const PYPROJECT: &str = "pyproject.toml";

/// Files that usually hold the application object or start the program.
const ENTRIES: [&str; 10] = [
    "main.py",
    "app.py",
    "app/main.py",
    "src/main.py",
    "api.py",
    "server.py",
    "wsgi.py",
    "asgi.py",
    "app/__init__.py",
    "src/app.py",
];

pub fn is_there(tree: &dyn Tree) -> Option<&'static str> {
    first_of(tree, &[REQUIREMENTS, PYPROJECT, "manage.py", "uv.lock", "poetry.lock"])
        .or_else(|| first_of(tree, &["main.py", "app.py"]).filter(|_| !tree.has("package.json")))
}

pub fn detect(tree: &dyn Tree, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = is_there(tree).unwrap_or(REQUIREMENTS);
    draft.language("python", Source::file(marker));
    let pyproject = read_pyproject(tree)?;
    if let Some(version) =
        pyproject.as_ref().and_then(|p| p.toml.get("project")?.get("requires-python")?.as_str().map(str::to_owned))
    {
        draft.version(
            "python",
            &version,
            Source::line(PYPROJECT, &pyproject.as_ref().map(|p| p.text.clone()).unwrap_or_default(), "requires-python"),
        );
    } else if let Some(text) = tree.read(".python-version") {
        draft.version("python", text.trim(), Source { file: ".python-version", line: Some(1) });
    } else if let Some(text) = tree.read("runtime.txt") {
        draft.version("python", text.trim().trim_start_matches("python-"), Source { file: "runtime.txt", line: Some(1) });
    }
    install(tree, pyproject.as_ref(), draft);
    let dependencies = Dependencies { requirements: tree.read(REQUIREMENTS), pyproject: pyproject.map(|p| p.text) };
    framework(tree, &dependencies, draft);
    for (package, need) in [
        ("psycopg", "postgresql"),
        ("asyncpg", "postgresql"),
        ("redis", "redis"),
        ("celery", "redis"),
        ("pymongo", "mongodb"),
        ("mysqlclient", "mysql"),
    ] {
        if let Some(source) = dependencies.find(package) {
            draft.need(need, source, &format!("dependency {package}"));
        }
    }
    Ok(())
}

struct Pyproject {
    text: String,
    toml: toml::Table,
}

fn read_pyproject(tree: &dyn Tree) -> Result<Option<Pyproject>, PlanError> {
    let Some(text) = tree.read(PYPROJECT) else {
        return Ok(None);
    };
    let toml = toml_table(PYPROJECT, &text)?;
    Ok(Some(Pyproject { text, toml }))
}

fn install(tree: &dyn Tree, pyproject: Option<&Pyproject>, draft: &mut Draft) {
    let poetry = pyproject.is_some_and(|p| p.toml.get("tool").is_some_and(|tool| tool.get("poetry").is_some()));
    if tree.has("uv.lock") {
        draft.package_manager("uv", Source::file("uv.lock"), "its lockfile is there");
        draft.install("uv sync --frozen --no-dev", Source::file("uv.lock"), "exactly what the lockfile says");
    } else if tree.has("poetry.lock") || poetry {
        let file = if tree.has("poetry.lock") { "poetry.lock" } else { PYPROJECT };
        draft.package_manager("poetry", Source::file(file), "its file is there");
        draft.install("poetry install --only main --no-root --no-interaction", Source::file(file), "the dependencies it names");
        draft.plan.build.env.insert("POETRY_VIRTUALENVS_IN_PROJECT".into(), "true".into());
    } else if tree.has(REQUIREMENTS) {
        draft.package_manager("pip", Source::file(REQUIREMENTS), "requirements.txt is there");
        let command = "python3 -m venv .venv && .venv/bin/pip install -r requirements.txt";
        draft.install(command, Source::file(REQUIREMENTS), "the dependencies it names");
    } else if pyproject.is_some_and(|p| p.toml.contains_key("project")) {
        draft.package_manager("pip", Source::file(PYPROJECT), "a project without a lockfile");
        draft.install("python3 -m venv .venv && .venv/bin/pip install .", Source::file(PYPROJECT), "the dependencies it names");
    }
}

struct Dependencies {
    requirements: Option<String>,
    pyproject: Option<String>,
}

impl Dependencies {
    /// Where a distribution is asked for, if it is. Names compare as PEP 503 says.
    fn find(&self, package: &str) -> Option<Source<'static>> {
        let names = |line: &str| {
            let line = line.trim().trim_start_matches(['"', '\'']).to_lowercase().replace('_', "-");
            let end = line.find(|c: char| !(c.is_ascii_alphanumeric() || c == '-' || c == '.')).unwrap_or(line.len());
            line[..end] == *package
        };
        for (file, text) in [(REQUIREMENTS, &self.requirements), (PYPROJECT, &self.pyproject)] {
            let Some(text) = text else { continue };
            for (index, line) in text.lines().enumerate() {
                let inside = line.split_once('[').map_or("", |(_, rest)| rest);
                if names(line) || inside.split(',').any(names) {
                    return Some(Source { file, line: Some(index + 1) });
                }
            }
        }
        None
    }
}

fn framework(tree: &dyn Tree, dependencies: &Dependencies, draft: &mut Draft) {
    if let Some(source) = dependencies.find("django") {
        draft.framework("django", source, "dependency django");
        django(tree, dependencies, draft);
    } else if let Some(source) = dependencies.find("fastapi") {
        draft.framework("fastapi", source, "dependency fastapi");
        draft.kind(Kind::Api);
        object(tree, "FastAPI(", draft, |module| format!("uvicorn {module} --host 0.0.0.0 --port $PORT"));
    } else if let Some(source) = dependencies.find("starlette") {
        draft.framework("starlette", source, "dependency starlette");
        object(tree, "Starlette(", draft, |module| format!("uvicorn {module} --host 0.0.0.0 --port $PORT"));
    } else if let Some(source) = dependencies.find("flask") {
        draft.framework("flask", source, "dependency flask");
        let gunicorn = dependencies.find("gunicorn").is_some();
        object(tree, "Flask(", draft, |module| {
            if gunicorn {
                format!("gunicorn --bind 0.0.0.0:$PORT {module}")
            } else {
                format!("flask --app {module} run --host 0.0.0.0 --port $PORT")
            }
        });
    } else if let Some(file) = first_of(tree, &ENTRIES) {
        let text = tree.read(file).unwrap_or_default();
        let serves = ["http.server", "aiohttp", "tornado", "socketserver", "bottle", "sanic"]
            .iter()
            .find_map(|module| line_of(&text, module));
        let name = if serves.is_some() { "web" } else { "worker" };
        draft.process(
            name,
            &format!("python {file}"),
            Source { file, line: serves },
            "a file of this name usually starts it",
            0.6,
        );
        if serves.is_none() {
            draft.ask(
                "processes.web",
                &format!("{file} does not look like a server; it was taken for a worker"),
                &format!("[processes]\nweb = \"python {file}\""),
            );
        }
    }
    if draft.plan.processes.contains_key("web") {
        draft.port(
            8000,
            Source::file(first_of(tree, &ENTRIES).unwrap_or("manage.py")),
            "the usual port of Python servers; PORT says the same",
            0.7,
        );
    }
}

/// Finds `name = Constructor(` and names it the way servers want it: `package.module:name`.
fn object(tree: &dyn Tree, constructor: &str, draft: &mut Draft, command: impl Fn(&str) -> String) {
    for file in ENTRIES {
        let Some(text) = tree.read(file) else { continue };
        for (index, line) in text.lines().enumerate() {
            let Some((name, rest)) = line.split_once('=') else { continue };
            let name = name.split(':').next().unwrap_or_default().trim();
            let plain =
                !line.starts_with([' ', '\t', '#']) && !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '_');
            if plain && rest.trim_start().starts_with(constructor) {
                let module = file.trim_end_matches(".py").trim_end_matches("/__init__").replace('/', ".");
                if draft.plan.kind == Kind::Unknown {
                    draft.kind(Kind::Web);
                }
                let source = Source { file, line: Some(index + 1) };
                draft.process("web", &command(&format!("{module}:{name}")), source, "the application object", 0.95);
                return;
            }
        }
    }
    draft.ask(
        "processes.web",
        &format!("no file with an object made by {constructor}…) was found among {}", ENTRIES.join(", ")),
        "[processes]\nweb = \"gunicorn --bind 0.0.0.0:$PORT module:app\"",
    );
}

fn django(tree: &dyn Tree, dependencies: &Dependencies, draft: &mut Draft) {
    draft.kind(Kind::Web);
    // The package that holds wsgi.py is the project's.
    let project = tree
        .list("")
        .into_iter()
        .filter_map(|name| name.strip_suffix('/').map(str::to_owned))
        .find(|folder| tree.has(&format!("{folder}/wsgi.py")));
    match (&project, dependencies.find("gunicorn")) {
        (Some(project), Some(source)) => {
            draft.process(
                "web",
                &format!("gunicorn --bind 0.0.0.0:$PORT {project}.wsgi"),
                source,
                "Django's WSGI application under gunicorn",
                0.95,
            );
        }
        _ => {
            draft.process(
                "web",
                "python manage.py runserver --noreload 0.0.0.0:$PORT",
                Source::file("manage.py"),
                "Django's own server",
                0.6,
            );
            draft.ask(
                "processes.web",
                "Django's own server is for development; no gunicorn is among the dependencies",
                "[processes]\nweb = \"gunicorn --bind 0.0.0.0:$PORT project.wsgi\"",
            );
        }
    }
    if tree.has("manage.py") {
        draft.release("python manage.py migrate --noinput", Source::file("manage.py"), "Django's migrations");
    }
    let settings = project.map(|project| format!("{project}/settings.py"));
    if let Some((file, text)) = settings.and_then(|file| tree.read(&file).map(|text| (file, text)))
        && let Some(line) = text.lines().position(|line| line.starts_with("STATIC_ROOT"))
    {
        draft.build(
            "python manage.py collectstatic --noinput",
            Source { file: &file, line: Some(line + 1) },
            "STATIC_ROOT is set",
        );
    }
}
