//! `mcpipe embed`: images and texts to embeddings, and what lies at a backbone's taps.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::ffi::OsString;
use std::path::{Path, PathBuf};

use mcpipe_data::{ImageList, ImageOptions};
use mcpipe_eval::normalize;
use mcpipe_graph::Kernels;
use mcpipe_models::weights::{Entry, write_safetensors};
use mcpipe_models::{Checkpoint, ModelError, TapShape, WeightsError};
use mcpipe_train::{DeviceChoice, Encoder, ImageTower, TrainError};

use crate::error::RunError;
use crate::model::{Model, ModelSource, evaluation_view};
use crate::npy;
use crate::settings::open;
use crate::store::write_file;

/// What is to be embedded.
#[derive(Clone, Debug)]
pub enum Inputs {
    /// Image files, folders, shards.
    Images(Vec<String>),
    /// Texts.
    Texts(Vec<String>),
    /// A file with one tensor `[n, S, S, 3]` or `[n, 3, S, S]`, safetensors or npy, taken as normalised already.
    Raw(PathBuf),
}

/// How.
#[derive(Clone, Debug)]
pub struct EmbedOptions {
    /// Taps whose values are kept beside the embedding.
    pub taps: Vec<String>,
    /// Images of one forward pass.
    pub batch: usize,
    /// Divide each embedding by its L2 norm.
    pub normalize: bool,
    /// Threads that decode.
    pub workers: usize,
    /// What the model runs on.
    pub device: DeviceChoice,
}

impl Default for EmbedOptions {
    fn default() -> Self {
        Self { taps: Vec::new(), batch: 32, normalize: true, workers: 2, device: DeviceChoice::Cpu }
    }
}

/// A tensor `[n, ..]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Rows {
    /// Its shape.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Vec<f32>,
}

impl Rows {
    fn entry(&self) -> Entry<'_> {
        Entry::F32(self.shape.clone(), Cow::Borrowed(&self.values))
    }
}

/// What came out.
#[derive(Clone, Debug, PartialEq)]
pub struct Embeddings {
    /// A name for each input: path, shard and key, the text itself, or the number of a row of a raw tensor.
    pub names: Vec<String>,
    /// `[n, D]`.
    pub embedding: Rows,
    /// Values of the taps, in the order asked, of [`TapShape::shape`]; n inputs are one batch.
    pub taps: Vec<(String, Rows)>,
    /// Whether the embeddings have length 1.
    pub normalized: bool,
    /// Registered name of the backbone.
    pub backbone: String,
}

/// Embeds `inputs`. `tell` hears how many of how many are done.
///
/// # Errors
/// A model that can't be opened or has no such tap, an input that can't be used (named), an embedding without
/// direction.
pub fn embed(
    source: &ModelSource,
    inputs: &Inputs,
    options: &EmbedOptions,
    tell: &dyn Fn(usize, usize),
) -> Result<Embeddings, RunError> {
    let texts = matches!(inputs, Inputs::Texts(_));
    if texts && !options.taps.is_empty() {
        return Err(RunError::Usage("taps lie in the image backbone; texts have none".into()));
    }
    let mut model = Model::open(source, texts, &open(options.device, Kernels::Native)?)?;
    let (names, out) = match inputs {
        Inputs::Texts(texts) => {
            let embedding = embed_texts(&mut model, texts, options.batch, tell)?;
            (texts.clone(), Tapped { embedding, taps: Vec::new() })
        }
        Inputs::Images(paths) => {
            let list = ImageList::open(paths)?;
            (list.names(), embed_images(&model, &list, options, tell)?)
        }
        Inputs::Raw(file) => {
            let (n, images) = raw(file, model.image.image_size)?;
            let mut encoder = ImageEncoder::new(&model, &options.taps, options.batch.min(n))?;
            let mut out = encoder.room();
            let side = model.image.image_size;
            for part in images.chunks(encoder.batch * side * side * 3) {
                encoder.encode(&model, part, &mut out)?;
                tell(out.embedding.len() / model.image.dim().max(1), n);
            }
            ((0..n).map(|row| row.to_string()).collect(), out)
        }
    };
    let n = names.len();
    let mut embedding = Rows { shape: vec![n, out.embedding.len() / n.max(1)], values: out.embedding };
    if let Some(row) = without_direction(&mut embedding, options.normalize) {
        return Err(RunError::Eval(format!("the embedding of `{}` is zero or not finite", names[row])));
    }
    let shapes = tap_shapes(&model, &options.taps)?;
    let taps = shapes.into_iter().zip(out.taps);
    let taps = taps.map(|((name, shape), values)| (name, Rows { shape: shape.shape(n), values })).collect();
    let backbone = model.image.backbone.name().to_owned();
    Ok(Embeddings { names, embedding, taps, normalized: options.normalize, backbone })
}

