//! Folders of plain pages.

use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::Repo;

const FILES: [&str; 8] = [
    "index.html",
    "public/index.html",
    "dist/index.html",
    "site/index.html",
    "www/index.html",
    "docs/index.html",
    "src/index.html",
    "build/index.html",
];

pub fn is_there(repo: &Repo<'_>) -> Option<String> {
    let marker = repo.first(&["Staticfile"]).or_else(|| repo.first(&FILES)).map(str::to_owned);
    marker.or_else(|| repo.ending("", ".html"))
}

pub fn detect(repo: &Repo<'_>, draft: &mut Draft) -> Result<(), PlanError> {
    let Some(file) = is_there(repo) else { return Ok(()) };
    draft.language("static", Source::file(&file));
    draft.kind(Kind::Static);
    if file == "Staticfile" {
        let text = repo.text(&file);
        let root = text.lines().enumerate().find_map(|(index, line)| Some((index, line.trim().strip_prefix("root:")?.trim())));
        let (line, folder) = root.map_or((None, "."), |(index, folder)| (Some(index + 1), folder.trim_matches(['"', '/'])));
        draft.output(if folder.is_empty() { "." } else { folder }, Source { file: &file, line }, "set in Staticfile", 1.0);
        if text.contains("pushstate: enabled") {
            draft.plan.networking.single_page = true;
        }
        return Ok(());
    }
    let folder = file.rsplit_once('/').map_or(".", |(folder, _)| folder);
    draft.output(folder, Source::file(&file), "an index.html and no program", if folder == "." { 1.0 } else { 0.9 });
    if !file.ends_with("index.html") {
        draft.add_question("build.output", &format!("{file} exists, but no index.html"), "[build]\noutput = \".\"");
    }
    Ok(())
}
