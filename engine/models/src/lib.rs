//! mcpipe's models: image backbones, text transformer, projection heads and their checkpoints.
//!
//! * [`backbones`], [`text_encoders`]: what is registered; [`backbone`], [`text_encoder`]: one of them with parameters
//!   from the file.
//! * [`Backbone::build`], [`TextEncoder::build`]: add it to a step graph, with taps for distillation.
//! * [`projection`]: projection head, regressors, logit scale.
//! * [`reparam`]: multi-branch blocks folded into single convolutions for inference.
//! * [`weights`]: safetensors in and out; [`export`]: the student under timm's and open_clip's names.
//!
//! A new image backbone is one file that implements [`Backbone`] and has an entry, and one line in `registry.rs`.

mod backbone;
mod bert;
mod convmixer;
mod convnext;
mod efficientnet;
mod error;
pub mod export;
mod fastvit;
mod layers;
mod mbconv;
mod mobilenetv3;
mod mobilevit;
mod mobilevitv2;
mod params;
pub mod projection;
mod registry;
pub mod reparam;
pub mod repmixer;
mod resnet;
mod siglip;
mod text;
mod transformer;
mod vit;
pub mod weights;

pub use backbone::{
    Backbone, CLIP_MEAN, CLIP_STD, IMAGENET_MEAN, IMAGENET_STD, ImageOutputs, Interpolation, Naming, Preprocess, Tap,
    TapInfo, TapShape,
};
pub use bert::{Bert, BertPool, BertSizes};
pub use convmixer::{ConvMixer, ConvMixerSizes};
pub use convnext::{ConvNext, ConvNextSizes};
pub use efficientnet::{EfficientNet, EfficientNetActivation, EfficientNetSizes};
pub use error::ModelError;
pub use fastvit::{FastVit, FastVitSizes};
pub use mobilenetv3::{MobileNetV3, MobileNetV3Sizes};
pub use mobilevit::{MobileVit, MobileVitSizes};
pub use mobilevitv2::{MobileVitV2, MobileVitV2Sizes};
pub use registry::{BackboneEntry, TextEncoderEntry, backbone, backbones, text_encoder, text_encoders};
pub use resnet::{ResNet, ResNetSizes};
pub use siglip::{Siglip, SiglipSizes};
pub use text::{LastToken, TextEncoder, TextOutputs, TextPool, TextSizes, TextTransformer, Vocabulary, eot_positions};
pub use transformer::MlpActivation;
pub use vit::{Vit, VitSizes};
pub use weights::{Checkpoint, WeightsError};
