//! Layers that several backbones share.

use mcpipe_graph::{Activation, BatchNormArgs, ConvArgs, GraphBuilder, Init, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;

/// Activation of a convolutional backbone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum ConvActivation {
    /// max(x, 0).
    Relu,
    /// min(max(x, 0), 6).
    Relu6,
    /// x·σ(x).
    Silu,
    /// x·Φ(x) with the exact normal distribution function.
    Gelu,
}

impl From<ConvActivation> for Activation {
    fn from(act: ConvActivation) -> Activation {
        match act {
            ConvActivation::Relu => Activation::Relu,
            ConvActivation::Relu6 => Activation::Relu6,
            ConvActivation::Silu => Activation::Silu,
            ConvActivation::Gelu => Activation::Gelu,
        }
    }
}

/// Convolution and batch norm with an activation.
pub(crate) fn conv_bn(
    g: &mut GraphBuilder,
    conv: &Path,
    bn: &Path,
    x_bhwc: &Tensor,
    a: ConvArgs,
    act: Activation,
) -> Result<Tensor, ModelError> {
    let y = g.conv2d(conv, x_bhwc, a)?;
    Ok(g.batch_norm(bn, &y, BatchNormArgs::new(act))?)
}

/// [`conv_bn`] at `{path}.conv` and `{path}.bn`.
pub(crate) fn conv_norm_act(
    g: &mut GraphBuilder,
    path: &Path,
    x_bhwc: &Tensor,
    a: ConvArgs,
    act: Activation,
) -> Result<Tensor, ModelError> {
    conv_bn(g, &path.at("conv"), &path.at("bn"), x_bhwc, a, act)
}

/// A convolution with its own initialisation of weight and bias.
pub(crate) fn conv2d_with(
    g: &mut GraphBuilder,
    path: &Path,
    x_bhwc: &Tensor,
    a: ConvArgs,
    weight: Init,
    bias: Init,
) -> Result<Tensor, ModelError> {
    let c_in = x_bhwc.shape().last().copied().unwrap_or(0);
    // Declared first: `conv2d` finds them with the initialisation given here.
    g.param(&path.at("weight"), &[a.out, c_in / a.groups.max(1), a.kernel, a.kernel], weight)?;
    if a.bias {
        g.param(&path.at("bias"), &[a.out], bias)?;
    }
    Ok(g.conv2d(path, x_bhwc, a)?)
}

/// PyTorch's default initialisation of the bias of a layer with `fan_in` inputs to an output.
pub(crate) fn torch_bias(fan_in: usize) -> Init {
    Init::Uniform((fan_in.max(1) as f32).sqrt().recip())
}

/// A 1x1 convolution of the last axis, whose weight is `[out, in, 1, 1]`, with bias.
pub(crate) fn pointwise(
    g: &mut GraphBuilder,
    path: &Path,
    x: &Tensor,
    out: usize,
    weight: Init,
) -> Result<Tensor, ModelError> {
    let c_in = x.shape().last().copied().unwrap_or(0);
    let w = g.param(&path.at("weight"), &[out, c_in, 1, 1], weight)?;
    let w = g.reshape(&w, &[out, c_in])?;
    let b = g.param(&path.at("bias"), &[out], Init::Zeros)?;
    Ok(g.linear_with(x, &w, Some(&b))?)
}

/// `x ∘ s` with the layer scale s, a parameter `[C, 1, 1]` at `path` (Touvron et al. 2021, arXiv:2103.17239, §2).
pub(crate) fn layer_scale(g: &mut GraphBuilder, path: &Path, x: &Tensor, init: f32) -> Result<Tensor, ModelError> {
    let c = x.shape().last().copied().unwrap_or(0);
    let scale = g.param(path, &[c, 1, 1], Init::Constant(init))?;
    let scale = g.reshape(&scale, &[c])?;
    Ok(g.scale_channels(x, &scale)?)
}

/// Squeeze-and-excitation (Hu et al. 2018, arXiv:1709.01507): the pooled map goes through two 1x1 convolutions to a
/// factor for each channel.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SqueezeExcite {
    /// Names of the convolutions.
    pub(crate) names: [&'static str; 2],
    /// Channels between them.
    pub(crate) reduced: usize,
    /// Activation between them.
    pub(crate) act: Activation,
    /// Activation that gives the factors.
    pub(crate) gate: Activation,
    /// Initialisation of their weights.
    pub(crate) weight: Init,
    /// Initialisation of a bias by its layer's inputs to an output.
    pub(crate) bias: fn(usize) -> Init,
}

impl SqueezeExcite {
    /// Scales the channels of `x_bhwc`.
    pub(crate) fn build(&self, g: &mut GraphBuilder, path: &Path, x_bhwc: &Tensor) -> Result<Tensor, ModelError> {
        let (batch, c) = (x_bhwc.shape()[0], x_bhwc.shape()[3]);
        let pooled = g.global_avg_pool(x_bhwc)?;
        let mut s = g.reshape(&pooled, &[batch, 1, 1, c])?;
        for (name, c_in, out, act) in
            [(self.names[0], c, self.reduced, self.act), (self.names[1], self.reduced, c, self.gate)]
        {
            let conv = ConvArgs { bias: true, ..ConvArgs::new(out, 1) };
            s = conv2d_with(g, &path.at(name), &s, conv, self.weight, (self.bias)(c_in))?;
            s = g.activation(&s, act);
        }
        let s_bc = g.reshape(&s, &[batch, c])?;
        Ok(g.scale_channels(x_bhwc, &s_bc)?)
    }
}

/// Stochastic depth's rates block by block, from 0 at the first to `last` at the last (Huang et al. 2016, §3).
pub(crate) fn drop_path_rates(last: f64, blocks: usize) -> impl Iterator<Item = f32> {
    (0..blocks).map(move |i| (last * i as f64 / (blocks.max(2) - 1) as f64) as f32)
}

/// `n · factor`, cut to an integer as timm does.
pub(crate) fn scaled(n: usize, factor: f64) -> usize {
    (n as f64 * factor) as usize
}

/// Channels rounded to a multiple of 8, not below 90 % of `v` (MobileNetV2's rule, as timm's `make_divisible`).
pub(crate) fn divisible_by_8(v: f64) -> usize {
    let rounded = (((v + 4.0) as usize) / 8 * 8).max(8);
    if (rounded as f64) < 0.9 * v { rounded + 8 } else { rounded }
}

/// Side of the map after a convolution whose odd kernel is padded by its half.
pub(crate) fn strided(side: usize, stride: usize) -> usize {
    (side - 1) / stride + 1
}

/// Refuses an image that would vanish on its way.
pub(crate) fn check_reduction(backbone: &'static str, reduction: usize, size: usize) -> Result<(), ModelError> {
    if size < reduction {
        let message = format!("it halves the image down to 1/{reduction}, so the side is {reduction} or more");
        return Err(ModelError::ImageSize { backbone: backbone.to_owned(), size, message });
    }
    Ok(())
}

/// Refuses an image that is no whole number of patches.
pub(crate) fn check_patches(backbone: &'static str, patch: usize, size: usize) -> Result<(), ModelError> {
    if size == 0 || !size.is_multiple_of(patch) {
        let message = format!("the side is a multiple of its {patch}-pixel patches");
        return Err(ModelError::ImageSize { backbone: backbone.to_owned(), size, message });
    }
    Ok(())
}
