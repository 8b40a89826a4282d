//! Every row of the table of frameworks is detected by its signs.

use capsule_buildplan::{Framework, Memory, TABLE, plan};

/// A manifest of the language that asks for these.
fn manifest(language: &str, names: &[&str]) -> Vec<(String, String)> {
    let list = |each: &dyn Fn(&str) -> String| names.iter().map(|name| each(name)).collect::<Vec<_>>();
    let files: Vec<(&str, String)> = match language {
        "javascript" => {
            vec![("package.json", format!("{{\"dependencies\":{{{}}}}}", list(&|name| format!("\"{name}\":\"1\"")).join(",")))]
        }
        "deno" => {
            vec![("deno.json", format!("{{\"imports\":{{{}}}}}", list(&|name| format!("\"{name}\":\"jsr:{name}@1\"")).join(",")))]
        }
        "python" => vec![("requirements.txt", list(&|name| format!("{name}==1\n")).concat())],
        "ruby" => vec![("Gemfile", list(&|name| format!("gem \"{name}\"\n")).concat())],
        "php" => vec![("composer.json", format!("{{\"require\":{{{}}}}}", list(&|name| format!("\"{name}\":\"1\"")).join(",")))],
        "go" => vec![("go.mod", format!("module a\n{}", list(&|name| format!("require {name} v1.0.0\n")).concat()))],
        "rust" => vec![
            (
                "Cargo.toml",
                format!(
                    "[package]\nname=\"a\"\nversion=\"1.0.0\"\n[dependencies]\n{}",
                    list(&|name| format!("{name} = \"1\"\n")).concat()
                ),
            ),
            ("src/main.rs", String::new()),
        ],
        "java" if names.iter().any(|name| name.contains('/') || !name.contains('.')) => {
            vec![(
                "project.clj",
                format!("(defproject a \"1\" :dependencies [{}])", list(&|name| format!("[{name} \"1\"]\n")).concat()),
            )]
        }
        "java" => {
            let dependency = |name: &str| {
                let (group, artifact) = name.split_once(':').unwrap_or((name, "some-part"));
                format!("<dependency><groupId>{group}</groupId><artifactId>{artifact}</artifactId></dependency>")
            };
            vec![(
                "pom.xml",
                format!(
                    "<project><artifactId>a</artifactId><version>1</version><dependencies>{}</dependencies></project>",
                    list(&dependency).concat()
                ),
            )]
        }
        "elixir" => vec![("mix.exs", list(&|name| format!("{{:{name}, \"~> 1.0\"}},\n")).concat())],
        "erlang" => vec![("rebar.config", format!("{{deps, [{}]}}.", list(&|name| format!("{{{name}, \"1\"}}")).join(",")))],
        "gleam" => {
            vec![("gleam.toml", format!("name = \"a\"\n[dependencies]\n{}", list(&|name| format!("{name} = \"1\"\n")).concat()))]
        }
        "dotnet" => {
            let reference = |name: &str| {
                if name.contains(".Sdk.") {
                    format!("<Sdk Name=\"{name}\" />")
                } else {
                    format!("<PackageReference Include=\"{name}\" Version=\"1\" />")
                }
            };
            vec![(
                "App.csproj",
                format!(
                    "<Project><PropertyGroup><OutputType>Exe</OutputType></PropertyGroup><ItemGroup>{}</ItemGroup></Project>",
                    list(&reference).concat()
                ),
            )]
        }
        "swift" => vec![(
            "Package.swift",
            format!(
                "{}\n.executableTarget(name: \"App\")",
                list(&|name| format!(".package(url: \"https://example.com/{name}.git\", from: \"1\"),\n")).concat()
            ),
        )],
        "haskell" => vec![(
            "package.yaml",
            format!(
                "ghc-options: -O2\nexecutables:\n  app:\n    main: Main.hs\ndependencies:\n{}",
                list(&|name| format!("- {name}\n")).concat()
            ),
        )],
        "dart" => vec![
            ("pubspec.yaml", format!("name: a\ndependencies:\n{}", list(&|name| format!("  {name}: any\n")).concat())),
            ("bin/server.dart", String::new()),
        ],
        "crystal" => vec![(
            "shard.yml",
            format!(
                "name: a\ntargets:\n  a:\n    main: src/a.cr\ndependencies:\n{}",
                list(&|name| format!("  {name}:\n    github: x/{name}\n")).concat()
            ),
        )],
        "zig" => {
            let name = |name: &str| {
                if name.contains('.') {
                    format!(".@\"{name}\" = .{{ .url = \"x\" }},\n")
                } else {
                    format!(".{name} = .{{ .url = \"x\" }},\n")
                }
            };
            vec![("build.zig.zon", list(&name).concat()), ("build.zig", "addExecutable(.{ .name = \"a\"".into())]
        }
        "cpp" => vec![
            (
                "CMakeLists.txt",
                "add_executable(app main.cpp)\n".to_owned()
                    + &list(&|name| {
                        if name.contains('.') || name.contains('/') { String::new() } else { format!("find_package({name})\n") }
                    })
                    .concat(),
            ),
            ("main.cpp", list(&|name| format!("#include <{name}>\n")).concat()),
        ],
        "ocaml" => vec![
            ("dune-project", String::new()),
            ("bin/dune", format!("(executable (name main) (libraries {}))", names.join(" "))),
        ],
        "lua" => vec![("a-1.rockspec", list(&|name| format!("\"{name}\",\n")).concat())],
        "perl" => vec![("cpanfile", list(&|name| format!("requires '{name}';\n")).concat()), ("app.pl", String::new())],
        "r" => vec![("app.R", list(&|name| format!("library({name})\n")).concat())],
        "julia" => vec![
            ("Project.toml", format!("[deps]\n{}", list(&|name| format!("{name} = \"1\"\n")).concat())),
            ("server.jl", String::new()),
        ],
        _ => Vec::new(),
    };
    files.into_iter().map(|(path, content)| (path.to_owned(), content)).collect()
}

