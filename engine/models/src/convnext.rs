//! ConvNeXt (Liu et al. 2022, arXiv:2201.03545) with the layers, names and initialisation of timm's `convnext_atto` to
//! `convnext_tiny`.
//!
//! Shape suffixes: b batch, h and w height and width, c channels.

use mcpipe_graph::{Activation, ConvArgs, GraphBuilder, Init, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backbone::{Backbone, IMAGENET, ImageOutputs, Preprocess, TapInfo, Taps, image_side};
use crate::error::ModelError;
use crate::layers::{check_reduction, conv2d_with, drop_path_rates, scaled};
use crate::params::{Sizes, decode, encode, positive, positive_factor, rate, schema};
use crate::registry::BackboneEntry;

/// Sizes of a ConvNeXt: a stem that cuts the image into patches of 4 pixels, and four stages of blocks.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConvNextSizes {
    /// Blocks of the four stages.
    #[schemars(inner(range(min = 1, max = 64)))]
    pub depths: [usize; 4],
    /// Channels of the four stages.
    #[schemars(inner(range(min = 1, max = 65536)))]
    pub dims: [usize; 4],
    /// Side of the blocks' depthwise kernels; odd.
    #[schemars(range(min = 1, max = 31))]
    pub kernel_size: usize,
    /// Hidden channels of a block per channel.
    #[schemars(range(min = 0.125, max = 16.0))]
    pub mlp_ratio: f64,
    /// Whether the blocks' MLPs keep their weights as 1x1 convolutions `[out, in, 1, 1]` (the small variants) or as
    /// linear layers `[out, in]`.
    pub conv_mlp: bool,
    /// Initial value of the layer scale.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub layer_scale: f64,
    /// Stochastic depth: rate at which the last block's branch is dropped; it rises linearly from the first block's 0.
    #[schemars(range(min = 0.0, max = 0.95))]
    pub drop_path: f64,
}

impl Sizes for ConvNextSizes {
    fn check(&self) -> Result<(), (&'static str, String)> {
        positive("depths", &self.depths)?;
        positive("dims", &self.dims)?;
        positive("kernel_size", &[self.kernel_size])?;
        positive_factor("mlp_ratio", self.mlp_ratio)?;
        rate("layer_scale", self.layer_scale, 1.0)?;
        rate("drop_path", self.drop_path, 0.95)?;
        if self.kernel_size.is_multiple_of(2) {
            return Err(("kernel_size", format!("must be odd, not {}", self.kernel_size)));
        }
        if self.dims.iter().any(|&d| self.hidden(d) == 0) {
            return Err(("mlp_ratio", "leaves the MLP without a hidden layer".into()));
        }
        Ok(())
    }
}

impl ConvNextSizes {
    /// Hidden channels of a block.
    fn hidden(&self, dim: usize) -> usize {
        scaled(dim, self.mlp_ratio)
    }
}

const ATTO_SIZES: ConvNextSizes = ConvNextSizes {
    depths: [2, 2, 6, 2],
    dims: [40, 80, 160, 320],
    kernel_size: 7,
    mlp_ratio: 4.0,
    conv_mlp: true,
    layer_scale: 1e-6,
    drop_path: 0.0,
};

const FEMTO_SIZES: ConvNextSizes = ConvNextSizes { dims: [48, 96, 192, 384], ..ATTO_SIZES };

const PICO_SIZES: ConvNextSizes = ConvNextSizes { dims: [64, 128, 256, 512], ..ATTO_SIZES };

const NANO_SIZES: ConvNextSizes = ConvNextSizes { depths: [2, 2, 8, 2], dims: [80, 160, 320, 640], ..ATTO_SIZES };

const TINY_SIZES: ConvNextSizes =
    ConvNextSizes { depths: [3, 3, 9, 3], dims: [96, 192, 384, 768], conv_mlp: false, ..ATTO_SIZES };

/// `convnext_atto`.
pub const ATTO: BackboneEntry = BackboneEntry {
    name: "convnext_atto",
    family: "convnext",
    summary: "ConvNeXt-Atto: convolutions only, 3.4 M parameters (timm's names)",
    params: |generator| schema(generator, &ATTO_SIZES),
    make: |set| ConvNext::boxed("convnext_atto", &ATTO_SIZES, 0.875, set),
};

/// `convnext_femto`.
pub const FEMTO: BackboneEntry = BackboneEntry {
    name: "convnext_femto",
    family: "convnext",
    summary: "ConvNeXt-Femto: convolutions only, 4.8 M parameters (timm's names)",
    params: |generator| schema(generator, &FEMTO_SIZES),
    make: |set| ConvNext::boxed("convnext_femto", &FEMTO_SIZES, 0.875, set),
};

/// `convnext_pico`.
pub const PICO: BackboneEntry = BackboneEntry {
    name: "convnext_pico",
    family: "convnext",
    summary: "ConvNeXt-Pico: convolutions only, 8.5 M parameters (timm's names)",
    params: |generator| schema(generator, &PICO_SIZES),
    make: |set| ConvNext::boxed("convnext_pico", &PICO_SIZES, 0.875, set),
};

/// `convnext_nano`.
pub const NANO: BackboneEntry = BackboneEntry {
    name: "convnext_nano",
    family: "convnext",
    summary: "ConvNeXt-Nano: convolutions only, 15 M parameters (timm's names)",
    params: |generator| schema(generator, &NANO_SIZES),
    make: |set| ConvNext::boxed("convnext_nano", &NANO_SIZES, 0.95, set),
};

