//! The training stream: shuffled, decoded, augmented and tokenised batches, one per step.
//!
//! The stream is infinite. Its position p = step * batch size + row; epoch p / n takes the n usable samples in a
//! permutation keyed by (seed, epoch), so every sample is seen once an epoch, no sample is dropped, and the batch at
//! an epoch's end goes on into the next epoch. A batch is a function of (options, step) alone: the number of threads
//! cannot change it, and to resume a run is to start at its step.

use std::collections::{BTreeSet, HashSet};
use std::sync::{Arc, Mutex, PoisonError};

use crate::decode::{DEFAULT_MAX_PIXELS, decode};
use crate::error::{DataError, Result, SampleFault};
use crate::mix::{Mix, MixPolicy, MixTargets};
use crate::ordered::{Job, Ordered, StopFlag};
use crate::rng::Rng;
use crate::samples::{SampleSet, ShardFiles};
use crate::tokenize::{Tokenizer, check_context_length, tokenizer};
use crate::transform::{Augment, ImageForm, Resize, check_size};

/// What happens when a sample cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnBadSample {
    /// The run stops with the sample's error.
    Fail,
    /// The sample is replaced by another one, up to `max` distinct bad samples.
    Skip {
        /// Most distinct bad samples before the run stops.
        max: usize,
    },
}

/// Options of the training stream.
#[derive(Debug, Clone, PartialEq)]
pub struct LoaderOptions {
    /// Seed of shuffling, augmentation and mixing.
    pub seed: u64,
    /// Whether each epoch has an order of its own (else the order of the shards).
    pub shuffle: bool,
    /// Rows of a batch.
    pub batch_size: usize,
    /// Forms of the images that the models of a step want, without repetition; the student's first.
    pub forms: Vec<ImageForm>,
    /// Context lengths of the text towers of a step, without repetition; may be empty.
    pub context_lengths: Vec<usize>,
    /// Crop and flip.
    pub augment: Augment,
    /// Mixup and CutMix.
    pub mix: MixPolicy,
    /// Whether a sample without a caption is bad (else its caption is empty).
    pub captions: bool,
    /// What to do with bad samples.
    pub on_bad_sample: OnBadSample,
    /// Threads that decode.
    pub workers: usize,
    /// Batches made ahead of the one in use (at least one per thread).
    pub prefetch: usize,
    /// Pixel budget of one image.
    pub max_pixels: u64,
}

impl Default for LoaderOptions {
    fn default() -> Self {
        Self {
            seed: 0,
            shuffle: true,
            batch_size: 64,
            forms: vec![64.into()],
            context_lengths: Vec::new(),
            augment: Augment::default(),
            mix: MixPolicy::default(),
            captions: true,
            on_bad_sample: OnBadSample::Skip { max: 100 },
            workers: 2,
            prefetch: 4,
            max_pixels: DEFAULT_MAX_PIXELS,
        }
    }
}

impl LoaderOptions {
    /// Checks ranges.
    ///
    /// # Errors
    /// [`DataError::Option`].
    pub fn check(&self) -> Result<()> {
        if !(1..=1 << 20).contains(&self.batch_size) {
            return Err(DataError::Option(format!("batch size {}: expected 1 to 1048576", self.batch_size)));
        }
        if !(1..=1024).contains(&self.workers) {
            return Err(DataError::Option(format!("workers {}: expected 1 to 1024", self.workers)));
        }
        if self.forms.is_empty() {
            return Err(DataError::Option("no image size".into()));
        }
        self.forms.iter().try_for_each(|form| check_size(form.size))?;
        self.context_lengths.iter().try_for_each(|&l| check_context_length(l))?;
        self.augment.check()?;
        self.mix.check()
    }
}

/// One step's data: `batch` rows.
#[derive(Debug, Clone, PartialEq)]
pub struct Batch {
    /// The step that it belongs to.
    pub step: u64,
    /// Epoch of its first row.
    pub epoch: u64,
    /// Each row's index in [`SampleSet::entries`].
    pub samples: Vec<u32>,
    /// Each row's key.
    pub keys: Vec<String>,
    /// Forms of the images in [`Self::images`].
    pub forms: Vec<ImageForm>,
    /// RGB bytes `[batch, size, size, 3]`, one vector per form; every form shows the same pixels.
    pub images: Vec<Vec<u8>>,
    /// Each row's caption; empty where there is none.
    pub captions: Vec<String>,
    /// Context lengths of [`Self::tokens`].
    pub context_lengths: Vec<usize>,
    /// Token ids `[batch, context_length]`, one vector per context length.
    pub tokens: Vec<Vec<i32>>,
    /// Each row's class index, where it has one.
    pub class: Vec<Option<u32>>,
    /// Mixup or CutMix of this step; [`crate::model_input`] applies it.
    pub mix: Option<Mix>,
}

