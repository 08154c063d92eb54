//! MobileNetV3 (Howard et al. 2019, arXiv:1905.02244) with the layers, names and initialisation of timm's
//! `mobilenetv3_small_*` and `mobilenetv3_large_*`: pooling stands before the last convolution.

use mcpipe_graph::{Activation, ConvArgs, GraphBuilder, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backbone::{Backbone, IMAGENET, ImageOutputs, Interpolation, Preprocess, TapInfo, Taps, image_side};
use crate::error::ModelError;
use crate::layers::{check_reduction, divisible_by_8};
use crate::mbconv::{Block, Kind, Trunk, classifier, odd, squeeze_excite};
use crate::params::{Sizes, decode, encode, positive, positive_factor, rate, schema};
use crate::registry::BackboneEntry;

/// Sizes of a MobileNetV3. Every list but `expansions` has one value a stage.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MobileNetV3Sizes {
    /// Factor of all channels but the pooled features; the products are rounded to multiples of 8. Below 0.75 the stem
    /// keeps its channels.
    #[schemars(range(min = 0.0625, max = 64.0))]
    pub width: f64,
    /// Channels of the 3x3 stem, which halves the image.
    #[schemars(range(min = 1, max = 65536))]
    pub stem: usize,
    /// Channels of the stages.
    #[schemars(length(min = 1, max = 16), inner(range(min = 1, max = 65536)))]
    pub channels: Vec<usize>,
    /// Sides of the depthwise kernels, odd.
    #[schemars(length(min = 1, max = 16), inner(range(min = 1, max = 63)))]
    pub kernels: Vec<usize>,
    /// Strides of the stages' first blocks.
    #[schemars(length(min = 1, max = 16), inner(range(min = 1, max = 2)))]
    pub strides: Vec<usize>,
    /// For each stage a list with the hidden channels per input channel of each of its blocks, rounded to multiples of
    /// 8; a block of exactly 1 is depthwise-separable.
    #[schemars(length(min = 1, max = 16), inner(length(min = 1, max = 64)))]
    pub expansions: Vec<Vec<f64>>,
    /// Whether the stages' blocks have squeeze-and-excitation.
    #[schemars(length(min = 1, max = 16))]
    pub squeeze_excite: Vec<bool>,
    /// Leading stages whose activation is ReLU; hard-swish elsewhere.
    #[schemars(range(min = 0, max = 16))]
    pub relu_stages: usize,
    /// Channels of the 1x1 convolution behind the stages.
    #[schemars(range(min = 1, max = 65536))]
    pub last: usize,
    /// Width of the pooled features.
    #[schemars(range(min = 1, max = 65536))]
    pub features: usize,
    /// Rate of stochastic depth; block i of n drops at rate·i/n.
    #[schemars(range(min = 0.0, max = 0.9))]
    pub drop_path: f64,
}

impl Sizes for MobileNetV3Sizes {
    fn check(&self) -> Result<(), (&'static str, String)> {
        positive_factor("width", self.width)?;
        positive("stem", &[self.stem])?;
        positive("channels", &self.channels)?;
        odd("kernels", &self.kernels)?;
        positive("last", &[self.last])?;
        positive("features", &[self.features])?;
        rate("drop_path", self.drop_path, 0.9)?;
        let stages = self.channels.len();
        if !(1..=16).contains(&stages) {
            return Err(("channels", format!("must be 1 to 16 stages, not {stages}")));
        }
        let lengths = [
            ("kernels", self.kernels.len()),
            ("strides", self.strides.len()),
            ("expansions", self.expansions.len()),
            ("squeeze_excite", self.squeeze_excite.len()),
        ];
        if let Some((param, n)) = lengths.into_iter().find(|(_, n)| *n != stages) {
            return Err((param, format!("has {n} values for the {stages} stages of `channels`")));
        }
        if self.strides.iter().any(|s| !(1..=2).contains(s)) {
            return Err(("strides", "must be 1 or 2".into()));
        }
        if self.expansions.iter().any(|stage| !(1..=64).contains(&stage.len())) {
            return Err(("expansions", "every stage has 1 to 64 blocks".into()));
        }
        self.expansions.iter().flatten().try_for_each(|e| positive_factor("expansions", *e))
    }
}

fn small(width: f64) -> MobileNetV3Sizes {
    MobileNetV3Sizes {
        width,
        stem: 16,
        channels: vec![16, 24, 40, 48, 96],
        kernels: vec![3, 3, 5, 5, 5],
        strides: vec![2, 2, 2, 1, 2],
        expansions: vec![vec![1.0], vec![4.5, 3.67], vec![4.0, 6.0, 6.0], vec![3.0; 2], vec![6.0; 3]],
        squeeze_excite: vec![true, false, true, true, true],
        relu_stages: 2,
        last: 576,
        features: 1024,
        drop_path: 0.0,
    }
}

fn large(width: f64) -> MobileNetV3Sizes {
    MobileNetV3Sizes {
        width,
        stem: 16,
        channels: vec![16, 24, 40, 80, 112, 160],
        kernels: vec![3, 3, 5, 3, 3, 5],
        strides: vec![1, 2, 2, 2, 1, 2],
        expansions: vec![vec![1.0], vec![4.0, 3.0], vec![3.0; 3], vec![6.0, 2.5, 2.3, 2.3], vec![6.0; 2], vec![6.0; 3]],
        squeeze_excite: vec![false, false, true, false, true, true],
        relu_stages: 3,
        last: 960,
        features: 1280,
        drop_path: 0.0,
    }
}

