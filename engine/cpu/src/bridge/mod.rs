//! The only place that names dfdx: every op of this crate as a dfdx formulation, its VJP made from dfdx's tape.
//!
//! It serves as the default runner of dense algebra on the small joint space (projections and losses), as the
//! `--kernels reference` path of everything else, and, in `f64`, as the oracle of the kernels' tests.
//!
//! # What dfdx 0.13 cannot do on stable Rust, and what stands here instead
//! - `conv2d` and `pool2d` are behind its `nightly` feature: convolutions (any kernel, stride, groups) and
//!   average and maximum pooling are a gather of the windows' rows, then a matrix product, mean or maximum.
//!   These are formulations for comparison, far too slow and large for training.
//! - Resizing with half-pixel centres does not exist (its `upscale2d` aligns corners): two products with
//!   interpolation matrices.
//! - `accurate_gelu` has the right value, but its derivative misses a factor 1/√2 on the density, so GELU is an
//!   op of ours on dfdx's tape, around dfdx's value.
//! - `relu` and `max_to` drop NaN; ReLU is written as a choice that keeps it.
//! - Rank is static: a permutation of unknown rank is a gather of single elements.
//! - An op given the same tensor twice panics; formulas here use each handle once per op.
//!
//! Nothing else is missing: [`Op`] lists all ops, and each of them runs here.

mod layout;
mod losses;
mod nn;
mod sizes;
mod tape;
mod text;

use crate::activation::Activation;
use crate::attention::Attention;
use crate::attention_pool::AttentionPool;
use crate::conv::Conv2d;
use crate::gemm::Gemm;
use crate::layout::Patches;
use crate::linear::Linear;
use crate::loss::Contrastive;
use crate::norm::{GroupNorm, Norm};
use crate::pooling::Pool2d;
use crate::relational::Relational;
use crate::resize::Resize;
use crate::separable::SeparableAttention;
use crate::sigmoid_loss::SigmoidLoss;
use crate::token_conv::TokenConv;

pub use tape::{Pullback, Real};

use tape::Tape;