/// Normalises rows where asked; the first row that has no direction.
fn without_direction(rows: &mut Rows, scale: bool) -> Option<usize> {
    let dim = rows.shape[1].max(1);
    rows.values.chunks_exact_mut(dim).position(
        |row| {
            if scale { !normalize(row) } else { !row.iter().all(|v| v.is_finite()) }
        },
    )
}

fn embed_texts(
    model: &mut Model,
    texts: &[String],
    batch: usize,
    tell: &dyn Fn(usize, usize),
) -> Result<Vec<f32>, RunError> {
    let mut embeddings = Vec::new();
    for (at, part) in texts.chunks(batch.max(1)).enumerate() {
        let part: Vec<&str> = part.iter().map(String::as_str).collect();
        embeddings.extend(model.embed_texts(&part)?);
        tell(at * batch.max(1) + part.len(), texts.len());
    }
    Ok(embeddings)
}

/// Embeddings and taps of images, neither normalised.
pub(crate) struct Tapped {
    /// `[n, D]`.
    pub embedding: Vec<f32>,
    /// Each tap's values.
    pub taps: Vec<Vec<f32>>,
}

/// Reads, prepares and embeds a list of images.
///
/// # Errors
/// An image that can't be used (named), a tap that the backbone lacks, or a node that fails.
pub(crate) fn embed_images(
    model: &Model,
    list: &ImageList,
    options: &EmbedOptions,
    tell: &dyn Fn(usize, usize),
) -> Result<Tapped, RunError> {
    let (transform, to_input) = evaluation_view(&model.image);
    let mut encoder = ImageEncoder::new(model, &options.taps, options.batch.min(list.len()))?;
    let reading = ImageOptions { batch_size: encoder.batch, workers: options.workers, ..ImageOptions::new(transform) };
    let mut out = encoder.room();
    let (mut input, mut done) = (Vec::new(), 0);
    for pixels in list.read(&reading)? {
        let pixels = pixels?;
        input.resize(pixels.len(), 0.0);
        to_input.apply(&pixels, &mut input)?;
        encoder.encode(model, &input, &mut out)?;
        done += pixels.len() / (transform.size * transform.size * 3);
        tell(done, list.len());
    }
    Ok(out)
}

struct ImageEncoder {
    encoder: Encoder,
    batch: usize,
    taps: usize,
}

impl ImageEncoder {
    fn new(model: &Model, taps: &[String], batch: usize) -> Result<Self, RunError> {
        let batch = batch.max(1);
        let encoder = Encoder::tapped(&model.image, taps, batch, &model.store, &model.compute);
        let encoder = encoder.map_err(|error| match error {
            TrainError::Model(error @ ModelError::UnknownTap { .. }) => RunError::Usage(error.to_string()),
            other => RunError::Train(other),
        })?;
        Ok(Self { encoder, batch, taps: taps.len() })
    }

    fn room(&self) -> Tapped {
        Tapped { embedding: Vec::new(), taps: vec![Vec::new(); self.taps] }
    }

    fn encode(&mut self, model: &Model, images: &[f32], out: &mut Tapped) -> Result<(), RunError> {
        let (embedding, taps) = self.encoder.encode_images_and_taps(&model.store, images)?;
        out.embedding.extend(embedding);
        out.taps.iter_mut().zip(taps).for_each(|(all, tap)| all.extend(tap));
        Ok(())
    }
}

fn tap_shapes(model: &Model, taps: &[String]) -> Result<Vec<(String, TapShape)>, RunError> {
    let offered = model.image.taps()?;
    let shape = |name: &String| offered.iter().find(|tap| tap.name == *name).map(|tap| (name.clone(), tap.shape));
    Ok(taps.iter().filter_map(shape).collect())
}

