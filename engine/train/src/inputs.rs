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
    /// None where the images are written by other means ([`Inputs::image_places`]).
    pub views: Option<&'a [Vec<f32>]>,
    pub ids: &'a [i32],
    pub eot: &'a [i32],
    pub features: &'a [f32],
    pub masks: &'a [Vec<f32>],
}

impl<'a> Host<'a> {
    fn brings(&self, value: Value) -> bool {
        match value {
            Value::View(_) => self.views.is_some(),
            Value::Target(_) => false,
            _ => true,
        }
    }

    fn floats(&self, value: Value) -> &'a [f32] {
        match value {
            Value::View(v) => self.views.map_or(&[], |views| &views[v]),
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
    /// None for images before the first come.
    buffer: Option<B::Buffer>,
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
    /// Whether this batch's images were written into the towers' own memory.
    images_in_towers: bool,
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
            if inputs.images_in_towers && matches!(port.value, Value::View(_)) {
                continue;
            }
            if port.ids {
                self.executor.set_ids(&port.tensor, staged.ids[part].clone());
            } else if let Some(from) = staged.part(part) {
                self.executor.write(&port.tensor, from, 0);
            }
        }
        self.executor.walk(store, watch)
    }
}

impl<B: Backend> Staged<B> {
    fn part(&self, part: usize) -> Option<Part<'_, B>> {
        let (start, len) = (part * self.stride, self.len);
        self.buffer.as_ref().map(|buffer| Part { buffer, dtype: self.dtype, start, len })
    }

    /// The memory, made where there is none yet.
    fn room(&mut self, backend: &mut B, parts: usize) -> Result<&mut B::Buffer, ExecError> {
        if self.buffer.is_none() {
            let bytes = parts * self.stride * self.dtype.bytes();
            self.buffer = backend.allocate(&[bytes])?.pop();
        }
        Ok(self.buffer.get_or_insert_with(B::Buffer::default))
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
                let ids = if port.ids { vec![B::Ints::default(); parts] } else { Vec::new() };
                let mut new = Staged { value: port.value, buffer: None, dtype, len, stride, ids };
                // Images may come as bytes, and need no room here then.
                if !port.ids && !matches!(port.value, Value::View(_)) {
                    new.room(&mut backend, parts)?;
                }
                staged.push(new);
            }
        }
        Ok(Inputs { backend, parts, staged, images_in_towers: false })
    }

    /// Whether images have places without gaps between the parts.
    pub(crate) fn has_image_places(&self) -> bool {
        let gaps = |s: &Staged<B>| matches!(s.value, Value::View(_)) && s.stride != s.len;
        self.parts == 1 || !self.staged.iter().any(gaps)
    }

    /// Whether this batch's images were written into the towers' own memory, which changes what the walks do.
    pub(crate) fn images_in_towers(&self) -> bool {
        self.images_in_towers
    }

    /// Where the images of each view go that are not uploaded as values: the whole batch in each place.
    pub(crate) fn image_places<'a>(
        &'a mut self,
        towers: &[&'a Tower<B>],
    ) -> Result<Vec<(usize, Part<'a, B>)>, ExecError> {
        let mut places = Vec::new();
        if self.parts == 1 {
            for tower in towers {
                for port in &tower.ports {
                    if let Value::View(view) = port.value {
                        places.push((view, tower.executor.part(&port.tensor)));
                    }
                }
            }
            return Ok(places);
        }
        let (backend, parts) = (&mut self.backend, self.parts);
        for staged in &mut self.staged {
            if let Value::View(view) = staged.value {
                let (dtype, len) = (staged.dtype, staged.len * parts);
                places.push((view, Part { buffer: staged.room(backend, parts)?, dtype, start: 0, len }));
            }
        }
        Ok(places)
    }

    /// Copies a batch's values to the backend's memory.
    pub(crate) fn upload(&mut self, host: Host<'_>, towers: &mut [&mut Tower<B>]) -> Result<(), TrainError> {
        fn slice<T>(all: &[T], part: usize, parts: usize) -> &[T] {
            let len = all.len() / parts;
            &all[part * len..][..len]
        }
        self.images_in_towers = self.parts == 1 && host.views.is_none();
        for tower in towers {
            for port in &tower.ports {
                if port.ids {
                    for part in 0..self.parts {
                        tower.executor.check_ids(&port.tensor, slice(host.ids(port.value), part, self.parts))?;
                    }
                } else if port.staged.is_none() && host.brings(port.value) {
                    tower.executor.upload(&port.tensor, host.floats(port.value))?;
                }
            }
        }
        for staged in &mut self.staged {
            if !host.brings(staged.value) {
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
            let (dtype, len, stride) = (staged.dtype, staged.len, staged.stride);
            let room = staged.room(&mut self.backend, self.parts)?;
            if stride == len {
                self.backend.upload(values, dtype, room);
            } else {
                let mut padded = vec![0.0; stride * self.parts];
                for part in 0..self.parts {
                    padded[part * stride..][..len].copy_from_slice(slice(values, part, self.parts));
                }
                self.backend.upload(&padded, dtype, room);
            }
        }
        Ok(())
    }

    /// Keeps a target that a teacher computed for part `part`: among what is staged, or in `tower` itself.
    pub(crate) fn keep_target(&mut self, target: usize, part: usize, from: Part<'_, B>, tower: &mut Tower<B>) {
        let Some(port) = tower.ports.iter().find(|p| p.value == Value::Target(target)) else { return };
        match port.staged.map(|s| &mut self.staged[s]) {
            Some(s) => {
                if let Some(buffer) = &mut s.buffer {
                    self.backend.copy(from, buffer, s.dtype, part * s.stride, false);
                }
            }
            None => tower.executor.write(&port.tensor, from, 0),
        }
    }
}
