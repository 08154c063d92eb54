//! Tests of the ops: kernels, dfdx formulations, and known values.

mod harness;
mod table;
mod values;
mod vjp;
