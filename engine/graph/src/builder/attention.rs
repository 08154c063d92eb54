//! Attention and softmax.

use mcpipe_cpu::attention::Attention;
use mcpipe_cpu::separable::SeparableAttention;

use super::GraphBuilder;
use crate::graph::{GraphError, Tensor};
use crate::op::Op;

impl GraphBuilder {
    pub(super) fn attention_dims(&self, qkv: &Tensor, heads: usize, causal: bool) -> Result<Attention, GraphError> {
        match qkv.shape[..] {
            [batch, tokens, width] if heads > 0 && width % (3 * heads) == 0 => {
                Ok(Attention { batch, tokens, heads, head_dim: width / (3 * heads), causal })
            }
            _ => Err(self.refuse(
                "attention",
                &[qkv],
                format!("[batch, tokens, 3·width] with width divisible by {heads} heads is needed"),
            )),
        }
    }

    /// Softmax attention over packed `qkv [B, N, 3·width]` (q, k, v, each heads × head_dim) → `[B, N, width]`.
    ///
    /// # Errors
    /// A width that the heads don't divide.
    pub fn attention(&mut self, qkv: &Tensor, heads: usize, causal: bool) -> Result<Tensor, GraphError> {
        let d = self.attention_dims(qkv, heads, causal)?;
        Ok(self.op(Op::Attention(d), &[qkv], vec![d.batch, d.tokens, heads * d.head_dim]))
    }

    /// The attention probabilities `[B, heads, N, N]` of the same packed `qkv`.
    ///
    /// # Errors
    /// As [`attention`](Self::attention).
    pub fn attention_map(&mut self, qkv: &Tensor, heads: usize, causal: bool) -> Result<Tensor, GraphError> {
        let d = self.attention_dims(qkv, heads, causal)?;
        Ok(self.op(Op::AttentionMap(d), &[qkv], vec![d.batch, heads, d.tokens, d.tokens]))
    }

    /// Softmax over the last axis of `x / temperature`.
    pub fn softmax(&mut self, x: &Tensor, temperature: f32) -> Tensor {
        let (rows, c) = Self::rows(x);
        self.op(Op::Softmax { rows, c, temperature }, &[x], x.shape.clone())
    }

    /// MobileViTv2's separable self-attention (Mehta & Rastegari 2022b, §3.2) over packed `qkv [B, N, 1 + 2·d]` (query,
    /// keys, values) → `[B, N, d]`: the softmax over N of the queries weighs the keys to one context, by which
    /// relu(values) are scaled.
    ///
    /// # Errors
    /// Not `[batch, tokens, odd width]`.
    pub fn separable_attention(&mut self, qkv: &Tensor) -> Result<Tensor, GraphError> {
        match qkv.shape[..] {
            [batch, tokens, width] if width % 2 == 1 && width > 1 => {
                let d = SeparableAttention { batch, tokens, dim: width / 2 };
                Ok(self.op(Op::SeparableAttention(d), &[qkv], vec![batch, tokens, width / 2]))
            }
            _ => Err(self.refuse("separable_attention", &[qkv], "[batch, tokens, 1 + 2·width] is needed")),
        }
    }
}
