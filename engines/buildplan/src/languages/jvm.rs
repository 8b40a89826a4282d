//! Java, Kotlin, Scala, Groovy and Clojure: Maven, Gradle, sbt, Mill, Leiningen, tools.deps, Ant.

use std::collections::BTreeSet;

use super::{Pin, pinned, version};
use crate::dependencies::Dependencies;
use crate::frameworks::{self, Found, Type};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Lines, Repo, join, line_of};

const POM: &str = "pom.xml";
const GRADLE: [&str; 4] = ["build.gradle", "build.gradle.kts", "settings.gradle", "settings.gradle.kts"];
const SBT: &str = "build.sbt";
const LEIN: &str = "project.clj";
const DEPS: &str = "deps.edn";
/// Memory by the container's limit, not by the host's.
const JAVA: &str = "java -XX:MaxRAMPercentage=70";

pub fn is_there(repo: &Repo<'_>) -> Option<String> {
    let files =
        [POM, GRADLE[0], GRADLE[1], GRADLE[2], GRADLE[3], SBT, "build.sc", "build.mill", LEIN, DEPS, "build.xml", "Main.java"];
    repo.first(&files).map(str::to_owned)
}

pub fn detect(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    match is_there(repo).as_deref() {
        Some(POM) => maven(repo, draft, &mut BTreeSet::new())?,
        Some(SBT | "build.sc" | "build.mill") => scala(repo, draft),
        Some(LEIN) => leiningen(repo, draft),
        Some(DEPS) => tools_deps(repo, draft),
        Some(file) if GRADLE.contains(&file) => gradle(repo, draft),
        Some("build.xml") => {
            draft.language("java", Source::file("build.xml"));
            draft.package_manager("ant", Source::file("build.xml"), "build.xml exists");
            draft.build("ant", Source::file("build.xml"), "Ant's default target");
            draft.add_question("processes.web", "the output of Ant is unknown", "[processes]\nweb = \"java -jar dist/app.jar\"");
        }
        _ => {
            draft.language("java", Source::file("Main.java"));
            draft.build("javac Main.java", Source::file("Main.java"), "a program of one file");
            let serves =
                line_of(&repo.text("Main.java"), "HttpServer").or_else(|| line_of(&repo.text("Main.java"), "ServerSocket"));
            let process = if serves.is_some() { "web" } else { "worker" };
            draft.process(process, "java Main", Source { file: "Main.java", line: serves }, "its main class", 0.8);
            if serves.is_some() {
                draft.default_port(None, 8080, Source::file("Main.java"));
            }
        }
    }
    if !draft.plan.detection.versions.contains_key("java") {
        let system = || {
            let text = repo.read("system.properties")?;
            let (index, line) = text.lines().enumerate().find(|(_, line)| line.starts_with("java.runtime.version"))?;
            Some(Pin::new(line.split('=').nth(1)?, "system.properties", Some(index + 1)))
        };
        let sdkman = || {
            let text = repo.read(".sdkmanrc")?;
            let (index, line) = text.lines().enumerate().find(|(_, line)| line.starts_with("java="))?;
            Some(Pin::new(line.trim_start_matches("java="), ".sdkmanrc", Some(index + 1)))
        };
        version(draft, "java", pinned(repo, &["java"], &[(".java-version", "")]).or_else(system).or_else(sdkman));
    }
    Ok(())
}

/// The language of the sources, Java unless others are there.
fn language(repo: &Repo<'_>, draft: &mut Draft, hint: Option<&'static str>, file: &str) {
    let folders = [
        ("src/main/kotlin", "kotlin"),
        ("src/main/scala", "scala"),
        ("src/main/groovy", "groovy"),
        ("src/main/clojure", "clojure"),
    ];
    let there: Vec<&str> = folders.into_iter().filter(|(folder, _)| repo.has_folder(folder)).map(|(_, name)| name).collect();
    let java = repo.has_folder("src/main/java");
    let main = match (hint, java, there.first()) {
        (Some(hint), false, _) => hint,
        (_, true, Some(&"kotlin")) if hint == Some("kotlin") => "kotlin",
        (_, false, Some(other)) => other,
        _ if repo.has_folder("grails-app") => "groovy",
        _ => "java",
    };
    draft.language(main, Source::file(file));
    draft.plan.detection.languages.extend(there.into_iter().filter(|name| *name != main).map(str::to_owned));
}

