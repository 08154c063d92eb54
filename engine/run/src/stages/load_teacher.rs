//! Loads a teacher from a file: its tensors are checked and kept with the run's other results.

use std::sync::Arc;

use mcpipe_spec::{LoadTeacher as LoadTeacherSpec, Teacher};
use mcpipe_train::{ImageTower, TextTower};
use serde_json::{Value, json};

use super::StageDef;
use super::train_teacher::model_record;
use crate::assemble::{WEIGHTS, read_weights, write_weights};
use crate::error::RunError;
use crate::hash::file_digest;
use crate::pipeline::Resolved;
use crate::plan::{Context, Load, Need, Port, Stage, StageId};
use crate::progress::Event;
use crate::records::MODEL;
use crate::resolve::TextSide;
use crate::resolve::models::image_path;
use crate::store::write_json;

/// Name of the kind.
pub const NAME: &str = "load_teacher";

/// `load_teacher`.
pub const STAGE: StageDef = StageDef {
    name: NAME,
    summary: "Loads a teacher's weights from a file",
    declare: |resolved| {
        let load = |(at, teacher): (usize, &Teacher)| match teacher {
            Teacher::Load(_) => Some(Box::new(LoadTeacher { resolved: Arc::clone(resolved), at }) as Box<dyn Stage>),
            _ => None,
        };
        resolved.spec().teachers.iter().enumerate().filter_map(load).collect()
    },
};

#[derive(Debug)]
struct LoadTeacher {
    resolved: Arc<Resolved>,
    at: usize,
}

impl LoadTeacher {
    fn spec(&self) -> Result<&LoadTeacherSpec, RunError> {
        match &self.resolved.spec().teachers[self.at] {
            Teacher::Load(teacher) => Ok(teacher),
            _ => Err(RunError::Plan("a teacher that has no weight file is loaded".into())),
        }
    }
}

impl Stage for LoadTeacher {
    fn id(&self) -> StageId {
        StageId::new(NAME, self.resolved.models.teachers[self.at].name.clone())
    }

    fn path(&self) -> String {
        format!("teacher[{}]", self.at)
    }

    fn gives(&self) -> Port {
        Port::Teacher
    }

    fn needs(&self) -> Vec<Need> {
        Vec::new()
    }

    fn settings(&self) -> Result<Value, RunError> {
        let load = self.spec()?;
        let file = load.weights.as_path();
        let (digest, _) = file_digest(file).map_err(|e| RunError::read(file, e))?;
        let spec = &self.resolved.spec().teachers[self.at];
        let vocabulary = match &self.resolved.models.teachers[self.at].text {
            Some(TextSide::Own(tower)) => tower.tokenizer.digest(),
            _ => None,
        };
        let (image, text) = (spec.image(), spec.text());
        let file = [json!(digest), json!(load.resize_position)];
        Ok(json!({ "file": file, "image": image, "text": text, "vocabulary": vocabulary, "dim": spec.dim() }))
    }

    fn load(&self) -> Load {
        Load::Light
    }

    fn is_goal(&self) -> bool {
        false
    }

    fn run(&self, context: &Context<'_>) -> Result<String, RunError> {
        (context.tell)(Event::Started { steps: None, from: 0 });
        let model = &self.resolved.models.teachers[self.at];
        let image = model.image.as_ref().map(|tower| (tower as &dyn ImageTower, image_path(tower.backbone.as_ref())));
        let text = match &model.text {
            Some(TextSide::Own(tower)) => Some(tower as &dyn TextTower),
            _ => None,
        };
        let load = self.spec()?;
        let weights = read_weights(&load.weights, image, text, load.resize_position)?;
        write_weights(&context.dir.join(WEIGHTS), &weights.store, weights.logit_scale, &[])?;
        let record = model_record(model, None)?;
        write_json(&context.dir.join(MODEL), &record)?;
        Ok(format!("{} parameters", weights.store.trained_len()))
    }
}
