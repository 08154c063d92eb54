//! The learning rate over the steps: a factor on the optimiser's own rate.

use mcpipe_spec::{Component, ComponentKind, LrSchedule, Params, ParamsError, params_schema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::distill::Problem;

/// Linear warm-up, then half a cosine down to a share of the rate (Loshchilov & Hutter 2017).
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Cosine {
    /// Steps of linear warm-up from 0.
    pub warmup_steps: u64,
    /// Share of the rate that the last step comes down to.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub final_factor: f64,
}

impl Default for Cosine {
    fn default() -> Self {
        Cosine { warmup_steps: 0, final_factor: 0.0 }
    }
}

/// Linear warm-up, then the same rate to the end.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Constant {
    /// Steps of linear warm-up from 0.
    pub warmup_steps: u64,
}

/// Linear warm-up, then the rate is lowered whenever a metric stops getting better.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct Plateau {
    /// Steps of linear warm-up from 0.
    pub warmup_steps: u64,
    /// What is watched: `loss` (mean over `every_steps` steps; lower is better), or a metric of an evaluation in the loop
    /// as `evaluation.metric`, such as `zero_shot.acc1` (higher is better).
    pub metric: String,
    /// Steps over which the loss is averaged; unused for an evaluation's metric.
    #[schemars(range(min = 1))]
    pub every_steps: u64,
    /// What the rate is multiplied by.
    #[schemars(range(max = 1.0), extend("exclusiveMinimum" = 0))]
    pub factor: f64,
    /// Values without a better one that are borne before the rate is lowered.
    pub patience: u32,
    /// Least relative change that counts as better.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub threshold: f64,
    /// Least share of the rate.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub min_factor: f64,
}

impl Default for Plateau {
    fn default() -> Self {
        Plateau {
            warmup_steps: 0,
            metric: "loss".into(),
            every_steps: 100,
            factor: 0.5,
            patience: 3,
            threshold: 1e-3,
            min_factor: 0.0,
        }
    }
}

/// A learning-rate schedule with its parameters.
#[derive(Clone, Debug, PartialEq)]
pub enum LrConfig {
    /// `cosine`.
    Cosine(Cosine),
    /// `constant`.
    Constant(Constant),
    /// `plateau`.
    Plateau(Plateau),
}

struct Entry {
    component: Component,
    make: fn(&Params) -> Result<LrConfig, ParamsError>,
}

const KIND: ComponentKind = ComponentKind::Schedule;

/// The registered schedules.
static SCHEDULES: &[Entry] = &[
    Entry {
        component: Component {
            kind: KIND,
            name: "cosine",
            summary: "warm-up, then half a cosine",
            params: params_schema::<Cosine>,
        },
        make: |p| Ok(LrConfig::Cosine(p.decode()?)),
    },
    Entry {
        component: Component {
            kind: KIND,
            name: "plateau",
            summary: "warm-up, then lowered when a metric stops getting better",
            params: params_schema::<Plateau>,
        },
        make: |p| Ok(LrConfig::Plateau(p.decode()?)),
    },
    Entry {
        component: Component {
            kind: KIND,
            name: "constant",
            summary: "warm-up, then constant",
            params: params_schema::<Constant>,
        },
        make: |p| Ok(LrConfig::Constant(p.decode()?)),
    },
];

/// The schedules as components.
pub fn components() -> Vec<Component> {
    SCHEDULES.iter().map(|e| e.component.clone()).collect()
}

/// What a schedule remembers; part of a checkpoint.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct LrState {
    /// Factor reached by lowering.
    pub factor: f64,
    /// Best value so far.
    pub best: Option<f64>,
    /// Values since the best.
    pub waited: u32,
    /// Sum of the losses since the last look.
    pub loss_sum: f64,
    /// Number of those losses.
    pub loss_count: u64,
}

impl Default for LrState {
    fn default() -> Self {
        LrState { factor: 1.0, best: None, waited: 0, loss_sum: 0.0, loss_count: 0 }
    }
}

impl LrConfig {
    /// The schedule of a pipeline file.
    ///
    /// # Errors
    /// An unknown name, or parameters that don't fit; the path lies below the `[schedule]` table.
    pub fn from_spec(spec: &LrSchedule) -> Result<Self, Problem> {
        let Some(entry) = SCHEDULES.iter().find(|e| e.component.name == spec.kind) else {
            let known = SCHEDULES.iter().map(|e| e.component.name.to_owned()).collect();
            return Err(Problem {
                path: vec!["kind".into()],
                message: format!("there is no schedule `{}`", spec.kind),
                known,
            });
        };
        (entry.make)(&spec.params).map_err(|e| Problem::new(&[], e.message))
    }

