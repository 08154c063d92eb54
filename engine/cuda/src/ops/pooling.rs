//! Pooling and resizing: `kernels/pooling.cu`.

use mcpipe_cpu::pooling::Pool2d;
use mcpipe_cpu::resize::Resize;
use mcpipe_graph::Op;

use super::columns::Sum;
use super::elementwise::spread;
use crate::device::Device;
use crate::error::CudaError;
use crate::launch::{Argument, Shape, launch};
use crate::view::{Forward, Grad, Vjp};

/// `Window` of `kernels/pooling.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Window {
    h: i32,
    w: i32,
    c: i32,
    oh: i32,
    ow: i32,
    k: i32,
    stride: i32,
    pad: i32,
}

// SAFETY: repr(C), the same fields as in kernels/pooling.cu.
unsafe impl Argument for Window {}

impl Window {
    fn new(d: &Pool2d) -> Self {
        let [h, w, c, oh, ow, k, stride, pad] =
            [d.h, d.w, d.c, d.out_h(), d.out_w(), d.k, d.stride, d.pad].map(|n| n as i32);
        Window { h, w, c, oh, ow, k, stride, pad }
    }
}

/// `Resizing` of `kernels/pooling.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Resizing {
    h: i32,
    w: i32,
    c: i32,
    oh: i32,
    ow: i32,
    aligned: i32,
    scale_y: f32,
    scale_x: f32,
}

// SAFETY: repr(C), the same fields as in kernels/pooling.cu.
unsafe impl Argument for Resizing {}

impl Resizing {
    fn new(d: &Resize) -> Self {
        // In f32, as the CPU and torch do.
        let scale = |input: usize, output: usize| match (d.aligned, output) {
            (true, 0 | 1) => 0.0,
            (true, _) => (input - 1) as f32 / (output - 1) as f32,
            (false, _) => input as f32 / output as f32,
        };
        let [h, w, c, oh, ow, aligned] = [d.h, d.w, d.c, d.oh, d.ow, usize::from(d.aligned)].map(|n| n as i32);
        Resizing { h, w, c, oh, ow, aligned, scale_y: scale(d.h, d.oh), scale_x: scale(d.w, d.ow) }
    }
}

/// Blocks that walk along rows of `[batch, h, w, c]`, and whether threads take eight channels.
fn rows(batch: usize, h: usize, w: usize, c: usize) -> (Shape, i32) {
    let wide = c.is_multiple_of(8);
    let row = if wide { w * c / 8 } else { w * c };
    let threads = row.next_multiple_of(32).clamp(32, 256);
    (Shape::grid([batch * h, row.div_ceil(threads), 1], threads as u32), i32::from(wide))
}

pub(crate) fn forward(dev: &Device, op: &Op, io: Forward<'_>) -> Result<(), CudaError> {
    let (x, y) = (io.ins[0], io.out);
    match op {
        Op::GlobalAvgPool { batch, hw, c } => {
            let sum = Sum { factor: 1.0 / *hw as f32, ..Sum::new(*batch, *hw, *c) };
            sum.of(dev, x, Grad { view: y, accumulate: false })
        }
        Op::AvgPool(d) => {
            let (shape, wide) = rows(d.batch, d.out_h(), d.out_w(), d.c);
            launch!(dev, "pooling", "avg_pool", shape, x, y, Window::new(d), wide)
        }
        Op::MaxPool(d) => {
            let (shape, wide) = rows(d.batch, d.out_h(), d.out_w(), d.c);
            launch!(dev, "pooling", "max_pool", shape, x, y, io.saved[0], Window::new(d), wide)
        }
        Op::Resize(d) => {
            let (shape, wide) = rows(d.batch, d.oh, d.ow, d.c);
            launch!(dev, "pooling", "resize", shape, x, y, Resizing::new(d), wide)
        }
        _ => Err(super::unsupported(op)),
    }
}

pub(crate) fn vjp(dev: &Device, op: &Op, io: Vjp<'_>) -> Result<(), CudaError> {
    let dy = io.dout;
    let Some(dx) = io.grads[0] else { return Ok(()) };
    let add = i32::from(dx.accumulate);
    match op {
        Op::GlobalAvgPool { hw, c, .. } => spread(dev, dy, *hw, *c, 1.0 / *hw as f32, dx),
        Op::AvgPool(d) => {
            let (shape, wide) = rows(d.batch, d.h, d.w, d.c);
            launch!(dev, "pooling", "avg_pool_vjp", shape, dy, dx.view, Window::new(d), wide, add)
        }
        Op::MaxPool(d) => {
            let (shape, wide) = rows(d.batch, d.h, d.w, d.c);
            launch!(dev, "pooling", "max_pool_vjp", shape, dy, io.saved[0], dx.view, Window::new(d), wide, add)
        }
        Op::Resize(d) => {
            let (shape, wide) = rows(d.batch, d.h, d.w, d.c);
            launch!(dev, "pooling", "resize_vjp", shape, dy, dx.view, Resizing::new(d), wide, add)
        }
        _ => Err(super::unsupported(op)),
    }
}
