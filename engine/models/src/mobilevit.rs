//! MobileViT (Mehta & Rastegari 2022, arXiv:2110.02178) with the layers, names and initialisation of timm's
//! `mobilevit_xxs`, `mobilevit_xs` and `mobilevit_s`.
//!
//! Shape suffixes: b batch, h and w height and width, c channels; p positions inside a patch, n patches.

use mcpipe_graph::{Activation, ConvArgs, GraphBuilder, Init, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backbone::{Backbone, IMAGENET, ImageOutputs, Preprocess, TapInfo, TapShape, Taps, image_side};
use crate::error::ModelError;
use crate::layers::{check_reduction, conv_norm_act, divisible_by_8, drop_path_rates, scaled, strided};
use crate::params::{Sizes, decode, encode, positive, positive_factor, rate, schema};
use crate::registry::BackboneEntry;

/// Sizes of a MobileViT. Five stages of inverted residual blocks; the last three end in a MobileViT block.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct MobileVitSizes {
    /// Channels of the 3x3 stem, which halves the image.
    #[schemars(range(min = 1, max = 65536))]
    pub stem: usize,
    /// Channels of the five stages.
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
    /// Widths of the transformers of the last three stages.
    #[schemars(inner(range(min = 1, max = 65536)))]
    pub transformer_dims: [usize; 3],
    /// Layers of the transformers of the last three stages.
    #[schemars(inner(range(min = 1, max = 64)))]
    pub transformer_depths: [usize; 3],
    /// Attention heads; they divide every transformer width.
    #[schemars(range(min = 1, max = 256))]
    pub heads: usize,
    /// Hidden width of a transformer's MLP per width.
    #[schemars(range(min = 0.125, max = 16.0))]
    pub mlp_ratio: f64,
    /// Side of the patches that a map is unfolded into.
    #[schemars(range(min = 1, max = 16))]
    pub patch_size: usize,
    /// Channels after the last 1x1 convolution: the width of the pooled features.
    #[schemars(range(min = 1, max = 65536))]
    pub features: usize,
    /// Rate of stochastic depth of the last block; it rises linearly from 0 at the first.
    #[schemars(range(min = 0.0, max = 0.9))]
    pub drop_path: f64,
}

impl Sizes for MobileVitSizes {
    fn check(&self) -> Result<(), (&'static str, String)> {
        positive("stem", &[self.stem])?;
        positive("channels", &self.channels)?;
        positive("depths", &self.depths)?;
        positive("strides", &self.strides)?;
        positive("transformer_dims", &self.transformer_dims)?;
        positive("transformer_depths", &self.transformer_depths)?;
        positive("heads", &[self.heads])?;
        positive("patch_size", &[self.patch_size])?;
        positive("features", &[self.features])?;
        positive_factor("expansion", self.expansion)?;
        positive_factor("mlp_ratio", self.mlp_ratio)?;
        rate("drop_path", self.drop_path, 0.9)?;
        if let Some(dim) = self.transformer_dims.iter().find(|&&d| d % self.heads != 0) {
            return Err(("transformer_dims", format!("{} heads don't divide the width {dim}", self.heads)));
        }
        if self.transformer_dims.iter().any(|&d| scaled(d, self.mlp_ratio) == 0) {
            return Err(("mlp_ratio", "leaves the MLP without a hidden layer".into()));
        }
        Ok(())
    }
}

const XXS_SIZES: MobileVitSizes = MobileVitSizes {
    stem: 16,
    channels: [16, 24, 48, 64, 80],
    depths: [1, 3, 1, 1, 1],
    strides: [1, 2, 2, 2, 2],
    expansion: 2.0,
    transformer_dims: [64, 80, 96],
    transformer_depths: [2, 4, 3],
    heads: 4,
    mlp_ratio: 2.0,
    patch_size: 2,
    features: 320,
    drop_path: 0.0,
};

const XS_SIZES: MobileVitSizes = MobileVitSizes {
    channels: [32, 48, 64, 80, 96],
    expansion: 4.0,
    transformer_dims: [96, 120, 144],
    features: 384,
    ..XXS_SIZES
};

const S_SIZES: MobileVitSizes = MobileVitSizes {
    channels: [32, 64, 96, 128, 160],
    expansion: 4.0,
    transformer_dims: [144, 192, 240],
    features: 640,
    ..XXS_SIZES
};

/// `mobilevit_xxs`.
pub const XXS: BackboneEntry = BackboneEntry {
    name: "mobilevit_xxs",
    family: "mobilevit",
    summary: "MobileViT-XXS: convolutions and small transformers, 0.95 M parameters (timm's names)",
    params: |generator| schema(generator, &XXS_SIZES),
    make: |set| MobileVit::boxed("mobilevit_xxs", &XXS_SIZES, set),
};

