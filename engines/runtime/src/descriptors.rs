//! Closes inherited file descriptors, except standard input, output and error. The parent of a server may have left some
//! open; no child of the server needs them.

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::process::Command;

/// The first descriptor that is not standard input, output or error.
const FIRST_DESCRIPTOR: i32 = 3;

/// Set in a process that has replaced itself, so that it does so only once.
const REPLACED_VARIABLE: &str = "CAPSULE_DESCRIPTORS_CLOSED";

/// Marks every open descriptor as close-on-exec.
pub fn close_on_exec() {
    close_fds::set_fds_cloexec_threadsafe(FIRST_DESCRIPTOR, &[]);
}

/// Closes the descriptors that this process has inherited, if any: it executes the same program again with the same
/// arguments. To be called first, by processes that outlive their parent.
///
/// # Errors
/// When the program cannot be executed.
pub fn close_inherited() -> std::io::Result<()> {
    close_on_exec();
    if std::env::var_os(REPLACED_VARIABLE).is_some() || !any_open()? {
        return Ok(());
    }
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let mut command = Command::new("/proc/self/exe");
    if let Some((name, rest)) = arguments.split_first() {
        command.arg0(name).args(rest);
    }
    Err(command.env(REPLACED_VARIABLE, "1").exec())
}

fn any_open() -> std::io::Result<bool> {
    let open = std::fs::read_dir("/proc/self/fd")?.flatten().filter_map(|entry| entry.file_name().to_str()?.parse::<i32>().ok());
    // One of them is the directory that is being read.
    Ok(open.filter(|descriptor| *descriptor >= FIRST_DESCRIPTOR).count() > 1)
}
