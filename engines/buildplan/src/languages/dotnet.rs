//! .NET: C#, F#, Visual Basic.

use super::{Pin, pinned, version};
use crate::dependencies::Dependencies;
use crate::frameworks::{self, Found, Type};
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::{Lines, Repo, join, line_of};

const PROJECTS: [&str; 3] = [".csproj", ".fsproj", ".vbproj"];

pub fn is_there(repo: &Repo<'_>) -> Option<String> {
    let solution = || [".sln", ".slnx"].iter().find_map(|end| repo.ending("", end));
    projects_in(repo, "")
        .into_iter()
        .next()
        .or_else(solution)
        .or_else(|| repo.first(&["global.json"]).filter(|_| !projects(repo).is_empty()).map(str::to_owned))
        .or_else(|| {
            let nested = projects(repo);
            nested.into_iter().next()
        })
}

fn projects_in(repo: &Repo<'_>, folder: &str) -> Vec<String> {
    PROJECTS.iter().flat_map(|end| repo.all_ending(folder, end)).collect()
}

/// Project files at the top, and two folders down at the most.
fn projects(repo: &Repo<'_>) -> Vec<String> {
    let top = projects_in(repo, "");
    if !top.is_empty() {
        return top;
    }
    let mut all = Vec::new();
    for folder in repo.folders("").into_iter().take(40) {
        all.extend(projects_in(repo, &folder));
        if matches!(folder.as_str(), "src" | "app" | "apps" | "server" | "source" | "Source" | "backend") {
            for inner in repo.folders(&folder).into_iter().take(60) {
                all.extend(projects_in(repo, &inner));
            }
        }
    }
    all
}

/// A project, and what it asks for.
struct Project {
    file: String,
    text: std::rc::Rc<str>,
    dependencies: Dependencies,
    found: Option<Found>,
}

fn read(repo: &Repo<'_>, file: String) -> Result<Project, PlanError> {
    let text = repo.text(&file);
    let mut dependencies = Dependencies::default();
    let document = roxmltree::Document::parse(&text).map_err(|error| PlanError {
        file: file.clone(),
        line: usize::try_from(error.pos().row).ok(),
        message: format!("it is not valid XML: {error}"),
    })?;
    let lines = Lines::of(&text);
    for node in document.descendants().filter(roxmltree::Node::is_element) {
        let line = Some(lines.at(node.range().start));
        for name in ["Include", "Sdk", "Name"] {
            if let Some(value) = node.attribute(name).filter(|_| name != "Name" || node.tag_name().name() == "Sdk") {
                dependencies.add(value, &file, line);
            }
        }
    }
    let found = frameworks::find("dotnet", &dependencies, repo);
    Ok(Project { file, text, dependencies, found })
}

impl Project {
    fn property(&self, name: &str) -> Option<(&str, usize)> {
        let (open, close) = (format!("<{name}>"), format!("</{name}>"));
        let at = self.text.find(&open)? + open.len();
        let end = self.text[at..].find(&close)?;
        Some((self.text[at..at + end].trim(), self.text[..at].matches('\n').count() + 1))
    }

    /// How much it looks like the application.
    fn weight(&self) -> u32 {
        let file = self.file.to_lowercase();
        if file.contains("test") || self.dependencies.has("Microsoft.NET.Test.Sdk") {
            return 0;
        }
        match self.found.as_ref().map(|found| found.framework.kind) {
            Some(Type::Web | Type::Api) => 4,
            Some(Type::Spa) => 3,
            Some(_) => 2,
            None if self.property("OutputType").is_some_and(|(kind, _)| kind.eq_ignore_ascii_case("exe")) => 1,
            None => 0,
        }
    }
}

pub fn detect(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let files = projects(repo);
    let mut all = files.into_iter().take(80).map(|file| read(repo, file)).collect::<Result<Vec<_>, _>>()?;
    all.sort_by_key(|project| std::cmp::Reverse(project.weight()));
    let marker = is_there(repo).unwrap_or_default();
    draft.language("dotnet", Source::file(all.first().map_or(&marker, |project| &project.file)));
    draft.package_manager("nuget", Source::file(&marker), "a .NET project exists");
    draft.plan.detection.build_tool = Some("dotnet".into());
    let Some(project) = all.first() else { return Ok(()) };
    let sdk = || {
        let json = repo.json("global.json").ok()??;
        let wanted = json.pointer("/sdk/version")?.as_str()?.to_owned();
        Some(Pin::new(&wanted, "global.json", line_of(&repo.text("global.json"), "\"version\"")))
    };
    let target = || {
        let (name, line) = project.property("TargetFramework").or_else(|| project.property("TargetFrameworks"))?;
        let wanted = name.split(';').next_back()?.trim_start_matches("netcoreapp").trim_start_matches("net").split('-').next()?;
        Some(Pin::new(wanted, &project.file, Some(line)))
    };
    version(draft, "dotnet", sdk().or_else(|| pinned(repo, &["dotnet", "dotnet-core"], &[])).or_else(target));
    let source = Source::file(&project.file);
    draft.install(&format!("dotnet restore {}", project.file), source, "the packages it names");
    if project.weight() == 0 {
        draft.build(&format!("dotnet build --configuration Release {}", project.file), source, "how .NET builds it");
        draft.kind(Kind::Library);
        return Ok(());
    }
    draft.build(
        &format!("dotnet publish --no-restore --configuration Release --output out {}", project.file),
        source,
        "how .NET publishes it",
    );
    let stem = project.file.rsplit('/').next().unwrap_or(&project.file);
    let stem = PROJECTS.iter().find_map(|end| stem.strip_suffix(end)).unwrap_or(stem);
    let name = project.property("AssemblyName").map_or(stem, |(name, _)| name);
    match &project.found {
        Some(found) if found.framework.kind.is_files() => {
            draft.found(found);
            draft.files(found, "out/wwwroot");
        }
        Some(found) => {
            draft.found(found);
            let process = if found.framework.kind == Type::Worker { "worker" } else { "web" };
            let command = format!("dotnet out/{name}.dll");
            let command = if process == "web" { format!("ASPNETCORE_URLS=http://0.0.0.0:$PORT {command}") } else { command };
            draft.process(process, &command, found.source(), "what .NET publishes", 0.95);
            if process == "web" {
                draft.default_port(Some(found), 8080, found.source());
            }
        }
        None => {
            let line = project.property("OutputType").map(|(_, line)| line);
            draft.process(
                "worker",
                &format!("dotnet out/{name}.dll"),
                Source { file: &project.file, line },
                "a program without a web framework",
                0.7,
            );
        }
    }
    let rivals: Vec<&str> = all
        .iter()
        .skip(1)
        .filter(|other| other.weight() == project.weight() && other.weight() > 1)
        .map(|other| other.file.as_str())
        .collect();
    if !rivals.is_empty() {
        draft.add_question(
            "build.build",
            &format!("several projects make an application ({}, {}); using the first", project.file, rivals.join(", ")),
            &format!("[build]\nbuild = \"dotnet publish --configuration Release --output out {}\"", rivals[0]),
        );
    }
    let folder = project.file.rsplit_once('/').map_or("", |(folder, _)| folder);
    if repo.has_folder(&join(folder, "Migrations")) && project.dependencies.has("Microsoft.EntityFrameworkCore.Design") {
        draft.add_question(
            "build.release",
            "there are migrations of Entity Framework; they are run only if the program does so itself",
            "[build]\nrelease = \"dotnet tool run dotnet-ef database update\"",
        );
    }
    project.dependencies.conclude("dotnet", draft);
    Ok(())
}
