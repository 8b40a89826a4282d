//! Plans of small repositories.

use crate::{Kind, Memory, Plan, plan};

fn of(files: &[(&str, &str)]) -> Plan {
    plan(&Memory::new(files.iter().copied())).expect("a plan")
}

fn web(plan: &Plan) -> &str {
    plan.processes.get("web").map_or("", String::as_str)
}

const EXPRESS: &str = r#"{
  "name": "shop",
  "scripts": { "start": "node server.js" },
  "dependencies": {
    "express": "^4.19.2"
  }
}"#;

#[test]
fn express_is_started_by_its_own_script_and_the_evidence_names_the_lines() {
    let plan = of(&[("package.json", EXPRESS), ("package-lock.json", "{}"), ("server.js", "")]);
    assert_eq!(plan.kind, Kind::Web);
    assert_eq!(plan.detection.framework.as_deref(), Some("express"));
    assert_eq!(plan.build.install.as_deref(), Some("npm ci"));
    assert_eq!(web(&plan), "node server.js");
    let framework = plan.evidence.iter().find(|e| e.field == "detection.framework").expect("evidence");
    assert_eq!((framework.file.as_str(), framework.line), ("package.json", Some(5)));
    assert!(plan.questions.is_empty(), "{:?}", plan.questions);
}

#[test]
fn the_package_manager_follows_the_declaration_then_the_lockfile() {
    let install = |files: &[(&str, &str)]| of(files).build.install.unwrap_or_default();
    assert_eq!(install(&[("package.json", EXPRESS), ("pnpm-lock.yaml", "")]), "pnpm install --frozen-lockfile");
    assert_eq!(install(&[("package.json", EXPRESS), ("yarn.lock", "# yarn lockfile v1")]), "yarn install --frozen-lockfile");
    assert_eq!(install(&[("package.json", EXPRESS), ("yarn.lock", "__metadata:\n  version: 8")]), "yarn install --immutable");
    assert_eq!(install(&[("package.json", EXPRESS)]), "npm install");
    let declared = EXPRESS.replace("\"name\": \"shop\"", "\"packageManager\": \"pnpm@9.12.1\"");
    let plan = of(&[("package.json", declared.as_str()), ("yarn.lock", "")]);
    assert_eq!(plan.detection.package_manager.as_deref(), Some("pnpm"));
    assert_eq!(plan.detection.versions.get("pnpm").map(String::as_str), Some("9.12.1"));
}

#[test]
fn several_lockfiles_become_a_question() {
    let plan = of(&[("package.json", EXPRESS), ("yarn.lock", ""), ("package-lock.json", "{}")]);
    assert_eq!(plan.questions.len(), 1);
    assert_eq!(plan.questions[0].field, "detection.package_manager");
}

#[test]
fn vite_is_a_site_unless_something_else_is_started() {
    let package = r#"{"scripts": {"build": "vite build"}, "devDependencies": {"vite": "6"}}"#;
    let plan = of(&[("package.json", package)]);
    assert_eq!((plan.kind, plan.build.output.as_deref(), plan.networking.single_page), (Kind::Static, Some("dist"), true));
    let config = "export default {\n  build: { outDir: 'build/client' }\n}";
    let plan = of(&[("package.json", package), ("vite.config.js", config)]);
    assert_eq!(plan.build.output.as_deref(), Some("build/client"));
    let server = r#"{"scripts": {"build": "vite build", "start": "node server.js"}, "devDependencies": {"vite": "6"}}"#;
    assert_eq!(of(&[("package.json", server)]).kind, Kind::Web);
}

#[test]
fn next_is_a_server_or_an_export() {
    let package = r#"{"scripts": {"build": "next build", "start": "next start"}, "dependencies": {"next": "15"}}"#;
    assert_eq!(web(&of(&[("package.json", package)])), "next start");
    let plan = of(&[("package.json", package), ("next.config.mjs", "export default {\n  output: 'export',\n}")]);
    assert_eq!((plan.kind, plan.build.output.as_deref()), (Kind::Static, Some("out")));
}

#[test]
fn python_frameworks_are_started_by_the_object_they_define() {
    let fastapi = of(&[
        ("requirements.txt", "fastapi==0.115.0\nuvicorn\n"),
        ("main.py", "from fastapi import FastAPI\n\napi = FastAPI()\n"),
    ]);
    assert_eq!(web(&fastapi), "uvicorn main:api --host 0.0.0.0 --port $PORT");
    assert_eq!(fastapi.kind, Kind::Api);
    let flask = of(&[("requirements.txt", "Flask==3\ngunicorn\n"), ("app/__init__.py", "app = Flask(__name__)\n")]);
    assert_eq!(web(&flask), "gunicorn --bind 0.0.0.0:$PORT app:app");
    let django = of(&[
        ("requirements.txt", "Django>=5\ngunicorn\n"),
        ("manage.py", ""),
        ("shop/wsgi.py", ""),
        ("shop/settings.py", "DEBUG = False\nSTATIC_ROOT = 'static'\n"),
    ]);
    assert_eq!(web(&django), "gunicorn --bind 0.0.0.0:$PORT shop.wsgi");
    assert_eq!(django.build.release.as_deref(), Some("python manage.py migrate --noinput"));
    assert_eq!(django.build.build.as_deref(), Some("python manage.py collectstatic --noinput"));
}

