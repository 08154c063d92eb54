//! Building a step graph op by op, with shapes inferred and checked.

mod attention;
mod conv;
mod dense;
mod elementwise;
mod layout;
mod losses;
mod norm;
mod text;

pub use losses::PairInputs;

use std::collections::HashMap;
use std::fmt;

use mcpipe_cpu::activation::Activation;
use petgraph::graph::DiGraph;

use crate::graph::{GraphError, Node, ParamId, ParamSpec, Source, StepGraph, StochasticInput, Tensor, ValueId};
use crate::init::Init;
use crate::op::{Image, Op, Runner};
use crate::params::ParamKind;

/// A dotted parameter path (`stages.0.1.conv_kxk`).
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Path(String);

impl Path {
    /// The path of a whole model, or a prefix such as `visual.trunk`.
    pub fn new(prefix: impl Into<String>) -> Self {
        Path(prefix.into())
    }

    /// The path one step further down.
    pub fn at(&self, step: impl fmt::Display) -> Path {
        if self.0.is_empty() { Path(step.to_string()) } else { Path(format!("{}.{step}", self.0)) }
    }

    /// The path as text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Settings of a convolution.
#[derive(Clone, Copy, Debug)]
pub struct ConvArgs {
    /// Output channels.
    pub out: usize,
    /// Kernel height and width.
    pub kernel: usize,
    /// Stride both ways.
    pub stride: usize,
    /// Zero padding on each side.
    pub pad: usize,
    /// Groups; the channels for a depthwise convolution.
    pub groups: usize,
    /// Whether it has a bias.
    pub bias: bool,
}

impl ConvArgs {
    /// A dense convolution with "same" padding for odd kernels and no bias.
    pub fn new(out: usize, kernel: usize) -> Self {
        ConvArgs { out, kernel, stride: 1, pad: kernel / 2, groups: 1, bias: false }
    }

    /// The same with a stride.
    pub fn stride(self, stride: usize) -> Self {
        ConvArgs { stride, ..self }
    }

    /// The same in groups.
    pub fn groups(self, groups: usize) -> Self {
        ConvArgs { groups, ..self }
    }
}

/// Settings of a batch norm.
#[derive(Clone, Copy, Debug)]
pub struct BatchNormArgs {
    /// Added to the variance.
    pub eps: f32,
    /// Share of the batch in the running statistics.
    pub momentum: f32,
    /// Activation fused behind the norm.
    pub act: Activation,
}

impl BatchNormArgs {
    /// PyTorch's defaults (eps 1e-5, momentum 0.1) with an activation behind.
    pub fn new(act: Activation) -> Self {
        BatchNormArgs { eps: 1e-5, momentum: 0.1, act }
    }
}

/// Builds a [`StepGraph`]. `train` selects batch statistics and gradients; without it batch norms use running
/// statistics and nothing requires a gradient.
#[derive(Debug)]
pub struct GraphBuilder {
    dag: DiGraph<Node, usize>,
    params: Vec<ParamSpec>,
    param_nodes: HashMap<String, ValueId>,
    inputs: HashMap<String, Tensor>,
    outputs: Vec<(String, Tensor)>,
    stochastic: Vec<StochasticInput>,
    label: String,
    train: bool,
    frozen: bool,
    runner: Runner,
}

impl GraphBuilder {
    /// An empty training (`true`) or evaluation (`false`) graph.
    pub fn new(train: bool) -> Self {
        GraphBuilder {
            dag: DiGraph::new(),
            params: Vec::new(),
            param_nodes: HashMap::new(),
            inputs: HashMap::new(),
            outputs: Vec::new(),
            stochastic: Vec::new(),
            label: String::new(),
            train,
            frozen: false,
            runner: Runner::Kernel,
        }
    }

    /// Whether this is a training graph.
    pub fn is_train(&self) -> bool {
        self.train
    }

    /// Builds what `f` adds without gradients for its parameters.
    pub fn frozen<T>(&mut self, f: impl FnOnce(&mut Self) -> T) -> T {
        let before = std::mem::replace(&mut self.frozen, true);
        let result = f(self);
        self.frozen = before;
        result
    }

    /// Builds what `f` adds as nodes that dfdx runs.
    pub fn on_dfdx<T>(&mut self, f: impl FnOnce(&mut Self) -> T) -> T {
        let before = std::mem::replace(&mut self.runner, Runner::Dfdx);
        let result = f(self);
        self.runner = before;
        result
    }

    /// Builds what `f` adds as nodes that own kernels run, whatever is around them.
    pub fn on_kernels<T>(&mut self, f: impl FnOnce(&mut Self) -> T) -> T {
        let before = std::mem::replace(&mut self.runner, Runner::Kernel);
        let result = f(self);
        self.runner = before;
        result
    }

