//! The image of a static site: its files, served by nginx. It holds the files that a site publishes, and no others.

use std::fmt::Write;

use super::{WORK, Writer, health_check};
use crate::published::{
    COPY_ENDINGS, FIREBASE_KEY, KEY_ENDINGS, KEY_FILES, KEY_PREFIXES, NAMED_KEY_PREFIXES, PACKAGES_FOLDER, PAGES,
    TOOL_FILE_VARIANTS, TOOL_FILES, WELL_KNOWN,
};

/// The folder that nginx serves.
const SERVED: &str = "/usr/share/nginx/html";
/// The same files in the stage before.
const STAGED: &str = "/site";

/// Characters around a name that do not belong to it.
const MARKS: &str = "[[:space:][:cntrl:]~#.]*";
/// The first character of the name itself.
const NO_MARK: &str = "[^/[:space:][:cntrl:]~#.]";

impl Writer<'_> {
    /// Writes the stages of a site whose files are in the build context, or were made in the stage `from`.
    pub fn site(&self, text: &mut String, from: Option<&str>) {
        let output = self.plan.build.output.as_deref().unwrap_or(".");
        let image = self.image("static", None);
        let source = match (from, output) {
            (Some(_), ".") => format!("{WORK}/"),
            (Some(_), folder) => format!("{WORK}/{folder}/"),
            (None, ".") => "./".to_owned(),
            (None, folder) => format!("{folder}/"),
        };
        let from = from.map(|stage| format!("--from={stage} ")).unwrap_or_default();
        let copied = serde_json::to_string(&[source, format!("{STAGED}/")]).unwrap_or_default();
        // Removed in a stage of their own, these files are in no layer of the image.
        let _ = writeln!(text, "FROM {image} AS site");
        let _ = writeln!(text, "# hadolint ignore=DL3002\nUSER root\nCOPY {from}{copied}");
        let _ = writeln!(text, "RUN {}\n", remove_unpublished(STAGED));

        let otherwise = if self.plan.networking.single_page { "/index.html" } else { "=404" };
        let configuration = format!(
            "server {{ listen 8080; root {SERVED}; absolute_redirect off; error_page 404 /404.html; location / {{ try_files $uri $uri/ $uri.html {otherwise}; }} }}"
        );
        let _ = writeln!(text, "FROM {image}");
        let _ = writeln!(text, "RUN printf '%s\\n' '{configuration}' > /etc/nginx/conf.d/default.conf");
        let _ = writeln!(text, "COPY --from=site {STAGED}/ {SERVED}/");
        let _ = writeln!(text, "ENV PORT=8080\nEXPOSE 8080\nUSER 101");
        health_check(text, "8080", "/", "[234]");
        let _ = writeln!(text, "CMD [\"nginx\", \"-g\", \"daemon off;\"]");
    }
}

/// A command of GNU find that removes what [`crate::is_published`] and [`crate::is_published_folder`] leave out. The lists
/// of names are theirs; what they do to a name first (its case, marks around it, endings of copies) is in the patterns.
fn remove_unpublished(folder: &str) -> String {
    let files = [
        any(&[
            alternatives(&TOOL_FILES),
            alternatives(&KEY_FILES),
            format!(r"{NO_MARK}[^/]*\.({})", alternatives(&KEY_ENDINGS)),
            format!(r"[^/]*{FIREBASE_KEY}[^/]*\.json"),
        ]),
        format!("{} ! {}", begins(&KEY_PREFIXES), ends(&["pub"])),
        format!("{} ! {} ! {}", begins(&NAMED_KEY_PREFIXES), ends(&["pub"]), ends(&PAGES)),
        format!("{} ! {}", begins(&TOOL_FILE_VARIANTS), ends(&PAGES)),
    ];
    let hidden = format!("-name '.*' ! -iname {WELL_KNOWN} -o -iname {PACKAGES_FOLDER}");
    let files = files.join(" \\\n    -o ");
    format!(
        "find {folder} -mindepth 1 -regextype posix-extended \\( {hidden} -o ! -xtype d \\( \\\n    {files} \\\n    \\) \\) -prune -exec rm -rf {{}} +"
    )
}

