//! What the trainer is given for the student, the same student without distillation, and the teachers.

use std::path::PathBuf;
use std::sync::Arc;

use mcpipe_graph::{ParamStore, StepGraph};
use mcpipe_spec::{LossKind, Teacher as TeacherSpec, TeacherKind};
use mcpipe_train::distill::Problem;
use mcpipe_train::{
    AverageSetup, BackboneTower, CaptionEncoder, Compute, Contrast, EncoderTower, FrozenImage, LrConfig, ModelText,
    Objective, Teacher, TeacherModel, TrainSetup, TrainedModel, optimizer,
};

use crate::assemble::{Views, WEIGHTS, declared, image_graph, read_own, read_weights, text_graph, view_of};
use crate::error::RunError;
use crate::initial::Initial;
use crate::pipeline::Resolved;
use crate::plan::StageId;
use crate::resolve::{StudentText, TextSide};
use crate::settings::Settings;
use crate::stages::{load_teacher, train_teacher};

/// Scale of the logits that a teacher's training starts from: 1/0.07 as CLIP's.
const TEACHER_SCALE: f64 = 1.0 / 0.07;
/// Scale of a teacher's targets where neither the pipeline nor its weights say one: CLIP's greatest.
const TARGET_SCALE: f64 = 100.0;

/// Bias of SigLIP's logits at the start (Zhai et al. 2023, §3.2).
const SIGLIP_BIAS: f64 = -10.0;

/// Where the weights of frozen models come from.
#[derive(Clone, Copy)]
pub enum Frozen<'a> {
    /// From the results of the stages that made them.
    Results(&'a dyn Fn(&StageId) -> Result<PathBuf, RunError>),
    /// From nowhere: shapes are enough, nothing will run.
    ShapesOnly,
}

/// A training's setup and the views that its batches must have.
#[derive(Debug)]
pub struct Setup {
    /// For the trainer.
    pub train: TrainSetup,
    /// For the data source.
    pub views: Views,
    /// What of the model does not start from random weights, in one line.
    pub start: Option<String>,
}

/// The stage that makes a teacher; none for the student's average.
pub fn teacher_stage(resolved: &Resolved, at: usize) -> Option<StageId> {
    let model = resolved.models.teachers.get(at)?;
    match model.kind {
        TeacherKind::Train => Some(StageId::new(train_teacher::NAME, model.name.clone())),
        TeacherKind::Load => Some(StageId::new(load_teacher::NAME, model.name.clone())),
        TeacherKind::Ema => None,
    }
}

/// Teachers, by their position in the pipeline, that the distilled student learns from.
pub fn teachers_used(resolved: &Resolved) -> Vec<usize> {
    let mut used: Vec<usize> = resolved.terms.iter().flat_map(|term| term.teachers.iter().copied()).collect();
    used.sort_unstable();
    used.dedup();
    used
}

/// Stages whose weights the student's training reads, with or without distillation.
pub fn student_needs(resolved: &Resolved, distilled: bool) -> Vec<StageId> {
    let mut needs = Vec::new();
    let mut add = |at: usize| {
        if let Some(id) = teacher_stage(resolved, at)
            && !needs.contains(&id)
        {
            needs.push(id);
        }
    };
    if let StudentText::Teacher(at) = resolved.models.student.text
        && let Some((owner, _)) = resolved.models.text_of(at)
    {
        add(owner);
    }
    for at in teachers_used(resolved).into_iter().filter(|_| distilled) {
        add(at);
        if let Some((owner, _)) = resolved.models.text_of(at) {
            add(owner);
        }
    }
    needs
}

/// Weights of a stage's result for the graphs that are to run, and its logit scale.
fn weights(frozen: Frozen<'_>, stage: &StageId, graphs: &[StepGraph]) -> Result<(ParamStore, Option<f64>), RunError> {
    match frozen {
        Frozen::ShapesOnly => Ok((declared(graphs), None)),
        Frozen::Results(dir) => {
            let read = read_own(&dir(stage)?.join(WEIGHTS), graphs)?;
            Ok((read.store, read.logit_scale))
        }
    }
}

/// What a setup's graphs run on; where nothing will run, no device is looked for.
fn compute(frozen: Frozen<'_>, settings: &Settings) -> Result<Compute, RunError> {
    match frozen {
        Frozen::ShapesOnly => Ok(Compute::Cpu(settings.kernels)),
        Frozen::Results(_) => settings.compute(),
    }
}

