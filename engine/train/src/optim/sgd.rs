//! Stochastic gradient descent with momentum.

use mcpipe_cpu::optim::sgd_step;
use mcpipe_cuda::optim::Rule;
use mcpipe_spec::params_schema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Optimizer, OptimizerEntry, Update};

/// Stochastic gradient descent with momentum; norms, biases and the logit scale don't decay.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Sgd {
    /// Learning rate before the schedule.
    #[schemars(range(max = 100.0), extend("exclusiveMinimum" = 0))]
    pub lr: f64,
    /// Momentum; 0 for none.
    #[schemars(range(min = 0.0, max = 0.999_999))]
    pub momentum: f64,
    /// Look ahead along the momentum (Nesterov).
    pub nesterov: bool,
    /// L2 penalty of matrices and convolution kernels, added to the gradient.
    #[schemars(range(min = 0.0, max = 10.0))]
    pub weight_decay: f64,
}

impl Default for Sgd {
    fn default() -> Self {
        Sgd { lr: 0.1, momentum: 0.9, nesterov: false, weight_decay: 0.0 }
    }
}

pub(super) const ENTRY: OptimizerEntry = OptimizerEntry {
    name: "sgd",
    summary: "stochastic gradient descent with momentum",
    params: params_schema::<Sgd>,
    make: |params| Ok(std::sync::Arc::new(params.decode::<Sgd>()?)),
};

impl Optimizer for Sgd {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn lr(&self) -> f64 {
        self.lr
    }

    fn slots(&self) -> &'static [&'static str] {
        &["velocity"]
    }

    fn rule(&self) -> Option<Rule> {
        let (momentum, weight_decay) = (self.momentum as f32, self.weight_decay as f32);
        Some(Rule::Sgd { momentum, nesterov: self.nesterov, weight_decay })
    }

    fn update(&self, a: Update<'_>, params: &mut [f32], state: &mut [Vec<f32>]) {
        let decay = if a.decay { self.weight_decay as f32 } else { 0.0 };
        if let [velocity] = state {
            sgd_step(params, a.grads, velocity, a.lr as f32, self.momentum as f32, self.nesterov, decay, a.step);
        }
    }
}
