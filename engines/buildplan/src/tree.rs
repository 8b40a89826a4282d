//! The files a plan is made from: a folder, or anything else that can list and read.
//!
//! Nothing is executed, no path leads out of the tree, and files are read on demand. Detectors access files only through
//! [`Repo`], which stays within the tree, spends from the plan's budget, and caches files and listings.

use std::borrow::Cow;
use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::rc::Rc;

use serde_json::Value;

use crate::budget::{Budget, MAX_PARTS, may_search};
use crate::plan::PlanError;

/// Bytes of a file that a plan reads. Larger files are ignored.
pub const MAX_FILE_BYTES: u64 = 2 << 20;
/// Entries of a folder that are listed.
pub const MAX_ENTRIES: usize = 200_000;
/// Bytes of a path, and of one of its parts: the limits of Linux.
const MAX_PATH_BYTES: usize = 4096;
const MAX_PART_BYTES: usize = 255;

/// A repository's files. Paths are relative, with `/` between parts.
pub trait Tree {
    /// Reads a file; `None` if it does not exist or has more than [`MAX_FILE_BYTES`].
    fn bytes(&self, path: &str) -> Option<Vec<u8>>;

    /// Lists the names in a folder (`""` is the root), sorted. Names of folders end with `/`.
    fn list(&self, folder: &str) -> Vec<String>;
}

/// Reads a file by its path.
type Read<'a> = Box<dyn Fn(&str) -> Option<Vec<u8>> + 'a>;

/// A list of paths and a way to read them: an archive's index, a commit's tree, files in memory.
pub struct Listing<'a> {
    folders: BTreeMap<String, Vec<String>>,
    read: Read<'a>,
}

impl std::fmt::Debug for Listing<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Listing({} folders)", self.folders.len())
    }
}

impl<'a> Listing<'a> {
    /// Files at these paths, each read by `read` on demand.
    pub fn new<P: AsRef<str>>(paths: impl IntoIterator<Item = P>, read: impl Fn(&str) -> Option<Vec<u8>> + 'a) -> Self {
        let mut folders: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for path in paths {
            // Paths out of the tree and paths that are too deep are left out.
            let Some(path) = normal(path.as_ref()) else { continue };
            let mut rest = &*path;
            let mut is_file = true;
            while !rest.is_empty() {
                let (folder, name) = rest.rsplit_once('/').unwrap_or(("", rest));
                let is_known = folders.contains_key(folder);
                let names = folders.entry(folder.to_owned()).or_default();
                names.push(if is_file { name.to_owned() } else { format!("{name}/") });
                if is_known {
                    break;
                }
                (rest, is_file) = (folder, false);
            }
        }
        for names in folders.values_mut() {
            names.sort_unstable();
            names.dedup();
        }
        Self { folders, read: Box::new(read) }
    }
}

impl Tree for Listing<'_> {
    fn bytes(&self, path: &str) -> Option<Vec<u8>> {
        (self.read)(&normal(path)?).filter(|bytes| bytes.len() as u64 <= MAX_FILE_BYTES)
    }

    fn list(&self, folder: &str) -> Vec<String> {
        normal(folder).and_then(|folder| self.folders.get(&*folder).cloned()).unwrap_or_default()
    }
}

/// Files in memory.
#[derive(Debug)]
pub struct Memory(Listing<'static>);

impl Memory {
    /// A tree of these files.
    pub fn new<P: Into<String>, C: Into<Vec<u8>>>(files: impl IntoIterator<Item = (P, C)>) -> Self {
        let files = files.into_iter().filter_map(|(path, content)| Some((normal(&path.into())?.into_owned(), content.into())));
        let files: BTreeMap<String, Vec<u8>> = files.collect();
        let paths: Vec<String> = files.keys().cloned().collect();
        Self(Listing::new(paths, move |path| files.get(path).cloned()))
    }
}

impl Tree for Memory {
    fn bytes(&self, path: &str) -> Option<Vec<u8>> {
        self.0.bytes(path)
    }

    fn list(&self, folder: &str) -> Vec<String> {
        self.0.list(folder)
    }
}

#[derive(Default)]
struct Seen {
    lists: RefCell<HashMap<String, Rc<[String]>>>,
    texts: RefCell<HashMap<String, Option<Rc<str>>>>,
    budget: Budget,
}

/// A tree, or a folder of it, with a cache. Paths may come from the repository's own files: an absolute path, or one out of
/// the folder, does not exist.
#[derive(Clone)]
pub struct Repo<'a> {
    tree: &'a dyn Tree,
    /// Empty, or a folder with a trailing `/`; `None` if the folder does not exist.
    prefix: Option<String>,
    seen: Rc<Seen>,
}

