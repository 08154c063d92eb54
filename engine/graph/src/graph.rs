//! The finished step graph and the handles into it.

use petgraph::graph::{DiGraph, NodeIndex};

use crate::init::Init;
use crate::op::{Op, Runner};
use crate::params::ParamKind;

/// The value a node produces; also the node's index in the DAG.
pub type ValueId = NodeIndex<u32>;

/// Position of a parameter in [`StepGraph::params`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ParamId(pub usize);

/// A value of the graph seen with a shape. A reshape is another view of the same value.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tensor {
    pub(crate) id: ValueId,
    pub(crate) shape: Vec<usize>,
}

impl Tensor {
    /// Shape, outermost dimension first.
    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    /// Number of elements.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// The value behind this view.
    pub fn id(&self) -> ValueId {
        self.id
    }
}

/// Where a node's value comes from.
#[derive(Clone, Debug)]
pub enum Source {
    /// Fed by the caller under a name, `f32`.
    Input(String),
    /// Fed by the caller under a name, `i32` (token ids, row indices).
    IntInput(String),
    /// A parameter of the store.
    Param(ParamId),
    /// Computed.
    Op(Op),
}

/// One node of the DAG: it produces one value.
#[derive(Clone, Debug)]
pub struct Node {
    /// What produces the value.
    pub source: Source,
    /// Inputs in argument order (the DAG's edges carry the same, as positions).
    pub inputs: Vec<ValueId>,
    /// Shape of the value.
    pub shape: Vec<usize>,
    /// Whether a gradient flows into this value.
    pub requires_grad: bool,
    /// Layer path of the last parameterised op before this one, for messages.
    pub label: String,
    /// Who runs the node by default.
    pub runner: Runner,
}

impl Node {
    /// Number of elements of the value.
    pub fn numel(&self) -> usize {
        self.shape.iter().product()
    }

    /// The op, where the value is computed.
    pub fn op(&self) -> Option<&Op> {
        match &self.source {
            Source::Op(op) => Some(op),
            _ => None,
        }
    }
}

/// A parameter that a graph reads.
#[derive(Clone, Debug, PartialEq)]
pub struct ParamSpec {
    /// Name in the published checkpoints.
    pub name: String,
    /// Published shape.
    pub shape: Vec<usize>,
    /// Initialisation.
    pub init: Init,
    /// What the optimiser does with it.
    pub kind: ParamKind,
}

/// An input that each training step draws anew: the mask of a [`drop_path`](crate::GraphBuilder::drop_path).
#[derive(Clone, Debug, PartialEq)]
pub struct StochasticInput {
    /// Name that it is fed under.
    pub name: String,
    /// Probability that a sample is kept: the mask is `1/keep` there, else 0.
    pub keep: f32,
    /// Samples: the mask's length.
    pub samples: usize,
}

/// A tensor-op DAG for one training or evaluation step. Node indices are a topological order.
#[derive(Clone, Debug)]
pub struct StepGraph {
    pub(crate) dag: DiGraph<Node, usize>,
    pub(crate) params: Vec<ParamSpec>,
    pub(crate) outputs: Vec<(String, Tensor)>,
    pub(crate) stochastic: Vec<StochasticInput>,
}

impl StepGraph {
    /// The DAG; an edge's weight is the argument's position.
    pub fn dag(&self) -> &DiGraph<Node, usize> {
        &self.dag
    }

    /// The node that produces `id`.
    pub fn node(&self, id: ValueId) -> &Node {
        &self.dag[id]
    }

    /// Nodes in topological order.
    pub fn nodes(&self) -> impl DoubleEndedIterator<Item = (ValueId, &Node)> {
        self.dag.node_indices().map(|i| (i, &self.dag[i]))
    }

    /// Parameters, in order of first use.
    pub fn params(&self) -> &[ParamSpec] {
        &self.params
    }

    /// Named outputs, in order of marking.
    pub fn outputs(&self) -> &[(String, Tensor)] {
        &self.outputs
    }

    /// Inputs to be drawn anew for each step, in order of use; they are fed like any other input.
    pub fn stochastic(&self) -> &[StochasticInput] {
        &self.stochastic
    }

    /// The output called `name`.
    ///
    /// # Errors
    /// The graph has no such output.
    pub fn output(&self, name: &str) -> Result<&Tensor, GraphError> {
        let found = self.outputs.iter().find(|(n, _)| n == name);
        found.map(|(_, t)| t).ok_or_else(|| GraphError::NoOutput(name.to_owned()))
    }

    /// The input called `name`.
    pub fn input(&self, name: &str) -> Option<Tensor> {
        self.nodes().find_map(|(id, node)| match &node.source {
            Source::Input(n) | Source::IntInput(n) if n == name => Some(Tensor { id, shape: node.shape.clone() }),
            _ => None,
        })
    }

    /// Floating-point operations of one forward pass (a multiply-add counts two); a training step takes about three
    /// times as many.
    pub fn forward_flops(&self) -> u64 {
        self.nodes().filter_map(|(_, n)| n.op().map(|op| op.flops(n.numel()))).sum()
    }

    /// Number of trained parameter values.
    pub fn trained_len(&self) -> usize {
        let trained = self.params.iter().filter(|p| p.kind != ParamKind::Buffer);
        trained.map(|p| p.shape.iter().product::<usize>()).sum()
    }
}

/// A graph that can't be built as asked, or a store that does not fit it.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum GraphError {
    /// Operand shapes that an op can't take.
    #[error("{op} at `{label}` can't take {shapes:?}: {reason}")]
    Shape {
        /// Op name.
        op: &'static str,
        /// Layer path.
        label: String,
        /// Operand shapes.
        shapes: Vec<Vec<usize>>,
        /// What is wrong.
        reason: String,
    },
    /// A setting of a model or loss that does not hold together.
    #[error("{0}")]
    Invalid(String),
    /// A parameter used twice with different shapes, or held by the store with another shape.
    #[error("parameter `{name}` has shape {held:?}, but {wanted:?} is needed")]
    ParamShape {
        /// Parameter name.
        name: String,
        /// Shape held.
        held: Vec<usize>,
        /// Shape needed.
        wanted: Vec<usize>,
    },
    /// A parameter that the store lacks.
    #[error("parameter `{0}` is missing from the store")]
    NoParam(String),
    /// An output name that the graph lacks.
    #[error("the graph has no output `{0}`")]
    NoOutput(String),
}
