//! Layers that several backbones share.

use mcpipe_graph::{Activation, ConvArgs, GraphBuilder, Init, Path, Tensor};

use crate::error::ModelError;

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

/// Squeeze-and-excitation (Hu et al. 2018) by 1x1 convolutions `{path}.fc1` to `reduced` channels and `{path}.fc2`
/// back, with PyTorch's default initialisation.
pub(crate) fn squeeze_excite(
    g: &mut GraphBuilder,
    path: &Path,
    x_bhwc: &Tensor,
    reduced: usize,
) -> Result<Tensor, ModelError> {
    let (batch, c) = (x_bhwc.shape()[0], x_bhwc.shape()[3]);
    let pooled = g.global_avg_pool(x_bhwc)?;
    let s = g.reshape(&pooled, &[batch, 1, 1, c])?;
    let conv = |out: usize| ConvArgs { bias: true, ..ConvArgs::new(out, 1) };
    let s = conv2d_with(g, &path.at("fc1"), &s, conv(reduced), Init::FanInUniform, torch_bias(c))?;
    let s = g.activation(&s, Activation::Relu);
    let s = conv2d_with(g, &path.at("fc2"), &s, conv(c), Init::FanInUniform, torch_bias(reduced))?;
    let s = g.activation(&s, Activation::Sigmoid);
    let s_bc = g.reshape(&s, &[batch, c])?;
    Ok(g.scale_channels(x_bhwc, &s_bc)?)
}

/// Stochastic depth's rates block by block, from 0 at the first to `last` at the last (Huang et al. 2016, §3).
pub(crate) fn drop_path_rates(last: f64, depths: &[usize]) -> Vec<f32> {
    let blocks: usize = depths.iter().sum();
    (0..blocks).map(|i| (last * i as f64 / (blocks.max(2) - 1) as f64) as f32).collect()
}