/// An op with its dims and integer arguments. Each variant's comment gives its tensor arguments in order, its
/// value, and what it saves beside the value.
///
/// Letters: R rows, C channels, B batch, H and W height and width, T tokens. An argument named *constant* gets
/// no gradient (an empty one from the [`Pullback`]).
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Op<'a> {
    /// x → act(x).
    Activation(Activation),
    /// x [R, C], γ, β → act(batch norm with the batch's statistics); saves mean and rstd.
    BatchNorm {
        /// R, C, ε.
        dims: Norm,
        /// The fused activation.
        act: Activation,
    },
    /// x [R, C], γ, β, constant running mean, constant running variance → act(batch norm).
    BatchNormEval {
        /// R, C, ε.
        dims: Norm,
        /// The fused activation.
        act: Activation,
    },
    /// x [R, C], γ, β → layer norm of each row; saves mean and rstd of the rows.
    LayerNorm(Norm),
    /// x [B, R, C], γ, β → norm of each of the B parts, γ and β per channel; saves mean and rstd of the parts.
    GroupNorm(GroupNorm),
    /// qkv [B, T, 3, H, D] → [B, T, H·D]; saves the probabilities [B, H, T, T].
    Attention(Attention),
    /// As [`Op::Attention`], where the keys of batch entry b are its tokens 0..=last\[b\].
    MaskedAttention {
        /// B, T, H, D.
        dims: Attention,
        /// B last tokens.
        last: &'a [i32],
    },
    /// q [H, D], kv [B, T, 2, H, D] → [B, H·D]; saves the probabilities [B, H, T].
    AttentionPool(AttentionPool),
    /// x [B, T, C], w [C, K] → [B, T, C].
    TokenConv(TokenConv),
    /// a [B, D], b [B', D], scale \[1\], bias \[1\], constant t [B, B'] → loss \[1\].
    SigmoidLoss(SigmoidLoss),
    /// qkv [B, T, 3, H, D] → probabilities [B, H, T, T].
    AttentionMap(Attention),
    /// qkv [B, N, 1 + 2·D] → [B, N, D]; saves the weights [B, N] and the context [B, D].
    SeparableAttention(SeparableAttention),
    /// x [B, HW, C] → [B, C].
    GlobalAvgPool {
        /// B.
        batch: usize,
        /// H·W.
        hw: usize,
        /// C.
        c: usize,
    },
    /// x [B, H, W, C] → maxima of windows. Ties share the gradient here, where the kernel gives it to the first.
    MaxPool(Pool2d),
    /// x [B, H, W, C] → means of windows.
    AvgPool(Pool2d),
    /// x [B, H, W, C] → [B, OH, OW, C], bilinear.
    Resize(Resize),
    /// x [B, H, W, C] → [B·P, N, C].
    Unfold(Patches),
    /// x [B·P, N, C] → [B, H, W, C].
    Fold(Patches),
    /// table [V, width] → [N, width].
    Embedding {
        /// Width of a row.
        width: usize,
        /// N rows of the table.
        ids: &'a [i32],
    },
    /// x [B, T, width] → [B, width].
    GatherRows {
        /// T.
        tokens: usize,
        /// Width of a row.
        width: usize,
        /// B token indices.
        index: &'a [i32],
    },
    /// a [R, CA], b [R, CB] → [R, CA + CB].
    ConcatLast {
        /// R.
        rows: usize,
        /// Columns of a.
        ca: usize,
        /// Columns of b.
        cb: usize,
    },
    /// token \[C\], x [B, T, C] → [B, T + 1, C].
    PrependToken {
        /// B.
        batch: usize,
        /// T.
        tokens: usize,
        /// C.
        width: usize,
    },
    /// x [O, rows, width] → x[:, start..start + count, :].
    SliceRows {
        /// O.
        outer: usize,
        /// Rows of x.
        rows: usize,
        /// Width of a row.
        width: usize,
        /// First row taken.
        start: usize,
        /// Rows taken.
        count: usize,
    },
    /// x of `shape` → x with its axes reordered by `perm`.
    Permute {
        /// Shape of x.
        shape: &'a [usize],
        /// Axis of x that becomes axis i.
        perm: &'a [usize],
    },
    /// a, b → a + b.
    Add,
    /// x [R, N], b \[N\] → x + b in each row.
    AddBroadcast,
    /// a, b → a ∘ b.
    Mul,
    /// x → factor·x.
    Scale(f32),
    /// x → e^x.
    Exp,
    /// x [B, HW, C], s [B, C] → x·s.
    ChannelScale {
        /// B.
        batch: usize,
        /// H·W.
        hw: usize,
        /// C.
        c: usize,
    },
    /// x [B, len], constant m \[B\] → x·m.
    ScaleSamples {
        /// B.
        batch: usize,
        /// Values of a sample.
        len: usize,
    },
    /// x [R, C] → rows of unit norm; saves the norms.
    L2Normalize {
        /// R.
        rows: usize,
        /// C.
        c: usize,
    },
    /// x [R, C] → softmax(x/temperature).
    Softmax {
        /// R.
        rows: usize,
        /// C.
        c: usize,
        /// Divides x.
        temperature: f32,
    },
    /// x [R, C] → ln softmax(x/temperature).
    LogSoftmax {
        /// R.
        rows: usize,
        /// C.
        c: usize,
        /// Divides x.
        temperature: f32,
    },
    /// x [R, in], w [out, in], optional bias \[out\] → x·wᵀ + bias.
    Linear(Linear),
    /// a, b → alpha·op(a)·op(b).
    MatMul {
        /// Sizes and transpositions.
        dims: Gemm,
        /// Factor.
        alpha: f32,
    },
    /// x [B, H, W, CI], w [CO, CI/groups, KH, KW], optional bias \[CO\] → [B, OH, OW, CO].
    Conv2d(Conv2d),
    /// a [B, D], b [B', D], scale \[1\], constant p_row [B, B'], constant p_col [B', B] → loss \[1\].
    Contrastive(Contrastive),
    /// a [rows, D], b [cols, D], scale \[1\], constant keep \[rows\], share \[cols\], column_total \[cols\], then each
    /// teacher's constant u [rows, D_k] and v [cols, D_k] → CE and KD \[2\].
    Relational {
        /// All dims.
        dims: &'a Relational,
        /// Group of the caption of each row's image.
        own: &'a [i32],
        /// Group of the caption of the image mixed into it.
        other: &'a [i32],
        /// Group of each column's caption.
        group: &'a [i32],
    },
    /// a, b → mean of (a − b)², \[1\].
    Mse,
    /// a, b [R, C] → mean of 1 − cos, \[1\].
    Cosine {
        /// R.
        rows: usize,
        /// C.
        c: usize,
    },
    /// constant p, q [R, C] → mean over rows of KL(p ‖ q), \[1\].
    KlRows {
        /// R.
        rows: usize,
        /// C.
        c: usize,
    },
    /// x [B, HW, C] → attention-transfer map [B, HW].
    AttentionTransferMap {
        /// B.
        batch: usize,
        /// H·W.
        hw: usize,
        /// C.
        c: usize,
    },
}

