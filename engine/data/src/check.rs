//! `mcpipe data check`: reads a data set from end to end and lists every trouble with its shard and key.

use std::fmt;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde::Serialize;

use crate::decode::{DEFAULT_MAX_PIXELS, decode};
use crate::error::{DataError, Result, SampleFault};
use crate::eval_set::{
    CLASSNAMES, DATASET_TYPE, DatasetType, check_labels, dataset_type, read_classnames, read_templates,
};
use crate::samples::{SampleSet, ShardFiles, scan_shard};
use crate::shards::{NSHARDS, list_shards, split_shards, tar_files};

/// What to look at.
#[derive(Debug, Clone, PartialEq)]
pub struct CheckOptions {
    /// Decode every image, not only the members' structure and labels.
    pub decode: bool,
    /// Pixel budget of one image.
    pub max_pixels: u64,
    /// Threads that a run would read with; fewer shards than that are worth a warning. 0 for no opinion.
    pub workers: usize,
}

impl Default for CheckOptions {
    fn default() -> Self {
        Self { decode: true, max_pixels: DEFAULT_MAX_PIXELS, workers: 0 }
    }
}

/// How bad a trouble is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// A run works with it.
    Warning,
    /// A run stops or loses samples.
    Error,
}

/// One trouble.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// How bad it is.
    pub severity: Severity,
    /// Stable name of its kind.
    pub code: &'static str,
    /// The file or directory that it is about.
    pub path: PathBuf,
    /// The sample's key, where it is about a sample.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub key: Option<String>,
    /// The whole message, path and key included.
    pub message: String,
}

/// What [`check`] found.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Report {
    /// Shards looked at.
    pub shards: usize,
    /// Usable samples.
    pub samples: usize,
    /// Samples with an image and a caption.
    pub with_caption: usize,
    /// Samples with an image and a class index.
    pub with_class: usize,
    /// Everything that is wrong, in the order of the paths given, shards and samples.
    pub problems: Vec<Problem>,
}

impl Report {
    /// Number of errors (warnings not counted).
    pub fn errors(&self) -> usize {
        self.problems.iter().filter(|p| p.severity == Severity::Error).count()
    }

    /// Whether nothing is in a run's way.
    pub fn is_ok(&self) -> bool {
        self.errors() == 0
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for problem in &self.problems {
            let word = match problem.severity {
                Severity::Error => "error",
                Severity::Warning => "warning",
            };
            writeln!(f, "{word}[{}]: {}", problem.code, problem.message)?;
        }
        write!(
            f,
            "{} shards, {} usable samples ({} with caption, {} with class), {} errors, {} warnings",
            self.shards,
            self.samples,
            self.with_caption,
            self.with_class,
            self.errors(),
            self.problems.len() - self.errors()
        )
    }
}

/// Checks data sets: each path is a shard, a brace pattern, a directory of shards, or the root of an evaluation set
/// (a directory with `classnames.txt`, `dataset_type.txt`, or split directories).
///
/// Everything is read and reported; a trouble never hides the ones after it.
pub fn check<S: AsRef<str>>(paths: &[S], options: &CheckOptions) -> Report {
    let mut report = Report::default();
    for path in paths {
        let path = path.as_ref();
        let dir = Path::new(path);
        if dir.is_dir() {
            check_dir(dir, options, &mut report);
        } else {
            match list_shards(&[path]) {
                Ok(shards) => check_shards(&shards, None, options, &mut report),
                Err(e) => report.add(&e),
            }
        }
    }
    report
}

/// Labels that the samples of an evaluation set must have.
struct Labels {
    kind: DatasetType,
    classnames: Vec<String>,
}

fn check_dir(dir: &Path, options: &CheckOptions, report: &mut Report) {
    let own = match tar_files(dir) {
        Ok(tars) => tars,
        Err(e) => return report.add(&e),
    };
    let is_root = own.is_empty() || dir.join(CLASSNAMES).exists() || dir.join(DATASET_TYPE).exists();
    if !is_root {
        // A split or a plain directory of shards; labels are known where the root above is an evaluation set.
        let root = dir.parent().filter(|p| p.join(CLASSNAMES).exists());
        let labels = root.and_then(|root| labels(root, report));
        return check_split(dir, own, labels.as_ref(), options, report);
    }
    let splits = match splits(dir) {
        Ok(splits) => splits,
        Err(e) => return report.add(&e),
    };
    if splits.is_empty() && own.is_empty() {
        let text = format!("{} and its directories hold no .tar file", dir.display());
        return report.add(&DataError::NoShards(text));
    }
    let labels = labels(dir, report);
    if !own.is_empty() {
        check_split(dir, own, labels.as_ref(), options, report);
    }
    for split in splits {
        match tar_files(&split) {
            Ok(tars) => check_split(&split, tars, labels.as_ref(), options, report),
            Err(e) => report.add(&e),
        }
    }
}

/// Directories below `root` that look like splits.
fn splits(root: &Path) -> Result<Vec<PathBuf>> {
    let mut splits = Vec::new();
    for entry in std::fs::read_dir(root).map_err(|e| DataError::read(root, e))? {
        let path = entry.map_err(|e| DataError::read(root, e))?.path();
        if path.is_dir() && (path.join(NSHARDS).exists() || tar_files(&path).is_ok_and(|t| !t.is_empty())) {
            splits.push(path);
        }
    }
    splits.sort();
    Ok(splits)
}