macro_rules! entries {
    ($($id:ident, $name:literal, $sizes:expr, $filter:ident, $summary:literal;)*) => {$(
        #[doc = concat!("`", $name, "`.")]
        pub const $id: BackboneEntry = BackboneEntry {
            name: $name,
            family: "mobilenetv3",
            summary: $summary,
            params: |generator| schema(generator, &$sizes),
            make: |set| MobileNetV3::boxed($name, &$sizes, Interpolation::$filter, set),
        };
    )*};
}

entries! {
    SMALL_050, "mobilenetv3_small_050", small(0.5), Bicubic,
        "MobileNetV3-Small, half the width: 1.6 M parameters (timm's names)";
    SMALL_075, "mobilenetv3_small_075", small(0.75), Bicubic,
        "MobileNetV3-Small, three quarters of the width: 2.0 M parameters (timm's names)";
    SMALL_100, "mobilenetv3_small_100", small(1.0), Bicubic,
        "MobileNetV3-Small: 2.5 M parameters (timm's names)";
    LARGE_075, "mobilenetv3_large_075", large(0.75), Bilinear,
        "MobileNetV3-Large, three quarters of the width: 4.0 M parameters (timm's names)";
    LARGE_100, "mobilenetv3_large_100", large(1.0), Bicubic,
        "MobileNetV3-Large: 5.5 M parameters (timm's names)";
}

/// A MobileNetV3.
#[derive(Clone, Debug)]
pub struct MobileNetV3 {
    name: &'static str,
    sizes: MobileNetV3Sizes,
    interpolation: Interpolation,
}

impl MobileNetV3 {
    fn boxed(
        name: &'static str,
        defaults: &MobileNetV3Sizes,
        interpolation: Interpolation,
        set: &toml::Table,
    ) -> Result<Box<dyn Backbone>, ModelError> {
        Ok(Box::new(MobileNetV3 { name, sizes: decode(name, defaults, set)?, interpolation }))
    }

    fn trunk(&self) -> Trunk {
        let s = &self.sizes;
        let wide = |c: usize| divisible_by_8(c as f64 * s.width);
        let stem = if s.width < 0.75 { s.stem } else { wide(s.stem) };
        let swish = Activation::HardSwish;
        let mut c_in = stem;
        let mut stages = Vec::new();
        for (i, expansions) in s.expansions.iter().enumerate() {
            let act = if i < s.relu_stages { Activation::Relu } else { swish };
            let mut blocks = Vec::new();
            for (j, &expansion) in expansions.iter().enumerate() {
                let (kind, hidden) = if expansion == 1.0 {
                    (Kind::Separable, c_in)
                } else {
                    let hidden = divisible_by_8(c_in as f64 * expansion);
                    (Kind::Inverted(hidden), hidden)
                };
                let reduced = divisible_by_8(hidden as f64 * 0.25);
                let se = squeeze_excite(reduced, Activation::Relu, Activation::HardSigmoid);
                let (out, stride) = (wide(s.channels[i]), if j == 0 { s.strides[i] } else { 1 });
                let se = s.squeeze_excite[i].then_some(se);
                blocks.push(Block { kind, kernel: s.kernels[i], stride, out, act, se, drop_path: 0.0 });
                c_in = out;
            }
            stages.push(blocks);
        }
        let last =
            Block { kind: Kind::Dense, kernel: 1, stride: 1, out: wide(s.last), act: swish, se: None, drop_path: 0.0 };
        stages.push(vec![last]);
        Trunk { stem, act: swish, stages }.with_drop_path(s.drop_path)
    }
}

impl Backbone for MobileNetV3 {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> toml::Table {
        encode(&self.sizes)
    }

    fn preprocess(&self) -> Preprocess {
        Preprocess { interpolation: self.interpolation, ..IMAGENET }
    }

    fn features(&self) -> usize {
        self.sizes.features
    }

    fn check_image_size(&self, size: usize) -> Result<(), ModelError> {
        check_reduction(self.name, self.trunk().reduction(), size)
    }

    fn taps(&self, image_size: usize) -> Result<Vec<TapInfo>, ModelError> {
        self.check_image_size(image_size)?;
        Ok(self.trunk().taps(image_size).0)
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
        let trunk = self.trunk();
        let x_bhwc = trunk.build(g, path, image, &mut taps)?;
        let pooled = g.global_avg_pool(&x_bhwc)?;
        let batch = image.shape()[0];
        let pooled = g.reshape(&pooled, &[batch, 1, 1, trunk.channels()])?;
        let head = ConvArgs { bias: true, ..ConvArgs::new(self.sizes.features, 1) };
        let y = g.conv2d(&path.at("conv_head"), &pooled, head)?;
        let y = g.activation(&y, Activation::HardSwish);
        let features = g.reshape(&y, &[batch, self.sizes.features])?;
        let embedding = classifier(g, path, &features, dim)?;
        Ok(ImageOutputs { features, embedding, taps: taps.finish()? })
    }
}
