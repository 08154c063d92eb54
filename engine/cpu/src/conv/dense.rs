//! Dense convolution as a matrix product without im2col.
//!
//! In a channels-last image the `kw * c_in` inputs of one kernel row lie side by side, so one output row is a product
//! whose A is the (zero-padded) image itself: row `ox` starts `stride * c_in` elements after row `ox - 1`, and the
//! inner dimension comes in `kh` segments, one padded image row apart. Only the padding is ever copied.

use super::Conv2d;
use crate::gemm::kernel::{Product, product};
use crate::gemm::merge;
use crate::gemm::pack::{pack_b, packed_len};
use crate::parallel::{Shared, for_each_task, part, tasks_for};
use crate::workspace::Workspace;
use std::ops::Range;

/// Elements of padded input that a task works on at a time: about half of a second-level cache.
const STRIP: usize = 128 << 10;

/// A convolution as the product driver sees it; also the one that is the transpose of a stride-1 convolution.
#[derive(Clone, Copy)]
struct Geometry {
    batch: usize,
    h: usize,
    w: usize,
    c_in: usize,
    out_h: usize,
    out_w: usize,
    c_out: usize,
    kh: usize,
    kw: usize,
    stride: usize,
    pad_y: usize,
    pad_x: usize,
}

impl Geometry {
    fn of(d: &Conv2d) -> Self {
        Geometry {
            batch: d.batch,
            h: d.h,
            w: d.w,
            c_in: d.c_in,
            out_h: d.out_h(),
            out_w: d.out_w(),
            c_out: d.c_out,
            kh: d.kh,
            kw: d.kw,
            stride: d.stride,
            pad_y: d.pad,
            pad_x: d.pad,
        }
    }

    /// Elements of a padded input row.
    fn row(&self) -> usize {
        (self.w + 2 * self.pad_x) * self.c_in
    }

    fn padded(&self) -> bool {
        self.pad_x + self.pad_y > 0
    }

    /// Input rows under `rows` output rows.
    fn rows_under(&self, rows: usize) -> usize {
        (rows - 1) * self.stride + self.kh
    }

    /// Output rows of a strip.
    fn strip_rows(&self) -> usize {
        let input_rows = (STRIP / self.row().max(1)).max(self.kh);
        ((input_rows - self.kh) / self.stride + 1).min(self.out_h)
    }

    /// The strips of all images: (image, output rows), by flat index.
    fn strips(&self) -> usize {
        self.batch * self.out_h.div_ceil(self.strip_rows())
    }

    fn strip(&self, index: usize) -> (usize, Range<usize>) {
        let each = self.out_h.div_ceil(self.strip_rows());
        (index / each, part(self.out_h, 1, each, index % each))
    }

    /// Elements of scratch for the padded input of a strip.
    fn scratch(&self) -> usize {
        if self.padded() { self.rows_under(self.strip_rows()) * self.row() } else { 0 }
    }

    /// The input under output rows `rows` of image `n`, with padding: a slice of `x` where there is none, else a copy.
    fn input<'a>(&self, x: &'a [f32], n: usize, rows: &Range<usize>, scratch: &'a mut [f32]) -> &'a [f32] {
        let image = &x[n * self.h * self.w * self.c_in..][..self.h * self.w * self.c_in];
        let (first, count) = (rows.start * self.stride, self.rows_under(rows.len()));
        if !self.padded() {
            return &image[first * self.row()..(first + count) * self.row()];
        }
        let side = self.pad_x * self.c_in;
        let inner = self.w * self.c_in;
        let lines = &mut scratch[..count * self.row()];
        for (i, line) in lines.chunks_exact_mut(self.row()).enumerate() {
            match (first + i).checked_sub(self.pad_y).filter(|iy| *iy < self.h) {
                None => line.fill(0.0),
                Some(iy) => {
                    line[..side].fill(0.0);
                    line[side..side + inner].copy_from_slice(&image[iy * inner..(iy + 1) * inner]);
                    line[side + inner..].fill(0.0);
                }
            }
        }
        lines
    }

