//! The training loop.

use std::path::PathBuf;
use std::rc::Rc;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use mcpipe_graph::ParamStore;

use crate::batch::{Batch, BatchSource};
use crate::checkpoint::{CHECKPOINT_FORMAT, Checkpoint, CheckpointState, Checkpoints, Contents, Counters};
use crate::ema::Average;
use crate::error::{BoxError, TrainError};
use crate::graphs::{CLIP_SLOT, Graphs, term_names};
use crate::machine::{Ahead, At, Done, Machine, State, machine};
use crate::observer::{EvalWeights, Evaluate, Observer, SkippedStep, StepReport};
use crate::optim::OptimizerState;
use crate::schedule::LrState;
use crate::setup::{TeacherModel, TrainSetup};
use crate::step::{running, trained};

/// Name of the student's own average among the averages.
const OWN_AVERAGE: &str = "student";

/// Good steps in a row after which the learning rate, halved by a skipped step, is doubled again.
const RECOVERY_STEPS: u64 = 50;

/// Asks a running training to stop: it finishes its step, saves and returns. Clones share the request.
#[derive(Clone, Debug, Default)]
pub struct Stop(Arc<AtomicBool>);

impl Stop {
    /// A request around a flag that something else sets, such as a signal handler.
    pub fn from_flag(flag: Arc<AtomicBool>) -> Self {
        Stop(flag)
    }

    /// Asks for the stop.
    pub fn request(&self) {
        self.0.store(true, Ordering::SeqCst);
    }

    /// Whether it was asked for.
    pub fn requested(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

/// How a training ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// All steps are done.
    Finished,
    /// Stopped on request.
    Interrupted {
        /// Steps done.
        step: u64,
        /// The checkpoint to go on from; none where the training keeps no checkpoints.
        checkpoint: Option<PathBuf>,
    },
}

/// A training: its weights, optimiser and counters, and the graphs that run its steps.
///
/// A step whose loss or gradient is not finite changes no weight, no average and no running statistic. It is counted and
/// the learning rate is halved (training is in `f32`, so there is no loss scale to lower); 50 good steps in a row double it
/// again, up to the schedule's. After `non_finite.max_in_a_row` skipped steps in a row the training stops with
/// [`TrainError::NonFinite`].
#[derive(Debug)]
pub struct Trainer {
    setup: Rc<TrainSetup>,
    state: State,
    /// Whether the machine's state is ahead of `state`.
    stale: bool,
    machine: Box<dyn Machine>,
    names: Vec<String>,
    schedule: LrState,
    counters: Counters,
    step: u64,
    cursor: serde_json::Value,
    weights: Vec<f64>,
}

impl Trainer {
    /// Builds the graphs, initialises what `setup.initial` lacks, allocates everything.
    ///
    /// # Errors
    /// Parts that don't fit together.
    pub fn new(setup: TrainSetup) -> Result<Self, TrainError> {
        let setup = Rc::new(setup);
        let graphs = Graphs::new(&setup)?;
        let mut store = setup.initial.clone();
        for graph in graphs.trained() {
            store.init(graph, setup.seed)?;
        }
        let (trained, running) = (trained(&graphs, &store), running(&graphs, &store));
        let mut averages = Vec::new();
        if let Some(a) = &setup.average {
            averages.push(Average::new(OWN_AVERAGE, &store, a.momentum, None));
        }
        for teacher in setup.teachers.iter().filter(|_| setup.distils()) {
            if let TeacherModel::Average { momentum, final_momentum, .. } = teacher.model {
                averages.push(Average::new(teacher.name.clone(), &store, momentum, final_momentum));
            }
        }
        let optimizer = OptimizerState::new(setup.optimizer.as_ref(), &store, &trained);
        let state = State { store, averages, optimizer, trained, running };
        let machine = machine(&setup, graphs, &state)?;
        Ok(Trainer {
            weights: Vec::new(),
            schedule: LrState::default(),
            counters: Counters::default(),
            step: 0,
            cursor: serde_json::Value::Null,
            names: term_names(&setup),
            stale: false,
            setup,
            state,
            machine,
        })
    }

