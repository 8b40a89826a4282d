//! Plans of unusual repositories.

use std::os::unix::ffi::OsStrExt;

use capsule_buildplan::{Folder, Kind, Listing, Memory, affected, plan};

fn of(files: &[(&str, &[u8])]) -> Result<capsule_buildplan::Plan, capsule_buildplan::PlanError> {
    plan(&Memory::new(files.iter().map(|(path, content)| (*path, content.to_vec()))))
}

#[test]
fn an_empty_repository_becomes_a_question() {
    let plan = of(&[]).expect("a plan");
    assert_eq!(plan.kind, Kind::Unknown);
    assert_eq!(plan.questions.len(), 1);
}

#[test]
fn a_hundred_thousand_files_are_not_read() {
    let paths: Vec<String> = (0..100_000).map(|n| format!("packages/p{}/src/deep/er/file{n}.ts", n % 500)).collect();
    let reads = std::cell::Cell::new(0);
    let read = |path: &str| {
        reads.set(reads.get() + 1);
        (path == "package.json").then(|| b"{\"workspaces\":[\"packages/*\"]}".to_vec())
    };
    let tree = Listing::new(paths.iter().map(String::as_str).chain(["package.json"]), read);
    let plan = plan(&tree).expect("a plan");
    assert_eq!(plan.detection.language.as_deref(), Some("javascript"));
    assert!(reads.get() < 2000, "{} files were read", reads.get());
}

#[test]
fn deep_folders_cyclic_links_and_names_that_are_not_utf_8_do_no_harm() {
    let folder = tempfile::tempdir().expect("a folder");
    let root = folder.path();
    let deep: std::path::PathBuf = std::iter::repeat_n("d", 500).collect();
    std::fs::create_dir_all(root.join(deep)).expect("made");
    std::fs::write(root.join("package.json"), "{\"workspaces\":[\"**\"],\"scripts\":{\"start\":\"node a.js\"}}")
        .expect("written");
    std::os::unix::fs::symlink(".", root.join("circle")).expect("a link");
    std::os::unix::fs::symlink("b", root.join("a")).expect("a link");
    std::os::unix::fs::symlink("a", root.join("b")).expect("a link");
    std::fs::write(root.join(std::ffi::OsStr::from_bytes(b"caf\xe9.py")), "print()").expect("written");
    let plan = plan(&Folder::new(root)).expect("a plan");
    assert_eq!(plan.processes["web"], "node a.js");
}

#[test]
fn a_malformed_file_is_named_with_its_line() {
    for (file, content, line) in [
        ("package.json", "{\n \"scripts\": {,}\n}", Some(2)),
        ("composer.json", "{\n\"require\": [\n", Some(3)),
        ("Cargo.toml", "[package]\nname = \n", Some(2)),
        ("pyproject.toml", "[project\n", Some(1)),
        ("pom.xml", "<project>\n<a></b>\n</project>", Some(2)),
        ("App.csproj", "<Project>\n<a></b>\n", Some(2)),
        ("pubspec.yaml", "name: a\n  b: [\n", Some(2)),
        ("compose.yaml", "services:\n\t- a\n", None),
        ("Procfile", "web: a\nno colon here\n", Some(2)),
        ("capsule.toml", "[build]\nunknown = 1\n", Some(2)),
        ("go.mod", "go 1.22\n", None),
    ] {
        let error = of(&[(file, content.as_bytes())]).expect_err(file);
        assert_eq!(error.file, file, "{error}");
        if line.is_some() {
            assert_eq!(error.line, line, "{error}");
        }
        assert!(!error.message.is_empty());
    }
}

#[test]
fn a_malformed_file_of_another_platform_becomes_a_question() {
    let plan = of(&[("index.html", b"hi"), ("vercel.json", b"{"), ("netlify.toml", b"[build")]).expect("a plan");
    assert_eq!(plan.kind, Kind::Static);
    assert_eq!(plan.questions.len(), 2, "{:?}", plan.questions);
}

