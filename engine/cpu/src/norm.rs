//! Batch norm with a fused activation, and layer norm.
//!
//! Letters: R rows (batch · height · width, or batch · tokens), C channels. x, y, dy, dx are [R, C];
//! everything named after a channel is [C].
//!
//! Rows are cut into fixed chunks, whatever the number of threads; each chunk leaves partial sums in `f32`
//! and the partial sums are merged in order, in `f64`.

use rayon::prelude::*;

use crate::activation::{Activation, CHUNK, with_act};
use crate::simd::{Level, Simd};
use crate::simd_fn;
use crate::vmath::Act;
use crate::workspace::Workspace;

/// Size of a normalisation: over the rows for batch norm, over the channels for layer norm.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Norm {
    /// R.
    pub rows: usize,
    /// C.
    pub c: usize,
    /// Added to the variance.
    pub eps: f32,
}

impl Norm {
    fn check(&self, x: &[f32], y: &[f32]) {
        assert_eq!(x.len(), self.rows * self.c, "x is [R, C]");
        assert_eq!(y.len(), self.rows * self.c, "y is [R, C]");
    }

    fn check_channels(&self, channels: &[&[f32]]) {
        for values in channels {
            assert_eq!(values.len(), self.c, "a channel vector is [C]");
        }
    }

    /// Rows of one task.
    fn chunk_rows(&self) -> usize {
        (2 * CHUNK / self.c.max(1)).max(1)
    }

    fn chunks(&self) -> usize {
        self.rows.div_ceil(self.chunk_rows())
    }
}

/// Runs `task(chunk, rows of x, partial)` for each chunk of rows, in parallel.
fn for_chunks(d: &Norm, partials: &mut [f32], task: impl Fn(usize, &mut [f32]) + Sync) {
    let width = partials.len() / d.chunks().max(1);
    partials.par_chunks_mut(width.max(1)).enumerate().for_each(|(chunk, partial)| task(chunk, partial));
}

/// Elements of chunk `chunk`.
fn span(d: &Norm, chunk: usize) -> std::ops::Range<usize> {
    let rows = d.chunk_rows();
    chunk * rows * d.c..((chunk + 1) * rows).min(d.rows) * d.c
}

/// Rows summed before a partial sum is moved to a second accumulator, which bounds rounding growth.
const RUN: usize = 64;

/// Per-channel mean and sum of squared deviations of some rows, about the first row so that a large common
/// offset does not cancel.
#[inline(always)]
fn moments_impl<S: Simd>(s: S, c: usize, x: &[f32], partial: &mut [f32]) {
    let (mean, m2) = partial.split_at_mut(c);
    let rows = (x.len() / c) as f32;
    let inverse = s.splat(1.0 / rows);
    let count = s.splat(rows);
    let mut col = 0;
    while col < c {
        let shift = s.load_partial(&x[col..c]);
        let (mut sum, mut square) = (s.zero(), s.zero());
        for run in x.chunks(RUN * c) {
            let (mut run_sum, mut run_square) = (s.zero(), s.zero());
            for row in run.chunks_exact(c) {
                let v = s.sub(s.load_partial(&row[col..]), shift);
                run_sum = s.add(run_sum, v);
                run_square = s.fma(v, v, run_square);
            }
            sum = s.add(sum, run_sum);
            square = s.add(square, run_square);
        }
        let offset = s.mul(sum, inverse);
        s.store_partial(&mut mean[col..], s.add(shift, offset));
        s.store_partial(&mut m2[col..], s.sub(square, s.mul(count, s.mul(offset, offset))));
        col += S::LANES;
    }
}

