//! The system calls that a sandbox may make: an allow-list modelled on the default profile of Docker Engine, with less.
//!
//! There are three filters; the strictest result applies. A call that is not on the list fails with `EPERM` if the list of
//! known calls has it, and with `ENOSYS` if it is newer, so that a C library falls back to an older call. Calls of another
//! architecture (32-bit x86) kill the process; those of x32 are not on the list.

use std::collections::{BTreeMap, BTreeSet};

use seccompiler::{
    BpfProgram, SeccompAction, SeccompCmpArgLen as Length, SeccompCmpOp as Compare, SeccompCondition, SeccompFilter, SeccompRule,
};
use serde::{Deserialize, Serialize};
use syscalls::Sysno;

/// A relaxation of the system call filter, which a platform administrator grants to a service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Relaxation {
    /// `io_uring_setup` and its siblings.
    IoUring,
    /// User namespaces and the calls that they need, for browsers and nested sandboxes.
    UserNamespaces,
    /// Access to other processes beyond `ptrace`, as Docker gives with `CAP_SYS_PTRACE`: `pidfd_getfd`, `kcmp`.
    Ptrace,
    /// `keyctl`, `add_key`, `request_key`.
    Keyrings,
    /// `perf_event_open`.
    PerfEvents,
    /// `userfaultfd`.
    Userfaultfd,
    /// `get_mempolicy`, `set_mempolicy`, `mbind` and their siblings, for databases on NUMA machines.
    MemoryPolicy,
    /// Any execution domain of `personality`, such as one without random addresses.
    Personality,
    /// No filter at all.
    Unconfined,
}

impl Relaxation {
    /// The calls that it allows.
    fn calls(self) -> &'static str {
        match self {
            Self::IoUring => "io_uring_setup io_uring_enter io_uring_register",
            Self::UserNamespaces => {
                "clone3 unshare setns mount umount2 pivot_root chroot sethostname setdomainname \
                 fsopen fsconfig fsmount fspick move_mount open_tree mount_setattr"
            }
            Self::Ptrace => "kcmp pidfd_getfd process_madvise",
            Self::Keyrings => "keyctl add_key request_key",
            Self::PerfEvents => "perf_event_open",
            Self::Userfaultfd => "userfaultfd",
            Self::MemoryPolicy => "get_mempolicy set_mempolicy mbind migrate_pages move_pages set_mempolicy_home_node",
            Self::Personality | Self::Unconfined => "",
        }
    }
}

