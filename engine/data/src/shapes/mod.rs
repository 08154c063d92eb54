//! The embedded default data set: rendered coloured shapes with captions, written as real WebDataset shards in
//! CLIP_benchmark's layout and read back like any other set.
//!
//! A class is a colour and a shape (48 of them, balanced). What makes it more than a lookup: colours jitter into each
//! other, shapes are small, rotated, partly hidden, among smaller shapes, under noise. The caption tells the class and
//! often the size, the place, the background.

mod render;

use std::fs::{self, File};
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::error::{DataError, Result};
use crate::eval_set::{CLASSNAMES, TEMPLATES};
use crate::files::TemporaryDir;
use crate::rng::Rng;
use crate::shards::NSHARDS;
use render::{CLASSES, Scene, class_name, render};

/// Rises when the same parameters give other bytes.
const VERSION: u32 = 1;
const SAMPLES_PER_SHARD: usize = 1024;

/// File that lists what was made, beside the splits.
pub const MANIFEST: &str = "manifest.json";

/// Prompt templates of the set.
const PROMPTS: [&str; 4] = ["a photo of a {c}", "a {c}", "there is a {c} in the picture", "a drawing of a {c}"];

/// Rendered coloured shapes with captions.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize, schemars::JsonSchema)]
#[serde(deny_unknown_fields, default)]
pub struct ShapesParams {
    /// Samples to train on.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub train: usize,
    /// Samples to evaluate on; a multiple of 48 has every class equally often.
    #[schemars(range(min = 1, max = 10_000_000))]
    pub eval: usize,
    /// Side of an image in pixels.
    #[schemars(range(min = 16, max = 1024))]
    pub image_size: usize,
    /// 0 (large, clean shapes) to 1 (small, hidden, noisy ones).
    #[schemars(range(min = 0.0, max = 1.0))]
    pub difficulty: f64,
}

impl Default for ShapesParams {
    fn default() -> Self {
        Self { train: 4096, eval: 720, image_size: 64, difficulty: 0.5 }
    }
}

impl ShapesParams {
    /// Checks ranges.
    ///
    /// # Errors
    /// [`DataError::Option`].
    pub fn check(&self) -> Result<()> {
        for (name, count) in [("train", self.train), ("eval", self.eval)] {
            if !(1..=10_000_000).contains(&count) {
                return Err(DataError::Option(format!("shapes.{name} {count}: expected 1 to 10000000")));
            }
        }
        if !(16..=1024).contains(&self.image_size) {
            return Err(DataError::Option(format!("shapes.image_size {}: expected 16 to 1024", self.image_size)));
        }
        if !(0.0..=1.0).contains(&self.difficulty) {
            return Err(DataError::Option(format!("shapes.difficulty {}: expected 0 to 1", self.difficulty)));
        }
        Ok(())
    }
}

/// What was made: enough to make it again, and to notice a change.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Manifest {
    /// "shapes".
    pub maker: String,
    /// Version of the maker.
    pub version: u32,
    /// Seed.
    pub seed: u64,
    /// Parameters.
    pub params: ShapesParams,
    /// Every file with its size in bytes and BLAKE3 hash, in order of path.
    pub files: Vec<ManifestFile>,
    /// BLAKE3 over paths and hashes of all files, hex.
    pub content_hash: String,
}

/// One file of a data set.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ManifestFile {
    /// Path below the data set's directory, with `/`.
    pub path: String,
    /// Size in bytes.
    pub bytes: u64,
    /// BLAKE3, hex.
    pub blake3: String,
}

impl Manifest {
    /// Reads the manifest of the data set at `dir`; `None` when it has none.
    ///
    /// # Errors
    /// [`DataError::Read`], [`DataError::Line`] when it does not parse.
    pub fn read(dir: &Path) -> Result<Option<Self>> {
        let path = dir.join(MANIFEST);
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(e) => return Err(DataError::read(&path, e)),
        };
        serde_json::from_slice(&bytes).map(Some).map_err(|e| DataError::Line {
            path,
            line: e.line().max(1),
            reason: e.to_string(),
        })
    }

    /// Checks that every file is there with its size and, with `hashes`, its content.
    ///
    /// # Errors
    /// [`DataError::Read`] for a file that is missing, [`DataError::Exists`] for one that differs.
    pub fn verify(&self, dir: &Path, hashes: bool) -> Result<()> {
        self.files.par_iter().try_for_each(|entry| {
            let path = dir.join(&entry.path);
            let length = fs::metadata(&path).map_err(|e| DataError::read(&path, e))?.len();
            let same = length == entry.bytes && (!hashes || hash_file(&path)? == entry.blake3);
            if same { Ok(()) } else { Err(DataError::Exists { path, reason: "differs from its manifest".into() }) }
        })
    }
}

