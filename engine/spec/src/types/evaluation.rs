use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::markers::TemplateText;
use super::{DEVICE_PATTERN, NAME_PATTERN, Params};

/// An evaluation of the student.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-mcpipe-component" = "evaluation", "x-mcpipe-tag" = "kind"))]
pub struct Evaluation {
    /// Name under which its results are recorded.
    #[schemars(length(min = 1, max = 100), extend("pattern" = NAME_PATTERN))]
    pub name: String,
    /// What is measured.
    pub kind: String,
    /// Steps between two evaluations during training; 0: once, at the end.
    #[serde(default)]
    pub every_steps: u64,
    /// Folder of the data. Absent: `data.eval`'s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-mcpipe-path" = true, "minLength" = 1))]
    pub root: Option<PathBuf>,
    /// Folder of the split below the root. Absent: `data.eval`'s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1))]
    pub split: Option<String>,
    /// Prompts, with `{c}` for the class name. Absent: `data.eval`'s.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<TemplateText>>", length(min = 1))]
    pub templates: Option<Vec<String>>,
    /// The evaluation's own parameters.
    #[serde(flatten)]
    #[schemars(skip)]
    pub params: Params,
}

impl Evaluation {
    /// What a file without `[[eval]]` evaluates.
    pub(crate) fn default_list() -> Vec<Self> {
        vec![Self {
            name: "zero_shot".to_owned(),
            kind: "zero_shot".to_owned(),
            every_steps: 0,
            root: None,
            split: None,
            templates: None,
            params: Params::default(),
        }]
    }
}

/// The forms in which the trained student is written.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Export {
    /// Whose parameter names the exported files use; one safetensors file each.
    #[schemars(extend("uniqueItems" = true))]
    pub formats: Vec<ExportFormat>,
}

impl Default for Export {
    fn default() -> Self {
        Self { formats: vec![ExportFormat::Timm, ExportFormat::OpenClip] }
    }
}

/// Parameter names of an exported file.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum ExportFormat {
    /// The image trunk alone, as `timm.create_model(..).load_state_dict` takes it.
    Timm,
    /// Image trunk, projection and text tower, as open_clip's `CLIP` with a timm tower names them.
    OpenClip,
}

/// Where results are kept and how much of the machine is used.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Run {
    /// Folder in which each run gets its directory. Absent: `runs` in the current folder.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("x-mcpipe-path" = true, "minLength" = 1))]
    pub dir: Option<PathBuf>,
    /// Threads for computing; 0: one for each core. Bits of the result depend on this number.
    #[schemars(range(max = 4096))]
    pub threads: usize,
    /// What trainings and evaluations run on: `cpu`, `cuda` (the first GPU), `cuda:N` (GPU number N, from 0), or `auto`: the
    /// first GPU, and where none can be used the CPU. Absent: `auto`. Bits of the result differ between CPU and GPU.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(extend("pattern" = DEVICE_PATTERN))]
    pub device: Option<String>,
}
