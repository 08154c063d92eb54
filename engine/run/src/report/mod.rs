//! The report: one self-contained page of what a run did and what came out.

mod confusion;
mod curves;
mod page;

use crate::records::{ModelRecord, Predictions, Scores};

pub use curves::{Logged, read_metrics};
pub use page::html;

/// Everything that the report shows.
#[derive(Clone, Debug)]
pub struct Report {
    /// Name of the pipeline.
    pub name: String,
    /// Models, the student first.
    pub models: Vec<ModelRecord>,
    /// Numbers of all evaluations, the student's first.
    pub scores: Vec<Scores>,
    /// Logged lines of each training: the model's name and its lines.
    pub trainings: Vec<(String, Vec<Logged>)>,
    /// The student's predictions.
    pub predictions: Option<Predictions>,
    /// The DAG as SVG.
    pub dag: String,
    /// Settings in groups.
    pub settings: Vec<SettingsGroup>,
    /// Version of the code.
    pub version: String,
}

/// A table of the pipeline: its name and its lines of key and value.
pub type SettingsGroup = (String, Vec<(String, String)>);

/// The name of a model for people.
pub fn label(name: &str, role: crate::records::Role, distils: bool) -> String {
    use crate::records::Role;
    match role {
        Role::Student if distils => "student, distilled".into(),
        Role::Student => "student".into(),
        Role::Baseline => "student, not distilled".into(),
        Role::Teacher => format!("teacher {name}"),
    }
}
