//! The register tile of every matrix product here: `C[m,n] = alpha * A[m,k] B[k,n] (+ C) (+ bias)`.
//!
//! A is read in place, one broadcast per element, so it needs no packing in either orientation; B is read by vectors,
//! in place when it is row-major or from packed panels. The inner dimension may come in segments that lie apart in A
//! (a kernel row of a convolution, an output row of its weight gradient): that makes convolution a matrix product
//! without im2col.

use crate::simd::Simd;
use crate::simd_fn;

/// Widest panel of B, in vectors.
const MAX_PANEL: usize = 3;
/// Rows of A that stay in the nearest caches while the panels of B pass.
const ROW_BLOCK: usize = 48;

/// One product, by raw pointers. Strides are in elements.
///
/// - `A(i, s, k) = a[i * a_row + s * a_seg + k * a_col]` for segment `s < segs` and `k < seg_len`; one of `a_row` and
///   `a_col` is 1.
/// - B has `segs * seg_len` rows. In place (`b_packed == false`): `B(k, j) = b[k * ldb + j]`. Packed: panels as
///   [`next_panel`] cuts them; the one at column `j0` is `ldb` rows of its full width from `b[j0 * ldb]`, and the
///   product uses its rows from `b_first` on. Padding columns are not read.
/// - `C(i, j) = c[i * ldc + j]`.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub m: usize,
    pub n: usize,
    pub segs: usize,
    pub seg_len: usize,
    pub a: *const f32,
    pub a_row: usize,
    pub a_col: usize,
    pub a_seg: usize,
    pub b: *const f32,
    pub ldb: usize,
    pub b_packed: bool,
    pub b_first: usize,
    pub c: *mut f32,
    pub ldc: usize,
    pub alpha: f32,
    /// Add to C instead of overwriting it.
    pub accumulate: bool,
    /// `n` values added to every row, or null.
    pub bias: *const f32,
}

/// Cuts `vectors` vectors of columns into panels of at most [`MAX_PANEL`], without a narrow last one where possible:
/// the width in vectors of the next panel when `left` vectors remain.
#[inline(always)]
pub(crate) fn next_panel(left: usize) -> usize {
    match left {
        0..=MAX_PANEL => left,
        4 => 2,
        _ => MAX_PANEL,
    }
}

/// A tile of MR rows by NV vectors. `ROW`: A is row-major (`a_col == 1`), else `a_row == 1`. `TAIL`: the last vector
/// has only `last` lanes (of C, and of B where it is not packed).
///
/// # Safety
/// The product's pointers cover the tile: A's MR rows, B's rows, C's MR rows of NV vectors (`last` lanes in the last).
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const NV: usize, const ROW: bool, const TAIL: bool>(
    s: S,
    p: &Product,
    a: *const f32,
    b: *const f32,
    ldb: usize,
    c: *mut f32,
    bias: *const f32,
    last: usize,
) {
    let lanes = S::LANES;
    let mut acc = [[s.zero(); NV]; MR];
    let mut b = b;
    let (a_row, a_col) = if ROW { (p.a_row, 1) } else { (1, p.a_col) };
    // SAFETY: every access is inside the tile that the caller's contract covers.
    unsafe {
        for seg in 0..p.segs {
            let mut ak = a.add(seg * p.a_seg);
            for _ in 0..p.seg_len {
                let mut bv = [s.zero(); NV];
                for j in 0..NV {
                    bv[j] = if TAIL && j == NV - 1 {
                        s.load_partial_ptr(b.add(j * lanes), last)
                    } else {
                        s.load_ptr(b.add(j * lanes))
                    };
                }
                for i in 0..MR {
                    let av = s.splat(*ak.add(i * a_row));
                    for j in 0..NV {
                        acc[i][j] = s.fma(av, bv[j], acc[i][j]);
                    }
                }
                ak = ak.add(a_col);
                b = b.add(ldb);
            }
        }
        let alpha = s.splat(p.alpha);
        for j in 0..NV {
            let tail = TAIL && j == NV - 1;
            let add = if bias.is_null() {
                s.zero()
            } else if tail {
                s.load_partial_ptr(bias.add(j * lanes), last)
            } else {
                s.load_ptr(bias.add(j * lanes))
            };
            for i in 0..MR {
                let at = c.add(i * p.ldc + j * lanes);
                let mut v = s.fma(acc[i][j], alpha, add);
                if p.accumulate {
                    let old = if tail { s.load_partial_ptr(at, last) } else { s.load_ptr(at) };
                    v = s.add(v, old);
                }
                if tail {
                    s.store_partial_ptr(at, last, v);
                } else {
                    s.store_ptr(at, v);
                }
            }
        }
    }
}

