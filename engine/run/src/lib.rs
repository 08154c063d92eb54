//! mcpipe's pipeline runner: from a checked file to a plan of stages, their execution, and the run directory.
//!
//! * [`components`]: every registered component, for parser, schema and `mcpipe list`.
//! * [`compile`]: a [`mcpipe_spec::Document`] to a [`Pipeline`]: names resolved, checked, stages linked to a [`Plan`].
//! * [`describe`], [`drawing`]: what a run would do.
//! * [`export`]: a run's student, or any weights, in another library's names or folded for inference.
//! * [`embed`], [`classify`]: a trained model put to use on images and texts.
//! * [`run`]: runs the stages whose results the [`store`](store::Store) lacks and fills the run directory.

mod assemble;
mod classify;
mod components;
mod convert;
mod describe;
pub mod draw;
mod embed;
mod error;
mod hash;
mod initial;
mod model;
mod npy;
mod pipeline;
pub mod plan;
mod progress;
mod records;
pub mod report;
mod resolve;
mod run_dir;
mod schedule;
mod settings;
mod setups;
mod stages;
pub mod store;
mod summary;
mod text_file;

use std::path::{Path, PathBuf};

pub use classify::{Classes, Classified, Guess, TEMPLATE, classify};
pub use components::{components, schema_text};
pub use convert::{ExportSource, export};
pub use describe::{Description, ModelLine, StageLine, TapLine, TrainingLine, describe, drawing};
pub use embed::{EmbedOptions, EmbeddingFile, Embeddings, Inputs, Rows, embed};
pub use error::RunError;
pub use hash::code_version;
pub use mcpipe_models::export::Form;
pub use mcpipe_train::DeviceChoice;
pub use model::{ModelSource, WeightFile};
pub use pipeline::{Pipeline, Resolved, compile};
pub use plan::Plan;
pub use progress::{Event, Interrupt, Observer, Silent};
pub use records::{Headline, ModelRecord, Role, Scores, TrainingRecord};
pub use run_dir::RunDir;
pub use schedule::{Outcome, Status, execute, statuses};
pub use settings::{Settings, all_threads, default_store};
pub use store::write_file;
pub use summary::{Row, Summary};

/// A finished run.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its directory.
    pub dir: PathBuf,
    /// Its results.
    pub summary: Summary,
}

/// Runs a pipeline: the stages whose results the store lacks, then the run directory.
///
/// # Errors
/// The first stage's that failed; [`RunError::Interrupted`] when asked to stop, with the state saved; a run directory
/// that can't be written to.
pub fn run(
    pipeline: &Pipeline,
    settings: &Settings,
    out: Option<&Path>,
    observer: &dyn Observer,
    interrupt: &Interrupt,
) -> Result<Finished, RunError> {
    let dir = RunDir::create(pipeline, settings, out)?;
    let finished = execute(&pipeline.plan, settings, observer, &|stage, line| dir.metric(stage, line), interrupt)
        .and_then(|outcomes| {
            dir.finish(&outcomes)?;
            Summary::read(&outcomes)
        });
    match finished {
        Ok(summary) => Ok(Finished { dir: dir.path().to_owned(), summary }),
        Err(error) => {
            dir.close(if matches!(error, RunError::Interrupted { .. }) { "interrupted" } else { "failed" });
            Err(error)
        }
    }
}
