//! Ops that move values: `kernels/layout.cu`, `kernels/embedding.cu`.

use mcpipe_cpu::layout::Patches;
use mcpipe_graph::Op;

use super::columns::Sum;
use super::elementwise::{pass, scale};
use super::embedding;
use crate::device::Device;
use crate::error::CudaError;
use crate::launch::{Argument, Shape, launch};
use crate::view::{Forward, Grad, View, Vjp};

/// Whether kernels can take eight elements at a time.
fn wide(lengths: &[usize]) -> bool {
    lengths.iter().all(|n| n.is_multiple_of(8))
}

fn overwrite(view: View) -> Grad {
    Grad { view, accumulate: false }
}

fn patches(dev: &Device, d: &Patches, from: View, to: Grad, to_image: bool) -> Result<(), CudaError> {
    let wide = wide(&[d.c]);
    let row = if wide { d.w * d.c / 8 } else { d.w * d.c };
    let threads = row.next_multiple_of(32).clamp(32, 256);
    let shape = Shape::grid([d.batch * d.h, row.div_ceil(threads), 1], threads as u32);
    let [h, w, c, ph, pw] = [d.h, d.w, d.c, d.ph, d.pw].map(|n| n as i32);
    let (image, wide, add) = (i32::from(to_image), i32::from(wide), i32::from(to.accumulate));
    launch!(dev, "layout", "patches", shape, from, to.view, h, w, c, ph, pw, image, wide, add)
}

/// `outer` runs of `len` elements: from and to are (distance between runs, start of the first).
struct Runs {
    outer: usize,
    len: usize,
    from: (usize, usize),
    to: (usize, usize),
}

fn copy_rows(dev: &Device, r: &Runs, from: View, to: Grad) -> Result<(), CudaError> {
    let wide = wide(&[r.len, r.from.0, r.from.1, r.to.0, r.to.1]);
    let n = r.outer * r.len;
    let shape = Shape::row((if wide { n / 8 } else { n }).div_ceil(512), 256);
    let [len, from_pitch, to_pitch, from_start, to_start] =
        [r.len, r.from.0, r.to.0, r.from.1, r.to.1].map(|n| n as i64);
    let (wide, add) = (i32::from(wide), i32::from(to.accumulate));
    launch!(
        dev,
        "layout",
        "copy_rows",
        shape,
        from,
        to.view,
        n as i64,
        len,
        from_pitch,
        to_pitch,
        from_start,
        to_start,
        wide,
        add
    )
}

/// `Axes` of `kernels/layout.cu`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
struct Axes {
    count: i32,
    pad: i32,
    size: [i64; 8],
    from: [i64; 8],
    to: [i64; 8],
}

// SAFETY: repr(C), the same fields as in kernels/layout.cu.
unsafe impl Argument for Axes {}

impl Axes {
    fn push(&mut self, size: usize, from: usize, to: usize) {
        let i = self.count as usize;
        (self.size[i], self.from[i], self.to[i]) = (size as i64, from as i64, to as i64);
        self.count += 1;
    }

    fn numbers(&self) -> usize {
        self.size[..self.count as usize].iter().map(|&n| n as usize).product()
    }
}

/// An axis of a permuted tensor in the order of y: its size and its strides in x and y.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Axis {
    size: usize,
    from: usize,
    to: usize,
}

/// y's axes, without those of one element; neighbours that stay neighbours are one axis.
fn axes(shape: &[usize], perm: &[usize]) -> Vec<Axis> {
    let stride = |at: usize| shape[at + 1..].iter().product::<usize>();
    let mut merged: Vec<Axis> = Vec::new();
    for &a in perm {
        let (size, from) = (shape[a], stride(a));
        if size == 1 {
            continue;
        }
        match merged.last_mut() {
            Some(last) if last.from == size * from => {
                last.size *= size;
                last.from = from;
            }
            _ => merged.push(Axis { size, from, to: 0 }),
        }
    }
    let mut to = 1;
    for axis in merged.iter_mut().rev() {
        axis.to = to;
        to *= axis.size;
    }
    merged
}

/// y (+)= x with its axes reordered, as `mcpipe_cpu::layout::permute`.
fn permute(dev: &Device, shape: &[usize], perm: &[usize], x: View, y: Grad) -> Result<(), CudaError> {
    if x.len == 0 {
        return Ok(());
    }
    let all = axes(shape, perm);
    let Some((last, before)) = all.split_last().filter(|(_, before)| !before.is_empty()) else {
        return scale(dev, x, 1.0, y);
    };
    let (mut rest, add) = (Axes::default(), i32::from(y.accumulate));
    if last.from == 1 {
        before.iter().for_each(|a| rest.push(a.size, a.from, a.to));
        let wide = wide(&[last.size]);
        let shape = Shape::items(if wide { x.len / 8 } else { x.len });
        let (n, run) = (x.len as i64, last.size as i64);
        return launch!(dev, "layout", "permute_runs", shape, x, y.view, rest, n, run, i32::from(wide), add);
    }
    // x's last axis lies somewhere before.
    let mut rows = Axis { size: 1, from: 1, to: 1 };
    for a in before {
        if a.from == 1 { rows = *a } else { rest.push(a.size, a.from, a.to) }
    }
    let shape = Shape::grid([rest.numbers(), rows.size.div_ceil(64), last.size.div_ceil(64)], 256);
    let [r, rows_to, columns, columns_from] = [rows.size, rows.to, last.size, last.from].map(|n| n as i64);
    launch!(dev, "layout", "permute_tiles", shape, x, y.view, rest, r, rows_to, columns, columns_from, add)
}

