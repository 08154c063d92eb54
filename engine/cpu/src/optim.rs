//! Parameter updates and the reductions that guard them, each over one parameter's flat slice.

use rayon::prelude::*;

use crate::activation::CHUNK;
use crate::simd::{Level, Simd};
use crate::simd_fn;

/// Constants of one AdamW step.
#[derive(Clone, Copy, Debug, PartialEq)]
struct AdamW {
    /// Learning rate.
    lr: f32,
    /// Decay of the mean of the gradients, β₁.
    beta1: f32,
    /// Decay of the mean of their squares, β₂.
    beta2: f32,
    /// Added to the root of the second moment.
    eps: f32,
    /// Decoupled weight decay: θ ← θ·(1 − lr·wd) before the step.
    weight_decay: f32,
    /// Number of this step, from 1.
    step: u64,
}

#[inline(always)]
fn adamw_impl<S: Simd>(s: S, d: &AdamW, params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32]) {
    // In f64: with β₂ = 0.999 the correction of the first steps loses three digits in f32.
    let t = d.step as f64;
    let correction1 = 1.0 - f64::from(d.beta1).powf(t);
    let correction2 = 1.0 - f64::from(d.beta2).powf(t);
    let step = s.splat(-(f64::from(d.lr) / correction1) as f32);
    let root = s.splat((1.0 / correction2.sqrt()) as f32);
    let decay = s.splat(1.0 - d.lr * d.weight_decay);
    let (beta1, beta2) = (s.splat(d.beta1), s.splat(d.beta2));
    let (rest1, rest2) = (s.splat(1.0 - d.beta1), s.splat(1.0 - d.beta2));
    let eps = s.splat(d.eps);
    let mut i = 0;
    while i < params.len() {
        let g = s.load_partial(&grads[i..]);
        let mean = s.fma(rest1, g, s.mul(beta1, s.load_partial(&m[i..])));
        let square = s.fma(rest2, s.mul(g, g), s.mul(beta2, s.load_partial(&v[i..])));
        let denominator = s.fma(s.sqrt(square), root, eps);
        let p = s.mul(s.load_partial(&params[i..]), decay);
        s.store_partial(&mut params[i..], s.fma(step, s.div(mean, denominator), p));
        s.store_partial(&mut m[i..], mean);
        s.store_partial(&mut v[i..], square);
        i += S::LANES;
    }
}

/// Constants of one SGD step.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Sgd {
    /// Learning rate.
    lr: f32,
    /// Momentum; 0 turns it off.
    momentum: f32,
    /// Whether the step looks ahead along the momentum (Nesterov).
    nesterov: bool,
    /// L2 penalty, added to the gradient.
    weight_decay: f32,
    /// Number of this step, from 1: the first one sets the momentum buffer to the gradient, as torch does.
    step: u64,
}

#[inline(always)]
fn sgd_impl<S: Simd>(_s: S, d: &Sgd, params: &mut [f32], grads: &[f32], velocity: &mut [f32]) {
    let keep = if d.step <= 1 { 0.0 } else { d.momentum };
    for ((p, g), v) in params.iter_mut().zip(grads).zip(velocity) {
        let g = g + d.weight_decay * *p;
        let direction = if d.momentum == 0.0 {
            g
        } else {
            *v = keep * *v + g;
            if d.nesterov { g + d.momentum * *v } else { *v }
        };
        *p -= d.lr * direction;
    }
}

#[inline(always)]
fn ema_impl<S: Simd>(_s: S, target: &mut [f32], source: &[f32], momentum: f32) {
    for (t, s) in target.iter_mut().zip(source) {
        *t = momentum * *t + (1.0 - momentum) * s;
    }
}

#[inline(always)]
fn squares_impl<S: Simd>(s: S, x: &[f32]) -> f64 {
    // 1,024 elements at a time in f32, then f64: overflow needs elements above 5e17.
    let mut total = 0.0;
    for run in x.chunks(1024) {
        let mut sum = s.zero();
        let mut i = 0;
        while i < run.len() {
            let v = s.load_partial(&run[i..]);
            sum = s.fma(v, v, sum);
            i += S::LANES;
        }
        total += f64::from(s.sum(sum));
    }
    total
}

