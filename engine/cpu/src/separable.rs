//! MobileViTv2's separable self-attention (Mehta & Rastegari, "Separable self-attention for mobile vision
//! transformers", arXiv:2206.02680, §3.2) on a packed `qkv`.
//!
//! Letters: B batch, N tokens, D width. A row of qkv [B, N, 1 + 2·D] holds the query (one number), the key and the
//! value. With p = softmax over N of the queries and the context c = Σ p·key, the output is relu(value)·c, [B, N, D].

use rayon::prelude::*;

use crate::columns::{get, over_columns, set};
use crate::simd::{Level, Simd};
use crate::simd_fn;
use crate::softmax::softmax_row;
use crate::workspace::Workspace;

/// Sizes of a separable self-attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SeparableAttention {
    /// B.
    pub batch: usize,
    /// N.
    pub tokens: usize,
    /// D.
    pub dim: usize,
}

impl SeparableAttention {
    /// Elements of a row of qkv.
    fn stride(&self) -> usize {
        1 + 2 * self.dim
    }

    fn check(&self, qkv: usize, out: usize, p: usize, context: usize) {
        let rows = self.batch * self.tokens;
        assert_eq!(qkv, rows * self.stride(), "qkv is [B, N, 1 + 2·D]");
        assert_eq!(out, rows * self.dim, "the output is [B, N, D]");
        assert_eq!(p, rows, "the weights are [B, N]");
        assert_eq!(context, self.batch * self.dim, "the context is [B, D]");
    }
}

/// max(v, 0); NaN stays NaN.
#[inline(always)]
fn relu<S: Simd>(s: S, v: S::V) -> S::V {
    s.select_gt(s.zero(), v, s.zero(), v)
}

#[inline(always)]
fn forward_impl<S: Simd>(s: S, qkv: &[f32], y: &mut [f32], p: &mut [f32], context: &mut [f32]) {
    let dim = context.len();
    let rows = || qkv.chunks_exact(1 + 2 * dim);
    // The output's room holds the queries side by side until it is written.
    let queries = &mut y[..p.len()];
    queries.iter_mut().zip(rows()).for_each(|(q, row)| *q = row[0]);
    softmax_row(s, 1.0, queries, p);
    context.fill(0.0);
    for (row, p) in rows().zip(&*p) {
        let (key, p) = (&row[1..=dim], s.splat(*p));
        over_columns!(S::LANES, dim, |i, FULL| {
            // SAFETY: key and context have `dim` elements.
            unsafe {
                let v = s.fma(p, get::<S, FULL>(s, key, i), get::<S, FULL>(s, context, i));
                set::<S, FULL>(s, context, i, v);
            }
        });
    }
    for (row, y) in rows().zip(y.chunks_exact_mut(dim)) {
        let value = &row[1 + dim..];
        over_columns!(S::LANES, dim, |i, FULL| {
            // SAFETY: value, context and y have `dim` elements.
            unsafe {
                let v = s.mul(relu(s, get::<S, FULL>(s, value, i)), get::<S, FULL>(s, context, i));
                set::<S, FULL>(s, y, i, v);
            }
        });
    }
}

