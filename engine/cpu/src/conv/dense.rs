//! Dense convolution as a matrix product without im2col.
//!
//! In a channels-last image the `kw * c_in` inputs of one kernel row lie side by side, so one output row is a product
//! whose A is the (zero-padded) image itself: row `ox` starts `stride * c_in` elements after row `ox - 1`, and the
//! inner dimension comes in `kh` segments, one padded image row apart. Only the padding is ever copied.

use super::Conv2d;
use crate::activation::Activation;
use crate::gemm::Epilogue;
use crate::gemm::bf16::{pairs_across_rows, pairs_along_rows, pairs_at_distance};
use crate::gemm::kernel::{Product, product};
use crate::gemm::pack::{pack_b, packed_len};
use crate::parallel::{Shared, for_each_task, part, tasks_for};
use crate::workspace::{Precision, Workspace};
use rayon::prelude::*;
use std::ops::Range;

/// Elements of padded input that a task works on at a time: a quarter of a second-level cache.
const STRIP: usize = 64 << 10;
/// From this many output channels on, the weights are packed: rows in place would lie pages apart.
const WIDE: usize = 256;

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

    /// Cuts the output into strips, for `tasks` tasks: rows of one image, or several whole images.
    fn strips(&self, tasks: usize) -> Strips {
        let input_rows = (STRIP / self.row().max(1)).max(self.kh);
        let rows = ((input_rows - self.kh) / self.stride + 1).min(self.out_h);
        let image = self.image_len();
        let images = if rows < self.out_h { 1 } else { (STRIP / image.max(1)).clamp(1, self.batch.div_ceil(tasks)) };
        let per_image = self.out_h.div_ceil(rows);
        let count = self.batch.div_ceil(images) * per_image;
        let scratch = if self.padded() { images * self.rows_under(rows) * self.row() } else { 0 };
        Strips { images, per_image, count, scratch }
    }

    /// Elements from one (padded) input image to the next.
    fn image_len(&self) -> usize {
        if self.padded() { self.rows_under(self.out_h) * self.row() } else { self.h * self.row() }
    }

    fn strip(&self, strips: &Strips, index: usize) -> Strip {
        let first = index / strips.per_image * strips.images;
        Strip {
            images: first..self.batch.min(first + strips.images),
            rows: part(self.out_h, 1, strips.per_image, index % strips.per_image),
        }
    }

    /// The input under a strip, with padding: a slice of `x` where there is none, else a copy. Rows lie
    /// [`row`](Self::row) apart; where the strip is whole images, these lie [`image_len`](Self::image_len) apart.
    fn input<'a>(&self, x: &'a [f32], strip: &Strip, scratch: &'a mut [f32]) -> &'a [f32] {
        let image = self.h * self.w * self.c_in;
        let (first, count) = (strip.rows.start * self.stride, self.rows_under(strip.rows.len()));
        if !self.padded() {
            let last = (strip.images.end - 1) * image + (first + count) * self.row();
            return &x[strip.images.start * image + first * self.row()..last];
        }
        let side = self.pad_x * self.c_in;
        let inner = self.w * self.c_in;
        let copies = &mut scratch[..strip.images.len() * count * self.row()];
        for (n, lines) in strip.images.clone().zip(copies.chunks_exact_mut(count * self.row())) {
            let image = &x[n * image..(n + 1) * image];
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
        }
        copies
    }

    fn flops(&self) -> u64 {
        2 * (self.batch * self.out_h * self.out_w * self.c_out) as u64 * (self.kh * self.kw * self.c_in) as u64
    }
}

impl Strips {
    /// Elements of the longest input under a strip.
    fn longest(&self, g: &Geometry) -> usize {
        if g.padded() { self.scratch } else { self.images * g.h * g.row() }
    }
}

/// How the output is cut into strips.
struct Strips {
    images: usize,
    per_image: usize,
    count: usize,
    /// Elements of scratch for the padded input of one.
    scratch: usize,
}

/// Output rows `rows` of each of `images`.
struct Strip {
    images: Range<usize>,
    rows: Range<usize>,
}

