//! What a stage is: its ports, what its hash covers, how it runs.

use std::collections::HashMap;
use std::fmt;
use std::path::Path;

use serde_json::Value;

use crate::error::RunError;
use crate::hash::StageHash;
use crate::progress::{Event, Interrupt};
use crate::settings::Settings;
use crate::store::Stored;

/// The type of what flows from one stage to another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Port {
    /// Shards in CLIP_benchmark's layout.
    Dataset,
    /// Weights and description of a teacher.
    Teacher,
    /// Weights and description of a student.
    Student,
    /// Results of one evaluation of one model.
    Scores,
    /// Exported files.
    Files,
    /// The report.
    Report,
}

impl Port {
    /// The word for it at an edge of the graph.
    pub fn id(self) -> &'static str {
        match self {
            Self::Dataset => "data set",
            Self::Teacher => "teacher",
            Self::Student => "student",
            Self::Scores => "scores",
            Self::Files => "files",
            Self::Report => "report",
        }
    }
}

/// Which stage: its kind and what it works on, as in `train_teacher clip`.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct StageId {
    /// Registered name of the kind.
    pub kind: &'static str,
    /// What it works on, where there may be several of the kind; empty otherwise.
    pub subject: String,
}

impl StageId {
    /// A stage of a kind.
    pub fn new(kind: &'static str, subject: impl Into<String>) -> Self {
        Self { kind, subject: subject.into() }
    }
}

impl fmt::Display for StageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.kind)?;
        if !self.subject.is_empty() {
            write!(f, " {}", self.subject)?;
        }
        Ok(())
    }
}

/// An input port: the stage whose result it takes, and the type expected of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Need {
    /// Whose result.
    pub stage: StageId,
    /// Of which type.
    pub port: Port,
}

/// How much of the machine a stage takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Load {
    /// All threads: such stages run one at a time unless more jobs are asked for.
    Heavy,
    /// Little: runs beside others.
    Light,
}

/// A stage of a plan. It knows all it needs from the pipeline; results of other stages come through its ports.
pub trait Stage: Send + Sync + fmt::Debug {
    /// Which stage it is.
    fn id(&self) -> StageId;

    /// Path in the pipeline file of what declares it, for messages.
    fn path(&self) -> String;

    /// Type of its result.
    fn gives(&self) -> Port;

    /// Its input ports.
    fn needs(&self) -> Vec<Need>;

    /// Everything of the pipeline and of the world outside that its result depends on, besides its input ports.
    ///
    /// # Errors
    /// A file that the stage reads is not there any more.
    fn settings(&self) -> Result<Value, RunError>;

    /// Digest of the code that its result depends on.
    fn code(&self) -> &'static str {
        crate::hash::COMPUTE_DIGEST
    }

    /// Whether what an interrupted run left in its folder is of use.
    fn resumes(&self) -> bool {
        false
    }

    /// How much of the machine it takes.
    fn load(&self) -> Load {
        Load::Heavy
    }

    /// Whether its result is wanted for itself, and not only by the stages that take it.
    fn is_goal(&self) -> bool {
        true
    }

    /// Computes the result into [`Context::dir`] and says in a few words what came out.
    ///
    /// # Errors
    /// Whatever keeps the stage from its result.
    fn run(&self, context: &Context<'_>) -> Result<String, RunError>;
}

/// What a running stage gets.
pub struct Context<'a> {
    /// Folder to write the result to.
    pub dir: &'a Path,
    /// The stage's content hash.
    pub hash: StageHash,
    /// Results of the stages that it needs.
    pub inputs: &'a HashMap<StageId, Stored>,
    /// Threads and kernels.
    pub settings: &'a Settings,
    /// Takes what the stage tells.
    pub tell: &'a (dyn Fn(Event) + Sync),
    /// Takes lines of metrics.
    pub metrics: &'a (dyn Fn(&Value) + Sync),
    /// The request to stop.
    pub interrupt: &'a Interrupt,
}

impl Context<'_> {
    /// Folder of the result of a stage that this one needs.
    ///
    /// # Errors
    /// The stage did not declare that it needs it.
    pub fn input(&self, id: &StageId) -> Result<&Path, RunError> {
        let found = self.inputs.get(id).map(|stored| stored.dir.as_path());
        found.ok_or_else(|| RunError::Plan(format!("a stage reads `{id}` without declaring it")))
    }
}

impl fmt::Debug for Context<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context").field("dir", &self.dir).finish_non_exhaustive()
    }
}