impl<'a> Repo<'a> {
    /// The whole tree, with a budget of its own.
    pub fn new(tree: &'a dyn Tree) -> Self {
        Self { tree, prefix: Some(String::new()), seen: Rc::default() }
    }

    /// A folder as a tree of its own; an empty one if it does not exist.
    pub fn folder(&self, folder: &str) -> Self {
        let prefix = self.place(folder).filter(|_| self.has_folder(folder));
        let prefix = prefix.filter(|prefix| self.seen.budget.enter(prefix));
        let prefix = prefix.map(|prefix| if prefix.is_empty() { prefix } else { prefix + "/" });
        Self { tree: self.tree, prefix, seen: self.seen.clone() }
    }

    /// The path of this folder in the tree, for detecting folders that were entered before.
    pub fn prefix(&self) -> Option<&str> {
        self.prefix.as_deref()
    }

    /// Fails if the budget is exceeded.
    pub fn check(&self) -> Result<(), PlanError> {
        self.seen.budget.check()
    }

    /// Converts a path of this folder to one from the root of the tree.
    fn place(&self, path: &str) -> Option<String> {
        let prefix = self.prefix.as_ref()?;
        let whole = format!("{prefix}{}", normal(path)?);
        let parts = whole.bytes().filter(|byte| *byte == b'/').count();
        (whole.len() <= MAX_PATH_BYTES && parts < MAX_PARTS).then(|| whole.trim_end_matches('/').to_owned())
    }

    /// Reads a text file, without a byte-order mark; `None` if it does not exist, is too large, or is not text.
    pub fn read(&self, path: &str) -> Option<Rc<str>> {
        if !self.has(path) {
            return None;
        }
        let path = self.place(path)?;
        if let Some(known) = self.seen.texts.borrow().get(&path) {
            return known.clone();
        }
        let budget = &self.seen.budget;
        let bytes = budget.open(&path).then(|| self.tree.bytes(&path)).flatten();
        let text: Option<Rc<str>> = bytes.filter(|bytes| budget.read(bytes.len(), &path)).and_then(text).map(Into::into);
        self.seen.texts.borrow_mut().insert(path, text.clone());
        text
    }

    /// Reads a text file; empty if it does not exist.
    pub fn text(&self, path: &str) -> Rc<str> {
        self.read(path).unwrap_or_else(|| "".into())
    }

    /// The names in a folder.
    pub fn list(&self, folder: &str) -> Rc<[String]> {
        let Some(path) = self.place(folder) else { return Rc::default() };
        if let Some(known) = self.seen.lists.borrow().get(&path) {
            return known.clone();
        }
        let budget = &self.seen.budget;
        let mut names = if budget.open(&path) { self.tree.list(&path) } else { Vec::new() };
        if !budget.list(names.len(), &path) {
            names.clear();
        }
        let names: Rc<[String]> = names.into();
        self.seen.lists.borrow_mut().insert(path, names.clone());
        names
    }

    /// Whether a file exists.
    pub fn has(&self, path: &str) -> bool {
        let Some(path) = normal(path).filter(|_| !path.ends_with('/')) else { return false };
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", &path));
        !name.is_empty() && self.has_folder(folder) && self.list(folder).binary_search_by(|known| (**known).cmp(name)).is_ok()
    }

