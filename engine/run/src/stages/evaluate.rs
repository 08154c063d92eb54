//! Evaluates a model: zero-shot classification and retrieval, at the end and in the loop of a training.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Instant;

use mcpipe_data::{DatasetType, EvalOptions, EvalSet, EvalTransform, Normalize};
use mcpipe_eval::{Classifier, RETRIEVAL, ZERO_SHOT, ZeroShot, ZeroShotOptions, retrieval, zero_shot};
use mcpipe_graph::ParamStore;
use mcpipe_spec::{Evaluation, NoParams, TeacherKind};
use mcpipe_train::{
    BackboneTower, BoxError, CaptionEncoder, Encoder, EvalReport, EvalWeights, Evaluate, Head, ImageTower,
};
use serde_json::{Value, json};

use super::train_student::{roles, stage_of, student_name};
use super::{StageDef, make_data};
use crate::assemble::{WEIGHTS, image_graph, read_own, text_graph};
use crate::draw::png_data_uri;
use crate::error::RunError;
use crate::model::evaluation_view;
use crate::pipeline::Resolved;
use crate::plan::{Context, Need, Port, Stage, StageId};
use crate::progress::{Event, Interrupt};
use crate::records::{GalleryItem, Headline, PREDICTIONS, Predictions, Role, SCORES, Scores};
use crate::resolve::EvalData;
use crate::settings::Settings;
use crate::setups::{self, Frozen, student_needs, teacher_stage};
use crate::store::write_json;

const NAME: &str = "evaluate";
/// Pictures of the report's gallery.
const GALLERY: usize = 36;

/// `evaluate`.
pub const STAGE: StageDef = StageDef {
    name: NAME,
    summary: "Evaluates a student or a teacher",
    declare: |resolved| {
        let stage =
            |(subject, at)| Box::new(RunEvaluation { resolved: Arc::clone(resolved), subject, at }) as Box<dyn Stage>;
        subjects(resolved).into_iter().map(stage).collect()
    },
};

/// What is evaluated.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Subject {
    /// A student.
    Student(Role),
    /// A teacher, by its position in the pipeline.
    Teacher(usize),
}

/// Every model that has both towers, with the position of each evaluation.
fn subjects(resolved: &Resolved) -> Vec<(Subject, usize)> {
    let students = roles(resolved).into_iter().map(Subject::Student);
    let teachers = resolved.models.teachers.iter().enumerate();
    let teachers = teachers.filter(|(_, t)| t.kind != TeacherKind::Ema && t.image.is_some() && t.text.is_some());
    let all: Vec<Subject> = students.chain(teachers.map(|(at, _)| Subject::Teacher(at))).collect();
    all.into_iter().flat_map(|subject| (0..resolved.evals.len()).map(move |at| (subject, at))).collect()
}

fn model_name(resolved: &Resolved, subject: Subject) -> &str {
    match subject {
        Subject::Student(role) => student_name(role),
        Subject::Teacher(at) => &resolved.models.teachers[at].name,
    }
}

fn id(resolved: &Resolved, subject: Subject, at: usize) -> StageId {
    StageId::new(NAME, format!("{} {}", model_name(resolved, subject), resolved.evals[at].0.name))
}

/// The evaluations of a pipeline, the student's first.
pub fn stages(resolved: &Resolved) -> Vec<StageId> {
    subjects(resolved).into_iter().map(|(subject, at)| id(resolved, subject, at)).collect()
}

/// Checks an evaluation's own parameters.
///
/// # Errors
/// Why they can't be served.
pub fn params(evaluation: &Evaluation) -> Result<(), String> {
    evaluation.params.decode::<NoParams>().map(drop).map_err(|e| e.to_string())
}

/// What of the evaluations in the loop a training's result depends on.
///
/// # Errors
/// Data that went away.
pub fn loop_settings(resolved: &Resolved) -> Result<Value, RunError> {
    let own = |(evaluation, data): &&(Evaluation, EvalData)| {
        Ok(json!([evaluation.name, evaluation.kind, evaluation.every_steps, data.identity()?]))
    };
    resolved.evals.iter().filter(|(e, _)| e.every_steps > 0).collect::<Vec<_>>().iter().map(own).collect()
}

/// What an evaluation came to.
struct Found {
    metrics: BTreeMap<String, f64>,
    headline: Headline,
    samples: usize,
    predictions: Option<Predictions>,
}

