//! Structural reparameterisation (Ding et al. 2021, arXiv:2101.03697, §3.3): branches that are linear in evaluation
//! (convolutions, batch norms with running statistics, skip connections, layer scales) summed into one convolution. All
//! arithmetic is in `f64`.

use mcpipe_graph::{Param, ParamKind, ParamStore, Path};

use crate::backbone::Backbone;
use crate::error::ModelError;

/// A backbone in its inference form.
#[derive(Debug)]
pub struct Folded {
    /// The backbone.
    pub backbone: Box<dyn Backbone>,
    /// Its parameters, and whatever else the store held.
    pub store: ParamStore,
}

/// A convolution with bias: stride and padding are its user's.
#[derive(Clone, Debug, PartialEq)]
pub struct Kernel {
    /// `[out, in/groups, side, side]`.
    shape: [usize; 4],
    weight: Vec<f64>,
    bias: Vec<f64>,
}

fn values(store: &ParamStore, path: &Path) -> Result<Vec<f64>, ModelError> {
    let param = store.get(path.as_str()).ok_or_else(|| ModelError::Missing(path.to_string()))?;
    Ok(param.data.iter().map(|&v| f64::from(v)).collect())
}

impl Kernel {
    /// The convolution whose `{path}.weight` is `[out, in/groups, side, side]`, with its `{path}.bias` where there is one.
    ///
    /// # Errors
    /// No such weight, or not of a square convolution.
    pub fn read(store: &ParamStore, path: &Path) -> Result<Self, ModelError> {
        let name = path.at("weight");
        let param = store.get(name.as_str()).ok_or_else(|| ModelError::Missing(name.to_string()))?;
        let shape = match param.shape[..] {
            [out, c, h, w] if h == w => [out, c, h, w],
            _ => return Err(ModelError::Dims(format!("`{name}` of shape {:?} is no square kernel", param.shape))),
        };
        let bias = match store.get(path.at("bias").as_str()) {
            Some(bias) if bias.data.len() == shape[0] => values(store, &path.at("bias"))?,
            Some(bias) => return Err(ModelError::Dims(format!("`{path}` has {} biases", bias.data.len()))),
            None => vec![0.0; shape[0]],
        };
        Ok(Kernel { shape, weight: values(store, &name)?, bias })
    }

    /// The identity as a convolution in groups.
    ///
    /// # Errors
    /// Groups that don't divide the channels, or an even side, which has no centre.
    pub fn identity(channels: usize, groups: usize, side: usize) -> Result<Self, ModelError> {
        if groups == 0 || !channels.is_multiple_of(groups) || side.is_multiple_of(2) {
            let message = format!("no identity of {channels} channels in {groups} groups is {side}x{side}");
            return Err(ModelError::Dims(message));
        }
        let c_in = channels / groups;
        let mut weight = vec![0.0; channels * c_in * side * side];
        for out in 0..channels {
            weight[((out * c_in + out % c_in) * side + side / 2) * side + side / 2] = 1.0;
        }
        Ok(Kernel { shape: [channels, c_in, side, side], weight, bias: vec![0.0; channels] })
    }

    /// This, with the batch norm at `path` behind, as it is in evaluation.
    ///
    /// # Errors
    /// The norm is not in the store, or has other channels.
    pub fn normed(self, store: &ParamStore, path: &Path, eps: f64) -> Result<Self, ModelError> {
        let read = |name: &str| values(store, &path.at(name));
        let (gamma, beta, mean, var) = (read("weight")?, read("bias")?, read("running_mean")?, read("running_var")?);
        if [&gamma, &beta, &mean, &var].iter().any(|v| v.len() != self.bias.len()) {
            return Err(ModelError::Dims(format!("the norm `{path}` does not follow {} channels", self.bias.len())));
        }
        let factors: Vec<f64> = gamma.iter().zip(&var).map(|(g, v)| g / (v + eps).sqrt()).collect();
        let shift = factors.iter().zip(&beta).zip(&mean).map(|((f, b), m)| b - m * f);
        let shift: Vec<f64> = shift.collect();
        let mut scaled = self.scaled(&factors)?;
        scaled.bias.iter_mut().zip(shift).for_each(|(b, s)| *b += s);
        Ok(scaled)
    }

