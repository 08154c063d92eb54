//! The ops: what each needs for its VJP, what it saves, what it costs.

use mcpipe_cpu::activation::Activation;
use mcpipe_cpu::attention::Attention;
use mcpipe_cpu::attention_pool::AttentionPool;
use mcpipe_cpu::conv::Conv2d;
use mcpipe_cpu::gemm::Gemm;
use mcpipe_cpu::layout::Patches;
use mcpipe_cpu::linear::Linear;
use mcpipe_cpu::loss::Contrastive;
use mcpipe_cpu::norm::{GroupNorm, Norm};
use mcpipe_cpu::pooling::Pool2d;
use mcpipe_cpu::relational::Relational;
use mcpipe_cpu::resize::Resize;
use mcpipe_cpu::separable::SeparableAttention;
use mcpipe_cpu::sigmoid_loss::SigmoidLoss;
use mcpipe_cpu::token_conv::TokenConv;

use crate::fuse::FusedConv;

/// Who runs a node unless `--kernels reference` asks otherwise.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Runner {
    /// A kernel of ours.
    Kernel,
    /// dfdx; its tape gives the VJP inside the node.
    Dfdx,
}

/// Spatial dims of an image op: `[batch, h, w, c]`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Image {
    /// Images.
    pub batch: usize,
    /// Height.
    pub h: usize,
    /// Width.
    pub w: usize,
    /// Channels.
    pub c: usize,
}

