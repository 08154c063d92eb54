//! MobileViTv2 (Mehta & Rastegari 2022, arXiv:2206.02680: separable self-attention) with the layers, names and
//! initialisation of timm's `mobilevitv2_050` and `mobilevitv2_100`.
//!
//! Shape suffixes: b batch, h and w height and width, c channels; p positions inside a patch, n patches.

use mcpipe_graph::{Activation, ConvArgs, GraphBuilder, Init, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backbone::{Backbone, IMAGENET, ImageOutputs, Preprocess, TapInfo, Taps, image_side};
use crate::error::ModelError;
use crate::layers::{check_reduction, conv_norm_act, divisible_by_8, drop_path_rates, pointwise, scaled, strided};
use crate::mobilevit::inverted_residual;
use crate::params::{Sizes, decode, encode, positive, positive_factor, rate, schema};
use crate::registry::BackboneEntry;

/// Sizes of a MobileViTv2. Five stages of inverted residual blocks; the last three end in a MobileViTv2 block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MobileVitV2Sizes {
    /// Channels of the 3x3 stem, which halves the image.
    #[schemars(range(min = 1, max = 65536))]
    pub stem: usize,
    /// Channels of the five stages; the last is the width of the pooled features.
    #[schemars(inner(range(min = 1, max = 65536)))]
    pub channels: [usize; 5],
    /// Inverted residual blocks of the five stages.
    #[schemars(inner(range(min = 1, max = 64)))]
    pub depths: [usize; 5],
    /// Strides of the five stages.
    #[schemars(inner(range(min = 1, max = 2)))]
    pub strides: [usize; 5],
    /// Hidden channels of an inverted residual block per input channel, rounded to a multiple of 8.
    #[schemars(range(min = 0.125, max = 16.0))]
    pub expansion: f64,
    /// Width of a stage's transformer per channel, rounded to a multiple of 8.
    #[schemars(range(min = 0.0625, max = 16.0))]
    pub transformer_ratio: f64,
    /// Layers of the transformers of the last three stages.
    #[schemars(inner(range(min = 1, max = 64)))]
    pub transformer_depths: [usize; 3],
    /// Hidden width of a transformer's MLP per width.
    #[schemars(range(min = 0.125, max = 16.0))]
    pub mlp_ratio: f64,
    /// Side of the patches that a map is unfolded into; a map that it does not divide is resized up.
    #[schemars(range(min = 1, max = 16))]
    pub patch_size: usize,
    /// Rate of stochastic depth of the last block; it rises linearly from 0 at the first.
    #[schemars(range(min = 0.0, max = 0.9))]
    pub drop_path: f64,
}

impl Sizes for MobileVitV2Sizes {
    fn check(&self) -> Result<(), (&'static str, String)> {
        positive("stem", &[self.stem])?;
        positive("channels", &self.channels)?;
        positive("depths", &self.depths)?;
        positive("strides", &self.strides)?;
        positive("transformer_depths", &self.transformer_depths)?;
        positive("patch_size", &[self.patch_size])?;
        positive_factor("expansion", self.expansion)?;
        positive_factor("transformer_ratio", self.transformer_ratio)?;
        positive_factor("mlp_ratio", self.mlp_ratio)?;
        rate("drop_path", self.drop_path, 0.9)?;
        // A width is 8 or more.
        if scaled(8, self.mlp_ratio) == 0 {
            return Err(("mlp_ratio", "leaves the MLP without a hidden layer".into()));
        }
        Ok(())
    }
}

const V2_100: MobileVitV2Sizes = MobileVitV2Sizes {
    stem: 32,
    channels: [64, 128, 256, 384, 512],
    depths: [1, 2, 1, 1, 1],
    strides: [1, 2, 2, 2, 2],
    expansion: 2.0,
    transformer_ratio: 0.5,
    transformer_depths: [2, 4, 3],
    mlp_ratio: 2.0,
    patch_size: 2,
    drop_path: 0.0,
};

