//! Size limits of a plan. Plans are stored, sent and printed, so each text in them is truncated or refused.

use crate::plan::{Plan, PlanError};

/// Process types of one application.
pub const MAX_PROCESSES: usize = 100;
/// Items of each list: needed services, system packages, members.
pub const MAX_LIST_ITEMS: usize = 400;
/// Items of evidence.
pub const MAX_EVIDENCE: usize = 2000;
/// Questions.
pub const MAX_QUESTIONS: usize = 50;
/// Bytes of a text for people.
const MAX_TEXT_BYTES: usize = 1000;
/// Bytes of a command or the value of a variable.
const MAX_COMMAND_BYTES: usize = 16 << 10;
/// Variables of a build.
const MAX_VARIABLES: usize = 500;
/// Bytes of all texts of a plan.
const MAX_BYTES: usize = 256 << 10;

/// Truncates a text for people to the length that a plan keeps.
pub fn truncate(text: &str) -> String {
    truncate_to(text, MAX_TEXT_BYTES)
}

/// Truncates a text for people to `max_bytes`, at the end of a character, and marks the cut with `…`.
#[must_use]
pub fn truncate_to(text: &str, max_bytes: usize) -> String {
    if text.len() <= max_bytes {
        return text.to_owned();
    }
    format!("{}…", &text[..text.floor_char_boundary(max_bytes)])
}

/// Whether a name is a valid process type. It becomes part of names on the host.
pub fn is_process_name(name: &str) -> bool {
    (1..=30).contains(&name.len()) && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-' || b == b'_')
}

/// Whether a path is a valid URL path.
pub fn is_http_path(path: &str) -> bool {
    path.starts_with('/') && path.len() <= MAX_TEXT_BYTES && path.bytes().all(|byte| byte.is_ascii_graphic())
}

/// Checks the size and the values of a plan.
///
/// # Errors
/// When a limit is exceeded or a value is invalid, with the place in the evidence for it.
pub fn check(plan: &Plan) -> Result<(), PlanError> {
    if let Some(name) = plan.processes.keys().find(|name| !is_process_name(name)) {
        return Err(at(
            plan,
            "processes",
            format!("`{}` is not a valid process type: use a-z, 0-9, - and _, at most 30 characters", truncate_to(name, 100)),
        ));
    }
    if plan.processes.len() > MAX_PROCESSES {
        return Err(at(plan, "processes", format!("more than {MAX_PROCESSES} process types are declared")));
    }
    if plan.networking.health_check.as_ref().is_some_and(|path| !is_http_path(path)) {
        return Err(at(plan, "networking.health_check", "the health check is not a URL path".into()));
    }
    let steps = [
        ("build.install", &plan.build.install),
        ("build.build", &plan.build.build),
        ("build.release", &plan.build.release),
        ("build.output", &plan.build.output),
    ];
    let steps = steps.into_iter().filter_map(|(field, text)| Some((field.to_owned(), text.as_ref()?)));
    let processes = plan.processes.iter().map(|(name, command)| (format!("processes.{name}"), command));
    for (field, command) in steps.chain(processes) {
        if command.contains('\0') {
            return Err(at(plan, &field, format!("the command of {field} holds a NUL byte")));
        }
        if command.len() > MAX_COMMAND_BYTES {
            let message = format!("the command of {field} has {} bytes; at most {MAX_COMMAND_BYTES} are allowed", command.len());
            return Err(at(plan, &field, message));
        }
    }
    let variables = &plan.build.env;
    if variables.len() > MAX_VARIABLES {
        let message = format!("{} variables are set for the build; at most {MAX_VARIABLES} are allowed", variables.len());
        return Err(at(plan, "build.env", message));
    }
    if let Some((name, value)) = variables.iter().find(|(name, value)| name.len() > 256 || value.len() > MAX_COMMAND_BYTES) {
        let message =
            format!("the variable {} has {} bytes; at most {MAX_COMMAND_BYTES} are allowed", truncate(name), value.len());
        return Err(at(plan, "build.env", message));
    }
    let bytes = size(plan);
    if bytes > MAX_BYTES {
        let message = format!("the plan has {} KiB of text; at most {} KiB are allowed", bytes >> 10, MAX_BYTES >> 10);
        return Err(at(plan, "", message));
    }
    Ok(())
}

