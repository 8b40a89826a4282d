//! What a build tells while it runs.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard, PoisonError};

use capsule_runtime::Mask;
use serde::Serialize;

use super::ImageJob;

/// Something that happened in a build.
#[derive(Clone, Debug, PartialEq, Serialize)]
#[serde(tag = "event", rename_all = "snake_case")]
pub enum Event {
    /// A step has begun: its number, and what it does.
    Step { step: usize, name: String },
    /// A step printed a line.
    Output { step: usize, text: String },
    /// A step is done: how long it took, and whether that was done before.
    Done { step: usize, seconds: f64, cached: bool },
}

/// Tells what happens, without what is secret.
pub struct Told<'a> {
    tell: &'a (dyn Fn(&Event) + Sync),
    mask: Mask,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    /// The number of each step, by whatever the builder calls it.
    steps: HashMap<String, usize>,
    done: HashMap<usize, bool>,
    /// The beginning of a line whose end was not printed yet.
    open: HashMap<usize, String>,
}

impl<'a> Told<'a> {
    pub fn new(job: &ImageJob, tell: &'a (dyn Fn(&Event) + Sync)) -> Self {
        let passwords = job.credentials.values().map(|credentials| &credentials.password);
        Self { tell, mask: Mask::new(job.secrets.values().chain(passwords)), state: Mutex::default() }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The same text, with secrets masked.
    pub fn masked(&self, text: &str) -> String {
        self.mask.text(text).into_owned()
    }

    /// A step has begun; told once.
    pub fn begun(&self, key: &str, name: &str) {
        let step = {
            let mut state = self.state();
            let next = state.steps.len() + 1;
            if state.steps.contains_key(key) {
                return;
            }
            state.steps.insert(key.to_owned(), next);
            next
        };
        (self.tell)(&Event::Step { step, name: self.masked(name) });
    }

    /// A step printed something.
    pub fn output(&self, key: &str, text: &str) {
        let (step, lines) = {
            let mut state = self.state();
            let step = state.steps.get(key).copied().unwrap_or_default();
            let open = state.open.entry(step).or_default();
            open.push_str(text);
            let whole = open.rfind('\n').map_or(String::new(), |end| open.drain(..=end).collect());
            (step, whole)
        };
        for line in lines.lines() {
            (self.tell)(&Event::Output { step, text: self.masked(line.trim_end_matches('\r')) });
        }
    }

    /// A step is done; told once.
    pub fn done(&self, key: &str, seconds: f64, cached: bool) {
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
            (self.tell)(&Event::Output { step, text: self.masked(&text) });
        }
        (self.tell)(&Event::Done { step, seconds, cached });
    }

    /// How many steps there were, and how many of them were done before.
    pub fn counts(&self) -> (usize, usize) {
        let state = self.state();
        (state.done.len(), state.done.values().filter(|cached| **cached).count())
    }
}

#[cfg(test)]
mod tests {
    use super::super::{Context, ImageJob, Method};
    use super::{Event, Told};
    use std::sync::Mutex;

    #[test]
    fn secrets_are_masked_and_lines_are_whole() {
        let folder = tempfile::tempdir().expect("a folder");
        let context = Context::with(folder.path(), "FROM scratch\n", "").expect("packed");
        let mut job = ImageJob::new("x", context, Method::BuildKit);
        job.secrets = [("A".to_owned(), "hunter2222".to_owned()), ("B".to_owned(), "2222".to_owned())].into();
        let events = Mutex::new(Vec::new());
        let tell = |event: &Event| events.lock().expect("free").push(event.clone());
        let told = Told::new(&job, &tell);
        told.begun("k", "RUN echo hunter2222");
        told.begun("k", "again");
        told.output("k", "one hun");
        told.output("k", "ter2222\r\ntwo");
        told.done("k", 1.0, false);
        told.done("k", 2.0, true);
        let step = 1;
        let expected = [
            Event::Step { step, name: "RUN echo ***".into() },
            Event::Output { step, text: "one ***".into() },
            Event::Output { step, text: "two".into() },
            Event::Done { step, seconds: 1.0, cached: false },
        ];
        assert_eq!(*events.lock().expect("free"), expected);
        assert_eq!(told.counts(), (1, 0));
    }
}
