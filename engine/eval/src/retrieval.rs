//! Image–text retrieval.

use mcpipe_data::{DataError, EvalBatch, Normalize};
use serde::Serialize;

use crate::classifier::{normalize, products};
use crate::error::EvalError;
use crate::{EncodeImages, EncodeTexts};

/// Recall@k both ways, as fractions; none where there are not more than k candidates, of which all would be found.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RetrievalMetrics {
    /// Share of texts whose image is among the first k images, k = 1, 5, 10.
    pub image: [Option<f64>; 3],
    /// Share of images one of whose texts is among the first k texts, k = 1, 5, 10.
    pub text: [Option<f64>; 3],
}

/// The result of a retrieval.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Retrieval {
    /// Images measured.
    pub images: usize,
    /// Texts measured.
    pub texts: usize,
    /// The measures.
    pub metrics: RetrievalMetrics,
}

const DEPTHS: [usize; 3] = [1, 5, 10];
const IMAGE_NAMES: [&str; 3] = ["image_retrieval_recall@1", "image_retrieval_recall@5", "image_retrieval_recall@10"];
const TEXT_NAMES: [&str; 3] = ["text_retrieval_recall@1", "text_retrieval_recall@5", "text_retrieval_recall@10"];

impl Retrieval {
    /// Measures by name, those that are defined.
    pub fn metrics(&self) -> Vec<(&'static str, f64)> {
        let m = &self.metrics;
        let named = IMAGE_NAMES.into_iter().zip(m.image).chain(TEXT_NAMES.into_iter().zip(m.text));
        named.filter_map(|(name, value)| Some((name, value?))).collect()
    }
}

/// Rows of scores computed at a time.
const BLOCK: usize = 256;

/// Shares of `queries` one of whose `wanted` candidates is among the first k.
fn recall(
    queries: &[f32],
    candidates: &[f32],
    dim: usize,
    wanted: impl Fn(usize) -> std::ops::Range<usize>,
) -> [Option<f64>; 3] {
    let (n, m) = (queries.len() / dim, candidates.len() / dim);
    let mut hits = [0u64; 3];
    for (block, rows) in queries.chunks(BLOCK * dim).enumerate() {
        let scores = products(rows, candidates, dim, 1.0);
        for (i, scores) in scores.chunks_exact(m).enumerate() {
            let range = wanted(block * BLOCK + i);
            // The best of the wanted ones, the first of equals; how many stand before it decides every depth.
            let best = range.clone().fold(range.start, |b, c| if scores[c] > scores[b] { c } else { b });
            let before = scores
                .iter()
                .enumerate()
                .filter(|&(c, s)| *s > scores[best] || (*s == scores[best] && c < best))
                .count();
            for (hit, depth) in hits.iter_mut().zip(DEPTHS) {
                *hit += u64::from(before < depth);
            }
        }
    }
    let mut depths = DEPTHS.into_iter();
    hits.map(|h| depths.next().filter(|&k| m > k && n > 0).map(|_| h as f64 / n as f64))
}

