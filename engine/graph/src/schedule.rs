//! In which order nodes run: forward in their own order, then backward, where activations may be computed a second time
//! instead of being kept.
//!
//! Recomputation (Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost"): the graph is cut into segments at
//! places where few values pass. Only what passes a cut is kept; before the walk backward enters a segment, the segment's
//! nodes run forward once more. The same kernels read the same values, so the bits are the same.

use crate::backend::Layout;
use crate::graph::{Source, StepGraph, ValueId};
use crate::op::Op;

/// One task of the walk backward.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Task {
    /// A node runs forward again.
    Again(ValueId),
    /// A node's VJP.
    Back(ValueId),
}

/// When nodes run. Node `i` runs forward at tick `i`; the tasks of the walk backward follow.
#[derive(Clone, Debug)]
pub(crate) struct Schedule {
    pub tasks: Vec<Task>,
    /// Tick of each node's VJP.
    pub back: Vec<usize>,
    /// Tick of each node's second forward, where it has one: its value is dropped after its last reader of the first.
    pub again: Vec<Option<usize>>,
}

impl Schedule {
    fn new(nodes: usize, tasks: Vec<Task>) -> Self {
        let (mut back, mut again) = (vec![0; nodes], vec![None; nodes]);
        for (i, task) in tasks.iter().enumerate() {
            match *task {
                Task::Again(id) => again[id.index()] = Some(nodes + i),
                Task::Back(id) => back[id.index()] = nodes + i,
            }
        }
        Schedule { tasks, back, again }
    }

    /// Everything that a VJP reads is kept.
    pub(crate) fn keeping(graph: &StepGraph) -> Self {
        Schedule::new(graph.dag.node_count(), graph.dag.node_indices().rev().map(Task::Back).collect())
    }

    /// Segments begin at the nodes `cuts`.
    fn recomputing(graph: &StepGraph, layout: &impl Layout, cuts: &[usize]) -> Self {
        let n = graph.dag.node_count();
        let again = again(graph, layout, cuts);
        let mut tasks = Vec::new();
        let mut end = n;
        for &start in cuts.iter().rev().chain([&0]) {
            let ids = || (start..end).map(ValueId::new);
            tasks.extend(ids().filter(|id| again[id.index()]).map(Task::Again));
            tasks.extend(ids().rev().map(Task::Back));
            end = start;
        }
        Schedule::new(n, tasks)
    }

    /// The tick after the last.
    pub(crate) fn end(&self) -> usize {
        self.back.len() + self.tasks.len()
    }

    /// Schedules that recompute, from few segments to many.
    pub(crate) fn candidates(graph: &StepGraph, layout: &impl Layout) -> Vec<Schedule> {
        let costs = Costs::new(graph, layout);
        let mut tried: Vec<Vec<usize>> = Vec::new();
        for parts in [2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96] {
            let cuts = costs.cuts(costs.total() / parts);
            if !cuts.is_empty() && !tried.contains(&cuts) {
                tried.push(cuts);
            }
        }
        tried.iter().map(|cuts| Schedule::recomputing(graph, layout, cuts)).collect()
    }
}

/// Whether someone's VJP reads a node's value.
fn read_backward(graph: &StepGraph, layout: &impl Layout) -> Vec<bool> {
    let mut read = vec![false; graph.dag.node_count()];
    for (id, node) in graph.nodes() {
        let Some(op) = node.op().filter(|_| node.requires_grad) else { continue };
        let needs = layout.needs(op);
        for (a, input) in node.inputs.iter().enumerate() {
            read[input.index()] |= needs.inputs & (1 << a) != 0;
        }
        read[id.index()] |= needs.output;
    }
    read
}

