//! Open files that a process was started with, beyond standard input, output and error. Whoever starts a server may
//! have left some open; nothing that the server starts needs them.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The first descriptor that is not standard input, output or error.
const FIRST: i32 = 3;

/// Set for a process that has replaced itself, so that it never does so twice.
const REPLACED: &str = "CAPSULE_DESCRIPTORS_CLOSED";

/// Marks every descriptor that is open now so that programs started from here on do not get it.
pub fn close_on_exec() {
    close_fds::set_fds_cloexec_threadsafe(FIRST, &[]);
}

/// Closes what this process was started with, where there is anything: the process replaces itself by the same program
/// with the same arguments. For processes that live on by themselves; called first of all.
///
/// # Errors
/// When the program cannot be started again.
pub fn close_inherited() -> std::io::Result<()> {
    close_on_exec();
    if std::env::var_os(REPLACED).is_some() || !any_open()? {
        return Ok(());
    }
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let mut command = Command::new("/proc/self/exe");
    if let Some((name, rest)) = arguments.split_first() {
        command.arg0(name).args(rest);
    }
    Err(command.env(REPLACED, "1").exec())
}

fn any_open() -> std::io::Result<bool> {
    let open = std::fs::read_dir("/proc/self/fd")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    // One of them is the folder that is being read.
    Ok(open.filter(|descriptor| *descriptor >= FIRST).count() > 1)
}
