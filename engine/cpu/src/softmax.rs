//! Softmax and log-softmax over the rows of [R, C], with a temperature.

use rayon::prelude::*;

use crate::activation::CHUNK;
use crate::simd::{Level, Simd};
use crate::simd_fn;

/// Largest element, or NaN if there is one.
#[inline(always)]
fn largest<S: Simd>(s: S, x: &[f32]) -> f32 {
    let mut best = s.splat(f32::NEG_INFINITY);
    let mut i = 0;
    while i + S::LANES <= x.len() {
        best = s.max(best, s.load(&x[i..]));
        i += S::LANES;
    }
    let tail = x[i..].iter().fold(f32::NEG_INFINITY, |a, b| if *b > a { *b } else { a });
    let head = if i > 0 { s.max_lane(best) } else { f32::NEG_INFINITY };
    if tail > head { tail } else { head }
}

/// y = softmax(scale·x). A NaN in x makes the whole row NaN; a row whose maximum is −∞ is NaN too, as in torch.
#[inline(always)]
pub(crate) fn softmax_row<S: Simd>(s: S, scale: f32, x: &[f32], y: &mut [f32]) {
    let sum = shifted_exp(s, scale, x, y).1;
    let inverse = s.splat(1.0 / sum);
    let mut i = 0;
    while i < y.len() {
        let v = s.mul(s.load_partial(&y[i..]), inverse);
        s.store_partial(&mut y[i..], v);
        i += S::LANES;
    }
}

/// y = exp(scale·x − max); returns the maximum of scale·x and the sum of y.
#[inline(always)]
fn shifted_exp<S: Simd>(s: S, scale: f32, x: &[f32], y: &mut [f32]) -> (f32, f32) {
    let top = scale * largest(s, x);
    let (scales, tops) = (s.splat(scale), s.splat(top));
    let mut sum = s.zero();
    let mut i = 0;
    while i + S::LANES <= x.len() {
        let e = s.exp_bounded(s.sub(s.mul(s.load(&x[i..]), scales), tops));
        s.store(&mut y[i..], e);
        sum = s.add(sum, e);
        i += S::LANES;
    }
    let mut total = s.sum(sum);
    if i < x.len() {
        let e = s.exp_bounded(s.sub(s.mul(s.load_partial(&x[i..]), scales), tops));
        s.store_partial(&mut y[i..], e);
        total += y[i..].iter().sum::<f32>();
    }
    (top, total)
}

#[inline(always)]
fn rows_impl<S: Simd>(s: S, c: usize, scale: f32, x: &[f32], y: &mut [f32]) {
    for (x, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)) {
        softmax_row(s, scale, x, y);
    }
}

#[inline(always)]
fn log_rows_impl<S: Simd>(s: S, c: usize, scale: f32, x: &[f32], y: &mut [f32]) {
    let scales = s.splat(scale);
    for (x, y) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)) {
        let (top, sum) = shifted_exp(s, scale, x, y);
        let (tops, logs) = (s.splat(top), s.splat(sum.ln()));
        let mut i = 0;
        while i < c {
            let v = s.sub(s.sub(s.mul(s.load_partial(&x[i..]), scales), tops), logs);
            s.store_partial(&mut y[i..], v);
            i += S::LANES;
        }
    }
}

#[inline(always)]
fn back_rows_impl<S: Simd>(s: S, c: usize, scale: f32, y: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool) {
    let scales = s.splat(scale);
    for ((y, dy), dx) in y.chunks_exact(c).zip(dy.chunks_exact(c)).zip(dx.chunks_exact_mut(c)) {
        let mut dot = s.zero();
        let mut i = 0;
        while i < c {
            dot = s.fma(s.load_partial(&y[i..]), s.load_partial(&dy[i..]), dot);
            i += S::LANES;
        }
        let dot = s.splat(s.sum(dot));
        i = 0;
        while i < c {
            let g = s.mul(s.mul(scales, s.load_partial(&y[i..])), s.sub(s.load_partial(&dy[i..]), dot));
            let g = if accumulate { s.add(g, s.load_partial(&dx[i..])) } else { g };
            s.store_partial(&mut dx[i..], g);
            i += S::LANES;
        }
    }
}

