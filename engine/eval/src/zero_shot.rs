//! Zero-shot classification over an evaluation split.

use mcpipe_data::{DataError, EvalBatch, EvalSet, Normalize};
use serde::Serialize;

use crate::classifier::Classifier;
use crate::error::EvalError;
use crate::metrics::{Confusion, RANK_DEPTH, rank, softmax, top_k};
use crate::{EncodeImages, EncodeTexts};

/// How a split is run through the image encoder.
#[derive(Clone, Debug, PartialEq)]
pub struct ZeroShotOptions {
    /// Position of the model's images in a batch's [`EvalBatch::images`].
    pub transform: usize,
    /// The model's normalisation.
    pub normalize: Normalize,
    /// Samples whose predictions are kept for a report, spread evenly over the split.
    pub keep_samples: usize,
    /// Classes kept of each of those.
    pub keep_classes: usize,
}

impl ZeroShotOptions {
    /// The first transform with a normalisation; 24 samples with their three best classes.
    pub fn new(normalize: Normalize) -> Self {
        ZeroShotOptions { transform: 0, normalize, keep_samples: 24, keep_classes: 3 }
    }
}

/// The measures, as fractions.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ZeroShotMetrics {
    /// Share of samples whose class comes first.
    pub acc1: f64,
    /// Share of samples whose class is among the first five; none with fewer than five classes.
    pub acc5: Option<f64>,
    /// Mean over classes of the share recognised.
    pub mean_per_class_recall: f64,
}

/// One class of a prediction.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Prediction {
    /// Class index.
    pub class: usize,
    /// Softmax of the logits.
    pub probability: f32,
}

/// A sample with its best classes and its pixels, for a report.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct SamplePrediction {
    /// The sample's key.
    pub key: String,
    /// Its class.
    pub class: usize,
    /// The best classes, best first.
    pub top: Vec<Prediction>,
    /// Side of the image.
    pub size: usize,
    /// RGB bytes `[size, size, 3]`.
    #[serde(skip)]
    pub pixels: Vec<u8>,
}

/// The result of a zero-shot classification.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct ZeroShot {
    /// Samples measured.
    pub samples: u64,
    /// Number of classes; chance is one over it.
    pub classes: usize,
    /// The measures.
    pub metrics: ZeroShotMetrics,
    /// True against predicted classes.
    pub confusion: Confusion,
    /// Some samples with their predictions.
    pub predictions: Vec<SamplePrediction>,
}

impl ZeroShot {
    /// Measures by name, those that are defined.
    pub fn metrics(&self) -> Vec<(&'static str, f64)> {
        let m = &self.metrics;
        let mut list = vec![("acc1", m.acc1)];
        list.extend(m.acc5.map(|a| ("acc5", a)));
        list.push(("mean_per_class_recall", m.mean_per_class_recall));
        list
    }
}

impl Classifier {
    /// The classifier of a split's class names and templates.
    ///
    /// # Errors
    /// A set without classes, an encoder that fails, embeddings without direction.
    pub fn of(set: &EvalSet, encode: &mut EncodeTexts<'_>) -> Result<Self, EvalError> {
        let prompts = set.prompts();
        let texts: Vec<&str> = prompts.iter().map(String::as_str).collect();
        let embeddings = encode(&texts).map_err(EvalError::Encode)?;
        Classifier::new(&embeddings, set.classnames.len(), set.templates.len())
    }
}

