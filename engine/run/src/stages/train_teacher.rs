//! Trains a teacher with CLIP's loss.

use std::sync::Arc;

use mcpipe_spec::Teacher;
use mcpipe_train::NoEval;
use serde_json::{Value, json};

use super::{StageDef, make_data, training};
use crate::assemble::{image_graph, text_graph};
use crate::error::RunError;
use crate::pipeline::Resolved;
use crate::plan::{Context, Need, Port, Stage, StageId};
use crate::records::{MODEL, ModelRecord, Role, TrainingRecord};
use crate::resolve::{TeacherModel, TextSide};
use crate::setups::{Frozen, teacher_stage, trained_teacher};
use crate::store::write_json;

/// Name of the kind.
pub const NAME: &str = "train_teacher";

/// `train_teacher`.
pub const STAGE: StageDef = StageDef {
    name: NAME,
    summary: "Trains a teacher on the training data with CLIP's loss",
    declare: |resolved| {
        let train = |(at, teacher): (usize, &Teacher)| match teacher {
            Teacher::Train(_) => Some(Box::new(TrainTeacher { resolved: Arc::clone(resolved), at }) as Box<dyn Stage>),
            _ => None,
        };
        resolved.spec().teachers.iter().enumerate().filter_map(train).collect()
    },
};

/// The record of a teacher.
pub fn model_record(model: &TeacherModel, training: Option<TrainingRecord>) -> Result<ModelRecord, RunError> {
    let image = model.image.as_ref().map(|tower| image_graph(tower)).transpose()?;
    let text = match &model.text {
        Some(TextSide::Own(tower)) => Some(text_graph(tower)?),
        _ => None,
    };
    Ok(ModelRecord {
        name: model.name.clone(),
        role: Role::Teacher,
        backbone: model.image.as_ref().map(|tower| tower.backbone.name().to_owned()),
        image_size: model.image.as_ref().map(|tower| tower.image_size),
        image_parameters: image.as_ref().map_or(0, |graph| graph.trained_len()),
        text_parameters: text.as_ref().map_or(0, |graph| graph.trained_len()),
        flops_per_image: image.as_ref().map_or(0, |graph| graph.forward_flops()),
        training,
    })
}

/// A training's settings that its result depends on: how often the state is saved is none, nor whether activations are
/// computed twice.
pub fn training_settings(training: &mcpipe_spec::Training) -> Value {
    let mut value = json!(training);
    if let Some(object) = value.as_object_mut() {
        object.remove("checkpoint");
        object.remove("recompute");
    }
    value
}

/// What a training reads of the data: the shards' identity and how they are read, but not by how many threads.
pub fn data_settings(resolved: &Resolved) -> Result<Value, RunError> {
    let data = &resolved.spec().data.train;
    Ok(json!({
        "files": resolved.train.identity()?,
        "on_bad_sample": data.on_bad_sample,
        "max_bad_samples": data.max_bad_samples,
        "augment": resolved.spec().augment,
    }))
}

#[derive(Debug)]
struct TrainTeacher {
    resolved: Arc<Resolved>,
    at: usize,
}

impl TrainTeacher {
    fn model(&self) -> &TeacherModel {
        &self.resolved.models.teachers[self.at]
    }
}

impl Stage for TrainTeacher {
    fn id(&self) -> StageId {
        StageId::new(NAME, self.model().name.clone())
    }

    fn path(&self) -> String {
        format!("teacher[{}]", self.at)
    }

    fn gives(&self) -> Port {
        Port::Teacher
    }

    fn needs(&self) -> Vec<Need> {
        let mut needs = make_data::needs_of(&self.resolved, true, &[]);
        if let Some(TextSide::Of(_)) = self.model().text
            && let Some((owner, _)) = self.resolved.models.text_of(self.at)
            && let Some(stage) = teacher_stage(&self.resolved, owner)
        {
            needs.push(Need { stage, port: Port::Teacher });
        }
        needs
    }

    fn settings(&self) -> Result<Value, RunError> {
        let spec = self.resolved.spec();
        let Teacher::Train(teacher) = &spec.teachers[self.at] else {
            return Err(RunError::Plan("a teacher that is not to be trained is trained".into()));
        };
        // Not its name and not the scale of its targets: neither changes its weights.
        Ok(json!({
            "image": teacher.image,
            "text": match self.model().text { Some(TextSide::Own(ref tower)) => json!([teacher.text, tower.tokenizer.digest()]), _ => json!("other") },
            "dim": teacher.dim,
            "training": training_settings(&teacher.training),
            "optimizer": spec.optimizer_of(teacher),
            "schedule": spec.schedule_of(teacher),
            "seed": spec.seed,
            "data": data_settings(&self.resolved)?,
        }))
    }

    fn resumes(&self) -> bool {
        true
    }

    fn run(&self, context: &Context<'_>) -> Result<String, RunError> {
        let dir = |id: &StageId| context.input(id).map(ToOwned::to_owned);
        let setup =
            trained_teacher(&self.resolved, self.at, Frozen::Results(&dir), context.settings, context.hash.hex())?;
        let shards = make_data::training_shards(&self.resolved.train, context)?;
        let record = training::run(&self.resolved, context, setup, shards, &mut NoEval)?;
        let summary = training_summary(&record);
        write_json(&context.dir.join(MODEL), &model_record(self.model(), Some(record))?)?;
        Ok(summary)
    }
}

/// A training in a few words.
pub fn training_summary(record: &TrainingRecord) -> String {
    let loss = record.final_loss.map_or_else(String::new, |loss| format!("loss {loss:.3}, "));
    format!("{loss}{:.0} images/s", record.images_per_second)
}
