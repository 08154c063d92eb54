//! Matrix products: row-major f32, any transposition, split along the inner dimension where that is the long one.

pub(crate) mod bf16;
pub(crate) mod kernel;
pub(crate) mod pack;

use crate::activation::Activation;
use crate::parallel::{Shared, for_each_task, part, tasks_for};
use crate::simd::Level;
use crate::workspace::Workspace;
use kernel::{Product, product};
use pack::{pack_b, packed_len};
use std::cell::RefCell;

/// Rows of B taken at a time: B's block and A's tile then stay in the second-level cache.
const K_BLOCK: usize = 384;
/// From this inner length on, a product is split along it rather than along its rows.
const SPLIT_K: usize = 1024;

/// Sizes of `C[m,n] = alpha * op(A) op(B) + beta * C`. A is `[m,k]`, or `[k,m]` if `trans_a`; B is `[k,n]`, or `[n,k]`
/// if `trans_b`; all row-major without gaps.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Gemm {
    /// Rows of C.
    pub m: usize,
    /// Columns of C.
    pub n: usize,
    /// Inner dimension.
    pub k: usize,
    /// A is stored as `[k,m]`.
    pub trans_a: bool,
    /// B is stored as `[n,k]`.
    pub trans_b: bool,
}

impl Gemm {
    /// Floating-point operations: `2 m n k`.
    pub fn flops(&self) -> u64 {
        2 * self.m as u64 * self.n as u64 * self.k as u64
    }
}

/// What happens to a product's result before it leaves the nearest caches: `act(result + bias + residual)`.
#[derive(Clone, Copy, Debug, Default)]
pub struct Epilogue<'a> {
    /// One value per column.
    pub bias: Option<&'a [f32]>,
    /// Of the result's size.
    pub residual: Option<&'a [f32]>,
    /// Last.
    pub act: Activation,
}

impl<'a> Epilogue<'a> {
    /// A bias alone.
    pub fn bias(bias: Option<&'a [f32]>) -> Self {
        Epilogue { bias, ..Epilogue::default() }
    }

    fn is_empty(&self) -> bool {
        self.bias.is_none() && self.residual.is_none() && self.act == Activation::Identity
    }

    /// Panics unless it fits a result of `rows` by `columns`.
    pub(crate) fn check(&self, rows: usize, columns: usize) {
        assert!(self.bias.is_none_or(|bias| bias.len() == columns), "bias's length");
        assert!(self.residual.is_none_or(|residual| residual.len() == rows * columns), "residual's length");
    }
}

/// A matrix operand inside a larger array: element `(i, j)` is `data[i * ld + j]`, or `data[j * ld + i]` if `trans`.
#[derive(Clone, Copy, Debug)]
pub struct Mat<'a> {
    /// From the first element on.
    pub data: &'a [f32],
    /// Distance between stored rows.
    pub ld: usize,
    /// Stored rows are the operand's columns.
    pub trans: bool,
}

impl<'a> Mat<'a> {
    /// The operand as it is stored, rows `ld` apart.
    pub fn new(data: &'a [f32], ld: usize) -> Self {
        Mat { data, ld, trans: false }
    }
    /// The transpose of what is stored in rows `ld` apart.
    pub fn transposed(data: &'a [f32], ld: usize) -> Self {
        Mat { data, ld, trans: true }
    }
    fn strides(&self) -> (usize, usize) {
        if self.trans { (1, self.ld) } else { (self.ld, 1) }
    }
    fn check(&self, rows: usize, cols: usize) {
        let (stored, len) = if self.trans { (cols, rows) } else { (rows, cols) };
        assert!(span(stored, self.ld, len) <= self.data.len(), "matrix operand shorter than its sizes");
    }
}

/// Elements from the first to behind the last of `rows` rows of `len`, `ld` apart.
fn span(rows: usize, ld: usize, len: usize) -> usize {
    if rows == 0 || len == 0 { 0 } else { (rows - 1) * ld + len }
}

