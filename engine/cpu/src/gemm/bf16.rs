//! Products of operands rounded to bf16, summed in f32: mixed precision with f32 master weights.
//!
//! Two neighbours along the inner dimension share the 32 bits of one f32, so that the register tile and its addressing
//! stay those of the f32 product, with half the inner length. Operands are rounded (to nearest, ties to even) block by
//! block, just before they are used.

use super::kernel::{Product, product};
use super::pack::{pack_b, packed_len};
use super::{Epilogue, Gemm, SPLIT_K, merge};
use crate::parallel::{Shared, for_each_task, part, tasks_for};
use crate::simd::{Level, Simd};
use crate::simd_fn;
use crate::workspace::Workspace;

/// Rows of A that are rounded at a time.
const ROWS: usize = 96;
/// Elements of both operands that a weight gradient rounds at a time.
const BLOCK: usize = 64 << 10;

/// The bits of the nearest bf16 in the upper half; the lower half is noise. NaN stays NaN.
#[inline(always)]
fn rounded(x: f32) -> u32 {
    let bits = x.to_bits();
    let up = bits.wrapping_add(0x7fff + ((bits >> 16) & 1));
    if x.is_nan() { bits | 0x0040_0000 } else { up }
}

#[inline(always)]
fn round_impl<S: Simd>(_s: S, x: &[f32], out: &mut [u16]) {
    for (o, x) in out.iter_mut().zip(x) {
        *o = (rounded(*x) >> 16) as u16;
    }
}

#[inline(always)]
fn zip_impl<S: Simd>(_s: S, first: &[f32], second: &[f32], out: &mut [f32]) {
    for ((o, a), b) in out.iter_mut().zip(first).zip(second) {
        *o = f32::from_bits((rounded(*a) >> 16) | (rounded(*b) & 0xffff_0000));
    }
}

#[inline(always)]
fn alone_impl<S: Simd>(_s: S, first: &[f32], out: &mut [f32]) {
    for (o, a) in out.iter_mut().zip(first) {
        *o = f32::from_bits(rounded(*a) >> 16);
    }
}

simd_fn! {
    fn round(x: &[f32], out: &mut [u16]) = round_impl;
    /// Pairs of `first[i]` and `second[i]`.
    fn zip(first: &[f32], second: &[f32], out: &mut [f32]) = zip_impl;
    /// Pairs of `first[i]` and 0.
    fn alone(first: &[f32], out: &mut [f32]) = alone_impl;
}

/// Neighbours of each row as pairs: `out` is `[rows, ceil(k/2)]`, an odd row's last pair ends in 0.
pub(crate) fn pairs_along_rows(level: Level, k: usize, x: &[f32], out: &mut [f32]) {
    let half = k.div_ceil(2);
    if k.is_multiple_of(2) {
        // SAFETY: an f32 holds two u16, whose alignment is less.
        let out = unsafe { std::slice::from_raw_parts_mut(out.as_mut_ptr().cast::<u16>(), out.len() * 2) };
        return round(level, x, out);
    }
    for (x, out) in x.chunks_exact(k).zip(out.chunks_exact_mut(half)) {
        for (o, x) in out.iter_mut().zip(x.chunks(2)) {
            let second = x.get(1).map_or(0, |v| rounded(*v) & 0xffff_0000);
            *o = f32::from_bits((rounded(x[0]) >> 16) | second);
        }
    }
}

/// Neighbouring rows of `n` elements as pairs: `out` is `[ceil(rows/2), n]`, an odd last row is paired with 0.
pub(crate) fn pairs_across_rows(level: Level, n: usize, x: &[f32], out: &mut [f32]) {
    for (rows, out) in x.chunks(2 * n).zip(out.chunks_exact_mut(n)) {
        let (first, second) = rows.split_at(n);
        if second.is_empty() { alone(level, first, out) } else { zip(level, first, second, out) }
    }
}

/// `out[i] = (x[i], x[i + distance])`, 0 behind the end.
pub(crate) fn pairs_at_distance(level: Level, distance: usize, x: &[f32], out: &mut [f32]) {
    let both = x.len().saturating_sub(distance);
    let (head, tail) = out[..x.len()].split_at_mut(both);
    zip(level, &x[..both], &x[x.len() - both..], head);
    alone(level, &x[both..], tail);
}