/// The calls that every sandbox may make. Names that the architecture does not have are ignored.
const ALLOWED: &str = "
    accept accept4 access adjtimex alarm arch_prctl bind brk cachestat capget capset chdir chmod chown clock_adjtime
    clock_getres clock_gettime clock_nanosleep clone close close_range connect copy_file_range creat dup dup2 dup3
    epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait epoll_wait_old eventfd eventfd2
    execve execveat exit exit_group faccessat faccessat2 fadvise64 fallocate fchdir fchmod fchmodat fchmodat2 fchown
    fchownat fcntl fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstatat fstatfs fsync ftruncate
    futex futex_requeue futex_wait futex_waitv futex_wake futimesat getcpu getcwd getdents getdents64 getegid geteuid
    getgid getgroups getitimer getpeername getpgid getpgrp getpid getppid getpriority getrandom getresgid getresuid
    getrlimit get_robust_list getrusage getsid getsockname getsockopt get_thread_area gettid gettimeofday getuid getxattr
    getxattrat inotify_add_watch inotify_init inotify_init1 inotify_rm_watch io_cancel ioctl io_destroy io_getevents
    io_pgetevents ioprio_get ioprio_set io_setup io_submit kill landlock_add_rule landlock_create_ruleset
    landlock_restrict_self lchown lgetxattr link linkat listen listxattr listxattrat llistxattr lremovexattr lseek
    lsetxattr lstat madvise map_shadow_stack membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock
    mlock2 mlockall mmap mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedsend mq_unlink mremap mseal
    msgctl msgget msgrcv msgsnd msync munlock munlockall munmap name_to_handle_at nanosleep newfstatat open openat openat2
    pause personality pidfd_open pidfd_send_signal pipe pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll prctl pread64
    preadv preadv2 prlimit64 process_mrelease process_vm_readv process_vm_writev pselect6 ptrace pwrite64 pwritev pwritev2
    read readahead readlink readlinkat readv recvfrom recvmmsg recvmsg remap_file_pages removexattr removexattrat rename
    renameat renameat2 restart_syscall rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask rt_sigqueueinfo rt_sigreturn
    rt_sigsuspend rt_sigtimedwait rt_tgsigqueueinfo sched_getaffinity sched_getattr sched_getparam sched_get_priority_max
    sched_get_priority_min sched_getscheduler sched_rr_get_interval sched_setaffinity sched_setattr sched_setparam
    sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop sendfile sendmmsg sendmsg sendto setfsgid
    setfsuid setgid setgroups setitimer setpgid setpriority setregid setresgid setresuid setreuid setrlimit
    set_robust_list setsid setsockopt set_thread_area set_tid_address setuid setxattr setxattrat shmat shmctl shmdt shmget
    shutdown sigaltstack signalfd signalfd4 socket socketpair splice stat statfs statx symlink symlinkat sync
    sync_file_range syncfs sysinfo tee tgkill time timer_create timer_delete timer_getoverrun timer_gettime timer_settime
    timerfd_create timerfd_gettime timerfd_settime times tkill truncate umask uname unlink unlinkat uretprobe utime
    utimensat utimes vfork vmsplice wait4 waitid write writev
";

/// `CLONE_NEW…` of `linux/sched.h`: cgroup, UTS, IPC, user, PID and network namespaces, and mounts.
const NAMESPACES: [u64; 7] = [0x0002_0000, 0x0200_0000, 0x0400_0000, 0x0800_0000, 0x1000_0000, 0x2000_0000, 0x4000_0000];
/// `CLONE_FILES` and `CLONE_THREAD` of `linux/sched.h`: a thread, and one table of descriptors for both.
const CLONE_FILES: u64 = 0x400;
const CLONE_THREAD: u64 = 0x1_0000;
/// `close_range`: gives the thread a table of its own first.
const CLOSE_RANGE_UNSHARE: u64 = 2;
/// `personality`: Linux and its 32-bit form, either with the kernel release shown as 2.6, and the question which it is.
const PERSONALITIES: [u64; 5] = [0, 0x8, 0x2_0000, 0x2_0008, 0xffff_ffff];

/// `ioctl`: the flags and the project of a file, by which it would count towards no quota; input into a terminal by another
/// program; and the console's own.
const CONTROLS: [u64; 4] = [0x4008_6602, 0x401c_5820, 0x5412, 0x541c];

/// Address families of `socket`.
const UNIX: u64 = 1;
const INET: u64 = 2;
const INET6: u64 = 10;
const NETLINK: u64 = 16;
/// `NETLINK_ROUTE`: what addresses there are.
const ROUTE: u64 = 0;
/// The kinds of sockets on the internet: streams and datagrams. All others are raw or take protocols of their own.
const KINDS: [u64; 2] = [1, 2];
/// What remains of a kind without `SOCK_CLOEXEC` and `SOCK_NONBLOCK`.
const KIND_MASK: u64 = 0xf;
/// Protocols on the internet: the default of the kind, TCP, UDP, and multipath TCP, which Go requests.
const PROTOCOLS: [u64; 4] = [0, 6, 17, 262];

const EPERM: u32 = 1;
const ENOSYS: u32 = 38;
const EAFNOSUPPORT: u32 = 97;

type Rules = BTreeMap<i64, Vec<SeccompRule>>;

