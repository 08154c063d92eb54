//! Export of a trained student under the names of timm and open_clip, so that those libraries load it strictly.
//!
//! A linear projection is folded into the model's own head (both are linear maps of the pooled features), so that the
//! exported model is a plain one.

mod convert;

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mcpipe_graph::ParamStore;
use serde_json::{Value, json};

use crate::backbone::{Backbone, Interpolation, Naming};
use crate::projection::{Projection, ProjectionKind};
use crate::text::TextEncoder;
use crate::weights::{Entry, WeightsError, head_of, path_prefix, write_atomic, write_safetensors};

pub use convert::{Conversion, Converted, Described, Form, convert, described};

/// A trained student in a store. Paths are those that the models were built under.
#[derive(Clone, Copy, Debug)]
pub struct Student<'a> {
    /// Its weights (or their running average).
    pub store: &'a ParamStore,
    /// Image backbone.
    pub backbone: &'a dyn Backbone,
    /// Path of the backbone.
    pub image_path: &'a str,
    /// Side of the images that it was trained on.
    pub image_size: usize,
    /// Projection behind the backbone and its path.
    pub projection: Option<(Projection, &'a str)>,
    /// Batches that the batch norms have seen.
    pub batches: u64,
}

/// The text side of an exported student.
#[derive(Clone, Copy, Debug)]
pub struct StudentText<'a> {
    /// Store of the text encoder's weights.
    pub store: &'a ParamStore,
    /// Text encoder.
    pub encoder: &'a dyn TextEncoder,
    /// Path of the text encoder.
    pub path: &'a str,
    /// Whether the text embedding goes through the student's projection too.
    pub shared_projection: bool,
    /// Logarithm of the logit scale.
    pub logit_scale: f32,
}

/// What was written for timm.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TimmExport {
    /// The weights.
    pub file: PathBuf,
    /// Name for `timm.create_model`.
    pub model: &'static str,
    /// `num_classes` for `timm.create_model`: the embedding's width, or 0 where the head is left out.
    pub num_classes: usize,
    /// Whether an MLP projection, which a timm trunk has no place for, was left out: the file gives pooled features.
    pub projection_left_out: bool,
}

/// What was written for open_clip.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct OpenClipExport {
    /// Directory for `open_clip.create_model("local-dir:DIRECTORY")`.
    pub directory: PathBuf,
    /// `open_clip_model.safetensors` in it.
    pub weights: PathBuf,
    /// `open_clip_config.json` in it.
    pub config: PathBuf,
}

/// What the user of an export must know where timm does not build the model by its name alone.
pub fn name_note(backbone: &dyn Backbone) -> Option<String> {
    let name = backbone.name();
    (backbone.naming() == Naming::Timm && !backbone.is_published())
        .then(|| format!("its sizes are not timm's: timm.create_model(\"{name}\") alone does not build it"))
}

type Tensors<'a> = BTreeMap<String, Entry<'a>>;

/// A dense matrix `[rows, cols]`.
#[derive(Clone, Debug)]
struct Matrix {
    rows: usize,
    cols: usize,
    data: Vec<f32>,
}

impl Matrix {
    fn read(store: &ParamStore, name: &str) -> Result<Option<Matrix>, WeightsError> {
        let Some(p) = store.get(name) else { return Ok(None) };
        match p.shape[..] {
            [rows, cols] => Ok(Some(Matrix { rows, cols, data: p.data.clone() })),
            _ => Err(WeightsError::Export(format!("`{name}` is no matrix but {:?}", p.shape))),
        }
    }

    fn transposed(&self) -> Matrix {
        let data = (0..self.cols).flat_map(|c| (0..self.rows).map(move |r| self.data[r * self.cols + c])).collect();
        Matrix { rows: self.cols, cols: self.rows, data }
    }

