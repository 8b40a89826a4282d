//! The process that makes one plan. It gives up every right that it does not need before it reads the first
//! byte: it sees no file but the tree or the archive that it was given, has no network, cannot start anything,
//! and has bounds of memory and time.

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

use super::{Answer, CONTAINERS, ROOM};
use crate::{NOBODY_UID, archive};

/// CPU time of one plan.
pub const CPU_SECONDS: u64 = 10;
/// Memory of one plan, beyond the program itself.
pub const MEMORY_BYTES: u64 = 512 << 20;
const STACK_BYTES: u64 = 8 << 20;
const DESCRIPTORS: u64 = 256;

/// The role's entry: `planner folder|archive [room=<bytes>] [containers]`, with the folder or the archive as standard input.
/// The answer is JSON on standard output; an archive is decompressed to standard error.
#[must_use]
pub fn run() -> i32 {
    // A panic is told by the answer; a backtrace would go into the file of an archive.
    std::panic::set_hook(Box::new(|_| {}));
    let answer = answer();
    let is_plan = matches!(answer, Answer::Plan(_));
    let told = serde_json::to_vec(&answer).is_ok_and(|bytes| std::io::stdout().lock().write_all(&bytes).is_ok());
    i32::from(!(is_plan && told))
}

fn answer() -> Answer {
    let mut arguments = std::env::args().skip(2);
    let is_folder = arguments.next().as_deref() == Some("folder");
    let mut options = Options { containers: false };
    let mut room = u64::MAX;
    for argument in arguments {
        match argument.strip_prefix(ROOM) {
            Some(bytes) => room = bytes.parse().unwrap_or(room),
            None => options.containers |= argument == CONTAINERS,
        }
    }
    if let Err(error) = capsule_runtime::descriptors::close_inherited() {
        return Answer::Unconfined(format!("inherited descriptors: {error}"));
    }
    let opened = rustix::stdio::stdin().try_clone_to_owned().and_then(|input| {
        let spool = rustix::stdio::stderr().try_clone_to_owned()?;
        Ok((input, spool))
    });
    let (input, spool) = match opened {
        Ok(opened) => opened,
        Err(error) => return Answer::Unconfined(format!("its input: {error}")),
    };
    // Set first: a limit that is lower already stays.
    let limited = if room < most_written(is_folder) { limit(Resource::Fsize, room) } else { Ok(()) };
    if let Err(why) = limited.and_then(|()| confine(&input, is_folder)) {
        return Answer::Unconfined(why);
    }
    let made = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| make(input, spool, is_folder, options)));
    match made {
        Ok(Ok(plan)) => Answer::Plan(Box::new(plan)),
        Ok(Err(why)) => Answer::Refused(why),
        Err(_) => Answer::Refused("reading the repository met an error of Capsule's own; please report it".into()),
    }
}

fn make(input: OwnedFd, spool: OwnedFd, is_folder: bool, options: Options) -> Result<capsule_buildplan::Plan, String> {
    let told = |error: PlanError| error.to_string();
    if is_folder {
        return plan_with(&Folder::at(input), options).map_err(told);
    }
    let tree = archive::listing_of(File::from(input), || Ok(File::from(spool))).map_err(|error| error.to_string())?;
    plan_with(&tree, options).map_err(told)
}

fn at<E: std::fmt::Display>(what: &'static str) -> impl FnOnce(E) -> String {
    move |error| format!("{what}: {error}")
}

/// Bytes of the largest file that is written: what an archive decompresses to is written to one.
fn most_written(is_folder: bool) -> u64 {
    if is_folder { 0 } else { archive::Limits::default().bytes + (1 << 20) }
}

fn limit(resource: Resource, most: u64) -> Result<(), String> {
    setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) }).map_err(at("limits"))
}

/// Gives up whatever a plan does not take: of this process, for good. `input` is the folder that is read, which
/// becomes the root of all paths, or an archive.
///
/// # Errors
/// When the host does not allow that. Nothing may be read then.
pub fn confine(input: &OwnedFd, is_folder: bool) -> Result<(), String> {
    for (resource, most) in [
        (Resource::Data, MEMORY_BYTES),
        (Resource::Stack, STACK_BYTES),
        (Resource::Nofile, DESCRIPTORS),
        (Resource::Nproc, 0),
        (Resource::Core, 0),
        (Resource::Fsize, most_written(is_folder)),
    ] {
        limit(resource, getrlimit(resource).maximum.map_or(most, |present| present.min(most)))?;
    }
    // The signal of the first tells more than that of the second.
    let time = Rlimit { current: Some(CPU_SECONDS), maximum: Some(CPU_SECONDS + 2) };
    setrlimit(Resource::Cpu, time).map_err(at("limits"))?;

    let is_root = rustix::process::geteuid().is_root();
    if !is_root {
        // A namespace in which this user may change its root.
        unshare(CloneFlags::CLONE_NEWUSER).map_err(at("a user namespace"))?;
    }
    if is_folder {
        rustix::process::fchdir(input.as_fd()).map_err(at("entering the folder"))?;
    }
    // The tree itself, or the empty folder that an archive's process was started in.
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

/// The system calls that reading files, memory and time take. All others fail; nothing is executed, no memory
/// becomes code, and there are no sockets.
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