/// What a run gives.
pub struct Run<E> {
    /// The op's value.
    pub value: Vec<E>,
    /// What the op saves beside it; see [`Op`].
    pub saved: Vec<Vec<E>>,
    /// The VJP, where it was asked for.
    pub pullback: Option<Pullback<E>>,
}

impl<E> std::fmt::Debug for Run<E> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Run")
            .field("value", &self.value.len())
            .field("saved", &self.saved.len())
            .field("pullback", &self.pullback.is_some())
            .finish()
    }
}

/// Arguments that an op cannot run on.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum BridgeError {
    /// The op takes another number of arguments.
    Arguments {
        /// How many it takes at least.
        expected: usize,
        /// How many there are.
        got: usize,
    },
    /// An argument's length does not fit the dims.
    Length {
        /// Which argument, from 0.
        argument: usize,
        /// Elements that the dims ask for.
        expected: usize,
        /// Elements that it has.
        got: usize,
    },
    /// A row index outside its table.
    Index {
        /// The index.
        id: i32,
        /// Rows of the table.
        rows: usize,
    },
    /// Dims that describe no op (a permutation with an axis twice, patches that do not tile the image, ...).
    Dims(&'static str),
    /// An argument is empty though the value is not.
    Empty {
        /// Which argument, from 0.
        argument: usize,
    },
    /// dfdx could not allocate a tensor.
    Allocation,
}

impl std::fmt::Display for BridgeError {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            BridgeError::Arguments { expected, got } => write!(f, "{expected} arguments expected, {got} given"),
            BridgeError::Length { argument, expected, got } => {
                write!(f, "argument {argument} has {got} elements where the dims ask for {expected}")
            }
            BridgeError::Index { id, rows } => write!(f, "row {id} of a table with {rows} rows"),
            BridgeError::Dims(reason) => f.write_str(reason),
            BridgeError::Empty { argument } => write!(f, "argument {argument} is empty"),
            BridgeError::Allocation => f.write_str("dfdx could not allocate a tensor"),
        }
    }
}

impl std::error::Error for BridgeError {}

