//! Running averages of the weights: avg ← m·avg + (1−m)·weights after each step.

use mcpipe_cpu::optim::ema_update;
use mcpipe_graph::ParamStore;

/// A running average of a store.
#[derive(Clone, Debug)]
pub struct Average {
    /// Name of the teacher, or of the student's own average.
    pub name: String,
    /// The averaged weights.
    pub store: ParamStore,
    /// Momentum at the first step.
    pub momentum: f64,
    /// Momentum at the last step, reached along a cosine (Grill et al. 2020, BYOL); none keeps it constant.
    pub final_momentum: Option<f64>,
}

impl Average {
    /// An average that starts as the weights are.
    pub fn new(name: impl Into<String>, store: &ParamStore, momentum: f64, final_momentum: Option<f64>) -> Self {
        Average { name: name.into(), store: store.clone(), momentum, final_momentum }
    }

    /// Momentum at `step` (from 0) of `steps`.
    pub fn momentum_at(&self, step: u64, steps: u64) -> f64 {
        match self.final_momentum {
            None => self.momentum,
            Some(last) => {
                let share = step as f64 / steps.saturating_sub(1).max(1) as f64;
                last - (last - self.momentum) * 0.5 * (1.0 + (std::f64::consts::PI * share.min(1.0)).cos())
            }
        }
    }

    /// Moves the average towards `store` where `moving` says that a parameter changes (trained ones and running
    /// statistics).
    pub fn update(&mut self, store: &ParamStore, moving: &[bool], momentum: f64) {
        let pairs = self.store.params_mut().iter_mut().zip(store.params()).zip(moving);
        for ((average, param), _) in pairs.filter(|(_, moves)| **moves) {
            ema_update(&mut average.data, &param.data, momentum as f32);
        }
    }
}

#[cfg(test)]
mod tests {
    use mcpipe_graph::{Param, ParamKind};

    use super::*;

    fn store(values: [f32; 2]) -> ParamStore {
        let mut s = ParamStore::default();
        for (name, kind, v) in [("w", ParamKind::Decay, values[0]), ("running_mean", ParamKind::Buffer, values[1])] {
            s.insert(Param { name: name.into(), shape: vec![1], kind, data: vec![v] });
        }
        s
    }

    #[test]
    fn weights_and_running_statistics_follow_the_closed_form() {
        let mut average = Average::new("t", &store([1.0, 1.0]), 0.75, None);
        for _ in 0..3 {
            average.update(&store([0.0, 3.0]), &[true, true], 0.75);
        }
        let got: Vec<f32> = average.store.params().iter().map(|p| p.data[0]).collect();
        let m = 0.75f32.powi(3);
        assert!((got[0] - m).abs() < 1e-6 && (got[1] - (3.0 - 2.0 * m)).abs() < 1e-6, "{got:?}");
    }

    #[test]
    fn momentum_runs_to_its_last_value() {
        let a = Average::new("t", &ParamStore::default(), 0.9, Some(1.0));
        assert_eq!(a.momentum_at(0, 11), 0.9);
        assert!((a.momentum_at(5, 11) - 0.95).abs() < 1e-12);
        assert_eq!(a.momentum_at(10, 11), 1.0);
    }
}
