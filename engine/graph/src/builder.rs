//! Building a step graph op by op, with shapes inferred and checked.

mod losses;

use std::collections::HashMap;
use std::fmt;

use mcpipe_cpu::activation::Activation;
use mcpipe_cpu::attention::Attention;
use mcpipe_cpu::conv::Conv2d;
use mcpipe_cpu::gemm::Gemm;
use mcpipe_cpu::layout::Patches;
use mcpipe_cpu::linear::Linear;
use mcpipe_cpu::norm::Norm;
use mcpipe_cpu::pooling::Pool2d;
use petgraph::graph::DiGraph;

use crate::graph::{GraphError, Node, ParamId, ParamSpec, Source, StepGraph, Tensor, ValueId};
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

    /// Finishes the graph.
    pub fn finish(self) -> StepGraph {
        StepGraph { dag: self.dag, params: self.params, outputs: self.outputs }
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

    /// The same value seen with another shape.
    ///
    /// # Errors
    /// The sizes differ.
    pub fn reshape(&self, x: &Tensor, shape: &[usize]) -> Result<Tensor, GraphError> {
        if shape.iter().product::<usize>() != x.numel() {
            return Err(self.refuse("reshape", &[x], format!("{shape:?} has another size")));
        }
        Ok(Tensor { id: x.id, shape: shape.to_vec() })
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

    /// Convolution over `x [B,H,W,C]` with `{path}.weight` `[out, C/groups, k, k]` and, if asked, `{path}.bias`.
    ///
    /// # Errors
    /// Not an image, channels that the groups don't divide, or an image smaller than the kernel.
    pub fn conv2d(&mut self, path: &Path, x: &Tensor, a: ConvArgs) -> Result<Tensor, GraphError> {
        self.label = path.as_str().to_owned();
        let i = self.image("conv2d", x)?;
        if a.groups == 0 || !i.c.is_multiple_of(a.groups) || !a.out.is_multiple_of(a.groups) {
            return Err(self.refuse("conv2d", &[x], format!("{} groups don't divide the channels", a.groups)));
        }
        if i.h + 2 * a.pad < a.kernel || i.w + 2 * a.pad < a.kernel || a.stride == 0 {
            return Err(self.refuse("conv2d", &[x], format!("the image is smaller than the {0}x{0} kernel", a.kernel)));
        }
        let init = Init::KaimingFanOut { groups: a.groups };
        let w = self.param(&path.at("weight"), &[a.out, i.c / a.groups, a.kernel, a.kernel], init)?;
        let d = Conv2d {
            batch: i.batch,
            h: i.h,
            w: i.w,
            c_in: i.c,
            c_out: a.out,
            kh: a.kernel,
            kw: a.kernel,
            stride: a.stride,
            pad: a.pad,
            groups: a.groups,
        };
        let shape = vec![i.batch, d.out_h(), d.out_w(), a.out];
        if a.bias {
            let b = self.param(&path.at("bias"), &[a.out], Init::Zeros)?;
            return Ok(self.op(Op::Conv2d(d), &[x, &w, &b], shape));
        }
        Ok(self.op(Op::Conv2d(d), &[x, &w], shape))
    }

    /// Linear map of the last axis with `{path}.weight` `[out, in]` and, if asked, `{path}.bias`.
    ///
    /// # Errors
    /// A parameter of that path with another shape.
    pub fn linear(
        &mut self,
        path: &Path,
        x: &Tensor,
        out: usize,
        bias: bool,
        init: Init,
    ) -> Result<Tensor, GraphError> {
        let (_, c_in) = Self::rows(x);
        let w = self.param(&path.at("weight"), &[out, c_in], init)?;
        let b = if bias { Some(self.param(&path.at("bias"), &[out], Init::Zeros)?) } else { None };
        self.linear_with(x, &w, b.as_ref())
    }

    /// Linear map of the last axis with given `w [out, in]` and bias.
    ///
    /// # Errors
    /// `w` does not fit the last axis.
    pub fn linear_with(&mut self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, GraphError> {
        let (rows, c_in) = Self::rows(x);
        let c_out = match w.shape[..] {
            [o, i] if i == c_in => o,
            _ => return Err(self.refuse("linear", &[x, w], "the weight's second axis is not the input's last")),
        };
        let mut shape = x.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = c_out;
        }
        let op = Op::Linear(Linear { rows, c_in, c_out });
        Ok(match bias {
            Some(b) => self.op(op, &[x, w, b], shape),
            None => self.op(op, &[x, w], shape),
        })
    }

    /// `alpha · op(a) · op(b)` of two matrices.
    ///
    /// # Errors
    /// Not matrices, or inner dims that differ.
    pub fn matmul(
        &mut self,
        a: &Tensor,
        trans_a: bool,
        b: &Tensor,
        trans_b: bool,
        alpha: f32,
    ) -> Result<Tensor, GraphError> {
        let ([ar, ac], [br, bc]) = (self.matrix("matmul", a)?, self.matrix("matmul", b)?);
        let (m, k) = if trans_a { (ac, ar) } else { (ar, ac) };
        let (k2, n) = if trans_b { (bc, br) } else { (br, bc) };
        if k != k2 {
            return Err(self.refuse("matmul", &[a, b], "the inner dims differ"));
        }
        let dims = Gemm { m, n, k, trans_a, trans_b };
        Ok(self.op(Op::MatMul { dims, alpha }, &[a, b], vec![m, n]))
    }

    fn matrix(&self, op: &'static str, x: &Tensor) -> Result<[usize; 2], GraphError> {
        match x.shape[..] {
            [r, c] => Ok([r, c]),
            _ => Err(self.refuse(op, &[x], "a matrix is needed")),
        }
    }

    /// Batch norm over all but the last axis, with the activation of `a` behind; parameters `{path}.{weight,bias,
    /// running_mean,running_var}`.
    ///
    /// # Errors
    /// A parameter of that path with another shape.
    pub fn batch_norm(&mut self, path: &Path, x: &Tensor, a: BatchNormArgs) -> Result<Tensor, GraphError> {
        let (rows, c) = Self::rows(x);
        let gamma = self.param(&path.at("weight"), &[c], Init::Ones)?;
        let beta = self.param(&path.at("bias"), &[c], Init::Zeros)?;
        let mean = self.buffer(&path.at("running_mean"), &[c], Init::Zeros)?;
        let var = self.buffer(&path.at("running_var"), &[c], Init::Ones)?;
        self.label = path.as_str().to_owned();
        let dims = Norm { rows, c, eps: a.eps };
        let shape = x.shape.clone();
        if !self.train {
            return Ok(self.op(Op::BatchNormEval { dims, act: a.act }, &[x, &gamma, &beta, &mean, &var], shape));
        }
        let id = |t: &Tensor| match self.dag[t.id].source {
            Source::Param(p) => p,
            _ => unreachable!("buffer() gives a parameter node"),
        };
        let op = Op::BatchNorm { dims, act: a.act, momentum: a.momentum, running: [id(&mean), id(&var)] };
        Ok(self.op(op, &[x, &gamma, &beta], shape))
    }

    /// Layer norm over the last axis, `{path}.{weight,bias}`.
    ///
    /// # Errors
    /// A parameter of that path with another shape.
    pub fn layer_norm(&mut self, path: &Path, x: &Tensor, eps: f32) -> Result<Tensor, GraphError> {
        let (rows, c) = Self::rows(x);
        let gamma = self.param(&path.at("weight"), &[c], Init::Ones)?;
        let beta = self.param(&path.at("bias"), &[c], Init::Zeros)?;
        Ok(self.op(Op::LayerNorm(Norm { rows, c, eps }), &[x, &gamma, &beta], x.shape.clone()))
    }

    /// Elementwise activation.
    pub fn activation(&mut self, x: &Tensor, act: Activation) -> Tensor {
        if act == Activation::Identity { x.clone() } else { self.op(Op::Activation(act), &[x], x.shape.clone()) }
    }

    fn attention_dims(&self, qkv: &Tensor, heads: usize, causal: bool) -> Result<Attention, GraphError> {
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

    fn same_size(&mut self, op: Op, a: &Tensor, b: &Tensor) -> Result<Tensor, GraphError> {
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

    fn patches(&self, i: Image, patch: [usize; 2]) -> Patches {
        Patches { batch: i.batch, h: i.h, w: i.w, c: i.c, ph: patch[0], pw: patch[1] }
    }

    /// MobileViT's unfold (Mehta & Rastegari 2022, §3.1): `[B,H,W,C]` → `[B·P, N, C]`, P positions inside a patch, N
    /// patches.
    ///
    /// # Errors
    /// The patch does not divide the image.
    pub fn unfold_patches(&mut self, x: &Tensor, patch: [usize; 2]) -> Result<Tensor, GraphError> {
        let i = self.image("unfold_patches", x)?;
        if patch.contains(&0) || i.h % patch[0] != 0 || i.w % patch[1] != 0 {
            return Err(self.refuse("unfold_patches", &[x], format!("patches of {patch:?} don't tile it")));
        }
        let p = patch[0] * patch[1];
        Ok(self.op(Op::Unfold(self.patches(i, patch)), &[x], vec![i.batch * p, i.h * i.w / p, i.c]))
    }

    /// Inverse of [`unfold_patches`](Self::unfold_patches), to an image of `h`×`w`.
    ///
    /// # Errors
    /// The sizes don't fit.
    pub fn fold_patches(&mut self, x: &Tensor, h: usize, w: usize, patch: [usize; 2]) -> Result<Tensor, GraphError> {
        let (_, c) = Self::rows(x);
        let pixels = x.numel() / c.max(1);
        let tiled = !patch.contains(&0) && h.is_multiple_of(patch[0]) && w.is_multiple_of(patch[1]);
        if !tiled || h * w == 0 || !pixels.is_multiple_of(h * w) {
            return Err(self.refuse(
                "fold_patches",
                &[x],
                format!("it is no image of {h}x{w} in patches of {patch:?}"),
            ));
        }
        let i = Image { batch: pixels / (h * w), h, w, c };
        Ok(self.op(Op::Fold(self.patches(i, patch)), &[x], vec![i.batch, h, w, c]))
    }

    /// Mean over all but the first and last axes: `[B, …, C]` → `[B, C]`.
    ///
    /// # Errors
    /// Fewer than three axes.
    pub fn global_avg_pool(&mut self, x: &Tensor) -> Result<Tensor, GraphError> {
        if x.shape.len() < 3 {
            return Err(self.refuse("global_avg_pool", &[x], "three axes or more are needed"));
        }
        let (batch, c) = (x.shape[0], x.shape[x.shape.len() - 1]);
        let hw = x.numel() / (batch * c).max(1);
        Ok(self.op(Op::GlobalAvgPool { batch, hw, c }, &[x], vec![batch, c]))
    }

    /// Average over k×k windows.
    ///
    /// # Errors
    /// Not an image, or smaller than the window.
    pub fn avg_pool(&mut self, x: &Tensor, k: usize, stride: usize, pad: usize) -> Result<Tensor, GraphError> {
        let i = self.image("avg_pool", x)?;
        if i.h + 2 * pad < k || i.w + 2 * pad < k || stride == 0 || k == 0 {
            return Err(self.refuse("avg_pool", &[x], "the image is smaller than the window"));
        }
        let d = Pool2d { batch: i.batch, h: i.h, w: i.w, c: i.c, k, stride, pad };
        let out = |n: usize| (n + 2 * pad - k) / stride + 1;
        Ok(self.op(Op::AvgPool(d), &[x], vec![i.batch, out(i.h), out(i.w), i.c]))
    }

    /// Bilinear resize to `h`×`w` (half-pixel centres, no antialiasing); the value itself where the size is the same.
    ///
    /// # Errors
    /// Not an image, or an empty size.
    pub fn resize_bilinear(&mut self, x: &Tensor, h: usize, w: usize) -> Result<Tensor, GraphError> {
        let from = self.image("resize_bilinear", x)?;
        if h == 0 || w == 0 {
            return Err(self.refuse("resize_bilinear", &[x], "the target is empty"));
        }
        if [from.h, from.w] == [h, w] {
            return Ok(x.clone());
        }
        Ok(self.op(Op::Resize { from, to: [h, w] }, &[x], vec![from.batch, h, w, from.c]))
    }

    /// Rows of `table [V, width]` by `ids`.
    ///
    /// # Errors
    /// `table` is no matrix.
    pub fn embedding(&mut self, table: &Tensor, ids: &Tensor) -> Result<Tensor, GraphError> {
        let [_, width] = self.matrix("embedding", table)?;
        let mut shape = ids.shape.clone();
        shape.push(width);
        Ok(self.op(Op::Embedding { width }, &[table, ids], shape))
    }

    fn tokens(&self, op: &'static str, x: &Tensor) -> Result<[usize; 3], GraphError> {
        match x.shape[..] {
            [b, n, c] => Ok([b, n, c]),
            _ => Err(self.refuse(op, &[x], "[batch, tokens, width] is needed")),
        }
    }

    /// `y[b] = x[b, index[b]]`.
    ///
    /// # Errors
    /// `x` is not `[batch, tokens, width]`.
    pub fn gather_rows(&mut self, x: &Tensor, index: &Tensor) -> Result<Tensor, GraphError> {
        let [batch, tokens, width] = self.tokens("gather_rows", x)?;
        Ok(self.op(Op::GatherRows { batch, tokens, width }, &[x, index], vec![batch, width]))
    }

    /// Concatenation along the last axis.
    ///
    /// # Errors
    /// Leading sizes differ.
    pub fn concat(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor, GraphError> {
        let ((rows, ca), (rb, cb)) = (Self::rows(a), Self::rows(b));
        if rows != rb {
            return Err(self.refuse("concat", &[a, b], "the leading sizes differ"));
        }
        let mut shape = a.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = ca + cb;
        }
        Ok(self.op(Op::ConcatLast { rows, ca, cb }, &[a, b], shape))
    }

    /// `token [width]` before every sequence of `x [B, N, width]`.
    ///
    /// # Errors
    /// Widths differ.
    pub fn prepend_token(&mut self, token: &Tensor, x: &Tensor) -> Result<Tensor, GraphError> {
        let [batch, tokens, width] = self.tokens("prepend_token", x)?;
        if token.numel() != width {
            return Err(self.refuse("prepend_token", &[token, x], "the widths differ"));
        }
        Ok(self.op(Op::PrependToken { batch, tokens, width }, &[token, x], vec![batch, tokens + 1, width]))
    }

    /// Tokens `start..start+len` of every sequence.
    ///
    /// # Errors
    /// The range leaves the sequence.
    pub fn slice_rows(&mut self, x: &Tensor, start: usize, len: usize) -> Result<Tensor, GraphError> {
        let [batch, tokens, width] = self.tokens("slice_rows", x)?;
        if len == 0 || start + len > tokens {
            return Err(self.refuse("slice_rows", &[x], format!("tokens {start}..{} don't exist", start + len)));
        }
        Ok(self.op(Op::SliceRows { batch, tokens, width, start, len }, &[x], vec![batch, len, width]))
    }

    /// Axes reordered: output axis i is input axis `axes[i]`.
    ///
    /// # Errors
    /// `axes` is no permutation of `x`'s axes.
    pub fn permute(&mut self, x: &Tensor, axes: &[usize]) -> Result<Tensor, GraphError> {
        let mut sorted = axes.to_vec();
        sorted.sort_unstable();
        if sorted != (0..x.shape.len()).collect::<Vec<_>>() {
            return Err(self.refuse("permute", &[x], format!("{axes:?} does not order its axes")));
        }
        let shape = axes.iter().map(|&a| x.shape[a]).collect();
        Ok(self.op(Op::Permute { shape: x.shape.clone(), axes: axes.to_vec() }, &[x], shape))
    }

    /// Rows of the last axis scaled to unit length.
    pub fn l2_normalize(&mut self, x: &Tensor) -> Tensor {
        let (rows, c) = Self::rows(x);
        self.op(Op::L2Normalize { rows, c }, &[x], x.shape.clone())
    }

    /// Softmax over the last axis of `x / temperature`.
    pub fn softmax(&mut self, x: &Tensor, temperature: f32) -> Tensor {
        let (rows, c) = Self::rows(x);
        self.op(Op::Softmax { rows, c, temperature }, &[x], x.shape.clone())
    }
}
