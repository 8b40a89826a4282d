//! Smaller families of compiled languages: Swift, Dart, Haskell, Crystal, Zig, OCaml, C and C++, COBOL.

use super::{Pin, pinned, version};
use crate::dependencies::Dependencies;
use crate::frameworks::{self, Found, Type};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Repo, join, line_of};

/// A program that the build makes: web with a framework, else a worker that may be asked about.
fn program(draft: &mut Draft, found: Option<&Found>, command: &str, source: Source<'_>) {
    if let Some(found) = found {
        draft.found(found);
    }
    let is_web = found.is_some_and(|found| matches!(found.framework.kind, Type::Web | Type::Api | Type::Ssr));
    draft.process(if is_web { "web" } else { "worker" }, command, source, "what the build makes", if is_web { 0.9 } else { 0.6 });
    if is_web {
        draft.default_port(found, 8080, found.map_or(source, Found::source));
    } else if found.is_none() {
        draft.add_question(
            "processes.web",
            "no web framework detected; treated as a worker",
            &format!("[processes]\nweb = \"{command}\""),
        );
    }
}

/// Pages that the build makes.
fn pages(draft: &mut Draft, found: &Found, build: &str) {
    draft.found(found);
    draft.build(build, found.source(), &format!("how {} makes the pages", found.framework.title));
    draft.files(found, found.framework.output.unwrap_or("public"));
}

fn is_pages(found: Option<&Found>) -> Option<&Found> {
    found.filter(|found| found.framework.kind.is_files())
}

pub fn swift_is_there(repo: &Repo<'_>) -> Option<String> {
    repo.first(&["Package.swift"]).map(str::to_owned)
}

pub fn swift(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    const FILE: &str = "Package.swift";
    let text = repo.text(FILE);
    draft.language("swift", Source::file(FILE));
    draft.package_manager("swiftpm", Source::file(FILE), "Package.swift exists");
    let tools = text
        .lines()
        .next()
        .and_then(|line| line.split("swift-tools-version:").nth(1))
        .map(|wanted| Pin::new(wanted, FILE, Some(1)));
    version(draft, "swift", pinned(repo, &["swift"], &[(".swift-version", "")]).or(tools));
    let mut dependencies = Dependencies::default();
    for (index, line) in text.lines().enumerate() {
        if let Some((_, rest)) = line.split_once(".package(") {
            let url = rest.split('"').find(|word| word.contains("://") || word.starts_with("../")).unwrap_or_default();
            let name = url.trim_end_matches(".git").rsplit('/').next().unwrap_or_default();
            dependencies.add(name, FILE, Some(index + 1));
        }
    }
    let found = frameworks::find("swift", &dependencies, repo);
    if let Some(found) = is_pages(found.as_ref()) {
        pages(draft, found, "swift run --configuration release");
        return Ok(());
    }
    draft.install("swift package resolve", Source::file(FILE), "the packages it names");
    let target = text
        .split(".executableTarget(")
        .nth(1)
        .or_else(|| text.split(".executable(").nth(1))
        .and_then(|rest| rest.split('"').nth(1));
    let Some(target) = target.map(str::to_owned).or_else(|| {
        let folders = repo.folders("Sources");
        folders
            .iter()
            .find(|folder| repo.has(&join(folder, "main.swift")))
            .map(|folder| folder.trim_start_matches("Sources/").to_owned())
    }) else {
        draft.kind(Kind::Library);
        return Ok(());
    };
    let at = Source::line(FILE, &text, &format!("\"{target}\""));
    draft.build(
        &format!(
            r"swift build --configuration release && mkdir -p bin && cp .build/release/{target} bin/ && find -L .build/release -maxdepth 1 -name '*.resources' -exec cp -R {{}} bin/ \;"
        ),
        at,
        "how SwiftPM builds it",
    );
    let vapor = found.as_ref().is_some_and(|found| found.framework.name == "vapor");
    let command = if vapor {
        format!("./bin/{target} serve --env production --hostname 0.0.0.0 --port $PORT")
    } else {
        format!("./bin/{target}")
    };
    program(draft, found.as_ref(), &command, at);
    dependencies.conclude("swift", draft);
    Ok(())
}

