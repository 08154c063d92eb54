//! Evaluation sets in CLIP_benchmark's layout: classes, templates, shards, and their samples in order.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::decode::{DEFAULT_MAX_PIXELS, decode};
use crate::error::{DataError, Result, SampleFault};
use crate::loader::OnBadSample;
use crate::ordered::{Job, Ordered, StopFlag};
use crate::samples::{SampleSet, ShardFiles};
use crate::shards::split_shards;
use crate::transform::{EvalTransform, Resize};

/// File with one class name a line.
pub const CLASSNAMES: &str = "classnames.txt";
/// File with one prompt template a line.
pub const TEMPLATES: &str = "zeroshot_classification_templates.txt";
/// File with the kind of data set.
pub const DATASET_TYPE: &str = "dataset_type.txt";
/// The placeholder of a template.
pub const PLACEHOLDER: &str = "{c}";

/// What an evaluation set is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
#[serde(rename_all = "snake_case")]
pub enum DatasetType {
    /// One class index per image.
    Classification,
    /// Captions per image.
    Retrieval,
}

/// An evaluation split.
#[derive(Debug, Clone)]
pub struct EvalSet {
    /// The directory given.
    pub root: PathBuf,
    /// The split, such as "test".
    pub split: String,
    /// Its kind.
    pub kind: DatasetType,
    /// Names of the classes, by class index; empty for retrieval.
    pub classnames: Vec<String>,
    /// Prompt templates, each with `{c}`; empty for retrieval.
    pub templates: Vec<String>,
    /// Its samples.
    pub samples: Arc<SampleSet>,
}

impl EvalSet {
    /// Opens `root/split`. `templates` stand in for the file of the set when given.
    ///
    /// # Errors
    /// [`DataError::MissingFile`], [`DataError::Line`] (a template without `{c}`, an empty class name),
    /// [`DataError::MissingNshards`], [`DataError::BadNshards`], [`DataError::MissingShards`], [`DataError::Shard`],
    /// [`DataError::Read`], [`DataError::Option`] for templates given or a multilabel set.
    pub fn open(root: &Path, split: &str, templates: Option<&[String]>) -> Result<Self> {
        if !root.is_dir() {
            return Err(DataError::MissingFile { path: root.to_owned(), what: "the directory of an evaluation set" });
        }
        let kind = dataset_type(root)?;
        let (classnames, templates) = match kind {
            DatasetType::Retrieval => (Vec::new(), Vec::new()),
            DatasetType::Classification => (
                read_classnames(root)?,
                match templates {
                    Some(given) => {
                        check_templates(given)?;
                        given.to_vec()
                    }
                    None => read_templates(root)?,
                },
            ),
        };
        let samples = SampleSet::open(split_shards(&root.join(split))?)?;
        Ok(Self {
            root: root.to_owned(),
            split: split.to_owned(),
            kind,
            classnames,
            templates,
            samples: Arc::new(samples),
        })
    }

    /// Every prompt, class after class: `[classes, templates]`, row-major.
    pub fn prompts(&self) -> Vec<String> {
        self.classnames
            .iter()
            .flat_map(|class| self.templates.iter().map(move |t| t.replace(PLACEHOLDER, class)))
            .collect()
    }

    /// Starts reading the split in order.
    ///
    /// # Errors
    /// [`DataError::Option`]; [`DataError::Sample`] or [`DataError::TooManyBadSamples`] for samples that the scan
    /// found bad; [`DataError::NoShards`] for a split without a usable sample.
    pub fn read(&self, options: &EvalOptions) -> Result<EvalReader> {
        EvalReader::start(self, options)
    }
}

/// Options of reading an evaluation split.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalOptions {
    /// Rows of a batch; the last batch may have fewer.
    pub batch_size: usize,
    /// One transform per model.
    pub transforms: Vec<EvalTransform>,
    /// What to do with bad samples. Skipped ones are left out and counted.
    pub on_bad_sample: OnBadSample,
    /// Threads that decode.
    pub workers: usize,
    /// Pixel budget of one image.
    pub max_pixels: u64,
}

