//! Depthwise convolution: one kernel per channel, vectorised over channels, several output columns per register block.
//!
//! Square kernels of 3, 5 and 7 at stride 1 and 2 have unrolled kernels; other sizes take a plain vector loop.

mod kernel;

use crate::activation::{self, Activation};
use crate::conv::Conv2d;
use crate::gemm::{Epilogue, merge};
use crate::parallel::{Shared, for_each_task, part, tasks_for};
use crate::workspace::Workspace;
use kernel::{Line, Strip};
use std::ops::Range;

/// Bytes of input and output rows that a weight gradient's register block passes over before it is put away.
const STRIP_BYTES: usize = 64 << 10;

/// `[ky, kx, c]` from `[c, 1, ky, kx]`; `turned` by 180 degrees if asked.
fn taps_first(w: &[f32], taps: usize, turned: bool, out: &mut [f32]) {
    let channels = w.len() / taps;
    for (tap, line) in out.chunks_exact_mut(channels).enumerate() {
        let from = if turned { taps - 1 - tap } else { tap };
        for (c, v) in line.iter_mut().enumerate() {
            *v = w[c * taps + from];
        }
    }
}

/// The arithmetic of a call as a task count; a depthwise product costs about twice a dense one, for its memory.
fn tasks(d: &Conv2d) -> usize {
    tasks_for(2 * d.flops())
}

/// `y = act(conv(x, w) + bias + residual)`.
pub(crate) fn forward(d: &Conv2d, x: &[f32], w: &[f32], epilogue: &Epilogue, y: &mut [f32], ws: &mut Workspace) {
    let source = Source { x, h: d.h, w: d.w, pad_y: d.pad, pad_x: d.pad, stride: d.stride };
    correlate(d, source, (d.out_h(), d.out_w()), w, false, epilogue, false, y, ws);
}

/// The image that a correlation reads.
#[derive(Clone, Copy)]
struct Source<'a> {
    x: &'a [f32],
    h: usize,
    w: usize,
    pad_y: usize,
    pad_x: usize,
    stride: usize,
}

/// `y (+)= correlation of the source with w (turned if asked)`, then the epilogue; `y` has rows and columns of size `out`.
fn correlate(
    d: &Conv2d,
    source: Source,
    (out_h, out_w): (usize, usize),
    w: &[f32],
    turned: bool,
    epilogue: &Epilogue,
    accumulate: bool,
    y: &mut [f32],
    ws: &mut Workspace,
) {
    if y.is_empty() {
        return;
    }
    let (level, channels) = (ws.level(), d.c_in);
    let weights = ws.take(w.len());
    taps_first(w, d.kh * d.kw, turned, weights);
    let weights = &*weights;
    let rows = d.batch * out_h;
    let tasks = tasks(d).min(rows);
    let out = Shared(y.as_mut_ptr());
    for_each_task(tasks, |task| {
        for row in part(rows, 1, tasks, task) {
            let (n, oy) = (row / out_h, row % out_h);
            // SAFETY: rows of y are disjoint over tasks.
            let y = unsafe { std::slice::from_raw_parts_mut(out.ptr().add(row * out_w * channels), out_w * channels) };
            let line = Line {
                image: &source.x[n * source.h * source.w * channels..][..source.h * source.w * channels],
                h: source.h,
                w: source.w,
                channels,
                kh: d.kh,
                kw: d.kw,
                stride: source.stride,
                top: (oy * source.stride) as isize - source.pad_y as isize,
                pad: source.pad_x,
                weights,
                bias: epilogue.bias,
                accumulate,
            };
            kernel::forward(level, &line, y);
            if let Some(residual) = epilogue.residual {
                let from = row * out_w * channels;
                y.iter_mut().zip(&residual[from..]).for_each(|(y, r)| *y += r);
            }
            if epilogue.act != Activation::Identity {
                activation::apply(level, epilogue.act, y);
            }
        }
    });
}

