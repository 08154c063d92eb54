//! The CPU backend: dispatches each op to its kernel, or to dfdx.

mod vjp;

use std::borrow::Cow;
use std::collections::HashMap;

use mcpipe_cpu::norm::{self, Norm};
use mcpipe_cpu::relational::{self, PairTargets};
use mcpipe_cpu::{
    Epilogue, Precision, Workspace, activation, attention, attention_pool, conv, elementwise, embedding, gemm, layout,
    linear, loss, pooling, resize, separable, sigmoid_loss, softmax, token_conv,
};

use super::reference::{self, Tape};
use super::{Arg, Backend, BackendError, Dtype, Forward, Kernels, Layout, Part, Vjp};
use crate::fuse::FusedConv;
use crate::graph::{Node, ValueId};
use crate::op::{Op, Runner};

/// Runs nodes on the host.
#[derive(Default)]
pub struct Cpu {
    kernels: Kernels,
    ws: Workspace,
    /// Weights and bias of a convolution with its batch norm folded in.
    folded: [Vec<f32>; 2],
    /// What dfdx's tapes left for the backward walk.
    tapes: HashMap<ValueId, Tape>,
}

impl std::fmt::Debug for Cpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Cpu").field("kernels", &self.kernels).field("tapes", &self.tapes.len()).finish_non_exhaustive()
    }
}

impl Cpu {
    /// A CPU backend with the given kernels.
    pub fn new(kernels: Kernels) -> Self {
        Cpu { kernels, ..Cpu::default() }
    }

    /// The same in another precision; dfdx's nodes stay f32.
    pub fn with_precision(self, precision: Precision) -> Self {
        Cpu { ws: self.ws.with_precision(precision), ..self }
    }

    fn on_dfdx(&self, node: &Node) -> bool {
        self.kernels == Kernels::Reference || node.runner == Runner::Dfdx
    }
}

impl Arg<'_, Cpu> {
    pub(super) fn values(&self) -> &[f32] {
        match self {
            Arg::Values { buffer, len, .. } => &buffer[..*len],
            Arg::Ids(_) => &[],
        }
    }

    pub(super) fn ids(&self) -> &[i32] {
        match self {
            Arg::Values { .. } => &[],
            Arg::Ids(ids) => ids,
        }
    }
}

impl Layout for Cpu {}

impl Backend for Cpu {
    type Buffer = Vec<f32>;
    type Ints = Vec<i32>;

    fn fuses(&self) -> bool {
        self.kernels == Kernels::Native
    }

    fn allocate(&mut self, bytes: &[usize]) -> Result<Vec<Vec<f32>>, BackendError> {
        Ok(bytes.iter().map(|b| vec![0.0; b / size_of::<f32>()]).collect())
    }

    fn upload(&mut self, values: &[f32], _: Dtype, buffer: &mut Vec<f32>) {
        if buffer.len() < values.len() {
            *buffer = vec![0.0; values.len()];
        }
        buffer[..values.len()].copy_from_slice(values);
    }

    fn upload_ints(&mut self, values: &[i32], ids: &mut Vec<i32>) {
        ids.clear();
        ids.extend_from_slice(values);
    }

