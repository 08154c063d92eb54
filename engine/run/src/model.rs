//! A trained model opened for use: a run's student, a file that mcpipe exported, or any weights with the name of their
//! backbone.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mcpipe_data::{EvalTransform, Normalize};
use mcpipe_graph::ParamStore;
use mcpipe_models::export::described;
use mcpipe_models::projection::{Projection, ProjectionKind};
use mcpipe_models::weights::{NameMap, head_of};
use mcpipe_models::{Backbone, Checkpoint, backbone};
use mcpipe_spec::TeacherKind;
use mcpipe_train::{BackboneTower, CaptionEncoder, Compute, Encoder, EncoderTower, Head, LOGIT_SCALE};

use crate::assemble::{WEIGHTS, declared, image_graph, read_own, read_weights, text_graph, view_of};
use crate::components::components;
use crate::error::RunError;
use crate::resolve::models::{PROJECTION, ProjectionHead, image_path};
use crate::resolve::{Models, StudentText};
use crate::run_dir::SPEC;
use crate::text_file::{self, holds_text};

/// Scale of the logits where nothing says another: CLIP's greatest.
const CLIP_SCALE: f64 = 100.0;

/// Where a model comes from.
#[derive(Clone, Debug)]
pub enum ModelSource {
    /// A run directory, whose student is taken, or a file that mcpipe exported: it says itself whose weights it holds.
    Described(PathBuf),
    /// Weights under timm's or open_clip's names.
    Weights(WeightFile),
}

/// A weight file that does not say whose weights it holds.
#[derive(Clone, Debug, Default)]
pub struct WeightFile {
    /// The file.
    pub file: PathBuf,
    /// Registered name of the backbone.
    pub backbone: String,
    /// Its parameters that differ from the published ones, as TOML.
    pub params: String,
    /// Side of its images; the published one by default.
    pub image_size: Option<usize>,
    /// File of the text tower; by default the same file, where it holds one.
    pub text: Option<PathBuf>,
    /// Parameters of the text tower that its weights don't show (`heads`, `act`), as TOML.
    pub text_params: String,
}

/// A model with its weights.
#[derive(Debug)]
pub struct Model {
    /// Image tower.
    pub image: BackboneTower,
    /// Its weights.
    pub store: ParamStore,
    /// Text side, where it was asked for.
    text: Option<TextSide>,
    /// Factor of cosines that makes logits.
    pub logit_scale: f64,
    /// What it runs on.
    pub compute: Compute,
}

/// A text encoder, and the map behind it where the text embedding goes through the image side's projection.
#[derive(Debug)]
struct TextSide {
    encoder: CaptionEncoder,
    head: Option<Encoder>,
}

/// Texts that go through the map behind the text encoder at a time.
const HEAD_BATCH: usize = 32;

/// The backbone of a name with parameters in TOML, and the side of its images.
///
/// # Errors
/// Parameters that are no TOML, an unknown name, or a size that it can't take.
pub(crate) fn named_backbone(
    name: &str,
    params: &str,
    image_size: Option<usize>,
) -> Result<(Box<dyn Backbone>, usize), RunError> {
    let params: toml::Table = params.parse().map_err(|e| RunError::Usage(format!("--params is no TOML: {e}")))?;
    let refused = |error: mcpipe_models::ModelError| RunError::Usage(error.to_string());
    let model = backbone(name, &params).map_err(refused)?;
    let size = image_size.unwrap_or(model.preprocess().image_size);
    model.check_image_size(size).map_err(refused)?;
    Ok((model, size))
}

/// How images are made ready for a tower in evaluation: resize and crop, then normalisation.
pub(crate) fn evaluation_view(tower: &BackboneTower) -> (EvalTransform, Normalize) {
    let preprocess = tower.backbone.preprocess();
    let view = view_of(tower.image_size, &preprocess);
    // The published crop belongs to the published size; at another size nothing is cut away.
    let crop_pct = if tower.image_size == preprocess.image_size { f64::from(preprocess.crop_pct) } else { 1.0 };
    (EvalTransform { size: view.form.size, crop_pct, filter: view.form.filter }, view.normalize)
}