/// All rows `from..to` of one panel of NV vectors.
///
/// # Safety
/// As for [`product`]; the panel and rows lie inside the product.
#[inline(always)]
unsafe fn panel<S: Simd, const NV: usize, const ROW: bool, const TAIL: bool>(
    s: S,
    p: &Product,
    rows: std::ops::Range<usize>,
    b: *const f32,
    ldb: usize,
    col: usize,
    last: usize,
) {
    let mut i = rows.start;
    // SAFETY: rows and columns lie inside the product by the caller's contract.
    unsafe {
        let bias = if p.bias.is_null() { p.bias } else { p.bias.add(col) };
        macro_rules! run {
            ($mr:literal) => {
                while rows.end - i >= $mr {
                    let (a, c) = (p.a.add(i * p.a_row), p.c.add(i * p.ldc + col));
                    tile::<S, $mr, NV, ROW, TAIL>(s, p, a, b, ldb, c, bias, last);
                    i += $mr;
                }
            };
        }
        // The largest tile leaves registers for B's vectors and one broadcast: 32 registers at 16 lanes, else 16.
        if S::LANES == 16 {
            match NV {
                1 => run!(16),
                2 => run!(12),
                _ => {}
            }
            run!(8);
        } else {
            match NV {
                1 => run!(8),
                2 => run!(6),
                _ => {}
            }
        }
        run!(4);
        run!(2);
        run!(1);
    }
}

/// # Safety
/// As for [`product`].
#[inline(always)]
unsafe fn product_impl<S: Simd>(s: S, p: &Product) {
    let lanes = S::LANES;
    let vectors = p.n.div_ceil(lanes);
    let row_major = p.a_col == 1;
    for row in (0..p.m).step_by(ROW_BLOCK) {
        let rows = row..p.m.min(row + ROW_BLOCK);
        let mut v = 0;
        while v < vectors {
            let nv = next_panel(vectors - v);
            let col = v * lanes;
            let last = (p.n - col).min(nv * lanes) - (nv - 1) * lanes;
            // SAFETY: the panel's start lies inside B by the caller's contract.
            let (b, ldb) = unsafe {
                if p.b_packed {
                    (p.b.add(col * p.ldb + p.b_first * nv * lanes), nv * lanes)
                } else {
                    (p.b.add(col), p.ldb)
                }
            };
            macro_rules! run {
                ($($nv:literal)*) => {
                    match (nv, row_major, last < lanes) {
                        $(
                            ($nv, true, false) => panel::<S, $nv, true, false>(s, p, rows.clone(), b, ldb, col, last),
                            ($nv, true, true) => panel::<S, $nv, true, true>(s, p, rows.clone(), b, ldb, col, last),
                            ($nv, false, false) => panel::<S, $nv, false, false>(s, p, rows.clone(), b, ldb, col, last),
                            ($nv, false, true) => panel::<S, $nv, false, true>(s, p, rows.clone(), b, ldb, col, last),
                        )*
                        _ => {}
                    }
                };
            }
            // SAFETY: rows and panel lie inside the product; the contract is the caller's.
            unsafe { run!(1 2 3) };
            v += nv;
        }
    }
}

simd_fn! {
    /// Computes one product on the calling thread.
    ///
    /// # Safety
    /// Every element that [`Product`]'s formulas name for its sizes is readable (A, B, bias) or writable (C), C
    /// overlaps none of the others, and one of `a_row`, `a_col` is 1.
    pub(crate) unsafe fn product(p: &Product) = product_impl;
}