thread_local! {
    /// Packed B of [`gemm_serial`], one per thread, grown to the largest need.
    static PACKED: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
}

/// `C[m,n] = alpha * A[m,k] B[k,n]`, plus C if `accumulate`, on the calling thread; C's rows are `ldc` apart.
///
/// Meant for small products inside a parallel task. Panics if a slice is shorter than its sizes say.
pub fn gemm_serial(
    level: Level,
    (m, n, k): (usize, usize, usize),
    alpha: f32,
    a: Mat,
    b: Mat,
    accumulate: bool,
    c: &mut [f32],
    ldc: usize,
) {
    a.check(m, k);
    b.check(k, n);
    assert!(span(m, ldc, n) <= c.len(), "C shorter than its sizes");
    assert!(m <= 1 || ldc >= n, "rows of C overlap");
    if m == 0 || n == 0 {
        return;
    }
    let (a_row, a_col) = a.strides();
    let (b_row, b_col) = b.strides();
    let mut p = Product {
        m,
        n,
        outers: 1,
        segs: 1,
        seg_len: k,
        a: a.data.as_ptr(),
        a_row,
        a_col,
        a_seg: 0,
        a_outer: 0,
        b: b.data.as_ptr(),
        ldb: b.ld,
        b_packed: false,
        b_first: 0,
        c: c.as_mut_ptr(),
        ldc,
        alpha,
        pairs: false,
        accumulate,
        bias: std::ptr::null(),
        residual: std::ptr::null(),
        act: Activation::Identity,
    };
    if b_col == 1 {
        // SAFETY: the checks above cover all three operands; C is borrowed mutably, so it overlaps nothing.
        unsafe { product_by_k_blocks(level, &p, k) };
        return;
    }
    PACKED.with_borrow_mut(|packed| {
        let need = packed_len(level, k, n);
        if packed.len() < need {
            packed.resize(need, 0.0);
        }
        pack_b(level, k, n, b.data, b_row, b_col, packed);
        (p.b, p.ldb, p.b_packed) = (packed.as_ptr(), k, true);
        // SAFETY: as above, with the packed copy as B.
        unsafe { product_by_k_blocks(level, &p, k) };
    });
}

/// Runs a one-segment product of inner length `k`, [`K_BLOCK`] rows of B at a time.
///
/// # Safety
/// As for [`product`].
unsafe fn product_by_k_blocks(level: Level, p: &Product, k: usize) {
    if k <= K_BLOCK + K_BLOCK / 2 {
        // SAFETY: the caller's contract.
        unsafe { product(level, p) };
        return;
    }
    let blocks = k.div_ceil(K_BLOCK);
    for block in 0..blocks {
        let rows = part(k, 1, blocks, block);
        let mut q = *p;
        q.seg_len = rows.len();
        // SAFETY: the block's rows lie inside A and B by the caller's contract.
        unsafe {
            q.a = p.a.add(rows.start * p.a_col);
            if p.b_packed {
                q.b_first = rows.start;
            } else {
                q.b = p.b.add(rows.start * p.ldb);
            }
            if block > 0 {
                q.accumulate = true;
                q.bias = std::ptr::null();
            }
            if block + 1 < blocks {
                q.residual = std::ptr::null();
                q.act = Activation::Identity;
            }
            product(level, &q);
        }
    }
}

/// `C = alpha * op(A) op(B) + beta * C` over the current rayon pool. With `beta == 0` C's old contents are not read.
///
/// Panics if a slice's length is not what `d` says.
pub fn gemm(d: &Gemm, alpha: f32, a: &[f32], b: &[f32], beta: f32, c: &mut [f32], ws: &mut Workspace) {
    assert_eq!(a.len(), d.m * d.k, "A's length");
    assert_eq!(b.len(), d.k * d.n, "B's length");
    assert_eq!(c.len(), d.m * d.n, "C's length");
    if beta != 0.0 && beta != 1.0 {
        c.iter_mut().for_each(|v| *v *= beta);
    }
    multiply(d, alpha, a, b, beta != 0.0, &Epilogue::default(), c, ws);
}