/// Number and values `[n, side, side, 3]` of a raw tensor.
fn raw(path: &Path, side: usize) -> Result<(usize, Vec<f32>), RunError> {
    let refuse = |reason: String| RunError::Usage(format!("{}: {reason}", path.display()));
    let (shape, values) = if has_extension(path, "npy") {
        npy::read(path)?
    } else {
        let file = Checkpoint::open(path).map_err(|error| match error {
            error @ WeightsError::Io { .. } => RunError::Weights(error),
            other => RunError::Usage(other.to_string()),
        })?;
        let names: Vec<&str> = file.names().collect();
        let name = match names[..] {
            [one] => one,
            _ if file.contains("images") => "images",
            _ => {
                let names = names.into_iter().take(5).collect::<Vec<_>>().join("`, `");
                return Err(refuse(format!("one tensor is expected, or one called `images`; there are `{names}`")));
            }
        };
        let shape = file.shape(name).unwrap_or_default().to_vec();
        (shape, file.values(name)?.unwrap_or_default())
    };
    match shape[..] {
        [n, h, w, 3] if n > 0 && h == side && w == side => Ok((n, values)),
        [n, 3, h, w] if n > 0 && h == side && w == side => {
            let plane = side * side;
            let mut channels_last = Vec::with_capacity(values.len());
            for image in values.chunks_exact(3 * plane) {
                for at in 0..plane {
                    channels_last.extend([image[at], image[plane + at], image[2 * plane + at]]);
                }
            }
            Ok((n, channels_last))
        }
        _ => Err(refuse(format!(
            "the tensor is {shape:?}; the model takes [n, {side}, {side}, 3] or [n, 3, {side}, {side}]"
        ))),
    }
}

fn has_extension(path: &Path, extension: &str) -> bool {
    path.extension().is_some_and(|e| e.eq_ignore_ascii_case(extension))
}

/// Form of an output file.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum EmbeddingFile {
    /// `embedding` and the taps by name; `names` (a JSON array), `backbone` and `normalized` in the metadata.
    Safetensors,
    /// The embedding alone, and the names in a text file beside it, one a line.
    Npy,
}

impl EmbeddingFile {
    /// The form that a path's extension asks for, which must have room for `taps`; its folder must be there.
    ///
    /// # Errors
    /// Another extension, taps in an npy file, or no such folder.
    pub fn of(path: &Path, taps: &[String]) -> Result<Self, RunError> {
        let form = if has_extension(path, "safetensors") {
            Self::Safetensors
        } else if has_extension(path, "npy") {
            Self::Npy
        } else {
            let path = path.display();
            return Err(RunError::Usage(format!("{path}: the output is a .safetensors or an .npy file")));
        };
        if form == Self::Npy && !taps.is_empty() {
            return Err(RunError::Usage(
                "an npy file holds the embedding alone; taps go to a .safetensors file".into(),
            ));
        }
        match path.parent() {
            Some(folder) if !folder.as_os_str().is_empty() && !folder.is_dir() => {
                Err(RunError::Usage(format!("{}: there is no folder {}", path.display(), folder.display())))
            }
            _ => Ok(form),
        }
    }
}

impl Embeddings {
    /// Writes a file whole or not at all. Returns the file of names beside an npy.
    ///
    /// # Errors
    /// The file can't be written.
    pub fn write(&self, path: &Path, form: EmbeddingFile) -> Result<Option<PathBuf>, RunError> {
        match form {
            EmbeddingFile::Safetensors => {
                let mut tensors = BTreeMap::from([("embedding".to_owned(), self.embedding.entry())]);
                tensors.extend(self.taps.iter().map(|(name, rows)| (name.clone(), rows.entry())));
                let metadata = BTreeMap::from([
                    ("backbone".to_owned(), self.backbone.clone()),
                    ("names".to_owned(), serde_json::json!(self.names).to_string()),
                    ("normalized".to_owned(), self.normalized.to_string()),
                ]);
                write_safetensors(path, &tensors, &metadata)?;
                Ok(None)
            }
            EmbeddingFile::Npy => {
                let mut name = OsString::from(path.as_os_str());
                name.push(".txt");
                let beside = PathBuf::from(name);
                let lines: String = self.names.iter().map(|name| name.replace(['\n', '\r'], " ") + "\n").collect();
                write_file(&beside, lines.as_bytes())?;
                npy::write(path, &self.embedding.shape, &self.embedding.values)?;
                Ok(Some(beside))
            }
        }
    }
}