/// y = act((x − mean)·scale + beta), per channel. Subtracting first keeps the digits that a large mean would cost.
#[inline(always)]
fn affine_act<S: Simd, A: Act>(s: S, mean: &[f32], scale: &[f32], beta: &[f32], x: &[f32], y: &mut [f32]) {
    let c = scale.len();
    for (row, out) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)) {
        let mut i = 0;
        while i < c {
            let v = s.sub(s.load_partial(&row[i..]), s.load_partial(&mean[i..]));
            let z = s.fma(v, s.load_partial(&scale[i..]), s.load_partial(&beta[i..]));
            s.store_partial(&mut out[i..], A::value(s, z));
            i += S::LANES;
        }
    }
}

#[inline(always)]
fn affine_impl<S: Simd>(s: S, act: Activation, mean: &[f32], scale: &[f32], beta: &[f32], x: &[f32], y: &mut [f32]) {
    with_act!(act, A => affine_act::<S, A>(s, mean, scale, beta, x, y))
}

/// Per-channel constants of the backward pass.
#[derive(Clone, Copy)]
struct Backward<'a> {
    /// mean.
    mean: &'a [f32],
    /// 1/√(var + eps): x̂ = (x − mean)·rstd.
    rstd: &'a [f32],
    /// γ·rstd: z = (x − mean)·scale + β; also the factor of g in dx.
    scale: &'a [f32],
    /// β.
    beta: &'a [f32],
}

/// Σ g and Σ g·x̂ per channel over some rows, g = dy·act'(z).
#[inline(always)]
fn sums_act<S: Simd, A: Act>(s: S, k: Backward<'_>, x: &[f32], dy: &[f32], partial: &mut [f32]) {
    let c = k.scale.len();
    let (sum_g, sum_gx) = partial.split_at_mut(c);
    let mut col = 0;
    while col < c {
        let (scale, beta) = (s.load_partial(&k.scale[col..]), s.load_partial(&k.beta[col..]));
        let mean = s.load_partial(&k.mean[col..]);
        let (mut total_g, mut total_gx) = (s.zero(), s.zero());
        for (x_run, dy_run) in x.chunks(RUN * c).zip(dy.chunks(RUN * c)) {
            let (mut run_g, mut run_gx) = (s.zero(), s.zero());
            for (row, dy_row) in x_run.chunks_exact(c).zip(dy_run.chunks_exact(c)) {
                let v = s.sub(s.load_partial(&row[col..]), mean);
                let g = s.mul(s.load_partial(&dy_row[col..]), A::slope(s, s.fma(v, scale, beta)));
                run_g = s.add(run_g, g);
                run_gx = s.fma(g, v, run_gx);
            }
            total_g = s.add(total_g, run_g);
            total_gx = s.add(total_gx, run_gx);
        }
        s.store_partial(&mut sum_g[col..], total_g);
        s.store_partial(&mut sum_gx[col..], s.mul(total_gx, s.load_partial(&k.rstd[col..])));
        col += S::LANES;
    }
}

#[inline(always)]
fn sums_impl<S: Simd>(s: S, act: Activation, k: Backward<'_>, x: &[f32], dy: &[f32], partial: &mut [f32]) {
    with_act!(act, A => sums_act::<S, A>(s, k, x, dy, partial))
}

/// dx (+)= scale·g + (x − mean)·slope + offset.
#[inline(always)]
fn input_act<S: Simd, A: Act>(
    s: S,
    k: Backward<'_>,
    slope: &[f32],
    offset: &[f32],
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
) {
    let c = k.scale.len();
    for ((row, dy_row), out) in x.chunks_exact(c).zip(dy.chunks_exact(c)).zip(dx.chunks_exact_mut(c)) {
        let mut i = 0;
        while i < c {
            let v = s.sub(s.load_partial(&row[i..]), s.load_partial(&k.mean[i..]));
            let scale = s.load_partial(&k.scale[i..]);
            let z = s.fma(v, scale, s.load_partial(&k.beta[i..]));
            let g = s.mul(s.load_partial(&dy_row[i..]), A::slope(s, z));
            let through_mean = s.fma(v, s.load_partial(&slope[i..]), s.load_partial(&offset[i..]));
            let mut d = s.fma(scale, g, through_mean);
            if accumulate {
                d = s.add(d, s.load_partial(&out[i..]));
            }
            s.store_partial(&mut out[i..], d);
            i += S::LANES;
        }
    }
}