    /// `self · other`, summed in f64.
    fn times(&self, other: &Matrix) -> Result<Matrix, WeightsError> {
        if self.cols != other.rows {
            let message = format!("a {}x{} projection does not follow a map to {}", self.rows, self.cols, other.rows);
            return Err(WeightsError::Export(message));
        }
        let mut data = Vec::with_capacity(self.rows * other.cols);
        let mut sums = vec![0f64; other.cols];
        for row in self.data.chunks_exact(self.cols.max(1)) {
            sums.fill(0.0);
            for (&a, b) in row.iter().zip(other.data.chunks_exact(other.cols.max(1))) {
                sums.iter_mut().zip(b).for_each(|(s, &b)| *s += f64::from(a) * f64::from(b));
            }
            data.extend(sums.iter().map(|&s| s as f32));
        }
        Ok(Matrix { rows: self.rows, cols: other.cols, data })
    }

    fn entry<'a>(self) -> Entry<'a> {
        Entry::F32(vec![self.rows, self.cols], Cow::Owned(self.data))
    }
}

/// The map from pooled features to the embedding: affine, or an MLP.
struct Head {
    /// `[out, in]`; none where the features are the embedding, or where there is an MLP.
    weight: Option<Matrix>,
    bias: Option<Vec<f32>>,
    /// First weight and bias, second weight.
    mlp: Option<(Matrix, Vec<f32>, Matrix)>,
}

/// Names of the parameters of a backbone's own head, without the backbone's path.
struct HeadNames {
    weight: String,
    bias: Option<String>,
    /// Axis of the weight's outputs.
    outputs: usize,
}

impl HeadNames {
    fn of(backbone: &dyn Backbone, image_size: usize) -> Result<Self, WeightsError> {
        let refuse = |why: String| WeightsError::Export(format!("the head of `{}`: {why}", backbone.name()));
        let head = head_of(backbone, image_size).map_err(|e| refuse(e.to_string()))?;
        let (biases, weights): (Vec<_>, Vec<_>) = head.into_iter().partition(|(name, _)| name.ends_with("bias"));
        match <[_; 1]>::try_from(weights) {
            Ok([(weight, outputs)]) => {
                Ok(HeadNames { weight, bias: biases.into_iter().next().map(|(name, _)| name), outputs })
            }
            Err(several) => Err(refuse(format!("it has {} weights, not one", several.len()))),
        }
    }
}

fn missing(name: &str) -> WeightsError {
    WeightsError::Export(format!("the store has no `{name}`"))
}

fn matrix(store: &ParamStore, name: &str) -> Result<Matrix, WeightsError> {
    Matrix::read(store, name)?.ok_or_else(|| missing(name))
}

fn join(path: &str, name: &str) -> String {
    if path.is_empty() { name.to_owned() } else { format!("{path}.{name}") }
}

/// `weight · bias`.
fn times_vector(weight: &Matrix, v: &[f32]) -> Result<Vec<f32>, WeightsError> {
    Ok(weight.times(&Matrix { rows: v.len(), cols: 1, data: v.to_vec() })?.data)
}

