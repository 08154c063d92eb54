//! The register tile of every matrix product here: `C[m,n] = alpha * A[m,k] B[k,n] (+ C) (+ bias)`.
//!
//! A is read in place, one broadcast per element, so it needs no packing in either orientation; B is read by vectors,
//! in place when it is row-major or from packed panels. The inner dimension may come in segments that lie apart in A
//! (a kernel row of a convolution, an output row of its weight gradient): that makes convolution a matrix product
//! without im2col.

use crate::activation::{self, Activation};
use crate::simd::{Level, Simd};
use crate::simd_fn;
use std::ops::Range;

/// Rows of A that stay in the nearest caches while the panels of B pass.
const ROW_BLOCK: usize = 48;
/// Elements of B that are gone over again for each block of rows: about half of a second-level cache.
const B_BLOCK: usize = 128 << 10;

/// One product, by raw pointers. Strides are in elements.
///
/// - `A(i, o, s, k) = a[i * a_row + o * a_outer + s * a_seg + k * a_col]` for `o < outers`, segment `s < segs` and
///   `k < seg_len`.
/// - B has `outers * segs * seg_len` rows, in that order. In place (`b_packed == false`): `B(k, j) = b[k * ldb + j]`. Packed: panels as
///   [`next_panel`] cuts them; the one at column `j0` is `ldb` rows of its full width from `b[j0 * ldb]`, and the
///   product uses its rows from `b_first` on. Padding columns are not read.
/// - `C(i, j) = c[i * ldc + j]`.
#[derive(Clone, Copy)]
pub(crate) struct Product {
    pub m: usize,
    pub n: usize,
    pub outers: usize,
    pub segs: usize,
    pub seg_len: usize,
    pub a: *const f32,
    pub a_row: usize,
    pub a_col: usize,
    pub a_seg: usize,
    pub a_outer: usize,
    pub b: *const f32,
    pub ldb: usize,
    pub b_packed: bool,
    pub b_first: usize,
    pub c: *mut f32,
    pub ldc: usize,
    pub alpha: f32,
    /// Elements of A and B are pairs of bf16 along the inner dimension, in the bits of an f32; `seg_len` counts pairs.
    pub pairs: bool,
    /// Add to C instead of overwriting it.
    pub accumulate: bool,
    /// `n` values added to every row, or null.
    pub bias: *const f32,
    /// A matrix as C, rows `ldc` apart, that is added; or null.
    pub residual: *const f32,
    /// Applied to C last, while its rows are still in the nearest caches.
    pub act: Activation,
}

/// Cuts the columns of B into panels: the width in vectors of the next one when `left` vectors remain. With 32 registers
/// (16 lanes) 8 rows by 3 vectors fit, else 6 by 2; a narrow last panel is avoided.
#[inline(always)]
pub(crate) fn next_panel(lanes: usize, left: usize) -> usize {
    match (lanes, left) {
        (16, 4) => 2,
        (16, _) => left.min(3),
        _ => left.min(2),
    }
}

/// How a tile multiplies two elements and adds them up.
const F32: u8 = 0;
/// Pairs of bf16, by two f32 operations.
const PAIRS: u8 = 1;
/// Pairs of bf16, by the machine's own instruction.
const NATIVE_PAIRS: u8 = 2;

/// Rows of A and one panel of B.
#[derive(Clone, Copy)]
struct Panel<'a> {
    p: &'a Product,
    first_row: usize,
    behind_row: usize,
    /// The panel's first row, rows `ldb` apart.
    b: *const f32,
    ldb: usize,
    /// Its first column, in C.
    col: usize,
    /// Columns that exist in its last vector.
    last: usize,
}