impl Batch {
    /// Number of rows.
    pub fn len(&self) -> usize {
        self.samples.len()
    }

    /// Whether there is no row.
    pub fn is_empty(&self) -> bool {
        self.samples.is_empty()
    }

    /// RGB bytes `[batch, size, size, 3]`, when a model of the step has this form.
    pub fn images_of(&self, form: impl Into<ImageForm>) -> Option<&[u8]> {
        let form = form.into();
        let at = self.forms.iter().position(|&f| f == form)?;
        Some(&self.images[at])
    }

    /// Token ids `[batch, context_length]`, when a tower of the step has this context length.
    pub fn tokens_of(&self, context_length: usize) -> Option<&[i32]> {
        let at = self.context_lengths.iter().position(|&l| l == context_length)?;
        Some(&self.tokens[at])
    }

    /// Targets of the step's mixing; `None` when rows stand for themselves.
    pub fn mix_targets(&self) -> Option<MixTargets> {
        self.mix.as_ref().map(|m| m.targets(self.len()))
    }
}

/// What the loader has met so far. Counts follow the batches handed out, not those made ahead, so that they are as
/// reproducible as the batches.
#[derive(Debug, Clone, Default, PartialEq, Eq, serde::Serialize)]
pub struct LoaderStats {
    /// Distinct samples that could not be used.
    pub bad_samples: usize,
    /// Messages of the first few of them.
    pub first_bad: Vec<String>,
    /// Captions cut to the shortest context length, counted once a row.
    pub truncated_captions: u64,
    /// Rows handed out.
    pub rows: u64,
}

/// Bad samples whose messages are kept.
const FIRST_BAD: usize = 5;

/// A batch with what was met on the way.
struct Made {
    batch: Batch,
    bad: Vec<(u32, String)>,
    truncated: u64,
}

/// Iterates over the steps of training. Threads decode ahead; dropping it stops them.
pub struct TrainLoader {
    stream: Ordered<Made>,
    set: Arc<SampleSet>,
    stats: LoaderStats,
    bad: BTreeSet<u32>,
    max_bad: Option<usize>,
}

impl std::fmt::Debug for TrainLoader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("TrainLoader").field("stats", &self.stats).finish_non_exhaustive()
    }
}

impl TrainLoader {
    /// Starts the stream of `set` at `first_step` (0, or the step at which a run resumes).
    ///
    /// # Errors
    /// [`DataError::Option`], [`DataError::TooFewSamples`], and, for samples that the scan of the shards found bad,
    /// [`DataError::Sample`] or [`DataError::TooManyBadSamples`] as `on_bad_sample` says.
    pub fn start(set: Arc<SampleSet>, options: LoaderOptions, first_step: u64) -> Result<Self> {
        options.check()?;
        let max_bad = match options.on_bad_sample {
            OnBadSample::Fail => None,
            OnBadSample::Skip { max } => Some(max),
        };
        let mut stats = LoaderStats::default();
        for error in set.bad_errors() {
            if max_bad.is_none() {
                return Err(error);
            }
            stats.bad_samples += 1;
            if stats.first_bad.len() < FIRST_BAD {
                stats.first_bad.push(error.to_string());
            }
        }
        check_cap(&stats, max_bad)?;
        if set.len() < options.batch_size {
            return Err(DataError::TooFewSamples { samples: set.len(), batch_size: options.batch_size });
        }
        let shared = Arc::new(Shared { set: set.clone(), options, orders: Mutex::default() });
        let jobs = (0..shared.options.workers)
            .map(|_| {
                let mut maker =
                    Maker { shared: shared.clone(), files: ShardFiles::default(), resize: Resize::default() };
                Box::new(move |step: u64, stop: &StopFlag| maker.batch(step, stop)) as Job<Made>
            })
            .collect();
        let stream = Ordered::start(jobs, shared.options.prefetch, first_step, u64::MAX)?;
        Ok(Self { stream, set, stats, bad: BTreeSet::new(), max_bad })
    }

