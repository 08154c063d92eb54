//! FastViT (Vasu et al. 2023, arXiv:2303.14189) as MobileCLIP's image towers (Vasu et al. 2024, arXiv:2311.17049), with
//! the layers, names and initialisation of timm's `fastvit_mci0`, `fastvit_mci1` and `fastvit_mci2`, in the training form
//! and folded for inference.
//!
//! Shape suffixes: b batch, h and w height and width, c channels, n positions.

mod blocks;

use mcpipe_graph::{Activation, BatchNormArgs, GraphBuilder, Init, ParamStore, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backbone::{Backbone, IMAGENET, ImageOutputs, Preprocess, TapInfo, TapShape, Taps, image_side};
use crate::error::ModelError;
use crate::layers::{SqueezeExcite, check_reduction, drop_path_rates, layer_scale, scaled, torch_bias};
use crate::params::{Sizes, decode, encode, positive, positive_factor, rate, schema};
use crate::registry::BackboneEntry;
use crate::reparam::{Folded, Folding};

use blocks::{LargeKernel, MobileOne, PositionalEncoding, RepMixer, WEIGHT, conv_mlp};

/// Sizes of a FastViT: a stem that halves the image twice, and four stages of which the last attends.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct FastVitSizes {
    /// Blocks of the four stages.
    #[schemars(inner(range(min = 1, max = 64)))]
    pub layers: [usize; 4],
    /// Channels of the four stages, each a multiple of the one before; the last a multiple of a head's 32.
    #[schemars(inner(range(min = 1, max = 65536)))]
    pub dims: [usize; 4],
    /// Hidden channels of a block's MLP per channel.
    #[schemars(range(min = 0.125, max = 16.0))]
    pub mlp_ratio: f64,
    /// Initial value of the layer scales.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub layer_scale: f64,
    /// Stochastic depth: rate at which the last block's branches are dropped; it rises linearly from the first block's 0.
    #[schemars(range(min = 0.0, max = 0.95))]
    pub drop_path: f64,
    /// Whether the blocks' branches are folded into single convolutions, the form for inference (`mcpipe export
    /// --reparam` folds trained weights).
    pub reparam: bool,
}

impl Sizes for FastVitSizes {
    fn check(&self) -> Result<(), (&'static str, String)> {
        positive("layers", &self.layers)?;
        positive("dims", &self.dims)?;
        positive_factor("mlp_ratio", self.mlp_ratio)?;
        rate("layer_scale", self.layer_scale, 1.0)?;
        rate("drop_path", self.drop_path, 0.95)?;
        if let Some(pair) = self.dims.windows(2).find(|d| !d[1].is_multiple_of(d[0])) {
            return Err(("dims", format!("{} is no multiple of {}", pair[1], pair[0])));
        }
        if !self.dims[3].is_multiple_of(HEAD_DIM) {
            return Err(("dims", format!("the last, {}, is no multiple of a head's {HEAD_DIM}", self.dims[3])));
        }
        if self.dims.iter().any(|&d| self.hidden(d) == 0) {
            return Err(("mlp_ratio", "leaves the MLP without a hidden layer".into()));
        }
        Ok(())
    }
}

impl FastVitSizes {
    /// Hidden channels of a block's MLP.
    fn hidden(&self, dim: usize) -> usize {
        scaled(dim, self.mlp_ratio)
    }
}

const MCI0_SIZES: FastVitSizes = FastVitSizes {
    layers: [2, 6, 10, 2],
    dims: [64, 128, 256, 512],
    mlp_ratio: 3.0,
    layer_scale: 1e-5,
    drop_path: 0.0,
    reparam: false,
};

const MCI1_SIZES: FastVitSizes = FastVitSizes { layers: [4, 12, 20, 4], ..MCI0_SIZES };

const MCI2_SIZES: FastVitSizes = FastVitSizes { layers: [4, 12, 24, 4], dims: [80, 160, 320, 640], ..MCI0_SIZES };

