//! The graphs of a training step, built from the setup.

use mcpipe_graph::{GraphBuilder, Init, Path, StepGraph, Tensor};
use mcpipe_models::{ModelError, TapInfo};

use crate::distill::{CLIP, Pairing, SIGLIP};
use crate::error::TrainError;
use crate::losses::{self, PairForm, pair_form};
use crate::setup::{Contrast, LOGIT_SCALE, ModelText, TeacherModel, TrainSetup};
use crate::tower::ImageTower;

/// Inputs and outputs by name.
pub(crate) const IMAGES: &str = "images";
pub(crate) const IDS: &str = "ids";
pub(crate) const EOT: &str = "eot";
pub(crate) const FEATURES: &str = "text.features";
/// A teacher's embeddings times its logit scale.
pub(crate) const SCALED: &str = "scaled";
pub(crate) const IMAGE: &str = "image";
pub(crate) const TEXT: &str = "text";

/// Path below which the parameters of distillation terms lie.
pub(crate) const DISTILL: &str = "distill";

/// A target that a teacher's graph computes and the student's tower graph reads.
#[derive(Clone, Debug)]
pub(crate) struct Target {
    /// Position of the term.
    pub term: usize,
    /// Position of the teacher.
    pub teacher: usize,
    /// Position of the pair within the level.
    pub pair: usize,
    /// Output of the teacher's graph and input of the tower graph.
    pub name: String,
    /// The student's tap.
    pub student_tap: TapInfo,
    /// The teacher's tap.
    pub teacher_tap: TapInfo,
    /// Shape of the input.
    pub shape: Vec<usize>,
}

/// What runs of a teacher.
#[derive(Clone, Debug)]
pub(crate) struct TeacherGraph {
    /// Position of the teacher.
    pub teacher: usize,
    /// Whether some term reads its embeddings.
    pub embeddings: bool,
    /// Its tower over one part of the batch; none where nothing of it runs.
    pub graph: Option<StepGraph>,
}

/// Position of a term's loss in the value list: 0 is CLIP's own loss, `1 + i` is term i.
pub(crate) const CLIP_SLOT: usize = 0;

/// The graphs of a step.
#[derive(Clone, Debug)]
pub(crate) struct Graphs {
    /// Towers over one part of the batch, with the losses local to a sample.
    pub tower: StepGraph,
    /// The same without local losses, for the first of two forwards.
    pub first: Option<StepGraph>,
    /// Losses over the whole batch's embeddings.
    pub loss: StepGraph,
    /// Teachers that run.
    pub teachers: Vec<TeacherGraph>,
    /// Targets between teachers and tower.
    pub targets: Vec<Target>,
    /// Slots of the terms whose loss is in the tower graph.
    pub local: Vec<usize>,
    /// Slots of the terms whose loss is in the loss graph.
    pub whole: Vec<usize>,
    /// Whether the text embedding comes out of the tower graph.
    pub text_in_tower: bool,
}

/// Output name of the loss in a slot.
pub(crate) fn loss_name(setup: &TrainSetup, slot: usize) -> String {
    match slot {
        CLIP_SLOT => format!("loss.{}", own_name(setup)),
        i => format!("loss.{}", setup.objective.terms[i - 1].name),
    }
}

/// Name of the model's own loss.
fn own_name(setup: &TrainSetup) -> &'static str {
    match setup.objective.contrast {
        Contrast::Clip => CLIP,
        Contrast::Sigmoid { .. } => SIGLIP,
    }
}

/// Names of the terms in slot order; the model's own loss alone where nothing is distilled.
pub(crate) fn term_names(setup: &TrainSetup) -> Vec<String> {
    let mut names = vec![own_name(setup).to_owned()];
    if setup.distils() {
        names.extend(setup.objective.terms.iter().map(|t| t.name.clone()));
    }
    names
}

impl Graphs {
    /// Builds every graph of a step, with the losses over pairs in the form that suits the setup.
    pub(crate) fn new(setup: &TrainSetup) -> Result<Self, TrainError> {
        Self::with(setup, pair_form(setup))
    }

