//! Dockerfiles of the whole corpus: no step calls a program that its image has not.

use capsule_buildplan::{ImageOptions, Memory, dockerfile, plan};

use crate::{corpus, parse};

/// Programs of many tools, and the images that bring them by themselves.
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
    ("dotnet", &["mcr.microsoft.com/dotnet/sdk"]),
    ("dx", &[]),
    ("flutter", &["ghcr.io/cirruslabs/flutter"]),
    ("gem", &["ruby"]),
    ("gleam", &["ghcr.io/gleam-lang/gleam"]),
    ("go", &["golang"]),
    ("gradle", &["gradle"]),
    ("haunt", &[]),
    ("hugo", &[]),
    ("javac", &["eclipse-temurin", "maven", "gradle"]),
    ("jekyll", &[]),
    ("julia", &["julia"]),
    ("lein", &["clojure"]),
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
    ("php", &["php"]),
    ("pip", &["python"]),
    ("pipenv", &[]),
    ("pnpm", &[]),
    ("poetry", &[]),
    ("python", &["python"]),
    ("python3", &["python"]),
    ("rebar3", &["erlang"]),
    ("Rscript", &["rocker/r-ver"]),
    ("sbt", &["sbtscala/scala-sbt"]),
    ("shards", &["crystallang/crystal"]),
    ("stack", &["haskell"]),
    ("swift", &["swift"]),
    ("trunk", &[]),
    ("uv", &[]),
    // In the image of Node.js is the first version; later ones are brought.
    ("yarn", &["node"]),
    ("zig", &[]),
    ("zola", &[]),
];
/// Packages and commands that bring a program under another name.
const BRINGS: &[(&str, &str)] = &[
    ("cobc", "gnucobol"),
    ("pip", "python3-pip"),
    ("python3", "python3-pip"),
    ("make", "build-essential"),
    ("gem", "ruby"),
    ("npx", "npm"),
    ("node", "nodejs"),
];

#[test]
fn no_step_calls_a_program_that_its_image_has_not() {
    let (mut missing, mut seen) = (Vec::new(), 0);
    for path in std::fs::read_dir(corpus()).expect("the corpus").flatten().map(|entry| entry.path()) {
        let (_, files, _) = parse(&std::fs::read_to_string(&path).expect("a fixture"));
        let tree = Memory::new(files);
        let Ok(plan) = plan(&tree) else { continue };
        let Ok(image) = dockerfile(&tree, &plan, &ImageOptions::default()) else { continue };
        seen += 1;
        let (mut base, mut before) = ("", String::new());
        for line in image.dockerfile.lines() {
            if let Some(rest) = line.strip_prefix("FROM ") {
                base = rest.split([':', ' ']).next().unwrap_or_default();
                before.clear();
            }
            let steps = line.strip_prefix("RUN ").unwrap_or_default();
            for command in steps.split(['&', '|', ';', '(', ')']) {
                let mut words = command.split_whitespace().filter(|word| !word.starts_with("--mount") && !word.contains('='));
                let program = words.next().unwrap_or_default();
                let Some((_, bases)) = PROGRAMS.iter().find(|(name, _)| *name == program) else { continue };
                let brought = |name: &str| before.split([' ', '/', '@', '=', '"', ':']).any(|word| word == name);
                let aliases = BRINGS.iter().filter(|(name, _)| *name == program).map(|(_, alias)| *alias);
                if !bases.contains(&base) && !std::iter::once(program).chain(aliases).any(brought) {
                    missing.push(format!("{}: `{program}` in {base}", path.file_stem().unwrap_or_default().display()));
                }
                before.push_str(command);
                before.push(' ');
            }
            before.push_str(steps);
            before.push(' ');
        }
    }
    assert!(seen > 200 && missing.is_empty(), "{seen} seen, missing:\n{}", missing.join("\n"));
}
