use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::markers::PathText;
use super::{Params, Weights};

/// The image encoder to train.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("x-mcpipe-component" = "backbone", "x-mcpipe-tag" = "backbone"))]
pub struct Student {
    /// The image backbone.
    pub backbone: String,
    /// Side of the square input image in pixels.
    #[schemars(range(min = 8, max = 4096))]
    pub image_size: usize,
    /// Sizes of the backbone that differ from its published ones.
    #[serde(default, skip_serializing_if = "Params::is_empty")]
    pub params: Params,
    /// Weights that the backbone starts from: a file, or a table with its `path` and how it is taken. Absent: random ones.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub weights: Option<Weights>,
    /// Keep a running average of the student's weights.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ema: Option<Ema>,
    /// Also train the same student without distillation, to compare with.
    #[serde(default)]
    pub baseline: bool,
    /// Seed of the student's initialisation, shuffling and augmentation. Absent: the pipeline's. Teachers keep the
    /// pipeline's, so that one teacher serves students of several seeds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seed: Option<u64>,
}

/// A running average of the student's weights: avg ← momentum·avg + (1−momentum)·weights after each step.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ema {
    /// How much of the average a step keeps.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub momentum: f64,
    /// Evaluate and export the averaged weights instead of the trained ones.
    #[serde(default)]
    pub evaluate: bool,
}

/// An image tower.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("x-mcpipe-component" = "backbone", "x-mcpipe-tag" = "backbone"))]
pub struct Tower {
    /// The image backbone.
    pub backbone: String,
    /// Side of the square input image in pixels.
    #[schemars(range(min = 8, max = 4096))]
    pub image_size: usize,
    /// Sizes of the backbone that differ from its published ones.
    #[serde(default, skip_serializing_if = "Params::is_empty")]
    pub params: Params,
}

/// A text tower.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("x-mcpipe-component" = "text-encoder", "x-mcpipe-tag" = "encoder"))]
pub struct TextTower {
    /// The text encoder.
    pub encoder: String,
    /// Sizes of the encoder that differ from its published ones.
    #[serde(default, skip_serializing_if = "Params::is_empty")]
    pub params: Params,
    /// Vocabulary of an encoder that reads WordPiece: a text file with one piece a line (BERT's `vocab.txt`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PathText>")]
    pub vocab: Option<PathBuf>,
}

/// The frozen text encoder that the student's image embeddings are trained to match.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TextEncoder {
    /// The text tower of a teacher.
    Teacher(TextOfTeacher),
    /// A text encoder of its own, loaded from a file.
    Own(OwnText),
}

/// The text tower of a teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextOfTeacher {
    /// Name of the teacher whose text tower is used, frozen.
    #[schemars(extend("x-mcpipe-ref" = "teacher"))]
    pub teacher: String,
}

/// A text encoder loaded from a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(extend("x-mcpipe-component" = "text-encoder", "x-mcpipe-tag" = "encoder"))]
pub struct OwnText {
    /// The text encoder.
    pub encoder: String,
    /// Sizes of the encoder that differ from its published ones.
    #[serde(default, skip_serializing_if = "Params::is_empty")]
    pub params: Params,
    /// Vocabulary of an encoder that reads WordPiece: a text file with one piece a line (BERT's `vocab.txt`).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<PathText>")]
    pub vocab: Option<PathBuf>,
    /// File with the encoder's weights under open_clip's names, or under Hugging Face's.
    #[schemars(extend("x-mcpipe-path" = true, "minLength" = 1))]
    pub weights: PathBuf,
    /// Dimension of the text embedding.
    #[schemars(range(min = 1, max = 65536))]
    pub dim: usize,
}

/// The map from the student's own embedding to the space it shares with the text.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Projection {
    /// Form of the map.
    pub kind: ProjectionKind,
    /// Dimension of the shared space. Absent: the text embedding's.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub dim: Option<usize>,
    /// Width of the hidden layer of an `mlp`. Absent: the shared space's dimension.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 65536))]
    pub hidden: Option<usize>,
    /// Send the text embedding through the same map as the image embedding.
    pub shared: bool,
}

impl Default for Projection {
    fn default() -> Self {
        Self { kind: ProjectionKind::Linear, dim: None, hidden: None, shared: false }
    }
}

/// Form of the projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ProjectionKind {
    /// No map: the backbone's embedding has the shared dimension already.
    None,
    /// One matrix.
    Linear,
    /// Linear, GELU, linear.
    Mlp,
}
