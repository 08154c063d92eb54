//! Losses, and the attention-transfer map that one of them compares.
//!
//! Each `*_forward` returns the loss; each `*_backward` takes its gradient `dl`. By default these nodes run on
//! dfdx ([`crate::bridge`]); the kernels here take over where a profile asks for it.

use rayon::prelude::*;

use crate::elementwise::NORM_EPS;
use crate::gemm::{Mat, gemm_serial};
use crate::layout::transpose_2d_backward;
use crate::simd::{Level, Simd};
use crate::simd_fn;
use crate::softmax::softmax_row;
use crate::workspace::Workspace;

/// The contrastive loss with soft targets, of B embeddings `a` against B' embeddings `b`, D wide.
///
/// With S = scale·a·bᵀ: L = w_row·mean_i H(P_row_i, softmax(S_i)) + w_col·mean_j H(P_col_j, softmax(Sᵀ_j)),
/// where H(p, q) = −Σ p·ln q. CLIP's loss has w_row = w_col = ½ and the identity as targets; a teacher's
/// softmax as targets gives MobileCLIP's logits level, and with `subtract_entropy` its KL form (same gradient).
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Contrastive {
    /// B.
    pub rows: usize,
    /// B'.
    pub cols: usize,
    /// D.
    pub dim: usize,
    /// Weight of the direction a → b.
    pub w_row: f32,
    /// Weight of the direction b → a.
    pub w_col: f32,
    /// Subtract the targets' entropy, so that the loss is 0 where the prediction is the target.
    pub subtract_entropy: bool,
}

impl Contrastive {
    fn check(&self, a: &[f32], b: &[f32], p_row: &[f32], p_col: &[f32]) {
        assert_eq!(a.len(), self.rows * self.dim, "a is [B, D]");
        assert_eq!(b.len(), self.cols * self.dim, "b is [B', D]");
        assert_eq!(p_row.len(), self.rows * self.cols, "p_row is [B, B']");
        assert_eq!(p_col.len(), self.rows * self.cols, "p_col is [B', B]");
    }
}

/// Rows of one task of a loss.
const ROWS: usize = 16;

/// Σ_j p_j·(lse − s_j), minus Σ p·ln(1/p) if asked, for one row of cosines with s = scale·x.
#[inline(always)]
fn cross_entropy_impl<S: Simd>(s: S, scale: f32, subtract_entropy: bool, x: &[f32], p: &[f32]) -> f64 {
    // A NaN that the maximum skips comes back through the sum.
    let top = x.iter().fold(f32::NEG_INFINITY, |a, b| if *b * scale > a { *b * scale } else { a });
    let (scales, tops) = (s.splat(scale), s.splat(top));
    let mut sum = 0.0f64;
    let mut i = 0;
    while i < x.len() {
        let e = s.exp_bounded(s.sub(s.mul(s.load_partial(&x[i..]), scales), tops));
        let mut lanes = [0.0f32; 16];
        let n = S::LANES.min(x.len() - i);
        s.store_partial(&mut lanes[..n], e);
        sum += lanes[..n].iter().map(|v| f64::from(*v)).sum::<f64>();
        i += S::LANES;
    }
    let log_sum = sum.ln();
    let mut total = 0.0;
    for (x, p) in x.iter().zip(p) {
        let p = f64::from(*p);
        total += p * (log_sum - (f64::from(scale * x) - f64::from(top)));
        if subtract_entropy && p > 0.0 {
            total += p * p.ln();
        }
    }
    total
}

/// g (+)= weight·(softmax(scale·x)·Σp − p).
#[inline(always)]
fn cross_entropy_back_impl<S: Simd>(s: S, scale: f32, weight: f32, x: &[f32], p: &[f32], g: &mut [f32]) {
    let mass: f32 = p.iter().sum();
    softmax_row(s, scale, x, g);
    for (g, p) in g.iter_mut().zip(p) {
        *g = weight * (*g * mass - p);
    }
}

#[inline(always)]
fn dot_impl<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = s.zero();
    let mut i = 0;
    while i < a.len() {
        sum = s.fma(s.load_partial(&a[i..]), s.load_partial(&b[i..]), sum);
        i += S::LANES;
    }
    s.sum(sum)
}

#[inline(always)]
fn square_distance_impl<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f64 {
    let mut total = 0.0;
    for (a, b) in a.chunks(1024).zip(b.chunks(1024)) {
        let mut sum = s.zero();
        let mut i = 0;
        while i < a.len() {
            let d = s.sub(s.load_partial(&a[i..]), s.load_partial(&b[i..]));
            sum = s.fma(d, d, sum);
            i += S::LANES;
        }
        total += f64::from(s.sum(sum));
    }
    total
}

