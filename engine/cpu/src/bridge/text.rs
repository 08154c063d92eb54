//! Formulations of what text towers and SigLIP's models add.

use dfdx::prelude::*;

use super::layout::rows_of;
use super::tape::{Flat, Real, Tape, Var, flatten};
use crate::attention_pool::AttentionPool;
use crate::sigmoid_loss::SigmoidLoss;
use crate::token_conv::TokenConv;

/// Keys (0) or values (1) as [B, H, T, D].
fn part<E: Real>(t: &Tape<E>, d: &AttentionPool, which: usize) -> Var<(usize, usize, usize, usize), E> {
    let kv = t.arg(1, (d.batch, d.tokens, 2, d.heads, d.head_dim));
    kv.permute::<_, Axes5<2, 0, 3, 1, 4>>().select(t.index(which))
}

pub(super) fn attention_pool<E: Real>(t: &Tape<E>, d: &AttentionPool) -> (Flat<E>, Vec<Vec<E>>) {
    let shape = (d.batch, d.heads, d.tokens, d.head_dim);
    let q = t.arg(0, (d.heads, d.head_dim)).broadcast_like::<_, Axes2<0, 2>>(&shape);
    let scores = (q * part(t, d, 0)).sum::<(usize, usize, usize), Axis<3>>();
    let map = (scores * E::of_f64(1.0 / (d.head_dim as f64).sqrt())).softmax::<Axis<2>>();
    let saved = map.as_vec();
    let out = map.broadcast_like::<_, Axis<3>>(&shape) * part(t, d, 1);
    (flatten(out.sum::<(usize, usize, usize), Axis<2>>()), vec![saved])
}

pub(super) fn token_conv<E: Real>(t: &Tape<E>, d: &TokenConv) -> Flat<E> {
    let (rows, taps) = (d.batch * d.tokens, d.kernel);
    // One row past the last stands for what lies outside a sequence.
    let source = |i: usize| {
        let (row, k) = (i / taps, i % taps);
        let (b, token) = (row / d.tokens, row % d.tokens);
        let from = (token + k).checked_sub(taps / 2).filter(|from| *from < d.tokens);
        from.map_or(rows, |from| b * d.tokens + from)
    };
    let x = (t.arg(0, (rows, d.channels)), t.filled(0.0, (1, d.channels)).leaky_traced()).concat_along(Axis::<0>);
    let windows = rows_of(t, x, (0..rows * taps).map(source).collect()).reshape_like(&(rows, taps, d.channels));
    let w = t.arg(1, (d.channels, taps)).permute::<_, Axes2<1, 0>>();
    let products = windows * w.broadcast_like::<_, Axis<0>>(&(rows, taps, d.channels));
    flatten(products.sum::<(usize, usize), Axis<1>>())
}

pub(super) fn sigmoid_loss<E: Real>(t: &Tape<E>, d: &SigmoidLoss) -> Flat<E> {
    let shape = (d.rows, d.cols);
    let b = t.arg(1, (d.cols, d.dim)).permute::<_, Axes2<1, 0>>();
    let scale = t.arg(2, ()).broadcast_like::<_, Axes2<0, 1>>(&shape);
    let bias = t.arg(3, ()).broadcast_like::<_, Axes2<0, 1>>(&shape);
    let logits = t.arg(0, (d.rows, d.dim)).matmul(b) * scale + bias;
    let losses = logits.bce_with_logits(t.constant(4, shape).leaky_traced());
    (losses.sum::<(), _>() * E::of_f64(1.0 / d.rows as f64)).reshape_like(&(1,))
}
