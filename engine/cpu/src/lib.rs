//! mcpipe's CPU kernels and the bridge to dfdx: forward and VJP of each op on plain slices

pub mod gemm;
pub mod linear;
mod parallel;
mod reduce;
pub mod simd;
#[cfg(test)]
mod testing;
pub mod workspace;

pub use gemm::{Gemm, Mat, batched_gemm, gemm, gemm_serial};
pub use linear::{Linear, linear_backward_data, linear_backward_weights, linear_forward};
pub use simd::Level;
pub use workspace::Workspace;
