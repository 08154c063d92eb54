//! The memory plan: a slot for every value, saved tensor and gradient, shared by those whose lifetimes don't meet.
//!
//! Time runs in the ticks of a [`Schedule`].

use std::collections::{BTreeMap, HashMap};

use crate::backend::Layout;
use crate::graph::{Node, Source, StepGraph, ValueId};
use crate::op::Op;
use crate::schedule::{Schedule, Task, keeps_saved};

/// Which walks an executor makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mode {
    /// Forward only: a value is dropped after its last reader.
    Forward,
    /// Forward, then backward: what VJPs read is kept.
    Train,
    /// As `Train`, but most of it is computed a second time instead of kept: less memory, more work, the same bits.
    Recompute,
}

impl Mode {
    /// Whether it walks backward.
    pub fn trains(self) -> bool {
        self != Mode::Forward
    }
}

/// Index of a buffer that several tensors use in turn.
pub type Slot = usize;

/// Where everything of a step lives.
#[derive(Clone, Debug)]
pub struct MemoryPlan {
    /// Size of each slot in bytes.
    pub slots: Vec<usize>,
    /// Where each slot begins, where [slots overlap](Layout::overlaps): then every tensor has one of its own.
    pub starts: Option<Vec<usize>>,
    /// Slot of each op's value.
    pub values: HashMap<ValueId, Slot>,
    /// Slots of the tensors that an op saves.
    pub saved: HashMap<ValueId, Vec<Slot>>,
    /// Slot of the gradient of each value that isn't a parameter.
    pub grads: HashMap<ValueId, Slot>,
    /// Slots of values that are computed a second time, for their readers in the walk backward.
    pub values_again: HashMap<ValueId, Slot>,
    /// Slots of what their ops save then, where they are others than the first time's.
    pub saved_again: HashMap<ValueId, Vec<Slot>>,
    /// The walk backward.
    pub tasks: Vec<Task>,
    /// Inputs of an [`Op::Add`] whose gradient takes over the slot of the sum's gradient: (add, argument).
    pub moved: Vec<(ValueId, usize)>,
}

#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
enum What {
    Value(ValueId),
    Saved(ValueId, usize),
    Grad(ValueId),
    ValueAgain(ValueId),
    SavedAgain(ValueId, usize),
}

struct Life {
    what: What,
    /// Bytes.
    len: usize,
    from: usize,
    to: usize,
}

impl MemoryPlan {
    /// Plans `graph`. Its outputs (and where it [trains](Mode::trains) the gradients of its inputs) live to the end.
    pub fn new(graph: &StepGraph, mode: Mode, layout: &impl Layout) -> Self {
        let plain = Self::scheduled(graph, mode, layout, &Schedule::keeping(graph));
        if mode != Mode::Recompute {
            return plain;
        }
        let others = Schedule::candidates(graph, layout);
        let others = others.iter().map(|schedule| Self::scheduled(graph, mode, layout, schedule));
        others.fold(plain, |best, other| if other.bytes() < best.bytes() { other } else { best })
    }

    fn scheduled(graph: &StepGraph, mode: Mode, layout: &impl Layout, schedule: &Schedule) -> Self {
        let (lives, moved) = lifetimes(graph, mode, layout, schedule);
        let mut plan = MemoryPlan {
            slots: Vec::new(),
            starts: None,
            values: HashMap::new(),
            saved: HashMap::new(),
            grads: HashMap::new(),
            values_again: HashMap::new(),
            saved_again: HashMap::new(),
            tasks: if mode.trains() { schedule.tasks.clone() } else { Vec::new() },
            moved: moved.iter().map(|m| (m.add, m.argument)).collect(),
        };
        plan.assign(lives, layout.overlaps());
        // A moved gradient lives in the slot that it was moved from; the latest addition's comes first.
        for m in moved.iter().rev() {
            if let Some(&slot) = plan.grads.get(&m.add) {
                plan.grads.insert(m.to, slot);
            }
        }
        plan
    }

