//! Fusion of the distillation levels' losses in training graphs: rows normalised and compared, attention maps averaged and
//! compared, activations given their bias and compared, each in one op, where nobody else reads what lies between.

use mcpipe_cpu::attention::Attention;
use petgraph::Direction;

use crate::graph::{Source, StepGraph, ValueId};
use crate::op::{Distance, Op};

/// Where an argument of a [`Part`] comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Operand {
    /// An argument of the whole.
    Input(usize),
    /// The value of an earlier part. Each is read once.
    Part(usize),
}

/// One of the ops that another op is made of.
#[derive(Clone, Debug)]
pub(crate) struct Part {
    pub op: Op,
    pub inputs: Vec<Operand>,
    /// Elements of its value.
    pub numel: usize,
}

impl Op {
    /// Whether it is several ops in one.
    pub(crate) fn is_of_parts(&self) -> bool {
        matches!(self, Op::RowLoss { .. } | Op::TransferLoss { .. } | Op::MapLoss { .. } | Op::PixelLoss { .. })
    }

    /// The ops that it is made of; the last one's value is its own. None for an op that is one.
    pub(crate) fn parts(&self) -> Vec<Part> {
        let compare = |distance, rows, c, inputs| {
            let op = match distance {
                Distance::Mse => Op::Mse,
                Distance::Cosine => Op::Cosine { rows, c },
            };
            Part { op, inputs, numel: 1 }
        };
        match *self {
            Op::RowLoss { rows, c, distance, normalize } => {
                let mut parts = Vec::new();
                let mut sides = Vec::new();
                for (i, normalize) in normalize.into_iter().enumerate() {
                    sides.push(if normalize { Operand::Part(parts.len()) } else { Operand::Input(i) });
                    if normalize {
                        let op = Op::L2Normalize { rows, c };
                        parts.push(Part { op, inputs: vec![Operand::Input(i)], numel: rows * c });
                    }
                }
                parts.push(compare(distance, rows, c, sides));
                parts
            }
            Op::TransferLoss { batch, hw, c } => vec![
                Part {
                    op: Op::AttentionTransferMap { batch, hw, c },
                    inputs: vec![Operand::Input(0)],
                    numel: batch * hw,
                },
                compare(Distance::Mse, batch, hw, vec![Operand::Part(0), Operand::Input(1)]),
            ],
            Op::MapLoss { attention: d, images } => {
                let (n, maps) = (d.tokens, d.batch * d.heads);
                let mean = Op::GlobalAvgPool { batch: images, hw: maps / images.max(1), c: n * n };
                vec![
                    Part { op: Op::AttentionMap(d), inputs: vec![Operand::Input(0)], numel: maps * n * n },
                    Part { op: mean, inputs: vec![Operand::Part(0)], numel: images * n * n },
                    Part {
                        op: Op::KlRows { rows: images * n, c: n },
                        inputs: vec![Operand::Input(1), Operand::Part(1)],
                        numel: 1,
                    },
                ]
            }
            Op::PixelLoss { rows, c, distance } => vec![
                Part { op: Op::AddBroadcast, inputs: vec![Operand::Input(0), Operand::Input(2)], numel: rows * c },
                compare(distance, rows, c, vec![Operand::Part(0), Operand::Input(1)]),
            ],
            _ => Vec::new(),
        }
    }
}

/// What a loss becomes.
struct Fused {
    op: Op,
    inputs: Vec<ValueId>,
    /// Nodes that compute nothing any more.
    gone: Vec<ValueId>,
    /// A product that leaves its bias to the loss.
    unbiased: Option<ValueId>,
}

/// A training graph with the same outputs and gradients whose losses make fewer passes over memory. The values in between
/// are gone: their nodes stay, so that ids stay valid, but compute nothing.
pub fn fuse_losses(graph: &StepGraph) -> StepGraph {
    let mut fused = graph.clone();
    let ids: Vec<ValueId> = fused.dag.node_indices().collect();
    for id in ids {
        let Some(found) = pattern(&fused, id) else { continue };
        let mut changed = found.gone;
        for &gone in &changed {
            fused.dag[gone].source = Source::Fused;
            fused.dag[gone].inputs.clear();
        }
        fused.dag[id].source = Source::Op(found.op);
        fused.dag[id].inputs = found.inputs;
        changed.push(id);
        if let Some(product) = found.unbiased {
            fused.dag[product].inputs.truncate(2);
            changed.push(product);
        }
        fused.rebuild_edges(&changed);
    }
    fused
}

