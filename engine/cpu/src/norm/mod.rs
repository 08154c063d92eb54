//! Batch norm with a fused activation, layer norm and group norm.
//!
//! Letters: R rows (batch · height · width, or batch · tokens), C channels. x, y, dy, dx are [R, C];
//! everything named after a channel is \[C\].
//!
//! Rows are cut into fixed chunks, whatever the number of threads; each chunk leaves partial sums in `f32`
//! and the partial sums are merged in order, in `f64`.

mod group;
mod kernels;

use rayon::prelude::*;

use crate::activation::{Activation, CHUNK};
use crate::simd::Level;
use crate::workspace::Workspace;
use kernels::{Backward, affine, input_gradient, layer_rows, layer_rows_back, moments, sums};

pub use group::{GroupNorm, group_norm_backward, group_norm_forward};

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
        (CHUNK / self.c.max(1)).max(1)
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

/// y = γ·(x − mean)/√(var + eps) + β with mean and biased variance of each row; `mean` and `rstd` are \[R\].
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
