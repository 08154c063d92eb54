//! The step graph: the tensor ops of one training or evaluation step as a petgraph DAG, and the executor that walks
//! it forward and, node by node, backward.
//!
//! * [`GraphBuilder`] adds ops; shapes are inferred and checked while building.
//! * [`StepGraph`] is the finished DAG: nodes in topological order, parameters, inputs.
//! * [`MemoryPlan`] gives every value, saved tensor and gradient a slot from its lifetime, so that a step allocates
//!   nothing after the first and its memory is known before anything runs.
//! * [`Executor`] runs a graph on a [`Backend`]: [`Cpu`] (own kernels; dfdx for the nodes marked so).
//!
//! Values are `f32`, contiguous and row-major; images are channels-last `[B, H, W, C]`. Token ids are `i32` inputs.

pub mod backend;
mod builder;
mod exec;
mod fuse;
mod graph;
pub mod init;
mod memory;
pub mod op;
mod params;
mod schedule;

pub use backend::{Backend, Cpu, Dtype, Kernels, Layout, Part};
pub use builder::{BatchNormArgs, ConvArgs, GraphBuilder, PairInputs, Path};
pub use exec::{ExecError, Executor, Feed, Feeds, OpTime, Watch};
pub use fuse::{FusedConv, fuse_losses};
pub use graph::{GraphError, Node, ParamId, ParamSpec, Source, StepGraph, StochasticInput, Tensor, ValueId};
pub use init::Init;
pub use mcpipe_cpu::Precision;
pub use mcpipe_cpu::activation::Activation;
pub use memory::{MemoryPlan, Mode};
pub use op::{Distance, Op, Runner};
pub use params::{Grads, Param, ParamKind, ParamStore};
pub use schedule::Task;
