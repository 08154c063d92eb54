//! Dense products and convolutions: cuBLASLt and cuDNN, with `kernels/dense.cu` around them.

use mcpipe_graph::Op;

use crate::device::Device;
use crate::error::CudaError;
use crate::view::{Forward, View, Vjp};

pub(crate) fn forward(_: &Device, op: &Op, _: Forward<'_>) -> Result<(), CudaError> {
    Err(super::unsupported(op))
}

pub(crate) fn vjp(_: &Device, op: &Op, _: Vjp<'_>) -> Result<(), CudaError> {
    Err(super::unsupported(op))
}

/// Copies of weights as products take them.
#[derive(Debug, Default)]
pub(crate) struct Weights {}

impl Weights {
    /// Notes that the weights in `range` changed.
    pub(crate) fn changed(&mut self, _: View) {}
}

/// Brings the copies of weights that changed up to date.
pub(crate) fn refresh_weights(_: &Device) -> Result<(), CudaError> {
    Ok(())
}
