//! Multi-head self-attention on a packed `qkv`, and the attention map by itself (for distilling it).
//!
//! Letters: B batch, T tokens, H heads, D size of a head. qkv is [B, T, 3, H, D] (timm's and open_clip's
//! order), the output [B, T, H·D], probabilities [B, H, T, T]. P = softmax(Q·Kᵀ/√D), out = P·V.

use rayon::prelude::*;

use crate::simd::{Level, Simd};
use crate::simd_fn;
use crate::small_gemm::{Left, padded, small_gemm};
use crate::softmax::softmax_row;
use crate::workspace::Workspace;

/// Sizes of a self-attention.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attention {
    /// B.
    pub batch: usize,
    /// T.
    pub tokens: usize,
    /// H.
    pub heads: usize,
    /// D.
    pub head_dim: usize,
    /// Whether token i sees only tokens 0..=i (a text tower's mask).
    pub causal: bool,
}

/// The batch is cut into at most this many groups, each with scratch of its own.
const GROUPS: usize = 32;

impl Attention {
    /// 1/√D.
    fn scale(&self) -> f32 {
        1.0 / (self.head_dim as f32).sqrt()
    }

    /// Elements between the rows of two tokens in `qkv`.
    fn stride(&self) -> usize {
        3 * self.heads * self.head_dim
    }

    fn qkv_len(&self) -> usize {
        self.batch * self.tokens * self.stride()
    }

    fn map_len(&self) -> usize {
        self.batch * self.heads * self.tokens * self.tokens
    }

    fn out_len(&self) -> usize {
        self.batch * self.tokens * self.heads * self.head_dim
    }

    /// Batch entries of one group.
    fn group(&self) -> usize {
        self.batch.div_ceil(GROUPS).max(1)
    }

    /// Scratch of one group: room for three T x T and six T x D matrices, or their transposes, with rows
    /// padded to the widest vector.
    fn scratch(&self) -> usize {
        let (t, d) = (self.tokens.next_multiple_of(16), self.head_dim.next_multiple_of(16));
        2 * self.tokens * t + 2 * self.head_dim * t + 4 * self.tokens * d + 64
    }

    fn groups(&self) -> usize {
        self.batch.div_ceil(self.group())
    }
}

/// Which of the three parts of `qkv`.
#[derive(Clone, Copy)]
enum Part {
    Q = 0,
    K = 1,
    V = 2,
}

/// First element of a part of a head at token 0 of one batch entry.
#[inline(always)]
fn start(d: &Attention, part: Part, head: usize) -> usize {
    (part as usize * d.heads + head) * d.head_dim
}

/// Copies a [rows, cols] matrix with rows `stride` apart into rows of whole vectors, padding with zeros.
#[inline(always)]
fn pack<S: Simd>(s: S, rows: usize, cols: usize, from: &[f32], stride: usize, to: &mut [f32]) {
    let wide = padded::<S>(cols);
    for r in 0..rows {
        let source = &from[r * stride..][..cols];
        let mut i = 0;
        while i < wide {
            s.store(&mut to[r * wide + i..], s.load_partial(&source[i..]));
            i += S::LANES;
        }
    }
}

/// Like [`pack`], transposed: row i of the result is column i of the source.
#[inline(always)]
fn pack_transposed<S: Simd>(_s: S, rows: usize, cols: usize, from: &[f32], stride: usize, to: &mut [f32]) {
    let wide = padded::<S>(rows);
    for r in 0..rows {
        for (i, value) in from[r * stride..][..cols].iter().enumerate() {
            to[i * wide + r] = *value;
        }
    }
    for i in 0..cols {
        to[i * wide + rows..(i + 1) * wide].fill(0.0);
    }
}

