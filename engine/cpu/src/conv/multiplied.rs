//! Depthwise convolutions with several outputs per channel (`groups == c_in`, `c_out = m·c_in`): each channel is
//! repeated m times, then convolved as a plain depthwise one.

use rayon::prelude::*;

use super::Conv2d;
use crate::activation::CHUNK;
use crate::depthwise;
use crate::simd::{Level, Simd};
use crate::simd_fn;
use crate::workspace::Workspace;

/// The depthwise convolution of the repeated channels.
fn spread(d: &Conv2d) -> Conv2d {
    Conv2d { c_in: d.c_out, groups: d.c_out, ..*d }
}

#[inline(always)]
fn repeat_impl<S: Simd>(_s: S, m: usize, x: &[f32], y: &mut [f32]) {
    // Few multipliers are in use; a constant one compiles to shuffles.
    match m {
        2 => repeat_by::<2>(x, y),
        4 => repeat_by::<4>(x, y),
        _ => y.chunks_exact_mut(m).zip(x).for_each(|(y, x)| y.fill(*x)),
    }
}

#[inline(always)]
fn repeat_by<const M: usize>(x: &[f32], y: &mut [f32]) {
    for (y, x) in y.chunks_exact_mut(M).zip(x) {
        for v in y {
            *v = *x;
        }
    }
}

#[inline(always)]
fn gather_impl<S: Simd>(_s: S, m: usize, dy: &[f32], dx: &mut [f32], accumulate: bool) {
    for (dx, dy) in dx.iter_mut().zip(dy.chunks_exact(m)) {
        let sum: f32 = dy.iter().sum();
        *dx = if accumulate { *dx + sum } else { sum };
    }
}

simd_fn! {
    /// y[i·m + j] = x[i] for j in 0..m.
    fn repeat(m: usize, x: &[f32], y: &mut [f32]) = repeat_impl;
    /// dx[i] (+)= Σ_j dy[i·m + j].
    fn gather(m: usize, dy: &[f32], dx: &mut [f32], accumulate: bool) = gather_impl;
}

/// x with each channel m times, in a buffer of the workspace.
fn repeated(d: &Conv2d, level: Level, x: &[f32], ws: &mut Workspace) -> Vec<f32> {
    let m = d.c_out / d.c_in;
    let mut buffer = ws.lend(x.len() * m);
    buffer[..x.len() * m].par_chunks_mut(CHUNK * m).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| repeat(level, m, x, y));
    buffer
}

/// `y = conv(x, w) + bias`.
pub(super) fn forward(d: &Conv2d, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32], ws: &mut Workspace) {
    let d2 = spread(d);
    let buffer = repeated(d, ws.level(), x, ws);
    depthwise::forward(&d2, &buffer[..d.batch * d.h * d.w * d.c_out], w, bias, y, ws);
    ws.give_back(buffer);
}

/// `dx (+)= conv^T(dy, w)`.
pub(super) fn backward_data(d: &Conv2d, w: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool, ws: &mut Workspace) {
    let (level, m) = (ws.level(), d.c_out / d.c_in);
    let mut buffer = ws.lend(dx.len() * m);
    let wide = &mut buffer[..dx.len() * m];
    depthwise::backward_data(&spread(d), w, dy, wide, false, ws);
    dx.par_chunks_mut(CHUNK).zip(wide.par_chunks(CHUNK * m)).for_each(|(dx, dy)| gather(level, m, dy, dx, accumulate));
    ws.give_back(buffer);
}

/// `dw += gradient by the weights`.
pub(super) fn backward_weights(d: &Conv2d, x: &[f32], dy: &[f32], dw: &mut [f32], ws: &mut Workspace) {
    let buffer = repeated(d, ws.level(), x, ws);
    depthwise::backward_weights(&spread(d), &buffer[..d.batch * d.h * d.w * d.c_out], dy, dw, ws);
    ws.give_back(buffer);
}