    /// Takes the state of a checkpoint.
    ///
    /// # Errors
    /// A checkpoint of another model or training; then nothing was changed.
    pub fn restore(&mut self, checkpoint: &Checkpoint) -> Result<(), TrainError> {
        let optimizer = self.setup.optimizer.as_ref();
        let held = (optimizer.name(), optimizer.slots(), &mut self.state.optimizer);
        checkpoint.restore(&self.setup.identity, &mut self.state.store, held, &mut self.state.averages)?;
        self.machine.load(&self.state)?;
        self.stale = false;
        let state = checkpoint.state();
        self.step = state.step;
        self.cursor = state.cursor.clone();
        self.schedule = state.schedule.clone();
        self.counters = state.counters.clone();
        Ok(())
    }

    /// Steps done.
    pub fn step(&self) -> u64 {
        self.step
    }

    /// Where the data source stood after the last step, in its own form; null before the first.
    pub fn cursor(&self) -> &serde_json::Value {
        &self.cursor
    }

    /// What was counted.
    pub fn counters(&self) -> &Counters {
        &self.counters
    }

    /// Brings back from a device what [`store`](Self::store), [`average`](Self::average) and
    /// [`evaluated`](Self::evaluated) show; they show the last state that was brought back. [`run`](Self::run) does so
    /// before evaluations, checkpoints and its end. Nothing to do on the CPU.
    ///
    /// # Errors
    /// A device that fails.
    pub fn sync(&mut self) -> Result<(), TrainError> {
        if self.stale {
            self.machine.sync(&mut self.state)?;
            self.stale = false;
        }
        Ok(())
    }

    /// The trained weights.
    pub fn store(&self) -> &ParamStore {
        &self.state.store
    }

    /// Which parameters of the [`store`](Self::store) are trained, in its order.
    pub fn trained(&self) -> &[bool] {
        &self.state.trained
    }

    /// The running average of the weights, where the setup keeps one.
    pub fn average(&self) -> Option<&ParamStore> {
        self.state.averages.iter().find(|a| a.name == OWN_AVERAGE && self.setup.average.is_some()).map(|a| &a.store)
    }

    /// The weights that evaluations see: the average where the setup says so.
    pub fn evaluated(&self) -> EvalWeights<'_> {
        match (self.average(), self.setup.average) {
            (Some(store), Some(a)) if a.evaluate => EvalWeights { store, averaged: true },
            _ => EvalWeights { store: &self.state.store, averaged: false },
        }
    }

    /// The setup.
    pub fn setup(&self) -> &TrainSetup {
        &self.setup
    }

    /// Saves the state after the last step.
    ///
    /// # Errors
    /// What the file system refuses; nothing half-written is left. A device that fails.
    pub fn save(&mut self, checkpoints: &Checkpoints) -> Result<PathBuf, TrainError> {
        self.sync()?;
        let state = CheckpointState {
            format: CHECKPOINT_FORMAT,
            identity: self.setup.identity.clone(),
            step: self.step,
            cursor: self.cursor.clone(),
            schedule: self.schedule.clone(),
            counters: self.counters.clone(),
            optimizer: self.setup.optimizer.name().to_owned(),
            updates: self.state.optimizer.step,
        };
        checkpoints.save(Contents {
            state: &state,
            store: &self.state.store,
            slot_names: self.setup.optimizer.slots(),
            optimizer: &self.state.optimizer,
            averages: &self.state.averages,
        })
    }

