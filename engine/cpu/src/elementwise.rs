//! Element-wise arithmetic, broadcasts over rows or channels, and L2 normalisation of rows.

use rayon::prelude::*;

use crate::activation::CHUNK;
use crate::reduce;
use crate::simd::{Level, Simd};
use crate::simd_fn;
use crate::workspace::Workspace;

/// Smallest norm that a row is divided by, as in torch's `F.normalize`.
pub const NORM_EPS: f32 = 1e-12;

#[inline(always)]
fn add_impl<S: Simd>(_s: S, a: &[f32], b: &[f32], y: &mut [f32]) {
    for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
        *y = a + b;
    }
}

#[inline(always)]
fn mul_impl<S: Simd>(_s: S, a: &[f32], b: &[f32], y: &mut [f32], accumulate: bool) {
    if accumulate {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y += a * b;
        }
    } else {
        for ((y, a), b) in y.iter_mut().zip(a).zip(b) {
            *y = a * b;
        }
    }
}

#[inline(always)]
fn scale_impl<S: Simd>(_s: S, factor: f32, x: &[f32], y: &mut [f32], accumulate: bool) {
    if accumulate {
        for (y, x) in y.iter_mut().zip(x) {
            *y += factor * x;
        }
    } else {
        for (y, x) in y.iter_mut().zip(x) {
            *y = factor * x;
        }
    }
}

#[inline(always)]
fn add_rows_impl<S: Simd>(_s: S, b: &[f32], x: &[f32], y: &mut [f32]) {
    for (x, y) in x.chunks_exact(b.len()).zip(y.chunks_exact_mut(b.len())) {
        for ((y, x), b) in y.iter_mut().zip(x).zip(b) {
            *y = x + b;
        }
    }
}

#[inline(always)]
fn mul_rows_impl<S: Simd>(_s: S, b: &[f32], x: &[f32], y: &mut [f32], accumulate: bool) {
    for (x, y) in x.chunks_exact(b.len()).zip(y.chunks_exact_mut(b.len())) {
        mul_impl(_s, x, b, y, accumulate);
    }
}

#[inline(always)]
fn dot_rows_impl<S: Simd>(_s: S, a: &[f32], b: &[f32], sum: &mut [f32], accumulate: bool) {
    if !accumulate {
        sum.fill(0.0);
    }
    for (a, b) in a.chunks_exact(sum.len()).zip(b.chunks_exact(sum.len())) {
        for ((sum, a), b) in sum.iter_mut().zip(a).zip(b) {
            *sum += a * b;
        }
    }
}

#[inline(always)]
fn dot<S: Simd>(s: S, a: &[f32], b: &[f32]) -> f32 {
    let mut sum = s.zero();
    let mut i = 0;
    while i < a.len() {
        sum = s.fma(s.load_partial(&a[i..]), s.load_partial(&b[i..]), sum);
        i += S::LANES;
    }
    s.sum(sum)
}

#[inline(always)]
fn normalize_impl<S: Simd>(s: S, c: usize, x: &[f32], y: &mut [f32], norm: &mut [f32]) {
    for ((x, y), norm) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).zip(norm) {
        *norm = dot(s, x, x).sqrt();
        scale_impl(s, 1.0 / at_least(*norm), x, y, false);
    }
}

#[inline(always)]
fn normalize_back_impl<S: Simd>(s: S, c: usize, y: &[f32], norm: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool) {
    for (((y, dy), dx), norm) in y.chunks_exact(c).zip(dy.chunks_exact(c)).zip(dx.chunks_exact_mut(c)).zip(norm) {
        let inverse = 1.0 / at_least(*norm);
        // A row shorter than the bound is only scaled: its norm does not enter the value.
        let along = if *norm < NORM_EPS { 0.0 } else { dot(s, y, dy) };
        for ((d, y), g) in dx.iter_mut().zip(y).zip(dy) {
            let g = (g - y * along) * inverse;
            *d = if accumulate { *d + g } else { g };
        }
    }
}

/// The norm, or the bound where it is smaller; NaN stays NaN.
#[inline(always)]
fn at_least(norm: f32) -> f32 {
    if norm < NORM_EPS { NORM_EPS } else { norm }
}

simd_fn! {
    fn add_chunk(a: &[f32], b: &[f32], y: &mut [f32]) = add_impl;
    fn mul_chunk(a: &[f32], b: &[f32], y: &mut [f32], accumulate: bool) = mul_impl;
    fn scale_chunk(factor: f32, x: &[f32], y: &mut [f32], accumulate: bool) = scale_impl;
    fn add_rows_chunk(b: &[f32], x: &[f32], y: &mut [f32]) = add_rows_impl;
    fn mul_rows_chunk(b: &[f32], x: &[f32], y: &mut [f32], accumulate: bool) = mul_rows_impl;
    fn dot_rows_chunk(a: &[f32], b: &[f32], sum: &mut [f32], accumulate: bool) = dot_rows_impl;
    fn normalize_chunk(c: usize, x: &[f32], y: &mut [f32], norm: &mut [f32]) = normalize_impl;
    fn normalize_chunk_back(
        c: usize, y: &[f32], norm: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool,
    ) = normalize_back_impl;
}

