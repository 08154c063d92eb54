//! Formulations of the layers. Each handle of a tensor is used once per op: dfdx refuses a tensor given twice.

use dfdx::prelude::*;
use dfdx::tensor::Tape as _;

use super::layout::rows_of;
use super::tape::{Flat, Real, Tape, Var, flatten};
use crate::activation::Activation;
use crate::attention::Attention;
use crate::conv::Conv2d;
use crate::gemm::Gemm;
use crate::linear::Linear;
use crate::norm::{GroupNorm, Norm};
use crate::pooling::Pool2d;
use crate::resize::{self, Resize};
use crate::separable::SeparableAttention;

/// Square of the smallest norm that a row is divided by. Added under the root, where the kernels take a
/// maximum: the same in both precisions unless a row is nearly zero, and differentiable there.
pub(super) const NORM_EPS_SQUARED: f64 = 1e-24;

type Mat<E> = Var<(usize, usize), E>;
type Cube<E> = Var<(usize, usize, usize), E>;

fn num<E: Real>(x: f64) -> E {
    E::of_f64(x)
}

pub(super) fn activation<S: Shape, E: Real>(t: &Tape<E>, act: Activation, x: Var<S, E>) -> Var<S, E> {
    match act {
        Activation::Identity => x,
        Activation::Relu => relu(t, x),
        Activation::Relu6 => x.clamp(0.0, 6.0),
        Activation::Silu => x.with_empty_tape().sigmoid() * x,
        Activation::Gelu => gelu(x),
        Activation::GeluTanh => {
            let factor = 2.0 * (2.0 / std::f64::consts::PI).sqrt();
            let cube = x.with_empty_tape().square() * x.with_empty_tape() * num::<E>(0.044715);
            ((cube + x.with_empty_tape()) * num::<E>(factor)).sigmoid() * x
        }
        Activation::QuickGelu => (x.with_empty_tape() * num::<E>(1.702)).sigmoid() * x,
        Activation::HardSwish => hard_sigmoid(x.with_empty_tape()) * x,
        Activation::HardSigmoid => hard_sigmoid(x),
        Activation::Sigmoid => x.sigmoid(),
        Activation::Tanh => x.tanh(),
    }
}

/// Not dfdx's `relu`, which turns NaN into 0: here a NaN fails the comparison and is chosen.
fn relu<S: Shape, E: Real>(t: &Tape<E>, x: Var<S, E>) -> Var<S, E> {
    let zeros = t.filled(0.0, *x.shape()).leaky_traced();
    x.le(num::<E>(0.0)).choose(zeros, x)
}

fn hard_sigmoid<S: Shape, E: Real>(x: Var<S, E>) -> Var<S, E> {
    (x + num::<E>(3.0)).clamp(0.0, 6.0) * num::<E>(1.0 / 6.0)
}

/// x·Φ(x): dfdx's value, with the derivative Φ(x) + x·φ(x) put on the tape by us.
fn gelu<S: Shape, E: Real>(x: Var<S, E>) -> Var<S, E> {
    let (x, mut tape) = x.split_tape();
    let y = x.clone().accurate_gelu();
    let slope: Vec<E> = x
        .as_vec()
        .into_iter()
        .zip(y.as_vec())
        .map(|(x, y)| {
            let (x, y) = (x.into_f64(), y.into_f64());
            let cdf = if x == 0.0 { 0.5 } else { y / x };
            let density = (-0.5 * x * x).exp() / (2.0 * std::f64::consts::PI).sqrt();
            num(cdf + x * density)
        })
        .collect();
    let out = y.clone();
    tape.add_backward_op(move |grads| {
        let gradient = grads.get_or_alloc_mut(&y)?.to_vec();
        let into = grads.get_or_alloc_mut(&x)?;
        for ((into, g), slope) in into.iter_mut().zip(gradient).zip(slope) {
            *into += g * slope;
        }
        Ok(())
    });
    out.put_tape(tape)
}

fn affine<E: Real>(t: &Tape<E>, x: Mat<E>) -> Mat<E> {
    let shape = *x.shape();
    let gamma = t.arg(1, (shape.1,)).broadcast_like::<_, Axis<0>>(&shape);
    let beta = t.arg(2, (shape.1,)).broadcast_like::<_, Axis<0>>(&shape);
    x * gamma + beta
}

