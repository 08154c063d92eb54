use std::path::PathBuf;

use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{LrSchedule, NAME_PATTERN, Optimizer, TextOfTeacher, TextTower, Tower, Training};

/// A model whose outputs the student learns from.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum Teacher {
    /// Trained in this pipeline, with CLIP's loss on the training data, before the student.
    Train(Box<TrainTeacher>),
    /// Loaded from a file.
    Load(Box<LoadTeacher>),
    /// The running average of the student itself.
    Ema(EmaTeacher),
}

/// How a teacher comes about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TeacherKind {
    /// Trained in this pipeline.
    Train,
    /// Loaded from a file.
    Load,
    /// The running average of the student.
    Ema,
}

/// A teacher trained in this pipeline.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TrainTeacher {
    /// Name by which the rest of the file refers to this teacher.
    #[schemars(length(min = 1, max = 100), extend("pattern" = NAME_PATTERN))]
    pub name: String,
    /// The image tower.
    pub image: Tower,
    /// The text tower: trained with the image tower, or frozen from another teacher.
    pub text: TeacherText,
    /// Dimension of the embedding that both towers share.
    #[schemars(range(min = 1, max = 65536))]
    pub dim: usize,
    /// Scale of the logits it gives as targets. Absent: the scale it was trained to.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000.0), extend("exclusiveMinimum" = 0))]
    pub logit_scale: Option<f64>,
    /// Length and size of its training.
    pub training: Training,
    /// Its optimiser. Absent: the pipeline's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub optimizer: Option<Optimizer>,
    /// Its learning-rate schedule. Absent: the pipeline's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<LrSchedule>,
}

/// A teacher loaded from a file.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct LoadTeacher {
    /// Name by which the rest of the file refers to this teacher.
    #[schemars(length(min = 1, max = 100), extend("pattern" = NAME_PATTERN))]
    pub name: String,
    /// The image tower. Absent: a teacher of text only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub image: Option<Tower>,
    /// The text tower. Absent: a teacher of images only.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub text: Option<TeacherText>,
    /// Dimension of the embedding that both towers share.
    #[schemars(range(min = 1, max = 65536))]
    pub dim: usize,
    /// Scale of the logits it gives as targets. Absent: the scale in the file.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000.0), extend("exclusiveMinimum" = 0))]
    pub logit_scale: Option<f64>,
    /// File with the weights under timm's and open_clip's names, or under those of Hugging Face's `CLIPModel` and
    /// `BertModel`.
    #[schemars(extend("x-mcpipe-path" = true, "minLength" = 1))]
    pub weights: PathBuf,
    /// Resize the file's position embeddings to the towers' grid and context, as timm and open_clip do.
    #[serde(default)]
    pub resize_position: bool,
}

/// The running average of the student as its own teacher.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct EmaTeacher {
    /// Name by which the rest of the file refers to this teacher.
    #[schemars(length(min = 1, max = 100), extend("pattern" = NAME_PATTERN))]
    pub name: String,
    /// How much of the average a step keeps.
    #[schemars(range(min = 0.0), extend("exclusiveMaximum" = 1))]
    pub momentum: f64,
    /// Momentum at the last step, reached along a cosine. Absent: it stays the same.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 0.0, max = 1.0))]
    pub final_momentum: Option<f64>,
    /// Scale of the logits it gives as targets. Absent: the student's.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(max = 1000.0), extend("exclusiveMinimum" = 0))]
    pub logit_scale: Option<f64>,
}

/// A teacher's text tower.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(untagged)]
pub enum TeacherText {
    /// The frozen text tower of another teacher.
    Teacher(TextOfTeacher),
    /// A text tower of its own.
    Own(TextTower),
}

impl Teacher {
    /// Its name.
    pub fn name(&self) -> &str {
        match self {
            Self::Train(teacher) => &teacher.name,
            Self::Load(teacher) => &teacher.name,
            Self::Ema(teacher) => &teacher.name,
        }
    }

    /// How it comes about.
    pub fn kind(&self) -> TeacherKind {
        match self {
            Self::Train(_) => TeacherKind::Train,
            Self::Load(_) => TeacherKind::Load,
            Self::Ema(_) => TeacherKind::Ema,
        }
    }

    /// Its image tower; none for a teacher of text only and for the student's average, whose tower
    /// is the student's.
    pub fn image(&self) -> Option<&Tower> {
        match self {
            Self::Train(teacher) => Some(&teacher.image),
            Self::Load(teacher) => teacher.image.as_ref(),
            Self::Ema(_) => None,
        }
    }

    /// Its text tower.
    pub fn text(&self) -> Option<&TeacherText> {
        match self {
            Self::Train(teacher) => Some(&teacher.text),
            Self::Load(teacher) => teacher.text.as_ref(),
            Self::Ema(_) => None,
        }
    }

    /// Dimension of its joint embedding; none for the student's average, which has the student's.
    pub fn dim(&self) -> Option<usize> {
        match self {
            Self::Train(teacher) => Some(teacher.dim),
            Self::Load(teacher) => Some(teacher.dim),
            Self::Ema(_) => None,
        }
    }

    /// The scale of its target logits where the file fixes it.
    pub fn logit_scale(&self) -> Option<f64> {
        match self {
            Self::Train(teacher) => teacher.logit_scale,
            Self::Load(teacher) => teacher.logit_scale,
            Self::Ema(teacher) => teacher.logit_scale,
        }
    }
}