/// What follows from a framework, with the archive that the build makes.
fn program(repo: &Repo<'_>, draft: &mut Draft, found: Option<&Found>, archive: &str, file: &str, is_executable: bool) {
    let Some(found) = found else {
        draft.process("worker", &format!("{JAVA} -jar {archive}"), Source::file(file), "the archive that the build makes", 0.5);
        draft.kind(Kind::Worker);
        draft.add_question(
            "processes.web",
            if is_executable {
                "no framework detected; treated as a worker"
            } else {
                "no framework was recognized; the archive may not be executable"
            },
            &format!("[processes]\nweb = \"java -cp {archive} com.example.Main\""),
        );
        return;
    };
    draft.found(found);
    let row = found.framework;
    let (command, reason, confidence) = match row.name {
        "spring-boot" | "jhipster" | "grails" => {
            (format!("{JAVA} -Dserver.port=$PORT -jar {archive}"), "Spring Boot's executable archive", 0.95)
        }
        "quarkus" => {
            let folder = archive.rsplit_once('/').map_or("target", |(folder, _)| folder).trim_end_matches("/libs");
            (
                format!("{JAVA} -Dquarkus.http.host=0.0.0.0 -Dquarkus.http.port=$PORT -jar {folder}/quarkus-app/quarkus-run.jar"),
                "Quarkus' runner",
                0.95,
            )
        }
        "micronaut" => (format!("MICRONAUT_SERVER_PORT=$PORT {JAVA} -jar {archive}"), "the archive with all dependencies", 0.8),
        "helidon" => (format!("{JAVA} -Dserver.port=$PORT -jar {archive}"), "Helidon's executable archive", 0.9),
        "dropwizard" => {
            let settings = repo.first(&["config.yml", "config.yaml", "configuration.yml"]).unwrap_or("config.yml");
            (
                format!("{JAVA} -Ddw.server.applicationConnectors[0].port=$PORT -jar {archive} server {settings}"),
                "how Dropwizard is started",
                0.8,
            )
        }
        _ => (format!("{JAVA} -jar {archive}"), "the archive that the build makes", 0.6),
    };
    let process = if row.kind == Type::Worker { "worker" } else { "web" };
    draft.process(process, &command, found.source(), reason, confidence);
    if process == "web" {
        draft.default_port(Some(found), 8080, found.source());
    }
}

fn health(dependencies: &Dependencies, draft: &mut Draft) {
    for (dependency, path, reason) in [
        ("spring-boot-starter-actuator", "/actuator/health", "Spring Boot's own health check"),
        ("quarkus-smallrye-health", "/q/health", "Quarkus' own health check"),
        ("micronaut-management", "/health", "Micronaut's own health check"),
    ] {
        if let Some(found) = dependencies.find(dependency) {
            draft.health_check(path, Source { file: &found.file, line: found.line }, reason, 0.8);
        }
    }
}