/// `fastvit_mci0`.
pub const MCI0: BackboneEntry = BackboneEntry {
    name: "fastvit_mci0",
    family: "fastvit",
    summary: "FastViT-MCi0, MobileCLIP-S0's image tower, 11 M parameters (timm's names)",
    params: |generator| schema(generator, &MCI0_SIZES),
    make: |set| FastVit::boxed("fastvit_mci0", &MCI0_SIZES, set),
};

/// `fastvit_mci1`.
pub const MCI1: BackboneEntry = BackboneEntry {
    name: "fastvit_mci1",
    family: "fastvit",
    summary: "FastViT-MCi1, MobileCLIP-S1's image tower, 21 M parameters (timm's names)",
    params: |generator| schema(generator, &MCI1_SIZES),
    make: |set| FastVit::boxed("fastvit_mci1", &MCI1_SIZES, set),
};

/// `fastvit_mci2`.
pub const MCI2: BackboneEntry = BackboneEntry {
    name: "fastvit_mci2",
    family: "fastvit",
    summary: "FastViT-MCi2, MobileCLIP-S2's image tower, 36 M parameters (timm's names)",
    params: |generator| schema(generator, &MCI2_SIZES),
    make: |set| FastVit::boxed("fastvit_mci2", &MCI2_SIZES, set),
};

/// Width of an attention head.
const HEAD_DIM: usize = 32;

/// The stage that attends.
const ATTENTION_STAGE: usize = 3;

/// The first stage whose downsampling has squeeze-and-excitation.
const FIRST_SE_STAGE: usize = 2;

/// How much smaller the last map is than the image.
const REDUCTION: usize = 32;

/// Squeeze-and-excitation by `fc1` and `fc2`, with PyTorch's default initialisation.
fn squeeze_excite(reduced: usize) -> SqueezeExcite {
    let (names, act, gate) = (["fc1", "fc2"], Activation::Relu, Activation::Sigmoid);
    SqueezeExcite { names, reduced, act, gate, weight: Init::FanInUniform, bias: torch_bias }
}

/// A FastViT.
#[derive(Clone, Debug)]
pub struct FastVit {
    name: &'static str,
    sizes: FastVitSizes,
}

impl FastVit {
    fn boxed(name: &'static str, defaults: &FastVitSizes, set: &toml::Table) -> Result<Box<dyn Backbone>, ModelError> {
        Ok(Box::new(FastVit { name, sizes: decode(name, defaults, set)? }))
    }

    fn stem(&self) -> [MobileOne; 3] {
        let dim = self.sizes.dims[0];
        [
            MobileOne { stride: 2, ..MobileOne::new(3, dim, 3) },
            MobileOne { stride: 2, depthwise: true, ..MobileOne::new(dim, dim, 3) },
            MobileOne::new(dim, dim, 1),
        ]
    }

    /// What leads into stage `i` ≥ 1.
    fn downsample(&self, i: usize) -> (LargeKernel, MobileOne) {
        let (c_in, out) = (self.sizes.dims[i - 1], self.sizes.dims[i]);
        (LargeKernel { c_in, out, kernels: [7, 3], stride: 2 }, MobileOne::new(out, out, 1))
    }

    fn mixer(&self, i: usize) -> RepMixer {
        RepMixer { dim: self.sizes.dims[i], kernel: 3 }
    }

    fn position(&self) -> PositionalEncoding {
        PositionalEncoding { dim: self.sizes.dims[ATTENTION_STAGE], kernel: 7 }
    }

    fn final_conv(&self) -> MobileOne {
        MobileOne { depthwise: true, ..MobileOne::new(self.sizes.dims[3], self.features(), 3) }
    }

    /// Sides of the maps of the four stages.
    fn sides(image_size: usize) -> [usize; 4] {
        let half = |n: usize| n.div_ceil(2);
        let mut sides = [half(half(image_size)); 4];
        for i in 1..4 {
            sides[i] = half(sides[i - 1]);
        }
        sides
    }