    /// Runs from where the training stands to its last step.
    ///
    /// `source` must stand at [`cursor`](Self::cursor). With a device its next batch is taken while a step runs, so that it may
    /// be one batch ahead of the cursor when this returns before the last step. Evaluations run after the steps that they are due at. Without
    /// `checkpoints` nothing is saved.
    ///
    /// # Errors
    /// Data, evaluation or files that fail; too many steps in a row that are not finite.
    pub fn run(
        &mut self,
        source: &mut dyn BatchSource,
        eval: &mut dyn Evaluate,
        observer: &mut dyn Observer,
        checkpoints: Option<&Checkpoints>,
        stop: &Stop,
    ) -> Result<Outcome, TrainError> {
        let steps = self.setup.training.steps;
        let policy = self.setup.training.checkpoint.clone();
        let mut saved_at = Instant::now();
        let mut saved_step = None;
        let mut speed = Speed::default();
        let mut batches = Batches { source, stop, ahead: None, more: true };
        while self.step < steps {
            if stop.requested() {
                return self.interrupted(checkpoints, saved_step, observer);
            }
            let (batch, taken_ahead) = batches.take();
            let batch = batch.map_err(|source| TrainError::Data { step: self.step, source })?;
            batches.more = self.step + 1 < steps;
            let mut report = match self.advance(&batch, taken_ahead, &mut batches) {
                Err(TrainError::NonFinite { step, in_a_row, origin, .. }) => {
                    let checkpoint = checkpoints.map(Checkpoints::latest).transpose()?.flatten();
                    return Err(TrainError::NonFinite { step, in_a_row, origin, checkpoint });
                }
                other => other?,
            };
            report.images_per_second = speed.saw(self.setup.training.batch_size);
            observer.step(&report);
            if self.evaluate(eval, observer)? {
                speed.pause();
            }
            let due = (policy.every_steps > 0 && self.step.is_multiple_of(policy.every_steps))
                || (policy.every_minutes > 0.0 && saved_at.elapsed().as_secs_f64() >= 60.0 * policy.every_minutes);
            if let Some(checkpoints) = checkpoints.filter(|_| due || self.step == steps) {
                let path = self.save(checkpoints)?;
                observer.message(&format!("checkpoint {}", path.display()));
                saved_at = Instant::now();
                saved_step = Some(self.step);
                speed.pause();
            }
        }
        self.sync()?;
        Ok(Outcome::Finished)
    }

    fn interrupted(
        &mut self,
        checkpoints: Option<&Checkpoints>,
        saved_step: Option<u64>,
        observer: &mut dyn Observer,
    ) -> Result<Outcome, TrainError> {
        self.sync()?;
        let checkpoint = match checkpoints {
            None => None,
            Some(c) if saved_step == Some(self.step) => c.latest()?,
            Some(c) => Some(self.save(c)?),
        };
        observer.message(&format!("stopped on request after step {}", self.step));
        Ok(Outcome::Interrupted { step: self.step, checkpoint })
    }

    fn evaluate(&mut self, eval: &mut dyn Evaluate, observer: &mut dyn Observer) -> Result<bool, TrainError> {
        if !eval.due(self.step, self.setup.training.steps) {
            return Ok(false);
        }
        self.sync()?;
        let step = self.step;
        let reports = eval.evaluate(step, self.evaluated()).map_err(|source| TrainError::Eval { step, source })?;
        for report in &reports {
            observer.eval(report);
            for (metric, value) in &report.metrics {
                let name = format!("{}.{metric}", report.name);
                if self.setup.schedule.saw_metric(&name, *value, &mut self.schedule) {
                    observer.message(&format!(
                        "learning rate lowered to {} of its start: {name} stands still",
                        self.schedule.factor
                    ));
                }
            }
        }
        Ok(true)
    }

    /// Weights of the terms at the current step, in slot order.
    fn weigh(&mut self) {
        let objective = &self.setup.objective;
        self.weights.clear();
        if !self.setup.distils() {
            self.weights.push(1.0);
            return;
        }
        let steps = self.setup.training.steps;
        self.weights.push(1.0 - objective.lambda);
        self.weights.extend(objective.terms.iter().map(|t| objective.lambda * t.weight_at(self.step, steps)));
        debug_assert_eq!(CLIP_SLOT, 0);
    }

    /// One step on `batch`: for callers that run their own loop. The report's speed is left at 0.
    ///
    /// # Errors
    /// A batch that does not fit, a node that fails, or too many steps in a row that are not finite.
    pub fn one(&mut self, batch: &Batch) -> Result<StepReport, TrainError> {
        self.advance(batch, false, &mut ())
    }