#[inline(always)]
fn finite_impl<S: Simd>(_s: S, x: &[f32]) -> bool {
    // x·0 is 0 for a finite x and NaN otherwise; a plain sum vectorises where an early exit does not.
    let mut lanes = [0.0f32; 16];
    let mut runs = x.chunks_exact(16);
    for run in &mut runs {
        for (lane, v) in lanes.iter_mut().zip(run) {
            *lane += v * 0.0;
        }
    }
    let rest: f32 = runs.remainder().iter().map(|v| v * 0.0).sum();
    lanes.iter().sum::<f32>() + rest == 0.0
}

simd_fn! {
    fn adamw_chunk(d: &AdamW, params: &mut [f32], grads: &[f32], m: &mut [f32], v: &mut [f32]) = adamw_impl;
    fn sgd_chunk(d: &Sgd, params: &mut [f32], grads: &[f32], velocity: &mut [f32]) = sgd_impl;
    fn ema_chunk(target: &mut [f32], source: &[f32], momentum: f32) = ema_impl;
    fn squares_chunk(x: &[f32]) -> f64 = squares_impl;
    fn finite_chunk(x: &[f32]) -> bool = finite_impl;
}

/// One AdamW step (Loshchilov and Hutter; torch's `AdamW`), with `m` and `v` its moments. `step` counts from 1;
/// θ decays by lr·weight_decay beside the step.
pub fn adamw_step(
    params: &mut [f32],
    grads: &[f32],
    m: &mut [f32],
    v: &mut [f32],
    lr: f32,
    beta1: f32,
    beta2: f32,
    eps: f32,
    weight_decay: f32,
    step: u64,
) {
    let d = &AdamW { lr, beta1, beta2, eps, weight_decay, step };
    let n = params.len();
    assert!(grads.len() == n && m.len() == n && v.len() == n, "params, grads and moments have one length");
    let level = Level::active();
    params
        .par_chunks_mut(CHUNK)
        .zip(grads.par_chunks(CHUNK))
        .zip(m.par_chunks_mut(CHUNK).zip(v.par_chunks_mut(CHUNK)))
        .for_each(|((params, grads), (m, v))| adamw_chunk(level, d, params, grads, m, v));
}

/// One SGD step (torch's `SGD`, no dampening), with `velocity` its momentum buffer; `step` counts from 1.
pub fn sgd_step(
    params: &mut [f32],
    grads: &[f32],
    velocity: &mut [f32],
    lr: f32,
    momentum: f32,
    nesterov: bool,
    weight_decay: f32,
    step: u64,
) {
    let d = &Sgd { lr, momentum, nesterov, weight_decay, step };
    let n = params.len();
    assert!(grads.len() == n && velocity.len() == n, "params, grads and velocity have one length");
    let level = Level::active();
    params
        .par_chunks_mut(CHUNK)
        .zip(grads.par_chunks(CHUNK).zip(velocity.par_chunks_mut(CHUNK)))
        .for_each(|(params, (grads, velocity))| sgd_chunk(level, d, params, grads, velocity));
}

/// target ← momentum·target + (1 − momentum)·source.
pub fn ema_update(target: &mut [f32], source: &[f32], momentum: f32) {
    assert_eq!(target.len(), source.len(), "target and source have one length");
    let level = Level::active();
    target
        .par_chunks_mut(CHUNK)
        .zip(source.par_chunks(CHUNK))
        .for_each(|(target, source)| ema_chunk(level, target, source, momentum));
}

/// Σ x², in f64 over fixed chunks merged in order.
pub fn sum_of_squares(x: &[f32]) -> f64 {
    let level = Level::active();
    if x.len() <= CHUNK {
        return squares_chunk(level, x);
    }
    let partials: Vec<f64> = x.par_chunks(CHUNK).map(|x| squares_chunk(level, x)).collect();
    partials.iter().sum()
}

/// Whether no element is NaN or infinite.
pub fn all_finite(x: &[f32]) -> bool {
    let level = Level::active();
    if x.len() <= CHUNK {
        return finite_chunk(level, x);
    }
    x.par_chunks(CHUNK).all(|x| finite_chunk(level, x))
}

/// x ← factor·x.
pub fn scale_in_place(x: &mut [f32], factor: f32) {
    x.par_chunks_mut(CHUNK).for_each(|x| {
        for v in x {
            *v *= factor;
        }
    });
}