pub fn dart_is_there(repo: &Repo<'_>) -> Option<String> {
    repo.first(&["pubspec.yaml"]).map(str::to_owned)
}

pub fn dart(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    const FILE: &str = "pubspec.yaml";
    let yaml = repo.yaml(FILE)?.unwrap_or_default();
    let text = repo.text(FILE);
    draft.language("dart", Source::file(FILE));
    draft.package_manager("pub", Source::file(FILE), "pubspec.yaml exists");
    let sdk = yaml
        .pointer("/environment/sdk")
        .and_then(serde_json::Value::as_str)
        .map(|wanted| Pin::new(wanted, FILE, line_of(&text, "sdk:")));
    version(draft, "dart", pinned(repo, &["dart"], &[]).or(sdk));
    let mut dependencies = Dependencies::default();
    for section in ["dependencies", "dev_dependencies"] {
        for (name, _) in yaml.get(section).and_then(serde_json::Value::as_object).into_iter().flatten() {
            dependencies.add(name, FILE, line_of(&text, &format!("{name}:")));
        }
    }
    let found = frameworks::find("dart", &dependencies, repo);
    if let Some(found) = is_pages(found.as_ref()) {
        version(draft, "flutter", pinned(repo, &["flutter"], &[]));
        draft.install("flutter pub get", Source::file(FILE), "the packages it names");
        pages(draft, found, "flutter build web --release");
        return Ok(());
    }
    draft.install("dart pub get", Source::file(FILE), "the packages it names");
    if let Some(found) = found.as_ref().filter(|found| found.framework.name == "dart_frog") {
        draft.build(
            "dart pub global run dart_frog_cli:dart_frog build && dart compile exe build/bin/server.dart -o bin/app",
            found.source(),
            "how Dart Frog is built",
        );
        program(draft, Some(found), "./bin/app", found.source());
        return Ok(());
    }
    let name = yaml.get("name").and_then(serde_json::Value::as_str).unwrap_or("main");
    let files = ["bin/server.dart".to_owned(), "bin/main.dart".to_owned(), format!("bin/{name}.dart")];
    match files.iter().find(|file| repo.has(file)).cloned().or_else(|| repo.ending("bin", ".dart")) {
        Some(file) => {
            draft.build(&format!("dart compile exe {file} -o bin/app"), Source::file(&file), "one program without the SDK");
            program(draft, found.as_ref(), "./bin/app", Source::file(&file));
        }
        None => draft.kind(Kind::Library),
    }
    dependencies.conclude("dart", draft);
    Ok(())
}

pub fn haskell_is_there(repo: &Repo<'_>) -> Option<String> {
    let marker = repo.first(&["stack.yaml", "cabal.project"]).map(str::to_owned);
    marker
        .or_else(|| repo.ending("", ".cabal"))
        .or_else(|| repo.first(&["package.yaml"]).filter(|file| repo.text(file).contains("ghc-options")).map(str::to_owned))
}