    /// Whether a folder exists.
    pub fn has_folder(&self, folder: &str) -> bool {
        let Some(folder) = normal(folder).filter(|_| self.prefix.is_some()) else { return false };
        let mut at = 0;
        while at < folder.len() {
            let end = folder[at..].find('/').map_or(folder.len(), |length| at + length);
            let above = folder[..at].trim_end_matches('/');
            let name = &folder[at..end];
            if self.list(above).binary_search(&format!("{name}/")).is_err() {
                return false;
            }
            at = end + 1;
        }
        true
    }

    /// The first of these files that exists.
    pub fn first<'f>(&self, files: &[&'f str]) -> Option<&'f str> {
        files.iter().copied().find(|file| self.has(file))
    }

    /// The first file of a folder with this ending, as a path.
    pub fn ending(&self, folder: &str, end: &str) -> Option<String> {
        if !self.has_folder(folder) {
            return None;
        }
        self.list(folder).iter().find(|name| name.ends_with(end)).map(|name| join(folder, name))
    }

    /// The files of a folder with this ending, as paths.
    pub fn all_ending(&self, folder: &str, end: &str) -> Vec<String> {
        if !self.has_folder(folder) {
            return Vec::new();
        }
        self.list(folder).iter().filter(|name| name.ends_with(end)).map(|name| join(folder, name)).collect()
    }

    /// The folders in a folder, as paths, without those that never contain source.
    pub fn folders(&self, folder: &str) -> Vec<String> {
        if !self.has_folder(folder) {
            return Vec::new();
        }
        let names = self.list(folder);
        let folders = names.iter().filter_map(|name| name.strip_suffix('/'));
        folders.filter(|name| !name.starts_with('.') && !SKIPPED.contains(name)).map(|name| join(folder, name)).collect()
    }

    /// Reads a JSON file; with comments and trailing commas, if the tools that read it allow those.
    pub fn json(&self, path: &str) -> Result<Option<Value>, PlanError> {
        let Some(text) = self.decisive(path)? else { return Ok(None) };
        let failed = |error: &serde_json::Error| PlanError {
            file: path.into(),
            line: Some(error.line()),
            message: format!("it is not valid JSON: {error}"),
        };
        match serde_json::from_str(&text) {
            Ok(value) => Ok(Some(value)),
            Err(error) if STRICT.iter().any(|name| path.ends_with(name)) => Err(failed(&error)),
            Err(error) => serde_json::from_str(&without_comments(&text)).map(Some).map_err(|_| failed(&error)),
        }
    }

    /// Reads a TOML file.
    pub fn toml(&self, path: &str) -> Result<Option<toml::Table>, PlanError> {
        let Some(text) = self.decisive(path)? else { return Ok(None) };
        let failed = |error: toml::de::Error| PlanError {
            message: format!("it is not valid TOML: {}", error.message()),
            ..PlanError::toml(path, &text, &error)
        };
        text.parse().map(Some).map_err(failed)
    }

    /// Reads a YAML file.
    pub fn yaml(&self, path: &str) -> Result<Option<Value>, PlanError> {
        let Some(text) = self.decisive(path)? else { return Ok(None) };
        if text.trim().is_empty() {
            return Ok(Some(Value::Null));
        }
        serde_saphyr::from_str::<Value>(&text).map(Some).map_err(|error| PlanError {
            file: path.into(),
            line: error.location().and_then(|place| usize::try_from(place.line()).ok()),
            message: format!("it is not valid YAML: {}", error.to_string().lines().next().unwrap_or_default()),
        })
    }

    /// Reads a file that must be text if it exists.
    fn decisive(&self, path: &str) -> Result<Option<Rc<str>>, PlanError> {
        match self.read(path) {
            None if self.has(path) => {
                Err(PlanError { file: path.into(), line: None, message: "it cannot be read as text".into() })
            }
            text => Ok(text),
        }
    }
}

/// JSON files whose tools refuse comments.
const STRICT: [&str; 2] = ["package.json", "composer.json"];

/// Folders that never contain source.
const SKIPPED: [&str; 14] = [
    "node_modules",
    "vendor",
    "target",
    "dist",
    "build",
    "out",
    "tmp",
    "log",
    "coverage",
    "__pycache__",
    "venv",
    "deps",
    "_build",
    "Pods",
];

