//! mcpipe's data: WebDataset shards to decoded, augmented, tokenised batches.
//!
//! The way of one image: [`list_shards`] names the tars, [`SampleSet::open`] scans their headers once into a table of
//! offsets, [`TrainLoader`] shuffles that table, and its threads read a sample, [`decode`] it, choose a
//! [`View`] and resize it for each model; [`model_input`] mixes and normalises a batch for one model.
//! [`EvalSet`] reads an evaluation split in order. [`make_shapes`] writes the embedded default data set, and
//! [`check`] finds what is wrong with any.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod check;
mod decode;
mod entities;
mod error;
mod eval_set;
mod files;
mod from_spec;
mod images;
mod loader;
mod mix;
mod ordered;
pub mod rng;
mod samples;
mod shapes;
mod shards;
mod tar_scan;
mod tokenize;
mod transform;
mod wordpiece;

pub use check::{CheckOptions, Problem, Report, Severity, check};
pub use decode::{DEFAULT_MAX_PIXELS, ImageFormat, RgbImage, decode};
pub use error::{DataError, ImageFault, Result, SampleFault, ShardFault};
pub use eval_set::{
    CLASSNAMES, DATASET_TYPE, DatasetType, EvalBatch, EvalOptions, EvalReader, EvalSet, PLACEHOLDER, TEMPLATES,
    check_template, dataset_type, read_classnames, read_lines, read_templates,
};
pub use from_spec::components;
pub use images::{ImageList, ImageOptions, ImageReader};
pub use loader::{Batch, LoaderOptions, LoaderStats, OnBadSample, TrainLoader, epoch_order};
pub use mix::{CutBox, Mix, MixOptions, MixPolicy, MixTargets, model_input};
pub use rng::Rng;
pub use samples::{BadEntry, Entry, MAX_CAPTION_BYTES, Member, MemberKind, SampleSet, ShardFiles, content_hash};
pub use shapes::{MANIFEST, Manifest, ManifestFile, ShapesParams, make_shapes, shapes_paths};
pub use shards::{MAX_EXPANSION, NSHARDS, expand_braces, index, list_shards, split_shards, tar_files};
pub use tar_scan::{RawMember, TarScan, scan_tar};
pub use tokenize::{END_OF_TEXT, START_OF_TEXT, Tokenizer, Tokens, VOCABULARY, check_context_length, tokenizer};
pub use transform::{Augment, EvalTransform, Filter, ImageForm, Normalize, RandomCrop, Resize, View};
pub use wordpiece::{CaptionTokenizer, WordPiece};