    fn view<'a>(&self, part: Part<'a, Self>) -> Cow<'a, [f32]> {
        Cow::Borrowed(&part.buffer[part.start..][..part.len])
    }

    fn copy(&mut self, from: Part<'_, Self>, to: &mut Vec<f32>, _: Dtype, start: usize, add: bool) {
        let from = &from.buffer[from.start..][..from.len];
        elementwise::copy_or_add(from, &mut to[start..][..from.len()], add);
    }

    fn forward(&mut self, id: ValueId, node: &Node, io: Forward<'_, Self>) -> Result<(), BackendError> {
        let Some(op) = node.op() else { return Ok(()) };
        let y = &mut io.out[..node.numel()];
        if self.on_dfdx(node) {
            let ran = reference::run(op, io.ins, io.keep).map_err(|e| failed(node, op, e.to_string()))?;
            y.copy_from_slice(&ran.value);
            for (to, from) in io.saved.iter_mut().zip(ran.saved) {
                to[..from.len()].copy_from_slice(&from);
            }
            if let Some(tape) = ran.pullback {
                self.tapes.insert(id, tape);
            }
            return Ok(());
        }
        if op.is_of_parts() {
            let ran = self.run_parts(node, op, io.ins)?;
            y.copy_from_slice(ran.last().map_or(&[], |r| &r.value));
            return Ok(());
        }
        let ws = &mut self.ws;
        let x = |i: usize| io.ins[i].values();
        let saved = io.saved;
        match op {
            Op::Conv2d(d) => conv::conv2d_forward(d, x(0), x(1), io.ins.get(2).map(Arg::values), y, ws),
            Op::FusedConv(f) => fused_conv(f, io.ins, y, &mut self.folded, ws),
            Op::Linear(d) => linear::linear_forward(d, x(0), x(1), io.ins.get(2).map(Arg::values), y, ws),
            Op::MatMul { dims, alpha } => gemm::gemm(dims, *alpha, x(0), x(1), 0.0, y, ws),
            Op::BatchNorm { dims, act, .. } => {
                let [mean, rstd] = pair(saved);
                let (mean, rstd) = (&mut mean[..dims.c], &mut rstd[..dims.c]);
                norm::batch_norm_train_forward(dims, *act, x(0), x(1), x(2), y, mean, rstd, ws);
            }
            Op::BatchNormEval { dims, act } => {
                norm::batch_norm_eval_forward(dims, *act, x(0), x(1), x(2), x(3), x(4), y);
            }
            Op::LayerNorm(d) => {
                let [mean, rstd] = pair(saved);
                norm::layer_norm_forward(d, x(0), x(1), x(2), y, &mut mean[..d.rows], &mut rstd[..d.rows]);
            }
            Op::GroupNorm(d) => {
                let [mean, rstd] = pair(saved);
                let (mean, rstd) = (&mut mean[..d.batch], &mut rstd[..d.batch]);
                norm::group_norm_forward(d, x(0), x(1), x(2), y, mean, rstd, ws);
            }
            Op::Activation(a) => activation::activation_forward(*a, x(0), y),
            Op::Attention(d) => {
                let probs = d.batch * d.heads * d.tokens * d.tokens;
                attention::attention_forward(d, x(0), y, &mut saved[0][..probs], ws);
            }
            Op::MaskedAttention(d) => {
                let probs = d.batch * d.heads * d.tokens * d.tokens;
                attention::masked_attention_forward(d, x(0), io.ins[1].ids(), y, &mut saved[0][..probs], ws);
            }
            Op::AttentionPool(d) => {
                let probs = &mut saved[0][..d.batch * d.heads * d.tokens];
                attention_pool::attention_pool_forward(d, x(0), x(1), y, probs, ws);
            }
            Op::TokenConv(d) => token_conv::token_conv_forward(d, x(0), x(1), y, ws),
            Op::SigmoidLoss(d) => {
                y[0] = sigmoid_loss::sigmoid_loss_forward(d, x(0), x(1), x(2)[0], x(3)[0], x(4), ws);
            }
            Op::AttentionMap(d) => attention::attention_map_forward(d, x(0), y, ws),
            Op::SeparableAttention(d) => {
                let [p, context] = pair(saved);
                let (p, context) = (&mut p[..d.batch * d.tokens], &mut context[..d.batch * d.dim]);
                separable::separable_attention_forward(d, x(0), y, p, context);
            }
            Op::Add => elementwise::add(x(0), x(1), y),
            Op::AddBroadcast => elementwise::add_broadcast(x(0), x(1), y),
            Op::Mul => elementwise::mul(x(0), x(1), y),
            Op::ScaleChannels { batch, hw, c } => {
                elementwise::channel_scale_forward(*batch, *hw, *c, x(0), x(1), y);
            }
            Op::ScaleSamples { batch, len } => elementwise::scale_samples(*batch, *len, x(0), x(1), y, false),
            Op::Scale(s) => elementwise::scale(x(0), *s, y),
            Op::Exp => elementwise::exp(x(0), y),
            Op::Unfold(d) => layout::unfold_patches(d, x(0), y, false),
            Op::Fold(d) => layout::fold_patches(d, x(0), y, false),
            Op::GlobalAvgPool { batch, hw, c } => pooling::global_avg_pool_forward(*batch, *hw, *c, x(0), y),
            Op::AvgPool(d) => pooling::avg_pool_forward(d, x(0), y),
            Op::MaxPool(d) => {
                let winners = &mut saved[0][..y.len()];
                pooling::max_pool_forward(d, x(0), y, winners);
            }
            Op::Resize(d) => resize::resize_bilinear_forward(d, x(0), y),
            Op::Embedding { width } => embedding::embedding_forward(x(0), *width, io.ins[1].ids(), y),
            Op::GatherRows { batch, tokens, width } => {
                embedding::gather_rows_forward(*batch, *tokens, *width, io.ins[1].ids(), x(0), y);
            }
            Op::ConcatLast { rows, ca, cb } => layout::concat_last_forward(*rows, *ca, *cb, x(0), x(1), y),
            Op::PrependToken { batch, tokens, width } => {
                layout::prepend_token_forward(*batch, *tokens, *width, x(0), x(1), y);
            }
            Op::SliceRows { batch, tokens, width, start, len } => {
                layout::slice_rows_forward(*batch, *tokens, *width, *start, *len, x(0), y);
            }
            Op::Permute { shape, axes } => layout::permute(shape, axes, x(0), y, false),
            Op::L2Normalize { rows, c } => {
                elementwise::l2_normalize_forward(*rows, *c, x(0), y, &mut saved[0][..*rows]);
            }
            Op::Softmax { rows, c, temperature } => softmax::softmax_rows_forward(*rows, *c, *temperature, x(0), y),
            Op::Contrastive(d) => y[0] = loss::contrastive_forward(d, x(0), x(1), x(2)[0], x(3), x(4), ws),
            Op::Relational(d) => {
                if d.rows != d.cols {
                    return Err(failed(node, op, "the CPU holds all rows in one process"));
                }
                let (targets, teachers) = pairs(io.ins);
                relational::relational_forward(d, x(0), x(1), x(2)[0], &targets, &teachers, y, ws);
            }
            Op::Mse => y[0] = loss::mse_forward(x(0), x(1)),
            Op::Cosine { rows, c } => y[0] = loss::cosine_forward(*rows, *c, x(0), x(1)),
            Op::KlRows { rows, c } => y[0] = loss::kl_rows_forward(*rows, *c, x(0), x(1)),
            Op::AttentionTransferMap { batch, hw, c } => {
                loss::attention_transfer_forward(*batch, *hw, *c, x(0), y);
            }
            Op::RowLoss { .. } | Op::TransferLoss { .. } | Op::MapLoss { .. } | Op::PixelLoss { .. } => {
                unreachable!("run in parts above")
            }
        }
        Ok(())
    }

    fn vjp(&mut self, id: ValueId, node: &Node, io: Vjp<'_, Self>) -> Result<(), BackendError> {
        let Some(op) = node.op() else { return Ok(()) };
        let dy = &io.dout[..node.numel()];
        if let Some(tape) = self.tapes.remove(&id) {
            let found = tape(dy);
            for (i, target) in io.grads.iter_mut().enumerate() {
                let Some(target) = target else { continue };
                let Some(grad) = found.get(i).filter(|g| g.len() == target.len) else {
                    return Err(failed(node, op, format!("dfdx gave no gradient for argument {i}")));
                };
                elementwise::copy_or_add(grad, &mut target.buffer[..target.len], target.accumulate);
            }
            return Ok(());
        }
        if op.is_of_parts() {
            return self.parts_vjp(node, op, io);
        }
        vjp::run(op, node, io, &mut self.ws);
        Ok(())
    }

    fn running_statistics(&mut self, dims: &Norm, momentum: f32, batch: [&Vec<f32>; 2], running: [&mut Vec<f32>; 2]) {
        let [mean, rstd] = batch;
        let [running_mean, running_var] = running;
        let c = dims.c;
        norm::batch_norm_update_running(dims, momentum, &mean[..c], &rstd[..c], running_mean, running_var);
    }
}