    /// The samples behind the stream.
    pub fn samples(&self) -> &Arc<SampleSet> {
        &self.set
    }

    /// The step of the next batch: all that has to be saved to resume.
    pub fn step(&self) -> u64 {
        self.stream.position()
    }

    /// What has been met up to the last batch handed out.
    pub fn stats(&self) -> &LoaderStats {
        &self.stats
    }

    /// The batch of the next step. Waits for it where the threads are behind.
    ///
    /// # Errors
    /// [`DataError::Sample`] for a bad sample under [`OnBadSample::Fail`], [`DataError::TooManyBadSamples`] under
    /// [`OnBadSample::Skip`], [`DataError::Worker`]. After an error the loader has ended.
    pub fn next_batch(&mut self) -> Result<Batch> {
        let made = match self.stream.next() {
            Some(made) => made?,
            None => return Err(DataError::Worker("the loader has ended after an error".into())),
        };
        for (sample, message) in made.bad {
            if self.bad.insert(sample) {
                self.stats.bad_samples += 1;
                tracing::warn!("bad sample: {message}");
                if self.stats.first_bad.len() < FIRST_BAD {
                    self.stats.first_bad.push(message);
                }
            }
        }
        check_cap(&self.stats, self.max_bad)?;
        self.stats.truncated_captions += made.truncated;
        self.stats.rows += made.batch.len() as u64;
        Ok(made.batch)
    }
}

fn check_cap(stats: &LoaderStats, max_bad: Option<usize>) -> Result<()> {
    match max_bad {
        Some(max) if stats.bad_samples > max => {
            Err(DataError::TooManyBadSamples { count: stats.bad_samples, max, first: stats.first_bad.clone() })
        }
        _ => Ok(()),
    }
}

/// What all threads read.
struct Shared {
    set: Arc<SampleSet>,
    options: LoaderOptions,
    /// Orders of the epochs in use: a batch touches at most two, threads may be an epoch apart.
    orders: Mutex<Vec<(u64, Arc<Vec<u32>>)>>,
}

const KEPT_ORDERS: usize = 3;

impl Shared {
    fn order(&self, epoch: u64) -> Arc<Vec<u32>> {
        // The list is whole at every point, so a panic elsewhere does not spoil it.
        let mut orders = self.orders.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, order)) = orders.iter().find(|(e, _)| *e == epoch) {
            return order.clone();
        }
        let order = Arc::new(if self.options.shuffle {
            epoch_order(self.options.seed, epoch, self.set.len())
        } else {
            (0..self.set.len() as u32).collect()
        });
        if orders.len() == KEPT_ORDERS {
            orders.remove(0);
        }
        orders.push((epoch, order.clone()));
        order
    }
}

/// The order of the samples in an epoch.
pub fn epoch_order(seed: u64, epoch: u64, samples: usize) -> Vec<u32> {
    Rng::new(seed, "shuffle", epoch, 0).permutation(samples)
}

/// One thread's part.
struct Maker {
    shared: Arc<Shared>,
    files: ShardFiles,
    resize: Resize,
}

/// What one row adds to its batch.
struct Row {
    caption: String,
    class: Option<u32>,
}