/// A model made ready for evaluation: encoders, to be run with the weights of the moment.
struct Model {
    image: Encoder,
    text: CaptionEncoder,
    /// The map behind the frozen text encoder, where the student has one.
    head: Option<Encoder>,
    transform: EvalTransform,
    normalize: Normalize,
}

impl Model {
    fn new(
        tower: &BackboneTower,
        text: CaptionEncoder,
        head: Option<Arc<dyn Head>>,
        batch: usize,
        store: &ParamStore,
        settings: &Settings,
    ) -> Result<Self, RunError> {
        let compute = settings.compute()?;
        let head =
            head.map(|head| Encoder::embeddings(head.as_ref(), text.dim(), batch, store, &compute)).transpose()?;
        let (transform, normalize) = evaluation_view(tower);
        Ok(Self {
            image: Encoder::images(tower as &dyn ImageTower, batch, store, &compute)?,
            text,
            head,
            transform,
            normalize,
        })
    }

    /// Runs an evaluation with the weights in `store`.
    fn evaluate(
        &mut self,
        evaluation: &Evaluation,
        data: &EvalData,
        root: &std::path::Path,
        store: &ParamStore,
        workers: usize,
        interrupt: &Interrupt,
        tell: &dyn Fn(usize, usize),
    ) -> Result<Found, RunError> {
        let set = EvalSet::open(root, &data.split, data.templates.as_deref())?;
        let options = EvalOptions { batch_size: data.batch_size, workers, ..EvalOptions::new(vec![self.transform]) };
        let reader = set.read(&options)?;
        let total = set.samples.len();
        let Self { image, text, head, normalize, .. } = self;
        let mut done = 0;
        let mut encode_images = |pixels: &[f32], n: usize| -> Result<Vec<f32>, BoxError> {
            interrupt.check()?;
            let embeddings = image.encode_images(store, pixels)?;
            done += n;
            tell(done, total);
            Ok(embeddings)
        };
        let mut encode_texts = |texts: &[&str]| -> Result<Vec<f32>, BoxError> {
            let embeddings = text.embed(texts)?;
            Ok(match head.as_mut() {
                Some(head) => head.encode_embeddings(store, &embeddings)?,
                None => embeddings,
            })
        };
        let failed = |error: mcpipe_eval::EvalError| match interrupt.check() {
            Err(stopped) => stopped,
            Ok(()) => match error {
                mcpipe_eval::EvalError::Data(error) => RunError::Data(error),
                other => RunError::Eval(other.to_string()),
            },
        };
        if evaluation.kind == RETRIEVAL {
            let found = retrieval(reader, 0, normalize, &mut encode_images, &mut encode_texts).map_err(failed)?;
            let metrics: BTreeMap<String, f64> = found.metrics().into_iter().map(|(k, v)| (k.to_owned(), v)).collect();
            let (metric, value) = found.metrics().first().map_or(("image_retrieval_recall@1", 0.0), |&m| m);
            let headline = Headline {
                metric: metric.to_owned(),
                label: metric.replace('_', " "),
                value,
                chance: 1.0 / found.images.max(1) as f64,
            };
            return Ok(Found { metrics, headline, samples: found.images, predictions: None });
        }
        if evaluation.kind != ZERO_SHOT {
            return Err(RunError::Plan(format!("no code runs the evaluation `{}`", evaluation.kind)));
        }
        if set.kind == DatasetType::Retrieval {
            return Err(RunError::Eval(format!(
                "{} is a set for retrieval (`dataset_type.txt`), which has no classes to tell apart",
                root.display()
            )));
        }
        let classifier = Classifier::of(&set, &mut encode_texts).map_err(failed)?;
        let options = ZeroShotOptions { keep_samples: GALLERY, ..ZeroShotOptions::new(*normalize) };
        let found = zero_shot(&classifier, reader, total, &options, &mut encode_images).map_err(failed)?;
        let headline = Headline {
            metric: "acc1".into(),
            label: "top-1".into(),
            value: found.metrics.acc1,
            chance: 1.0 / found.classes.max(1) as f64,
        };
        Ok(Found {
            metrics: found.metrics().into_iter().map(|(k, v)| (k.to_owned(), v)).collect(),
            headline,
            samples: usize::try_from(found.samples).unwrap_or(usize::MAX),
            predictions: Some(predictions(&set, &found)?),
        })
    }
}

