//! The host's part of a step: from a batch to what the backend's part reads.

use mcpipe_graph::{Backend, Dtype, Executor, Part, StepGraph};

use crate::batch::{Batch, SoftTargets, SparseTargets};
use crate::distill::{Fed, teacher_input};
use crate::encoder::tokens;
use crate::error::TrainError;
use crate::graphs::TEXT;
use crate::inputs::{Host, Tower};
use crate::losses::{IMAGE_TO_TEXT, PAIRS, SPARSE, TEXT_TO_IMAGE};
use crate::setup::{ModelText, TeacherModel};
use crate::step::{CELL, Step};
use crate::stochastic::drop_masks;

/// What the host makes of a batch, but for its images.
#[derive(Debug)]
pub(crate) struct Prepared {
    ids: Vec<i32>,
    eot: Vec<i32>,
    features: Vec<f32>,
    masks: Vec<Vec<f32>>,
    /// Inputs of the loss graph by name.
    losses: Vec<(String, Values)>,
}

/// Values of an input.
#[derive(Debug)]
enum Values {
    Floats(Vec<f32>),
    Ids(Vec<i32>),
}

/// Rows scaled to unit length (zero rows stay zero).
fn normalized(x: &[f32], rows: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(x.len());
    for row in x.chunks_exact((x.len() / rows.max(1)).max(1)) {
        let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
        let scale = if norm == 0.0 { 0.0 } else { 1.0 / norm };
        out.extend(row.iter().map(|v| (f64::from(*v) * scale) as f32));
    }
    out
}

/// Copies values to the input called `name`, where the graph has one.
fn upload<B: Backend>(executor: &mut Executor<B>, name: &str, values: &Values) -> Result<(), TrainError> {
    match (executor.graph().input(name), values) {
        (Some(input), Values::Floats(values)) => Ok(executor.upload(&input, values)?),
        (Some(input), Values::Ids(values)) => Ok(executor.upload_ids(&input, values)?),
        (None, _) => Ok(()),
    }
}

/// The targets of the batch's pairs, in the forms that the loss graph reads.
fn targets(graph: &StepGraph, batch: &Batch) -> Vec<(String, Values)> {
    let reads = |name: &str| graph.input(name).is_some();
    let mut inputs = Vec::new();
    if [IMAGE_TO_TEXT, TEXT_TO_IMAGE, PAIRS].into_iter().any(reads) {
        let t = SoftTargets::new(&batch.captions, batch.mix.as_ref());
        let matrices = [(IMAGE_TO_TEXT, t.image_to_text), (TEXT_TO_IMAGE, t.text_to_image), (PAIRS, t.pairs)];
        inputs.extend(matrices.map(|(name, values)| (name.to_owned(), Values::Floats(values))));
    }
    if SPARSE.into_iter().any(reads) {
        use Values::{Floats, Ids};
        let t = SparseTargets::new(&batch.captions, batch.mix.as_ref());
        let lists = [Ids(t.own), Ids(t.other), Floats(t.keep), Ids(t.group), Floats(t.share), Floats(t.column_total)];
        inputs.extend(SPARSE.map(str::to_owned).into_iter().zip(lists));
    }
    inputs
}

impl<B: Backend> Step<B> {
    /// Refuses a batch with other sizes than the setup's.
    pub(crate) fn check(&self, batch: &Batch, step: u64) -> Result<(), TrainError> {
        self.fits(batch).map_err(|reason| TrainError::Batch { step, reason })
    }

    fn fits(&self, batch: &Batch) -> Result<(), String> {
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
        if let Some(bytes) = &batch.bytes {
            bytes.check(b)?;
        }
        let mut views = vec![(self.setup.model.view, self.setup.model.image.image_size())];
        for run in &self.teachers {
            if let TeacherModel::Frozen { image: Some(i), .. } = &self.setup.teachers[run.plan.teacher].model {
                views.push((i.view, i.tower.image_size()));
            }
        }
        for (view, side) in views {
            let got = batch.view_size(view);
            let fits = got.is_some_and(|(s, len)| s.is_none_or(|s| s == side) && len == b * side * side * 3);
            if !fits {
                let got = got.map(|(_, len)| len);
                return Err(format!("view {view} has {got:?} values, {b} images of {side}x{side} are needed"));
            }
        }
        Ok(())
    }

    /// Makes what a pass over the batch reads and copies it to the backend.
    pub(crate) fn prepare(&mut self, batch: &Batch, step: u64, weights: &[f64]) -> Result<(), TrainError> {
        self.check(batch, step)?;
        let prepared = self.make(batch, step)?;
        let views = batch.values().map_err(|e| TrainError::Batch { step, reason: e.to_string() })?;
        self.put(prepared, Some(&views), weights)
    }

