//! RepMixer blocks over the tokens of a text (FastViT's, Vasu et al. 2023, in the form of MobileCLIP's text tower, Vasu
//! et al. 2024, §4.1), in the branches that training has. Names within a block are Apple's.

use mcpipe_graph::{Activation, BatchNormArgs, GraphBuilder, Init, Path, Tensor};

use crate::error::ModelError;

/// Layer scale's first value.
const LAYER_SCALE: f32 = 1e-5;
/// Hidden width of the feed-forward part per width.
const MLP_RATIO: usize = 4;
/// Deviation of the feed-forward part's first weights.
const STD: f32 = 0.02;

fn batch_norm(g: &mut GraphBuilder, path: &Path, x: &Tensor) -> Result<Tensor, ModelError> {
    Ok(g.batch_norm(path, x, BatchNormArgs::new(Activation::Identity))?)
}

/// `x + scale ∘ y` with the layer scale `{path}.layer_scale [C, 1, 1]`.
fn add_scaled(g: &mut GraphBuilder, path: &Path, x: &Tensor, y: &Tensor) -> Result<Tensor, ModelError> {
    let c = x.shape()[2];
    let scale = g.param(&path.at("layer_scale"), &[c, 1, 1], Init::Constant(LAYER_SCALE))?;
    let scale = g.reshape(&scale, &[c])?;
    let y = g.scale_channels(y, &scale)?;
    Ok(g.add(x, &y)?)
}

/// A 1x1 convolution `{path}.{weight [out, in, 1, 1], bias}`, which over tokens is a linear map.
fn pointwise(g: &mut GraphBuilder, path: &Path, x: &Tensor, out: usize) -> Result<Tensor, ModelError> {
    let c = x.shape()[2];
    let w = g.param(&path.at("weight"), &[out, c, 1, 1], Init::Normal(STD))?;
    let w = g.reshape(&w, &[out, c])?;
    let b = g.param(&path.at("bias"), &[out], Init::Zeros)?;
    Ok(g.linear_with(x, &w, Some(&b))?)
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
    let y = g.token_conv(&ffn.at("conv.conv"), &x_bnc, kernel, Init::Normal(STD))?;
    let y = batch_norm(g, &ffn.at("conv.bn"), &y)?;
    let y = pointwise(g, &ffn.at("fc1"), &y, MLP_RATIO * width)?;
    let y = g.activation(&y, Activation::Gelu);
    let y = pointwise(g, &ffn.at("fc2"), &y, width)?;
    add_scaled(g, path, &x_bnc, &y)
}
