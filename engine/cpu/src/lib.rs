//! mcpipe's CPU kernels and the bridge to dfdx: forward and VJP of each op on plain slices

pub mod simd;
pub mod workspace;

pub use simd::Level;
pub use workspace::Workspace;