/// A repository that has one of a row's signs.
fn repository(row: &Framework, sign: &[&str]) -> Vec<(String, String)> {
    let wanted = sign.iter().filter(|part| !part.starts_with('!'));
    let (files, names): (Vec<&str>, Vec<&str>) = wanted.partition(|part| part.starts_with("file:"));
    let mut all = if names.is_empty() { Vec::new() } else { manifest(row.language, &names) };
    for file in files.iter().map(|file| file.trim_start_matches("file:")) {
        if all.iter().any(|(path, _)| path == file) {
            continue;
        }
        // A name without an ending may be a folder.
        let folder = matches!(file, "lua");
        all.push((
            if folder { format!("{file}/a") } else { file.to_owned() },
            if file.ends_with(".json") { "{}".into() } else { String::new() },
        ));
    }
    // Some are looked for only where their language is.
    let needs = |path: &str, content: &str| (path.to_owned(), content.to_owned());
    if names.is_empty() {
        match row.language {
            "javascript" => all.push(needs("package.json", "{}")),
            "deno" => all.push(needs("deno.json", "{}")),
            "go" if row.name == "hugo" && !all.iter().any(|(path, _)| path.starts_with("hugo.") || path.contains("_default")) => {
                all.push(needs("config.toml", ""));
            }
            "ruby" if row.name == "jekyll" => all.push(needs("_posts/a.md", "")),
            "cpp" => all.push(needs("CMakeLists.txt", "add_executable(app main.c)")),
            "lua" => all.push(needs("main.lua", "")),
            "php" => all.push(needs("composer.json", "{}")),
            "python" if row.name == "odoo" || row.name == "web2py" => all.push(needs("requirements.txt", "")),
            _ => {}
        }
    }
    all
}

#[test]
fn every_framework_of_the_table_is_detected_by_each_of_its_signs() {
    let mut wrong = Vec::new();
    for row in TABLE.iter() {
        for sign in &row.signs {
            let files = repository(row, sign);
            let found = match plan(&Memory::new(files.clone())) {
                Ok(plan) => plan.detection.framework.unwrap_or_default(),
                Err(error) => error.to_string(),
            };
            if found != row.name {
                wrong.push(format!("{} {} by {}: found {found:?}", row.language, row.name, sign.join("+")));
            }
        }
    }
    assert!(wrong.is_empty(), "{} signs lead elsewhere:\n{}", wrong.len(), wrong.join("\n"));
}

