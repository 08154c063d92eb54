//! Loops of the norms over some rows, for each SIMD level.

use crate::activation::{Activation, with_act};
use crate::columns::{get, over_columns, set};
use crate::simd::Simd;
use crate::simd_fn;
use crate::vmath::Act;

/// Rows read side by side: a channel's constants and accumulators are loaded once for so many rows.
const QUAD: usize = 4;

/// Per-channel constants of batch norm's backward pass, each \[C\].
#[derive(Clone, Copy)]
pub(super) struct Backward<'a> {
    pub(super) mean: &'a [f32],
    /// 1/√(var + eps): x̂ = (x − mean)·rstd.
    pub(super) rstd: &'a [f32],
    /// γ·rstd: z = (x − mean)·scale + β; also the factor of g in dx.
    pub(super) scale: &'a [f32],
    pub(super) beta: &'a [f32],
}

impl<'a> Backward<'a> {
    /// The same, with lengths that the compiler can see are `c`.
    #[inline(always)]
    fn of(self, c: usize) -> Self {
        Backward { mean: &self.mean[..c], rstd: &self.rstd[..c], scale: &self.scale[..c], beta: &self.beta[..c] }
    }
}

/// N rows of `c` elements.
#[inline(always)]
fn rows_of<const N: usize>(x: &[f32], c: usize) -> [&[f32]; N] {
    std::array::from_fn(|r| &x[r * c..(r + 1) * c])
}

#[inline(always)]
fn moments_impl<S: Simd>(s: S, c: usize, x: &[f32], partial: &mut [f32]) {
    partial.fill(0.0);
    let (sum, square) = partial.split_at_mut(c);
    let (first, square) = (&x[..c], &mut square[..c]);
    let mut quads = x.chunks_exact(QUAD * c);
    for rows in &mut quads {
        add_moments::<S, QUAD>(s, first, rows, sum, square);
    }
    for row in quads.remainder().chunks_exact(c) {
        add_moments::<S, 1>(s, first, row, sum, square);
    }
    let rows = (x.len() / c) as f32;
    let (inverse, count) = (s.splat(1.0 / rows), s.splat(rows));
    over_columns!(S::LANES, c, |i, FULL| {
        // SAFETY: all rows here have `c` elements.
        unsafe {
            let offset = s.mul(get::<S, FULL>(s, sum, i), inverse);
            let excess = s.mul(count, s.mul(offset, offset));
            let m2 = s.sub(get::<S, FULL>(s, square, i), excess);
            set::<S, FULL>(s, square, i, m2);
            set::<S, FULL>(s, sum, i, s.add(get::<S, FULL>(s, first, i), offset));
        }
    });
}

/// Adds x − first and its square, summed over N rows, to the accumulators.
#[inline(always)]
fn add_moments<S: Simd, const N: usize>(s: S, first: &[f32], rows: &[f32], sum: &mut [f32], square: &mut [f32]) {
    let c = first.len();
    let rows = rows_of::<N>(rows, c);
    let (sum, square) = (&mut sum[..c], &mut square[..c]);
    over_columns!(S::LANES, c, |i, FULL| {
        // SAFETY: all rows here have `c` elements.
        unsafe {
            let shift = get::<S, FULL>(s, first, i);
            let (mut total, mut squares) = (get::<S, FULL>(s, sum, i), get::<S, FULL>(s, square, i));
            for row in rows {
                let v = s.sub(get::<S, FULL>(s, row, i), shift);
                total = s.add(total, v);
                squares = s.fma(v, v, squares);
            }
            set::<S, FULL>(s, sum, i, total);
            set::<S, FULL>(s, square, i, squares);
        }
    });
}

