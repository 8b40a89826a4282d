//! Folders of plain pages.

use super::first_of;
use crate::plan::{Draft, Kind, PlanError, Source};
use crate::tree::Tree;

const FILES: [&str; 5] = ["index.html", "public/index.html", "dist/index.html", "site/index.html", "www/index.html"];

pub fn is_there(tree: &dyn Tree) -> Option<&'static str> {
    first_of(tree, &FILES)
}

pub fn detect(tree: &dyn Tree, draft: &mut Draft) -> Result<(), PlanError> {
    if let Some(file) = is_there(tree) {
        draft.language("static", Source::file(file));
        draft.kind(Kind::Static);
        let folder = file.rsplit_once('/').map_or(".", |(folder, _)| folder);
        draft.output(folder, Source::file(file), "an index.html and no program", if folder == "." { 1.0 } else { 0.9 });
    }
    Ok(())
}