fn alternatives(texts: &[&str]) -> String {
    texts.iter().map(|text| text.replace('.', r"\.")).collect::<Vec<_>>().join("|")
}

/// What follows a name: marks, and endings of copies.
fn rest() -> String {
    format!(r"{MARKS}(\.({}){MARKS})*", alternatives(&COPY_ENDINGS))
}

/// Matches the files whose names are one of these patterns.
fn any(names: &[String]) -> String {
    format!("-iregex '.*/{MARKS}({}){}'", names.join("|"), rest())
}

/// Matches the files whose names begin so.
fn begins(beginnings: &[&str]) -> String {
    format!("-iregex '.*/{MARKS}({})[^/]*'", alternatives(beginnings))
}

/// Matches the files whose names have one of these endings.
fn ends(endings: &[&str]) -> String {
    format!(r"-iregex '.*\.({}){}'", alternatives(endings), rest())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;
    use std::path::Path;
    use std::process::Command;

    use super::remove_unpublished;
    use crate::dockerfile::{ImageOptions, dockerfile};
    use crate::is_published;
    use crate::published::tests::{NOT_PUBLISHED, PUBLISHED};
    use crate::tree::Memory;

    fn remove(folder: &Path) {
        let command = remove_unpublished(&folder.display().to_string());
        let output = Command::new("sh").args(["-c", &command]).output().expect("sh runs");
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
    }

    #[test]
    fn the_image_of_a_site_holds_what_capsule_publishes() {
        let mut paths: Vec<String> = NOT_PUBLISHED
            .iter()
            .chain(&PUBLISHED)
            .filter(|path| !path.starts_with(['/', '.']))
            .map(|path| (*path).to_owned())
            .collect();
        paths
            .extend([".env", ".npmrc", ".ssh/id_rsa", ".well-known/a", ".well-known/.b", "Node_Modules/a.js"].map(str::to_owned));
        // Whatever stands around a name.
        for name in
            ["id_rsa", "id_rsa.pub", "id_rsa_github.html", "server.key", "dockerfile", "dockerfile.dev", "page.html", "env"]
        {
            for (before, after) in
                [("", "~"), ("#", "#"), ("~", ".bak"), ("", ".old.~tmp"), (" ", " .orig~"), ("", ".txt"), ("", "x")]
            {
                paths.push(format!("around/{before}{name}{after}"));
            }
        }
        let folder = tempfile::tempdir().expect("a folder");
        for path in &paths {
            let path = folder.path().join(path);
            std::fs::create_dir_all(path.parent().expect("a folder")).expect("made");
            std::fs::write(path, "").expect("written");
        }
        symlink(".env", folder.path().join("environment")).expect("linked");
        std::fs::create_dir(folder.path().join("credentials.json")).expect("made");
        remove(folder.path());
        for path in &paths {
            assert_eq!(folder.path().join(path).exists(), is_published(Path::new(path)), "{path}");
        }
        assert!(!folder.path().join("environment").exists(), "it leads nowhere");
        assert!(folder.path().join("credentials.json").is_dir(), "the rule is about files");
    }

    #[test]
    fn files_of_a_site_pass_the_stage_that_removes_what_is_not_published() {
        let scripts = r#"{"scripts": {"build": "vite build"}, "devDependencies": {"vite": "5"}}"#;
        for (files, copied) in [
            (vec![("index.html", "")], r#"COPY ["./","/site/"]"#),
            (vec![("package.json", scripts), ("index.html", "")], r#"COPY --from=build ["/app/dist/","/site/"]"#),
        ] {
            let tree = Memory::new(files);
            let plan = crate::plan(&tree).expect("a plan");
            let text = dockerfile(&tree, &plan, &ImageOptions::default()).expect("a Dockerfile").dockerfile;
            let (before, last) = text.rsplit_once("FROM ").expect("stages");
            assert!(before.contains(copied) && before.contains("RUN find /site "), "{text}");
            let copies: Vec<&str> = last.lines().filter(|line| line.starts_with("COPY")).collect();
            assert_eq!(copies, ["COPY --from=site /site/ /usr/share/nginx/html/"], "{text}");
        }
    }
}