pub fn haskell(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = haskell_is_there(repo).unwrap_or_default();
    draft.language("haskell", Source::file(&marker));
    let stack = repo.has("stack.yaml");
    draft.package_manager(if stack { "stack" } else { "cabal" }, Source::file(&marker), "its file exists");
    let cabal = repo.ending("", ".cabal");
    let description =
        repo.first(&["package.yaml"]).map(str::to_owned).or_else(|| cabal.clone()).unwrap_or_else(|| marker.clone());
    let text = repo.text(&description);
    if let Some((index, line)) = repo
        .text("stack.yaml")
        .lines()
        .enumerate()
        .find(|(_, line)| line.starts_with("resolver:") || line.starts_with("snapshot:"))
    {
        let wanted = line.split_once(':').map_or("", |(_, rest)| rest.trim());
        version(draft, "stackage", Some(Pin::new(wanted, "stack.yaml", Some(index + 1))));
    }
    version(draft, "ghc", pinned(repo, &["ghc", "haskell"], &[]));
    let mut dependencies = Dependencies::default();
    for (index, line) in text.lines().enumerate() {
        let listed = line.trim().strip_prefix("build-depends:").unwrap_or(line);
        for part in listed.split(',') {
            let name = part.trim().trim_start_matches("- ").split([' ', '<', '>', '=', '^', ':']).next().unwrap_or_default();
            if !name.is_empty() && name.chars().all(|c| c.is_alphanumeric() || c == '-') {
                dependencies.add(name, &description, Some(index + 1));
            }
        }
    }
    let found = frameworks::find("haskell", &dependencies, repo);
    let executable = executable(&text);
    let Some(name) = executable else {
        draft.kind(Kind::Library);
        return Ok(());
    };
    if let Some(found) = is_pages(found.as_ref()) {
        let run = if stack { format!("stack build && stack exec {name} build") } else { format!("cabal run {name} -- build") };
        pages(draft, found, &run);
        return Ok(());
    }
    let command = if stack {
        "stack build --copy-bins --local-bin-path bin".to_owned()
    } else {
        format!("cabal update && cabal install exe:{name} --install-method=copy --installdir=bin --overwrite-policy=always")
    };
    let at = Source::line(&description, &text, &name);
    draft.build(&command, at, "how it is built into bin/");
    program(draft, found.as_ref(), &format!("./bin/{name}"), at);
    dependencies.conclude("haskell", draft);
    Ok(())
}

/// The name of the program: `executable name` of Cabal, or the first below `executables:` of hpack.
fn executable(text: &str) -> Option<String> {
    let cabal = text.lines().find_map(|line| line.strip_prefix("executable ").map(|name| name.trim().to_owned()));
    cabal.or_else(|| {
        let mut lines = text.lines().skip_while(|line| !line.starts_with("executables:")).skip(1);
        let name = lines.find(|line| !line.trim().is_empty())?.trim().trim_end_matches(':').to_owned();
        Some(name)
    })
}

pub fn crystal_is_there(repo: &Repo<'_>) -> Option<String> {
    repo.first(&["shard.yml"]).map(str::to_owned)
}

pub fn crystal(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    const FILE: &str = "shard.yml";
    let yaml = repo.yaml(FILE)?.unwrap_or_default();
    let text = repo.text(FILE);
    draft.language("crystal", Source::file(FILE));
    draft.package_manager("shards", Source::file(FILE), "shard.yml exists");
    let wanted = yaml.get("crystal").map(|wanted| wanted.as_str().map_or_else(|| wanted.to_string(), str::to_owned));
    version(
        draft,
        "crystal",
        pinned(repo, &["crystal"], &[(".crystal-version", "")])
            .or_else(|| Some(Pin::new(&wanted?, FILE, line_of(&text, "crystal:")))),
    );
    let mut dependencies = Dependencies::default();
    for (name, _) in yaml.get("dependencies").and_then(serde_json::Value::as_object).into_iter().flatten() {
        dependencies.add(name, FILE, line_of(&text, &format!("{name}:")));
    }
    let found = frameworks::find("crystal", &dependencies, repo);
    draft.install("shards install --production", Source::file(FILE), "the shards it names");
    let target = yaml.get("targets").and_then(serde_json::Value::as_object).and_then(|targets| targets.keys().next().cloned());
    let name = yaml.get("name").and_then(serde_json::Value::as_str).unwrap_or("app").to_owned();
    let Some(target) = target.or_else(|| (found.is_some() && repo.has(&format!("src/{name}.cr"))).then(|| name.clone())) else {
        draft.kind(Kind::Library);
        return Ok(());
    };
    let at = Source::line(FILE, &text, &target);
    let build = if yaml.get("targets").is_some() {
        format!("shards build --release --no-debug {target}")
    } else {
        format!("mkdir -p bin && crystal build --release --no-debug src/{name}.cr -o bin/{name}")
    };
    draft.build(&build, at, "how Shards builds it into bin/");
    let kemal = found.as_ref().is_some_and(|found| found.framework.name == "kemal");
    let arguments = if kemal { " --bind 0.0.0.0 --port $PORT" } else { "" };
    program(draft, found.as_ref(), &format!("./bin/{target}{arguments}"), at);
    dependencies.conclude("crystal", draft);
    Ok(())
}