/// Filters the system calls of this process and its children.
///
/// # Errors
/// When the kernel or the architecture does not support filters.
pub fn install(relaxations: &[Relaxation]) -> Result<(), String> {
    if relaxations.contains(&Relaxation::Unconfined) {
        return Ok(());
    }
    for filter in filters(relaxations)? {
        seccompiler::apply_filter_all_threads(&filter).map_err(|error| format!("cannot filter system calls: {error}"))?;
    }
    Ok(())
}

/// Whether the filter ensures that all threads of a process share one descriptor table, so that one thread shows all open
/// files of the process.
pub fn threads_share_files(relaxations: &[Relaxation]) -> bool {
    !relaxations.iter().any(|relaxation| matches!(relaxation, Relaxation::UserNamespaces | Relaxation::Unconfined))
}

/// The filters in the order of installation: if two reject a call, the error of the later one is returned.
fn filters(relaxations: &[Relaxation]) -> Result<[BpfProgram; 3], String> {
    let allowed = allowed(relaxations);
    let list = allowed.iter().map(|call| (number(*call), Vec::new())).collect();
    // `clone3` fails with `ENOSYS`: its flags are in memory, where a filter cannot see them. A C library then calls `clone`.
    let known = Sysno::iter().filter(|call| !allowed.contains(call) && *call != Sysno::clone3);
    let mut refused: Rules = known.map(|call| (number(call), Vec::new())).collect();
    refused.extend(refused_arguments(relaxations)?);
    let families = BTreeMap::from([
        (number(Sysno::socket), vec![rule(&[UNIX, INET, INET6, NETLINK].map(|family| (0, Compare::Ne, family)))?]),
        (number(Sysno::socketpair), vec![rule(&[(0, Compare::Ne, UNIX)])?]),
    ]);
    Ok([
        compile(list, SeccompAction::Errno(ENOSYS), SeccompAction::Allow)?,
        compile(refused, SeccompAction::Allow, SeccompAction::Errno(EPERM))?,
        compile(families, SeccompAction::Allow, SeccompAction::Errno(EAFNOSUPPORT))?,
    ])
}

fn allowed(relaxations: &[Relaxation]) -> BTreeSet<Sysno> {
    let more = relaxations.iter().flat_map(|relaxation| relaxation.calls().split_whitespace());
    ALLOWED.split_whitespace().chain(more).filter_map(|name| name.parse().ok()).collect()
}

/// The rejected arguments of allowed calls.
fn refused_arguments(relaxations: &[Relaxation]) -> Result<Rules, String> {
    let mut rules = Rules::new();
    if !relaxations.contains(&Relaxation::UserNamespaces) {
        let flags = NAMESPACES.map(|flag| rule(&[(0, Compare::MaskedEq(flag), flag)]));
        rules.insert(number(Sysno::clone), flags.into_iter().collect::<Result<_, _>>()?);
    }
    if threads_share_files(relaxations) {
        let own_table = rule(&[(0, Compare::MaskedEq(CLONE_THREAD | CLONE_FILES), CLONE_THREAD)])?;
        rules.entry(number(Sysno::clone)).or_default().push(own_table);
        let unshare = rule(&[(2, Compare::MaskedEq(CLOSE_RANGE_UNSHARE), CLOSE_RANGE_UNSHARE)])?;
        rules.insert(number(Sysno::close_range), vec![unshare]);
    }
    if !relaxations.contains(&Relaxation::Personality) {
        rules.insert(number(Sysno::personality), vec![rule(&PERSONALITIES.map(|domain| (0, Compare::Ne, domain)))?]);
    }
    let controls = CONTROLS.map(|control| rule(&[(1, Compare::Eq, control)]));
    rules.insert(number(Sysno::ioctl), controls.into_iter().collect::<Result<_, _>>()?);
    let mut sockets = vec![rule(&[(0, Compare::Eq, NETLINK), (2, Compare::Ne, ROUTE)])?];
    for family in [INET, INET6] {
        for kind in (0..=KIND_MASK).filter(|kind| !KINDS.contains(kind)) {
            sockets.push(rule(&[(0, Compare::Eq, family), (1, Compare::MaskedEq(KIND_MASK), kind)])?);
        }
        let others = PROTOCOLS.map(|protocol| (2, Compare::Ne, protocol));
        let others: Vec<_> = std::iter::once((0, Compare::Eq, family)).chain(others).collect();
        sockets.push(rule(&others)?);
    }
    rules.insert(number(Sysno::socket), sockets);
    Ok(rules)
}

