//! Finding what left the finite range first.

use mcpipe_cpu::optim::all_finite;
use mcpipe_graph::{Node, Op, ParamStore};

use crate::batch::Batch;
use crate::ema::Average;
use crate::error::{Origin, TrainError};
use crate::setup::TeacherModel;
use crate::step::{Step, Values};

impl Step {
    /// The name of the first loss term or parameter that is not finite after a pass; nothing is run again.
    pub(crate) fn blame(&self, values: &Values, weights: &[f64], store: &ParamStore) -> Origin {
        let bad = values.terms.iter().zip(weights).position(|(v, w)| *w != 0.0 && !v.is_finite());
        if let Some(slot) = bad {
            return Origin { term: Some(self.names()[slot].clone()), layer: None, what: "loss" };
        }
        Origin { term: None, layer: self.bad_gradient(store), what: "gradient" }
    }

    /// The parameter nearest to the losses whose gradient is not finite.
    fn bad_gradient(&self, store: &ParamStore) -> Option<String> {
        let bad = |name: &str| store.index(name).is_some_and(|i| !all_finite(&self.grads.all()[i]));
        let params = self.graphs.trained().into_iter().rev().flat_map(|g| g.params().iter().rev());
        params.map(|p| p.name.clone()).find(|name| bad(name))
    }

    /// Runs the batch again, watching every value, to name what left the finite range first.
    pub(crate) fn diagnose(
        &mut self,
        store: &mut ParamStore,
        averages: &[Average],
        batch: &Batch,
        step: u64,
        weights: &[f64],
    ) -> Result<Origin, TrainError> {
        let found = |what, layer: String| Ok(Origin { term: None, layer: Some(layer), what });
        for (v, view) in batch.views.iter().enumerate() {
            if !all_finite(view) {
                return found("image", format!("view {v} of the batch"));
            }
        }
        if let Some(p) = store.params().iter().find(|p| !all_finite(&p.data)) {
            return found("weight", format!("`{}`", p.name));
        }
        self.prepare_text(batch)?;
        self.run_teachers(averages, batch)?;
        let bad_teacher = |average: bool| {
            let bad = self.teachers.iter().find(|run| {
                let teacher = &self.setup.teachers[run.plan.teacher];
                matches!(teacher.model, TeacherModel::Average { .. }) == average
                    && !(all_finite(&run.image) && all_finite(&run.text))
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
            self.watch_part(store, batch, part, true, &mut watch)?;
        }
        if let (None, Some(teacher)) = (&first, average) {
            return found("embedding", teacher);
        }
        let mut watch = |node: &Node, value: &dyn Fn() -> Vec<f32>| note_first(&mut first, node, value);
        self.first_forward(store, batch)?;
        self.watch_losses(store, batch, &mut watch)?;
        // Each term by itself: the first whose loss or gradient is not finite.
        let alone = |slot: usize| -> Vec<f64> {
            weights.iter().enumerate().map(|(i, w)| if i == slot { *w } else { 0.0 }).collect()
        };
        for slot in (0..weights.len()).filter(|&s| weights[s] != 0.0) {
            let own = alone(slot);
            let values = self.run(store, averages, batch, step, &own)?;
            let blame = self.blame(&values, &own, store);
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
