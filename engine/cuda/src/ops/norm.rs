//! Normalisations: `kernels/norm.cu`.

use mcpipe_cpu::norm::Norm;
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

pub(crate) fn running_statistics(
    _: &Device,
    _: &Norm,
    _: f32,
    _mean: View,
    _rstd: View,
    _running_mean: View,
    _running_var: View,
) -> Result<(), CudaError> {
    Err(CudaError::Unsupported("running statistics".into()))
}
