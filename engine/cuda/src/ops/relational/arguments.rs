//! The structs that the relational loss's kernels take by value.

use mcpipe_cpu::relational::MOST_TEACHERS;

use crate::driver::TensorMap;
use crate::launch::Argument;
use crate::view::Address;

/// Pairs of embeddings that `relational_sm90a.cu` takes at a time.
pub(super) const MAPPED: usize = 5;

#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Operand {
    pub(super) data: Address,
    pub(super) ld: i64,
}

pub(super) const SETS: usize = 1 + MOST_TEACHERS;

/// `Operands` of `kernels/relational.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Operands {
    pub(super) left: [Operand; SETS],
    pub(super) right: [Operand; SETS],
    pub(super) dim: [i32; SETS],
}
// SAFETY: repr(C), and mirrors the C++ struct.
unsafe impl Argument for Operands {}

/// `Maps` of `kernels/relational_sm90a.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Maps {
    pub(super) left: [TensorMap; MAPPED],
    pub(super) right: [TensorMap; MAPPED],
    pub(super) dim: [i32; 16],
}
// SAFETY: as above.
unsafe impl Argument for Maps {}

/// `Targets` of `kernels/relational.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Targets {
    pub(super) own: Address,
    pub(super) other: Address,
    pub(super) keep: Address,
    pub(super) group: Address,
    pub(super) share: Address,
    pub(super) column_total: Address,
    pub(super) spans: Address,
}
// SAFETY: as above.
unsafe impl Argument for Targets {}

/// `Problem` there.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Problem {
    pub(super) rows: i32,
    pub(super) first_row: i32,
    pub(super) cols: i32,
    pub(super) teachers: i32,
    pub(super) all_teachers: i32,
    pub(super) row_stride: i32,
    pub(super) col_stride: i32,
}
// SAFETY: as above.
unsafe impl Argument for Problem {}