    fn flops(&self) -> u64 {
        2 * (self.batch * self.out_h * self.out_w * self.c_out) as u64 * (self.kh * self.kw * self.c_in) as u64
    }
}

/// `y = conv(x, w) + bias`.
pub(super) fn forward(d: &Conv2d, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32], ws: &mut Workspace) {
    // `[ky, kx, i, o]` from `[o, i, ky, kx]`.
    let (o_stride, i_stride) = (d.c_in * d.kh * d.kw, d.kh * d.kw);
    convolve(&Geometry::of(d), x, w, |k, i, o| o * o_stride + i * i_stride + k, false, bias, y, ws);
}

/// `y (+)= conv(x, w) + bias`, where `index(tap, i, o)` says where in `w` a weight stands.
fn convolve(
    g: &Geometry,
    x: &[f32],
    w: &[f32],
    index: impl Fn(usize, usize, usize) -> usize,
    accumulate: bool,
    bias: Option<&[f32]>,
    y: &mut [f32],
    ws: &mut Workspace,
) {
    if y.is_empty() {
        return;
    }
    let (level, k) = (ws.level(), g.kh * g.kw * g.c_in);
    let strips = g.strips();
    let tasks = tasks_for(g.flops()).min(strips);
    let pack = g.c_out > 256;
    let packed = if pack { packed_len(level, k, g.c_out) } else { 0 };
    let [weights, packed, scratch] = ws.split([k * g.c_out, packed, tasks * g.scratch()]);
    for (r, line) in weights.chunks_exact_mut(g.c_out).enumerate() {
        let (tap, i) = (r / g.c_in, r % g.c_in);
        for (o, v) in line.iter_mut().enumerate() {
            *v = w[index(tap, i, o)];
        }
    }
    if pack {
        pack_b(level, k, g.c_out, weights, g.c_out, 1, packed);
    }
    let (weights, packed) = (&*weights, &*packed);
    let (out, scratch) = (Shared(y.as_mut_ptr()), Shared(scratch.as_mut_ptr()));
    for_each_task(tasks, |task| {
        // SAFETY: each task has its own part of the scratch.
        let own = unsafe { std::slice::from_raw_parts_mut(scratch.ptr().add(task * g.scratch()), g.scratch()) };
        for strip in part(strips, 1, tasks, task) {
            let (n, rows) = g.strip(strip);
            let input = g.input(x, n, &rows, own);
            for oy in rows.clone() {
                let at = (oy - rows.start) * g.stride * g.row();
                let p = Product {
                    m: g.out_w,
                    n: g.c_out,
                    segs: g.kh,
                    seg_len: g.kw * g.c_in,
                    a: input[at..at + (g.kh - 1) * g.row() + ((g.out_w - 1) * g.stride + g.kw) * g.c_in].as_ptr(),
                    a_row: g.stride * g.c_in,
                    a_col: 1,
                    a_seg: g.row(),
                    b: if pack { packed.as_ptr() } else { weights.as_ptr() },
                    ldb: if pack { k } else { g.c_out },
                    b_packed: pack,
                    b_first: 0,
                    // SAFETY: output row `oy` of image `n` lies inside `y`.
                    c: unsafe { out.ptr().add((n * g.out_h + oy) * g.out_w * g.c_out) },
                    ldc: g.c_out,
                    alpha: 1.0,
                    accumulate,
                    bias: bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
                };
                // SAFETY: the slice above covers A; B has k rows; strips, so output rows, are disjoint over tasks.
                unsafe { product(level, &p) };
            }
        }
    });
}

