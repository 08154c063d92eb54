//! One training step: values and gradients of the objective over a batch.

use std::rc::Rc;
use std::sync::Arc;

use mcpipe_graph::{
    Cpu, ExecError, Executor, Feed, Grads, Mode, Node, Op, ParamSpec, ParamStore, Precision, Source, StepGraph, Tensor,
};

use crate::batch::{Batch, SoftTargets};
use crate::distill::{Fed, Pairing, teacher_input};
use crate::ema::Average;
use crate::encoder::tokens;
use crate::error::TrainError;
use crate::graphs::{
    EOT, FEATURES, Graphs, IDS, IMAGE, IMAGE_TO_TEXT, IMAGES, PAIRS, TEXT, TEXT_TO_IMAGE, TeacherGraph, loss_name,
    term_names,
};
use crate::setup::{Contrast, LOGIT_SCALE, MAX_LOGIT_SCALE, ModelText, TeacherModel, TrainSetup};
use crate::stochastic::drop_masks;

/// Is shown each node and its value right after it ran.
type Watch<'a> = dyn FnMut(&Node, &dyn Fn() -> Vec<f32>) + 'a;

/// One teacher's tower, running.
#[derive(Debug)]
pub(crate) struct TeacherRun {
    pub plan: TeacherGraph,
    executor: Option<Executor<Cpu>>,
    /// Embeddings of the whole batch, normalised.
    pub image: Vec<f32>,
    pub text: Vec<f32>,
    /// Image embeddings (text where there is no image tower) times the logit scale.
    scaled: Vec<f32>,
}

/// Runs the steps of one training.
#[derive(Debug)]
pub(crate) struct Step {
    pub(crate) setup: Rc<TrainSetup>,
    pub(crate) graphs: Graphs,
    names: Vec<String>,
    tower: Executor<Cpu>,
    first: Option<Executor<Cpu>>,
    loss: Executor<Cpu>,
    pub(crate) teachers: Vec<TeacherRun>,
    /// Targets of each part, in the order of `graphs.targets`.
    targets: Vec<Vec<Vec<f32>>>,
    image: Vec<f32>,
    text: Vec<f32>,
    pub(crate) features: Vec<f32>,
    ids: Vec<i32>,
    eot: Vec<i32>,
    /// The step's masks of the whole batch, one for each stochastic input of the tower graph.
    masks: Vec<Vec<f32>>,
    pub(crate) grads: Grads,
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
}

impl Values {
    /// Sums the terms that have a weight.
    fn weigh(&mut self, weights: &[f64]) {
        let used = self.terms.iter().zip(weights).filter(|(_, w)| **w != 0.0);
        self.total = used.map(|(v, w)| v * w).sum();
        self.finite = self.total.is_finite();
    }
}

/// Rows scaled to unit length (zero rows stay zero).
fn normalized(x: &[f32], dim: usize, out: &mut Vec<f32>) {
    out.clear();
    for row in x.chunks_exact(dim.max(1)) {
        let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let scale = if norm == 0.0 { 0.0 } else { 1.0 / norm };
        out.extend(row.iter().map(|v| (f64::from(*v) * scale) as f32));
    }
}

