//! RepMixer blocks over the tokens of a text (FastViT's, Vasu et al. 2023, in the form of MobileCLIP's text tower, Vasu
//! et al. 2024, §4.1), in the branches that training has. Names within a block are Apple's.

use mcpipe_graph::{Activation, BatchNormArgs, GraphBuilder, Init, Path, Tensor};

use crate::error::ModelError;
use crate::layers::{layer_scale, pointwise};

/// Layer scale's first value.
const LAYER_SCALE: f32 = 1e-5;
/// Hidden width of the feed-forward part per width.
const MLP_RATIO: usize = 4;
/// Initialisation of the feed-forward part's weights.
const WEIGHT: Init = Init::Normal(0.02);

fn batch_norm(g: &mut GraphBuilder, path: &Path, x: &Tensor) -> Result<Tensor, ModelError> {
    Ok(g.batch_norm(path, x, BatchNormArgs::new(Activation::Identity))?)
}

/// `x + s ∘ y` with the layer scale s.
fn add_scaled(g: &mut GraphBuilder, path: &Path, x: &Tensor, y: &Tensor) -> Result<Tensor, ModelError> {
    let y = layer_scale(g, &path.at("layer_scale"), y, LAYER_SCALE)?;
    Ok(g.add(x, &y)?)
}

/// The block over `x [B, N, C]`: the token mixer x + s∘(mixer(x) − norm(x)), then x + s∘convffn(x), with depthwise
/// convolutions of `kernel` tokens.
pub(crate) fn text_block(
    g: &mut GraphBuilder,
    path: &Path,
    x_bnc: &Tensor,
    kernel: usize,
) -> Result<Tensor, ModelError> {
    let width = x_bnc.shape()[2];
    let mixer = path.at("token_mixer");
    let conv = g.token_conv(&mixer.at("mixer.rbr_conv.0.conv"), x_bnc, kernel, Init::FanInUniform)?;
    let conv = batch_norm(g, &mixer.at("mixer.rbr_conv.0.bn"), &conv)?;
    let skip = batch_norm(g, &mixer.at("mixer.rbr_skip"), x_bnc)?;
    let mixed = g.add(&conv, &skip)?;
    let norm = batch_norm(g, &mixer.at("norm.rbr_skip"), x_bnc)?;
    let norm = g.scale(&norm, -1.0);
    let change = g.add(&mixed, &norm)?;
    let x_bnc = add_scaled(g, &mixer, x_bnc, &change)?;

    let ffn = path.at("convffn");
    let y = g.token_conv(&ffn.at("conv.conv"), &x_bnc, kernel, WEIGHT)?;
    let y = batch_norm(g, &ffn.at("conv.bn"), &y)?;
    let y = pointwise(g, &ffn.at("fc1"), &y, MLP_RATIO * width, WEIGHT)?;
    let y = g.activation(&y, Activation::Gelu);
    let y = pointwise(g, &ffn.at("fc2"), &y, width, WEIGHT)?;
    add_scaled(g, path, &x_bnc, &y)
}
