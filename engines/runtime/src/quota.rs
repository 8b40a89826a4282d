//! Project quotas: ext4 and XFS enforce a limit on directories if the file system is mounted with `prjquota`.
//!
//! They are set with `chattr` and `setquota`, since the system calls have no safe interface. Usage is measured in any case;
//! a workload that a quota keeps within its limit is never found beyond it.

use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use crate::trees::Usage;

/// The lowest project number that Capsule uses, far above those that people choose.
const FIRST_PROJECT: u32 = 1 << 30;

/// A limit that the file system enforces.
#[derive(Debug)]
pub struct Quota {
    project: u32,
    mount: PathBuf,
}

impl Quota {
    /// Limits the total usage of these directories. The first is new; the others may have content. `None` if the file system
    /// cannot enforce the limit.
    pub fn set(id: &str, folders: &[&Path], limit: Usage) -> Option<Self> {
        let mount = mount_with_quotas(folders.first()?)?;
        let quota = Self { project: project(id), mount };
        let number = quota.project.to_string();
        for (index, folder) in folders.iter().enumerate() {
            if !run(Command::new("chattr").args(["+P", "-p", &number, "--"]).arg(folder)) {
                return None;
            }
            if index > 0 {
                // Fails for entries that are neither files nor directories, and continues.
                run(Command::new("chattr").args(["-R", "-f", "+P", "-p", &number, "--"]).arg(folder));
            }
        }
        quota.limit(limit).then_some(quota)
    }

    /// Sets the limit; zero removes it.
    fn limit(&self, limit: Usage) -> bool {
        run(Command::new("setquota").arg("-P").args(limit_arguments(self.project, limit)).arg(&self.mount))
    }

    /// Removes the limit: the directories may be used for something else.
    pub fn remove(&self) {
        self.limit(Usage::NOTHING);
    }
}

/// Whether quotas can be set in this directory.
pub fn is_available(folder: &Path) -> bool {
    let has = |program: &str| Command::new(program).arg("--version").stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok();
    rustix::process::geteuid().is_root() && mount_with_quotas(folder).is_some() && has("setquota") && has("chattr")
}

/// `setquota -P <project> <soft KiB> <hard KiB> <soft inodes> <hard inodes> <mount point>`.
fn limit_arguments(project: u32, limit: Usage) -> [String; 5] {
    [project.to_string(), "0".into(), limit.bytes.div_ceil(1024).to_string(), "0".into(), limit.inodes.to_string()]
}

/// The project number of a workload: the FNV-1a hash of its id.
fn project(id: &str) -> u32 {
    let hash = id.bytes().fold(2_166_136_261_u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(16_777_619));
    FIRST_PROJECT | (hash & (FIRST_PROJECT - 1))
}

fn mount_with_quotas(folder: &Path) -> Option<PathBuf> {
    let device = std::fs::metadata(folder).ok()?.dev();
    let device = format!("{}:{}", rustix::fs::major(device), rustix::fs::minor(device));
    find_mount(&std::fs::read_to_string("/proc/self/mountinfo").ok()?, &device)
}

/// Finds the mount point of a device that is mounted with project quotas. A line of `mountinfo` is
/// `id parent device root mount-point options [tags] - type source super-options`.
fn find_mount(mountinfo: &str, device: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (mount, system) = line.split_once(" - ")?;
        let mount: Vec<&str> = mount.split(' ').collect();
        let options = system.split(' ').nth(2)?;
        let enforced = options.split(',').any(|option| matches!(option, "prjquota" | "pquota"));
        // `setquota` needs a mount of the whole file system.
        (enforced && *mount.get(2)? == device && *mount.get(3)? == "/").then(|| mount.get(4).map(PathBuf::from))?
    })
}

fn run(command: &mut Command) -> bool {
    command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().is_ok_and(|status| status.success())
}

#[cfg(test)]
mod tests {
    use super::{FIRST_PROJECT, find_mount, limit_arguments, project};
    use crate::trees::Usage;

    #[test]
    fn a_mount_with_project_quotas_is_found_by_its_device() {
        let mountinfo = "22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw,errors=remount-ro\n\
                         30 22 8:2 /sub /mnt rw - xfs /dev/sda2 rw,attr2,prjquota\n\
                         31 22 8:2 / /srv rw,relatime - xfs /dev/sda2 rw,attr2,prjquota\n";
        assert_eq!(find_mount(mountinfo, "8:1"), None);
        assert_eq!(find_mount(mountinfo, "8:2").expect("found").to_str(), Some("/srv"));
        assert_eq!(find_mount(mountinfo, "8:3"), None);
    }

    #[test]
    fn a_limit_is_passed_in_kibibytes_and_inodes() {
        let limit = Usage { bytes: 64 << 20, inodes: 10_000 };
        assert_eq!(limit_arguments(7, limit), ["7", "0", "65536", "0", "10000"]);
        assert_eq!(limit_arguments(7, Usage::NOTHING), ["7", "0", "0", "0", "0"]);
        assert!(project("i0123") >= FIRST_PROJECT && project("i0123") != project("i0124"));
    }
}
