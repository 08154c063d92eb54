//! The projection level: the student's embeddings come to lie where the teacher's do (CLIP-KD's feature distillation,
//! Yang et al. 2024).

use mcpipe_graph::{GraphBuilder, Init, Path, Tensor};
use mcpipe_models::ModelError;
use mcpipe_spec::params_schema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{BatchContext, Level, LevelEntry, Problem, make};
use crate::tower::{StudentShape, TeacherShape};

/// Embeddings: MSE of the normalised student and teacher embeddings, through a trained linear map where their dimensions
/// differ; mean over the teachers. CLIP-KD's weight is 2000.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Projection {
    /// Compare the text embeddings too, where the student's are trained and the teacher has some.
    pub text: bool,
}

impl Default for Projection {
    fn default() -> Self {
        Projection { text: true }
    }
}

pub(super) const ENTRY: LevelEntry = LevelEntry {
    name: "projection",
    summary: "the student's embeddings match the teacher's (MSE, a linear map where dimensions differ)",
    params: params_schema::<Projection>,
    make: make::<Projection>,
};

/// `x` in a teacher's space: itself where the dimension fits, else the normalised image of a trained linear map.
pub(super) fn to_teacher(g: &mut GraphBuilder, path: &Path, x_bd: &Tensor, dim: usize) -> Result<Tensor, ModelError> {
    let own = x_bd.shape()[1];
    if own == dim {
        return Ok(x_bd.clone());
    }
    let mapped = g.linear(path, x_bd, dim, false, Init::Normal((own.max(1) as f32).powf(-0.5)))?;
    Ok(g.l2_normalize(&mapped))
}

/// The mean of scalars.
pub(super) fn mean(g: &mut GraphBuilder, losses: &[Tensor]) -> Result<Option<Tensor>, ModelError> {
    let Some((first, rest)) = losses.split_first() else { return Ok(None) };
    let mut sum = first.clone();
    for loss in rest {
        sum = g.add(&sum, loss)?;
    }
    Ok(Some(if rest.is_empty() { sum } else { g.scale(&sum, 1.0 / losses.len() as f32) }))
}

impl Level for Projection {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn accepts(&self, _: &StudentShape, teacher: &TeacherShape) -> bool {
        teacher.image.is_some()
    }

    fn check(&self, _: &StudentShape, teachers: &[&TeacherShape]) -> Vec<Problem> {
        let lacking = teachers.iter().filter(|t| t.image.is_none());
        lacking.map(|t| Problem::new(&["teachers"], format!("teacher `{}` has no image tower", t.name))).collect()
    }

    fn batch_loss(&self, g: &mut GraphBuilder, c: &BatchContext) -> Result<Option<Tensor>, ModelError> {
        let mut losses = Vec::new();
        for teacher in &c.teachers {
            let path = c.path.at(&teacher.name);
            let Some(theirs_bd) = teacher.image_bd(g) else { continue };
            let ours_bd = to_teacher(g, &path.at("image"), &c.image_bd, theirs_bd.shape()[1])?;
            let mut loss = g.mse(&ours_bd, &theirs_bd)?;
            if self.text
                && c.text_trained
                && let Some(theirs_bd) = teacher.text_bd(g)
            {
                let ours_bd = to_teacher(g, &path.at("text"), &c.text_bd, theirs_bd.shape()[1])?;
                let text = g.mse(&ours_bd, &theirs_bd)?;
                loss = g.add(&loss, &text)?;
            }
            losses.push(loss);
        }
        mean(g, &losses)
    }
}