/// `mobilevit_xs`.
pub const XS: BackboneEntry = BackboneEntry {
    name: "mobilevit_xs",
    family: "mobilevit",
    summary: "MobileViT-XS: convolutions and small transformers, 1.9 M parameters (timm's names)",
    params: |generator| schema(generator, &XS_SIZES),
    make: |set| MobileVit::boxed("mobilevit_xs", &XS_SIZES, set),
};

/// `mobilevit_s`.
pub const S: BackboneEntry = BackboneEntry {
    name: "mobilevit_s",
    family: "mobilevit",
    summary: "MobileViT-S: convolutions and small transformers, 4.9 M parameters (timm's names)",
    params: |generator| schema(generator, &S_SIZES),
    make: |set| MobileVit::boxed("mobilevit_s", &S_SIZES, set),
};

/// Stages whose last block is a MobileViT block.
const FIRST_TRANSFORMER_STAGE: usize = 2;

/// LayerNorm's epsilon inside the transformers.
const LN_EPS: f32 = 1e-5;

/// Inverted residual block (Sandler et al. 2018) to `out` channels: expand by a factor, depthwise, project; where the
/// shape stays it is added to its input, dropped at a rate.
pub(crate) fn inverted_residual(
    g: &mut GraphBuilder,
    path: &Path,
    x_bhwc: &Tensor,
    [out, stride]: [usize; 2],
    expansion: f64,
    drop_path: f32,
) -> Result<Tensor, ModelError> {
    let c_in = x_bhwc.shape()[3];
    let mid = divisible_by_8(c_in as f64 * expansion);
    let silu = Activation::Silu;
    let y = conv_norm_act(g, &path.at("conv1_1x1"), x_bhwc, ConvArgs::new(mid, 1), silu)?;
    let depthwise = ConvArgs::new(mid, 3).stride(stride).groups(mid);
    let y = conv_norm_act(g, &path.at("conv2_kxk"), &y, depthwise, silu)?;
    let residual = stride == 1 && c_in == out;
    let project = path.at("conv3_1x1");
    if residual {
        // The block starts as the identity (Goyal et al. 2017, §5.1), as timm's does.
        g.param(&project.at("bn.weight"), &[out], Init::Zeros)?;
    }
    let y = conv_norm_act(g, &project, &y, ConvArgs::new(out, 1), Activation::Identity)?;
    if !residual {
        return Ok(y);
    }
    let y = g.drop_path(&y, drop_path)?;
    Ok(g.add(&y, x_bhwc)?)
}

/// A MobileViT.
#[derive(Clone, Debug)]
pub struct MobileVit {
    name: &'static str,
    sizes: MobileVitSizes,
}

impl MobileVit {
    fn boxed(
        name: &'static str,
        defaults: &MobileVitSizes,
        set: &toml::Table,
    ) -> Result<Box<dyn Backbone>, ModelError> {
        Ok(Box::new(MobileVit { name, sizes: decode(name, defaults, set)? }))
    }

    /// Sides of the maps after the stem and after each stage.
    fn sides(&self, image_size: usize) -> [usize; 6] {
        let mut sides = [strided(image_size, 2); 6];
        for i in 0..5 {
            sides[i + 1] = strided(sides[i], self.sizes.strides[i]);
        }
        sides
    }

    fn patches(&self, side: usize) -> usize {
        side.div_ceil(self.sizes.patch_size)
    }

