//! SigLIP's pairwise loss (Zhai et al. 2023, eq. 1): every image–text pair is a binary classification of its own.

use rayon::prelude::*;

use crate::gemm::{Gemm, gemm};
use crate::workspace::Workspace;

/// The sigmoid loss of B embeddings `a` against B' embeddings `b`, D wide, with targets t in 0..1 (SigLIP: the identity).
///
/// With l = scale·a·bᵀ + bias: L = −1/B·Σ_ij [t·ln σ(l) + (1−t)·ln σ(−l)]. The sum is over all pairs, the mean over rows
/// only, as in the paper and in open_clip's `SigLipLoss`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SigmoidLoss {
    /// B.
    pub rows: usize,
    /// B'.
    pub cols: usize,
    /// D.
    pub dim: usize,
}

impl SigmoidLoss {
    fn check(&self, a: &[f32], b: &[f32], t: &[f32]) {
        assert_eq!(a.len(), self.rows * self.dim, "a is [B, D]");
        assert_eq!(b.len(), self.cols * self.dim, "b is [B', D]");
        assert_eq!(t.len(), self.rows * self.cols, "t is [B, B']");
    }

    /// a·bᵀ.
    fn products(&self) -> Gemm {
        Gemm { m: self.rows, n: self.cols, k: self.dim, trans_a: false, trans_b: true }
    }
}

/// −t·ln σ(l) − (1−t)·ln σ(−l), without cancellation at either end.
fn cross_entropy(l: f64, t: f64) -> f64 {
    // Not `max`, which drops a NaN.
    let positive = if l < 0.0 { 0.0 } else { l };
    positive - t * l + (-l.abs()).exp().ln_1p()
}

fn sigmoid(l: f64) -> f64 {
    1.0 / (1.0 + (-l).exp())
}

/// The sigmoid loss; see [`SigmoidLoss`]. An empty batch has loss 0.
pub fn sigmoid_loss_forward(
    d: &SigmoidLoss,
    a: &[f32],
    b: &[f32],
    scale: f32,
    bias: f32,
    t: &[f32],
    ws: &mut Workspace,
) -> f32 {
    d.check(a, b, t);
    if t.is_empty() {
        return 0.0;
    }
    let mut x = vec![0.0; t.len()];
    gemm(&d.products(), 1.0, a, b, 0.0, &mut x, ws);
    let (scale, bias) = (f64::from(scale), f64::from(bias));
    let row = |(x, t): (&[f32], &[f32])| -> f64 {
        x.iter().zip(t).map(|(x, t)| cross_entropy(scale * f64::from(*x) + bias, f64::from(*t))).sum()
    };
    let rows: Vec<f64> = x.par_chunks(d.cols).zip(t.par_chunks(d.cols)).map(row).collect();
    (rows.iter().sum::<f64>() / d.rows as f64) as f32
}

/// VJP of [`sigmoid_loss_forward`] with respect to a, b, the scale and the bias, all overwritten:
/// g = dl/B·(σ(l) − t), da = scale·g·b, db = scale·gᵀ·a, dscale = Σ g∘(a·bᵀ), dbias = Σ g.
pub fn sigmoid_loss_backward(
    d: &SigmoidLoss,
    a: &[f32],
    b: &[f32],
    scale: f32,
    bias: f32,
    t: &[f32],
    dl: f32,
    da: &mut [f32],
    db: &mut [f32],
    [dscale, dbias]: [&mut f32; 2],
    ws: &mut Workspace,
) {
    d.check(a, b, t);
    assert!(da.len() == a.len() && db.len() == b.len(), "gradients are as long as their arguments");
    (*dscale, *dbias) = (0.0, 0.0);
    if t.is_empty() {
        da.fill(0.0);
        db.fill(0.0);
        return;
    }
    let mut g = vec![0.0; t.len()];
    gemm(&d.products(), 1.0, a, b, 0.0, &mut g, ws);
    let (wide, offset, weight) = (f64::from(scale), f64::from(bias), f64::from(dl) / d.rows as f64);
    let row = |(x, t): (&mut [f32], &[f32])| -> (f64, f64) {
        let (mut by_scale, mut by_bias) = (0.0, 0.0);
        for (x, t) in x.iter_mut().zip(t) {
            let cosine = f64::from(*x);
            let g = weight * (sigmoid(wide * cosine + offset) - f64::from(*t));
            by_scale += g * cosine;
            by_bias += g;
            *x = g as f32;
        }
        (by_scale, by_bias)
    };
    let sums: Vec<(f64, f64)> = g.par_chunks_mut(d.cols).zip(t.par_chunks(d.cols)).map(row).collect();
    *dscale = sums.iter().map(|s| s.0).sum::<f64>() as f32;
    *dbias = sums.iter().map(|s| s.1).sum::<f64>() as f32;
    let rows = Gemm { m: d.rows, n: d.dim, k: d.cols, trans_a: false, trans_b: false };
    gemm(&rows, scale, &g, b, 0.0, da, ws);
    let columns = Gemm { m: d.cols, n: d.dim, k: d.rows, trans_a: true, trans_b: false };
    gemm(&columns, scale, &g, a, 0.0, db, ws);
}