    /// Builds every graph of a step.
    pub(crate) fn with(setup: &TrainSetup, form: PairForm) -> Result<Self, TrainError> {
        setup.check()?;
        let part = setup.training.micro_batch();
        let targets = targets(setup, part)?;
        let teachers = teachers(setup, part, &targets)?;
        // The teachers' graphs say what shape their targets have; targets that are finished on the host know theirs.
        let mut targets = targets;
        for target in &mut targets {
            if target.shape.is_empty() {
                let graph = teachers.iter().find(|t| t.teacher == target.teacher).and_then(|t| t.graph.as_ref());
                let graph = graph.ok_or_else(|| TrainError::Setup(format!("no teacher runs for `{}`", target.name)))?;
                target.shape = graph.output(&target.name)?.shape().to_vec();
            }
        }
        let (tower, local) = tower(setup, part, Some(&targets))?;
        let first = if setup.training.accumulate > 1 { Some(tower_only(setup, part)?) } else { None };
        let (loss, whole) = losses::graph(setup, form)?;
        let text_in_tower = !matches!(setup.model.text, ModelText::Frozen { projection: None, .. });
        Ok(Graphs { tower, first, loss, teachers, targets, local, whole, text_in_tower })
    }

    /// Every graph whose parameters are those of the model that is trained.
    pub(crate) fn trained(&self) -> [&StepGraph; 2] {
        [&self.tower, &self.loss]
    }
}

fn targets(setup: &TrainSetup, part: usize) -> Result<Vec<Target>, TrainError> {
    let mut targets = Vec::new();
    if !setup.distils() {
        return Ok(targets);
    }
    let student = setup.student_shape()?;
    let teachers = setup.teacher_shapes()?;
    let lost = |name: &str| TrainError::Setup(format!("there is no tap `{name}`"));
    for (i, term) in setup.objective.terms.iter().enumerate() {
        for &t in &term.teachers {
            for (p, pair) in term.level.pairs().iter().enumerate() {
                let image = teachers[t].image.as_ref();
                let student_tap = student.image.tap(&pair.student).ok_or_else(|| lost(&pair.student))?.clone();
                let teacher_tap = image.and_then(|i| i.tap(&pair.teacher)).ok_or_else(|| lost(&pair.teacher))?.clone();
                let pairing = Pairing { student: &student_tap, teacher: &teacher_tap, batch: part };
                let shape = term.level.target_shape(pairing).unwrap_or_default();
                let name = format!("target.{}/{}/{p}", term.name, teachers[t].name);
                targets.push(Target { term: i, teacher: t, pair: p, name, student_tap, teacher_tap, shape });
            }
        }
    }
    Ok(targets)
}

fn unique<'a>(names: impl Iterator<Item = &'a str>) -> Vec<String> {
    let mut list: Vec<String> = Vec::new();
    for name in names {
        if !list.iter().any(|n| n == name) {
            list.push(name.to_owned());
        }
    }
    list
}

fn teachers(setup: &TrainSetup, part: usize, targets: &[Target]) -> Result<Vec<TeacherGraph>, TrainError> {
    let mut list = Vec::new();
    if !setup.distils() {
        return Ok(list);
    }
    for (t, teacher) in setup.teachers.iter().enumerate() {
        let mut terms = setup.objective.terms.iter().filter(|term| term.teachers.contains(&t)).peekable();
        if terms.peek().is_none() {
            continue;
        }
        let embeddings = terms.any(|term| term.level.uses_embeddings());
        let own: Vec<&Target> = targets.iter().filter(|target| target.teacher == t).collect();
        let mut g = GraphBuilder::new(false);
        let tower: Option<&dyn ImageTower> = match &teacher.model {
            TeacherModel::Frozen { image, .. } => image.as_ref().map(|i| i.tower.as_ref()),
            TeacherModel::Average { .. } => Some(setup.model.image.as_ref()),
        };
        let graph = match tower {
            Some(tower) if embeddings || !own.is_empty() => {
                let side = tower.image_size();
                let x_bhwc = g.input(IMAGES, &[part, side, side, 3]);
                let names = unique(own.iter().map(|o| o.teacher_tap.name.as_str()));
                let encoded = tower.build(&mut g, &x_bhwc, &names)?;
                if embeddings {
                    let image_bd = g.l2_normalize(&encoded.embedding_bd);
                    g.output(IMAGE, &image_bd);
                    let scaled_bd = scaled(&mut g, &teacher.model, &image_bd)?;
                    g.output(SCALED, &scaled_bd);
                }
                for target in own {
                    let tap = encoded.taps.iter().find(|(n, _)| *n == target.teacher_tap.name);
                    let (_, tap) =
                        tap.ok_or_else(|| TrainError::Setup(format!("no tap `{}`", target.teacher_tap.name)))?;
                    let pairing = Pairing { student: &target.student_tap, teacher: &target.teacher_tap, batch: part };
                    let level = &setup.objective.terms[target.term].level;
                    let value = level.tap_target(&mut g, tap, pairing)?;
                    g.output(target.name.clone(), &value);
                }
                if let (TeacherModel::Average { .. }, true) = (&teacher.model, embeddings)
                    && let Some(text_bd) = model_text(setup, &mut g, part)?
                {
                    let text_bd = g.l2_normalize(&text_bd);
                    g.output(TEXT, &text_bd);
                }
                Some(g.finish())
            }
            _ => None,
        };
        list.push(TeacherGraph { teacher: t, embeddings, graph });
    }
    Ok(list)
}