simd_fn! {
    fn cross_entropy(scale: f32, subtract_entropy: bool, x: &[f32], p: &[f32]) -> f64 = cross_entropy_impl;
    fn cross_entropy_back(scale: f32, weight: f32, x: &[f32], p: &[f32], g: &mut [f32]) = cross_entropy_back_impl;
    fn dot(a: &[f32], b: &[f32]) -> f32 = dot_impl;
    fn square_distance(a: &[f32], b: &[f32]) -> f64 = square_distance_impl;
}

/// out [m, n] = A·B by blocks of rows, A [m, k] given by `a(first row)`.
fn product<'a>(
    level: Level,
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    a: impl Fn(usize) -> Mat<'a> + Sync,
    b: Mat<'_>,
    out: &mut [f32],
) {
    if out.is_empty() {
        return;
    }
    out.par_chunks_mut(ROWS * n).enumerate().for_each(|(block, out)| {
        let first = block * ROWS;
        gemm_serial(level, (ROWS.min(m - first), n, k), alpha, a(first), b, false, out, n);
    });
}

/// Mean over rows of the cross-entropies, summed in order in f64.
fn direction(level: Level, scale: f32, entropy: bool, cols: usize, x: &[f32], p: &[f32]) -> f64 {
    let blocks: Vec<f64> = x
        .par_chunks(ROWS * cols)
        .zip(p.par_chunks(ROWS * cols))
        .map(|(x, p)| {
            let rows = x.chunks_exact(cols).zip(p.chunks_exact(cols));
            rows.map(|(x, p)| cross_entropy(level, scale, entropy, x, p)).sum()
        })
        .collect();
    blocks.iter().sum::<f64>() / (x.len() / cols) as f64
}

/// The contrastive loss; see [`Contrastive`]. a [B, D] and b [B', D] as given (normalised by the caller),
/// p_row [B, B'], p_col [B', B]. An empty batch has loss 0.
pub fn contrastive_forward(
    d: &Contrastive,
    a: &[f32],
    b: &[f32],
    scale: f32,
    p_row: &[f32],
    p_col: &[f32],
    ws: &mut Workspace,
) -> f32 {
    d.check(a, b, p_row, p_col);
    if p_row.is_empty() {
        return 0.0;
    }
    let level = ws.level();
    let n = d.rows * d.cols;
    let [cosines, transposed] = ws.split([n, n]);
    product(
        level,
        (d.rows, d.cols, d.dim),
        1.0,
        |r| Mat::new(&a[r * d.dim..], d.dim),
        Mat::transposed(b, d.dim),
        cosines,
    );
    let mut total = 0.0;
    if d.w_row != 0.0 {
        total += f64::from(d.w_row) * direction(level, scale, d.subtract_entropy, d.cols, cosines, p_row);
    }
    if d.w_col != 0.0 {
        transpose_2d_backward(d.cols, d.rows, cosines, transposed, false);
        total += f64::from(d.w_col) * direction(level, scale, d.subtract_entropy, d.rows, transposed, p_col);
    }
    total as f32
}

