//! What runs a training's steps: the CPU on the training's own state, or a device on a copy of it.

mod cpu;
mod cuda;
mod memory;

use std::fmt::Debug;
use std::rc::Rc;

use mcpipe_cpu::optim::scale_in_place;
use mcpipe_graph::{Grads, ParamStore};

use crate::batch::Batch;
use crate::compute::Compute;
use crate::ema::Average;
use crate::error::{Origin, TrainError};
use crate::graphs::Graphs;
use crate::optim::OptimizerState;
use crate::setup::{LOGIT_SCALE, MAX_LOGIT_SCALE, TrainSetup};
use crate::step::Values;

pub(crate) use cpu::CpuMachine;
pub(crate) use cuda::{CudaMachine, precision};

/// What a training changes, on the host. With a device it is the state at the last [`Machine::sync`].
#[derive(Debug)]
pub(crate) struct State {
    pub store: ParamStore,
    pub averages: Vec<Average>,
    pub optimizer: OptimizerState,
    /// Which parameters a gradient can reach.
    pub trained: Vec<bool>,
    /// Which are running statistics.
    pub running: Vec<bool>,
}

impl State {
    /// Trained parameters and running statistics: what averages follow.
    pub fn moving(&self) -> Vec<bool> {
        self.trained.iter().zip(&self.running).map(|(t, r)| *t || *r).collect()
    }
}

/// What changes from step to step besides the batch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct At<'a> {
    /// Steps done.
    pub step: u64,
    /// Weights of the terms in slot order.
    pub weights: &'a [f64],
    /// Learning rate.
    pub lr: f64,
    /// Momenta of the averages, in their order.
    pub momenta: &'a [f64],
    /// Whether the batch is the one that the last step took from its [`Ahead`].
    pub taken_ahead: bool,
}

/// Gives the batch of the step after the one that runs.
pub(crate) trait Ahead {
    /// The batch; none where there is no next step, or no batch for it.
    fn batch(&mut self) -> Option<&Batch>;
}

/// No step follows.
impl Ahead for () {
    fn batch(&mut self) -> Option<&Batch> {
        None
    }
}

/// How a step went.
#[derive(Clone, Debug)]
pub(crate) struct Done {
    pub values: Values,
    /// Norm of the gradient of all trained parameters; NaN where a loss is not finite.
    pub grad_norm: f64,
    /// Whether losses and gradients were finite, so that the parameters were updated. Where not, nothing was changed.
    pub updated: bool,
}

/// Runs steps.
pub(crate) trait Machine: Debug {
    /// One step on `batch`. While a device works on it, it may take the next from `ahead` and make it ready.
    ///
    /// # Errors
    /// A batch that does not fit, or a node that fails; never for what is ahead.
    fn step(&mut self, state: &mut State, batch: &Batch, at: At<'_>, ahead: &mut dyn Ahead)
    -> Result<Done, TrainError>;

    /// The name of the first loss term or parameter that was not finite in the last step.
    fn blame(&self, state: &State, values: &Values, weights: &[f64]) -> Origin;

    /// Runs the batch again, watching every value, to name what left the finite range first. Changes nothing in `state`.
    ///
    /// # Errors
    /// As [`step`](Self::step).
    fn diagnose(&mut self, state: &mut State, batch: &Batch, at: At<'_>) -> Result<Origin, TrainError>;

    /// Brings `state` up to date.
    ///
    /// # Errors
    /// A device that fails.
    fn sync(&mut self, state: &mut State) -> Result<(), TrainError>;

    /// Goes on from `state`.
    ///
    /// # Errors
    /// A device that fails.
    fn load(&mut self, state: &State) -> Result<(), TrainError>;
}

/// The machine that a setup asks for.
pub(crate) fn machine(setup: &Rc<TrainSetup>, graphs: Graphs, state: &State) -> Result<Box<dyn Machine>, TrainError> {
    Ok(match &setup.compute {
        Compute::Cpu(kernels) => Box::new(CpuMachine::new(Rc::clone(setup), graphs, &state.store, *kernels)?),
        Compute::Cuda(device) => {
            let machine = CudaMachine::new(Rc::clone(setup), graphs, state, device);
            Box::new(machine.map_err(|e| memory::explain(setup, device, e))?)
        }
    })
}

/// Clips, updates the weights, clamps the logit scale, moves the averages.
fn apply(setup: &TrainSetup, state: &mut State, grads: &mut Grads, at: At<'_>, grad_norm: f64) {
    if let Some(most) = setup.training.clip_norm.filter(|most| grad_norm > *most) {
        let factor = (most / (grad_norm + 1e-6)) as f32;
        for (g, _) in grads.all_mut().iter_mut().zip(&state.trained).filter(|(_, t)| **t) {
            scale_in_place(g, factor);
        }
    }
    state.optimizer.update(setup.optimizer.as_ref(), at.lr, &mut state.store, grads);
    if let Some(scale) = state.store.get_mut(LOGIT_SCALE) {
        for v in &mut scale.data {
            *v = v.min(MAX_LOGIT_SCALE.ln() as f32);
        }
    }
    let moving = state.moving();
    for (average, momentum) in state.averages.iter_mut().zip(at.momenta) {
        average.update(&state.store, &moving, *momentum);
    }
}