/// `dx (+)= conv^T(dy, w)`.
pub(super) fn backward_data(d: &Conv2d, w: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool, ws: &mut Workspace) {
    let taps = d.kh * d.kw;
    if d.stride == 1 && d.pad < d.kh && d.pad < d.kw && !dy.is_empty() {
        // The transpose is a convolution of dy with the kernel turned by 180 degrees.
        let g = Geometry {
            batch: d.batch,
            h: d.out_h(),
            w: d.out_w(),
            c_in: d.c_out,
            out_h: d.h,
            out_w: d.w,
            c_out: d.c_in,
            kh: d.kh,
            kw: d.kw,
            stride: 1,
            pad_y: d.kh - 1 - d.pad,
            pad_x: d.kw - 1 - d.pad,
        };
        let o_stride = d.c_in * taps;
        convolve(&g, dy, w, |k, o, i| o * o_stride + i * taps + (taps - 1 - k), accumulate, None, dx, ws);
    } else {
        scatter(d, w, dy, dx, accumulate, ws);
    }
}

/// The transpose of a strided convolution: what each output pixel sends to its taps is one product row, which is then
/// added to the input pixels under it. A task takes whole images, for neighbouring strips share input rows.
fn scatter(d: &Conv2d, w: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool, ws: &mut Workspace) {
    let (level, g) = (ws.level(), Geometry::of(d));
    let columns = d.kh * d.kw * d.c_in;
    if dx.is_empty() {
        return;
    }
    if !accumulate {
        dx.fill(0.0);
    }
    if dy.is_empty() {
        return;
    }
    let tasks = tasks_for(g.flops()).min(d.batch);
    let strip = (STRIP / (g.out_w * columns)).clamp(1, g.out_h);
    let taken = strip * g.out_w * columns;
    let packed = packed_len(level, d.c_out, columns);
    let [weights, packed, scratch] = ws.split([d.c_out * columns, packed, tasks * taken]);
    for (o, line) in weights.chunks_exact_mut(columns).enumerate() {
        for (j, v) in line.iter_mut().enumerate() {
            *v = w[(o * d.c_in + j % d.c_in) * d.kh * d.kw + j / d.c_in];
        }
    }
    pack_b(level, d.c_out, columns, weights, columns, 1, packed);
    let packed = &*packed;
    let (out, scratch) = (Shared(dx.as_mut_ptr()), Shared(scratch.as_mut_ptr()));
    let image = d.h * d.w * d.c_in;
    for_each_task(tasks, |task| {
        // SAFETY: each task has its own part of the scratch.
        let sent = unsafe { std::slice::from_raw_parts_mut(scratch.ptr().add(task * taken), taken) };
        for n in part(d.batch, 1, tasks, task) {
            // SAFETY: image `n` of dx belongs to this task alone.
            let image = unsafe { std::slice::from_raw_parts_mut(out.ptr().add(n * image), image) };
            for oy in (0..g.out_h).step_by(strip) {
                let rows = oy..g.out_h.min(oy + strip);
                let p = Product {
                    m: rows.len() * g.out_w,
                    n: columns,
                    segs: 1,
                    seg_len: d.c_out,
                    a: dy[(n * g.out_h + oy) * g.out_w * d.c_out..].as_ptr(),
                    a_row: d.c_out,
                    a_col: 1,
                    a_seg: 0,
                    b: packed.as_ptr(),
                    ldb: d.c_out,
                    b_packed: true,
                    b_first: 0,
                    c: sent.as_mut_ptr(),
                    ldc: columns,
                    alpha: 1.0,
                    accumulate: false,
                    bias: std::ptr::null(),
                };
                // SAFETY: dy has these rows, the packed weights `c_out` rows, the scratch room for the strip.
                unsafe { product(level, &p) };
                for (r, oy) in rows.enumerate() {
                    add_row(d, &sent[r * g.out_w * columns..(r + 1) * g.out_w * columns], oy, image);
                }
            }
        }
    });
}

