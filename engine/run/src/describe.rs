//! What `mcpipe plan` says of a pipeline: stages, models with the shapes of their taps, memory and work of a step.

use mcpipe_models::TapShape;
use mcpipe_models::export::name_note;
use mcpipe_train::{ImageTower, StepPlan, TextTower, TowerShape};
use serde::Serialize;

use crate::assemble::{image_graph, text_graph};
use crate::draw::{Drawing, NodeState};
use crate::error::RunError;
use crate::pipeline::Pipeline;
use crate::plan::Planned;
use crate::records::Role;
use crate::resolve::TextSide;
use crate::schedule::{Status, statuses};
use crate::settings::Settings;
use crate::setups::{self, Frozen};
use crate::stages::train_student::roles;

/// A pipeline as planned.
#[derive(Clone, Debug, Serialize)]
pub struct Description {
    /// Its name.
    pub name: String,
    /// Its stages, each after all that it needs.
    pub stages: Vec<StageLine>,
    /// Its image and text towers.
    pub models: Vec<ModelLine>,
    /// A step of each training that it has.
    pub steps: Vec<TrainingLine>,
}

/// A stage.
#[derive(Clone, Debug, Serialize)]
pub struct StageLine {
    /// Its name.
    pub stage: String,
    /// `cached`, `to run` or `not needed`.
    pub status: &'static str,
    /// Its content hash, shortened.
    pub hash: String,
    /// Names of the stages that it needs.
    pub needs: Vec<String>,
}

/// A tower.
#[derive(Clone, Debug, Serialize)]
pub struct ModelLine {
    /// Whose it is: `student`, `teacher clip`, with `text` behind for a text tower.
    pub model: String,
    /// Registered name of the backbone or text encoder.
    pub component: String,
    /// Side of its images, or tokens of its captions.
    pub input: usize,
    /// Trained values.
    pub parameters: usize,
    /// Floating-point operations of one sample's forward pass.
    pub flops: u64,
    /// Dimension of its embedding.
    pub dim: usize,
    /// What the user of its export must know.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub note: Option<String>,
    /// Its taps.
    pub taps: Vec<TapLine>,
}

/// A tap.
#[derive(Clone, Debug, Serialize)]
pub struct TapLine {
    /// Its name.
    pub name: String,
    /// What it holds: `map`, `tokens` or `attention`.
    pub kind: &'static str,
    /// Shape for one image.
    pub shape: Vec<usize>,
    /// Whether a distillation term compares it.
    pub used: bool,
}

/// A step of a training.
#[derive(Clone, Debug, Serialize)]
pub struct TrainingLine {
    /// Whose training.
    pub training: String,
    /// Optimiser steps.
    pub steps: u64,
    /// Bytes in all.
    pub bytes: usize,
    /// Floating-point operations of a step.
    pub flops: u64,
    /// The parts.
    pub plan: StepPlan,
}

