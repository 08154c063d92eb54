//! The CPU backend: dispatches each op to its kernel, or to dfdx.

use std::borrow::Cow;
use std::collections::HashMap;

use mcpipe_cpu::norm::{self, Norm};
use mcpipe_cpu::{
    Epilogue, Workspace, activation, attention, conv, elementwise, embedding, gemm, layout, linear, loss, pooling,
    resize, softmax,
};

use super::reference::{self, Tape};
use super::{Arg, Backend, BackendError, Forward, GradOut, Kernels, Vjp};
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

    fn on_dfdx(&self, node: &Node) -> bool {
        self.kernels == Kernels::Reference || node.runner == Runner::Dfdx
    }
}

impl Arg<'_, Cpu> {
    pub(super) fn values(&self) -> &[f32] {
        match self {
            Arg::F32 { buffer, len } => &buffer[..*len],
            Arg::I32(_) => &[],
        }
    }

    pub(super) fn ids(&self) -> &[i32] {
        match self {
            Arg::F32 { .. } => &[],
            Arg::I32(ids) => ids,
        }
    }
}

/// Two gradient targets at once; a kernel that computes one pass for several asks for each in turn.
struct Targets<'g, 'a>(&'g mut [Option<GradOut<'a, Cpu>>]);

impl Targets<'_, '_> {
    /// Gradient of argument `i`: its slice and whether to add.
    fn get(&mut self, i: usize) -> Option<(&mut [f32], bool)> {
        self.0.get_mut(i)?.as_mut().map(|g| (&mut g.buffer[..g.len], g.accumulate))
    }

    fn wants(&self, i: usize) -> bool {
        self.0.get(i).is_some_and(Option::is_some)
    }

    /// Takes argument `i`'s target out, so that several can be held at once.
    fn take(&mut self, i: usize) -> Vec<f32> {
        self.0.get_mut(i).and_then(Option::as_mut).map(|g| std::mem::take(g.buffer)).unwrap_or_default()
    }

    /// As [`take`](Self::take), made `len` long where nobody wants the gradient.
    fn take_at_least(&mut self, i: usize, len: usize) -> Vec<f32> {
        let mut buffer = self.take(i);
        if buffer.len() < len {
            buffer.resize(len, 0.0);
        }
        buffer
    }

    fn put(&mut self, i: usize, buffer: Vec<f32>) {
        if let Some(g) = self.0.get_mut(i).and_then(Option::as_mut) {
            *g.buffer = buffer;
        }
    }

    fn len(&self, i: usize) -> usize {
        self.0.get(i).and_then(Option::as_ref).map_or(0, |g| g.len)
    }

    fn accumulate(&self, i: usize) -> bool {
        self.0.get(i).and_then(Option::as_ref).is_some_and(|g| g.accumulate)
    }
}

impl Backend for Cpu {
    type Buffer = Vec<f32>;
    type Ints = Vec<i32>;

    fn fuses(&self) -> bool {
        self.kernels == Kernels::Native
    }

    fn grow(&mut self, buffer: &mut Vec<f32>, len: usize) {
        if buffer.len() < len {
            *buffer = vec![0.0; len];
        }
    }

    fn upload(&mut self, values: &[f32], buffer: &mut Vec<f32>) {
        self.grow(buffer, values.len());
        buffer[..values.len()].copy_from_slice(values);
    }

    fn upload_ints(&mut self, values: &[i32], ids: &mut Vec<i32>) {
        ids.clear();
        ids.extend_from_slice(values);
    }

