//! What can go wrong in a run, and the exit code that says so.

use std::io;
use std::path::{Path, PathBuf};

use mcpipe_spec::Diagnostics;

/// An error of a run.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum RunError {
    /// The pipeline file has mistakes.
    #[error("{0}")]
    Spec(Diagnostics),
    /// An argument that can't be served.
    #[error("{0}")]
    Usage(String),
    /// The run was asked to stop and did so at a safe point.
    #[error("interrupted by signal {signal}")]
    Interrupted {
        /// Number of the signal.
        signal: i32,
    },
    /// A stage failed.
    #[error("stage {stage}: {source}")]
    Stage {
        /// The stage's name.
        stage: String,
        /// What happened.
        source: Box<RunError>,
    },
    /// A file or folder can't be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// A file or folder can't be written.
    #[error("cannot write {}: {}", path.display(), explain(source))]
    Write {
        /// Which.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The data can't be used.
    #[error(transparent)]
    Data(#[from] mcpipe_data::DataError),
    /// A training failed.
    #[error(transparent)]
    Train(#[from] mcpipe_train::TrainError),
    /// A graph can't be built or run.
    #[error(transparent)]
    Graph(#[from] mcpipe_graph::GraphError),
    /// A step can't be run.
    #[error(transparent)]
    Exec(#[from] mcpipe_graph::ExecError),
    /// A model can't be built as asked.
    #[error(transparent)]
    Model(#[from] mcpipe_models::ModelError),
    /// Weights can't be read or written.
    #[error(transparent)]
    Weights(#[from] mcpipe_models::WeightsError),
    /// An evaluation failed.
    #[error("{0}")]
    Eval(String),
    /// The report can't be made.
    #[error("{0}")]
    Report(String),
    /// Stages that don't fit together: a mistake in this program, not in a file.
    #[error("the plan does not hold together: {0}")]
    Plan(String),
}

/// The system's reason with what to do about the two that users can act on.
fn explain(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::StorageFull => format!("{error}; free some space, or choose another disk by --store and --out"),
        io::ErrorKind::PermissionDenied | io::ErrorKind::ReadOnlyFilesystem => {
            format!("{error}; choose another folder by --store and --out")
        }
        _ => error.to_string(),
    }
}

impl RunError {
    pub(crate) fn read(path: &Path, source: io::Error) -> Self {
        Self::Read { path: path.to_owned(), source }
    }

    pub(crate) fn write(path: &Path, source: io::Error) -> Self {
        Self::Write { path: path.to_owned(), source }
    }

    /// A file that the user named and that can't be used is bad usage.
    pub(crate) fn of_input(error: mcpipe_models::WeightsError) -> Self {
        Self::Usage(error.to_string())
    }

    pub(crate) fn in_stage(self, stage: &str) -> Self {
        match self {
            // These speak of the whole run.
            Self::Interrupted { .. } | Self::Stage { .. } => self,
            other => Self::Stage { stage: stage.to_owned(), source: Box::new(other) },
        }
    }

    /// The process's exit code: 2 for a bad file or argument, 128 + signal for an interrupted run, else 1.
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::Spec(_) | Self::Usage(_) => 2,
            Self::Interrupted { signal } => u8::try_from(128 + signal).unwrap_or(1),
            _ => 1,
        }
    }

    /// A short, stable name of the kind of error, for `--format json`.
    pub fn code(&self) -> &'static str {
        match self {
            Self::Spec(_) => "spec",
            Self::Usage(_) => "usage",
            Self::Interrupted { .. } => "interrupted",
            Self::Stage { source, .. } => source.code(),
            Self::Read { .. } => "read",
            Self::Write { .. } => "write",
            Self::Data(error) => error.code(),
            Self::Train(_) => "train",
            Self::Graph(_) | Self::Exec(_) => "graph",
            Self::Model(_) => "model",
            Self::Weights(_) => "weights",
            Self::Eval(_) => "eval",
            Self::Report(_) => "report",
            Self::Plan(_) => "plan",
        }
    }
}