pub fn zig_is_there(repo: &Repo<'_>) -> Option<String> {
    repo.first(&["build.zig", "build.zig.zon"]).map(str::to_owned)
}

pub fn zig(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = zig_is_there(repo).unwrap_or_default();
    draft.language("zig", Source::file(&marker));
    draft.package_manager("zig", Source::file(&marker), "its build file exists");
    let text = repo.text("build.zig.zon");
    let least = text.lines().enumerate().find_map(|(index, line)| {
        let (_, rest) = line.split_once(".minimum_zig_version")?;
        Some(Pin::new(rest.split('"').nth(1)?, "build.zig.zon", Some(index + 1)))
    });
    version(draft, "zig", pinned(repo, &["zig"], &[(".zigversion", ""), (".zig-version", "")]).or(least));
    let mut dependencies = Dependencies::default();
    for (index, line) in text.lines().enumerate() {
        if let Some((name, rest)) = line.trim().trim_start_matches('.').split_once('=')
            && rest.trim().starts_with(".{")
        {
            dependencies.add(name.trim().trim_start_matches("@\"").trim_end_matches('"'), "build.zig.zon", Some(index + 1));
        }
    }
    let found = frameworks::find("zig", &dependencies, repo);
    if let Some(found) = is_pages(found.as_ref()) {
        pages(draft, found, "zig build");
        return Ok(());
    }
    let build = repo.text("build.zig");
    let name =
        build.split("addExecutable(").nth(1).and_then(|rest| rest.split(".name").nth(1)).and_then(|rest| rest.split('"').nth(1));
    let Some(name) = name else {
        draft.kind(Kind::Library);
        return Ok(());
    };
    let at = Source::line("build.zig", &build, "addExecutable(");
    draft.build("zig build --release=safe", at, "how Zig builds it");
    program(draft, found.as_ref(), &format!("./zig-out/bin/{name}"), at);
    Ok(())
}

pub fn ocaml_is_there(repo: &Repo<'_>) -> Option<String> {
    repo.first(&["dune-project", "esy.json"]).map(str::to_owned).or_else(|| repo.ending("", ".opam"))
}

pub fn ocaml(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = ocaml_is_there(repo).unwrap_or_default();
    draft.language("ocaml", Source::file(&marker));
    draft.package_manager("opam", Source::file(&marker), "its file exists");
    draft.plan.detection.build_tool = Some("dune".into());
    let mut dependencies = Dependencies::default();
    let files = ["dune-project".to_owned(), "bin/dune".to_owned(), "dune".to_owned()].into_iter().chain(repo.ending("", ".opam"));
    let mut target = None;
    for file in files {
        let text = repo.text(&file);
        let is_program = file.ends_with("dune") && text.contains("(executable");
        for (index, line) in text.lines().enumerate() {
            for word in line.split(|c: char| !(c.is_alphanumeric() || matches!(c, '-' | '_'))).filter(|word| !word.is_empty()) {
                dependencies.add(word, &file, Some(index + 1));
            }
            if is_program && target.is_none() {
                let name =
                    line.split_once("(name ").map(|(_, rest)| rest.split([')', ' ']).next().unwrap_or_default().to_owned());
                target = name.map(|name| (file.trim_end_matches("dune").to_owned() + &name, file.clone(), index + 1));
            }
        }
    }
    let found = frameworks::find("ocaml", &dependencies, repo);
    draft.install("opam install . --deps-only --yes", Source::file(&marker), "the packages it names");
    let Some((path, file, line)) = target else {
        draft.kind(Kind::Library);
        return Ok(());
    };
    let source = Source { file: &file, line: Some(line) };
    draft.build("opam exec -- dune build --profile release", source, "how Dune builds it");
    program(draft, found.as_ref(), &format!("./_build/default/{path}.exe"), source);
    dependencies.conclude("ocaml", draft);
    Ok(())
}