#[inline(always)]
fn affine_act<S: Simd, A: Act>(s: S, mean: &[f32], scale: &[f32], beta: &[f32], x: &[f32], y: &mut [f32]) {
    let c = mean.len();
    let (scale, beta) = (&scale[..c], &beta[..c]);
    let (mut x_quads, mut y_quads) = (x.chunks_exact(QUAD * c), y.chunks_exact_mut(QUAD * c));
    for (x, y) in (&mut x_quads).zip(&mut y_quads) {
        affine_rows::<S, A, QUAD>(s, mean, scale, beta, x, y);
    }
    for (x, y) in x_quads.remainder().chunks_exact(c).zip(y_quads.into_remainder().chunks_exact_mut(c)) {
        affine_rows::<S, A, 1>(s, mean, scale, beta, x, y);
    }
}

#[inline(always)]
fn affine_rows<S: Simd, A: Act, const N: usize>(
    s: S,
    mean: &[f32],
    scale: &[f32],
    beta: &[f32],
    x: &[f32],
    y: &mut [f32],
) {
    let c = mean.len();
    let (x, y) = (rows_of::<N>(x, c), &mut y[..N * c]);
    over_columns!(S::LANES, c, |i, FULL| {
        // SAFETY: all rows here have `c` elements.
        unsafe {
            let (mean, scale) = (get::<S, FULL>(s, mean, i), get::<S, FULL>(s, scale, i));
            let beta = get::<S, FULL>(s, beta, i);
            for (r, x) in x.iter().enumerate() {
                let z = s.fma(s.sub(get::<S, FULL>(s, x, i), mean), scale, beta);
                set::<S, FULL>(s, y.get_unchecked_mut(r * c..(r + 1) * c), i, A::value(s, z));
            }
        }
    });
}

#[inline(always)]
fn affine_impl<S: Simd>(s: S, act: Activation, mean: &[f32], scale: &[f32], beta: &[f32], x: &[f32], y: &mut [f32]) {
    with_act!(act, A => affine_act::<S, A>(s, mean, scale, beta, x, y))
}

#[inline(always)]
fn sums_act<S: Simd, A: Act>(s: S, k: Backward<'_>, x: &[f32], dy: &[f32], partial: &mut [f32]) {
    let c = k.scale.len();
    partial.fill(0.0);
    let (sum_g, sum_gx) = partial.split_at_mut(c);
    let (mut x_quads, mut dy_quads) = (x.chunks_exact(QUAD * c), dy.chunks_exact(QUAD * c));
    for (x, dy) in (&mut x_quads).zip(&mut dy_quads) {
        add_sums::<S, A, QUAD>(s, k, x, dy, sum_g, sum_gx);
    }
    for (x, dy) in x_quads.remainder().chunks_exact(c).zip(dy_quads.remainder().chunks_exact(c)) {
        add_sums::<S, A, 1>(s, k, x, dy, sum_g, sum_gx);
    }
    for (sum, rstd) in sum_gx.iter_mut().zip(k.rstd) {
        *sum *= rstd;
    }
}

/// Adds g and g·(x − mean), summed over N rows, to the accumulators.
#[inline(always)]
fn add_sums<S: Simd, A: Act, const N: usize>(
    s: S,
    k: Backward<'_>,
    x: &[f32],
    dy: &[f32],
    sum_g: &mut [f32],
    sum_gx: &mut [f32],
) {
    let c = k.scale.len();
    let k = k.of(c);
    let (x, dy) = (rows_of::<N>(x, c), rows_of::<N>(dy, c));
    let (sum_g, sum_gx) = (&mut sum_g[..c], &mut sum_gx[..c]);
    over_columns!(S::LANES, c, |i, FULL| {
        // SAFETY: all rows here have `c` elements.
        unsafe {
            let (mean, scale) = (get::<S, FULL>(s, k.mean, i), get::<S, FULL>(s, k.scale, i));
            let beta = get::<S, FULL>(s, k.beta, i);
            let (mut g_sum, mut gx_sum) = (get::<S, FULL>(s, sum_g, i), get::<S, FULL>(s, sum_gx, i));
            for (x, dy) in x.iter().zip(dy) {
                let v = s.sub(get::<S, FULL>(s, x, i), mean);
                let g = s.mul(get::<S, FULL>(s, dy, i), A::slope(s, s.fma(v, scale, beta)));
                g_sum = s.add(g_sum, g);
                gx_sum = s.fma(g, v, gx_sum);
            }
            set::<S, FULL>(s, sum_g, i, g_sum);
            set::<S, FULL>(s, sum_gx, i, gx_sum);
        }
    });
}

