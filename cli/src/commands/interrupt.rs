//! Handles ^C while a command waits for a deployment: the deployment continues, and the command prints how to cancel
//! it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::SIGINT;
use signal_hook::iterator::Signals;

use crate::terminal::{Failure, Progress, Terminal};

/// The exit status of a process that SIGINT ended, as shells report it.
const SIGINT_STATUS: u8 = 130;

/// While this exists, ^C ends the command with a message. After that, ^C ends it without one.
#[derive(Debug)]
pub struct InterruptGuard(Arc<AtomicBool>);

impl InterruptGuard {
    /// Installs the handler. Where that fails, ^C ends the command without a message.
    pub fn install(terminal: Terminal, progress: &Progress, message: String) -> Self {
        let is_waiting = Arc::new(AtomicBool::new(true));
        // The second ^C ends the command at once, even while the first is handled.
        let was_interrupted = Arc::new(AtomicBool::new(false));
        let signals =
            signal_hook::flag::register_conditional_default(SIGINT, was_interrupted.clone()).and_then(|_| Signals::new([SIGINT]));
        if let Ok(mut signals) = signals {
            let (is_waiting, progress) = (is_waiting.clone(), progress.clone());
            std::thread::spawn(move || {
                if signals.forever().next().is_some() {
                    was_interrupted.store(true, Ordering::SeqCst);
                    if is_waiting.load(Ordering::SeqCst) {
                        progress.finish();
                        let failure = Failure { exit_status: SIGINT_STATUS, ..Failure::new("interrupted", message) };
                        terminal.notify(&failure);
                    }
                    std::process::exit(i32::from(SIGINT_STATUS));
                }
            });
        }
        Self(is_waiting)
    }
}

impl Drop for InterruptGuard {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}