/// `seen` has the folders whose modules were looked into: a module may name any other, and itself.
fn maven(repo: &Repo<'_>, draft: &mut Draft, seen: &mut BTreeSet<String>) -> Result<(), PlanError> {
    seen.extend(repo.prefix().map(str::to_owned));
    let text =
        repo.read(POM).ok_or_else(|| PlanError { file: POM.into(), line: None, message: "it cannot be read as text".into() })?;
    let failed = |message: String, line| PlanError { file: POM.into(), line, message };
    let document = roxmltree::Document::parse(&text)
        .map_err(|error| failed(format!("it is not valid XML: {error}"), usize::try_from(error.pos().row).ok()))?;
    let root = document.root_element();
    if root.tag_name().name() != "project" {
        return Err(failed("it has no <project> element".into(), None));
    }
    let child = |node: roxmltree::Node<'_, '_>, name: &str| {
        node.children()
            .find(|child| child.tag_name().name() == name)
            .and_then(|child| child.text())
            .map(|text| text.trim().to_owned())
    };
    let lines = Lines::of(&text);
    let line = |node: roxmltree::Node<'_, '_>| Some(lines.at(node.range().start));
    let section = |name: &str| root.children().find(|node| node.tag_name().name() == name);
    let property = |name: &str| section("properties").and_then(|all| all.children().find(|node| node.tag_name().name() == name));

    let mut dependencies = Dependencies::default();
    for node in root.descendants().filter(|node| matches!(node.tag_name().name(), "parent" | "dependency" | "plugin")) {
        let group = child(node, "groupId").unwrap_or_default();
        let artifact = child(node, "artifactId").unwrap_or_default();
        let own = node.children().find(|child| child.tag_name().name() == "artifactId").unwrap_or(node);
        dependencies.add(&format!("{group}:{artifact}"), POM, line(own));
    }
    let kotlin = dependencies.has("kotlin-maven-plugin").then_some("kotlin");
    let scala = dependencies.has("scala-maven-plugin").then_some("scala");
    language(repo, draft, kotlin.or(scala), POM);
    draft.package_manager("maven", Source::file(POM), "pom.xml exists");
    draft.plan.detection.build_tool = Some("maven".into());
    let wanted = ["java.version", "maven.compiler.release", "maven.compiler.target", "maven.compiler.source", "jdk.version"]
        .into_iter()
        .find_map(property);
    version(
        draft,
        "java",
        wanted.and_then(|node| Some(Pin::new(node.text()?, POM, line(node)))).filter(|pin| !pin.version.contains('$')),
    );
    let command = if repo.has("mvnw") { "sh ./mvnw" } else { "mvn" };
    draft.build(
        &format!("{command} --batch-mode --no-transfer-progress -DskipTests package"),
        Source::file(POM),
        "Maven packages it",
    );
    let found = frameworks::find("java", &dependencies, repo);
    if section("modules").is_some() {
        if let Some(found) = &found {
            draft.found(found);
        }
        return maven_modules(repo, draft, found.as_ref(), command, seen);
    }
    let parent = section("parent");
    let artifact = child(root, "artifactId");
    let own = child(root, "version").or_else(|| parent.and_then(|parent| child(parent, "version")));
    let (Some(artifact), Some(own)) = (artifact, own) else {
        return Err(failed("it has no <artifactId> and <version>, of its own or of a parent".into(), None));
    };
    let name = section("build").and_then(|build| child(build, "finalName"));
    let name = name.map_or_else(
        || format!("{artifact}-{own}"),
        |name| name.replace("${project.artifactId}", &artifact).replace("${project.version}", &own),
    );
    let name = if name.contains("${") { "*".to_owned() } else { name };
    let packaging = child(root, "packaging").unwrap_or_else(|| "jar".into());
    if packaging == "war" && !found.as_ref().is_some_and(|found| matches!(found.framework.name, "spring-boot" | "jhipster")) {
        if let Some(found) = &found {
            draft.found(found);
        }
        draft.kind(Kind::Web);
        draft.add_question(
            "processes.web",
            &format!("target/{name}.war takes a servlet container"),
            &format!("[processes]\nweb = \"java -jar target/dependency/webapp-runner.jar --port $PORT target/{name}.war\""),
        );
        return Ok(());
    }
    if packaging == "pom" {
        draft.kind(Kind::Library);
        return Ok(());
    }
    let shaded = ["maven-shade-plugin", "maven-assembly-plugin", "spring-boot-maven-plugin", "maven-jar-plugin"]
        .iter()
        .any(|plugin| dependencies.has(plugin));
    let suffix = if dependencies.has("maven-assembly-plugin") && !dependencies.has("maven-shade-plugin") {
        "-jar-with-dependencies"
    } else {
        ""
    };
    program(repo, draft, found.as_ref(), &format!("target/{name}{suffix}.{packaging}"), POM, shaded);
    health(&dependencies, draft);
    dependencies.conclude("java", draft);
    Ok(())
}

