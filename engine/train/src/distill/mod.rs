//! Distillation levels: what is compared between teacher and student. A new level is one file here and one line in
//! [`LEVELS`].
//!
//! A level adds its loss in one of two places. Over the whole batch ([`Level::batch_loss`]), in the loss graph, from the
//! embeddings. Or for each sample by itself ([`Level::tap_loss`]), in the tower graph, from pairs of taps: there the
//! teacher's side ([`Level::tap_target`]) is computed in the teacher's graph, so that only the target is copied.

mod attention;
mod clip;
mod features;
mod icl;
mod logits;
mod projection;
mod siglip;

use std::fmt::{self, Debug};
use std::sync::Arc;

use mcpipe_graph::{GraphBuilder, Path, Tensor};
use mcpipe_models::{ModelError, Tap, TapInfo};
use mcpipe_spec::{Component, ComponentKind, Distill, Params, ParamsError};
use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::{Deserialize, Serialize};

use crate::losses::{IMAGE_TO_TEXT, TEXT_TO_IMAGE};
use crate::setup::Term;
use crate::tower::{StudentShape, TeacherShape};

pub use clip::CLIP;
pub(crate) use clip::clip_loss;
pub use siglip::SIGLIP;
pub(crate) use siglip::siglip_loss;

/// A value of a level's parameters that does not fit the models.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where, as keys and list positions below the `[[distill]]` entry: `["taps", "0", "student"]`.
    pub path: Vec<String>,
    /// What is wrong and what was expected.
    pub message: String,
    /// The names that would be valid, where a name is wrong.
    pub known: Vec<String>,
}

impl Problem {
    pub(crate) fn new(path: &[&str], message: impl Into<String>) -> Self {
        Problem { path: path.iter().map(|&p| p.to_owned()).collect(), message: message.into(), known: Vec::new() }
    }
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path.join("."))?;
        }
        f.write_str(&self.message)
    }
}

/// Names of a tap of the student and one of the teacher that are compared.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TapPair {
    /// Tap of the student's backbone.
    pub student: String,
    /// Tap of the teacher's backbone.
    pub teacher: String,
}

/// Two taps that are compared, with their shapes.
#[derive(Clone, Copy, Debug)]
pub struct Pairing<'a> {
    /// The student's.
    pub student: &'a TapInfo,
    /// The teacher's.
    pub teacher: &'a TapInfo,
    /// Images.
    pub batch: usize,
}

/// What a loss over the whole batch is made from. Embeddings are normalised.
#[derive(Clone, Debug)]
pub struct BatchContext {
    /// Where the term's own parameters lie.
    pub path: Path,
    /// Samples.
    pub batch: usize,
    /// The student's image embeddings `[B, D]`.
    pub image_bd: Tensor,
    /// The text embeddings `[B, D]`.
    pub text_bd: Tensor,
    /// Whether the text embeddings take a gradient.
    pub text_trained: bool,
    /// exp(logit scale) `[1]`.
    pub scale: Tensor,
    /// The term's teachers.
    pub teachers: Vec<TeacherInputs>,
}

impl BatchContext {
    /// CLIP's targets: rows image → text, rows text → image, `[B, B]` each.
    pub fn targets(&self, g: &mut GraphBuilder) -> [Tensor; 2] {
        [IMAGE_TO_TEXT, TEXT_TO_IMAGE].map(|name| g.input(name, &[self.batch, self.batch]))
    }
}

/// A teacher's embeddings as inputs of the loss graph.
#[derive(Clone, Debug)]
pub struct TeacherInputs {
    /// Its name.
    pub name: String,
    /// Samples.
    pub batch: usize,
    /// Dimension of its image embedding.
    pub image: Option<usize>,
    /// Dimension of its text embedding.
    pub text: Option<usize>,
}

impl TeacherInputs {
    pub(crate) fn new(teacher: &TeacherShape, batch: usize) -> Self {
        let image = teacher.image.as_ref().map(|i| i.dim);
        TeacherInputs { name: teacher.name.clone(), batch, image, text: teacher.text }
    }

    /// Its normalised image embeddings.
    pub fn image_bd(&self, g: &mut GraphBuilder) -> Option<Tensor> {
        self.image.map(|dim| g.input(teacher_input(&self.name, Fed::Image), &[self.batch, dim]))
    }

    /// Its normalised text embeddings.
    pub fn text_bd(&self, g: &mut GraphBuilder) -> Option<Tensor> {
        self.text.map(|dim| g.input(teacher_input(&self.name, Fed::Text), &[self.batch, dim]))
    }

    /// The sides of its logits `(u, v)`, u·vᵀ: text–text for a teacher of text only, image–image for one of images only.
    pub(crate) fn sides(&self, g: &mut GraphBuilder) -> Option<(Tensor, Tensor)> {
        let u_bd = self.scaled_bd(g)?;
        let v_bd = if self.text.is_some() { self.text_bd(g)? } else { self.image_bd(g)? };
        Some((u_bd, v_bd))
    }