#[test]
fn python_package_managers_are_detected_by_their_files() {
    let project = "[project]\nname = \"x\"\nrequires-python = \">=3.11\"\ndependencies = [\"fastapi\", \"uvicorn\"]\n";
    let app = ("main.py", "app = FastAPI()\n");
    let manager = |files: &[(&str, &str)]| of(files).detection.package_manager.unwrap_or_default();
    assert_eq!(manager(&[("pyproject.toml", project), ("uv.lock", ""), app]), "uv");
    assert_eq!(manager(&[("pyproject.toml", "[tool.poetry]\nname = \"x\"\n"), app]), "poetry");
    assert_eq!(manager(&[("pyproject.toml", project), app]), "pip");
    assert_eq!(web(&of(&[("pyproject.toml", project), ("uv.lock", ""), app])), "uvicorn main:app --host 0.0.0.0 --port $PORT");
}

#[test]
fn compiled_languages_are_built_into_a_program_that_is_started() {
    let go =
        of(&[("go.mod", "module x\n\ngo 1.19\n\nrequire github.com/go-chi/chi/v5 v5.0.12\n"), ("main.go", "package main\n")]);
    assert_eq!((go.build.build.as_deref(), web(&go)), (Some("go build -o bin/app ."), "./bin/app"));
    assert_eq!(go.detection.framework.as_deref(), Some("chi"));
    let two = of(&[("go.mod", "module x\n"), ("cmd/a/main.go", "package main\n"), ("cmd/b/main.go", "package main\n")]);
    assert_eq!(two.questions.len(), 1, "{:?}", two.questions);
    let rust = of(&[
        ("Cargo.toml", "[package]\nname = \"api\"\n[dependencies]\naxum = \"0.8\"\n"),
        ("Cargo.lock", ""),
        ("src/main.rs", ""),
    ]);
    assert_eq!((rust.build.build.as_deref(), web(&rust)), (Some("cargo install --locked --path . --root ."), "./bin/api"));
    let pom = "<project><parent><artifactId>spring-boot-starter-parent</artifactId><version>3.3.4</version></parent>\
               <artifactId>shop</artifactId><version>1.0.0</version></project>";
    let java = of(&[("pom.xml", pom)]);
    assert!(web(&java).ends_with("-jar target/shop-1.0.0.jar"), "{}", web(&java));
}

#[test]
fn plain_pages_are_served_without_a_build() {
    let plan = of(&[("index.html", "<h1>hi</h1>"), ("style.css", "")]);
    assert_eq!((plan.kind, plan.build.output.as_deref()), (Kind::Static, Some(".")));
}

#[test]
fn capsule_toml_overrides_the_procfile_and_both_override_detection() {
    let files =
        [("package.json", EXPRESS), ("Procfile", "web: node cluster.js\nworker: node jobs.js\nrelease: node migrate.js\n")];
    let plan = of(&files);
    assert_eq!((web(&plan), plan.processes["worker"].as_str()), ("node cluster.js", "node jobs.js"));
    assert_eq!(plan.build.release.as_deref(), Some("node migrate.js"));
    let toml = "service = \"shop\"\n[processes]\nweb = \"node main.js\"\n[networking]\nport = 9000\nhealth_check = \"/up\"\n";
    let plan = of(&[files[0], files[1], ("capsule.toml", toml)]);
    assert_eq!(
        (web(&plan), plan.networking.port, plan.networking.health_check.as_deref()),
        ("node main.js", Some(9000), Some("/up"))
    );
}

#[test]
fn a_malformed_file_is_named_with_its_line() {
    let error = |files: &[(&str, &str)]| plan(&Memory::new(files.iter().copied())).expect_err("malformed").to_string();
    assert!(error(&[("package.json", "{\n  \"name\": \"x\",\n}")]).starts_with("package.json:3: "));
    assert!(error(&[("index.html", ""), ("Procfile", "web: x\nnonsense\n")]).starts_with("Procfile:2: "));
    let toml = error(&[("index.html", ""), ("capsule.toml", "service = \"x\"\n[networking]\nprot = 80\n")]);
    assert!(toml.starts_with("capsule.toml:3: ") && toml.contains("prot"), "{toml}");
}

#[test]
fn an_unknown_repository_becomes_a_question() {
    let plan = of(&[("README.md", "# hi")]);
    assert_eq!(plan.kind, Kind::Unknown);
    assert_eq!((plan.detection.language, plan.networking.port), (None, None));
    assert_eq!(plan.questions.len(), 1);
}

#[test]
fn a_byte_order_mark_does_no_harm() {
    let plan = of(&[("package.json", &format!("\u{feff}{EXPRESS}"))]);
    assert_eq!(plan.detection.framework.as_deref(), Some("express"));
}