impl Model {
    /// Opens a model to be run on `compute`; its text side only where `texts`.
    ///
    /// # Errors
    /// A folder that is no run's or whose run has no student yet, weights that are not the model's, or texts asked of
    /// a model without a text tower.
    pub fn open(source: &ModelSource, texts: bool, compute: &Compute) -> Result<Self, RunError> {
        Self::read(source, texts, compute).map_err(|error| match error {
            // The file that the user named is not the one that is wanted.
            RunError::Weights(error) => RunError::of_input(error),
            other => other,
        })
    }

    fn read(source: &ModelSource, texts: bool, compute: &Compute) -> Result<Self, RunError> {
        match source {
            ModelSource::Described(path) if path.is_dir() => of_run(path, texts, compute),
            ModelSource::Described(path) => {
                let file = Checkpoint::open(path)?;
                let noted = described(&file)?.ok_or_else(|| {
                    let path = path.display();
                    RunError::Usage(format!(
                        "{path} does not say whose weights it holds; give --backbone and --weights"
                    ))
                })?;
                let text = texts.then_some((path.as_path(), ""));
                of_weights(&file, noted.backbone, noted.image_size, text, compute)
            }
            ModelSource::Weights(weights) => {
                let (backbone, size) = named_backbone(&weights.backbone, &weights.params, weights.image_size)?;
                let text = weights.text.as_ref().unwrap_or(&weights.file);
                let text = texts.then_some((text.as_path(), weights.text_params.as_str()));
                of_weights(&Checkpoint::open(&weights.file)?, backbone, size, text, compute)
            }
        }
    }

    /// Embeddings `[n, D]`, not normalised, of texts.
    ///
    /// # Errors
    /// A model that was opened without its text side, or a node that fails.
    pub fn embed_texts(&mut self, texts: &[&str]) -> Result<Vec<f32>, RunError> {
        let Some(side) = &mut self.text else {
            return Err(RunError::Plan("the model was opened without its text tower".into()));
        };
        let embeddings = side.encoder.embed(texts)?;
        Ok(match &mut side.head {
            Some(head) => head.encode_embeddings(&self.store, &embeddings)?,
            None => embeddings,
        })
    }
}

/// The student of a run.
fn of_run(dir: &Path, texts: bool, compute: &Compute) -> Result<Model, RunError> {
    let spec = dir.join(SPEC);
    if !spec.is_file() {
        return Err(RunError::Usage(format!("{} is no run directory: it has no {SPEC}", dir.display())));
    }
    let text = fs::read_to_string(&spec).map_err(|e| RunError::read(&spec, e))?;
    let document = mcpipe_spec::load_text(&spec, &text, &[], &components()).map_err(RunError::Spec)?;
    let mut found = Vec::new();
    let models = match Models::resolve(&document, &mut found) {
        Some(models) if found.is_empty() => models,
        _ => return Err(RunError::Spec(document.report(found))),
    };
    let file = dir.join("checkpoints/student").join(WEIGHTS);
    if !file.is_file() {
        return Err(RunError::Usage(format!(
            "{} holds no trained student; run its pipeline to the end (`mcpipe run .. --out {}`)",
            dir.display(),
            dir.display()
        )));
    }
    let student = &models.student;
    let weights = read_own(&file, &[image_graph(&student.image)?])?;
    let text = match texts {
        true => Some(text_of_run(dir, &models, &document.spec, &weights.store, compute)?),
        false => None,
    };
    Ok(Model {
        image: student.image.clone(),
        store: weights.store,
        text,
        logit_scale: weights.logit_scale.unwrap_or(document.spec.loss.logit_scale),
        compute: compute.clone(),
    })
}

