//! Steps on a device: parameters, gradients and averages live there; the host sends a batch and a few scalars, and reads
//! losses, norm and whether the step counted.

use std::rc::Rc;

use mcpipe_cpu::optim::sum_of_squares;
use mcpipe_cuda::{Cuda, CudaError, Device, Gradients, Parameters, Precision};
use mcpipe_graph::{Grads, ParamStore};

use super::{At, Done, Machine, State, apply};
use crate::batch::Batch;
use crate::error::{Origin, TrainError};
use crate::graphs::Graphs;
use crate::setup::{TeacherModel, TrainSetup};
use crate::step::{Step, Values, Weights};

/// A device with its copy of the training's state.
#[derive(Debug)]
pub(crate) struct CudaMachine {
    device: Device,
    step: Step<Cuda>,
    params: Parameters,
    grads: Gradients,
    /// In the order of the state's.
    averages: Vec<Parameters>,
    /// Frozen teachers' weights, by position in the setup.
    frozen: Vec<Option<Parameters>>,
}

/// The device's word for a precision.
pub(crate) fn precision(of: mcpipe_spec::Precision) -> Precision {
    match of {
        mcpipe_spec::Precision::F32 => Precision::F32,
        mcpipe_spec::Precision::Tf32 => Precision::Tf32,
        mcpipe_spec::Precision::Bf16 => Precision::Bf16,
    }
}

/// Each teacher's weights, by position in the setup.
fn teachers<'a>(
    setup: &TrainSetup,
    state: &State,
    frozen: &'a [Option<Parameters>],
    averages: &'a [Parameters],
) -> Vec<Option<&'a ParamStore<mcpipe_cuda::Buffer>>> {
    let weights = |(t, frozen): (&crate::setup::Teacher, &'a Option<Parameters>)| match &t.model {
        TeacherModel::Frozen { .. } => frozen.as_ref().map(|p| &p.store),
        TeacherModel::Average { .. } => {
            let own = state.averages.iter().position(|a| a.name == t.name);
            own.map(|i| &averages[i].store)
        }
    };
    setup.teachers.iter().zip(frozen).map(weights).collect()
}

impl CudaMachine {
    /// Allocates everything on `device` and copies the state there.
    pub(crate) fn new(
        setup: Rc<TrainSetup>,
        graphs: Graphs,
        state: &State,
        device: &Device,
    ) -> Result<Self, TrainError> {
        let params = Parameters::upload(device, &state.store)?;
        let grads = Gradients::zeros_like(device, &state.store)?;
        let averages = state.averages.iter().map(|a| Parameters::upload(device, &a.store));
        let averages = averages.collect::<Result<Vec<_>, CudaError>>()?;
        let mut frozen = Vec::new();
        for (t, teacher) in setup.teachers.iter().enumerate() {
            let graph = graphs.teachers.iter().find(|run| run.teacher == t).and_then(|run| run.graph.as_ref());
            frozen.push(match (&teacher.model, graph) {
                (TeacherModel::Frozen { image: Some(image), .. }, Some(graph)) => {
                    Some(Parameters::upload(device, &image.store.subset(graph)?)?)
                }
                _ => None,
            });
        }
        let precision = precision(setup.training.precision);
        let backend = Cuda::new(device.clone(), precision);
        let weights = teachers(&setup, state, &frozen, &averages);
        let make = || backend.clone();
        let step = Step::new(Rc::clone(&setup), graphs, &params.store, &weights, make, make)?;
        Ok(CudaMachine { device: device.clone(), step, params, grads, averages, frozen })
    }

    /// The device's part of a step, up to the gradients.
    fn compute(&mut self, state: &State, weights: &[f64]) -> Result<(), TrainError> {
        self.grads.zero(&self.device)?;
        let setup = Rc::clone(&self.step.setup);
        let teachers = teachers(&setup, state, &self.frozen, &self.averages);
        let mut w = Weights { store: &mut self.params.store, grads: &mut self.grads.grads, teachers };
        self.step.compute(&mut w, weights)
    }

    fn gradients(&self, state: &State) -> Grads {
        let get = |(i, p): (usize, &mcpipe_graph::Param)| match p.kind {
            mcpipe_graph::ParamKind::Buffer => Vec::new(),
            _ => self.step.gradient(&self.grads.grads, i, p.data.len()),
        };
        Grads::from_buffers(state.store.params().iter().enumerate().map(get).collect())
    }
}

impl Machine for CudaMachine {
    fn step(&mut self, state: &mut State, batch: &Batch, at: At<'_>) -> Result<Done, TrainError> {
        self.step.prepare(batch, at.step, at.weights)?;
        self.compute(state, at.weights)?;
        let mut values = self.step.values(at.weights);
        // Until the device has an optimiser of its own: the host's.
        let mut grads = self.gradients(state);
        let trained = grads.all().iter().zip(&state.trained).filter(|(_, t)| **t);
        let squares: f64 = trained.map(|(g, _)| sum_of_squares(g)).sum();
        let grad_norm = if values.finite { squares.sqrt() } else { f64::NAN };
        let updated = grad_norm.is_finite();
        if updated {
            let mut moved = state.store.clone();
            self.params.download(&self.device, &mut moved)?;
            state.store = moved;
            apply(&self.step.setup, state, &mut grads, at, grad_norm);
            for (on_device, average) in self.averages.iter().zip(&state.averages) {
                on_device.update(&self.device, &average.store)?;
            }
        }
        self.params.update(&self.device, &state.store)?;
        values.logit_scale = crate::step::scale_of(&state.store);
        Ok(Done { values, grad_norm, updated })
    }

    fn blame(&self, state: &State, values: &Values, weights: &[f64]) -> Origin {
        self.step.blame(values, weights, &state.store, &self.grads.grads)
    }

    fn diagnose(&mut self, state: &mut State, batch: &Batch, at: At<'_>) -> Result<Origin, TrainError> {
        self.sync(state)?;
        let setup = Rc::clone(&self.step.setup);
        let (device, all) = (self.device.clone(), self.grads.clone());
        let teachers = teachers(&setup, state, &self.frozen, &self.averages);
        let mut w = Weights { store: &mut self.params.store, grads: &mut self.grads.grads, teachers };
        let found = self.step.diagnose(&mut w, &state.store, batch, at, &mut |_| Ok(all.zero(&device)?));
        // It moved running statistics.
        self.load(state)?;
        found
    }

    fn sync(&mut self, state: &mut State) -> Result<(), TrainError> {
        self.params.download(&self.device, &mut state.store)?;
        for (on_device, average) in self.averages.iter().zip(&mut state.averages) {
            on_device.download(&self.device, &mut average.store)?;
        }
        Ok(())
    }

    fn load(&mut self, state: &State) -> Result<(), TrainError> {
        self.params.update(&self.device, &state.store)?;
        for (on_device, average) in self.averages.iter().zip(&state.averages) {
            on_device.update(&self.device, &average.store)?;
        }
        Ok(())
    }
}