/// Runs an op by dfdx. With `keep`, the result holds the VJP: gradient of the value in, gradients of the
/// arguments out (in order; empty for constants).
///
/// A value without elements is given without dfdx, which has no tensors of no elements; so is a loss over
/// nothing, which is 0.
///
/// # Errors
/// If the arguments do not fit the op; see [`BridgeError`].
pub fn run<E: Real>(op: &Op<'_>, inputs: &[&[E]], keep: bool) -> Result<Run<E>, BridgeError> {
    let sizes = sizes::check(op, inputs)?;
    if sizes.value == 0 || (sizes.loss && inputs.iter().any(|x| x.is_empty())) {
        let lens: Vec<usize> = inputs.iter().map(|x| x.len()).collect();
        let pullback: Pullback<E> = Box::new(move |_| lens.into_iter().map(|len| vec![E::of_f64(0.0); len]).collect());
        return Ok(Run {
            value: vec![E::of_f64(0.0); sizes.value],
            saved: sizes.saved.iter().map(|len| vec![E::of_f64(0.0); *len]).collect(),
            pullback: keep.then_some(pullback),
        });
    }
    if let Some(argument) = inputs.iter().position(|x| x.is_empty()) {
        return Err(BridgeError::Empty { argument });
    }
    let tape = Tape::new(inputs)?;
    let t = &tape;
    let (value, saved) = match *op {
        Op::Activation(act) => (nn::activation(t, act, t.flat(0)), vec![]),
        Op::BatchNorm { dims, act } => nn::batch_norm(t, &dims, act),
        Op::BatchNormEval { dims, act } => (nn::batch_norm_eval(t, &dims, act), vec![]),
        Op::LayerNorm(dims) => nn::layer_norm(t, &dims),
        Op::Attention(d) => nn::attention(t, &d, &[]),
        Op::MaskedAttention { dims, last } => nn::attention(t, &dims, last),
        Op::AttentionPool(d) => text::attention_pool(t, &d),
        Op::TokenConv(d) => (text::token_conv(t, &d), vec![]),
        Op::SigmoidLoss(d) => (text::sigmoid_loss(t, &d), vec![]),
        Op::GroupNorm(dims) => nn::group_norm(t, &dims),
        Op::AttentionMap(d) => (nn::attention_map(t, &d), vec![]),
        Op::SeparableAttention(d) => nn::separable_attention(t, &d),
        Op::GlobalAvgPool { batch, hw, c } => (nn::global_avg_pool(t, batch, hw, c), vec![]),
        Op::MaxPool(d) => (nn::max_pool(t, &d), vec![]),
        Op::AvgPool(d) => (nn::avg_pool(t, &d), vec![]),
        Op::Resize(d) => (nn::resize(t, &d), vec![]),
        Op::Unfold(d) => (layout::unfold(t, &d), vec![]),
        Op::Fold(d) => (layout::fold(t, &d), vec![]),
        Op::Embedding { width, ids } => (layout::embedding(t, width, ids), vec![]),
        Op::GatherRows { tokens, width, index } => (layout::gather_rows(t, tokens, width, index), vec![]),
        Op::ConcatLast { rows, ca, cb } => (layout::concat_last(t, rows, ca, cb), vec![]),
        Op::PrependToken { batch, tokens, width } => (layout::prepend_token(t, batch, tokens, width), vec![]),
        Op::SliceRows { outer, rows, width, start, count } => {
            (layout::slice_rows(t, [outer, rows, width], start, count), vec![])
        }
        Op::Permute { shape, perm } => (layout::permute(t, shape, perm), vec![]),
        Op::Add => (t.flat(0) + t.flat(1), vec![]),
        Op::AddBroadcast => (nn::add_broadcast(t), vec![]),
        Op::Mul => (t.flat(0) * t.flat(1), vec![]),
        Op::Scale(factor) => (t.flat(0) * E::of_f64(f64::from(factor)), vec![]),
        Op::Exp => (t.flat(0).exp(), vec![]),
        Op::ChannelScale { batch, hw, c } => (nn::channel_scale(t, batch, hw, c), vec![]),
        Op::ScaleSamples { batch, len } => (nn::scale_samples(t, batch, len), vec![]),
        Op::L2Normalize { rows, c } => nn::l2_normalize(t, rows, c),
        Op::Softmax { rows, c, temperature } => (nn::softmax(t, rows, c, temperature), vec![]),
        Op::LogSoftmax { rows, c, temperature } => (nn::log_softmax(t, rows, c, temperature), vec![]),
        Op::Linear(d) => (nn::linear(t, &d), vec![]),
        Op::MatMul { dims, alpha } => (nn::matmul(t, &dims, alpha), vec![]),
        Op::Conv2d(d) => (nn::conv2d(t, &d), vec![]),
        Op::Contrastive(d) => (losses::contrastive(t, &d, inputs), vec![]),
        Op::Relational { dims, own, other, group } => {
            (losses::relational(t, dims, [own, other, group], inputs), vec![])
        }
        Op::Mse => (losses::mse(t), vec![]),
        Op::Cosine { rows, c } => (losses::cosine(t, rows, c), vec![]),
        Op::KlRows { rows, c } => (losses::kl_rows(t, rows, c, inputs), vec![]),
        Op::AttentionTransferMap { batch, hw, c } => (losses::attention_transfer(t, batch, hw, c), vec![]),
    };
    Ok(tape.finish(value, saved, &sizes.constants, keep))
}
