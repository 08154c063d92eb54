//! One training step: values and gradients of the objective over a batch, on any backend.
//!
//! [`Step::prepare`] is the host's part: it checks the batch, makes tokens, masks and targets and copies them to the
//! backend (`prepared.rs`). [`Step::compute`] is the backend's part: teachers, forwards, losses and backwards, with nothing from or to the
//! host in between, so that a device may record it once and replay it. [`Step::values`] reads what came out.

use std::rc::Rc;
use std::sync::Arc;

use mcpipe_graph::backend::BackendError;
use mcpipe_graph::{
    Backend, Dtype, ExecError, Executor, Grads, Mode, Node, Op, ParamSpec, ParamStore, Part, Source, StepGraph,
};

use crate::distill::{Fed, Pairing, teacher_input};
use crate::error::TrainError;
use crate::graphs::{Graphs, IMAGE, SCALED, TEXT, TeacherGraph, loss_name, term_names};
use crate::inputs::{Inputs, Tower};
use crate::setup::{LOGIT_SCALE, MAX_LOGIT_SCALE, TeacherModel, TrainSetup};

/// Is shown each node and its value right after it ran.
type Watch<'a> = dyn FnMut(&Node, &dyn Fn() -> Vec<f32>) + 'a;

/// Takes no notice.
fn unwatched(_: &Node, _: &dyn Fn() -> Vec<f32>) {}

/// Elements that each scalar has to itself: kernels take addresses at multiples of 16 bytes.
pub(crate) const CELL: usize = 4;

/// One teacher, running.
#[derive(Debug)]
pub(crate) struct TeacherRun<B: Backend> {
    pub plan: TeacherGraph,
    pub tower: Option<Tower<B>>,
}

/// Parameters and their gradients in a backend's memory.
#[derive(Debug)]
pub(crate) struct Weights<'a, B: Backend> {
    /// Those of the model that is trained.
    pub store: &'a mut ParamStore<B::Buffer>,
    /// Their gradients.
    pub grads: &'a mut Grads<B::Buffer>,
    /// Each teacher's image tower, by position in the setup; none where nothing of it runs.
    pub teachers: Vec<Option<&'a ParamStore<B::Buffer>>>,
}

/// Runs the steps of one training.
#[derive(Debug)]
pub(crate) struct Step<B: Backend> {
    pub(crate) setup: Rc<TrainSetup>,
    pub(crate) graphs: Graphs,
    names: Vec<String>,
    pub(crate) backend: B,
    pub(crate) inputs: Inputs<B>,
    pub(crate) tower: Tower<B>,
    pub(crate) first: Option<Tower<B>>,
    pub(crate) loss: Executor<B>,
    pub(crate) teachers: Vec<TeacherRun<B>>,
    pub(crate) features: Vec<f32>,
    /// One cell for each of the graphs' losses ([`Step::cell`]), and one for the logit scale.
    cells: B::Buffer,
    /// Each loss's weight, cell by cell.
    pub(crate) seeds: B::Buffer,
    /// The sum of the losses that have a weight.
    sum: B::Buffer,
}

/// Where a pass over the batch ended.
#[derive(Clone, Debug)]
pub(crate) struct Values {
    /// Unweighted losses in slot order.
    pub terms: Vec<f64>,
    /// Weighted sum.
    pub total: f64,
    /// Whether every weighted loss is finite.
    pub finite: bool,
    /// exp(logit scale) after the step, where it was [kept](Step::keep_logit_scale).
    pub logit_scale: f64,
}