/// Joins a folder and a name.
pub fn join(folder: &str, name: &str) -> String {
    if folder.is_empty() { name.to_owned() } else { format!("{folder}/{name}") }
}

/// UTF-8, or UTF-16 as some editors and shells on Windows write it.
fn text(bytes: Vec<u8>) -> Option<String> {
    let wide = |decode: fn([u8; 2]) -> u16| {
        let units = bytes[2..].chunks_exact(2).map(|pair| decode([pair[0], pair[1]]));
        char::decode_utf16(units).collect::<Result<String, _>>().ok()
    };
    match bytes.as_slice() {
        [0xff, 0xfe, ..] => return wide(u16::from_le_bytes),
        [0xfe, 0xff, ..] => return wide(u16::from_be_bytes),
        _ => {}
    }
    let text = match String::from_utf8(bytes) {
        Ok(text) => text,
        // Invalid UTF-8 is tolerated, as in comments with an older encoding; a NUL byte is not.
        Err(error) if !error.as_bytes().contains(&0) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
        Err(_) => return None,
    };
    if text.contains('\0') {
        return None;
    }
    Some(text.strip_prefix('\u{feff}').map_or_else(|| text.clone(), str::to_owned))
}

/// Removes `//` and `/* */` comments and trailing commas from JSON. Line numbers do not change.
fn without_comments(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let mut rest = text.chars().peekable();
    let mut quoted = false;
    while let Some(c) = rest.next() {
        match (quoted, c, rest.peek()) {
            (true, '\\', _) => {
                out.push(c);
                out.extend(rest.next());
            }
            (_, '"', _) => {
                quoted = !quoted;
                out.push(c);
            }
            (false, '/', Some('/')) => {
                while rest.peek().is_some_and(|next| *next != '\n') {
                    rest.next();
                }
            }
            (false, '/', Some('*')) => {
                let mut last = ' ';
                rest.next();
                for next in rest.by_ref() {
                    if next == '\n' {
                        out.push(next);
                    }
                    if last == '*' && next == '/' {
                        break;
                    }
                    last = next;
                }
            }
            (false, '}' | ']', _) => {
                let kept = out.trim_end().len();
                if out[..kept].ends_with(',') {
                    out.remove(kept - 1);
                }
                out.push(c);
            }
            _ => out.push(c),
        }
    }
    out
}

/// Normalizes a path: removes empty parts and `.`, and resolves `..`. `None` if it is absolute, leads out of the folder,
/// contains a NUL byte, or is longer than Linux allows.
fn normal(path: &str) -> Option<Cow<'_, str>> {
    if path.starts_with('/') || path.len() > MAX_PATH_BYTES || path.contains('\0') {
        return None;
    }
    if path.split('/').any(|part| part.len() > MAX_PART_BYTES) || path.split('/').count() > MAX_PARTS {
        return None;
    }
    let is_plain = !path.ends_with('/') && path.split('/').all(|part| !matches!(part, "" | "." | ".."));
    if is_plain || path.is_empty() {
        return Some(Cow::Borrowed(path));
    }
    let mut parts = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(Cow::Owned(parts.join("/")))
}

/// The 1-based number of the first line that contains `needle`; `None` if the search budget is used up.
pub fn line_of(text: &str, needle: &str) -> Option<usize> {
    line_where(text, |line| line.contains(needle))
}

/// The 1-based number of the first line that matches; `None` if the search budget is used up.
pub fn line_where(text: &str, matches: impl Fn(&str) -> bool) -> Option<usize> {
    if !may_search(text.len()) {
        return None;
    }
    text.lines().position(matches).map(|index| index + 1)
}

/// The offsets of the lines of a text, for repeated look-ups.
pub struct Lines(Vec<usize>);

impl Lines {
    /// Indexes a text.
    pub fn of(text: &str) -> Self {
        Self(text.bytes().enumerate().filter(|(_, byte)| *byte == b'\n').map(|(at, _)| at).collect())
    }

