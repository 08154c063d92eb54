//! Progress of a run on standard error: a bar for each stage on a terminal, plain lines elsewhere.

use std::collections::HashMap;
use std::fmt::Write as _;
use std::io::{self, IsTerminal, Write};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use indicatif::{MultiProgress, ProgressBar, ProgressDrawTarget, ProgressStyle};
use mcpipe_run::{Event, Observer};

use crate::output::eprint;

/// Between two plain lines of one stage.
const LINE_EVERY: Duration = Duration::from_secs(5);

/// How much is said.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loudness {
    /// Nothing but warnings.
    Quiet,
    /// Progress.
    Normal,
}

#[derive(Debug)]
struct StageState {
    bar: Option<ProgressBar>,
    steps: Option<u64>,
    from: u64,
    started: Instant,
    said: Option<Instant>,
    terms: String,
}

/// Shows the events of a run.
#[derive(Debug)]
pub struct Progress {
    multi: Option<MultiProgress>,
    stages: Mutex<HashMap<usize, StageState>>,
    loudness: Loudness,
}

impl Progress {
    /// For standard error.
    pub fn new(loudness: Loudness) -> Self {
        let terminal = io::stderr().is_terminal() && loudness == Loudness::Normal;
        let multi = terminal.then(|| MultiProgress::with_draw_target(ProgressDrawTarget::stderr_with_hz(10)));
        Self { multi, stages: Mutex::default(), loudness }
    }

    /// Writes a line without tearing a bar.
    pub fn line(&self, text: &str) {
        match &self.multi {
            // A bar that can't be redrawn is no reason to lose the line.
            Some(multi) => multi.suspend(|| eprint(&format!("{text}\n"))),
            None => eprint(&format!("{text}\n")),
        }
    }

    /// A writer of log lines that does not tear a bar.
    pub fn writer(&self) -> LogWriter {
        LogWriter(self.multi.clone())
    }

    fn start(&self, name: &str, steps: Option<u64>, from: u64) -> StageState {
        let bar = self.multi.as_ref().map(|multi| {
            let bar = match steps {
                Some(steps) => {
                    ProgressBar::new(steps).with_style(style("{prefix:28} {bar:24} {pos}/{len}  {msg}  {eta} left"))
                }
                None => ProgressBar::new_spinner().with_style(style("{prefix:28} {spinner} {elapsed}  {msg}")),
            };
            let bar = multi.add(bar.with_prefix(name.to_owned()).with_position(from).with_elapsed(Duration::ZERO));
            bar.reset_eta();
            bar.enable_steady_tick(Duration::from_millis(200));
            bar
        });
        if bar.is_none() && self.loudness == Loudness::Normal {
            let going_on = if from > 0 { format!(", going on at step {from}") } else { String::new() };
            self.line(&format!("{name}: started{going_on}"));
        }
        StageState { bar, steps, from, started: Instant::now(), said: None, terms: String::new() }
    }

    fn step(&self, name: &str, state: &mut StageState, step: u64, terms: &[(String, f64)], images: Option<f64>) {
        if !terms.is_empty() {
            state.terms.clear();
            for (i, (term, value)) in terms.iter().enumerate() {
                let _ = write!(state.terms, "{}{term} {value:.3}", if i > 0 { "  " } else { "" });
            }
        }
        let rate = images.map(|rate| format!("{rate:.0} images/s"));
        let said = Some(state.terms.clone()).filter(|terms| !terms.is_empty());
        if let Some(bar) = &state.bar {
            bar.set_position(step);
            bar.set_message(said.into_iter().chain(rate).collect::<Vec<_>>().join("  "));
            return;
        }
        let last = state.steps == Some(step);
        if self.loudness == Loudness::Quiet || (!last && state.said.is_some_and(|said| said.elapsed() < LINE_EVERY)) {
            return;
        }
        state.said = Some(Instant::now());
        let total = state.steps.map_or_else(String::new, |steps| format!("/{steps}"));
        let left = state.steps.filter(|steps| *steps > step).and_then(|steps| {
            let done = step.saturating_sub(state.from);
            let rest = (steps - step) as f64;
            (done > 0).then(|| format!("{:.0} s left", state.started.elapsed().as_secs_f64() / done as f64 * rest))
        });
        let parts: Vec<String> = [Some(format!("{step}{total}")), said, rate, left].into_iter().flatten().collect();
        self.line(&format!("{name}: {}", parts.join("  ")));
    }
}

impl Observer for Progress {
    fn event(&self, index: usize, name: &str, event: &Event) {
        let mut stages = self.stages.lock().unwrap_or_else(PoisonError::into_inner);
        match event {
            Event::Started { steps, from } => {
                let state = self.start(name, *steps, *from);
                if let Some(bar) = stages.insert(index, state).and_then(|old| old.bar) {
                    bar.finish_and_clear();
                }
            }
            Event::Step { step, terms, images_per_s } => {
                if let Some(state) = stages.get_mut(&index) {
                    self.step(name, state, *step, terms, *images_per_s);
                }
            }
            Event::Note(text) if self.loudness == Loudness::Normal => self.line(&format!("{name}: {text}")),
            Event::Warning(text) => self.line(&format!("{name}: warning: {text}")),
            Event::Finished { cached, seconds, summary } => {
                if let Some(bar) = stages.remove(&index).and_then(|state| state.bar) {
                    bar.finish_and_clear();
                }
                if self.loudness == Loudness::Normal {
                    let how = if *cached { "from the store".to_owned() } else { format!("{seconds:.1} s") };
                    let summary = if summary.is_empty() { String::new() } else { format!("  {summary}") };
                    self.line(&format!("{name}: done ({how}){summary}"));
                }
            }
            _ => {}
        }
    }
}

/// A bar that counts samples on a terminal, and nothing elsewhere.
#[derive(Debug)]
pub struct Counter(Option<ProgressBar>);

impl Counter {
    /// For standard error.
    pub fn new(name: &str, quiet: bool) -> Self {
        let shown = !quiet && io::stderr().is_terminal();
        Self(shown.then(|| {
            let bar = ProgressBar::with_draw_target(None, ProgressDrawTarget::stderr_with_hz(10));
            bar.with_style(style("{prefix:10} {bar:24} {pos}/{len}  {per_sec}  {eta} left"))
                .with_prefix(name.to_owned())
        }))
    }

    /// So many of so many are done.
    pub fn set(&self, done: usize, all: usize) {
        if let Some(bar) = &self.0 {
            bar.set_length(all as u64);
            bar.set_position(done as u64);
        }
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        if let Some(bar) = &self.0 {
            bar.finish_and_clear();
        }
    }
}

fn style(template: &str) -> ProgressStyle {
    // The templates are constants of this file.
    ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar())
}

/// Writes whole log lines above the bars.
#[derive(Clone, Debug)]
pub struct LogWriter(Option<MultiProgress>);

impl Write for LogWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match &self.0 {
            Some(multi) => multi.suspend(|| io::stderr().write(bytes)),
            None => io::stderr().write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}
