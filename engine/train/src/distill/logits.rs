//! The logits level: the student's image–text similarities follow the teachers' (MobileCLIP, Vasu et al. 2024; CLIP-KD's
//! contrastive relational distillation, Yang et al. 2024).

use mcpipe_cpu::loss::Contrastive;
use mcpipe_graph::{GraphBuilder, Tensor};
use mcpipe_models::ModelError;
use mcpipe_spec::params_schema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BatchContext, Level, LevelEntry, Problem, make};
use crate::tower::{StudentShape, TeacherShape};

/// Similarities within the batch: ½[KL(p ‖ softmax S) by rows + the same by columns], with S the student's scaled
/// image–text cosines and p the mean over the teachers of softmax T. T are a teacher's scaled image–text cosines;
/// text–text for a teacher of text only, image–image for one of images only.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Logits {
    /// Softens both sides: logits are divided by it and the loss multiplied by its square (Hinton et al. 2015).
    #[schemars(range(max = 1000.0), extend("exclusiveMinimum" = 0))]
    pub temperature: f64,
}

impl Default for Logits {
    fn default() -> Self {
        Logits { temperature: 1.0 }
    }
}

pub(super) const ENTRY: LevelEntry = LevelEntry {
    name: "logits",
    summary: "similarities within the batch follow the mean of the teachers' (KL both ways)",
    params: params_schema::<Logits>,
    make: make::<Logits>,
};

impl Level for Logits {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn accepts(&self, _: &StudentShape, teacher: &TeacherShape) -> bool {
        teacher.image.is_some() || teacher.text.is_some()
    }

    fn check(&self, student: &StudentShape, teachers: &[&TeacherShape]) -> Vec<Problem> {
        let mut problems = Vec::new();
        if !(self.temperature.is_finite() && self.temperature > 0.0) {
            problems.push(Problem::new(&["temperature"], "the temperature is a positive number"));
        }
        for t in teachers.iter().filter(|t| !self.accepts(student, t)) {
            problems.push(Problem::new(
                &["teachers"],
                format!("teacher `{}` has neither an image nor a text tower", t.name),
            ));
        }
        for t in teachers {
            if let (Some(image), Some(text)) = (&t.image, t.text)
                && image.dim != text
            {
                let reason = format!(
                    "teacher `{}`'s image embedding has dimension {}, its text embedding {text}",
                    t.name, image.dim
                );
                problems.push(Problem::new(&["teachers"], reason));
            }
        }
        problems
    }

    fn relational_temperature(&self) -> Option<f32> {
        Some(self.temperature as f32)
    }

    fn batch_loss(&self, g: &mut GraphBuilder, c: &BatchContext) -> Result<Option<Tensor>, ModelError> {
        let temperature = self.temperature as f32;
        let mut mean: Option<[Tensor; 2]> = None;
        for teacher in &c.teachers {
            let Some((a_bd, b_bd)) = teacher.sides(g) else { continue };
            let rows = g.matmul(&a_bd, false, &b_bd, true, 1.0)?;
            let columns = g.matmul(&b_bd, false, &a_bd, true, 1.0)?;
            let p = [g.softmax(&rows, temperature), g.softmax(&columns, temperature)];
            mean = Some(match mean {
                None => p,
                Some([r, l]) => [g.add(&r, &p[0])?, g.add(&l, &p[1])?],
            });
        }
        let Some([mut rows, mut columns]) = mean else {
            return Err(ModelError::Dims("the logits level has no teacher".into()));
        };
        if c.teachers.len() > 1 {
            let share = 1.0 / c.teachers.len() as f32;
            rows = g.scale(&rows, share);
            columns = g.scale(&columns, share);
        }
        let dim = c.image_bd.shape()[1];
        let d = Contrastive { rows: c.batch, cols: c.batch, dim, w_row: 0.5, w_col: 0.5, subtract_entropy: true };
        let scale = if temperature == 1.0 { c.scale.clone() } else { g.scale(&c.scale, 1.0 / temperature) };
        let kl = g.contrastive(d, &c.image_bd, &c.text_bd, &scale, [&rows, &columns])?;
        Ok(Some(if temperature == 1.0 { kl } else { g.scale(&kl, temperature * temperature) }))
    }
}
