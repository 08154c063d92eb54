//! ResNet (He et al. 2015, arXiv:1512.03385; the stride on the 3x3 convolution) with the layers, names and
//! initialisation of timm's `resnet18` and `resnet50`.

use mcpipe_graph::{Activation, ConvArgs, GraphBuilder, Init, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backbone::{Backbone, IMAGENET, ImageOutputs, Preprocess, TapInfo, Taps, image_side};
use crate::error::ModelError;
use crate::layers::{ConvActivation, check_reduction, conv_bn, drop_path_rates, strided};
use crate::params::{Sizes, decode, encode, positive, rate, schema};
use crate::registry::BackboneEntry;

/// Sizes of a ResNet of four stages, each of which but the first halves the map.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct ResNetSizes {
    /// Channels of the stages' 3x3 convolutions.
    #[schemars(inner(range(min = 1, max = 16384)))]
    pub channels: [usize; 4],
    /// Blocks of the stages.
    #[schemars(inner(range(min = 1, max = 64)))]
    pub depths: [usize; 4],
    /// Whether a block is 1x1, 3x3, 1x1 with four times as many channels at its end; else it is two 3x3 convolutions.
    pub bottleneck: bool,
    /// Activation.
    pub act: ConvActivation,
    /// Rate of stochastic depth of the last block; it rises linearly from 0 at the first.
    #[schemars(range(min = 0.0, max = 0.9))]
    pub drop_path: f64,
}

impl Sizes for ResNetSizes {
    fn check(&self) -> Result<(), (&'static str, String)> {
        positive("channels", &self.channels)?;
        positive("depths", &self.depths)?;
        rate("drop_path", self.drop_path, 0.9)
    }
}

const R18_SIZES: ResNetSizes = ResNetSizes {
    channels: [64, 128, 256, 512],
    depths: [2, 2, 2, 2],
    bottleneck: false,
    act: ConvActivation::Relu,
    drop_path: 0.0,
};
const R50_SIZES: ResNetSizes = ResNetSizes { depths: [3, 4, 6, 3], bottleneck: true, ..R18_SIZES };

/// `resnet18`.
pub const R18: BackboneEntry = BackboneEntry {
    name: "resnet18",
    family: "resnet",
    summary: "ResNet-18: 11.7 M parameters (timm's names)",
    params: |generator| schema(generator, &R18_SIZES),
    make: |set| ResNet::boxed("resnet18", &R18_SIZES, set),
};

/// `resnet50`.
pub const R50: BackboneEntry = BackboneEntry {
    name: "resnet50",
    family: "resnet",
    summary: "ResNet-50: bottleneck blocks, 25.6 M parameters (timm's names)",
    params: |generator| schema(generator, &R50_SIZES),
    make: |set| ResNet::boxed("resnet50", &R50_SIZES, set),
};

/// Channels of the 7x7 stem.
const STEM: usize = 64;

/// A ResNet.
#[derive(Clone, Debug)]
pub struct ResNet {
    name: &'static str,
    sizes: ResNetSizes,
}

impl ResNet {
    fn boxed(name: &'static str, defaults: &ResNetSizes, set: &toml::Table) -> Result<Box<dyn Backbone>, ModelError> {
        Ok(Box::new(ResNet { name, sizes: decode(name, defaults, set)? }))
    }

    /// Channels after stage i.
    fn out(&self, i: usize) -> usize {
        self.sizes.channels[i] * if self.sizes.bottleneck { 4 } else { 1 }
    }

    /// A residual block of stage i.
    fn block(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        x_bhwc: &Tensor,
        i: usize,
        stride: usize,
        drop_path: f32,
    ) -> Result<Tensor, ModelError> {
        let (c_in, c, out) = (x_bhwc.shape()[3], self.sizes.channels[i], self.out(i));
        let (act, identity) = (Activation::from(self.sizes.act), Activation::Identity);
        let layers = if self.sizes.bottleneck {
            vec![ConvArgs::new(c, 1), ConvArgs::new(c, 3).stride(stride), ConvArgs::new(out, 1)]
        } else {
            vec![ConvArgs::new(c, 3).stride(stride), ConvArgs::new(out, 3)]
        };
        let mut y = x_bhwc.clone();
        for (k, conv) in (1..).zip(&layers) {
            let (after, bn) = (if k < layers.len() { act } else { identity }, path.at(format!("bn{k}")));
            if k == layers.len() {
                // The block starts as the identity (Goyal et al. 2017, §5.1), as timm's does.
                g.param(&bn.at("weight"), &[out], Init::Zeros)?;
            }
            y = conv_bn(g, &path.at(format!("conv{k}")), &bn, &y, *conv, after)?;
        }
        let y = g.drop_path(&y, drop_path)?;
        let shortcut = if stride != 1 || c_in != out {
            let down = path.at("downsample");
            conv_bn(g, &down.at(0), &down.at(1), x_bhwc, ConvArgs::new(out, 1).stride(stride), identity)?
        } else {
            x_bhwc.clone()
        };
        let sum = g.add(&y, &shortcut)?;
        Ok(g.activation(&sum, act))
    }
}

impl Backbone for ResNet {
    fn name(&self) -> &'static str {
        self.name
    }

    fn params(&self) -> toml::Table {
        encode(&self.sizes)
    }

    fn preprocess(&self) -> Preprocess {
        Preprocess { crop_pct: 0.95, ..IMAGENET }
    }

    fn features(&self) -> usize {
        self.out(3)
    }

    fn check_image_size(&self, size: usize) -> Result<(), ModelError> {
        check_reduction(self.name, 32, size)
    }

    fn taps(&self, image_size: usize) -> Result<Vec<TapInfo>, ModelError> {
        self.check_image_size(image_size)?;
        let mut side = strided(image_size, 2);
        let mut taps = vec![TapInfo::map("act1", side, STEM)];
        for i in 0..4 {
            side = strided(side, 2);
            taps.push(TapInfo::map(format!("layer{}", i + 1), side, self.out(i)));
        }
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
        let stem = ConvArgs::new(STEM, 7).stride(2);
        let x_bhwc = conv_bn(g, &path.at("conv1"), &path.at("bn1"), image, stem, self.sizes.act.into())?;
        taps.add("act1", &x_bhwc);
        let mut x_bhwc = g.max_pool(&x_bhwc, 3, 2, 1)?;
        let mut rates = drop_path_rates(self.sizes.drop_path, self.sizes.depths.iter().sum());
        for i in 0..4 {
            let stage = format!("layer{}", i + 1);
            for j in 0..self.sizes.depths[i] {
                let stride = if i > 0 && j == 0 { 2 } else { 1 };
                let drop = rates.next().unwrap_or_default();
                x_bhwc = self.block(g, &path.at(&stage).at(j), &x_bhwc, i, stride, drop)?;
            }
            taps.add(&stage, &x_bhwc);
        }
        let features = g.global_avg_pool(&x_bhwc)?;
        let embedding = match dim {
            Some(dim) => {
                // PyTorch's default for a linear layer, which timm leaves in place here.
                let bound = (self.features() as f32).sqrt().recip();
                g.param(&path.at("fc.bias"), &[dim], Init::Uniform(bound))?;
                g.linear(&path.at("fc"), &features, dim, true, Init::FanInUniform)?
            }
            None => features.clone(),
        };
        Ok(ImageOutputs { features, embedding, taps: taps.finish()? })
    }
}
