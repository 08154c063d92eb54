use std::path::{Path, PathBuf};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::markers::PathText;

/// Weights to start from: a file, or a file and how it is taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Weights {
    /// The file; every parameter must be there with its shape.
    File(#[schemars(with = "PathText")] PathBuf),
    /// The file and how it is taken.
    Table(WeightsTable),
}

/// A weight file and how it is taken.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct WeightsTable {
    /// File with weights under timm's, open_clip's or Apple's names: safetensors, or a PyTorch checkpoint (`.pt`, `.pth`,
    /// `.bin`, also gzipped), of which nothing is executed.
    #[schemars(extend("x-mcpipe-path" = true, "minLength" = 1))]
    pub path: PathBuf,
    /// Patterns of the backbone's parameters that are taken, `*` for any characters, as `stages.*`. Absent: all. The
    /// others are initialised as without a file.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(inner(length(min = 1)))]
    pub include: Vec<String>,
    /// Patterns of the backbone's parameters that are not taken.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(inner(length(min = 1)))]
    pub exclude: Vec<String>,
    /// What may differ: `head` leaves the file's head and starts the model's own anew; `position` resizes the position
    /// embedding to the model's grid (bicubic, as timm and open_clip do).
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub resize: Vec<Resize>,
    /// The file is of a larger model of the same family: of its layers those at even distances are taken, the first and
    /// the last among them, of its channels the leading ones, and its position embedding is resized (after TinyCLIP's
    /// manual inheritance).
    #[serde(default)]
    pub inherit: bool,
}

/// A part of a model that may differ from the file's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Resize {
    /// The map from pooled features to the embedding or classes.
    Head,
    /// The position embedding.
    Position,
}

impl Weights {
    /// The file.
    pub fn path(&self) -> &Path {
        match self {
            Self::File(path) => path,
            Self::Table(table) => &table.path,
        }
    }

    /// How it is taken, where the pipeline says so.
    pub fn table(&self) -> Option<&WeightsTable> {
        match self {
            Self::File(_) => None,
            Self::Table(table) => Some(table),
        }
    }
}
