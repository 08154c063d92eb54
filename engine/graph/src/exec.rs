//! The executor: walks the DAG forward in topological order, then backward, one VJP a node.

use std::borrow::Cow;
use std::collections::HashMap;
use std::mem::take;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::backend::{Arg, Backend, BackendError, Cpu, Forward, GradOut, Vjp};
use crate::graph::{GraphError, Node, Source, StepGraph, Tensor, ValueId};
use crate::memory::{MemoryPlan, Mode};
use crate::op::Op;
use crate::params::{Grads, ParamStore};

/// A value for an input.
#[derive(Clone, Copy, Debug)]
pub enum Feed<'a> {
    /// Values.
    F32(&'a [f32]),
    /// Ids.
    I32(&'a [i32]),
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
    started: Vec<bool>,
    profile: Option<HashMap<(&'static str, String), OpTime>>,
}

/// Time spent in one kind of op.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct OpTime {
    /// Op name.
    pub op: &'static str,
    /// What tells it apart from others of its name (kernel size and stride), or nothing.
    pub detail: String,
    /// Time in forwards.
    pub forward: Duration,
    /// Time in VJPs.
    pub backward: Duration,
    /// Floating-point operations of the forwards that were timed.
    pub flops: u64,
}

impl<B: Backend> Executor<B> {
    /// Plans the memory of `graph`, allocates it and finds its parameters in `store`.
    ///
    /// # Errors
    /// A parameter that `store` lacks or holds with another shape.
    pub fn new(
        graph: Arc<StepGraph>,
        store: &ParamStore<B::Buffer>,
        mode: Mode,
        mut backend: B,
    ) -> Result<Self, GraphError> {
        let plan = MemoryPlan::new(&graph, mode);
        let mut bound = Vec::with_capacity(graph.params.len());
        for spec in &graph.params {
            let index = store.index(&spec.name).ok_or_else(|| GraphError::NoParam(spec.name.clone()))?;
            let held = &store.params()[index].shape;
            if *held != spec.shape {
                return Err(GraphError::ParamShape {
                    name: spec.name.clone(),
                    held: held.clone(),
                    wanted: spec.shape.clone(),
                });
            }
            bound.push(index);
        }
        let slots = plan.slots.iter().map(|&len| {
            let mut buffer = B::Buffer::default();
            backend.grow(&mut buffer, len);
            buffer
        });
        let slots = slots.collect();
        let moved = plan.moved.iter().copied().collect();
        let started = vec![false; graph.dag.node_count()];
        Ok(Executor { graph, plan, mode, backend, slots, ints: HashMap::new(), bound, moved, started, profile: None })
    }

    /// The graph that is run.
    pub fn graph(&self) -> &StepGraph {
        &self.graph
    }

    /// The memory plan.
    pub fn plan(&self) -> &MemoryPlan {
        &self.plan
    }

    /// Starts to count the time spent in each kind of op, from zero.
    pub fn start_profile(&mut self) {
        self.profile = Some(HashMap::new());
    }

    /// The times counted since [`start_profile`](Self::start_profile), longest first; ends the counting.
    pub fn take_profile(&mut self) -> Vec<OpTime> {
        let mut times: Vec<OpTime> = self.profile.take().unwrap_or_default().into_values().collect();
        times.sort_by_key(|t| std::cmp::Reverse(t.forward + t.backward));
        times
    }

    fn count(&mut self, node: &Node, op: &Op, since: Instant, backward: bool) {
        let Some(profile) = &mut self.profile else { return };
        let detail = match op {
            Op::Conv2d(d) => format!("{}x{} stride {}", d.kh, d.kw, d.stride),
            _ => String::new(),
        };
        let time = profile.entry((op.name(), detail)).or_insert_with_key(|(op, detail)| OpTime {
            op,
            detail: detail.clone(),
            ..OpTime::default()
        });
        if backward {
            time.backward += since.elapsed();
        } else {
            time.forward += since.elapsed();
            time.flops += op.flops(node.numel());
        }
    }

    fn feed(&mut self, feeds: &Feeds<'_>) -> Result<(), ExecError> {
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
                (Some(Feed::F32(v)), false) if v.len() == node.numel() => {
                    self.backend.upload(v, &mut self.slots[self.plan.values[&id]]);
                }
                (Some(Feed::I32(v)), true) if v.len() == node.numel() => {
                    self.backend.upload_ints(v, self.ints.entry(id).or_default());
                }
                (Some(Feed::F32(v)), _) => return Err(wrong(format!("{} f32", v.len()))),
                (Some(Feed::I32(v)), _) => return Err(wrong(format!("{} i32", v.len()))),
            }
        }
        Ok(())
    }

    fn args<'a>(
        graph: &StepGraph,
        plan: &MemoryPlan,
        slots: &'a [B::Buffer],
        ints: &'a HashMap<ValueId, B::Ints>,
        bound: &[usize],
        store: &'a ParamStore<B::Buffer>,
        node: &Node,
    ) -> Vec<Arg<'a, B>> {
        let arg = |id: &ValueId| {
            let input = &graph.dag[*id];
            let len = input.numel();
            match &input.source {
                Source::Param(p) => Arg::F32 { buffer: &store.params()[bound[p.0]].data, len },
                Source::IntInput(_) => Arg::I32(&ints[id]),
                Source::Input(_) | Source::Op(_) => Arg::F32 { buffer: &slots[plan.values[id]], len },
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
        let graph = Arc::clone(&self.graph);
        for (id, node) in graph.nodes() {
            let Some(op) = node.op() else { continue };
            let start = Instant::now();
            let slot = self.plan.values[&id];
            let mut out = take(&mut self.slots[slot]);
            let saved_slots = self.plan.saved.get(&id).map_or(&[][..], Vec::as_slice);
            let mut saved: Vec<B::Buffer> = saved_slots.iter().map(|&s| take(&mut self.slots[s])).collect();
            let ins = Self::args(&graph, &self.plan, &self.slots, &self.ints, &self.bound, store, node);
            let keep = self.mode == Mode::Train && node.requires_grad;
            let io = Forward { ins: &ins, out: &mut out, saved: &mut saved, keep };
            let ran = self.backend.forward(id, node, io);
            drop(ins);
            for (&s, buffer) in saved_slots.iter().zip(saved) {
                self.slots[s] = buffer;
            }
            self.slots[slot] = out;
            ran?;
            self.count(node, op, start, false);
            let held = &self.slots[slot];
            watch(node, &|| self.backend.view(held, node.numel()).into_owned());
        }
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

    /// An output's (or input's) values after a forward.
    pub fn value(&self, t: &Tensor) -> Cow<'_, [f32]> {
        self.backend.view(&self.slots[self.plan.values[&t.id]], t.numel())
    }

    /// The gradient of an input made by [`input_with_grad`](crate::GraphBuilder::input_with_grad), after a backward.
    ///
    /// # Errors
    /// No gradient reaches that input.
    pub fn grad(&self, t: &Tensor) -> Result<Cow<'_, [f32]>, ExecError> {
        let none = || ExecError::NoGradient(format!("{:?}", self.graph.dag[t.id].source));
        let slot = self.plan.grads.get(&t.id).filter(|_| self.started[t.id.index()]).ok_or_else(none)?;
        Ok(self.backend.view(&self.slots[*slot], t.numel()))
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
        let graph = Arc::clone(&self.graph);
        self.started.fill(false);
        for (t, seed) in seeds {
            let output = graph.outputs.iter().any(|(_, o)| o.id == t.id);
            let slot = self.plan.grads.get(&t.id).filter(|_| output && self.mode == Mode::Train);
            let slot = *slot.ok_or_else(|| ExecError::NoGradient(graph.dag[t.id].label.clone()))?;
            if seed.len() != t.numel() {
                let name = format!("gradient at {}", graph.dag[t.id].label);
                return Err(ExecError::Feed { name, wanted: t.numel(), kind: "f32", got: seed.len().to_string() });
            }
            let twice = std::mem::replace(&mut self.started[t.id.index()], true);
            if twice {
                let held = self.backend.view(&self.slots[slot], seed.len());
                let sum: Vec<f32> = held.iter().zip(*seed).map(|(a, b)| a + b).collect();
                self.backend.upload(&sum, &mut self.slots[slot]);
            } else {
                self.backend.upload(seed, &mut self.slots[slot]);
            }
        }
        for (id, node) in graph.nodes().rev() {
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
                let mut buffer = B::Buffer::default();
                self.backend.grow(&mut buffer, len);
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
            let saved_slots = self.plan.saved.get(&id).map_or(&[][..], Vec::as_slice);
            let saved: Vec<B::Buffer> = saved_slots.iter().map(|&s| take(&mut self.slots[s])).collect();
            let ins = Self::args(graph, &self.plan, &self.slots, &self.ints, &self.bound, store, node);
            let mut outs: Vec<Option<GradOut<'_, B>>> = buffers
                .iter_mut()
                .map(|b| {
                    b.as_mut().map(|(buffer, len, accumulate)| GradOut { buffer, len: *len, accumulate: *accumulate })
                })
                .collect();
            let out = op.needs().output.then(|| &self.slots[self.plan.values[&id]]);
            let io = Vjp { ins: &ins, out, saved: &saved, dout: &dout, grads: &mut outs };
            let ran = self.backend.vjp(id, node, io);
            drop(ins);
            for (&s, buffer) in saved_slots.iter().zip(saved) {
                self.slots[s] = buffer;
            }
            ran
        };
        self.slots[dout_slot] = dout;
        let mut repeats = Vec::new();
        for (home, buffer) in homes.into_iter().zip(buffers) {
            match (home, buffer) {
                (Some(Home::Slot(slot)), Some((buffer, ..))) => self.slots[slot] = buffer,
                (Some(Home::Param(index)), Some((buffer, ..))) => grads.data[index] = buffer,
                (Some(Home::Repeat(first)), Some((buffer, len, _))) => repeats.push((first, buffer, len)),
                _ => {}
            }
        }
        ran?;
        for (first, buffer, len) in repeats {
            let input = node.inputs[first];
            let held = &graph.dag[input];
            let to = match held.source {
                Source::Param(p) => &mut grads.data[self.bound[p.0]],
                _ => &mut self.slots[self.plan.grads[&input]],
            };
            let added = self.backend.view(&buffer, len);
            let sum: Vec<f32> = self.backend.view(to, len).iter().zip(added.iter()).map(|(a, b)| a + b).collect();
            self.backend.upload(&sum, to);
        }
        Ok(())
    }
}
