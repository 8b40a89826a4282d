//! The files a plan is made from: a folder, or anything else that can list and read.
//!
//! Nothing is executed, links are followed only within the tree, and files are read when they are
//! asked for. [`Repo`] remembers what it has seen, so that asking twice costs nothing.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde_json::Value;

use crate::plan::PlanError;

/// A larger file decides nothing.
pub const MOST_BYTES: u64 = 2 << 20;
/// A folder with more entries is listed up to here.
const MOST_ENTRIES: usize = 200_000;

/// A repository's files. Paths are relative, with `/` between parts.
pub trait Tree {
    /// A file's bytes; `None` if it is not there, or too large to decide anything.
    fn bytes(&self, path: &str) -> Option<Vec<u8>>;

    /// The names in a folder, `""` being the root, in order: files as they are, folders with `/` behind.
    fn list(&self, folder: &str) -> Vec<String>;
}

/// A folder on disk.
#[derive(Debug)]
pub struct Folder {
    root: PathBuf,
    /// The same without links, once one was met.
    real: RefCell<Option<PathBuf>>,
}

impl Folder {
    /// The folder at `path`.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        Self { root: path.into(), real: RefCell::default() }
    }

    /// Where a link leads, if that is a file of this folder.
    fn follow(&self, link: &Path) -> Option<PathBuf> {
        let mut real = self.real.borrow_mut();
        if real.is_none() {
            *real = std::fs::canonicalize(&self.root).ok();
        }
        let target = std::fs::canonicalize(link).ok()?;
        (target.starts_with(real.as_ref()?) && target.is_file()).then_some(target)
    }
}

impl Tree for Folder {
    fn bytes(&self, path: &str) -> Option<Vec<u8>> {
        let mut path = self.root.join(path);
        let mut kind = std::fs::symlink_metadata(&path).ok()?;
        if kind.is_symlink() {
            path = self.follow(&path)?;
            kind = std::fs::metadata(&path).ok()?;
        }
        if !kind.is_file() || kind.len() > MOST_BYTES {
            return None;
        }
        std::fs::read(path).ok()
    }

    fn list(&self, folder: &str) -> Vec<String> {
        let Ok(entries) = std::fs::read_dir(self.root.join(folder)) else {
            return Vec::new();
        };
        let mut names: Vec<String> = entries
            .flatten()
            .take(MOST_ENTRIES)
            .filter_map(|entry| {
                let kind = entry.file_type().ok()?;
                let name = entry.file_name().into_string().ok()?;
                if kind.is_symlink() && self.follow(&entry.path()).is_none() {
                    return None;
                }
                Some(if kind.is_dir() { format!("{name}/") } else { name })
            })
            .collect();
        names.sort_unstable();
        names
    }
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
    /// Files at these paths, each read by `read` when it is asked for.
    pub fn new<P: AsRef<str>>(paths: impl IntoIterator<Item = P>, read: impl Fn(&str) -> Option<Vec<u8>> + 'a) -> Self {
        let mut folders: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for path in paths {
            let mut rest = path.as_ref();
            let mut is_file = true;
            while !rest.is_empty() {
                let (folder, name) = rest.rsplit_once('/').unwrap_or(("", rest));
                let names = folders.entry(folder.to_owned()).or_default();
                names.push(if is_file { name.to_owned() } else { format!("{name}/") });
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
        (self.read)(path).filter(|bytes| bytes.len() as u64 <= MOST_BYTES)
    }

    fn list(&self, folder: &str) -> Vec<String> {
        self.folders.get(folder).cloned().unwrap_or_default()
    }
}

/// Files in memory.
#[derive(Debug)]
pub struct Memory(Listing<'static>);

impl Memory {
    /// A tree of these files.
    pub fn new<P: Into<String>, C: Into<Vec<u8>>>(files: impl IntoIterator<Item = (P, C)>) -> Self {
        let files: BTreeMap<String, Vec<u8>> = files.into_iter().map(|(path, content)| (path.into(), content.into())).collect();
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
}

/// A tree, or a folder of it, that remembers what was read and listed.
#[derive(Clone)]
pub struct Repo<'a> {
    tree: &'a dyn Tree,
    /// Empty, or a folder with `/` behind.
    prefix: String,
    seen: Rc<Seen>,
}

impl<'a> Repo<'a> {
    /// The whole tree.
    pub fn new(tree: &'a dyn Tree) -> Self {
        Self { tree, prefix: String::new(), seen: Rc::default() }
    }

    /// A folder of it, as if it were all there is.
    pub fn folder(&self, folder: &str) -> Self {
        let prefix = format!("{}{}/", self.prefix, folder.trim_end_matches('/'));
        Self { tree: self.tree, prefix, seen: self.seen.clone() }
    }

    /// A file's text without a byte-order mark; `None` if it is not there, too large, or not text.
    pub fn read(&self, path: &str) -> Option<Rc<str>> {
        if !self.has(path) {
            return None;
        }
        let path = format!("{}{path}", self.prefix);
        if let Some(known) = self.seen.texts.borrow().get(&path) {
            return known.clone();
        }
        let text: Option<Rc<str>> = self.tree.bytes(&path).and_then(text).map(Into::into);
        self.seen.texts.borrow_mut().insert(path, text.clone());
        text
    }

    /// A file's text, empty if there is none.
    pub fn text(&self, path: &str) -> Rc<str> {
        self.read(path).unwrap_or_else(|| "".into())
    }

    /// The names in a folder.
    pub fn list(&self, folder: &str) -> Rc<[String]> {
        let path = format!("{}{folder}", self.prefix);
        let path = path.trim_end_matches('/');
        if let Some(known) = self.seen.lists.borrow().get(path) {
            return known.clone();
        }
        let names: Rc<[String]> = self.tree.list(path).into();
        self.seen.lists.borrow_mut().insert(path.to_owned(), names.clone());
        names
    }

    /// Whether a file is there. A folder that is not there is not looked into.
    pub fn has(&self, path: &str) -> bool {
        let (folder, name) = path.rsplit_once('/').unwrap_or(("", path));
        !name.is_empty() && self.has_folder(folder) && self.list(folder).binary_search_by(|known| (**known).cmp(name)).is_ok()
    }

    /// Whether a folder is there.
    pub fn has_folder(&self, folder: &str) -> bool {
        let mut at = 0;
        while at < folder.len() {
            let end = folder[at..].find('/').map_or(folder.len(), |length| at + length);
            let name = format!("{}/", &folder[at..end]);
            let above = folder[..at].trim_end_matches('/');
            if name == "/" || self.list(above).binary_search(&name).is_err() {
                return false;
            }
            at = end + 1;
        }
        true
    }

    /// The first of these files that is there.
    pub fn first<'f>(&self, files: &[&'f str]) -> Option<&'f str> {
        files.iter().copied().find(|file| self.has(file))
    }