/// Copies (or adds) rows of whole vectors back to rows of `cols` elements `stride` apart.
#[inline(always)]
fn unpack<S: Simd>(s: S, rows: usize, cols: usize, from: &[f32], to: &mut [f32], stride: usize, accumulate: bool) {
    let wide = padded::<S>(cols);
    for r in 0..rows {
        let target = &mut to[r * stride..][..cols];
        let mut i = 0;
        while i < cols {
            let mut v = s.load(&from[r * wide + i..]);
            if accumulate {
                v = s.add(v, s.load_partial(&target[i..]));
            }
            s.store_partial(&mut target[i..], v);
            i += S::LANES;
        }
    }
}

/// Keys that queries of batch entry `b` see: all, or those up to the entry's last token.
#[inline(always)]
fn visible(d: &Attention, last: &[i32], b: usize) -> usize {
    last.get(b).map_or(d.tokens, |last| d.tokens.min(last.max(&0).unsigned_abs() as usize + 1))
}

/// The probabilities of one head, [T, T], over the first `keys` tokens, into `map`; `scratch` is left holding nothing
/// of use.
#[inline(always)]
fn probabilities<S: Simd>(
    s: S,
    d: &Attention,
    qkv: &[f32],
    head: usize,
    keys: usize,
    map: &mut [f32],
    scratch: &mut [f32],
) {
    let (t, wide) = (d.tokens, padded::<S>(d.tokens));
    let (packed, scores) = scratch.split_at_mut(d.head_dim * wide);
    pack_transposed(s, t, d.head_dim, &qkv[start(d, Part::K, head)..], d.stride(), packed);
    let q = Left { data: &qkv[start(d, Part::Q, head)..], row: d.stride(), col: 1 };
    small_gemm(s, t, t, d.head_dim, d.scale(), q, packed, wide, scores, wide);
    for i in 0..t {
        let seen = if d.causal { keys.min(i + 1) } else { keys };
        let row = &mut map[i * t..(i + 1) * t];
        softmax_row(s, 1.0, &scores[i * wide..][..seen], &mut row[..seen]);
        row[seen..].fill(0.0);
    }
}

#[inline(always)]
fn forward_impl<S: Simd>(
    s: S,
    d: &Attention,
    qkv: &[f32],
    last: &[i32],
    out: &mut [f32],
    map: &mut [f32],
    scratch: &mut [f32],
) {
    let (t, width) = (d.tokens, d.heads * d.head_dim);
    let wide = padded::<S>(d.head_dim);
    for (b, (qkv, out)) in qkv.chunks_exact(t * d.stride()).zip(out.chunks_exact_mut(t * width)).enumerate() {
        for head in 0..d.heads {
            let map = &mut map[(b * d.heads + head) * t * t..][..t * t];
            probabilities(s, d, qkv, head, visible(d, last, b), map, scratch);
            let (values, result) = scratch.split_at_mut(t * wide);
            pack(s, t, d.head_dim, &qkv[start(d, Part::V, head)..], d.stride(), values);
            small_gemm(s, t, d.head_dim, t, 1.0, Left { data: map, row: t, col: 1 }, values, wide, result, wide);
            unpack(s, t, d.head_dim, result, &mut out[head * d.head_dim..], width, false);
        }
    }
}

/// Turns dP [T, T] (rows `ld` apart) into the gradient of the scores before the scale:
/// dS = P ∘ (dP − Σ P∘dP).
#[inline(always)]
fn softmax_gradient<S: Simd>(s: S, t: usize, map: &[f32], grad: &mut [f32], ld: usize) {
    for (p_row, g_row) in map.chunks_exact(t).zip(grad.chunks_mut(ld)) {
        let mut dot = s.zero();
        let mut i = 0;
        while i < t {
            dot = s.fma(s.load_partial(&p_row[i..]), s.load_partial(&g_row[i..t]), dot);
            i += S::LANES;
        }
        let dot = s.splat(s.sum(dot));
        i = 0;
        while i < t {
            let v = s.mul(s.load_partial(&p_row[i..]), s.sub(s.load_partial(&g_row[i..t]), dot));
            s.store_partial(&mut g_row[i..t], v);
            i += S::LANES;
        }
    }
}

