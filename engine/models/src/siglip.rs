//! SigLIP's vision transformer (Zhai et al. 2023): no class token, pooling by attention of a learnt query. Names and
//! initialisation of timm's `vit_*_siglip_*`.

use mcpipe_graph::{ConvArgs, GraphBuilder, Init, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backbone::{Backbone, IMAGENET, ImageOutputs, Preprocess, TapInfo, TapShape, Taps, image_side};
use crate::error::ModelError;
use crate::layers::{check_patches, conv2d_with, torch_bias};
use crate::params::{Sizes, decode, encode, positive, schema};
use crate::registry::BackboneEntry;
use crate::transformer::MlpActivation;
use crate::vit::check_transformer;

/// LayerNorm's epsilon.
const EPS: f32 = 1e-6;
/// Deviation of the first weights.
const INIT: Init = Init::Normal(0.02);

/// Sizes of a SigLIP vision transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct SiglipSizes {
    /// Side of a patch in pixels; it divides the image size.
    #[schemars(range(min = 1, max = 1024))]
    pub patch_size: usize,
    /// Width of a token.
    #[schemars(range(min = 1, max = 65536))]
    pub width: usize,
    /// Number of blocks.
    #[schemars(range(min = 1, max = 256))]
    pub depth: usize,
    /// Attention heads, of the blocks and of the pooling; they divide the width.
    #[schemars(range(min = 1, max = 256))]
    pub heads: usize,
    /// Hidden width of an MLP per width.
    #[schemars(range(min = 0.125, max = 16.0))]
    pub mlp_ratio: f64,
    /// Activation of the MLPs.
    pub act: MlpActivation,
}

impl Sizes for SiglipSizes {
    fn check(&self) -> Result<(), (&'static str, String)> {
        positive("patch_size", &[self.patch_size])?;
        positive("depth", &[self.depth])?;
        check_transformer(self.width, self.heads, self.mlp_ratio)
    }
}

const BASE_SIZES: SiglipSizes =
    SiglipSizes { patch_size: 16, width: 768, depth: 12, heads: 12, mlp_ratio: 4.0, act: MlpActivation::Gelu };

const BASE_32_SIZES: SiglipSizes = SiglipSizes { patch_size: 32, act: MlpActivation::GeluTanh, ..BASE_SIZES };

/// `vit_base_patch16_siglip_224`.
pub const BASE: BackboneEntry = BackboneEntry {
    name: "vit_base_patch16_siglip_224",
    family: "siglip",
    summary: "SigLIP's ViT-B/16: pooling by attention, no class token (timm's names)",
    params: |generator| schema(generator, &BASE_SIZES),
    make: |set| Siglip::boxed("vit_base_patch16_siglip_224", 224, &BASE_SIZES, set),
};

/// `vit_base_patch32_siglip_256`.
pub const BASE_32: BackboneEntry = BackboneEntry {
    name: "vit_base_patch32_siglip_256",
    family: "siglip",
    summary: "SigLIP 2's ViT-B/32: as the B/16, with GELU by its tanh formula (timm's names)",
    params: |generator| schema(generator, &BASE_32_SIZES),
    make: |set| Siglip::boxed("vit_base_patch32_siglip_256", 256, &BASE_32_SIZES, set),
};

/// A SigLIP vision transformer.
#[derive(Clone, Debug)]
pub struct Siglip {
    name: &'static str,
    image_size: usize,
    sizes: SiglipSizes,
}

impl Siglip {
    fn boxed(
        name: &'static str,
        image_size: usize,
        defaults: &SiglipSizes,
        set: &toml::Table,
    ) -> Result<Box<dyn Backbone>, ModelError> {
        Ok(Box::new(Siglip { name, image_size, sizes: decode(name, defaults, set)? }))
    }

    /// A linear layer as timm starts every one of them: a narrow normal, no bias.
    fn linear(g: &mut GraphBuilder, path: &Path, x: &Tensor, out: usize) -> Result<Tensor, ModelError> {
        Ok(g.linear(path, x, out, true, INIT)?)
    }

    fn mlp(&self, g: &mut GraphBuilder, path: &Path, x: &Tensor) -> Result<Tensor, ModelError> {
        let s = &self.sizes;
        let y = Self::linear(g, &path.at("fc1"), x, (s.width as f64 * s.mlp_ratio) as usize)?;
        let y = g.activation(&y, s.act.into());
        Self::linear(g, &path.at("fc2"), &y, s.width)
    }