#[test]
fn byte_order_marks_and_utf_16_are_read() {
    let bom = "\u{feff}{\"scripts\":{\"start\":\"node a.js\"}}";
    assert_eq!(of(&[("package.json", bom.as_bytes())]).expect("a plan").processes["web"], "node a.js");
    let wide: Vec<u8> = [0xff, 0xfe].into_iter().chain("flask\r\n".encode_utf16().flat_map(u16::to_le_bytes)).collect();
    let plan = of(&[("requirements.txt", &wide), ("app.py", b"app = Flask(__name__)")]).expect("a plan");
    assert_eq!(plan.detection.framework.as_deref(), Some("flask"));
    assert!(of(&[("package.json", b"\0\xff\xfe")]).expect_err("binary").message.contains("text"));
}

#[test]
fn an_expanding_yaml_is_refused() {
    let mut bomb = String::from("a: &a [x,x,x,x,x,x,x,x,x]\n");
    for (this, last) in ('b'..='j').zip('a'..='i') {
        bomb += &format!("{this}: &{this} [*{last},*{last},*{last},*{last},*{last},*{last},*{last},*{last},*{last}]\n");
    }
    let error = of(&[("pubspec.yaml", bomb.as_bytes())]);
    assert!(error.is_err(), "{error:?}");
}

#[test]
fn deeply_nested_files_are_refused() {
    // As large as a file may be that is read at all.
    let many = |piece: &str| piece.repeat((2 << 20) / piece.len()).into_bytes();
    for (file, content) in [
        ("package.json", many("[")),
        ("package.json", many("{\"a\":")),
        ("deno.jsonc", many("[")),
        ("deno.jsonc", many("/*")),
        ("Cargo.toml", [b"a = ".to_vec(), many("[")].concat()),
        ("Cargo.toml", [b"a = ".to_vec(), many("{a=")].concat()),
        ("Cargo.toml", many("[[")),
        ("Cargo.toml", [many("a."), b"a = 1".to_vec()].concat()),
        ("Cargo.toml", [b"[".to_vec(), many("a."), b"a]".to_vec()].concat()),
        ("capsule.toml", [many("a."), b"a = 1".to_vec()].concat()),
        ("pubspec.yaml", (0..1400).map(|n| " ".repeat(n) + "a:\n").collect::<String>().into_bytes()),
        ("pubspec.yaml", many("? ")),
        ("mise.toml", [many("a."), b"a = 1".to_vec()].concat()),
        ("pubspec.yaml", many("[")),
        ("pubspec.yaml", many("- ")),
        ("pubspec.yaml", many("{a: ")),
        ("pom.xml", many("<a>")),
        ("App.csproj", many("<a>")),
        ("mix.exs", many("{:")),
        ("CMakeLists.txt", many("add_executable(")),
        ("Procfile", many("a: ")),
        ("Dockerfile", many("RUN \\\n")),
        ("go.mod", many("require (\n")),
    ] {
        // Whatever comes of it, it comes.
        let _ = of(&[(file, &content)]);
    }
}

#[test]
fn a_change_affects_a_member_and_its_dependents() {
    let package = |name: &str, more: &str| format!("{{\"name\":\"{name}\",\"scripts\":{{\"start\":\"node a.js\"}}{more}}}");
    let tree = Memory::new([
        ("package.json".to_owned(), "{\"workspaces\":[\"apps/*\",\"packages/*\"]}".to_owned()),
        ("apps/web/package.json".to_owned(), package("web", ",\"dependencies\":{\"@x/ui\":\"*\"}")),
        ("apps/api/package.json".to_owned(), package("api", "")),
        (
            "packages/ui/package.json".to_owned(),
            "{\"name\":\"@x/ui\",\"main\":\"index.js\",\"dependencies\":{\"@x/base\":\"*\"}}".to_owned(),
        ),
        ("packages/base/package.json".to_owned(), "{\"name\":\"@x/base\",\"main\":\"index.js\"}".to_owned()),
    ]);
    let names =
        |changed: &[&str]| affected(&tree, changed).expect("members").into_iter().map(|member| member.name).collect::<Vec<_>>();
    assert_eq!(names(&["apps/api/src/a.js"]), ["api"]);
    assert_eq!(names(&["packages/base/index.js"]), ["web"]);
    assert_eq!(names(&["README.md"]), Vec::<String>::new());
    assert_eq!(names(&["package-lock.json"]), ["api", "web"]);
}
