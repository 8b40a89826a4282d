//! Unlinked files, which still take disk space because a process has them open or mapped.

use std::collections::HashMap;
use std::fs::{File, Metadata};
use std::io::{BufRead, BufReader, Read};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use nix::sys::resource::{UsageWho, getrusage};

use crate::trees::{Excess, Meter};

/// The most descriptors and mappings that are examined.
const MAX_EXAMINED: usize = 4 << 20;
/// The CPU time of one scan, enough for about a million descriptors.
const MAX_CPU_TIME: Duration = Duration::from_secs(2);
/// The wall-clock time of one scan, which is long if the host is busy or a process blocks the reading of its mappings.
const MAX_TIME: Duration = Duration::from_secs(10);
/// The time is checked after this many descriptors and mappings.
const CHECK_INTERVAL: usize = 256;
/// The most bytes of the list of one process's mappings. The kernel allows 65,530 of them, and names of 4 KiB.
const MAX_MAPS_BYTES: u64 = 64 << 20;

/// File systems in memory, which control groups and their own sizes limit.
const TMPFS_MAGIC: u64 = 0x0102_1994;
const HUGETLBFS_MAGIC: u64 = 0x9584_58f6;

/// Adds the unlinked files of a workload's processes. `proc` is the `/proc` of its PID namespace, `mounts` are its writable
/// directories as seen from the caller. `share_files` is whether all threads of a process share one descriptor table.
///
/// # Errors
/// When the limit is exceeded, or the files cannot be measured.
pub fn add(meter: &mut Meter, proc: &Path, mounts: &[PathBuf], share_files: bool) -> Result<(), Excess> {
    let mut scan = Scan::new(mounts);
    for process in numbered(proc) {
        let (mut has_mappings, mut has_files) = (false, false);
        // Each thread may have its own working directory and descriptor table. The first thread may have ended, and then shows
        // nothing.
        for thread in numbered(&process.join("task")) {
            for name in ["exe", "cwd", "root"] {
                scan.add_file(meter, &thread.join(name))?;
            }
            if !(share_files && has_files) {
                for descriptor in numbered(&thread.join("fd")) {
                    scan.add_file(meter, &descriptor)?;
                }
                // A thread that has ended meanwhile has not shown all.
                has_files = numbered(&thread.join("fd")).next().is_some();
            }
            // All threads share their memory.
            has_mappings = has_mappings || scan.add_mappings(meter, &process, &thread)?;
        }
    }
    for (inode, bytes) in std::mem::take(&mut scan.estimates) {
        meter.add_once(0, inode, bytes)?;
    }
    Ok(())
}

struct Scan {
    examined: usize,
    began: Instant,
    /// The CPU time of this thread before the scan.
    cpu: Duration,
    /// The size up to the end of the last mapping, by inode, of mapped files that cannot be examined themselves.
    estimates: HashMap<u64, u64>,
    devices: Vec<String>,
}

impl Scan {
    fn new(mounts: &[PathBuf]) -> Self {
        Self { examined: 0, began: Instant::now(), cpu: cpu_time(), estimates: HashMap::new(), devices: devices(mounts) }
    }

    fn examine(&mut self) -> Result<(), Excess> {
        self.examined += 1;
        if self.examined > MAX_EXAMINED {
            return Err(Excess::Descriptors(MAX_EXAMINED));
        }
        if self.examined.is_multiple_of(CHECK_INTERVAL)
            && (cpu_time().saturating_sub(self.cpu) > MAX_CPU_TIME || self.began.elapsed() > MAX_TIME)
        {
            return Err(Excess::Slow);
        }
        Ok(())
    }

    /// Adds the file that a link of `/proc` leads to, if it is unlinked.
    fn add_file(&mut self, meter: &mut Meter, link: &Path) -> Result<(), Excess> {
        self.examine()?;
        match std::fs::metadata(link) {
            Ok(file) if is_unlinked_on_disk(&file, link) => meter.add_once(0, file.ino(), file.blocks() * 512),
            _ => Ok(()),
        }
    }

    /// Adds the unlinked files that a process has mapped, as one of its threads shows them: a mapping outlives its descriptor.
    /// Returns whether the thread shows any mapping.
    fn add_mappings(&mut self, meter: &mut Meter, process: &Path, thread: &Path) -> Result<bool, Excess> {
        let Ok(maps) = File::open(thread.join("maps")) else { return Ok(false) };
        let mut maps = BufReader::new(maps.take(MAX_MAPS_BYTES));
        let (mut line, mut has_any) = (Vec::new(), false);
        loop {
            line.clear();
            if !matches!(maps.read_until(b'\n', &mut line), Ok(1..)) {
                break;
            }
            has_any = true;
            self.examine()?;
            let Some(text) = line.strip_suffix(b"\n").filter(|text| text.ends_with(b"(deleted)")) else { continue };
            let text = String::from_utf8_lossy(text);
            let Some(mapping) = Mapping::parse(&text) else { continue };
            // `map_files` is missing in `task/<tid>`, but exists in `/proc/<tid>`.
            let thread = thread.file_name().unwrap_or_default();
            let link = process.join("..").join(thread).join("map_files").join(mapping.range);
            match std::fs::metadata(&link) {
                Ok(file) if is_unlinked_on_disk(&file, &link) => meter.add_once(0, file.ino(), file.blocks() * 512)?,
                Ok(_) => {}
                // Only root of the host may follow these links, and only while the thread lives.
                Err(_) => {
                    if self.devices.iter().any(|device| device == mapping.device) {
                        let end = self.estimates.entry(mapping.inode).or_default();
                        *end = mapping.end.max(*end);
                    }
                }
            }
        }
        if maps.get_ref().limit() == 0 { Err(Excess::Slow) } else { Ok(has_any) }
    }
}

