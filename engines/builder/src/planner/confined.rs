//! The process that makes one plan. It confines itself before it reads the first byte: it can open no file but the tree or
//! archive that it was given, has no network, cannot start a program, and has limits of memory and time.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use capsule_buildplan::{Folder, Options, PlanError, plan_with};
use nix::libc;
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, setgroups, setresgid, setresuid};
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustix::thread::{CapabilitySet, CapabilitySets};
use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition, SeccompFilter, SeccompRule, TargetArch,
};

use super::{CONTAINERS, Reply, SPOOL_BYTES};
use crate::{NOBODY_UID, archive};

/// CPU time of one plan.
pub const CPU_SECONDS: u64 = 10;
/// Memory of one plan, beyond the program itself.
pub const MEMORY_BYTES: u64 = 512 << 20;
const STACK_BYTES: u64 = 8 << 20;
const DESCRIPTORS: u64 = 256;

/// Runs the role: `planner folder|archive [room=<bytes>] [containers]`, with the folder or the archive as standard input.
/// The reply is JSON on standard output; an archive is decompressed to standard error. Returns the exit status.
#[must_use]
pub fn run() -> i32 {
    // The reply reports a panic. A backtrace would be written to standard error, the file of the archive.
    std::panic::set_hook(Box::new(|_| {}));
    let reply = reply();
    let is_plan = matches!(reply, Reply::Plan(_));
    let is_written = serde_json::to_vec(&reply).is_ok_and(|bytes| std::io::stdout().lock().write_all(&bytes).is_ok());
    i32::from(!(is_plan && is_written))
}

fn reply() -> Reply {
    let mut arguments = std::env::args().skip(2);
    let is_folder = arguments.next().as_deref() == Some("folder");
    let mut options = Options { containers: false };
    let mut spool_bytes = u64::MAX;
    for argument in arguments {
        match argument.strip_prefix(SPOOL_BYTES) {
            Some(bytes) => spool_bytes = bytes.parse().unwrap_or(spool_bytes),
            None => options.containers |= argument == CONTAINERS,
        }
    }
    if let Err(error) = capsule_runtime::descriptors::close_inherited() {
        return Reply::Unconfined(format!("inherited descriptors: {error}"));
    }
    let opened = rustix::stdio::stdin().try_clone_to_owned().and_then(|input| {
        let spool = rustix::stdio::stderr().try_clone_to_owned()?;
        Ok((input, spool))
    });
    let (input, spool) = match opened {
        Ok(opened) => opened,
        Err(error) => return Reply::Unconfined(format!("its input: {error}")),
    };
    // Set first: `confine` keeps a limit that is already lower.
    let limited = if spool_bytes < max_file_bytes(is_folder) { limit(Resource::Fsize, spool_bytes) } else { Ok(()) };
    if let Err(why) = limited.and_then(|()| confine(&input, is_folder)) {
        return Reply::Unconfined(why);
    }
    let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| make(input, spool, is_folder, options)));
    match made {
        Ok(Ok(plan)) => Reply::Plan(Box::new(plan)),
        Ok(Err(why)) => Reply::Refused(why),
        Err(_) => Reply::Refused("reading the repository met an error of Capsule's own; report it as a bug".into()),
    }
}

fn make(input: OwnedFd, spool: OwnedFd, is_folder: bool, options: Options) -> Result<capsule_buildplan::Plan, String> {
    let message = |error: PlanError| error.to_string();
    if is_folder {
        return plan_with(&Folder::at(input), options).map_err(message);
    }
    let tree = archive::listing_of(File::from(input), || Ok(File::from(spool))).map_err(|error| error.to_string())?;
    plan_with(&tree, options).map_err(message)
}

fn at<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {error}")
}

/// Bytes of the largest file that may be written: the decompressed archive.
fn max_file_bytes(is_folder: bool) -> u64 {
    if is_folder { 0 } else { archive::Limits::default().bytes + (1 << 20) }
}

fn limit(resource: Resource, most: u64) -> Result<(), String> {
    setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) }).map_err(at("limits"))
}

