//! What to do when a device's memory does not suffice.

use mcpipe_cuda::{CudaError, Device};
use mcpipe_graph::ExecError;

use crate::error::TrainError;
use crate::plan::StepPlan;
use crate::setup::TrainSetup;

/// Share of a device's memory that a plan may fill: libraries and scratch memory take the rest.
const SHARE: f64 = 0.9;

/// Adds to an error of full memory what would fit; other errors stay as they are.
pub(super) fn explain(setup: &TrainSetup, device: &Device, error: TrainError) -> TrainError {
    let full = match &error {
        TrainError::Device(CudaError::OutOfMemory { .. }) => true,
        TrainError::Exec(ExecError::Backend(e)) => e.reason.starts_with("out of GPU memory"),
        _ => false,
    };
    if !full {
        return error;
    }
    let room = (device.memory().1 as f64 * SHARE) as usize;
    TrainError::OutOfMemory { what: error.to_string(), advice: advice(setup, room) }
}

fn gib(bytes: usize) -> String {
    format!("{:.1} GiB", bytes as f64 / f64::from(1 << 30))
}

/// The least accumulation, else the greatest batch, that fits into `room` bytes by the plan's arithmetic.
pub(super) fn advice(setup: &TrainSetup, room: usize) -> String {
    let bytes = |batch_size: usize, accumulate: usize| -> Option<usize> {
        let mut other = setup.clone();
        other.training.batch_size = batch_size;
        other.training.accumulate = accumulate;
        Some(StepPlan::new(&other, true).ok()?.bytes())
    };
    let t = &setup.training;
    let planned = bytes(t.batch_size, t.accumulate);
    let needs = planned.map_or_else(String::new, |b| format!("the plan needs {}; ", gib(b)));
    let doubled = |n: &usize| Some(2 * n);
    let parts = std::iter::successors(Some(2 * t.accumulate), doubled)
        .take_while(|parts| 2 * parts <= t.batch_size)
        .filter(|parts| t.batch_size.is_multiple_of(*parts));
    for parts in parts {
        if let Some(b) = bytes(t.batch_size, parts).filter(|b| *b <= room) {
            return format!("{needs}`accumulate = {parts}` would need {} for the same steps", gib(b));
        }
    }
    for batch in std::iter::successors(Some(t.batch_size / 2), |n| Some(n / 2)).take_while(|n| *n >= 2) {
        if let Some(b) = bytes(batch, 1).filter(|b| *b <= room) {
            return format!("{needs}`batch_size = {batch}` would need {}", gib(b));
        }
    }
    format!("{needs}no smaller batch fits by the plan: another model or a larger GPU is needed")
}