/// VJP of [`contrastive_forward`] with respect to a, b and the scale; `da`, `db` and `dscale` are overwritten.
pub fn contrastive_backward(
    d: &Contrastive,
    a: &[f32],
    b: &[f32],
    scale: f32,
    p_row: &[f32],
    p_col: &[f32],
    dl: f32,
    da: &mut [f32],
    db: &mut [f32],
    dscale: &mut f32,
    ws: &mut Workspace,
) {
    d.check(a, b, p_row, p_col);
    assert_eq!(da.len(), a.len(), "da is [B, D]");
    assert_eq!(db.len(), b.len(), "db is [B', D]");
    *dscale = 0.0;
    if p_row.is_empty() {
        da.fill(0.0);
        db.fill(0.0);
        return;
    }
    let level = ws.level();
    let n = d.rows * d.cols;
    let [cosines, transposed, grad, grad_col] = ws.split([n, n, n, n]);
    product(
        level,
        (d.rows, d.cols, d.dim),
        1.0,
        |r| Mat::new(&a[r * d.dim..], d.dim),
        Mat::transposed(b, d.dim),
        cosines,
    );
    let gradient = |weight: f32, cols: usize, x: &[f32], p: &[f32], g: &mut [f32]| {
        let weight = dl * weight / (x.len() / cols) as f32;
        g.par_chunks_mut(cols)
            .zip(x.par_chunks(cols).zip(p.par_chunks(cols)))
            .with_min_len(ROWS)
            .for_each(|(g, (x, p))| cross_entropy_back(level, scale, weight, x, p, g));
    };
    if d.w_row != 0.0 {
        gradient(d.w_row, d.cols, cosines, p_row, grad);
    } else {
        grad.fill(0.0);
    }
    if d.w_col != 0.0 {
        transpose_2d_backward(d.cols, d.rows, cosines, transposed, false);
        gradient(d.w_col, d.rows, transposed, p_col, grad_col);
        transpose_2d_backward(d.rows, d.cols, grad_col, grad, true);
    }
    let grad = &*grad;
    product(level, (d.rows, d.dim, d.cols), scale, |r| Mat::new(&grad[r * d.cols..], d.cols), Mat::new(b, d.dim), da);
    product(level, (d.cols, d.dim, d.rows), scale, |r| Mat::transposed(&grad[r..], d.cols), Mat::new(a, d.dim), db);
    let sums = grad.chunks(1024).zip(cosines.chunks(1024)).map(|(g, x)| f64::from(dot(level, g, x)));
    *dscale = sums.sum::<f64>() as f32;
}

/// Mean of (a − b)²; 0 for empty slices.
pub fn mse_forward(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len(), "a and b have one length");
    if a.is_empty() {
        return 0.0;
    }
    (square_distance(Level::active(), a, b) / a.len() as f64) as f32
}

/// VJP of [`mse_forward`] for the first argument: da (+)= dl·2·(a − b)/n. Swap the arguments for the second.
pub fn mse_backward(a: &[f32], b: &[f32], dl: f32, da: &mut [f32], accumulate: bool) {
    assert!(a.len() == b.len() && da.len() == a.len(), "a, b and da have one length");
    let factor = (2.0 * f64::from(dl) / a.len().max(1) as f64) as f32;
    for ((d, a), b) in da.iter_mut().zip(a).zip(b) {
        let g = factor * (a - b);
        *d = if accumulate { *d + g } else { g };
    }
}

/// The norms (at least [`NORM_EPS`]) and the cosine of two rows.
fn cosine(level: Level, a: &[f32], b: &[f32]) -> (f32, f32, f32) {
    let norm = |x: &[f32]| {
        let norm = dot(level, x, x).sqrt();
        if norm < NORM_EPS { NORM_EPS } else { norm }
    };
    let (na, nb) = (norm(a), norm(b));
    (na, nb, dot(level, a, b) / na / nb)
}

fn check_rows(rows: usize, c: usize, lens: &[usize]) {
    for len in lens {
        assert_eq!(*len, rows * c, "every matrix is [R, C]");
    }
}

/// Mean over the rows of [R, C] of 1 − cos(a_i, b_i); 0 without rows.
pub fn cosine_forward(rows: usize, c: usize, a: &[f32], b: &[f32]) -> f32 {
    check_rows(rows, c, &[a.len(), b.len()]);
    if a.is_empty() {
        return 0.0;
    }
    let level = Level::active();
    let total: f64 =
        a.chunks_exact(c).zip(b.chunks_exact(c)).map(|(a, b)| 1.0 - f64::from(cosine(level, a, b).2)).sum();
    (total / rows as f64) as f32
}

/// VJP of [`cosine_forward`] for the first argument. Swap the arguments for the second.
pub fn cosine_backward(rows: usize, c: usize, a: &[f32], b: &[f32], dl: f32, da: &mut [f32], accumulate: bool) {
    check_rows(rows, c, &[a.len(), b.len(), da.len()]);
    if a.is_empty() {
        return;
    }
    let level = Level::active();
    let factor = -dl / rows as f32;
    for ((a, b), da) in a.chunks_exact(c).zip(b.chunks_exact(c)).zip(da.chunks_exact_mut(c)) {
        let (na, nb, cos) = cosine(level, a, b);
        // At the bound the norm is a constant.
        let along = if na > NORM_EPS { cos } else { 0.0 };
        for ((d, a), b) in da.iter_mut().zip(a).zip(b) {
            let g = factor / na * (b / nb - along * (a / na));
            *d = if accumulate { *d + g } else { g };
        }
    }
}

