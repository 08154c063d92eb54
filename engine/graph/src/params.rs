//! Parameters and their gradients, by name. One store serves several graphs of a model (training, evaluation).

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::graph::{GraphError, StepGraph};

/// What a parameter is to the optimiser.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ParamKind {
    /// Trained, with weight decay (matrices and convolution kernels).
    Decay,
    /// Trained, without weight decay (norms, biases, logit scale: everything with fewer than two dimensions).
    NoDecay,
    /// Not trained by gradient (batch norm's running statistics).
    Buffer,
}

/// One named tensor.
#[derive(Clone, Debug)]
pub struct Param<Buf = Vec<f32>> {
    /// Name in the published checkpoints (timm, open_clip).
    pub name: String,
    /// Shape in the published layout.
    pub shape: Vec<usize>,
    /// What the optimiser does with it.
    pub kind: ParamKind,
    /// Values, row-major.
    pub data: Buf,
}

/// The parameters of one or more models, in a fixed order.
#[derive(Clone, Debug)]
pub struct ParamStore<Buf = Vec<f32>> {
    params: Vec<Param<Buf>>,
    by_name: HashMap<String, usize>,
    version: u64,
}

/// A number that no store has had yet.
fn fresh_version() -> u64 {
    static NEXT: AtomicU64 = AtomicU64::new(1);
    NEXT.fetch_add(1, Ordering::Relaxed)
}

impl<Buf> Default for ParamStore<Buf> {
    fn default() -> Self {
        ParamStore { params: Vec::new(), by_name: HashMap::new(), version: fresh_version() }
    }
}

impl<Buf> ParamStore<Buf> {
    /// Changes whenever the store may have been written to. Two stores of one version hold the same values.
    pub fn version(&self) -> u64 {
        self.version
    }

    /// Position of the parameter called `name`.
    pub fn index(&self, name: &str) -> Option<usize> {
        self.by_name.get(name).copied()
    }

    /// The parameter called `name`.
    pub fn get(&self, name: &str) -> Option<&Param<Buf>> {
        self.index(name).map(|i| &self.params[i])
    }

    /// The parameter called `name`, to be changed.
    pub fn get_mut(&mut self, name: &str) -> Option<&mut Param<Buf>> {
        self.version = fresh_version();
        self.index(name).map(|i| &mut self.params[i])
    }

    /// All parameters in store order.
    pub fn params(&self) -> &[Param<Buf>] {
        &self.params
    }

    /// All parameters in store order, to be changed.
    pub fn params_mut(&mut self) -> &mut [Param<Buf>] {
        self.version = fresh_version();
        &mut self.params
    }

    /// Adds a parameter, or replaces the one of the same name.
    pub fn insert(&mut self, param: Param<Buf>) {
        self.version = fresh_version();
        match self.by_name.get(&param.name) {
            Some(&i) => self.params[i] = param,
            None => {
                self.by_name.insert(param.name.clone(), self.params.len());
                self.params.push(param);
            }
        }
    }
}

impl ParamStore {
    /// Adds `graph`'s parameters that the store lacks, initialised from `seed`.
    ///
    /// # Errors
    /// A parameter that the store holds with another shape.
    pub fn init(&mut self, graph: &StepGraph, seed: u64) -> Result<(), GraphError> {
        for spec in graph.params() {
            match self.get(&spec.name) {
                Some(held) if held.shape != spec.shape => {
                    return Err(GraphError::ParamShape {
                        name: spec.name.clone(),
                        held: held.shape.clone(),
                        wanted: spec.shape.clone(),
                    });
                }
                Some(_) => {}
                None => self.insert(Param {
                    name: spec.name.clone(),
                    shape: spec.shape.clone(),
                    kind: spec.kind,
                    data: spec.init.sample(seed, &spec.name, &spec.shape),
                }),
            }
        }
        Ok(())
    }

    /// A copy of those parameters that `graph` reads.
    ///
    /// # Errors
    /// A parameter that the store lacks.
    pub fn subset(&self, graph: &StepGraph) -> Result<ParamStore, GraphError> {
        let mut own = ParamStore::default();
        for spec in graph.params() {
            own.insert(self.get(&spec.name).ok_or_else(|| GraphError::NoParam(spec.name.clone()))?.clone());
        }
        Ok(own)
    }

    /// Number of trained values (buffers excluded).
    pub fn trained_len(&self) -> usize {
        self.params.iter().filter(|p| p.kind != ParamKind::Buffer).map(|p| p.data.len()).sum()
    }
}

/// Gradients beside a [`ParamStore`], in its order; empty for buffers.
#[derive(Clone, Debug, Default)]
pub struct Grads<Buf = Vec<f32>> {
    pub(crate) data: Vec<Buf>,
}

impl<Buf> Grads<Buf> {
    /// Gradients in `data`, one buffer for each parameter of a store; those of buffers are never touched.
    pub fn from_buffers(data: Vec<Buf>) -> Self {
        Grads { data }
    }

    /// Gradients in the store's order.
    pub fn all(&self) -> &[Buf] {
        &self.data
    }
}

impl Grads {
    /// Zero gradients for every trained parameter of `store`.
    pub fn zeros_like(store: &ParamStore) -> Self {
        let len = |p: &Param| if p.kind == ParamKind::Buffer { 0 } else { p.data.len() };
        Grads { data: store.params.iter().map(|p| vec![0.0; len(p)]).collect() }
    }

    /// Sets all gradients to zero, keeping the memory.
    pub fn zero(&mut self) {
        self.data.iter_mut().for_each(|g| g.fill(0.0));
    }

    /// Gradients in the store's order, to be changed (clipping, scaling).
    pub fn all_mut(&mut self) -> &mut [Vec<f32>] {
        &mut self.data
    }
}