    fn view<'a>(&self, buffer: &'a Vec<f32>, len: usize) -> Cow<'a, [f32]> {
        Cow::Borrowed(&buffer[..len])
    }

    fn forward(&mut self, id: ValueId, node: &Node, io: Forward<'_, Self>) -> Result<(), BackendError> {
        let Some(op) = node.op() else { return Ok(()) };
        check_ids(node, op, io.ins)?;
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
            Op::Activation(a) => activation::activation_forward(*a, x(0), y),
            Op::Attention(d) => {
                let probs = d.batch * d.heads * d.tokens * d.tokens;
                attention::attention_forward(d, x(0), y, &mut saved[0][..probs], ws);
            }
            Op::AttentionMap(d) => attention::attention_map_forward(d, x(0), y, ws),
            Op::Add => elementwise::add(x(0), x(1), y),
            Op::AddBroadcast => elementwise::add_broadcast(x(0), x(1), y),
            Op::Mul => elementwise::mul(x(0), x(1), y),
            Op::Scale(s) => elementwise::scale(x(0), *s, y),
            Op::Exp => elementwise::exp(x(0), y),
            Op::Unfold(d) => layout::unfold_patches(d, x(0), y, false),
            Op::Fold(d) => layout::fold_patches(d, x(0), y, false),
            Op::GlobalAvgPool { batch, hw, c } => pooling::global_avg_pool_forward(*batch, *hw, *c, x(0), y),
            Op::AvgPool(d) => pooling::avg_pool_forward(d, x(0), y),
            Op::Resize { from, to } => {
                resize::resize_bilinear_forward(from.batch, from.h, from.w, from.c, to[0], to[1], x(0), y);
            }
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
            Op::Mse => y[0] = loss::mse_forward(x(0), x(1)),
            Op::Cosine { rows, c } => y[0] = loss::cosine_forward(*rows, *c, x(0), x(1)),
            Op::KlRows { rows, c } => y[0] = loss::kl_rows_forward(*rows, *c, x(0), x(1)),
            Op::AttentionTransferMap { batch, hw, c } => {
                loss::attention_transfer_forward(*batch, *hw, *c, x(0), y);
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
        let x = |i: usize| io.ins[i].values();
        let mut g = Targets(io.grads);
        let ws = &mut self.ws;
        let y = io.out.map_or(&[][..], |out| &out[..node.numel()]);
        let saved = io.saved;
        match op {
            Op::Conv2d(d) => {
                if let Some((dx, add)) = g.get(0) {
                    conv::conv2d_backward_data(d, x(1), dy, dx, add, ws);
                }
                weights_vjp(&mut g, |dw, db| conv::conv2d_backward_weights(d, x(0), dy, dw, db, ws));
            }
            Op::Linear(d) => {
                if let Some((dx, add)) = g.get(0) {
                    linear::linear_backward_data(d, x(1), dy, dx, add, ws);
                }
                weights_vjp(&mut g, |dw, db| linear::linear_backward_weights(d, x(0), dy, dw, db, ws));
            }
            Op::MatMul { dims: d, alpha } => matmul_vjp(d, *alpha, x(0), x(1), dy, &mut g, ws),
            Op::BatchNorm { dims, act, .. } => {
                let (mean, rstd) = (&saved[0][..dims.c], &saved[1][..dims.c]);
                norm_vjp(&mut g, dims, |dx, add, dgamma, dbeta| {
                    norm::batch_norm_train_backward(
                        dims,
                        *act,
                        x(0),
                        x(1),
                        x(2),
                        mean,
                        rstd,
                        dy,
                        dx,
                        add,
                        dgamma,
                        dbeta,
                        ws,
                    );
                });
            }
            Op::BatchNormEval { dims, act } => norm_vjp(&mut g, dims, |dx, add, dgamma, dbeta| {
                norm::batch_norm_eval_backward(
                    dims,
                    *act,
                    x(0),
                    x(1),
                    x(2),
                    x(3),
                    x(4),
                    dy,
                    dx,
                    add,
                    dgamma,
                    dbeta,
                    ws,
                );
            }),
            Op::LayerNorm(d) => {
                let (mean, rstd) = (&saved[0][..d.rows], &saved[1][..d.rows]);
                norm_vjp(&mut g, d, |dx, add, dgamma, dbeta| {
                    norm::layer_norm_backward(d, x(0), x(1), mean, rstd, dy, dx, add, dgamma, dbeta, ws);
                });
            }
            _ => vjp_simple(op, node, x, y, saved, dy, &mut g, io.ins, ws),
        }
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

/// VJPs with one or two plain targets.
fn vjp_simple<'a>(
    op: &Op,
    node: &Node,
    x: impl Fn(usize) -> &'a [f32],
    y: &[f32],
    saved: &[Vec<f32>],
    dy: &[f32],
    g: &mut Targets<'_, '_>,
    ins: &[Arg<'_, Cpu>],
    ws: &mut Workspace,
) {
    // Losses have two or three targets and a scalar gradient.
    if matches!(op, Op::Contrastive(_) | Op::Mse | Op::Cosine { .. } | Op::KlRows { .. }) {
        return loss_vjp(op, x, dy[0], g, ws);
    }
    match op {
        Op::Add => {
            for i in 0..2 {
                if let Some((d, add)) = g.get(i) {
                    elementwise::copy_or_add(dy, d, add);
                }
            }
            return;
        }
        Op::AddBroadcast => {
            if let Some((d, add)) = g.get(0) {
                elementwise::copy_or_add(dy, d, add);
            }
            if let Some((d, add)) = g.get(1) {
                if !add {
                    d.fill(0.0);
                }
                elementwise::add_broadcast_backward(dy, d, ws);
            }
            return;
        }
        Op::Mul => {
            if let Some((d, add)) = g.get(0) {
                elementwise::mul_backward(x(1), dy, d, add);
            }
            if let Some((d, add)) = g.get(1) {
                elementwise::mul_backward(x(0), dy, d, add);
            }
            return;
        }
        Op::ConcatLast { rows, ca, cb } => {
            for i in 0..2 {
                if let Some((d, add)) = g.get(i) {
                    layout::concat_last_backward(*rows, *ca, *cb, i, dy, d, add);
                }
            }
            return;
        }
        Op::PrependToken { batch, tokens, width } => {
            if let Some((d, add)) = g.get(0) {
                if !add {
                    d.fill(0.0);
                }
                layout::prepend_token_backward_token(*batch, *tokens, *width, dy, d);
            }
            if let Some((d, add)) = g.get(1) {
                layout::slice_rows_forward_or_add(*batch, *tokens + 1, *width, 1, *tokens, dy, d, add);
            }
            return;
        }
        _ => {}
    }
    let Some((dx, add)) = g.get(0) else { return };
    match op {
        Op::Activation(a) => activation::activation_backward(*a, x(0), dy, dx, add),
        Op::Attention(d) => {
            let probs = d.batch * d.heads * d.tokens * d.tokens;
            attention::attention_backward(d, x(0), &saved[0][..probs], dy, dx, add, ws);
        }
        Op::AttentionMap(d) => attention::attention_map_backward(d, x(0), y, dy, dx, add, ws),
        Op::Scale(s) => elementwise::scale_backward(*s, dy, dx, add),
        Op::Exp => elementwise::mul_backward(y, dy, dx, add),
        Op::Unfold(d) => layout::fold_patches(d, dy, dx, add),
        Op::Fold(d) => layout::unfold_patches(d, dy, dx, add),
        Op::GlobalAvgPool { batch, hw, c } => pooling::global_avg_pool_backward(*batch, *hw, *c, dy, dx, add),
        Op::AvgPool(d) => pooling::avg_pool_backward(d, dy, dx, add),
        Op::Resize { from, to } => {
            resize::resize_bilinear_backward(from.batch, from.h, from.w, from.c, to[0], to[1], dy, dx, add);
        }
        Op::Embedding { width } => {
            if !add {
                dx.fill(0.0);
            }
            embedding::embedding_backward(*width, ins[1].ids(), dy, dx);
        }
        Op::GatherRows { batch, tokens, width } => {
            embedding::gather_rows_backward(*batch, *tokens, *width, ins[1].ids(), dy, dx, add);
        }
        Op::SliceRows { batch, tokens, width, start, len } => {
            layout::slice_rows_backward(*batch, *tokens, *width, *start, *len, dy, dx, add);
        }
        Op::Permute { shape, axes } => {
            // The inverse order brings the gradient back.
            let mut inverse = vec![0; axes.len()];
            axes.iter().enumerate().for_each(|(i, &a)| inverse[a] = i);
            let from: Vec<usize> = axes.iter().map(|&a| shape[a]).collect();
            layout::permute(&from, &inverse, dy, dx, add);
        }
        Op::L2Normalize { rows, c } => {
            elementwise::l2_normalize_backward(*rows, *c, y, &saved[0][..*rows], dy, dx, add);
        }
        Op::Softmax { rows, c, temperature } => {
            softmax::softmax_rows_backward(*rows, *c, *temperature, y, dy, dx, add);
        }
        Op::AttentionTransferMap { batch, hw, c } => {
            loss::attention_transfer_backward(*batch, *hw, *c, x(0), dy, dx, add);
        }
        _ => debug_assert!(false, "{} at {} has its own arm", op.name(), node.label),
    }
}

fn loss_vjp<'a>(op: &Op, x: impl Fn(usize) -> &'a [f32], dl: f32, g: &mut Targets<'_, '_>, ws: &mut Workspace) {
    match op {
        Op::Contrastive(d) => {
            let lens = [d.rows * d.dim, d.cols * d.dim, 1];
            let mut found = lens.map(|n| vec![0.0; n]);
            let [da, db, ds] = &mut found;
            loss::contrastive_backward(d, x(0), x(1), x(2)[0], x(3), x(4), dl, da, db, &mut ds[0], ws);
            for (i, grad) in found.iter().enumerate() {
                if let Some((to, add)) = g.get(i) {
                    elementwise::copy_or_add(grad, to, add);
                }
            }
        }
        Op::Mse => {
            if let Some((d, add)) = g.get(0) {
                loss::mse_backward(x(0), x(1), dl, d, add);
            }
            if let Some((d, add)) = g.get(1) {
                loss::mse_backward(x(1), x(0), dl, d, add);
            }
        }
        Op::Cosine { rows, c } => {
            if let Some((d, add)) = g.get(0) {
                loss::cosine_backward(*rows, *c, x(0), x(1), dl, d, add);
            }
            if let Some((d, add)) = g.get(1) {
                loss::cosine_backward(*rows, *c, x(1), x(0), dl, d, add);
            }
        }
        Op::KlRows { rows, c } => {
            if let Some((d, add)) = g.get(1) {
                loss::kl_rows_backward(*rows, *c, x(0), x(1), dl, d, add);
            }
        }
        _ => {}
    }
}

fn matmul_vjp(
    d: &gemm::Gemm,
    alpha: f32,
    a: &[f32],
    b: &[f32],
    dy: &[f32],
    g: &mut Targets<'_, '_>,
    ws: &mut Workspace,
) {
    let beta = |add: bool| if add { 1.0 } else { 0.0 };
    if let Some((da, add)) = g.get(0) {
        // C = op(A)·op(B): dop(A) = dC·op(B)ᵀ, transposed where A was.
        let dims = gemm::Gemm { m: d.m, n: d.k, k: d.n, trans_a: false, trans_b: !d.trans_b };
        if d.trans_a {
            let t = gemm::Gemm { m: d.k, n: d.m, k: d.n, trans_a: d.trans_b, trans_b: true };
            gemm::gemm(&t, alpha, b, dy, beta(add), da, ws);
        } else {
            gemm::gemm(&dims, alpha, dy, b, beta(add), da, ws);
        }
    }
    if let Some((db, add)) = g.get(1) {
        if d.trans_b {
            let t = gemm::Gemm { m: d.n, n: d.k, k: d.m, trans_a: true, trans_b: d.trans_a };
            gemm::gemm(&t, alpha, dy, a, beta(add), db, ws);
        } else {
            let dims = gemm::Gemm { m: d.k, n: d.n, k: d.m, trans_a: !d.trans_a, trans_b: false };
            gemm::gemm(&dims, alpha, a, dy, beta(add), db, ws);
        }
    }
}

/// Runs the VJP of a layer's weight and bias, which adds to both. They may be values, to be overwritten at first.
fn weights_vjp(g: &mut Targets<'_, '_>, run: impl FnOnce(&mut [f32], Option<&mut [f32]>)) {
    if !g.wants(1) {
        return;
    }
    for i in [1, 2] {
        if let Some((grad, false)) = g.get(i) {
            grad.fill(0.0);
        }
    }
    let (n, bias) = (g.len(1), g.wants(2).then(|| g.len(2)));
    let (mut dw, mut db) = (g.take(1), g.take(2));
    run(&mut dw[..n], bias.map(|m| &mut db[..m]));
    g.put(1, dw);
    g.put(2, db);
}

/// Runs a norm's VJP, whose three gradients come from one pass; targets that nobody wants go to scratch.
fn norm_vjp(g: &mut Targets<'_, '_>, d: &Norm, run: impl FnOnce(&mut [f32], bool, &mut [f32], &mut [f32])) {
    let (len, add) = (d.rows * d.c, g.accumulate(0));
    let mut dx = g.take_at_least(0, len);
    let [mut dgamma, mut dbeta] = [g.take_at_least(1, d.c), g.take_at_least(2, d.c)];
    run(&mut dx[..len], add, &mut dgamma[..d.c], &mut dbeta[..d.c]);
    g.put(0, dx);
    g.put(1, dgamma);
    g.put(2, dbeta);
}

fn pair(saved: &mut [Vec<f32>]) -> [&mut Vec<f32>; 2] {
    match saved {
        [a, b] => [a, b],
        _ => unreachable!("Op::saved gives a norm two tensors"),
    }
}

fn failed(node: &Node, op: &Op, reason: impl Into<String>) -> BackendError {
    BackendError { op: op.name(), label: node.label.clone(), reason: reason.into() }
}

/// Ids come from data: refuse those outside the table before a kernel reads there.
fn check_ids(node: &Node, op: &Op, ins: &[Arg<'_, Cpu>]) -> Result<(), BackendError> {
    let rows = match op {
        Op::Embedding { width } => ins[0].values().len() / (*width).max(1),
        Op::GatherRows { tokens, .. } => *tokens,
        _ => return Ok(()),
    };
    match ins[1].ids().iter().find(|&&i| usize::try_from(i).map_or(true, |i| i >= rows)) {
        Some(bad) => Err(failed(node, op, format!("id {bad} lies outside 0..{rows}"))),
        None => Ok(()),
    }
}
