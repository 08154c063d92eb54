//! The vision transformer in CLIP's form (Radford et al. 2021): class token, norm before the blocks, projection
//! without bias. Names and initialisation of open_clip's `VisionTransformer`.

use mcpipe_graph::{ConvArgs, GraphBuilder, Init, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backbone::{
    Backbone, CLIP_MEAN, CLIP_STD, IMAGENET, ImageOutputs, Naming, Preprocess, TapInfo, TapShape, Taps, image_side,
};
use crate::error::ModelError;
use crate::layers::check_patches;
use crate::params::{Sizes, decode, encode, positive, positive_factor, schema};
use crate::registry::BackboneEntry;
use crate::transformer::{BlockInit, LN_EPS, MlpActivation, Transformer, project};

/// Sizes of a vision transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct VitSizes {
    /// Side of a patch in pixels; it divides the image size.
    #[schemars(range(min = 1, max = 1024))]
    pub patch_size: usize,
    /// Width of a token.
    #[schemars(range(min = 1, max = 65536))]
    pub width: usize,
    /// Number of blocks.
    #[schemars(range(min = 1, max = 256))]
    pub depth: usize,
    /// Attention heads; they divide the width.
    #[schemars(range(min = 1, max = 256))]
    pub heads: usize,
    /// Hidden width of an MLP per width.
    #[schemars(range(min = 0.125, max = 16.0))]
    pub mlp_ratio: f64,
    /// Activation of the MLPs.
    pub act: MlpActivation,
}

impl Sizes for VitSizes {
    fn check(&self) -> Result<(), (&'static str, String)> {
        positive("patch_size", &[self.patch_size])?;
        positive("depth", &[self.depth])?;
        check_transformer(self.width, self.heads, self.mlp_ratio)
    }
}

/// What holds for every transformer of CLIP.
pub(crate) fn check_transformer(width: usize, heads: usize, mlp_ratio: f64) -> Result<(), (&'static str, String)> {
    positive("width", &[width])?;
    positive("heads", &[heads])?;
    positive_factor("mlp_ratio", mlp_ratio)?;
    if !width.is_multiple_of(heads) {
        return Err(("heads", format!("{heads} heads don't divide the width {width}")));
    }
    if (width as f64 * mlp_ratio) as usize == 0 {
        return Err(("mlp_ratio", "leaves the MLP without a hidden layer".into()));
    }
    Ok(())
}

const BASE_SIZES: VitSizes =
    VitSizes { patch_size: 16, width: 768, depth: 12, heads: 12, mlp_ratio: 4.0, act: MlpActivation::Gelu };

const SMALL_SIZES: VitSizes = VitSizes { width: 384, heads: 6, ..BASE_SIZES };

const BASE_32_SIZES: VitSizes = VitSizes { patch_size: 32, ..BASE_SIZES };

const TINY_SIZES: VitSizes = VitSizes { width: 192, heads: 3, ..BASE_SIZES };

/// `vit`.
pub const VIT: BackboneEntry = BackboneEntry {
    name: "vit",
    family: "vit",
    summary: "Vision transformer in CLIP's form, any size; ViT-B/16 by default (open_clip's names)",
    params: |generator| schema(generator, &BASE_SIZES),
    make: |set| Vit::boxed("vit", &BASE_SIZES, set),
};

/// `vit_tiny`.
pub const TINY: BackboneEntry = BackboneEntry {
    name: "vit_tiny",
    family: "vit",
    summary: "ViT-Ti/16 in CLIP's form: a vision transformer of width 192, 5.5 M parameters (open_clip's names)",
    params: |generator| schema(generator, &TINY_SIZES),
    make: |set| Vit::boxed("vit_tiny", &TINY_SIZES, set),
};

/// `vit_small`.
pub const SMALL: BackboneEntry = BackboneEntry {
    name: "vit_small",
    family: "vit",
    summary: "ViT-S/16 in CLIP's form: a vision transformer of width 384, 22 M parameters (open_clip's names)",
    params: |generator| schema(generator, &SMALL_SIZES),
    make: |set| Vit::boxed("vit_small", &SMALL_SIZES, set),
};

/// `vit_base`.
pub const BASE: BackboneEntry = BackboneEntry {
    name: "vit_base",
    family: "vit",
    summary: "ViT-B/16 in CLIP's form: a vision transformer of width 768, 86 M parameters (open_clip's names)",
    params: |generator| schema(generator, &BASE_SIZES),
    make: |set| Vit::boxed("vit_base", &BASE_SIZES, set),
};

