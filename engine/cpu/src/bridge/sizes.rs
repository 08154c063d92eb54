//! What lengths an op's arguments must have, checked before dfdx (which panics) sees them.

use super::{BridgeError, Op};
use crate::attention::Attention;
use crate::layout::Patches;
use crate::pooling::Pool2d;

/// Lengths that follow from an op and its arguments.
pub(super) struct Sizes {
    /// Of the value.
    pub(super) value: usize,
    /// Of what is saved.
    pub(super) saved: Vec<usize>,
    /// Arguments without a gradient.
    pub(super) constants: Vec<usize>,
    /// Whether it is a loss: defined (0) over nothing.
    pub(super) loss: bool,
}

/// Checks the arguments and gives the sizes of the results.
pub(super) fn check<E>(op: &Op<'_>, inputs: &[&[E]]) -> Result<Sizes, BridgeError> {
    dims(op)?;
    let len = |i: usize| inputs.get(i).map_or(0, |x| x.len());
    let attention = |d: &Attention| {
        let tokens = d.batch * d.tokens;
        (tokens * 3 * d.heads * d.head_dim, tokens * d.heads * d.head_dim, tokens * d.heads * d.tokens)
    };
    let image = |d: &Patches| d.batch * d.h * d.w * d.c;
    let pooled = |d: &Pool2d| (d.batch * d.h * d.w * d.c, d.batch * d.out_h() * d.out_w() * d.c);
    let (mut saved, mut constants) = (Vec::new(), Vec::new());
    let (expected, value) = match *op {
        Op::Activation(_) | Op::Scale(_) | Op::Exp => (vec![len(0)], len(0)),
        Op::BatchNorm { dims: d, .. } => {
            saved = vec![d.c, d.c];
            (vec![d.rows * d.c, d.c, d.c], d.rows * d.c)
        }
        Op::BatchNormEval { dims: d, .. } => {
            constants = vec![3, 4];
            (vec![d.rows * d.c, d.c, d.c, d.c, d.c], d.rows * d.c)
        }
        Op::LayerNorm(d) => {
            saved = vec![d.rows, d.rows];
            (vec![d.rows * d.c, d.c, d.c], d.rows * d.c)
        }
        Op::GroupNorm(d) => {
            saved = vec![d.batch, d.batch];
            let len = d.batch * d.rows * d.c;
            (vec![len, d.c, d.c], len)
        }
        Op::Attention(d) => {
            let (qkv, out, map) = attention(&d);
            saved = vec![map];
            (vec![qkv], out)
        }
        Op::MaskedAttention { dims: d, last } => {
            if last.len() != d.batch {
                return Err(BridgeError::Dims("one last token per batch entry is needed"));
            }
            within(last, d.tokens)?;
            let (qkv, out, map) = attention(&d);
            saved = vec![map];
            (vec![qkv], out)
        }
        Op::AttentionPool(d) => {
            let width = d.heads * d.head_dim;
            saved = vec![d.batch * d.heads * d.tokens];
            (vec![width, 2 * d.batch * d.tokens * width], d.batch * width)
        }
        Op::TokenConv(d) => {
            let x = d.batch * d.tokens * d.channels;
            (vec![x, d.channels * d.kernel], x)
        }
        Op::SigmoidLoss(d) => {
            constants = vec![4];
            (vec![d.rows * d.dim, d.cols * d.dim, 1, 1, d.rows * d.cols], 1)
        }
        Op::AttentionMap(d) => (vec![attention(&d).0], attention(&d).2),
        Op::SeparableAttention(d) => {
            let rows = d.batch * d.tokens;
            saved = vec![rows, d.batch * d.dim];
            (vec![rows * (1 + 2 * d.dim)], rows * d.dim)
        }
        Op::GlobalAvgPool { batch, hw, c } => (vec![batch * hw * c], batch * c),
        Op::MaxPool(d) | Op::AvgPool(d) => (vec![pooled(&d).0], pooled(&d).1),
        Op::Resize(d) => (vec![d.batch * d.h * d.w * d.c], d.batch * d.oh * d.ow * d.c),
        Op::Unfold(d) | Op::Fold(d) => (vec![image(&d)], image(&d)),
        Op::Embedding { width, ids } => {
            let rows = len(0) / width.max(1);
            within(ids, rows)?;
            (vec![rows * width], ids.len() * width)
        }
        Op::GatherRows { tokens, width, index } => {
            within(index, tokens)?;
            (vec![index.len() * tokens * width], index.len() * width)
        }
        Op::ConcatLast { rows, ca, cb } => (vec![rows * ca, rows * cb], rows * (ca + cb)),
        Op::PrependToken { batch, tokens, width } => {
            (vec![width, batch * tokens * width], batch * (tokens + 1) * width)
        }
        Op::SliceRows { outer, rows, width, count, .. } => (vec![outer * rows * width], outer * count * width),
        Op::Permute { shape, .. } => (vec![shape.iter().product()], shape.iter().product()),
        Op::Add | Op::Mul => (vec![len(0), len(0)], len(0)),
        Op::AddBroadcast => {
            let n = len(1);
            let fits = if n == 0 { len(0) == 0 } else { len(0).is_multiple_of(n) };
            if !fits {
                return Err(BridgeError::Dims("x is no whole number of rows as long as b"));
            }
            (vec![len(0), n], len(0))
        }
        Op::ChannelScale { batch, hw, c } => (vec![batch * hw * c, batch * c], batch * hw * c),
        Op::ScaleSamples { batch, len } => {
            constants = vec![1];
            (vec![batch * len, batch], batch * len)
        }
        Op::L2Normalize { rows, c } => {
            saved = vec![rows];
            (vec![rows * c], rows * c)
        }
        Op::Softmax { rows, c, .. } | Op::LogSoftmax { rows, c, .. } => (vec![rows * c], rows * c),
        Op::Linear(d) => {
            let bias = if inputs.len() > 2 { vec![d.c_out] } else { vec![] };
            ([vec![d.rows * d.c_in, d.c_out * d.c_in], bias].concat(), d.rows * d.c_out)
        }
        Op::MatMul { dims: d, .. } => (vec![d.m * d.k, d.k * d.n], d.m * d.n),
        Op::Conv2d(d) => {
            let bias = if inputs.len() > 2 { vec![d.c_out] } else { vec![] };
            let x = d.batch * d.h * d.w * d.c_in;
            ([vec![x, d.weights()], bias].concat(), d.batch * d.out_h() * d.out_w() * d.c_out)
        }
        Op::Contrastive(d) => {
            constants = vec![3, 4];
            (vec![d.rows * d.dim, d.cols * d.dim, 1, d.rows * d.cols, d.rows * d.cols], 1)
        }
        Op::Relational { dims: d, own, other, group } => {
            if own.len() != d.rows || other.len() != d.rows || group.len() != d.cols {
                return Err(BridgeError::Dims("a group for each row and each column is needed"));
            }
            let sides = d.teachers.iter().flat_map(|k| [d.rows * k, d.cols * k]);
            constants = (3..6 + 2 * d.teachers.len()).collect();
            ([d.rows * d.dim, d.cols * d.dim, 1, d.rows, d.cols, d.cols].into_iter().chain(sides).collect(), 2)
        }
        Op::Mse => (vec![len(0), len(0)], 1),
        Op::Cosine { rows, c } => (vec![rows * c, rows * c], 1),
        Op::KlRows { rows, c } => {
            constants = vec![0];
            (vec![rows * c, rows * c], 1)
        }
        Op::AttentionTransferMap { batch, hw, c } => (vec![batch * hw * c], batch * hw),
    };
    if inputs.len() != expected.len() {
        return Err(BridgeError::Arguments { expected: expected.len(), got: inputs.len() });
    }
    for (argument, (x, expected)) in inputs.iter().zip(expected).enumerate() {
        if x.len() != expected {
            return Err(BridgeError::Length { argument, expected, got: x.len() });
        }
    }
    let loss = matches!(
        op,
        Op::Contrastive(_)
            | Op::Relational { .. }
            | Op::SigmoidLoss(_)
            | Op::Mse
            | Op::Cosine { .. }
            | Op::KlRows { .. }
    );
    Ok(Sizes { value, saved, constants, loss })
}