#[inline(always)]
fn backward_impl<S: Simd>(
    s: S,
    qkv: &[f32],
    p: &[f32],
    context: &[f32],
    dy: &[f32],
    dqkv: &mut [f32],
    accumulate: bool,
    scratch: &mut [f32],
) {
    let dim = context.len();
    let stride = 1 + 2 * dim;
    let (dcontext, dp) = scratch.split_at_mut(dim);
    dcontext.fill(0.0);
    for ((row, dy), out) in qkv.chunks_exact(stride).zip(dy.chunks_exact(dim)).zip(dqkv.chunks_exact_mut(stride)) {
        let (value, dvalue) = (&row[1 + dim..], &mut out[1 + dim..]);
        over_columns!(S::LANES, dim, |i, FULL| {
            // SAFETY: each of these has `dim` elements.
            unsafe {
                let (v, g) = (get::<S, FULL>(s, value, i), get::<S, FULL>(s, dy, i));
                let sum = s.fma(g, relu(s, v), get::<S, FULL>(s, dcontext, i));
                set::<S, FULL>(s, dcontext, i, sum);
                let mut d = s.select_gt(v, s.zero(), s.mul(g, get::<S, FULL>(s, context, i)), s.zero());
                if accumulate {
                    d = s.add(d, get::<S, FULL>(s, dvalue, i));
                }
                set::<S, FULL>(s, dvalue, i, d);
            }
        });
    }
    let mut along = 0.0;
    for (((row, out), p), dp) in qkv.chunks_exact(stride).zip(dqkv.chunks_exact_mut(stride)).zip(p).zip(&mut *dp) {
        let (key, dkey, weight) = (&row[1..=dim], &mut out[1..=dim], s.splat(*p));
        let mut dot = s.zero();
        over_columns!(S::LANES, dim, |i, FULL| {
            // SAFETY: each of these has `dim` elements.
            unsafe {
                let g = get::<S, FULL>(s, dcontext, i);
                dot = s.fma(get::<S, FULL>(s, key, i), g, dot);
                let mut d = s.mul(weight, g);
                if accumulate {
                    d = s.add(d, get::<S, FULL>(s, dkey, i));
                }
                set::<S, FULL>(s, dkey, i, d);
            }
        });
        *dp = s.sum(dot);
        along += p * *dp;
    }
    for ((out, p), dp) in dqkv.chunks_exact_mut(stride).zip(p).zip(&*dp) {
        let d = p * (dp - along);
        out[0] = if accumulate { out[0] + d } else { d };
    }
}

simd_fn! {
    fn forward_one(qkv: &[f32], y: &mut [f32], p: &mut [f32], context: &mut [f32]) = forward_impl;
    fn backward_one(
        qkv: &[f32], p: &[f32], context: &[f32], dy: &[f32], dqkv: &mut [f32], accumulate: bool, scratch: &mut [f32],
    ) = backward_impl;
}

/// y = relu(value)·context; `p` [B, N] keeps the weights of the tokens and `context` [B, D] the weighted keys.
pub fn separable_attention_forward(
    d: &SeparableAttention,
    qkv: &[f32],
    y: &mut [f32],
    p: &mut [f32],
    context: &mut [f32],
) {
    d.check(qkv.len(), y.len(), p.len(), context.len());
    if y.is_empty() {
        return;
    }
    let level = Level::active();
    y.par_chunks_mut(d.tokens * d.dim)
        .zip(qkv.par_chunks(d.tokens * d.stride()))
        .zip(p.par_chunks_mut(d.tokens).zip(context.par_chunks_mut(d.dim)))
        .for_each(|((y, qkv), (p, context))| forward_one(level, qkv, y, p, context));
}

/// VJP of [`separable_attention_forward`] from what it kept.
pub fn separable_attention_backward(
    d: &SeparableAttention,
    qkv: &[f32],
    p: &[f32],
    context: &[f32],
    dy: &[f32],
    dqkv: &mut [f32],
    accumulate: bool,
    ws: &mut Workspace,
) {
    d.check(qkv.len(), dy.len(), p.len(), context.len());
    assert_eq!(dqkv.len(), qkv.len(), "dqkv is as qkv");
    if dqkv.is_empty() || dy.is_empty() {
        return;
    }
    let (level, own) = (ws.level(), d.dim + d.tokens);
    let scratch = ws.take(d.batch * own);
    dqkv.par_chunks_mut(d.tokens * d.stride())
        .zip(qkv.par_chunks(d.tokens * d.stride()).zip(dy.par_chunks(d.tokens * d.dim)))
        .zip(p.par_chunks(d.tokens).zip(context.par_chunks(d.dim)))
        .zip(scratch.par_chunks_mut(own))
        .for_each(|(((dqkv, (qkv, dy)), (p, context)), scratch)| {
            backward_one(level, qkv, p, context, dy, dqkv, accumulate, scratch);
        });
}