const MANIFESTS: [&str; 8] =
    ["CMakeLists.txt", "meson.build", "conanfile.txt", "conanfile.py", "vcpkg.json", "xmake.lua", "Makefile", "makefile"];
const SOURCES: [&str; 6] = [".c", ".cpp", ".cc", ".cxx", ".h", ".hpp"];

pub fn cpp_is_there(repo: &Repo<'_>) -> Option<String> {
    let sources =
        || ["", "src", "source", "app"].iter().any(|folder| SOURCES.iter().any(|end| repo.ending(folder, end).is_some()));
    repo.first(&MANIFESTS[..6])
        .map(str::to_owned)
        .or_else(|| repo.first(&MANIFESTS[6..]).filter(|_| sources()).map(str::to_owned))
        .or_else(|| repo.first(&["main.c", "main.cpp"]).map(str::to_owned))
}

pub fn cpp(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = cpp_is_there(repo).unwrap_or_default();
    let sources: Vec<String> = ["", "src", "source", "app"]
        .iter()
        .flat_map(|folder| SOURCES[..4].iter().flat_map(|end| repo.all_ending(folder, end)))
        .take(60)
        .collect();
    let plain = !sources.is_empty() && sources.iter().all(|file| file.ends_with(".c"));
    draft.language(if plain { "c" } else { "cpp" }, Source::file(&marker));
    let mut dependencies = Dependencies::default();
    for file in MANIFESTS {
        for (index, line) in repo.text(file).lines().enumerate().filter(|(_, line)| !line.trim_start().starts_with('#')) {
            for word in line.split(|c: char| !(c.is_alphanumeric() || matches!(c, '-' | '_' | '.'))).filter(|word| word.len() > 1)
            {
                dependencies.add(word, file, Some(index + 1));
            }
        }
    }
    for file in &sources {
        for (index, line) in repo.text(file).lines().enumerate().take(80) {
            if let Some(header) = line.trim().strip_prefix("#include").map(|rest| rest.trim().trim_matches(['<', '>', '"'])) {
                dependencies.add(header, file, Some(index + 1));
            }
        }
    }
    let found = frameworks::find("cpp", &dependencies, repo);
    let sockets =
        ["sys/socket.h", "netinet/in.h", "boost/asio.hpp", "event2/http.h"].iter().find_map(|header| dependencies.find(header));
    let cmake = repo.text("CMakeLists.txt");
    let meson = repo.text("meson.build");
    if let Some(manager) = [("vcpkg.json", "vcpkg"), ("conanfile.txt", "conan"), ("conanfile.py", "conan")]
        .into_iter()
        .find(|(file, _)| repo.has(file))
    {
        draft.package_manager(manager.1, Source::file(manager.0), "its file exists");
    }
    let (tool, file, build, path) = if let Some((name, _)) = target(&cmake, "add_executable(") {
        draft.system_package("cmake", Source::file("CMakeLists.txt"), "CMake builds it");
        let variable = if name.contains("${") { cmake_project(&cmake).unwrap_or_else(|| "app".into()) } else { name };
        (
            "cmake",
            "CMakeLists.txt",
            "cmake -S . -B build -DCMAKE_BUILD_TYPE=Release && cmake --build build --parallel".to_owned(),
            format!("./build/{variable}"),
        )
    } else if let Some((name, _)) = target(&meson, "executable(") {
        draft.system_package("meson", Source::file("meson.build"), "Meson builds it");
        (
            "meson",
            "meson.build",
            "meson setup build --buildtype=release && meson compile -C build".to_owned(),
            format!("./build/{name}"),
        )
    } else if let Some(file) = repo.first(&MANIFESTS[6..]) {
        let text = repo.text(file);
        let named = text.lines().find_map(|line| {
            let (name, value) = line.split_once('=')?;
            matches!(name.trim().trim_end_matches(':'), "TARGET" | "BIN" | "PROGRAM" | "EXEC" | "NAME" | "EXECUTABLE" | "OUT")
                .then(|| value.trim().to_owned())
        });
        let first = text.lines().find_map(|line| {
            line.split_once(':')
                .map(|(name, _)| name.trim())
                .filter(|name| {
                    !name.is_empty()
                        && !name.starts_with(['.', '\t', '#', '$', '%'])
                        && !matches!(*name, "all" | "clean" | "install" | "run")
                })
                .map(str::to_owned)
        });
        ("make", file, "make".to_owned(), format!("./{}", named.or(first).unwrap_or_else(|| "app".into())))
    } else if let Some(file) = repo.first(&["main.c", "main.cpp"]) {
        let compiler = if plain { "cc" } else { "c++" };
        ("cc", file, format!("mkdir -p bin && {compiler} -O2 -o bin/app {file}"), "./bin/app".to_owned())
    } else {
        draft.kind(Kind::Library);
        return Ok(());
    };
    draft.build_tool(tool, Source::file(file), "its build file exists");
    draft.build(&build, Source::file(file), "how it is built");
    match (&found, sockets) {
        (None, Some(socket)) => {
            let source = Source { file: &socket.file, line: socket.line };
            draft.kind(Kind::Web);
            draft.process("web", &path, source, "it listens on sockets", 0.6);
            let port = sources.iter().find_map(|file| super::port_in(&repo.text(file)).map(|(port, line)| (file, port, line)));
            match port {
                Some((file, port, line)) => {
                    draft.port(port, Source { file, line: Some(line) }, "default beside PORT in this file", 0.9);
                }
                None => draft.default_port(None, 8080, source),
            }
        }
        _ => program(draft, found.as_ref(), &path, Source::file(file)),
    }
    dependencies.conclude("cpp", draft);
    Ok(())
}