#[inline(always)]
fn log_back_rows_impl<S: Simd>(s: S, c: usize, scale: f32, y: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool) {
    let scales = s.splat(scale);
    for ((y, dy), dx) in y.chunks_exact(c).zip(dy.chunks_exact(c)).zip(dx.chunks_exact_mut(c)) {
        let mut sum = s.zero();
        let mut i = 0;
        while i < c {
            sum = s.add(sum, s.load_partial(&dy[i..]));
            i += S::LANES;
        }
        let sum = s.splat(s.sum(sum));
        i = 0;
        while i < c {
            let p = s.exp_bounded(s.load_partial(&y[i..]));
            let g = s.mul(scales, s.sub(s.load_partial(&dy[i..]), s.mul(p, sum)));
            let g = if accumulate { s.add(g, s.load_partial(&dx[i..])) } else { g };
            s.store_partial(&mut dx[i..], g);
            i += S::LANES;
        }
    }
}

simd_fn! {
    fn softmax_chunk(c: usize, scale: f32, x: &[f32], y: &mut [f32]) = rows_impl;
    fn log_softmax_chunk(c: usize, scale: f32, x: &[f32], y: &mut [f32]) = log_rows_impl;
    fn softmax_chunk_back(c: usize, scale: f32, y: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool) = back_rows_impl;
    fn log_softmax_chunk_back(
        c: usize, scale: f32, y: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool,
    ) = log_back_rows_impl;
}

fn check(rows: usize, c: usize, temperature: f32, slices: &[usize]) {
    assert!(temperature > 0.0, "temperature {temperature} is not positive");
    for len in slices {
        assert_eq!(*len, rows * c, "every matrix is [R, C]");
    }
}

/// Elements of one task: whole rows.
fn chunk(c: usize) -> usize {
    (CHUNK / c).max(1) * c
}

/// y = softmax(x/temperature) over each row of [R, C].
pub fn softmax_rows_forward(rows: usize, c: usize, temperature: f32, x: &[f32], y: &mut [f32]) {
    check(rows, c, temperature, &[x.len(), y.len()]);
    if y.is_empty() {
        return;
    }
    let level = Level::active();
    y.par_chunks_mut(chunk(c))
        .zip(x.par_chunks(chunk(c)))
        .for_each(|(y, x)| softmax_chunk(level, c, 1.0 / temperature, x, y));
}

/// VJP of [`softmax_rows_forward`] from its result `y`.
pub fn softmax_rows_backward(
    rows: usize,
    c: usize,
    temperature: f32,
    y: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
) {
    check(rows, c, temperature, &[y.len(), dy.len(), dx.len()]);
    if dx.is_empty() {
        return;
    }
    let level = Level::active();
    dx.par_chunks_mut(chunk(c))
        .zip(y.par_chunks(chunk(c)).zip(dy.par_chunks(chunk(c))))
        .for_each(|(dx, (y, dy))| softmax_chunk_back(level, c, 1.0 / temperature, y, dy, dx, accumulate));
}

/// y = ln softmax(x/temperature) over each row of [R, C].
pub fn log_softmax_rows_forward(rows: usize, c: usize, temperature: f32, x: &[f32], y: &mut [f32]) {
    check(rows, c, temperature, &[x.len(), y.len()]);
    if y.is_empty() {
        return;
    }
    let level = Level::active();
    y.par_chunks_mut(chunk(c))
        .zip(x.par_chunks(chunk(c)))
        .for_each(|(y, x)| log_softmax_chunk(level, c, 1.0 / temperature, x, y));
}

/// VJP of [`log_softmax_rows_forward`] from its result `y`.
pub fn log_softmax_rows_backward(
    rows: usize,
    c: usize,
    temperature: f32,
    y: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
) {
    check(rows, c, temperature, &[y.len(), dy.len(), dx.len()]);
    if dx.is_empty() {
        return;
    }
    let level = Level::active();
    dx.par_chunks_mut(chunk(c))
        .zip(y.par_chunks(chunk(c)).zip(dy.par_chunks(chunk(c))))
        .for_each(|(dx, (y, dy))| log_softmax_chunk_back(level, c, 1.0 / temperature, y, dy, dx, accumulate));
}
