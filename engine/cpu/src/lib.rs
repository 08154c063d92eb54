//! mcpipe's CPU kernels and the bridge to dfdx: forward and VJP of each op on plain slices

pub mod activation;
pub mod alloc;
pub mod attention;
pub mod attention_pool;
pub mod bridge;
mod columns;
pub mod conv;
mod depthwise;
pub mod elementwise;
pub mod embedding;
pub mod gemm;
pub mod layout;
pub mod linear;
pub mod loss;
pub mod norm;
pub mod optim;
mod parallel;
pub mod pooling;
mod reduce;
pub mod reference;
pub mod relational;
pub mod resize;
pub mod separable;
pub mod sigmoid_loss;
pub mod simd;
mod small_gemm;
pub mod softmax;
#[cfg(test)]
mod testing;
pub mod token_conv;
mod vmath;
pub mod workspace;

pub use conv::{Conv2d, conv2d_backward_data, conv2d_backward_weights, conv2d_forward, conv2d_fused_forward};
pub use gemm::{Epilogue, Gemm, Mat, batched_gemm, gemm, gemm_serial};
pub use linear::{Linear, linear_backward_data, linear_backward_weights, linear_forward, linear_fused_forward};
pub use simd::Level;
pub use workspace::{Precision, Workspace};