fn size(plan: &Plan) -> usize {
    let build = &plan.build;
    let steps = [&build.install, &build.build, &build.release, &build.output, &build.dockerfile, &build.compose];
    let pairs = plan.processes.iter().chain(&build.env).chain(&plan.detection.versions);
    let evidence = plan.evidence.iter().map(|one| one.field.len() + one.value.len() + one.file.len() + one.reason.len());
    let questions = plan.questions.iter().map(|one| one.field.len() + one.text.len() + one.answer_with.len());
    steps.into_iter().flatten().map(String::len).sum::<usize>()
        + pairs.map(|(name, value)| name.len() + value.len()).sum::<usize>()
        + plan.needs.iter().chain(&plan.system_packages).chain(&plan.detection.languages).map(String::len).sum::<usize>()
        + plan.members.iter().map(|member| member.path.len() + member.name.len()).sum::<usize>()
        + evidence.chain(questions).sum::<usize>()
}

/// An error of a field, at the place in its evidence.
fn at(plan: &Plan, field: &str, message: String) -> PlanError {
    let known = plan.evidence.iter().find(|evidence| evidence.field == field);
    PlanError {
        file: known.map_or_else(|| ".".into(), |known| known.file.clone()),
        line: known.and_then(|known| known.line),
        message,
    }
}

#[cfg(test)]
mod tests {
    use crate::{Memory, Plan, PlanError, plan};

    fn of(file: &str, content: String) -> Result<Plan, PlanError> {
        plan(&Memory::new([(file.to_owned(), content), ("start.sh".to_owned(), String::new())]))
    }

    #[test]
    fn files_that_would_make_a_plan_too_large_are_refused() {
        let many = |piece: &dyn Fn(usize) -> String, count: usize| (0..count).map(piece).collect::<String>();
        for (file, content, told) in [
            ("Procfile", many(&|n| format!("p{n}: a\n"), 100_000), "Procfile:101: more than 100 process types"),
            ("Procfile", format!("web: {}\n", "a".repeat(1 << 20)), "Procfile:1: the command of processes.web has"),
            ("Procfile", format!("{}\n", "a".repeat(1 << 20)), "is not `type: command`"),
            (
                "capsule.toml",
                format!("[processes]\n{}", many(&|n| format!("p{n} = \"a\"\n"), 50_000)),
                "more than 100 process types",
            ),
            ("capsule.toml", format!("[build.env]\n{}", many(&|n| format!("V{n} = \"a\"\n"), 50_000)), "50000 variables"),
            (
                "capsule.toml",
                format!("[build]\nbuild = \"{}\"", "a".repeat(1 << 20)),
                "capsule.toml:2: the command of build.build",
            ),
            (
                "package.json",
                "{\"scripts\":{\"start\":\"a\\u0000b\"}}".into(),
                "package.json:1: the command of processes.web holds a NUL byte",
            ),
            ("capsule.toml", "[networking]\nhealth_check = \"/a b\"\n".into(), "capsule.toml:2: "),
            ("app.json", format!("{{\"env\":{{\"A\":\"{}\"}}}}", "a".repeat(1 << 20)), "the variable A has"),
            (
                "package.json",
                format!("{{\"scripts\":{{\"start\":\"{}\"}}}}", "a".repeat(1 << 20)),
                "package.json:1: the command of",
            ),
        ] {
            let error = of(file, content).expect_err(file).to_string();
            assert!(error.contains(told) && error.len() < 3000, "{error}");
        }
    }

    #[test]
    fn long_texts_and_lists_are_truncated() {
        let packages: String = (0..100_000).map(|n| format!("package-{n}\n")).collect();
        let compose: String = (0..20_000)
            .map(|n| format!("  s{n}:\n    build: ./{}{n}\n", "x".repeat(20)))
            .fold("services:\n".into(), |all, one| all + &one);
        let fly = "[processes]\n\"../../x\" = \"a\"\nWEB = \"b\"\n".to_owned()
            + &(0..20_000).map(|n| format!("p{n} = \"a\"\n")).collect::<String>();
        let addons = format!("{{\"name\":\"{}\",\"workspaces\":[\"{}\"]}}", "n".repeat(1 << 20), "w".repeat(1 << 19));
        for (file, content) in [("Aptfile", packages), ("compose.yaml", compose), ("fly.toml", fly), ("package.json", addons)] {
            let plan = of(file, content).expect("a plan");
            let text = serde_json::to_string(&plan).expect("JSON");
            assert!(plan.processes.keys().all(|name| super::is_process_name(name)), "{file}");
            assert!(text.len() < 600_000, "{file}: {}", text.len());
        }
    }
}
