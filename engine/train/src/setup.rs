//! Everything a training needs, as parts that can be built into graphs.

use std::sync::Arc;

use mcpipe_graph::ParamStore;
use mcpipe_spec::{Training, WeightSchedule};

use crate::compute::Compute;
use crate::distill::Level;
use crate::encoder::{CaptionEncoder, Tokenize};
use crate::optim::OptimizerConfig;
use crate::schedule::LrConfig;
use crate::tower::{Head, ImageTower, StudentShape, TeacherShape, TextTower, TowerShape};
use crate::{TrainError, distill};

/// Name of the trained logit scale (its logarithm), a scalar.
pub const LOGIT_SCALE: &str = "logit_scale";

/// Name of the trained bias of SigLIP's logits, a scalar.
pub const LOGIT_BIAS: &str = "logit_bias";

/// Greatest exp(logit scale); the logarithm is held at or below ln 100 after every step.
pub const MAX_LOGIT_SCALE: f64 = 100.0;

/// The model that is trained: a student, or a teacher.
#[derive(Clone, Debug)]
pub struct TrainedModel {
    /// The image tower.
    pub image: Arc<dyn ImageTower>,
    /// Which of a batch's views the image tower reads.
    pub view: usize,
    /// The text side.
    pub text: ModelText,
    /// exp(logit scale) at the start.
    pub logit_scale: f64,
    /// Whether the logit scale is trained.
    pub train_logit_scale: bool,
}

/// The text side of the model that is trained.
#[derive(Clone)]
pub enum ModelText {
    /// Trained with the image tower.
    Trained {
        /// The text tower.
        tower: Arc<dyn TextTower>,
        /// Its tokenizer.
        tokenize: Tokenize,
    },
    /// Frozen: one of the setup's encoders.
    Frozen {
        /// Position in [`TrainSetup::texts`].
        encoder: usize,
        /// A trained map behind it; the same path of parameters as the image tower's projection makes it shared.
        projection: Option<Arc<dyn Head>>,
    },
}

impl std::fmt::Debug for ModelText {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            ModelText::Trained { tower, .. } => f.debug_tuple("Trained").field(tower).finish(),
            ModelText::Frozen { encoder, projection } => {
                f.debug_tuple("Frozen").field(encoder).field(projection).finish()
            }
        }
    }
}

/// A teacher.
#[derive(Clone, Debug)]
pub struct Teacher {
    /// Its name.
    pub name: String,
    /// What it is.
    pub model: TeacherModel,
}

/// What a teacher is.
#[derive(Clone, Debug)]
pub enum TeacherModel {
    /// Trained before, never changed.
    Frozen {
        /// Image tower and its weights; none for a teacher of text only.
        image: Option<FrozenImage>,
        /// Text tower: position in [`TrainSetup::texts`]; none for a teacher of images only.
        text: Option<usize>,
        /// Scale of its target logits.
        logit_scale: f64,
    },
    /// The running average of the student: θ ← m·θ + (1−m)·student after each step, running statistics too.
    Average {
        /// m at the first step.
        momentum: f64,
        /// m at the last step, reached along a cosine; none keeps it constant.
        final_momentum: Option<f64>,
        /// Scale of its target logits; none takes the average's own.
        logit_scale: Option<f64>,
    },
}

/// A frozen image tower with its weights.
#[derive(Clone, Debug)]
pub struct FrozenImage {
    /// The tower.
    pub tower: Arc<dyn ImageTower>,
    /// Its weights.
    pub store: Arc<ParamStore>,
    /// Which of a batch's views it reads.
    pub view: usize,
}

/// One distillation term of the objective.
#[derive(Clone, Debug)]
pub struct Term {
    /// Name in metrics and of its parameters; unique.
    pub name: String,
    /// The level.
    pub level: Arc<dyn Level>,
    /// Positions in [`TrainSetup::teachers`].
    pub teachers: Vec<usize>,
    /// Weight within the distillation part.
    pub weight: f64,
    /// Factor on the weight over the steps.
    pub schedule: Option<WeightSchedule>,
}

impl Term {
    /// The term's weight at `step` (from 0) of `steps`, without λ.
    pub fn weight_at(&self, step: u64, steps: u64) -> f64 {
        self.weight * self.schedule.as_ref().map_or(1.0, |s| s.factor(step, steps))
    }
}

/// The model's own loss on images and captions.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub enum Contrast {
    /// CLIP's: each image chooses among the batch's captions and each caption among its images.
    #[default]
    Clip,
    /// SigLIP's: each pair is judged by itself, with a trained bias on the logits.
    Sigmoid {
        /// The bias at the start.
        bias: f64,
    },
}

/// L = (1−λ)·own + λ·Σ weight·level.
#[derive(Clone, Debug, Default)]
pub struct Objective {
    /// The model's own loss.
    pub contrast: Contrast,
    /// Share of distillation, 0 to 1. With 0 the terms are left out and no teacher runs.
    pub lambda: f64,
    /// Distillation terms.
    pub terms: Vec<Term>,
}