    fn build_downsample(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        x_bhwc: &Tensor,
        i: usize,
    ) -> Result<Tensor, ModelError> {
        let (large, mix) = self.downsample(i);
        let proj = path.at("downsample.proj");
        let mut x = large.build(g, &proj.at(0), x_bhwc, self.sizes.reparam)?;
        if i >= FIRST_SE_STAGE {
            // A quarter of the channels, rounded to a multiple of 8, half up.
            let reduced = ((large.out as f64 / 4.0 + 4.0) as usize / 8 * 8).max(8);
            x = squeeze_excite(reduced).build(g, &proj.at("0.se"), &x)?;
        }
        let x = g.activation(&x, Activation::Gelu);
        let x = mix.build(g, &proj.at(1), &x, self.sizes.reparam)?;
        Ok(g.activation(&x, Activation::Gelu))
    }

    /// The MLP of a block, scaled, added to its input.
    fn mlp(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        scale: &str,
        x_bhwc: &Tensor,
        drop: f32,
    ) -> Result<Tensor, ModelError> {
        let y = conv_mlp(g, &path.at("mlp"), x_bhwc, self.sizes.hidden(x_bhwc.shape()[3]))?;
        let y = layer_scale(g, &path.at(scale).at("gamma"), &y, self.sizes.layer_scale as f32)?;
        let y = g.drop_path(&y, drop)?;
        Ok(g.add(x_bhwc, &y)?)
    }

    /// Attention over the positions of a map, scaled, added to its input.
    fn attend(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        tap: &str,
        x_bhwc: &Tensor,
        drop: f32,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor, ModelError> {
        let (batch, side, width) = (x_bhwc.shape()[0], x_bhwc.shape()[1], x_bhwc.shape()[3]);
        let (heads, mixer) = (width / HEAD_DIM, path.at("token_mixer"));
        let y = g.batch_norm(&path.at("norm"), x_bhwc, BatchNormArgs::new(Activation::Identity))?;
        let y_bnc = g.reshape(&y, &[batch, side * side, width])?;
        let qkv = g.linear(&mixer.at("qkv"), &y_bnc, 3 * width, false, WEIGHT)?;
        if taps.wants(tap) {
            let map = g.attention_map(&qkv, heads, false)?;
            taps.add(tap, &map);
        }
        let y = g.attention(&qkv, heads, false)?;
        let y = g.linear(&mixer.at("proj"), &y, width, true, WEIGHT)?;
        let y = g.reshape(&y, x_bhwc.shape())?;
        let y = layer_scale(g, &path.at("layer_scale_1.gamma"), &y, self.sizes.layer_scale as f32)?;
        let y = g.drop_path(&y, drop)?;
        Ok(g.add(x_bhwc, &y)?)
    }
}

/// Name of the attention map of block `j` of the attending stage.
fn attention_tap(j: usize) -> String {
    format!("stages.{ATTENTION_STAGE}.blocks.{j}.token_mixer.attn")
}

impl Backbone for FastVit {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> toml::Table {
        encode(&self.sizes)
    }

    fn preprocess(&self) -> Preprocess {
        Preprocess { image_size: 256, mean: [0.0; 3], std: [1.0; 3], crop_pct: 0.95, ..IMAGENET }
    }

    fn features(&self) -> usize {
        2 * self.sizes.dims[3]
    }

    fn check_image_size(&self, size: usize) -> Result<(), ModelError> {
        check_reduction(self.name, REDUCTION, size)
    }

    fn taps(&self, image_size: usize) -> Result<Vec<TapInfo>, ModelError> {
        self.check_image_size(image_size)?;
        let (s, sides) = (&self.sizes, Self::sides(image_size));
        let mut taps = vec![TapInfo::map("stem", sides[0], s.dims[0])];
        for i in 0..4 {
            if i == ATTENTION_STAGE {
                let heads = s.dims[i] / HEAD_DIM;
                let shape = TapShape::Attention { groups: 1, heads, prefix: 0, grid: [sides[i]; 2] };
                taps.extend((0..s.layers[i]).map(|j| TapInfo { name: attention_tap(j), shape }));
            }
            taps.push(TapInfo::map(format!("stages.{i}"), sides[i], s.dims[i]));
        }
        taps.push(TapInfo::map("final_conv", sides[3], self.features()));
        Ok(taps)
    }