impl Step {
    /// Builds the graphs, completes `store` and allocates everything.
    pub(crate) fn new(setup: Rc<TrainSetup>, store: &mut ParamStore) -> Result<Self, TrainError> {
        let graphs = Graphs::new(&setup)?;
        for graph in graphs.trained() {
            store.init(graph, setup.seed)?;
        }
        let precision = match setup.training.precision {
            mcpipe_spec::Precision::F32 => Precision::F32,
            mcpipe_spec::Precision::Bf16 => Precision::Bf16,
        };
        let backend = || Cpu::new(setup.kernels).with_precision(precision);
        let tower = Executor::new(Arc::new(graphs.tower.clone()), store, Mode::Train, backend())?;
        let first = graphs.first.clone().map(|g| Executor::new(Arc::new(g), store, Mode::Forward, backend()));
        let loss = Executor::new(Arc::new(graphs.loss.clone()), store, Mode::Train, Cpu::new(setup.kernels))?;
        let mut teachers = Vec::new();
        for plan in &graphs.teachers {
            let weights: Option<&ParamStore> = match &setup.teachers[plan.teacher].model {
                TeacherModel::Frozen { image, .. } => image.as_ref().map(|i| i.store.as_ref()),
                TeacherModel::Average { .. } => Some(store),
            };
            let executor = match (&plan.graph, weights) {
                (Some(graph), Some(weights)) => {
                    Some(Executor::new(Arc::new(graph.clone()), weights, Mode::Forward, backend())?)
                }
                _ => None,
            };
            let (image, text, scaled) = (Vec::new(), Vec::new(), Vec::new());
            teachers.push(TeacherRun { plan: plan.clone(), executor, image, text, scaled });
        }
        let targets = vec![vec![Vec::new(); graphs.targets.len()]; setup.training.accumulate];
        Ok(Step {
            names: term_names(&setup),
            tower,
            first: first.transpose()?,
            loss,
            teachers,
            targets,
            image: Vec::new(),
            text: Vec::new(),
            features: Vec::new(),
            ids: Vec::new(),
            eot: Vec::new(),
            masks: Vec::new(),
            grads: Grads::zeros_like(store),
            graphs,
            setup,
        })
    }

    /// Names of the terms in slot order.
    pub(crate) fn names(&self) -> &[String] {
        &self.names
    }

    /// Refuses a batch with other sizes than the setup's.
    fn check(&self, batch: &Batch) -> Result<(), String> {
        let b = self.setup.training.batch_size;
        if batch.captions.len() != b {
            return Err(format!("it has {} captions, {b} are needed", batch.captions.len()));
        }
        if let Some(mix) = &batch.mix {
            let fits = mix.partner.len() == b && mix.keep.len() == b && mix.partner.iter().all(|&p| p < b);
            let shares = mix.keep.iter().all(|k| (0.0..=1.0).contains(k));
            if !fits || !shares {
                return Err("its mixing names other samples than its own, or shares outside 0 to 1".into());
            }
        }
        let mut views = vec![(self.setup.model.view, self.setup.model.image.image_size())];
        for run in &self.teachers {
            if let TeacherModel::Frozen { image: Some(i), .. } = &self.setup.teachers[run.plan.teacher].model {
                views.push((i.view, i.tower.image_size()));
            }
        }
        for (view, side) in views {
            let got = batch.views.get(view).map(Vec::len);
            if got != Some(b * side * side * 3) {
                return Err(format!("view {view} has {got:?} values, {b} images of {side}x{side} are needed"));
            }
        }
        Ok(())
    }

    /// One pass over the batch with the given weights of the terms (slot order). Batch norm's running statistics in
    /// `store` move; gradients are left in [`grads`](Self::grads). Where a weighted loss is not finite the backward walk
    /// is left out.
    pub(crate) fn run(
        &mut self,
        store: &mut ParamStore,
        averages: &[Average],
        batch: &Batch,
        step: u64,
        weights: &[f64],
    ) -> Result<Values, TrainError> {
        self.check(batch).map_err(|reason| TrainError::Batch { step, reason })?;
        self.grads.zero();
        self.masks = drop_masks(self.graphs.tower.stochastic(), self.parts(), self.setup.seed, step);
        self.prepare_text(batch)?;
        self.run_teachers(averages, batch)?;
        self.first_forward(store, batch)?;
        let mut values = Values { terms: vec![0.0; self.names.len()], total: 0.0, finite: true };
        self.batch_losses(store, batch, &mut values)?;
        if self.first.is_none() {
            self.add_local(&mut values)?;
        }
        values.weigh(weights);
        if !values.finite {
            return Ok(values);
        }
        let [image, text] = self.batch_gradients(store, weights)?;
        for part in 0..self.parts() {
            if self.first.is_some() {
                self.forward_part(store, batch, part, true)?;
                self.add_local(&mut values)?;
            }
            self.tower.update_running_statistics(store);
            self.backward_part(store, part, weights, [image.as_deref(), text.as_deref()])?;
        }
        values.weigh(weights);
        Ok(values)
    }