fn hash_file(path: &Path) -> Result<String> {
    let mut hasher = blake3::Hasher::new();
    let mut file = File::open(path).map_err(|e| DataError::read(path, e))?;
    std::io::copy(&mut file, &mut hasher).map_err(|e| DataError::read(path, e))?;
    Ok(hasher.finalize().to_hex().to_string())
}

/// Makes the data set at `dir`: `train/` and `test/` with numbered shards and `nshards.txt`, `classnames.txt`,
/// `zeroshot_classification_templates.txt`, `manifest.json`. All is written beside `dir` and renamed at the end, so
/// `dir` is either whole or not there. The same set that is there already is left as it is.
///
/// `progress(done, total)` is called from time to time with numbers of samples.
///
/// # Errors
/// [`DataError::Option`], [`DataError::Write`] with the path, [`DataError::Exists`] when `dir` holds something else.
pub fn make_shapes(
    dir: &Path,
    params: &ShapesParams,
    seed: u64,
    progress: &mut dyn FnMut(usize, usize),
) -> Result<Manifest> {
    params.check()?;
    if dir.exists() {
        return reuse(dir, params, seed);
    }
    let temporary = TemporaryDir::beside(dir)?;
    let mut writer = SetWriter { root: temporary.path(), files: Vec::new() };
    let total = params.train + params.eval;
    let mut done = 0;
    for (split, samples) in [("train", params.train), ("test", params.eval)] {
        let order = Rng::new(seed, &format!("shapes/{split}/classes"), 0, 0).permutation(samples);
        fs::create_dir(writer.root.join(split)).map_err(|e| DataError::write(&writer.root.join(split), e))?;
        for (shard, classes) in order.chunks(SAMPLES_PER_SHARD).enumerate() {
            let first = shard * SAMPLES_PER_SHARD;
            let made: Vec<Result<Sample>> = classes
                .par_iter()
                .enumerate()
                .map(|(i, &n)| Sample::make(params, seed, split, first + i, n as usize % CLASSES))
                .collect();
            writer.shard(&format!("{split}/{shard}.tar"), first, made)?;
            done += classes.len();
            progress(done, total);
        }
        let shards = samples.div_ceil(SAMPLES_PER_SHARD);
        writer.file(&format!("{split}/{NSHARDS}"), format!("{shards}\n").as_bytes())?;
    }
    let names: String = (0..CLASSES).map(|c| class_name(c) + "\n").collect();
    writer.file(CLASSNAMES, names.as_bytes())?;
    writer.file(TEMPLATES, (PROMPTS.join("\n") + "\n").as_bytes())?;

    let mut files = writer.files;
    files.sort_by(|a, b| a.path.cmp(&b.path));
    let mut hasher = blake3::Hasher::new();
    for file in &files {
        hasher.update(file.path.as_bytes());
        hasher.update(b"\0");
        hasher.update(file.blake3.as_bytes());
    }
    let manifest = Manifest {
        maker: "shapes".into(),
        version: VERSION,
        seed,
        params: *params,
        files,
        content_hash: hasher.finalize().to_hex().to_string(),
    };
    let path = temporary.path().join(MANIFEST);
    let text =
        serde_json::to_string_pretty(&manifest).map_err(|e| DataError::write(&path, std::io::Error::other(e)))?;
    write_synced(&path, text.as_bytes())?;
    temporary.keep_as(dir)?;
    Ok(manifest)
}

/// The set at `dir` when it is the one asked for.
fn reuse(dir: &Path, params: &ShapesParams, seed: u64) -> Result<Manifest> {
    let differs = |reason: &str| DataError::Exists { path: dir.to_owned(), reason: reason.into() };
    let manifest = Manifest::read(dir)?.ok_or_else(|| differs("has no manifest.json"))?;
    if (manifest.version, manifest.seed, manifest.params) != (VERSION, seed, *params) {
        return Err(differs("was made with other parameters"));
    }
    manifest.verify(dir, false)?;
    Ok(manifest)
}

/// The encoded members of one sample.
struct Sample {
    png: Vec<u8>,
    caption: String,
    class: usize,
    json: Vec<u8>,
}

impl Sample {
    fn make(params: &ShapesParams, seed: u64, split: &str, index: usize, class: usize) -> Result<Self> {
        let mut rng = Rng::new(seed, &format!("shapes/{split}"), 0, index as u64);
        let (pixels, scene) = render(class, params.image_size, params.difficulty as f32, &mut rng);
        let encode = |e: &dyn std::fmt::Display| DataError::Option(format!("encoding sample {index}: {e}"));
        let png = encode_png(&pixels, params.image_size).map_err(|e| encode(&e))?;
        let json = serde_json::to_vec(&scene).map_err(|e| encode(&e))?;
        Ok(Self { png, caption: caption(&scene, &mut rng), class, json })
    }
}

