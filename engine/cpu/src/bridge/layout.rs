//! Formulations of the ops that only move numbers.

use dfdx::prelude::*;

use super::tape::{Flat, Real, Tape, Var, flatten};
use crate::layout::Patches;

/// Rows `index` of a matrix; the index must lie within.
pub(super) fn rows_of<E: Real>(t: &Tape<E>, x: Var<(usize, usize), E>, index: Vec<usize>) -> Var<(usize, usize), E> {
    x.gather(t.indices(index))
}

pub(super) fn unfold<E: Real>(t: &Tape<E>, d: &Patches) -> Flat<E> {
    let x = t.arg(0, (d.batch, d.h / d.ph, d.ph, d.w / d.pw, d.pw, d.c));
    flatten(x.permute::<_, Axes6<0, 2, 4, 1, 3, 5>>())
}

pub(super) fn fold<E: Real>(t: &Tape<E>, d: &Patches) -> Flat<E> {
    let x = t.arg(0, (d.batch, d.ph, d.pw, d.h / d.ph, d.w / d.pw, d.c));
    flatten(x.permute::<_, Axes6<0, 3, 1, 4, 2, 5>>())
}

pub(super) fn embedding<E: Real>(t: &Tape<E>, width: usize, ids: &[i32]) -> Flat<E> {
    let table = t.flat(0);
    let rows = table.shape().0 / width;
    let index = ids.iter().map(|id| *id as usize).collect();
    flatten(rows_of(t, table.reshape_like(&(rows, width)), index))
}

pub(super) fn gather_rows<E: Real>(t: &Tape<E>, tokens: usize, width: usize, index: &[i32]) -> Flat<E> {
    let rows = index.iter().enumerate().map(|(b, id)| b * tokens + *id as usize).collect();
    flatten(rows_of(t, t.arg(0, (index.len() * tokens, width)), rows))
}

pub(super) fn concat_last<E: Real>(t: &Tape<E>, rows: usize, ca: usize, cb: usize) -> Flat<E> {
    flatten((t.arg(0, (rows, ca)), t.arg(1, (rows, cb))).concat_along(Axis::<1>))
}

pub(super) fn prepend_token<E: Real>(t: &Tape<E>, batch: usize, tokens: usize, width: usize) -> Flat<E> {
    let all = (t.arg(0, (1, width)), t.arg(1, (batch * tokens, width))).concat_along(Axis::<0>);
    let row = |i: usize| {
        let (b, token) = (i / (tokens + 1), i % (tokens + 1));
        if token == 0 { 0 } else { 1 + b * tokens + token - 1 }
    };
    flatten(rows_of(t, all, (0..batch * (tokens + 1)).map(row).collect()))
}

pub(super) fn slice_rows<E: Real>(
    t: &Tape<E>,
    [outer, rows, width]: [usize; 3],
    start: usize,
    count: usize,
) -> Flat<E> {
    flatten(t.arg(0, (outer, rows, width)).slice((0..outer, start..start + count, 0..width)))
}

pub(super) fn permute<E: Real>(t: &Tape<E>, shape: &[usize], perm: &[usize]) -> Flat<E> {
    let mut strides = vec![1; shape.len()];
    for axis in (1..shape.len()).rev() {
        strides[axis - 1] = strides[axis] * shape[axis];
    }
    let element = |mut i: usize| {
        let mut from = 0;
        for axis in perm.iter().rev() {
            from += i % shape[*axis] * strides[*axis];
            i /= shape[*axis];
        }
        from
    };
    let len: usize = shape.iter().product();
    t.flat(0).gather(t.indices((0..len).map(element).collect()))
}