/// Columns of the weight matrix that are moved together: whole cache lines on its side, as many streams on the other.
const LANE: usize = 16;
/// Rows of the weight matrix that a task fills.
const ROWS: usize = 128;
/// Weights fewer than these are moved by one thread.
const SMALL: usize = 1 << 14;

/// `out[r, c] = w[at(r) + c * stride]`: the weights as a matrix of `columns` columns.
fn weight_matrix(w: &[f32], columns: usize, at: impl Fn(usize) -> usize + Sync, stride: usize, out: &mut [f32]) {
    let fill = |(block, out): (usize, &mut [f32])| {
        for first in (0..columns).step_by(LANE) {
            let behind = columns.min(first + LANE);
            for (r, line) in out.chunks_exact_mut(columns).enumerate() {
                let from = w[at(block * ROWS + r) + first * stride..].iter().step_by(stride);
                line[first..behind].iter_mut().zip(from).for_each(|(v, w)| *v = *w);
            }
        }
    };
    if out.len() < SMALL || rayon::current_num_threads() == 1 {
        out.chunks_mut(ROWS * columns).enumerate().for_each(fill);
    } else {
        out.par_chunks_mut(ROWS * columns).enumerate().for_each(fill);
    }
}

/// `y = act(conv(x, w) + bias + residual)`.
pub(super) fn forward(d: &Conv2d, x: &[f32], w: &[f32], epilogue: &Epilogue, y: &mut [f32], ws: &mut Workspace) {
    // `[ky, kx, i, o]` from `[o, i, ky, kx]`.
    let taps = d.kh * d.kw;
    let at = |r: usize| r % d.c_in * taps + r / d.c_in;
    convolve(&Geometry::of(d), x, w, at, d.c_in * taps, false, epilogue, y, ws);
}

