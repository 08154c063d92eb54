//! Element-wise ops: `kernels/elementwise.cu`.

use mcpipe_graph::{Activation, Op};

use super::columns::Sum;
use crate::device::Device;
use crate::error::CudaError;
use crate::launch::{Shape, launch};
use crate::view::{Element, Forward, Grad, View, Vjp};

/// An activation's number in `kernels/activation.cuh`.
pub(crate) fn code(act: Activation) -> i32 {
    Activation::ALL.iter().position(|a| *a == act).unwrap_or(0) as i32
}

/// The shape of kernels that take 16 elements a thread.
pub(crate) fn sixteens(n: usize) -> Shape {
    Shape::row(n.div_ceil(4096), 256)
}

/// to (+)= factor·x, from any float type to any.
pub(crate) fn scale(dev: &Device, x: View, factor: f32, to: Grad) -> Result<(), CudaError> {
    let n = x.len;
    launch!(dev, "elementwise", "scale", sixteens(n), x, to.view, n as i64, factor, i32::from(to.accumulate))
}

/// A gradient passed on.
pub(crate) fn pass(dev: &Device, dy: View, to: Option<Grad>) -> Result<(), CudaError> {
    match to {
        Some(to) => scale(dev, dy, 1.0, to),
        None => Ok(()),
    }
}

fn mul(dev: &Device, a: View, b: View, to: Grad) -> Result<(), CudaError> {
    let n = a.len;
    launch!(dev, "elementwise", "mul", sixteens(n), a, b, to.view, n as i64, i32::from(to.accumulate))
}

fn scale_channels(dev: &Device, x: View, s: View, rows: usize, c: usize, to: Grad) -> Result<(), CudaError> {
    let (n, rows, c, accumulate) = (x.len, rows as i64, c as i64, i32::from(to.accumulate));
    launch!(dev, "elementwise", "scale_channels", sixteens(n), x, s, to.view, n as i64, rows, c, accumulate)
}

fn scale_samples(dev: &Device, x: View, m: View, len: usize, to: Grad) -> Result<(), CudaError> {
    let (n, accumulate) = (x.len, i32::from(to.accumulate));
    launch!(dev, "elementwise", "scale_samples", sixteens(n), x, m, to.view, n as i64, len as i64, accumulate)
}

/// dx (+)= factor·dy, the same for all rows of `[batch, rows, c]`.
pub(crate) fn spread(dev: &Device, dy: View, rows: usize, c: usize, factor: f32, to: Grad) -> Result<(), CudaError> {
    let n = to.view.len;
    let (shape, rows, c, accumulate) = (Shape::eights(n), rows as i64, c as i64, i32::from(to.accumulate));
    launch!(dev, "elementwise", "spread_channels", shape, dy, to.view, n as i64, rows, c, factor, accumulate)
}

pub(crate) fn forward(dev: &Device, op: &Op, io: Forward<'_>) -> Result<(), CudaError> {
    let (n, shape) = (io.out.len, sixteens(io.out.len));
    let x = |i: usize| io.ins[i];
    let to = Grad { view: io.out, accumulate: false };
    match op {
        Op::Add => launch!(dev, "elementwise", "add", shape, x(0), x(1), io.out, n as i64),
        Op::AddBroadcast => {
            let c = x(1).len as i64;
            launch!(dev, "elementwise", "add_broadcast", shape, x(0), x(1), io.out, n as i64, c)
        }
        Op::Mul => mul(dev, x(0), x(1), to),
        Op::ScaleChannels { hw, c, .. } => scale_channels(dev, x(0), x(1), *hw, *c, to),
        Op::ScaleSamples { len, .. } => scale_samples(dev, x(0), x(1), *len, to),
        Op::Scale(s) => scale(dev, x(0), *s, to),
        Op::Exp => launch!(dev, "elementwise", "exponential", shape, x(0), io.out, n as i64),
        Op::Activation(a) => launch!(dev, "elementwise", "activation", shape, x(0), io.out, n as i64, code(*a)),
        _ => Err(super::unsupported(op)),
    }
}

pub(crate) fn vjp(dev: &Device, op: &Op, io: Vjp<'_>) -> Result<(), CudaError> {
    let (n, dy) = (io.dout.len, io.dout);
    let x = |i: usize| io.ins[i];
    match op {
        Op::Add => {
            pass(dev, dy, io.grads[0])?;
            pass(dev, dy, io.grads[1])
        }
        Op::AddBroadcast => {
            pass(dev, dy, io.grads[0])?;
            let Some(db) = io.grads[1] else { return Ok(()) };
            let c = db.view.len;
            Sum::new(1, n / c.max(1), c).of(dev, dy, db)
        }
        Op::Mul => match (io.grads[0], io.grads[1]) {
            (Some(da), Some(db)) => {
                let (add_a, add_b) = (i32::from(da.accumulate), i32::from(db.accumulate));
                let shape = sixteens(n);
                let (a, b) = (da.view, db.view);
                launch!(dev, "elementwise", "mul_vjp", shape, x(0), x(1), dy, a, b, n as i64, add_a, add_b)
            }
            (Some(da), None) => mul(dev, x(1), dy, da),
            (None, Some(db)) => mul(dev, x(0), dy, db),
            (None, None) => Ok(()),
        },
        Op::ScaleChannels { batch, hw, c } => match (io.grads[0], io.grads[1]) {
            (Some(dx), None) => scale_channels(dev, dy, x(1), *hw, *c, dx),
            (dx, Some(ds)) => {
                // Without a taker dx goes to scratch: layer scale and squeeze-excite always have one.
                let dx = match dx {
                    Some(dx) => dx,
                    None => Grad { view: dev.scratch(n, Element::Bf16)?, accumulate: false },
                };
                let add = i32::from(dx.accumulate);
                Sum::new(*batch, *hw, *c).run(dev, ds, |shape, d| {
                    launch!(dev, "elementwise", "scale_channels_vjp", shape, x(0), dy, x(1), dx.view, d, add)
                })
            }
            (None, None) => Ok(()),
        },
        Op::ScaleSamples { len, .. } => io.grads[0].map_or(Ok(()), |dx| scale_samples(dev, dy, x(1), *len, dx)),
        Op::Scale(s) => io.grads[0].map_or(Ok(()), |dx| scale(dev, dy, *s, dx)),
        Op::Exp => match (io.grads[0], io.out) {
            (Some(dx), Some(y)) => mul(dev, y, dy, dx),
            _ => Ok(()),
        },
        Op::Activation(a) => {
            let Some(dx) = io.grads[0] else { return Ok(()) };
            let (view, add, code) = (dx.view, i32::from(dx.accumulate), code(*a));
            launch!(dev, "elementwise", "activation_vjp", sixteens(n), x(0), dy, view, n as i64, code, add)
        }
        _ => Err(super::unsupported(op)),
    }
}

/// Elements from one view to another of the same length, converted between types; added where `add` says so. The views
/// may start at any element.
pub(crate) fn copy(dev: &Device, from: View, to: View, add: bool) -> Result<(), CudaError> {
    if from.address.is_multiple_of(16) && to.address.is_multiple_of(16) {
        return scale(dev, from, 1.0, Grad { view: to, accumulate: add });
    }
    let n = from.len;
    launch!(dev, "elementwise", "copy_unaligned", Shape::items(n), from, to, n as i64, i32::from(add))
}
