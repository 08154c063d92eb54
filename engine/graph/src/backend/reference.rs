//! Nodes run by dfdx: each op in the bridge's terms.

use mcpipe_cpu::bridge::{self, Op as Dfdx, Pullback, Run};

use super::cpu::Cpu;
use super::{Arg, Dtype};
use crate::fuse::Operand;
use crate::op::Op;

/// The backward half of a dfdx node.
pub(super) type Tape = Pullback<f32>;

/// Runs `op` by dfdx; with `keep`, the result holds its VJP.
pub(super) fn run(op: &Op, ins: &[Arg<'_, Cpu>], keep: bool) -> Result<Run<f32>, bridge::BridgeError> {
    if op.is_of_parts() {
        return run_parts(op, ins, keep);
    }
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
        Op::RowLoss { .. } | Op::TransferLoss { .. } | Op::MapLoss { .. } | Op::PixelLoss { .. } => {
            unreachable!("run in parts above")
        }
    };
    // Ids are part of the op there, not arguments.
    let tensors: Vec<&[f32]> = ins.iter().filter(|a| matches!(a, Arg::Values { .. })).map(Arg::values).collect();
    bridge::run(&dfdx, &tensors, keep)
}

/// Runs an op part by part; the pullback goes back through theirs.
fn run_parts(op: &Op, ins: &[Arg<'_, Cpu>], keep: bool) -> Result<Run<f32>, bridge::BridgeError> {
    let parts = op.parts();
    let mut values: Vec<Vec<f32>> = Vec::with_capacity(parts.len());
    let mut tapes: Vec<(Vec<Operand>, Tape)> = Vec::with_capacity(parts.len());
    for part in parts {
        let copied: Vec<Vec<f32>> = part
            .inputs
            .iter()
            .map(|from| match *from {
                Operand::Input(i) => ins[i].values().to_vec(),
                Operand::Part(i) => values[i].clone(),
            })
            .collect();
        let args: Vec<Arg<'_, Cpu>> =
            copied.iter().map(|buffer| Arg::Values { buffer, len: buffer.len(), dtype: Dtype::F32 }).collect();
        let ran = run(&part.op, &args, keep)?;
        values.push(ran.value);
        tapes.extend(ran.pullback.map(|tape| (part.inputs, tape)));
    }
    let arguments = ins.len();
    let pullback = move |gradient: &[f32]| {
        let add = |to: &mut Vec<f32>, found: Vec<f32>| match to.is_empty() {
            true => *to = found,
            false => to.iter_mut().zip(found).for_each(|(t, f)| *t += f),
        };
        let mut inner: Vec<Vec<f32>> = vec![Vec::new(); tapes.len()];
        let mut grads: Vec<Vec<f32>> = vec![Vec::new(); arguments];
        if let Some(last) = inner.last_mut() {
            *last = gradient.to_vec();
        }
        for (i, (inputs, tape)) in tapes.into_iter().enumerate().rev() {
            for (from, found) in inputs.iter().zip(tape(&inner[i])) {
                match *from {
                    Operand::Input(j) => add(&mut grads[j], found),
                    Operand::Part(j) => add(&mut inner[j], found),
                }
            }
        }
        grads
    };
    let value = values.pop().unwrap_or_default();
    Ok(Run { value, saved: Vec::new(), pullback: keep.then(|| Box::new(pullback) as Tape) })
}
