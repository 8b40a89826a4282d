//! The progress of a build.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use capsule_runtime::Mask;
use serde::Serialize;

use super::ImageJob;

/// An event of a build.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A step started: its number and its command.
    Step { step: usize, name: String },
    /// A step printed a line.
    Output { step: usize, text: String },
    /// A step finished: its duration, and whether it came from the cache.
    Done { step: usize, seconds: f64, cached: bool },
}

/// Reports events, with secrets masked.
pub struct Progress<'a> {
    report: &'a (dyn Fn(&Event) + Sync),
    mask: Mask,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The number of each step, by the builder's own key.
    steps: HashMap<String, usize>,
    done: HashMap<usize, bool>,
    /// The beginning of an unfinished line of each step.
    open: HashMap<usize, String>,
}

impl<'a> Progress<'a> {
    pub fn new(job: &ImageJob, report: &'a (dyn Fn(&Event) + Sync)) -> Self {
        let passwords = job.credentials.values().map(|credentials| &credentials.password);
        Self { report, mask: Mask::new(job.secrets.values().chain(passwords)), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Masks the secrets in a text.
    pub fn masked(&self, text: &str) -> String {
        self.mask.text(text).into_owned()
    }

    /// Reports the start of a step, once.
    pub fn step_started(&self, key: &str, name: &str) {
        let step = {
            let mut state = self.state();
            let next = state.steps.len() + 1;
            if state.steps.contains_key(key) {
                return;
            }
            state.steps.insert(key.to_owned(), next);
            next
        };
        (self.report)(&Event::Step { step, name: self.masked(name) });
    }

    /// Reports the complete lines that a step printed.
    pub fn step_output(&self, key: &str, text: &str) {
        let (step, lines) = {
            let mut state = self.state();
            let step = state.steps.get(key).copied().unwrap_or_default();
            let open = state.open.entry(step).or_default();
            open.push_str(text);
            let whole = open.rfind('\n').map_or(String::new(), |end| open.drain(..=end).collect());
            (step, whole)
        };
        for line in lines.lines() {
            (self.report)(&Event::Output { step, text: self.masked(line.trim_end_matches('\r')) });
        }
    }

    /// Reports the end of a step, once.
    pub fn step_finished(&self, key: &str, seconds: f64, cached: bool) {
        let rest = {
            let mut state = self.state();
            let Some(step) = state.steps.get(key).copied() else { return };
            if state.done.contains_key(&step) {
                return;
            }
            state.done.insert(step, cached);
            (step, state.open.remove(&step).filter(|rest| !rest.is_empty()))
        };
        let (step, rest) = rest;
        if let Some(text) = rest {
            (self.report)(&Event::Output { step, text: self.masked(&text) });
        }
        (self.report)(&Event::Done { step, seconds, cached });
    }

    /// Returns the number of steps, and how many of them came from the cache.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.state();
        (state.done.len(), state.done.values().filter(|cached| **cached).count())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Context, ImageJob, Method};
    use super::{Event, Progress};
    use std::sync::Mutex;

    #[test]
    fn secrets_are_masked_and_lines_are_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let context = Context::with(folder.path(), "FROM scratch\n", "").expect("packed");
        let mut job = ImageJob::new("x", context, Method::BuildKit);
        job.secrets = [("A".to_owned(), "hunter2222".to_owned()), ("B".to_owned(), "2222".to_owned())].into();
        let events = Mutex::new(Vec::new());
        let report = |event: &Event| events.lock().expect("free").push(event.clone());
        let progress = Progress::new(&job, &report);
        progress.step_started("k", "RUN echo hunter2222");
        progress.step_started("k", "again");
        progress.step_output("k", "one hun");
        progress.step_output("k", "ter2222\r\ntwo");
        progress.step_finished("k", 1.0, false);
        progress.step_finished("k", 2.0, true);
        let step = 1;
        let expected = [
            Event::Step { step, name: "RUN echo ***".into() },
            Event::Output { step, text: "one ***".into() },
            Event::Output { step, text: "two".into() },
            Event::Done { step, seconds: 1.0, cached: false },
        ];
        assert_eq!(*events.lock().expect("free"), expected);
        assert_eq!(progress.counts(), (1, 0));
    }
}