impl Student<'_> {
    /// The trunk without its head, under `prefix`.
    fn trunk(&self, prefix: &str) -> Result<Tensors<'_>, WeightsError> {
        let head = HeadNames::of(self.backbone, self.image_size)?;
        let own = path_prefix(self.image_path);
        let mut tensors = Tensors::new();
        for p in self.store.params() {
            let Some(name) = p.name.strip_prefix(&own) else { continue };
            if name == head.weight || head.bias.as_deref() == Some(name) {
                continue;
            }
            tensors.insert(format!("{prefix}{name}"), Entry::F32(p.shape.clone(), Cow::Borrowed(&p.data)));
            tensors.extend(batch_counter(&format!("{prefix}{name}"), self.batches));
        }
        if tensors.is_empty() {
            return Err(WeightsError::Export(format!("the store has no parameters under `{}`", self.image_path)));
        }
        Ok(tensors)
    }

    /// The head and the projection as one map.
    fn head(&self) -> Result<Head, WeightsError> {
        let own = |name: &str| join(self.image_path, name);
        let names = HeadNames::of(self.backbone, self.image_size)?;
        let mut bias = names.bias.and_then(|name| Some(self.store.get(&own(&name))?.data.clone()));
        let mut weight = Matrix::read(self.store, &own(&names.weight))?;
        if names.outputs == 1 {
            weight = weight.map(|w| w.transposed());
        }
        let mut mlp = None;
        match self.projection {
            None | Some((Projection { kind: ProjectionKind::None, .. }, _)) => {}
            Some((Projection { kind: ProjectionKind::Linear, .. }, path)) => {
                let projection = matrix(self.store, &join(path, "weight"))?;
                bias = bias.map(|b| times_vector(&projection, &b)).transpose()?;
                weight = Some(match weight {
                    Some(w) => projection.times(&w)?,
                    None => projection,
                });
            }
            Some((Projection { kind: ProjectionKind::Mlp { .. }, .. }, path)) => {
                let mut fc1 = matrix(self.store, &join(path, "fc1.weight"))?;
                let name = join(path, "fc1.bias");
                let mut b1 = self.store.get(&name).ok_or_else(|| missing(&name))?.data.clone();
                if let Some(b) = bias.take() {
                    let shift = times_vector(&fc1, &b)?;
                    b1.iter_mut().zip(shift).for_each(|(b, s)| *b += s);
                }
                if let Some(w) = weight.take() {
                    fc1 = fc1.times(&w)?;
                }
                mlp = Some((fc1, b1, matrix(self.store, &join(path, "fc2.weight"))?));
            }
        }
        Ok(Head { weight, bias, mlp })
    }

    /// A linear head under timm's names, which has a bias.
    fn add_timm_head(
        &self,
        tensors: &mut Tensors<'_>,
        prefix: &str,
        weight: Matrix,
        bias: Option<Vec<f32>>,
    ) -> Result<(), WeightsError> {
        let names = HeadNames::of(self.backbone, self.image_size)?;
        if let Some(name) = names.bias {
            let bias = bias.unwrap_or_else(|| vec![0.0; weight.rows]);
            tensors.insert(format!("{prefix}{name}"), Entry::F32(vec![bias.len()], Cow::Owned(bias)));
        }
        tensors.insert(format!("{prefix}{}", names.weight), weight.entry());
        Ok(())
    }

    fn metadata(&self, form: &str) -> BTreeMap<String, String> {
        metadata(self.backbone, self.image_size, form)
    }
}

/// The metadata of an exported file.
fn metadata(backbone: &dyn Backbone, image_size: usize, form: &str) -> BTreeMap<String, String> {
    let p = backbone.preprocess();
    let text = |v: Value| v.to_string();
    BTreeMap::from([
        ("format".into(), "pt".into()),
        ("mcpipe.form".into(), form.into()),
        ("mcpipe.backbone".into(), backbone.name().into()),
        ("mcpipe.params".into(), text(serde_json::to_value(backbone.params()).unwrap_or_default())),
        ("mcpipe.image_size".into(), image_size.to_string()),
        ("mcpipe.mean".into(), text(json!(p.mean))),
        ("mcpipe.std".into(), text(json!(p.std))),
    ])
}

/// PyTorch's batch norm counts its batches in a buffer that a strict load asks for: its name beside `running_mean`.
fn batch_counter(name: &str, batches: u64) -> Option<(String, Entry<'static>)> {
    let norm = name.strip_suffix("running_mean")?;
    let count = i64::try_from(batches).unwrap_or(i64::MAX);
    Some((format!("{norm}num_batches_tracked"), Entry::I64(Vec::new(), vec![count])))
}

