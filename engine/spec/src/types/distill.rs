use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::markers::TeacherName;
use super::{Params, yes};

/// The student's own loss and its balance against distillation: L = (1−lambda)·own + lambda·Σ weight·level.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Loss {
    /// The student's own loss on images and captions.
    pub kind: LossKind,
    /// Share of distillation in the loss; 0 trains on captions alone, 1 on teachers alone.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub lambda: f64,
    /// The student's logit scale at the start (not its logarithm).
    #[schemars(range(max = 100.0), extend("exclusiveMinimum" = 0))]
    pub logit_scale: f64,
    /// Train the logit scale; it never passes 100.
    #[serde(default = "yes")]
    pub train_logit_scale: bool,
    /// For `siglip`: the trained bias of its logits at the start. Absent: -10, as published (with a logit scale of 10).
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = -1000.0, max = 1000.0))]
    pub logit_bias: Option<f64>,
}

/// The student's own loss on images and captions.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum LossKind {
    /// CLIP's cross-entropies: an image chooses among the batch's captions, a caption among its images.
    #[default]
    Clip,
    /// SigLIP's: each pair is judged by itself, a match or none.
    Siglip,
}

impl Default for Loss {
    fn default() -> Self {
        Self { kind: LossKind::Clip, lambda: 0.7, logit_scale: 14.2857, train_logit_scale: true, logit_bias: None }
    }
}

/// A distillation term.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-mcpipe-component" = "level", "x-mcpipe-tag" = "level"))]
pub struct Distill {
    /// What is compared between teacher and student.
    pub level: String,
    /// Names of the teachers to learn from. Absent: every teacher that has what the level needs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(with = "Option<Vec<TeacherName>>", length(min = 1))]
    pub teachers: Option<Vec<String>>,
    /// Weight of the term within the distillation part of the loss.
    #[serde(default = "one")]
    #[schemars(range(min = 0.0))]
    pub weight: f64,
    /// Factor on the weight over the steps. Absent: 1 throughout.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub schedule: Option<WeightSchedule>,
    /// The level's own parameters.
    #[serde(flatten)]
    #[schemars(skip)]
    pub params: Params,
}

fn one() -> f64 {
    1.0
}

impl Distill {
    /// The weight of the term at a step (counted from 0) of a training of `steps`.
    pub fn weight_at(&self, step: u64, steps: u64) -> f64 {
        let factor = match &self.schedule {
            None => 1.0,
            Some(schedule) => schedule.factor(step, steps),
        };
        self.weight * factor
    }
}

/// Factor on a distillation term's weight over the steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(tag = "kind", rename_all = "snake_case")]
pub enum WeightSchedule {
    /// 1 throughout.
    Constant,
    /// Along a straight line.
    Linear(Ramp),
    /// Along half a cosine.
    Cosine(Ramp),
}

/// From one factor to another between two steps; constant before and after.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Ramp {
    /// Factor up to the step `start`.
    #[serde(default = "one")]
    #[schemars(range(min = 0.0))]
    pub from: f64,
    /// Factor from the step `end` on.
    #[serde(default)]
    #[schemars(range(min = 0.0))]
    pub to: f64,
    /// Last step that has the factor `from`.
    #[serde(default)]
    pub start: u64,
    /// First step that has the factor `to`. Absent: the last step of the training.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub end: Option<u64>,
}

impl WeightSchedule {
    /// The factor at a step (counted from 0) of a training of `steps`.
    pub fn factor(&self, step: u64, steps: u64) -> f64 {
        let (ramp, cosine) = match self {
            Self::Constant => return 1.0,
            Self::Linear(ramp) => (ramp, false),
            Self::Cosine(ramp) => (ramp, true),
        };
        let end = ramp.end.unwrap_or(steps.saturating_sub(1));
        let done = if step <= ramp.start {
            0.0
        } else if step >= end {
            1.0
        } else {
            (step - ramp.start) as f64 / (end - ramp.start) as f64
        };
        let done = if cosine { 0.5 - 0.5 * (std::f64::consts::PI * done).cos() } else { done };
        ramp.from + (ramp.to - ramp.from) * done
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ramp_runs_between_its_ends() {
        let ramp = Ramp { from: 1.0, to: 0.0, start: 10, end: Some(20) };
        let linear = WeightSchedule::Linear(ramp.clone());
        assert_eq!(linear.factor(0, 100), 1.0);
        assert_eq!(linear.factor(10, 100), 1.0);
        assert_eq!(linear.factor(15, 100), 0.5);
        assert_eq!(linear.factor(20, 100), 0.0);
        assert_eq!(linear.factor(99, 100), 0.0);
        let cosine = WeightSchedule::Cosine(ramp);
        assert!((cosine.factor(15, 100) - 0.5).abs() < 1e-12);
        assert!(cosine.factor(12, 100) > linear.factor(12, 100));
    }

    #[test]
    fn ramp_without_end_ends_with_the_training() {
        let schedule = WeightSchedule::Linear(Ramp { from: 0.0, to: 2.0, start: 0, end: None });
        assert_eq!(schedule.factor(9, 10), 2.0);
        assert_eq!(schedule.factor(0, 1), 0.0);
        assert_eq!(schedule.factor(0, 0), 0.0);
    }
}