/// The text side of a run's student.
fn text_of_run(
    dir: &Path,
    models: &Models,
    spec: &mcpipe_spec::Spec,
    student: &ParamStore,
    compute: &Compute,
) -> Result<TextSide, RunError> {
    let (tower, shared) = (&models.student.text_tower, models.student.text_head());
    let teacher = match models.student.text {
        StudentText::Teacher(at) => models.text_of(at).map(|(owner, _)| owner),
        StudentText::File(..) => None,
    };
    let exported = dir.join("export/open_clip/open_clip_model.safetensors");
    let store = match teacher.map(|at| &models.teachers[at]) {
        Some(teacher) if teacher.kind == TeacherKind::Train => {
            let own = dir.join("checkpoints").join(teacher.name.replace(' ', "-")).join(WEIGHTS);
            read_own(&own, &[text_graph(tower)?])?.store
        }
        _ => {
            let (file, resize) = match (&models.student.text, teacher) {
                (StudentText::File(_, file), _) => (file.as_path(), false),
                (_, Some(at)) => match &spec.teachers[at] {
                    mcpipe_spec::Teacher::Load(load) => (load.weights.as_path(), load.resize_position),
                    _ => return Err(RunError::Plan("the student's text tower has no weights".into())),
                },
                (_, None) => return Err(RunError::Plan("the student's text tower has no weights".into())),
            };
            match file.is_file() {
                true => read_weights(file, None, Some(tower), resize)?.store,
                // A file from outside may have moved; what was exported stays with the run, with a shared map in it.
                false if shared.is_none() && exported.is_file() => {
                    read_weights(&exported, None, Some(tower), false)?.store
                }
                false => {
                    return Err(RunError::Usage(format!(
                        "the text tower's weights, {}, are not there; the run's {SPEC} says where they are looked for",
                        file.display()
                    )));
                }
            }
        }
    };
    text_side(tower, store, shared, student, compute)
}

fn text_side(
    tower: &EncoderTower,
    store: ParamStore,
    shared: Option<Arc<dyn Head>>,
    image: &ParamStore,
    compute: &Compute,
) -> Result<TextSide, RunError> {
    let encoder = CaptionEncoder::new(tower, tower.tokenize(), Arc::new(store), compute)?;
    let head = shared.map(|head| Encoder::embeddings(head.as_ref(), tower.dim, HEAD_BATCH, image, compute));
    Ok(TextSide { encoder, head: head.transpose()? })
}

/// The map that open_clip puts behind a timm trunk: where it is in the file, and its form.
fn open_clip_head(file: &Checkpoint) -> Option<(&'static str, Projection)> {
    let rows = |name: &str| file.shape(name).and_then(|shape| shape.first().copied());
    if let Some(dim) = rows("visual.head.proj.weight") {
        return Some(("visual.head.proj.", Projection { kind: ProjectionKind::Linear, dim }));
    }
    let (hidden, dim) = (rows("visual.head.mlp.fc1.weight")?, rows("visual.head.mlp.fc2.weight")?);
    Some(("visual.head.mlp.", Projection { kind: ProjectionKind::Mlp { hidden }, dim }))
}

/// A model of a weight file; `text` is the text tower's file and parameters, where texts are asked for.
fn of_weights(
    file: &Checkpoint,
    backbone: Box<dyn Backbone>,
    image_size: usize,
    text: Option<(&Path, &str)>,
    compute: &Compute,
) -> Result<Model, RunError> {
    let at = image_path(backbone.as_ref());
    let bare = NameMap::new().and_image(file, "");
    let outputs = |(name, axis): (String, usize)| file.shape(&bare.to_file(&name)?)?.get(axis).copied();
    let head = head_of(backbone.as_ref(), image_size)?.into_iter().find_map(outputs);
    let behind = open_clip_head(file);
    let image = BackboneTower {
        backbone: backbone.into(),
        path: mcpipe_graph::Path::new(at),
        image_size,
        head,
        projection: behind.map(|(_, projection)| Arc::new(ProjectionHead(projection)) as Arc<dyn Head>),
    };
    let mut store = declared(&[image_graph(&image)?]);
    let mut names = NameMap::new().and_image(file, at);
    if let Some((prefix, _)) = behind {
        names = names.and(prefix, format!("{PROJECTION}."));
    }
    file.load(&mut store, &names)?;
    let mut scale = scale_of(file)?;
    let text = match text {
        Some((path, params)) => {
            let file = Checkpoint::open(path)?;
            if !holds_text(&file) {
                return Err(RunError::Usage(format!(
                    "{} holds no text tower under open_clip's names; give a file that does by --text-weights, or a run \
                     directory",
                    path.display()
                )));
            }
            let tower = text_file::tower(&file, params)?;
            let store = read_weights(path, None, Some(&tower), false)?.store;
            scale = scale_of(&file)?.or(scale);
            Some(text_side(&tower, store, None, &ParamStore::default(), compute)?)
        }
        None => None,
    };
    Ok(Model { image, store, text, logit_scale: scale.unwrap_or(CLIP_SCALE), compute: compute.clone() })
}

fn scale_of(file: &Checkpoint) -> Result<Option<f64>, RunError> {
    Ok(file.values(LOGIT_SCALE)?.and_then(|v| v.first().map(|&log| f64::from(log).exp())))
}