fn pattern(graph: &StepGraph, id: ValueId) -> Option<Fused> {
    let node = &graph.dag[id];
    if !node.requires_grad {
        return None;
    }
    let (distance, dims) = match node.op()? {
        Op::Mse => (Distance::Mse, None),
        Op::Cosine { rows, c } => (Distance::Cosine, Some((*rows, *c))),
        Op::KlRows { rows, c } => return map_loss(graph, &node.inputs, *rows, *c),
        _ => return None,
    };
    let pair = [node.inputs[0], node.inputs[1]];
    let swapped = [pair[1], pair[0]];
    row_loss(graph, pair, distance, dims)
        .or_else(|| [pair, swapped].into_iter().find_map(|p| transfer_loss(graph, p, distance)))
        .or_else(|| [pair, swapped].into_iter().find_map(|p| pixel_loss(graph, p, distance, dims)))
}

/// The op of a node that one other node reads, and nobody else.
fn inner(graph: &StepGraph, id: ValueId) -> Option<&Op> {
    let output = graph.outputs.iter().any(|(_, t)| t.id == id);
    if output || graph.dag.edges(id).count() != 1 { None } else { graph.dag[id].op() }
}

fn row_loss(graph: &StepGraph, pair: [ValueId; 2], distance: Distance, dims: Option<(usize, usize)>) -> Option<Fused> {
    let sides = pair.map(|id| match inner(graph, id) {
        Some(Op::L2Normalize { rows, c }) => Some((*rows, *c)),
        _ => None,
    });
    // A mean squared error knows no rows: they are those of the first side that is normalised.
    let (rows, c) = dims.or(sides[0]).or(sides[1])?;
    let normalize = sides.map(|side| side == Some((rows, c)));
    if normalize == [false; 2] {
        return None;
    }
    let gone: Vec<ValueId> = (0..2).filter(|&i| normalize[i]).map(|i| pair[i]).collect();
    let inputs = (0..2).map(|i| if normalize[i] { graph.dag[pair[i]].inputs[0] } else { pair[i] }).collect();
    Some(Fused { op: Op::RowLoss { rows, c, distance, normalize }, inputs, gone, unbiased: None })
}

fn transfer_loss(graph: &StepGraph, [map, target]: [ValueId; 2], distance: Distance) -> Option<Fused> {
    let Op::AttentionTransferMap { batch, hw, c } = *inner(graph, map)? else { return None };
    if distance != Distance::Mse || graph.dag[target].requires_grad {
        return None;
    }
    let inputs = vec![graph.dag[map].inputs[0], target];
    Some(Fused { op: Op::TransferLoss { batch, hw, c }, inputs, gone: vec![map], unbiased: None })
}

fn pixel_loss(
    graph: &StepGraph,
    [product, target]: [ValueId; 2],
    distance: Distance,
    dims: Option<(usize, usize)>,
) -> Option<Fused> {
    let c = match inner(graph, product)? {
        Op::Linear(d) => d.c_out,
        Op::Conv2d(d) => d.c_out,
        _ => return None,
    };
    let (node, rows) = (&graph.dag[product], graph.dag[product].numel() / c.max(1));
    let [_, _, bias] = node.inputs[..] else { return None };
    if graph.dag[target].requires_grad || dims.is_some_and(|d| d != (rows, c)) {
        return None;
    }
    let (op, inputs) = (Op::PixelLoss { rows, c, distance }, vec![product, target, bias]);
    Some(Fused { op, inputs, gone: Vec::new(), unbiased: Some(product) })
}

/// The maps that node `id` averages over heads and over the sequences of an image.
fn mean_of_maps(graph: &StepGraph, id: ValueId) -> Option<(ValueId, Attention, usize)> {
    let Op::GlobalAvgPool { batch: images, hw, c } = *inner(graph, id)? else { return None };
    let maps = graph.dag[id].inputs[0];
    let Some(Op::AttentionMap(d)) = graph.dag[maps].op() else { return None };
    let fits = images * hw == d.batch * d.heads && c == d.tokens * d.tokens && d.batch.is_multiple_of(images.max(1));
    fits.then_some((maps, *d, images))
}