    /// Finishes the graph.
    pub fn finish(self) -> StepGraph {
        StepGraph { dag: self.dag, params: self.params, outputs: self.outputs, stochastic: self.stochastic }
    }

    /// Names a value as an output: its buffer lives to the end of the step.
    pub fn output(&mut self, name: impl Into<String>, value: &Tensor) {
        self.outputs.push((name.into(), value.clone()));
    }

    fn push(&mut self, source: Source, inputs: &[&Tensor], shape: Vec<usize>, requires_grad: bool) -> Tensor {
        let node = Node {
            source,
            inputs: inputs.iter().map(|t| t.id).collect(),
            shape: shape.clone(),
            requires_grad,
            label: self.label.clone(),
            runner: self.runner,
        };
        let id = self.dag.add_node(node);
        for (position, input) in inputs.iter().enumerate() {
            self.dag.add_edge(input.id, id, position);
        }
        Tensor { id, shape }
    }

    fn op(&mut self, op: Op, inputs: &[&Tensor], shape: Vec<usize>) -> Tensor {
        let requires = inputs.iter().enumerate().any(|(i, t)| op.differentiable(i) && self.dag[t.id].requires_grad);
        self.push(Source::Op(op), inputs, shape, requires && self.train)
    }

    fn refuse(&self, op: &'static str, tensors: &[&Tensor], reason: impl Into<String>) -> GraphError {
        GraphError::Shape {
            op,
            label: self.label.clone(),
            shapes: tensors.iter().map(|t| t.shape.clone()).collect(),
            reason: reason.into(),
        }
    }

    /// An `f32` input fed under `name`, without gradient. Asking again for a name gives the same input.
    pub fn input(&mut self, name: impl Into<String>, shape: &[usize]) -> Tensor {
        self.named_input(name.into(), shape, false, false)
    }

    /// An `f32` input whose gradient the executor returns.
    pub fn input_with_grad(&mut self, name: impl Into<String>, shape: &[usize]) -> Tensor {
        self.named_input(name.into(), shape, false, true)
    }

    /// An `i32` input (token ids, row indices).
    pub fn int_input(&mut self, name: impl Into<String>, shape: &[usize]) -> Tensor {
        self.named_input(name.into(), shape, true, false)
    }

    fn named_input(&mut self, name: String, shape: &[usize], int: bool, grad: bool) -> Tensor {
        if let Some(t) = self.inputs.get(&name) {
            return t.clone();
        }
        let source = if int { Source::IntInput(name.clone()) } else { Source::Input(name.clone()) };
        let t = self.push(source, &[], shape.to_vec(), grad && self.train);
        self.inputs.insert(name, t.clone());
        t
    }

    /// The parameter at `path`, declared at its first use. Fewer than two dimensions means no weight decay.
    ///
    /// # Errors
    /// The same path used before with another shape.
    pub fn param(&mut self, path: &Path, shape: &[usize], init: Init) -> Result<Tensor, GraphError> {
        let kind = if shape.len() < 2 { ParamKind::NoDecay } else { ParamKind::Decay };
        self.declare(path, shape, init, kind)
    }

    /// A value that checkpoints hold but gradients don't change (running statistics).
    ///
    /// # Errors
    /// The same path used before with another shape.
    pub fn buffer(&mut self, path: &Path, shape: &[usize], init: Init) -> Result<Tensor, GraphError> {
        self.declare(path, shape, init, ParamKind::Buffer)
    }

    fn declare(&mut self, path: &Path, shape: &[usize], init: Init, kind: ParamKind) -> Result<Tensor, GraphError> {
        let name = path.as_str();
        if let Some(&id) = self.param_nodes.get(name) {
            let held = &self.dag[id].shape;
            if held != shape {
                return Err(GraphError::ParamShape { name: name.into(), held: held.clone(), wanted: shape.to_vec() });
            }
            return Ok(Tensor { id, shape: shape.to_vec() });
        }
        self.label = name.rsplit_once('.').map_or(name, |(layer, _)| layer).to_owned();
        let param = ParamId(self.params.len());
        self.params.push(ParamSpec { name: name.into(), shape: shape.to_vec(), init, kind });
        let trained = self.train && !self.frozen && kind != ParamKind::Buffer;
        let t = self.push(Source::Param(param), &[], shape.to_vec(), trained);
        self.param_nodes.insert(name.into(), t.id);
        Ok(t)
    }

    fn image(&self, op: &'static str, x: &Tensor) -> Result<Image, GraphError> {
        match x.shape[..] {
            [batch, h, w, c] => Ok(Image { batch, h, w, c }),
            _ => Err(self.refuse(op, &[x], "an image tensor is [batch, height, width, channels]")),
        }
    }

    fn rows(x: &Tensor) -> (usize, usize) {
        let c = x.shape.last().copied().unwrap_or(1);
        (x.numel() / c.max(1), c)
    }
}
