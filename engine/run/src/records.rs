//! What stages write for the stages after them and for the run directory.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};

use crate::error::RunError;
use crate::plan::StageId;
use crate::stages::train_student;
use crate::store::read_json;

/// File of a trained or loaded model's record.
pub const MODEL: &str = "model.json";
/// File of an evaluation's numbers.
pub const SCORES: &str = "scores.json";
/// File of an evaluation's predictions.
pub const PREDICTIONS: &str = "predictions.json";
/// File of a training's metrics, one JSON object a line.
pub const METRICS: &str = "metrics.jsonl";

/// What a model is to the pipeline.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// The student with distillation (without, where the pipeline has none).
    Student,
    /// The same student without distillation.
    Baseline,
    /// A teacher.
    Teacher,
}

/// A trained or loaded model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct ModelRecord {
    /// Its name: `student`, `baseline` or the teacher's.
    pub name: String,
    /// What it is to the pipeline.
    pub role: Role,
    /// The image backbone; none for a teacher of text only.
    pub backbone: Option<String>,
    /// Side of its images.
    pub image_size: Option<usize>,
    /// Parameters of the image tower.
    pub image_parameters: usize,
    /// Parameters of the text tower.
    pub text_parameters: usize,
    /// Floating-point operations of one image's forward pass.
    pub flops_per_image: u64,
    /// Its training; none for a loaded model.
    pub training: Option<TrainingRecord>,
}

impl ModelRecord {
    /// Reads the record of a stage's result. Name and role are the stage's: one result may serve stages of other
    /// names, as a teacher that was renamed.
    ///
    /// # Errors
    /// The record can't be read.
    pub fn read(dir: &Path, stage: &StageId) -> Result<Self, RunError> {
        let mut record: Self = read_json(&dir.join(MODEL))?;
        record.role = match (stage.kind, stage.subject.as_str()) {
            (train_student::NAME, subject) if subject == train_student::student_name(Role::Baseline) => Role::Baseline,
            (train_student::NAME, _) => Role::Student,
            _ => Role::Teacher,
        };
        record.name.clone_from(&stage.subject);
        Ok(record)
    }
}

/// How a training went.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct TrainingRecord {
    /// Optimiser steps.
    pub steps: u64,
    /// Samples of one step.
    pub batch_size: usize,
    /// Seconds, over all runs that it was interrupted in.
    pub seconds: f64,
    /// Images a second over the whole training, evaluations and checkpoints included.
    pub images_per_second: f64,
    /// Loss of the last logged step.
    pub final_loss: Option<f64>,
    /// Steps skipped because a loss or gradient was not finite.
    pub skipped_steps: u64,
    /// Distinct samples that could not be used.
    pub bad_samples: usize,
    /// Messages of the first few of them.
    pub first_bad: Vec<String>,
    /// Largest resident memory of the process so far, in bytes, where the system tells.
    pub peak_memory: Option<u64>,
}

/// Numbers of one evaluation of one model.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Scores {
    /// The model's name.
    pub model: String,
    /// What it is to the pipeline.
    pub role: Role,
    /// The evaluation's name.
    pub evaluation: String,
    /// Its kind.
    pub kind: String,
    /// Metrics by name, as fractions.
    pub metrics: BTreeMap<String, f64>,
    /// The metric that sums the evaluation up, and what guessing gives.
    pub headline: Headline,
    /// Samples evaluated.
    pub samples: usize,
    /// Images a second of the whole evaluation, reading included.
    pub images_per_second: f64,
}

/// The metric that sums an evaluation up.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Headline {
    /// Its name among the metrics.
    pub metric: String,
    /// The name for people.
    pub label: String,
    /// Its value.
    pub value: f64,
    /// What guessing gives.
    pub chance: f64,
}

/// Predictions of a zero-shot evaluation, for the report.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Predictions {
    /// Names of the classes.
    pub classes: Vec<String>,
    /// Samples by true class (row) and predicted class (column).
    pub confusion: Vec<Vec<u32>>,
    /// Some samples with their likeliest classes.
    pub gallery: Vec<GalleryItem>,
}

/// A sample with its likeliest classes.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct GalleryItem {
    /// The sample's key.
    pub key: String,
    /// The picture as a data URI.
    pub picture: String,
    /// Its class.
    pub class: usize,
    /// The likeliest classes with their probabilities, likeliest first.
    pub top: Vec<(usize, f64)>,
}
