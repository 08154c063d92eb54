use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::markers::{AspectRatio, Share};

/// Random changes to training images, drawn once for a sample: student and teachers see the same pixels.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Augment {
    /// Random resized crop. Absent: the whole image, resized, its centre cut out.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub crop: Option<Crop>,
    /// Probability of a left–right flip.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub flip: f64,
    /// Blends of two images with their captions' targets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub mixup: Option<Mixup>,
    /// A box of one image pasted into another, with their captions' targets.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cutmix: Option<CutMix>,
}

/// Random resized crop.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Crop {
    /// Least and greatest share of the image's area that is kept.
    #[schemars(with = "[Share; 2]")]
    pub scale: [f64; 2],
    /// Least and greatest ratio of width to height.
    #[schemars(with = "[AspectRatio; 2]")]
    pub ratio: [f64; 2],
}

impl Default for Crop {
    fn default() -> Self {
        Self { scale: [0.9, 1.0], ratio: [0.75, 1.3333] }
    }
}

/// Mixup: image = k·a + (1−k)·b with k drawn from Beta(alpha, alpha); the targets are mixed alike.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Mixup {
    /// Both parameters of the Beta distribution that k is drawn from.
    #[schemars(range(max = 100.0), extend("exclusiveMinimum" = 0))]
    pub alpha: f64,
    /// Share of batches that are mixed.
    #[serde(default = "always")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub probability: f64,
}

/// CutMix: a box of b pasted into a; k, drawn from Beta(alpha, alpha), is the share of a that stays.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct CutMix {
    /// Both parameters of the Beta distribution that k is drawn from.
    #[schemars(range(max = 100.0), extend("exclusiveMinimum" = 0))]
    pub alpha: f64,
    /// Share of batches that get a pasted box.
    #[serde(default = "always")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub probability: f64,
}

fn always() -> f64 {
    1.0
}