#[inline(always)]
fn input_impl<S: Simd>(
    s: S,
    act: Activation,
    k: Backward<'_>,
    slope: &[f32],
    offset: &[f32],
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
) {
    with_act!(act, A => input_act::<S, A>(s, k, slope, offset, x, dy, dx, accumulate))
}

simd_fn! {
    fn moments(c: usize, x: &[f32], partial: &mut [f32]) = moments_impl;
    fn affine(act: Activation, mean: &[f32], scale: &[f32], beta: &[f32], x: &[f32], y: &mut [f32]) = affine_impl;
    fn sums(act: Activation, k: Backward<'_>, x: &[f32], dy: &[f32], partial: &mut [f32]) = sums_impl;
    fn input_gradient(
        act: Activation, k: Backward<'_>, slope: &[f32], offset: &[f32],
        x: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool,
    ) = input_impl;
}

/// y = act(γ·(x − mean)/√(var + eps) + β) with the batch's own mean and biased variance; writes `mean` and
/// `rstd` = 1/√(var + eps) for the backward pass and for [`batch_norm_update_running`].
pub fn batch_norm_train_forward(
    d: &Norm,
    act: Activation,
    x: &[f32],
    gamma: &[f32],
    beta: &[f32],
    y: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
    ws: &mut Workspace,
) {
    d.check(x, y);
    d.check_channels(&[gamma, beta, mean, rstd]);
    if x.is_empty() {
        return;
    }
    let level = ws.level();
    let [partials, scale] = ws.split([d.chunks() * 2 * d.c, d.c]);
    for_chunks(d, partials, |chunk, partial| moments(level, d.c, &x[span(d, chunk)], partial));
    merge_moments(d, partials, mean, rstd);
    for i in 0..d.c {
        scale[i] = gamma[i] * rstd[i];
    }
    apply(d, level, act, mean, scale, beta, x, y);
}

fn apply(d: &Norm, level: Level, act: Activation, mean: &[f32], scale: &[f32], beta: &[f32], x: &[f32], y: &mut [f32]) {
    let chunk = d.chunk_rows() * d.c;
    y.par_chunks_mut(chunk).zip(x.par_chunks(chunk)).for_each(|(y, x)| affine(level, act, mean, scale, beta, x, y));
}

/// Merges the chunks' means and squared deviations (Chan, Golub and LeVeque) in `f64`.
fn merge_moments(d: &Norm, partials: &[f32], mean: &mut [f32], rstd: &mut [f32]) {
    let rows_of = |chunk: usize| (span(d, chunk).len() / d.c) as f64;
    for i in 0..d.c {
        let of_chunks = || partials.chunks_exact(2 * d.c).enumerate();
        let total: f64 = of_chunks().map(|(chunk, p)| rows_of(chunk) * f64::from(p[i])).sum();
        let center = total / d.rows as f64;
        let m2: f64 = of_chunks()
            .map(|(chunk, p)| {
                let delta = f64::from(p[i]) - center;
                f64::from(p[d.c + i]) + rows_of(chunk) * delta * delta
            })
            .sum();
        // A rounding error may leave a constant channel slightly negative; NaN has to stay NaN.
        let variance = if m2 < 0.0 { 0.0 } else { m2 / d.rows as f64 };
        mean[i] = center as f32;
        rstd[i] = (1.0 / (variance + f64::from(d.eps)).sqrt()) as f32;
    }
}

/// Moves running statistics towards a batch's: running += momentum·(batch − running), with the unbiased
/// variance R/(R − 1)·var, as torch does. `mean` and `rstd` are those of [`batch_norm_train_forward`].
pub fn batch_norm_update_running(
    d: &Norm,
    momentum: f32,
    mean: &[f32],
    rstd: &[f32],
    running_mean: &mut [f32],
    running_var: &mut [f32],
) {
    d.check_channels(&[mean, rstd, running_mean, running_var]);
    let rows = d.rows as f64;
    let unbias = if d.rows > 1 { rows / (rows - 1.0) } else { 1.0 };
    for i in 0..d.c {
        let rstd = f64::from(rstd[i]);
        let variance = 1.0 / (rstd * rstd) - f64::from(d.eps);
        let variance = if variance < 0.0 { 0.0 } else { variance * unbias } as f32;
        running_mean[i] += momentum * (mean[i] - running_mean[i]);
        running_var[i] += momentum * (variance - running_var[i]);
    }
}

/// y = act(γ·(x − running_mean)/√(running_var + eps) + β).
pub fn batch_norm_eval_forward(
    d: &Norm,
    act: Activation,
    x: &[f32],
    gamma: &[f32],
    beta: &[f32],
    running_mean: &[f32],
    running_var: &[f32],
    y: &mut [f32],
) {
    d.check(x, y);
    d.check_channels(&[gamma, beta, running_mean, running_var]);
    if x.is_empty() {
        return;
    }
    let scale: Vec<f32> = (0..d.c).map(|i| gamma[i] * rstd_of(running_var[i], d.eps)).collect();
    apply(d, Level::active(), act, running_mean, &scale, beta, x, y);
}

fn rstd_of(var: f32, eps: f32) -> f32 {
    (1.0 / (f64::from(var) + f64::from(eps)).sqrt()) as f32
}

/// VJP of [`batch_norm_train_forward`], through the batch statistics too. `dgamma` and `dbeta` are added to.
pub fn batch_norm_train_backward(
    d: &Norm,
    act: Activation,
    x: &[f32],
    gamma: &[f32],
    beta: &[f32],
    mean: &[f32],
    rstd: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
    dgamma: &mut [f32],
    dbeta: &mut [f32],
    ws: &mut Workspace,
) {
    d.check_channels(&[mean, rstd]);
    backward(d, act, x, gamma, beta, |i| (mean[i], rstd[i]), dy, dx, accumulate, dgamma, dbeta, true, ws);
}

/// VJP of [`batch_norm_eval_forward`], the running statistics being constants. `dgamma` and `dbeta` are added to.
pub fn batch_norm_eval_backward(
    d: &Norm,
    act: Activation,
    x: &[f32],
    gamma: &[f32],
    beta: &[f32],
    running_mean: &[f32],
    running_var: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
    dgamma: &mut [f32],
    dbeta: &mut [f32],
    ws: &mut Workspace,
) {
    d.check_channels(&[running_mean, running_var]);
    let of = |i: usize| (running_mean[i], rstd_of(running_var[i], d.eps));
    backward(d, act, x, gamma, beta, of, dy, dx, accumulate, dgamma, dbeta, false, ws);
}

/// The VJP with mean and rstd of channel i given by `stats`; `batch` says whether they depend on x:
/// dx = γ·rstd·(g − Σg/R − x̂·Σ(g·x̂)/R), without the last two terms if they do not.
fn backward(
    d: &Norm,
    act: Activation,
    x: &[f32],
    gamma: &[f32],
    beta: &[f32],
    stats: impl Fn(usize) -> (f32, f32),
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
    dgamma: &mut [f32],
    dbeta: &mut [f32],
    batch: bool,
    ws: &mut Workspace,
) {
    d.check(x, dy);
    d.check(x, dx);
    d.check_channels(&[gamma, beta, dgamma, dbeta]);
    if x.is_empty() {
        return;
    }
    let level = ws.level();
    let c = d.c;
    let [partials, means, rstds, scale, slope, offset] = ws.split([d.chunks() * 2 * c, c, c, c, c, c]);
    for i in 0..c {
        (means[i], rstds[i]) = stats(i);
        scale[i] = gamma[i] * rstds[i];
    }
    let k = Backward { mean: means, rstd: rstds, scale, beta };
    for_chunks(d, partials, |chunk, partial| {
        sums(level, act, k, &x[span(d, chunk)], &dy[span(d, chunk)], partial);
    });
    for i in 0..c {
        let sum = |at: usize| partials.chunks_exact(2 * c).map(|p| f64::from(p[at])).sum::<f64>();
        let (sum_g, sum_gx) = (sum(i), sum(c + i));
        dbeta[i] += sum_g as f32;
        dgamma[i] += sum_gx as f32;
        if batch {
            let factor = f64::from(k.scale[i]) / d.rows as f64;
            slope[i] = (-factor * sum_gx * f64::from(k.rstd[i])) as f32;
            offset[i] = (-factor * sum_g) as f32;
        } else {
            slope[i] = 0.0;
            offset[i] = 0.0;
        }
    }
    let (slope, offset) = (&*slope, &*offset);
    let chunk = d.chunk_rows() * c;
    dx.par_chunks_mut(chunk)
        .zip(x.par_chunks(chunk).zip(dy.par_chunks(chunk)))
        .for_each(|(dx, (x, dy))| input_gradient(level, act, k, slope, offset, x, dy, dx, accumulate));
}

#[inline(always)]
fn layer_forward_impl<S: Simd>(
    s: S,
    eps: f32,
    gamma: &[f32],
    beta: &[f32],
    x: &[f32],
    y: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    let c = gamma.len();
    for (r, (row, out)) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).enumerate() {
        let mut sum = s.zero();
        let mut i = 0;
        while i < c {
            sum = s.add(sum, s.load_partial(&row[i..]));
            i += S::LANES;
        }
        let center = s.sum(sum) / c as f32;
        let centers = s.splat(center);
        let mut square = s.zero();
        i = 0;
        while i + S::LANES <= c {
            let v = s.sub(s.load(&row[i..]), centers);
            square = s.fma(v, v, square);
            i += S::LANES;
        }
        let mut total = s.sum(square);
        for value in &row[i..] {
            total += (value - center) * (value - center);
        }
        let inverse = 1.0 / (total / c as f32 + eps).sqrt();
        let inverses = s.splat(inverse);
        i = 0;
        while i < c {
            let v = s.mul(s.sub(s.load_partial(&row[i..]), centers), inverses);
            s.store_partial(&mut out[i..], s.fma(v, s.load_partial(&gamma[i..]), s.load_partial(&beta[i..])));
            i += S::LANES;
        }
        mean[r] = center;
        rstd[r] = inverse;
    }
}