/// The text encoders of a setup, each made once.
#[derive(Default)]
struct Texts {
    encoders: Vec<CaptionEncoder>,
    owners: Vec<Option<usize>>,
}

impl Texts {
    fn position(
        &mut self,
        owner: Option<usize>,
        tower: &EncoderTower,
        store: impl FnOnce() -> Result<ParamStore, RunError>,
        compute: &Compute,
    ) -> Result<usize, RunError> {
        if let Some(at) = self.owners.iter().position(|held| *held == owner) {
            return Ok(at);
        }
        self.encoders.push(CaptionEncoder::new(tower, tower.tokenize(), Arc::new(store()?), compute)?);
        self.owners.push(owner);
        Ok(self.owners.len() - 1)
    }

    fn of_teacher(
        &mut self,
        resolved: &Resolved,
        at: usize,
        frozen: Frozen<'_>,
        settings: &Settings,
    ) -> Result<usize, RunError> {
        let lost = || RunError::Plan(format!("teacher {at} has no text tower"));
        let (owner, tower) = resolved.models.text_of(at).ok_or_else(lost)?;
        let stage = teacher_stage(resolved, owner).ok_or_else(lost)?;
        let store = || Ok(weights(frozen, &stage, &[text_graph(tower)?])?.0);
        self.position(Some(owner), tower, store, &compute(frozen, settings)?)
    }
}

/// The student's frozen text encoder alone, for evaluation.
///
/// # Errors
/// Weights that can't be read.
pub fn student_text(resolved: &Resolved, frozen: Frozen<'_>, settings: &Settings) -> Result<CaptionEncoder, RunError> {
    let mut texts = Texts::default();
    let at = student_text_at(resolved, &mut texts, frozen, settings)?;
    Ok(texts.encoders.swap_remove(at))
}

fn student_text_at(
    resolved: &Resolved,
    texts: &mut Texts,
    frozen: Frozen<'_>,
    settings: &Settings,
) -> Result<usize, RunError> {
    match &resolved.models.student.text {
        StudentText::Teacher(at) => texts.of_teacher(resolved, *at, frozen, settings),
        StudentText::File(tower, file) => {
            let store = || match frozen {
                Frozen::ShapesOnly => Ok(declared(&[text_graph(tower)?])),
                Frozen::Results(_) => Ok(read_weights(file, None, Some(tower), false)?.store),
            };
            texts.position(None, tower, store, &compute(frozen, settings)?)
        }
    }
}

fn view(views: &mut Views, tower: &BackboneTower) -> usize {
    views.position(view_of(tower.image_size, &tower.backbone.preprocess()))
}

fn refused(table: &str, problem: &Problem) -> RunError {
    RunError::Usage(format!("[{table}] {problem}"))
}

/// The student's training; `distilled` false leaves the teachers out.
///
/// # Errors
/// Weights that can't be read, parts that don't fit together.
pub fn student(
    resolved: &Resolved,
    distilled: bool,
    frozen: Frozen<'_>,
    settings: &Settings,
    identity: String,
) -> Result<Setup, RunError> {
    let spec = resolved.spec();
    let model = &resolved.models.student;
    let mut views = Views::default();
    let own_view = view(&mut views, &model.image);
    let mut texts = Texts::default();
    let encoder = student_text_at(resolved, &mut texts, frozen, settings)?;
    let mut teachers = Vec::new();
    let contrast = match spec.loss.kind {
        LossKind::Clip => Contrast::Clip,
        LossKind::Siglip => Contrast::Sigmoid { bias: spec.loss.logit_bias.unwrap_or(SIGLIP_BIAS) },
    };
    let mut objective = Objective { contrast, ..Objective::default() };
    if distilled {
        let used = teachers_used(resolved);
        for &at in &used {
            teachers.push(teacher(resolved, at, &mut views, &mut texts, frozen, settings)?);
        }
        objective.lambda = spec.loss.lambda;
        objective.terms = resolved.terms.clone();
        for term in &mut objective.terms {
            term.teachers = term.teachers.iter().filter_map(|t| used.iter().position(|u| u == t)).collect();
        }
    }
    let initial = match (&spec.student.weights, frozen) {
        (Some(weights), Frozen::Results(_)) => Some(Initial::find(&model.image, weights)?),
        _ => None,
    };
    let start = initial.as_ref().map(Initial::summary);
    let initial = initial.map(|found| found.read()).transpose()?.unwrap_or_default();
    let train = TrainSetup {
        model: TrainedModel {
            image: Arc::new(model.image.clone()),
            view: own_view,
            text: ModelText::Frozen { encoder, projection: model.text_head() },
            logit_scale: spec.loss.logit_scale,
            train_logit_scale: spec.loss.train_logit_scale,
        },
        initial,
        teachers,
        texts: texts.encoders,
        objective,
        average: spec.student.ema.as_ref().map(|e| AverageSetup { momentum: e.momentum, evaluate: e.evaluate }),
        optimizer: optimizer(&spec.optimizer).map_err(|p| refused("optimizer", &p))?,
        schedule: LrConfig::from_spec(&spec.schedule).map_err(|p| refused("schedule", &p))?,
        training: spec.training.clone(),
        seed: resolved.student_seed(),
        compute: compute(frozen, settings)?,
        identity,
    };
    Ok(Setup { train, views, start })
}

