//! Compares the versions that a repository requests with those that run.

use serde::{Deserialize, Serialize};

use crate::plan::Plan;

/// A toolchain that runs in another version than the repository requests.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct VersionMismatch {
    /// As in `detection.versions`: `node`, `python`.
    pub tool: String,
    pub requested: String,
    /// The file that requests it.
    pub file: String,
    pub line: Option<usize>,
    pub running: String,
}

impl std::fmt::Display for VersionMismatch {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { requested, file, running, .. } = self;
        let title = title(&self.tool);
        match self.line {
            Some(line) => write!(f, "{file}:{line} requests {title} {requested}, but {title} {running} runs"),
            None => write!(f, "{file} requests {title} {requested}, but {title} {running} runs"),
        }
    }
}

/// The display name of a toolchain.
fn title(tool: &str) -> &str {
    match tool {
        "node" => "Node.js",
        "dotnet" => ".NET",
        "php" => "PHP",
        "ghc" => "GHC",
        "python" => "Python",
        "go" => "Go",
        "rust" => "Rust",
        "java" => "Java",
        "ruby" => "Ruby",
        "deno" => "Deno",
        "bun" => "Bun",
        "elixir" => "Elixir",
        "swift" => "Swift",
        "dart" => "Dart",
        other => other,
    }
}

/// Compares the versions of a plan with those that `running` returns. Versions that cannot be compared are not
/// mismatches.
pub fn mismatches(plan: &Plan, running: impl Fn(&str) -> Option<String>) -> Vec<VersionMismatch> {
    let mut all = Vec::new();
    for (tool, requested) in &plan.detection.versions {
        let field = format!("detection.versions.{tool}");
        let evidence = plan.evidence.iter().find(|evidence| evidence.field == field);
        let file = evidence.map_or("", |evidence| evidence.file.as_str());
        let Some(running) = running(tool) else { continue };
        if is_satisfied(tool, requested, file, &running) == Some(false) {
            all.push(VersionMismatch {
                tool: tool.clone(),
                requested: requested.clone(),
                file: file.to_owned(),
                line: evidence.and_then(|evidence| evidence.line),
                running,
            });
        }
    }
    all
}

/// Whether the running version of a tool satisfies the request in `file`; `None` if they cannot be compared.
///
/// Supports versions and parts of them (`20`, `20.11`), wildcards (`22.x`, `3.11.*`), the ranges of npm,
/// Composer, pip, Poetry, RubyGems and Hex, Node.js' `lts/*` and its names, and channels of Rust.
#[must_use]
pub fn is_satisfied(tool: &str, requested: &str, file: &str, running: &str) -> Option<bool> {
    let requested = requested.trim().trim_matches(['"', '\'']).to_ascii_lowercase();
    let actual = Version::parse(tool, running)?;
    if let Some(by_name) = named(tool, &requested, running, &actual) {
        return by_name;
    }
    // A manifest of the language requests a minimum; a file that pins a toolchain requests an exact version.
    let is_least = matches!(
        (tool, file.rsplit('/').next().unwrap_or(file)),
        ("go", "go.mod" | "go.work")
            | ("rust", "Cargo.toml")
            | ("swift", "Package.swift")
            | ("zig", "build.zig.zon")
            | ("java", "pom.xml" | "build.gradle" | "build.gradle.kts")
    );
    let mut any = false;
    for alternative in requested.split('|').map(str::trim).filter(|part| !part.is_empty()) {
        any |= all_of(tool, alternative, is_least, &actual)?;
    }
    Some(any)
}

