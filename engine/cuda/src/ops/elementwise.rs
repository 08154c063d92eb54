//! Element-wise ops: `kernels/elementwise.cu`.

use mcpipe_graph::{Activation, Op};

use crate::device::Device;
use crate::error::CudaError;
use crate::launch::{Shape, launch};
use crate::view::{Forward, View, Vjp};

/// An activation's number in `kernels/activation.cuh`.
pub(crate) fn code(act: Activation) -> i32 {
    Activation::ALL.iter().position(|a| *a == act).unwrap_or(0) as i32
}

pub(crate) fn forward(dev: &Device, op: &Op, io: Forward<'_>) -> Result<(), CudaError> {
    let n = io.out.len;
    match op {
        Op::Add => launch!(dev, "elementwise", "add", Shape::eights(n), io.ins[0], io.ins[1], io.out, n as i64),
        Op::Activation(a) => {
            launch!(dev, "elementwise", "activation", Shape::eights(n), io.ins[0], io.out, n as i64, code(*a))
        }
        _ => Err(super::unsupported(op)),
    }
}

pub(crate) fn vjp(dev: &Device, op: &Op, io: Vjp<'_>) -> Result<(), CudaError> {
    let n = io.dout.len;
    match op {
        Op::Activation(a) => {
            let Some(dx) = io.grads[0] else { return Ok(()) };
            let (x, accumulate) = (io.ins[0], i32::from(dx.accumulate));
            let shape = Shape::eights(n);
            launch!(dev, "elementwise", "activation_vjp", shape, x, io.dout, dx.view, n as i64, code(*a), accumulate)
        }
        _ => Err(super::unsupported(op)),
    }
}

/// Elements from one view to another of the same length, converted between types; added where `add` says so.
pub(crate) fn copy(dev: &Device, from: View, to: View, add: bool) -> Result<(), CudaError> {
    let n = from.len as i64;
    launch!(dev, "elementwise", "copy", Shape::eights(from.len), from, to, n, i32::from(add))
}
