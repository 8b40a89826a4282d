//! A folder on disk. All paths are opened relative to its descriptor and cannot lead out of it.

use std::cell::Cell;
use std::io::Read;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, Dir, FileType, Mode, OFlags, ResolveFlags, fstat, openat, openat2, readlinkat, statat};
use rustix::io::Errno;

use crate::tree::{MAX_ENTRIES, MAX_FILE_BYTES, Tree};

/// Links of one folder that are followed; further ones are ignored.
const MAX_LINKS: u32 = 10_000;
/// Links on the way to one file, as the kernel counts them.
const MAX_HOPS: u32 = 40;

/// A folder on disk. Everything that is opened is within it, whatever the path and the links in it.
#[derive(Debug)]
pub struct Folder {
    /// `None` if it cannot be opened; the folder is then empty.
    root: Option<OwnedFd>,
    links: Cell<u32>,
    /// Whether the kernel supports `RESOLVE_BENEATH` (Linux 5.6).
    by_kernel: Cell<bool>,
}

impl Folder {
    /// The folder at `path`.
    #[must_use]
    pub fn new(path: &Path) -> Self {
        let root = openat(CWD, path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty());
        Self { root: root.ok(), links: Cell::default(), by_kernel: Cell::new(true) }
    }

    /// The folder that a descriptor is open at.
    #[must_use]
    pub fn at(folder: OwnedFd) -> Self {
        Self { root: Some(folder), links: Cell::default(), by_kernel: Cell::new(true) }
    }

    /// Opens a path. All access to the folder goes through this function.
    fn open(&self, path: &str, flags: OFlags) -> Option<OwnedFd> {
        let root = self.root.as_ref()?;
        if path.starts_with('/') {
            return None;
        }
        let path = if path.is_empty() { "." } else { path };
        // Opening a pipe must not block, and opening a terminal must not make it the controlling one.
        let careful = if flags.contains(OFlags::PATH) { OFlags::empty() } else { OFlags::NOCTTY | OFlags::NONBLOCK };
        let flags = flags | OFlags::CLOEXEC | careful;
        if self.by_kernel.get() {
            // A concurrent rename in the tree makes the call fail with EAGAIN.
            for _ in 0..16 {
                match openat2(root, path, flags, Mode::empty(), ResolveFlags::BENEATH | ResolveFlags::NO_MAGICLINKS) {
                    Ok(file) => return Some(file),
                    Err(Errno::AGAIN) => {}
                    // Filters of system calls that do not support the call return either.
                    Err(Errno::NOSYS | Errno::PERM) => {
                        self.by_kernel.set(false);
                        break;
                    }
                    Err(_) => return None,
                }
            }
        }
        if self.by_kernel.get() { None } else { step_by_step(root.as_fd(), path, flags) }
    }

    /// Whether a link leads to a file of this folder.
    fn leads_to_file(&self, path: &str) -> bool {
        self.links.set(self.links.get() + 1);
        self.links.get() <= MAX_LINKS
            && self.open(path, OFlags::PATH).is_some_and(|file| kind(&file) == Some(FileType::RegularFile))
    }
}

impl Tree for Folder {
    fn bytes(&self, path: &str) -> Option<Vec<u8>> {
        let file = self.open(path, OFlags::RDONLY)?;
        let stat = fstat(&file).ok()?;
        let size = u64::try_from(stat.st_size).ok()?;
        if FileType::from_raw_mode(stat.st_mode) != FileType::RegularFile || size > MAX_FILE_BYTES {
            return None;
        }
        let mut content = Vec::with_capacity(usize::try_from(size).ok()?);
        // The file may have grown since `fstat`.
        std::fs::File::from(file).take(MAX_FILE_BYTES + 1).read_to_end(&mut content).ok()?;
        (content.len() as u64 <= MAX_FILE_BYTES).then_some(content)
    }

    fn list(&self, folder: &str) -> Vec<String> {
        let Some(opened) = self.open(folder, OFlags::RDONLY | OFlags::DIRECTORY) else { return Vec::new() };
        let Ok(entries) = Dir::read_from(&opened) else { return Vec::new() };
        let mut names = Vec::new();
        for entry in entries.flatten().take(MAX_ENTRIES) {
            let name = entry.file_name();
            let Ok(text) = name.to_str() else { continue };
            if matches!(text, "." | "..") {
                continue;
            }
            let kind = match entry.file_type() {
                FileType::Unknown => statat(&opened, name, AtFlags::SYMLINK_NOFOLLOW)
                    .map_or(FileType::Unknown, |stat| FileType::from_raw_mode(stat.st_mode)),
                kind => kind,
            };
            match kind {
                FileType::Directory => names.push(format!("{text}/")),
                FileType::RegularFile => names.push(text.to_owned()),
                FileType::Symlink if self.leads_to_file(&crate::tree::join(folder, text)) => names.push(text.to_owned()),
                _ => {}
            }
        }
        names.sort_unstable();
        names
    }
}

fn kind(file: &OwnedFd) -> Option<FileType> {
    fstat(file).ok().map(|stat| FileType::from_raw_mode(stat.st_mode))
}