/// Writes the student's trunk as `timm.create_model(name, num_classes=…)` takes it, to `file`.
///
/// # Errors
/// A backbone that timm does not name, a store that lacks its parameters, or a file that can't be written.
pub fn export_timm(student: &Student<'_>, file: &Path) -> Result<TimmExport, WeightsError> {
    let model = student.backbone.name();
    if student.backbone.naming() != Naming::Timm {
        return Err(WeightsError::Export(format!(
            "`{model}` has open_clip's names, not timm's; export it as `open_clip`"
        )));
    }
    let mut tensors = student.trunk("")?;
    let head = student.head()?;
    let projection_left_out = head.mlp.is_some();
    let num_classes = if projection_left_out { 0 } else { head.weight.as_ref().map_or(0, |w| w.rows) };
    if !projection_left_out && let Some(weight) = head.weight {
        student.add_timm_head(&mut tensors, "", weight, head.bias)?;
    }
    write_safetensors(file, &tensors, &student.metadata("timm"))?;
    Ok(TimmExport { file: file.to_owned(), model, num_classes, projection_left_out })
}

/// Writes student and text encoder as one open_clip model (`CustomTextCLIP`: `visual.*`, `text.*`, `logit_scale`) into
/// `directory`, with the configuration from which `open_clip.create_model("local-dir:…")` builds it.
///
/// # Errors
/// A projection that open_clip's towers have no place for, a store that lacks parameters, or files that can't be written.
pub fn export_open_clip(
    student: &Student<'_>,
    text: &StudentText<'_>,
    directory: &Path,
) -> Result<OpenClipExport, WeightsError> {
    let visual = match student.backbone.naming() {
        Naming::Timm => "visual.trunk.",
        Naming::OpenClip => "visual.",
    };
    let mut tensors = student.trunk(visual)?;
    let head = student.head()?;
    let (dim, timm_proj) = match (student.backbone.naming(), head.mlp, head.weight) {
        (Naming::Timm, Some((fc1, b1, fc2)), _) => {
            let dim = fc2.rows;
            if fc1.rows != 2 * dim {
                let message =
                    format!("open_clip's mlp projection is twice its output ({}) wide, not {}", 2 * dim, fc1.rows);
                return Err(WeightsError::Export(message));
            }
            tensors.insert("visual.head.mlp.fc1.bias".into(), Entry::F32(vec![b1.len()], Cow::Owned(b1)));
            tensors.insert("visual.head.mlp.fc1.weight".into(), fc1.entry());
            tensors.insert("visual.head.mlp.fc2.weight".into(), fc2.entry());
            (dim, "mlp")
        }
        (Naming::Timm, None, Some(weight)) => {
            let dim = weight.rows;
            student.add_timm_head(&mut tensors, visual, weight, head.bias)?;
            (dim, "")
        }
        (Naming::Timm, None, None) => (student.backbone.features(), "none"),
        (Naming::OpenClip, Some(_), _) => {
            return Err(WeightsError::Export("open_clip's own image tower has no place for an mlp projection".into()));
        }
        (Naming::OpenClip, None, Some(weight)) => {
            let dim = weight.rows;
            tensors.insert("visual.proj".into(), weight.transposed().entry());
            (dim, "")
        }
        (Naming::OpenClip, None, None) => {
            return Err(WeightsError::Export(
                "open_clip's own image tower ends in a projection, but the student has none".into(),
            ));
        }
    };
    let text_dim = add_text(&mut tensors, student, text)?;
    if text_dim != dim {
        return Err(WeightsError::Export(format!("image embeddings have {dim} values, text embeddings {text_dim}")));
    }
    tensors.insert("logit_scale".into(), Entry::F32(Vec::new(), Cow::Owned(vec![text.logit_scale])));

    let config = open_clip_config(student, text, dim, timm_proj)?;
    fs::create_dir_all(directory).map_err(WeightsError::io(directory, "can't create"))?;
    let (weights, config_file) =
        (directory.join("open_clip_model.safetensors"), directory.join("open_clip_config.json"));
    write_safetensors(&weights, &tensors, &student.metadata("open_clip"))?;
    write_atomic(&config_file, |file| writeln!(file, "{config:#}"))?;
    Ok(OpenClipExport { directory: directory.to_owned(), weights, config: config_file })
}