    fn block(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        name: &str,
        x: &Tensor,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor, ModelError> {
        let s = &self.sizes;
        let y = g.layer_norm(&path.at("norm1"), x, EPS)?;
        let qkv = Self::linear(g, &path.at("attn.qkv"), &y, 3 * s.width)?;
        let tap = format!("{name}.attn");
        if taps.wants(&tap) {
            let map = g.attention_map(&qkv, s.heads, false)?;
            taps.add(&tap, &map);
        }
        let y = g.attention(&qkv, s.heads, false)?;
        let y = Self::linear(g, &path.at("attn.proj"), &y, s.width)?;
        let x = g.add(x, &y)?;
        let y = g.layer_norm(&path.at("norm2"), &x, EPS)?;
        let y = self.mlp(g, &path.at("mlp"), &y)?;
        Ok(g.add(&x, &y)?)
    }

    /// The pooling of `x [B, N, width]`: attention of one query, then an MLP with a residual.
    fn pool(&self, g: &mut GraphBuilder, path: &Path, x: &Tensor) -> Result<Tensor, ModelError> {
        let width = self.sizes.width;
        let latent = g.param(&path.at("latent"), &[1, 1, width], Init::TruncNormal((width as f32).powf(-0.5)))?;
        let latent = g.reshape(&latent, &[1, width])?;
        let q = Self::linear(g, &path.at("q"), &latent, width)?;
        let kv = Self::linear(g, &path.at("kv"), x, 2 * width)?;
        let y = g.attention_pool(&q, &kv, self.sizes.heads)?;
        let x = Self::linear(g, &path.at("proj"), &y, width)?;
        let y = g.layer_norm(&path.at("norm"), &x, EPS)?;
        let y = self.mlp(g, &path.at("mlp"), &y)?;
        Ok(g.add(&x, &y)?)
    }
}

impl Backbone for Siglip {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> toml::Table {
        encode(&self.sizes)
    }

    fn preprocess(&self) -> Preprocess {
        Preprocess { image_size: self.image_size, mean: [0.5; 3], std: [0.5; 3], crop_pct: 0.9, ..IMAGENET }
    }

    fn features(&self) -> usize {
        self.sizes.width
    }

    fn check_image_size(&self, size: usize) -> Result<(), ModelError> {
        check_patches(self.name, self.sizes.patch_size, size)
    }

    fn taps(&self, image_size: usize) -> Result<Vec<TapInfo>, ModelError> {
        self.check_image_size(image_size)?;
        let s = &self.sizes;
        let grid = [image_size / s.patch_size; 2];
        let attention = TapShape::Attention { groups: 1, heads: s.heads, prefix: 0, grid };
        let tokens = TapShape::Tokens { prefix: 0, grid, channels: s.width };
        let block = |i: usize| {
            let name = format!("blocks.{i}");
            [TapInfo { name: format!("{name}.attn"), shape: attention }, TapInfo { name, shape: tokens }]
        };
        Ok((0..s.depth).flat_map(block).collect())
    }

    /// A head of as many outputs as the width is left out: SigLIP's image embedding is the pooled features.
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
        let (batch, s) = (image.shape()[0], &self.sizes);
        let tokens = (side / s.patch_size).pow(2);
        let conv = ConvArgs { stride: s.patch_size, pad: 0, bias: true, ..ConvArgs::new(s.width, s.patch_size) };
        let fan_in = 3 * s.patch_size * s.patch_size;
        let x_bhwc = conv2d_with(g, &path.at("patch_embed.proj"), image, conv, Init::FanInUniform, torch_bias(fan_in))?;
        let x_bnc = g.reshape(&x_bhwc, &[batch, tokens, s.width])?;
        let position = g.param(&path.at("pos_embed"), &[1, tokens, s.width], INIT)?;
        let mut x_bnc = g.add_broadcast(&x_bnc, &position)?;
        for i in 0..s.depth {
            let name = format!("blocks.{i}");
            x_bnc = self.block(g, &path.at(&name), &name, &x_bnc, &mut taps)?;
            taps.add(&name, &x_bnc);
        }
        let x_bnc = g.layer_norm(&path.at("norm"), &x_bnc, EPS)?;
        let features = self.pool(g, &path.at("attn_pool"), &x_bnc)?;
        let embedding = match dim {
            Some(dim) if dim != s.width => g.linear(&path.at("head"), &features, dim, true, INIT)?,
            _ => features.clone(),
        };
        Ok(ImageOutputs { features, embedding, taps: taps.finish()? })
    }
}
