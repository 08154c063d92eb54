//! What a run tells while it works, and how it is asked to stop.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI32, Ordering};

use crate::error::RunError;

/// Something that happened in a run.
#[derive(Clone, Debug)]
#[non_exhaustive]
pub enum Event {
    /// A stage starts.
    Started {
        /// Steps that it will take, where it counts steps.
        steps: Option<u64>,
        /// Step at which it goes on, after an interruption.
        from: u64,
    },
    /// A step is done.
    Step {
        /// Steps done so far.
        step: u64,
        /// Loss and its terms, by name; empty between two logged steps.
        terms: Vec<(String, f64)>,
        /// Images a second, where images are counted.
        images_per_s: Option<f64>,
    },
    /// An intermediate result in one line.
    Note(String),
    /// Something the user should know.
    Warning(String),
    /// The stage has ended.
    Finished {
        /// Whether its result came from the store.
        cached: bool,
        /// Seconds it took.
        seconds: f64,
        /// Its result in a few words.
        summary: String,
    },
}

/// Takes the events of a run. Called from the threads of the stages.
pub trait Observer: Sync {
    /// Stage `index` of the plan, called `name`, tells something.
    fn event(&self, index: usize, name: &str, event: &Event);
}

/// An observer that does nothing.
#[derive(Clone, Copy, Debug, Default)]
pub struct Silent;

impl Observer for Silent {
    fn event(&self, _: usize, _: &str, _: &Event) {}
}

/// The request to stop: set by a signal handler or by the failure of another stage.
#[derive(Clone, Debug, Default)]
pub struct Interrupt {
    signal: Arc<AtomicI32>,
    flag: Arc<AtomicBool>,
}

/// What [`Interrupt::raise`] records when the reason is a failed stage and not a signal.
pub(crate) const FAILED: i32 = -1;

impl Interrupt {
    /// Asks the run to stop at the next safe point. The first reason stays.
    pub fn raise(&self, signal: i32) {
        let _ = self.signal.compare_exchange(0, signal, Ordering::SeqCst, Ordering::SeqCst);
        self.flag.store(true, Ordering::SeqCst);
    }

    /// The reason, where there is one.
    pub fn signal(&self) -> Option<i32> {
        Some(self.signal.load(Ordering::SeqCst)).filter(|&s| s != 0)
    }

    /// The flag for loops that only need to know whether to stop.
    pub fn flag(&self) -> Arc<AtomicBool> {
        Arc::clone(&self.flag)
    }

    /// An error once the run was asked to stop.
    ///
    /// # Errors
    /// [`RunError::Interrupted`].
    pub fn check(&self) -> Result<(), RunError> {
        match self.signal() {
            Some(signal) => Err(RunError::Interrupted { signal }),
            None => Ok(()),
        }
    }
}
