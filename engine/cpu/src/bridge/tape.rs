//! Arguments as dfdx tensors, and the pullback made from dfdx's tape.

use std::ops::DerefMut;

use dfdx::prelude::*;
use dfdx::tensor::Tape as _;

use super::{BridgeError, Run};

/// A real number that the formulations run in: `f32`, or `f64` for oracles.
pub trait Real: Dtype {
    /// dfdx's device; always its CPU. (As an associated type, its operations come along as implied bounds.)
    type Device: Device<Self, Err = CpuError>
        + Storage<Self, Vec: DerefMut<Target = Vec<Self>>>
        + Storage<bool>
        + TensorFromVec<bool>
        + ZerosTensor<Self>
        + Default;

    /// The nearest number of this type.
    fn of_f64(x: f64) -> Self;
    /// The same number, or the nearest.
    fn into_f64(self) -> f64;
}

impl Real for f32 {
    type Device = Cpu;
    fn of_f64(x: f64) -> Self {
        x as f32
    }
    fn into_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Real for f64 {
    type Device = Cpu;
    fn of_f64(x: f64) -> Self {
        x
    }
    fn into_f64(self) -> f64 {
        self
    }
}

/// The VJP of one run: the value's gradient in, the arguments' gradients out.
pub type Pullback<E> = Box<dyn FnOnce(&[E]) -> Vec<Vec<E>>>;

/// A tensor on the tape.
pub(super) type Var<S, E> = Tensor<S, E, <E as Real>::Device, OwnedTape<E, <E as Real>::Device>>;
/// A tensor off the tape.
pub(super) type Const<S, E> = Tensor<S, E, <E as Real>::Device>;
pub(super) type Flat<E> = Var<(usize,), E>;

/// The device and the arguments, as flat leaves.
pub(super) struct Tape<E: Real> {
    dev: E::Device,
    leaves: Vec<Const<(usize,), E>>,
}

impl<E: Real> Tape<E> {
    pub(super) fn new(inputs: &[&[E]]) -> Result<Self, BridgeError> {
        let dev = E::Device::default();
        let leaves = inputs
            .iter()
            .map(|x| dev.try_tensor_from_vec(x.to_vec(), (x.len(),)).map_err(|_| BridgeError::Allocation))
            .collect::<Result<_, _>>()?;
        Ok(Tape { dev, leaves })
    }

    /// How many arguments there are.
    pub(super) fn arguments(&self) -> usize {
        self.leaves.len()
    }

    /// Argument i, traced, flat.
    pub(super) fn flat(&self, i: usize) -> Flat<E> {
        self.leaves[i].leaky_trace()
    }

    /// Argument i, traced, in a shape of as many elements.
    pub(super) fn arg<S: Shape>(&self, i: usize, shape: S) -> Var<S, E> {
        self.flat(i).reshape_like(&shape)
    }

    /// Argument i without a gradient.
    pub(super) fn constant<S: Shape>(&self, i: usize, shape: S) -> Const<S, E> {
        self.leaves[i].clone().reshape_like(&shape)
    }

    /// A tensor of given values, without a gradient.
    pub(super) fn values<S: Shape>(&self, values: Vec<E>, shape: S) -> Const<S, E> {
        self.dev.tensor_from_vec(values, shape)
    }

    /// A tensor of one value throughout, without a gradient.
    pub(super) fn filled<S: Shape>(&self, value: f64, shape: S) -> Const<S, E> {
        self.values(vec![E::of_f64(value); shape.num_elements()], shape)
    }

    /// Row or element indices.
    pub(super) fn indices(&self, index: Vec<usize>) -> Tensor<(usize,), usize, E::Device> {
        let len = index.len();
        self.dev.tensor_from_vec(index, (len,))
    }

    /// An index by itself.
    pub(super) fn index(&self, index: usize) -> Tensor<(), usize, E::Device> {
        self.dev.tensor_from_vec(vec![index], ())
    }

    /// The value as a vector, and the pullback if asked for.
    pub(super) fn finish(self, value: Flat<E>, saved: Vec<Vec<E>>, constants: &[usize], keep: bool) -> Run<E> {
        let out = value.as_vec();
        if !keep {
            return Run { value: out, saved, pullback: None };
        }
        let (value, mut tape) = value.split_tape();
        let root: Const<(), E> = self.filled(0.0, ());
        let Tape { leaves, .. } = self;
        let constants = constants.to_vec();
        let pullback = move |gradient: &[E]| {
            let gradient = gradient.to_vec();
            // `backward` starts from a scalar; this op, run first, sets the value's gradient in its place.
            tape.add_backward_op(move |grads| {
                let into: &mut Vec<E> = grads.get_or_alloc_mut(&value)?;
                for (into, g) in into.iter_mut().zip(gradient) {
                    *into = g;
                }
                Ok(())
            });
            let mut grads = root.put_tape(tape).backward();
            leaves
                .iter()
                .enumerate()
                .map(|(i, leaf)| {
                    if constants.contains(&i) {
                        return Vec::new();
                    }
                    match grads.get_or_alloc_mut(leaf) {
                        Ok(found) => found.to_vec(),
                        Err(_) => vec![E::of_f64(f64::NAN); leaf.shape().0],
                    }
                })
                .collect()
        };
        Run { value: out, saved, pullback: Some(Box::new(pullback)) }
    }
}

/// A flat view of a tensor, contiguous.
pub(super) fn flatten<S: Shape, E: Real>(x: Var<S, E>) -> Flat<E> {
    let len = x.shape().num_elements();
    x.reshape_like(&(len,))
}
