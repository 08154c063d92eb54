//! ConvMixer (Trockman & Kolter 2022, arXiv:2201.09792) with the layers, names and initialisation of timm's
//! `convmixer_1024_20_ks9_p14`.

use mcpipe_graph::{Activation, BatchNormArgs, ConvArgs, GraphBuilder, Init, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backbone::{Backbone, IMAGENET, ImageOutputs, Preprocess, TapInfo, Taps, image_side};
use crate::error::ModelError;
use crate::layers::{conv2d_with, torch_bias};
use crate::params::{Sizes, decode, encode, positive, schema};
use crate::registry::BackboneEntry;

/// Sizes of a ConvMixer: patches, then blocks that mix places, then channels, at one resolution.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ConvMixerSizes {
    /// Channels throughout.
    #[schemars(range(min = 1, max = 16384))]
    pub width: usize,
    /// Blocks.
    #[schemars(range(min = 1, max = 256))]
    pub depth: usize,
    /// Side of the depthwise convolutions; odd.
    #[schemars(range(min = 1, max = 63))]
    pub kernel_size: usize,
    /// Side of the patches that the first convolution takes one by one.
    #[schemars(range(min = 1, max = 256))]
    pub patch_size: usize,
}

impl Sizes for ConvMixerSizes {
    fn check(&self) -> Result<(), (&'static str, String)> {
        positive("width", &[self.width])?;
        positive("depth", &[self.depth])?;
        positive("patch_size", &[self.patch_size])?;
        if self.kernel_size.is_multiple_of(2) {
            return Err(("kernel_size", "an even kernel has no middle".into()));
        }
        Ok(())
    }
}

const SIZES: ConvMixerSizes = ConvMixerSizes { width: 1024, depth: 20, kernel_size: 9, patch_size: 14 };

/// `convmixer_1024_20_ks9_p14`.
pub const KS9_P14: BackboneEntry = BackboneEntry {
    name: "convmixer_1024_20_ks9_p14",
    family: "convmixer",
    summary: "ConvMixer-1024/20: patches mixed by convolutions alone, 24.4 M parameters (timm's names)",
    params: |generator| schema(generator, &SIZES),
    make: |set| ConvMixer::boxed(set),
};

/// A ConvMixer.
#[derive(Clone, Debug)]
pub struct ConvMixer {
    sizes: ConvMixerSizes,
}

impl ConvMixer {
    fn boxed(set: &toml::Table) -> Result<Box<dyn Backbone>, ModelError> {
        Ok(Box::new(ConvMixer { sizes: decode(KS9_P14.name, &SIZES, set)? }))
    }

    /// Convolution at `{path}.{at}`, GELU, batch norm two places on.
    fn layer(g: &mut GraphBuilder, path: &Path, at: usize, x: &Tensor, a: ConvArgs) -> Result<Tensor, ModelError> {
        let fan_in = x.shape()[3] / a.groups * a.kernel * a.kernel;
        let a = ConvArgs { bias: true, ..a };
        let y = conv2d_with(g, &path.at(at), x, a, Init::FanInUniform, torch_bias(fan_in))?;
        let y = g.activation(&y, Activation::Gelu);
        Ok(g.batch_norm(&path.at(at + 2), &y, BatchNormArgs::new(Activation::Identity))?)
    }
}

impl Backbone for ConvMixer {
    fn name(&self) -> &'static str {
        KS9_P14.name
    }

    fn params(&self) -> toml::Table {
        encode(&self.sizes)
    }

    fn preprocess(&self) -> Preprocess {
        Preprocess { crop_pct: 0.96, ..IMAGENET }
    }

    fn features(&self) -> usize {
        self.sizes.width
    }

    fn check_image_size(&self, size: usize) -> Result<(), ModelError> {
        let patch = self.sizes.patch_size;
        if size < patch {
            let message = format!("it takes patches of {patch} pixels, so the side is {patch} or more");
            return Err(ModelError::ImageSize { backbone: self.name().to_owned(), size, message });
        }
        Ok(())
    }

    fn taps(&self, image_size: usize) -> Result<Vec<TapInfo>, ModelError> {
        self.check_image_size(image_size)?;
        let side = image_size / self.sizes.patch_size;
        Ok((0..self.sizes.depth).map(|i| TapInfo::map(format!("blocks.{i}"), side, self.sizes.width)).collect())
    }

    fn build(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        image: &Tensor,
        dim: Option<usize>,
        taps: &[String],
    ) -> Result<ImageOutputs, ModelError> {
        let mut taps = Taps::new(self.name(), taps, self.taps(image_side(self.name(), image)?)?)?;
        let s = &self.sizes;
        let patches = ConvArgs { pad: 0, ..ConvArgs::new(s.width, s.patch_size).stride(s.patch_size) };
        let mut x_bhwc = Self::layer(g, &path.at("stem"), 0, image, patches)?;
        for i in 0..s.depth {
            let block = path.at("blocks").at(i);
            let places = ConvArgs::new(s.width, s.kernel_size).groups(s.width);
            let y = Self::layer(g, &block.at(0).at("fn"), 0, &x_bhwc, places)?;
            let y = g.add(&y, &x_bhwc)?;
            x_bhwc = Self::layer(g, &block, 1, &y, ConvArgs::new(s.width, 1))?;
            taps.add(&format!("blocks.{i}"), &x_bhwc);
        }
        let features = g.global_avg_pool(&x_bhwc)?;
        let embedding = match dim {
            Some(dim) => {
                g.param(&path.at("head.bias"), &[dim], torch_bias(s.width))?;
                g.linear(&path.at("head"), &features, dim, true, Init::FanInUniform)?
            }
            None => features.clone(),
        };
        Ok(ImageOutputs { features, embedding, taps: taps.finish()? })
    }
}
