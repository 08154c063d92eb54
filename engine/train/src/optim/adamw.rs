//! AdamW (Loshchilov & Hutter 2019).

use mcpipe_cpu::optim::adamw_step;
use mcpipe_cuda::optim::Rule;
use mcpipe_spec::params_schema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Optimizer, OptimizerEntry, Update};

/// Adam with decoupled weight decay; norms, biases and the logit scale don't decay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct AdamW {
    /// Learning rate before the schedule.
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// Decay of the means of the gradient and of its square.
    #[schemars(inner(range(min = 0.0, max = 0.999_999)))]
    pub betas: [f64; 2],
    /// Added to the root of the second moment.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0))]
    pub eps: f64,
    /// Weight decay of matrices and convolution kernels.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub weight_decay: f64,
}

impl Default for AdamW {
    fn default() -> Self {
        AdamW { lr: 1e-3, betas: [0.9, 0.98], eps: 1e-8, weight_decay: 0.1 }
    }
}

pub(super) const ENTRY: OptimizerEntry = OptimizerEntry {
    name: "adamw",
    summary: "Adam with decoupled weight decay",
    params: params_schema::<AdamW>,
    make: |params| Ok(std::sync::Arc::new(params.decode::<AdamW>()?)),
};

impl Optimizer for AdamW {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn slots(&self) -> &'static [&'static str] {
        &["m", "v"]
    }

    fn rule(&self) -> Option<Rule> {
        let betas = self.betas.map(|b| b as f32);
        Some(Rule::Adamw { betas, eps: self.eps as f32, weight_decay: self.weight_decay as f32 })
    }

    fn update(&self, a: Update<'_>, params: &mut [f32], state: &mut [Vec<f32>]) {
        let [beta1, beta2] = self.betas.map(|b| b as f32);
        let decay = if a.decay { self.weight_decay as f32 } else { 0.0 };
        if let [m, v] = state {
            adamw_step(params, a.grads, m, v, a.lr as f32, beta1, beta2, self.eps as f32, decay, a.step);
        }
    }
}
