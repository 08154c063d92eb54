//! Nodes run by dfdx: each op in the bridge's terms.

use mcpipe_cpu::bridge::{self, Op as Dfdx, Pullback, Run};

use super::Arg;
use super::cpu::Cpu;
use crate::op::Op;

/// The backward half of a dfdx node.
pub(super) type Tape = Pullback<f32>;

/// Runs `op` by dfdx; with `keep`, the result holds its VJP.
pub(super) fn run(op: &Op, ins: &[Arg<'_, Cpu>], keep: bool) -> Result<Run<f32>, bridge::BridgeError> {
    let ids = ins.get(1).map_or(&[][..], Arg::ids);
    let dfdx = match op {
        Op::Conv2d(d) => Dfdx::Conv2d(*d),
        // Never asked for: an executor on reference kernels does not fuse.
        Op::FusedConv(_) => return Err(bridge::BridgeError::Dims("a fused op has no formulation of its own")),
        Op::Linear(d) => Dfdx::Linear(*d),
        Op::MatMul { dims, alpha } => Dfdx::MatMul { dims: *dims, alpha: *alpha },
        Op::BatchNorm { dims, act, .. } => Dfdx::BatchNorm { dims: *dims, act: *act },
        Op::BatchNormEval { dims, act } => Dfdx::BatchNormEval { dims: *dims, act: *act },
        Op::LayerNorm(d) => Dfdx::LayerNorm(*d),
        Op::GroupNorm(d) => Dfdx::GroupNorm(*d),
        Op::Activation(a) => Dfdx::Activation(*a),
        Op::Attention(d) => Dfdx::Attention(*d),
        Op::MaskedAttention(d) => Dfdx::MaskedAttention { dims: *d, last: ids },
        Op::AttentionPool(d) => Dfdx::AttentionPool(*d),
        Op::TokenConv(d) => Dfdx::TokenConv(*d),
        Op::SigmoidLoss(d) => Dfdx::SigmoidLoss(*d),
        Op::AttentionMap(d) => Dfdx::AttentionMap(*d),
        Op::SeparableAttention(d) => Dfdx::SeparableAttention(*d),
        Op::Add => Dfdx::Add,
        Op::AddBroadcast => Dfdx::AddBroadcast,
        Op::Mul => Dfdx::Mul,
        Op::ScaleChannels { batch, hw, c } => Dfdx::ChannelScale { batch: *batch, hw: *hw, c: *c },
        Op::ScaleSamples { batch, len } => Dfdx::ScaleSamples { batch: *batch, len: *len },
        Op::Scale(s) => Dfdx::Scale(*s),
        Op::Exp => Dfdx::Exp,
        Op::Unfold(d) => Dfdx::Unfold(*d),
        Op::Fold(d) => Dfdx::Fold(*d),
        Op::GlobalAvgPool { batch, hw, c } => Dfdx::GlobalAvgPool { batch: *batch, hw: *hw, c: *c },
        Op::MaxPool(d) => Dfdx::MaxPool(*d),
        Op::AvgPool(d) => Dfdx::AvgPool(*d),
        Op::Resize(d) => Dfdx::Resize(*d),
        Op::Embedding { width } => Dfdx::Embedding { width: *width, ids },
        Op::GatherRows { tokens, width, .. } => Dfdx::GatherRows { tokens: *tokens, width: *width, index: ids },
        Op::ConcatLast { rows, ca, cb } => Dfdx::ConcatLast { rows: *rows, ca: *ca, cb: *cb },
        Op::PrependToken { batch, tokens, width } => {
            Dfdx::PrependToken { batch: *batch, tokens: *tokens, width: *width }
        }
        Op::SliceRows { batch, tokens, width, start, len } => {
            Dfdx::SliceRows { outer: *batch, rows: *tokens, width: *width, start: *start, count: *len }
        }
        Op::Permute { shape, axes } => Dfdx::Permute { shape, perm: axes },
        Op::L2Normalize { rows, c } => Dfdx::L2Normalize { rows: *rows, c: *c },
        Op::Softmax { rows, c, temperature } => Dfdx::Softmax { rows: *rows, c: *c, temperature: *temperature },
        Op::Contrastive(d) => Dfdx::Contrastive(*d),
        Op::Relational(d) => Dfdx::Relational { dims: d, own: ins[3].ids(), other: ins[4].ids(), group: ins[6].ids() },
        Op::Mse => Dfdx::Mse,
        Op::Cosine { rows, c } => Dfdx::Cosine { rows: *rows, c: *c },
        Op::KlRows { rows, c } => Dfdx::KlRows { rows: *rows, c: *c },
        Op::AttentionTransferMap { batch, hw, c } => Dfdx::AttentionTransferMap { batch: *batch, hw: *hw, c: *c },
    };
    // Ids are part of the op there, not arguments.
    let tensors: Vec<&[f32]> = ins.iter().filter(|a| matches!(a, Arg::Values { .. })).map(Arg::values).collect();
    bridge::run(&dfdx, &tensors, keep)
}