/// A build of several modules: the one that makes the application.
fn maven_modules(
    repo: &Repo<'_>,
    draft: &mut Draft,
    outer: Option<&Found>,
    command: &str,
    seen: &mut BTreeSet<String>,
) -> Result<(), PlanError> {
    let mut best: Option<(u32, String, Draft)> = None;
    for folder in crate::workspace::maven_members(repo).into_iter().take(40) {
        let member = repo.folder(&folder);
        if !member.has(POM) || member.prefix().is_some_and(|prefix| seen.contains(prefix)) {
            continue;
        }
        let mut inner = Draft::default();
        // What is wrong with one module is told when it is deployed by itself.
        if maven(&member, &mut inner, seen).is_err() {
            continue;
        }
        let weight = super::weight(&inner) * 2 + u32::from(inner.plan.detection.framework.is_some());
        if best.as_ref().is_none_or(|(most, ..)| weight > *most) {
            best = Some((weight, folder, inner));
        }
    }
    let Some((_, folder, inner)) = best.filter(|(weight, ..)| *weight > 4) else {
        draft.kind(if outer.is_some() { Kind::Web } else { Kind::Library });
        return Ok(());
    };
    let source = |evidence: &crate::plan::Evidence| join(&folder, &evidence.file);
    for evidence in &inner.plan.evidence {
        let known = draft.plan.evidence.iter().any(|known| known.field == evidence.field);
        if !known || evidence.field.starts_with("detection.framework") {
            let file = source(evidence);
            let at = Source { file: &file, line: evidence.line };
            draft.add_evidence(
                &evidence.field,
                &evidence.value.replace("target/", &format!("{folder}/target/")),
                at,
                &evidence.reason,
                evidence.confidence,
            );
        }
    }
    draft.plan.detection.framework = inner.plan.detection.framework.clone();
    draft.plan.kind = inner.plan.kind;
    for (name, version) in inner.plan.detection.versions {
        draft.plan.detection.versions.entry(name).or_insert(version);
    }
    let text = format!("{command} --batch-mode --no-transfer-progress -DskipTests --projects {folder} --also-make package");
    draft.build(&text, Source::file(&join(&folder, POM)), "Maven packages the module and what it takes");
    for (name, command) in inner.plan.processes {
        draft.plan.processes.insert(name, command.replace("target/", &format!("{folder}/target/")));
    }
    draft.plan.networking = inner.plan.networking;
    draft.plan.needs.extend(inner.plan.needs);
    Ok(())
}

