//! Runs an op by this crate's kernels and by dfdx, and compares values and VJPs.

use mcpipe_cpu::bridge::{self, Op, Real};
use mcpipe_cpu::relational::{self, PairTargets};
use mcpipe_cpu::{
    Workspace, activation, attention, attention_pool, conv, elementwise, embedding, gemm, layout, linear, loss, norm,
    pooling, resize, separable, sigmoid_loss, softmax, token_conv,
};

/// Numbers in (−1, 1) from a counter (SplitMix64), different for each seed.
pub fn random(len: usize, seed: u64) -> Vec<f32> {
    (0..len as u64)
        .map(|i| {
            let mut z = (seed << 32 | i).wrapping_add(0x9e37_79b9_7f4a_7c15).wrapping_mul(0xbf58_476d_1ce4_e5b9);
            z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
            ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// Each teacher's u and v.
type Embeddings<'a> = Vec<(&'a [f32], &'a [f32])>;

/// Targets and teachers of the relational op, from its tensor arguments.
fn pairs<'a>(op: &Op<'a>, inputs: &'a [Vec<f32>]) -> (PairTargets<'a>, Embeddings<'a>) {
    let Op::Relational { own, other, group, .. } = *op else { unreachable!("asked for that op only") };
    let x = |i: usize| inputs[i].as_slice();
    let targets = PairTargets { own, other, group, keep: x(3), share: x(4), column_total: x(5) };
    (targets, inputs[6..].chunks_exact(2).map(|side| (side[0].as_slice(), side[1].as_slice())).collect())
}

/// What fills an argument.
#[derive(Clone, Copy, Debug)]
pub enum Fill {
    /// Uniform in ±scale around an offset.
    Uniform(f32, f32),
    /// Rows of this length that are probabilities.
    Probabilities(usize),
    /// Rows of this length, one-hot: row i at column i (modulo the length).
    OneHot(usize),
    /// These values over and over.
    Given(&'static [f32]),
    /// Rows of this length and unit norm.
    Unit(usize),
    /// Rows of this length, each ± the same unit vector, so that cosines are ±1.
    Opposed(usize),
}

/// The values of an argument.
pub fn fill(how: Fill, len: usize, seed: u64) -> Vec<f32> {
    let mut x = random(len, seed);
    match how {
        Fill::Uniform(scale, offset) => x.iter_mut().for_each(|v| *v = *v * scale + offset),
        Fill::Probabilities(c) => {
            for row in x.chunks_exact_mut(c) {
                row.iter_mut().for_each(|v| *v = (2.0 * *v).exp());
                let sum: f32 = row.iter().sum();
                row.iter_mut().for_each(|v| *v /= sum);
            }
        }
        Fill::OneHot(c) => {
            for (i, row) in x.chunks_exact_mut(c).enumerate() {
                row.fill(0.0);
                row[i % c] = 1.0;
            }
        }
        Fill::Given(values) => x.iter_mut().zip(values.iter().cycle()).for_each(|(v, given)| *v = *given),
        Fill::Unit(c) => {
            for row in x.chunks_exact_mut(c) {
                let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
                row.iter_mut().for_each(|v| *v /= norm);
            }
        }
        Fill::Opposed(c) => {
            let first = fill(Fill::Unit(c), c, 1);
            for (i, row) in x.chunks_exact_mut(c).enumerate() {
                let sign = if i % 3 == 0 { -1.0 } else { 1.0 };
                row.iter_mut().zip(&first).for_each(|(v, f)| *v = sign * f);
            }
        }
    }
    x
}

/// One row of the table: an op, and how its arguments are filled.
pub struct Case {
    pub name: &'static str,
    pub op: Op<'static>,
    pub inputs: Vec<(usize, Fill)>,
    /// Error allowed, relative to the largest magnitude of what is compared.
    pub tolerance: f64,
}

impl Case {
    pub fn arguments(&self) -> Vec<Vec<f32>> {
        let seeded = self.inputs.iter().enumerate();
        seeded.map(|(i, (len, how))| fill(*how, *len, i as u64 + 7)).collect()
    }
}

pub fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|v| f64::from(*v)).collect()
}

/// Value, saved tensors and gradients by dfdx.
pub fn by_dfdx<E: Real>(op: &Op<'_>, inputs: &[Vec<E>], dy: &[E]) -> (Vec<E>, Vec<Vec<E>>, Vec<Vec<E>>) {
    let slices: Vec<&[E]> = inputs.iter().map(Vec::as_slice).collect();
    let run = bridge::run(op, &slices, true).expect("the table's arguments fit");
    let grads = run.pullback.expect("asked for")(dy);
    (run.value, run.saved, grads)
}

pub fn value_by_dfdx<E: Real>(op: &Op<'_>, inputs: &[Vec<E>]) -> Vec<E> {
    let slices: Vec<&[E]> = inputs.iter().map(Vec::as_slice).collect();
    bridge::run(op, &slices, false).expect("the table's arguments fit").value
}

/// Value and saved tensors by the kernels.
pub fn forward(op: &Op<'_>, inputs: &[Vec<f32>], ws: &mut Workspace) -> (Vec<f32>, Vec<Vec<f32>>) {
    let x = |i: usize| inputs[i].as_slice();
    let slices: Vec<&[f32]> = inputs.iter().map(Vec::as_slice).collect();
    // Only the length is taken from dfdx; NaN where a kernel leaves an element unwritten.
    let mut y = vec![f32::NAN; bridge::run(op, &slices, false).expect("the table's arguments fit").value.len()];
    let y_slice = &mut y[..];
    let mut saved: Vec<Vec<f32>> = Vec::new();
    match *op {
        Op::Activation(a) => activation::activation_forward(a, x(0), y_slice),
        Op::BatchNorm { dims, act } => {
            let (mut mean, mut rstd) = (vec![f32::NAN; dims.c], vec![f32::NAN; dims.c]);
            norm::batch_norm_train_forward(&dims, act, x(0), x(1), x(2), y_slice, &mut mean, &mut rstd, ws);
            saved = vec![mean, rstd];
        }
        Op::BatchNormEval { dims, act } => {
            norm::batch_norm_eval_forward(&dims, act, x(0), x(1), x(2), x(3), x(4), y_slice);
        }
        Op::LayerNorm(d) => {
            let (mut mean, mut rstd) = (vec![f32::NAN; d.rows], vec![f32::NAN; d.rows]);
            norm::layer_norm_forward(&d, x(0), x(1), x(2), y_slice, &mut mean, &mut rstd);
            saved = vec![mean, rstd];
        }
        Op::GroupNorm(d) => {
            let (mut mean, mut rstd) = (vec![f32::NAN; d.batch], vec![f32::NAN; d.batch]);
            norm::group_norm_forward(&d, x(0), x(1), x(2), y_slice, &mut mean, &mut rstd, ws);
            saved = vec![mean, rstd];
        }
        Op::SeparableAttention(d) => {
            let (mut p, mut context) = (vec![f32::NAN; d.batch * d.tokens], vec![f32::NAN; d.batch * d.dim]);
            separable::separable_attention_forward(&d, x(0), y_slice, &mut p, &mut context);
            saved = vec![p, context];
        }
        Op::ScaleSamples { batch, len } => elementwise::scale_samples(batch, len, x(0), x(1), y_slice, false),
        Op::Attention(d) => {
            let mut probs = vec![f32::NAN; d.batch * d.heads * d.tokens * d.tokens];
            attention::attention_forward(&d, x(0), y_slice, &mut probs, ws);
            saved = vec![probs];
        }
        Op::MaskedAttention { dims: d, last } => {
            let mut probs = vec![f32::NAN; d.batch * d.heads * d.tokens * d.tokens];
            attention::masked_attention_forward(&d, x(0), last, y_slice, &mut probs, ws);
            saved = vec![probs];
        }
        Op::AttentionPool(d) => {
            let mut probs = vec![f32::NAN; d.batch * d.heads * d.tokens];
            attention_pool::attention_pool_forward(&d, x(0), x(1), y_slice, &mut probs, ws);
            saved = vec![probs];
        }
        Op::TokenConv(d) => token_conv::token_conv_forward(&d, x(0), x(1), y_slice, ws),
        Op::SigmoidLoss(d) => {
            y[0] = sigmoid_loss::sigmoid_loss_forward(&d, x(0), x(1), x(2)[0], x(3)[0], x(4), ws);
        }
        Op::AttentionMap(d) => attention::attention_map_forward(&d, x(0), y_slice, ws),
        Op::GlobalAvgPool { batch, hw, c } => pooling::global_avg_pool_forward(batch, hw, c, x(0), y_slice),
        Op::MaxPool(d) => {
            // Not compared: dfdx keeps no positions.
            let mut argmax = vec![f32::NAN; y_slice.len()];
            pooling::max_pool_forward(&d, x(0), y_slice, &mut argmax);
        }
        Op::AvgPool(d) => pooling::avg_pool_forward(&d, x(0), y_slice),
        Op::Resize(d) => resize::resize_bilinear_forward(&d, x(0), y_slice),
        Op::Unfold(d) => layout::unfold_patches(&d, x(0), y_slice, false),
        Op::Fold(d) => layout::fold_patches(&d, x(0), y_slice, false),
        Op::Embedding { width, ids } => embedding::embedding_forward(x(0), width, ids, y_slice),
        Op::GatherRows { tokens, width, index } => {
            embedding::gather_rows_forward(index.len(), tokens, width, index, x(0), y_slice);
        }
        Op::ConcatLast { rows, ca, cb } => layout::concat_last_forward(rows, ca, cb, x(0), x(1), y_slice),
        Op::PrependToken { batch, tokens, width } => {
            layout::prepend_token_forward(batch, tokens, width, x(0), x(1), y_slice);
        }
        Op::SliceRows { outer, rows, width, start, count } => {
            layout::slice_rows_forward(outer, rows, width, start, count, x(0), y_slice);
        }
        Op::Permute { shape, perm } => layout::permute(shape, perm, x(0), y_slice, false),
        Op::Add => elementwise::add(x(0), x(1), y_slice),
        Op::AddBroadcast => elementwise::add_broadcast(x(0), x(1), y_slice),
        Op::Mul => elementwise::mul(x(0), x(1), y_slice),
        Op::Scale(s) => elementwise::scale(x(0), s, y_slice),
        Op::Exp => elementwise::exp(x(0), y_slice),
        Op::ChannelScale { batch, hw, c } => {
            elementwise::channel_scale_forward(batch, hw, c, x(0), x(1), y_slice);
        }
        Op::L2Normalize { rows, c } => {
            let mut norm = vec![f32::NAN; rows];
            elementwise::l2_normalize_forward(rows, c, x(0), y_slice, &mut norm);
            saved = vec![norm];
        }
        Op::Softmax { rows, c, temperature } => softmax::softmax_rows_forward(rows, c, temperature, x(0), y_slice),
        Op::LogSoftmax { rows, c, temperature } => {
            softmax::log_softmax_rows_forward(rows, c, temperature, x(0), y_slice);
        }
        Op::Linear(d) => linear::linear_forward(&d, x(0), x(1), inputs.get(2).map(Vec::as_slice), y_slice, ws),
        Op::MatMul { dims, alpha } => gemm::gemm(&dims, alpha, x(0), x(1), 0.0, y_slice, ws),
        Op::Conv2d(d) => conv::conv2d_forward(&d, x(0), x(1), inputs.get(2).map(Vec::as_slice), y_slice, ws),
        Op::Contrastive(d) => y[0] = loss::contrastive_forward(&d, x(0), x(1), x(2)[0], x(3), x(4), ws),
        Op::Relational { dims, .. } => {
            let (targets, teachers) = pairs(op, inputs);
            relational::relational_forward(dims, x(0), x(1), x(2)[0], &targets, &teachers, y_slice, ws);
        }
        Op::Mse => y[0] = loss::mse_forward(x(0), x(1)),
        Op::Cosine { rows, c } => y[0] = loss::cosine_forward(rows, c, x(0), x(1)),
        Op::KlRows { rows, c } => y[0] = loss::kl_rows_forward(rows, c, x(0), x(1)),
        Op::AttentionTransferMap { batch, hw, c } => {
            loss::attention_transfer_forward(batch, hw, c, x(0), y_slice);
        }
    }
    (y, saved)
}

/// Gradients by the kernels: each starts from `start` elements if it adds (always so for parameters) and from
/// NaN if it overwrites. None where the kernels have no such VJP. The flag says whether the gradient adds.
pub fn backward(
    op: &Op<'_>,
    inputs: &[Vec<f32>],
    y: &[f32],
    saved: &[Vec<f32>],
    dy: &[f32],
    accumulate: bool,
    start: f32,
    ws: &mut Workspace,
) -> Vec<Option<(Vec<f32>, bool)>> {
    let x = |i: usize| inputs[i].as_slice();
    let data = |i: usize| vec![if accumulate { start } else { f32::NAN }; inputs[i].len()];
    let param = |i: usize| vec![start; inputs[i].len()];
    let one = |f: &mut dyn FnMut(&mut [f32])| {
        let mut dx = data(0);
        f(&mut dx);
        vec![Some((dx, accumulate))]
    };
    let a = accumulate;
    match *op {
        Op::Activation(act) => one(&mut |dx| activation::activation_backward(act, x(0), dy, dx, a)),
        Op::BatchNorm { .. } | Op::BatchNormEval { .. } | Op::LayerNorm(_) | Op::GroupNorm(_) => {
            let (mut dx, mut dg, mut db) = (data(0), param(1), param(2));
            let (dx_, dg_, db_) = (&mut dx[..], &mut dg[..], &mut db[..]);
            match *op {
                Op::BatchNorm { dims, act } => norm::batch_norm_train_backward(
                    &dims,
                    act,
                    x(0),
                    x(1),
                    x(2),
                    &saved[0],
                    &saved[1],
                    dy,
                    dx_,
                    a,
                    dg_,
                    db_,
                    ws,
                ),
                Op::BatchNormEval { dims, act } => {
                    norm::batch_norm_eval_backward(&dims, act, x(0), x(1), x(2), x(3), x(4), dy, dx_, a, dg_, db_, ws)
                }
                Op::LayerNorm(d) => {
                    norm::layer_norm_backward(&d, x(0), x(1), &saved[0], &saved[1], dy, dx_, a, dg_, db_, ws);
                }
                Op::GroupNorm(d) => {
                    norm::group_norm_backward(&d, x(0), x(1), &saved[0], &saved[1], dy, dx_, a, dg_, db_, ws);
                }
                _ => unreachable!("the outer arm names four ops"),
            }
            vec![Some((dx, a)), Some((dg, true)), Some((db, true))]
        }
        Op::Attention(d) => one(&mut |dx| attention::attention_backward(&d, x(0), &saved[0], dy, dx, a, ws)),
        Op::MaskedAttention { dims: d, .. } => {
            one(&mut |dx| attention::attention_backward(&d, x(0), &saved[0], dy, dx, a, ws))
        }
        Op::AttentionPool(d) => {
            let (mut dq, mut dkv) = (param(0), data(1));
            attention_pool::attention_pool_backward(&d, x(0), x(1), &saved[0], dy, &mut dkv, a, &mut dq, ws);
            vec![Some((dq, true)), Some((dkv, a))]
        }
        Op::TokenConv(d) => {
            let (mut dx, mut dw) = (data(0), param(1));
            token_conv::token_conv_backward_data(&d, x(1), dy, &mut dx, a, ws);
            token_conv::token_conv_backward_weights(&d, x(0), dy, &mut dw, ws);
            vec![Some((dx, a)), Some((dw, true))]
        }
        Op::SigmoidLoss(d) => {
            let [mut da, mut db] = [0, 1].map(|i| vec![f32::NAN; inputs[i].len()]);
            let (mut ds, mut dc) = (f32::NAN, f32::NAN);
            let (s, c, to) = (x(2)[0], x(3)[0], [&mut ds, &mut dc]);
            sigmoid_loss::sigmoid_loss_backward(&d, x(0), x(1), s, c, x(4), dy[0], &mut da, &mut db, to, ws);
            vec![Some((da, false)), Some((db, false)), Some((vec![ds], false)), Some((vec![dc], false)), None]
        }
        Op::AttentionMap(d) => one(&mut |dx| attention::attention_map_backward(&d, x(0), y, dy, dx, a, ws)),
        Op::SeparableAttention(d) => one(&mut |dx| {
            separable::separable_attention_backward(&d, x(0), &saved[0], &saved[1], dy, dx, a, ws);
        }),
        Op::ScaleSamples { batch, len } => {
            let dx = one(&mut |dx| elementwise::scale_samples(batch, len, dy, x(1), dx, a));
            [dx, vec![None]].concat()
        }
        Op::GlobalAvgPool { batch, hw, c } => one(&mut |dx| pooling::global_avg_pool_backward(batch, hw, c, dy, dx, a)),
        Op::MaxPool(d) => {
            let (mut again, mut argmax) = (y.to_vec(), vec![0.0; y.len()]);
            pooling::max_pool_forward(&d, x(0), &mut again, &mut argmax);
            one(&mut |dx| pooling::max_pool_backward(&d, &argmax, dy, dx, a))
        }
        Op::AvgPool(d) => one(&mut |dx| pooling::avg_pool_backward(&d, dy, dx, a)),
        Op::Resize(d) => one(&mut |dx| resize::resize_bilinear_backward(&d, dy, dx, a)),
        Op::Unfold(d) => one(&mut |dx| layout::fold_patches(&d, dy, dx, a)),
        Op::Fold(d) => one(&mut |dx| layout::unfold_patches(&d, dy, dx, a)),
        Op::Embedding { width, ids } => {
            let mut table = param(0);
            embedding::embedding_backward(width, ids, dy, &mut table);
            vec![Some((table, true))]
        }
        Op::GatherRows { tokens, width, index } => {
            one(&mut |dx| embedding::gather_rows_backward(index.len(), tokens, width, index, dy, dx, a))
        }
        Op::ConcatLast { rows, ca, cb } => (0..2)
            .map(|which| {
                let mut dx = data(which);
                layout::concat_last_backward(rows, ca, cb, which, dy, &mut dx, a);
                Some((dx, a))
            })
            .collect(),
        Op::PrependToken { batch, tokens, width } => {
            let (mut token, mut dx) = (param(0), data(1));
            layout::prepend_token_backward_token(batch, tokens, width, dy, &mut token);
            layout::slice_rows_forward_or_add(batch, tokens + 1, width, 1, tokens, dy, &mut dx, a);
            vec![Some((token, true)), Some((dx, a))]
        }
        Op::SliceRows { outer, rows, width, start, count } => {
            one(&mut |dx| layout::slice_rows_backward(outer, rows, width, start, count, dy, dx, a))
        }
        Op::Permute { shape, perm } => {
            let mut inverse = vec![0; perm.len()];
            perm.iter().enumerate().for_each(|(i, axis)| inverse[*axis] = i);
            let from: Vec<usize> = perm.iter().map(|axis| shape[*axis]).collect();
            one(&mut |dx| layout::permute(&from, &inverse, dy, dx, a))
        }
        Op::Add => (0..2)
            .map(|i| {
                let mut dx = data(i);
                elementwise::copy_or_add(dy, &mut dx, a);
                Some((dx, a))
            })
            .collect(),
        Op::AddBroadcast => {
            let (mut dx, mut db) = (data(0), param(1));
            elementwise::copy_or_add(dy, &mut dx, a);
            elementwise::add_broadcast_backward(dy, &mut db, ws);
            vec![Some((dx, a)), Some((db, true))]
        }
        Op::Mul => (0..2)
            .map(|i| {
                let mut dx = data(i);
                elementwise::mul_backward(x(1 - i), dy, &mut dx, a);
                Some((dx, a))
            })
            .collect(),
        Op::Scale(s) => one(&mut |dx| elementwise::scale_backward(s, dy, dx, a)),
        Op::Exp => one(&mut |dx| elementwise::mul_backward(y, dy, dx, a)),
        Op::ChannelScale { batch, hw, c } => {
            let (mut dx, mut ds) = (data(0), data(1));
            elementwise::channel_scale_backward(batch, hw, c, x(0), x(1), dy, &mut dx, a, &mut ds, a, ws);
            vec![Some((dx, a)), Some((ds, a))]
        }
        Op::L2Normalize { rows, c } => {
            one(&mut |dx| elementwise::l2_normalize_backward(rows, c, y, &saved[0], dy, dx, a))
        }
        Op::Softmax { rows, c, temperature } => {
            one(&mut |dx| softmax::softmax_rows_backward(rows, c, temperature, y, dy, dx, a))
        }
        Op::LogSoftmax { rows, c, temperature } => {
            one(&mut |dx| softmax::log_softmax_rows_backward(rows, c, temperature, y, dy, dx, a))
        }
        Op::Linear(d) => {
            let (mut dx, mut dw) = (data(0), param(1));
            let mut db = if inputs.len() > 2 { Some(param(2)) } else { None };
            linear::linear_backward_data(&d, x(1), dy, &mut dx, a, ws);
            linear::linear_backward_weights(&d, x(0), dy, &mut dw, db.as_deref_mut(), ws);
            let bias = db.map(|db| (db, true));
            [vec![Some((dx, a)), Some((dw, true))], bias.map(|b| vec![Some(b)]).unwrap_or_default()].concat()
        }
        Op::Conv2d(d) => {
            let (mut dx, mut dw) = (data(0), param(1));
            let mut db = if inputs.len() > 2 { Some(param(2)) } else { None };
            conv::conv2d_backward_data(&d, x(1), dy, &mut dx, a, ws);
            conv::conv2d_backward_weights(&d, x(0), dy, &mut dw, db.as_deref_mut(), ws);
            let bias = db.map(|db| (db, true));
            [vec![Some((dx, a)), Some((dw, true))], bias.map(|b| vec![Some(b)]).unwrap_or_default()].concat()
        }
        // Its VJP is two more products; gemm's own tests cover it.
        Op::MatMul { .. } => vec![None, None],
        Op::Contrastive(d) => {
            let (mut da, mut db, mut ds) = (vec![f32::NAN; inputs[0].len()], vec![f32::NAN; inputs[1].len()], f32::NAN);
            loss::contrastive_backward(&d, x(0), x(1), x(2)[0], x(3), x(4), dy[0], &mut da, &mut db, &mut ds, ws);
            vec![Some((da, false)), Some((db, false)), Some((vec![ds], false)), None, None]
        }
        Op::Relational { dims, .. } => {
            let (mut da, mut db, mut ds) = (vec![f32::NAN; inputs[0].len()], vec![f32::NAN; inputs[1].len()], f32::NAN);
            let (targets, teachers) = pairs(op, inputs);
            let (scale, dl) = (x(2)[0], [dy[0], dy[1]]);
            relational::relational_backward(
                dims,
                x(0),
                x(1),
                scale,
                &targets,
                &teachers,
                dl,
                &mut da,
                &mut db,
                &mut ds,
                ws,
            );
            let constants = inputs[3..].iter().map(|_| None);
            [da, db, vec![ds]].into_iter().map(|g| Some((g, false))).chain(constants).collect()
        }
        Op::Mse | Op::Cosine { .. } => (0..2)
            .map(|i| {
                let mut dx = data(i);
                match *op {
                    Op::Cosine { rows, c } => loss::cosine_backward(rows, c, x(i), x(1 - i), dy[0], &mut dx, a),
                    _ => loss::mse_backward(x(i), x(1 - i), dy[0], &mut dx, a),
                }
                Some((dx, a))
            })
            .collect(),
        Op::KlRows { rows, c } => {
            let mut dq = data(1);
            loss::kl_rows_backward(rows, c, x(0), x(1), dy[0], &mut dq, a);
            vec![None, Some((dq, a))]
        }
        Op::AttentionTransferMap { batch, hw, c } => {
            one(&mut |dx| loss::attention_transfer_backward(batch, hw, c, x(0), dy, dx, a))
        }
    }
}

/// Asserts that `got` is within `tolerance` of `want`, relative to the largest magnitude of `want` (at least 0.01:
/// arguments are of the order of 1).
pub fn assert_close(got: &[f32], want: &[f64], tolerance: f64, what: &str) {
    assert_eq!(got.len(), want.len(), "{what}: length");
    let scale = want.iter().fold(1e-2f64, |m, v| m.max(v.abs()));
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        let error = (f64::from(*g) - w).abs();
        assert!(error <= tolerance * scale, "{what}: element {i} is {g}, expected {w} (scale {scale})");
    }
}