pub(super) fn batch_norm<E: Real>(t: &Tape<E>, d: &Norm, act: Activation) -> (Flat<E>, Vec<Vec<E>>) {
    let shape = (d.rows, d.c);
    let x = t.arg(0, shape);
    let mean = x.with_empty_tape().mean::<(usize,), Axis<0>>();
    let means = mean.as_vec();
    let centered = x - mean.broadcast_like::<_, Axis<0>>(&shape);
    let variance = centered.with_empty_tape().square().mean::<(usize,), Axis<0>>();
    let std = (variance + num::<E>(f64::from(d.eps))).sqrt();
    let rstds = std.as_vec().into_iter().map(|s| num(1.0 / s.into_f64())).collect();
    let normal = centered / std.broadcast_like::<_, Axis<0>>(&shape);
    (flatten(activation(t, act, affine(t, normal))), vec![means, rstds])
}

pub(super) fn batch_norm_eval<E: Real>(t: &Tape<E>, d: &Norm, act: Activation) -> Flat<E> {
    let shape = (d.rows, d.c);
    let mean = t.constant(3, (d.c,)).broadcast_like::<_, Axis<0>>(&shape);
    let std = (t.constant(4, (d.c,)) + num::<E>(f64::from(d.eps))).sqrt();
    let normal = (t.arg(0, shape) - mean) / std.broadcast_like::<_, Axis<0>>(&shape);
    flatten(activation(t, act, affine(t, normal)))
}

pub(super) fn layer_norm<E: Real>(t: &Tape<E>, d: &Norm) -> (Flat<E>, Vec<Vec<E>>) {
    let shape = (d.rows, d.c);
    let x = t.arg(0, shape);
    let mean = x.with_empty_tape().mean::<(usize,), Axis<1>>();
    let means = mean.as_vec();
    let centered = x - mean.broadcast_like::<_, Axis<1>>(&shape);
    let variance = centered.with_empty_tape().square().mean::<(usize,), Axis<1>>();
    let std = (variance + num::<E>(f64::from(d.eps))).sqrt();
    let rstds = std.as_vec().into_iter().map(|s| num(1.0 / s.into_f64())).collect();
    let normal = centered / std.broadcast_like::<_, Axis<1>>(&shape);
    (flatten(affine(t, normal)), vec![means, rstds])
}

pub(super) fn group_norm<E: Real>(t: &Tape<E>, d: &GroupNorm) -> (Flat<E>, Vec<Vec<E>>) {
    let shape = (d.batch, d.rows * d.c);
    let x = t.arg(0, shape);
    let mean = x.with_empty_tape().mean::<(usize,), Axis<1>>();
    let means = mean.as_vec();
    let centered = x - mean.broadcast_like::<_, Axis<1>>(&shape);
    let variance = centered.with_empty_tape().square().mean::<(usize,), Axis<1>>();
    let std = (variance + num::<E>(f64::from(d.eps))).sqrt();
    let rstds = std.as_vec().into_iter().map(|s| num(1.0 / s.into_f64())).collect();
    let normal = centered / std.broadcast_like::<_, Axis<1>>(&shape);
    (flatten(affine(t, normal.reshape_like(&(d.batch * d.rows, d.c)))), vec![means, rstds])
}

type Heads<E> = Var<(usize, usize, usize, usize), E>;

/// Q (0), K (1) or V (2) as [B, H, T, D].
fn part<E: Real>(t: &Tape<E>, d: &Attention, which: usize) -> Heads<E> {
    let qkv = t.arg(0, (d.batch, d.tokens, 3, d.heads, d.head_dim));
    qkv.permute::<_, Axes5<2, 0, 3, 1, 4>>().select(t.index(which))
}

/// `last` names the last visible token of each batch entry; where it is empty, all are visible.
fn probabilities<E: Real>(t: &Tape<E>, d: &Attention, last: &[i32]) -> Heads<E> {
    let keys = part(t, d, 1).permute::<_, Axes4<0, 1, 3, 2>>();
    let scores = part(t, d, 0).matmul(keys) * num::<E>(1.0 / (d.head_dim as f64).sqrt());
    if !d.causal && last.is_empty() {
        return scores.softmax::<Axis<3>>();
    }
    let n = d.tokens;
    let hidden = |i: usize| {
        let (b, query, key) = (i / (n * n), i / n % n, i % n);
        let padding = last.get(b).is_some_and(|last| key > *last as usize);
        num(if padding || d.causal && key > query { -1e30 } else { 0.0 })
    };
    let mask = t.values((0..d.batch * n * n).map(hidden).collect(), (d.batch, n, n));
    let mask = mask.broadcast_like::<_, Axis<1>>(&(d.batch, d.heads, n, n));
    (scores + mask).softmax::<Axis<3>>()
}

pub(super) fn attention<E: Real>(t: &Tape<E>, d: &Attention, last: &[i32]) -> (Flat<E>, Vec<Vec<E>>) {
    let map = probabilities(t, d, last);
    let saved = map.as_vec();
    let out = map.matmul(part(t, d, 2));
    (flatten(out.permute::<_, Axes4<0, 2, 1, 3>>()), vec![saved])
}

