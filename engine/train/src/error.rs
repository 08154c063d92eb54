//! What can go wrong in training.

use std::fmt;
use std::path::{Path, PathBuf};

use mcpipe_cuda::CudaError;
use mcpipe_graph::{ExecError, GraphError};
use mcpipe_models::{ModelError, WeightsError};

/// An error of a caller's part (data source, evaluation), passed through.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// Where a value first left the finite range.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Origin {
    /// The loss term, where one is to blame (`clip`, `logits`, ..).
    pub term: Option<String>,
    /// Model, layer path and op.
    pub layer: Option<String>,
    /// `loss`, `gradient`, `image` or `embedding`.
    pub what: &'static str,
}

impl fmt::Display for Origin {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (&self.term, &self.layer) {
            (Some(term), Some(layer)) => write!(f, "{} of term `{term}`, first at {layer}", self.what),
            (Some(term), None) => write!(f, "{} of term `{term}`", self.what),
            (None, Some(layer)) => write!(f, "{}, first at {layer}", self.what),
            (None, None) => write!(f, "{}", self.what),
        }
    }
}

/// A training that could not be set up or go on.
#[derive(Debug, thiserror::Error)]
pub enum TrainError {
    /// Parts of the setup that don't fit together.
    #[error("{0}")]
    Setup(String),
    /// A graph that can't be built, or weights that don't fit it.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// A model that can't be built as asked.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// A step that could not run.
    #[error(transparent)]
    Exec(#[from] ExecError),
    /// A device that can't be used or fails.
    #[error(transparent)]
    Device(#[from] CudaError),
    /// A device's memory does not suffice.
    #[error("{what}; {advice}")]
    OutOfMemory {
        /// What was asked for, where, and what there was.
        what: String,
        /// What would fit.
        advice: String,
    },
    /// The data source failed.
    #[error("reading the training data failed at step {step}: {source}")]
    Data {
        /// Step that needed the batch.
        step: u64,
        /// What the source said.
        source: BoxError,
    },
    /// A batch does not have the sizes of the setup.
    #[error("the batch of step {step} does not fit: {reason}")]
    Batch {
        /// Step that needed the batch.
        step: u64,
        /// What does not fit.
        reason: String,
    },
    /// An evaluation in the loop failed.
    #[error("the evaluation after step {step} failed: {source}")]
    Eval {
        /// Steps done.
        step: u64,
        /// What the evaluation said.
        source: BoxError,
    },
    /// Too many steps in a row had a loss or gradient that is not finite.
    #[error(
        "stopped after {in_a_row} steps in a row without a finite loss and gradient (step {step}): {origin}; {}",
        match checkpoint {
            Some(path) => format!("the last good checkpoint is {}", path.display()),
            None => "there is no checkpoint yet".to_owned(),
        }
    )]
    NonFinite {
        /// Last step tried.
        step: u64,
        /// Steps skipped in a row.
        in_a_row: u32,
        /// What went first.
        origin: Origin,
        /// Last good checkpoint.
        checkpoint: Option<PathBuf>,
    },
    /// A file or folder could not be read or written.
    #[error("could not {action} {}: {source}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// Where.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A weight file could not be written.
    #[error(transparent)]
    Weights(#[from] WeightsError),
    /// A checkpoint that is not whole, or is not of this training.
    #[error("the checkpoint {} can't be used: {reason}", path.display())]
    Checkpoint {
        /// The checkpoint's folder.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

impl TrainError {
    pub(crate) fn io<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> TrainError + 'a {
        move |source| TrainError::Io { action, path: path.to_owned(), source }
    }
}
