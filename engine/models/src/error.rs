//! What can be wrong with a model as asked for.

use mcpipe_graph::GraphError;

/// A model that can't be built as asked.
#[derive(Clone, Debug, thiserror::Error, PartialEq)]
pub enum ModelError {
    /// No component of that name is registered.
    #[error("unknown {kind} `{name}`{}; registered: {}", suggestion(.nearest), .known.join(", "))]
    Unknown {
        /// What was looked for (`backbone`, `text encoder`).
        kind: &'static str,
        /// Name asked for.
        name: String,
        /// The registered name that is most like it.
        nearest: Option<String>,
        /// All registered names.
        known: Vec<String>,
    },
    /// A parameter that the component lacks, or a value that it can't take.
    #[error("parameter `{param}` of `{component}`: {message}")]
    Param {
        /// Component name.
        component: String,
        /// Path of the parameter (`channels[2]`).
        param: String,
        /// What is wrong, what is expected.
        message: String,
    },
    /// An image size that the backbone can't take.
    #[error("`{backbone}` can't take {size}x{size} images: {message}")]
    ImageSize {
        /// Backbone name.
        backbone: String,
        /// Side asked for.
        size: usize,
        /// What sizes fit.
        message: String,
    },
    /// A tap that the backbone lacks.
    #[error("`{backbone}` has no tap `{tap}`{}; taps: {}", suggestion(.nearest), .known.join(", "))]
    UnknownTap {
        /// Backbone name.
        backbone: String,
        /// Name asked for.
        tap: String,
        /// The tap that is most like it.
        nearest: Option<String>,
        /// All taps.
        known: Vec<String>,
    },
    /// A store that lacks a parameter.
    #[error("the store has no parameter `{0}`")]
    Missing(String),
    /// Dimensions that don't fit together.
    #[error("{0}")]
    Dims(String),
    /// The graph could not be built.
    #[error(transparent)]
    Graph(#[from] GraphError),
}

fn suggestion(nearest: &Option<String>) -> String {
    nearest.as_ref().map_or_else(String::new, |n| format!(" (did you mean `{n}`?)"))
}

/// The name of `known` that is most like `name`, where one is.
pub(crate) fn nearest<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    let scored = known.into_iter().map(|k| (strsim::jaro_winkler(name, k), k));
    let best = scored.max_by(|a, b| a.0.total_cmp(&b.0))?;
    (best.0 >= 0.7).then(|| best.1.to_owned())
}
