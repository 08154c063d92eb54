//! The typed pipeline: what a checked file decodes to.
//!
//! Doc comments of the fields become the descriptions in the JSON schema, so they speak to the
//! author of a pipeline file. Types whose further keys belong to a registered component hold them
//! as [`Params`]; the component's own crate decodes those.

mod augment;
mod data;
mod distill;
mod evaluation;
mod markers;
mod model;
mod params;
mod teacher;
mod training;
mod weights;

pub use augment::{Augment, Crop, CutMix, Mixup};
pub use data::{Data, EvalData, MakeData, OnBadSample, Shards, TrainData};
pub use distill::{Distill, Loss, LossKind, Ramp, WeightSchedule};
pub use evaluation::{Evaluation, Export, ExportFormat, Run};
pub use model::{Ema, OwnText, Projection, ProjectionKind, Student, TextEncoder, TextOfTeacher, TextTower, Tower};
pub use params::{Params, ParamsError};
pub use teacher::{EmaTeacher, LoadTeacher, Teacher, TeacherKind, TeacherText, TrainTeacher};
pub use training::{Checkpoint, LrSchedule, NonFinite, Optimizer, Precision, Training};
pub use weights::{Resize, Weights, WeightsTable};

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

/// The version of the pipeline format that this crate reads.
pub const VERSION: u32 = 1;

/// A pipeline: data, teachers and a student, how the student is distilled, evaluated and exported.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
#[schemars(title = "mcpipe pipeline")]
pub struct Spec {
    /// Version of the pipeline format; this engine reads version 1.
    #[schemars(extend("const" = 1))]
    pub version: u32,
    /// Name of the pipeline; it names the run directory.
    #[schemars(length(min = 1, max = 100), extend("pattern" = NAME_PATTERN))]
    pub name: String,
    /// Seed of every random choice: initial weights, order of samples, augmentation, made data.
    #[serde(default)]
    #[schemars(range(max = 9_007_199_254_740_991u64))]
    pub seed: u64,
    /// Where training and evaluation samples come from.
    pub data: Data,
    /// Random changes to training images.
    #[serde(default)]
    pub augment: Augment,
    /// Models whose outputs the student learns from; any number, each an image tower, a text tower or both.
    #[serde(default, rename = "teacher", skip_serializing_if = "Vec::is_empty")]
    pub teachers: Vec<Teacher>,
    /// The image encoder to train.
    pub student: Student,
    /// The frozen text encoder that the student's image embeddings are trained to match.
    pub text: TextEncoder,
    /// The map from the student's own embedding to the space it shares with the text.
    #[serde(default)]
    pub projection: Projection,
    /// CLIP's own loss and how it is balanced against distillation.
    #[serde(default)]
    pub loss: Loss,
    /// Distillation terms; any number, also several of one level.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub distill: Vec<Distill>,
    /// The optimiser of the student, and of a trained teacher that has none of its own.
    pub optimizer: Optimizer,
    /// The learning rate over the steps, for the student and for a trained teacher that has none of its own.
    pub schedule: LrSchedule,
    /// Length and size of the student's training.
    pub training: Training,
    /// Evaluations of the student; absent: zero-shot classification once, at the end.
    #[serde(default = "Evaluation::default_list")]
    pub eval: Vec<Evaluation>,
    /// The forms in which the trained student is written.
    #[serde(default)]
    pub export: Export,
    /// Where results are kept and how much of the machine is used.
    #[serde(default)]
    pub run: Run,
}

impl Spec {
    /// The teacher of this name.
    pub fn teacher(&self, name: &str) -> Option<&Teacher> {
        self.teachers.iter().find(|teacher| teacher.name() == name)
    }

    /// The optimiser of a trained teacher: its own or the pipeline's.
    pub fn optimizer_of<'a>(&'a self, teacher: &'a TrainTeacher) -> &'a Optimizer {
        teacher.optimizer.as_ref().unwrap_or(&self.optimizer)
    }

    /// The learning-rate schedule of a trained teacher: its own or the pipeline's.
    pub fn schedule_of<'a>(&'a self, teacher: &'a TrainTeacher) -> &'a LrSchedule {
        teacher.schedule.as_ref().unwrap_or(&self.schedule)
    }

    /// The resolved pipeline as TOML, every default written out; loading it gives the same `Spec`.
    ///
    /// # Errors
    /// When a path in the pipeline is not UTF-8, which TOML cannot hold.
    pub fn to_toml(&self) -> Result<String, toml::ser::Error> {
        toml::to_string_pretty(self)
    }
}

/// What names a device.
pub(crate) const DEVICE_PATTERN: &str = "^(auto|cpu|cuda(:[0-9]{1,3})?)$";

/// Names become parts of file names, so they keep to characters that are safe in one.
pub(crate) const NAME_PATTERN: &str = "^[A-Za-z0-9][A-Za-z0-9._-]*$";

pub(crate) fn yes() -> bool {
    true
}
