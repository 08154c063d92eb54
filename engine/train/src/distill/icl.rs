//! Interactive contrastive learning (CLIP-KD's ICL, Yang et al. 2024): each side of the student is contrasted with the
//! other side of the teacher.

use mcpipe_cpu::loss::Contrastive;
use mcpipe_graph::{GraphBuilder, Tensor};
use mcpipe_models::ModelError;
use mcpipe_spec::{NoParams, params_schema};

use super::projection::{mean, to_teacher};
use super::{BatchContext, Level, LevelEntry, Problem};
use crate::tower::{StudentShape, TeacherShape};

/// ½[CE(s·f_image^S · f_text^T) + CE(s·f_text^S · f_image^T)] with the batch's targets, through a trained linear map where
/// dimensions differ; mean over the teachers.
#[derive(Clone, Copy, Debug, Default)]
pub struct Interactive;

pub(super) const ENTRY: LevelEntry = LevelEntry {
    name: "icl",
    summary: "student images against teacher texts and student texts against teacher images (contrastive)",
    params: params_schema::<NoParams>,
    make: |params| {
        params.decode::<NoParams>()?;
        Ok(std::sync::Arc::new(Interactive))
    },
};

impl Level for Interactive {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn accepts(&self, _: &StudentShape, teacher: &TeacherShape) -> bool {
        teacher.image.is_some() && teacher.text.is_some()
    }

    fn check(&self, student: &StudentShape, teachers: &[&TeacherShape]) -> Vec<Problem> {
        let lacking = teachers.iter().filter(|t| !self.accepts(student, t));
        let text = |t: &&&TeacherShape| format!("the level `icl` needs both towers of teacher `{}`", t.name);
        lacking.map(|t| Problem::new(&["teachers"], text(&t))).collect()
    }

    fn batch_loss(&self, g: &mut GraphBuilder, c: &BatchContext) -> Result<Option<Tensor>, ModelError> {
        let mut losses = Vec::new();
        let [image_to_text, text_to_image] = c.targets(g);
        for teacher in &c.teachers {
            let path = c.path.at(&teacher.name);
            let (Some(image_bd), Some(text_bd)) = (teacher.image_bd(g), teacher.text_bd(g)) else { continue };
            // Only rows: the student's side against all of the teacher's.
            let rows = |g: &mut GraphBuilder, ours: &Tensor, theirs: &Tensor, targets: [&Tensor; 2]| {
                let dim = theirs.shape()[1];
                let d =
                    Contrastive { rows: c.batch, cols: c.batch, dim, w_row: 0.5, w_col: 0.0, subtract_entropy: false };
                g.contrastive(d, ours, theirs, &c.scale, targets)
            };
            let ours_bd = to_teacher(g, &path.at("image"), &c.image_bd, text_bd.shape()[1])?;
            let images = rows(g, &ours_bd, &text_bd, [&image_to_text, &text_to_image])?;
            let ours_bd = to_teacher(g, &path.at("text"), &c.text_bd, image_bd.shape()[1])?;
            let texts = rows(g, &ours_bd, &image_bd, [&text_to_image, &image_to_text])?;
            losses.push(g.add(&images, &texts)?);
        }
        mean(g, &losses)
    }
}