pub(super) fn attention_map<E: Real>(t: &Tape<E>, d: &Attention) -> Flat<E> {
    flatten(probabilities(t, d, &[]))
}

pub(super) fn separable_attention<E: Real>(t: &Tape<E>, d: &SeparableAttention) -> (Flat<E>, Vec<Vec<E>>) {
    let (b, n, c) = (d.batch, d.tokens, d.dim);
    let columns = |from: usize, to: usize| t.arg(0, (b, n, 1 + 2 * c)).slice((0..b, 0..n, from..to));
    let weights = columns(0, 1).reshape_like(&(b, n)).softmax::<Axis<1>>();
    let p = weights.as_vec();
    let keys = columns(1, 1 + c).reshape_like(&(b, n, c));
    let context = weights.reshape_like(&(b, 1, n)).matmul(keys).reshape_like(&(b, c));
    let kept = context.as_vec();
    let values = relu(t, columns(1 + c, 1 + 2 * c).reshape_like(&(b, n, c)));
    (flatten(values * context.broadcast_like::<_, Axis<1>>(&(b, n, c))), vec![p, kept])
}

pub(super) fn global_avg_pool<E: Real>(t: &Tape<E>, batch: usize, hw: usize, c: usize) -> Flat<E> {
    flatten(t.arg(0, (batch, hw, c)).mean::<(usize, usize), Axis<1>>())
}

/// For each window of an image batch its pixels' rows, row-major inside the window; `rows` (one past the last
/// pixel) stands for padding.
fn windows(
    [batch, h, w]: [usize; 3],
    [kh, kw]: [usize; 2],
    [oh, ow]: [usize; 2],
    stride: usize,
    pad: usize,
) -> Vec<usize> {
    let mut index = Vec::with_capacity(batch * oh * ow * kh * kw);
    for b in 0..batch {
        for window in 0..oh * ow {
            for k in 0..kh * kw {
                let y = (window / ow * stride + k / kw).checked_sub(pad).filter(|y| *y < h);
                let x = (window % ow * stride + k % kw).checked_sub(pad).filter(|x| *x < w);
                index.push(match (y, x) {
                    (Some(y), Some(x)) => (b * h + y) * w + x,
                    _ => batch * h * w,
                });
            }
        }
    }
    index
}

/// The rows of `windows` of argument 0 [rows, c], `padding` standing in each row outside the image.
fn gather_windows<E: Real>(t: &Tape<E>, rows: usize, c: usize, padding: f64, index: Vec<usize>) -> Mat<E> {
    let x = (t.arg(0, (rows, c)), t.filled(padding, (1, c)).leaky_traced()).concat_along(Axis::<0>);
    rows_of(t, x, index)
}

fn pool_windows<E: Real>(t: &Tape<E>, d: &Pool2d, padding: f64) -> Cube<E> {
    let index = windows([d.batch, d.h, d.w], [d.k, d.k], [d.out_h(), d.out_w()], d.stride, d.pad);
    let count = index.len() / (d.k * d.k);
    gather_windows(t, d.batch * d.h * d.w, d.c, padding, index).reshape_like(&(count, d.k * d.k, d.c))
}

pub(super) fn max_pool<E: Real>(t: &Tape<E>, d: &Pool2d) -> Flat<E> {
    flatten(pool_windows(t, d, f64::NEG_INFINITY).max::<(usize, usize), Axis<1>>())
}

pub(super) fn avg_pool<E: Real>(t: &Tape<E>, d: &Pool2d) -> Flat<E> {
    flatten(pool_windows(t, d, 0.0).mean::<(usize, usize), Axis<1>>())
}

pub(super) fn conv2d<E: Real>(t: &Tape<E>, d: &Conv2d) -> Flat<E> {
    let (ci, co, taps) = (d.c_in / d.groups, d.c_out / d.groups, d.kh * d.kw);
    let index = windows([d.batch, d.h, d.w], [d.kh, d.kw], [d.out_h(), d.out_w()], d.stride, d.pad);
    let outputs = index.len() / taps;
    let columns = gather_windows(t, d.batch * d.h * d.w, d.c_in, 0.0, index)
        .reshape_like(&(outputs, taps, d.groups, ci))
        .permute::<_, Axes4<2, 0, 1, 3>>()
        .reshape_like(&(d.groups, outputs, taps * ci));
    let weights =
        t.arg(1, (d.groups, co, ci, taps)).permute::<_, Axes4<0, 3, 2, 1>>().reshape_like(&(d.groups, taps * ci, co));
    let y = columns.matmul(weights).permute::<_, Axes3<1, 0, 2>>().reshape_like(&(outputs, d.c_out));
    flatten(add_bias(t, y))
}