/// y\[i\] = x\[i·group + ids\[i\]\] of `rows` rows.
fn gather(dev: &Device, x: View, ids: View, y: View, width: usize, group: usize, rows: usize) -> Result<(), CudaError> {
    let wide = wide(&[width]);
    let shape = Shape::items(if wide { y.len / 8 } else { y.len });
    let (n, width, group, rows) = (y.len as i64, width as i64, group as i64, rows as i64);
    launch!(dev, "layout", "gather_rows", shape, x, ids, y, n, width, group, rows, i32::from(wide))
}

pub(crate) fn forward(dev: &Device, op: &Op, io: Forward<'_>) -> Result<(), CudaError> {
    let x = |i: usize| io.ins[i];
    let to = overwrite(io.out);
    match op {
        Op::Unfold(d) => patches(dev, d, x(0), to, false),
        Op::Fold(d) => patches(dev, d, x(0), to, true),
        Op::Embedding { width } => gather(dev, x(0), x(1), io.out, *width, 0, x(0).len / (*width).max(1)),
        Op::GatherRows { tokens, width, .. } => gather(dev, x(0), x(1), io.out, *width, *tokens, *tokens),
        Op::ConcatLast { rows, ca, cb } => {
            let pitch = ca + cb;
            copy_rows(dev, &Runs { outer: *rows, len: *ca, from: (*ca, 0), to: (pitch, 0) }, x(0), to)?;
            copy_rows(dev, &Runs { outer: *rows, len: *cb, from: (*cb, 0), to: (pitch, *ca) }, x(1), to)
        }
        Op::PrependToken { batch, tokens, width } => {
            let (len, pitch) = (tokens * width, (tokens + 1) * width);
            copy_rows(dev, &Runs { outer: *batch, len: *width, from: (0, 0), to: (pitch, 0) }, x(0), to)?;
            copy_rows(dev, &Runs { outer: *batch, len, from: (len, 0), to: (pitch, *width) }, x(1), to)
        }
        Op::SliceRows { batch, tokens, width, start, len } => {
            let (pitch, n) = (tokens * width, len * width);
            copy_rows(dev, &Runs { outer: *batch, len: n, from: (pitch, start * width), to: (n, 0) }, x(0), to)
        }
        Op::Permute { shape, axes } => permute(dev, shape, axes, x(0), to),
        _ => Err(super::unsupported(op)),
    }
}

pub(crate) fn vjp(dev: &Device, op: &Op, io: Vjp<'_>) -> Result<(), CudaError> {
    let dy = io.dout;
    // Where only some places get a gradient the others are zero.
    let cleared = |dx: Grad| -> Result<Grad, CudaError> {
        if !dx.accumulate {
            dev.fill(dx.view, 0)?;
        }
        Ok(Grad { view: dx.view, accumulate: true })
    };
    match op {
        Op::ConcatLast { rows, ca, cb } => {
            for (to, len, start) in [(io.grads[0], *ca, 0), (io.grads[1], *cb, *ca)] {
                let Some(to) = to else { continue };
                copy_rows(dev, &Runs { outer: *rows, len, from: (ca + cb, start), to: (len, 0) }, dy, to)?;
            }
            return Ok(());
        }
        Op::PrependToken { batch, tokens, width } => {
            let (len, pitch) = (tokens * width, (tokens + 1) * width);
            if let Some(to) = io.grads[0] {
                let sum = Sum { row_pitch: pitch, batch_pitch: pitch * batch, ..Sum::new(1, *batch, *width) };
                sum.of(dev, dy, to)?;
            }
            let Some(to) = io.grads[1] else { return Ok(()) };
            return copy_rows(dev, &Runs { outer: *batch, len, from: (pitch, *width), to: (len, 0) }, dy, to);
        }
        _ => {}
    }
    let Some(dx) = io.grads[0] else { return Ok(()) };
    match op {
        Op::Unfold(d) => patches(dev, d, dy, dx, true),
        Op::Fold(d) => patches(dev, d, dy, dx, false),
        Op::Embedding { width } => embedding::vjp(dev, *width, io.ins[1], dy, cleared(dx)?.view),
        Op::GatherRows { tokens, width, .. } => {
            let to = cleared(dx)?.view;
            let (n, width, tokens) = (dy.len as i64, *width as i64, *tokens as i64);
            launch!(dev, "layout", "gather_rows_vjp", Shape::items(dy.len), dy, io.ins[1], to, n, width, tokens)
        }
        Op::SliceRows { batch, tokens, width, start, len } => {
            let (pitch, n) = (tokens * width, len * width);
            let runs = Runs { outer: *batch, len: n, from: (n, 0), to: (pitch, start * width) };
            if len == tokens {
                return pass(dev, dy, Some(dx));
            }
            copy_rows(dev, &runs, dy, cleared(dx)?)
        }
        Op::Permute { shape, axes } => {
            // The inverse order brings the gradient back.
            let mut inverse = vec![0; axes.len()];
            axes.iter().enumerate().for_each(|(i, &a)| inverse[a] = i);
            let from: Vec<usize> = axes.iter().map(|&a| shape[a]).collect();
            permute(dev, &from, &inverse, dy, dx)
        }
        _ => Err(super::unsupported(op)),
    }
}