/// A tensor op with its dims. Inputs are listed in argument order.
#[derive(Clone, Debug)]
pub enum Op {
    /// `x [B,H,W,Ci], w [Co,Ci/g,kh,kw], (bias [Co])` → `[B,H',W',Co]`.
    Conv2d(Conv2d),
    /// A convolution or linear layer with what follows it, in evaluation.
    FusedConv(FusedConv),
    /// `x [rows,in], w [out,in], (bias [out])` → `[rows,out]`.
    Linear(Linear),
    /// `a, b` → `alpha · op(a) · op(b)`.
    MatMul {
        /// Dims and transpositions.
        dims: Gemm,
        /// Factor.
        alpha: f32,
    },
    /// `x [rows,C], gamma, beta` → `act(batch norm)`, statistics of this batch; saves mean and 1/std.
    BatchNorm {
        /// Dims.
        dims: Norm,
        /// Activation fused behind the norm.
        act: Activation,
        /// Share of the batch in the running statistics.
        momentum: f32,
        /// Running mean and variance, updated after a training forward.
        running: [super::ParamId; 2],
    },
    /// `x [rows,C], gamma, beta, running mean, running variance` → `act(batch norm)` with running statistics.
    BatchNormEval {
        /// Dims.
        dims: Norm,
        /// Activation fused behind the norm.
        act: Activation,
    },
    /// `x [rows,C], gamma, beta`; saves mean and 1/std per row.
    LayerNorm(Norm),
    /// `x [batch,rows,C], gamma, beta`; saves mean and 1/std per batch entry.
    GroupNorm(GroupNorm),
    /// Elementwise.
    Activation(Activation),
    /// Softmax attention over a packed `qkv [B,N,3,heads,d]` → `[B,N,heads·d]`; saves the probabilities.
    Attention(Attention),
    /// `qkv, last [B] (i32)`: as [`Op::Attention`], where sequence b's keys are its tokens 0..=`last[b]`.
    MaskedAttention(Attention),
    /// `q [heads·d], kv [B,N,2,heads,d]` → `[B,heads·d]`: attention of one query; saves the probabilities.
    AttentionPool(AttentionPool),
    /// `x [B,N,C], w [C,1,1,K]` → `[B,N,C]`: depthwise convolution over tokens.
    TokenConv(TokenConv),
    /// The softmax probabilities `[B,heads,N,N]` of the same packed `qkv`, as a value (attention-level distillation).
    AttentionMap(Attention),
    /// MobileViTv2's attention over a packed `qkv [B,N,1+2d]` → `[B,N,d]`; saves the weights and the context.
    SeparableAttention(SeparableAttention),
    /// `a + b`, same size.
    Add,
    /// `x [outer, n] + b [n]`.
    AddBroadcast,
    /// `a ∘ b`, same size.
    Mul,
    /// `x [batch,hw,C], s [batch,C]` → `x·s`. A batch of 1 shares the factors among all rows (layer scale).
    ScaleChannels {
        /// Images with factors of their own.
        batch: usize,
        /// Rows that share factors.
        hw: usize,
        /// Channels.
        c: usize,
    },
    /// `x [batch,len], m [batch]` → `x·m`; no gradient to `m` (stochastic depth).
    ScaleSamples {
        /// Samples.
        batch: usize,
        /// Values of a sample.
        len: usize,
    },
    /// `s · x`.
    Scale(f32),
    /// `e^x`.
    Exp,
    /// MobileViT's unfold: `[B,H,W,C]` → `[B·P, N, C]`.
    Unfold(Patches),
    /// Inverse of [`Op::Unfold`].
    Fold(Patches),
    /// `[B,HW,C]` → `[B,C]`.
    GlobalAvgPool {
        /// Images.
        batch: usize,
        /// Pixels.
        hw: usize,
        /// Channels.
        c: usize,
    },
    /// Average over windows.
    AvgPool(Pool2d),
    /// Maximum over windows; saves the winners' positions.
    MaxPool(Pool2d),
    /// Bilinear resize, no antialiasing.
    Resize(Resize),
    /// `table [V,width], ids (i32)` → `[len, width]`.
    Embedding {
        /// Row width.
        width: usize,
    },
    /// `x [B,N,width], index [B] (i32)` → `[B,width]`.
    GatherRows {
        /// Batch.
        batch: usize,
        /// Rows per batch entry.
        tokens: usize,
        /// Row width.
        width: usize,
    },
    /// `a [rows,ca], b [rows,cb]` → `[rows,ca+cb]`.
    ConcatLast {
        /// Rows.
        rows: usize,
        /// Width of `a`.
        ca: usize,
        /// Width of `b`.
        cb: usize,
    },
    /// `token [width], x [B,N,width]` → `[B,N+1,width]`.
    PrependToken {
        /// Batch.
        batch: usize,
        /// Rows per batch entry.
        tokens: usize,
        /// Row width.
        width: usize,
    },
    /// Rows `start..start+len` of `x [B,N,width]`.
    SliceRows {
        /// Batch.
        batch: usize,
        /// Rows per batch entry.
        tokens: usize,
        /// Row width.
        width: usize,
        /// First row kept.
        start: usize,
        /// Rows kept.
        len: usize,
    },
    /// Axes reordered.
    Permute {
        /// Input shape.
        shape: Vec<usize>,
        /// Output axis i is input axis `axes[i]`.
        axes: Vec<usize>,
    },
    /// Rows scaled to unit L2 norm; saves the norms.
    L2Normalize {
        /// Rows.
        rows: usize,
        /// Width.
        c: usize,
    },
    /// Softmax over rows of `x / temperature`.
    Softmax {
        /// Rows.
        rows: usize,
        /// Width.
        c: usize,
        /// Divisor of the logits.
        temperature: f32,
    },
    /// `a [B,D], b [B',D], scale [1], p_row [B,B'], p_col [B',B]` → scalar contrastive cross-entropy or KL.
    Contrastive(Contrastive),
    /// `a [rows,D], b [cols,D], scale [1]`, the targets `own [rows] (i32), other [rows] (i32), keep [rows], group [cols] (i32),
    /// share [cols], column_total [cols]`, then for each teacher `u [rows,D_k], v [cols,D_k]` (logits u·vᵀ) → `[2]`: CLIP's
    /// cross-entropy and the relational distillation. Gradients to a, b and scale.
    Relational(Relational),
    /// `a [B,D], b [B',D], scale [1], bias [1], t [B,B']` → scalar: SigLIP's pairwise cross-entropy.
    SigmoidLoss(SigmoidLoss),
    /// Mean squared error of `a, b` → scalar.
    Mse,
    /// Mean over rows of `1 − cos(a_i, b_i)` → scalar.
    Cosine {
        /// Rows.
        rows: usize,
        /// Width.
        c: usize,
    },
    /// `p (target), q`, rows of probabilities → mean over rows of `KL(p ‖ q)`.
    KlRows {
        /// Rows.
        rows: usize,
        /// Width.
        c: usize,
    },
    /// Attention-transfer map `[B,HW,C]` → `[B,HW]`: mean over channels of x², L2-normalised per image.
    AttentionTransferMap {
        /// Images.
        batch: usize,
        /// Pixels.
        hw: usize,
        /// Channels.
        c: usize,
    },
}

