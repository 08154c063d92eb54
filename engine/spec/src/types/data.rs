use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Params;
use super::markers::{PathText, TemplateText};

/// Where training and evaluation samples come from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Data {
    /// A data set that the engine makes itself, written as real shards and read back like any other.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub make: Option<MakeData>,
    /// Image–text pairs to train on.
    #[serde(default)]
    pub train: TrainData,
    /// The labelled set to evaluate on.
    #[serde(default)]
    pub eval: EvalData,
}

/// A data set that the engine makes itself.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-mcpipe-component" = "data-maker", "x-mcpipe-tag" = "kind"))]
pub struct MakeData {
    /// Which data set to make.
    pub kind: String,
    /// The maker's own parameters.
    #[serde(flatten)]
    #[schemars(skip)]
    pub params: Params,
}

/// Image–text pairs to train on, in WebDataset shards.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct TrainData {
    /// Tar files: one pattern or a list; braces expand as in `part-{00000..00099}.tar`. Absent: the
    /// training split of `data.make`. A relative path starts at this file's folder, one given by
    /// `--set` at the current folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub shards: Option<Shards>,
    /// What a sample that cannot be read does: `skip` counts it and goes on, `fail` stops the run.
    pub on_bad_sample: OnBadSample,
    /// With `on_bad_sample = "skip"`: so many bad samples, counted over the whole run, stop it after all.
    pub max_bad_samples: u64,
    /// Threads that decode and augment.
    #[schemars(range(min = 1, max = 1024))]
    pub workers: usize,
}

impl Default for TrainData {
    fn default() -> Self {
        Self { shards: None, on_bad_sample: OnBadSample::Skip, max_bad_samples: 100, workers: 2 }
    }
}

/// One shard pattern or a list of them.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum Shards {
    /// One pattern.
    One(#[schemars(with = "PathText")] String),
    /// Several patterns, read in this order before shuffling.
    Many(#[schemars(with = "Vec<PathText>", length(min = 1))] Vec<String>),
}

impl Shards {
    /// The patterns, braces not yet expanded.
    pub fn patterns(&self) -> &[String] {
        match self {
            Self::One(pattern) => std::slice::from_ref(pattern),
            Self::Many(patterns) => patterns,
        }
    }
}

/// What a sample that cannot be read does.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum OnBadSample {
    /// Count it and go on, up to `max_bad_samples`.
    Skip,
    /// Stop the run.
    Fail,
}

/// The labelled set to evaluate on, in CLIP_benchmark's layout.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct EvalData {
    /// Folder that holds `classnames.txt` and `<split>/0.tar`. Absent: the set of `data.make`, or the
    /// folder above the first training shard where that has this layout.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-mcpipe-path" = true, "minLength" = 1))]
    pub root: Option<PathBuf>,
    /// Folder of the split below the root.
    #[schemars(length(min = 1))]
    pub split: String,
    /// Prompts of the zero-shot classifier, with `{c}` for the class name. Absent: the root's
    /// `zeroshot_classification_templates.txt`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<TemplateText>>", length(min = 1))]
    pub templates: Option<Vec<String>>,
    /// Images in one forward pass.
    #[schemars(range(min = 1, max = 65536))]
    pub batch_size: usize,
}

impl Default for EvalData {
    fn default() -> Self {
        Self { root: None, split: "test".to_owned(), templates: None, batch_size: 64 }
    }
}