/// Refuses dims that describe no op.
fn dims(op: &Op<'_>) -> Result<(), BridgeError> {
    let reason = match *op {
        Op::MaxPool(d) | Op::AvgPool(d)
            if d.k == 0 || d.stride == 0 || d.pad >= d.k || d.h + 2 * d.pad < d.k || d.w + 2 * d.pad < d.k =>
        {
            "a pooling window needs a size, a step, less padding than its size, and room in the image"
        }
        Op::Unfold(d) | Op::Fold(d)
            if d.ph == 0 || d.pw == 0 || !d.h.is_multiple_of(d.ph) || !d.w.is_multiple_of(d.pw) =>
        {
            "the patches do not tile the image"
        }
        Op::Conv2d(d)
            if d.groups == 0
                || d.stride == 0
                || !d.c_in.is_multiple_of(d.groups)
                || !d.c_out.is_multiple_of(d.groups) =>
        {
            "a convolution needs a step, and groups that divide both numbers of channels"
        }
        Op::Relational { dims: d, .. } if d.rows != d.cols || d.problem().is_some() => {
            "the columns' sums need all rows, and at most 11 teachers fit"
        }
        Op::TokenConv(d) if d.kernel % 2 == 0 => "a convolution over tokens has an odd kernel",
        Op::SliceRows { rows, start, count, .. } if start + count > rows => "the slice passes the last row",
        Op::Softmax { temperature, .. } | Op::LogSoftmax { temperature, .. }
            if temperature.is_nan() || temperature <= 0.0 =>
        {
            "the temperature is not positive"
        }
        Op::Permute { shape, perm }
            if shape.len() != perm.len() || !(0..shape.len()).all(|axis| perm.contains(&axis)) =>
        {
            "the axes are no permutation"
        }
        _ => return Ok(()),
    };
    Err(BridgeError::Dims(reason))
}

fn within(ids: &[i32], rows: usize) -> Result<(), BridgeError> {
    match ids.iter().find(|id| usize::try_from(**id).map_or(true, |row| row >= rows)) {
        Some(id) => Err(BridgeError::Index { id: *id, rows }),
        None => Ok(()),
    }
}