fn teacher(
    resolved: &Resolved,
    at: usize,
    views: &mut Views,
    texts: &mut Texts,
    frozen: Frozen<'_>,
    settings: &Settings,
) -> Result<Teacher, RunError> {
    let model = &resolved.models.teachers[at];
    let spec = &resolved.spec().teachers[at];
    let teacher = match (spec, teacher_stage(resolved, at)) {
        (TeacherSpec::Ema(ema), _) => TeacherModel::Average {
            momentum: ema.momentum,
            final_momentum: ema.final_momentum,
            logit_scale: ema.logit_scale,
        },
        (_, Some(stage)) => {
            let mut file_scale = None;
            let image = match &model.image {
                Some(tower) => {
                    let (store, scale) = weights(frozen, &stage, &[image_graph(tower)?])?;
                    file_scale = scale;
                    let tower = Arc::new(tower.clone());
                    let view = views.position(view_of(tower.image_size, &tower.backbone.preprocess()));
                    Some(FrozenImage { tower, store: Arc::new(store), view })
                }
                None => {
                    if matches!(frozen, Frozen::Results(_)) {
                        file_scale = weights(frozen, &stage, &[])?.1;
                    }
                    None
                }
            };
            let text = match model.text {
                Some(_) => Some(texts.of_teacher(resolved, at, frozen, settings)?),
                None => None,
            };
            let logit_scale = spec.logit_scale().or(file_scale).unwrap_or(TARGET_SCALE);
            TeacherModel::Frozen { image, text, logit_scale }
        }
        (_, None) => return Err(RunError::Plan(format!("no stage makes the teacher `{}`", model.name))),
    };
    Ok(Teacher { name: model.name.clone(), model: teacher })
}

/// The training of a teacher with CLIP's loss.
///
/// # Errors
/// As [`student`].
pub fn trained_teacher(
    resolved: &Resolved,
    at: usize,
    frozen: Frozen<'_>,
    settings: &Settings,
    identity: String,
) -> Result<Setup, RunError> {
    let spec = resolved.spec();
    let model = &resolved.models.teachers[at];
    let (TeacherSpec::Train(teacher), Some(image)) = (&spec.teachers[at], &model.image) else {
        return Err(RunError::Plan(format!("the teacher `{}` is not one to train", model.name)));
    };
    let mut views = Views::default();
    let own_view = view(&mut views, image);
    let mut texts = Texts::default();
    let text = match &model.text {
        Some(TextSide::Own(tower)) => ModelText::Trained { tower: Arc::new(tower.clone()), tokenize: tower.tokenize() },
        Some(TextSide::Of(other)) => {
            ModelText::Frozen { encoder: texts.of_teacher(resolved, *other, frozen, settings)?, projection: None }
        }
        None => return Err(RunError::Plan(format!("the teacher `{}` has no text side", model.name))),
    };
    let train = TrainSetup {
        model: TrainedModel {
            image: Arc::new(image.clone()),
            view: own_view,
            text,
            logit_scale: TEACHER_SCALE,
            train_logit_scale: true,
        },
        initial: ParamStore::default(),
        teachers: Vec::new(),
        texts: texts.encoders,
        objective: Objective::default(),
        average: None,
        optimizer: optimizer(spec.optimizer_of(teacher)).map_err(|p| refused("optimizer", &p))?,
        schedule: LrConfig::from_spec(spec.schedule_of(teacher)).map_err(|p| refused("schedule", &p))?,
        training: teacher.training.clone(),
        seed: spec.seed,
        compute: compute(frozen, settings)?,
        identity,
    };
    Ok(Setup { train, views, start: None })
}
