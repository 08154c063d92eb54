//! What the host gives a step: it lies in the backend's memory, at fixed addresses, before the step's first node runs, so
//! that the walks over it need nothing from the host.

use mcpipe_graph::{Backend, Dtype, ExecError, Executor, ParamStore, Part, StepGraph, Tensor, Watch};

use crate::error::TrainError;
use crate::graphs::{EOT, FEATURES, IDS, IMAGES};

/// What an input of a tower holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Value {
    /// Images of one of the batch's views.
    View(usize),
    /// Token ids.
    Ids,
    /// Positions of the last tokens.
    Eot,
    /// The frozen text encoder's embeddings.
    Features,
    /// A stochastic input's factors.
    Mask(usize),
    /// A target that a teacher computes; written on the device.
    Target(usize),
}

/// A batch's values on the host.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Host<'a> {
    pub views: &'a [Vec<f32>],
    pub ids: &'a [i32],
    pub eot: &'a [i32],
    pub features: &'a [f32],
    pub masks: &'a [Vec<f32>],
}

impl<'a> Host<'a> {
    fn floats(&self, value: Value) -> &'a [f32] {
        match value {
            Value::View(v) => &self.views[v],
            Value::Features => self.features,
            Value::Mask(i) => &self.masks[i],
            Value::Ids | Value::Eot | Value::Target(_) => &[],
        }
    }

    fn ids(&self, value: Value) -> &'a [i32] {
        match value {
            Value::Ids => self.ids,
            Value::Eot => self.eot,
            _ => &[],
        }
    }
}

/// Values of the whole batch in the backend's memory, part by part.
#[derive(Debug)]
struct Staged<B: Backend> {
    value: Value,
    buffer: B::Buffer,
    dtype: Dtype,
    /// Elements of a part, and from one part to the next.
    len: usize,
    stride: usize,
    /// Ids, one buffer a part.
    ids: Vec<B::Ints>,
}

/// Elements that parts start at multiples of: kernels read and write eight at a time.
const ALIGN: usize = 8;

/// What the towers of a step read.
#[derive(Debug)]
pub(crate) struct Inputs<B: Backend> {
    backend: B,
    parts: usize,
    staged: Vec<Staged<B>>,
}

/// One input of a tower.
#[derive(Clone, Debug)]
struct Port {
    tensor: Tensor,
    value: Value,
    /// Its position among what is staged; none where the value is uploaded straight into the graph's memory.
    staged: Option<usize>,
    ids: bool,
}

/// A graph that runs over one part of the batch at a time.
#[derive(Debug)]
pub(crate) struct Tower<B: Backend> {
    pub executor: Executor<B>,
    ports: Vec<Port>,
}

impl<B: Backend> Tower<B> {
    /// A tower that reads images of `view`; `targets` are the names of targets in their order.
    pub(crate) fn new(executor: Executor<B>, view: usize, targets: &[&str]) -> Self {
        let graph = executor.graph();
        let mut ports = Vec::new();
        let mut port = |name: &str, value, ids| {
            if let Some(tensor) = graph.input(name) {
                ports.push(Port { tensor, value, staged: None, ids });
            }
        };
        port(IMAGES, Value::View(view), false);
        port(IDS, Value::Ids, true);
        port(EOT, Value::Eot, true);
        port(FEATURES, Value::Features, false);
        for (i, input) in graph.stochastic().iter().enumerate() {
            port(&input.name, Value::Mask(i), false);
        }
        for (i, name) in targets.iter().enumerate() {
            port(name, Value::Target(i), false);
        }
        Tower { executor, ports }
    }

    pub(crate) fn graph(&self) -> &StepGraph {
        self.executor.graph()
    }

    /// Runs over part `part` of the batch.
    pub(crate) fn forward(
        &mut self,
        inputs: &Inputs<B>,
        part: usize,
        store: &ParamStore<B::Buffer>,
        watch: Watch<'_>,
    ) -> Result<(), ExecError> {
        for port in &self.ports {
            let Some(staged) = port.staged.map(|s| &inputs.staged[s]) else { continue };
            if port.ids {
                self.executor.set_ids(&port.tensor, staged.ids[part].clone());
            } else {
                self.executor.write(&port.tensor, staged.part(part), 0);
            }
        }
        self.executor.walk(store, watch)
    }
}

