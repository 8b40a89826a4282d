//! Plans of hostile repositories: paths out of the folder, cycles, and unlimited sizes.

use std::os::unix::fs::symlink;

use capsule_buildplan::{Folder, ImageOptions, Memory, affected, dockerfile, plan};

fn of(files: Vec<(String, Vec<u8>)>) -> Result<capsule_buildplan::Plan, capsule_buildplan::PlanError> {
    plan(&Memory::new(files))
}

fn pom(modules: &[&str]) -> Vec<u8> {
    let modules: String = modules.iter().map(|module| format!("<module>{module}</module>")).collect();
    format!("<project><artifactId>a</artifactId><version>1</version><modules>{modules}</modules></project>").into_bytes()
}

#[test]
fn cyclic_modules_end() {
    for modules in [&["."][..], &["./"], &["a/.."], &["a", ".", "a/../."], &["a"], &["a", "b"]] {
        let files = vec![
            ("pom.xml".to_owned(), pom(modules)),
            ("a/pom.xml".to_owned(), pom(&["..", ".", "../a", "../b", "b"])),
            ("b/pom.xml".to_owned(), pom(&["../a", "../../b"])),
            ("a/b/pom.xml".to_owned(), pom(&["../..", "../b", "."])),
        ];
        of(files).unwrap_or_else(|error| panic!("{modules:?}: {error}"));
    }
    // Each level names all folders of the next by many names.
    let mut files = Vec::new();
    for depth in 0..60 {
        let folder = "m/".repeat(depth);
        files.push((format!("{folder}pom.xml"), pom(&["m", "./m", "m/.", "m/../m", "m//", "n", "."])));
        files.push((format!("{folder}n/pom.xml"), pom(&[".", "n"])));
    }
    of(files).expect("a plan");
}

#[test]
fn cycles_of_other_manifests_end() {
    let text = |text: &str| text.as_bytes().to_vec();
    for (file, content) in [
        ("requirements.txt", "-r requirements.txt\n-r ./requirements.txt\n-r ../requirements.txt\nflask\n"),
        ("settings.gradle", "include '.', ':', '..', ':..:..', '/', '/etc'\n"),
        ("package.json", "{\"workspaces\":[\".\",\"./\",\"**\",\"**/**/**/**/**/**/**/**/**\",\"..\",\"/etc/*\",\"a/../..\"]}"),
        ("pnpm-workspace.yaml", "packages: ['.', '**/**', '../*', '!**/../..']\n"),
        ("Cargo.toml", "[workspace]\nmembers = [\".\", \"..\", \"/etc\", \"*/../..\"]\nexclude = [\"**\"]\n"),
        ("pyproject.toml", "[tool.uv.workspace]\nmembers = [\".\", \"..\", \"**\"]\n"),
        ("go.work", "use .\nuse ./\nuse ./.\nuse ..\nuse ./../..\n"),
        ("lerna.json", "{\"packages\":[\".\",\"..\"]}"),
        ("rush.json", "{\"projects\":[{\"projectFolder\":\".\"},{\"projectFolder\":\"..\"}]}"),
        ("deno.json", "{\"workspace\":[\".\",\"..\"]}"),
        ("Dockerfile", "FROM a AS a\nFROM a AS a\nCMD [\"a\"]\n"),
        ("compose.yaml", "services:\n  a:\n    build: ../..\n    extends: {file: compose.yaml, service: a}\n"),
        ("capsule.toml", "[build]\nroot = \".\"\n"),
    ] {
        let files = vec![
            (file.to_owned(), text(content)),
            ("a/b/package.json".to_owned(), text("{}")),
            ("main.go".to_owned(), text("package main\n")),
        ];
        of(files).unwrap_or_else(|error| panic!("{file}: {error}"));
    }
}

