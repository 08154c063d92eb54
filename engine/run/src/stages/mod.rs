//! The registered stages. A new one is a file with its [`StageDef`] and one line in [`STAGES`].

use std::sync::Arc;

use mcpipe_spec::{Component, ComponentKind, NoParams, params_schema};

use crate::pipeline::Resolved;
use crate::plan::Stage;

pub mod evaluate;
mod export;
pub mod load_teacher;
pub mod make_data;
mod report;
pub mod train_student;
pub mod train_teacher;
mod training;

/// A registered kind of stage.
#[derive(Clone, Copy, Debug)]
pub struct StageDef {
    /// Its name.
    pub name: &'static str,
    /// One line for `mcpipe list`.
    pub summary: &'static str,
    /// The stages of this kind that a pipeline has.
    pub declare: fn(&Arc<Resolved>) -> Vec<Box<dyn Stage>>,
}

/// All kinds, in the order in which a plan lists them where its DAG leaves a choice.
pub static STAGES: &[StageDef] = &[
    make_data::STAGE,
    load_teacher::STAGE,
    train_teacher::STAGE,
    train_student::STAGE,
    evaluate::STAGE,
    export::STAGE,
    report::STAGE,
];

/// The stages of a pipeline, not yet linked.
pub fn declare(resolved: &Arc<Resolved>) -> Vec<Box<dyn Stage>> {
    STAGES.iter().flat_map(|def| (def.declare)(resolved)).collect()
}

/// The stages as components, for `mcpipe list`.
pub fn components() -> Vec<Component> {
    let component = |def: &StageDef| Component {
        kind: ComponentKind::Stage,
        name: def.name,
        summary: def.summary,
        params: params_schema::<NoParams>,
    };
    STAGES.iter().map(component).collect()
}