impl<B: Backend> Step<B> {
    /// Makes the executors of `graphs`: the student's parameters are found in `store`, each teacher's in `teachers` (by
    /// position in the setup). `towers` makes backends for towers, `losses` for the losses, which are always f32.
    pub(crate) fn new(
        setup: Rc<TrainSetup>,
        graphs: Graphs,
        store: &ParamStore<B::Buffer>,
        teachers: &[Option<&ParamStore<B::Buffer>>],
        towers: impl Fn() -> B,
        losses: impl Fn() -> B,
    ) -> Result<Self, TrainError> {
        let on = |backend: B, whose: &str, graph: &StepGraph, store: &ParamStore<B::Buffer>, mode| {
            Executor::new(Arc::new(graph.clone()), store, mode, backend).map_err(|e| match e {
                // Memory that was refused.
                ExecError::Backend(e) => {
                    ExecError::Backend(BackendError { label: format!("the activations of the {whose}"), ..e })
                }
                other => other,
            })
        };
        let executor = |whose: &str, graph: &StepGraph, store: &ParamStore<B::Buffer>, mode| {
            on(towers(), whose, graph, store, mode)
        };
        let targets: Vec<&str> = graphs.targets.iter().map(|t| t.name.as_str()).collect();
        let view = setup.model.view;
        let mode = if setup.training.recompute { Mode::Recompute } else { Mode::Train };
        let mut tower = Tower::new(executor("student", &graphs.tower, store, mode)?, view, &targets);
        let first = graphs.first.as_ref().map(|g| executor("student", g, store, Mode::Forward)).transpose()?;
        let mut first = first.map(|e| Tower::new(e, view, &[]));
        let loss = on(losses(), "losses", &graphs.loss, store, Mode::Train)?;
        let mut runs = Vec::new();
        for plan in &graphs.teachers {
            let view = match &setup.teachers[plan.teacher].model {
                TeacherModel::Frozen { image, .. } => image.as_ref().map_or(0, |i| i.view),
                TeacherModel::Average { .. } => view,
            };
            let tower = match (&plan.graph, teachers[plan.teacher]) {
                (Some(graph), Some(weights)) => {
                    let whose = format!("teacher {}", setup.teachers[plan.teacher].name);
                    Some(Tower::new(executor(&whose, graph, weights, Mode::Forward)?, view, &[]))
                }
                _ => None,
            };
            runs.push(TeacherRun { plan: plan.clone(), tower });
        }
        let mut all: Vec<&mut Tower<B>> = vec![&mut tower];
        all.extend(&mut first);
        all.extend(runs.iter_mut().filter_map(|r| r.tower.as_mut()));
        let parts = setup.training.accumulate;
        let inputs = Inputs::new(losses(), parts, &mut all)?;
        let mut backend = losses();
        let cells = (graphs.whole.len() + graphs.local.len() * parts + 1) * CELL * size_of::<f32>();
        let mut scalars =
            backend.allocate(&[cells, cells, CELL * size_of::<f32>()]).map_err(ExecError::from)?.into_iter();
        let mut scalar = || scalars.next().unwrap_or_default();
        let (cells, seeds, sum) = (scalar(), scalar(), scalar());
        let names = term_names(&setup);
        let features = Vec::new();
        let teachers = runs;
        Ok(Step { setup, graphs, names, backend, inputs, tower, first, loss, teachers, features, cells, seeds, sum })
    }