fn gradle(repo: &Repo<'_>, draft: &mut Draft) {
    let file = repo.first(&GRADLE).unwrap_or(GRADLE[0]);
    let mut dependencies = Dependencies::default();
    let files: Vec<String> =
        GRADLE[..2].iter().map(|file| (*file).to_owned()).chain(["gradle/libs.versions.toml".to_owned()]).collect();
    for file in &files {
        gradle_dependencies(&repo.text(file), file, &mut dependencies);
    }
    let mut module = String::new();
    let mut found = frameworks::find("java", &dependencies, repo);
    let members = crate::workspace::gradle_members(repo);
    if found.is_none() || !repo.has_folder("src/main") {
        // The member that has the framework's plug-in or dependency, `app` first.
        let mut folders: Vec<&String> = members.iter().collect();
        folders.sort_by_key(|folder| !matches!(folder.as_str(), "app" | "server" | "application" | "web" | "api"));
        for folder in folders.into_iter().take(40) {
            let mut inner = Dependencies::default();
            for file in &GRADLE[..2] {
                let path = join(folder, file);
                gradle_dependencies(&repo.text(&path), &path, &mut inner);
            }
            if inner.0.is_empty() {
                continue;
            }
            let member = repo.folder(folder);
            if let Some(it) =
                frameworks::find("java", &inner, &member).filter(|_| member.has_folder("src/main") || inner.has("application"))
            {
                dependencies.0.extend(inner.0);
                (module, found) = (folder.clone(), Some(it));
                break;
            }
        }
    }
    let place = if module.is_empty() { repo.clone() } else { repo.folder(&module) };
    let kotlin =
        (dependencies.has("org.jetbrains.kotlin.jvm") || dependencies.has("kotlin") || dependencies.has("kotlin-stdlib"))
            .then_some("kotlin");
    language(&place, draft, kotlin.filter(|_| place.has_folder("src/main/kotlin") || place.has_folder("src/kotlin")), file);
    draft.package_manager("gradle", Source::file(file), "its build file exists");
    draft.plan.detection.build_tool = Some("gradle".into());
    toolchain(repo, &module, draft);
    let wrapper = "gradle/wrapper/gradle-wrapper.properties";
    if let Some((index, line)) = repo.text(wrapper).lines().enumerate().find(|(_, line)| line.starts_with("distributionUrl")) {
        let wanted = line.rsplit("gradle-").next().and_then(|rest| rest.split('-').next()).unwrap_or_default();
        version(draft, "gradle", Some(Pin::new(wanted, wrapper, Some(index + 1))));
    }
    let name = project_name(repo, &module);
    let libs = if module.is_empty() { "build/libs".to_owned() } else { format!("{module}/build/libs") };
    let path = if module.is_empty() { String::new() } else { format!(":{}:", module.replace('/', ":")) };
    let has = |name: &str| dependencies.has(name);
    let row = found.as_ref().map(|found| found.framework.name);
    let (task, archive, is_executable) = if matches!(row, Some("spring-boot" | "jhipster" | "grails")) {
        ("bootJar", format!("{libs}/*.jar"), true)
    } else if row == Some("quarkus") {
        ("build", format!("{libs}/{name}.jar"), true)
    } else if row == Some("ktor") && has("io.ktor.plugin") {
        ("buildFatJar", format!("{libs}/*-all.jar"), true)
    } else if has("com.github.johnrengelman.shadow")
        || has("com.gradleup.shadow")
        || has("io.micronaut.application") && has("shadow")
    {
        ("shadowJar", format!("{libs}/*-all.jar"), true)
    } else if has("application") || has("io.micronaut.application") {
        ("installDist", String::new(), true)
    } else {
        ("build", format!("{libs}/*.jar"), false)
    };
    let gradlew = if repo.has("gradlew") { "sh ./gradlew" } else { "gradle" };
    draft.build(&format!("{gradlew} --no-daemon {path}{task} -x test"), Source::file(file), &format!("Gradle's task {task}"));
    if task == "installDist" {
        let script = format!("{}/install/{name}/bin/{name}", libs.trim_end_matches("/libs"));
        let source = found.as_ref().map_or_else(|| Source::file(file), Found::source);
        if let Some(found) = &found {
            draft.found(found);
        }
        let process = if found.as_ref().is_some_and(|found| found.framework.kind != Type::Worker) { "web" } else { "worker" };
        draft.process(process, &script, source, "the program that Gradle installs", 0.8);
        if process == "web" {
            draft.default_port(found.as_ref(), 8080, source);
        }
    } else if found.is_none() && !has("application") && !repo.has_folder("src/main") && !members.is_empty()
        || found.is_none() && has("java-library")
    {
        draft.kind(Kind::Library);
    } else {
        program(repo, draft, found.as_ref(), &archive, file, is_executable);
    }
    health(&dependencies, draft);
    dependencies.conclude("java", draft);
}

/// Quoted coordinates and plug-ins of a build file, and those of a version catalogue.
fn gradle_dependencies(text: &str, file: &str, all: &mut Dependencies) {
    for (index, line) in text.lines().enumerate() {
        let trimmed = line.trim();
        if trimmed.starts_with("//") {
            continue;
        }
        for word in trimmed.split(['"', '\'']).skip(1).step_by(2) {
            let mut parts = word.split(':');
            if let (Some(group), Some(artifact)) = (parts.next(), parts.next()) {
                if !group.is_empty() && !artifact.is_empty() {
                    all.add(&format!("{group}:{artifact}"), file, Some(index + 1));
                }
            } else if !word.is_empty() && (trimmed.contains("id") || trimmed.contains("apply plugin") || trimmed.contains("id ="))
            {
                all.add(word, file, Some(index + 1));
            }
        }
        if let Some(rest) = trimmed.strip_prefix("kotlin(") {
            let module = rest.trim_start_matches(['"', '\'']).split(['"', '\'']).next().unwrap_or_default();
            all.add(&format!("org.jetbrains.kotlin.{module}"), file, Some(index + 1));
        }
        if matches!(trimmed, "application" | "java" | "`java-library`" | "`application`" | "groovy" | "war") {
            all.add(trimmed.trim_matches('`'), file, Some(index + 1));
        }
    }
}

