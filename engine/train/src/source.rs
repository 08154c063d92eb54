//! The data crate's loader as a source of batches.

use mcpipe_data::{DataError, ImageForm, Normalize, TrainLoader};

use crate::batch::{Batch, BatchSource, ByteView, FormBytes, ImageBytes};
use crate::error::BoxError;

/// The form and normalisation of one model's images.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct ViewSpec {
    /// Side and filter of the resize; one of the loader's forms.
    pub form: ImageForm,
    /// Mean and standard deviation of the model.
    pub normalize: Normalize,
}

/// Batches of a [`TrainLoader`], as bytes, with the views that the models of a step read. The loader starts at the step that
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
        let view = |v: &ViewSpec| {
            let form = made.forms.iter().position(|f| *f == v.form);
            let missing = || DataError::Option(format!("the loader makes no images of {0}x{0}", v.form.size));
            Ok(ByteView { form: form.ok_or_else(missing)?, normalize: v.normalize })
        };
        let views = self.views.iter().map(view).collect::<Result<_, DataError>>()?;
        let forms = made.forms.iter().zip(made.images);
        let forms = forms.map(|(form, bytes)| FormBytes { size: form.size, bytes }).collect();
        let cursor = serde_json::json!({ "step": self.loader.step() });
        Ok(Batch::of_bytes(ImageBytes { forms, views, mix: made.mix }, made.captions, cursor))
    }
}