    /// Each output channel times its factor.
    ///
    /// # Errors
    /// Another number of factors than of channels.
    pub fn scaled(mut self, factors: &[f64]) -> Result<Self, ModelError> {
        if factors.len() != self.bias.len() {
            return Err(ModelError::Dims(format!("{} factors for {} channels", factors.len(), self.bias.len())));
        }
        let size = self.weight.len() / self.bias.len().max(1);
        for (row, factor) in self.weight.chunks_exact_mut(size.max(1)).zip(factors) {
            row.iter_mut().for_each(|w| *w *= factor);
        }
        self.bias.iter_mut().zip(factors).for_each(|(b, f)| *b *= f);
        Ok(self)
    }

    /// The same map as a larger kernel, zeros around.
    ///
    /// # Errors
    /// A side that is smaller, or of other parity.
    pub fn padded(self, side: usize) -> Result<Self, ModelError> {
        let [out, c, h, _] = self.shape;
        if side < h || !(side - h).is_multiple_of(2) {
            return Err(ModelError::Dims(format!("a {h}x{h} kernel is no {side}x{side} one")));
        }
        let border = (side - h) / 2;
        let mut weight = vec![0.0; out * c * side * side];
        for (i, row) in self.weight.chunks_exact(h.max(1)).enumerate() {
            let at = (i / h * side + i % h + border) * side + border;
            weight[at..at + h].copy_from_slice(row);
        }
        Ok(Kernel { shape: [out, c, side, side], weight, bias: self.bias })
    }

    /// The sum of two branches.
    ///
    /// # Errors
    /// Kernels of different shapes.
    pub fn plus(mut self, other: &Kernel) -> Result<Self, ModelError> {
        if self.shape != other.shape {
            return Err(ModelError::Dims(format!("kernels {:?} and {:?} don't add", self.shape, other.shape)));
        }
        self.weight.iter_mut().zip(&other.weight).for_each(|(a, b)| *a += b);
        self.bias.iter_mut().zip(&other.bias).for_each(|(a, b)| *a += b);
        Ok(self)
    }

    /// The difference of two branches.
    ///
    /// # Errors
    /// As [`plus`](Self::plus).
    pub fn minus(self, other: &Kernel) -> Result<Self, ModelError> {
        let negative = vec![-1.0; other.bias.len()];
        self.plus(&other.clone().scaled(&negative)?)
    }
}

/// A store whose blocks are replaced one by one.
#[derive(Debug)]
pub struct Folding<'a> {
    /// The store of the training form.
    pub store: &'a ParamStore,
    dropped: Vec<String>,
    added: Vec<(Path, Kernel)>,
}

impl<'a> Folding<'a> {
    /// Nothing replaced yet.
    pub fn new(store: &'a ParamStore) -> Self {
        Folding { store, dropped: Vec::new(), added: Vec::new() }
    }

    /// Parameters of a store's vector, as `{path}`.
    ///
    /// # Errors
    /// No such parameter.
    pub fn vector(&self, path: &Path) -> Result<Vec<f64>, ModelError> {
        values(self.store, path)
    }

    /// Puts `kernel` at `{path}.reparam_conv` in place of the `branches` under `path`.
    pub fn replace(&mut self, path: &Path, branches: &[&str], kernel: Kernel) {
        self.dropped.extend(branches.iter().map(|branch| format!("{}.", path.at(branch))));
        self.added.push((path.at("reparam_conv"), kernel));
    }

    /// The folded store: what was not replaced, then the kernels.
    pub fn finish(self) -> ParamStore {
        let mut folded = ParamStore::default();
        for p in self.store.params() {
            if !self.dropped.iter().any(|d| p.name.starts_with(d.as_str())) {
                folded.insert(p.clone());
            }
        }
        let single = |values: Vec<f64>| values.into_iter().map(|v| v as f32).collect();
        for (path, kernel) in self.added {
            folded.insert(Param {
                name: path.at("weight").to_string(),
                shape: kernel.shape.to_vec(),
                kind: ParamKind::Decay,
                data: single(kernel.weight),
            });
            folded.insert(Param {
                name: path.at("bias").to_string(),
                shape: vec![kernel.shape[0]],
                kind: ParamKind::NoDecay,
                data: single(kernel.bias),
            });
        }
        folded
    }
}
