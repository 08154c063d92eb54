//! EfficientNet (Tan & Le 2019, arXiv:1905.11946) and its Lite form with the layers, names and initialisation of timm's
//! `efficientnet_b0` … `efficientnet_b3` and `efficientnet_lite0`.

use mcpipe_graph::{Activation, ConvArgs, GraphBuilder, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backbone::{Backbone, IMAGENET, ImageOutputs, Preprocess, TapInfo, Taps, image_side};
use crate::error::ModelError;
use crate::layers::{ConvActivation, check_reduction, conv_bn, divisible_by_8};
use crate::mbconv::{Block, Kind, Trunk, classifier, odd, squeeze_excite};
use crate::params::{Sizes, decode, encode, positive, positive_factor, rate, schema};
use crate::registry::BackboneEntry;

/// Sizes of an EfficientNet: seven stages of inverted bottlenecks before `width` and `depth` scale them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EfficientNetSizes {
    /// Factor of all channels; the products are rounded to multiples of 8.
    #[schemars(range(min = 0.0625, max = 64.0))]
    pub width: f64,
    /// Factor of the blocks of each stage, rounded up.
    #[schemars(range(min = 0.0625, max = 64.0))]
    pub depth: f64,
    /// Whether stem, pooled features and the depths of the first and last stage stay as they are whatever `width` and
    /// `depth` (EfficientNet-Lite).
    pub fixed_ends: bool,
    /// Channels of the 3x3 stem, which halves the image.
    #[schemars(range(min = 1, max = 65536))]
    pub stem: usize,
    /// Channels of the stages.
    #[schemars(inner(range(min = 1, max = 65536)))]
    pub channels: [usize; 7],
    /// Blocks of the stages.
    #[schemars(inner(range(min = 1, max = 64)))]
    pub depths: [usize; 7],
    /// Sides of the depthwise kernels, odd.
    #[schemars(inner(range(min = 1, max = 63)))]
    pub kernels: [usize; 7],
    /// Strides of the stages' first blocks.
    #[schemars(inner(range(min = 1, max = 2)))]
    pub strides: [usize; 7],
    /// Hidden channels per input channel of the stages' blocks; a block of exactly 1 is depthwise-separable.
    #[schemars(inner(range(min = 0.0625, max = 64.0)))]
    pub expansions: [f64; 7],
    /// Channels inside squeeze-and-excitation per input channel of a block; 0 leaves it out.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub squeeze_excite: f64,
    /// Activation.
    pub act: ConvActivation,
    /// Channels after the last 1x1 convolution: the width of the pooled features.
    #[schemars(range(min = 1, max = 65536))]
    pub features: usize,
    /// Rate of stochastic depth; block i of n drops at rate·i/n.
    #[schemars(range(min = 0.0, max = 0.9))]
    pub drop_path: f64,
}

impl Sizes for EfficientNetSizes {
    fn check(&self) -> Result<(), (&'static str, String)> {
        positive_factor("width", self.width)?;
        positive_factor("depth", self.depth)?;
        positive("stem", &[self.stem])?;
        positive("channels", &self.channels)?;
        positive("depths", &self.depths)?;
        odd("kernels", &self.kernels)?;
        positive("features", &[self.features])?;
        rate("squeeze_excite", self.squeeze_excite, 1.0)?;
        rate("drop_path", self.drop_path, 0.9)?;
        if self.depths.iter().any(|d| *d > 64) {
            return Err(("depths", "must be 64 at most".into()));
        }
        if self.strides.iter().any(|s| !(1..=2).contains(s)) {
            return Err(("strides", "must be 1 or 2".into()));
        }
        self.expansions.iter().try_for_each(|e| positive_factor("expansions", *e))
    }
}

const B0_SIZES: EfficientNetSizes = EfficientNetSizes {
    width: 1.0,
    depth: 1.0,
    fixed_ends: false,
    stem: 32,
    channels: [16, 24, 40, 80, 112, 192, 320],
    depths: [1, 2, 2, 3, 3, 4, 1],
    kernels: [3, 3, 5, 3, 5, 5, 3],
    strides: [1, 2, 2, 2, 1, 2, 1],
    expansions: [1.0, 6.0, 6.0, 6.0, 6.0, 6.0, 6.0],
    squeeze_excite: 0.25,
    act: ConvActivation::Silu,
    features: 1280,
    drop_path: 0.0,
};
const B1_SIZES: EfficientNetSizes = EfficientNetSizes { depth: 1.1, ..B0_SIZES };
const B2_SIZES: EfficientNetSizes = EfficientNetSizes { width: 1.1, depth: 1.2, ..B0_SIZES };
const B3_SIZES: EfficientNetSizes = EfficientNetSizes { width: 1.2, depth: 1.4, ..B0_SIZES };
const LITE0_SIZES: EfficientNetSizes =
    EfficientNetSizes { fixed_ends: true, squeeze_excite: 0.0, act: ConvActivation::Relu6, ..B0_SIZES };

