//! Random repositories with a hostile structure: manifests that refer to each other, to themselves and to paths outside,
//! links in all directions, and large numbers of all of these.

use std::os::unix::fs::symlink;
use std::path::Path;

use rand::RngExt;
use rand::rngs::StdRng;
use rand::seq::IndexedRandom;

/// What lies beside the repository, and must not be found in any answer.
pub const SECRET: &str = "SECRET-OF-ANOTHER";

const FOLDERS: [&str; 8] = ["", "a", "a/b", "b", "packages/p", "src", "cmd/x", "d"];
/// What a manifest names.
const NAMES: [&str; 18] = [
    ".",
    "./",
    "..",
    "../",
    "../..",
    "a",
    "b",
    "../a",
    "../b",
    "a/..",
    "a/../..",
    "../../outside",
    "../outside",
    "/etc",
    "link",
    "up/outside",
    "packages/*",
    "**",
];
/// Manifests with a place for names.
const MANIFESTS: [(&str, &str, &str); 15] = [
    ("pom.xml", "<project><artifactId>a</artifactId><version>1</version><modules><module>", "</module></modules></project>"),
    ("settings.gradle", "include '", "'\n"),
    ("package.json", "{\"scripts\":{\"start\":\"node a.js\"},\"workspaces\":[\"", "\"]}"),
    ("pnpm-workspace.yaml", "packages: ['", "']\n"),
    ("Cargo.toml", "[workspace]\nmembers = [\"", "\"]\n"),
    ("pyproject.toml", "[tool.uv.workspace]\nmembers = [\"", "\"]\n"),
    ("requirements.txt", "flask\n-r ", "\n"),
    ("go.work", "go 1.22\nuse ./", "\n"),
    ("lerna.json", "{\"packages\":[\"", "\"]}"),
    ("rush.json", "{\"projects\":[{\"projectFolder\":\"", "\"}]}"),
    ("deno.json", "{\"workspace\":[\"", "\"]}"),
    ("compose.yaml", "services:\n  a:\n    build: '", "'\n"),
    ("capsule.toml", "[build]\nroot = \"", "\"\n"),
    ("Procfile", "web: cd ", " && start\n"),
    ("Staticfile", "root: ", "\n"),
];

/// Makes a repository in the empty folder `root`, and a secret beside it in `outside`.
pub fn make(random: &mut StdRng, root: &Path) {
    let outside = root.parent().expect("a folder").join("outside");
    let _ = std::fs::create_dir(&outside);
    for (file, content) in
        [("Procfile", format!("web: {SECRET}\n")), ("package.json", format!("{{\"scripts\":{{\"start\":\"{SECRET}\"}}}}"))]
    {
        std::fs::write(outside.join(file), content).expect("written");
    }
    for _ in 0..random.random_range(1..=12) {
        let folder = root.join(FOLDERS.choose(random).copied().unwrap_or_default());
        if std::fs::create_dir_all(&folder).is_err() {
            continue;
        }
        let (file, before, after) = MANIFESTS.choose(random).copied().unwrap_or_default();
        let separator = match file {
            "pom.xml" => "</module><module>",
            "requirements.txt" => "/requirements.txt\n-r ",
            "go.work" => "\nuse ./",
            "settings.gradle" | "pnpm-workspace.yaml" => "', '",
            "compose.yaml" | "capsule.toml" | "Procfile" | "Staticfile" => "/",
            "rush.json" => "\"},{\"projectFolder\":\"",
            _ => "\",\"",
        };
        let most = if random.random_ratio(1, 10) { 3000 } else { 4 };
        let names: Vec<&str> = (0..random.random_range(1..=most)).filter_map(|_| NAMES.choose(random).copied()).collect();
        let _ = std::fs::write(folder.join(file), format!("{before}{}{after}", names.join(separator)));
    }
    for _ in 0..random.random_range(0..=6) {
        let targets = [
            "..",
            ".",
            "../outside",
            "outside",
            "../outside/Procfile",
            "/etc/passwd",
            "/",
            "up",
            "link",
            "a",
            "Procfile",
            "../../..",
        ];
        let names =
            ["link", "up", "a/up", "b/link", "Procfile", "package.json", "a/b/Procfile", "packages/p/package.json", "src/link"];
        let path = root.join(names.choose(random).copied().unwrap_or_default());
        if path.parent().is_some_and(|folder| std::fs::create_dir_all(folder).is_ok()) {
            let _ = symlink(targets.choose(random).copied().unwrap_or_default(), path);
        }
    }
    if random.random_ratio(1, 6) {
        let deep = root.join("d/".repeat(random.random_range(1..=300)));
        let _ = std::fs::create_dir_all(&deep).and_then(|()| std::fs::write(deep.join("package.json"), "{}"));
    }
    if random.random_ratio(1, 8) {
        for number in 0..random.random_range(1..=600) {
            let folder = root.join(format!("packages/p{number}"));
            let _ = std::fs::create_dir_all(&folder)
                .and_then(|()| std::fs::write(folder.join("package.json"), "{\"scripts\":{\"start\":\"x\"}}"));
        }
    }
    if random.random_ratio(1, 8) {
        let (file, before, after) = MANIFESTS.choose(random).copied().unwrap_or_default();
        let piece =
            ["a", "[", "{", "../", "<module>.</module>", "x: y\n", "\",\"", "'"].choose(random).copied().unwrap_or_default();
        let _ = std::fs::write(
            root.join(file),
            format!("{before}{}{after}", piece.repeat(random.random_range(1..=(2 << 20) / piece.len()))),
        );
    }
}