impl EvalOptions {
    /// Options with defaults: batches of 64, two threads, a bad sample is an error.
    pub fn new(transforms: Vec<EvalTransform>) -> Self {
        Self {
            batch_size: 64,
            transforms,
            on_bad_sample: OnBadSample::Fail,
            workers: 2,
            max_pixels: DEFAULT_MAX_PIXELS,
        }
    }
}

/// Some samples of an evaluation split.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalBatch {
    /// Each row's index in [`SampleSet::entries`].
    pub samples: Vec<u32>,
    /// Each row's key.
    pub keys: Vec<String>,
    /// RGB bytes `[rows, size, size, 3]`, one vector per transform.
    pub images: Vec<Vec<u8>>,
    /// Each row's class index; `None` for retrieval.
    pub class: Vec<Option<u32>>,
    /// Each row's captions (lines of its text); empty for a classification sample without text.
    pub captions: Vec<Vec<String>>,
}

impl EvalBatch {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }
}

/// Reads a split batch by batch, in order; an iterator over `Result<EvalBatch>`. Dropping it stops its threads.
pub struct EvalReader {
    stream: Ordered<(EvalBatch, Vec<String>)>,
    bad: usize,
    first_bad: Vec<String>,
    max_bad: Option<usize>,
}

const FIRST_BAD: usize = 5;

impl EvalReader {
    fn start(set: &EvalSet, options: &EvalOptions) -> Result<Self> {
        if options.batch_size == 0 || options.workers == 0 || options.transforms.is_empty() {
            return Err(DataError::Option("evaluation: batch size, workers and transforms must not be zero".into()));
        }
        options.transforms.iter().try_for_each(EvalTransform::check)?;
        let max_bad = match options.on_bad_sample {
            OnBadSample::Fail => None,
            OnBadSample::Skip { max } => Some(max),
        };
        if set.samples.is_empty() {
            let error = set.samples.bad_errors().next();
            return Err(error.unwrap_or_else(|| {
                DataError::NoShards(format!("{} has no samples", set.root.join(&set.split).display()))
            }));
        }
        let batches = set.samples.len().div_ceil(options.batch_size) as u64;
        let jobs = (0..options.workers)
            .map(|_| {
                let mut maker = EvalMaker {
                    set: set.clone(),
                    options: options.clone(),
                    files: ShardFiles::default(),
                    resize: Resize::default(),
                };
                Box::new(move |i: u64, stop: &StopFlag| maker.batch(i, stop)) as Job<_>
            })
            .collect();
        let mut reader = Self {
            stream: Ordered::start(jobs, options.workers * 2, 0, batches)?,
            bad: 0,
            first_bad: Vec::new(),
            max_bad,
        };
        for error in set.samples.bad_errors() {
            if max_bad.is_none() {
                return Err(error);
            }
            reader.note(error.to_string());
        }
        reader.check_cap()?;
        Ok(reader)
    }

    fn note(&mut self, message: String) {
        tracing::warn!("bad sample: {message}");
        self.bad += 1;
        if self.first_bad.len() < FIRST_BAD {
            self.first_bad.push(message);
        }
    }

    fn check_cap(&self) -> Result<()> {
        match self.max_bad {
            Some(max) if self.bad > max => {
                Err(DataError::TooManyBadSamples { count: self.bad, max, first: self.first_bad.clone() })
            }
            _ => Ok(()),
        }
    }

    /// Samples left out so far.
    pub fn bad_samples(&self) -> usize {
        self.bad
    }

    /// Messages of the first few samples left out.
    pub fn first_bad(&self) -> &[String] {
        &self.first_bad
    }
}

impl Iterator for EvalReader {
    type Item = Result<EvalBatch>;

