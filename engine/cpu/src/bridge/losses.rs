//! Formulations of the losses.

use dfdx::prelude::*;

use super::nn::{NORM_EPS_SQUARED, row_norms};
use super::tape::{Const, Flat, Real, Tape, Var, flatten};
use crate::loss::Contrastive;
use crate::relational::Relational;

/// Σ p·ln p with 0·ln 0 = 0, of constants.
fn negative_entropy<E: Real>(p: &[E]) -> f64 {
    p.iter().map(|p| p.into_f64()).map(|p| if p == 0.0 { 0.0 } else { p * p.ln() }).sum()
}

/// A number times a factor, plus a constant, as the loss's one element.
fn loss<E: Real>(sum: Var<(), E>, factor: f64, offset: f64) -> Flat<E> {
    (sum * E::of_f64(factor) + E::of_f64(offset)).reshape_like(&(1,))
}

pub(super) fn contrastive<E: Real>(t: &Tape<E>, d: &Contrastive, inputs: &[&[E]]) -> Flat<E> {
    let shape = (d.rows, d.cols);
    let a = t.arg(0, (d.rows, d.dim));
    let b = t.arg(1, (d.cols, d.dim)).permute::<_, Axes2<1, 0>>();
    let scale = t.arg(2, ()).broadcast_like::<_, Axes2<0, 1>>(&shape);
    let logits = a.matmul(b) * scale;

    let mut total = None;
    if d.w_row != 0.0 {
        let sum = (logits.with_empty_tape().log_softmax::<Axis<1>>() * t.constant(3, shape)).sum();
        let weight = f64::from(d.w_row) / d.rows as f64;
        let entropy = if d.subtract_entropy { negative_entropy(inputs[3]) } else { 0.0 };
        total = Some(loss(sum, -weight, weight * entropy));
    }
    if d.w_col != 0.0 {
        let targets = t.constant(4, (d.cols, d.rows)).permute::<_, Axes2<1, 0>>();
        let sum = (logits.with_empty_tape().log_softmax::<Axis<0>>() * targets).sum();
        let weight = f64::from(d.w_col) / d.cols as f64;
        let entropy = if d.subtract_entropy { negative_entropy(inputs[4]) } else { 0.0 };
        let columns = loss(sum, -weight, weight * entropy);
        total = Some(match total {
            Some(rows) => rows + columns,
            None => columns,
        });
    }
    let nothing = loss(t.filled(0.0, ()).leaky_traced(), 1.0, 0.0);
    // The logits' own tape joins here: the terms above were recorded on empty ones.
    let (_, tape) = logits.split_tape();
    let (value, own) = total.unwrap_or(nothing).split_tape();
    value.put_tape(tape.merge(own))
}

/// p_row [rows, cols] and p_col in the same layout, from the sparse targets.
fn dense_targets<E: Real>(d: &Relational, [own, other, group]: [&[i32]; 3], inputs: &[&[E]]) -> [Vec<E>; 2] {
    let value = |argument: usize, i: usize| inputs[argument][i].into_f64();
    let (mut row, mut column) = (Vec::new(), Vec::new());
    for i in 0..d.rows {
        for j in 0..d.cols {
            let (keep, share, total) = (value(3, i), value(4, j), value(5, j));
            let mut mass = if own[i] == group[j] { keep } else { 0.0 };
            mass += if other[i] == group[j] { 1.0 - keep } else { 0.0 };
            let p = if mass == 0.0 { 0.0 } else { mass * share };
            row.push(E::of_f64(p));
            column.push(E::of_f64(match (total == 0.0, p == 0.0) {
                (true, _) => f64::from(u8::from(d.first_row + i == j)),
                (false, true) => 0.0,
                (false, false) => p / total,
            }));
        }
    }
    [row, column]
}

pub(super) fn relational<E: Real>(t: &Tape<E>, d: &Relational, groups: [&[i32]; 3], inputs: &[&[E]]) -> Flat<E> {
    let (shape, k) = ((d.rows, d.cols), d.teachers.len());
    // The teachers' mean distributions by rows and by columns.
    let mut means = [t.filled(0.0, shape), t.filled(0.0, shape)];
    for (i, &width) in d.teachers.iter().enumerate() {
        let v = t.constant(7 + 2 * i, (d.cols, width)).permute::<_, Axes2<1, 0>>();
        let logits = t.constant(6 + 2 * i, (d.rows, width)).matmul(v);
        let [rows, columns] = means;
        let share = E::of_f64(1.0 / k as f64);
        means = [rows + logits.clone().softmax::<Axis<1>>() * share, columns + logits.softmax::<Axis<0>>() * share];
    }
    let targets = dense_targets(d, groups, inputs).map(|p| t.values(p, shape));

    let a = t.arg(0, (d.rows, d.dim));
    let b = t.arg(1, (d.cols, d.dim)).permute::<_, Axes2<1, 0>>();
    let scale = t.arg(2, ()).broadcast_like::<_, Axes2<0, 1>>(&shape);
    let logits = a.matmul(b) * scale;
    let weight = 0.5 / d.cols as f64;
    let both = |[row, column]: [Const<(usize, usize), E>; 2], offset: f64| {
        let rows = (logits.with_empty_tape().log_softmax::<Axis<1>>() * row).sum::<(), _>();
        let columns = (logits.with_empty_tape().log_softmax::<Axis<0>>() * column).sum::<(), _>();
        loss(rows + columns, -weight, offset)
    };
    let ce = both(targets, 0.0);
    let kd = if k == 0 {
        t.filled(0.0, (1,)).leaky_traced()
    } else {
        let entropy: f64 = means.iter().map(|p| negative_entropy(&p.as_vec())).sum();
        both(means, weight * entropy)
    };
    let value = (ce, kd).concat_along(Axis::<0>);
    // The logits' own tape joins here: the terms above were recorded on empty ones.
    let (_, tape) = logits.split_tape();
    let (value, own) = value.split_tape();
    value.put_tape(tape.merge(own))
}

pub(super) fn mse<E: Real>(t: &Tape<E>) -> Flat<E> {
    let d = t.flat(0) - t.flat(1);
    let n = d.shape().0 as f64;
    loss(d.square().sum(), 1.0 / n, 0.0)
}

pub(super) fn cosine<E: Real>(t: &Tape<E>, rows: usize, c: usize) -> Flat<E> {
    let shape = (rows, c);
    let norms = row_norms(t.arg(0, shape)) * row_norms(t.arg(1, shape));
    let dots = (t.arg(0, shape) * t.arg(1, shape)).sum::<(usize,), Axis<1>>();
    loss((dots / norms).sum(), -1.0 / rows as f64, 1.0)
}

pub(super) fn kl_rows<E: Real>(t: &Tape<E>, rows: usize, c: usize, inputs: &[&[E]]) -> Flat<E> {
    let shape = (rows, c);
    let q = t.arg(1, shape).clamp(f32::MIN_POSITIVE, f32::MAX);
    let sum = (q.ln() * t.constant(0, shape)).sum();
    let rows = rows as f64;
    loss(sum, -1.0 / rows, negative_entropy(inputs[0]) / rows)
}

pub(super) fn attention_transfer<E: Real>(t: &Tape<E>, batch: usize, hw: usize, c: usize) -> Flat<E> {
    let map = t.arg(0, (batch, hw, c)).square().mean::<(usize, usize), Axis<2>>();
    let squares = map.with_empty_tape().square().sum::<(usize,), Axis<1>>();
    let norm = (squares + E::of_f64(NORM_EPS_SQUARED)).sqrt();
    flatten(map / norm.broadcast_like::<_, Axis<1>>(&(batch, hw)))
}