/// [`super::multiply`] on operands rounded to bf16.
pub(crate) fn multiply(
    d: &Gemm,
    a: &[f32],
    b: &[f32],
    accumulate: bool,
    epilogue: &Epilogue,
    c: &mut [f32],
    ws: &mut Workspace,
) {
    let Gemm { m, n, k, .. } = *d;
    if m == 0 || n == 0 {
        return;
    }
    assert!(a.len() >= m * k && b.len() >= k * n && c.len() >= m * n, "operand shorter than its sizes");
    epilogue.check(m, n);
    let level = ws.level();
    let tasks = tasks_for(d.flops());
    if d.trans_a && !d.trans_b && k >= SPLIT_K && epilogue.is_empty() {
        return split_k(d, a, b, accumulate, c, tasks, ws);
    }
    let half = k.div_ceil(2);
    let by_columns = m < 16 * tasks && n >= 2 * m;
    let unit = if by_columns { 3 * level.lanes() } else { 24 };
    let length = if by_columns { n } else { m };
    let tasks = tasks.min(length.div_ceil(unit));
    // A is rounded by each task as it goes; as a whole where tasks share it, or where its columns are its rows.
    let whole_a = by_columns || d.trans_a;
    let pack = d.trans_b || (n > 256 && m >= 64);
    let lens = [half * n, if pack { packed_len(level, half, n) } else { 0 }];
    let a_len = if whole_a { m * half } else { tasks * ROWS.min(m) * half };
    let [b_pairs, packed, a_pairs] = ws.split([lens[0], lens[1], a_len]);
    let (b_row, b_col) = if d.trans_b {
        along_rows(level, k, &b[..n * k], b_pairs);
        (1, half)
    } else {
        across_rows(level, n, &b[..k * n], b_pairs);
        (n, 1)
    };
    if pack && !by_columns {
        pack_b(level, half, n, b_pairs, b_row, b_col, packed);
    }
    if d.trans_a {
        across_rows(level, m, &a[..k * m], a_pairs);
    } else if whole_a {
        pairs_along_rows(level, k, &a[..m * k], a_pairs);
    }
    let b_pairs = &*b_pairs;
    let packed = Shared(packed.as_mut_ptr());
    let (a_ptr, c_ptr) = (Shared(a_pairs.as_mut_ptr()), Shared(c.as_mut_ptr()));
    for_each_task(tasks, |task| {
        let range = part(length, unit, tasks, task);
        let (rows, cols) = if by_columns { (0..m, range) } else { (range, 0..n) };
        if rows.is_empty() || cols.is_empty() {
            return;
        }
        // SAFETY: column `cols.start`'s panels start there; a task that packs its own columns starts at a whole vector.
        let own_b = unsafe { packed.ptr().add(cols.start * half) };
        if pack && by_columns {
            // SAFETY: as above, up to the next task's columns.
            let own = unsafe { std::slice::from_raw_parts_mut(own_b, packed_len(level, half, cols.len())) };
            pack_b(level, half, cols.len(), &b_pairs[cols.start * b_col..], b_row, b_col, own);
        }
        let step = if whole_a { rows.len() } else { ROWS };
        for first in rows.clone().step_by(step) {
            let count = step.min(rows.end - first);
            // SAFETY: rounded rows lie in this task's part of `a_pairs`, or are only read; C's rows or columns belong
            // to this task; the other operands were checked above.
            unsafe {
                let (a_from, a_row, a_col) = match (d.trans_a, whole_a) {
                    (true, _) => (a_ptr.ptr().add(first), 1, m),
                    (false, true) => (a_ptr.ptr().add(first * half), half, 1),
                    (false, false) => {
                        let own = a_ptr.ptr().add(task * ROWS.min(m) * half);
                        let out = std::slice::from_raw_parts_mut(own, count * half);
                        pairs_along_rows(level, k, &a[first * k..(first + count) * k], out);
                        (own, half, 1)
                    }
                };
                let p = Product {
                    m: count,
                    n: cols.len(),
                    outers: 1,
                    segs: 1,
                    seg_len: half,
                    a: a_from,
                    a_row,
                    a_col,
                    a_seg: 0,
                    a_outer: 0,
                    b: if pack { own_b.cast_const() } else { b_pairs[cols.start..].as_ptr() },
                    ldb: if pack { half } else { n },
                    b_packed: pack,
                    b_first: 0,
                    c: c_ptr.ptr().add(first * n + cols.start),
                    ldc: n,
                    alpha: 1.0,
                    pairs: true,
                    accumulate,
                    bias: epilogue.bias.map_or(std::ptr::null(), |bias| bias.as_ptr().add(cols.start)),
                    residual: epilogue.residual.map_or(std::ptr::null(), |r| r.as_ptr().add(first * n + cols.start)),
                    act: epilogue.act,
                };
                super::product_by_k_blocks(level, &p, half);
            }
        }
    });
}

