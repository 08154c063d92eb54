//! What can go wrong in an evaluation.

use mcpipe_data::DataError;

/// An error of a caller's encoder, passed through.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

/// An evaluation without a result.
#[derive(Debug, thiserror::Error)]
pub enum EvalError {
    /// The data can't be read.
    #[error(transparent)]
    Data(#[from] DataError),
    /// An encoder failed.
    #[error("encoding failed: {0}")]
    Encode(BoxError),
    /// Embeddings, classes or samples that don't fit together.
    #[error("{0}")]
    Shape(String),
    /// A sample's class is not in the list of class names.
    #[error("sample `{key}` has class {class}, but there are {classes} class names")]
    Class {
        /// The sample's key.
        key: String,
        /// Its class.
        class: u32,
        /// Number of class names.
        classes: usize,
    },
    /// An embedding that is not finite.
    #[error("the embedding of {0} is not finite")]
    NotFinite(String),
    /// A split without samples.
    #[error("the evaluation split has no samples")]
    Empty,
}
