//! B of a matrix product, repacked into the panels that the register tile reads.

use super::kernel::next_panel;
use crate::simd::Level;

/// Elements of a `k x n` matrix packed for `level`: columns rounded up to whole vectors.
pub(crate) fn packed_len(level: Level, k: usize, n: usize) -> usize {
    k * n.next_multiple_of(level.lanes())
}

/// Packs `B(r, j) = at(r, j)`, given by its strides (`b[r * row + j * col]`), into panels of the whole height `k`.
/// Padding columns become 0.
pub(crate) fn pack_b(level: Level, k: usize, n: usize, b: &[f32], row: usize, col: usize, out: &mut [f32]) {
    let lanes = level.lanes();
    let (vectors, mut v) = (n.div_ceil(lanes), 0);
    while v < vectors {
        let nv = next_panel(vectors - v);
        let (j0, width) = (v * lanes, nv * lanes);
        let used = width.min(n - j0);
        let panel = &mut out[j0 * k..(j0 + width) * k];
        if col == 1 {
            for (r, line) in panel.chunks_exact_mut(width).enumerate() {
                let from = r * row + j0;
                line[..used].copy_from_slice(&b[from..from + used]);
                line[used..].fill(0.0);
            }
        } else {
            transpose(k, width, used, b, j0, row, col, panel);
        }
        v += nv;
    }
}

/// The strided case of [`pack_b`]: blocks of 16 rows, so that both sides stay in the nearest cache.
fn transpose(k: usize, width: usize, used: usize, b: &[f32], j0: usize, row: usize, col: usize, panel: &mut [f32]) {
    const ROWS: usize = 16;
    for (block, lines) in panel.chunks_mut(ROWS * width).enumerate() {
        let r0 = block * ROWS;
        let rows = ROWS.min(k - r0);
        for j in 0..used {
            let from = (j0 + j) * col + r0 * row;
            if row == 1 {
                for (r, v) in b[from..from + rows].iter().enumerate() {
                    lines[r * width + j] = *v;
                }
            } else {
                for r in 0..rows {
                    lines[r * width + j] = b[from + r * row];
                }
            }
        }
        for line in lines.chunks_exact_mut(width) {
            line[used..].fill(0.0);
        }
    }
}