    /// Gives each tensor a slot: a range of one memory, or a whole one by whichever of two ways needs less.
    fn assign(&mut self, mut lives: Vec<Life>, overlaps: bool) {
        lives.sort_by_key(|l| (l.from, std::cmp::Reverse(l.len), l.what));
        let of: Vec<Slot>;
        if overlaps {
            self.starts = Some(starts_by_size(&lives));
            self.slots = lives.iter().map(|l| l.len).collect();
            of = (0..lives.len()).collect();
        } else {
            let (in_time, by_size) = (assign_in_time(&lives), assign_by_size(&lives));
            let bytes = |found: &(Vec<usize>, Vec<Slot>)| found.0.iter().sum::<usize>();
            (self.slots, of) = if bytes(&by_size) < bytes(&in_time) { by_size } else { in_time };
        }
        for (life, slot) in lives.into_iter().zip(of) {
            match life.what {
                What::Value(v) => drop(self.values.insert(v, slot)),
                What::ValueAgain(v) => drop(self.values_again.insert(v, slot)),
                What::Grad(v) => drop(self.grads.insert(v, slot)),
                What::Saved(v, i) | What::SavedAgain(v, i) => {
                    let first = matches!(life.what, What::Saved(..));
                    let all = if first { &mut self.saved } else { &mut self.saved_again };
                    // The longest of a node's saved tensors comes first here, whatever its place in the list.
                    let saved = all.entry(v).or_default();
                    saved.resize(saved.len().max(i + 1), slot);
                    saved[i] = slot;
                }
            }
        }
    }

    /// Bytes of all slots: activations, saved tensors and gradients of activations. Parameters, their gradients and
    /// the optimiser's state come on top.
    pub fn bytes(&self) -> usize {
        match &self.starts {
            Some(starts) => starts.iter().zip(&self.slots).map(|(start, len)| start + len).max().unwrap_or(0),
            None => self.slots.iter().sum(),
        }
    }

    /// The slots as ranges of one memory, start and size, where they are that.
    pub fn ranges(&self) -> Option<Vec<(usize, usize)>> {
        Some(self.starts.as_ref()?.iter().copied().zip(self.slots.iter().copied()).collect())
    }

    /// The slot of a value's memory: in the walk forward, or (`late`) backward.
    pub fn value(&self, id: ValueId, late: bool) -> Slot {
        let again = self.values_again.get(&id).filter(|_| late);
        *again.unwrap_or_else(|| &self.values[&id])
    }

    /// The slots of what an op saved, as [`value`](Self::value).
    pub fn saved(&self, id: ValueId, late: bool) -> &[Slot] {
        let again = self.saved_again.get(&id).filter(|_| late);
        again.or_else(|| self.saved.get(&id)).map_or(&[], Vec::as_slice)
    }

    /// Nodes that run forward a second time.
    pub fn nodes_again(&self) -> impl Iterator<Item = ValueId> {
        self.tasks.iter().filter_map(|task| match task {
            Task::Again(id) => Some(*id),
            Task::Back(_) => None,
        })
    }
}

/// Slots' sizes and each tensor's slot, in the order of time: the best fit of the free ones, else the largest grows.
fn assign_in_time(lives: &[Life]) -> (Vec<usize>, Vec<Slot>) {
    let (mut slots, mut of): (Vec<usize>, Vec<Slot>) = (Vec::new(), Vec::new());
    let mut free: Vec<Slot> = Vec::new();
    let mut busy: Vec<(usize, Slot)> = Vec::new();
    for life in lives {
        busy.retain(|&(to, slot)| {
            let done = to < life.from;
            if done {
                free.push(slot);
            }
            !done
        });
        // Best fit; else the largest free slot grows; else a new one.
        let fits =
            free.iter().enumerate().filter(|(_, s)| slots[**s] >= life.len).min_by_key(|(_, s)| (slots[**s], **s));
        let pick = fits.or_else(|| free.iter().enumerate().max_by_key(|(_, s)| (slots[**s], **s))).map(|(i, _)| i);
        let slot = match pick {
            Some(i) => free.swap_remove(i),
            None => {
                slots.push(0);
                slots.len() - 1
            }
        };
        slots[slot] = slots[slot].max(life.len);
        busy.push((life.to, slot));
        of.push(slot);
    }
    (slots, of)
}