/// Compares names of versions, such as `lts/*`. The outer `None`: the request is not a name.
fn named(tool: &str, requested: &str, running: &str, actual: &Version) -> Option<Option<bool>> {
    let other = ["pypy", "jruby", "truffleruby", "graalpy", "mruby", "stackless", "miniconda", "anaconda"];
    if other.iter().any(|name| requested.starts_with(name)) {
        return Some(Some(running.to_ascii_lowercase().starts_with(requested)));
    }
    match (tool, requested) {
        (_, "" | "*" | "x" | "latest" | "current" | "stable" | "node" | "any") => {
            let is_stable = tool != "rust" || !running.contains("nightly") && !running.contains("beta");
            Some(Some(is_stable || requested != "stable"))
        }
        ("rust", channel) if channel.starts_with("nightly") || channel.starts_with("beta") => {
            Some(Some(running.contains(channel.split('-').next().unwrap_or(channel))))
        }
        ("node", name) if name.starts_with("lts") || name.starts_with("--lts") => {
            let major = actual.0.first().copied().unwrap_or_default();
            let name = name.trim_start_matches("--").trim_start_matches("lts").trim_start_matches(['/', '-', '=']);
            let of_name = [
                ("argon", 4),
                ("boron", 6),
                ("carbon", 8),
                ("dubnium", 10),
                ("erbium", 12),
                ("fermium", 14),
                ("gallium", 16),
                ("hydrogen", 18),
                ("iron", 20),
                ("jod", 22),
                ("krypton", 24),
            ];
            Some(match of_name.iter().find(|(known, _)| *known == name) {
                Some((_, wanted)) => Some(major == *wanted),
                // Even versions become those of long-term support.
                None if matches!(name, "" | "*") => Some(major % 2 == 0),
                None => None,
            })
        }
        _ => None,
    }
}

/// The numbers of a version, most significant first.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Version(Vec<u64>);

impl Version {
    /// Parses the version at the beginning of a text, after the name of a tool or distributor.
    fn parse(tool: &str, text: &str) -> Option<Self> {
        let text = text.trim();
        let at = text.find(|c: char| c.is_ascii_digit())?;
        let prefix = text[..at].trim_end_matches(['-', '_', ' ', '=']).to_ascii_lowercase();
        let distributors = [
            "",
            "v",
            "temurin",
            "openjdk",
            "openjdk64",
            "corretto",
            "zulu",
            "liberica",
            "adoptopenjdk",
            "oracle",
            "microsoft",
            "semeru-openj9",
            "sapmachine",
            "graalvm",
            "graalvm-community",
            "cpython",
        ];
        if !distributors.contains(&&*prefix) && prefix != tool {
            return None;
        }
        let end = text[at..].find(|c: char| !(c.is_ascii_digit() || c == '.')).map_or(text.len(), |end| at + end);
        let mut numbers: Vec<u64> =
            text[at..end].split('.').filter(|part| !part.is_empty()).map(str::parse).collect::<Result<_, _>>().ok()?;
        // Java 8 called itself 1.8.
        if tool == "java" && numbers.len() > 1 && numbers[0] == 1 {
            numbers.remove(0);
        }
        if tool == "dotnet" {
            // An SDK rolls forward within its feature band, and what it runs is named by two numbers.
            numbers.truncate(2);
        }
        numbers.truncate(4);
        (!numbers.is_empty()).then_some(Self(numbers))
    }

    /// Compares only the numbers that `other` has.
    fn compare(&self, other: &Self, by: usize) -> std::cmp::Ordering {
        let number = |version: &Self, at: usize| version.0.get(at).copied().unwrap_or_default();
        (0..by)
            .map(|at| number(self, at).cmp(&number(other, at)))
            .find(|order| order.is_ne())
            .unwrap_or(std::cmp::Ordering::Equal)
    }

    fn begins_with(&self, other: &Self) -> bool {
        self.compare(other, other.0.len()).is_eq()
    }

    /// Whether it is at least `least`, with the same first `same` numbers.
    fn is_from(&self, least: &Self, same: usize) -> bool {
        self.compare(least, 4).is_ge() && self.compare(least, same).is_eq()
    }
}

