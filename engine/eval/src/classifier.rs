//! The zero-shot classifier: class weights from prompts (Radford et al. 2021, §3.1.4).

use mcpipe_cpu::Workspace;
use mcpipe_cpu::gemm::{Gemm, gemm};

use crate::error::EvalError;

/// Scale of the logits.
const LOGIT_SCALE: f32 = 100.0;

/// Divides by the L2 norm, in place; false where the row is zero or not finite.
#[must_use]
pub fn normalize(row: &mut [f32]) -> bool {
    let norm = row.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    for v in row.iter_mut() {
        *v = (f64::from(*v) / norm) as f32;
    }
    norm.is_finite() && norm > 0.0
}

/// Normalised class weights `[classes, D]`.
#[derive(Clone, Debug, PartialEq)]
pub struct Classifier {
    weights: Vec<f32>,
    classes: usize,
    dim: usize,
}

impl Classifier {
    /// The classifier of prompt embeddings `[classes, templates, D]`: each normalised, mean over the templates,
    /// normalised again.
    ///
    /// # Errors
    /// No class or template, sizes that don't fit, or an embedding that is zero or not finite.
    pub fn new(prompts: &[f32], classes: usize, templates: usize) -> Result<Self, EvalError> {
        let rows = classes * templates;
        if rows == 0 || prompts.is_empty() || !prompts.len().is_multiple_of(rows) {
            return Err(EvalError::Shape(format!(
                "{} values are not the embeddings of {classes} classes in {templates} templates",
                prompts.len()
            )));
        }
        let dim = prompts.len() / rows;
        let mut weights = Vec::with_capacity(classes * dim);
        for (class, prompts) in prompts.chunks_exact(templates * dim).enumerate() {
            let mut mean = vec![0.0f32; dim];
            for prompt in prompts.chunks_exact(dim) {
                let mut prompt = prompt.to_vec();
                if !normalize(&mut prompt) {
                    return Err(EvalError::NotFinite(format!("a prompt of class {class}")));
                }
                mean.iter_mut().zip(&prompt).for_each(|(m, p)| *m += p / templates as f32);
            }
            if !normalize(&mut mean) {
                return Err(EvalError::NotFinite(format!("class {class} (its prompts cancel out)")));
            }
            weights.extend(mean);
        }
        Ok(Classifier { weights, classes, dim })
    }

    /// Number of classes.
    pub fn classes(&self) -> usize {
        self.classes
    }

    /// Dimension of the embeddings.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Normalised class weights `[classes, D]`.
    pub fn weights(&self) -> &[f32] {
        &self.weights
    }

    /// Logits `[n, classes]` = 100 · f · Wᵀ of image embeddings `[n, D]`, normalised here.
    ///
    /// # Errors
    /// Embeddings of another dimension; a zero or non-finite one (with its row as name).
    pub fn logits(&self, embeddings: &[f32]) -> Result<Vec<f32>, EvalError> {
        self.scaled(embeddings, LOGIT_SCALE)
    }

    /// Cosines `[n, classes]` = f · Wᵀ of image embeddings `[n, D]`, normalised here.
    ///
    /// # Errors
    /// As [`logits`](Self::logits).
    pub fn cosines(&self, embeddings: &[f32]) -> Result<Vec<f32>, EvalError> {
        self.scaled(embeddings, 1.0)
    }

    fn scaled(&self, embeddings: &[f32], scale: f32) -> Result<Vec<f32>, EvalError> {
        if !embeddings.len().is_multiple_of(self.dim) {
            return Err(EvalError::Shape(format!(
                "image embeddings ({} values) don't have the prompts' dimension {}",
                embeddings.len(),
                self.dim
            )));
        }
        let mut f = embeddings.to_vec();
        if let Some(row) = f.chunks_exact_mut(self.dim).position(|row| !normalize(row)) {
            return Err(EvalError::NotFinite(format!("image {row} of the batch")));
        }
        Ok(products(&f, &self.weights, self.dim, scale))
    }
}

/// `alpha · a · bᵀ` of rows of `dim`.
pub(crate) fn products(a: &[f32], b: &[f32], dim: usize, alpha: f32) -> Vec<f32> {
    let (m, n) = (a.len() / dim, b.len() / dim);
    let mut out = vec![0.0; m * n];
    if m * n > 0 {
        let d = Gemm { m, n, k: dim, trans_a: false, trans_b: true };
        gemm(&d, alpha, a, b, 0.0, &mut out, &mut Workspace::default());
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn prompts_are_averaged_on_the_sphere() {
        // Class 0: (3,0) and (0,5) → (1,1)/√2. Class 1: (−2,0) twice.
        let c = Classifier::new(&[3.0, 0.0, 0.0, 5.0, -2.0, 0.0, -1.0, 0.0], 2, 2).unwrap();
        let h = 0.5f32.sqrt();
        assert!(c.weights().iter().zip([h, h, -1.0, 0.0]).all(|(a, b)| (a - b).abs() < 1e-6), "{c:?}");
        let logits = c.logits(&[10.0, 0.0, 0.0, 0.1]).unwrap();
        let expected = [100.0 * h, -100.0, 100.0 * h, 0.0];
        assert!(logits.iter().zip(expected).all(|(a, b)| (a - b).abs() < 1e-4), "{logits:?}");
        let cosines = c.cosines(&[10.0, 0.0, 0.0, 0.1]).unwrap();
        assert!(cosines.iter().zip([h, -1.0, h, 0.0]).all(|(a, b)| (a - b).abs() < 1e-6), "{cosines:?}");
    }

    #[test]
    fn refuses_what_has_no_direction() {
        assert!(matches!(Classifier::new(&[1.0, 0.0, -1.0, 0.0], 1, 2), Err(EvalError::NotFinite(_))));
        assert!(matches!(Classifier::new(&[f32::NAN, 0.0], 1, 1), Err(EvalError::NotFinite(_))));
        assert!(matches!(Classifier::new(&[1.0, 0.0, 1.0], 1, 2), Err(EvalError::Shape(_))));
        let c = Classifier::new(&[1.0, 0.0], 1, 1).unwrap();
        assert!(matches!(c.logits(&[1.0]), Err(EvalError::Shape(_))));
        assert!(matches!(c.logits(&[f32::INFINITY, 0.0]), Err(EvalError::NotFinite(_))));
    }
}
