//! Ops by family: each chooses kernels and their launch shapes.

pub(crate) mod attention;
pub(crate) mod columns;
pub(crate) mod dense;
pub(crate) mod depthwise;
mod depthwise_band;
pub(crate) mod elementwise;
pub(crate) mod embedding;
pub(crate) mod layout;
pub(crate) mod levels;
pub(crate) mod loss;
pub(crate) mod norm;
pub(crate) mod pooling;
pub(crate) mod relational;
#[cfg(test)]
mod testing;
#[cfg(test)]
mod tests;

use mcpipe_graph::Op;

use crate::device::Device;
use crate::error::CudaError;
use crate::view::{Forward, Vjp};

pub(crate) fn unsupported(op: &Op) -> CudaError {
    CudaError::Unsupported(format!("the CUDA backend has no kernel for {} with these dims", op.name()))
}

type Run<Io> = fn(&Device, &Op, Io) -> Result<(), CudaError>;

/// The family that runs an op.
fn family<'a>(op: &Op) -> (Run<Forward<'a>>, Run<Vjp<'a>>) {
    match op {
        Op::Conv2d(d) if d.groups > 1 && d.groups == d.c_in => (depthwise::forward, depthwise::vjp),
        Op::TokenConv(_) => (depthwise::forward, depthwise::vjp),
        Op::Conv2d(_) | Op::FusedConv(_) | Op::Linear(_) | Op::MatMul { .. } => (dense::forward, dense::vjp),
        Op::BatchNorm { .. } | Op::BatchNormEval { .. } | Op::LayerNorm(_) | Op::GroupNorm(_) => {
            (norm::forward, norm::vjp)
        }
        Op::Attention(_)
        | Op::MaskedAttention(_)
        | Op::AttentionPool(_)
        | Op::AttentionMap(_)
        | Op::SeparableAttention(_) => (attention::forward, attention::vjp),
        Op::Activation(_)
        | Op::Add
        | Op::AddBroadcast
        | Op::Mul
        | Op::ScaleChannels { .. }
        | Op::ScaleSamples { .. }
        | Op::Scale(_)
        | Op::Exp => (elementwise::forward, elementwise::vjp),
        Op::Unfold(_)
        | Op::Fold(_)
        | Op::Embedding { .. }
        | Op::GatherRows { .. }
        | Op::ConcatLast { .. }
        | Op::PrependToken { .. }
        | Op::SliceRows { .. }
        | Op::Permute { .. } => (layout::forward, layout::vjp),
        Op::GlobalAvgPool { .. } | Op::AvgPool(_) | Op::MaxPool(_) | Op::Resize(_) => (pooling::forward, pooling::vjp),
        Op::Relational(_) => (relational::forward, relational::vjp),
        Op::L2Normalize { .. }
        | Op::Softmax { .. }
        | Op::Contrastive(_)
        | Op::SigmoidLoss(_)
        | Op::Mse
        | Op::Cosine { .. }
        | Op::KlRows { .. }
        | Op::AttentionTransferMap { .. } => (loss::forward, loss::vjp),
        Op::RowLoss { .. } | Op::TransferLoss { .. } | Op::MapLoss { .. } | Op::PixelLoss { .. } => {
            (levels::forward, levels::vjp)
        }
    }
}

pub(crate) fn forward(dev: &Device, op: &Op, io: Forward<'_>) -> Result<(), CudaError> {
    family(op).0(dev, op, io)
}

pub(crate) fn vjp(dev: &Device, op: &Op, io: Vjp<'_>) -> Result<(), CudaError> {
    family(op).1(dev, op, io)
}