/// Adds or writes dQ = dS·K/√D and dK = dSᵀ·Q/√D of one head. `grad` holds dS with rows `ld` apart.
#[inline(always)]
fn query_key_gradient<S: Simd>(
    s: S,
    d: &Attention,
    qkv: &[f32],
    head: usize,
    grad: &[f32],
    ld: usize,
    dqkv: &mut [f32],
    accumulate: bool,
    scratch: &mut [f32],
) {
    let (t, wide) = (d.tokens, padded::<S>(d.head_dim));
    let (packed, result) = scratch.split_at_mut(t * wide);
    pack(s, t, d.head_dim, &qkv[start(d, Part::K, head)..], d.stride(), packed);
    let rows = Left { data: grad, row: ld, col: 1 };
    small_gemm(s, t, d.head_dim, t, d.scale(), rows, packed, wide, result, wide);
    unpack(s, t, d.head_dim, result, &mut dqkv[start(d, Part::Q, head)..], d.stride(), accumulate);
    pack(s, t, d.head_dim, &qkv[start(d, Part::Q, head)..], d.stride(), packed);
    let columns = Left { data: grad, row: 1, col: ld };
    small_gemm(s, t, d.head_dim, t, d.scale(), columns, packed, wide, result, wide);
    unpack(s, t, d.head_dim, result, &mut dqkv[start(d, Part::K, head)..], d.stride(), accumulate);
}

#[inline(always)]
fn backward_impl<S: Simd>(
    s: S,
    d: &Attention,
    qkv: &[f32],
    map: &[f32],
    dout: &[f32],
    dqkv: &mut [f32],
    accumulate: bool,
    scratch: &mut [f32],
) {
    let (t, width) = (d.tokens, d.heads * d.head_dim);
    let (wide, wide_t) = (padded::<S>(d.head_dim), padded::<S>(t));
    let entries = qkv.chunks_exact(t * d.stride()).zip(dqkv.chunks_exact_mut(t * d.stride()));
    for (b, ((qkv, dqkv), dout)) in entries.zip(dout.chunks_exact(t * width)).enumerate() {
        for head in 0..d.heads {
            let map = &map[(b * d.heads + head) * t * t..][..t * t];
            let dout = &dout[head * d.head_dim..];
            let (grad, rest) = scratch.split_at_mut(t * wide_t);

            // dV = Pᵀ·dO.
            let (packed, result) = rest.split_at_mut(t * wide);
            pack(s, t, d.head_dim, dout, width, packed);
            let columns = Left { data: map, row: 1, col: t };
            small_gemm(s, t, d.head_dim, t, 1.0, columns, packed, wide, result, wide);
            unpack(s, t, d.head_dim, result, &mut dqkv[start(d, Part::V, head)..], d.stride(), accumulate);

            // dP = dO·Vᵀ.
            let values = &mut rest[..d.head_dim * wide_t];
            pack_transposed(s, t, d.head_dim, &qkv[start(d, Part::V, head)..], d.stride(), values);
            let rows = Left { data: dout, row: width, col: 1 };
            small_gemm(s, t, t, d.head_dim, 1.0, rows, values, wide_t, grad, wide_t);

            softmax_gradient(s, t, map, grad, wide_t);
            query_key_gradient(s, d, qkv, head, grad, wide_t, dqkv, accumulate, rest);
        }
    }
}

#[inline(always)]
fn map_forward_impl<S: Simd>(s: S, d: &Attention, qkv: &[f32], map: &mut [f32], scratch: &mut [f32]) {
    let t = d.tokens;
    for (b, qkv) in qkv.chunks_exact(t * d.stride()).enumerate() {
        for head in 0..d.heads {
            let map = &mut map[(b * d.heads + head) * t * t..][..t * t];
            probabilities(s, d, qkv, head, d.tokens, map, scratch);
        }
    }
}