/// `dx (+)= conv^T(dy, w)`.
pub(crate) fn backward_data(d: &Conv2d, w: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool, ws: &mut Workspace) {
    let (out_h, out_w) = (d.out_h(), d.out_w());
    if d.stride == 1 && d.pad < d.kh && d.pad < d.kw && out_h > 0 && out_w > 0 {
        let (pad_y, pad_x) = (d.kh - 1 - d.pad, d.kw - 1 - d.pad);
        let source = Source { x: dy, h: out_h, w: out_w, pad_y, pad_x, stride: 1 };
        correlate(d, source, (d.h, d.w), w, true, &Epilogue::default(), accumulate, dx, ws);
        return;
    }
    if dx.is_empty() {
        return;
    }
    let (level, channels) = (ws.level(), d.c_in);
    let weights = ws.take(w.len());
    taps_first(w, d.kh * d.kw, false, weights);
    let weights = &*weights;
    let rows = d.batch * d.h;
    let tasks = tasks(d).min(rows);
    let out = Shared(dx.as_mut_ptr());
    for_each_task(tasks, |task| {
        for row in part(rows, 1, tasks, task) {
            let (n, iy) = (row / d.h, row % d.h);
            // SAFETY: rows of dx are disjoint over tasks.
            let dx = unsafe { std::slice::from_raw_parts_mut(out.ptr().add(row * d.w * channels), d.w * channels) };
            let line = Line {
                image: &dy[n * out_h * out_w * channels..][..out_h * out_w * channels],
                h: out_h,
                w: out_w,
                channels,
                kh: d.kh,
                kw: d.kw,
                stride: d.stride,
                top: (iy + d.pad) as isize,
                pad: d.pad,
                weights,
                bias: None,
                accumulate,
            };
            kernel::transposed(level, &line, dx);
        }
    });
}

/// `dw += gradient by the weights`: one partial per task, summed in task order.
pub(crate) fn backward_weights(d: &Conv2d, x: &[f32], dy: &[f32], dw: &mut [f32], ws: &mut Workspace) {
    if dw.is_empty() || dy.is_empty() {
        return;
    }
    let (level, channels, taps) = (ws.level(), d.c_in, d.kh * d.kw);
    let (out_h, out_w) = (d.out_h(), d.out_w());
    let row_bytes = (d.w * d.stride + out_w) * channels * size_of::<f32>();
    let each = out_h.div_ceil((STRIP_BYTES / row_bytes.max(1)).max(1));
    let strips = d.batch * each;
    let tasks = tasks(d).min(strips);
    let len = taps * channels;
    let [partials, sum] = ws.split([tasks * len, len]);
    partials.fill(0.0);
    let out = Shared(partials.as_mut_ptr());
    for_each_task(tasks, |task| {
        // SAFETY: each task has its own partial.
        let partial = unsafe { std::slice::from_raw_parts_mut(out.ptr().add(task * len), len) };
        for strip in part(strips, 1, tasks, task) {
            let (n, rows): (usize, Range<usize>) = (strip / each, part(out_h, 1, each, strip % each));
            let image = d.h * d.w * channels;
            let strip = Strip {
                image: &x[n * image..(n + 1) * image],
                dy: &dy[(n * out_h + rows.start) * out_w * channels..(n * out_h + rows.end) * out_w * channels],
                h: d.h,
                w: d.w,
                out_w,
                channels,
                kh: d.kh,
                kw: d.kw,
                stride: d.stride,
                top: (rows.start * d.stride) as isize - d.pad as isize,
                pad: d.pad,
            };
            kernel::weights(level, &strip, partial);
        }
    });
    merge(partials, false, sum);
    for (c, own) in dw.chunks_exact_mut(taps).enumerate() {
        for (tap, v) in own.iter_mut().enumerate() {
            *v += sum[tap * channels + c];
        }
    }
}