/// `y (+)= conv(x, w)`, then the epilogue; the weight of (tap, input channel) `r` and output channel `o` being `w[at(r) + o * stride]`.
fn convolve(
    g: &Geometry,
    x: &[f32],
    w: &[f32],
    at: impl Fn(usize) -> usize + Sync,
    stride: usize,
    accumulate: bool,
    epilogue: &Epilogue,
    y: &mut [f32],
    ws: &mut Workspace,
) {
    if y.is_empty() {
        return;
    }
    let (level, k) = (ws.level(), g.kh * g.kw * g.c_in);
    let tasks = tasks_for(g.flops());
    let strips = g.strips(tasks);
    let tasks = tasks.min(strips.count);
    let pack = g.c_out > WIDE;
    // Pairs of bf16 halve the inner dimension; they lie within a segment where the channels are even.
    let pairs = ws.precision() == Precision::Bf16 && g.c_in.is_multiple_of(2);
    let per = if pairs { 2 } else { 1 };
    let packed = if pack { packed_len(level, k / per, g.c_out) } else { 0 };
    let rounded = if pairs { strips.longest(g) / 2 } else { 0 };
    let each = strips.scratch + rounded;
    let halves = if pairs { k / 2 * g.c_out } else { 0 };
    let [plain, halves, packed, scratch] = ws.split([k * g.c_out, halves, packed, tasks * each]);
    weight_matrix(w, g.c_out, at, stride, plain);
    if pairs {
        pairs_across_rows(level, g.c_out, plain, halves);
    }
    let weights = if pairs { &*halves } else { &*plain };
    if pack {
        pack_b(level, k / per, g.c_out, weights, g.c_out, 1, packed);
    }
    let packed = &*packed;
    let (out, scratch) = (Shared(y.as_mut_ptr()), Shared(scratch.as_mut_ptr()));
    for_each_task(tasks, |task| {
        // SAFETY: each task has its own part of the scratch.
        let own = unsafe { std::slice::from_raw_parts_mut(scratch.ptr().add(task * each), each) };
        let (copy, rounded) = own.split_at_mut(strips.scratch);
        for index in part(strips.count, 1, tasks, task) {
            let strip = g.strip(&strips, index);
            let mut input = g.input(x, &strip, copy);
            if pairs {
                let out = &mut rounded[..input.len() / 2];
                pairs_along_rows(level, input.len(), input, out);
                input = out;
            }
            for (i, n) in strip.images.clone().enumerate() {
                for oy in strip.rows.clone() {
                    let at = (i * g.image_len() + (oy - strip.rows.start) * g.stride * g.row()) / per;
                    let used = ((g.kh - 1) * g.row() + ((g.out_w - 1) * g.stride + g.kw) * g.c_in) / per;
                    let p = Product {
                        m: g.out_w,
                        n: g.c_out,
                        outers: 1,
                        segs: g.kh,
                        seg_len: g.kw * g.c_in / per,
                        a: input[at..at + used].as_ptr(),
                        a_row: g.stride * g.c_in / per,
                        a_col: 1,
                        a_seg: g.row() / per,
                        a_outer: 0,
                        b: if pack { packed.as_ptr() } else { weights.as_ptr() },
                        ldb: if pack { k / per } else { g.c_out },
                        b_packed: pack,
                        b_first: 0,
                        // SAFETY: output row `oy` of image `n` lies inside `y`.
                        c: unsafe { out.ptr().add((n * g.out_h + oy) * g.out_w * g.c_out) },
                        ldc: g.c_out,
                        alpha: 1.0,
                        pairs,
                        accumulate,
                        bias: epilogue.bias.map_or(std::ptr::null(), <[f32]>::as_ptr),
                        // SAFETY: as `c`: the residual has the output's size.
                        residual: epilogue.residual.map_or(std::ptr::null(), |r| unsafe {
                            r.as_ptr().add((n * g.out_h + oy) * g.out_w * g.c_out)
                        }),
                        act: epilogue.act,
                    };
                    // SAFETY: the slice above covers A; B has k rows; strips, so output rows, are disjoint over tasks.
                    unsafe { product(level, &p) };
                }
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
        let at = |r: usize| r % d.c_out * d.c_in * taps + (taps - 1 - r / d.c_out);
        convolve(&g, dy, w, at, taps, accumulate, &Epilogue::default(), dx, ws);
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
    let taps = d.kh * d.kw;
    for (kernel, line) in w.chunks_exact(columns).zip(weights.chunks_exact_mut(columns)) {
        for (tap, line) in line.chunks_exact_mut(d.c_in).enumerate() {
            line.iter_mut().zip(kernel[tap..].iter().step_by(taps)).for_each(|(v, w)| *v = *w);
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
                    outers: 1,
                    segs: 1,
                    seg_len: d.c_out,
                    a: dy[(n * g.out_h + oy) * g.out_w * d.c_out..].as_ptr(),
                    a_row: d.c_out,
                    a_col: 1,
                    a_seg: 0,
                    a_outer: 0,
                    b: packed.as_ptr(),
                    ldb: d.c_out,
                    b_packed: true,
                    b_first: 0,
                    c: sent.as_mut_ptr(),
                    ldc: columns,
                    alpha: 1.0,
                    pairs: false,
                    accumulate: false,
                    bias: std::ptr::null(),
                    residual: std::ptr::null(),
                    act: Activation::Identity,
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
    // One partial per thread: each is as large as the weights, and has to be summed again.
    let tasks = tasks_for(g.flops()).min(rayon::current_num_threads());
    let strips = g.strips(tasks);
    let tasks = tasks.min(strips.count);
    let len = d.weights();
    let pairs = ws.precision() == Precision::Bf16;
    // Pairs run along the pixels of an output row.
    let (per, width) = if pairs { (2, g.out_w.div_ceil(2)) } else { (1, g.out_w) };
    let (x_pairs, dy_pairs) =
        if pairs { (strips.longest(&g), strips.images * g.out_h * width * d.c_out) } else { (0, 0) };
    let each = strips.scratch + x_pairs + dy_pairs;
    let [partials, scratch] = ws.split([tasks * len, tasks * each]);
    let (out, scratch) = (Shared(partials.as_mut_ptr()), Shared(scratch.as_mut_ptr()));
    for_each_task(tasks, |task| {
        // SAFETY: each task has its own part of the scratch and its own partial.
        let (own, partial) = unsafe {
            (
                std::slice::from_raw_parts_mut(scratch.ptr().add(task * each), each),
                std::slice::from_raw_parts_mut(out.ptr().add(task * len), len),
            )
        };
        let segment = d.kw * d.c_in;
        let (copy, own) = own.split_at_mut(strips.scratch);
        let (x_pairs, dy_pairs) = own.split_at_mut(x_pairs);
        for (i, index) in part(strips.count, 1, tasks, task).enumerate() {
            let strip = g.strip(&strips, index);
            let mut input = g.input(x, &strip, copy);
            let (images, rows) = (strip.images.len(), strip.rows.len());
            let first = (strip.images.start * g.out_h + strip.rows.start) * g.out_w * d.c_out;
            let mut dy = &dy[first..first + images * rows * g.out_w * d.c_out];
            if pairs {
                pairs_at_distance(level, d.stride * d.c_in, input, x_pairs);
                input = &x_pairs[..input.len()];
                let line = g.out_w * d.c_out;
                for (dy, out) in dy.chunks_exact(line).zip(dy_pairs.chunks_exact_mut(width * d.c_out)) {
                    pairs_across_rows(level, d.c_out, dy, out);
                }
                dy = &dy_pairs[..images * rows * width * d.c_out];
            }
            let used = (images - 1) * g.image_len()
                + (rows - 1) * d.stride * g.row()
                + (g.out_w - 1) * d.stride * d.c_in
                + segment;
            for ky in 0..d.kh {
                let p = Product {
                    m: segment,
                    n: d.c_out,
                    outers: images,
                    segs: rows,
                    seg_len: width,
                    a: input[ky * g.row()..ky * g.row() + used].as_ptr(),
                    a_row: 1,
                    a_col: per * d.stride * d.c_in,
                    a_seg: d.stride * g.row(),
                    a_outer: g.image_len(),
                    b: dy.as_ptr(),
                    ldb: d.c_out,
                    b_packed: false,
                    b_first: 0,
                    c: partial[ky * segment * d.c_out..(ky + 1) * segment * d.c_out].as_mut_ptr(),
                    ldc: d.c_out,
                    alpha: 1.0,
                    pairs,
                    accumulate: i > 0,
                    bias: std::ptr::null(),
                    residual: std::ptr::null(),
                    act: Activation::Identity,
                };
                // SAFETY: the slices above cover A, B and C; C is this task's own.
                unsafe { product(level, &p) };
            }
        }
    });
    add_weights(d, partials, dw);
}

/// `dw[o, i, ky, kx] += sum of the partials' [ky, kx, i, o]`, in their order.
fn add_weights(d: &Conv2d, partials: &[f32], dw: &mut [f32]) {
    let (taps, len) = (d.kh * d.kw, d.weights());
    let kernel = d.c_in * taps;
    let blocks = d.c_out.div_ceil(LANE);
    let out = Shared(dw.as_mut_ptr());
    let body = |block: usize| {
        let columns = block * LANE..d.c_out.min((block + 1) * LANE);
        // SAFETY: the kernels of a block of output channels belong to one call.
        let own =
            unsafe { std::slice::from_raw_parts_mut(out.ptr().add(columns.start * kernel), columns.len() * kernel) };
        for i in 0..d.c_in {
            for tap in 0..taps {
                let mut sums = [0.0f32; LANE];
                for partial in partials.chunks_exact(len) {
                    let line = &partial[(tap * d.c_in + i) * d.c_out..][columns.clone()];
                    sums.iter_mut().zip(line).for_each(|(sum, v)| *sum += v);
                }
                let to = own[i * taps + tap..].iter_mut().step_by(kernel);
                to.zip(sums).for_each(|(v, sum)| *v += sum);
            }
        }
    };
    if partials.len() < SMALL {
        (0..blocks).for_each(body);
    } else {
        for_each_task(blocks, body);
    }
}