/// Whether a version is within all of several conditions: `>=18 <21`, `>=3.8,<3.12`, `18 - 20`.
fn all_of(tool: &str, conditions: &str, is_least: bool, actual: &Version) -> Option<bool> {
    if let Some((from, to)) = conditions.split_once(" - ") {
        let (from, to) = (Version::parse(tool, from)?, Version::parse(tool, to)?);
        return Some(actual.compare(&from, 4).is_ge() && actual.compare(&to, to.0.len()).is_le());
    }
    let mut rest = conditions;
    let mut all = true;
    loop {
        rest = rest.trim_start_matches([' ', ',', '(', ')', '[', ']']);
        if rest.is_empty() {
            return Some(all);
        }
        let operator = ["===", ">=", "<=", "==", "!=", "~=", "~>", "^", "~", ">", "<", "="]
            .iter()
            .find(|operator| rest.starts_with(**operator));
        rest = rest[operator.map_or(0, |operator| operator.len())..].trim_start();
        let end = rest.find([' ', ',', '<', '>', '=', '^', '~', '!']).unwrap_or(rest.len());
        let (text, more) = rest.split_at(end);
        rest = more;
        // `22.x`, `3.11.*`: the numbers before the wildcard.
        let is_wild = |part: &str| matches!(part, "x" | "*");
        let given: Vec<&str> = text.split('.').take_while(|part| !is_wild(part)).collect();
        if given.is_empty() && text.split('.').all(is_wild) {
            continue;
        }
        let wanted = Version::parse(tool, &given.join("."))?;
        let named = wanted.0.len();
        all &= match operator.copied() {
            None if is_least => actual.compare(&wanted, 4).is_ge(),
            None | Some("=" | "==" | "===") => actual.begins_with(&wanted),
            Some("!=") => !actual.begins_with(&wanted),
            Some(">=") => actual.compare(&wanted, 4).is_ge(),
            Some("<=") => actual.compare(&wanted, named).is_le(),
            Some(">") => actual.compare(&wanted, named).is_gt(),
            Some("<") => actual.compare(&wanted, 4).is_lt(),
            // The first number that is not zero stays.
            Some("^") => actual.is_from(&wanted, (wanted.0.iter().position(|number| *number != 0).unwrap_or(0) + 1).min(named)),
            // npm and Poetry keep two numbers, Composer, pip, RubyGems and Hex all but the last.
            Some("~") if tool != "php" => actual.is_from(&wanted, named.min(2)),
            Some("~" | "~=" | "~>") => actual.is_from(&wanted, named.saturating_sub(1).max(1)),
            Some(_) => return None,
        };
    }
}

#[cfg(test)]
mod tests {
    use super::{is_satisfied, mismatches};
    use crate::{Memory, plan};