#[inline(always)]
fn map_backward_impl<S: Simd>(
    s: S,
    d: &Attention,
    qkv: &[f32],
    map: &[f32],
    dmap: &[f32],
    dqkv: &mut [f32],
    accumulate: bool,
    scratch: &mut [f32],
) {
    let t = d.tokens;
    let wide_t = padded::<S>(t);
    let entries = qkv.chunks_exact(t * d.stride()).zip(dqkv.chunks_exact_mut(t * d.stride()));
    for (b, (qkv, dqkv)) in entries.enumerate() {
        for head in 0..d.heads {
            let at = (b * d.heads + head) * t * t;
            let (grad, rest) = scratch.split_at_mut(t * wide_t);
            pack(s, t, t, &dmap[at..at + t * t], t, grad);
            softmax_gradient(s, t, &map[at..at + t * t], grad, wide_t);
            query_key_gradient(s, d, qkv, head, grad, wide_t, dqkv, accumulate, rest);
            if !accumulate {
                for token in 0..t {
                    dqkv[token * d.stride() + start(d, Part::V, head)..][..d.head_dim].fill(0.0);
                }
            }
        }
    }
}

simd_fn! {
    fn forward_group(
        d: &Attention, qkv: &[f32], last: &[i32], out: &mut [f32], map: &mut [f32], scratch: &mut [f32],
    ) = forward_impl;
    fn backward_group(
        d: &Attention, qkv: &[f32], map: &[f32], dout: &[f32], dqkv: &mut [f32], accumulate: bool, scratch: &mut [f32],
    ) = backward_impl;
    fn map_forward_group(d: &Attention, qkv: &[f32], map: &mut [f32], scratch: &mut [f32]) = map_forward_impl;
    fn map_backward_group(
        d: &Attention, qkv: &[f32], map: &[f32], dmap: &[f32], dqkv: &mut [f32], accumulate: bool, scratch: &mut [f32],
    ) = map_backward_impl;
}

/// Scratch of all groups, and the elements of `qkv`, output and map that one group owns.
fn groups<'w>(d: &Attention, ws: &'w mut Workspace) -> (Level, &'w mut [f32], [usize; 3]) {
    let level = ws.level();
    let scratch = ws.take(d.groups() * d.scratch());
    let each = d.group();
    let map = d.heads * d.tokens * d.tokens;
    (level, scratch, [each * d.tokens * d.stride(), each * d.tokens * d.heads * d.head_dim, each * map])
}

/// out = softmax(Q·Kᵀ/√D)·V for each head; `probs` keeps the probabilities for the backward pass (0 where
/// the causal mask hides a token).
pub fn attention_forward(d: &Attention, qkv: &[f32], out: &mut [f32], probs: &mut [f32], ws: &mut Workspace) {
    forward(d, qkv, &[], out, probs, ws);
}

/// As [`attention_forward`], where in batch entry b only tokens 0..=last\[b\] are keys (padding stands behind them). The
/// hidden probabilities are 0, so that [`attention_backward`] is its VJP, too.
pub fn masked_attention_forward(
    d: &Attention,
    qkv: &[f32],
    last: &[i32],
    out: &mut [f32],
    probs: &mut [f32],
    ws: &mut Workspace,
) {
    assert_eq!(last.len(), d.batch, "one last token per batch entry");
    forward(d, qkv, last, out, probs, ws);
}