fn map_loss(graph: &StepGraph, inputs: &[ValueId], rows: usize, c: usize) -> Option<Fused> {
    let (target, mean) = (inputs[0], inputs[1]);
    let (maps, attention, images) = mean_of_maps(graph, mean)?;
    if c != attention.tokens || rows != images * c {
        return None;
    }
    // Several teachers may read the maps, but nobody whom they have to be stored for.
    let stored = |reader: ValueId| {
        let compared = |id: ValueId| matches!(graph.dag[id].op(), Some(Op::KlRows { c, .. }) if *c == attention.tokens);
        mean_of_maps(graph, reader).is_none()
            || !graph.dag.neighbors_directed(reader, Direction::Outgoing).all(compared)
    };
    let output = graph.outputs.iter().any(|(_, t)| t.id == maps);
    if output || graph.dag.neighbors(maps).any(stored) {
        return None;
    }
    let mut gone = vec![mean];
    if graph.dag.edges(maps).count() == 1 {
        gone.push(maps);
    }
    let inputs = vec![graph.dag[maps].inputs[0], target];
    Some(Fused { op: Op::MapLoss { attention, images }, inputs, gone, unbiased: None })
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::backend::{Cpu, Kernels};
    use crate::{Executor, Feed, Grads, GraphBuilder, GraphError, Init, Mode, ParamStore, Path, Tensor};

    type Build = fn(&mut GraphBuilder) -> Result<Tensor, GraphError>;

    fn regressor(g: &mut GraphBuilder) -> Result<Tensor, GraphError> {
        let x = g.input_with_grad("x", &[2, 3, 2, 5]);
        g.linear(&Path::new("r"), &x, 4, true, Init::FanInUniform)
    }

    fn mean_map(g: &mut GraphBuilder, maps: &Tensor) -> Result<Tensor, GraphError> {
        let flat = g.reshape(maps, &[2, 4, 9])?;
        let mean = g.global_avg_pool(&flat)?;
        g.reshape(&mean, &[2, 3, 3])
    }

    fn probabilities(g: &mut GraphBuilder, name: &str) -> Tensor {
        let t = g.input(name, &[2, 3, 3]);
        g.softmax(&t, 1.0)
    }

    /// Graphs, and the fused losses that they end with.
    const GRAPHS: &[(&str, &[&str], Build)] = &[
        ("projection", &["row_loss"], |g| {
            let x = g.input_with_grad("x", &[4, 6]);
            let x = g.l2_normalize(&x);
            let y = g.linear(&Path::new("p"), &x, 5, false, Init::FanInUniform)?;
            let (y, t) = (g.l2_normalize(&y), g.input("t", &[4, 5]));
            g.mse(&y, &t)
        }),
        ("both sides", &["row_loss"], |g| {
            let (a, b) = (g.input_with_grad("x", &[4, 6]), g.input_with_grad("y", &[4, 6]));
            let (a, b) = (g.l2_normalize(&a), g.l2_normalize(&b));
            g.cosine(&a, &b)
        }),
        ("a row that others read", &["mse", "cosine"], |g| {
            let x = g.input_with_grad("x", &[4, 6]);
            let (x, t) = (g.l2_normalize(&x), g.input("t", &[4, 6]));
            let (a, b) = (g.mse(&x, &t)?, g.cosine(&x, &t)?);
            g.add(&a, &b)
        }),
        ("transfer", &["transfer_loss"], |g| {
            let x = g.input_with_grad("x", &[2, 3, 2, 5]);
            let (map, t) = (g.attention_transfer_map(&x)?, g.input("t", &[2, 6]));
            g.mse(&map, &t)
        }),
        ("transfer, target first", &["transfer_loss"], |g| {
            let x = g.input_with_grad("x", &[2, 3, 2, 5]);
            let (map, t) = (g.attention_transfer_map(&x)?, g.input("t", &[2, 6]));
            g.mse(&t, &map)
        }),
        ("features by squares", &["pixel_loss"], |g| {
            let (y, t) = (regressor(g)?, g.input("t", &[2, 3, 2, 4]));
            g.mse(&y, &t)
        }),
        ("features by cosine", &["pixel_loss"], |g| {
            let (y, t) = (regressor(g)?, g.input("t", &[2, 3, 2, 4]));
            g.cosine(&y, &t)
        }),
        ("features that are an output", &["mse"], |g| {
            let (y, t) = (regressor(g)?, g.input("t", &[2, 3, 2, 4]));
            g.output("tap", &y);
            g.mse(&y, &t)
        }),
        ("maps for two teachers", &["map_loss", "map_loss"], |g| {
            let qkv = g.input_with_grad("x", &[4, 3, 12]);
            let maps = g.attention_map(&qkv, 2, false)?;
            let (p, q) = (probabilities(g, "t"), probabilities(g, "u"));
            let mean = mean_map(g, &maps)?;
            let a = g.kl(&p, &mean)?;
            let mean = mean_map(g, &maps)?;
            let b = g.kl(&q, &mean)?;
            g.add(&a, &b)
        }),
        ("maps without their first token", &["kl"], |g| {
            let qkv = g.input_with_grad("x", &[4, 3, 12]);
            let maps = g.attention_map(&qkv, 2, false)?;
            let mean = mean_map(g, &maps)?;
            let rows = g.slice_rows(&mean, 1, 2)?;
            let t = g.input("t", &[2, 2, 3]);
            let t = g.softmax(&t, 1.0);
            g.kl(&t, &rows)
        }),
    ];

    /// The loss, and the gradients of its inputs and parameters.
    fn run(graph: &StepGraph, kernels: Kernels) -> Result<Vec<Vec<f32>>, Box<dyn std::error::Error>> {
        let mut store = ParamStore::default();
        store.init(graph, 5)?;
        for p in store.params_mut() {
            let noise = Init::Uniform(0.3).sample(1, "noise", &p.shape);
            p.data.iter_mut().zip(noise).for_each(|(v, n)| *v += n);
        }
        let mut grads = Grads::zeros_like(&store);
        let mut e = Executor::new(Arc::new(graph.clone()), &store, Mode::Train, Cpu::new(kernels))?;
        let fed: Vec<(String, Vec<f32>, bool)> = graph
            .nodes()
            .filter_map(|(_, n)| match &n.source {
                Source::Input(name) => {
                    Some((name.clone(), Init::Normal(1.0).sample(3, name, &n.shape), n.requires_grad))
                }
                _ => None,
            })
            .collect();
        let feeds: Vec<(&str, Feed<'_>)> = fed.iter().map(|(n, v, _)| (n.as_str(), Feed::F32(v))).collect();
        e.forward(&store, &feeds)?;
        let loss = graph.output("loss")?;
        let mut found = vec![e.value(loss).into_owned()];
        e.backward(&store, &[(loss, &[0.7])], &mut grads)?;
        for (name, ..) in fed.iter().filter(|f| f.2) {
            found.push(e.grad(&graph.input(name).ok_or("an input")?)?.into_owned());
        }
        found.extend(grads.all().iter().cloned());
        Ok(found)
    }

    #[test]
    fn a_fused_loss_is_the_plain_one() -> Result<(), Box<dyn std::error::Error>> {
        for (name, losses, build) in GRAPHS {
            let mut g = GraphBuilder::new(true);
            let loss = build(&mut g)?;
            g.output("loss", &loss);
            let graph = g.finish();
            let fused = fuse_losses(&graph);
            let is_loss = |op: &Op| op.is_of_parts() || matches!(op, Op::Mse | Op::Cosine { .. } | Op::KlRows { .. });
            let ops: Vec<&str> =
                fused.nodes().filter_map(|(_, n)| n.op()).filter(|op| is_loss(op)).map(Op::name).collect();
            assert_eq!(ops, *losses, "{name}");
            let maps = fused.nodes().filter(|(_, n)| matches!(n.op(), Some(Op::AttentionMap(_)))).count();
            assert!(maps == 0 || *losses == ["kl"], "{name}: maps are stored");
            for kernels in [Kernels::Native, Kernels::Reference] {
                let (plain, other) = (run(&graph, kernels)?, run(&fused, kernels)?);
                assert_eq!(plain.len(), other.len());
                for (i, (a, b)) in plain.iter().zip(&other).enumerate() {
                    let largest = a.iter().fold(0f32, |m, v| m.max(v.abs()));
                    let gap = a.iter().zip(b).fold(0f32, |m, (a, b)| m.max((a - b).abs()));
                    assert!(largest > 0.0 && gap <= 2e-6 * largest, "{name} {i}: {gap} of {largest}");
                }
            }
        }
        Ok(())
    }
}
