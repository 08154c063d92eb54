use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::Params;

/// An optimiser.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-mcpipe-component" = "optimizer", "x-mcpipe-tag" = "kind"))]
pub struct Optimizer {
    /// Which optimiser.
    pub kind: String,
    /// The optimiser's own parameters.
    #[serde(flatten)]
    #[schemars(skip)]
    pub params: Params,
}

/// The learning rate over the steps.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[schemars(extend("x-mcpipe-component" = "schedule", "x-mcpipe-tag" = "kind"))]
pub struct LrSchedule {
    /// Which schedule.
    pub kind: String,
    /// The schedule's own parameters.
    #[serde(flatten)]
    #[schemars(skip)]
    pub params: Params,
}

/// Length and size of a training.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Training {
    /// Optimiser steps.
    #[schemars(range(min = 1, max = 1_000_000_000))]
    pub steps: u64,
    /// Samples in one optimiser step.
    #[schemars(range(min = 2, max = 1_048_576))]
    pub batch_size: usize,
    /// Parts that a batch is split into to save memory; the step stays that of the whole batch.
    #[serde(default = "one")]
    #[schemars(range(min = 1, max = 65536))]
    pub accumulate: usize,
    /// Compute most of the student's activations a second time in the backward instead of keeping them: much less memory,
    /// about a third more work, the same result.
    #[serde(default)]
    pub recompute: bool,
    /// What linear layers and dense convolutions round their operands to. Weights, sums, norms, attention and losses stay
    /// f32, and so do evaluations.
    #[serde(default)]
    pub precision: Precision,
    /// Greatest norm of the gradient of all parameters together; a greater one is scaled down.
    /// Absent: never scaled.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(extend("exclusiveMinimum" = 0))]
    pub clip_norm: Option<f64>,
    /// Steps between two lines of metrics.
    #[serde(default = "ten")]
    #[schemars(range(min = 1))]
    pub log_every: u64,
    /// When the state is saved so that an interrupted run goes on where it was.
    #[serde(default)]
    pub checkpoint: Checkpoint,
    /// What happens when a loss or gradient is not finite.
    #[serde(default)]
    pub non_finite: NonFinite,
}

/// A floating-point format of products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
pub enum Precision {
    /// 32 bits, nothing is rounded.
    #[default]
    F32,
    /// On a GPU, products round their operands to 10 bits of mantissa; the CPU computes in 32 bits.
    Tf32,
    /// bfloat16, 8 bits of mantissa. On a GPU activations are kept in it too; on CPUs it is faster with AVX512_BF16, correct
    /// but slower on others.
    Bf16,
}

fn one() -> usize {
    1
}

fn ten() -> u64 {
    10
}

impl Training {
    /// Samples in one forward pass.
    pub fn micro_batch(&self) -> usize {
        self.batch_size / self.accumulate.max(1)
    }
}

/// When the state of a training is saved.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Checkpoint {
    /// Steps between two checkpoints; 0: none by steps.
    pub every_steps: u64,
    /// Minutes between two checkpoints; 0: none by time.
    #[schemars(range(min = 0.0))]
    pub every_minutes: f64,
    /// Checkpoints kept; older ones are deleted.
    #[schemars(range(min = 1, max = 10_000))]
    pub keep: usize,
}

impl Default for Checkpoint {
    fn default() -> Self {
        Self { every_steps: 0, every_minutes: 10.0, keep: 2 }
    }
}

/// What happens when a loss or gradient is not finite: the step is skipped and counted.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct NonFinite {
    /// So many skipped steps in a row stop the run at the last good checkpoint.
    #[schemars(range(min = 1, max = 100_000))]
    pub max_in_a_row: u32,
}

impl Default for NonFinite {
    fn default() -> Self {
        Self { max_in_a_row: 5 }
    }
}