macro_rules! entries {
    ($($id:ident, $name:literal, $sizes:ident, $preprocess:expr, $summary:literal;)*) => {$(
        #[doc = concat!("`", $name, "`.")]
        pub const $id: BackboneEntry = BackboneEntry {
            name: $name,
            family: "efficientnet",
            summary: $summary,
            params: |generator| schema(generator, &$sizes),
            make: |set| EfficientNet::boxed($name, &$sizes, $preprocess, set),
        };
    )*};
}

entries! {
    B0, "efficientnet_b0", B0_SIZES, IMAGENET, "EfficientNet-B0: 5.3 M parameters (timm's names)";
    B1, "efficientnet_b1", B1_SIZES,
        Preprocess { image_size: 240, mean: [0.5; 3], std: [0.5; 3], crop_pct: 0.9, ..IMAGENET },
        "EfficientNet-B1: 7.8 M parameters (timm's names)";
    B2, "efficientnet_b2", B2_SIZES, Preprocess { image_size: 256, ..IMAGENET },
        "EfficientNet-B2: 9.1 M parameters (timm's names)";
    B3, "efficientnet_b3", B3_SIZES, Preprocess { image_size: 288, ..IMAGENET },
        "EfficientNet-B3: 12.2 M parameters (timm's names)";
    LITE0, "efficientnet_lite0", LITE0_SIZES, IMAGENET,
        "EfficientNet-Lite0: ReLU6 and no squeeze-and-excitation, 4.7 M parameters (timm's names)";
}

/// An EfficientNet.
#[derive(Clone, Debug)]
pub struct EfficientNet {
    name: &'static str,
    sizes: EfficientNetSizes,
    preprocess: Preprocess,
}

impl EfficientNet {
    fn boxed(
        name: &'static str,
        defaults: &EfficientNetSizes,
        preprocess: Preprocess,
        set: &toml::Table,
    ) -> Result<Box<dyn Backbone>, ModelError> {
        Ok(Box::new(EfficientNet { name, sizes: decode(name, defaults, set)?, preprocess }))
    }

    fn wide(&self, channels: usize) -> usize {
        divisible_by_8(channels as f64 * self.sizes.width)
    }

    /// Blocks of stage i.
    fn blocks(&self, i: usize) -> usize {
        let s = &self.sizes;
        let fixed = s.fixed_ends && (i == 0 || i == s.depths.len() - 1);
        if fixed { s.depths[i] } else { (s.depths[i] as f64 * s.depth).ceil() as usize }
    }

    fn trunk(&self) -> Trunk {
        let s = &self.sizes;
        let act = Activation::from(s.act);
        let stem = if s.fixed_ends { s.stem } else { self.wide(s.stem) };
        let mut c_in = stem;
        let mut stages = Vec::new();
        for i in 0..s.channels.len() {
            let mut blocks = Vec::new();
            for j in 0..self.blocks(i) {
                let kind = if s.expansions[i] == 1.0 {
                    Kind::Separable
                } else {
                    Kind::Inverted(divisible_by_8(c_in as f64 * s.expansions[i]))
                };
                // timm reckons from the hidden channels divided by the expansion, which may differ by the rounding.
                let hidden = if let Kind::Inverted(hidden) = kind { hidden } else { c_in };
                let reduced = hidden as f64 * (s.squeeze_excite / s.expansions[i]);
                let reduced = (reduced.round_ties_even() as usize).max(1);
                let se = squeeze_excite(reduced, act, Activation::Sigmoid);
                let (out, stride) = (self.wide(s.channels[i]), if j == 0 { s.strides[i] } else { 1 });
                let se = (s.squeeze_excite > 0.0).then_some(se);
                blocks.push(Block { kind, kernel: s.kernels[i], stride, out, act, se, drop_path: 0.0 });
                c_in = out;
            }
            stages.push(blocks);
        }
        Trunk { stem, act, stages }.with_drop_path(s.drop_path)
    }
}

impl Backbone for EfficientNet {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> toml::Table {
        encode(&self.sizes)
    }

    fn preprocess(&self) -> Preprocess {
        self.preprocess
    }

    fn features(&self) -> usize {
        if self.sizes.fixed_ends { self.sizes.features } else { self.wide(self.sizes.features) }
    }

    fn check_image_size(&self, size: usize) -> Result<(), ModelError> {
        check_reduction(self.name, self.trunk().reduction(), size)
    }

    fn taps(&self, image_size: usize) -> Result<Vec<TapInfo>, ModelError> {
        self.check_image_size(image_size)?;
        let (mut taps, side) = self.trunk().taps(image_size);
        taps.push(TapInfo::map("bn2", side, self.features()));
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
        let x_bhwc = self.trunk().build(g, path, image, &mut taps)?;
        let head = ConvArgs::new(self.features(), 1);
        let act = self.sizes.act.into();
        let x_bhwc = conv_bn(g, &path.at("conv_head"), &path.at("bn2"), &x_bhwc, head, act)?;
        taps.add("bn2", &x_bhwc);
        let features = g.global_avg_pool(&x_bhwc)?;
        let embedding = classifier(g, path, &features, dim)?;
        Ok(ImageOutputs { features, embedding, taps: taps.finish()? })
    }
}
