//! Plans of small repositories: `corpus/*.txt`, each with its expected plan. `UPDATE_GOLDEN=1` updates the expected plans;
//! review the difference.

mod awkward;
mod hostile;
mod images;
mod random;
mod rows;
mod structure;

use std::fmt::Write;
use std::path::{Path, PathBuf};

use capsule_buildplan::{Memory, Plan, PlanError, plan};

fn corpus() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/plans/corpus")
}

/// A file of the corpus: files behind lines `-- path --`, then what is expected behind `== plan`.
fn parse(text: &str) -> (String, Vec<(String, String)>, String) {
    let (input, expected) = text.split_once("== plan\n").unwrap_or((text, ""));
    let mut files: Vec<(String, String)> = Vec::new();
    let mut about = String::new();
    for line in input.split_inclusive('\n') {
        match line.trim_end().strip_prefix("-- ").and_then(|rest| rest.strip_suffix(" --")) {
            Some(path) => files.push((path.to_owned(), String::new())),
            None => match files.last_mut() {
                Some((_, content)) => content.push_str(line),
                None => about.push_str(line),
            },
        }
    }
    (about, files, expected.to_owned())
}

/// A summary of a plan without empty values.
fn summary(planned: &Result<Plan, PlanError>) -> String {
    let mut text = String::new();
    let plan = match planned {
        Ok(plan) => plan,
        Err(error) => return format!("error: {error}\n"),
    };
    let json = serde_json::to_value(plan).expect("JSON");
    let _ = writeln!(text, "kind: {}", json["kind"].as_str().unwrap_or_default());
    for section in ["detection", "build", "processes", "networking"] {
        for (name, value) in json[section].as_object().expect("an object") {
            let value = match value {
                serde_json::Value::Null | serde_json::Value::Bool(false) => continue,
                serde_json::Value::String(text) => text.clone(),
                serde_json::Value::Array(all) if all.len() < 2 => continue,
                serde_json::Value::Object(all) if all.is_empty() => continue,
                other => other.to_string(),
            };
            let _ = writeln!(text, "{section}.{name}: {value}");
        }
    }
    for list in ["needs", "system_packages"] {
        let all: Vec<&str> = json[list].as_array().expect("a list").iter().filter_map(serde_json::Value::as_str).collect();
        if !all.is_empty() {
            let _ = writeln!(text, "{list}: {}", all.join(" "));
        }
    }
    for member in &plan.members {
        let _ = writeln!(text, "member: {} {} {}", member.path, member.name, serde_json::to_value(member.kind).expect("JSON"));
    }
    for evidence in &plan.evidence {
        let place = evidence.line.map_or_else(|| evidence.file.clone(), |line| format!("{}:{line}", evidence.file));
        let _ = writeln!(text, "because: {} in {place}: {}", evidence.field, evidence.reason);
    }
    for question in &plan.questions {
        let _ = writeln!(text, "asks: {}: {} -> {}", question.field, question.text, question.answer_with.replace('\n', "; "));
    }
    text
}

#[test]
fn every_repository_of_the_corpus_has_its_expected_plan() {
    let mut wrong = Vec::new();
    let mut paths: Vec<_> = std::fs::read_dir(corpus()).expect("the corpus").flatten().map(|entry| entry.path()).collect();
    paths.sort();
    assert!(paths.len() >= 200, "{} fixtures", paths.len());
    for path in &paths {
        let text = std::fs::read_to_string(path).expect("a fixture");
        let (about, files, expected) = parse(&text);
        let found = summary(&plan(&Memory::new(files.clone())));
        if found == expected {
            continue;
        }
        if std::env::var_os("UPDATE_GOLDEN").is_some() {
            let input: String = files.iter().map(|(path, content)| format!("-- {path} --\n{content}")).collect();
            std::fs::write(path, format!("{about}{input}== plan\n{found}")).expect("written");
        } else {
            wrong.push(format!("{}:\n--- expected\n{expected}--- found\n{found}", path.display()));
        }
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), paths.len(), wrong.join("\n"));
}

#[test]
fn the_suggested_lines_of_a_question_answer_it() {
    for path in std::fs::read_dir(corpus()).expect("the corpus").flatten().map(|entry| entry.path()) {
        let (_, files, _) = parse(&std::fs::read_to_string(&path).expect("a fixture"));
        let Ok(asking) = plan(&Memory::new(files.clone())) else { continue };
        if files.iter().any(|(path, _)| path == "capsule.toml") {
            continue;
        }
        for question in asking.questions.iter().filter(|question| !question.answer_with.starts_with('#')) {
            let answered = files.iter().cloned().chain([("capsule.toml".to_owned(), question.answer_with.clone())]);
            let settled = plan(&Memory::new(answered))
                .unwrap_or_else(|error| panic!("{}: {error}\n{}", path.display(), question.answer_with));
            let again = settled.questions.iter().any(|other| other.field == question.field && other.text == question.text);
            assert!(!again, "{}: asked again: {question:?}", path.display());
        }
    }
}