const V2_050: MobileVitV2Sizes = MobileVitV2Sizes { stem: 16, channels: [32, 64, 128, 192, 256], ..V2_100 };

/// `mobilevitv2_050`.
pub const HALF: BackboneEntry = BackboneEntry {
    name: "mobilevitv2_050",
    family: "mobilevitv2",
    summary: "MobileViTv2, half the width: attention of linear cost, 1.4 M parameters (timm's names)",
    params: |generator| schema(generator, &V2_050),
    make: |set| MobileVitV2::boxed("mobilevitv2_050", &V2_050, set),
};

/// `mobilevitv2_100`.
pub const WHOLE: BackboneEntry = BackboneEntry {
    name: "mobilevitv2_100",
    family: "mobilevitv2",
    summary: "MobileViTv2: attention of linear cost, 4.9 M parameters (timm's names)",
    params: |generator| schema(generator, &V2_100),
    make: |set| MobileVitV2::boxed("mobilevitv2_100", &V2_100, set),
};

/// Stages whose last block is a MobileViTv2 block.
const FIRST_TRANSFORMER_STAGE: usize = 2;

/// Group norm's epsilon.
const GN_EPS: f32 = 1e-5;

/// Initialisation of the transformers' weights.
const WEIGHT: Init = Init::KaimingFanOut { groups: 1 };

/// A MobileViTv2.
#[derive(Clone, Debug)]
pub struct MobileVitV2 {
    name: &'static str,
    sizes: MobileVitV2Sizes,
}

impl MobileVitV2 {
    fn boxed(
        name: &'static str,
        defaults: &MobileVitV2Sizes,
        set: &toml::Table,
    ) -> Result<Box<dyn Backbone>, ModelError> {
        Ok(Box::new(MobileVitV2 { name, sizes: decode(name, defaults, set)? }))
    }

    /// Side of a map whose sides are whole patches.
    fn whole(&self, side: usize) -> usize {
        side.next_multiple_of(self.sizes.patch_size)
    }

    /// One pre-norm layer of separable attention and MLP over `batch` images.
    fn layer(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        x_bpnc: &Tensor,
        batch: usize,
        drop_path: f32,
    ) -> Result<Tensor, ModelError> {
        let (width, tokens) = (x_bpnc.shape()[2], x_bpnc.shape()[0] * x_bpnc.shape()[1] / batch);
        let add = |g: &mut GraphBuilder, x: &Tensor, y: &Tensor| -> Result<Tensor, ModelError> {
            // A sample is an image, not a position inside the patches.
            let y = g.reshape(y, &[batch, tokens, width])?;
            let y = g.drop_path(&y, drop_path)?;
            Ok(g.add(x, &y)?)
        };
        let y = g.group_norm(&path.at("norm1"), x_bpnc, batch, GN_EPS)?;
        let qkv = pointwise(g, &path.at("attn.qkv_proj"), &y, 1 + 2 * width, WEIGHT)?;
        let y = g.separable_attention(&qkv)?;
        let y = pointwise(g, &path.at("attn.out_proj"), &y, width, WEIGHT)?;
        let x = add(g, x_bpnc, &y)?;
        let y = g.group_norm(&path.at("norm2"), &x, batch, GN_EPS)?;
        let y = pointwise(g, &path.at("mlp.fc1"), &y, scaled(width, self.sizes.mlp_ratio), WEIGHT)?;
        let y = g.activation(&y, Activation::Silu);
        let y = pointwise(g, &path.at("mlp.fc2"), &y, width, WEIGHT)?;
        add(g, &x, &y)
    }

