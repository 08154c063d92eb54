//! Writes the student under timm's and open_clip's names.

use std::sync::Arc;

use mcpipe_models::export::{Student, StudentText as ExportText, export_open_clip, export_timm, name_note};
use mcpipe_models::projection::INIT_LOGIT_SCALE;
use mcpipe_spec::ExportFormat;
use serde_json::{Value, json};

use super::StageDef;
use super::train_student::stage_of;
use crate::assemble::{WEIGHTS, image_graph, read_own, read_weights, text_graph};
use crate::error::RunError;
use crate::hash::file_digest;
use crate::pipeline::Resolved;
use crate::plan::{Context, Load, Need, Port, Stage, StageId};
use crate::progress::Event;
use crate::records::Role;
use crate::resolve::StudentText;
use crate::resolve::models::{PROJECTION, TEXT};
use crate::setups::teacher_stage;

const NAME: &str = "export";

/// `export`.
pub const STAGE: StageDef = StageDef {
    name: NAME,
    summary: "Writes the student as safetensors under timm's and open_clip's names",
    declare: |resolved| {
        if resolved.spec().export.formats.is_empty() {
            return Vec::new();
        }
        vec![Box::new(Export { resolved: Arc::clone(resolved) })]
    },
};

#[derive(Debug)]
struct Export {
    resolved: Arc<Resolved>,
}

impl Export {
    /// The stage whose result holds the text tower's weights.
    fn text_stage(&self) -> Option<StageId> {
        match self.resolved.models.student.text {
            StudentText::Teacher(at) => teacher_stage(&self.resolved, self.resolved.models.text_of(at)?.0),
            StudentText::File(..) => None,
        }
    }
}

impl Stage for Export {
    fn id(&self) -> StageId {
        StageId::new(NAME, "")
    }

    fn path(&self) -> String {
        "export".into()
    }

    fn gives(&self) -> Port {
        Port::Files
    }

    fn needs(&self) -> Vec<Need> {
        let student = Need { stage: stage_of(Role::Student), port: Port::Student };
        let text = self.text_stage().map(|stage| Need { stage, port: Port::Teacher });
        std::iter::once(student).chain(text).collect()
    }

    fn settings(&self) -> Result<Value, RunError> {
        let spec = self.resolved.spec();
        let text = match &self.resolved.models.student.text {
            StudentText::Teacher(_) => Value::Null,
            StudentText::File(_, file) => json!(file_digest(file).map_err(|e| RunError::read(file, e))?.0),
        };
        Ok(json!([
            spec.export,
            spec.student.backbone,
            spec.student.params,
            spec.student.image_size,
            spec.projection,
            text
        ]))
    }

    fn load(&self) -> Load {
        Load::Light
    }

    fn run(&self, context: &Context<'_>) -> Result<String, RunError> {
        (context.tell)(Event::Started { steps: None, from: 0 });
        let model = &self.resolved.models.student;
        let graph = image_graph(&model.image)?;
        let mut graphs = vec![graph];
        if let Some(head) = model.text_head() {
            // The shared map is one of the image side's parameters already.
            debug_assert!(graphs[0].params().iter().any(|p| p.name.starts_with(PROJECTION)) && head.dim() > 0);
        }
        let weights = read_own(&context.input(&stage_of(Role::Student))?.join(WEIGHTS), &graphs)?;
        graphs.clear();
        let training = &self.resolved.spec().training;
        let student = Student {
            store: &weights.store,
            backbone: model.image.backbone.as_ref(),
            image_path: model.image.path.as_str(),
            image_size: model.image.image_size,
            projection: model.projection.map(|(projection, _)| (projection, PROJECTION)),
            batches: training.steps * training.accumulate as u64,
        };
        if let Some(note) = name_note(student.backbone) {
            (context.tell)(Event::Warning(format!("{}: {note}", student.backbone.name())));
        }
        let mut written = Vec::new();
        for format in &self.resolved.spec().export.formats {
            match format {
                ExportFormat::Timm => {
                    let file = context.dir.join("timm.safetensors");
                    let done = export_timm(&student, &file)?;
                    if done.projection_left_out {
                        let text =
                            "timm's trunk has no place for an mlp projection: timm.safetensors gives pooled features";
                        (context.tell)(Event::Warning(text.into()));
                    }
                    written.push(format!("timm.safetensors ({}, num_classes={})", done.model, done.num_classes));
                }
                ExportFormat::OpenClip => {
                    let graph = text_graph(&model.text_tower)?;
                    let text = match (&model.text, self.text_stage()) {
                        (StudentText::File(tower, file), _) => read_weights(file, None, Some(tower), false)?,
                        (_, Some(stage)) => read_own(&context.input(&stage)?.join(WEIGHTS), &[graph])?,
                        (_, None) => return Err(RunError::Plan("the student's text tower has no weights".into())),
                    };
                    let text = ExportText {
                        store: &text.store,
                        encoder: model.text_tower.encoder.as_ref(),
                        path: TEXT,
                        shared_projection: model.projection.is_some_and(|(_, shared)| shared),
                        logit_scale: weights.logit_scale.map_or(INIT_LOGIT_SCALE, |scale| scale.ln() as f32),
                    };
                    export_open_clip(&student, &text, &context.dir.join("open_clip"))?;
                    written.push("open_clip/".to_owned());
                }
            }
        }
        Ok(written.join(", "))
    }
}