    fn build(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        image: &Tensor,
        dim: Option<usize>,
        taps: &[String],
    ) -> Result<ImageOutputs, ModelError> {
        let side = image_side(self.name, image)?;
        let mut taps = Taps::new(self.name, taps, self.taps(side)?)?;
        let (s, folded, scale) = (&self.sizes, self.sizes.reparam, self.sizes.layer_scale as f32);
        let mut x_bhwc = image.clone();
        for (i, block) in self.stem().into_iter().enumerate() {
            let x = block.build(g, &path.at("stem").at(i), &x_bhwc, folded)?;
            x_bhwc = g.activation(&x, Activation::Gelu);
        }
        taps.add("stem", &x_bhwc);
        let mut rates = drop_path_rates(s.drop_path, s.layers.iter().sum());
        for i in 0..4 {
            let stage = path.at("stages").at(i);
            if i > 0 {
                x_bhwc = self.build_downsample(g, &stage, &x_bhwc, i)?;
            }
            if i == ATTENTION_STAGE {
                x_bhwc = self.position().build(g, &stage.at("pos_emb"), &x_bhwc, folded)?;
            }
            for j in 0..s.layers[i] {
                let (block, drop) = (stage.at("blocks").at(j), rates.next().unwrap_or_default());
                x_bhwc = if i == ATTENTION_STAGE {
                    let x = self.attend(g, &block, &attention_tap(j), &x_bhwc, drop, &mut taps)?;
                    self.mlp(g, &block, "layer_scale_2", &x, drop)?
                } else {
                    let x = self.mixer(i).build(g, &block.at("token_mixer"), &x_bhwc, scale, folded)?;
                    self.mlp(g, &block, "layer_scale", &x, drop)?
                };
            }
            taps.add(&format!("stages.{i}"), &x_bhwc);
        }
        let last = path.at("final_conv");
        let x = self.final_conv().build(g, &last, &x_bhwc, folded)?;
        // A sixteenth of the channels, rounded.
        let reduced = ((self.features() + 8) / 16).max(1);
        let x = squeeze_excite(reduced).build(g, &last.at("se"), &x)?;
        let x_bhwc = g.activation(&x, Activation::Gelu);
        taps.add("final_conv", &x_bhwc);
        let features = g.global_avg_pool(&x_bhwc)?;
        let embedding = match dim {
            Some(dim) => g.linear(&path.at("head.fc"), &features, dim, true, WEIGHT)?,
            None => features.clone(),
        };
        Ok(ImageOutputs { features, embedding, taps: taps.finish()? })
    }

    fn reparam(&self, store: &ParamStore, path: &Path) -> Result<Option<Folded>, ModelError> {
        if self.sizes.reparam {
            return Ok(None);
        }
        let mut f = Folding::new(store);
        for (i, block) in self.stem().iter().enumerate() {
            block.fold(&mut f, &path.at("stem").at(i))?;
        }
        for i in 0..4 {
            let stage = path.at("stages").at(i);
            if i > 0 {
                let (large, mix) = self.downsample(i);
                large.fold(&mut f, &stage.at("downsample.proj.0"))?;
                mix.fold(&mut f, &stage.at("downsample.proj.1"))?;
            }
            if i == ATTENTION_STAGE {
                self.position().fold(&mut f, &stage.at("pos_emb"))?;
            } else {
                for j in 0..self.sizes.layers[i] {
                    self.mixer(i).fold(&mut f, &stage.at("blocks").at(j).at("token_mixer"))?;
                }
            }
        }
        self.final_conv().fold(&mut f, &path.at("final_conv"))?;
        let sizes = FastVitSizes { reparam: true, ..self.sizes.clone() };
        let backbone = Box::new(FastVit { name: self.name, sizes });
        Ok(Some(Folded { backbone, store: f.finish() }))
    }
}
