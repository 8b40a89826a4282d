//! Java with Maven; Spring Boot.

use super::required;
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Tree, line_of};

pub const FILE: &str = "pom.xml";

pub fn detect(tree: &dyn Tree, draft: &mut Draft) -> Result<(), PlanError> {
    let text = required(tree, FILE)?;
    if !text.contains("<project") {
        return Err(PlanError { file: FILE.into(), line: None, message: "it has no <project> element".into() });
    }
    draft.language("java", Source::file(FILE));
    draft.package_manager("maven", Source::file(FILE), "pom.xml is there");
    draft.plan.detection.build_tool = Some("maven".into());
    if let Some(version) = element(&text, "java.version").or_else(|| element(&text, "maven.compiler.release")) {
        draft.version("java", &version, Source::line(FILE, &text, &version));
    }
    let maven = if tree.has("mvnw") { "sh ./mvnw" } else { "mvn" };
    draft.build(
        &format!("{maven} --batch-mode --no-transfer-progress -DskipTests package"),
        Source::file(FILE),
        "Maven packages it",
    );
    let own = own_part(&text);
    let (Some(artifact), Some(version)) = (element(&own, "artifactId"), element(&own, "version")) else {
        return Err(PlanError {
            file: FILE.into(),
            line: None,
            message: "it has no <artifactId> and <version> of its own".into(),
        });
    };
    let jar = element(&text, "finalName").unwrap_or_else(|| format!("{artifact}-{version}"));
    if let Some(line) = line_of(&text, "spring-boot") {
        let source = Source { file: FILE, line: Some(line) };
        draft.framework("spring-boot", source, "its parent or a dependency");
        draft.kind(Kind::Web);
        draft.process(
            "web",
            &format!("java -XX:MaxRAMPercentage=70 -Dserver.port=$PORT -jar target/{jar}.jar"),
            source,
            "Spring Boot's executable archive",
            0.95,
        );
        draft.port(8080, source, "Spring Boot's own port; PORT says the same", 0.9);
    } else {
        draft.kind(Kind::Web);
        draft.process(
            "web",
            &format!("java -jar target/{jar}.jar"),
            Source::line(FILE, &text, "<artifactId>"),
            "the archive that Maven makes",
            0.5,
        );
        draft.ask(
            "processes.web",
            "no framework was recognized; the archive may not be executable",
            &format!("[processes]\nweb = \"java -cp target/{jar}.jar com.example.Main\""),
        );
    }
    Ok(())
}

/// The project's own elements, without those of its parent, dependencies and build.
fn own_part(text: &str) -> String {
    let mut own = text.to_owned();
    for section in ["parent", "dependencies", "dependencyManagement", "build", "profiles"] {
        while let (Some(start), Some(end)) = (own.find(&format!("<{section}>")), own.find(&format!("</{section}>"))) {
            if end < start {
                break;
            }
            own.replace_range(start..end + section.len() + 3, "");
        }
    }
    own
}

fn element(text: &str, name: &str) -> Option<String> {
    let (_, rest) = text.split_once(&format!("<{name}>"))?;
    let (value, _) = rest.split_once(&format!("</{name}>"))?;
    let value = value.trim();
    (!value.is_empty() && !value.contains(['<', '$', '/', ' '])).then(|| value.to_owned())
}