impl Maker {
    fn batch(&mut self, step: u64, stop: &StopFlag) -> Result<Made> {
        let shared = self.shared.clone();
        let (set, options) = (&shared.set, &shared.options);
        let rows = options.batch_size;
        let n = set.len() as u64;
        let start = step
            .checked_mul(rows as u64)
            .ok_or_else(|| DataError::Option(format!("step {step} of {rows} rows is beyond the stream")))?;
        let planned: Vec<u32> =
            (0..rows as u64).map(|row| shared.order((start + row) / n)[((start + row) % n) as usize]).collect();
        let mut taken: HashSet<u32> = planned.iter().copied().collect();
        let sizes: Vec<usize> = options.forms.iter().map(|f| f.size).collect();
        let mut batch = Batch {
            step,
            epoch: start / n,
            samples: Vec::with_capacity(rows),
            keys: Vec::with_capacity(rows),
            forms: options.forms.clone(),
            images: options.forms.iter().map(|f| vec![0; rows * f.size * f.size * 3]).collect(),
            captions: Vec::with_capacity(rows),
            context_lengths: options.context_lengths.clone(),
            tokens: Vec::new(),
            class: Vec::with_capacity(rows),
            mix: options.mix.draw(options.seed, step, rows, &sizes),
        };
        let mut bad = Vec::new();
        for (row, &first) in planned.iter().enumerate() {
            if stop.is_set() {
                return Err(DataError::Worker("stopped".into()));
            }
            let mut candidates = Replacements::new(options.seed, step, row, first, n);
            let (sample, content) = loop {
                let sample = candidates.next(&taken).ok_or_else(|| self.give_up(&bad))?;
                match self.row(sample, step, row, &mut batch) {
                    Ok(content) => break (sample, content),
                    Err(fault) => {
                        let error = set.fault(sample as usize, fault);
                        if options.on_bad_sample == OnBadSample::Fail {
                            return Err(error);
                        }
                        bad.push((sample, error.to_string()));
                    }
                }
            };
            taken.insert(sample);
            batch.samples.push(sample);
            batch.keys.push(set.entries()[sample as usize].key.to_string());
            batch.captions.push(content.caption);
            batch.class.push(content.class);
        }
        let tokenizer: &Tokenizer = tokenizer();
        let mut truncated = 0;
        for &length in &options.context_lengths {
            let (ids, cut) = tokenizer.tokenize_batch(&batch.captions, length);
            batch.tokens.push(ids);
            truncated = truncated.max(cut as u64);
        }
        Ok(Made { batch, bad, truncated })
    }

    /// Reads one sample and writes its pixels to `row` of every form.
    fn row(&mut self, sample: u32, step: u64, row: usize, batch: &mut Batch) -> Result<Row, SampleFault> {
        let (set, options) = (&self.shared.set, &self.shared.options);
        let index = sample as usize;
        let caption = match set.read_text(index, &mut self.files)? {
            Some(text) => text,
            None if options.captions => return Err(SampleFault::NoCaption),
            None => String::new(),
        };
        let class = set.read_class(index, &mut self.files)?;
        let image = decode(&set.read_image(index, &mut self.files)?, options.max_pixels)?;
        let mut rng = Rng::new(options.seed, "augment", step, row as u64);
        let view = options.augment.view(image.width, image.height, &mut rng);
        for (pixels, &form) in batch.images.iter_mut().zip(&options.forms) {
            let bytes = form.size * form.size * 3;
            self.resize
                .view(&image, &view, form, &mut pixels[row * bytes..][..bytes])
                .map_err(|e| SampleFault::Read(e.to_string()))?;
        }
        Ok(Row { caption, class })
    }

    /// No usable replacement: report what was met.
    fn give_up(&self, bad: &[(u32, String)]) -> DataError {
        DataError::TooManyBadSamples {
            count: bad.len(),
            max: match self.shared.options.on_bad_sample {
                OnBadSample::Fail => 0,
                OnBadSample::Skip { max } => max,
            },
            first: bad.iter().take(FIRST_BAD).map(|(_, m)| m.clone()).collect(),
        }
    }
}

/// The samples that are tried for a row: the planned one, then draws keyed by (seed, step, row).
///
/// Drawing at random rather than taking the stream's next sample keeps every other row and step where it is, so that
/// neither the number of threads nor a resume can change what follows a bad sample.
struct Replacements {
    rng: Rng,
    first: Option<u32>,
    samples: u64,
    tries: usize,
}

const REPLACEMENT_TRIES: usize = 64;

impl Replacements {
    fn new(seed: u64, step: u64, row: usize, first: u32, samples: u64) -> Self {
        let rng = Rng::new(seed, "replace", step, row as u64);
        Self { rng, first: Some(first), samples, tries: 0 }
    }

    fn next(&mut self, taken: &HashSet<u32>) -> Option<u32> {
        if let Some(first) = self.first.take() {
            return Some(first);
        }
        while self.tries < REPLACEMENT_TRIES {
            self.tries += 1;
            let sample = self.rng.below(self.samples) as u32;
            // A second copy in the batch is a last resort: a set hardly larger than a batch has nothing else.
            if self.tries > REPLACEMENT_TRIES / 2 || !taken.contains(&sample) {
                return Some(sample);
            }
        }
        None
    }
}