/// `languageVersion = JavaLanguageVersion.of(21)`, `jvmToolchain(21)`, `sourceCompatibility`.
fn toolchain(repo: &Repo<'_>, module: &str, draft: &mut Draft) {
    for folder in [module, ""] {
        for file in &GRADLE[..2] {
            let path = join(folder, file);
            for (index, line) in repo.text(&path).lines().enumerate() {
                let after = ["JavaLanguageVersion.of(", "jvmToolchain(", "sourceCompatibility", "JvmTarget.JVM_"]
                    .iter()
                    .find_map(|sign| Some(line.split_once(sign)?.1));
                let Some(rest) = after else { continue };
                let digits = rest.trim_start_matches(|c: char| !c.is_ascii_digit()).replace('_', ".");
                let end = digits.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(digits.len());
                if end > 0 {
                    return version(draft, "java", Some(Pin::new(&digits[..end], &path, Some(index + 1))));
                }
            }
        }
    }
}

fn project_name(repo: &Repo<'_>, module: &str) -> String {
    if let Some(name) = module.rsplit('/').next().filter(|name| !name.is_empty()) {
        return name.to_owned();
    }
    let named = GRADLE[2..].iter().find_map(|file| {
        let text = repo.read(file)?;
        let line = text.lines().find(|line| line.trim().starts_with("rootProject.name"))?;
        line.split(['"', '\'']).nth(1).map(str::to_owned)
    });
    named.unwrap_or_else(|| "app".into())
}

fn scala(repo: &Repo<'_>, draft: &mut Draft) {
    let (file, tool) =
        if repo.has(SBT) { (SBT, "sbt") } else { (repo.first(&["build.mill", "build.sc"]).unwrap_or("build.sc"), "mill") };
    draft.language("scala", Source::file(file));
    draft.package_manager(tool, Source::file(file), "its build file exists");
    draft.plan.detection.build_tool = Some(tool.into());
    let mut dependencies = Dependencies::default();
    for file in [file, "project/plugins.sbt", "project/Dependencies.scala"] {
        for (index, line) in repo.text(file).lines().enumerate() {
            let quoted: Vec<&str> = line.split('"').skip(1).step_by(2).collect();
            if let [group, artifact, ..] = quoted.as_slice()
                && line.contains('%')
            {
                dependencies.add(&format!("{group}:{artifact}"), file, Some(index + 1));
            }
        }
    }
    let text = repo.text(file);
    let setting = |name: &str| {
        text.lines().enumerate().find_map(|(index, line)| {
            let (_, rest) = line.split_once(name)?;
            Some((rest.split('"').nth(1)?.to_owned(), index + 1))
        })
    };
    version(draft, "scala", setting("scalaVersion").map(|(wanted, line)| Pin::new(&wanted, file, Some(line))));
    let found = frameworks::find("java", &dependencies, repo);
    if let Some(found) = &found {
        draft.found(found);
    }
    let name = setting("name :=")
        .or_else(|| setting("name:="))
        .map_or_else(|| "app".to_owned(), |(name, _)| name.to_lowercase().replace(' ', "-"));
    let source = found.as_ref().map_or_else(|| Source::file(file), Found::source);
    let play = found.as_ref().is_some_and(|found| matches!(found.framework.name, "play" | "lagom"));
    if play || dependencies.has("sbt-native-packager") {
        draft.build("sbt -batch stage", source, "sbt stages the program");
        let port = if play { " -Dhttp.port=$PORT" } else { "" };
        draft.process(
            if found.is_some() { "web" } else { "worker" },
            &format!("target/universal/stage/bin/{name}{port}"),
            source,
            "what sbt stages",
            0.9,
        );
    } else if dependencies.has("sbt-assembly") {
        draft.build("sbt -batch assembly", source, "sbt makes one archive");
        draft.process(
            if found.is_some() { "web" } else { "worker" },
            &format!("{JAVA} -jar target/scala-*/*-assembly-*.jar"),
            source,
            "the archive that sbt makes",
            0.8,
        );
    } else {
        draft.build(if tool == "sbt" { "sbt -batch compile" } else { "./mill __.assembly" }, source, "how it is built");
        if found.is_some() {
            draft.add_question(
                "processes.web",
                "neither sbt-native-packager nor sbt-assembly is set up; the start command is unknown",
                "[processes]\nweb = \"sbt -batch run\"",
            );
        } else {
            draft.kind(Kind::Library);
        }
        return;
    }
    if draft.plan.processes.contains_key("web") {
        draft.default_port(found.as_ref(), 8080, source);
    }
    dependencies.conclude("java", draft);
}