    /// MobileViTv2 block (§3.3 of the paper): depthwise convolution, transformer over the patches, projection.
    fn block(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        x_bhwc: &Tensor,
        i: usize,
        drop_path: f32,
    ) -> Result<Tensor, ModelError> {
        let (s, channels) = (&self.sizes, self.sizes.channels[i]);
        let (batch, side, patch) = (x_bhwc.shape()[0], self.whole(x_bhwc.shape()[1]), [s.patch_size; 2]);
        let x_bhwc = g.resize_bilinear_aligned(x_bhwc, side, side)?;
        let depthwise = ConvArgs::new(channels, 3).groups(channels);
        let y = conv_norm_act(g, &path.at("conv_kxk"), &x_bhwc, depthwise, Activation::Silu)?;
        let width = divisible_by_8(channels as f64 * s.transformer_ratio);
        let y = g.conv2d(&path.at("conv_1x1"), &y, ConvArgs::new(width, 1))?;
        let mut y_bpnc = g.unfold_patches(&y, patch)?;
        for k in 0..s.transformer_depths[i - FIRST_TRANSFORMER_STAGE] {
            y_bpnc = self.layer(g, &path.at("transformer").at(k), &y_bpnc, batch, drop_path)?;
        }
        let y_bpnc = g.group_norm(&path.at("norm"), &y_bpnc, batch, GN_EPS)?;
        let y = g.fold_patches(&y_bpnc, side, side, patch)?;
        conv_norm_act(g, &path.at("conv_proj"), &y, ConvArgs::new(channels, 1), Activation::Identity)
    }
}

impl Backbone for MobileVitV2 {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> toml::Table {
        encode(&self.sizes)
    }

    fn preprocess(&self) -> Preprocess {
        Preprocess { image_size: 256, mean: [0.0; 3], std: [1.0; 3], crop_pct: 0.888, ..IMAGENET }
    }

    fn features(&self) -> usize {
        self.sizes.channels[4]
    }

    fn check_image_size(&self, size: usize) -> Result<(), ModelError> {
        check_reduction(self.name, 2 * self.sizes.strides.iter().product::<usize>(), size)
    }

    fn taps(&self, image_size: usize) -> Result<Vec<TapInfo>, ModelError> {
        self.check_image_size(image_size)?;
        let s = &self.sizes;
        let mut side = strided(image_size, 2);
        let mut taps = vec![TapInfo::map("stem", side, s.stem)];
        for i in 0..5 {
            side = strided(side, s.strides[i]);
            if i >= FIRST_TRANSFORMER_STAGE {
                side = self.whole(side);
            }
            taps.push(TapInfo::map(format!("stages.{i}"), side, s.channels[i]));
        }
        // timm's name of the last map among its features; there is no such convolution in this family.
        taps.push(TapInfo::map("final_conv", side, s.channels[4]));
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
        let s = &self.sizes;
        // The transformers are blocks, too.
        let blocks = s.depths.iter().sum::<usize>() + s.transformer_depths.len();
        let mut rates = drop_path_rates(s.drop_path, blocks);
        let mut next = || rates.next().unwrap_or_default();
        let stem = ConvArgs::new(s.stem, 3).stride(2);
        let mut x_bhwc = conv_norm_act(g, &path.at("stem"), image, stem, Activation::Silu)?;
        taps.add("stem", &x_bhwc);
        for i in 0..5 {
            let stage = path.at("stages").at(i);
            for j in 0..s.depths[i] {
                let stride = if j == 0 { s.strides[i] } else { 1 };
                let shape = [s.channels[i], stride];
                x_bhwc = inverted_residual(g, &stage.at(j), &x_bhwc, shape, s.expansion, next())?;
            }
            if i >= FIRST_TRANSFORMER_STAGE {
                x_bhwc = self.block(g, &stage.at(s.depths[i]), &x_bhwc, i, next())?;
            }
            taps.add(&format!("stages.{i}"), &x_bhwc);
        }
        taps.add("final_conv", &x_bhwc);
        let features = g.global_avg_pool(&x_bhwc)?;
        let embedding = match dim {
            Some(dim) => g.linear(&path.at("head.fc"), &features, dim, true, Init::Normal(0.01))?,
            None => features.clone(),
        };
        Ok(ImageOutputs { features, embedding, taps: taps.finish()? })
    }
}