fn predictions(set: &EvalSet, found: &ZeroShot) -> Result<Predictions, RunError> {
    let count = |&n: &u64| u32::try_from(n).unwrap_or(u32::MAX);
    let confusion = found.confusion.counts.chunks(found.classes.max(1)).map(|row| row.iter().map(count).collect());
    let item = |p: &mcpipe_eval::SamplePrediction| {
        Ok(GalleryItem {
            key: p.key.clone(),
            picture: png_data_uri(p.size, p.size, &p.pixels)?,
            class: p.class,
            top: p.top.iter().map(|t| (t.class, f64::from(t.probability))).collect(),
        })
    };
    Ok(Predictions {
        classes: set.classnames.clone(),
        confusion: confusion.collect(),
        gallery: found.predictions.iter().map(item).collect::<Result<_, RunError>>()?,
    })
}

/// Evaluations in the loop of the student's training.
pub struct InLoop {
    model: Option<InLoopModel>,
    evals: Vec<(Evaluation, EvalData, PathBuf)>,
    workers: usize,
}

/// What makes the model at the first evaluation, when the weights are there.
struct InLoopModel {
    tower: BackboneTower,
    text: CaptionEncoder,
    head: Option<Arc<dyn Head>>,
    settings: Settings,
    /// Encoders by batch size.
    made: Vec<(usize, Model)>,
}

impl InLoop {
    /// The evaluations that a pipeline asks for during training; their data must be there.
    ///
    /// # Errors
    /// The text encoder's weights can't be read.
    pub fn new(resolved: &Resolved, context: &Context<'_>, frozen: Frozen<'_>) -> Result<Self, RunError> {
        let mut evals = Vec::new();
        for (evaluation, data) in resolved.evals.iter().filter(|(e, _)| e.every_steps > 0) {
            evals.push((evaluation.clone(), data.clone(), make_data::evaluation_root(data, context)?));
        }
        let student = &resolved.models.student;
        let model = if evals.is_empty() {
            None
        } else {
            Some(InLoopModel {
                tower: student.image.clone(),
                text: setups::student_text(resolved, frozen, context.settings)?,
                head: student.text_head(),
                settings: context.settings.clone(),
                made: Vec::new(),
            })
        };
        Ok(Self { model, evals, workers: resolved.spec().data.train.workers })
    }

    fn is_due(evaluation: &Evaluation, step: u64, steps: u64) -> bool {
        // After the last step the stage of its own evaluates.
        step < steps && step.is_multiple_of(evaluation.every_steps.max(1))
    }
}

impl Evaluate for InLoop {
    fn due(&self, step: u64, steps: u64) -> bool {
        self.evals.iter().any(|(evaluation, _, _)| Self::is_due(evaluation, step, steps))
    }

    fn evaluate(&mut self, step: u64, weights: EvalWeights<'_>) -> Result<Vec<EvalReport>, BoxError> {
        let Some(model) = &mut self.model else { return Ok(Vec::new()) };
        let mut reports = Vec::new();
        for (evaluation, data, root) in &self.evals {
            if !Self::is_due(evaluation, step, u64::MAX) {
                continue;
            }
            let at = match model.made.iter().position(|(batch, _)| *batch == data.batch_size) {
                Some(at) => at,
                None => {
                    let (text, head) = (model.text.clone(), model.head.clone());
                    let made = Model::new(&model.tower, text, head, data.batch_size, weights.store, &model.settings)?;
                    model.made.push((data.batch_size, made));
                    model.made.len() - 1
                }
            };
            // A request to stop waits for the end of the evaluation: the training saves its state only between steps.
            let none = Interrupt::default();
            let found =
                model.made[at].1.evaluate(evaluation, data, root, weights.store, self.workers, &none, &|_, _| {})?;
            reports.push(EvalReport { step, name: evaluation.name.clone(), metrics: found.metrics });
        }
        Ok(reports)
    }
}

#[derive(Debug)]
struct RunEvaluation {
    resolved: Arc<Resolved>,
    subject: Subject,
    at: usize,
}

impl RunEvaluation {
    fn evaluation(&self) -> &(Evaluation, EvalData) {
        &self.resolved.evals[self.at]
    }

    fn model_stage(&self) -> Result<StageId, RunError> {
        match self.subject {
            Subject::Student(role) => Ok(stage_of(role)),
            Subject::Teacher(at) => {
                teacher_stage(&self.resolved, at).ok_or_else(|| RunError::Plan("no stage makes the teacher".into()))
            }
        }
    }

    /// Stages of the text tower where it is not the model's own.
    fn text_stages(&self) -> Vec<StageId> {
        match self.subject {
            Subject::Student(_) => student_needs(&self.resolved, false),
            Subject::Teacher(at) => {
                let owner = self.resolved.models.text_of(at).map(|(owner, _)| owner).filter(|owner| *owner != at);
                owner.and_then(|owner| teacher_stage(&self.resolved, owner)).into_iter().collect()
            }
        }
    }