/// A convolution with its batch norm folded in, then bias, residual and activation in one pass.
fn fused_conv(
    f: &FusedConv,
    ins: &[Arg<'_, Cpu>],
    y: &mut [f32],
    [weights, offset]: &mut [Vec<f32>; 2],
    ws: &mut Workspace,
) {
    let mut rest = ins[2..].iter().map(Arg::values);
    let (x, w) = (ins[0].values(), ins[1].values());
    let bias = if f.bias { rest.next() } else { None };
    let (w, bias) = match f.norm {
        Some(eps) => {
            let [gamma, beta, mean, var] = std::array::from_fn(|_| rest.next().unwrap_or_default());
            norm::fold_batch_norm(w, bias, gamma, beta, mean, var, eps, weights, offset);
            (&weights[..], Some(&offset[..]))
        }
        None => (w, bias),
    };
    let residual = if f.residual { rest.next() } else { None };
    conv::conv2d_fused_forward(&f.conv, x, w, &Epilogue { bias, residual, act: f.act }, y, ws);
}

/// Each teacher's u and v.
type Embeddings<'a> = Vec<(&'a [f32], &'a [f32])>;

/// Targets and teachers of [`Op::Relational`].
fn pairs<'a>(ins: &'a [Arg<'a, Cpu>]) -> (PairTargets<'a>, Embeddings<'a>) {
    let x = |i: usize| ins[i].values();
    let targets = PairTargets {
        own: ins[3].ids(),
        other: ins[4].ids(),
        keep: x(5),
        group: ins[6].ids(),
        share: x(7),
        column_total: x(8),
    };
    (targets, ins[9..].chunks_exact(2).map(|side| (side[0].values(), side[1].values())).collect())
}

fn pair(saved: &mut [Vec<f32>]) -> [&mut Vec<f32>; 2] {
    match saved {
        [a, b] => [a, b],
        _ => unreachable!("Op::saved gives these ops two tensors"),
    }
}

fn failed(node: &Node, op: &Op, reason: impl Into<String>) -> BackendError {
    BackendError { op: op.name(), label: node.label.clone(), reason: reason.into() }
}
