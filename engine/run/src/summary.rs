//! What a run came to, for the table at its end.

use serde::Serialize;

use crate::error::RunError;
use crate::records::{MODEL, ModelRecord, Role, SCORES, Scores};
use crate::schedule::Outcome;
use crate::store::read_json;

/// A run's results.
#[derive(Clone, Debug, Serialize)]
pub struct Summary {
    /// One row for each model, the student first.
    pub rows: Vec<Row>,
    /// Stages taken from the store.
    pub from_store: usize,
    /// Stages run.
    pub ran: usize,
}

/// A model's results.
#[derive(Clone, Debug, Serialize)]
pub struct Row {
    /// The model and how its training went.
    pub model: ModelRecord,
    /// Its evaluations.
    pub scores: Vec<Scores>,
}

impl Summary {
    /// Reads the results of a run's stages.
    ///
    /// # Errors
    /// A result that can't be read.
    pub fn read(outcomes: &[Outcome]) -> Result<Self, RunError> {
        let mut rows: Vec<Row> = Vec::new();
        let mut scores: Vec<Scores> = Vec::new();
        for (id, stored) in outcomes.iter().filter_map(|o| Some((&o.id, o.stored.as_ref()?))) {
            if stored.dir.join(MODEL).is_file() {
                rows.push(Row { model: ModelRecord::read(&stored.dir, id)?, scores: Vec::new() });
            }
            if stored.dir.join(SCORES).is_file() {
                scores.push(read_json(&stored.dir.join(SCORES))?);
            }
        }
        rows.sort_by_key(|row| row.model.role);
        for row in &mut rows {
            let own = scores.iter().filter(|s| s.model == row.model.name && s.role == row.model.role);
            row.scores = own.cloned().collect();
        }
        let ran = outcomes.iter().filter(|o| o.stored.is_some() && !o.cached).count();
        Ok(Self { rows, from_store: outcomes.iter().filter(|o| o.cached).count(), ran })
    }

    /// Whether a student without distillation stands beside the distilled one.
    pub fn has_baseline(&self) -> bool {
        self.rows.iter().any(|row| row.model.role == Role::Baseline)
    }
}