/// A tile of MR rows from `row` on by NV vectors. `TAIL`: the last vector is not whole.
///
/// # Safety
/// As for [`product`]; the rows and the panel lie inside the product.
#[inline(always)]
unsafe fn tile<S: Simd, const MR: usize, const NV: usize, const TAIL: bool, const DOT: u8>(
    s: S,
    panel: &Panel,
    row: usize,
) {
    let (lanes, p, last) = (S::LANES, panel.p, panel.last);
    let mut acc = [[s.zero(); NV]; MR];
    // SAFETY: every access is inside the tile that the caller's contract covers.
    unsafe {
        let mut b = panel.b;
        for outer in 0..p.outers {
            for seg in 0..p.segs {
                let mut a = p.a.add(row * p.a_row + outer * p.a_outer + seg * p.a_seg);
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
                        let av = s.splat(*a.add(i * p.a_row));
                        for j in 0..NV {
                            acc[i][j] = match DOT {
                                NATIVE_PAIRS => s.dot_bf16_native(av, bv[j], acc[i][j]),
                                PAIRS => s.dot_bf16(av, bv[j], acc[i][j]),
                                _ => s.fma(av, bv[j], acc[i][j]),
                            };
                        }
                    }
                    a = a.add(p.a_col);
                    b = b.add(panel.ldb);
                }
            }
        }
        let c = p.c.add(row * p.ldc + panel.col);
        let alpha = s.splat(p.alpha);
        for j in 0..NV {
            let tail = TAIL && j == NV - 1;
            let bias = p.bias.wrapping_add(panel.col + j * lanes);
            let add = match (p.bias.is_null(), tail) {
                (true, _) => s.zero(),
                (false, true) => s.load_partial_ptr(bias, last),
                (false, false) => s.load_ptr(bias),
            };
            for i in 0..MR {
                let at = c.add(i * p.ldc + j * lanes);
                let mut v = s.fma(acc[i][j], alpha, add);
                if p.accumulate {
                    v = s.add(v, if tail { s.load_partial_ptr(at, last) } else { s.load_ptr(at) });
                }
                if !p.residual.is_null() {
                    let from = p.residual.add((row + i) * p.ldc + panel.col + j * lanes);
                    v = s.add(v, if tail { s.load_partial_ptr(from, last) } else { s.load_ptr(from) });
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

/// All rows of one panel of NV vectors.
///
/// # Safety
/// As for [`product`]; the rows and the panel lie inside the product.
#[inline(always)]
unsafe fn panel_impl<S: Simd, const NV: usize, const TAIL: bool, const DOT: u8>(s: S, panel: &Panel) {
    let mut row = panel.first_row;
    macro_rules! run {
        ($mr:literal) => {
            while panel.behind_row - row >= $mr {
                // SAFETY: the rows lie inside the product by the caller's contract.
                unsafe { tile::<S, $mr, NV, TAIL, DOT>(s, panel, row) };
                row += $mr;
            }
        };
    }
    // The largest tile leaves registers for B's vectors and one broadcast: of 32 registers at 16 lanes, else of 16.
    match (S::LANES, NV) {
        (16, 1) => run!(16),
        (16, 2) => run!(12),
        (16, _) | (_, 1) => run!(8),
        (_, 2) => run!(6),
        // No panel is wider: see `next_panel`.
        _ => return,
    }
    run!(4);
    run!(1);
}

simd_fn! {
    unsafe fn panel1(panel: &Panel) = panel_impl::<_, 1, false, F32>;
    unsafe fn panel2(panel: &Panel) = panel_impl::<_, 2, false, F32>;
    unsafe fn panel3(panel: &Panel) = panel_impl::<_, 3, false, F32>;
    unsafe fn panel1_tail(panel: &Panel) = panel_impl::<_, 1, true, F32>;
    unsafe fn panel2_tail(panel: &Panel) = panel_impl::<_, 2, true, F32>;
    unsafe fn panel3_tail(panel: &Panel) = panel_impl::<_, 3, true, F32>;
    unsafe fn pairs1(panel: &Panel) = panel_impl::<_, 1, false, PAIRS>;
    unsafe fn pairs2(panel: &Panel) = panel_impl::<_, 2, false, PAIRS>;
    unsafe fn pairs3(panel: &Panel) = panel_impl::<_, 3, false, PAIRS>;
    unsafe fn pairs1_tail(panel: &Panel) = panel_impl::<_, 1, true, PAIRS>;
    unsafe fn pairs2_tail(panel: &Panel) = panel_impl::<_, 2, true, PAIRS>;
    unsafe fn pairs3_tail(panel: &Panel) = panel_impl::<_, 3, true, PAIRS>;
}

/// The panels of bf16 pairs where the machine has AVX512_BF16.
#[cfg(target_arch = "x86_64")]
mod native {
    use super::{NATIVE_PAIRS, Panel, panel_impl};
    use crate::simd::Avx512;

    macro_rules! panels {
        ($($name:ident: $nv:literal, $tail:literal;)*) => {$(
            /// # Safety
            /// As for [`super::product`]; the machine has AVX512_BF16 beside the level's instructions.
            #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx512bf16,avx2,fma")]
            pub(super) unsafe fn $name(panel: &Panel) {
                // SAFETY: the caller's contract.
                unsafe { panel_impl::<_, $nv, $tail, NATIVE_PAIRS>(Avx512::new(), panel) }
            }
        )*};
    }
    panels! {
        pairs1: 1, false;
        pairs2: 2, false;
        pairs3: 3, false;
        pairs1_tail: 1, true;
        pairs2_tail: 2, true;
        pairs3_tail: 3, true;
    }
}

/// One panel by the function for its width.
///
/// # Safety
/// As for [`product`].
unsafe fn run_panel(level: Level, panel: &Panel, vectors: usize, whole: bool) {
    // SAFETY: the caller's contract; native pairs only where the level says so.
    unsafe {
        #[cfg(target_arch = "x86_64")]
        if panel.p.pairs && level.has_bf16() {
            return match (vectors, whole) {
                (1, true) => native::pairs1(panel),
                (2, true) => native::pairs2(panel),
                (_, true) => native::pairs3(panel),
                (1, false) => native::pairs1_tail(panel),
                (2, false) => native::pairs2_tail(panel),
                (_, false) => native::pairs3_tail(panel),
            };
        }
        match (panel.p.pairs, vectors, whole) {
            (false, 1, true) => panel1(level, panel),
            (false, 2, true) => panel2(level, panel),
            (false, _, true) => panel3(level, panel),
            (false, 1, false) => panel1_tail(level, panel),
            (false, 2, false) => panel2_tail(level, panel),
            (false, _, false) => panel3_tail(level, panel),
            (true, 1, true) => pairs1(level, panel),
            (true, 2, true) => pairs2(level, panel),
            (true, _, true) => pairs3(level, panel),
            (true, 1, false) => pairs1_tail(level, panel),
            (true, 2, false) => pairs2_tail(level, panel),
            (true, _, false) => pairs3_tail(level, panel),
        }
    }
}

/// Computes one product on the calling thread.
///
/// # Safety
/// Every element that [`Product`]'s formulas name for its sizes is readable (A, B, bias, residual) or writable (C), and C overlaps
/// none of the others.
pub(crate) unsafe fn product(level: Level, p: &Product) {
    let lanes = level.lanes();
    let vectors = p.n.div_ceil(lanes);
    let height = p.outers * p.segs * p.seg_len;
    let mut from = 0;
    while from < vectors {
        // Columns whose part of B stays in the second-level cache while the rows of A pass.
        let mut to = from;
        while to < vectors && (to == from || (to - from) * lanes * height < B_BLOCK) {
            to += next_panel(lanes, vectors - to);
        }
        for first_row in (0..p.m).step_by(ROW_BLOCK) {
            let mut v = from;
            while v < to {
                let nv = next_panel(lanes, vectors - v);
                let (col, width) = (v * lanes, nv * lanes);
                let last = (p.n - col).min(width) - (nv - 1) * lanes;
                // SAFETY: the panel's start lies inside B by the caller's contract.
                let (b, ldb) = unsafe {
                    if p.b_packed { (p.b.add(col * p.ldb + p.b_first * width), width) } else { (p.b.add(col), p.ldb) }
                };
                let panel = Panel { p, first_row, behind_row: p.m.min(first_row + ROW_BLOCK), b, ldb, col, last };
                // SAFETY: rows and panel lie inside the product; the contract is the caller's.
                unsafe { run_panel(level, &panel, nv, last == lanes) };
                v += nv;
            }
            if p.act != Activation::Identity {
                let (first, behind) = (from * lanes, p.n.min(to * lanes));
                // SAFETY: these elements of C were written just now.
                unsafe { activate(level, p, first_row..p.m.min(first_row + ROW_BLOCK), first..behind) };
            }
        }
        from = to;
    }
}

/// `C = act(C)` on some rows and columns.
///
/// # Safety
/// The rows and columns lie inside C, which nothing else uses meanwhile.
unsafe fn activate(level: Level, p: &Product, rows: Range<usize>, columns: Range<usize>) {
    let whole = columns.len() == p.ldc;
    let (count, len) = if whole { (1, rows.len() * p.ldc) } else { (rows.len(), columns.len()) };
    for i in 0..count {
        // SAFETY: the caller's contract; rows are `ldc` apart, so whole rows lie side by side.
        let line = unsafe { std::slice::from_raw_parts_mut(p.c.add((rows.start + i) * p.ldc + columns.start), len) };
        activation::apply(level, p.act, line);
    }
}
