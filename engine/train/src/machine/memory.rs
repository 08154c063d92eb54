//! What to do when a device's memory does not suffice.

use mcpipe_cuda::{CudaError, Device, size};
use mcpipe_graph::ExecError;
use mcpipe_graph::backend::BackendError;
use mcpipe_spec::Training;

use crate::error::TrainError;
use crate::plan::StepPlan;
use crate::setup::TrainSetup;

/// Share of the memory that a plan may fill: libraries and scratch memory take the rest.
const SHARE: f64 = 0.9;

/// Names what the memory was wanted for.
pub(super) fn of(what: &str) -> impl FnOnce(CudaError) -> TrainError {
    move |e| match e {
        CudaError::OutOfMemory { .. } => {
            let (label, reason) = (what.to_owned(), e.to_string());
            ExecError::Backend(BackendError { op: "memory", label, reason }).into()
        }
        other => other.into(),
    }
}

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
    // What other programs hold won't come back.
    let room = (device.room() as f64 * SHARE) as usize;
    TrainError::OutOfMemory { what: error.to_string(), advice: advice(setup, room) }
}

/// What of a setup fits into `room` bytes by the plan's arithmetic: recomputation, the least accumulation that keeps the
/// batch, the greatest batch in as many parts as now.
fn advice(setup: &TrainSetup, room: usize) -> String {
    let t = &setup.training;
    let planned = |change: &dyn Fn(&mut Training)| {
        let mut other = setup.clone();
        change(&mut other.training);
        Some(StepPlan::new(&other, true).ok()?.bytes())
    };
    let Some(now) = planned(&|_| ()) else { return "no plan can be made".into() };
    // Where it should have fitted, something else took the memory: a good deal less is to be tried.
    let most = if now <= room { now / 4 * 3 } else { room };
    let fits = |change: &dyn Fn(&mut Training)| planned(change).filter(|b| *b <= most);
    let mut list = Vec::new();
    if let Some(bytes) = fits(&|t| t.recompute = true).filter(|_| !t.recompute) {
        list.push(format!("`recompute = true` with {} for the same steps", size(bytes)));
    }
    let parts = (t.accumulate + 1..=t.batch_size / 2).filter(|parts| t.batch_size.is_multiple_of(*parts));
    if let Some((parts, bytes)) = parts.into_iter().find_map(|p| Some((p, fits(&|t| t.accumulate = p)?))) {
        list.push(format!("`accumulate = {parts}` with {} for the same steps", size(bytes)));
    }
    // Halving: a batch that fits, and one above it that doesn't.
    let (mut low, mut high) = (0, t.batch_size / t.accumulate);
    while high - low > 1 {
        let middle = low.midpoint(high);
        if fits(&|t| t.batch_size = middle * t.accumulate).is_some() { low = middle } else { high = middle }
    }
    let batch_size = low * t.accumulate;
    if low >= 2
        && let Some(bytes) = fits(&|t| t.batch_size = batch_size)
    {
        list.push(format!("`batch_size = {batch_size}` with {}", size(bytes)));
    }
    let needs = format!("the step needs {} by the plan, and there is room for {}", size(now), size(room));
    match list.is_empty() {
        true => format!("{needs}; no smaller batch fits: another model or a larger GPU is needed"),
        false => format!("{needs}; what fits: {}", list.join(", or ")),
    }
}