#[test]
fn the_table_is_complete() {
    assert!(TABLE.len() >= 150, "{} rows", TABLE.len());
    for row in TABLE.iter() {
        let plain = |text: &str| {
            !text.is_empty() && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.' | '_'))
        };
        assert!(plain(row.name), "{row:?}");
        assert!(!row.title.is_empty() && !row.signs.is_empty(), "{row:?}");
        if row.kind.is_files() && row.language != "dotnet" {
            assert!(row.output.is_some(), "{row:?}");
        }
        let twice = TABLE.iter().filter(|other| other.language == row.language && other.name == row.name).count();
        assert_eq!(twice, 1, "{row:?}");
    }
}

/// Languages by the names that people give them.
const LANGUAGES: [(&str, &str); 25] = [
    ("javascript", "JavaScript and TypeScript"),
    ("deno", "Deno"),
    ("python", "Python"),
    ("ruby", "Ruby"),
    ("php", "PHP"),
    ("go", "Go"),
    ("rust", "Rust"),
    ("java", "Java, Kotlin, Scala, Groovy, Clojure"),
    ("elixir", "Elixir"),
    ("erlang", "Erlang"),
    ("gleam", "Gleam"),
    ("dotnet", ".NET"),
    ("swift", "Swift"),
    ("haskell", "Haskell"),
    ("dart", "Dart"),
    ("crystal", "Crystal"),
    ("zig", "Zig"),
    ("cpp", "C and C++"),
    ("ocaml", "OCaml"),
    ("lua", "Lua"),
    ("perl", "Perl"),
    ("r", "R"),
    ("julia", "Julia"),
    ("scheme", "Scheme"),
    ("cobol", "COBOL"),
];

/// `docs/reference/frameworks.md`, as the table says it.
fn reference() -> String {
    let mut text = format!(
        "# Frameworks\n\nGenerated from `engines/buildplan/src/frameworks.txt` by its test (`UPDATE_GOLDEN=1`). {} frameworks; the \
         first match of a language wins. Settings in the repository override detection: see \
         [build plans](../guides/build-plans.md).\n\n*Detected by*: a dependency's name, or the beginning of it; a file in \
         `code`; `+` takes both, `!` its absence.\n",
        TABLE.len()
    );
    for (language, title) in LANGUAGES {
        let rows: Vec<&Framework> = TABLE.iter().filter(|row| row.language == language).collect();
        if rows.is_empty() {
            continue;
        }
        text += &format!(
            "\n## {title}\n\n| framework | `detection.framework` | detected by | makes | default start or output | port |\n|---|---|---|---|---|---|\n"
        );
        for row in rows {
            let sign = |parts: &Vec<&str>| {
                let part = |part: &&str| part.replace("file:", "").replace('|', "\\|");
                let shown =
                    parts.iter().map(|whole| if whole.contains("file:") { format!("`{}`", part(whole)) } else { part(whole) });
                shown.collect::<Vec<_>>().join(" + ")
            };
            let signs = row.signs.iter().map(sign).collect::<Vec<_>>().join(", ");
            let kind = serde_json::to_value(format!("{:?}", row.kind).to_lowercase()).expect("JSON");
            let start = row.start.or(row.output).map(|text| format!("`{}`", text.replace('|', "\\|"))).unwrap_or_default();
            let port = row.port.map(|port| port.to_string()).unwrap_or_default();
            text += &format!(
                "| {} | `{}` | {signs} | {} | {start} | {port} |\n",
                row.title,
                row.name,
                kind.as_str().unwrap_or_default()
            );
        }
    }
    text
}

#[test]
fn the_reference_matches_the_table() {
    let path = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../docs/reference/frameworks.md");
    let wanted = reference();
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::write(&path, &wanted).expect("written");
    }
    assert_eq!(std::fs::read_to_string(&path).unwrap_or_default(), wanted, "UPDATE_GOLDEN=1 writes it anew");
    assert!(TABLE.iter().all(|row| LANGUAGES.iter().any(|(language, _)| *language == row.language)));
}
