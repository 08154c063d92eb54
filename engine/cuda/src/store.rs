//! Parameters and gradients in device memory.

use mcpipe_graph::{Grads, Param, ParamKind, ParamStore};

use crate::backend::Buffer;
use crate::device::Device;
use crate::error::CudaError;
use crate::view::{Element, View};

/// Bytes that parameters start at multiples of.
const ALIGN: usize = 256;

/// A store's parameters, or their gradients, one after another in one piece of device memory, as f32.
#[derive(Debug)]
pub struct Parameters {
    /// The parameters by name, in the order of the store that they came from.
    pub store: ParamStore<Buffer>,
    all: Buffer,
}

fn layout(store: &ParamStore) -> (Vec<usize>, usize) {
    let mut total = 0;
    let start = |p: &Param| {
        let at = total;
        total += (p.data.len() * size_of::<f32>()).next_multiple_of(ALIGN);
        at
    };
    (store.params().iter().map(start).collect(), total)
}

impl Parameters {
    /// A copy of `from` on `device`.
    ///
    /// # Errors
    /// The device's memory does not suffice.
    pub fn upload(device: &Device, from: &ParamStore) -> Result<Self, CudaError> {
        let (starts, total) = layout(from);
        let all = Buffer::new(device.alloc(total)?);
        let mut store = ParamStore::default();
        for (p, start) in from.params().iter().zip(starts) {
            let data = all.slice(start, p.data.len() * size_of::<f32>());
            store.insert(Param { name: p.name.clone(), shape: p.shape.clone(), kind: p.kind, data });
        }
        let new = Parameters { store, all };
        new.update(device, from)?;
        Ok(new)
    }

    /// Overwrites the values by those of `from`, a store of the same parameters in the same order.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn update(&self, device: &Device, from: &ParamStore) -> Result<(), CudaError> {
        let (starts, total) = layout(from);
        let mut values = vec![0.0f32; total / size_of::<f32>()];
        for (p, start) in from.params().iter().zip(starts) {
            values[start / size_of::<f32>()..][..p.data.len()].copy_from_slice(&p.data);
        }
        device.upload(&values, self.all())?;
        device.weights_changed(self.all());
        Ok(())
    }

    /// Copies the values back into `to`, the store that they came from.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn download(&self, device: &Device, to: &mut ParamStore) -> Result<(), CudaError> {
        let values = device.download(self.all())?;
        let (starts, _) = layout(to);
        for (p, start) in to.params_mut().iter_mut().zip(starts) {
            let len = p.data.len();
            p.data.copy_from_slice(&values[start / size_of::<f32>()..][..len]);
        }
        Ok(())
    }

    /// All of them with the gaps between.
    pub fn all(&self) -> View {
        self.all.view(self.all.bytes() / size_of::<f32>(), Element::F32)
    }
}

/// Gradients beside a store, in its order; empty for buffers (running statistics). Clones share the memory.
#[derive(Clone, Debug)]
pub struct Gradients {
    /// The gradients.
    pub grads: Grads<Buffer>,
    all: Buffer,
}

impl Gradients {
    /// Zero gradients for every trained parameter of `store`.
    ///
    /// # Errors
    /// The device's memory does not suffice.
    pub fn zeros_like(device: &Device, store: &ParamStore) -> Result<Self, CudaError> {
        let (starts, total) = layout(store);
        let all = Buffer::new(device.alloc(total)?);
        let slice = |(p, start): (&Param, usize)| {
            let len = if p.kind == ParamKind::Buffer { 0 } else { p.data.len() };
            all.slice(start, len * size_of::<f32>())
        };
        let grads = Grads::from_buffers(store.params().iter().zip(starts).map(slice).collect());
        let new = Gradients { grads, all };
        new.zero(device)?;
        Ok(new)
    }

    /// Sets all of them to zero.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn zero(&self, device: &Device) -> Result<(), CudaError> {
        device.fill(self.all.view(self.all.bytes(), Element::U8), 0)
    }
}
