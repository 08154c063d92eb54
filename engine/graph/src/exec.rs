//! The executor: walks the DAG forward in topological order, then backward, one VJP a node.

use std::borrow::Cow;
use std::collections::HashMap;
use std::mem::take;
use std::sync::Arc;
use std::time::Instant;

use crate::backend::{Arg, Backend, BackendError, Cpu, Dtype, Forward, GradOut, Part, Vjp};
use crate::fuse::{fuse, fuse_losses};
use crate::graph::{GraphError, Node, Source, StepGraph, Tensor, ValueId};
use crate::memory::{MemoryPlan, Mode};
use crate::op::Op;
use crate::params::{Grads, ParamStore};
use crate::schedule::Task;

mod profile;

pub use profile::OpTime;

/// A value for an input.
#[derive(Clone, Copy, Debug)]
pub enum Feed<'a> {
    /// Values.
    F32(&'a [f32]),
    /// Ids.
    I32(&'a [i32]),
    /// Written before by [`Executor::write`].
    Held,
}

/// Inputs by name.
pub type Feeds<'a> = [(&'a str, Feed<'a>)];

/// A step that could not run.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ExecError {
    /// An input of the graph was not fed.
    #[error("input `{0}` was not fed")]
    Missing(String),
    /// An input was fed with another length or type.
    #[error("input `{name}` needs {wanted} {kind} values, but got {got}")]
    Feed {
        /// Input name.
        name: String,
        /// Length needed.
        wanted: usize,
        /// Type needed.
        kind: &'static str,
        /// What was fed.
        got: String,
    },
    /// A gradient was asked for or given where there is none.
    #[error("`{0}` takes no gradient")]
    NoGradient(String),
    /// The store does not fit the graph.
    #[error(transparent)]
    Graph(#[from] GraphError),
    /// A node failed.
    #[error(transparent)]
    Backend(#[from] BackendError),
}

/// Sees each node after it ran, with a way to read its value.
pub type Watch<'a> = &'a mut dyn FnMut(&Node, &dyn Fn() -> Vec<f32>);

/// Ids come from data: refuses those outside the table that a node looks them up in, before a kernel reads there.
fn check_ids(graph: &StepGraph, ids: ValueId, values: &[i32]) -> Result<(), BackendError> {
    for reader in graph.dag.neighbors(ids) {
        let node = &graph.dag[reader];
        let Some(op) = node.op() else { continue };
        let rows = match op {
            Op::Embedding { width } => graph.dag[node.inputs[0]].numel() / (*width).max(1),
            Op::GatherRows { tokens, .. } => *tokens,
            Op::MaskedAttention(d) => d.tokens,
            _ => continue,
        };
        if let Some(bad) = values.iter().find(|&&i| usize::try_from(i).map_or(true, |i| i >= rows)) {
            let reason = format!("id {bad} lies outside 0..{rows}");
            return Err(BackendError { op: op.name(), label: node.label.clone(), reason });
        }
    }
    Ok(())
}

/// Runs one [`StepGraph`] with one [`MemoryPlan`]; reused from step to step.
#[derive(Debug)]
pub struct Executor<B: Backend = Cpu> {
    graph: Arc<StepGraph>,
    plan: MemoryPlan,
    mode: Mode,
    backend: B,
    slots: Vec<B::Buffer>,
    ints: HashMap<ValueId, B::Ints>,
    /// Position in the store of each of the graph's parameters.
    bound: Vec<usize>,
    moved: HashMap<ValueId, usize>,
    /// Gradients of arguments that are another argument of the same node too.
    repeats: HashMap<(ValueId, usize), B::Buffer>,
    /// Element type of each node's value.
    dtypes: Vec<Dtype>,
    started: Vec<bool>,
    profile: Option<HashMap<(&'static str, String), OpTime>>,
}

impl<B: Backend> Executor<B> {
    /// Plans the memory of `graph`, allocates it and finds its parameters in `store`.
    ///
    /// # Errors
    /// A parameter that `store` lacks or holds with another shape, or a device whose memory does not suffice.
    pub fn new(
        graph: Arc<StepGraph>,
        store: &ParamStore<B::Buffer>,
        mode: Mode,
        mut backend: B,
    ) -> Result<Self, ExecError> {
        let graph = match mode {
            Mode::Forward if backend.fuses() => Arc::new(fuse(&graph)),
            _ if mode.trains() && backend.fuses_losses() => Arc::new(fuse_losses(&graph)),
            _ => graph,
        };
        let plan = MemoryPlan::new(&graph, mode, &backend);
        let dtypes = graph.dag.node_indices().map(|id| backend.dtype(&graph, id)).collect();
        let mut bound = Vec::with_capacity(graph.params.len());
        for spec in &graph.params {
            let index = store.index(&spec.name).ok_or_else(|| GraphError::NoParam(spec.name.clone()))?;
            let held = &store.params()[index].shape;
            if *held != spec.shape {
                return Err(GraphError::ParamShape {
                    name: spec.name.clone(),
                    held: held.clone(),
                    wanted: spec.shape.clone(),
                }
                .into());
            }
            bound.push(index);
        }
        let slots = match plan.ranges() {
            Some(ranges) => backend.allocate_ranges(plan.bytes(), &ranges)?,
            None => backend.allocate(&plan.slots)?,
        };
        let moved = plan.moved.iter().copied().collect();
        let started = vec![false; graph.dag.node_count()];
        Ok(Executor {
            graph,
            plan,
            mode,
            backend,
            slots,
            ints: HashMap::new(),
            bound,
            moved,
            repeats: HashMap::new(),
            dtypes,
            started,
            profile: None,
        })
    }

    /// The graph that is run.
    pub fn graph(&self) -> &StepGraph {
        &self.graph
    }

    /// The memory plan.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// The backend.
    pub fn backend(&self) -> &B {
        &self.backend
    }

    /// Copies `feeds` to the graph's inputs: the first half of [`forward`](Self::forward).
    ///
    /// # Errors
    /// A missing or wrong feed.
    pub fn feed(&mut self, feeds: &Feeds<'_>) -> Result<(), ExecError> {
        let graph = Arc::clone(&self.graph);
        for (id, node) in graph.nodes() {
            let (name, int) = match &node.source {
                Source::Input(name) => (name, false),
                Source::IntInput(name) => (name, true),
                _ => continue,
            };
            let fed = feeds.iter().find(|(n, _)| n == name).map(|(_, f)| *f);
            let wrong = |got: String| ExecError::Feed {
                name: name.clone(),
                wanted: node.numel(),
                kind: if int { "i32" } else { "f32" },
                got,
            };
            match (fed, int) {
                (None, _) => return Err(ExecError::Missing(name.clone())),
                (Some(Feed::Held), _) => {}
                (Some(Feed::F32(v)), false) if v.len() == node.numel() => {
                    let dtype = self.dtypes[id.index()];
                    self.backend.upload(v, dtype, &mut self.slots[self.plan.values[&id]]);
                }
                (Some(Feed::I32(v)), true) if v.len() == node.numel() => {
                    check_ids(&graph, id, v)?;
                    self.backend.upload_ints(v, self.ints.entry(id).or_default());
                }
                (Some(Feed::F32(v)), _) => return Err(wrong(format!("{} f32", v.len()))),
                (Some(Feed::I32(v)), _) => return Err(wrong(format!("{} i32", v.len()))),
            }
        }
        Ok(())
    }

    /// Copies host values to the value of input `t`; to be fed as [`Feed::Held`].
    ///
    /// # Errors
    /// Another number of values.
    pub fn upload(&mut self, t: &Tensor, values: &[f32]) -> Result<(), ExecError> {
        if values.len() != t.numel() {
            return Err(self.wrong_feed(t, "f32", values.len()));
        }
        let dtype = self.dtypes[t.id.index()];
        self.backend.upload(values, dtype, &mut self.slots[self.plan.values[&t.id]]);
        Ok(())
    }

    /// Refuses ids for input `t` of another number, or outside the table that they are looked up in.
    ///
    /// # Errors
    /// What is wrong with them.
    pub fn check_ids(&self, t: &Tensor, values: &[i32]) -> Result<(), ExecError> {
        if values.len() != t.numel() {
            return Err(self.wrong_feed(t, "i32", values.len()));
        }
        Ok(check_ids(&self.graph, t.id, values)?)
    }

    /// Copies host ids to input `t`; to be fed as [`Feed::Held`].
    ///
    /// # Errors
    /// As [`check_ids`](Self::check_ids).
    pub fn upload_ids(&mut self, t: &Tensor, values: &[i32]) -> Result<(), ExecError> {
        self.check_ids(t, values)?;
        self.backend.upload_ints(values, self.ints.entry(t.id).or_default());
        Ok(())
    }

    /// Takes `ids` (a buffer that they were uploaded to) as those of input `t`; to be fed as [`Feed::Held`].
    pub fn set_ids(&mut self, t: &Tensor, ids: B::Ints) {
        self.ints.insert(t.id, ids);
    }

    fn wrong_feed(&self, t: &Tensor, kind: &'static str, got: usize) -> ExecError {
        let name = match &self.graph.dag[t.id].source {
            Source::Input(name) | Source::IntInput(name) => name.clone(),
            _ => self.graph.dag[t.id].label.clone(),
        };
        ExecError::Feed { name, wanted: t.numel(), kind, got: format!("{got} {kind}") }
    }

    /// Element type of a value.
    pub fn dtype(&self, t: &Tensor) -> Dtype {
        self.dtypes[t.id.index()]
    }

    /// Copies to the value of input `t`, from its element `start` on; to be fed as [`Feed::Held`].
    pub fn write(&mut self, t: &Tensor, from: Part<'_, B>, start: usize) {
        let dtype = self.dtypes[t.id.index()];
        self.backend.copy(from, &mut self.slots[self.plan.values[&t.id]], dtype, start, false);
    }

    fn args<'a>(
        graph: &StepGraph,
        plan: &MemoryPlan,
        dtypes: &[Dtype],
        slots: &'a [B::Buffer],
        ints: &'a HashMap<ValueId, B::Ints>,
        bound: &[usize],
        store: &'a ParamStore<B::Buffer>,
        node: &Node,
        late: bool,
    ) -> Vec<Arg<'a, B>> {
        let arg = |id: &ValueId| {
            let input = &graph.dag[*id];
            let (len, dtype) = (input.numel(), dtypes[id.index()]);
            match &input.source {
                Source::Param(p) => Arg::Values { buffer: &store.params()[bound[p.0]].data, len, dtype: Dtype::F32 },
                Source::IntInput(_) => Arg::Ids(&ints[id]),
                Source::Input(_) | Source::Op(_) | Source::Fused => {
                    Arg::Values { buffer: &slots[plan.value(*id, late)], len, dtype }
                }
            }
        };
        node.inputs.iter().map(arg).collect()
    }

    /// Runs the graph forward. Outputs stay readable through [`value`](Self::value) until the next forward.
    ///
    /// # Errors
    /// A missing or wrong feed, or a node that fails.
    pub fn forward(&mut self, store: &ParamStore<B::Buffer>, feeds: &Feeds<'_>) -> Result<(), ExecError> {
        self.forward_watched(store, feeds, &mut |_, _| {})
    }

    /// As [`forward`](Self::forward), showing each node and its value right after it ran: to find the first layer
    /// that leaves the finite range, or to time nodes.
    ///
    /// # Errors
    /// As [`forward`](Self::forward).
    pub fn forward_watched(
        &mut self,
        store: &ParamStore<B::Buffer>,
        feeds: &Feeds<'_>,
        watch: Watch<'_>,
    ) -> Result<(), ExecError> {
        self.feed(feeds)?;
        self.walk(store, watch)
    }

    /// The second half of [`forward`](Self::forward): runs the nodes on what was fed.
    ///
    /// # Errors
    /// A node that fails.
    pub fn walk(&mut self, store: &ParamStore<B::Buffer>, watch: Watch<'_>) -> Result<(), ExecError> {
        let graph = Arc::clone(&self.graph);
        self.backend.begin(&graph)?;
        for (id, node) in graph.nodes() {
            if node.op().is_none() {
                continue;
            }
            self.run(id, node, store, false)?;
            let dtype = self.dtypes[id.index()];
            let held = &self.slots[self.plan.values[&id]];
            let part = || Part { buffer: held, dtype, start: 0, len: node.numel() };
            watch(node, &|| self.backend.view(part()).into_owned());
        }
        Ok(())
    }

    /// Runs a node forward: in the walk forward, or again in the walk backward.
    fn run(&mut self, id: ValueId, node: &Node, store: &ParamStore<B::Buffer>, again: bool) -> Result<(), ExecError> {
        let Some(op) = node.op() else { return Ok(()) };
        let start = Instant::now();
        let slot = self.plan.value(id, again);
        let mut out = take(&mut self.slots[slot]);
        let saved_slots = self.plan.saved(id, again);
        let mut saved: Vec<B::Buffer> = saved_slots.iter().map(|&s| take(&mut self.slots[s])).collect();
        let ins =
            Self::args(&self.graph, &self.plan, &self.dtypes, &self.slots, &self.ints, &self.bound, store, node, again);
        let keep = self.mode.trains() && node.requires_grad && (again || !self.plan.values_again.contains_key(&id));
        let io = Forward { ins: &ins, out: &mut out, dtype: self.dtypes[id.index()], saved: &mut saved, keep };
        let ran = self.backend.forward(id, node, io);
        drop(ins);
        for (&s, buffer) in self.plan.saved(id, again).iter().zip(saved) {
            self.slots[s] = buffer;
        }
        self.slots[slot] = out;
        ran?;
        self.count(node, op, start, false);
        Ok(())
    }

    /// Moves the running statistics of every batch norm in `store` towards this forward's batch. Once a step, before the
    /// backward, which reuses the memory of the batch's statistics: with gradient accumulation, after the forward that
    /// is followed by a backward.
    pub fn update_running_statistics(&mut self, store: &mut ParamStore<B::Buffer>) {
        let graph = Arc::clone(&self.graph);
        for (id, node) in graph.nodes() {
            let Some(Op::BatchNorm { dims, momentum, running: [mean, var], .. }) = node.op() else { continue };
            let (mean, var) = (self.bound[mean.0], self.bound[var.0]);
            let saved = &self.plan.saved[&id];
            let batch = [&self.slots[saved[0]], &self.slots[saved[1]]];
            let params = store.params_mut();
            let mut running = [take(&mut params[mean].data), take(&mut params[var].data)];
            let [m, v] = &mut running;
            self.backend.running_statistics(dims, *momentum, batch, [m, v]);
            let [m, v] = running;
            params[mean].data = m;
            params[var].data = v;
        }
    }

    /// Where an output's (or input's) values lie after a forward.
    pub fn part(&self, t: &Tensor) -> Part<'_, B> {
        let buffer = &self.slots[self.plan.values[&t.id]];
        Part { buffer, dtype: self.dtypes[t.id.index()], start: 0, len: t.numel() }
    }

    /// An output's (or input's) values after a forward.
    pub fn value(&self, t: &Tensor) -> Cow<'_, [f32]> {
        self.backend.view(self.part(t))
    }

    /// Where the gradient of an input made by [`input_with_grad`](crate::GraphBuilder::input_with_grad) lies after a
    /// backward.
    ///
    /// # Errors
    /// No gradient reaches that input.
    pub fn grad_part(&self, t: &Tensor) -> Result<Part<'_, B>, ExecError> {
        let none = || ExecError::NoGradient(format!("{:?}", self.graph.dag[t.id].source));
        let slot = self.plan.grads.get(&t.id).filter(|_| self.started[t.id.index()]).ok_or_else(none)?;
        Ok(Part { buffer: &self.slots[*slot], dtype: self.dtypes[t.id.index()], start: 0, len: t.numel() })
    }

    /// The gradient of an input made by [`input_with_grad`](crate::GraphBuilder::input_with_grad), after a backward.
    ///
    /// # Errors
    /// No gradient reaches that input.
    pub fn grad(&self, t: &Tensor) -> Result<Cow<'_, [f32]>, ExecError> {
        Ok(self.backend.view(self.grad_part(t)?))
    }

    /// Walks backward from `seeds` (gradients of outputs), adding parameters' gradients to `grads`.
    ///
    /// # Errors
    /// A seed for a value that is no output, takes no gradient or has another size; a node that fails.
    pub fn backward(
        &mut self,
        store: &ParamStore<B::Buffer>,
        seeds: &[(&Tensor, &[f32])],
        grads: &mut Grads<B::Buffer>,
    ) -> Result<(), ExecError> {
        self.clear_seeds();
        let mut fed: HashMap<ValueId, Vec<f32>> = HashMap::new();
        for (t, seed) in seeds {
            if seed.len() != t.numel() {
                let name = format!("gradient at {}", self.graph.dag[t.id].label);
                return Err(ExecError::Feed { name, wanted: t.numel(), kind: "f32", got: seed.len().to_string() });
            }
            let slot = self.seed_slot(t)?;
            self.started[t.id.index()] = true;
            let dtype = self.dtypes[t.id.index()];
            // An output that is seeded twice gets the sum.
            let sum = match fed.get_mut(&t.id) {
                Some(held) => {
                    held.iter_mut().zip(*seed).for_each(|(h, s)| *h += s);
                    &*held
                }
                None => &*fed.entry(t.id).or_insert_with(|| seed.to_vec()),
            };
            self.backend.upload(sum, dtype, &mut self.slots[slot]);
        }
        self.walk_backward(store, grads)
    }

    fn seed_slot(&self, t: &Tensor) -> Result<usize, ExecError> {
        let output = self.graph.outputs.iter().any(|(_, o)| o.id == t.id);
        let slot = self.plan.grads.get(&t.id).filter(|_| output && self.mode.trains());
        Ok(*slot.ok_or_else(|| ExecError::NoGradient(self.graph.dag[t.id].label.clone()))?)
    }

    /// Forgets the seeds of the last backward: the first step of a backward whose seeds lie on the device.
    pub fn clear_seeds(&mut self) {
        self.started.fill(false);
    }

    /// Adds to the gradient of output `t`, after a forward, for [`walk_backward`](Self::walk_backward).
    ///
    /// # Errors
    /// A value that is no output or takes no gradient.
    pub fn seed(&mut self, t: &Tensor, from: Part<'_, B>) -> Result<(), ExecError> {
        let slot = self.seed_slot(t)?;
        let add = std::mem::replace(&mut self.started[t.id.index()], true);
        self.backend.copy(from, &mut self.slots[slot], self.dtypes[t.id.index()], 0, add);
        Ok(())
    }

    /// Walks backward from what was [`seed`](Self::seed)ed, adding parameters' gradients to `grads`.
    ///
    /// # Errors
    /// A node that fails.
    pub fn walk_backward(
        &mut self,
        store: &ParamStore<B::Buffer>,
        grads: &mut Grads<B::Buffer>,
    ) -> Result<(), ExecError> {
        let graph = Arc::clone(&self.graph);
        for i in 0..self.plan.tasks.len() {
            let (Task::Again(id) | Task::Back(id)) = self.plan.tasks[i];
            let node = &graph.dag[id];
            if let Task::Again(_) = self.plan.tasks[i] {
                self.run(id, node, store, true)?;
                continue;
            }
            let Some(op) = node.op() else { continue };
            if node.requires_grad && self.started[id.index()] {
                let start = Instant::now();
                self.vjp(&graph, id, node, op, store, grads)?;
                self.count(node, op, start, true);
            }
        }
        Ok(())
    }

    fn vjp(
        &mut self,
        graph: &StepGraph,
        id: ValueId,
        node: &Node,
        op: &Op,
        store: &ParamStore<B::Buffer>,
        grads: &mut Grads<B::Buffer>,
    ) -> Result<(), ExecError> {
        enum Home {
            Slot(usize),
            Param(usize),
            Repeat(usize),
        }
        let dout_slot = self.plan.grads[&id];
        let dout = take(&mut self.slots[dout_slot]);
        // Where each argument's gradient lives; taken out while the node runs.
        let mut homes: Vec<Option<Home>> = Vec::with_capacity(node.inputs.len());
        let mut buffers: Vec<Option<(B::Buffer, usize, bool)>> = Vec::with_capacity(node.inputs.len());
        for (a, input) in node.inputs.iter().enumerate() {
            let held = &graph.dag[*input];
            let len = held.numel();
            if !op.differentiable(a) || !held.requires_grad {
                homes.push(None);
                buffers.push(None);
            } else if self.moved.get(&id) == Some(&a) {
                self.started[input.index()] = true;
                homes.push(None);
                buffers.push(None);
            } else if let Some(first) = node.inputs[..a].iter().position(|i| i == input) {
                let buffer = match self.repeats.remove(&(id, a)) {
                    Some(buffer) => buffer,
                    None => {
                        let bytes = len * self.dtypes[input.index()].bytes();
                        self.backend.allocate(&[bytes])?.pop().unwrap_or_default()
                    }
                };
                homes.push(Some(Home::Repeat(first)));
                buffers.push(Some((buffer, len, false)));
            } else if let Source::Param(p) = held.source {
                let index = self.bound[p.0];
                homes.push(Some(Home::Param(index)));
                buffers.push(Some((take(&mut grads.data[index]), len, true)));
            } else {
                let slot = self.plan.grads[input];
                let accumulate = std::mem::replace(&mut self.started[input.index()], true);
                homes.push(Some(Home::Slot(slot)));
                buffers.push(Some((take(&mut self.slots[slot]), len, accumulate)));
            }
        }
        let ran = {
            // Saved tensors are gathered into one slice for the backend.
            let saved_slots = self.plan.saved(id, true);
            let saved: Vec<B::Buffer> = saved_slots.iter().map(|&s| take(&mut self.slots[s])).collect();
            let (plan, dtypes) = (&self.plan, &self.dtypes);
            let ins = Self::args(graph, plan, dtypes, &self.slots, &self.ints, &self.bound, store, node, true);
            let mut outs: Vec<Option<GradOut<'_, B>>> = buffers
                .iter_mut()
                .zip(&node.inputs)
                .map(|(b, input)| {
                    let (buffer, len, accumulate) = b.as_mut()?;
                    let dtype = self.dtypes[input.index()];
                    Some(GradOut { buffer, len: *len, dtype, accumulate: *accumulate })
                })
                .collect();
            let out = self.backend.needs(op).output.then(|| &self.slots[self.plan.value(id, true)]);
            let dtype = self.dtypes[id.index()];
            let io = Vjp { ins: &ins, out, saved: &saved, dout: &dout, dtype, grads: &mut outs };
            let ran = self.backend.vjp(id, node, io);
            drop(ins);
            for (&s, buffer) in saved_slots.iter().zip(saved) {
                self.slots[s] = buffer;
            }
            ran
        };
        self.slots[dout_slot] = dout;
        let mut repeats = Vec::new();
        for (a, (home, buffer)) in homes.into_iter().zip(buffers).enumerate() {
            match (home, buffer) {
                (Some(Home::Slot(slot)), Some((buffer, ..))) => self.slots[slot] = buffer,
                (Some(Home::Param(index)), Some((buffer, ..))) => grads.data[index] = buffer,
                (Some(Home::Repeat(first)), Some((buffer, len, _))) => repeats.push((a, first, buffer, len)),
                _ => {}
            }
        }
        ran?;
        for (a, first, buffer, len) in repeats {
            let input = node.inputs[first];
            let dtype = self.dtypes[input.index()];
            let to = match graph.dag[input].source {
                Source::Param(p) => &mut grads.data[self.bound[p.0]],
                _ => &mut self.slots[self.plan.grads[&input]],
            };
            self.backend.copy(Part { buffer: &buffer, dtype, start: 0, len }, to, dtype, 0, true);
            self.repeats.insert((id, a), buffer);
        }
        Ok(())
    }
}
