//! Dockerfiles of the whole corpus: each program that they call is in the image.

use capsule_buildplan::{ImageOptions, Memory, dockerfile, plan};

use crate::{corpus, parse};

/// Programs, and the base images that contain them.
const PROGRAMS: &[(&str, &[&str])] = &[
    ("bun", &["oven/bun"]),
    ("bundle", &["ruby"]),
    ("cabal", &["haskell"]),
    ("cargo", &["rust"]),
    ("clojure", &["clojure"]),
    ("cmake", &[]),
    ("cobc", &[]),
    ("composer", &[]),
    ("conda", &["condaforge/miniforge3"]),
    ("cpanm", &["perl"]),
    ("dart", &["dart"]),
    ("deno", &["denoland/deno"]),
    ("docker-php-ext-configure", &["php"]),
    ("docker-php-ext-enable", &["php"]),
    ("docker-php-ext-install", &["php"]),
    ("dotnet", &["mcr.microsoft.com/dotnet/sdk", "mcr.microsoft.com/dotnet/aspnet"]),
    ("dx", &[]),
    ("flutter", &["ghcr.io/cirruslabs/flutter"]),
    ("gem", &["ruby"]),
    ("gleam", &["ghcr.io/gleam-lang/gleam"]),
    ("go", &["golang"]),
    ("gradle", &["gradle"]),
    ("haunt", &[]),
    ("hugo", &[]),
    ("java", &["eclipse-temurin", "maven", "gradle", "clojure"]),
    ("javac", &["eclipse-temurin", "maven", "gradle"]),
    ("jekyll", &[]),
    ("julia", &["julia"]),
    ("lein", &["clojure"]),
    ("lua", &["openresty/openresty"]),
    ("luarocks", &[]),
    ("make", &["perl", "ruby", "elixir", "haskell"]),
    ("mdbook", &[]),
    ("meson", &[]),
    ("meteor", &[]),
    ("mix", &["elixir"]),
    ("mvn", &["maven"]),
    ("node", &["node"]),
    ("npm", &["node"]),
    ("npx", &["node"]),
    ("opam", &["ocaml/opam"]),
    ("pdm", &[]),
    ("openresty", &["openresty/openresty"]),
    ("perl", &["perl", "debian"]),
    ("php", &["php"]),
    ("pecl", &["php"]),
    ("pip", &["python"]),
    ("pipenv", &[]),
    ("pnpm", &[]),
    ("poetry", &[]),
    ("python", &["python"]),
    ("python3", &["python"]),
    ("rebar3", &["erlang"]),
    ("Rscript", &["rocker/r-ver"]),
    ("ruby", &["ruby"]),
    ("sbt", &["sbtscala/scala-sbt"]),
    ("shards", &["crystallang/crystal"]),
    ("stack", &["haskell"]),
    ("swift", &["swift"]),
    ("trunk", &[]),
    ("uv", &[]),
    // The image of Node.js has yarn 1; recipes install later versions.
    ("yarn", &["node"]),
    ("zig", &[]),
    ("zola", &[]),
];
/// Packages and commands that provide a program of another name.
const PROVIDED_BY: &[(&str, &str)] = &[
    ("cobc", "gnucobol"),
    ("pip", "python3-pip"),
    ("python3", "python3-pip"),
    ("make", "build-essential"),
    ("gem", "ruby"),
    ("npx", "npm"),
    ("node", "nodejs"),
];

/// The programs of a command that neither the base image nor an earlier step provides.
fn missing<'c>(command: &'c str, base: &str, before: &str) -> Vec<&'c str> {
    let mut missing = Vec::new();
    let mut seen = before.to_owned();
    for command in command.split(['&', '|', ';', '(', ')']) {
        let mut words = command.split_whitespace().filter(|word| !word.starts_with("--mount") && !word.contains('='));
        let program = words.next().unwrap_or_default();
        let Some((_, bases)) = PROGRAMS.iter().find(|(name, _)| *name == program) else { continue };
        let brought = |name: &str| seen.split([' ', '/', '@', '=', '"', ':']).any(|word| word == name);
        let aliases = PROVIDED_BY.iter().filter(|(name, _)| *name == program).map(|(_, alias)| *alias);
        if !bases.contains(&base) && !std::iter::once(program).chain(aliases).any(brought) {
            missing.push(program);
        }
        seen.push_str(command);
        seen.push(' ');
    }
    missing
}

#[test]
fn every_program_that_is_called_is_in_the_image() {
    let (mut all, mut seen) = (Vec::new(), 0);
    for path in std::fs::read_dir(corpus()).expect("the corpus").flatten().map(|entry| entry.path()) {
        let (_, files, _) = parse(&std::fs::read_to_string(&path).expect("a fixture"));
        let tree = Memory::new(files);
        let Ok(plan) = plan(&tree) else { continue };
        let Ok(image) = dockerfile(&tree, &plan, &ImageOptions::default()) else { continue };
        seen += 1;
        let (mut base, mut before) = ("", String::new());
        let mut tell = |command: &str, base: &str, before: &str| {
            let name = path.file_stem().unwrap_or_default().display();
            all.extend(missing(command, base, before).iter().map(|program| format!("{name}: `{program}` in {base}")));
        };
        for line in image.dockerfile.lines() {
            if let Some(rest) = line.strip_prefix("FROM ") {
                base = rest.split([':', ' ']).next().unwrap_or_default();
                before.clear();
            }
            let steps = line.strip_prefix("RUN ").unwrap_or_default();
            tell(steps, base, &before);
            before.push_str(steps);
            before.push(' ');
        }
        // Start commands have the last stage only.
        for command in plan.processes.values().chain(&plan.build.release) {
            tell(command, base, &before);
        }
    }
    assert!(seen > 200 && all.is_empty(), "{seen} seen, missing:\n{}", all.join("\n"));
}