/// The same from the longest tensor to the shortest (Pisarchyk & Lee 2020, "Efficient Memory Management for Deep Neural Net
/// Inference", greedy by size): each joins the shortest slot that nobody uses in its time, and no slot ever grows.
fn assign_by_size(lives: &[Life]) -> (Vec<usize>, Vec<Slot>) {
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lives[i].len));
    let mut slots: Vec<usize> = Vec::new();
    // Each slot's uses, by the tick that they begin at.
    let mut uses: Vec<BTreeMap<usize, usize>> = Vec::new();
    let mut of = vec![0; lives.len()];
    for i in order {
        let life = &lives[i];
        // Uses of a slot don't meet: of those that begin before the end, the last one ends last.
        let idle =
            |uses: &BTreeMap<usize, usize>| uses.range(..=life.to).next_back().is_none_or(|(_, to)| *to < life.from);
        let slot = uses.iter().rposition(idle).unwrap_or_else(|| {
            slots.push(life.len);
            uses.push(BTreeMap::new());
            slots.len() - 1
        });
        uses[slot].insert(life.from, life.to);
        of[i] = slot;
    }
    (slots, of)
}

/// Bytes that ranges start at multiples of.
const ALIGN: usize = 256;

/// Starts of ranges of one memory, from the longest tensor to the shortest (Pisarchyk & Lee 2020, greedy by size for
/// offsets): each takes the smallest gap between the ranges of its time, or the end of them.
fn starts_by_size(lives: &[Life]) -> Vec<usize> {
    let mut order: Vec<usize> = (0..lives.len()).collect();
    order.sort_by_key(|&i| std::cmp::Reverse(lives[i].len));
    let mut starts = vec![0; lives.len()];
    // In the order of their starts.
    let mut placed: Vec<usize> = Vec::new();
    for i in order {
        let (life, len) = (&lives[i], lives[i].len.next_multiple_of(ALIGN));
        let (mut end, mut gap) = (0, None);
        for &other in &placed {
            if lives[other].to < life.from || life.to < lives[other].from {
                continue;
            }
            let start = starts[other];
            if start >= end + len && gap.is_none_or(|(size, _)| start - end < size) {
                gap = Some((start - end, end));
            }
            end = end.max(start + lives[other].len.next_multiple_of(ALIGN));
        }
        starts[i] = gap.map_or(end, |(_, start)| start);
        let at = placed.partition_point(|&other| starts[other] < starts[i]);
        placed.insert(at, i);
    }
    starts
}

struct Move {
    add: ValueId,
    argument: usize,
    to: ValueId,
}