/// The text files of an evaluation set's root; each of their troubles is reported.
fn labels(root: &Path, report: &mut Report) -> Option<Labels> {
    let kind = match dataset_type(root) {
        Ok(kind) => kind,
        Err(e) => {
            report.add(&e);
            return None;
        }
    };
    if kind == DatasetType::Retrieval {
        return Some(Labels { kind, classnames: Vec::new() });
    }
    if let Err(e) = read_templates(root) {
        // Templates may stand in the pipeline file instead.
        let missing = matches!(e, DataError::MissingFile { .. });
        report.push(&e, if missing { Severity::Warning } else { Severity::Error });
    }
    match read_classnames(root) {
        Ok(classnames) => Some(Labels { kind, classnames }),
        Err(e) => {
            report.add(&e);
            None
        }
    }
}

/// A directory of shards: by `nshards.txt` where it has one or belongs to an evaluation set, else all its tars.
fn check_split(dir: &Path, tars: Vec<PathBuf>, labels: Option<&Labels>, options: &CheckOptions, report: &mut Report) {
    let mut shards = tars;
    if labels.is_some() || dir.join(NSHARDS).exists() {
        match split_shards(dir) {
            Ok(counted) => {
                let beyond = shards.iter().filter(|s| !counted.contains(s)).count();
                if beyond > 0 {
                    let text = format!("{beyond} .tar files of {} are beyond its {NSHARDS}", dir.display());
                    report.note(Severity::Warning, "data::shards_beyond", dir, None, text);
                }
                shards = counted;
            }
            // The shards that are there are still worth a look.
            Err(e) => report.add(&e),
        }
    }
    check_shards(&shards, labels, options, report);
}

fn check_shards(shards: &[PathBuf], labels: Option<&Labels>, options: &CheckOptions, report: &mut Report) {
    if !shards.is_empty() && shards.len() < options.workers {
        let text = format!(
            "{} shards for {} workers: harmless here, but other readers leave workers idle",
            shards.len(),
            options.workers
        );
        report.note(Severity::Warning, "data::few_shards", &shards[0], None, text);
    }
    let checked: Vec<Report> = shards.par_iter().map(|shard| check_shard(shard, labels, options)).collect();
    for part in checked {
        report.shards += part.shards;
        report.samples += part.samples;
        report.with_caption += part.with_caption;
        report.with_class += part.with_class;
        report.problems.extend(part.problems);
    }
}

fn check_shard(path: &Path, labels: Option<&Labels>, options: &CheckOptions) -> Report {
    let mut report = Report { shards: 1, ..Report::default() };
    let scanned = match scan_shard(0, path) {
        Ok(scanned) => scanned,
        Err(e) => {
            report.add(&e);
            return report;
        }
    };
    if let Some(fault) = scanned.scan.fault.clone() {
        report.add(&DataError::shard(path, fault));
    }
    let set = SampleSet::of_shard(path, scanned);
    set.bad_errors().for_each(|e| report.add(&e));
    let mut files = ShardFiles::default();
    let mut unlabelled = 0;
    for index in 0..set.len() {
        let entry = &set.entries()[index];
        report.with_caption += usize::from(entry.has_text());
        report.with_class += usize::from(entry.has_class());
        unlabelled += usize::from(entry.has_class() && !entry.has_text());
        let faults = sample_faults(&set, index, labels, options, &mut files);
        report.samples += usize::from(faults.is_empty());
        for fault in faults {
            report.add(&set.fault(index, fault));
        }
    }
    if unlabelled > 0 && labels.is_none_or(|l| l.kind == DatasetType::Retrieval) {
        let text = format!(
            "shard {}: {unlabelled} samples have a class (cls) but no caption (txt); training needs captions",
            path.display()
        );
        report.note(Severity::Warning, "data::class_without_caption", path, None, text);
    }
    report
}

fn sample_faults(
    set: &SampleSet,
    index: usize,
    labels: Option<&Labels>,
    options: &CheckOptions,
    files: &mut ShardFiles,
) -> Vec<SampleFault> {
    let mut faults = Vec::new();
    let text = set.read_text(index, files);
    let class = set.read_class(index, files);
    if let (Some(labels), Ok(text), Ok(class)) = (labels, &text, &class)
        && let Err(fault) = check_labels(labels.kind, &labels.classnames, *class, text.as_deref())
    {
        faults.push(fault);
    }
    faults.extend(text.err());
    faults.extend(class.err());
    faults.extend(set.read_json(index, files).err());
    if options.decode {
        let image = set.read_image(index, files).and_then(|bytes| Ok(decode(&bytes, options.max_pixels)?));
        faults.extend(image.err());
    }
    faults
}

impl Report {
    fn add(&mut self, error: &DataError) {
        self.push(error, Severity::Error);
    }

    fn push(&mut self, error: &DataError, severity: Severity) {
        let (path, key) = error.place();
        self.problems.push(Problem {
            severity,
            code: error.code(),
            path: path.to_owned(),
            key: key.map(str::to_owned),
            message: error.to_string(),
        });
    }

    fn note(&mut self, severity: Severity, code: &'static str, path: &Path, key: Option<String>, message: String) {
        self.problems.push(Problem { severity, code, path: path.to_owned(), key, message });
    }
}
