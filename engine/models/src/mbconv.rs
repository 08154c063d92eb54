//! Mobile inverted bottlenecks (Sandler et al. 2018) with the layers, names and initialisation of timm's
//! `mobilenetv3_*` and `efficientnet_*`: a stem, stages of blocks under `blocks.{stage}.{block}`.

use mcpipe_graph::{Activation, BatchNormArgs, ConvArgs, GraphBuilder, Init, Path, Tensor};

use crate::backbone::{TapInfo, TapShape, Taps};
use crate::error::ModelError;
use crate::mobilevit::strided;

/// Squeeze-and-excitation (Hu et al. 2018) of a block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct SqueezeExcite {
    /// Channels between its two layers.
    pub(crate) reduced: usize,
    /// Activation between them.
    pub(crate) act: Activation,
    /// Activation that gives the factors.
    pub(crate) gate: Activation,
}

/// What a block does.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Kind {
    /// Depthwise, then 1x1.
    Separable,
    /// 1x1 to so many hidden channels, depthwise, 1x1.
    Inverted(usize),
    /// One dense convolution.
    Dense,
}

/// One block.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Block {
    pub(crate) kind: Kind,
    /// Side of the spatial kernel; odd.
    pub(crate) kernel: usize,
    pub(crate) stride: usize,
    /// Output channels.
    pub(crate) out: usize,
    pub(crate) act: Activation,
    pub(crate) se: Option<SqueezeExcite>,
    /// Rate of stochastic depth of its branch.
    pub(crate) drop_path: f32,
}

/// A stem and stages of blocks.
#[derive(Clone, Debug)]
pub(crate) struct Trunk {
    /// Channels of the 3x3 stem, which halves the image.
    pub(crate) stem: usize,
    /// Activation of the stem.
    pub(crate) act: Activation,
    pub(crate) stages: Vec<Vec<Block>>,
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

/// `{path}.conv_reduce` and `{path}.conv_expand` on the pooled map, whose gate scales the channels.
fn squeeze_excite(g: &mut GraphBuilder, path: &Path, x_bhwc: &Tensor, a: SqueezeExcite) -> Result<Tensor, ModelError> {
    let (batch, c) = (x_bhwc.shape()[0], x_bhwc.shape()[3]);
    let pooled = g.global_avg_pool(x_bhwc)?;
    let s = g.reshape(&pooled, &[batch, 1, 1, c])?;
    let biased = |out: usize| ConvArgs { bias: true, ..ConvArgs::new(out, 1) };
    let s = g.conv2d(&path.at("conv_reduce"), &s, biased(a.reduced))?;
    let s = g.activation(&s, a.act);
    let s = g.conv2d(&path.at("conv_expand"), &s, biased(c))?;
    let s = g.activation(&s, a.gate);
    let s_bc = g.reshape(&s, &[batch, c])?;
    Ok(g.scale_channels(x_bhwc, &s_bc)?)
}

impl Block {
    /// The block over `x_bhwc`; added to its input where the shape stays (not so the dense one).
    fn build(&self, g: &mut GraphBuilder, path: &Path, x_bhwc: &Tensor) -> Result<Tensor, ModelError> {
        let c_in = x_bhwc.shape()[3];
        let at = |name: &str| path.at(name);
        let depthwise = |c: usize| ConvArgs::new(c, self.kernel).stride(self.stride).groups(c);
        let project = ConvArgs::new(self.out, 1);
        let y = match self.kind {
            Kind::Dense => {
                let conv = ConvArgs::new(self.out, self.kernel).stride(self.stride);
                return conv_bn(g, &at("conv"), &at("bn1"), x_bhwc, conv, self.act);
            }
            Kind::Separable => {
                let y = conv_bn(g, &at("conv_dw"), &at("bn1"), x_bhwc, depthwise(c_in), self.act)?;
                let y = self.excite(g, path, y)?;
                conv_bn(g, &at("conv_pw"), &at("bn2"), &y, project, Activation::Identity)?
            }
            Kind::Inverted(hidden) => {
                let y = conv_bn(g, &at("conv_pw"), &at("bn1"), x_bhwc, ConvArgs::new(hidden, 1), self.act)?;
                let y = conv_bn(g, &at("conv_dw"), &at("bn2"), &y, depthwise(hidden), self.act)?;
                let y = self.excite(g, path, y)?;
                conv_bn(g, &at("conv_pwl"), &at("bn3"), &y, project, Activation::Identity)?
            }
        };
        if self.stride != 1 || c_in != self.out {
            return Ok(y);
        }
        let y = g.drop_path(&y, self.drop_path)?;
        Ok(g.add(&y, x_bhwc)?)
    }