    /// The 1-based number of the line that contains a byte offset.
    pub fn at(&self, byte: usize) -> usize {
        self.0.partition_point(|end| *end < byte) + 1
    }
}

#[cfg(test)]
mod tests {
    use super::{Lines, Memory, Repo, Tree, text, without_comments};

    #[test]
    fn json_with_comments_is_read_and_line_numbers_stay() {
        let clean = without_comments("{ // one\n \"a//b\": 1, /* two\n three */ \"c\": [1, 2,],\n}");
        assert_eq!(serde_json::from_str::<serde_json::Value>(&clean).expect("valid")["c"][1], 2);
        assert_eq!(clean.lines().count(), 4);
    }

    #[test]
    fn text_is_read_in_every_usual_encoding_and_binaries_are_not() {
        assert_eq!(text(b"\xef\xbb\xbfa".to_vec()).as_deref(), Some("a"));
        assert_eq!(text(b"\xff\xfea\0b\0".to_vec()).as_deref(), Some("ab"));
        assert_eq!(text(b"caf\xe9".to_vec()).as_deref(), Some("caf\u{fffd}"));
        assert_eq!(text(b"a\0\xff".to_vec()), None);
    }

    #[test]
    fn listed_files_are_found_by_their_paths() {
        let memory = Memory::new([("a/b/c.txt", "x"), ("a.txt", "y")]);
        let repo = Repo::new(&memory);
        assert!(repo.has("a/b/c.txt") && repo.has("a.txt") && repo.has_folder("a/b"));
        assert!(!repo.has("a/b") && !repo.has("b/c.txt") && !repo.has_folder("b") && !repo.has(""));
        assert_eq!(&*repo.folder("a").text("b/c.txt"), "x");
        assert_eq!(memory.list(""), ["a.txt", "a/"]);
    }

    #[test]
    fn no_path_leads_out_of_the_tree_or_a_folder_of_it() {
        let memory = Memory::new([("a/b/c.txt", "x"), ("top.txt", "y"), ("a/own.txt", "z")]);
        let repo = Repo::new(&memory);
        let a = repo.folder("./a//");
        assert_eq!(&*a.text("./b/../own.txt"), "z");
        for out in ["../top.txt", "/top.txt", "b/../../top.txt", "..", "/", "b/\0", "own.txt/", &"b/".repeat(3000)] {
            assert!(!a.has(out) && a.read(out).is_none() && a.list(out).is_empty(), "{out}");
            assert!(a.folder(out).list("").is_empty() && !a.folder(out).has("top.txt"), "{out}");
        }
        for out in ["..", "../..", "/etc", "gone", "a/../.."] {
            let none = repo.folder(out);
            assert!(none.list("").is_empty() && !none.has("passwd") && none.folder("").list("").is_empty(), "{out}");
        }
        assert_eq!(memory.list("a/../.."), Vec::<String>::new());
        assert!(Memory::new([("../out", "x"), ("/etc/passwd", "x")]).list("").is_empty());
    }

    #[test]
    fn an_exceeded_budget_is_an_error_and_nothing_more_is_read() {
        let files: Vec<(String, String)> = (0..70).map(|n| (format!("f{n}"), "x".repeat(1 << 20))).collect();
        let memory = Memory::new(files);
        let repo = Repo::new(&memory);
        let read = (0..70).filter(|n| repo.read(&format!("f{n}")).is_some()).count();
        assert_eq!(read, 64);
        let error = repo.check().expect_err("too much");
        assert!(error.message.contains("more than 64 MiB"), "{error}");
        let deep = Memory::new([("d/".repeat(500) + "package.json", "{}")]);
        assert!(Repo::new(&deep).list("").is_empty(), "too deep to be looked for");
    }

    #[test]
    fn lines_are_counted_from_one() {
        let lines = Lines::of("a\nbc\n\nd");
        assert_eq!([0, 1, 2, 4, 5, 6].map(|at| lines.at(at)), [1, 1, 2, 2, 3, 4]);
    }
}
