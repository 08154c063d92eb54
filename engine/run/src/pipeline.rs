//! From a checked file to a plan: names resolved, models and data checked against each other, stages linked.

use std::path::Path;
use std::sync::Arc;

use mcpipe_models::Checkpoint;
use mcpipe_spec::{Code, Diagnostic, Document, Evaluation, Spec, Teacher, TeacherKind};
use mcpipe_train::distill::{Problem, terms};
use mcpipe_train::{ImageTower, StudentShape, TeacherShape, Term, TextTower, TowerShape};

use crate::assemble::read_weights;
use crate::error::RunError;
use crate::initial;
use crate::plan::{LinkError, Plan};
use crate::resolve::models::image_path;
use crate::resolve::{EvalData, EvalSource, Models, StudentText, TextSide, TrainSource};
use crate::settings::Settings;
use crate::stages;

/// A pipeline whose names are resolved. Stages hold it and take from it what is theirs.
#[derive(Debug)]
pub struct Resolved {
    /// The file.
    pub document: Document,
    /// Its models.
    pub models: Models,
    /// Its training data.
    pub train: TrainSource,
    /// Its evaluations with their data.
    pub evals: Vec<(Evaluation, EvalData)>,
    /// Its distillation terms; teachers by their position in the pipeline.
    pub terms: Vec<Term>,
}

/// A pipeline ready to run.
#[derive(Debug)]
pub struct Pipeline {
    /// What it means.
    pub resolved: Arc<Resolved>,
    /// Its stages.
    pub plan: Plan,
}

impl Resolved {
    /// The typed file.
    pub fn spec(&self) -> &Spec {
        &self.document.spec
    }

    /// Whether the student learns from teachers.
    pub fn distils(&self) -> bool {
        self.spec().loss.lambda > 0.0 && !self.terms.is_empty()
    }

    /// Seed of the student's weights and of its order of samples.
    pub fn student_seed(&self) -> u64 {
        self.spec().student.seed.unwrap_or(self.spec().seed)
    }

    /// Whether the pipeline's own data set is used at all.
    pub fn uses_made_data(&self) -> bool {
        self.train == TrainSource::Made || self.evals.iter().any(|(_, data)| data.source == EvalSource::Made)
    }
}

/// Resolves and checks a pipeline and links its stages. Neither data nor a device is needed; files that the pipeline
/// names must be there.
///
/// # Errors
/// All mistakes that the file has, or what keeps the stages from being linked.
pub fn compile(document: Document, settings: &Settings) -> Result<Pipeline, RunError> {
    let mut found = Vec::new();
    check_made_data(&document, &mut found);
    let train = TrainSource::resolve(&document, &mut found);
    let spec = &document.spec;
    let evals: Vec<(Evaluation, EvalData)> = spec
        .eval
        .iter()
        .enumerate()
        .filter_map(|(at, eval)| Some((eval.clone(), EvalData::resolve(&document, at, eval, &train, &mut found)?)))
        .collect();
    let models = Models::resolve(&document, &mut found);
    let terms = match &models {
        Some(models) => {
            check_weights(&document, models, &mut found);
            initial::check(&document, &models.student.image, &mut found);
            check_evaluations(&document, &mut found);
            check_terms(&document, models, &mut found)
        }
        None => Vec::new(),
    };
    let models = match models {
        Some(models) if found.is_empty() => models,
        _ => return Err(RunError::Spec(document.report(found))),
    };
    let resolved = Arc::new(Resolved { document, models, train, evals, terms });
    let plan = match Plan::link(stages::declare(&resolved), settings) {
        Ok(plan) => plan,
        Err(LinkError::Other(error)) => return Err(error),
        Err(LinkError::Cycles(cycles)) => {
            let found = cycles.iter().map(|cycle| of_cycle(&resolved.document, &cycle.chain)).collect();
            return Err(RunError::Spec(resolved.document.report(found)));
        }
    };
    Ok(Pipeline { resolved, plan })
}

fn of_cycle(document: &Document, chain: &[(crate::plan::StageId, String)]) -> Diagnostic {
    let mut names: Vec<String> = chain.iter().map(|(id, _)| format!("`{id}`")).collect();
    names.extend(names.first().cloned());
    let path = chain.first().map(|(_, path)| path.as_str()).unwrap_or_default();
    let message = format!("stages wait for each other in a circle: {}", names.join(" -> "));
    let diagnostic = document.diagnostic(Code::Cycle, path, message).with_label("waits for the next in the circle");
    chain.iter().skip(1).fold(diagnostic, |d, (id, path)| d.with_related(document.span_of(path), format!("`{id}`")))
}

fn check_made_data(document: &Document, found: &mut Vec<Diagnostic>) {
    let Some(make) = &document.spec.data.make else { return };
    if let Err(reason) = stages::make_data::params(make) {
        found.push(document.bad_params("data.make", &make.kind, reason));
    }
}

/// Shapes of the student as distillation levels see it.
pub(crate) fn student_shape(models: &Models) -> Result<StudentShape, RunError> {
    let student = &models.student;
    let shared = student.text_head();
    Ok(StudentShape {
        image: TowerShape::of(&student.image)?,
        text: shared.as_ref().map_or(student.text_tower.dim, |head| head.dim()),
        text_trained: shared.is_some(),
    })
}