/// A running average of the trained weights beside them.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AverageSetup {
    /// How much of the average a step keeps.
    pub momentum: f64,
    /// Whether the average is what evaluations see.
    pub evaluate: bool,
}

/// Everything a training needs.
#[derive(Clone, Debug)]
pub struct TrainSetup {
    /// What is trained.
    pub model: TrainedModel,
    /// Weights to start from; what they lack is initialised from `seed`.
    pub initial: ParamStore,
    /// Teachers.
    pub teachers: Vec<Teacher>,
    /// Frozen text encoders, shared by the model and its teachers; each caches captions' embeddings.
    pub texts: Vec<CaptionEncoder>,
    /// The objective.
    pub objective: Objective,
    /// The average of the weights, where one is kept for evaluation or export.
    pub average: Option<AverageSetup>,
    /// The optimiser.
    pub optimizer: OptimizerConfig,
    /// The learning rate over the steps.
    pub schedule: LrConfig,
    /// Length, sizes, checkpoints, limits.
    pub training: Training,
    /// Seed of initial weights.
    pub seed: u64,
    /// What runs the steps.
    pub compute: Compute,
    /// Hash of everything that a resumed training must share with the one that wrote a checkpoint.
    pub identity: String,
}

impl TrainSetup {
    /// What levels may ask of the model.
    ///
    /// # Errors
    /// An image size that the tower can't take, or a text encoder that the setup lacks.
    pub fn student_shape(&self) -> Result<StudentShape, TrainError> {
        let (text, text_trained) = match &self.model.text {
            ModelText::Trained { tower, .. } => (tower.dim(), true),
            ModelText::Frozen { projection: Some(head), .. } => (head.dim(), true),
            ModelText::Frozen { encoder, projection: None } => (self.text(*encoder)?.dim(), false),
        };
        Ok(StudentShape { image: TowerShape::of(self.model.image.as_ref())?, text, text_trained })
    }

    /// What levels may ask of each teacher.
    ///
    /// # Errors
    /// As [`student_shape`](Self::student_shape).
    pub fn teacher_shapes(&self) -> Result<Vec<TeacherShape>, TrainError> {
        self.teachers.iter().map(|teacher| self.teacher_shape(teacher)).collect()
    }

    fn teacher_shape(&self, teacher: &Teacher) -> Result<TeacherShape, TrainError> {
        let (image, text) = match &teacher.model {
            TeacherModel::Frozen { image, text, .. } => {
                let image = image.as_ref().map(|i| TowerShape::of(i.tower.as_ref())).transpose()?;
                (image, text.map(|t| self.text(t).map(CaptionEncoder::dim)).transpose()?)
            }
            TeacherModel::Average { .. } => {
                let student = self.student_shape()?;
                (Some(student.image), Some(student.text))
            }
        };
        Ok(TeacherShape { name: teacher.name.clone(), image, text })
    }

    pub(crate) fn text(&self, index: usize) -> Result<&CaptionEncoder, TrainError> {
        self.texts.get(index).ok_or_else(|| TrainError::Setup(format!("the setup has no text encoder {index}")))
    }

    /// Whether distillation terms take part.
    pub(crate) fn distils(&self) -> bool {
        self.objective.lambda > 0.0 && !self.objective.terms.is_empty()
    }

    /// Refuses parts that don't fit together.
    ///
    /// # Errors
    /// [`TrainError::Setup`] with the first thing found.
    pub fn check(&self) -> Result<(), TrainError> {
        let refuse = |text: String| Err(TrainError::Setup(text));
        let t = &self.training;
        if t.steps == 0 || t.batch_size < 2 || t.accumulate == 0 {
            return refuse("training needs a step, a batch of 2 samples and an accumulation of 1 at least".into());
        }
        if !t.batch_size.is_multiple_of(t.accumulate) {
            return refuse(format!("a batch of {} can't be split into {} equal parts", t.batch_size, t.accumulate));
        }
        if !(0.0..=1.0).contains(&self.objective.lambda) {
            return refuse(format!("lambda is {}, but lies between 0 and 1", self.objective.lambda));
        }
        let student = self.student_shape()?;
        if student.image.dim != student.text {
            return refuse(format!(
                "the image embedding has dimension {}, the text embedding {}: a projection must join them",
                student.image.dim, student.text
            ));
        }
        let teachers = self.teacher_shapes()?;
        for (i, term) in self.objective.terms.iter().enumerate() {
            if self.objective.terms[..i].iter().any(|t| t.name == term.name)
                || [distill::CLIP, distill::SIGLIP].contains(&term.name.as_str())
            {
                return refuse(format!("two terms of the loss are called `{}`", term.name));
            }
            let chosen: Option<Vec<&TeacherShape>> = term.teachers.iter().map(|&t| teachers.get(t)).collect();
            let Some(chosen) = chosen.filter(|c| !c.is_empty()) else {
                return refuse(format!("term `{}` has no teacher, or one that the setup lacks", term.name));
            };
            if let Some(problem) = term.level.check(&student, &chosen).first() {
                return refuse(format!("term `{}`: {problem}", term.name));
            }
        }
        Ok(())
    }
}