/// The text tower under `text.`; returns the width of its embedding.
fn add_text<'a>(
    tensors: &mut Tensors<'a>,
    student: &Student<'_>,
    text: &StudentText<'a>,
) -> Result<usize, WeightsError> {
    let own = path_prefix(text.path);
    for p in text.store.params() {
        if let Some(name) = p.name.strip_prefix(&own)
            && name != "text_projection"
        {
            tensors.insert(format!("text.{name}"), Entry::F32(p.shape.clone(), Cow::Borrowed(&p.data)));
        }
    }
    let mut projection = Matrix::read(text.store, &format!("{own}text_projection"))?;
    if text.shared_projection {
        match student.projection {
            Some((Projection { kind: ProjectionKind::Mlp { .. }, .. }, _)) => {
                return Err(WeightsError::Export(
                    "open_clip's text tower has no place for a shared mlp projection".into(),
                ));
            }
            Some((Projection { kind: ProjectionKind::Linear, .. }, path)) => {
                let shared = matrix(student.store, &join(path, "weight"))?.transposed();
                projection = Some(match projection {
                    Some(p) => p.times(&shared)?,
                    None => shared,
                });
            }
            _ => {}
        }
    }
    match projection {
        Some(p) => {
            let dim = p.cols;
            tensors.insert("text.text_projection".into(), p.entry());
            Ok(dim)
        }
        None => Ok(text.encoder.features()),
    }
}

/// open_clip's description of the model, from which it builds it.
fn open_clip_config(
    student: &Student<'_>,
    text: &StudentText<'_>,
    dim: usize,
    timm_proj: &str,
) -> Result<Value, WeightsError> {
    let (t, p) = (text.encoder.params(), student.backbone.preprocess());
    let get = |table: &toml::Table, key: &str| {
        table.get(key).and_then(|v| serde_json::to_value(v).ok()).unwrap_or(Value::Null)
    };
    let quick = |table: &toml::Table| table.get("act").and_then(|a| a.as_str()) == Some("quick_gelu");
    let mut text_cfg = json!({
        "context_length": get(&t, "context_length"),
        "vocab_size": get(&t, "vocab_size"),
        "width": get(&t, "width"),
        "heads": get(&t, "heads"),
        "layers": get(&t, "depth"),
        "mlp_ratio": get(&t, "mlp_ratio"),
    });
    if text.store.get(&join(text.path, "text_projection")).is_none() && !text.shared_projection {
        text_cfg["proj_type"] = json!("none");
    }
    // timm's word for pooling by attention of one query.
    let attention_pool = join(student.image_path, "attn_pool.latent");
    let vision_cfg = match student.backbone.naming() {
        Naming::Timm => json!({
            "timm_model_name": student.backbone.name(),
            "timm_model_pretrained": false,
            "timm_pool": if student.store.get(&attention_pool).is_some() { "map" } else { "avg" },
            "timm_proj": timm_proj,
            "image_size": student.image_size,
        }),
        Naming::OpenClip => {
            let v = student.backbone.params();
            if quick(&v) != quick(&t) {
                let message = "open_clip has one activation for both towers, but image and text differ in `act`";
                return Err(WeightsError::Export(message.into()));
            }
            let size = |key: &str| v.get(key).and_then(toml::Value::as_integer).unwrap_or(1).max(1);
            json!({
                "image_size": student.image_size,
                "patch_size": get(&v, "patch_size"),
                "width": get(&v, "width"),
                "layers": get(&v, "depth"),
                "head_width": size("width") / size("heads"),
                "mlp_ratio": get(&v, "mlp_ratio"),
            })
        }
    };
    let interpolation = match p.interpolation {
        Interpolation::Bicubic => "bicubic",
        Interpolation::Bilinear => "bilinear",
    };
    Ok(json!({
        "model_cfg": {
            "embed_dim": dim,
            "quick_gelu": quick(&t),
            "custom_text": true,
            "vision_cfg": vision_cfg,
            "text_cfg": text_cfg,
        },
        "preprocess_cfg": { "mean": p.mean, "std": p.std, "interpolation": interpolation, "resize_mode": "shortest" },
    }))
}
