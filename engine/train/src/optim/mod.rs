//! Optimisers. A new one is one file here and one line in [`OPTIMIZERS`].

mod adamw;
mod sgd;

use std::fmt::Debug;
use std::sync::Arc;

use mcpipe_cuda::optim::Rule;
use mcpipe_graph::{Grads, ParamKind, ParamStore};
use mcpipe_spec::{Component, ComponentKind, Params, ParamsError};
use schemars::{Schema, SchemaGenerator};

use crate::distill::Problem;

pub use adamw::AdamW;
pub use sgd::Sgd;

/// What one update of one parameter reads.
#[derive(Clone, Copy, Debug)]
pub struct Update<'a> {
    /// Learning rate at this step.
    pub lr: f64,
    /// Number of this step, from 1; skipped steps don't count.
    pub step: u64,
    /// Whether weight decay applies (matrices and kernels; not norms, biases, logit scale).
    pub decay: bool,
    /// The gradient.
    pub grads: &'a [f32],
}

/// An optimiser with its parameters.
pub trait Optimizer: Debug + Send + Sync {
    /// Its registered name.
    fn name(&self) -> &'static str;

    /// Learning rate before the schedule.
    fn lr(&self) -> f64;

    /// Names of what it keeps for each parameter, each as long as the parameter and zero at the start.
    fn slots(&self) -> &'static [&'static str];

    /// The device's word for it; none where it runs on the CPU alone.
    fn rule(&self) -> Option<Rule> {
        None
    }

    /// Updates one parameter. `state` has one vector for each of [`slots`](Self::slots).
    fn update(&self, a: Update<'_>, params: &mut [f32], state: &mut [Vec<f32>]);
}

/// An optimiser, shared.
pub type OptimizerConfig = Arc<dyn Optimizer>;

/// A registered optimiser.
#[derive(Clone, Copy, Debug)]
pub struct OptimizerEntry {
    /// Name in pipeline files.
    pub name: &'static str,
    /// One line for `mcpipe list` and the schema.
    pub summary: &'static str,
    /// Schema of its parameters.
    pub params: fn(&mut SchemaGenerator) -> Schema,
    /// Makes it with parameters.
    pub make: fn(&Params) -> Result<OptimizerConfig, ParamsError>,
}

/// The registered optimisers.
pub static OPTIMIZERS: &[OptimizerEntry] = &[adamw::ENTRY, sgd::ENTRY];

/// The optimisers as components.
pub fn components() -> Vec<Component> {
    let kind = ComponentKind::Optimizer;
    OPTIMIZERS.iter().map(|e| Component { kind, name: e.name, summary: e.summary, params: e.params }).collect()
}

/// The optimiser of a pipeline file.
///
/// # Errors
/// An unknown name, or parameters that don't fit; the path lies below the `[optimizer]` table.
pub fn optimizer(spec: &mcpipe_spec::Optimizer) -> Result<OptimizerConfig, Problem> {
    let Some(entry) = OPTIMIZERS.iter().find(|e| e.name == spec.kind) else {
        let known = OPTIMIZERS.iter().map(|e| e.name.to_owned()).collect();
        return Err(Problem {
            path: vec!["kind".into()],
            message: format!("there is no optimizer `{}`", spec.kind),
            known,
        });
    };
    (entry.make)(&spec.params).map_err(|e| Problem::new(&[], e.message))
}

/// What an optimiser keeps beside the parameters.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OptimizerState {
    /// Updates done.
    pub step: u64,
    /// For each parameter of the store, one vector for each of the optimiser's slots; empty for those not trained.
    pub slots: Vec<Vec<Vec<f32>>>,
}

impl OptimizerState {
    /// Zero state for the parameters of `store` that are trained.
    pub fn new(optimizer: &dyn Optimizer, store: &ParamStore, trained: &[bool]) -> Self {
        let zeros = |len: usize| optimizer.slots().iter().map(|_| vec![0.0; len]).collect();
        let slots = store.params().iter().zip(trained);
        let slots = slots.map(|(p, &t)| if t { zeros(p.data.len()) } else { Vec::new() }).collect();
        OptimizerState { step: 0, slots }
    }

    /// One step over every trained parameter.
    pub fn update(&mut self, optimizer: &dyn Optimizer, lr: f64, store: &mut ParamStore, grads: &Grads) {
        self.step += 1;
        let all = store.params_mut().iter_mut().zip(grads.all()).zip(&mut self.slots);
        for ((param, grads), state) in all {
            if state.is_empty() && !optimizer.slots().is_empty() {
                continue;
            }
            let decay = param.kind == ParamKind::Decay;
            optimizer.update(Update { lr, step: self.step, decay, grads }, &mut param.data, state);
        }
    }
}