/// y = a + b.
pub fn add(a: &[f32], b: &[f32], y: &mut [f32]) {
    assert!(a.len() == y.len() && b.len() == y.len(), "a, b and y have one length");
    let level = Level::active();
    y.par_chunks_mut(CHUNK)
        .zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)))
        .for_each(|(y, (a, b))| add_chunk(level, a, b, y));
}

/// The VJP of [`add`] for one operand, and of any op that passes its gradient on: dx (+)= dy.
pub fn copy_or_add(dy: &[f32], dx: &mut [f32], accumulate: bool) {
    if accumulate {
        axpy(1.0, dy, dx);
    } else {
        assert_eq!(dy.len(), dx.len(), "dy and dx have one length");
        dx.par_chunks_mut(CHUNK).zip(dy.par_chunks(CHUNK)).for_each(|(dx, dy)| dx.copy_from_slice(dy));
    }
}

/// y = x + b for each row of x [R, N], b \[N\]: a bias or a positional embedding.
pub fn add_broadcast(x: &[f32], b: &[f32], y: &mut [f32]) {
    check_rows(x, b.len());
    assert_eq!(x.len(), y.len(), "x and y have one length");
    if y.is_empty() {
        return;
    }
    let (level, chunk) = (Level::active(), row_chunk(b.len()));
    y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).for_each(|(y, x)| add_rows_chunk(level, b, x, y));
}

/// VJP of [`add_broadcast`] for b: db += Σ over the rows of dy. ([`copy_or_add`] is the VJP for x.)
pub fn add_broadcast_backward(dy: &[f32], db: &mut [f32], ws: &mut Workspace) {
    let n = db.len();
    check_rows(dy, n);
    if dy.is_empty() {
        return;
    }
    reduce::add_column_sums(dy, n, db, ws);
}

fn check_rows(x: &[f32], n: usize) {
    assert!(if n == 0 { x.is_empty() } else { x.len().is_multiple_of(n) }, "{} is not rows of {n}", x.len());
}

/// Elements of one task, whole rows of n.
fn row_chunk(n: usize) -> usize {
    (CHUNK / n).max(1) * n
}

/// y = a ∘ b.
pub fn mul(a: &[f32], b: &[f32], y: &mut [f32]) {
    mul_add(a, b, y, false);
}

fn mul_add(a: &[f32], b: &[f32], y: &mut [f32], accumulate: bool) {
    assert!(a.len() == y.len() && b.len() == y.len(), "both factors and the result have one length");
    let level = Level::active();
    y.par_chunks_mut(CHUNK)
        .zip(a.par_chunks(CHUNK).zip(b.par_chunks(CHUNK)))
        .for_each(|(y, (a, b))| mul_chunk(level, a, b, y, accumulate));
}

/// VJP of [`mul`] for one factor, given the other: da (+)= b ∘ dy.
pub fn mul_backward(other: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool) {
    mul_add(other, dy, dx, accumulate);
}

/// y = e^x, for the handful of elements of a logit scale. Its VJP is [`mul_backward`] with y.
pub fn exp(x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "x and y have one length");
    for (y, x) in y.iter_mut().zip(x) {
        *y = x.exp();
    }
}

/// y = factor·x.
pub fn scale(x: &[f32], factor: f32, y: &mut [f32]) {
    scale_add(factor, x, y, false);
}

/// VJP of [`scale`]: dx (+)= factor·dy.
pub fn scale_backward(factor: f32, dy: &[f32], dx: &mut [f32], accumulate: bool) {
    scale_add(factor, dy, dx, accumulate);
}

/// y += a·x.
pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) {
    scale_add(a, x, y, true);
}

fn scale_add(factor: f32, x: &[f32], y: &mut [f32], accumulate: bool) {
    assert_eq!(x.len(), y.len(), "x and y have one length");
    let level = Level::active();
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| scale_chunk(level, factor, x, y, accumulate));
}

/// y[b, i, c] = x[b, i, c]·s[b, c]; x [B, HW, C], s [B, C] (squeeze-and-excitation; with a batch of 1, layer scale).
pub fn channel_scale_forward(batch: usize, hw: usize, c: usize, x: &[f32], s: &[f32], y: &mut [f32]) {
    assert!(x.len() == batch * hw * c && y.len() == x.len(), "x and y are [B, HW, C]");
    assert_eq!(s.len(), batch * c, "s is [B, C]");
    if y.is_empty() {
        return;
    }
    let (level, chunk) = (Level::active(), row_chunk(c));
    y.par_chunks_mut(hw * c).zip(x.par_chunks(hw * c).zip(s.par_chunks(c))).for_each(|(y, (x, s))| {
        y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).for_each(|(y, x)| mul_rows_chunk(level, s, x, y, false));
    });
}