/// The name of the first target of this kind, and its line.
fn target(text: &str, call: &str) -> Option<(String, usize)> {
    let mut offset = 0;
    for (index, line) in text.lines().enumerate() {
        let trimmed = line.trim_start();
        if trimmed.starts_with(call) || trimmed.contains(&format!("= {call}")) {
            let rest = &text[offset + line.find(call)? + call.len()..];
            let name = rest.trim_start().trim_start_matches(['\'', '"']);
            let end = name
                .find(|c: char| !(c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | '$' | '{' | '}')))
                .unwrap_or(name.len());
            return Some((name[..end].to_owned(), index + 1)).filter(|(name, _)| !name.is_empty());
        }
        offset += line.len() + 1;
        offset = offset.min(text.len());
        while !text.is_char_boundary(offset) {
            offset += 1;
        }
    }
    None
}

fn cmake_project(text: &str) -> Option<String> {
    let (_, rest) = text.split_once("project(")?;
    Some(rest.trim_start().split([' ', ')', '\n']).next()?.to_owned()).filter(|name| !name.is_empty())
}

pub fn cobol_is_there(repo: &Repo<'_>) -> Option<String> {
    [".cbl", ".cob", ".CBL"].iter().find_map(|end| repo.ending("", end).or_else(|| repo.ending("src", end)))
}

pub fn cobol(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let file = cobol_is_there(repo).unwrap_or_default();
    draft.language("cobol", Source::file(&file));
    draft.system_package("gnucobol", Source::file(&file), "the compiler");
    draft.build(&format!("mkdir -p bin && cobc -x -o bin/app {file}"), Source::file(&file), "how GnuCOBOL builds it");
    program(draft, None, "./bin/app", Source::file(&file));
    Ok(())
}