/// `batch` independent products of the same sizes, operands one behind the other; see [`gemm`].
pub fn batched_gemm(
    batch: usize,
    d: &Gemm,
    alpha: f32,
    a: &[f32],
    b: &[f32],
    beta: f32,
    c: &mut [f32],
    ws: &mut Workspace,
) {
    let (la, lb, lc) = (d.m * d.k, d.k * d.n, d.m * d.n);
    assert_eq!(a.len(), batch * la, "A's length");
    assert_eq!(b.len(), batch * lb, "B's length");
    assert_eq!(c.len(), batch * lc, "C's length");
    let level = ws.level();
    let tasks = tasks_for(d.flops() * batch as u64).min(batch);
    let out = Shared(c.as_mut_ptr());
    for_each_task(tasks, |task| {
        for i in part(batch, 1, tasks, task) {
            // SAFETY: item i of C belongs to this task alone.
            let c = unsafe { std::slice::from_raw_parts_mut(out.ptr().add(i * lc), lc) };
            if beta != 0.0 && beta != 1.0 {
                c.iter_mut().for_each(|v| *v *= beta);
            }
            let a = Mat { data: &a[i * la..(i + 1) * la], ld: if d.trans_a { d.m } else { d.k }, trans: d.trans_a };
            let b = Mat { data: &b[i * lb..(i + 1) * lb], ld: if d.trans_b { d.k } else { d.n }, trans: d.trans_b };
            gemm_serial(level, (d.m, d.n, d.k), alpha, a, b, beta != 0.0, c, d.n);
        }
    });
}

/// The parallel product behind [`gemm`] and the layers: `C (+)= alpha * op(A) op(B)`, then the
/// epilogue. Lengths are the caller's duty to check.
pub(crate) fn multiply(
    d: &Gemm,
    alpha: f32,
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
    if tasks > 1 && k >= SPLIT_K && k >= 4 * m.min(n) && epilogue.is_empty() && !d.trans_b {
        return split_k(d, alpha, a, b, accumulate, c, tasks, ws);
    }
    // Rows first; few rows and many columns are cut by columns.
    let by_columns = m < 16 * tasks && n >= 2 * m;
    let unit = if by_columns { 3 * level.lanes() } else { 24 };
    let length = if by_columns { n } else { m };
    let tasks = tasks.min(length.div_ceil(unit));
    // Wide matrices are packed too: in place, each row of a panel would lie on a page of its own.
    let pack = d.trans_b || (n > 256 && m >= 64);
    let (b_row, b_col) = if d.trans_b { (1, k) } else { (n, 1) };
    let packed = ws.take(if pack { packed_len(level, k, n) } else { 0 });
    if pack && !by_columns {
        pack_b(level, k, n, b, b_row, b_col, packed);
    }
    let (packed_ptr, c_ptr) = (Shared(packed.as_mut_ptr()), Shared(c.as_mut_ptr()));
    let (a_row, a_col) = if d.trans_a { (1, m) } else { (k, 1) };
    for_each_task(tasks, |task| {
        let range = part(length, unit, tasks, task);
        let (rows, cols) = if by_columns { (0..m, range) } else { (range, 0..n) };
        if rows.is_empty() || cols.is_empty() {
            return;
        }
        // SAFETY: A, B and bias are only read; the lengths were checked above; each task writes its own rows or
        // columns of C, and packs its own columns of B, which start at a whole vector.
        unsafe {
            let b_ptr = if pack {
                let own = packed_ptr.ptr().add(cols.start * k);
                if by_columns {
                    let own = std::slice::from_raw_parts_mut(own, packed_len(level, k, cols.len()));
                    pack_b(level, k, cols.len(), &b[cols.start * b_col..], b_row, b_col, own);
                }
                own.cast_const()
            } else {
                b.as_ptr().add(cols.start)
            };
            let p = Product {
                m: rows.len(),
                n: cols.len(),
                outers: 1,
                segs: 1,
                seg_len: k,
                a: a.as_ptr().add(rows.start * a_row),
                a_row,
                a_col,
                a_seg: 0,
                a_outer: 0,
                b: b_ptr,
                ldb: if pack { k } else { n },
                b_packed: pack,
                b_first: 0,
                c: c_ptr.ptr().add(rows.start * n + cols.start),
                ldc: n,
                alpha,
                pairs: false,
                accumulate,
                bias: epilogue.bias.map_or(std::ptr::null(), |bias| bias.as_ptr().add(cols.start)),
                residual: epilogue.residual.map_or(std::ptr::null(), |r| r.as_ptr().add(rows.start * n + cols.start)),
                act: epilogue.act,
            };
            product_by_k_blocks(level, &p, k);
        }
    });
}

