//! The VJP of each op by its kernel.

use mcpipe_cpu::{
    Workspace, activation, attention, attention_pool, conv, elementwise, embedding, gemm, layout, linear, loss, norm,
    pooling, relational, resize, separable, sigmoid_loss, softmax, token_conv,
};

use super::Cpu;
use crate::backend::{Arg, GradOut, Vjp};
use crate::graph::Node;
use crate::op::Op;

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

/// Runs the VJP of `node`.
pub(super) fn run(op: &Op, node: &Node, io: Vjp<'_, Cpu>, ws: &mut Workspace) {
    let dy = &io.dout[..node.numel()];
    let x = |i: usize| io.ins[i].values();
    let mut g = Targets(io.grads);
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
        Op::TokenConv(d) => {
            if let Some((dx, add)) = g.get(0) {
                token_conv::token_conv_backward_data(d, x(1), dy, dx, add, ws);
            }
            weights_vjp(&mut g, |dw, _| token_conv::token_conv_backward_weights(d, x(0), dy, dw, ws));
        }
        Op::AttentionPool(d) => {
            let probs = &saved[0][..d.batch * d.heads * d.tokens];
            let (width, add) = (d.heads * d.head_dim, g.accumulate(1));
            if let Some((dq, false)) = g.get(0) {
                dq.fill(0.0);
            }
            let len = 2 * d.batch * d.tokens * width;
            let (mut dq, mut dkv) = (g.take_at_least(0, width), g.take_at_least(1, len));
            let (to_q, to_kv) = (&mut dq[..width], &mut dkv[..len]);
            attention_pool::attention_pool_backward(d, x(0), x(1), probs, dy, to_kv, add, to_q, ws);
            g.put(0, dq);
            g.put(1, dkv);
        }
        Op::MatMul { dims: d, alpha } => matmul_vjp(d, *alpha, x(0), x(1), dy, &mut g, ws),
        Op::BatchNorm { dims, act, .. } => {
            let (mean, rstd) = (&saved[0][..dims.c], &saved[1][..dims.c]);
            norm_vjp(&mut g, [dims.rows * dims.c, dims.c], |dx, add, dgamma, dbeta| {
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
        Op::BatchNormEval { dims, act } => norm_vjp(&mut g, [dims.rows * dims.c, dims.c], |dx, add, dgamma, dbeta| {
            norm::batch_norm_eval_backward(dims, *act, x(0), x(1), x(2), x(3), x(4), dy, dx, add, dgamma, dbeta, ws);
        }),
        Op::LayerNorm(d) => {
            let (mean, rstd) = (&saved[0][..d.rows], &saved[1][..d.rows]);
            norm_vjp(&mut g, [d.rows * d.c, d.c], |dx, add, dgamma, dbeta| {
                norm::layer_norm_backward(d, x(0), x(1), mean, rstd, dy, dx, add, dgamma, dbeta, ws);
            });
        }
        Op::GroupNorm(d) => {
            let (mean, rstd) = (&saved[0][..d.batch], &saved[1][..d.batch]);
            norm_vjp(&mut g, [d.batch * d.rows * d.c, d.c], |dx, add, dgamma, dbeta| {
                norm::group_norm_backward(d, x(0), x(1), mean, rstd, dy, dx, add, dgamma, dbeta, ws);
            });
        }
        _ => vjp_simple(op, node, x, y, saved, dy, &mut g, io.ins, ws),
    }
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
    if let Op::Relational(d) = op {
        let (targets, teachers) = super::pairs(ins);
        let mut found = [d.rows * d.dim, d.cols * d.dim, 1].map(|n| vec![0.0; n]);
        let [da, db, ds] = &mut found;
        let (scale, dl) = (x(2)[0], [dy[0], dy[1]]);
        relational::relational_backward(d, x(0), x(1), scale, &targets, &teachers, dl, da, db, &mut ds[0], ws);
        for (i, grad) in found.iter().enumerate() {
            if let Some((to, add)) = g.get(i) {
                elementwise::copy_or_add(grad, to, add);
            }
        }
        return;
    }
    // Losses have two or three targets and a scalar gradient.
    if matches!(op, Op::Contrastive(_) | Op::SigmoidLoss(_) | Op::Mse | Op::Cosine { .. } | Op::KlRows { .. }) {
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
        Op::ScaleChannels { batch, hw, c } => {
            let (nx, ns) = (batch * hw * c, batch * c);
            let (add_x, add_s) = (g.accumulate(0), g.accumulate(1));
            let (mut dx, mut ds) = (g.take_at_least(0, nx), g.take_at_least(1, ns));
            let (to_x, to_s) = (&mut dx[..nx], &mut ds[..ns]);
            elementwise::channel_scale_backward(*batch, *hw, *c, x(0), x(1), dy, to_x, add_x, to_s, add_s, ws);
            g.put(0, dx);
            g.put(1, ds);
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
        Op::Attention(d) | Op::MaskedAttention(d) => {
            let probs = d.batch * d.heads * d.tokens * d.tokens;
            attention::attention_backward(d, x(0), &saved[0][..probs], dy, dx, add, ws);
        }
        Op::AttentionMap(d) => attention::attention_map_backward(d, x(0), y, dy, dx, add, ws),
        Op::SeparableAttention(d) => {
            let (p, context) = (&saved[0][..d.batch * d.tokens], &saved[1][..d.batch * d.dim]);
            separable::separable_attention_backward(d, x(0), p, context, dy, dx, add, ws);
        }
        Op::ScaleSamples { batch, len } => elementwise::scale_samples(*batch, *len, dy, x(1), dx, add),
        Op::Scale(s) => elementwise::scale_backward(*s, dy, dx, add),
        Op::Exp => elementwise::mul_backward(y, dy, dx, add),
        Op::Unfold(d) => layout::fold_patches(d, dy, dx, add),
        Op::Fold(d) => layout::unfold_patches(d, dy, dx, add),
        Op::GlobalAvgPool { batch, hw, c } => pooling::global_avg_pool_backward(*batch, *hw, *c, dy, dx, add),
        Op::AvgPool(d) => pooling::avg_pool_backward(d, dy, dx, add),
        Op::MaxPool(d) => pooling::max_pool_backward(d, &saved[0][..dy.len()], dy, dx, add),
        Op::Resize(d) => resize::resize_bilinear_backward(d, dy, dx, add),
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
        Op::SigmoidLoss(d) => {
            let lens = [d.rows * d.dim, d.cols * d.dim, 1, 1];
            let mut found = lens.map(|n| vec![0.0; n]);
            let [da, db, ds, dc] = &mut found;
            let (scale, bias, to) = (x(2)[0], x(3)[0], [&mut ds[0], &mut dc[0]]);
            sigmoid_loss::sigmoid_loss_backward(d, x(0), x(1), scale, bias, x(4), dl, da, db, to, ws);
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

/// Runs a norm's VJP over `len` values of `c` channels, whose three gradients come from one pass; targets that nobody
/// wants go to scratch.
fn norm_vjp(g: &mut Targets<'_, '_>, [len, c]: [usize; 2], run: impl FnOnce(&mut [f32], bool, &mut [f32], &mut [f32])) {
    let add = g.accumulate(0);
    let mut dx = g.take_at_least(0, len);
    let [mut dgamma, mut dbeta] = [g.take_at_least(1, c), g.take_at_least(2, c)];
    run(&mut dx[..len], add, &mut dgamma[..c], &mut dbeta[..c]);
    g.put(0, dx);
    g.put(1, dgamma);
    g.put(2, dbeta);
}