#[inline(always)]
fn layer_backward_impl<S: Simd>(
    s: S,
    gamma: &[f32],
    mean: &[f32],
    rstd: &[f32],
    x: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
    partial: &mut [f32],
) {
    let c = gamma.len();
    partial.fill(0.0);
    let (dgamma, dbeta) = partial.split_at_mut(c);
    let rows = x.chunks_exact(c).zip(dy.chunks_exact(c)).zip(dx.chunks_exact_mut(c));
    for (r, ((row, dy_row), out)) in rows.enumerate() {
        let (rstds, center) = (s.splat(rstd[r]), s.splat(mean[r]));
        let (mut sum_g, mut sum_gx) = (s.zero(), s.zero());
        let mut i = 0;
        while i < c {
            let normal = s.mul(s.sub(s.load_partial(&row[i..]), center), rstds);
            let up = s.load_partial(&dy_row[i..]);
            let for_gamma = s.fma(up, normal, s.load_partial(&dgamma[i..]));
            s.store_partial(&mut dgamma[i..], for_gamma);
            let for_beta = s.add(up, s.load_partial(&dbeta[i..]));
            s.store_partial(&mut dbeta[i..], for_beta);
            // Lanes past the end hold γ = 0 and dy = 0, so they add nothing.
            let g = s.mul(up, s.load_partial(&gamma[i..]));
            sum_g = s.add(sum_g, g);
            sum_gx = s.fma(g, normal, sum_gx);
            i += S::LANES;
        }
        let mean_g = s.splat(s.sum(sum_g) / c as f32);
        let mean_gx = s.splat(s.sum(sum_gx) / c as f32);
        i = 0;
        while i < c {
            let normal = s.mul(s.sub(s.load_partial(&row[i..]), center), rstds);
            let g = s.mul(s.load_partial(&dy_row[i..]), s.load_partial(&gamma[i..]));
            let mut d = s.mul(rstds, s.sub(s.sub(g, mean_g), s.mul(normal, mean_gx)));
            if accumulate {
                d = s.add(d, s.load_partial(&out[i..]));
            }
            s.store_partial(&mut out[i..], d);
            i += S::LANES;
        }
    }
}

