//! SigLIP's own loss (Zhai et al. 2023, eq. 1): each image–text pair is judged by itself, a match or none, against labels
//! that are the identity unless Mixup or CutMix blends images or a caption comes twice.

use mcpipe_cpu::sigmoid_loss::SigmoidLoss;
use mcpipe_graph::{GraphBuilder, Tensor};
use mcpipe_models::ModelError;

use super::BatchContext;

/// Name of the term in metrics.
pub const SIGLIP: &str = "siglip";

pub(crate) fn siglip_loss(
    g: &mut GraphBuilder,
    c: &BatchContext,
    bias: &Tensor,
    pairs: &Tensor,
) -> Result<Tensor, ModelError> {
    let d = SigmoidLoss { rows: c.batch, cols: c.batch, dim: c.image_bd.shape()[1] };
    Ok(g.sigmoid_loss(d, &c.image_bd, &c.text_bd, [&c.scale, bias], pairs)?)
}