/// What a VJP reads besides the gradient and the saved tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Needs {
    /// Bit i: input i's value.
    pub inputs: u32,
    /// The node's own value.
    pub output: bool,
}

const ALL: u32 = u32::MAX;

impl Op {
    /// Name for messages, plans and drawings.
    pub fn name(&self) -> &'static str {
        match self {
            Op::Conv2d(d) if d.groups > 1 && d.groups == d.c_in => "depthwise_conv2d",
            Op::Conv2d(_) => "conv2d",
            Op::FusedConv(f) if f.conv.groups > 1 && f.conv.groups == f.conv.c_in => "fused_depthwise_conv2d",
            Op::FusedConv(_) => "fused_conv2d",
            Op::Linear(_) => "linear",
            Op::MatMul { .. } => "matmul",
            Op::BatchNorm { .. } | Op::BatchNormEval { .. } => "batch_norm",
            Op::LayerNorm(_) => "layer_norm",
            Op::GroupNorm(_) => "group_norm",
            Op::Activation(_) => "activation",
            Op::Attention(_) => "attention",
            Op::MaskedAttention(_) => "masked_attention",
            Op::AttentionPool(_) => "attention_pool",
            Op::TokenConv(_) => "token_conv",
            Op::SigmoidLoss(_) => "sigmoid_loss",
            Op::AttentionMap(_) => "attention_map",
            Op::SeparableAttention(_) => "separable_attention",
            Op::Add => "add",
            Op::AddBroadcast => "add_broadcast",
            Op::Mul => "mul",
            Op::ScaleChannels { .. } => "scale_channels",
            Op::ScaleSamples { .. } => "drop_path",
            Op::Scale(_) => "scale",
            Op::Exp => "exp",
            Op::Unfold(_) => "unfold_patches",
            Op::Fold(_) => "fold_patches",
            Op::GlobalAvgPool { .. } => "global_avg_pool",
            Op::AvgPool(_) => "avg_pool",
            Op::MaxPool(_) => "max_pool",
            Op::Resize(_) => "resize_bilinear",
            Op::Embedding { .. } => "embedding",
            Op::GatherRows { .. } => "gather_rows",
            Op::ConcatLast { .. } => "concat",
            Op::PrependToken { .. } => "prepend_token",
            Op::SliceRows { .. } => "slice_rows",
            Op::Permute { .. } => "permute",
            Op::L2Normalize { .. } => "l2_normalize",
            Op::Softmax { .. } => "softmax",
            Op::Contrastive(_) => "contrastive",
            Op::Relational(_) => "relational",
            Op::Mse => "mse",
            Op::Cosine { .. } => "cosine",
            Op::KlRows { .. } => "kl",
            Op::AttentionTransferMap { .. } => "attention_transfer_map",
        }
    }

    /// What the VJP reads.
    pub fn needs(&self) -> Needs {
        let (inputs, output) = match self {
            Op::Conv2d(_) | Op::Linear(_) | Op::Embedding { .. } | Op::ScaleChannels { .. } => (0b11, false),
            Op::AttentionPool(_) | Op::TokenConv(_) => (0b11, false),
            Op::SigmoidLoss(_) | Op::Relational(_) => (ALL, false),
            Op::BatchNorm { .. } | Op::LayerNorm(_) | Op::GroupNorm(_) => (0b111, false),
            Op::BatchNormEval { .. } => (0b11111, false),
            Op::MatMul { .. } | Op::Mul | Op::Mse | Op::Cosine { .. } | Op::KlRows { .. } | Op::Contrastive(_) => {
                (ALL, false)
            }
            Op::Activation(_)
            | Op::Attention(_)
            | Op::MaskedAttention(_)
            | Op::SeparableAttention(_)
            | Op::AttentionTransferMap { .. } => (0b1, false),
            Op::GatherRows { .. } | Op::ScaleSamples { .. } => (0b10, false),
            Op::AttentionMap(_) => (0b1, true),
            Op::L2Normalize { .. } | Op::Softmax { .. } | Op::Exp => (0, true),
            Op::FusedConv(_)
            | Op::Add
            | Op::AddBroadcast
            | Op::Scale(_)
            | Op::Unfold(_)
            | Op::Fold(_)
            | Op::GlobalAvgPool { .. }
            | Op::AvgPool(_)
            | Op::MaxPool(_)
            | Op::Resize(_)
            | Op::ConcatLast { .. }
            | Op::PrependToken { .. }
            | Op::SliceRows { .. }
            | Op::Permute { .. } => (0, false),
        };
        Needs { inputs, output }
    }

    /// Lengths of the tensors that the forward saves for the VJP.
    pub fn saved(&self) -> Vec<usize> {
        match self {
            Op::BatchNorm { dims, .. } => vec![dims.c, dims.c],
            Op::LayerNorm(dims) => vec![dims.rows, dims.rows],
            Op::Attention(d) | Op::MaskedAttention(d) => vec![d.batch * d.heads * d.tokens * d.tokens],
            Op::AttentionPool(d) => vec![d.batch * d.heads * d.tokens],
            Op::GroupNorm(d) => vec![d.batch, d.batch],
            Op::SeparableAttention(d) => vec![d.batch * d.tokens, d.batch * d.dim],
            Op::MaxPool(d) => vec![d.batch * d.out_h() * d.out_w() * d.c],
            Op::L2Normalize { rows, .. } => vec![*rows],
            _ => Vec::new(),
        }
    }

    /// Whether a gradient flows to input `i`.
    pub fn differentiable(&self, i: usize) -> bool {
        match self {
            Op::BatchNormEval { .. } => i < 3,
            Op::Embedding { .. } => i == 0,
            Op::GatherRows { .. } | Op::ScaleSamples { .. } => i == 0,
            Op::Contrastive(_) | Op::Relational(_) => i < 3,
            Op::SigmoidLoss(_) => i < 4,
            Op::MaskedAttention(_) => i == 0,
            Op::KlRows { .. } => i == 1,
            Op::FusedConv(_) => false,
            _ => true,
        }
    }

    /// Floating-point operations of the forward (a multiply-add counts two) for an output of `numel` elements.
    /// Layout changes count nothing; transcendental functions count one.
    pub fn flops(&self, numel: usize) -> u64 {
        let n = numel as u64;
        match self {
            Op::Conv2d(d) | Op::FusedConv(FusedConv { conv: d, .. }) => d.flops(),
            Op::Linear(d) => 2 * (d.rows * d.c_in * d.c_out) as u64,
            Op::MatMul { dims: d, .. } => 2 * (d.m * d.n * d.k) as u64,
            Op::BatchNorm { .. } | Op::LayerNorm(_) | Op::GroupNorm(_) => 8 * n,
            Op::BatchNormEval { .. } => 3 * n,
            Op::AttentionPool(d) => 4 * (d.batch * d.tokens * d.heads * d.head_dim) as u64,
            Op::TokenConv(d) => 2 * n * d.kernel as u64,
            Op::SigmoidLoss(d) => 2 * (d.rows * d.cols * d.dim) as u64,
            Op::Attention(d) | Op::MaskedAttention(d) => {
                4 * (d.batch * d.heads * d.tokens * d.tokens * d.head_dim) as u64
            }
            Op::AttentionMap(d) => 2 * (d.batch * d.heads * d.tokens * d.tokens * d.head_dim) as u64,
            Op::Contrastive(d) => 2 * (d.rows * d.cols * d.dim) as u64,
            Op::Relational(d) => d.flops(),
            Op::GlobalAvgPool { hw, .. } => n * *hw as u64,
            Op::SeparableAttention(d) => 4 * (d.batch * d.tokens * d.dim) as u64,
            Op::AvgPool(d) | Op::MaxPool(d) => n * (d.k * d.k) as u64,
            Op::Resize(_) => 7 * n,
            Op::AttentionTransferMap { c, .. } => 2 * n * *c as u64,
            Op::Cosine { rows, c } | Op::KlRows { rows, c } => 4 * (rows * c) as u64,
            Op::L2Normalize { .. } | Op::Softmax { .. } => 4 * n,
            Op::Add
            | Op::AddBroadcast
            | Op::Mul
            | Op::ScaleChannels { .. }
            | Op::ScaleSamples { .. }
            | Op::Scale(_)
            | Op::Exp
            | Op::Activation(_) => n,
            Op::Mse
            | Op::Unfold(_)
            | Op::Fold(_)
            | Op::Embedding { .. }
            | Op::GatherRows { .. }
            | Op::ConcatLast { .. }
            | Op::PrependToken { .. }
            | Op::SliceRows { .. }
            | Op::Permute { .. } => 0,
        }
    }
}