    pub(crate) fn parts(&self) -> usize {
        self.setup.training.accumulate
    }

    /// Token ids or the frozen encoder's features of the batch's captions.
    pub(crate) fn prepare_text(&mut self, batch: &Batch) -> Result<(), TrainError> {
        match &self.setup.model.text {
            ModelText::Trained { tower, tokenize } => {
                let captions: Vec<&str> = batch.captions.iter().map(String::as_str).collect();
                (self.ids, self.eot) = tokens(tokenize, tower.context_length(), tower.last_token(), &captions)?;
            }
            ModelText::Frozen { encoder, .. } => self.features = self.setup.text(*encoder)?.embed(&batch.captions)?,
        }
        Ok(())
    }

    pub(crate) fn run_teachers(&mut self, averages: &[Average], batch: &Batch) -> Result<(), TrainError> {
        let setup = Rc::clone(&self.setup);
        let parts = self.parts();
        let inputs = TowerInputs { ids: &self.ids, eot: &self.eot, features: &self.features, parts };
        for run in &mut self.teachers {
            let teacher = &setup.teachers[run.plan.teacher];
            let lost = || TrainError::Setup(format!("no average is kept for the teacher `{}`", teacher.name));
            let (view, weights, scale) = match &teacher.model {
                TeacherModel::Frozen { image, logit_scale, .. } => {
                    (image.as_ref().map_or(0, |i| i.view), image.as_ref().map(|i| i.store.as_ref()), *logit_scale)
                }
                TeacherModel::Average { logit_scale, .. } => {
                    let average = averages.iter().find(|a| a.name == teacher.name).ok_or_else(lost)?;
                    (setup.model.view, Some(&average.store), logit_scale.unwrap_or_else(|| scale_of(&average.store)))
                }
            };
            let (mut image, mut text) = (Vec::new(), Vec::new());
            if let (Some(executor), Some(weights)) = (&mut run.executor, weights) {
                for part in 0..parts {
                    executor.forward(weights, &inputs.feeds(&batch.views[view], part))?;
                    for (name, to) in [(IMAGE, &mut image), (TEXT, &mut text)] {
                        if let Ok(output) = executor.graph().output(name) {
                            to.extend_from_slice(&executor.value(output));
                        }
                    }
                    for (i, target) in self.graphs.targets.iter().enumerate() {
                        if target.teacher == run.plan.teacher {
                            let batch = setup.training.micro_batch();
                            let pairing = Pairing { student: &target.student_tap, teacher: &target.teacher_tap, batch };
                            let computed = executor.value(executor.graph().output(&target.name)?);
                            let level = &setup.objective.terms[target.term].level;
                            level.finish_target(&computed, pairing, &mut self.targets[part][i]);
                        }
                    }
                }
            }
            if !run.plan.embeddings {
                continue;
            }
            let frozen = match &teacher.model {
                TeacherModel::Frozen { text, .. } => *text,
                TeacherModel::Average { .. } => match &setup.model.text {
                    ModelText::Frozen { encoder, projection: None } => Some(*encoder),
                    _ => None,
                },
            };
            if let Some(encoder) = frozen {
                text = setup.text(encoder)?.embed(&batch.captions)?;
            }
            let b = batch.captions.len();
            normalized(&image, image.len() / b, &mut run.image);
            normalized(&text, text.len() / b, &mut run.text);
            let first = if run.image.is_empty() { &run.text } else { &run.image };
            run.scaled.clear();
            run.scaled.extend(first.iter().map(|v| (f64::from(*v) * scale) as f32));
        }
        Ok(())
    }

    /// Runs the tower over one part of the batch, with the local losses if `local` says so.
    fn forward_part(&mut self, store: &ParamStore, batch: &Batch, part: usize, local: bool) -> Result<(), TrainError> {
        self.watch_part(store, batch, part, local, &mut |_, _| {})
    }

