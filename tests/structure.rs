//! The structure of the workspace: the dependencies between its crates, and the licences of all dependencies.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::process::Command;

use capsule_tests::root;
use serde_json::Value;

/// Licences that may be combined with Apache-2.0 in one binary.
const LICENCES: [&str; 14] = [
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "MIT",
    "MIT-0",
    "BSD-1-Clause",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "0BSD",
    "CDLA-Permissive-2.0",
    "ISC",
    "Zlib",
    "Unicode-3.0",
    "CC0-1.0",
    "Unlicense",
];
/// Other licences (data, weak copyleft per file), accepted only for these crates, whose sources are not changed.
const EXCEPTIONS: [(&str, &str); 3] =
    [("webpki-roots", "CDLA-Permissive-2.0"), ("option-ext", "MPL-2.0"), ("xxhash-rust", "BSL-1.0")];

fn metadata() -> Value {
    let output = Command::new(env!("CARGO"))
        .args(["metadata", "--format-version", "1", "--locked"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).expect("JSON")
}

/// The workspace's crates by folder, with the folders of their dependencies (without dev-dependencies).
fn graph() -> BTreeMap<String, BTreeSet<String>> {
    let metadata = metadata();
    let folder = |path: &str| Path::new(path).strip_prefix(root()).expect("in the repository").display().to_string();
    let mut graph = BTreeMap::new();
    for package in metadata["packages"].as_array().expect("a list").iter().filter(|package| package["source"].is_null()) {
        let manifest = Path::new(package["manifest_path"].as_str().expect("a path"));
        let own = folder(&manifest.parent().expect("a folder").display().to_string());
        let dependencies = package["dependencies"].as_array().expect("a list").iter();
        let inner = dependencies.filter(|one| one["kind"].is_null()).filter_map(|one| one["path"].as_str()).map(folder).collect();
        graph.insert(own, inner);
    }
    graph
}

#[test]
fn the_crate_graph_matches_the_golden_file() {
    let text: String = graph()
        .into_iter()
        .map(|(own, inner)| format!("{own}: {}\n", inner.into_iter().collect::<Vec<_>>().join(" ")).replace(": \n", ":\n"))
        .collect();
    let golden = root().join("tests/crate_graph.txt");
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&golden, &text).expect("written");
    }
    let expected = std::fs::read_to_string(&golden).unwrap_or_default();
    assert_eq!(
        text, expected,
        "the crate graph changed. If intended: UPDATE_GOLDEN=1 cargo test -p capsule-tests --test structure"
    );
}

#[test]
fn dependencies_point_downward_and_never_between_services() {
    let layer = |folder: &str| match folder.split('/').next() {
        Some("foundation") => 0,
        Some("engines") => 1,
        Some("services") => 2,
        Some("gateway") => 3,
        _ => 4,
    };
    for (own, inner) in graph() {
        for other in inner {
            assert!(layer(&own) >= layer(&other), "{own} depends on {other}, which is in a higher layer");
            assert!(layer(&own) != 2 || layer(&other) != 2, "{own} depends on {other}: services communicate over the bus only");
            assert!(
                layer(&own) != 1 || layer(&other) == 1,
                "{own} depends on {other}: engines depend on no service, bus or database"
            );
            assert!(
                own != "gateway" || layer(&other) == 0,
                "{own} depends on {other}: the gateway calls services over the bus only"
            );
        }
    }
}

/// The Rust files below a folder.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(folder).expect("a folder").map(|entry| entry.expect("an entry").path()) {
        match entry.is_dir() {
            true => found.extend(sources(&entry)),
            false if entry.extension().is_some_and(|extension| extension == "rs") => found.push(entry),
            false => {}
        }
    }
    found
}

/// A handler that could make a scope could access the data of every organization and user. The identity service makes one
/// where it verifies a credential.
#[test]
fn only_the_bus_makes_scopes() {
    for folder in ["services", "gateway", "cli"] {
        for file in sources(&root().join(folder)).into_iter().filter(|file| !file.ends_with("tests.rs")) {
            let text = std::fs::read_to_string(&file).expect("text");
            let verifies = file.ends_with("services/identity/src/authenticated.rs");
            assert!(
                verifies || !text.contains("Scope for "),
                "{} implements a scope; take the grant of the message",
                file.display()
            );
        }
    }
}

#[test]
fn every_dependency_has_a_compatible_licence() {
    let metadata = metadata();
    for package in metadata["packages"].as_array().expect("a list") {
        let (name, licence) = (package["name"].as_str().expect("a name"), package["license"].as_str().unwrap_or("none"));
        let plain = licence.replace('/', " OR ").replace(['(', ')'], "");
        let accepted = |one: &str| LICENCES.contains(&one.trim()) || EXCEPTIONS.contains(&(name, one.trim()));
        // `A AND B OR C`: without brackets, AND binds tighter. All licence expressions in use have this form.
        let any = plain.split(" OR ").any(|all| all.split(" AND ").all(accepted));
        assert!(any, "{name} {} has the licence {licence}, which is not accepted", package["version"]);
    }
}

#[test]
fn statements_of_services_name_the_columns_that_they_read() {
    for file in sources(&root().join("services")) {
        let text = std::fs::read_to_string(&file).expect("a source");
        assert!(!text.contains("SELECT *"), "{}: select the columns of the row type: SELECT :columns", file.display());
    }
}

#[test]
fn a_release_build_has_no_failpoints() {
    // Features of the binary's dependencies as `cargo build --release -p capsule` selects them: without dev-dependencies, and
    // without the other crates of the workspace.
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--locked", "--package", "capsule", "--edges", "normal,build", "--prefix", "none", "--format", "{p} {f}"])
        .current_dir(root())
        .output()
        .expect("cargo runs");
    let tree = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && tree.contains("capsule-deploy"), "{}", String::from_utf8_lossy(&output.stderr));
    assert!(!tree.contains("failpoint"), "{tree}");
}
