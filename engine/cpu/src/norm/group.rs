//! Group norm of one group: each image has a mean and a variance over all its rows and channels.

use rayon::prelude::*;

use super::Norm;
use super::kernels::{Backward, affine, input_gradient, moments, sums};
use crate::activation::Activation;
use crate::workspace::Workspace;

/// Size of a group norm over [B, R, C].
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct GroupNorm {
    /// B.
    pub batch: usize,
    /// R: rows of one image.
    pub rows: usize,
    /// C.
    pub c: usize,
    /// Added to the variance.
    pub eps: f32,
}

impl GroupNorm {
    /// The rows of one image.
    fn image(&self) -> Norm {
        Norm { rows: self.rows, c: self.c, eps: self.eps }
    }

    fn check(&self, images: &[&[f32]], channels: &[&[f32]], statistics: &[&[f32]]) {
        let len = self.batch * self.rows * self.c;
        assert!(images.iter().all(|x| x.len() == len), "x, y, dy and dx are [B, R, C]");
        assert!(channels.iter().all(|x| x.len() == self.c), "gamma and beta are [C]");
        assert!(statistics.iter().all(|x| x.len() == self.batch), "mean and rstd are [B]");
    }
}

/// y = γ·(x − mean)/√(var + eps) + β with mean and biased variance of each image; `mean` and `rstd` are \[B\].
pub fn group_norm_forward(
    d: &GroupNorm,
    x: &[f32],
    gamma: &[f32],
    beta: &[f32],
    y: &mut [f32],
    mean: &mut [f32],
    rstd: &mut [f32],
    ws: &mut Workspace,
) {
    d.check(&[x, y], &[gamma, beta], &[mean, rstd]);
    if x.is_empty() {
        return;
    }
    let (level, image) = (ws.level(), d.image());
    let (c, chunk, len) = (d.c, image.chunk_rows() * d.c, d.rows * d.c);
    // Of each image: its chunks' moments, then the mean and the scale of each channel.
    let own = (image.chunks() * 2 + 2) * c;
    let scratch = ws.take(d.batch * own);
    y.par_chunks_mut(len)
        .zip(x.par_chunks(len))
        .zip(mean.par_iter_mut().zip(rstd.par_iter_mut()))
        .zip(scratch.par_chunks_mut(own))
        .for_each(|(((y, x), (mean, rstd)), scratch)| {
            let (partials, constants) = scratch.split_at_mut(own - 2 * c);
            partials.par_chunks_mut(2 * c).zip(x.par_chunks(chunk)).for_each(|(p, x)| moments(level, c, x, p));
            (*mean, *rstd) = merge(&image, partials);
            let (means, scale) = constants.split_at_mut(c);
            means.fill(*mean);
            scale.iter_mut().zip(gamma).for_each(|(s, g)| *s = g * *rstd);
            let (means, scale) = (&*means, &*scale);
            y.par_chunks_mut(chunk)
                .zip(x.par_chunks(chunk))
                .for_each(|(y, x)| affine(level, Activation::Identity, means, scale, beta, x, y));
        });
}

/// Mean and 1/√(var + eps) of an image from its chunks' means and squared deviations per channel, merged in order
/// (Chan, Golub and LeVeque) in `f64`.
fn merge(d: &Norm, partials: &[f32]) -> (f32, f32) {
    let columns = || {
        partials.chunks_exact(2 * d.c).enumerate().flat_map(|(chunk, p)| {
            let rows = d.chunk_rows().min(d.rows - chunk * d.chunk_rows()) as f64;
            p[..d.c].iter().zip(&p[d.c..]).map(move |(mean, m2)| (rows, f64::from(*mean), f64::from(*m2)))
        })
    };
    let n = (d.rows * d.c) as f64;
    let center = columns().map(|(rows, mean, _)| rows * mean).sum::<f64>() / n;
    let m2: f64 = columns().map(|(rows, mean, m2)| m2 + rows * (mean - center) * (mean - center)).sum();
    // A rounding error may leave a constant image slightly negative; NaN has to stay NaN.
    let variance = if m2 < 0.0 { 0.0 } else { m2 / n };
    (center as f32, (1.0 / (variance + f64::from(d.eps)).sqrt()) as f32)
}

/// VJP of [`group_norm_forward`]: with g = γ·dy, dx (+)= rstd·(g − Σg/n − x̂·Σ(g·x̂)/n), the sums over the n = R·C
/// values of an image. `dgamma` and `dbeta` are added to.
pub fn group_norm_backward(
    d: &GroupNorm,
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
    d.check(&[x, dy, dx], &[gamma, dgamma, dbeta], &[mean, rstd]);
    if x.is_empty() {
        return;
    }
    let (level, image) = (ws.level(), d.image());
    let (c, chunk, len, n) = (d.c, image.chunk_rows() * d.c, d.rows * d.c, (d.rows * d.c) as f64);
    // Of each image: its chunks' sums, then six constants of each channel.
    let own = (image.chunks() * 2 + 6) * c;
    let scratch = ws.take(d.batch * own);
    dx.par_chunks_mut(len)
        .zip(x.par_chunks(len).zip(dy.par_chunks(len)))
        .zip(mean.par_iter().zip(rstd))
        .zip(scratch.par_chunks_mut(own))
        .for_each(|(((dx, (x, dy)), (mean, rstd)), scratch)| {
            let (partials, constants) = scratch.split_at_mut(own - 6 * c);
            for (constant, value) in constants.chunks_exact_mut(c).zip([*mean, *rstd, 0.0, 0.0]) {
                constant.fill(value);
            }
            constants[2 * c..3 * c].iter_mut().zip(gamma).for_each(|(s, g)| *s = g * rstd);
            let (constants, lines) = constants.split_at_mut(4 * c);
            let [mean, rstds, scale, beta] = std::array::from_fn(|i| &constants[i * c..(i + 1) * c]);
            let k = Backward { mean, rstd: rstds, scale, beta };
            partials
                .par_chunks_mut(2 * c)
                .zip(x.par_chunks(chunk).zip(dy.par_chunks(chunk)))
                .for_each(|(p, (x, dy))| sums(level, Activation::Identity, k, x, dy, p));
            let total = |at: usize| {
                let weighed = partials.chunks_exact(2 * c).flat_map(|p| p[at..at + c].iter().zip(gamma));
                weighed.map(|(sum, g)| f64::from(*sum) * f64::from(*g)).sum::<f64>()
            };
            let (slope, offset) = lines.split_at_mut(c);
            let rstd = f64::from(*rstd);
            slope.fill((-rstd * rstd * total(c) / n) as f32);
            offset.fill((-rstd * total(0) / n) as f32);
            let (slope, offset) = (&*slope, &*offset);
            dx.par_chunks_mut(chunk).zip(x.par_chunks(chunk).zip(dy.par_chunks(chunk))).for_each(|(dx, (x, dy))| {
                input_gradient(level, Activation::Identity, k, slope, offset, x, dy, dx, accumulate);
            });
        });
    for i in 0..c {
        let sum = |at: usize| {
            let images = scratch.chunks_exact(own).flat_map(|s| s[..own - 6 * c].chunks_exact(2 * c));
            images.map(|p| f64::from(p[at])).sum::<f64>()
        };
        dbeta[i] += sum(i) as f32;
        dgamma[i] += sum(c + i) as f32;
    }
}