    /// Makes of a checked batch what the pass of step `step` reads besides images. The backend's memory stays as it is.
    pub(crate) fn make(&self, batch: &Batch, step: u64) -> Result<Prepared, TrainError> {
        let setup = &self.setup;
        let (mut ids, mut eot, mut features) = (Vec::new(), Vec::new(), Vec::new());
        match &setup.model.text {
            ModelText::Trained { tower, tokenize } => {
                let captions: Vec<&str> = batch.captions.iter().map(String::as_str).collect();
                (ids, eot) = tokens(tokenize, tower.context_length(), tower.last_token(), &captions)?;
            }
            ModelText::Frozen { encoder, .. } => features = setup.text(*encoder)?.embed(&batch.captions)?,
        }
        let masks = drop_masks(self.graphs.tower.stochastic(), self.parts(), setup.seed, step);
        Ok(Prepared { ids, eot, features, masks, losses: self.loss_inputs(batch)? })
    }

    /// What the host gives the loss graph: targets, and the teachers' embeddings of texts.
    fn loss_inputs(&self, batch: &Batch) -> Result<Vec<(String, Values)>, TrainError> {
        let setup = &self.setup;
        let mut inputs = targets(self.loss.graph(), batch);
        for run in self.teachers.iter().filter(|r| r.plan.embeddings) {
            let teacher = &setup.teachers[run.plan.teacher];
            let (encoder, scale) = match &teacher.model {
                TeacherModel::Frozen { image, text, logit_scale } => (*text, image.is_none().then_some(*logit_scale)),
                TeacherModel::Average { .. } => match &setup.model.text {
                    ModelText::Frozen { encoder, projection: None } => (Some(*encoder), None),
                    _ => (None, None),
                },
            };
            let Some(encoder) = encoder else { continue };
            let text = normalized(&setup.text(encoder)?.embed(&batch.captions)?, batch.captions.len());
            let scaled = scale.map(|scale| text.iter().map(|v| (f64::from(*v) * scale) as f32).collect());
            let scaled = scaled.map(Values::Floats);
            inputs.push((teacher_input(&teacher.name, Fed::Text), Values::Floats(text)));
            inputs.extend(scaled.map(|scaled| (teacher_input(&teacher.name, Fed::Scaled), scaled)));
        }
        Ok(inputs)
    }

    /// Copies what a pass reads to the backend. Without `views` the images are still to be written to their
    /// [places](Self::image_places).
    pub(crate) fn put(
        &mut self,
        prepared: Prepared,
        views: Option<&[Vec<f32>]>,
        weights: &[f64],
    ) -> Result<(), TrainError> {
        let Prepared { ids, eot, features, masks, losses } = prepared;
        self.features = features;
        let host = Host { views, ids: &ids, eot: &eot, features: &self.features, masks: &masks };
        let mut towers: Vec<&mut Tower<B>> = vec![&mut self.tower];
        towers.extend(&mut self.first);
        towers.extend(self.teachers.iter_mut().filter_map(|r| r.tower.as_mut()));
        self.inputs.upload(host, &mut towers)?;
        if !self.graphs.text_in_tower
            && let Some(input) = self.loss.graph().input(TEXT)
        {
            self.loss.upload(&input, &self.features)?;
        }
        for (name, values) in &losses {
            upload(&mut self.loss, name, values)?;
        }
        let mut seeds = vec![0.0; self.cells_in_all() * CELL];
        for (i, &slot) in self.graphs.whole.iter().enumerate() {
            seeds[i * CELL] = weights[slot] as f32;
        }
        for (i, &slot) in self.graphs.local.iter().enumerate() {
            for part in 0..self.parts() {
                seeds[self.cell(i, part) * CELL] = (weights[slot] / self.parts() as f64) as f32;
            }
        }
        self.backend.upload(&seeds, Dtype::F32, &mut self.seeds);
        Ok(())
    }

    /// Where images that are not uploaded as values go: each view's whole batch in each of its places.
    pub(crate) fn image_places(&mut self) -> Result<Vec<(usize, Part<'_, B>)>, TrainError> {
        let mut towers: Vec<&Tower<B>> = vec![&self.tower];
        towers.extend(&self.first);
        towers.extend(self.teachers.iter().filter_map(|r| r.tower.as_ref()));
        Ok(self.inputs.image_places(&towers)?)
    }
}