    /// The first file of a folder with this ending, as a path.
    pub fn ending(&self, folder: &str, end: &str) -> Option<String> {
        self.all_ending(folder, end).into_iter().next()
    }

    /// The files of a folder with this ending, as paths.
    pub fn all_ending(&self, folder: &str, end: &str) -> Vec<String> {
        if !self.has_folder(folder) {
            return Vec::new();
        }
        self.list(folder).iter().filter(|name| name.ends_with(end)).map(|name| join(folder, name)).collect()
    }

    /// The folders in a folder, as paths, without those that hold no source.
    pub fn folders(&self, folder: &str) -> Vec<String> {
        if !self.has_folder(folder) {
            return Vec::new();
        }
        let names = self.list(folder);
        let folders = names.iter().filter_map(|name| name.strip_suffix('/'));
        folders.filter(|name| !name.starts_with('.') && !SKIPPED.contains(name)).map(|name| join(folder, name)).collect()
    }

    /// A file of JSON; with comments and trailing commas, where whoever else reads it takes those.
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

    /// A file of TOML.
    pub fn toml(&self, path: &str) -> Result<Option<toml::Table>, PlanError> {
        let Some(text) = self.decisive(path)? else { return Ok(None) };
        let failed = |error: toml::de::Error| PlanError {
            message: format!("it is not valid TOML: {}", error.message()),
            ..PlanError::toml(path, &text, &error)
        };
        text.parse().map(Some).map_err(failed)
    }

    /// A file of YAML.
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

    /// A file that decides: if it is there, it must be text.
    fn decisive(&self, path: &str) -> Result<Option<Rc<str>>, PlanError> {
        match self.read(path) {
            None if self.has(path) => {
                Err(PlanError { file: path.into(), line: None, message: "it cannot be read as text".into() })
            }
            text => Ok(text),
        }
    }
}

/// Files of JSON whose own tools refuse comments.
const STRICT: [&str; 2] = ["package.json", "composer.json"];

/// Folders that hold nothing a plan is made from.
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

/// A path of a folder and a name in it.
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
        // A comment in some older encoding does not make a file unreadable; a NUL byte does.
        Err(error) if !error.as_bytes().contains(&0) => String::from_utf8_lossy(error.as_bytes()).into_owned(),
        Err(_) => return None,
    };
    if text.contains('\0') {
        return None;
    }
    Some(text.strip_prefix('\u{feff}').map_or_else(|| text.clone(), str::to_owned))
}

/// JSON without `//` and `/* */` comments and trailing commas; lines stay where they are.
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

/// The 1-based number of the first line that contains `needle`.
pub fn line_of(text: &str, needle: &str) -> Option<usize> {
    text.lines().position(|line| line.contains(needle)).map(|index| index + 1)
}

#[cfg(test)]
mod tests {
    use super::{Folder, Memory, Repo, Tree, text, without_comments};

    #[test]
    fn json_with_comments_is_read_and_lines_stay() {
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
    fn what_is_listed_can_be_found_by_its_path() {
        let memory = Memory::new([("a/b/c.txt", "x"), ("a.txt", "y")]);
        let repo = Repo::new(&memory);
        assert!(repo.has("a/b/c.txt") && repo.has("a.txt") && repo.has_folder("a/b"));
        assert!(!repo.has("a/b") && !repo.has("b/c.txt") && !repo.has_folder("b") && !repo.has(""));
        assert_eq!(&*repo.folder("a").text("b/c.txt"), "x");
        assert_eq!(memory.list(""), ["a.txt", "a/"]);
    }

    #[test]
    fn links_are_followed_within_the_folder_only_and_never_in_circles() {
        let folder = tempfile::tempdir().expect("a folder");
        std::fs::write(folder.path().join("real.json"), "{}").expect("written");
        for (target, name) in [("real.json", "near.json"), ("/etc/hostname", "far"), (".", "circle"), ("gone", "dangling")] {
            std::os::unix::fs::symlink(target, folder.path().join(name)).expect("a link");
        }
        let tree = Folder::new(folder.path());
        assert_eq!(tree.list(""), ["near.json", "real.json"]);
        assert!(tree.bytes("near.json").is_some() && tree.bytes("far").is_none() && tree.bytes("circle/real.json").is_some());
    }
}
