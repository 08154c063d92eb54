//! Trains the student: with distillation, and once more without it to compare with.

use std::sync::Arc;

use serde_json::{Value, json};

use super::evaluate::{InLoop, loop_settings};
use super::train_teacher::{data_settings, training_settings, training_summary};
use super::{StageDef, make_data, training};
use crate::assemble::{image_graph, text_graph};
use crate::error::RunError;
use crate::hash::file_digest;
use crate::pipeline::Resolved;
use crate::plan::{Context, Need, Port, Stage, StageId};
use crate::records::{MODEL, ModelRecord, Role};
use crate::resolve::StudentText;
use crate::setups::{self, Frozen, student_needs, teachers_used};
use crate::store::write_json;

/// Name of the kind.
pub const NAME: &str = "train_student";

/// `train_student`.
pub const STAGE: StageDef = StageDef {
    name: NAME,
    summary: "Trains the student, with distillation or without",
    declare: |resolved| {
        roles(resolved)
            .into_iter()
            .map(|role| Box::new(TrainStudent { resolved: Arc::clone(resolved), role }) as Box<dyn Stage>)
            .collect()
    },
};

/// The students that a pipeline trains: without distillation the baseline is the student itself.
pub fn roles(resolved: &Resolved) -> Vec<Role> {
    let baseline = resolved.spec().student.baseline && resolved.distils();
    if baseline { vec![Role::Student, Role::Baseline] } else { vec![Role::Student] }
}

/// The name of a student by its role.
pub fn student_name(role: Role) -> &'static str {
    match role {
        Role::Baseline => "baseline",
        _ => "student",
    }
}

/// The stage that trains a student.
pub fn stage_of(role: Role) -> StageId {
    StageId::new(NAME, student_name(role))
}

#[derive(Debug)]
struct TrainStudent {
    resolved: Arc<Resolved>,
    role: Role,
}

impl TrainStudent {
    fn distilled(&self) -> bool {
        self.role == Role::Student && self.resolved.distils()
    }
}

impl Stage for TrainStudent {
    fn id(&self) -> StageId {
        stage_of(self.role)
    }

    fn path(&self) -> String {
        if self.role == Role::Baseline { "student.baseline".into() } else { "student".into() }
    }

    fn gives(&self) -> Port {
        Port::Student
    }

    fn needs(&self) -> Vec<Need> {
        let evals: Vec<_> =
            self.resolved.evals.iter().filter(|(e, _)| e.every_steps > 0).map(|(_, data)| data).collect();
        let mut needs = make_data::needs_of(&self.resolved, true, &evals);
        let teachers = student_needs(&self.resolved, self.distilled());
        needs.extend(teachers.into_iter().map(|stage| Need { stage, port: Port::Teacher }));
        needs
    }

    fn settings(&self) -> Result<Value, RunError> {
        let spec = self.resolved.spec();
        let s = &spec.student;
        let text = match &self.resolved.models.student.text {
            // A teacher's text tower comes through the port.
            StudentText::Teacher(_) => json!("teacher"),
            StudentText::File(tower, file) => {
                let (digest, _) = file_digest(file).map_err(|e| RunError::read(file, e))?;
                json!([spec.text, digest, tower.tokenizer.digest()])
            }
        };
        let weights = match &s.weights {
            Some(weights) => {
                let file = weights.path();
                let (digest, _) = file_digest(file).map_err(|e| RunError::read(file, e))?;
                let how = weights.table().map(|t| json!([t.include, t.exclude, t.resize, t.inherit]));
                json!([digest, how])
            }
            None => Value::Null,
        };
        let distillation = if self.distilled() {
            let scale = |&at: &usize| {
                let teacher = &spec.teachers[at];
                json!([
                    teacher.name(),
                    teacher.logit_scale(),
                    matches!(teacher, mcpipe_spec::Teacher::Ema(_)).then_some(teacher)
                ])
            };
            let teachers: Vec<Value> = teachers_used(&self.resolved).iter().map(scale).collect();
            json!([spec.loss.lambda, spec.distill, teachers])
        } else {
            Value::Null
        };
        Ok(json!({
            "student": [s.backbone, s.image_size, s.params, s.ema],
            "weights": weights,
            "text": text,
            "projection": spec.projection,
            "logit_scale": [spec.loss.logit_scale, json!(spec.loss.train_logit_scale)],
            "loss": [json!(spec.loss.kind), json!(spec.loss.logit_bias)],
            "distillation": distillation,
            "training": training_settings(&spec.training),
            "optimizer": spec.optimizer,
            "schedule": spec.schedule,
            "seed": self.resolved.student_seed(),
            "data": data_settings(&self.resolved)?,
            "evaluations": loop_settings(&self.resolved)?,
        }))
    }

    fn resumes(&self) -> bool {
        true
    }

    fn run(&self, context: &Context<'_>) -> Result<String, RunError> {
        let dir = |id: &StageId| context.input(id).map(ToOwned::to_owned);
        let frozen = Frozen::Results(&dir);
        let setup = setups::student(&self.resolved, self.distilled(), frozen, context.settings, context.hash.hex())?;
        let shards = make_data::training_shards(&self.resolved.train, context)?;
        let mut evaluate = InLoop::new(&self.resolved, context, frozen)?;
        let record = training::run(&self.resolved, context, setup, shards, &mut evaluate)?;
        let summary = training_summary(&record);
        let model = &self.resolved.models.student;
        let image = image_graph(&model.image)?;
        let record = ModelRecord {
            name: student_name(self.role).to_owned(),
            role: self.role,
            backbone: Some(model.image.backbone.name().to_owned()),
            image_size: Some(model.image.image_size),
            image_parameters: image.trained_len(),
            text_parameters: text_graph(&model.text_tower)?.trained_len(),
            flops_per_image: image.forward_flops(),
            training: Some(record),
        };
        write_json(&context.dir.join(MODEL), &record)?;
        Ok(summary)
    }
}