    fn excite(&self, g: &mut GraphBuilder, path: &Path, x_bhwc: Tensor) -> Result<Tensor, ModelError> {
        match self.se {
            Some(se) => squeeze_excite(g, &path.at("se"), &x_bhwc, se),
            None => Ok(x_bhwc),
        }
    }
}

impl Trunk {
    /// Sets the blocks' rates of stochastic depth: timm's rule for these families, `rate · i/n` for block i of n.
    pub(crate) fn with_drop_path(mut self, rate: f64) -> Self {
        let blocks = self.stages.iter().map(Vec::len).sum::<usize>().max(1);
        for (i, block) in self.stages.iter_mut().flatten().enumerate() {
            block.drop_path = (rate * i as f64 / blocks as f64) as f32;
        }
        self
    }

    /// How far the map is smaller than the image.
    pub(crate) fn reduction(&self) -> usize {
        2 * self.stages.iter().flatten().map(|b| b.stride).product::<usize>()
    }

    /// Channels of the last map.
    pub(crate) fn channels(&self) -> usize {
        self.stages.iter().flatten().last().map_or(self.stem, |b| b.out)
    }

    /// Taps of the stem (`bn1`) and of each stage (`blocks.{i}`), and the side of the last map.
    pub(crate) fn taps(&self, image_size: usize) -> (Vec<TapInfo>, usize) {
        let map = |name: String, side: usize, channels: usize| TapInfo {
            name,
            shape: TapShape::Image { height: side, width: side, channels },
        };
        let mut side = strided(image_size, 2);
        let mut taps = vec![map("bn1".into(), side, self.stem)];
        for (i, stage) in self.stages.iter().enumerate() {
            let mut channels = self.stem;
            for block in stage {
                (side, channels) = (strided(side, block.stride), block.out);
            }
            taps.push(map(format!("blocks.{i}"), side, channels));
        }
        (taps, side)
    }

    /// The trunk over an image, with its taps.
    pub(crate) fn build(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        image: &Tensor,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor, ModelError> {
        let stem = ConvArgs::new(self.stem, 3).stride(2);
        let mut x_bhwc = conv_bn(g, &path.at("conv_stem"), &path.at("bn1"), image, stem, self.act)?;
        taps.add("bn1", &x_bhwc);
        for (i, stage) in self.stages.iter().enumerate() {
            for (j, block) in stage.iter().enumerate() {
                x_bhwc = block.build(g, &path.at("blocks").at(i).at(j), &x_bhwc)?;
            }
            taps.add(&format!("blocks.{i}"), &x_bhwc);
        }
        Ok(x_bhwc)
    }
}

/// `{path}.classifier` to `dim` outputs, where a head was asked for, initialised as timm does for these families.
pub(crate) fn classifier(
    g: &mut GraphBuilder,
    path: &Path,
    features: &Tensor,
    dim: Option<usize>,
) -> Result<Tensor, ModelError> {
    match dim {
        Some(dim) => {
            let init = Init::Uniform((dim.max(1) as f32).sqrt().recip());
            Ok(g.linear(&path.at("classifier"), features, dim, true, init)?)
        }
        None => Ok(features.clone()),
    }
}

/// Refuses an image that would vanish on its way.
pub(crate) fn check_reduction(backbone: &'static str, reduction: usize, size: usize) -> Result<(), ModelError> {
    if size < reduction {
        let message = format!("it halves the image down to 1/{reduction}, so the side is {reduction} or more");
        return Err(ModelError::ImageSize { backbone: backbone.to_owned(), size, message });
    }
    Ok(())
}

/// Refuses kernels that have no centre.
pub(crate) fn odd(param: &'static str, kernels: &[usize]) -> Result<(), (&'static str, String)> {
    if kernels.iter().all(|k| !k.is_multiple_of(2) && *k <= 63) {
        Ok(())
    } else {
        Err((param, "must be odd, 63 at most".into()))
    }
}
