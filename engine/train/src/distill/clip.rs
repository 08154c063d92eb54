//! CLIP's own loss (Radford et al. 2021): ½[CE(s·f_i·f_tᵀ) + CE of the transpose] against soft targets, which are the
//! identity unless Mixup or CutMix blends images or a caption comes twice.

use mcpipe_cpu::loss::Contrastive;
use mcpipe_graph::{GraphBuilder, Tensor};
use mcpipe_models::ModelError;

use super::BatchContext;

/// Name of the term in metrics.
pub const CLIP: &str = "clip";

pub(crate) fn clip_loss(g: &mut GraphBuilder, c: &BatchContext) -> Result<Tensor, ModelError> {
    let dim = c.image_bd.shape()[1];
    let d = Contrastive { rows: c.batch, cols: c.batch, dim, w_row: 0.5, w_col: 0.5, subtract_entropy: false };
    let [rows, columns] = c.targets(g);
    Ok(g.contrastive(d, &c.image_bd, &c.text_bd, &c.scale, [&rows, &columns])?)
}
