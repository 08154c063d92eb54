//! Steps on the CPU: in the training's own state.

use std::rc::Rc;

use mcpipe_cpu::optim::sum_of_squares;
use mcpipe_graph::{Cpu, Grads, Kernels, Param, ParamStore, Precision};

use super::{Ahead, At, Done, Machine, State, apply};
use crate::batch::Batch;
use crate::ema::Average;
use crate::error::{Origin, TrainError};
use crate::graphs::Graphs;
use crate::setup::{TeacherModel, TrainSetup};
use crate::step::{Step, Values, Weights, scale_of};

/// The CPU.
#[derive(Debug)]
pub(crate) struct CpuMachine {
    step: Step<Cpu>,
    pub grads: Grads,
    /// Running statistics before the step, to be put back when it is skipped.
    kept: Vec<Vec<f32>>,
}

/// Each teacher's weights, by position in the setup.
fn teachers<'a>(
    setup: &'a TrainSetup,
    average: &dyn Fn(&str) -> Option<&'a ParamStore>,
) -> Vec<Option<&'a ParamStore>> {
    let weights = |t: &'a crate::setup::Teacher| match &t.model {
        TeacherModel::Frozen { image, .. } => image.as_ref().map(|i| i.store.as_ref()),
        TeacherModel::Average { .. } => average(&t.name),
    };
    setup.teachers.iter().map(weights).collect()
}

fn averages<'a>(averages: &'a [Average]) -> impl Fn(&str) -> Option<&'a ParamStore> {
    |name| averages.iter().find(|a| a.name == name).map(|a| &a.store)
}

impl CpuMachine {
    /// Allocates everything.
    pub(crate) fn new(
        setup: Rc<TrainSetup>,
        graphs: Graphs,
        store: &ParamStore,
        kernels: Kernels,
    ) -> Result<Self, TrainError> {
        let precision = match setup.training.precision {
            mcpipe_spec::Precision::F32 | mcpipe_spec::Precision::Tf32 => Precision::F32,
            mcpipe_spec::Precision::Bf16 => Precision::Bf16,
        };
        let towers = || Cpu::new(kernels).with_precision(precision);
        // An average has the parameters of the model itself.
        let weights = teachers(&setup, &|_| Some(store));
        let step = Step::new(Rc::clone(&setup), graphs, store, &weights, towers, || Cpu::new(kernels))?;
        Ok(CpuMachine { step, grads: Grads::zeros_like(store), kept: Vec::new() })
    }

    /// One pass over the batch: losses, and gradients in [`grads`](Self::grads).
    pub(crate) fn pass(
        &mut self,
        store: &mut ParamStore,
        own: &[Average],
        batch: &Batch,
        step: u64,
        weights: &[f64],
    ) -> Result<Values, TrainError> {
        self.grads.zero();
        self.step.prepare(batch, step, weights)?;
        let setup = Rc::clone(&self.step.setup);
        let teachers = teachers(&setup, &averages(own));
        let mut w = Weights { store, grads: &mut self.grads, teachers };
        self.step.compute(&mut w, weights)?;
        Ok(self.step.values(weights))
    }

    fn running_params(state: &mut State) -> impl Iterator<Item = &mut Param> {
        state.store.params_mut().iter_mut().zip(&state.running).filter(|(_, r)| **r).map(|(p, _)| p)
    }

    fn keep_running(&mut self, state: &mut State) {
        self.kept.resize_with(state.running.iter().filter(|r| **r).count(), Vec::new);
        for (p, kept) in Self::running_params(state).zip(&mut self.kept) {
            kept.clone_from(&p.data);
        }
    }

    fn put_back_running(&self, state: &mut State) {
        for (p, kept) in Self::running_params(state).zip(&self.kept) {
            p.data.clone_from(kept);
        }
    }
}

impl Machine for CpuMachine {
    fn step(&mut self, state: &mut State, batch: &Batch, at: At<'_>, _: &mut dyn Ahead) -> Result<Done, TrainError> {
        self.keep_running(state);
        let mut values = self.pass(&mut state.store, &state.averages, batch, at.step, at.weights)?;
        let squares: f64 = if values.finite {
            let trained = self.grads.all().iter().zip(&state.trained).filter(|(_, t)| **t);
            trained.map(|(g, _)| sum_of_squares(g)).sum()
        } else {
            f64::NAN
        };
        let grad_norm = squares.sqrt();
        let updated = grad_norm.is_finite();
        if updated {
            apply(&self.step.setup, state, &mut self.grads, at, grad_norm);
        } else {
            self.put_back_running(state);
        }
        values.logit_scale = scale_of(&state.store);
        Ok(Done { values, grad_norm, updated })
    }

    fn blame(&self, state: &State, values: &Values, weights: &[f64]) -> Origin {
        self.step.blame(values, weights, &state.store, &self.grads)
    }

    fn diagnose(&mut self, state: &mut State, batch: &Batch, at: At<'_>) -> Result<Origin, TrainError> {
        let setup = Rc::clone(&self.step.setup);
        self.keep_running(state);
        let host = state.store.clone();
        let teachers = teachers(&setup, &averages(&state.averages));
        let mut w = Weights { store: &mut state.store, grads: &mut self.grads, teachers };
        let found = self.step.diagnose(&mut w, &host, batch, at, &mut |g| {
            g.zero();
            Ok(())
        });
        self.put_back_running(state);
        found
    }

    fn sync(&mut self, _: &mut State) -> Result<(), TrainError> {
        Ok(())
    }

    fn load(&mut self, _: &State) -> Result<(), TrainError> {
        Ok(())
    }
}