    pub(crate) fn watch_part(
        &mut self,
        store: &ParamStore,
        batch: &Batch,
        part: usize,
        local: bool,
        watch: &mut Watch<'_>,
    ) -> Result<(), TrainError> {
        let inputs = TowerInputs {
            ids: &self.ids,
            eot: &self.eot,
            features: &self.features,
            parts: self.setup.training.accumulate,
        };
        let mut feeds = inputs.feeds(&batch.views[self.setup.model.view], part);
        for (target, values) in self.graphs.targets.iter().zip(&self.targets[part]) {
            feeds.push((&target.name, Feed::F32(values)));
        }
        for (input, mask) in self.graphs.tower.stochastic().iter().zip(&self.masks) {
            feeds.push((&input.name, Feed::F32(&mask[part * input.samples..][..input.samples])));
        }
        let executor = match &mut self.first {
            Some(first) if !local => first,
            _ => &mut self.tower,
        };
        Ok(executor.forward_watched(store, &feeds, watch)?)
    }

    /// Embeddings of the whole batch.
    pub(crate) fn first_forward(&mut self, store: &ParamStore, batch: &Batch) -> Result<(), TrainError> {
        self.image.clear();
        self.text.clear();
        for part in 0..self.parts() {
            self.forward_part(store, batch, part, false)?;
            let executor = self.first.as_ref().unwrap_or(&self.tower);
            self.image.extend_from_slice(&executor.value(executor.graph().output(IMAGE)?));
            if self.graphs.text_in_tower {
                self.text.extend_from_slice(&executor.value(executor.graph().output(TEXT)?));
            }
        }
        if !self.graphs.text_in_tower {
            self.text.extend_from_slice(&self.features);
        }
        Ok(())
    }

    fn batch_losses(&mut self, store: &ParamStore, batch: &Batch, values: &mut Values) -> Result<(), TrainError> {
        self.watch_losses(store, batch, &mut |_, _| {})?;
        for &slot in &self.graphs.whole {
            let output = self.loss.graph().output(&loss_name(&self.setup, slot))?;
            values.terms[slot] = f64::from(self.loss.value(output)[0]);
        }
        Ok(())
    }

