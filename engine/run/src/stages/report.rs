//! Makes the report and the drawing of the DAG.

use std::sync::Arc;

use serde_json::{Value, json};

use super::train_student::{roles, stage_of};
use super::{StageDef, evaluate};
use crate::draw::NodeState;
use crate::error::RunError;
use crate::hash::{REPORT_DIGEST, code_version};
use crate::pipeline::Resolved;
use crate::plan::{Context, Load, Need, Plan, Port, Stage, StageId};
use crate::progress::Event;
use crate::records::{METRICS, ModelRecord, PREDICTIONS, Role, SCORES, Scores};
use crate::report::{Report, SettingsGroup, html, read_metrics};
use crate::run_dir::resolved_toml;
use crate::setups::{student_needs, teacher_stage};
use crate::store::{read_json, write_file};

const NAME: &str = "report";

/// `report`.
pub const STAGE: StageDef = StageDef {
    name: NAME,
    summary: "Makes report.html and the drawing of the stages",
    declare: |resolved| vec![Box::new(MakeReport { resolved: Arc::clone(resolved) })],
};

#[derive(Debug)]
struct MakeReport {
    resolved: Arc<Resolved>,
}

impl MakeReport {
    /// Stages of models, the student's first.
    fn models(&self) -> Vec<StageId> {
        let mut stages: Vec<StageId> = roles(&self.resolved).into_iter().map(stage_of).collect();
        let teachers = student_needs(&self.resolved, true);
        let all = (0..self.resolved.models.teachers.len()).filter_map(|at| teacher_stage(&self.resolved, at));
        for stage in teachers.into_iter().chain(all) {
            if !stages.contains(&stage) {
                stages.push(stage);
            }
        }
        stages
    }
}

impl Stage for MakeReport {
    fn id(&self) -> StageId {
        StageId::new(NAME, "")
    }

    fn path(&self) -> String {
        String::new()
    }

    fn gives(&self) -> Port {
        Port::Report
    }

    fn needs(&self) -> Vec<Need> {
        let students = roles(&self.resolved).len();
        let models = self
            .models()
            .into_iter()
            .enumerate()
            .map(|(i, stage)| Need { stage, port: if i < students { Port::Student } else { Port::Teacher } });
        let scores = evaluate::stages(&self.resolved).into_iter().map(|stage| Need { stage, port: Port::Scores });
        models.chain(scores).collect()
    }

    fn settings(&self) -> Result<Value, RunError> {
        Ok(json!({ "spec": resolved_toml(&self.resolved)?, "version": code_version() }))
    }

    fn code(&self) -> &'static str {
        REPORT_DIGEST
    }

    fn load(&self) -> Load {
        Load::Light
    }

    fn run(&self, context: &Context<'_>) -> Result<String, RunError> {
        (context.tell)(Event::Started { steps: None, from: 0 });
        let mut models: Vec<ModelRecord> = Vec::new();
        let mut trainings = Vec::new();
        for stage in self.models() {
            let dir = context.input(&stage)?;
            let record = ModelRecord::read(dir, &stage)?;
            if record.training.is_some() {
                trainings.push((record.name.clone(), read_metrics(&dir.join(METRICS))?));
            }
            models.push(record);
        }
        let mut scores: Vec<Scores> = Vec::new();
        let mut predictions = None;
        for stage in evaluate::stages(&self.resolved) {
            let dir = context.input(&stage)?;
            let own: Scores = read_json(&dir.join(SCORES))?;
            let shown = dir.join(PREDICTIONS);
            if own.role == Role::Student && predictions.is_none() && shown.is_file() {
                predictions = Some(read_json(&shown)?);
            }
            scores.push(own);
        }
        scores.sort_by_key(|s| s.role);
        let plan = Plan::link(super::declare(&self.resolved), context.settings)
            .map_err(|e| RunError::Plan(format!("{e:?}")))?;
        let drawing = plan.drawing(&self.resolved.spec().name, &|_| NodeState::Plain, &|_| Vec::new());
        let report = Report {
            name: self.resolved.spec().name.clone(),
            models,
            scores,
            trainings,
            predictions,
            dag: drawing.svg(false),
            settings: settings(&resolved_toml(&self.resolved)?)?,
            version: code_version(),
        };
        write_file(&context.dir.join("report.html"), html(&report).as_bytes())?;
        write_file(&context.dir.join("graph.svg"), (drawing.svg(true) + "\n").as_bytes())?;
        write_file(&context.dir.join("graph.dot"), drawing.dot().as_bytes())?;
        Ok("report.html".into())
    }
}

/// The resolved pipeline as groups of dotted keys and values.
fn settings(text: &str) -> Result<Vec<SettingsGroup>, RunError> {
    let table: toml::Table = toml::from_str(text).map_err(|e| RunError::Report(e.to_string()))?;
    let mut groups = vec![("pipeline".to_owned(), Vec::new())];
    for (name, value) in &table {
        match value {
            toml::Value::Table(_) => groups.push((name.clone(), flat("", value))),
            toml::Value::Array(items) if items.iter().all(toml::Value::is_table) && !items.is_empty() => {
                for (i, item) in items.iter().enumerate() {
                    let about = ["name", "level"].iter().find_map(|key| item.get(*key)?.as_str()).unwrap_or_default();
                    groups.push((format!("{name}[{i}] {about}"), flat("", item)));
                }
            }
            other => groups[0].1.push((name.clone(), shown(other))),
        }
    }
    Ok(groups)
}

fn flat(prefix: &str, value: &toml::Value) -> Vec<(String, String)> {
    match value {
        toml::Value::Table(table) => table
            .iter()
            .flat_map(|(key, value)| {
                let path = if prefix.is_empty() { key.clone() } else { format!("{prefix}.{key}") };
                flat(&path, value)
            })
            .collect(),
        other => vec![(prefix.to_owned(), shown(other))],
    }
}

fn shown(value: &toml::Value) -> String {
    match value {
        toml::Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn settings_are_grouped_by_table() -> Result<(), RunError> {
        let groups = settings("name = \"x\"\n[a]\nb = 1\nc = { d = [1, 2] }\n[[t]]\nname = \"u\"\n")?;
        assert_eq!(groups[0], ("pipeline".into(), vec![("name".into(), "x".into())]));
        assert_eq!(groups[1].1, [("b".to_owned(), "1".to_owned()), ("c.d".to_owned(), "[1, 2]".to_owned())]);
        assert_eq!(groups[2].0, "t[0] u");
        Ok(())
    }
}