/// A folder with a secret beside it, and a repository in it that tries to reach that.
#[test]
fn nothing_outside_of_the_repository_is_read() {
    let directory = tempfile::tempdir().expect("a folder");
    let other = directory.path().join("other");
    std::fs::create_dir(&other).expect("made");
    let absolute = other.display().to_string();
    for (file, content) in [
        ("Procfile", "web: SECRET\n"),
        ("package.json", "{\"name\":\"SECRET\",\"scripts\":{\"start\":\"SECRET\"},\"dependencies\":{\"express\":\"1\"}}"),
        (
            "pom.xml",
            "<project><parent><groupId>org.springframework.boot</groupId><artifactId>spring-boot-starter-parent</artifactId><version>1</version></parent><artifactId>SECRET</artifactId></project>",
        ),
        ("build.gradle", "plugins { id 'org.springframework.boot' version 'SECRET' }"),
        ("requirements.txt", "flask-SECRET\n"),
        ("Cargo.toml", "[package]\nname = \"SECRET\"\n"),
        ("pyproject.toml", "[project]\nname = \"SECRET\"\ndependencies = [\"fastapi\"]\n"),
        ("main.go", "package main // SECRET\n"),
        ("app.json", "{\"env\":{\"SECRET\":\"SECRET\"}}"),
        ("Dockerfile", "FROM a\nCMD SECRET\n"),
    ] {
        std::fs::write(other.join(file), content).expect("written");
    }
    for out in [
        "../other",
        "./../other",
        "a/../../other",
        "../../../../../../../../../../..",
        &absolute,
        &format!("/{absolute}"),
        "link",
        "deep/link",
        "up/other",
        "a/up/../../other",
    ] {
        let root = directory.path().join("repository");
        let _ = std::fs::remove_dir_all(&root);
        std::fs::create_dir_all(root.join("a")).expect("made");
        std::fs::create_dir_all(root.join("deep")).expect("made");
        for (target, name) in [("../other", "link"), ("../../other", "deep/link"), ("..", "up"), ("up", "up2"), ("../..", "a/up")]
        {
            symlink(target, root.join(name)).expect("linked");
        }
        symlink(other.join("Procfile"), root.join("Procfile")).expect("linked");
        symlink("up2/other/app.json", root.join("app.json")).expect("linked");
        symlink("link/Dockerfile", root.join("Dockerfile")).expect("linked");
        let quoted = out.replace('\\', "");
        for (file, content) in [
            ("pom.xml", String::from_utf8(pom(&[out])).expect("text")),
            ("settings.gradle", format!("include '{quoted}', '{}'\n", quoted.replace('/', ":"))),
            ("package.json", format!("{{\"workspaces\":[\"{quoted}\",\"{quoted}/*\"],\"main\":\"{quoted}/package.json\"}}")),
            ("pnpm-workspace.yaml", format!("packages: ['{quoted}', '{quoted}/**']\n")),
            ("lerna.json", format!("{{\"packages\":[\"{quoted}\"]}}")),
            ("rush.json", format!("{{\"projects\":[{{\"projectFolder\":\"{quoted}\"}}]}}")),
            ("Cargo.toml", format!("[workspace]\nmembers = [\"{quoted}\"]\n")),
            ("pyproject.toml", format!("[tool.uv.workspace]\nmembers = [\"{quoted}\"]\n")),
            ("requirements.txt", format!("-r {quoted}/requirements.txt\n--requirement {quoted}/requirements.txt\n")),
            ("go.work", format!("use ./{quoted}\nuse {quoted}\n")),
            ("deno.json", format!("{{\"workspace\":[\"{quoted}\"]}}")),
            ("compose.yaml", format!("services:\n  a:\n    build: {{context: '{quoted}', dockerfile: '{quoted}/Dockerfile'}}\n")),
            ("capsule.toml", format!("[build]\nroot = \"{quoted}\"\n")),
            ("capsule.toml", format!("[build]\ndockerfile = \"{quoted}/Dockerfile\"\n")),
            ("captain-definition", format!("{{\"dockerfilePath\":\"{quoted}/Dockerfile\"}}")),
            ("netlify.toml", format!("[build]\nbase = \"{quoted}\"\npublish = \"{quoted}\"\n")),
            ("Staticfile", format!("root: {quoted}\n")),
        ] {
            std::fs::write(root.join(file), content).expect("written");
            let tree = Folder::new(&root);
            let told = match plan(&tree) {
                Ok(plan) => {
                    let image = dockerfile(&tree, &plan, &ImageOptions::default()).map(|image| image.dockerfile);
                    format!("{plan:?}{image:?}{:?}", affected(&tree, &["package.json"]))
                }
                Err(error) => error.to_string(),
            };
            assert!(!told.contains("SECRET"), "{file} with {out}: {told}");
            std::fs::remove_file(root.join(file)).expect("removed");
        }
    }
}

