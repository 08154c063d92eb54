//! What the trainer tells and asks while it runs. It prints nothing itself.

use std::collections::BTreeMap;

use mcpipe_graph::ParamStore;
use serde::Serialize;

use crate::error::{BoxError, Origin};

/// One optimiser step, as a line of metrics.
#[derive(Clone, Debug, Serialize)]
pub struct StepReport {
    /// Steps done, this one included.
    pub step: u64,
    /// Steps in all.
    pub steps: u64,
    /// Weighted sum of the terms.
    pub loss: f64,
    /// Unweighted loss terms in order: `clip`, then the distillation terms.
    pub terms: Vec<(String, f64)>,
    /// The weights of the terms at this step, in the same order.
    pub weights: Vec<f64>,
    /// Learning rate of this step.
    pub lr: f64,
    /// Norm of the gradient before clipping.
    pub grad_norm: f64,
    /// exp(logit scale) after the step.
    pub logit_scale: f64,
    /// Images a second, smoothed over the last steps.
    pub images_per_second: f64,
    /// Present when the step was skipped because a loss or gradient was not finite.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub skipped: Option<SkippedStep>,
    /// Whether this step is due for the log (every `log_every` steps, the first, the last and skipped ones).
    #[serde(skip)]
    pub log: bool,
}

/// Why a step was skipped and what follows.
#[derive(Clone, Debug, Serialize)]
pub struct SkippedStep {
    /// `loss` or `gradient` and the term, where it is known.
    pub origin: String,
    /// Steps skipped in a row, this one included.
    pub in_a_row: u32,
    /// Steps skipped in this training.
    pub total: u64,
    /// Factor on the learning rate from now on.
    pub lr_scale: f64,
}

impl SkippedStep {
    pub(crate) fn new(origin: &Origin, in_a_row: u32, total: u64, lr_scale: f64) -> Self {
        SkippedStep { origin: origin.to_string(), in_a_row, total, lr_scale }
    }
}

/// The results of one evaluation.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct EvalReport {
    /// Steps done.
    pub step: u64,
    /// Name of the evaluation.
    pub name: String,
    /// Metrics by name; fractions, never percent.
    pub metrics: BTreeMap<String, f64>,
}

/// Is told how the training goes.
pub trait Observer {
    /// A step was done (or skipped).
    fn step(&mut self, report: &StepReport);

    /// An evaluation in the loop was done.
    fn eval(&mut self, report: &EvalReport);

    /// Something worth a line: a checkpoint written, a learning rate lowered.
    fn message(&mut self, text: &str);
}

/// Takes no notice.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoObserver;

impl Observer for NoObserver {
    fn step(&mut self, _: &StepReport) {}
    fn eval(&mut self, _: &EvalReport) {}
    fn message(&mut self, _: &str) {}
}

/// The weights that an evaluation sees.
#[derive(Clone, Copy, Debug)]
pub struct EvalWeights<'a> {
    /// The trained weights, or their average where the setup says that the average is evaluated.
    pub store: &'a ParamStore,
    /// Whether they are the average.
    pub averaged: bool,
}

/// Evaluations in the loop.
pub trait Evaluate {
    /// Whether an evaluation is due when `step` of `steps` steps are done.
    fn due(&self, step: u64, steps: u64) -> bool;

    /// Runs those that are due.
    ///
    /// # Errors
    /// Whatever keeps an evaluation from its result; it stops the training.
    fn evaluate(&mut self, step: u64, weights: EvalWeights<'_>) -> Result<Vec<EvalReport>, BoxError>;
}

/// No evaluation in the loop.
#[derive(Clone, Copy, Debug, Default)]
pub struct NoEval;

impl Evaluate for NoEval {
    fn due(&self, _: u64, _: u64) -> bool {
        false
    }

    fn evaluate(&mut self, _: u64, _: EvalWeights<'_>) -> Result<Vec<EvalReport>, BoxError> {
        Ok(Vec::new())
    }
}