simd_fn! {
    fn layer_rows(
        eps: f32, gamma: &[f32], beta: &[f32], x: &[f32], y: &mut [f32], mean: &mut [f32], rstd: &mut [f32],
    ) = layer_forward_impl;
    fn layer_rows_back(
        gamma: &[f32], mean: &[f32], rstd: &[f32], x: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool,
        partial: &mut [f32],
    ) = layer_backward_impl;
}

/// y = γ·(x − mean)/√(var + eps) + β with mean and biased variance of each row; `mean` and `rstd` are [R].
pub fn layer_norm_forward(
    d: &Norm,
    x: &[f32],
    gamma: &[f32],
    beta: &[f32],
    y: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
) {
    d.check(x, y);
    d.check_channels(&[gamma, beta]);
    assert!(mean.len() == d.rows && rstd.len() == d.rows, "mean and rstd are [R]");
    if x.is_empty() {
        return;
    }
    let level = Level::active();
    let rows = d.chunk_rows();
    y.par_chunks_mut(rows * d.c)
        .zip(x.par_chunks(rows * d.c))
        .zip(mean.par_chunks_mut(rows).zip(rstd.par_chunks_mut(rows)))
        .for_each(|((y, x), (mean, rstd))| layer_rows(level, d.eps, gamma, beta, x, y, mean, rstd));
}

