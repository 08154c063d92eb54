//! What runs the nodes: the backend trait and the CPU backend.

mod cpu;
mod reference;

use std::borrow::Cow;

use mcpipe_cpu::norm::Norm;

use crate::graph::{Node, ValueId};

pub use cpu::Cpu;

/// Which kernels the CPU backend uses.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Kernels {
    /// Own kernels for the backbone ops, dfdx for the nodes marked so (projections and losses).
    #[default]
    Native,
    /// The dfdx formulation of every op that dfdx can express; plain loops for the rest. Slow: for comparison.
    Reference,
}

/// A backend that could not run a node.
#[derive(Clone, Debug, thiserror::Error)]
#[error("{op} at `{label}` failed: {reason}")]
pub struct BackendError {
    /// Op name.
    pub op: &'static str,
    /// Layer path.
    pub label: String,
    /// What went wrong.
    pub reason: String,
}

/// An argument of an op: a buffer's first `len` elements, or ids.
#[derive(Debug)]
pub enum Arg<'a, B: Backend + ?Sized> {
    /// Values.
    F32 {
        /// The buffer, at least `len` long.
        buffer: &'a B::Buffer,
        /// Elements that belong to the argument.
        len: usize,
    },
    /// Ids.
    I32(&'a B::Ints),
}

/// What a forward reads and writes.
#[derive(Debug)]
pub struct Forward<'a, B: Backend + ?Sized> {
    /// Arguments in order.
    pub ins: &'a [Arg<'a, B>],
    /// The value, to be overwritten.
    pub out: &'a mut B::Buffer,
    /// Tensors saved for the VJP, to be overwritten.
    pub saved: &'a mut [B::Buffer],
    /// Whether a VJP will follow.
    pub keep: bool,
}

/// Where an argument's gradient goes.
#[derive(Debug)]
pub struct GradOut<'a, B: Backend + ?Sized> {
    /// The buffer.
    pub buffer: &'a mut B::Buffer,
    /// Elements that belong to the gradient.
    pub len: usize,
    /// Add to what is there (always so for parameters) instead of overwriting.
    pub accumulate: bool,
}

/// What a VJP reads and writes.
#[derive(Debug)]
pub struct Vjp<'a, B: Backend + ?Sized> {
    /// Arguments in order; those that the op does not need may hold anything.
    pub ins: &'a [Arg<'a, B>],
    /// The value, where the op needs it.
    pub out: Option<&'a B::Buffer>,
    /// What the forward saved.
    pub saved: &'a [B::Buffer],
    /// Gradient of the value.
    pub dout: &'a B::Buffer,
    /// Gradients of the arguments; none where no gradient is wanted.
    pub grads: &'a mut [Option<GradOut<'a, B>>],
}

/// Forward and VJP of every op on one kind of device.
pub trait Backend {
    /// Device memory of `f32`.
    type Buffer: Default + std::fmt::Debug;
    /// Device memory of `i32`.
    type Ints: Default + std::fmt::Debug;

    /// Whether evaluation graphs are to be fused: the backend then runs [`Op::FusedConv`](crate::op::Op::FusedConv).
    fn fuses(&self) -> bool;
    /// Makes `buffer` hold at least `len` elements.
    fn grow(&mut self, buffer: &mut Self::Buffer, len: usize);
    /// Copies host values to the front of `buffer`.
    fn upload(&mut self, values: &[f32], buffer: &mut Self::Buffer);
    /// Copies host ids into `ids`.
    fn upload_ints(&mut self, values: &[i32], ids: &mut Self::Ints);
    /// The first `len` elements on the host.
    fn view<'a>(&self, buffer: &'a Self::Buffer, len: usize) -> Cow<'a, [f32]>;
    /// Runs a node.
    ///
    /// # Errors
    /// The device refuses, or an id lies outside its table.
    fn forward(&mut self, id: ValueId, node: &Node, io: Forward<'_, Self>) -> Result<(), BackendError>;
    /// Runs a node's VJP.
    ///
    /// # Errors
    /// The device refuses.
    fn vjp(&mut self, id: ValueId, node: &Node, io: Vjp<'_, Self>) -> Result<(), BackendError>;
    /// Moves running statistics towards a batch's: `r ← (1 − momentum)·r + momentum·batch`, variance unbiased.
    fn running_statistics(
        &mut self,
        dims: &Norm,
        momentum: f32,
        batch: [&Self::Buffer; 2],
        running: [&mut Self::Buffer; 2],
    );
}