/// [`pairs_along_rows`] in parallel.
fn along_rows(level: Level, k: usize, x: &[f32], out: &mut [f32]) {
    let (rows, half) = (x.len() / k.max(1), k.div_ceil(2));
    let out = Shared(out.as_mut_ptr());
    let tasks = tasks_for(16 * x.len() as u64).min(rows.max(1));
    for_each_task(tasks, |task| {
        let range = part(rows, 1, tasks, task);
        // SAFETY: rows of the output are disjoint over tasks.
        let out = unsafe { std::slice::from_raw_parts_mut(out.ptr().add(range.start * half), range.len() * half) };
        pairs_along_rows(level, k, &x[range.start * k..range.end * k], out);
    });
}

/// [`pairs_across_rows`] in parallel.
fn across_rows(level: Level, n: usize, x: &[f32], out: &mut [f32]) {
    let rows = x.len() / n.max(1);
    let out = Shared(out.as_mut_ptr());
    let tasks = tasks_for(16 * x.len() as u64).min(rows.div_ceil(2).max(1));
    for_each_task(tasks, |task| {
        let range = part(rows, 2, tasks, task);
        let len = range.len().div_ceil(2) * n;
        // SAFETY: ranges start at even rows, so pairs of rows are disjoint over tasks.
        let out = unsafe { std::slice::from_raw_parts_mut(out.ptr().add(range.start / 2 * n), len) };
        pairs_across_rows(level, n, &x[range.start * n..range.end * n], out);
    });
}

/// `C (+)= Aᵀ B` for weight gradients, A `[k, m]`, B `[k, n]`: one partial C per task, summed in task order.
fn split_k(d: &Gemm, a: &[f32], b: &[f32], accumulate: bool, c: &mut [f32], tasks: usize, ws: &mut Workspace) {
    let Gemm { m, n, k, .. } = *d;
    let level = ws.level();
    let tasks = tasks.min(k / (SPLIT_K / 4)).max(1);
    let rows = (BLOCK / (m + n)).clamp(32, 1024) / 2 * 2;
    let scratch = rows / 2 * (m + n);
    let [partials, rounded] = ws.split([tasks * m * n, tasks * scratch]);
    let (out, rounded) = (Shared(partials.as_mut_ptr()), Shared(rounded.as_mut_ptr()));
    for_each_task(tasks, |task| {
        // SAFETY: each task has its own part of the scratch.
        let own = unsafe { std::slice::from_raw_parts_mut(rounded.ptr().add(task * scratch), scratch) };
        let (a_pairs, b_pairs) = own.split_at_mut(rows / 2 * m);
        let range = part(k, 2, tasks, task);
        for first in range.clone().step_by(rows) {
            let behind = range.end.min(first + rows);
            pairs_across_rows(level, m, &a[first * m..behind * m], a_pairs);
            pairs_across_rows(level, n, &b[first * n..behind * n], b_pairs);
            let p = Product {
                m,
                n,
                outers: 1,
                segs: 1,
                seg_len: (behind - first).div_ceil(2),
                a: a_pairs.as_ptr(),
                a_row: 1,
                a_col: m,
                a_seg: 0,
                a_outer: 0,
                b: b_pairs.as_ptr(),
                ldb: n,
                b_packed: false,
                b_first: 0,
                // SAFETY: partial `task` of `tasks` lies inside the workspace slice.
                c: unsafe { out.ptr().add(task * m * n) },
                ldc: n,
                alpha: 1.0,
                pairs: true,
                accumulate: first > range.start,
                bias: std::ptr::null(),
                residual: std::ptr::null(),
                act: crate::activation::Activation::Identity,
            };
            // SAFETY: the rounded blocks hold `seg_len` rows; the partial belongs to this task alone.
            unsafe { product(level, &p) };
        }
    });
    merge(partials, accumulate, c);
}