/// A teacher's normalised embeddings times its logit scale.
fn scaled(g: &mut GraphBuilder, model: &TeacherModel, x_bd: &Tensor) -> Result<Tensor, ModelError> {
    match model {
        TeacherModel::Frozen { logit_scale, .. } | TeacherModel::Average { logit_scale: Some(logit_scale), .. } => {
            Ok(g.scale(x_bd, *logit_scale as f32))
        }
        TeacherModel::Average { logit_scale: None, .. } => {
            // The logarithm is held below its bound wherever a step leaves it.
            let log_scale = g.param(&Path::new(LOGIT_SCALE), &[], Init::Constant(0.0))?;
            let scale = g.exp(&log_scale);
            let flat = g.reshape(x_bd, &[x_bd.numel(), 1])?;
            let scaled = g.scale_channels(&flat, &scale)?;
            Ok(g.reshape(&scaled, x_bd.shape())?)
        }
    }
}

/// The text side of the model that is trained, where it runs with the image tower.
fn model_text(setup: &TrainSetup, g: &mut GraphBuilder, part: usize) -> Result<Option<Tensor>, TrainError> {
    Ok(match &setup.model.text {
        ModelText::Trained { tower, .. } => {
            let ids_bl = g.int_input(IDS, &[part, tower.context_length()]);
            let eot_b = g.int_input(EOT, &[part]);
            Some(tower.build(g, &ids_bl, &eot_b)?)
        }
        ModelText::Frozen { encoder, projection: Some(head) } => {
            let x_bd = g.input(FEATURES, &[part, setup.text(*encoder)?.dim()]);
            Some(head.build(g, &x_bd)?)
        }
        ModelText::Frozen { projection: None, .. } => None,
    })
}

fn tower_only(setup: &TrainSetup, part: usize) -> Result<StepGraph, TrainError> {
    Ok(tower(setup, part, None)?.0)
}

fn tower(setup: &TrainSetup, part: usize, targets: Option<&[Target]>) -> Result<(StepGraph, Vec<usize>), TrainError> {
    let targets = targets.unwrap_or_default();
    let mut g = GraphBuilder::new(true);
    let side = setup.model.image.image_size();
    let x_bhwc = g.input(IMAGES, &[part, side, side, 3]);
    let names = unique(targets.iter().map(|t| t.student_tap.name.as_str()));
    let encoded = setup.model.image.build(&mut g, &x_bhwc, &names)?;
    g.output(IMAGE, &encoded.embedding_bd);
    if let Some(text_bd) = model_text(setup, &mut g, part)? {
        g.output(TEXT, &text_bd);
    }
    let mut local = Vec::new();
    for (i, term) in setup.objective.terms.iter().enumerate() {
        let own: Vec<&Target> = targets.iter().filter(|t| t.term == i).collect();
        if own.is_empty() {
            continue;
        }
        let loss = g.on_dfdx(|g| -> Result<Tensor, ModelError> {
            let mut sum: Option<Tensor> = None;
            for target in &own {
                let tap = encoded.taps.iter().find(|(n, _)| *n == target.student_tap.name);
                let (_, tap) = tap.ok_or_else(|| ModelError::Dims(format!("no tap `{}`", target.student_tap.name)))?;
                let fed = g.input(target.name.clone(), &target.shape);
                let path = Path::new(DISTILL).at(&term.name).at(&setup.teachers[target.teacher].name);
                let path = path.at("regressor").at(target.pair);
                let pairing = Pairing { student: &target.student_tap, teacher: &target.teacher_tap, batch: part };
                let loss = term.level.tap_loss(g, &path, tap, &fed, pairing)?;
                sum = Some(match sum {
                    None => loss,
                    Some(sum) => g.add(&sum, &loss)?,
                });
            }
            let sum = sum.ok_or_else(|| ModelError::Dims(format!("`{}` compares nothing", term.name)))?;
            Ok(if own.len() > 1 { g.scale(&sum, 1.0 / own.len() as f32) } else { sum })
        })?;
        g.output(loss_name(setup, i + 1), &loss);
        local.push(i + 1);
    }
    Ok((g.finish(), local))
}