/// Drops every privilege of this process that making a plan does not need. `input` is an archive, or the folder to read,
/// which becomes the root directory.
///
/// # Errors
/// When the host does not allow it. The caller must not read the input then.
pub fn confine(input: &OwnedFd, is_folder: bool) -> Result<(), String> {
    for (resource, most) in [
        (Resource::Data, MEMORY_BYTES),
        (Resource::Stack, STACK_BYTES),
        (Resource::Nofile, DESCRIPTORS),
        (Resource::Nproc, 0),
        (Resource::Core, 0),
        (Resource::Fsize, max_file_bytes(is_folder)),
    ] {
        limit(resource, getrlimit(resource).maximum.map_or(most, |present| present.min(most)))?;
    }
    // The soft limit is lower: its signal, SIGXCPU, is easier to explain than SIGKILL.
    let time = Rlimit { current: Some(CPU_SECONDS), maximum: Some(CPU_SECONDS + 2) };
    setrlimit(Resource::Cpu, time).map_err(at("limits"))?;

    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        // Only in a user namespace of its own may this user call chroot.
        unshare(CloneFlags::CLONE_NEWUSER).map_err(at("a user namespace"))?;
    }
    if is_folder {
        rustix::process::fchdir(input.as_fd()).map_err(at("entering the folder"))?;
    }
    // The current directory is the tree, or the empty folder that the process of an archive starts in.
    rustix::process::chroot(".").map_err(at("chroot"))?;
    rustix::process::chdir("/").map_err(at("chroot"))?;
    if is_root {
        let (user, group) = (Uid::from_raw(NOBODY_UID), Gid::from_raw(NOBODY_UID));
        setgroups(&[]).map_err(at("groups"))?;
        setresgid(group, group, group).map_err(at("group"))?;
        setresuid(user, user, user).map_err(at("user"))?;
    }
    let none = CapabilitySet::empty();
    rustix::thread::set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(at("capabilities"))?;
    rustix::thread::set_no_new_privs(true).map_err(at("no_new_privs"))?;
    let filter = filter().map_err(at("seccomp"))?;
    seccompiler::apply_filter(&filter).map_err(at("seccomp"))
}

/// Allows the system calls for reading files, memory and time. All others fail: no program is executed, no memory
/// becomes executable, and no socket is opened.
fn filter() -> Result<BpfProgram, seccompiler::BackendError> {
    let mut rules: BTreeMap<i64, Vec<SeccompRule>> = [
        libc::SYS_read,
        libc::SYS_pread64,
        libc::SYS_readv,
        libc::SYS_write,
        libc::SYS_writev,
        libc::SYS_lseek,
        libc::SYS_close,
        libc::SYS_fcntl,
        libc::SYS_fstat,
        libc::SYS_newfstatat,
        libc::SYS_statx,
        libc::SYS_openat,
        libc::SYS_openat2,
        libc::SYS_getdents64,
        libc::SYS_readlinkat,
        libc::SYS_munmap,
        libc::SYS_mremap,
        libc::SYS_madvise,
        libc::SYS_brk,
        libc::SYS_rt_sigaction,
        libc::SYS_rt_sigprocmask,
        libc::SYS_rt_sigreturn,
        libc::SYS_sigaltstack,
        libc::SYS_futex,
        libc::SYS_sched_yield,
        libc::SYS_clock_gettime,
        libc::SYS_gettimeofday,
        libc::SYS_getrandom,
        libc::SYS_getpid,
        libc::SYS_gettid,
        libc::SYS_exit,
        libc::SYS_exit_group,
        libc::SYS_restart_syscall,
    ]
    .into_iter()
    .map(|call| (call, Vec::new()))
    .collect();
    let executable = u64::from(libc::PROT_EXEC.unsigned_abs());
    for call in [libc::SYS_mmap, libc::SYS_mprotect] {
        let is_data = SeccompCondition::new(2, SeccompCmpArgLen::Dword, SeccompCmpOp::MaskedEq(executable), 0)?;
        rules.insert(call, vec![SeccompRule::new(vec![is_data])?]);
    }
    let refusal = SeccompAction::Errno(libc::EPERM.unsigned_abs());
    let filter = SeccompFilter::new(rules, refusal, SeccompAction::Allow, TargetArch::try_from(std::env::consts::ARCH)?)?;
    filter.try_into()
}