impl<B: Backend> Staged<B> {
    fn part(&self, part: usize) -> Part<'_, B> {
        Part { buffer: &self.buffer, dtype: self.dtype, start: part * self.stride, len: self.len }
    }
}

impl<B: Backend> Inputs<B> {
    /// Makes room for what `towers` read that can't be uploaded straight into their memory: ids, what several of them or
    /// several parts read, and what is narrower there than on the host.
    pub(crate) fn new(mut backend: B, parts: usize, towers: &mut [&mut Tower<B>]) -> Result<Self, TrainError> {
        let mut staged: Vec<Staged<B>> = Vec::new();
        let readers: Vec<Value> = towers.iter().flat_map(|t| t.ports.iter().map(|p| p.value)).collect();
        for tower in towers {
            for port in &mut tower.ports {
                let dtype = tower.executor.dtype(&port.tensor);
                let target = matches!(port.value, Value::Target(_));
                let shared = readers.iter().filter(|v| **v == port.value).count() > 1;
                // A single part's target is copied straight from teacher to tower.
                if parts == 1 && !port.ids && (target || (!shared && dtype == Dtype::F32)) {
                    continue;
                }
                let found = staged.iter().position(|s| s.value == port.value);
                port.staged = Some(found.unwrap_or(staged.len()));
                if found.is_some() {
                    continue;
                }
                let len = port.tensor.numel();
                let stride = len.next_multiple_of(ALIGN);
                let dtype = if target { dtype } else { Dtype::F32 };
                let bytes = if port.ids { 0 } else { parts * stride * dtype.bytes() };
                let buffer = backend.allocate(&[bytes]).map_err(ExecError::from)?.pop().unwrap_or_default();
                let ids = if port.ids { vec![B::Ints::default(); parts] } else { Vec::new() };
                staged.push(Staged { value: port.value, buffer, dtype, len, stride, ids });
            }
        }
        Ok(Inputs { backend, parts, staged })
    }

    /// Copies a batch's values to the backend's memory.
    pub(crate) fn upload(&mut self, host: Host<'_>, towers: &mut [&mut Tower<B>]) -> Result<(), TrainError> {
        fn slice<T>(all: &[T], part: usize, parts: usize) -> &[T] {
            let len = all.len() / parts;
            &all[part * len..][..len]
        }
        for tower in towers {
            for port in &tower.ports {
                if port.ids {
                    for part in 0..self.parts {
                        tower.executor.check_ids(&port.tensor, slice(host.ids(port.value), part, self.parts))?;
                    }
                } else if port.staged.is_none() && !matches!(port.value, Value::Target(_)) {
                    tower.executor.upload(&port.tensor, host.floats(port.value))?;
                }
            }
        }
        for staged in &mut self.staged {
            if matches!(staged.value, Value::Target(_)) {
                continue;
            }
            for (part, ids) in staged.ids.iter_mut().enumerate() {
                self.backend.upload_ints(slice(host.ids(staged.value), part, self.parts), ids);
            }
            if !staged.ids.is_empty() {
                continue;
            }
            let values = host.floats(staged.value);
            if values.len() != staged.len * self.parts {
                let name = format!("{:?}", staged.value);
                let (wanted, got) = (staged.len * self.parts, values.len().to_string());
                return Err(ExecError::Feed { name, wanted, kind: "f32", got }.into());
            }
            if staged.stride == staged.len {
                self.backend.upload(values, staged.dtype, &mut staged.buffer);
            } else {
                let mut padded = vec![0.0; staged.stride * self.parts];
                for part in 0..self.parts {
                    let to = &mut padded[part * staged.stride..][..staged.len];
                    to.copy_from_slice(slice(values, part, self.parts));
                }
                self.backend.upload(&padded, staged.dtype, &mut staged.buffer);
            }
        }
        Ok(())
    }

    /// Keeps a target that a teacher computed for part `part`: among what is staged, or in `tower` itself.
    pub(crate) fn keep_target(&mut self, target: usize, part: usize, from: Part<'_, B>, tower: &mut Tower<B>) {
        let Some(port) = tower.ports.iter().find(|p| p.value == Value::Target(target)) else { return };
        match port.staged.map(|s| &mut self.staged[s]) {
            Some(s) => self.backend.copy(from, &mut s.buffer, s.dtype, part * s.stride, false),
            None => tower.executor.write(&port.tensor, from, 0),
        }
    }
}
