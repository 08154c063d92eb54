//! The CUDA backend: the step graph's ops on an NVIDIA GPU.
//!
//! Libraries (driver, NVRTC, cuBLASLt, cuDNN) are loaded at run time through cudarc, so the program builds without a CUDA
//! toolkit and runs without a GPU. The kernels are the `.cu` files of `kernels/`, embedded in the binary and compiled by
//! NVRTC for the device at hand.
//!
//! * [`Device`] is memory, launches and library products in the order of one stream.
//! * `ops` chooses kernels and launch shapes, op by op.
//! * [`Cuda`] is the [`Backend`](mcpipe_graph::Backend) that an executor walks with.

mod backend;
pub mod batch;
mod device;
pub mod doctor;
mod driver;
mod error;
mod launch;
mod library;
mod ops;
pub mod optim;
mod staging;
mod store;
mod view;

pub use backend::{Buffer, Cuda, DeviceLayout, Precision};
pub use device::{Device, Memory, Recording};
pub use driver::gpu::{GpuInfo, gpus};
pub use error::{CudaError, size};
pub use library::{Library, Place};
pub use ops::relational::Pairs;
pub use staging::Staging;
pub use store::{Gradients, Parameters};
pub use view::{Address, Element, Grad, View};