/// Adds argument 2 to each row, where there is one.
fn add_bias<E: Real>(t: &Tape<E>, y: Mat<E>) -> Mat<E> {
    if t.arguments() < 3 {
        return y;
    }
    let shape = *y.shape();
    y + t.arg(2, (shape.1,)).broadcast_like::<_, Axis<0>>(&shape)
}

/// The interpolation of one axis as a matrix [output, input].
fn interpolation<E: Real>(input: usize, output: usize, aligned: bool) -> Vec<E> {
    let mut matrix = vec![0.0; output * input];
    for o in 0..output {
        let tap = resize::tap(o, input, output, aligned);
        matrix[o * input + tap.low] += 1.0 - f64::from(tap.frac);
        matrix[o * input + tap.high] += f64::from(tap.frac);
    }
    matrix.into_iter().map(num).collect()
}

pub(super) fn resize<E: Real>(t: &Tape<E>, d: &Resize) -> Flat<E> {
    let Resize { batch: b, h, w, c, oh, ow, aligned } = *d;
    let down =
        t.values(interpolation(h, oh, aligned), (oh, h)).broadcast_like::<_, Axis<0>>(&(b, oh, h)).leaky_traced();
    let across =
        t.values(interpolation(w, ow, aligned), (ow, w)).broadcast_like::<_, Axis<0>>(&(b * oh, ow, w)).leaky_traced();
    let rows = down.matmul(t.arg(0, (b, h, w * c)));
    flatten(across.matmul(rows.reshape_like(&(b * oh, w, c))))
}

pub(super) fn add_broadcast<E: Real>(t: &Tape<E>) -> Flat<E> {
    let b = t.flat(1);
    let n = b.shape().0;
    let rows = t.flat(0).shape().0 / n;
    flatten(t.arg(0, (rows, n)) + b.broadcast_like::<_, Axis<0>>(&(rows, n)))
}

pub(super) fn channel_scale<E: Real>(t: &Tape<E>, batch: usize, hw: usize, c: usize) -> Flat<E> {
    let shape = (batch, hw, c);
    flatten(t.arg(0, shape) * t.arg(1, (batch, c)).broadcast_like::<_, Axis<1>>(&shape))
}

pub(super) fn scale_samples<E: Real>(t: &Tape<E>, batch: usize, len: usize) -> Flat<E> {
    let shape = (batch, len);
    flatten(t.arg(0, shape) * t.constant(1, (batch,)).broadcast_like::<_, Axis<1>>(&shape))
}

/// √(Σ x² + ε²) of each row.
pub(super) fn row_norms<E: Real>(x: Mat<E>) -> Flat<E> {
    (x.square().sum::<(usize,), Axis<1>>() + num::<E>(NORM_EPS_SQUARED)).sqrt()
}

pub(super) fn l2_normalize<E: Real>(t: &Tape<E>, rows: usize, c: usize) -> (Flat<E>, Vec<Vec<E>>) {
    let shape = (rows, c);
    let norm = row_norms(t.arg(0, shape));
    let norms = norm.as_vec();
    (flatten(t.arg(0, shape) / norm.broadcast_like::<_, Axis<1>>(&shape)), vec![norms])
}

fn tempered<E: Real>(t: &Tape<E>, rows: usize, c: usize, temperature: f32) -> Mat<E> {
    t.arg(0, (rows, c)) * num::<E>(1.0 / f64::from(temperature))
}

pub(super) fn softmax<E: Real>(t: &Tape<E>, rows: usize, c: usize, temperature: f32) -> Flat<E> {
    flatten(tempered(t, rows, c, temperature).softmax::<Axis<1>>())
}

pub(super) fn log_softmax<E: Real>(t: &Tape<E>, rows: usize, c: usize, temperature: f32) -> Flat<E> {
    flatten(tempered(t, rows, c, temperature).log_softmax::<Axis<1>>())
}

pub(super) fn linear<E: Real>(t: &Tape<E>, d: &Linear) -> Flat<E> {
    let weights = t.arg(1, (d.c_out, d.c_in)).permute::<_, Axes2<1, 0>>();
    flatten(add_bias(t, t.arg(0, (d.rows, d.c_in)).matmul(weights)))
}

pub(super) fn matmul<E: Real>(t: &Tape<E>, d: &Gemm, alpha: f32) -> Flat<E> {
    let a = if d.trans_a { t.arg(0, (d.k, d.m)).permute::<_, Axes2<1, 0>>() } else { t.arg(0, (d.m, d.k)) };
    let b = if d.trans_b { t.arg(1, (d.n, d.k)).permute::<_, Axes2<1, 0>>() } else { t.arg(1, (d.k, d.n)) };
    flatten(a.matmul(b) * num::<E>(f64::from(alpha)))
}
