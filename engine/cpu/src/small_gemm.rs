//! Products of matrices small enough to stay in L1, inlined into the kernels that use them.

use crate::simd::Simd;

/// Rounds a row length up to a whole number of vectors.
#[inline(always)]
pub(crate) fn padded<S: Simd>(n: usize) -> usize {
    n.div_ceil(S::LANES) * S::LANES
}

/// A left operand of any strides: element (i, p) is `data[i·row + p·col]`.
#[derive(Clone, Copy)]
pub(crate) struct Left<'a> {
    pub(crate) data: &'a [f32],
    pub(crate) row: usize,
    pub(crate) col: usize,
}

/// C (m x n) = alpha · A (m x k) · B (k x n).
///
/// Rows of B are `ldb` apart and readable for whole vectors, `padded(n)` elements; so are rows of C, `ldc`
/// apart, and written: what stands past column n of C is overwritten with sums of B's padding.
#[inline(always)]
pub(crate) fn small_gemm<S: Simd>(
    s: S,
    m: usize,
    n: usize,
    k: usize,
    alpha: f32,
    a: Left<'_>,
    b: &[f32],
    ldb: usize,
    c: &mut [f32],
    ldc: usize,
) {
    if m == 0 || n == 0 {
        return;
    }
    let wide = padded::<S>(n);
    assert!(k == 0 || a.data.len() > (m - 1) * a.row + (k - 1) * a.col, "A too short");
    assert!(k == 0 || b.len() >= (k - 1) * ldb + wide, "B too short");
    assert!(c.len() >= (m - 1) * ldc + wide, "C too short");
    // 32 registers hold 16 sums, 16 hold 8.
    let widest = if S::LANES >= 16 { 4 } else { 2 };
    let mut col = 0;
    while col < wide {
        let step = ((wide - col) / S::LANES).min(widest);
        let tall = if step * 8 <= widest * 4 { 8 } else { 4 };
        let mut row = 0;
        while row < m {
            let rows = match m - row {
                left if left >= tall => tall,
                left if left >= 4 => 4,
                _ => 1,
            };
            macro_rules! run {
                ($r:literal, $n:literal) => {
                    // SAFETY: the asserts above bound every index that a tile of `rows` rows and `step`
                    // vectors at (row, col) touches.
                    unsafe { tile::<S, $r, $n>(s, row, col, k, alpha, a, b, ldb, c, ldc) }
                };
            }
            match (rows, step) {
                (8, 2) => run!(8, 2),
                (8, _) => run!(8, 1),
                (4, 4) => run!(4, 4),
                (4, 3) => run!(4, 3),
                (4, 2) => run!(4, 2),
                (4, _) => run!(4, 1),
                (_, 4) => run!(1, 4),
                (_, 3) => run!(1, 3),
                (_, 2) => run!(1, 2),
                _ => run!(1, 1),
            }
            row += rows;
        }
        col += step * S::LANES;
    }
}

/// One register tile of R rows and N vectors.
///
/// # Safety
/// A holds rows `row..row + R` and `k` columns, B `k` rows up to column `col + N·LANES`, C rows
/// `row..row + R` up to the same column.
#[inline(always)]
unsafe fn tile<S: Simd, const R: usize, const N: usize>(
    s: S,
    row: usize,
    col: usize,
    k: usize,
    alpha: f32,
    a: Left<'_>,
    b: &[f32],
    ldb: usize,
    c: &mut [f32],
    ldc: usize,
) {
    let mut sums = [[s.zero(); N]; R];
    let a_start = a.data.as_ptr();
    let b_start = b.as_ptr();
    for p in 0..k {
        let mut b_row = [s.zero(); N];
        for (j, v) in b_row.iter_mut().enumerate() {
            // SAFETY: inside row p of B, by the caller's contract.
            *v = unsafe { s.load_ptr(b_start.add(p * ldb + col + j * S::LANES)) };
        }
        for (i, sums_row) in sums.iter_mut().enumerate() {
            // SAFETY: element (row + i, p) of A, by the caller's contract.
            let value = s.splat(unsafe { *a_start.add((row + i) * a.row + p * a.col) });
            for (sum, v) in sums_row.iter_mut().zip(b_row) {
                *sum = s.fma(value, v, *sum);
            }
        }
    }
    let scale = s.splat(alpha);
    let c_start = c.as_mut_ptr();
    for (i, sums_row) in sums.iter().enumerate() {
        for (j, sum) in sums_row.iter().enumerate() {
            // SAFETY: inside row `row + i` of C, by the caller's contract.
            unsafe { s.store_ptr(c_start.add((row + i) * ldc + col + j * S::LANES), s.mul(scale, *sum)) };
        }
    }
}