#[inline(always)]
fn sums_impl<S: Simd>(s: S, act: Activation, k: Backward<'_>, x: &[f32], dy: &[f32], partial: &mut [f32]) {
    with_act!(act, A => sums_act::<S, A>(s, k, x, dy, partial))
}

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
    let (mut x_quads, mut dy_quads) = (x.chunks_exact(QUAD * c), dy.chunks_exact(QUAD * c));
    let mut dx_quads = dx.chunks_exact_mut(QUAD * c);
    for ((x, dy), dx) in (&mut x_quads).zip(&mut dy_quads).zip(&mut dx_quads) {
        input_rows::<S, A, QUAD>(s, k, slope, offset, x, dy, dx, accumulate);
    }
    let rest = x_quads.remainder().chunks_exact(c).zip(dy_quads.remainder().chunks_exact(c));
    for ((x, dy), dx) in rest.zip(dx_quads.into_remainder().chunks_exact_mut(c)) {
        input_rows::<S, A, 1>(s, k, slope, offset, x, dy, dx, accumulate);
    }
}

#[inline(always)]
fn input_rows<S: Simd, A: Act, const N: usize>(
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
    let k = k.of(c);
    let (slope, offset) = (&slope[..c], &offset[..c]);
    let (x, dy, dx) = (rows_of::<N>(x, c), rows_of::<N>(dy, c), &mut dx[..N * c]);
    over_columns!(S::LANES, c, |i, FULL| {
        // SAFETY: all rows here have `c` elements.
        unsafe {
            let (mean, scale) = (get::<S, FULL>(s, k.mean, i), get::<S, FULL>(s, k.scale, i));
            let beta = get::<S, FULL>(s, k.beta, i);
            let (slope, offset) = (get::<S, FULL>(s, slope, i), get::<S, FULL>(s, offset, i));
            for (r, (x, dy)) in x.iter().zip(dy).enumerate() {
                let v = s.sub(get::<S, FULL>(s, x, i), mean);
                let g = s.mul(get::<S, FULL>(s, dy, i), A::slope(s, s.fma(v, scale, beta)));
                let mut d = s.fma(scale, g, s.fma(v, slope, offset));
                let out = dx.get_unchecked_mut(r * c..(r + 1) * c);
                if accumulate {
                    d = s.add(d, get::<S, FULL>(s, out, i));
                }
                set::<S, FULL>(s, out, i, d);
            }
        }
    });
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
    let beta = &beta[..c];
    let whole = c / S::LANES * S::LANES;
    for (r, (row, out)) in x.chunks_exact(c).zip(y.chunks_exact_mut(c)).enumerate() {
        let mut sum = s.zero();
        // SAFETY: all rows here have `c` elements.
        over_columns!(S::LANES, c, |i, FULL| sum = s.add(sum, unsafe { get::<S, FULL>(s, row, i) }));
        let center = s.sum(sum) / c as f32;
        let centers = s.splat(center);
        let mut square = s.zero();
        over_columns!(S::LANES, whole, |i, FULL| {
            // SAFETY: `whole` columns are whole vectors of the row.
            let v = s.sub(unsafe { get::<S, FULL>(s, &row[..whole], i) }, centers);
            square = s.fma(v, v, square);
        });
        let rest: f32 = row[whole..].iter().map(|v| (v - center) * (v - center)).sum();
        let inverse = 1.0 / ((s.sum(square) + rest) / c as f32 + eps).sqrt();
        let inverses = s.splat(inverse);
        over_columns!(S::LANES, c, |i, FULL| {
            // SAFETY: all rows here have `c` elements.
            unsafe {
                let v = s.mul(s.sub(get::<S, FULL>(s, row, i), centers), inverses);
                let y = s.fma(v, get::<S, FULL>(s, gamma, i), get::<S, FULL>(s, beta, i));
                set::<S, FULL>(s, out, i, y);
            }
        });
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
    let dbeta = &mut dbeta[..c];
    let rows = x.chunks_exact(c).zip(dy.chunks_exact(c)).zip(dx.chunks_exact_mut(c));
    for (r, ((row, dy_row), out)) in rows.enumerate() {
        let (rstds, center) = (s.splat(rstd[r]), s.splat(mean[r]));
        let (mut sum_g, mut sum_gx) = (s.zero(), s.zero());
        over_columns!(S::LANES, c, |i, FULL| {
            // SAFETY: all rows here have `c` elements.
            unsafe {
                let normal = s.mul(s.sub(get::<S, FULL>(s, row, i), center), rstds);
                let up = get::<S, FULL>(s, dy_row, i);
                let for_gamma = s.fma(up, normal, get::<S, FULL>(s, dgamma, i));
                set::<S, FULL>(s, dgamma, i, for_gamma);
                let for_beta = s.add(up, get::<S, FULL>(s, dbeta, i));
                set::<S, FULL>(s, dbeta, i, for_beta);
                // Lanes past the end hold γ = 0 and dy = 0, so they add nothing.
                let g = s.mul(up, get::<S, FULL>(s, gamma, i));
                sum_g = s.add(sum_g, g);
                sum_gx = s.fma(g, normal, sum_gx);
            }
        });
        let mean_g = s.splat(s.sum(sum_g) / c as f32);
        let mean_gx = s.splat(s.sum(sum_gx) / c as f32);
        over_columns!(S::LANES, c, |i, FULL| {
            // SAFETY: all rows here have `c` elements.
            unsafe {
                let normal = s.mul(s.sub(get::<S, FULL>(s, row, i), center), rstds);
                let g = s.mul(get::<S, FULL>(s, dy_row, i), get::<S, FULL>(s, gamma, i));
                let mut d = s.mul(rstds, s.sub(s.sub(g, mean_g), s.mul(normal, mean_gx)));
                if accumulate {
                    d = s.add(d, get::<S, FULL>(s, out, i));
                }
                set::<S, FULL>(s, out, i, d);
            }
        });
    }
}

simd_fn! {
    /// Per-channel mean and sum of squared deviations of some rows into `partial` [2·C], about the first row so
    /// that a large common offset does not cancel.
    pub(super) fn moments(c: usize, x: &[f32], partial: &mut [f32]) = moments_impl;
    /// y = act((x − mean)·scale + beta) per channel. Subtracting first keeps the digits that a large mean would
    /// cost.
    pub(super) fn affine(
        act: Activation, mean: &[f32], scale: &[f32], beta: &[f32], x: &[f32], y: &mut [f32],
    ) = affine_impl;
    /// Σ g and Σ g·x̂ per channel over some rows into `partial` [2·C], g = dy·act'(z).
    pub(super) fn sums(act: Activation, k: Backward<'_>, x: &[f32], dy: &[f32], partial: &mut [f32]) = sums_impl;
    /// dx (+)= scale·g + (x − mean)·slope + offset.
    pub(super) fn input_gradient(
        act: Activation, k: Backward<'_>, slope: &[f32], offset: &[f32],
        x: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool,
    ) = input_impl;
    /// Layer norm of some rows.
    pub(super) fn layer_rows(
        eps: f32, gamma: &[f32], beta: &[f32], x: &[f32], y: &mut [f32], mean: &mut [f32], rstd: &mut [f32],
    ) = layer_forward_impl;
    /// Its VJP; dγ and dβ of these rows into `partial` [2·C].
    pub(super) fn layer_rows_back(
        gamma: &[f32], mean: &[f32], rstd: &[f32], x: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool,
        partial: &mut [f32],
    ) = layer_backward_impl;
}
