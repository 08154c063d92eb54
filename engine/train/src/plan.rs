//! What a training step needs, known before anything runs.

use mcpipe_cuda::DeviceLayout;
use mcpipe_graph::backend::Plain;
use mcpipe_graph::{MemoryPlan, Mode, ParamKind, StepGraph, ValueId, fuse_losses};
use serde::Serialize;

use crate::error::TrainError;
use crate::graphs::Graphs;
use crate::setup::{TeacherModel, TrainSetup};

/// One part of a step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Part {
    /// What it is: `student`, `losses`, `teacher clip`, ..
    pub name: String,
    /// Bytes of activations, saved tensors and gradients of activations.
    pub activation_bytes: usize,
    /// Number of trained values of its own weights.
    pub parameters: usize,
    /// Bytes of its weights, running statistics included.
    pub weight_bytes: usize,
    /// Floating-point operations in a step.
    pub flops: u64,
}

/// Memory and work of one optimiser step.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct StepPlan {
    /// Images of a step.
    pub batch_size: usize,
    /// Images of one forward.
    pub micro_batch: usize,
    /// The parts.
    pub parts: Vec<Part>,
    /// Bytes of the parameters' gradients.
    pub gradient_bytes: usize,
    /// Bytes of the optimiser's state.
    pub optimizer_bytes: usize,
    /// Bytes of running averages (EMA of the student, EMA teachers).
    pub average_bytes: usize,
    /// Bytes of a batch's images in all views, and of the targets kept between two forwards.
    pub batch_bytes: usize,
}

const F32: usize = size_of::<f32>();

fn weights(graph: &StepGraph) -> (usize, usize) {
    let len = |p: &mcpipe_graph::ParamSpec| p.shape.iter().product::<usize>();
    (graph.trained_len(), graph.params().iter().map(len).sum::<usize>() * F32)
}

fn flops_of(graph: &StepGraph, id: ValueId) -> u64 {
    let node = graph.node(id);
    node.op().map_or(0, |op| op.flops(node.numel()))
}

impl StepPlan {
    /// The plan of a setup on the CPU or on a GPU; needs neither.
    ///
    /// # Errors
    /// Parts that don't fit together.
    pub fn new(setup: &TrainSetup, gpu: bool) -> Result<Self, TrainError> {
        let precision = crate::machine::precision(setup.training.precision);
        let layout = DeviceLayout { precision };
        let memory = |graph: &StepGraph, mode: Mode| match gpu {
            true if mode.trains() => MemoryPlan::new(&fuse_losses(graph), mode, &layout),
            true => MemoryPlan::new(graph, mode, &layout),
            false => MemoryPlan::new(graph, mode, &Plain),
        };
        let graphs = Graphs::new(setup)?;
        let accumulate = setup.training.accumulate as u64;
        let part = |name: &str, graph: &StepGraph, mode: Mode, runs: u64| {
            let (parameters, weight_bytes) = weights(graph);
            let plan = memory(graph, mode);
            // Forward once, backward about twice the forward; and what runs forward again.
            let flops = if mode.trains() { 3 * graph.forward_flops() } else { graph.forward_flops() };
            let again: u64 = plan.nodes_again().map(|id| flops_of(graph, id)).sum();
            Part {
                name: name.to_owned(),
                activation_bytes: plan.bytes(),
                parameters,
                weight_bytes,
                flops: runs * (flops + again),
            }
        };
        let mode = if setup.training.recompute { Mode::Recompute } else { Mode::Train };
        let mut parts = vec![part("student", &graphs.tower, mode, accumulate)];
        if let Some(first) = &graphs.first {
            let again = part("student, first forward", first, Mode::Forward, accumulate);
            parts.push(Part { parameters: 0, weight_bytes: 0, ..again });
        }
        parts.push(part("losses", &graphs.loss, Mode::Train, 1));
        for run in &graphs.teachers {
            let teacher = &setup.teachers[run.teacher];
            if let Some(graph) = &run.graph {
                let own = part(&format!("teacher {}", teacher.name), graph, Mode::Forward, accumulate);
                let average = matches!(teacher.model, TeacherModel::Average { .. });
                parts.push(if average { Part { parameters: 0, weight_bytes: 0, ..own } } else { own });
            }
        }
        for (i, text) in setup.texts.iter().enumerate() {
            let parameters = text.parameters();
            parts.push(Part {
                name: format!("text encoder {i}"),
                activation_bytes: text.bytes(),
                parameters,
                weight_bytes: parameters * F32,
                // Cached: after the first epochs it runs no more.
                flops: 0,
            });
        }
        let trained = |g: &StepGraph| -> usize {
            g.params().iter().filter(|p| p.kind != ParamKind::Buffer).map(|p| p.shape.iter().product::<usize>()).sum()
        };
        let student: usize = graphs.trained().into_iter().map(trained).sum();
        let all: usize = graphs.trained().into_iter().map(|g| weights(g).1).sum();
        let averages = usize::from(setup.average.is_some())
            + setup
                .teachers
                .iter()
                .filter(|t| setup.distils() && matches!(t.model, TeacherModel::Average { .. }))
                .count();
        let mut views: Vec<(usize, usize)> = vec![(setup.model.view, setup.model.image.image_size())];
        for run in &graphs.teachers {
            if let TeacherModel::Frozen { image: Some(i), .. } = &setup.teachers[run.teacher].model {
                views.push((i.view, i.tower.image_size()));
            }
        }
        views.sort_unstable();
        views.dedup();
        let batch = setup.training.batch_size;
        let images: usize = views.iter().map(|(_, side)| batch * side * side * 3).sum();
        // As values; on a GPU as bytes, and as values only where several parts read them.
        let image_bytes = match (gpu, setup.training.accumulate) {
            (false, _) => images * F32,
            (true, 1) => images,
            (true, _) => images * (1 + F32),
        };
        let targets: usize = graphs.targets.iter().map(|t| t.shape.iter().product::<usize>()).sum();
        Ok(StepPlan {
            batch_size: batch,
            micro_batch: setup.training.micro_batch(),
            parts,
            gradient_bytes: student * F32,
            optimizer_bytes: setup.optimizer.slots().len() * student * F32,
            average_bytes: averages * all,
            batch_bytes: image_bytes + targets * setup.training.accumulate * F32,
        })
    }

    /// Bytes in all.
    pub fn bytes(&self) -> usize {
        let parts: usize = self.parts.iter().map(|p| p.activation_bytes + p.weight_bytes).sum();
        parts + self.gradient_bytes + self.optimizer_bytes + self.average_bytes + self.batch_bytes
    }

    /// Floating-point operations of a step.
    pub fn flops(&self) -> u64 {
        self.parts.iter().map(|p| p.flops).sum()
    }
}
