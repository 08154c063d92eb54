//! A graph run forward, on the CPU or on a device.

use std::borrow::Cow;
use std::sync::Arc;

use mcpipe_cuda::{Cuda, Device, Parameters, Precision};
use mcpipe_graph::{Cpu, Executor, Feed, Mode, ParamStore, StepGraph};

use crate::compute::Compute;
use crate::error::TrainError;

/// A graph run forward in f32 with weights that each run names.
#[derive(Debug)]
pub(crate) enum Forward {
    Cpu(Box<Executor<Cpu>>),
    Cuda(Box<OnDevice>),
}

/// A graph on a device, with the weights that it ran with last.
#[derive(Debug)]
pub(crate) struct OnDevice {
    device: Device,
    executor: Executor<Cuda>,
    weights: Parameters,
    /// Which store the weights are a copy of.
    version: u64,
    graph: Arc<StepGraph>,
}

impl OnDevice {
    /// Copies the weights to the device, unless they are there.
    fn take(&mut self, store: &ParamStore) -> Result<(), TrainError> {
        if self.version != store.version() {
            self.weights.update(&self.device, &store.subset(&self.graph)?)?;
            self.version = store.version();
        }
        Ok(())
    }
}

impl Forward {
    /// `graph` on what `compute` names; `store` must hold its parameters.
    pub(crate) fn new(graph: StepGraph, store: &ParamStore, compute: &Compute) -> Result<Self, TrainError> {
        let graph = Arc::new(graph);
        Ok(match compute {
            Compute::Cpu(kernels) => {
                Forward::Cpu(Box::new(Executor::new(graph, store, Mode::Forward, Cpu::new(*kernels))?))
            }
            Compute::Cuda(device) => {
                let weights = Parameters::upload(device, &store.subset(&graph)?)?;
                let backend = Cuda::new(device.clone(), Precision::F32);
                let executor = Executor::new(Arc::clone(&graph), &weights.store, Mode::Forward, backend)?;
                let (device, version) = (device.clone(), store.version());
                Forward::Cuda(Box::new(OnDevice { device, executor, weights, version, graph }))
            }
        })
    }

    /// Runs it.
    pub(crate) fn run(&mut self, store: &ParamStore, feeds: &[(&str, Feed<'_>)]) -> Result<(), TrainError> {
        match self {
            Forward::Cpu(executor) => Ok(executor.forward(store, feeds)?),
            Forward::Cuda(own) => {
                own.take(store)?;
                Ok(own.executor.forward(&own.weights.store, feeds)?)
            }
        }
    }

    /// An output's values.
    pub(crate) fn output(&self, name: &str) -> Result<Cow<'_, [f32]>, TrainError> {
        Ok(match self {
            Forward::Cpu(executor) => executor.value(executor.graph().output(name)?),
            Forward::Cuda(own) => own.executor.value(own.executor.graph().output(name)?),
        })
    }

    /// Bytes of its activations.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Forward::Cpu(executor) => executor.plan().bytes(),
            Forward::Cuda(own) => own.executor.plan().bytes(),
        }
    }
}
