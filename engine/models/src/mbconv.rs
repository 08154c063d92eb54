//! Mobile inverted bottlenecks (Sandler et al. 2018) with the layers, names and initialisation of timm's
//! `mobilenetv3_*` and `efficientnet_*`: a stem, stages of blocks under `blocks.{stage}.{block}`.

use mcpipe_graph::{Activation, ConvArgs, GraphBuilder, Init, Path, Tensor};

use crate::backbone::{TapInfo, Taps};
use crate::error::ModelError;
use crate::layers::{SqueezeExcite, conv_bn, drop_path_rates, strided};

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

/// A block's squeeze-and-excitation by `conv_reduce` and `conv_expand`.
pub(crate) fn squeeze_excite(reduced: usize, act: Activation, gate: Activation) -> SqueezeExcite {
    let names = ["conv_reduce", "conv_expand"];
    SqueezeExcite { names, reduced, act, gate, weight: Init::KaimingFanOut { groups: 1 }, bias: |_| Init::Zeros }
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
            Some(se) => se.build(g, &path.at("se"), &x_bhwc),
            None => Ok(x_bhwc),
        }
    }
}

impl Trunk {
    /// Sets the blocks' rates of stochastic depth: timm's rule for these families, `rate · i/n` for block i of n.
    pub(crate) fn with_drop_path(mut self, rate: f64) -> Self {
        let blocks = self.stages.iter().map(Vec::len).sum::<usize>();
        // As if one block more followed.
        for (block, rate) in self.stages.iter_mut().flatten().zip(drop_path_rates(rate, blocks + 1)) {
            block.drop_path = rate;
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
        let mut side = strided(image_size, 2);
        let mut taps = vec![TapInfo::map("bn1", side, self.stem)];
        for (i, stage) in self.stages.iter().enumerate() {
            let mut channels = self.stem;
            for block in stage {
                (side, channels) = (strided(side, block.stride), block.out);
            }
            taps.push(TapInfo::map(format!("blocks.{i}"), side, channels));
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

/// Refuses kernels that have no centre.
pub(crate) fn odd(param: &'static str, kernels: &[usize]) -> Result<(), (&'static str, String)> {
    if kernels.iter().all(|k| !k.is_multiple_of(2) && *k <= 63) {
        Ok(())
    } else {
        Err((param, "must be odd, 63 at most".into()))
    }
}