/// A line of `/proc/<pid>/maps`: `address perms offset device inode path`.
struct Mapping<'a> {
    range: &'a str,
    device: &'a str,
    inode: u64,
    /// The offset of its end in the file.
    end: u64,
}

impl<'a> Mapping<'a> {
    fn parse(line: &'a str) -> Option<Self> {
        let mut words = line.split_ascii_whitespace();
        let range = words.next()?;
        let hexadecimal = |text: &str| u64::from_str_radix(text, 16).ok();
        let offset = hexadecimal(words.nth(1)?)?;
        let device = words.next()?;
        let inode = words.next()?.parse().ok()?;
        let (from, to) = range.split_once('-')?;
        let end = offset.saturating_add(hexadecimal(to)?.saturating_sub(hexadecimal(from)?));
        Some(Self { range, device, inode, end })
    }
}

/// The CPU time of this thread.
fn cpu_time() -> Duration {
    let part = |time: nix::sys::time::TimeVal| {
        Duration::from_secs(time.tv_sec().unsigned_abs()) + Duration::from_micros(time.tv_usec().unsigned_abs())
    };
    getrusage(UsageWho::RUSAGE_THREAD).map_or(Duration::ZERO, |usage| part(usage.user_time()) + part(usage.system_time()))
}

fn is_unlinked_on_disk(file: &Metadata, link: &Path) -> bool {
    if file.nlink() > 0 || !(file.is_file() || file.is_dir()) {
        return false;
    }
    #[allow(clippy::unnecessary_cast, clippy::cast_sign_loss, reason = "the type differs between architectures")]
    let kind = rustix::fs::statfs(link).map(|system| system.f_type as u64 & 0xffff_ffff);
    !matches!(kind, Ok(TMPFS_MAGIC | HUGETLBFS_MAGIC))
}

/// The devices of directories, as `/proc/<pid>/maps` writes them.
fn devices(folders: &[PathBuf]) -> Vec<String> {
    let device = |folder: &PathBuf| {
        let device = std::fs::metadata(folder).ok()?.dev();
        Some(format!("{:02x}:{:02x}", rustix::fs::major(device), rustix::fs::minor(device)))
    };
    folders.iter().filter_map(device).collect()
}

/// The entries of a directory whose names are numbers.
fn numbered(folder: &Path) -> impl Iterator<Item = PathBuf> + use<> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    entries.filter(|entry| entry.file_name().to_string_lossy().bytes().all(|b| b.is_ascii_digit())).map(|entry| entry.path())
}

#[cfg(test)]
mod tests {
    use super::{CHECK_INTERVAL, MAX_TIME, Mapping, Scan, add};
    use crate::trees::{Excess, Meter, Usage};
    use std::io::Write;
    use std::path::Path;
    use std::time::Instant;

    #[test]
    fn a_scan_that_takes_too_long_fails() {
        let mut scan = Scan::new(&[]);
        let mut examine = |began| {
            scan.began = began;
            (0..CHECK_INTERVAL).try_for_each(|_| scan.examine())
        };
        assert_eq!(examine(Instant::now()), Ok(()));
        let long_ago = Instant::now().checked_sub(MAX_TIME * 2).expect("the host runs for longer than that");
        assert_eq!(examine(long_ago), Err(Excess::Slow));
    }

    #[test]
    fn an_unlinked_file_counts_while_it_is_open() {
        // A `/proc` with this process only.
        let proc = tempfile::tempdir().expect("a folder");
        std::os::unix::fs::symlink(format!("/proc/{}", std::process::id()), proc.path().join("1")).expect("linked");
        let folder = tempfile::tempdir_in("/tmp").expect("a folder");
        let held = |most| {
            let mut meter = Meter::new(Usage { bytes: most, inodes: u64::MAX });
            (add(&mut meter, proc.path(), &[folder.path().to_owned()], true), meter.usage().bytes)
        };
        let (_, before) = held(u64::MAX);
        let mut file = std::fs::File::create_new(folder.path().join("large")).expect("made");
        file.write_all(&vec![1; 64 << 20]).expect("written");
        let again = file.try_clone().expect("cloned");
        let room = 32 << 20;
        assert!(held(u64::MAX).1 < before + room, "it has a name");
        std::fs::remove_file(folder.path().join("large")).expect("removed");
        assert!(held(u64::MAX).1 > before + room);
        assert_eq!(held(1 << 20).0, Err(Excess::Bytes(1 << 20)));
        drop(file);
        assert!(held(u64::MAX).1 > before + room, "another descriptor has it open");
        drop(again);
        assert!(held(u64::MAX).1 < before + room);
    }

    #[test]
    fn a_mapping_is_parsed() {
        let line = "7f0000000000-7f0000002000 rw-s 00001000 00:27 4242                       /app/big file (deleted)";
        let mapping = Mapping::parse(line).expect("a mapping");
        assert_eq!((mapping.range, mapping.device), ("7f0000000000-7f0000002000", "00:27"));
        assert_eq!((mapping.inode, mapping.end), (4242, 0x3000));
        assert!(Mapping::parse("nonsense").is_none());
        assert!(Path::new("/proc/self/maps").exists());
    }
}
