//! Attention of one learnt query over the tokens of each batch entry: SigLIP's pooling head (Zhai et al. 2023; timm's
//! `AttentionPoolLatent`).
//!
//! Letters: B batch, T tokens, H heads, D size of a head. q is [H·D], the same for every entry; kv is [B, T, 2, H, D],
//! probabilities [B, H, T], the output [B, H·D]. p = softmax(k·q/√D) over the tokens, out = Σ p·v.

use rayon::prelude::*;

use crate::simd::Simd;
use crate::simd_fn;
use crate::softmax::softmax_row;
use crate::workspace::Workspace;

/// Sizes of an attention pooling.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionPool {
    /// B.
    pub batch: usize,
    /// T.
    pub tokens: usize,
    /// H.
    pub heads: usize,
    /// D.
    pub head_dim: usize,
}

impl AttentionPool {
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// H·D.
    fn width(&self) -> usize {
        self.heads * self.head_dim
    }

    fn check(&self, q: usize, kv: usize, out: usize, probs: usize) {
        assert_eq!(q, self.width(), "q is [H*D]");
        assert_eq!(kv, 2 * self.batch * self.tokens * self.width(), "kv is [B, T, 2, H, D]");
        assert_eq!(out, self.batch * self.width(), "out is [B, H*D]");
        assert_eq!(probs, self.batch * self.heads * self.tokens, "probs is [B, H, T]");
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

/// y += a·x.
#[inline(always)]
fn add_scaled<S: Simd>(s: S, a: f32, x: &[f32], y: &mut [f32]) {
    let a = s.splat(a);
    let mut i = 0;
    while i < x.len() {
        let v = s.fma(a, s.load_partial(&x[i..]), s.load_partial(&y[i..]));
        s.store_partial(&mut y[i..], v);
        i += S::LANES;
    }
}

/// One batch entry.
#[inline(always)]
fn forward_impl<S: Simd>(
    s: S,
    d: &AttentionPool,
    q: &[f32],
    kv: &[f32],
    out: &mut [f32],
    probs: &mut [f32],
    scores: &mut [f32],
) {
    let (n, stride) = (d.head_dim, 2 * d.width());
    // Heads innermost, so that each row of kv is read once.
    for (t, row) in kv.chunks_exact(stride).enumerate() {
        for h in 0..d.heads {
            scores[h * d.tokens + t] = dot(s, &q[h * n..][..n], &row[h * n..][..n]);
        }
    }
    for (scores, probs) in scores.chunks_exact(d.tokens).zip(probs.chunks_exact_mut(d.tokens)) {
        softmax_row(s, d.scale(), scores, probs);
    }
    out.fill(0.0);
    for (t, row) in kv.chunks_exact(stride).enumerate() {
        for h in 0..d.heads {
            let values = &row[d.width() + h * n..][..n];
            add_scaled(s, probs[h * d.tokens + t], values, &mut out[h * n..][..n]);
        }
    }
}

/// One batch entry: dS = p ∘ (dout·v − Σ p∘(dout·v)), dk = dS·q/√D, dv = p·dout, and this entry's part of dq.
#[inline(always)]
fn backward_impl<S: Simd>(
    s: S,
    d: &AttentionPool,
    q: &[f32],
    kv: &[f32],
    probs: &[f32],
    dout: &[f32],
    dkv: &mut [f32],
    accumulate: bool,
    dq: &mut [f32],
    grad: &mut [f32],
) {
    let (n, stride) = (d.head_dim, 2 * d.width());
    for (t, row) in kv.chunks_exact(stride).enumerate() {
        for h in 0..d.heads {
            grad[h * d.tokens + t] = dot(s, &dout[h * n..][..n], &row[d.width() + h * n..][..n]);
        }
    }
    for (grad, probs) in grad.chunks_exact_mut(d.tokens).zip(probs.chunks_exact(d.tokens)) {
        let mean = dot(s, grad, probs);
        for (g, p) in grad.iter_mut().zip(probs) {
            *g = d.scale() * p * (*g - mean);
        }
    }
    if !accumulate {
        dkv.fill(0.0);
    }
    dq.fill(0.0);
    for (t, (row, drow)) in kv.chunks_exact(stride).zip(dkv.chunks_exact_mut(stride)).enumerate() {
        for h in 0..d.heads {
            let (g, p) = (grad[h * d.tokens + t], probs[h * d.tokens + t]);
            add_scaled(s, g, &q[h * n..][..n], &mut drow[h * n..][..n]);
            add_scaled(s, p, &dout[h * n..][..n], &mut drow[d.width() + h * n..][..n]);
            add_scaled(s, g, &row[h * n..][..n], &mut dq[h * n..][..n]);
        }
    }
}

simd_fn! {
    fn forward_entry(
        d: &AttentionPool, q: &[f32], kv: &[f32], out: &mut [f32], probs: &mut [f32], scores: &mut [f32],
    ) = forward_impl;
    fn backward_entry(
        d: &AttentionPool, q: &[f32], kv: &[f32], probs: &[f32], dout: &[f32], dkv: &mut [f32], accumulate: bool,
        dq: &mut [f32], grad: &mut [f32],
    ) = backward_impl;
}

/// out = Σ softmax(k·q/√D)·v for each head; `probs` keeps the probabilities for the backward pass.
pub fn attention_pool_forward(
    d: &AttentionPool,
    q: &[f32],
    kv: &[f32],
    out: &mut [f32],
    probs: &mut [f32],
    ws: &mut Workspace,
) {
    d.check(q.len(), kv.len(), out.len(), probs.len());
    if kv.is_empty() {
        return;
    }
    let (level, width, map) = (ws.level(), d.width(), d.heads * d.tokens);
    let scores = ws.take(probs.len());
    out.par_chunks_mut(width)
        .zip(probs.par_chunks_mut(map))
        .zip(scores.par_chunks_mut(map))
        .zip(kv.par_chunks(2 * d.tokens * width))
        .for_each(|(((out, probs), scores), kv)| forward_entry(level, d, q, kv, out, probs, scores));
}

/// VJP of [`attention_pool_forward`]: dkv overwritten, or added to with `accumulate`; dq always added to.
pub fn attention_pool_backward(
    d: &AttentionPool,
    q: &[f32],
    kv: &[f32],
    probs: &[f32],
    dout: &[f32],
    dkv: &mut [f32],
    accumulate: bool,
    dq: &mut [f32],
    ws: &mut Workspace,
) {
    d.check(q.len(), kv.len(), dout.len(), probs.len());
    assert!(dkv.len() == kv.len() && dq.len() == q.len(), "gradients are as long as their arguments");
    if kv.is_empty() {
        return;
    }
    let (level, width, map) = (ws.level(), d.width(), d.heads * d.tokens);
    let entry = 2 * d.tokens * width;
    let [parts, grads] = ws.split([d.batch * width, probs.len()]);
    dkv.par_chunks_mut(entry)
        .zip(kv.par_chunks(entry).zip(probs.par_chunks(map)).zip(dout.par_chunks(width)))
        .zip(parts.par_chunks_mut(width).zip(grads.par_chunks_mut(map)))
        .for_each(|((dkv, ((kv, probs), dout)), (part, grad))| {
            backward_entry(level, d, q, kv, probs, dout, dkv, accumulate, part, grad);
        });
    for part in parts.chunks_exact(width) {
        dq.iter_mut().zip(part).for_each(|(sum, part)| *sum += part);
    }
}
