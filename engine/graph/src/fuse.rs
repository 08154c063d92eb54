//! Fusion for evaluation: a convolution or linear layer with what follows it, where nobody else reads what lies between.
//!
//! Batch norm with running statistics is folded into the weights (Jacob et al. 2018, §3.2); an addition and an activation
//! behind go into the product's epilogue. Only nodes without a gradient are fused, so a fused node has no VJP. What dfdx
//! is to run stays as it is: it knows no fused product.
//!
//! Losses of training graphs: [`losses`].

mod losses;

use mcpipe_cpu::activation::Activation;
use mcpipe_cpu::conv::Conv2d;
use mcpipe_cpu::linear::Linear;

use crate::graph::{Source, StepGraph, ValueId};
use crate::op::{Op, Runner};

pub use losses::fuse_losses;
pub(crate) use losses::{Operand, Part};

/// `act(norm(conv(x, w) + bias) + residual)`. Inputs in this order: x, w, then those that are there of bias; gamma, beta,
/// running mean, running variance; residual.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct FusedConv {
    /// Dims; a linear layer is a 1x1 convolution.
    pub conv: Conv2d,
    /// Whether it has a bias.
    pub bias: bool,
    /// Epsilon of the batch norm, where one is folded in.
    pub norm: Option<f32>,
    /// Whether something is added.
    pub residual: bool,
    /// Activation at the end.
    pub act: Activation,
}

/// A graph that computes the same outputs with fewer passes over memory. The values in between are gone: their nodes
/// stay, so that ids stay valid, but compute nothing.
pub(crate) fn fuse(graph: &StepGraph) -> StepGraph {
    let mut fused = graph.clone();
    let ids: Vec<ValueId> = fused.dag.node_indices().collect();
    for id in ids {
        if let Some((into, op, inputs)) = step(&fused, id) {
            // The later node takes over; the earlier one's value is not needed any more.
            fused.dag[into].source = Source::Fused;
            fused.dag[into].inputs.clear();
            fused.dag[id].source = Source::Op(Op::FusedConv(op));
            fused.dag[id].inputs = inputs;
            fused.rebuild_edges(&[into, id]);
        }
    }
    fused
}

/// What node `id` becomes together with the node before it.
fn step(graph: &StepGraph, id: ValueId) -> Option<(ValueId, FusedConv, Vec<ValueId>)> {
    let node = &graph.dag[id];
    let op = node.op()?;
    if node.requires_grad || node.runner == Runner::Dfdx {
        return None;
    }
    match op {
        Op::BatchNormEval { dims, act } => {
            let from = node.inputs[0];
            let (mut fused, mut inputs) = product(graph, from)?;
            let plain = fused.norm.is_none() && !fused.residual && fused.act == Activation::Identity;
            if !plain || dims.c != fused.conv.c_out {
                return None;
            }
            (fused.norm, fused.act) = (Some(dims.eps), *act);
            inputs.extend(&node.inputs[1..]);
            Some((from, fused, inputs))
        }
        Op::Activation(act) => {
            let from = node.inputs[0];
            let (mut fused, inputs) = product(graph, from)?;
            if fused.act != Activation::Identity {
                return None;
            }
            fused.act = *act;
            Some((from, fused, inputs))
        }
        // The later operand is the branch: what it is added to is there already.
        Op::Add => {
            let (from, other) = if node.inputs[0] > node.inputs[1] {
                (node.inputs[0], node.inputs[1])
            } else {
                (node.inputs[1], node.inputs[0])
            };
            let (mut fused, mut inputs) = product(graph, from)?;
            if fused.residual || fused.act != Activation::Identity {
                return None;
            }
            fused.residual = true;
            inputs.push(other);
            Some((from, fused, inputs))
        }
        _ => None,
    }
}