fn lifetimes(graph: &StepGraph, mode: Mode, layout: &impl Layout, schedule: &Schedule) -> (Vec<Life>, Vec<Move>) {
    let bytes = |id: ValueId, node: &Node| node.numel() * layout.dtype(graph, id).bytes();
    let train = mode.trains();
    let n = graph.dag.node_count();
    let end = schedule.end();
    let back = |i: usize| schedule.back[i];
    let mut last_use: Vec<usize> = (0..n).collect();
    // Of the second life of what is computed again.
    let mut last_again: Vec<usize> = schedule.again.iter().map(|t| t.unwrap_or(0)).collect();
    let mut grad_from: Vec<usize> = vec![usize::MAX; n];
    for (id, node) in graph.nodes() {
        let Some(op) = node.op() else { continue };
        let i = id.index();
        let needs = layout.needs(op);
        let backward = train && node.requires_grad;
        let mut late = |j: usize, tick: usize| {
            let life = if schedule.again[j].is_some() { &mut last_again[j] } else { &mut last_use[j] };
            *life = (*life).max(tick);
        };
        for (a, input) in node.inputs.iter().enumerate() {
            let j = input.index();
            if backward && needs.inputs & (1 << a) != 0 {
                late(j, back(i));
            }
            if let Some(tick) = schedule.again[i] {
                late(j, tick);
            }
            if backward && op.differentiable(a) && graph.dag[*input].requires_grad {
                grad_from[j] = grad_from[j].min(back(i));
            }
        }
        if backward && needs.output {
            late(i, back(i));
        }
        for input in &node.inputs {
            last_use[input.index()] = last_use[input.index()].max(i);
        }
    }
    for (_, t) in &graph.outputs {
        let i = t.id.index();
        last_use[i] = end;
        if train && graph.dag[t.id].requires_grad {
            // The caller's seed is laid here before the backward walk.
            grad_from[i] = n;
        }
    }
    let moved = if train { moves(graph, &grad_from, back, layout) } else { Vec::new() };
    // The gradient that is taken over lives on until its last heir dies.
    let mut grad_to: Vec<usize> = (0..n).map(back).collect();
    for (id, node) in graph.nodes() {
        if matches!(node.source, Source::Input(_)) {
            grad_to[id.index()] = end;
        }
    }
    // Additions in forward order: an heir that is itself an addition comes before the one it inherits from.
    for m in &moved {
        let heir = grad_to[m.to.index()];
        let add = &mut grad_to[m.add.index()];
        *add = (*add).max(heir);
    }
    let heirs: Vec<ValueId> = moved.iter().map(|m| m.to).collect();
    let mut lives = Vec::new();
    for (id, node) in graph.nodes() {
        let i = id.index();
        if matches!(node.source, Source::Input(_)) {
            // Fed before the first tick.
            lives.push(Life { what: What::Value(id), len: bytes(id, node), from: 0, to: last_use[i] });
        }
        if let Some(op) = node.op() {
            lives.push(Life { what: What::Value(id), len: bytes(id, node), from: i, to: last_use[i] });
            let again = schedule.again[i];
            let backward = train && node.requires_grad;
            let to = if backward && (again.is_none() || keeps_saved(op)) { back(i) } else { i };
            for (k, len) in layout.saved(op).into_iter().enumerate() {
                let len = len * size_of::<f32>();
                lives.push(Life { what: What::Saved(id, k), len, from: i, to });
                if let Some(from) = again.filter(|_| !keeps_saved(op)) {
                    let to = if backward { back(i) } else { from };
                    lives.push(Life { what: What::SavedAgain(id, k), len, from, to });
                }
            }
            if let Some(from) = again {
                let (what, len) = (What::ValueAgain(id), bytes(id, node));
                lives.push(Life { what, len, from, to: last_again[i] });
            }
        }
        let is_param = matches!(node.source, Source::Param(_));
        if train && node.requires_grad && !is_param && grad_from[i] != usize::MAX && !heirs.contains(&id) {
            let len = bytes(id, node);
            lives.push(Life { what: What::Grad(id), len, from: grad_from[i], to: grad_to[i] });
        }
    }
    (lives, moved)
}