    /// The next batch; `None` at the end and after an error. A batch whose samples are all skipped is left out.
    fn next(&mut self) -> Option<Self::Item> {
        loop {
            let (batch, bad) = match self.stream.next()? {
                Ok(made) => made,
                Err(e) => return Some(Err(e)),
            };
            bad.into_iter().for_each(|m| self.note(m));
            if let Err(e) = self.check_cap() {
                return Some(Err(e));
            }
            if !batch.is_empty() {
                return Some(Ok(batch));
            }
        }
    }
}

struct EvalMaker {
    set: EvalSet,
    options: EvalOptions,
    files: ShardFiles,
    resize: Resize,
}

impl EvalMaker {
    fn batch(&mut self, number: u64, stop: &StopFlag) -> Result<(EvalBatch, Vec<String>)> {
        let samples = self.set.samples.clone();
        let first = number as usize * self.options.batch_size;
        let last = (first + self.options.batch_size).min(samples.len());
        let mut batch = EvalBatch {
            samples: Vec::with_capacity(last - first),
            keys: Vec::with_capacity(last - first),
            images: self
                .options
                .transforms
                .iter()
                .map(|t| Vec::with_capacity((last - first) * t.size * t.size * 3))
                .collect(),
            class: Vec::with_capacity(last - first),
            captions: Vec::with_capacity(last - first),
        };
        let mut bad = Vec::new();
        for index in first..last {
            if stop.is_set() {
                return Err(DataError::Worker("stopped".into()));
            }
            match self.row(index, &mut batch) {
                Ok(()) => {
                    batch.samples.push(index as u32);
                    batch.keys.push(samples.entries()[index].key.to_string());
                }
                Err(fault) => {
                    let error = samples.fault(index, fault);
                    if self.options.on_bad_sample == OnBadSample::Fail {
                        return Err(error);
                    }
                    bad.push(error.to_string());
                }
            }
        }
        Ok((batch, bad))
    }

    fn row(&mut self, index: usize, batch: &mut EvalBatch) -> Result<(), SampleFault> {
        let samples = &self.set.samples;
        let class = samples.read_class(index, &mut self.files)?;
        let text = samples.read_text(index, &mut self.files)?;
        check_labels(self.set.kind, &self.set.classnames, class, text.as_deref())?;
        let encoded = samples.read_image(index, &mut self.files)?;
        let image = decode(&encoded, self.options.max_pixels)?;
        let rows = batch.class.len();
        for (pixels, transform) in batch.images.iter_mut().zip(&self.options.transforms) {
            let bytes = transform.size * transform.size * 3;
            pixels.resize((rows + 1) * bytes, 0);
            self.resize
                .eval(&image, transform, &mut pixels[rows * bytes..])
                .map_err(|e| SampleFault::Read(e.to_string()))?;
        }
        batch.class.push(class);
        batch.captions.push(text.as_deref().map(caption_lines).unwrap_or_default());
        Ok(())
    }
}

/// What the kind of data set asks of a sample's labels.
pub(crate) fn check_labels(
    kind: DatasetType,
    classnames: &[String],
    class: Option<u32>,
    text: Option<&str>,
) -> Result<(), SampleFault> {
    match kind {
        DatasetType::Retrieval if text.is_none() => Err(SampleFault::NoCaption),
        DatasetType::Retrieval => Ok(()),
        DatasetType::Classification => match class {
            None => Err(SampleFault::NoClass),
            Some(class) if class as usize >= classnames.len() => {
                Err(SampleFault::ClassOutOfRange { class, classes: classnames.len() })
            }
            Some(_) => Ok(()),
        },
    }
}

/// Captions of a text member: its lines that hold something.
fn caption_lines(text: &str) -> Vec<String> {
    text.lines().map(str::trim).filter(|l| !l.is_empty()).map(str::to_owned).collect()
}