    fn advance(&mut self, batch: &Batch, taken_ahead: bool, ahead: &mut dyn Ahead) -> Result<StepReport, TrainError> {
        let training = self.setup.training.clone();
        self.weigh();
        let weights = std::mem::take(&mut self.weights);
        let base = self.setup.optimizer.lr() * self.setup.schedule.factor(self.step, training.steps, &self.schedule);
        let lr = base * self.counters.lr_scale;
        let momenta: Vec<f64> = self.state.averages.iter().map(|a| a.momentum_at(self.step, training.steps)).collect();
        let at = At { step: self.step, weights: &weights, lr, momenta: &momenta, taken_ahead };
        let done = self.machine.step(&mut self.state, batch, at, ahead)?;
        self.stale = true;
        let skipped = if done.updated {
            self.count_good();
            self.setup.schedule.saw_loss(done.values.total, self.step, &mut self.schedule);
            None
        } else {
            Some(self.skip(batch, &done, at, training.non_finite.max_in_a_row)?)
        };
        self.cursor = batch.cursor.clone();
        self.step += 1;
        let names = self.names.iter().cloned();
        let log = self.step == 1 || self.step.is_multiple_of(training.log_every.max(1)) || self.step == training.steps;
        let report = StepReport {
            step: self.step,
            steps: training.steps,
            loss: done.values.total,
            terms: names.zip(done.values.terms.iter().copied()).collect(),
            weights: weights.clone(),
            lr,
            grad_norm: done.grad_norm,
            logit_scale: done.values.logit_scale,
            images_per_second: 0.0,
            log: log || skipped.is_some(),
            skipped,
        };
        self.weights = weights;
        Ok(report)
    }

    fn count_good(&mut self) {
        let c = &mut self.counters;
        c.skipped_in_a_row = 0;
        c.good_in_a_row += 1;
        if c.lr_scale < 1.0 && c.good_in_a_row.is_multiple_of(RECOVERY_STEPS) {
            c.lr_scale = (c.lr_scale * 2.0).min(1.0);
        }
    }

    /// Counts a step that is not finite; the machine undid what it changed.
    fn skip(&mut self, batch: &Batch, done: &Done, at: At<'_>, most: u32) -> Result<SkippedStep, TrainError> {
        let origin = self.machine.blame(&self.state, &done.values, at.weights);
        let c = &mut self.counters;
        c.skipped += 1;
        c.skipped_in_a_row += 1;
        c.good_in_a_row = 0;
        c.lr_scale *= 0.5;
        let (in_a_row, total, lr_scale) = (c.skipped_in_a_row, c.skipped, c.lr_scale);
        if in_a_row >= most {
            let traced = self.machine.diagnose(&mut self.state, batch, at);
            let origin = traced.unwrap_or(origin);
            return Err(TrainError::NonFinite { step: self.step, in_a_row, origin, checkpoint: None });
        }
        Ok(SkippedStep::new(&origin, in_a_row, total, lr_scale))
    }
}

/// A source, and the batch that was taken from it while a step ran.
struct Batches<'a> {
    source: &'a mut dyn BatchSource,
    stop: &'a Stop,
    ahead: Option<Result<Batch, BoxError>>,
    /// Whether a step follows the one that runs.
    more: bool,
}

impl Batches<'_> {
    /// The next batch, and whether it was taken ahead.
    fn take(&mut self) -> (Result<Batch, BoxError>, bool) {
        match self.ahead.take() {
            Some(batch) => (batch, true),
            None => (self.source.next_batch(), false),
        }
    }
}

impl Ahead for Batches<'_> {
    fn batch(&mut self) -> Option<&Batch> {
        if !self.more || self.stop.requested() {
            return None;
        }
        // A source that fails is told of when the batch is needed.
        self.ahead.insert(self.source.next_batch()).as_ref().ok()
    }
}

/// Images a second, smoothed.
#[derive(Debug, Default)]
struct Speed {
    last: Option<Instant>,
    seconds: Option<f64>,
}

impl Speed {
    fn saw(&mut self, images: usize) -> f64 {
        let now = Instant::now();
        if let Some(last) = self.last {
            let took = (now - last).max(Duration::from_micros(1)).as_secs_f64();
            self.seconds = Some(self.seconds.map_or(took, |s| 0.9 * s + 0.1 * took));
        }
        self.last = Some(now);
        self.seconds.map_or(0.0, |s| images as f64 / s)
    }

    /// Leaves out what happens until the next step ends but for that step itself.
    fn pause(&mut self) {
        if self.last.is_some() {
            self.last = Some(Instant::now());
        }
    }
}