/// VJP of [`channel_scale_forward`]: dx (+)= dy·s, ds (+)= Σ over space of dy·x. Each chunk of rows leaves a partial
/// sum for ds; these are added in order, in `f64`.
pub fn channel_scale_backward(
    batch: usize,
    hw: usize,
    c: usize,
    x: &[f32],
    s: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate_x: bool,
    ds: &mut [f32],
    accumulate_s: bool,
    ws: &mut Workspace,
) {
    assert!(x.len() == batch * hw * c && dy.len() == x.len() && dx.len() == x.len(), "x, dy and dx are [B, HW, C]");
    assert!(s.len() == batch * c && ds.len() == s.len(), "s and ds are [B, C]");
    if dx.is_empty() {
        if !accumulate_s {
            ds.fill(0.0);
        }
        return;
    }
    let (level, chunk, image) = (ws.level(), row_chunk(c), hw * c);
    let partials = ws.take(batch * image.div_ceil(chunk) * c);
    let own = partials.len() / batch;
    dx.par_chunks_mut(image)
        .zip(x.par_chunks(image).zip(dy.par_chunks(image)))
        .zip(s.par_chunks(c).zip(ds.par_chunks_mut(c)))
        .zip(partials.par_chunks_mut(own))
        .for_each(|(((dx, (x, dy)), (s, ds)), partials)| {
            dx.par_chunks_mut(chunk)
                .zip(x.par_chunks(chunk).zip(dy.par_chunks(chunk)))
                .zip(partials.par_chunks_mut(c))
                .for_each(|((dx, (x, dy)), partial)| {
                    mul_rows_chunk(level, s, dy, dx, accumulate_x);
                    dot_rows_chunk(level, x, dy, partial, false);
                });
            for (i, ds) in ds.iter_mut().enumerate() {
                let sum: f64 = partials.chunks_exact(c).map(|p| f64::from(p[i])).sum();
                *ds = if accumulate_s { *ds + sum as f32 } else { sum as f32 };
            }
        });
}

/// y[b, i] (+)= x[b, i]·m[b]; x [B, len], m \[B\] (stochastic depth's mask). The VJP for x is the same with dy for x.
pub fn scale_samples(batch: usize, len: usize, x: &[f32], m: &[f32], y: &mut [f32], accumulate: bool) {
    assert!(x.len() == batch * len && y.len() == x.len(), "x and y are [B, len]");
    assert_eq!(m.len(), batch, "m is [B]");
    if y.is_empty() {
        return;
    }
    let level = Level::active();
    y.par_chunks_mut(len).zip(x.par_chunks(len)).zip(m.par_iter()).for_each(|((y, x), m)| {
        let chunks = y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK));
        chunks.for_each(|(y, x)| scale_chunk(level, *m, x, y, accumulate));
    });
}

/// y = x/max(‖x‖₂, [`NORM_EPS`]) for each row of [R, C]; `norm` \[R\] keeps ‖x‖₂.
pub fn l2_normalize_forward(rows: usize, c: usize, x: &[f32], y: &mut [f32], norm: &mut [f32]) {
    assert!(x.len() == rows * c && y.len() == x.len(), "x and y are [R, C]");
    assert_eq!(norm.len(), rows, "norm is [R]");
    if y.is_empty() {
        return norm.fill(0.0);
    }
    let (level, chunk) = (Level::active(), row_chunk(c));
    y.par_chunks_mut(chunk)
        .zip(x.par_chunks(chunk))
        .zip(norm.par_chunks_mut(chunk / c))
        .for_each(|((y, x), norm)| normalize_chunk(level, c, x, y, norm));
}

/// VJP of [`l2_normalize_forward`] from its results: dx (+)= (dy − y·(y·dy))/‖x‖₂.
pub fn l2_normalize_backward(
    rows: usize,
    c: usize,
    y: &[f32],
    norm: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
) {
    assert!(y.len() == rows * c && dy.len() == y.len() && dx.len() == y.len(), "y, dy and dx are [R, C]");
    assert_eq!(norm.len(), rows, "norm is [R]");
    if dx.is_empty() {
        return;
    }
    let (level, chunk) = (Level::active(), row_chunk(c));
    dx.par_chunks_mut(chunk)
        .zip(y.par_chunks(chunk).zip(dy.par_chunks(chunk)))
        .zip(norm.par_chunks(chunk / c))
        .for_each(|((dx, (y, dy)), norm)| normalize_chunk_back(level, c, y, norm, dy, dx, accumulate));
}