    /// Factor on the learning rate at `step` (from 0) of `steps`. Warm-up gives step i the share (i+1)/warm-up.
    pub fn factor(&self, step: u64, steps: u64, state: &LrState) -> f64 {
        let warmup = match self {
            LrConfig::Cosine(c) => c.warmup_steps,
            LrConfig::Constant(c) => c.warmup_steps,
            LrConfig::Plateau(p) => p.warmup_steps,
        };
        if step < warmup {
            return (step + 1) as f64 / warmup as f64;
        }
        match self {
            LrConfig::Cosine(c) => {
                let share = (step - warmup) as f64 / steps.saturating_sub(warmup).max(1) as f64;
                let cosine = 0.5 * (1.0 + (std::f64::consts::PI * share.min(1.0)).cos());
                c.final_factor + (1.0 - c.final_factor) * cosine
            }
            LrConfig::Constant(_) => 1.0,
            LrConfig::Plateau(_) => state.factor,
        }
    }

    /// Takes note of a step's loss; true when that lowered the rate.
    pub(crate) fn saw_loss(&self, loss: f64, step: u64, state: &mut LrState) -> bool {
        let LrConfig::Plateau(p) = self else { return false };
        if p.metric != "loss" || step < p.warmup_steps {
            return false;
        }
        state.loss_sum += loss;
        state.loss_count += 1;
        if state.loss_count < p.every_steps.max(1) {
            return false;
        }
        let mean = state.loss_sum / state.loss_count as f64;
        (state.loss_sum, state.loss_count) = (0.0, 0);
        p.saw(mean, false, state)
    }

    /// Takes note of an evaluation's metric (`evaluation.metric`); true when that lowered the rate.
    pub(crate) fn saw_metric(&self, name: &str, value: f64, state: &mut LrState) -> bool {
        match self {
            LrConfig::Plateau(p) if p.metric == name => p.saw(value, true, state),
            _ => false,
        }
    }
}

impl Plateau {
    fn saw(&self, value: f64, higher: bool, state: &mut LrState) -> bool {
        let better = match state.best {
            None => true,
            Some(best) if higher => value > best + self.threshold * best.abs(),
            Some(best) => value < best - self.threshold * best.abs(),
        };
        if better {
            state.best = Some(value);
            state.waited = 0;
            return false;
        }
        state.waited += 1;
        if state.waited <= self.patience {
            return false;
        }
        state.waited = 0;
        let lowered = (state.factor * self.factor).max(self.min_factor);
        std::mem::replace(&mut state.factor, lowered) != lowered
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cosine_warms_up_and_comes_down() {
        let s = LrConfig::Cosine(Cosine { warmup_steps: 4, final_factor: 0.1 });
        let at = |step| s.factor(step, 14, &LrState::default());
        assert_eq!([at(0), at(3)], [0.25, 1.0]);
        assert_eq!(at(4), 1.0);
        assert!((at(9) - 0.55).abs() < 1e-12);
        assert!((at(14) - 0.1).abs() < 1e-12);
    }

    #[test]
    fn plateau_lowers_after_its_patience() {
        let p = Plateau { every_steps: 2, patience: 1, factor: 0.5, min_factor: 0.4, ..Plateau::default() };
        let s = LrConfig::Plateau(p);
        let mut state = LrState::default();
        let mut lowered = Vec::new();
        for (step, loss) in [3.0, 3.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 2.0].into_iter().enumerate() {
            if s.saw_loss(loss, step as u64, &mut state) {
                lowered.push(step);
            }
        }
        assert_eq!(lowered, [7, 11]);
        assert_eq!(s.factor(20, 100, &state), 0.4);
        let json = serde_json::to_string(&state).unwrap();
        assert_eq!(serde_json::from_str::<LrState>(&json).unwrap(), state);
    }

    #[test]
    fn plateau_watches_a_metric_that_rises() {
        let s = LrConfig::Plateau(Plateau { metric: "zero_shot.acc1".into(), patience: 0, ..Plateau::default() });
        let mut state = LrState::default();
        assert!(!s.saw_metric("zero_shot.acc1", 0.5, &mut state));
        assert!(!s.saw_metric("zero_shot.acc1", 0.6, &mut state));
        assert!(!s.saw_metric("zero_shot.acc5", 0.1, &mut state));
        assert!(s.saw_metric("zero_shot.acc1", 0.6, &mut state));
    }
}