/// Opens a path below a folder without `RESOLVE_BENEATH`: opens each part by itself without following links, and replaces a
/// link by the parts of its target.
fn step_by_step(root: BorrowedFd<'_>, path: &str, flags: OFlags) -> Option<OwnedFd> {
    let mut way: Vec<OwnedFd> = Vec::new();
    let mut parts: Vec<String> = path.split('/').rev().map(str::to_owned).collect();
    let mut hops = 0;
    let mut last = None;
    while let Some(part) = parts.pop() {
        match part.as_str() {
            "" | "." => continue,
            ".." => {
                if last.take().is_none() {
                    way.pop()?;
                }
                continue;
            }
            _ => {}
        }
        // A file has no parts.
        if let Some(folder) = last.take() {
            way.push(folder);
        }
        if way.len() > crate::budget::MAX_PARTS {
            return None;
        }
        let at = way.last().map_or(root, AsFd::as_fd);
        let stat = statat(at, part.as_str(), AtFlags::SYMLINK_NOFOLLOW).ok()?;
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Symlink => {
                hops += 1;
                let target = readlinkat(at, part.as_str(), Vec::new()).ok()?.into_string().ok()?;
                if target.starts_with('/') || hops > MAX_HOPS {
                    return None;
                }
                parts.extend(target.split('/').rev().map(str::to_owned));
            }
            FileType::Directory => {
                let folder = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
                last = Some(openat(at, part.as_str(), folder, Mode::empty()).ok()?);
            }
            _ if parts.iter().all(String::is_empty) => {
                return openat(at, part.as_str(), flags | OFlags::NOFOLLOW, Mode::empty()).ok();
            }
            _ => return None,
        }
    }
    let at = last.as_ref().or(way.last()).map_or(root, AsFd::as_fd);
    openat(at, ".", flags, Mode::empty()).ok()
}

#[cfg(test)]
mod tests {
    use super::{Folder, step_by_step};
    use crate::tree::Tree;
    use rustix::fs::OFlags;
    use std::os::fd::AsFd;
    use std::os::unix::fs::symlink;

    #[test]
    fn links_are_followed_within_the_folder_only_and_never_in_circles() {
        let directory = tempfile::tempdir().expect("a folder");
        let outside = directory.path().join("outside");
        let root = directory.path().join("root");
        std::fs::create_dir_all(root.join("a/b")).expect("made");
        std::fs::create_dir(&outside).expect("made");
        std::fs::write(outside.join("secret"), "secret").expect("written");
        std::fs::write(root.join("real.json"), "{}").expect("written");
        std::fs::write(root.join("a/b/deep.json"), "{}").expect("written");
        for (target, name) in [
            ("real.json", "near.json"),
            ("a/b/../../near.json", "chain.json"),
            ("/etc/hostname", "far"),
            (".", "circle"),
            ("loop-b", "loop-a"),
            ("loop-a", "loop-b"),
            ("gone", "dangling"),
            ("..", "a/up"),
            ("../..", "a/out"),
            ("up/up/outside/secret", "a/climbs"),
            ("../../outside/secret", "a/leaves"),
            ("../root/real.json", "leaves-and-returns.json"),
        ] {
            symlink(target, root.join(name)).expect("a link");
        }
        let tree = Folder::new(&root);
        let old = Folder::new(&root);
        old.by_kernel.set(false);
        for tree in [&tree, &old] {
            assert_eq!(tree.list(""), ["a/", "chain.json", "near.json", "real.json"]);
            assert_eq!(tree.list("a"), ["b/"]);
            for within in
                ["near.json", "chain.json", "circle/real.json", "circle/circle/real.json", "a/b/../b/deep.json", "a/up/real.json"]
            {
                assert!(tree.bytes(within).is_some(), "{within}");
            }
            for out in [
                "far",
                "loop-a",
                "dangling",
                "a/climbs",
                "a/leaves",
                "leaves-and-returns.json",
                "../outside/secret",
                "a/../../outside/secret",
                "a/out/outside/secret",
                "/etc/hostname",
                "circle/../outside/secret",
            ] {
                assert!(tree.bytes(out).is_none(), "{out}");
            }
            assert!(tree.list("..").is_empty() && tree.list("a/out").is_empty() && tree.list("/").is_empty());
        }
        assert!(tree.by_kernel.get(), "this kernel has openat2");
    }

    #[test]
    fn pipes_sockets_and_devices_are_not_waited_for() {
        let directory = tempfile::tempdir().expect("a folder");
        rustix::fs::mknodat(
            rustix::fs::CWD,
            directory.path().join("Procfile"),
            rustix::fs::FileType::Fifo,
            rustix::fs::Mode::RWXU,
            0,
        )
        .expect("a pipe");
        let tree = Folder::new(directory.path());
        assert!(tree.list("").is_empty() && tree.bytes("Procfile").is_none());
        let root = std::fs::File::open(directory.path()).expect("opened");
        assert!(step_by_step(root.as_fd(), "", OFlags::RDONLY).is_some(), "the folder itself");
    }
}
