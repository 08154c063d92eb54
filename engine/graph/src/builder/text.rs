//! What text towers and SigLIP's models add: padding masks, attention pooling, convolutions over tokens.

use mcpipe_cpu::attention_pool::AttentionPool;
use mcpipe_cpu::sigmoid_loss::SigmoidLoss;
use mcpipe_cpu::token_conv::TokenConv;

use super::{GraphBuilder, Path};
use crate::graph::{GraphError, Tensor};
use crate::init::Init;
use crate::op::Op;

impl GraphBuilder {
    /// As [`attention`](Self::attention), where in sequence b only the tokens 0..=`last[b]` are keys; `last [B]` holds
    /// `i32`.
    ///
    /// # Errors
    /// A width that the heads don't divide, or not one last token per sequence.
    pub fn masked_attention(
        &mut self,
        qkv: &Tensor,
        last: &Tensor,
        heads: usize,
        causal: bool,
    ) -> Result<Tensor, GraphError> {
        let d = self.attention_dims(qkv, heads, causal)?;
        if last.shape != [d.batch] {
            return Err(self.refuse("masked_attention", &[qkv, last], "one last token per sequence is needed"));
        }
        Ok(self.op(Op::MaskedAttention(d), &[qkv, last], vec![d.batch, d.tokens, heads * d.head_dim]))
    }

    /// Softmax attention of one query `q`, the same for every sequence, over packed `kv [B, N, 2·width]` (k, v, each
    /// heads × head_dim) → `[B, width]`.
    ///
    /// # Errors
    /// Widths that differ or that the heads don't divide.
    pub fn attention_pool(&mut self, q: &Tensor, kv: &Tensor, heads: usize) -> Result<Tensor, GraphError> {
        let [batch, tokens, width] = self.tokens("attention_pool", kv)?;
        if heads == 0 || width % (2 * heads) != 0 || q.numel() != width / 2 {
            let reason = format!("keys and values as wide as the query, divisible by {heads} heads, are needed");
            return Err(self.refuse("attention_pool", &[q, kv], reason));
        }
        let d = AttentionPool { batch, tokens, heads, head_dim: width / (2 * heads) };
        Ok(self.op(Op::AttentionPool(d), &[q, kv], vec![batch, width / 2]))
    }

    /// Depthwise convolution over the tokens of `x [B, N, C]` with `{path}.weight` `[C, 1, 1, kernel]`, zeros outside the
    /// sequence.
    ///
    /// # Errors
    /// An even kernel, or a parameter of that path with another shape.
    pub fn token_conv(&mut self, path: &Path, x: &Tensor, kernel: usize, init: Init) -> Result<Tensor, GraphError> {
        let [batch, tokens, channels] = self.tokens("token_conv", x)?;
        if kernel.is_multiple_of(2) {
            return Err(self.refuse("token_conv", &[x], format!("a kernel of {kernel} has no middle")));
        }
        let w = self.param(&path.at("weight"), &[channels, 1, 1, kernel], init)?;
        let d = TokenConv { batch, tokens, channels, kernel };
        Ok(self.op(Op::TokenConv(d), &[x, &w], x.shape.clone()))
    }

    /// SigLIP's loss; see [`Op::SigmoidLoss`]. `targets [B,B']` lie in 0..1.
    ///
    /// # Errors
    /// Sizes that don't fit together.
    pub fn sigmoid_loss(
        &mut self,
        d: SigmoidLoss,
        a: &Tensor,
        b: &Tensor,
        [scale, bias]: [&Tensor; 2],
        targets: &Tensor,
    ) -> Result<Tensor, GraphError> {
        let fits = a.shape == [d.rows, d.dim]
            && b.shape == [d.cols, d.dim]
            && scale.numel() == 1
            && bias.numel() == 1
            && targets.shape == [d.rows, d.cols];
        if !fits {
            return Err(self.refuse("sigmoid_loss", &[a, b, scale, bias, targets], "embeddings and targets don't fit"));
        }
        Ok(self.op(Op::SigmoidLoss(d), &[a, b, scale, bias, targets], vec![1]))
    }
}
