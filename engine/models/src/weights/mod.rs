//! Weight files: reading safetensors and PyTorch's checkpoints into a [`ParamStore`](mcpipe_graph::ParamStore) by name,
//! and atomic writing of safetensors.

mod apple;
mod convert;
mod element;
mod fit;
mod globals;
mod hugging_face;
mod inherit;
mod load;
mod pickle;
mod read;
mod resize;
mod rules;
mod slot;
mod take;
mod torch;
mod torch_zip;
mod write;

use std::fmt;
use std::io;
use std::path::PathBuf;

pub use convert::{ConvertOptions, Form, convert};
pub use element::Element;
pub use fit::{Fit, fit, fits, head_of};
pub(crate) use load::path_prefix;
pub use load::{Loaded, NameMap, TEXT_ROOTS};
pub use read::{Checkpoint, Container, Source};
pub use take::{TakeOptions, Takeover, Target};
pub use write::{Entry, write_atomic, write_safetensors};

/// A weight file that can't be read, written, or taken by a model.
#[derive(Debug, thiserror::Error)]
pub enum WeightsError {
    /// The file can't be read or written.
    #[error("{}: {action}: {source}", .path.display())]
    Io {
        /// File.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// Cause.
        source: io::Error,
    },
    /// The file is of a kind that is not read.
    #[error("{} {message}", .path.display())]
    Kind {
        /// File.
        path: PathBuf,
        /// What it is or holds, behind its name: `is no weight file`.
        message: String,
    },
    /// The file is damaged.
    #[error("{}: damaged: {message}", .path.display())]
    Corrupt {
        /// File.
        path: PathBuf,
        /// What is wrong, and where.
        message: String,
    },
    /// The file asks for something that is not done, such as a call of a function.
    #[error("{}: refused: {message}", .path.display())]
    Refused {
        /// File.
        path: PathBuf,
        /// What it asks for, and where.
        message: String,
    },
    /// A tensor's element type is not a floating-point one that is read.
    #[error("{}: tensor `{name}` has type {dtype}; F32, F16, BF16 and F64 are read", .path.display())]
    Dtype {
        /// File.
        path: PathBuf,
        /// Tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// The file's tensors are not the model's.
    #[error("{}: the weights don't fit the model{mismatch}", .path.display())]
    Mismatch {
        /// File.
        path: PathBuf,
        /// Everything that does not fit.
        mismatch: Box<Mismatch>,
    },
    /// A pattern that names no parameter of the model.
    #[error("the pattern `{pattern}` names no parameter of the model that is to take {}", .path.display())]
    Pattern {
        /// File.
        path: PathBuf,
        /// The pattern.
        pattern: String,
    },
    /// A model can't be written in the form asked for.
    #[error("{0}")]
    Export(String),
}

impl WeightsError {
    pub(crate) fn io(path: &std::path::Path, action: &'static str) -> impl FnOnce(io::Error) -> WeightsError {
        let path = path.to_owned();
        move |source| WeightsError::Io { path, action, source }
    }
}

/// What does not fit between a file and a model. Names are the file's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Mismatch {
    /// Parameters of the model that the file lacks.
    pub missing: Vec<String>,
    /// Tensors of the file that the model lacks.
    pub unexpected: Vec<String>,
    /// Tensors with another shape: name, shape in the file, shape in the model.
    pub wrong_shape: Vec<(String, Vec<usize>, Vec<usize>)>,
    /// Settings that would allow for some of it.
    pub hints: Vec<String>,
}

/// Names listed of each kind; the rest is counted.
const LISTED: usize = 10;

impl Mismatch {
    /// Whether all fits.
    pub fn is_empty(&self) -> bool {
        self.missing.is_empty() && self.unexpected.is_empty() && self.wrong_shape.is_empty()
    }
}

impl fmt::Display for Mismatch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let wrong =
            |(name, file, model): &(String, Vec<usize>, Vec<usize>)| format!("{name} (file {file:?}, model {model:?})");
        let lists = [
            ("missing from the file", self.missing.clone()),
            ("not in the model", self.unexpected.clone()),
            ("of another shape", self.wrong_shape.iter().map(wrong).collect()),
        ];
        for (what, names) in lists.iter().filter(|(_, names)| !names.is_empty()) {
            write!(f, "\n  {} {what}:", names.len())?;
            for name in names.iter().take(LISTED) {
                write!(f, "\n    {name}")?;
            }
            if names.len() > LISTED {
                write!(f, "\n    and {} more", names.len() - LISTED)?;
            }
        }
        self.hints.iter().try_for_each(|hint| write!(f, "\n  {hint}"))
    }
}
