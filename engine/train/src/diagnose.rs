//! Finding what left the finite range first.

use mcpipe_cpu::optim::all_finite;
use mcpipe_graph::{Backend, Grads, Node, Op, ParamStore};

use crate::batch::Batch;
use crate::error::{Origin, TrainError};
use crate::machine::At;
use crate::setup::TeacherModel;
use crate::step::{Step, Values, Weights};

/// Sets gradients to zero.
pub(crate) type Zero<'a, Buf> = &'a mut dyn FnMut(&mut Grads<Buf>) -> Result<(), TrainError>;

impl<B: Backend> Step<B> {
    /// The name of the first loss term or parameter that is not finite after a pass; nothing is run again. `store` is the
    /// parameters on the host, of which only names and sizes count.
    pub(crate) fn blame(
        &self,
        values: &Values,
        weights: &[f64],
        store: &ParamStore,
        grads: &Grads<B::Buffer>,
    ) -> Origin {
        let bad = values.terms.iter().zip(weights).position(|(v, w)| *w != 0.0 && !v.is_finite());
        if let Some(slot) = bad {
            return Origin { term: Some(self.names()[slot].clone()), layer: None, what: "loss" };
        }
        Origin { term: None, layer: self.bad_gradient(store, grads), what: "gradient" }
    }

    /// The parameter nearest to the losses whose gradient is not finite.
    fn bad_gradient(&self, store: &ParamStore, grads: &Grads<B::Buffer>) -> Option<String> {
        let bad = |name: &str| {
            let held = store.index(name).map(|i| (i, &store.params()[i]));
            held.filter(|(_, p)| p.kind != mcpipe_graph::ParamKind::Buffer)
                .is_some_and(|(i, p)| !all_finite(&self.gradient(grads, i, p.data.len())))
        };
        let params = self.graphs.trained().into_iter().rev().flat_map(|g| g.params().iter().rev());
        params.map(|p| p.name.clone()).find(|name| bad(name))
    }

    /// Runs the batch again, watching every value, to name what left the finite range first. Running statistics move and
    /// gradients are left anyhow. `host` is the parameters on the host.
    pub(crate) fn diagnose(
        &mut self,
        w: &mut Weights<'_, B>,
        host: &ParamStore,
        batch: &Batch,
        at: At<'_>,
        zero: Zero<'_, B::Buffer>,
    ) -> Result<Origin, TrainError> {
        let found = |what, layer: String| Ok(Origin { term: None, layer: Some(layer), what });
        for (v, view) in batch.views.iter().enumerate() {
            if !all_finite(view) {
                return found("image", format!("view {v} of the batch"));
            }
        }
        if let Some(p) = host.params().iter().find(|p| !all_finite(&p.data)) {
            return found("weight", format!("`{}`", p.name));
        }
        self.prepare(batch, at.step, at.weights)?;
        self.run_teachers(&w.teachers)?;
        let bad_teacher = |average: bool| {
            let bad = self.teachers.iter().find(|run| {
                let teacher = &self.setup.teachers[run.plan.teacher];
                matches!(teacher.model, TeacherModel::Average { .. }) == average
                    && !all_finite(&self.teacher_embeddings(&teacher.name))
            })?;
            Some(format!("teacher `{}`", self.setup.teachers[bad.plan.teacher].name))
        };
        if let Some(teacher) = bad_teacher(false) {
            return found("embedding", teacher);
        }
        // An average goes bad with the student: it is to blame only where the student itself is finite.
        let average = bad_teacher(true);
        if !all_finite(&self.features) {
            return found("embedding", "the frozen text encoder".into());
        }
        let mut first: Option<String> = None;
        let mut watch = |node: &Node, value: &dyn Fn() -> Vec<f32>| note_first(&mut first, node, value);
        for part in 0..self.parts() {
            self.watch_part(w.store, part, &mut watch)?;
        }
        if let (None, Some(teacher)) = (&first, average) {
            return found("embedding", teacher);
        }
        // A walk may reuse its inputs' memory.
        self.prepare(batch, at.step, at.weights)?;
        self.run_teachers(&w.teachers)?;
        self.first_forward(w.store)?;
        let mut watch = |node: &Node, value: &dyn Fn() -> Vec<f32>| note_first(&mut first, node, value);
        self.watch_losses(w.store, &mut watch)?;
        // Each term by itself: the first whose loss or gradient is not finite.
        let alone = |slot: usize| -> Vec<f64> {
            at.weights.iter().enumerate().map(|(i, w)| if i == slot { *w } else { 0.0 }).collect()
        };
        for slot in (0..at.weights.len()).filter(|&s| at.weights[s] != 0.0) {
            let own = alone(slot);
            zero(w.grads)?;
            self.prepare(batch, at.step, &own)?;
            self.compute(w, &own)?;
            let values = self.values(&own);
            let blame = self.blame(&values, &own, host, w.grads);
            if !values.finite || blame.layer.is_some() {
                let term = Some(self.names()[slot].clone());
                let layer = first.or(blame.layer.map(|l| format!("`{l}`")));
                return Ok(Origin { term, layer, what: if values.finite { "gradient" } else { "loss" } });
            }
        }
        Ok(Origin { term: None, layer: first, what: "loss" })
    }
}

/// Remembers the first node whose value is not finite.
fn note_first(first: &mut Option<String>, node: &Node, value: &dyn Fn() -> Vec<f32>) {
    if first.is_none() && !all_finite(&value()) {
        let op = node.op().map_or("input", Op::name);
        *first = Some(format!("`{}` ({op})", node.label));
    }
}