/// Mean over the rows of [R, C] of KL(p ‖ q) = Σ p·(ln p − ln q), p and q probabilities; 0·ln 0 = 0. A q of 0
/// (an underflowed softmax) counts as the smallest normal `f32`, so the loss stays finite.
pub fn kl_rows_forward(rows: usize, c: usize, p: &[f32], q: &[f32]) -> f32 {
    check_rows(rows, c, &[p.len(), q.len()]);
    if p.is_empty() {
        return 0.0;
    }
    let total: f64 = p
        .iter()
        .zip(q)
        .map(|(p, q)| {
            let p64 = f64::from(*p);
            // `p == 0` and not `p > 0`, so that NaN passes.
            if *p == 0.0 && !q.is_nan() { 0.0 } else { p64 * (p64.ln() - f64::from(positive(*q)).ln()) }
        })
        .sum();
    (total / rows as f64) as f32
}

/// q, or the smallest normal number where it is less; NaN stays NaN.
fn positive(q: f32) -> f32 {
    if q < f32::MIN_POSITIVE { f32::MIN_POSITIVE } else { q }
}

/// VJP of [`kl_rows_forward`] with respect to q: dq (+)= −dl·p/(q·R).
pub fn kl_rows_backward(rows: usize, c: usize, p: &[f32], q: &[f32], dl: f32, dq: &mut [f32], accumulate: bool) {
    check_rows(rows, c, &[p.len(), q.len(), dq.len()]);
    let factor = -dl / rows.max(1) as f32;
    for ((d, p), q) in dq.iter_mut().zip(p).zip(q) {
        // In f64: p/q may pass f32's range where q is tiny; the softmax behind it multiplies by q again.
        let g = (f64::from(factor) * f64::from(*p) / f64::from(positive(*q))) as f32;
        let g = g.clamp(f32::MIN, f32::MAX);
        *d = if accumulate { *d + g } else { g };
    }
}

/// The attention-transfer map of activations (Zagoruyko and Komodakis, 2017): y [B, HW] = mean over channels
/// of x² of x [B, HW, C], L2-normalised over HW.
pub fn attention_transfer_forward(batch: usize, hw: usize, c: usize, x: &[f32], y: &mut [f32]) {
    check_transfer(batch, hw, c, x, y);
    if y.is_empty() {
        return;
    }
    let level = Level::active();
    y.par_chunks_mut(hw).zip(x.par_chunks(hw * c)).for_each(|(y, x)| {
        let norm = transfer_map(level, c, x, y);
        for y in y.iter_mut() {
            *y /= norm;
        }
    });
}

/// Mean squares over the channels of one image; returns their norm over space, at least [`NORM_EPS`].
fn transfer_map(level: Level, c: usize, x: &[f32], map: &mut [f32]) -> f32 {
    for (m, x) in map.iter_mut().zip(x.chunks_exact(c)) {
        *m = dot(level, x, x) / c as f32;
    }
    let norm = dot(level, map, map).sqrt();
    if norm < NORM_EPS { NORM_EPS } else { norm }
}

/// VJP of [`attention_transfer_forward`].
pub fn attention_transfer_backward(
    batch: usize,
    hw: usize,
    c: usize,
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
) {
    check_transfer(batch, hw, c, x, dy);
    assert_eq!(dx.len(), x.len(), "dx is [B, HW, C]");
    if dx.is_empty() {
        return;
    }
    let level = Level::active();
    dx.par_chunks_mut(hw * c).zip(x.par_chunks(hw * c).zip(dy.par_chunks(hw))).for_each_init(
        || vec![0.0; hw],
        |map, (dx, (x, dy))| {
            let norm = transfer_map(level, c, x, map);
            let along = if norm > NORM_EPS { dot(level, map, dy) / norm / norm } else { 0.0 };
            for (i, (dx, x)) in dx.chunks_exact_mut(c).zip(x.chunks_exact(c)).enumerate() {
                // d/dm of m/‖m‖, then d/dx of x²/C.
                let factor = (dy[i] - map[i] * along) / norm * 2.0 / c as f32;
                for (d, x) in dx.iter_mut().zip(x) {
                    let g = factor * x;
                    *d = if accumulate { *d + g } else { g };
                }
            }
        },
    );
}

fn check_transfer(batch: usize, hw: usize, c: usize, x: &[f32], y: &[f32]) {
    assert_eq!(x.len(), batch * hw * c, "x is [B, HW, C]");
    assert_eq!(y.len(), batch * hw, "the map is [B, HW]");
}