/// Describes a pipeline. Nothing runs and no weights are read.
///
/// # Errors
/// Parts that don't fit together.
pub fn describe(pipeline: &Pipeline, settings: &Settings) -> Result<Description, RunError> {
    let resolved = &pipeline.resolved;
    let planned: Vec<&Planned> = pipeline.plan.stages().collect();
    let stages = planned
        .iter()
        .zip(statuses(&pipeline.plan, settings))
        .enumerate()
        .map(|(index, (stage, status))| StageLine {
            stage: stage.id.to_string(),
            status: match status {
                Status::Cached(_) => "cached",
                Status::ToRun => "to run",
                Status::NotNeeded => "not needed",
            },
            hash: stage.hash.short(),
            needs: pipeline.plan.needs(index).into_iter().map(|need| planned[need].id.to_string()).collect(),
        })
        .collect();
    let student = &resolved.models.student;
    let used = |student_side: bool, teacher: Option<usize>| -> Vec<String> {
        let terms = resolved.terms.iter().filter(|term| teacher.is_none_or(|t| term.teachers.contains(&t)));
        let pairs = terms.flat_map(|term| term.level.pairs());
        pairs.map(|pair| if student_side { pair.student.clone() } else { pair.teacher.clone() }).collect()
    };
    let name = student.image.backbone.name();
    let mut models = vec![image_line("student".into(), name, &student.image, &used(true, None))?];
    if !resolved.spec().export.formats.is_empty() {
        models[0].note = name_note(student.image.backbone.as_ref());
    }
    models.push(text_line("student text".into(), student.text_tower.encoder.name(), &student.text_tower)?);
    for (at, teacher) in resolved.models.teachers.iter().enumerate() {
        if let Some(tower) = &teacher.image {
            let taps = used(false, Some(at));
            models.push(image_line(format!("teacher {}", teacher.name), tower.backbone.name(), tower, &taps)?);
        }
        if let Some(TextSide::Own(tower)) = &teacher.text {
            models.push(text_line(format!("teacher {} text", teacher.name), tower.encoder.name(), tower)?);
        }
    }
    let mut steps = Vec::new();
    for role in roles(resolved) {
        let distilled = role == Role::Student && resolved.distils();
        let setup = setups::student(resolved, distilled, Frozen::ShapesOnly, settings, String::new())?;
        let name = if role == Role::Student { "student" } else { "student without distillation" };
        steps.push(training_line(name.into(), &setup, settings)?);
    }
    for (at, teacher) in resolved.spec().teachers.iter().enumerate() {
        if let mcpipe_spec::Teacher::Train(teacher) = teacher {
            let setup = setups::trained_teacher(resolved, at, Frozen::ShapesOnly, settings, String::new())?;
            steps.push(training_line(format!("teacher {}", teacher.name), &setup, settings)?);
        }
    }
    Ok(Description { name: resolved.spec().name.clone(), stages, models, steps })
}

fn training_line(training: String, setup: &setups::Setup, settings: &Settings) -> Result<TrainingLine, RunError> {
    let mut plan = StepPlan::new(&setup.train, settings.on_gpu())?;
    for part in &mut plan.parts {
        // The trainer knows the model that it trains as the student, whoever it is to the pipeline.
        if let Some(rest) = part.name.strip_prefix("student") {
            part.name = format!("{training}{rest}");
        }
    }
    Ok(TrainingLine { training, steps: setup.train.training.steps, bytes: plan.bytes(), flops: plan.flops(), plan })
}

fn image_line(model: String, component: &str, tower: &dyn ImageTower, used: &[String]) -> Result<ModelLine, RunError> {
    let graph = image_graph(tower)?;
    let taps = TowerShape::of(tower)?.taps.into_iter().map(|tap| TapLine {
        used: used.contains(&tap.name),
        kind: match tap.shape {
            TapShape::Image { .. } => "map",
            TapShape::Tokens { .. } => "tokens",
            TapShape::Attention { .. } => "attention",
        },
        shape: tap.shape.shape(1),
        name: tap.name,
    });
    Ok(ModelLine {
        model,
        component: component.to_owned(),
        input: tower.image_size(),
        parameters: graph.trained_len(),
        flops: graph.forward_flops(),
        dim: tower.dim(),
        note: None,
        taps: taps.collect(),
    })
}

fn text_line(model: String, component: &str, tower: &dyn TextTower) -> Result<ModelLine, RunError> {
    let graph = text_graph(tower)?;
    Ok(ModelLine {
        model,
        component: component.to_owned(),
        input: tower.context_length(),
        parameters: graph.trained_len(),
        flops: graph.forward_flops(),
        dim: tower.dim(),
        note: None,
        taps: Vec::new(),
    })
}

/// The DAG as a drawing, each stage marked with whether its result is in the store.
pub fn drawing(pipeline: &Pipeline, settings: &Settings) -> Drawing {
    let planned: Vec<&Planned> = pipeline.plan.stages().collect();
    let statuses = statuses(&pipeline.plan, settings);
    let state = |stage: &Planned| {
        let at = planned.iter().position(|p| p.id == stage.id);
        match at.and_then(|at| statuses.get(at)) {
            Some(Status::Cached(_)) => NodeState::Cached,
            Some(Status::ToRun) => NodeState::ToRun,
            _ => NodeState::Plain,
        }
    };
    let lines = |stage: &Planned| match state(stage) {
        NodeState::Cached => vec!["in the store".to_owned()],
        _ => Vec::new(),
    };
    pipeline.plan.drawing(&pipeline.resolved.spec().name, &state, &lines)
}