    /// One pre-norm transformer layer. What stochastic depth drops is one sequence's branch, as in timm's, whose
    /// sequences are of one position inside the patches.
    fn layer(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        tap: &str,
        x: &Tensor,
        drop_path: f32,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor, ModelError> {
        let (width, heads) = (x.shape()[2], self.sizes.heads);
        let init = Init::Normal(0.01);
        let y = g.layer_norm(&path.at("norm1"), x, LN_EPS)?;
        let qkv = g.linear(&path.at("attn.qkv"), &y, 3 * width, true, init)?;
        if taps.wants(tap) {
            let map = g.attention_map(&qkv, heads, false)?;
            taps.add(tap, &map);
        }
        let y = g.attention(&qkv, heads, false)?;
        let y = g.linear(&path.at("attn.proj"), &y, width, true, init)?;
        let y = g.drop_path(&y, drop_path)?;
        let x = g.add(x, &y)?;
        let y = g.layer_norm(&path.at("norm2"), &x, LN_EPS)?;
        let y = g.linear(&path.at("mlp.fc1"), &y, scaled(width, self.sizes.mlp_ratio), true, init)?;
        let y = g.activation(&y, Activation::Silu);
        let y = g.linear(&path.at("mlp.fc2"), &y, width, true, init)?;
        let y = g.drop_path(&y, drop_path)?;
        Ok(g.add(&x, &y)?)
    }

    /// MobileViT block (§3.1 of the paper): local convolution, transformer over the patches, fusion with the input. A
    /// map that the patch does not divide is resized up for the transformer and back.
    fn block(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        name: &str,
        x_bhwc: &Tensor,
        (i, drop_path): (usize, f32),
        taps: &mut Taps<'_>,
    ) -> Result<Tensor, ModelError> {
        let (side, channels) = (x_bhwc.shape()[1], self.sizes.channels[i]);
        let (width, depth) = (
            self.sizes.transformer_dims[i - FIRST_TRANSFORMER_STAGE],
            self.sizes.transformer_depths[i - FIRST_TRANSFORMER_STAGE],
        );
        let (patch, silu) = ([self.sizes.patch_size; 2], Activation::Silu);
        let y = conv_norm_act(g, &path.at("conv_kxk"), x_bhwc, ConvArgs::new(channels, 3), silu)?;
        let y = g.conv2d(&path.at("conv_1x1"), &y, ConvArgs::new(width, 1))?;
        let whole = self.patches(side) * self.sizes.patch_size;
        let y = g.resize_bilinear(&y, whole, whole)?;
        let mut y_bpnc = g.unfold_patches(&y, patch)?;
        for k in 0..depth {
            let tap = format!("{name}.transformer.{k}.attn");
            y_bpnc = self.layer(g, &path.at("transformer").at(k), &tap, &y_bpnc, drop_path, taps)?;
        }
        let y_bpnc = g.layer_norm(&path.at("norm"), &y_bpnc, LN_EPS)?;
        let y = g.fold_patches(&y_bpnc, whole, whole, patch)?;
        let y = g.resize_bilinear(&y, side, side)?;
        let y = conv_norm_act(g, &path.at("conv_proj"), &y, ConvArgs::new(channels, 1), silu)?;
        let y = g.concat(x_bhwc, &y)?;
        conv_norm_act(g, &path.at("conv_fusion"), &y, ConvArgs::new(channels, 3), silu)
    }
}

impl Backbone for MobileVit {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> toml::Table {
        encode(&self.sizes)
    }

    fn preprocess(&self) -> Preprocess {
        Preprocess { image_size: 256, mean: [0.0; 3], std: [1.0; 3], crop_pct: 0.9, ..IMAGENET }
    }

    fn features(&self) -> usize {
        self.sizes.features
    }

    fn check_image_size(&self, size: usize) -> Result<(), ModelError> {
        check_reduction(self.name, 2 * self.sizes.strides.iter().product::<usize>(), size)
    }

    fn taps(&self, image_size: usize) -> Result<Vec<TapInfo>, ModelError> {
        self.check_image_size(image_size)?;
        let (s, sides) = (&self.sizes, self.sides(image_size));
        let mut taps = vec![TapInfo::map("stem", sides[0], s.stem)];
        for i in 0..5 {
            if i >= FIRST_TRANSFORMER_STAGE {
                let grid = [self.patches(sides[i + 1]); 2];
                let shape =
                    TapShape::Attention { groups: s.patch_size * s.patch_size, heads: s.heads, prefix: 0, grid };
                taps.extend(
                    (0..s.transformer_depths[i - FIRST_TRANSFORMER_STAGE])
                        .map(|k| TapInfo { name: format!("stages.{i}.{}.transformer.{k}.attn", s.depths[i]), shape }),
                );
            }
            taps.push(TapInfo::map(format!("stages.{i}"), sides[i + 1], s.channels[i]));
        }
        taps.push(TapInfo::map("final_conv", sides[5], s.features));
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
        let (s, silu) = (&self.sizes, Activation::Silu);
        // The transformers are blocks, too.
        let blocks = s.depths.iter().sum::<usize>() + s.transformer_depths.len();
        let mut rates = drop_path_rates(s.drop_path, blocks);
        let mut next = || rates.next().unwrap_or_default();
        let mut x_bhwc = conv_norm_act(g, &path.at("stem"), image, ConvArgs::new(s.stem, 3).stride(2), silu)?;
        taps.add("stem", &x_bhwc);
        for i in 0..5 {
            let stage = path.at("stages").at(i);
            for j in 0..s.depths[i] {
                let stride = if j == 0 { s.strides[i] } else { 1 };
                x_bhwc = inverted_residual(g, &stage.at(j), &x_bhwc, [s.channels[i], stride], s.expansion, next())?;
            }
            if i >= FIRST_TRANSFORMER_STAGE {
                let j = s.depths[i];
                let name = format!("stages.{i}.{j}");
                x_bhwc = self.block(g, &stage.at(j), &name, &x_bhwc, (i, next()), &mut taps)?;
            }
            taps.add(&format!("stages.{i}"), &x_bhwc);
        }
        let x_bhwc = conv_norm_act(g, &path.at("final_conv"), &x_bhwc, ConvArgs::new(s.features, 1), silu)?;
        taps.add("final_conv", &x_bhwc);
        let features = g.global_avg_pool(&x_bhwc)?;
        let embedding = match dim {
            Some(dim) => g.linear(&path.at("head.fc"), &features, dim, true, Init::Normal(0.01))?,
            None => features.clone(),
        };
        Ok(ImageOutputs { features, embedding, taps: taps.finish()? })
    }
}