#[test]
fn counts_and_sizes_are_limited() {
    let many = |piece: &dyn Fn(usize) -> String, count: usize| (0..count).map(piece).collect::<String>().into_bytes();
    let list = |name: &str, count| {
        [format!("{{\"{name}\":{{").into_bytes(), many(&|n| format!("\"d{n}\":\"1\","), count), b"\"e\":\"1\"}}".to_vec()]
            .concat()
    };
    for (file, content) in [
        ("package.json", list("dependencies", 100_000)),
        ("package.json", list("scripts", 100_000)),
        ("composer.json", list("require", 100_000)),
        ("deno.json", list("imports", 90_000)),
        ("renv.lock", list("Packages", 100_000)),
        ("app.json", list("buildpacks", 100_000)),
        (
            "composer.lock",
            [
                b"\"require\": {\n".to_vec(),
                many(&|n| format!("\"ext-a{n}\"\n"), 60_000),
                b"},\n\"provide\": {\n".to_vec(),
                many(&|n| format!("\"ext-b{n}\"\n"), 60_000),
            ]
            .concat(),
        ),
        (
            "pom.xml",
            [
                b"<project><artifactId>a</artifactId><version>1</version>".to_vec(),
                many(&|_| "<dependency><artifactId>a</artifactId></dependency>\n".into(), 40_000),
                b"</project>".to_vec(),
            ]
            .concat(),
        ),
        ("App.csproj", [b"<Project>".to_vec(), many(&|_| "<a Include='b'/>\n".into(), 100_000), b"</Project>".to_vec()].concat()),
        ("requirements.txt", many(&|n| format!("d{n}\n"), 200_000)),
        ("requirements.txt", many(&|n| format!("-r r{n}.txt\n"), 100_000)),
        ("pyproject.toml", [b"[tool.poetry.dependencies]\n".to_vec(), many(&|n| format!("d{n} = \"1\"\n"), 100_000)].concat()),
        (
            "Cargo.toml",
            [b"[package]\nname = \"a\"\n".to_vec(), many(&|n| format!("[[bin]]\nname = \"b{n}\"\n"), 50_000)].concat(),
        ),
        ("Gemfile", many(&|n| format!("gem 'g{n}'\n"), 100_000)),
        ("go.work", many(&|n| format!("use ./m{n}\n"), 100_000)),
        ("settings.gradle", many(&|n| format!("include ':m{n}'\n"), 100_000)),
        ("pnpm-workspace.yaml", [b"packages:\n".to_vec(), many(&|n| format!("- 'p{n}/**/*'\n"), 80_000)].concat()),
        ("fly.toml", [b"[processes]\n".to_vec(), many(&|n| format!("p{n} = \"a\"\n"), 100_000)].concat()),
        ("dune", many(&|_| "a\n".into(), 800_000)),
        ("app.py", many(&|_| "def create_app():\n".into(), 100_000)),
        ("Dockerfile", [b"FROM a\n".to_vec(), many(&|_| "EXPOSE 80\nCMD a\n".into(), 100_000)].concat()),
        ("compose.yaml", [b"services:\n".to_vec(), many(&|n| format!("  s{n}: {{image: redis}}\n"), 50_000)].concat()),
        (
            "render.yaml",
            [b"services:\n".to_vec(), many(&|n| format!("- {{type: worker, startCommand: c{n}}}\n"), 40_000)].concat(),
        ),
    ] {
        let extra =
            [("dune-project", ""), ("main.R", ""), ("index.php", ""), ("package.json", "{}"), ("requirements.txt", "flask\n")];
        let mut files: Vec<(String, Vec<u8>)> =
            extra.iter().map(|(path, text)| ((*path).to_owned(), text.as_bytes().to_vec())).collect();
        files.retain(|(path, _)| path != file);
        files.push((file.to_owned(), content));
        if let Ok(plan) = of(files) {
            let size = serde_json::to_string(&plan).expect("JSON").len();
            assert!(size < 700_000, "{file}: {size} bytes");
        }
    }
}
