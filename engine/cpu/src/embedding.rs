//! Row look-ups: token embeddings and the row of each sequence that the text tower reads out.

use rayon::prelude::*;

/// `y[i] = table[ids[i]]`; table [V, width], y [N, width].
///
/// # Panics
/// If an id is negative or not below V: the tokenizer's vocabulary is checked against the table when
/// the graph is built, so such an id is a bug and not a user's mistake.
pub fn embedding_forward(table: &[f32], width: usize, ids: &[i32], y: &mut [f32]) {
    assert_eq!(y.len(), ids.len() * width, "y is [N, width]");
    if y.is_empty() {
        return;
    }
    y.par_chunks_mut(width).zip(ids.par_iter()).with_min_len(64).for_each(|(y_w, id)| {
        let row = row_of(*id, table.len() / width);
        y_w.copy_from_slice(&table[row * width..][..width]);
    });
}

/// VJP of [`embedding_forward`]: `dtable[ids[i]] += dy[i]`, in the order of `ids`.
pub fn embedding_backward(width: usize, ids: &[i32], dy: &[f32], dtable: &mut [f32]) {
    assert_eq!(dy.len(), ids.len() * width, "dy is [N, width]");
    if dtable.is_empty() || ids.is_empty() {
        return;
    }
    // Each task owns a fixed range of table rows and reads all ids, so that equal ids add up in order
    // whatever thread runs the task.
    const TASKS: usize = 16;
    let rows = dtable.len() / width;
    let span = rows.div_ceil(TASKS).max(1);
    dtable.par_chunks_mut(span * width).enumerate().for_each(|(task, d_rows)| {
        let first = task * span;
        let count = d_rows.len() / width;
        for (id, dy_w) in ids.iter().zip(dy.chunks_exact(width)) {
            let row = row_of(*id, rows);
            if (first..first + count).contains(&row) {
                for (d, g) in d_rows[(row - first) * width..][..width].iter_mut().zip(dy_w) {
                    *d += g;
                }
            }
        }
    });
}

/// `y[b] = x[b, index[b]]`; x [B, tokens, width], index \[B\], y [B, width].
///
/// # Panics
/// If an index is negative or not below `tokens`.
pub fn gather_rows_forward(batch: usize, tokens: usize, width: usize, index: &[i32], x: &[f32], y: &mut [f32]) {
    assert_eq!(index.len(), batch, "index is [B]");
    assert_eq!(x.len(), batch * tokens * width, "x is [B, tokens, width]");
    assert_eq!(y.len(), batch * width, "y is [B, width]");
    for (b, id) in index.iter().enumerate() {
        let row = b * tokens + row_of(*id, tokens);
        y[b * width..(b + 1) * width].copy_from_slice(&x[row * width..][..width]);
    }
}

/// VJP of [`gather_rows_forward`]: dx is dy at the chosen rows and zero elsewhere.
pub fn gather_rows_backward(
    batch: usize,
    tokens: usize,
    width: usize,
    index: &[i32],
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
) {
    assert_eq!(index.len(), batch, "index is [B]");
    assert_eq!(dx.len(), batch * tokens * width, "dx is [B, tokens, width]");
    assert_eq!(dy.len(), batch * width, "dy is [B, width]");
    if !accumulate {
        dx.fill(0.0);
    }
    for (b, id) in index.iter().enumerate() {
        let row = b * tokens + row_of(*id, tokens);
        for (d, g) in dx[row * width..][..width].iter_mut().zip(&dy[b * width..]) {
            *d += g;
        }
    }
}

fn row_of(id: i32, rows: usize) -> usize {
    match usize::try_from(id) {
        Ok(row) if row < rows => row,
        _ => panic!("row {id} of a table with {rows} rows"),
    }
}
