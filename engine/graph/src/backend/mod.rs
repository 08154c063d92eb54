//! What runs the nodes: the backend trait and the CPU backend.

mod cpu;
mod parts;
mod reference;

use std::borrow::Cow;

use mcpipe_cpu::norm::Norm;

use crate::graph::{Node, StepGraph, ValueId};
use crate::op::{Needs, Op};

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

/// Element type of a value in a backend's memory. Parameters, their gradients and what ops save are always `F32`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Dtype {
    /// 32 bits.
    #[default]
    F32,
    /// The upper 16 bits of an `F32`.
    Bf16,
}

impl Dtype {
    /// Bytes of an element.
    pub fn bytes(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 => 2,
        }
    }
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

/// What a backend lays out its own way: read when the memory is planned.
pub trait Layout {
    /// Element type of a value and of its gradient.
    fn dtype(&self, _graph: &StepGraph, _id: ValueId) -> Dtype {
        Dtype::F32
    }
    /// Whether slots are ranges of one memory that may overlap where their tensors' lives don't meet.
    fn overlaps(&self) -> bool {
        false
    }
    /// What an op's VJP reads.
    fn needs(&self, op: &Op) -> Needs {
        op.needs()
    }
    /// Lengths of the `F32` tensors that an op's forward saves for its VJP.
    fn saved(&self, op: &Op) -> Vec<usize> {
        op.saved()
    }
}

/// The CPU's layout.
#[derive(Clone, Copy, Debug)]
pub struct Plain;

impl Layout for Plain {}

/// An argument of an op: a buffer's first `len` elements, or ids.
#[derive(Debug)]
pub enum Arg<'a, B: Backend + ?Sized> {
    /// Values.
    Values {
        /// The buffer, at least `len` long.
        buffer: &'a B::Buffer,
        /// Elements that belong to the argument.
        len: usize,
        /// Their type.
        dtype: Dtype,
    },
    /// Ids.
    Ids(&'a B::Ints),
}

/// What a forward reads and writes.
#[derive(Debug)]
pub struct Forward<'a, B: Backend + ?Sized> {
    /// Arguments in order.
    pub ins: &'a [Arg<'a, B>],
    /// The value, to be overwritten.
    pub out: &'a mut B::Buffer,
    /// Its element type.
    pub dtype: Dtype,
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
    /// Their type.
    pub dtype: Dtype,
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
    /// Element type of the value and of its gradient.
    pub dtype: Dtype,
    /// Gradients of the arguments; none where no gradient is wanted.
    pub grads: &'a mut [Option<GradOut<'a, B>>],
}

/// Part of a buffer.
#[derive(Debug)]
pub struct Part<'a, B: Backend + ?Sized> {
    /// The buffer.
    pub buffer: &'a B::Buffer,
    /// Element type.
    pub dtype: Dtype,
    /// First element.
    pub start: usize,
    /// Elements.
    pub len: usize,
}

impl<B: Backend + ?Sized> Part<'_, B> {
    /// `len` of its elements from `start` on.
    pub fn slice(self, start: usize, len: usize) -> Self {
        debug_assert!(start + len <= self.len, "{start} + {len} of {}", self.len);
        Part { start: self.start + start, len, ..self }
    }
}

/// Forward and VJP of every op on one kind of device.
///
/// Copies between host and device give no error: a device that fails stays failed, gives NaN from then on and says so at
/// the next [`forward`](Self::forward) or [`vjp`](Self::vjp).
pub trait Backend: Layout {
    /// Device memory.
    type Buffer: Default + std::fmt::Debug;
    /// Device memory of `i32`.
    type Ints: Clone + Default + std::fmt::Debug;

    /// Whether evaluation graphs are to be fused: the backend then runs [`Op::FusedConv`](crate::op::Op::FusedConv).
    fn fuses(&self) -> bool;
    /// Whether the losses of training graphs are to be fused ([`fuse_losses`](crate::fuse_losses)).
    fn fuses_losses(&self) -> bool {
        false
    }
    /// A buffer for each of the sizes, in bytes.
    ///
    /// # Errors
    /// The device's memory does not suffice.
    fn allocate(&mut self, bytes: &[usize]) -> Result<Vec<Self::Buffer>, BackendError>;
    /// A buffer for each of the ranges (start and size in bytes) of one memory of `total` bytes; for a backend that
    /// [overlaps](Layout::overlaps).
    ///
    /// # Errors
    /// The device's memory does not suffice.
    fn allocate_ranges(&mut self, _total: usize, ranges: &[(usize, usize)]) -> Result<Vec<Self::Buffer>, BackendError> {
        self.allocate(&ranges.iter().map(|(_, size)| *size).collect::<Vec<_>>())
    }
    /// Called before each walk forward over `graph`.
    ///
    /// # Errors
    /// The device refuses.
    fn begin(&mut self, _graph: &StepGraph) -> Result<(), BackendError> {
        Ok(())
    }
    /// Waits for what was asked for, so that a node can be timed.
    fn settle(&self) {}
    /// Copies host values to the front of `buffer`.
    fn upload(&mut self, values: &[f32], dtype: Dtype, buffer: &mut Self::Buffer);
    /// Copies host ids into `ids`.
    fn upload_ints(&mut self, values: &[i32], ids: &mut Self::Ints);
    /// Elements on the host.
    fn view<'a>(&self, part: Part<'a, Self>) -> Cow<'a, [f32]>;
    /// Copies elements to `to` from its element `start` on, converting between types; adds them where `add` says so.
    fn copy(&mut self, from: Part<'_, Self>, to: &mut Self::Buffer, dtype: Dtype, start: usize, add: bool);
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