/// The kind of the set at `root`: classification unless `dataset_type.txt` says otherwise.
///
/// # Errors
/// [`DataError::Line`] for a kind that is not known, [`DataError::Read`].
pub fn dataset_type(root: &Path) -> Result<DatasetType> {
    let path = root.join(DATASET_TYPE);
    if !path.exists() {
        return Ok(DatasetType::Classification);
    }
    let lines = read_lines(&path, "the kind of data set")?;
    let reason = match lines.first().map(String::as_str).unwrap_or_default() {
        "" | "classification" => return Ok(DatasetType::Classification),
        "retrieval" => return Ok(DatasetType::Retrieval),
        "multilabel" => "multilabel sets are not supported".to_owned(),
        other => format!("`{other}`: expected `classification` or `retrieval`"),
    };
    Err(DataError::Line { path, line: 1, reason })
}

/// The class names of the set at `root`, by class index.
///
/// # Errors
/// [`DataError::MissingFile`], [`DataError::Line`] for an empty line between names or an empty file.
pub fn read_classnames(root: &Path) -> Result<Vec<String>> {
    let path = root.join(CLASSNAMES);
    let names = read_lines(&path, "the class names, one a line in the order of the class indices")?;
    // An empty line in the middle would shift every index after it if it were dropped.
    if let Some(at) = names.iter().position(String::is_empty) {
        return Err(DataError::Line { path, line: at + 1, reason: "empty class name".into() });
    }
    if names.is_empty() {
        return Err(DataError::Line { path, line: 1, reason: "no class names".into() });
    }
    Ok(names)
}

/// The prompt templates of the set at `root`.
///
/// # Errors
/// [`DataError::MissingFile`], [`DataError::Line`] for a template without `{c}` or an empty file.
pub fn read_templates(root: &Path) -> Result<Vec<String>> {
    let path = root.join(TEMPLATES);
    let lines = read_lines(&path, "the prompt templates, one a line with `{c}` for the class")?;
    let mut templates = Vec::new();
    for (i, line) in lines.into_iter().enumerate() {
        if line.is_empty() {
            continue;
        }
        check_template(&line).map_err(|reason| DataError::Line { path: path.clone(), line: i + 1, reason })?;
        templates.push(line);
    }
    if templates.is_empty() {
        return Err(DataError::Line { path, line: 1, reason: "no templates".into() });
    }
    Ok(templates)
}

/// Checks that a template names the class with `{c}`.
///
/// # Errors
/// What is wrong, in words.
pub fn check_template(template: &str) -> Result<(), String> {
    if template.contains(PLACEHOLDER) {
        return Ok(());
    }
    let other = template
        .find('{')
        .and_then(|open| template[open..].find('}').map(|close| template[open..=open + close].to_owned()));
    Err(match other {
        Some(other) => format!("template `{template}` has `{other}` where `{{c}}` is expected"),
        None => format!("template `{template}` lacks the placeholder `{{c}}`"),
    })
}

fn check_templates(templates: &[String]) -> Result<()> {
    if templates.is_empty() {
        return Err(DataError::Option("the list of templates is empty".into()));
    }
    templates.iter().try_for_each(|t| check_template(t)).map_err(DataError::Option)
}

/// Lines of a UTF-8 file, trimmed, without empty ones at the end. `what` says what the file is for.
///
/// # Errors
/// [`DataError::MissingFile`], [`DataError::Line`] for bytes that are no UTF-8, [`DataError::Read`].
pub fn read_lines(path: &Path, what: &'static str) -> Result<Vec<String>> {
    let bytes = match fs::read(path) {
        Ok(bytes) => bytes,
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => {
            return Err(DataError::MissingFile { path: path.to_owned(), what });
        }
        Err(e) => return Err(DataError::read(path, e)),
    };
    let text = String::from_utf8(bytes).map_err(|e| {
        let good = &e.as_bytes()[..e.utf8_error().valid_up_to()];
        DataError::Line {
            path: path.to_owned(),
            line: 1 + good.iter().filter(|&&b| b == b'\n').count(),
            reason: "not UTF-8".into(),
        }
    })?;
    let text = text.trim_start_matches('\u{feff}');
    let mut lines: Vec<String> = text.lines().map(|l| l.trim().to_owned()).collect();
    while lines.last().is_some_and(String::is_empty) {
        lines.pop();
    }
    Ok(lines)
}
