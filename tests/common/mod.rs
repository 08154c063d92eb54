//! What the tests of the binary share: a folder of their own, a tiny pipeline, data sets that are wrong on purpose.

#![allow(dead_code, reason = "each test file uses its own part")]

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use snapbox::cmd::Command;
use tempfile::TempDir;

/// A pipeline that runs in seconds: few samples, tiny models, a handful of steps.
pub const TINY: &str = r#"version = 1
name = "tiny"

[data.make]
kind = "shapes"
train = 48
eval = 16
image_size = 32

[[teacher]]
name = "clip"
kind = "train"
image = { backbone = "vit", image_size = 32, params = { patch_size = 16, width = 16, depth = 1, heads = 2 } }
text = { encoder = "transformer", params = { width = 16, depth = 1, heads = 2, context_length = 12, frozen_embedding = true } }
dim = 16
training = { steps = 2, batch_size = 8 }

[student]
backbone = "mobilevit_xxs"
image_size = 64
baseline = true

[text]
teacher = "clip"

[projection]
kind = "linear"

[[distill]]
level = "logits"

[optimizer]
kind = "adamw"
lr = 1e-3

[schedule]
kind = "cosine"

[training]
steps = 3
batch_size = 8
log_every = 1

[[eval]]
name = "zero_shot"
kind = "zero_shot"
templates = ["a photo of a {c}"]
"#;

/// A folder for one test, with the tiny pipeline in `tiny.toml`.
pub struct Bench {
    dir: TempDir,
}

impl Bench {
    /// A fresh folder.
    pub fn new() -> Self {
        let dir = tempfile::tempdir().expect("a temporary folder");
        let bench = Self { dir };
        bench.write("tiny.toml", TINY);
        bench
    }

    /// The folder.
    pub fn path(&self) -> &Path {
        self.dir.path()
    }

    /// Writes a file below the folder.
    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> PathBuf {
        let path = self.path().join(name);
        fs::create_dir_all(path.parent().expect("a folder")).expect("folders");
        fs::write(&path, content).expect("written");
        path
    }

    /// The tiny pipeline with one text replaced by another, as `name`.
    pub fn variant(&self, name: &str, from: &str, to: &str) {
        assert!(TINY.contains(from), "`{from}` is not in the pipeline");
        self.write(name, TINY.replacen(from, to, 1));
    }

    /// `mcpipe` in this folder, with arguments.
    pub fn mcpipe(&self, args: &[&str]) -> Command {
        Command::new(snapbox::cmd::cargo_bin!("mcpipe"))
            .current_dir(self.path())
            .env_remove("MCPIPE_STORE")
            .env("MCPIPE_DEVICE", "cpu")
            .env("NO_COLOR", "1")
            .args(args)
    }

    /// Runs `mcpipe` and gives its exit code, standard output and standard error.
    pub fn output(&self, args: &[&str]) -> (i32, String, String) {
        let output = self.mcpipe(args).output().expect("mcpipe starts");
        let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
        (output.status.code().unwrap_or(-1), text(output.stdout), text(output.stderr))
    }
}

/// One sample of a shard: key, and members as extension and bytes.
pub type Sample<'a> = (&'a str, &'a [(&'a str, &'a [u8])]);