    /// Names of the terms in slot order.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    pub(crate) fn parts(&self) -> usize {
        self.setup.training.accumulate
    }

    /// Whether [`compute`](Self::compute) passes through the host.
    pub(crate) fn needs_host(&self) -> bool {
        self.graphs.targets.iter().any(|t| {
            let pair = Pairing { student: &t.student_tap, teacher: &t.teacher_tap, batch: 1 };
            self.setup.objective.terms[t.term].level.finishes_target(pair)
        })
    }

    /// Runs the prepared batch forward and backward with the given weights of the terms (slot order). Batch norm's
    /// running statistics move; gradients are added to those of `weights`. Losses that are not finite don't stop it.
    pub(crate) fn compute(&mut self, w: &mut Weights<'_, B>, weights: &[f64]) -> Result<(), TrainError> {
        self.run_teachers(&w.teachers)?;
        self.first_forward(w.store)?;
        self.watch_losses(w.store, &mut unwatched)?;
        self.loss.clear_seeds();
        for (i, &slot) in self.graphs.whole.iter().enumerate().filter(|(_, s)| weights[**s] != 0.0) {
            let output = self.loss.graph().output(&loss_name(&self.setup, slot))?.clone();
            self.loss.seed(&output, seed(&self.seeds, i))?;
        }
        self.loss.walk_backward(w.store, w.grads)?;
        for part in 0..self.parts() {
            if self.first.is_some() {
                self.tower.forward(&self.inputs, part, w.store, &mut unwatched)?;
            }
            self.keep_local(part)?;
            self.tower.executor.update_running_statistics(w.store);
            self.backward_part(w, part, weights)?;
        }
        Ok(())
    }

    /// The losses of the last pass.
    pub(crate) fn values(&self, weights: &[f64]) -> Values {
        let all = self.cells_in_all() * CELL;
        let cells = self.backend.view(Part { buffer: &self.cells, dtype: Dtype::F32, start: 0, len: all });
        let at = |cell: usize| f64::from(cells[cell * CELL]);
        let mut terms = vec![0.0; self.names.len()];
        for (i, &slot) in self.graphs.whole.iter().enumerate() {
            terms[slot] = at(i);
        }
        for (i, &slot) in self.graphs.local.iter().enumerate() {
            for part in 0..self.parts() {
                terms[slot] += at(self.cell(i, part)) / self.parts() as f64;
            }
        }
        let total: f64 = terms.iter().zip(weights).filter(|(_, w)| **w != 0.0).map(|(v, w)| v * w).sum();
        let logit_scale = at(self.cells_in_all() - 1).exp().min(MAX_LOGIT_SCALE);
        Values { terms, total, finite: total.is_finite(), logit_scale }
    }

    /// Keeps the logit scale that `store` holds for [`values`](Self::values).
    pub(crate) fn keep_logit_scale(&mut self, store: &ParamStore<B::Buffer>) {
        let at = (self.cells_in_all() - 1) * CELL;
        if let Some(p) = store.get(LOGIT_SCALE) {
            let from = Part { buffer: &p.data, dtype: Dtype::F32, start: 0, len: 1 };
            self.backend.copy(from, &mut self.cells, Dtype::F32, at, false);
        }
    }

    /// Adds up the losses that have a weight, for a device that judges by itself whether they are finite.
    pub(crate) fn sum_losses(&mut self, weights: &[f64]) {
        let whole = self.graphs.whole.iter().enumerate().map(|(i, slot)| (*slot, i));
        let parts = self.parts();
        let local = self.graphs.local.iter().enumerate();
        let local = local.flat_map(|(i, slot)| (0..parts).map(move |part| (*slot, i, part)));
        let local = local.map(|(slot, i, part)| (slot, self.cell(i, part)));
        let used: Vec<usize> = whole.chain(local).filter(|(slot, _)| weights[*slot] != 0.0).map(|(_, c)| c).collect();
        for (i, cell) in used.into_iter().enumerate() {
            let from = Part { buffer: &self.cells, dtype: Dtype::F32, start: cell * CELL, len: 1 };
            self.backend.copy(from, &mut self.sum, Dtype::F32, 0, i > 0);
        }
    }

    /// Where [`sum_losses`](Self::sum_losses) leaves the sum.
    pub(crate) fn sum(&self) -> &B::Buffer {
        &self.sum
    }

    /// Cells of losses, and the logit scale's.
    pub(crate) fn cells_in_all(&self) -> usize {
        self.graphs.whole.len() + self.graphs.local.len() * self.parts() + 1
    }

    /// The cell of the tower graph's loss `i` over a part.
    pub(crate) fn cell(&self, i: usize, part: usize) -> usize {
        self.graphs.whole.len() + i * self.parts() + part
    }

    /// Runs the teachers: embeddings go to the loss graph, targets to the tower.
    pub(crate) fn run_teachers(&mut self, teachers: &[Option<&ParamStore<B::Buffer>>]) -> Result<(), TrainError> {
        let setup = Rc::clone(&self.setup);
        let micro = setup.training.micro_batch();
        for run in &mut self.teachers {
            let teacher = &setup.teachers[run.plan.teacher];
            let Some(tower) = &mut run.tower else { continue };
            let lost = || TrainError::Setup(format!("no weights are kept for the teacher `{}`", teacher.name));
            let weights = teachers[run.plan.teacher].ok_or_else(lost)?;
            for part in 0..setup.training.accumulate {
                tower.forward(&self.inputs, part, weights, &mut unwatched)?;
                for (name, fed) in [(IMAGE, Fed::Image), (TEXT, Fed::Text), (SCALED, Fed::Scaled)] {
                    let output = tower.graph().output(name);
                    let input = self.loss.graph().input(&teacher_input(&teacher.name, fed));
                    if let (Ok(output), Some(input)) = (output, input) {
                        self.loss.write(&input, tower.executor.part(output), part * output.numel());
                    }
                }
                for (i, target) in self.graphs.targets.iter().enumerate().filter(|(_, t)| t.teacher == run.plan.teacher)
                {
                    let computed = tower.executor.part(tower.graph().output(&target.name)?);
                    let pair = Pairing { student: &target.student_tap, teacher: &target.teacher_tap, batch: micro };
                    let level = &setup.objective.terms[target.term].level;
                    if !level.finishes_target(pair) {
                        self.inputs.keep_target(i, part, computed, &mut self.tower);
                        continue;
                    }
                    if let Some(values) = level.finish_target(&self.backend.view(computed), pair) {
                        let bytes = size_of_val(values.as_slice());
                        let mut all = self.backend.allocate(&[bytes]).map_err(ExecError::from)?;
                        let mut buffer = all.pop().unwrap_or_default();
                        self.backend.upload(&values, Dtype::F32, &mut buffer);
                        let from = Part { buffer: &buffer, dtype: Dtype::F32, start: 0, len: values.len() };
                        self.inputs.keep_target(i, part, from, &mut self.tower);
                    }
                }
            }
        }
        Ok(())
    }

    /// Runs the tower over one part of the batch, with the local losses.
    pub(crate) fn watch_part(
        &mut self,
        store: &ParamStore<B::Buffer>,
        part: usize,
        watch: &mut Watch<'_>,
    ) -> Result<(), TrainError> {
        Ok(self.tower.forward(&self.inputs, part, store, watch)?)
    }

    /// Embeddings of the whole batch, into the loss graph.
    pub(crate) fn first_forward(&mut self, store: &ParamStore<B::Buffer>) -> Result<(), TrainError> {
        let tower = self.first.as_mut().unwrap_or(&mut self.tower);
        for part in 0..self.setup.training.accumulate {
            tower.forward(&self.inputs, part, store, &mut unwatched)?;
            for name in [IMAGE, TEXT] {
                let input = self.loss.graph().input(name);
                if let (Ok(output), Some(input)) = (tower.graph().output(name), input) {
                    self.loss.write(&input, tower.executor.part(output), part * output.numel());
                }
            }
        }
        Ok(())
    }

    /// Runs the losses over the whole batch and keeps them.
    pub(crate) fn watch_losses(
        &mut self,
        store: &ParamStore<B::Buffer>,
        watch: &mut Watch<'_>,
    ) -> Result<(), TrainError> {
        self.loss.walk(store, watch)?;
        for (i, &slot) in self.graphs.whole.iter().enumerate() {
            let output = self.loss.graph().output(&loss_name(&self.setup, slot))?;
            self.backend.copy(self.loss.part(output), &mut self.cells, Dtype::F32, i * CELL, false);
        }
        Ok(())
    }

    /// Keeps the tower graph's losses of the part that ran last.
    fn keep_local(&mut self, part: usize) -> Result<(), TrainError> {
        for (i, &slot) in self.graphs.local.iter().enumerate() {
            let at = self.cell(i, part) * CELL;
            let output = self.tower.graph().output(&loss_name(&self.setup, slot))?;
            self.backend.copy(self.tower.executor.part(output), &mut self.cells, Dtype::F32, at, false);
        }
        Ok(())
    }

    fn backward_part(&mut self, w: &mut Weights<'_, B>, part: usize, weights: &[f64]) -> Result<(), TrainError> {
        let tower = &mut self.tower.executor;
        tower.clear_seeds();
        for (i, &slot) in self.graphs.local.iter().enumerate().filter(|(_, s)| weights[**s] != 0.0) {
            let output = tower.graph().output(&loss_name(&self.setup, slot))?.clone();
            let cell = self.graphs.whole.len() + i * self.setup.training.accumulate + part;
            tower.seed(&output, seed(&self.seeds, cell))?;
        }
        for name in [IMAGE, TEXT] {
            let (Ok(output), Some(input)) = (tower.graph().output(name), self.loss.graph().input(name)) else {
                continue;
            };
            let output = output.clone();
            match self.loss.grad_part(&input) {
                Ok(all) => tower.seed(&output, all.slice(part * output.numel(), output.numel()))?,
                // No weighted loss reaches it.
                Err(ExecError::NoGradient(_)) => {}
                Err(e) => return Err(e.into()),
            }
        }
        Ok(tower.walk_backward(w.store, w.grads)?)
    }

    /// A teacher's embeddings as the loss graph was given them; to be read before the losses run.
    pub(crate) fn teacher_embeddings(&self, teacher: &str) -> Vec<f32> {
        let inputs =
            [Fed::Image, Fed::Text, Fed::Scaled].map(|fed| self.loss.graph().input(&teacher_input(teacher, fed)));
        inputs.iter().flatten().flat_map(|t| self.loss.value(t).into_owned()).collect()
    }

    /// The values of a gradient, on the host.
    pub(crate) fn gradient(&self, grads: &Grads<B::Buffer>, index: usize, len: usize) -> Vec<f32> {
        self.backend.view(Part { buffer: &grads.all()[index], dtype: Dtype::F32, start: 0, len }).into_owned()
    }
}

