//! ^C while a deployment is waited for: the deployment goes on, and the person is told how to stop it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use signal_hook::consts::SIGINT;
use signal_hook::iterator::Signals;

use crate::terminal::{Failure, Progress, Terminal};

/// The status of a process that SIGINT ended, as shells have it.
const STATUS: u8 = 130;

/// For as long as it lives, ^C ends the command with a message. Then it just ends it.
#[derive(Debug)]
pub struct Watch(Arc<AtomicBool>);

impl Watch {
    /// Begins to watch. Where that is not possible, ^C ends the command as always.
    pub fn begin(terminal: Terminal, progress: &Progress, message: String) -> Self {
        let waiting = Arc::new(AtomicBool::new(true));
        // The second one ends the command at once, whatever the first is still at.
        let again = Arc::new(AtomicBool::new(false));
        let watched = signal_hook::flag::register_conditional_default(SIGINT, again.clone()).and_then(|_| Signals::new([SIGINT]));
        if let Ok(mut signals) = watched {
            let (waiting, progress) = (waiting.clone(), progress.clone());
            std::thread::spawn(move || {
                if signals.forever().next().is_some() {
                    again.store(true, Ordering::SeqCst);
                    if waiting.load(Ordering::SeqCst) {
                        progress.finish();
                        let failure = Failure { exit_status: STATUS, ..Failure::new("interrupted", message) };
                        terminal.tell(&failure);
                    }
                    std::process::exit(i32::from(STATUS));
                }
            });
        }
        Self(waiting)
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.0.store(false, Ordering::SeqCst);
    }
}