    /// Its normalised image embeddings (text embeddings where it has no image tower) times its logit scale.
    pub fn scaled_bd(&self, g: &mut GraphBuilder) -> Option<Tensor> {
        self.image.or(self.text).map(|dim| g.input(teacher_input(&self.name, Fed::Scaled), &[self.batch, dim]))
    }
}

/// What the step feeds of a teacher.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Fed {
    Image,
    Text,
    Scaled,
}

/// Name of the loss graph's input for a teacher's embeddings.
pub(crate) fn teacher_input(teacher: &str, fed: Fed) -> String {
    let what = match fed {
        Fed::Image => "image",
        Fed::Text => "text",
        Fed::Scaled => "scaled",
    };
    format!("teacher.{teacher}/{what}")
}

/// A distillation level with its parameters.
pub trait Level: Debug + Send + Sync {
    /// Its registered name.
    fn name(&self) -> &'static str;

    /// Whether `teacher` has what the level compares; decides who teaches where a term names nobody.
    fn accepts(&self, student: &StudentShape, teacher: &TeacherShape) -> bool;

    /// What does not fit: taps that are missing or can't be compared, teachers without a tower that is needed.
    fn check(&self, student: &StudentShape, teachers: &[&TeacherShape]) -> Vec<Problem>;

    /// Whether it reads the teachers' embeddings.
    fn uses_embeddings(&self) -> bool {
        true
    }

    /// The pairs of taps that it compares.
    fn pairs(&self) -> &[TapPair] {
        &[]
    }

    /// Adds the loss over the whole batch to the loss graph, a scalar; none where the level is one of taps.
    ///
    /// # Errors
    /// Sizes that don't fit together.
    fn batch_loss(&self, _: &mut GraphBuilder, _: &BatchContext) -> Result<Option<Tensor>, ModelError> {
        Ok(None)
    }

    /// The temperature, where its loss over the whole batch is the relational one of
    /// [`Op::Relational`](mcpipe_graph::Op::Relational): such a level may be computed without its `[B, B]` logits.
    fn relational_temperature(&self) -> Option<f32> {
        None
    }

    /// Adds the target of a pair to the teacher's graph.
    ///
    /// # Errors
    /// Sizes that don't fit together.
    fn tap_target(&self, _: &mut GraphBuilder, tap: &Tap, _: Pairing<'_>) -> Result<Tensor, ModelError> {
        Ok(tap.value.clone())
    }

    /// Shape of a pair's target as [`tap_loss`](Self::tap_loss) takes it; none: as the teacher's graph gives it.
    fn target_shape(&self, _: Pairing<'_>) -> Option<Vec<usize>> {
        None
    }

    /// The target made of what [`tap_target`](Self::tap_target) computed, where ops can't express it and the host must;
    /// else none, and what was computed is the target.
    fn finish_target(&self, _: &[f32], _: Pairing<'_>) -> Option<Vec<f32>> {
        None
    }

    /// Whether [`finish_target`](Self::finish_target) does anything.
    fn finishes_target(&self, _: Pairing<'_>) -> bool {
        false
    }

    /// Adds the loss of a pair to the student's graph: a scalar, mean over samples. Its parameters lie under `path`.
    ///
    /// # Errors
    /// Sizes that don't fit together, or a level without pairs.
    fn tap_loss(
        &self,
        _: &mut GraphBuilder,
        _: &Path,
        _: &Tap,
        _: &Tensor,
        _: Pairing<'_>,
    ) -> Result<Tensor, ModelError> {
        Err(ModelError::Dims(format!("the level `{}` compares no taps", self.name())))
    }
}

/// A registered level.
#[derive(Clone, Copy, Debug)]
pub struct LevelEntry {
    /// Name in pipeline files.
    pub name: &'static str,
    /// One line for `mcpipe list` and the schema.
    pub summary: &'static str,
    /// Schema of its parameters.
    pub params: fn(&mut SchemaGenerator) -> Schema,
    /// Makes it with parameters.
    pub make: fn(&Params) -> Result<Arc<dyn Level>, ParamsError>,
}

/// The registered levels.
pub static LEVELS: &[LevelEntry] = &[logits::ENTRY, projection::ENTRY, attention::ENTRY, features::ENTRY, icl::ENTRY];

/// The levels as components.
pub fn components() -> Vec<Component> {
    let component =
        |e: &LevelEntry| Component { kind: ComponentKind::Level, name: e.name, summary: e.summary, params: e.params };
    LEVELS.iter().map(component).collect()
}

/// The level called `name` with its parameters.
///
/// # Errors
/// An unknown name, or parameters that don't fit the level.
pub fn level(name: &str, params: &Params) -> Result<Arc<dyn Level>, Problem> {
    let Some(entry) = LEVELS.iter().find(|e| e.name == name) else {
        let known = LEVELS.iter().map(|e| e.name.to_owned()).collect();
        return Err(Problem { path: vec!["level".into()], message: format!("there is no level `{name}`"), known });
    };
    (entry.make)(params).map_err(|e| Problem::new(&[], e.message))
}