fn encode_png(pixels: &[u8], side: usize) -> Result<Vec<u8>, png::EncodingError> {
    let mut bytes = Vec::with_capacity(pixels.len());
    let mut encoder = png::Encoder::new(&mut bytes, side as u32, side as u32);
    encoder.set_color(png::ColorType::Rgb);
    encoder.set_depth(png::BitDepth::Eight);
    encoder.set_compression(png::Compression::Fast);
    let mut writer = encoder.write_header()?;
    writer.write_image_data(pixels)?;
    writer.finish()?;
    Ok(bytes)
}

/// A sentence about a scene; every word in it is true.
fn caption(scene: &Scene, rng: &mut Rng) -> String {
    let Scene { shape, color, background, size, .. } = scene;
    let sized = if size.is_empty() { format!("a {color} {shape}") } else { format!("a {size} {color} {shape}") };
    let third = |v: f32, low: &'static str, high: &'static str| match v {
        v if v < 0.4 => low,
        v if v > 0.6 => high,
        _ => "",
    };
    let place = match (third(scene.center[1], "top", "bottom"), third(scene.center[0], "left", "right")) {
        ("", "") => "in the middle".to_owned(),
        ("", side) => format!("on the {side}"),
        (side, "") => format!("at the {side}"),
        (vertical, side) => format!("at the {vertical} {side}"),
    };
    match rng.below(10) {
        0 | 1 => format!("a photo of a {color} {shape}"),
        2 => format!("a photo of {sized}"),
        3 => format!("there is a {color} {shape} in the picture"),
        4 => format!("{sized} on a {background} background"),
        5 => format!("a {color} {shape} {place}"),
        6 => format!("{sized} {place} on a {background} background"),
        7 => format!("a drawing of a {color} {shape}"),
        8 if scene.occluded => format!("a partly hidden {color} {shape}"),
        8 if scene.noise > 0.08 => format!("a noisy picture of a {color} {shape}"),
        8 => format!("a clear picture of a {color} {shape}"),
        _ if scene.distractors > 0 => format!("{sized} among small shapes"),
        _ => format!("{sized} alone"),
    }
}

/// Writes files below a directory and remembers their hashes.
struct SetWriter<'a> {
    root: &'a Path,
    files: Vec<ManifestFile>,
}

impl SetWriter<'_> {
    fn file(&mut self, path: &str, bytes: &[u8]) -> Result<()> {
        write_synced(&self.root.join(path), bytes)?;
        self.files.push(ManifestFile {
            path: path.to_owned(),
            bytes: bytes.len() as u64,
            blake3: blake3::hash(bytes).to_hex().to_string(),
        });
        Ok(())
    }

    fn shard(&mut self, path: &str, first: usize, samples: Vec<Result<Sample>>) -> Result<()> {
        let full = self.root.join(path);
        let fail = |e| DataError::write(&full, e);
        let sink = Hashing { inner: File::create(&full).map_err(fail)?, hasher: blake3::Hasher::new(), bytes: 0 };
        let mut tar = tar::Builder::new(BufWriter::with_capacity(1 << 18, sink));
        for (i, sample) in samples.into_iter().enumerate() {
            let sample = sample?;
            let key = format!("s{:07}", first + i);
            let class = sample.class.to_string();
            let members: [(&str, &[u8]); 4] = [
                ("cls", class.as_bytes()),
                ("json", &sample.json),
                ("png", &sample.png),
                ("txt", sample.caption.as_bytes()),
            ];
            for (extension, bytes) in members {
                let mut header = tar::Header::new_ustar();
                header.set_size(bytes.len() as u64);
                header.set_mode(0o644);
                // Times and owners would make the same set differ from run to run.
                header.set_mtime(0);
                tar.append_data(&mut header, format!("{key}.{extension}"), bytes).map_err(fail)?;
            }
        }
        let buffered = tar.into_inner().map_err(fail)?;
        let sink = buffered.into_inner().map_err(|e| fail(e.into_error()))?;
        sink.inner.sync_all().map_err(fail)?;
        self.files.push(ManifestFile {
            path: path.to_owned(),
            bytes: sink.bytes,
            blake3: sink.hasher.finalize().to_hex().to_string(),
        });
        Ok(())
    }
}

struct Hashing {
    inner: File,
    hasher: blake3::Hasher,
    bytes: u64,
}

impl Write for Hashing {
    fn write(&mut self, buf: &[u8]) -> std::io::Result<usize> {
        let n = self.inner.write(buf)?;
        self.hasher.update(&buf[..n]);
        self.bytes += n as u64;
        Ok(n)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.inner.flush()
    }
}

fn write_synced(path: &Path, bytes: &[u8]) -> Result<()> {
    File::create(path)
        .and_then(|mut f| f.write_all(bytes).and_then(|()| f.sync_all()))
        .map_err(|e| DataError::write(path, e))
}

/// Where the splits of a made set lie: the training shards and the evaluation root.
pub fn shapes_paths(dir: &Path) -> (PathBuf, PathBuf) {
    (dir.join("train"), dir.to_owned())
}