/// Adds what output row `oy` sends (`[out_w, kh, kw, c_in]`) to the image's pixels.
fn add_row(d: &Conv2d, sent: &[f32], oy: usize, image: &mut [f32]) {
    let segment = d.kw * d.c_in;
    for (ox, pixel) in sent.chunks_exact(d.kh * segment).enumerate() {
        // Taps whose column lies in the image.
        let left = ox * d.stride;
        let first = d.pad.saturating_sub(left).min(d.kw);
        let behind = (d.w + d.pad).saturating_sub(left).min(d.kw).max(first);
        for ky in 0..d.kh {
            let Some(iy) = (oy * d.stride + ky).checked_sub(d.pad).filter(|iy| *iy < d.h) else {
                continue;
            };
            let from = &pixel[ky * segment + first * d.c_in..ky * segment + behind * d.c_in];
            if from.is_empty() {
                continue;
            }
            let at = (iy * d.w + left + first - d.pad) * d.c_in;
            image[at..at + from.len()].iter_mut().zip(from).for_each(|(v, s)| *v += s);
        }
    }
}

/// `dw += gradient by the weights`: per kernel row one product whose inner dimension runs over output pixels, one
/// segment per output row; one partial per task, summed in task order.
pub(super) fn backward_weights(d: &Conv2d, x: &[f32], dy: &[f32], dw: &mut [f32], ws: &mut Workspace) {
    let (level, g) = (ws.level(), Geometry::of(d));
    if dy.is_empty() || dw.is_empty() {
        return;
    }
    let k = d.kh * d.kw * d.c_in;
    let strips = g.strips();
    // One partial per thread: each is as large as the weights, and has to be summed again.
    let tasks = tasks_for(g.flops()).min(rayon::current_num_threads()).min(strips);
    let [partials, sum, scratch] = ws.split([tasks * k * d.c_out, k * d.c_out, tasks * g.scratch()]);
    let (out, scratch) = (Shared(partials.as_mut_ptr()), Shared(scratch.as_mut_ptr()));
    for_each_task(tasks, |task| {
        // SAFETY: each task has its own part of the scratch and its own partial.
        let (own, partial) = unsafe {
            (
                std::slice::from_raw_parts_mut(scratch.ptr().add(task * g.scratch()), g.scratch()),
                std::slice::from_raw_parts_mut(out.ptr().add(task * k * d.c_out), k * d.c_out),
            )
        };
        let segment = d.kw * d.c_in;
        for (i, strip) in part(strips, 1, tasks, task).enumerate() {
            let (n, rows) = g.strip(strip);
            let input = g.input(x, n, &rows, own);
            let dy = &dy[(n * g.out_h + rows.start) * g.out_w * d.c_out..];
            for ky in 0..d.kh {
                let used = (rows.len() - 1) * d.stride * g.row() + (g.out_w - 1) * d.stride * d.c_in + segment;
                let p = Product {
                    m: segment,
                    n: d.c_out,
                    segs: rows.len(),
                    seg_len: g.out_w,
                    a: input[ky * g.row()..ky * g.row() + used].as_ptr(),
                    a_row: 1,
                    a_col: d.stride * d.c_in,
                    a_seg: d.stride * g.row(),
                    b: dy[..rows.len() * g.out_w * d.c_out].as_ptr(),
                    ldb: d.c_out,
                    b_packed: false,
                    b_first: 0,
                    c: partial[ky * segment * d.c_out..(ky + 1) * segment * d.c_out].as_mut_ptr(),
                    ldc: d.c_out,
                    alpha: 1.0,
                    accumulate: i > 0,
                    bias: std::ptr::null(),
                };
                // SAFETY: the slices above cover A, B and C; C is this task's own.
                unsafe { product(level, &p) };
            }
        }
    });
    merge(partials, false, sum);
    // `[o, i, ky, kx]` from `[ky, kx, i, o]`.
    let taps = d.kh * d.kw;
    for (at, v) in dw.iter_mut().enumerate() {
        let (o, i, tap) = (at / (d.c_in * taps), at / taps % d.c_in, at % taps);
        *v += sum[(tap * d.c_in + i) * d.c_out + o];
    }
}