/// The product cut along its inner dimension, for weight gradients: one partial C per task, summed in task order.
fn split_k(
    d: &Gemm,
    alpha: f32,
    a: &[f32],
    b: &[f32],
    accumulate: bool,
    c: &mut [f32],
    tasks: usize,
    ws: &mut Workspace,
) {
    let Gemm { m, n, k, .. } = *d;
    let level = ws.level();
    let tasks = tasks.min(k / (SPLIT_K / 4)).max(1);
    let partials = ws.take(tasks * m * n);
    let out = Shared(partials.as_mut_ptr());
    let (a_row, a_col) = if d.trans_a { (1, m) } else { (k, 1) };
    for_each_task(tasks, |task| {
        let range = part(k, 1, tasks, task);
        let p = Product {
            m,
            n,
            outers: 1,
            segs: 1,
            seg_len: range.len(),
            a: a[range.start * a_col..].as_ptr(),
            a_row,
            a_col,
            a_seg: 0,
            a_outer: 0,
            b: b[range.start * n..].as_ptr(),
            ldb: n,
            b_packed: false,
            b_first: 0,
            // SAFETY: partial `task` of `tasks` lies inside the workspace slice.
            c: unsafe { out.ptr().add(task * m * n) },
            ldc: n,
            alpha,
            pairs: false,
            accumulate: false,
            bias: std::ptr::null(),
            residual: std::ptr::null(),
            act: Activation::Identity,
        };
        // SAFETY: rows `range` of the checked operands; the partial belongs to this task alone.
        unsafe { product_by_k_blocks(level, &p, range.len()) };
    });
    merge(partials, accumulate, c);
}

/// `out (+)= sum of the partials`, each as long as `out`, in their order.
pub(crate) fn merge(partials: &[f32], accumulate: bool, out: &mut [f32]) {
    const CHUNK: usize = 4096;
    let len = out.len();
    let (chunks, out_ptr) = (len.div_ceil(CHUNK), Shared(out.as_mut_ptr()));
    let body = |chunk: usize| {
        let range = chunk * CHUNK..len.min((chunk + 1) * CHUNK);
        // SAFETY: chunks of `out` are disjoint.
        let out = unsafe { std::slice::from_raw_parts_mut(out_ptr.ptr().add(range.start), range.len()) };
        for (i, partial) in partials.chunks_exact(len).enumerate() {
            let partial = &partial[range.clone()];
            if i == 0 && !accumulate {
                out.copy_from_slice(partial);
            } else {
                out.iter_mut().zip(partial).for_each(|(o, p)| *o += p);
            }
        }
    };
    // Small sums stay here: less work than waking a thread.
    if partials.len() < 1 << 17 {
        (0..chunks).for_each(body);
    } else {
        for_each_task(chunks, body);
    }
}

#[cfg(test)]
mod tests;
