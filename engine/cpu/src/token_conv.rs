//! Depthwise convolution over the tokens of a sequence (MobileCLIP's text blocks): y[t] = Σ_k w[:, k]·x[t + k − K/2],
//! zeros outside the sequence.
//!
//! Letters: B batch, T tokens, C channels, K taps (odd). x and y are [B, T, C], w is [C, K] (PyTorch's [C, 1, 1, K]).

use rayon::prelude::*;

use crate::simd::Simd;
use crate::simd_fn;
use crate::workspace::Workspace;

/// Sizes of a convolution over tokens.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct TokenConv {
    /// B.
    pub batch: usize,
    /// T.
    pub tokens: usize,
    /// C.
    pub channels: usize,
    /// K, odd.
    pub kernel: usize,
}

impl TokenConv {
    fn sequence(&self) -> usize {
        self.tokens * self.channels
    }

    fn check(&self, x: usize, w: usize, y: usize) {
        assert!(self.kernel % 2 == 1, "the kernel is odd");
        assert_eq!(x, self.batch * self.sequence(), "x is [B, T, C]");
        assert_eq!(w, self.channels * self.kernel, "w is [C, K]");
        assert_eq!(y, x, "y is [B, T, C]");
    }

    /// Tokens that tap k of output token t reads.
    #[inline(always)]
    fn source(&self, t: usize, k: usize) -> Option<usize> {
        (t + k).checked_sub(self.kernel / 2).filter(|from| *from < self.tokens)
    }
}

/// w [C, K] as [K, C], its taps in reverse where the transposed convolution is wanted.
fn taps(d: &TokenConv, w: &[f32], reverse: bool, out: &mut [f32]) {
    for (c, row) in w.chunks_exact(d.kernel).enumerate() {
        for (k, v) in row.iter().enumerate() {
            let k = if reverse { d.kernel - 1 - k } else { k };
            out[k * d.channels + c] = *v;
        }
    }
}

/// y (+)= a∘x.
#[inline(always)]
fn multiply_add<S: Simd>(s: S, a: &[f32], x: &[f32], y: &mut [f32]) {
    let mut i = 0;
    while i < y.len() {
        let v = s.fma(s.load_partial(&a[i..]), s.load_partial(&x[i..]), s.load_partial(&y[i..]));
        s.store_partial(&mut y[i..], v);
        i += S::LANES;
    }
}

/// One sequence, `w` as [K, C].
#[inline(always)]
fn sequence_impl<S: Simd>(s: S, d: &TokenConv, x: &[f32], w: &[f32], y: &mut [f32], accumulate: bool) {
    let c = d.channels;
    if !accumulate {
        y.fill(0.0);
    }
    for (t, y) in y.chunks_exact_mut(c).enumerate() {
        for k in 0..d.kernel {
            if let Some(from) = d.source(t, k) {
                multiply_add(s, &w[k * c..][..c], &x[from * c..][..c], y);
            }
        }
    }
}

/// One sequence's part of the weights' gradient, as [K, C].
#[inline(always)]
fn weights_impl<S: Simd>(s: S, d: &TokenConv, x: &[f32], dy: &[f32], dw: &mut [f32]) {
    let c = d.channels;
    dw.fill(0.0);
    for (t, dy) in dy.chunks_exact(c).enumerate() {
        for k in 0..d.kernel {
            if let Some(from) = d.source(t, k) {
                multiply_add(s, dy, &x[from * c..][..c], &mut dw[k * c..][..c]);
            }
        }
    }
}

simd_fn! {
    fn one_sequence(d: &TokenConv, x: &[f32], w: &[f32], y: &mut [f32], accumulate: bool) = sequence_impl;
    fn one_weights(d: &TokenConv, x: &[f32], dy: &[f32], dw: &mut [f32]) = weights_impl;
}

fn convolve(d: &TokenConv, x: &[f32], w: &[f32], reverse: bool, y: &mut [f32], accumulate: bool, ws: &mut Workspace) {
    d.check(x.len(), w.len(), y.len());
    if y.is_empty() {
        return;
    }
    let level = ws.level();
    let by_tap = ws.take(w.len());
    taps(d, w, reverse, by_tap);
    let (w, n) = (&*by_tap, d.sequence());
    y.par_chunks_mut(n).zip(x.par_chunks(n)).for_each(|(y, x)| one_sequence(level, d, x, w, y, accumulate));
}

/// The convolution.
pub fn token_conv_forward(d: &TokenConv, x: &[f32], w: &[f32], y: &mut [f32], ws: &mut Workspace) {
    convolve(d, x, w, false, y, false, ws);
}

/// VJP with respect to x: dx (+)= the convolution of dy with the taps reversed.
pub fn token_conv_backward_data(
    d: &TokenConv,
    w: &[f32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
    ws: &mut Workspace,
) {
    convolve(d, dy, w, true, dx, accumulate, ws);
}

/// VJP with respect to w, added to `dw`.
pub fn token_conv_backward_weights(d: &TokenConv, x: &[f32], dy: &[f32], dw: &mut [f32], ws: &mut Workspace) {
    d.check(x.len(), dw.len(), dy.len());
    if x.is_empty() {
        return;
    }
    let (level, n, len) = (ws.level(), d.sequence(), dw.len());
    let parts = ws.take(d.batch * len);
    parts
        .par_chunks_mut(len)
        .zip(x.par_chunks(n).zip(dy.par_chunks(n)))
        .for_each(|(part, (x, dy))| one_weights(level, d, x, dy, part));
    for part in parts.chunks_exact(len) {
        for (c, row) in dw.chunks_exact_mut(d.kernel).enumerate() {
            row.iter_mut().enumerate().for_each(|(k, sum)| *sum += part[k * d.channels + c]);
        }
    }
}