fn leiningen(repo: &Repo<'_>, draft: &mut Draft) {
    draft.language("clojure", Source::file(LEIN));
    draft.package_manager("leiningen", Source::file(LEIN), "project.clj exists");
    let text = repo.text(LEIN);
    let mut dependencies = Dependencies::default();
    for (index, line) in text.lines().enumerate() {
        for part in line.split('[').skip(1) {
            let name = part.split([' ', ']', '"']).next().unwrap_or_default();
            if !name.is_empty() && part.contains('"') {
                dependencies.add(name, LEIN, Some(index + 1));
            }
        }
    }
    clojure(repo, draft, &dependencies);
    let named = text
        .lines()
        .find_map(|line| line.trim().strip_prefix("(defproject "))
        .map(|rest| rest.split('"').map(str::trim).collect::<Vec<_>>());
    let jar = text.lines().find_map(|line| line.trim().strip_prefix(":uberjar-name")?.split('"').nth(1).map(str::to_owned));
    let jar = jar.map_or_else(
        || match named.as_deref() {
            Some([name, version, ..]) => {
                format!("target/uberjar/{}-{version}-standalone.jar", name.rsplit('/').next().unwrap_or(name))
            }
            _ => "target/uberjar/*-standalone.jar".to_owned(),
        },
        |name| format!("target/uberjar/{name}"),
    );
    draft.build("lein uberjar", Source::file(LEIN), "one archive with all dependencies");
    started(draft, &jar, LEIN);
    dependencies.conclude("java", draft);
}

fn tools_deps(repo: &Repo<'_>, draft: &mut Draft) {
    draft.language("clojure", Source::file(DEPS));
    draft.package_manager("clojure", Source::file(DEPS), "deps.edn exists");
    let mut dependencies = Dependencies::default();
    for (index, line) in repo.text(DEPS).lines().enumerate() {
        for (at, _) in line.match_indices("{:mvn/version") {
            let name = line[..at].trim().rsplit([' ', '{', '(']).next().unwrap_or_default();
            dependencies.add(name, DEPS, Some(index + 1));
        }
    }
    clojure(repo, draft, &dependencies);
    if repo.has("build.clj") {
        draft.build("clojure -T:build uber", Source::file("build.clj"), "one archive with all dependencies");
        started(draft, "target/*-standalone.jar", "build.clj");
    } else {
        draft.install("clojure -P", Source::file(DEPS), "the libraries it names");
        let line = line_of(&repo.text(DEPS), ":run");
        let process = if draft.plan.detection.framework.is_some() { "web" } else { "worker" };
        let command = if line.is_some() { "clojure -M:run" } else { "clojure -M -m core" };
        draft.process(process, command, Source { file: DEPS, line }, "how it is run", if line.is_some() { 0.8 } else { 0.4 });
        if line.is_none() {
            draft.add_question(
                &format!("processes.{process}"),
                "no alias :run and no build.clj; the main namespace is unknown",
                "[processes]\nweb = \"clojure -M -m my.namespace\"",
            );
        }
    }
    dependencies.conclude("java", draft);
}

fn clojure(repo: &Repo<'_>, draft: &mut Draft, dependencies: &Dependencies) {
    let found = frameworks::find("java", dependencies, repo);
    if let Some(found) = &found {
        draft.found(found);
        draft.default_port(Some(found), 3000, found.source());
    }
}

fn started(draft: &mut Draft, jar: &str, file: &str) {
    let process = if draft.plan.detection.framework.is_some() { "web" } else { "worker" };
    draft.process(process, &format!("{JAVA} -jar {jar}"), Source::file(file), "the archive that the build makes", 0.85);
}