/// Measures retrieval over every image with captions of `batches`; an image without a caption is left out.
///
/// # Errors
/// Data that can't be read, an encoder that fails, embeddings that are not finite, no samples.
pub fn retrieval(
    batches: impl Iterator<Item = Result<EvalBatch, DataError>>,
    transform: usize,
    normalization: &Normalize,
    encode_images: &mut EncodeImages<'_>,
    encode_texts: &mut EncodeTexts<'_>,
) -> Result<Retrieval, EvalError> {
    let (mut images, mut texts): (Vec<f32>, Vec<f32>) = (Vec::new(), Vec::new());
    // Texts of image i: starts[i]..starts[i + 1].
    let mut starts = vec![0usize];
    let mut owner = Vec::new();
    let mut dim = 0;
    for batch in batches {
        let batch = batch?;
        let n = batch.len();
        let Some(bytes) = batch.images.get(transform).filter(|b| n > 0 && b.len().is_multiple_of(n)) else {
            return Err(EvalError::Shape(format!("the batch has no images for transform {transform}")));
        };
        let mut pixels = vec![0.0; bytes.len()];
        normalization.apply(bytes, &mut pixels)?;
        let embeddings = encode_images(&pixels, n).map_err(EvalError::Encode)?;
        let captions: Vec<&str> = batch.captions.iter().flatten().map(String::as_str).collect();
        if captions.is_empty() {
            continue;
        }
        let mut own = encode_texts(&captions).map_err(EvalError::Encode)?;
        let width = embeddings.len() / n;
        if width == 0
            || embeddings.len() != n * width
            || own.len() != captions.len() * width
            || (dim != 0 && dim != width)
        {
            return Err(EvalError::Shape("image and text embeddings have different dimensions".into()));
        }
        dim = width;
        if let Some(bad) = own.chunks_exact_mut(dim).position(|row| !normalize(row)) {
            return Err(EvalError::NotFinite(format!("the caption `{}`", captions[bad])));
        }
        texts.extend(own);
        for (i, embedding) in embeddings.chunks_exact(dim).enumerate() {
            if batch.captions[i].is_empty() {
                continue;
            }
            let mut embedding = embedding.to_vec();
            if !normalize(&mut embedding) {
                return Err(EvalError::NotFinite(format!("image `{}`", batch.keys[i])));
            }
            images.extend(embedding);
            let image = starts.len() - 1;
            owner.extend(std::iter::repeat_n(image, batch.captions[i].len()));
            starts.push(owner.len());
        }
    }
    let count = starts.len() - 1;
    if count == 0 {
        return Err(EvalError::Empty);
    }
    let image = recall(&texts, &images, dim, |t| owner[t]..owner[t] + 1);
    let text = recall(&images, &texts, dim, |i| starts[i]..starts[i + 1]);
    Ok(Retrieval { images: count, texts: owner.len(), metrics: RetrievalMetrics { image, text } })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn batch(values: &[u8], captions: &[&[&str]]) -> Result<EvalBatch, DataError> {
        let n = values.len();
        Ok(EvalBatch {
            samples: (0..n as u32).collect(),
            keys: (0..n).map(|i| i.to_string()).collect(),
            images: vec![values.iter().flat_map(|v| [*v, 0, 0]).collect()],
            class: vec![None; n],
            captions: captions.iter().map(|c| c.iter().map(|&s| s.to_owned()).collect()).collect(),
        })
    }

    /// An angle on the circle as embedding: images by their pixel, texts by their number.
    fn angle(x: f32) -> [f32; 2] {
        [x.cos(), x.sin()]
    }

    #[test]
    fn recall_both_ways() {
        // Images at 0.0, 0.1, …; two texts each: one near, one that lies at the neighbour's place.
        let mut images = |x: &[f32], _: usize| Ok(x.chunks(3).flat_map(|p| angle(p[0] * 25.5)).collect());
        let mut texts = |t: &[&str]| Ok(t.iter().flat_map(|s| angle(s.parse::<f32>().unwrap())).collect());
        let batches = [
            batch(&[0, 1], &[&["0.01", "0.12"], &["0.11", "0.19"]]),
            batch(&[2, 3, 4], &[&["0.21", "0.31"], &[], &["0.41", "0.39"]]),
        ];
        let r = retrieval(batches.into_iter(), 0, &Normalize::UNIT, &mut images, &mut texts).unwrap();
        assert_eq!((r.images, r.texts), (4, 8));
        // Texts 0.12 → image 0.1, 0.19 → 0.2, 0.31 → 0.2 or 0.4: 0.2 lies 0.11 off, 0.4 lies 0.09 off. All others hit.
        assert_eq!(r.metrics.image, [Some(5.0 / 8.0), None, None]);
        // Image 0.1's nearest texts are 0.11; 0.2's is 0.19 (its neighbour's) or 0.21: equal but for rounding.
        assert!(r.metrics.text[0].unwrap() >= 0.75);
        assert_eq!(r.metrics.text[1], Some(1.0));
        assert_eq!(r.metrics.text[2], None);
        assert_eq!(r.metrics()[0], ("image_retrieval_recall@1", 0.625));
    }

    #[test]
    fn no_captions_no_result() {
        let mut images = |_: &[f32], n: usize| Ok(vec![1.0; n]);
        let mut texts = |t: &[&str]| Ok(vec![1.0; t.len()]);
        let e = retrieval([batch(&[1], &[&[]])].into_iter(), 0, &Normalize::UNIT, &mut images, &mut texts).unwrap_err();
        assert!(matches!(e, EvalError::Empty));
    }
}
