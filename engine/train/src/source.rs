//! The data crate's loader as a source of batches.

use mcpipe_data::{DataError, MixTargets, Normalize, TrainLoader, model_input};

use crate::batch::{Batch, BatchSource, Mix};
use crate::error::BoxError;

impl From<MixTargets> for Mix {
    fn from(targets: MixTargets) -> Self {
        Mix { partner: targets.partner, keep: targets.lambda }
    }
}

/// The size and normalisation of one model's images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ViewSpec {
    /// Side of the square image; one of the loader's sizes.
    pub size: usize,
    /// Mean and standard deviation of the model.
    pub normalize: Normalize,
}

/// Batches of a [`TrainLoader`], in the views that the models of a step read. The loader starts at the step that
/// [`step_of`](Self::step_of) reads from a checkpoint's cursor.
#[derive(Debug)]
pub struct LoaderSource {
    loader: TrainLoader,
    views: Vec<ViewSpec>,
}

impl LoaderSource {
    /// Batches of `loader` in `views`.
    pub fn new(loader: TrainLoader, views: Vec<ViewSpec>) -> Self {
        LoaderSource { loader, views }
    }

    /// The loader.
    pub fn loader(&self) -> &TrainLoader {
        &self.loader
    }

    /// The loader's first step for a training that stands at `cursor`; 0 for one that has not begun.
    pub fn step_of(cursor: &serde_json::Value) -> u64 {
        cursor.get("step").and_then(serde_json::Value::as_u64).unwrap_or(0)
    }
}

impl BatchSource for LoaderSource {
    fn next_batch(&mut self) -> Result<Batch, BoxError> {
        let made = self.loader.next_batch()?;
        let mut views = Vec::with_capacity(self.views.len());
        for view in &self.views {
            let size = view.size;
            let bytes = made.images_of(size);
            let bytes =
                bytes.ok_or_else(|| DataError::Option(format!("the loader makes no images of {size}x{size}")))?;
            let mut values = vec![0.0; bytes.len()];
            model_input(bytes, made.len(), size, made.mix.as_ref(), &view.normalize, &mut values)?;
            views.push(values);
        }
        let mix = made.mix_targets().map(Mix::from);
        let cursor = serde_json::json!({ "step": self.loader.step() });
        Ok(Batch { views, captions: made.captions, mix, cursor })
    }
}