/// A loss's weight.
fn seed<B: Backend>(seeds: &B::Buffer, cell: usize) -> Part<'_, B> {
    Part { buffer: seeds, dtype: Dtype::F32, start: cell * CELL, len: 1 }
}

/// Which parameters of `store` a gradient can reach.
pub(crate) fn trained(graphs: &Graphs, store: &ParamStore) -> Vec<bool> {
    let mut trained = vec![false; store.params().len()];
    for (spec, node) in graphs.trained().into_iter().flat_map(param_nodes) {
        if let Some(i) = store.index(&spec.name) {
            trained[i] |= node.requires_grad;
        }
    }
    trained
}

/// Which parameters of `store` are running statistics of batch norms.
pub(crate) fn running(graphs: &Graphs, store: &ParamStore) -> Vec<bool> {
    let mut running = vec![false; store.params().len()];
    for (_, node) in graphs.tower.nodes() {
        let Some(Op::BatchNorm { running: ids, .. }) = node.op() else { continue };
        for id in ids {
            if let Some(i) = store.index(&graphs.tower.params()[id.0].name) {
                running[i] = true;
            }
        }
    }
    running
}

fn param_nodes(graph: &StepGraph) -> impl Iterator<Item = (&ParamSpec, &Node)> {
    graph.nodes().filter_map(|(_, node)| match node.source {
        Source::Param(id) => Some((&graph.params()[id.0], node)),
        _ => None,
    })
}

/// exp(logit scale) that a store holds, not above its bound.
pub(crate) fn scale_of(store: &ParamStore) -> f64 {
    let log = store.get(LOGIT_SCALE).and_then(|p| p.data.first()).copied().unwrap_or(0.0);
    f64::from(log).exp().min(MAX_LOGIT_SCALE)
}