    pub(crate) fn watch_losses(
        &mut self,
        store: &ParamStore,
        batch: &Batch,
        watch: &mut Watch<'_>,
    ) -> Result<(), TrainError> {
        let targets = SoftTargets::new(&batch.captions, batch.mix.as_ref());
        let mut named: Vec<(String, &[f32])> = vec![
            (IMAGE.into(), &self.image),
            (TEXT.into(), &self.text),
            (IMAGE_TO_TEXT.into(), &targets.image_to_text),
            (TEXT_TO_IMAGE.into(), &targets.text_to_image),
        ];
        if matches!(self.setup.objective.contrast, Contrast::Sigmoid { .. }) {
            named.push((PAIRS.into(), &targets.pairs));
        }
        for run in &self.teachers {
            let name = &self.setup.teachers[run.plan.teacher].name;
            for (fed, values) in [(Fed::Image, &run.image), (Fed::Text, &run.text), (Fed::Scaled, &run.scaled)] {
                named.push((teacher_input(name, fed), values));
            }
        }
        let feeds: Vec<(&str, Feed<'_>)> = named.iter().map(|(n, v)| (n.as_str(), Feed::F32(v))).collect();
        Ok(self.loss.forward_watched(store, &feeds, watch)?)
    }

    /// Adds the tower graph's losses of the part that ran last.
    fn add_local(&self, values: &mut Values) -> Result<(), TrainError> {
        for &slot in &self.graphs.local {
            let output = self.tower.graph().output(&loss_name(&self.setup, slot))?;
            values.terms[slot] += f64::from(self.tower.value(output)[0]) / self.parts() as f64;
        }
        Ok(())
    }

    /// Gradients of the image and text embeddings of the whole batch; none where no weighted loss reaches them.
    fn batch_gradients(&mut self, store: &ParamStore, weights: &[f64]) -> Result<[Option<Vec<f32>>; 2], TrainError> {
        let outputs = self.seeds(&self.loss, &self.graphs.whole, weights, 1.0)?;
        if outputs.is_empty() {
            return Ok([None, None]);
        }
        let seeds: Vec<(&Tensor, &[f32])> = outputs.iter().map(|(t, w)| (t, w.as_slice())).collect();
        self.loss.backward(store, &seeds, &mut self.grads)?;
        let gradient = |name: &str| -> Result<Option<Vec<f32>>, TrainError> {
            let Some(input) = self.loss.graph().input(name) else { return Ok(None) };
            match self.loss.grad(&input) {
                Ok(values) => Ok(Some(values.into_owned())),
                Err(ExecError::NoGradient(_)) => Ok(None),
                Err(e) => Err(e.into()),
            }
        };
        let text = if self.graphs.text_in_tower { gradient(TEXT)? } else { None };
        Ok([gradient(IMAGE)?, text])
    }

    /// Outputs of a graph's losses with their weights as seeds; losses of weight 0 are left out.
    fn seeds(
        &self,
        executor: &Executor<Cpu>,
        slots: &[usize],
        weights: &[f64],
        share: f64,
    ) -> Result<Vec<(Tensor, Vec<f32>)>, TrainError> {
        let used = slots.iter().filter(|&&slot| weights[slot] != 0.0);
        let seed = |&slot: &usize| {
            let output = executor.graph().output(&loss_name(&self.setup, slot))?.clone();
            Ok((output, vec![(weights[slot] * share) as f32]))
        };
        used.map(seed).collect()
    }

    fn backward_part(
        &mut self,
        store: &ParamStore,
        part: usize,
        weights: &[f64],
        grads: [Option<&[f32]>; 2],
    ) -> Result<(), TrainError> {
        let parts = self.parts();
        let local = self.seeds(&self.tower, &self.graphs.local, weights, 1.0 / parts as f64)?;
        let mut embeddings: Vec<(Tensor, &[f32])> = Vec::new();
        for (name, grad) in [IMAGE, TEXT].into_iter().zip(grads) {
            if let Some(grad) = grad {
                let len = grad.len() / parts;
                embeddings.push((self.tower.graph().output(name)?.clone(), &grad[part * len..][..len]));
            }
        }
        let mut seeds: Vec<(&Tensor, &[f32])> = local.iter().map(|(t, w)| (t, w.as_slice())).collect();
        seeds.extend(embeddings.iter().map(|(t, g)| (t, *g)));
        if !seeds.is_empty() {
            self.tower.backward(store, &seeds, &mut self.grads)?;
        }
        Ok(())
    }

    /// Which parameters of `store` a gradient can reach.
    pub(crate) fn trained(&self, store: &ParamStore) -> Vec<bool> {
        let mut trained = vec![false; store.params().len()];
        for (spec, node) in self.graphs.trained().into_iter().flat_map(param_nodes) {
            if let Some(i) = store.index(&spec.name) {
                trained[i] |= node.requires_grad;
            }
        }
        trained
    }

    /// Which parameters of `store` are running statistics of batch norms.
    pub(crate) fn running(&self, store: &ParamStore) -> Vec<bool> {
        let mut running = vec![false; store.params().len()];
        for (_, node) in self.graphs.tower.nodes() {
            let Some(Op::BatchNorm { running: ids, .. }) = node.op() else { continue };
            for id in ids {
                if let Some(i) = store.index(&self.graphs.tower.params()[id.0].name) {
                    running[i] = true;
                }
            }
        }
        running
    }
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

/// What towers are fed, besides images.
struct TowerInputs<'a> {
    ids: &'a [i32],
    eot: &'a [i32],
    features: &'a [f32],
    parts: usize,
}

impl<'a> TowerInputs<'a> {
    /// One of the batch's equal parts; graphs take those that they have an input for.
    fn feeds(&self, view: &'a [f32], part: usize) -> Vec<(&'a str, Feed<'a>)> {
        fn slice<T>(all: &[T], part: usize, parts: usize) -> &[T] {
            let len = all.len() / parts;
            &all[part * len..][..len]
        }
        vec![
            (IMAGES, Feed::F32(slice(view, part, self.parts))),
            (IDS, Feed::I32(slice(self.ids, part, self.parts))),
            (EOT, Feed::I32(slice(self.eot, part, self.parts))),
            (FEATURES, Feed::F32(slice(self.features, part, self.parts))),
        ]
    }
}