/// `vit_base_32`.
pub const BASE_32: BackboneEntry = BackboneEntry {
    name: "vit_base_32",
    family: "vit",
    summary: "ViT-B/32 in CLIP's form: patches of 32 pixels, width 768, 88 M parameters (open_clip's names)",
    params: |generator| schema(generator, &BASE_32_SIZES),
    make: |set| Vit::boxed("vit_base_32", &BASE_32_SIZES, set),
};

/// A vision transformer.
#[derive(Clone, Debug)]
pub struct Vit {
    name: &'static str,
    sizes: VitSizes,
}

impl Vit {
    fn boxed(name: &'static str, defaults: &VitSizes, set: &toml::Table) -> Result<Box<dyn Backbone>, ModelError> {
        Ok(Box::new(Vit { name, sizes: decode(name, defaults, set)? }))
    }

    fn transformer(&self) -> Transformer {
        let s = &self.sizes;
        Transformer {
            depth: s.depth,
            heads: s.heads,
            hidden: (s.width as f64 * s.mlp_ratio) as usize,
            act: s.act,
            causal: false,
            first: 0,
            eps: LN_EPS,
            init: BlockInit {
                in_proj: Init::XavierUniform,
                out_proj: Init::FanInUniform,
                c_fc: Init::FanInUniform,
                c_proj: Init::FanInUniform,
            },
        }
    }
}

impl Backbone for Vit {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> toml::Table {
        encode(&self.sizes)
    }

    fn preprocess(&self) -> Preprocess {
        Preprocess { mean: CLIP_MEAN, std: CLIP_STD, crop_pct: 1.0, ..IMAGENET }
    }

    fn naming(&self) -> Naming {
        Naming::OpenClip
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
        let attention = TapShape::Attention { groups: 1, heads: s.heads, prefix: 1, grid };
        let tokens = TapShape::Tokens { prefix: 1, grid, channels: s.width };
        let block = |i: usize| {
            let name = format!("transformer.resblocks.{i}");
            [TapInfo { name: format!("{name}.attn"), shape: attention }, TapInfo { name, shape: tokens }]
        };
        Ok((0..s.depth).flat_map(block).collect())
    }

    fn build(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        image: &Tensor,
        dim: Option<usize>,
        taps: &[String],
    ) -> Result<ImageOutputs, ModelError> {
        let side = image_side(self.name(), image)?;
        let mut taps = Taps::new(self.name(), taps, self.taps(side)?)?;
        let (batch, s) = (image.shape()[0], &self.sizes);
        let tokens = (side / s.patch_size).pow(2);
        let conv1 = path.at("conv1");
        // PyTorch's default initialisation, not the one that `conv2d` declares.
        g.param(&conv1.at("weight"), &[s.width, 3, s.patch_size, s.patch_size], Init::FanInUniform)?;
        let patches = ConvArgs { stride: s.patch_size, pad: 0, ..ConvArgs::new(s.width, s.patch_size) };
        let x_bhwc = g.conv2d(&conv1, image, patches)?;
        let x_bnc = g.reshape(&x_bhwc, &[batch, tokens, s.width])?;
        let normal = Init::Normal((s.width as f32).powf(-0.5));
        let class = g.param(&path.at("class_embedding"), &[s.width], normal)?;
        let x_bnc = g.prepend_token(&class, &x_bnc)?;
        let position = g.param(&path.at("positional_embedding"), &[tokens + 1, s.width], normal)?;
        let x_bnc = g.add_broadcast(&x_bnc, &position)?;
        let x_bnc = g.layer_norm(&path.at("ln_pre"), &x_bnc, LN_EPS)?;
        let x_bnc = self.transformer().build(g, &path.at("transformer"), &x_bnc, &mut taps)?;
        // The norm works on each token by itself, so only the class token needs it.
        let class = g.slice_rows(&x_bnc, 0, 1)?;
        let class = g.reshape(&class, &[batch, s.width])?;
        let features = g.layer_norm(&path.at("ln_post"), &class, LN_EPS)?;
        let embedding = match dim {
            Some(dim) => project(g, &path.at("proj"), &features, dim)?,
            None => features.clone(),
        };
        Ok(ImageOutputs { features, embedding, taps: taps.finish()? })
    }
}