/// A sample that owns its members.
pub type OwnedSample = (String, Vec<(&'static str, Vec<u8>)>);

/// A tar of samples.
pub fn shard(samples: &[Sample<'_>]) -> Vec<u8> {
    let mut tar = tar::Builder::new(Vec::new());
    for (key, members) in samples {
        for (extension, bytes) in *members {
            let mut header = tar::Header::new_ustar();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o644);
            tar.append_data(&mut header, format!("{key}.{extension}"), *bytes).expect("appended");
        }
    }
    tar.into_inner().expect("closed")
}

/// A PNG of one colour.
pub fn png(side: u32) -> Vec<u8> {
    let mut bytes = Vec::new();
    let mut encoder = png::Encoder::new(&mut bytes, side, side);
    encoder.set_color(png::ColorType::Rgb);
    let mut writer = encoder.write_header().expect("header");
    writer.write_image_data(&vec![90; (side * side * 3) as usize]).expect("pixels");
    writer.finish().expect("finished");
    bytes
}

/// A PNG whose header declares 30,000 x 30,000 pixels, with next to nothing behind it.
pub fn huge_png() -> Vec<u8> {
    let mut bytes = png(1);
    // IHDR: width and height stand at 16..24, the checksum of the chunk at 29..33.
    bytes[16..20].copy_from_slice(&30_000_u32.to_be_bytes());
    bytes[20..24].copy_from_slice(&30_000_u32.to_be_bytes());
    let crc = crc32(&bytes[12..29]);
    bytes[29..33].copy_from_slice(&crc.to_be_bytes());
    bytes
}

fn crc32(bytes: &[u8]) -> u32 {
    !bytes.iter().fold(!0u32, |crc, &byte| {
        (0..8).fold(crc ^ u32::from(byte), |crc, _| if crc & 1 == 1 { crc >> 1 ^ 0xedb8_8320 } else { crc >> 1 })
    })
}

/// Writes a labelled set in CLIP_benchmark's layout with two classes: `test/0.tar` and `train/0.tar` of `samples`.
pub fn labelled_set(bench: &Bench, samples: &[Sample<'_>]) {
    bench.write("set/classnames.txt", "red square\nblue circle\n");
    bench.write("set/zeroshot_classification_templates.txt", "a photo of a {c}\n");
    for split in ["train", "test"] {
        bench.write(&format!("set/{split}/nshards.txt"), "1");
        bench.write(&format!("set/{split}/0.tar"), shard(samples));
    }
}

/// Eight good samples of the two classes.
pub fn good_samples() -> Vec<OwnedSample> {
    let sample = |i: usize| -> OwnedSample {
        let class = if i.is_multiple_of(2) { "0" } else { "1" };
        let caption = if i.is_multiple_of(2) { "a red square" } else { "a blue circle" };
        let members = vec![("cls", class.into()), ("png", png(8 + i as u32)), ("txt", caption.into())];
        (format!("s{i:07}"), members)
    };
    (0..8).map(sample).collect()
}

/// Borrows samples in the form that [`shard`] takes.
pub fn borrowed<T>(samples: &[OwnedSample], then: impl FnOnce(&[Sample<'_>]) -> T) -> T {
    let members: Vec<Vec<(&str, &[u8])>> =
        samples.iter().map(|(_, m)| m.iter().map(|(e, b)| (*e, b.as_slice())).collect()).collect();
    let list: Vec<Sample<'_>> =
        samples.iter().zip(&members).map(|((key, _), m)| (key.as_str(), m.as_slice())).collect();
    then(&list)
}

/// Header of a safetensors file and where its tensors start.
fn safetensors(bytes: &[u8]) -> (Value, usize) {
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    (serde_json::from_slice(&bytes[8..8 + header]).expect("JSON"), 8 + header)
}

/// Shape and values of an f32 tensor in a safetensors file.
pub fn tensor(file: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = fs::read(file).expect("a file");
    let (header, start) = safetensors(&bytes);
    let at = |i: usize| header[name]["data_offsets"][i].as_u64().expect("a tensor") as usize + start;
    let shape = header[name]["shape"].as_array().expect("a shape").iter().map(|d| d.as_u64().expect("a size") as usize);
    (shape.collect(), bytes[at(0)..at(1)].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect())
}

/// A word of a safetensors file's metadata.
pub fn metadata(file: &Path, key: &str) -> String {
    let (header, _) = safetensors(&fs::read(file).expect("a file"));
    header["__metadata__"][key].as_str().expect("a word").to_owned()
}