    #[test]
    fn versions_are_compared_as_their_tools_do() {
        for (tool, file, requested, running, satisfied) in [
            ("node", "package.json", "22.x", "20.19.2", Some(false)),
            ("node", "package.json", "20.x", "20.19.2", Some(true)),
            ("node", "package.json", ">=20 <21", "20.19.2", Some(true)),
            ("node", "package.json", ">=20 <21", "22.1.0", Some(false)),
            ("node", "package.json", ">= 18", "20.19.2", Some(true)),
            ("node", "package.json", "> 18", "18.20.0", Some(false)),
            ("node", "package.json", "^18", "20.19.2", Some(false)),
            ("node", "package.json", "^18.0.0 || ^20.9.0", "20.19.2", Some(true)),
            ("node", "package.json", "^20.9.0", "20.8.0", Some(false)),
            ("node", "package.json", "~20.19", "20.19.2", Some(true)),
            ("node", "package.json", "~20.18.1", "20.19.2", Some(false)),
            ("node", "package.json", "18 - 20", "20.19.2", Some(true)),
            ("node", "package.json", "18 - 19", "20.19.2", Some(false)),
            ("node", "package.json", "*", "20.19.2", Some(true)),
            ("node", "package.json", "<=20", "20.19.2", Some(true)),
            ("node", ".nvmrc", "lts/*", "20.19.2", Some(true)),
            ("node", ".nvmrc", "lts/*", "21.0.0", Some(false)),
            ("node", ".nvmrc", "lts/jod", "20.19.2", Some(false)),
            ("node", ".nvmrc", "lts/iron", "20.19.2", Some(true)),
            ("node", ".nvmrc", "v20.11.1", "v20.19.2", Some(false)),
            ("node", ".nvmrc", "20", "20.19.2", Some(true)),
            ("node", ".nvmrc", "something", "20.19.2", None),
            ("python", ".python-version", "3.12", "3.11.2", Some(false)),
            ("python", ".python-version", "3.11", "3.11.2", Some(true)),
            ("python", ".python-version", "pypy3.9-7.3.9", "3.11.2", Some(false)),
            ("python", "pyproject.toml", ">=3.8,<3.12", "3.11.2", Some(true)),
            ("python", "pyproject.toml", ">=3.12", "3.11.2", Some(false)),
            ("python", "pyproject.toml", "^3.10", "3.11.2", Some(true)),
            ("python", "pyproject.toml", "~=3.11", "3.13.0", Some(true)),
            ("python", "pyproject.toml", "~=3.11.0", "3.12.0", Some(false)),
            ("python", "pyproject.toml", "==3.11.*", "3.11.2", Some(true)),
            ("python", "pyproject.toml", ">=3.9,!=3.11.*", "3.11.2", Some(false)),
            ("python", "runtime.txt", "python-3.11.4", "3.11.2", Some(false)),
            ("go", "go.mod", "1.19", "1.22.2", Some(true)),
            ("go", "go.mod", "1.23.1", "1.22.2", Some(false)),
            ("go", ".go-version", "1.21", "1.22.2", Some(false)),
            ("rust", "Cargo.toml", "1.70", "1.75.0", Some(true)),
            ("rust", "rust-toolchain.toml", "1.70", "1.75.0", Some(false)),
            ("rust", "rust-toolchain.toml", "stable", "1.75.0", Some(true)),
            ("rust", "rust-toolchain.toml", "nightly-2024-01-01", "1.75.0", Some(false)),
            ("rust", "rust-toolchain.toml", "nightly", "1.80.0-nightly", Some(true)),
            ("java", "pom.xml", "17", "21.0.2", Some(true)),
            ("java", "pom.xml", "21", "17.0.9", Some(false)),
            ("java", "pom.xml", "1.8", "17.0.9", Some(true)),
            ("java", ".java-version", "17", "21.0.2", Some(false)),
            ("java", ".java-version", "temurin-17.0.9", "17.0.9", Some(true)),
            ("java", ".sdkmanrc", "21.0.2-tem", "21.0.2", Some(true)),
            ("java", "system.properties", "1.8", "1.8.0_392", Some(true)),
            ("ruby", ".ruby-version", "3.3.0", "3.1.2", Some(false)),
            ("ruby", "Gemfile", "~> 3.1", "3.3.0", Some(true)),
            ("ruby", "Gemfile", "~> 3.1.0", "3.3.0", Some(false)),
            ("ruby", "Gemfile", "jruby-9.4", "3.3.0", Some(false)),
            ("php", "composer.json", "^8.1", "8.2.7", Some(true)),
            ("php", "composer.json", "^7.4|^8.3", "8.2.7", Some(false)),
            ("php", "composer.json", "~8.1", "8.2.7", Some(true)),
            ("php", "composer.json", "8.1.*", "8.2.7", Some(false)),
            ("php", "composer.json", ">=8.0 <8.2", "8.2.7", Some(false)),
            ("dotnet", "global.json", "8.0.100", "8.0.404", Some(true)),
            ("dotnet", "App.csproj", "9.0", "8.0.404", Some(false)),
            ("elixir", "mix.exs", "~> 1.14", "1.17.3", Some(true)),
            ("elixir", "mix.exs", "~> 1.18", "1.17.3", Some(false)),
            ("bun", ".bun-version", "1.1.0", "1.4.5", Some(false)),
            ("deno", ".deno-version", "2", "2.9.6", Some(true)),
            ("zig", "build.zig.zon", "0.11.0", "0.13.0", Some(true)),
            ("node", "package.json", ">=99999999999999999999", "20.1.0", None),
        ] {
            assert_eq!(is_satisfied(tool, requested, file, running), satisfied, "{tool} {requested} in {file}, {running} runs");
        }
    }

    #[test]
    fn a_mismatch_names_the_line_that_asks() {
        let package = "{\n  \"engines\": {\n    \"node\": \"22.x\"\n  },\n  \"scripts\": { \"start\": \"node a.js\" }\n}";
        let plan = plan(&Memory::new([("package.json", package)])).expect("a plan");
        let found = mismatches(&plan, |tool| (tool == "node").then(|| "20.19.2".into()));
        let told: Vec<String> = found.iter().map(ToString::to_string).collect();
        assert_eq!(told, ["package.json:3 requests Node.js 22.x, but Node.js 20.19.2 runs"]);
        assert!(mismatches(&plan, |_| Some("22.1.0".into())).is_empty() && mismatches(&plan, |_| None).is_empty());
    }
}