/// Which nodes run a second time: those whose values (or what they save) a VJP reads, and whatever these are made of, but
/// for values that pass a cut, outputs, and the last segment, which the walk backward enters at once.
fn again(graph: &StepGraph, layout: &impl Layout, cuts: &[usize]) -> Vec<bool> {
    let n = graph.dag.node_count();
    let segment = |i: usize| cuts.partition_point(|cut| *cut <= i);
    let mut kept: Vec<bool> = (0..n).map(|i| segment(i) == cuts.len()).collect();
    for (id, node) in graph.nodes() {
        kept[id.index()] |= node.op().is_none();
        for input in &node.inputs {
            kept[input.index()] |= segment(input.index()) != segment(id.index());
        }
    }
    for (_, output) in &graph.outputs {
        kept[output.id.index()] = true;
    }
    let mut again = vec![false; n];
    let read = read_backward(graph, layout);
    for (id, node) in graph.nodes().rev() {
        let i = id.index();
        let Some(op) = node.op().filter(|_| !kept[i]) else { continue };
        again[i] |= read[i] || (node.requires_grad && !keeps_saved(op) && !layout.saved(op).is_empty());
        if again[i] {
            node.inputs.iter().for_each(|input| again[input.index()] |= !kept[input.index()]);
        }
    }
    again
}

/// Whether what an op's forward saves is kept though the op runs again: batch statistics, which the running ones are moved
/// by between the walks.
pub(crate) fn keeps_saved(op: &Op) -> bool {
    matches!(op, Op::BatchNorm { .. })
}

/// What cuts cost and spare.
struct Costs {
    /// Bytes that nodes before each one keep for their VJPs.
    before: Vec<usize>,
    /// Bytes of the values that pass between the node before and this one.
    passing: Vec<usize>,
}

impl Costs {
    fn new(graph: &StepGraph, layout: &impl Layout) -> Self {
        let n = graph.dag.node_count();
        let read = read_backward(graph, layout);
        let (mut before, mut passing) = (vec![0; n + 1], vec![0; n + 1]);
        let mut last: Vec<usize> = (0..n).collect();
        for (id, node) in graph.nodes() {
            node.inputs.iter().for_each(|input| last[input.index()] = id.index());
        }
        for (id, node) in graph.nodes() {
            let i = id.index();
            before[i + 1] = before[i];
            let Some(op) = node.op() else { continue };
            let bytes = node.numel() * layout.dtype(graph, id).bytes();
            let saved: usize = layout.saved(op).iter().sum::<usize>() * size_of::<f32>();
            before[i + 1] += if read[i] { bytes } else { 0 } + if node.requires_grad { saved } else { 0 };
            passing[i + 1..=last[i]].iter_mut().for_each(|p| *p += bytes);
        }
        // A cut before a parameter or an input is none: the same lies before the op that follows.
        for (id, node) in graph.nodes() {
            if !matches!(node.source, Source::Op(_)) {
                passing[id.index()] = usize::MAX;
            }
        }
        Costs { before, passing }
    }

    fn total(&self) -> usize {
        self.before.last().copied().unwrap_or(0)
    }

    /// Starts of segments that keep at most `most` bytes each where that can be, so that least passes the cuts.
    fn cuts(&self, most: usize) -> Vec<usize> {
        let n = self.before.len() - 1;
        // The least that passes the cuts up to one at p, and the cut before it.
        let mut best: Vec<(usize, usize)> = vec![(usize::MAX, 0); n + 1];
        best[0] = (0, 0);
        for p in 1..=n {
            let own = if p == n { 0 } else { self.passing[p] };
            if own == usize::MAX {
                continue;
            }
            for a in (0..p).rev() {
                // A segment that is too long is taken only where nothing shorter ends here.
                if self.before[p] - self.before[a] > most && best[p].0 != usize::MAX {
                    break;
                }
                let sum = best[a].0.saturating_add(own);
                if best[a].0 != usize::MAX && sum < best[p].0 {
                    best[p] = (sum, a);
                }
            }
        }
        let (mut cuts, mut at) = (Vec::new(), n);
        while best[at].1 > 0 {
            at = best[at].1;
            cuts.push(at);
        }
        cuts.reverse();
        cuts
    }
}
