//! Rust with Cargo; Zola and mdBook.

use super::{Pin, pinned, version};
use crate::dependencies::Dependencies;
use crate::frameworks::{self, Found, Type};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Repo, join, line_of};

const FILE: &str = "Cargo.toml";
/// More programs of one package are not looked at.
const MAX_BINARIES: usize = 200;

pub fn is_there(repo: &Repo<'_>) -> Option<String> {
    let zola = || repo.first(&["config.toml"]).filter(|_| repo.has("content/_index.md") || repo.has("templates/index.html"));
    repo.first(&[FILE, "book.toml"]).or_else(zola).map(str::to_owned)
}

pub fn detect(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let marker = is_there(repo).unwrap_or_default();
    let manifest = repo.toml(FILE)?;
    let text = repo.text(FILE);
    draft.language("rust", Source::file(&marker));
    let mut dependencies = Dependencies::default();
    if let Some(manifest) = &manifest {
        collect(manifest, FILE, &text, &mut dependencies);
    }
    let found = frameworks::find("rust", &dependencies, repo);
    if let Some(found) = &found {
        draft.found(found);
        let pages = match found.framework.name {
            "zola" => Some("zola build"),
            "mdbook" if manifest.is_none() => Some("mdbook build"),
            "leptos-csr" | "yew" | "dioxus" | "sycamore" if repo.has("index.html") || repo.has("Trunk.toml") => {
                Some("trunk build --release")
            }
            "dioxus" if repo.has("Dioxus.toml") => Some("dx build --release --platform web"),
            _ => None,
        };
        if let Some(command) = pages {
            draft.build(command, found.source(), &format!("how {} is built", found.framework.title));
            draft.files(found, found.framework.output.unwrap_or("dist"));
            return Ok(());
        }
    }
    let Some(manifest) = manifest else { return Ok(()) };
    draft.package_manager("cargo", Source::file(FILE), "Cargo.toml exists");
    let channel = || {
        let table = repo.toml("rust-toolchain.toml").ok()??;
        let channel = table.get("toolchain")?.get("channel")?.as_str()?.to_owned();
        Some(Pin::new(&channel, "rust-toolchain.toml", line_of(&repo.text("rust-toolchain.toml"), "channel")))
    };
    let least = || {
        let wanted = manifest.get("package")?.get("rust-version")?.as_str()?;
        Some(Pin::new(wanted, FILE, line_of(&text, "rust-version")))
    };
    version(draft, "rust", channel().or_else(|| pinned(repo, &["rust"], &[("rust-toolchain", "")])).or_else(least));
    programs(repo, &manifest, found.as_ref(), draft);
    dependencies.conclude("rust", draft);
    Ok(())
}

fn collect(manifest: &toml::Table, file: &str, text: &str, all: &mut Dependencies) {
    let workspace = manifest.get("workspace").and_then(toml::Value::as_table);
    for table in [Some(manifest), workspace].into_iter().flatten() {
        for name in table.get("dependencies").and_then(toml::Value::as_table).into_iter().flat_map(|all| all.keys()) {
            all.add(
                name,
                file,
                line_of(text, &format!("{name} ="))
                    .or_else(|| line_of(text, &format!("{name}.")))
                    .or_else(|| line_of(text, name)),
            );
        }
    }
}

