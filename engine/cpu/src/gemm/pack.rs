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
        let nv = next_panel(lanes, vectors - v);
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
            transpose(level, (k, used), &b[j0 * col..], (row, col), width, panel);
        }
        v += nv;
    }
}

/// The strided case of [`pack_b`], in square blocks, so that both sides stay in the nearest cache.
fn transpose(
    level: Level,
    (k, used): (usize, usize),
    b: &[f32],
    (row, col): (usize, usize),
    width: usize,
    panel: &mut [f32],
) {
    for (block, lines) in panel.chunks_mut(SIDE * width).enumerate() {
        let r0 = block * SIDE;
        let rows = SIDE.min(k - r0);
        for j0 in (0..used).step_by(SIDE) {
            let columns = SIDE.min(used - j0);
            let from = &b[j0 * col + r0 * row..];
            if row == 1 && rows == SIDE && columns == SIDE {
                square(level, from, col, &mut lines[j0..], width);
                continue;
            }
            for j in 0..columns {
                for r in 0..rows {
                    lines[r * width + j0 + j] = from[j * col + r * row];
                }
            }
        }
        for line in lines.chunks_exact_mut(width) {
            line[used..].fill(0.0);
        }
    }
}

/// Side of the blocks of a transposition.
const SIDE: usize = 8;

/// `to[r * to_row + j] = from[j * from_row + r]` for `r` and `j` below [`SIDE`].
fn square(level: Level, from: &[f32], from_row: usize, to: &mut [f32], to_row: usize) {
    assert!(from.len() >= (SIDE - 1) * from_row + SIDE && to.len() >= (SIDE - 1) * to_row + SIDE);
    #[cfg(target_arch = "x86_64")]
    if level > Level::SCALAR {
        // SAFETY: every level above the scalar one has AVX2; the lengths were checked.
        unsafe { x86::square(from.as_ptr(), from_row, to.as_mut_ptr(), to_row) };
        return;
    }
    let _ = level;
    for r in 0..SIDE {
        for j in 0..SIDE {
            to[r * to_row + j] = from[j * from_row + r];
        }
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    /// Transposes 8x8 in registers: pairs of rows are interleaved, then pairs of pairs, then halves are swapped.
    ///
    /// # Safety
    /// The machine has AVX2; 8 elements from each of 8 rows are readable and writable.
    #[target_feature(enable = "avx2")]
    pub(super) unsafe fn square(from: *const f32, from_row: usize, to: *mut f32, to_row: usize) {
        // SAFETY: the caller's contract.
        let r: [__m256; 8] = std::array::from_fn(|j| unsafe { _mm256_loadu_ps(from.add(j * from_row)) });
        let pairs: [__m256; 8] = std::array::from_fn(|i| {
            let (a, b) = (r[i / 2 * 2], r[i / 2 * 2 + 1]);
            if i % 2 == 0 { _mm256_unpacklo_ps(a, b) } else { _mm256_unpackhi_ps(a, b) }
        });
        // Quads `q[half * 4 + c]`: column `c` (and `c + 4` in the upper lane) of rows `4 half ..`.
        let quads: [__m256; 8] = std::array::from_fn(|i| {
            let (half, c) = (i / 4, i % 4);
            let (a, b) = (pairs[half * 4 + c / 2], pairs[half * 4 + 2 + c / 2]);
            if c % 2 == 0 { _mm256_shuffle_ps::<0x44>(a, b) } else { _mm256_shuffle_ps::<0xee>(a, b) }
        });
        for c in 0..4 {
            // SAFETY: the caller's contract.
            unsafe {
                let (low, high) = (quads[c], quads[4 + c]);
                _mm256_storeu_ps(to.add(c * to_row), _mm256_permute2f128_ps::<0x20>(low, high));
                _mm256_storeu_ps(to.add((c + 4) * to_row), _mm256_permute2f128_ps::<0x31>(low, high));
            }
        }
    }
}
