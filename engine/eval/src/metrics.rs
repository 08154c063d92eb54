//! Ranks, confusion matrix, probabilities.

use serde::Serialize;

/// Depth to which a sample's class is looked for (acc5).
pub const RANK_DEPTH: usize = 5;

/// Position of `class` when classes are sorted by falling score; equal scores keep the order of classes.
pub(crate) fn rank(scores: &[f32], class: usize) -> usize {
    let own = scores[class];
    scores.iter().enumerate().filter(|&(c, s)| *s > own || (*s == own && c < class)).count()
}

/// The `k` best classes with their scores, best first; equal scores keep the order of classes.
pub fn top_k(scores: &[f32], k: usize) -> Vec<(usize, f32)> {
    let mut order: Vec<usize> = (0..scores.len()).collect();
    order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]).then(a.cmp(&b)));
    order.into_iter().take(k).map(|c| (c, scores[c])).collect()
}

/// Probabilities of logits.
pub fn softmax(logits: &[f32]) -> Vec<f32> {
    let top = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    let e: Vec<f64> = logits.iter().map(|l| f64::from(l - top).exp()).collect();
    let sum: f64 = e.iter().sum();
    e.iter().map(|v| (v / sum) as f32).collect()
}

/// Counts of (true class, predicted class).
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Confusion {
    /// Number of classes.
    pub classes: usize,
    /// `[classes, classes]`, row-major: row = true class, column = predicted class.
    pub counts: Vec<u64>,
}

impl Confusion {
    /// No samples yet.
    pub fn new(classes: usize) -> Self {
        Confusion { classes, counts: vec![0; classes * classes] }
    }

    pub(crate) fn add(&mut self, truth: usize, predicted: usize) {
        self.counts[truth * self.classes + predicted] += 1;
    }

    /// Samples of a class and how many of them were recognised.
    pub fn class(&self, class: usize) -> (u64, u64) {
        let row = &self.counts[class * self.classes..][..self.classes];
        (row.iter().sum(), row[class])
    }

    /// Mean over the classes that have samples of the share recognised (balanced accuracy); none without samples.
    pub fn mean_per_class_recall(&self) -> Option<f64> {
        let recalls =
            (0..self.classes).map(|c| self.class(c)).filter(|(n, _)| *n > 0).map(|(n, hit)| hit as f64 / n as f64);
        let (sum, count) = recalls.fold((0.0, 0u32), |(s, n), r| (s + r, n + 1));
        (count > 0).then(|| sum / f64::from(count))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_break_ties_by_class() {
        let scores = [0.5, 0.9, 0.5, 0.1];
        assert_eq!((0..4).map(|c| rank(&scores, c)).collect::<Vec<_>>(), [1, 0, 2, 3]);
        assert_eq!(top_k(&scores, 2), [(1, 0.9), (0, 0.5)]);
        assert_eq!(top_k(&scores, 9).len(), 4);
    }

    #[test]
    fn recall_is_the_mean_over_classes_that_occur() {
        let mut c = Confusion::new(3);
        for (truth, predicted) in [(0, 0), (0, 0), (0, 1), (0, 2), (1, 1)] {
            c.add(truth, predicted);
        }
        assert_eq!(c.mean_per_class_recall(), Some(0.75));
        assert_eq!(Confusion::new(2).mean_per_class_recall(), None);
    }

    #[test]
    fn probabilities_sum_to_one_for_large_logits() {
        let p = softmax(&[1000.0, 999.0, -1000.0]);
        assert!((p.iter().sum::<f32>() - 1.0).abs() < 1e-6 && (p[0] - 0.731_058_6).abs() < 1e-6, "{p:?}");
    }
}
