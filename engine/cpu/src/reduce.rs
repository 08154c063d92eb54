//! Sums over rows, in a fixed order.

use crate::gemm::merge;
use crate::parallel::{Shared, for_each_task, part, tasks_for};
use crate::simd::Simd;
use crate::simd_fn;
use crate::workspace::Workspace;

/// `out[c] += sum_r x[r,c]` for row-major `x` of `columns` columns.
pub(crate) fn add_column_sums(x: &[f32], columns: usize, out: &mut [f32], ws: &mut Workspace) {
    assert_eq!(out.len(), columns, "one sum per column");
    if columns == 0 {
        return;
    }
    let rows = x.len() / columns;
    let level = ws.level();
    let tasks = tasks_for(4 * x.len() as u64).min(rows.max(1));
    let partials = ws.take(tasks * columns);
    let shared = Shared(partials.as_mut_ptr());
    for_each_task(tasks, |task| {
        let rows = part(rows, 1, tasks, task);
        // SAFETY: partial `task` belongs to this task alone and lies inside the workspace slice.
        let sums = unsafe { std::slice::from_raw_parts_mut(shared.ptr().add(task * columns), columns) };
        column_sums(level, &x[rows.start * columns..rows.end * columns], sums);
    });
    merge(partials, true, out);
}

#[inline(always)]
fn column_sums_impl<S: Simd>(s: S, x: &[f32], sums: &mut [f32]) {
    let columns = sums.len();
    let mut c = 0;
    while c < columns {
        let end = columns.min(c + S::LANES);
        // Four chains, so that an addition need not wait for the one before it.
        let mut acc = [s.zero(); 4];
        let mut quads = x.chunks_exact(4 * columns);
        for quad in &mut quads {
            for i in 0..4 {
                acc[i] = s.add(acc[i], s.load_partial(&quad[i * columns + c..i * columns + end]));
            }
        }
        for row in quads.remainder().chunks_exact(columns) {
            acc[0] = s.add(acc[0], s.load_partial(&row[c..end]));
        }
        let sum = s.add(s.add(acc[0], acc[1]), s.add(acc[2], acc[3]));
        s.store_partial(&mut sums[c..end], sum);
        c = end;
    }
}

simd_fn! {
    /// `sums[c] = sum_r x[r,c]`, columns as many as `sums`.
    fn column_sums(x: &[f32], sums: &mut [f32]) = column_sums_impl;
}
