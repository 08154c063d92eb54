//! Ops that move values: `kernels/layout.cu`.

use mcpipe_graph::Op;

use crate::device::Device;
use crate::error::CudaError;
use crate::view::{Forward, Vjp};

pub(crate) fn forward(_: &Device, op: &Op, _: Forward<'_>) -> Result<(), CudaError> {
    Err(super::unsupported(op))
}

pub(crate) fn vjp(_: &Device, op: &Op, _: Vjp<'_>) -> Result<(), CudaError> {
    Err(super::unsupported(op))
}
