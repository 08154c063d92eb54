//! The reference formulations of ops: dfdx where it can express them, plain loops where it can't.

use super::cpu::Cpu;
use super::{Arg, GradOut};
use crate::op::Op;

/// The backward half of a dfdx node.
pub(super) type Pullback = Box<dyn FnOnce(&[f32]) -> Vec<Vec<f32>>>;

pub(super) fn has(_op: &Op) -> bool {
    false
}

pub(super) fn forward(
    _op: &Op,
    _ins: &[Arg<'_, Cpu>],
    _keep: bool,
) -> Result<(Vec<f32>, Vec<Vec<f32>>, Option<Pullback>), String> {
    Err("no dfdx formulation".into())
}

pub(super) fn forward_plain(_op: &Op, _ins: &[Arg<'_, Cpu>], _y: &mut [f32]) -> bool {
    false
}

pub(super) fn vjp_plain(_op: &Op, _ins: &[Arg<'_, Cpu>], _dy: &[f32], _grads: &mut [Option<GradOut<'_, Cpu>>]) -> bool {
    false
}