/// The terms of a pipeline's `[[distill]]` entries: levels made, teachers found by name (all that can, where an entry
/// names none), each checked against the models. A second entry of a level is called `level.2`.
///
/// # Errors
/// All problems, each with the position of its entry.
pub fn terms(
    entries: &[Distill],
    student: &StudentShape,
    teachers: &[TeacherShape],
) -> Result<Vec<Term>, Vec<(usize, Problem)>> {
    let mut terms: Vec<Term> = Vec::new();
    let mut problems = Vec::new();
    for (i, entry) in entries.iter().enumerate() {
        match term(entry, student, teachers) {
            Ok(mut term) => {
                let before = entries[..i].iter().filter(|e| e.level == entry.level).count();
                if before > 0 {
                    term.name = format!("{}.{}", entry.level, before + 1);
                }
                terms.push(term);
            }
            Err(found) => problems.extend(found.into_iter().map(|p| (i, p))),
        }
    }
    if problems.is_empty() { Ok(terms) } else { Err(problems) }
}

fn term(entry: &Distill, student: &StudentShape, teachers: &[TeacherShape]) -> Result<Term, Vec<Problem>> {
    let level = level(&entry.level, &entry.params).map_err(|p| vec![p])?;
    let mut problems = Vec::new();
    let chosen: Vec<usize> = match &entry.teachers {
        Some(names) => {
            let find = |(i, name): (usize, &String)| {
                let found = teachers.iter().position(|t| t.name == *name);
                if found.is_none() {
                    let known = teachers.iter().map(|t| t.name.clone()).collect();
                    let path = vec!["teachers".to_owned(), i.to_string()];
                    problems.push(Problem { path, message: format!("there is no teacher `{name}`"), known });
                }
                found
            };
            names.iter().enumerate().filter_map(find).collect()
        }
        None => (0..teachers.len()).filter(|&t| level.accepts(student, &teachers[t])).collect(),
    };
    let shapes: Vec<&TeacherShape> = chosen.iter().map(|&t| &teachers[t]).collect();
    if chosen.is_empty() && problems.is_empty() {
        // Against every teacher, the check says what each lacks.
        let all: Vec<&TeacherShape> = teachers.iter().collect();
        problems = level.check(student, &all);
        if problems.is_empty() {
            problems
                .push(Problem::new(&["level"], format!("no teacher has what the level `{}` compares", entry.level)));
        }
    } else {
        problems.extend(level.check(student, &shapes));
    }
    if !problems.is_empty() {
        return Err(problems);
    }
    Ok(Term {
        name: entry.level.clone(),
        level,
        teachers: chosen,
        weight: entry.weight,
        schedule: entry.schedule.clone(),
    })
}

/// Decodes a level's parameters; for [`LevelEntry::make`].
fn make<L: Level + serde::de::DeserializeOwned + 'static>(params: &Params) -> Result<Arc<dyn Level>, ParamsError> {
    Ok(Arc::new(params.decode::<L>()?))
}

/// Problems of taps that are missing, for every pair and teacher; `compare` judges the pairs that exist.
fn check_pairs(
    pairs: &[TapPair],
    student: &StudentShape,
    teachers: &[&TeacherShape],
    compare: impl Fn(&TapInfo, &TapInfo) -> Option<String>,
) -> Vec<Problem> {
    let mut problems = Vec::new();
    for (i, pair) in pairs.iter().enumerate() {
        let at = i.to_string();
        let missing = |side: &str, whose: &str, name: &str, taps: &[TapInfo]| Problem {
            path: vec!["taps".into(), at.clone(), side.into()],
            message: format!("{whose} has no tap `{name}`"),
            known: taps.iter().map(|t| t.name.clone()).collect(),
        };
        let own = student.image.tap(&pair.student);
        if own.is_none() {
            problems.push(missing("student", "the student", &pair.student, &student.image.taps));
        }
        for teacher in teachers {
            let Some(image) = &teacher.image else {
                let text = format!("teacher `{}` has no image tower, so no taps", teacher.name);
                problems.push(Problem::new(&["taps", &at, "teacher"], text));
                continue;
            };
            let Some(theirs) = image.tap(&pair.teacher) else {
                problems.push(missing("teacher", &format!("teacher `{}`", teacher.name), &pair.teacher, &image.taps));
                continue;
            };
            if let Some(reason) = own.and_then(|own| compare(own, theirs)) {
                problems.push(Problem::new(&["taps", &at], reason));
            }
        }
    }
    problems
}

/// Whether an image tower has the teacher's taps of all pairs.
fn has_taps(pairs: &[TapPair], teacher: &TeacherShape) -> bool {
    teacher.image.as_ref().is_some_and(|image| pairs.iter().all(|p| image.tap(&p.teacher).is_some()))
}

/// Height and width of the grid that a tap lies on.
fn grid(tap: &TapInfo) -> [usize; 2] {
    use mcpipe_models::TapShape as S;
    match tap.shape {
        S::Image { height, width, .. } => [height, width],
        S::Tokens { grid, .. } | S::Attention { grid, .. } => grid,
    }
}