/// Node `id` as a fused product, if it is one that a single node reads.
fn product(graph: &StepGraph, id: ValueId) -> Option<(FusedConv, Vec<ValueId>)> {
    let node = &graph.dag[id];
    let output = graph.outputs.iter().any(|(_, t)| t.id == id);
    if output || node.requires_grad || node.runner == Runner::Dfdx || graph.dag.edges(id).count() != 1 {
        return None;
    }
    let plain = |conv, inputs: usize| FusedConv {
        conv,
        bias: inputs == 3,
        norm: None,
        residual: false,
        act: Activation::Identity,
    };
    let fused = match node.op()? {
        Op::Conv2d(d) => plain(*d, node.inputs.len()),
        Op::Linear(Linear { rows, c_in, c_out }) => {
            let (batch, h, w) = (1, 1, *rows);
            let d = Conv2d { batch, h, w, c_in: *c_in, c_out: *c_out, kh: 1, kw: 1, stride: 1, pad: 0, groups: 1 };
            plain(d, node.inputs.len())
        }
        Op::FusedConv(fused) => *fused,
        _ => return None,
    };
    Some((fused, node.inputs.clone()))
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::backend::{Cpu, Kernels};
    use crate::{
        BatchNormArgs, ConvArgs, Executor, Feed, GraphBuilder, GraphError, Init, Mode, ParamStore, Path, Tensor,
    };

    /// A residual block, a linear layer with an activation, and a tap in the middle of what could be fused.
    fn graph() -> Result<(StepGraph, Tensor), GraphError> {
        let mut g = GraphBuilder::new(false);
        let x = g.input("image", &[2, 6, 5, 8]);
        let root = Path::default();
        let norm = |act| BatchNormArgs::new(act);
        let y = g.conv2d(&root.at("a"), &x, ConvArgs::new(24, 1))?;
        let y = g.batch_norm(&root.at("a_bn"), &y, norm(Activation::Silu))?;
        let y = g.conv2d(&root.at("b"), &y, ConvArgs::new(24, 3).groups(24))?;
        let y = g.batch_norm(&root.at("b_bn"), &y, norm(Activation::Silu))?;
        let y = g.conv2d(&root.at("c"), &y, ConvArgs { bias: true, ..ConvArgs::new(8, 3) })?;
        let y = g.batch_norm(&root.at("c_bn"), &y, norm(Activation::Identity))?;
        let y = g.add(&y, &x)?;
        let y = g.activation(&y, Activation::Relu);
        let tap = g.conv2d(&root.at("d"), &y, ConvArgs::new(8, 1))?;
        g.output("tap", &tap);
        let y = g.batch_norm(&root.at("d_bn"), &tap, norm(Activation::Silu))?;
        let y = g.linear(&root.at("fc"), &y, 12, true, Init::FanInUniform)?;
        let y = g.activation(&y, Activation::Gelu);
        g.output("y", &y);
        Ok((g.finish(), y))
    }

    #[test]
    fn fused_values_are_the_plain_ones() -> Result<(), Box<dyn std::error::Error>> {
        let (graph, y) = graph()?;
        let graph = Arc::new(graph);
        let mut store = ParamStore::default();
        store.init(&graph, 3)?;
        for (i, p) in store.params_mut().iter_mut().enumerate() {
            let noise = Init::Uniform(0.4).sample(i as u64, "noise", &p.shape);
            p.data.iter_mut().zip(noise).for_each(|(v, n)| *v += n);
        }
        let image = Init::Normal(1.0).sample(0, "image", &[2 * 6 * 5 * 8]);
        let run = |kernels| -> Result<[Vec<f32>; 2], Box<dyn std::error::Error>> {
            let mut e = Executor::new(Arc::clone(&graph), &store, Mode::Forward, Cpu::new(kernels))?;
            e.forward(&store, &[("image", Feed::F32(&image))])?;
            Ok([e.value(graph.output("tap")?).into_owned(), e.value(&y).into_owned()])
        };
        let ops = |g: &StepGraph| g.nodes().filter(|(_, n)| n.op().is_some()).count();
        assert_eq!((ops(&graph), ops(&fuse(&graph))), (12, 6));
        for (a, b) in run(Kernels::Native)?.iter().zip(run(Kernels::Reference)?) {
            let largest = b.iter().fold(0f32, |m, v| m.max(v.abs()));
            let gap = a.iter().zip(&b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
            assert!(gap <= 2e-6 * largest, "{gap} of {largest}");
        }
        Ok(())
    }

    #[test]
    fn what_dfdx_runs_is_not_fused() -> Result<(), Box<dyn std::error::Error>> {
        let mut g = GraphBuilder::new(false);
        let x = g.input("x", &[2, 3]);
        let y = g.on_dfdx(|g| -> Result<Tensor, GraphError> {
            let y = g.linear(&Path::new("fc"), &x, 4, true, Init::FanInUniform)?;
            Ok(g.activation(&y, Activation::Gelu))
        })?;
        g.output("y", &y);
        let graph = g.finish();
        let mut store = ParamStore::default();
        store.init(&graph, 3)?;
        let mut e = Executor::new(Arc::new(graph), &store, Mode::Forward, Cpu::new(Kernels::Native))?;
        e.forward(&store, &[("x", Feed::F32(&[1.0, -2.0, 0.5, 0.0, 3.0, 1.0]))])?;
        assert!(e.value(&y).iter().all(|v| v.is_finite()));
        Ok(())
    }

    #[test]
    fn what_takes_a_gradient_is_not_fused() -> Result<(), GraphError> {
        let mut g = GraphBuilder::new(true);
        let x = g.input("image", &[2, 6, 5, 8]);
        let y = g.conv2d(&Path::new("a"), &x, ConvArgs::new(8, 1))?;
        let y = g.activation(&y, Activation::Silu);
        g.output("y", &y);
        let graph = g.finish();
        assert!(fuse(&graph).nodes().all(|(_, n)| !matches!(n.op(), Some(Op::FusedConv(_)))));
        Ok(())
    }
}
