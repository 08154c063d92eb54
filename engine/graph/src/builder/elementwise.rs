//! Element-wise ops and the products with repeated factors: per channel, per sample.

use mcpipe_cpu::activation::Activation;

use super::GraphBuilder;
use crate::graph::{GraphError, StochasticInput, Tensor};
use crate::op::Op;

impl GraphBuilder {
    /// Elementwise activation.
    pub fn activation(&mut self, x: &Tensor, act: Activation) -> Tensor {
        if act == Activation::Identity { x.clone() } else { self.op(Op::Activation(act), &[x], x.shape.clone()) }
    }

    pub(super) fn same_size(&mut self, op: Op, a: &Tensor, b: &Tensor) -> Result<Tensor, GraphError> {
        if a.numel() != b.numel() {
            return Err(self.refuse(op.name(), &[a, b], "the sizes differ"));
        }
        Ok(self.op(op, &[a, b], a.shape.clone()))
    }

    /// `a + b`.
    ///
    /// # Errors
    /// Sizes differ.
    pub fn add(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor, GraphError> {
        self.same_size(Op::Add, a, b)
    }

    /// `a ∘ b`.
    ///
    /// # Errors
    /// Sizes differ.
    pub fn mul(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor, GraphError> {
        self.same_size(Op::Mul, a, b)
    }

    /// `x + b`, where `b` is repeated over the leading axes of `x`.
    ///
    /// # Errors
    /// `b`'s size does not divide `x`'s.
    pub fn add_broadcast(&mut self, x: &Tensor, b: &Tensor) -> Result<Tensor, GraphError> {
        if b.numel() == 0 || !x.numel().is_multiple_of(b.numel()) {
            return Err(self.refuse("add_broadcast", &[x, b], "the second operand does not repeat over the first"));
        }
        Ok(self.op(Op::AddBroadcast, &[x, b], x.shape.clone()))
    }

    /// `s · x`.
    pub fn scale(&mut self, x: &Tensor, s: f32) -> Tensor {
        self.op(Op::Scale(s), &[x], x.shape.clone())
    }

    /// `e^x`.
    pub fn exp(&mut self, x: &Tensor) -> Tensor {
        self.op(Op::Exp, &[x], x.shape.clone())
    }

    /// `x [B, …, C]` times `s` per channel: one factor per image and channel if `s` is `[B, C]` (squeeze-and-excitation),
    /// else `s` holds C values for all of them (layer scale).
    ///
    /// # Errors
    /// `s` is neither.
    pub fn scale_channels(&mut self, x: &Tensor, s: &Tensor) -> Result<Tensor, GraphError> {
        let (rows, c) = Self::rows(x);
        let batch = match x.shape.first() {
            Some(&batch) if s.shape == [batch, c] => batch,
            _ if s.numel() == c => 1,
            _ => return Err(self.refuse("scale_channels", &[x, s], "[batch, channels] or [channels] is needed")),
        };
        let op = Op::ScaleChannels { batch, hw: rows / batch.max(1), c };
        Ok(self.op(op, &[x, s], x.shape.clone()))
    }

    /// Stochastic depth (Huang et al. 2016) of a residual branch `x [B, …]`: in a training graph each sample is dropped
    /// with probability `rate`, else scaled by 1/(1 − rate), by a mask `[B]` that is fed each step
    /// ([`StepGraph::stochastic`](crate::StepGraph::stochastic)). The value itself in an evaluation graph or at rate 0.
    ///
    /// # Errors
    /// A rate outside `0..1`, or a value without axes.
    pub fn drop_path(&mut self, x: &Tensor, rate: f32) -> Result<Tensor, GraphError> {
        if !(0.0..1.0).contains(&rate) {
            return Err(self.refuse("drop_path", &[x], format!("the rate {rate} is not in 0..1")));
        }
        let Some(&batch) = x.shape.first() else {
            return Err(self.refuse("drop_path", &[x], "it has no axis of samples"));
        };
        if rate == 0.0 || !self.train {
            return Ok(x.clone());
        }
        let name = format!("drop_path.{}", self.stochastic.len());
        let mask_b = self.input(name.clone(), &[batch]);
        self.stochastic.push(StochasticInput { name, keep: 1.0 - rate, samples: batch });
        let op = Op::ScaleSamples { batch, len: x.numel() / batch.max(1) };
        Ok(self.op(op, &[x, &mask_b], x.shape.clone()))
    }
}