    /// The model with its weights.
    fn model(&self, context: &Context<'_>) -> Result<(Model, ParamStore), RunError> {
        let dir = |id: &StageId| context.input(id).map(ToOwned::to_owned);
        let models = &self.resolved.models;
        let file = context.input(&self.model_stage()?)?.join(WEIGHTS);
        let (tower, text, head) = match self.subject {
            Subject::Student(_) => {
                let text = setups::student_text(&self.resolved, Frozen::Results(&dir), context.settings)?;
                (&models.student.image, text, models.student.text_head())
            }
            Subject::Teacher(at) => {
                let lost = || RunError::Plan(format!("teacher {at} lacks a tower"));
                let tower = models.teachers[at].image.as_ref().ok_or_else(lost)?;
                let (owner, text) = models.text_of(at).ok_or_else(lost)?;
                let stage = teacher_stage(&self.resolved, owner).ok_or_else(lost)?;
                let store = read_own(&context.input(&stage)?.join(WEIGHTS), &[text_graph(text)?])?.store;
                let compute = context.settings.compute()?;
                (tower, CaptionEncoder::new(text, text.tokenize(), Arc::new(store), &compute)?, None)
            }
        };
        let store = read_own(&file, &[image_graph(tower)?])?.store;
        let batch = self.evaluation().1.batch_size;
        Ok((Model::new(tower, text, head, batch, &store, context.settings)?, store))
    }
}

impl Stage for RunEvaluation {
    fn id(&self) -> StageId {
        id(&self.resolved, self.subject, self.at)
    }

    fn path(&self) -> String {
        format!("eval[{}]", self.at)
    }

    fn gives(&self) -> Port {
        Port::Scores
    }

    fn needs(&self) -> Vec<Need> {
        let mut needs = make_data::needs_of(&self.resolved, false, &[&self.evaluation().1]);
        let port = if matches!(self.subject, Subject::Student(_)) { Port::Student } else { Port::Teacher };
        needs.extend(self.model_stage().into_iter().map(|stage| Need { stage, port }));
        needs.extend(self.text_stages().into_iter().map(|stage| Need { stage, port: Port::Teacher }));
        needs
    }

    fn settings(&self) -> Result<Value, RunError> {
        let (evaluation, data) = self.evaluation();
        let role = match self.subject {
            Subject::Student(role) => role,
            Subject::Teacher(_) => Role::Teacher,
        };
        Ok(json!({
            "model": [model_name(&self.resolved, self.subject), json!(role)],
            "evaluation": [evaluation.name, evaluation.kind, json!(evaluation.params)],
            "data": data.identity()?,
        }))
    }

    fn run(&self, context: &Context<'_>) -> Result<String, RunError> {
        let started = Instant::now();
        let (mut model, store) = self.model(context)?;
        let (evaluation, data) = self.evaluation();
        let root = make_data::evaluation_root(data, context)?;
        (context.tell)(Event::Started { steps: None, from: 0 });
        let begun = Instant::now();
        let tell = |done: usize, _: usize| {
            let rate = done as f64 / begun.elapsed().as_secs_f64().max(1e-9);
            (context.tell)(Event::Step { step: done as u64, terms: Vec::new(), images_per_s: Some(rate) });
        };
        let workers = self.resolved.spec().data.train.workers;
        let found = model.evaluate(evaluation, data, &root, &store, workers, context.interrupt, &tell)?;
        let role = match self.subject {
            Subject::Student(role) => role,
            Subject::Teacher(_) => Role::Teacher,
        };
        let summary = format!(
            "{} {:.1} % (chance {:.1} %)",
            found.headline.label,
            100.0 * found.headline.value,
            100.0 * found.headline.chance
        );
        let scores = Scores {
            model: model_name(&self.resolved, self.subject).to_owned(),
            role,
            evaluation: evaluation.name.clone(),
            kind: evaluation.kind.clone(),
            metrics: found.metrics,
            headline: found.headline,
            samples: found.samples,
            images_per_second: found.samples as f64 / started.elapsed().as_secs_f64().max(1e-9),
        };
        write_json(&context.dir.join(SCORES), &scores)?;
        if let Some(predictions) = &found.predictions {
            write_json(&context.dir.join(PREDICTIONS), predictions)?;
        }
        Ok(summary)
    }
}