/// Shapes of the teachers as distillation levels see them, in the pipeline's order.
pub(crate) fn teacher_shapes(models: &Models) -> Result<Vec<TeacherShape>, RunError> {
    let student = student_shape(models)?;
    let mut shapes = Vec::new();
    for (at, teacher) in models.teachers.iter().enumerate() {
        let (image, text) = if teacher.kind == TeacherKind::Ema {
            (Some(student.image.clone()), Some(student.text))
        } else {
            let image = teacher.image.as_ref().map(|tower| TowerShape::of(tower)).transpose()?;
            (image, models.text_of(at).map(|(_, tower)| tower.dim()))
        };
        shapes.push(TeacherShape { name: teacher.name.clone(), image, text });
    }
    Ok(shapes)
}

fn check_terms(document: &Document, models: &Models, found: &mut Vec<Diagnostic>) -> Vec<Term> {
    let shapes = student_shape(models).and_then(|student| Ok((student, teacher_shapes(models)?)));
    let (student, teachers) = match shapes {
        Ok(shapes) => shapes,
        Err(error) => {
            found.push(document.diagnostic(Code::BadParams, "student", error.to_string()));
            return Vec::new();
        }
    };
    match terms(&document.spec.distill, &student, &teachers) {
        Ok(terms) => terms,
        Err(problems) => {
            found.extend(problems.iter().map(|(entry, problem)| of_problem(document, *entry, problem)));
            Vec::new()
        }
    }
}

/// A level's problem at the line of the value that it is about.
fn of_problem(document: &Document, entry: usize, problem: &Problem) -> Diagnostic {
    let mut path = format!("distill[{entry}]");
    for step in &problem.path {
        let step = if step.parse::<usize>().is_ok() { format!("[{step}]") } else { format!(".{step}") };
        path.push_str(&step);
    }
    let level = document.spec.distill.get(entry).map(|d| d.level.as_str()).unwrap_or_default();
    let written = document.sources().text(&document.span_of(&path)).trim_matches(['"', '\'']).to_owned();
    let known = problem.known.iter().map(String::as_str);
    match (problem.path.first().map(String::as_str), problem.known.is_empty()) {
        (Some("taps"), false) => document
            .diagnostic(Code::UnknownTap, &path, problem.message.clone())
            .with_label("no such tap")
            .with_choices(&written, "its taps", known),
        (Some("teachers"), false) => document
            .diagnostic(Code::UnknownTeacher, &path, problem.message.clone())
            .with_label("no such teacher")
            .with_choices(&written, "teachers", known),
        (_, false) => document
            .diagnostic(Code::Conflict, &path, problem.message.clone())
            .with_label("does not fit")
            .with_choices(&written, "valid", known),
        _ if problem.message.contains("dimension") => document
            .diagnostic(Code::DimMismatch, &path, problem.message.clone())
            .with_label(format!("level `{level}`")),
        _ => document.diagnostic(Code::Conflict, &path, problem.message.clone()).with_label(format!("level `{level}`")),
    }
}

/// Templates are checked by the form; here what an evaluation asks beyond it.
fn check_evaluations(document: &Document, found: &mut Vec<Diagnostic>) {
    for (at, evaluation) in document.spec.eval.iter().enumerate() {
        if let Err(reason) = stages::evaluate::params(evaluation) {
            found.push(document.bad_params(&format!("eval[{at}]"), &evaluation.kind, reason));
        }
    }
}

/// Weight files must be there and hold the tensors of the models that are to take them.
fn check_weights(document: &Document, models: &Models, found: &mut Vec<Diagnostic>) {
    for (at, teacher) in document.spec.teachers.iter().enumerate() {
        let Teacher::Load(load) = teacher else { continue };
        let model = &models.teachers[at];
        let image = model.image.as_ref().map(|tower| (tower as &dyn ImageTower, image_path(tower.backbone.as_ref())));
        let text = match &model.text {
            Some(TextSide::Own(tower)) => Some(tower as &dyn TextTower),
            _ => None,
        };
        let path = format!("teacher[{at}].weights");
        if !check_file(document, &path, &load.weights, found) {
            continue;
        }
        match read_weights(&load.weights, image, text, load.resize_position) {
            Err(error) => found.push(of_weights(document, &path, &error)),
            Ok(weights) if weights.logit_scale.is_none() && load.logit_scale.is_none() => {
                let message = "the weights hold no logit scale";
                found.push(
                    document
                        .diagnostic(Code::MissingKey, &format!("teacher[{at}].logit_scale"), message)
                        .with_label("a scale is needed")
                        .with_help("give the scale of its target logits: `logit_scale = 100.0` for CLIP's models"),
                );
            }
            Ok(_) => {}
        }
    }
    if let StudentText::File(tower, file) = &models.student.text
        && check_file(document, "text.weights", file, found)
        && let Err(error) = read_weights(file, None, Some(tower), false)
    {
        found.push(of_weights(document, "text.weights", &error));
    }
}

fn check_file(document: &Document, path: &str, file: &Path, found: &mut Vec<Diagnostic>) -> bool {
    if !file.exists() {
        found.push(document.missing_file(path, "weight file", file));
        return false;
    }
    // Opened here for the message that it can't be read; its content is compared by the caller.
    match Checkpoint::open(file) {
        Ok(_) => true,
        Err(error) => {
            found.push(document.diagnostic(Code::BadFile, path, error.to_string()).with_label("cannot be used"));
            false
        }
    }
}

/// What does not fit between a file and a model, at the file's line.
pub(crate) fn of_weights(document: &Document, path: &str, error: &RunError) -> Diagnostic {
    let text = error.to_string();
    // The first line says what, the lists of names below go to the help.
    let (message, rest) = text.split_once('\n').unwrap_or((&text, ""));
    let diagnostic = document.diagnostic(Code::BadFile, path, message).with_label("weights of another model");
    if rest.is_empty() { diagnostic } else { diagnostic.with_help(rest) }
}