/// VJP of [`layer_norm_forward`]. `dgamma` and `dbeta` are added to.
pub fn layer_norm_backward(
    d: &Norm,
    x: &[f32],
    gamma: &[f32],
    mean: &[f32],
    rstd: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
    dgamma: &mut [f32],
    dbeta: &mut [f32],
    ws: &mut Workspace,
) {
    d.check(x, dy);
    d.check(x, dx);
    d.check_channels(&[gamma, dgamma, dbeta]);
    assert!(mean.len() == d.rows && rstd.len() == d.rows, "mean and rstd are [R]");
    if x.is_empty() {
        return;
    }
    let (level, rows, c) = (ws.level(), d.chunk_rows(), d.c);
    let partials = ws.take(d.chunks() * 2 * c);
    dx.par_chunks_mut(rows * c)
        .zip(x.par_chunks(rows * c).zip(dy.par_chunks(rows * c)))
        .zip(mean.par_chunks(rows).zip(rstd.par_chunks(rows)))
        .zip(partials.par_chunks_mut(2 * c))
        .for_each(|(((dx, (x, dy)), (mean, rstd)), partial)| {
            layer_rows_back(level, gamma, mean, rstd, x, dy, dx, accumulate, partial);
        });
    for i in 0..c {
        let sum = |at: usize| partials.chunks_exact(2 * c).map(|p| f64::from(p[at])).sum::<f64>();
        dgamma[i] += sum(i) as f32;
        dbeta[i] += sum(c + i) as f32;
    }
}