/// A rule that matches if all conditions do: argument, comparison, value. All of them are `int` or have their flags in
/// the lower half.
fn rule(conditions: &[(u8, Compare, u64)]) -> Result<SeccompRule, String> {
    let condition = |(argument, compare, value): &(u8, Compare, u64)| {
        SeccompCondition::new(*argument, Length::Dword, compare.clone(), *value)
    };
    let conditions = conditions.iter().map(condition).collect::<Result<_, _>>().map_err(|error| error.to_string())?;
    SeccompRule::new(conditions).map_err(|error| error.to_string())
}

fn compile(rules: Rules, otherwise: SeccompAction, matched: SeccompAction) -> Result<BpfProgram, String> {
    let architecture = std::env::consts::ARCH;
    let target = architecture.try_into().map_err(|_| format!("cannot filter system calls on {architecture}"))?;
    let filter = SeccompFilter::new(rules, otherwise, matched, target);
    filter.and_then(TryInto::try_into).map_err(|error| format!("cannot compile the system call filter: {error}"))
}

fn number(call: Sysno) -> i64 {
    i64::from(call.id())
}

#[cfg(test)]
mod tests {
    use super::{ALLOWED, Relaxation, allowed, filters, threads_share_files};
    use syscalls::Sysno;

    #[test]
    fn every_name_is_a_system_call_of_a_supported_architecture() {
        // Of the calls that newer architectures do not have, none is missing on x86_64; there, `fstatat` is `newfstatat`.
        if cfg!(target_arch = "x86_64") {
            let unknown: Vec<_> = ALLOWED.split_whitespace().filter(|name| name.parse::<Sysno>().is_err()).collect();
            assert_eq!(unknown, ["fstatat"]);
        }
    }

    #[test]
    fn dangerous_calls_are_off_the_list_until_a_relaxation_adds_them() {
        let all = allowed(&[]);
        for name in "keyctl add_key request_key unshare setns clone3 io_uring_setup bpf perf_event_open userfaultfd mount \
                     pivot_root open_by_handle_at kexec_load init_module fanotify_init chroot quotactl syslog"
            .split_whitespace()
        {
            let call: Sysno = name.parse().expect(name);
            assert!(!all.contains(&call), "{name}");
        }
        assert!(allowed(&[Relaxation::IoUring]).contains(&Sysno::io_uring_setup));
        assert!(!allowed(&[Relaxation::IoUring]).contains(&Sysno::unshare));
    }

    #[test]
    fn threads_have_tables_of_their_own_only_where_namespaces_may_be_made() {
        assert!(threads_share_files(&[]) && threads_share_files(&[Relaxation::IoUring]));
        assert!(!threads_share_files(&[Relaxation::IoUring, Relaxation::UserNamespaces]));
        assert!(!threads_share_files(&[Relaxation::Unconfined]));
    }

    #[test]
    fn the_filters_fit_into_the_kernel_with_any_relaxation() {
        for relaxations in [&[][..], &[Relaxation::UserNamespaces, Relaxation::Personality], &[Relaxation::IoUring]] {
            for filter in filters(relaxations).expect("compiles") {
                assert!(filter.len() < 4096, "{}", filter.len());
            }
        }
    }
}