/// Which argument of each addition takes over the sum's gradient: one whose first contribution this is. It spares a
/// copy per residual connection.
fn moves(graph: &StepGraph, grad_from: &[usize], back: impl Fn(usize) -> usize, layout: &impl Layout) -> Vec<Move> {
    let mut moved: Vec<Move> = Vec::new();
    for (id, node) in graph.nodes() {
        let takes = matches!(node.op(), Some(Op::Add | Op::AddBroadcast)) && node.requires_grad;
        if !takes || grad_from[id.index()] == usize::MAX {
            continue;
        }
        let arguments = if matches!(node.op(), Some(Op::Add)) { 2 } else { 1 };
        let heir = (0..arguments).find(|&a| {
            let input = node.inputs[a];
            let held = &graph.dag[input];
            let twice = node.inputs.iter().filter(|i| **i == input).count() > 1;
            held.requires_grad
                && !matches!(held.source, Source::Param(_))
                && !twice
                && held.numel() == node.numel()
                && layout.dtype(graph, input) == layout.dtype(graph, id)
                && grad_from[input.index()] == back(id.index())
        });
        if let Some(argument) = heir {
            moved.push(Move { add: id, argument, to: node.inputs[argument] });
        }
    }
    moved
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::backend::Plain;
    use crate::{Activation, BatchNormArgs, ConvArgs, GraphBuilder, GraphError, Path};

    /// Residual blocks with norms: the shape of every trunk.
    fn trunk(train: bool, blocks: usize) -> Result<StepGraph, GraphError> {
        let mut g = GraphBuilder::new(train);
        let mut x = g.input("image", &[2, 8, 8, 4]);
        let root = Path::default();
        for i in 0..blocks {
            let p = root.at(i);
            let y = g.conv2d(&p.at("conv"), &x, ConvArgs::new(4, 3))?;
            let y = g.batch_norm(&p.at("bn"), &y, BatchNormArgs::new(Activation::Silu))?;
            x = g.add(&x, &y)?;
        }
        g.output("x", &x);
        Ok(g.finish())
    }

    #[test]
    fn tensors_that_live_together_have_their_own_slots() -> Result<(), GraphError> {
        let modes = [(Mode::Train, true), (Mode::Recompute, true), (Mode::Forward, true), (Mode::Forward, false)];
        for (mode, train) in modes {
            let graph = trunk(train, 5)?;
            let mut schedules = vec![Schedule::keeping(&graph)];
            if mode == Mode::Recompute {
                schedules.extend(Schedule::candidates(&graph, &Plain));
                assert!(schedules.len() > 2);
            }
            for schedule in schedules {
                apart(&graph, mode, &schedule);
            }
        }
        Ok(())
    }

    /// A layout whose slots may overlap.
    struct Ranges;

    impl Layout for Ranges {
        fn overlaps(&self) -> bool {
            true
        }
    }

    /// Tensors that live at one time have different slots, or ranges that don't meet, as long as they are.
    fn apart(graph: &StepGraph, mode: Mode, schedule: &Schedule) {
        let (lives, _) = lifetimes(graph, mode, &Plain, schedule);
        let [plan, ranges] = [
            MemoryPlan::scheduled(graph, mode, &Plain, schedule),
            MemoryPlan::scheduled(graph, mode, &Ranges, schedule),
        ];
        let slot = |plan: &MemoryPlan, what: &What| match *what {
            What::Value(v) => plan.values[&v],
            What::Grad(v) => plan.grads[&v],
            What::Saved(v, i) => plan.saved[&v][i],
            What::ValueAgain(v) => plan.values_again[&v],
            What::SavedAgain(v, i) => plan.saved_again[&v][i],
        };
        let range = |life: &Life| {
            let (start, len) = ranges.ranges().expect("ranges")[slot(&ranges, &life.what)];
            assert!(start.is_multiple_of(ALIGN) && len >= life.len);
            start..start + len
        };
        for (i, a) in lives.iter().enumerate() {
            assert!(plan.slots[slot(&plan, &a.what)] >= a.len);
            for b in &lives[..i] {
                if a.to < b.from || b.to < a.from {
                    continue;
                }
                assert!(slot(&plan, &a.what) != slot(&plan, &b.what));
                assert!(range(a).end <= range(b).start || range(b).end <= range(a).start);
            }
        }
    }

    #[test]
    fn memory_of_a_forward_does_not_grow_with_depth() -> Result<(), GraphError> {
        let bytes = |mode, train, n| Ok::<_, GraphError>(MemoryPlan::new(&trunk(train, n)?, mode, &Plain).bytes());
        assert_eq!(bytes(Mode::Forward, false, 3)?, bytes(Mode::Forward, false, 30)?);
        assert!(bytes(Mode::Train, true, 30)? > 5 * bytes(Mode::Train, true, 3)?);
        Ok(())
    }

    #[test]
    fn a_residual_takes_over_the_gradient_of_the_sum() -> Result<(), GraphError> {
        let graph = trunk(true, 3)?;
        let plan = MemoryPlan::new(&graph, Mode::Train, &Plain);
        // The first block's shortcut is the image, which takes no gradient, so its branch inherits.
        assert_eq!(plan.moved.len(), 3);
        for (add, argument) in &plan.moved {
            assert_eq!(plan.grads[add], plan.grads[&graph.dag[*add].inputs[*argument]]);
        }
        Ok(())
    }
}