fn forward(d: &Attention, qkv: &[f32], last: &[i32], out: &mut [f32], probs: &mut [f32], ws: &mut Workspace) {
    assert_eq!(qkv.len(), d.qkv_len(), "qkv is [B, T, 3, H, D]");
    assert_eq!(out.len(), d.out_len(), "out is [B, T, H*D]");
    assert_eq!(probs.len(), d.map_len(), "probs is [B, H, T, T]");
    if out.is_empty() {
        return;
    }
    let (level, scratch, [n_qkv, n_out, n_map]) = groups(d, ws);
    out.par_chunks_mut(n_out)
        .zip(probs.par_chunks_mut(n_map))
        .zip(qkv.par_chunks(n_qkv))
        .zip(scratch.par_chunks_mut(d.scratch()))
        .enumerate()
        .for_each(|(group, (((out, probs), qkv), scratch))| {
            let last = last.get(group * d.group()..).unwrap_or_default();
            forward_group(level, d, qkv, last, out, probs, scratch);
        });
}

/// VJP of [`attention_forward`] with respect to qkv.
pub fn attention_backward(
    d: &Attention,
    qkv: &[f32],
    probs: &[f32],
    dout: &[f32],
    dqkv: &mut [f32],
    accumulate: bool,
    ws: &mut Workspace,
) {
    assert!(qkv.len() == d.qkv_len() && dqkv.len() == d.qkv_len(), "qkv and dqkv are [B, T, 3, H, D]");
    assert_eq!(dout.len(), d.out_len(), "dout is [B, T, H*D]");
    assert_eq!(probs.len(), d.map_len(), "probs is [B, H, T, T]");
    if dqkv.is_empty() {
        return;
    }
    let (level, scratch, [n_qkv, n_out, n_map]) = groups(d, ws);
    dqkv.par_chunks_mut(n_qkv)
        .zip(qkv.par_chunks(n_qkv).zip(dout.par_chunks(n_out)))
        .zip(probs.par_chunks(n_map))
        .zip(scratch.par_chunks_mut(d.scratch()))
        .for_each(|(((dqkv, (qkv, dout)), probs), scratch)| {
            backward_group(level, d, qkv, probs, dout, dqkv, accumulate, scratch);
        });
}

/// The probabilities alone: map [B, H, T, T] = softmax(Q·Kᵀ/√D).
pub fn attention_map_forward(d: &Attention, qkv: &[f32], map: &mut [f32], ws: &mut Workspace) {
    assert_eq!(qkv.len(), d.qkv_len(), "qkv is [B, T, 3, H, D]");
    assert_eq!(map.len(), d.map_len(), "map is [B, H, T, T]");
    if map.is_empty() {
        return;
    }
    let (level, scratch, [n_qkv, _, n_map]) = groups(d, ws);
    map.par_chunks_mut(n_map)
        .zip(qkv.par_chunks(n_qkv))
        .zip(scratch.par_chunks_mut(d.scratch()))
        .for_each(|((map, qkv), scratch)| map_forward_group(level, d, qkv, map, scratch));
}

/// VJP of [`attention_map_forward`] with respect to qkv; V gets no gradient (zero unless accumulating).
pub fn attention_map_backward(
    d: &Attention,
    qkv: &[f32],
    map: &[f32],
    dmap: &[f32],
    dqkv: &mut [f32],
    accumulate: bool,
    ws: &mut Workspace,
) {
    assert!(qkv.len() == d.qkv_len() && dqkv.len() == d.qkv_len(), "qkv and dqkv are [B, T, 3, H, D]");
    assert!(map.len() == d.map_len() && dmap.len() == d.map_len(), "map and dmap are [B, H, T, T]");
    if dqkv.is_empty() {
        return;
    }
    let (level, scratch, [n_qkv, _, n_map]) = groups(d, ws);
    dqkv.par_chunks_mut(n_qkv)
        .zip(qkv.par_chunks(n_qkv))
        .zip(map.par_chunks(n_map).zip(dmap.par_chunks(n_map)))
        .zip(scratch.par_chunks_mut(d.scratch()))
        .for_each(|(((dqkv, qkv), (map, dmap)), scratch)| {
            map_backward_group(level, d, qkv, map, dmap, dqkv, accumulate, scratch);
        });
}