/// `convnext_tiny`.
pub const TINY: BackboneEntry = BackboneEntry {
    name: "convnext_tiny",
    family: "convnext",
    summary: "ConvNeXt-Tiny: convolutions only, 28 M parameters (timm's names)",
    params: |generator| schema(generator, &TINY_SIZES),
    make: |set| ConvNext::boxed("convnext_tiny", &TINY_SIZES, 0.95, set),
};

/// Side of the stem's patches.
const PATCH: usize = 4;

/// LayerNorm's epsilon.
const LN_EPS: f32 = 1e-6;

/// Initialisation of every weight. (timm cuts its normal draws at ±2, a hundred deviations: not at all.)
const WEIGHT: Init = Init::Normal(0.02);

/// A ConvNeXt.
#[derive(Clone, Debug)]
pub struct ConvNext {
    name: &'static str,
    sizes: ConvNextSizes,
    crop_pct: f32,
}

impl ConvNext {
    fn boxed(
        name: &'static str,
        defaults: &ConvNextSizes,
        crop_pct: f32,
        set: &toml::Table,
    ) -> Result<Box<dyn Backbone>, ModelError> {
        Ok(Box::new(ConvNext { name, sizes: decode(name, defaults, set)?, crop_pct }))
    }

    /// Layer of an MLP, as a linear layer or as a 1x1 convolution.
    fn dense(&self, g: &mut GraphBuilder, path: &Path, x_bhwc: &Tensor, out: usize) -> Result<Tensor, ModelError> {
        if self.sizes.conv_mlp {
            return conv2d_with(g, path, x_bhwc, ConvArgs { bias: true, ..ConvArgs::new(out, 1) }, WEIGHT, Init::Zeros);
        }
        Ok(g.linear(path, x_bhwc, out, true, WEIGHT)?)
    }

    /// Block (§2 of the paper): depthwise convolution, norm, MLP, layer scale, added to its input.
    fn block(&self, g: &mut GraphBuilder, path: &Path, x_bhwc: &Tensor, drop: f32) -> Result<Tensor, ModelError> {
        let (s, c) = (&self.sizes, x_bhwc.shape()[3]);
        let depthwise = ConvArgs { bias: true, ..ConvArgs::new(c, s.kernel_size).groups(c) };
        let y = conv2d_with(g, &path.at("conv_dw"), x_bhwc, depthwise, WEIGHT, Init::Zeros)?;
        let y = g.layer_norm(&path.at("norm"), &y, LN_EPS)?;
        let y = self.dense(g, &path.at("mlp.fc1"), &y, s.hidden(c))?;
        let y = g.activation(&y, Activation::Gelu);
        let y = self.dense(g, &path.at("mlp.fc2"), &y, c)?;
        let gamma = g.param(&path.at("gamma"), &[c], Init::Constant(s.layer_scale as f32))?;
        let y = g.scale_channels(&y, &gamma)?;
        let y = g.drop_path(&y, drop)?;
        Ok(g.add(x_bhwc, &y)?)
    }
}

impl Backbone for ConvNext {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> toml::Table {
        encode(&self.sizes)
    }

    fn preprocess(&self) -> Preprocess {
        Preprocess { crop_pct: self.crop_pct, ..IMAGENET }
    }

    fn features(&self) -> usize {
        self.sizes.dims[3]
    }

    fn check_image_size(&self, size: usize) -> Result<(), ModelError> {
        check_reduction(self.name, 8 * PATCH, size)
    }

    fn taps(&self, image_size: usize) -> Result<Vec<TapInfo>, ModelError> {
        self.check_image_size(image_size)?;
        let stem = TapInfo::map("stem", image_size / PATCH, self.sizes.dims[0]);
        let stage = |i: usize| TapInfo::map(format!("stages.{i}"), (image_size / PATCH) >> i, self.sizes.dims[i]);
        Ok(std::iter::once(stem).chain((0..4).map(stage)).collect())
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
        let s = &self.sizes;
        let patches =
            |out: usize, side: usize| ConvArgs { stride: side, pad: 0, bias: true, ..ConvArgs::new(out, side) };
        let stem = path.at("stem");
        let x = conv2d_with(g, &stem.at(0), image, patches(s.dims[0], PATCH), WEIGHT, Init::Zeros)?;
        let mut x_bhwc = g.layer_norm(&stem.at(1), &x, LN_EPS)?;
        taps.add("stem", &x_bhwc);
        let mut rates = drop_path_rates(s.drop_path, s.depths.iter().sum());
        for i in 0..4 {
            let stage = path.at("stages").at(i);
            if i > 0 {
                let down = stage.at("downsample");
                let x = g.layer_norm(&down.at(0), &x_bhwc, LN_EPS)?;
                x_bhwc = conv2d_with(g, &down.at(1), &x, patches(s.dims[i], 2), WEIGHT, Init::Zeros)?;
            }
            for j in 0..s.depths[i] {
                let drop = rates.next().unwrap_or_default();
                x_bhwc = self.block(g, &stage.at("blocks").at(j), &x_bhwc, drop)?;
            }
            taps.add(&format!("stages.{i}"), &x_bhwc);
        }
        let pooled = g.global_avg_pool(&x_bhwc)?;
        let features = g.layer_norm(&path.at("head.norm"), &pooled, LN_EPS)?;
        let embedding = match dim {
            Some(dim) => g.linear(&path.at("head.fc"), &features, dim, true, WEIGHT)?,
            None => features.clone(),
        };
        Ok(ImageOutputs { features, embedding, taps: taps.finish()? })
    }
}