/// Classifies every sample of `batches`, of which there are about `total`.
///
/// # Errors
/// Data that can't be read, a class outside the list, an encoder that fails, no samples.
pub fn zero_shot(
    classifier: &Classifier,
    batches: impl Iterator<Item = Result<EvalBatch, DataError>>,
    total: usize,
    options: &ZeroShotOptions,
    encode: &mut EncodeImages<'_>,
) -> Result<ZeroShot, EvalError> {
    let classes = classifier.classes();
    let mut confusion = Confusion::new(classes);
    let (mut samples, mut first, mut in_depth) = (0u64, 0u64, 0u64);
    let mut predictions = Vec::new();
    let mut pixels = Vec::new();
    for batch in batches {
        let batch = batch?;
        let n = batch.len();
        let Some(bytes) = batch.images.get(options.transform).filter(|b| n > 0 && b.len().is_multiple_of(n)) else {
            return Err(EvalError::Shape(format!("the batch has no images for transform {}", options.transform)));
        };
        pixels.resize(bytes.len(), 0.0);
        options.normalize.apply(bytes, &mut pixels)?;
        let embeddings = encode(&pixels, n).map_err(EvalError::Encode)?;
        if embeddings.len() != n * classifier.dim() {
            return Err(EvalError::Shape(format!(
                "{} values came for {n} images, {} dimensions each are expected",
                embeddings.len(),
                classifier.dim()
            )));
        }
        let logits = classifier.logits(&embeddings)?;
        let image = bytes.len() / n;
        for (i, logits) in logits.chunks_exact(classes).enumerate() {
            let key = &batch.keys[i];
            let class = match batch.class[i] {
                Some(c) if (c as usize) < classes => c as usize,
                Some(class) => return Err(EvalError::Class { key: key.clone(), class, classes }),
                None => return Err(EvalError::Shape(format!("sample `{key}` has no class"))),
            };
            let best = top_k(logits, options.keep_classes.max(1));
            let place = rank(logits, class);
            first += u64::from(place == 0);
            in_depth += u64::from(place < RANK_DEPTH);
            confusion.add(class, best[0].0);
            if kept(samples as usize, total, options.keep_samples) {
                let p = softmax(logits);
                let top = best.iter().map(|&(class, _)| Prediction { class, probability: p[class] }).collect();
                predictions.push(SamplePrediction {
                    key: key.clone(),
                    class,
                    top,
                    size: (image / 3).isqrt(),
                    pixels: bytes[i * image..][..image].to_vec(),
                });
            }
            samples += 1;
        }
    }
    let Some(mean_per_class_recall) = confusion.mean_per_class_recall() else { return Err(EvalError::Empty) };
    let share = |hits: u64| hits as f64 / samples as f64;
    let acc5 = (classes >= RANK_DEPTH).then(|| share(in_depth));
    let metrics = ZeroShotMetrics { acc1: share(first), acc5, mean_per_class_recall };
    Ok(ZeroShot { samples, classes, metrics, confusion, predictions })
}

/// Whether sample `i` of `total` is one of `keep` spread evenly.
fn kept(i: usize, total: usize, keep: usize) -> bool {
    let total = total.max(1);
    i < total && (i * keep) / total != ((i + 1) * keep) / total
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(classes: &[u32], values: &[u8]) -> Result<EvalBatch, DataError> {
        let n = classes.len();
        Ok(EvalBatch {
            samples: (0..n as u32).collect(),
            keys: (0..n).map(|i| format!("s{i:07}")).collect(),
            images: vec![values.iter().flat_map(|v| [*v, 255 - *v, 0]).collect()],
            class: classes.iter().map(|c| Some(*c)).collect(),
            captions: vec![Vec::new(); n],
        })
    }

    /// The pixel's two channels as the embedding.
    fn encode(x: &[f32], n: usize) -> Result<Vec<f32>, crate::BoxError> {
        assert_eq!(x.len(), 3 * n);
        Ok(x.chunks(3).flat_map(|p| [p[0], p[1]]).collect())
    }

    #[test]
    fn accuracy_is_a_fraction() {
        let c = Classifier::new(&[1.0, 0.0, 0.0, 1.0], 2, 1).unwrap();
        let batches = [batch(&[0, 1, 0], &[200, 30, 100]), batch(&[1], &[0])];
        let options = ZeroShotOptions { keep_samples: 2, ..ZeroShotOptions::new(Normalize::UNIT) };
        let z = zero_shot(&c, batches.into_iter(), 4, &options, &mut encode).unwrap();
        assert_eq!((z.samples, z.metrics.acc1, z.metrics.acc5), (4, 0.75, None));
        assert_eq!(z.metrics.mean_per_class_recall, 0.75);
        assert_eq!(z.confusion.counts, [1, 1, 0, 2]);
        assert_eq!(z.metrics(), [("acc1", 0.75), ("mean_per_class_recall", 0.75)]);
        assert_eq!(z.predictions.len(), 2);
        assert_eq!((z.predictions[1].top[0].class, z.predictions[1].size, z.predictions[1].pixels.len()), (1, 1, 3));
    }

    #[test]
    fn a_class_outside_the_list_names_the_sample() {
        let c = Classifier::new(&[1.0, 0.0, 0.0, 1.0], 2, 1).unwrap();
        let options = ZeroShotOptions::new(Normalize::UNIT);
        let e = zero_shot(&c, [batch(&[7], &[1])].into_iter(), 1, &options, &mut encode).unwrap_err();
        assert_eq!(e.to_string(), "sample `s0000000` has class 7, but there are 2 class names");
        let e = zero_shot(&c, std::iter::empty(), 0, &options, &mut encode).unwrap_err();
        assert!(matches!(e, EvalError::Empty));
    }

    #[test]
    fn kept_samples_are_spread_evenly() {
        let at = |total, keep| (0..total).filter(|&i| kept(i, total, keep)).collect::<Vec<_>>();
        assert_eq!(at(10, 2), [4, 9]);
        assert_eq!(at(3, 8), [0, 1, 2]);
        assert!(at(5, 0).is_empty());
    }
}