fn programs(repo: &Repo<'_>, manifest: &toml::Table, found: Option<&Found>, draft: &mut Draft) {
    let locked = if repo.has("Cargo.lock") { " --locked" } else { "" };
    let mut bins = bins(repo, "", manifest);
    if manifest.get("package").is_none() {
        // Of a workspace, every member that makes a program.
        for folder in crate::workspace::globbed(repo, &crate::workspace::cargo_members(manifest)).into_iter().take(60) {
            let Ok(Some(member)) = repo.folder(&folder).toml(FILE) else { continue };
            bins.extend(self::bins(&repo.folder(&folder), &folder, &member));
        }
    }
    let default = manifest.get("package").and_then(|package| package.get("default-run")?.as_str());
    let usual = |bin: &Bin| {
        let usual = ["server", "web", "api", "app"].iter().position(|name| bin.name.ends_with(name));
        (default != Some(&bin.name), usual.map_or(9, |at| at))
    };
    let Some(bin) = bins.iter().min_by_key(|bin| usual(bin)) else { return draft.kind(Kind::Library) };
    let which = if bins.iter().filter(|other| other.folder == bin.folder).count() > 1 {
        format!(" --bin {}", bin.name)
    } else {
        String::new()
    };
    let path = if bin.folder.is_empty() { "." } else { &bin.folder };
    let source = Source { file: &bin.file, line: bin.line };
    let leptos = found.is_some_and(|found| found.framework.name == "leptos");
    let command = if leptos {
        format!("cargo leptos build --release && install -D target/release/{0} bin/{0}", bin.name)
    } else {
        format!("cargo install{locked} --path {path} --root .{which}")
    };
    draft.build(&command, source, "Cargo builds it into bin/");
    let is_worker = found.is_some_and(|found| found.framework.kind == Type::Worker);
    let serves = is_worker || found.is_some() || repo.text(&bin.main).contains("TcpListener");
    let start = format!("./bin/{}", bin.name);
    let start = found.and_then(|found| found.framework.start).map_or(start.clone(), |template| template.replace("{bin}", &start));
    let confidence = if bins.len() == 1 { 0.9 } else { 0.5 };
    if is_worker {
        return draft.process("worker", &start, source, "what the build makes", confidence);
    }
    if found.is_none() {
        draft.kind(Kind::Web);
    }
    draft.process("web", &start, source, "what the build makes", if serves { confidence } else { 0.5 });
    match super::port_in(&repo.text(&bin.main)) {
        Some((port, line)) => {
            draft.port(port, Source { file: &bin.main, line: Some(line) }, "default beside PORT in this file", 0.9);
        }
        None => draft.default_port(found, 8080, found.map_or(source, Found::source)),
    }
    if bins.len() > 1 && default.is_none() {
        let all: Vec<_> = bins.iter().map(|bin| bin.name.as_str()).collect();
        let other = all.iter().find(|name| **name != bin.name).copied().unwrap_or_default();
        draft.add_question(
            "processes.web",
            &format!("found several programs ({}); using {}", all.join(", "), bin.name),
            &format!("[processes]\nweb = \"./bin/{other}\"\n\n[build]\nbuild = \"cargo install{locked} --path {path} --root . --bin {other}\""),
        );
    }
}

/// A program that a package makes.
struct Bin {
    /// The package's folder.
    folder: String,
    name: String,
    /// Where it is said, and where it begins.
    file: String,
    line: Option<usize>,
    main: String,
}

fn bins(repo: &Repo<'_>, folder: &str, manifest: &toml::Table) -> Vec<Bin> {
    let Some(package) = manifest.get("package").and_then(|package| package.get("name")?.as_str()) else { return Vec::new() };
    let text = repo.text(FILE);
    let file = join(folder, FILE);
    let bin = |name: &str, main: &str, needle: &str| Bin {
        folder: folder.to_owned(),
        name: name.to_owned(),
        file: file.clone(),
        line: line_of(&text, needle),
        main: join(folder, main),
    };
    let mut all: Vec<Bin> = Vec::new();
    for declared in manifest.get("bin").and_then(toml::Value::as_array).into_iter().flatten().take(MAX_BINARIES) {
        if let Some(name) = declared.get("name").and_then(toml::Value::as_str) {
            let main = declared.get("path").and_then(toml::Value::as_str).unwrap_or("src/main.rs");
            all.push(bin(name, main, &format!("\"{name}\"")));
        }
    }
    if repo.has("src/main.rs") && !all.iter().any(|known| known.main.ends_with("src/main.rs")) {
        all.push(bin(package, "src/main.rs", "name ="));
    }
    for path in repo.all_ending("src/bin", ".rs").into_iter().take(MAX_BINARIES) {
        let name = path.trim_start_matches("src/bin/").trim_end_matches(".rs").to_owned();
        if !all.iter().any(|known| known.name == name) {
            all.push(bin(&name, &path, "[package]"));
        }
    }
    all
}
