//! What runs kernels: a GPU through cudarc, or, for tests, the CPU.

pub(crate) mod blas;
pub(crate) mod compile;
pub(crate) mod dnn;
pub(crate) mod gpu;
#[cfg(feature = "shim")]
pub(crate) mod shim;

use std::fmt::Debug;
use std::ptr::NonNull;

use mcpipe_cpu::conv::Conv2d;

use crate::error::CudaError;
use crate::launch::{Arguments, Kernel, Shape};
use crate::view::{Address, View};

/// A product of row-major matrices: `d = alpha·op(a)·op(b) + beta·d + bias`, `batch` times.
#[derive(Clone, Copy, Debug)]
pub struct Product {
    /// Rows of d.
    pub m: usize,
    /// Columns of d.
    pub n: usize,
    /// Inner dimension.
    pub k: usize,
    /// `a` is stored as `[k, m]`.
    pub trans_a: bool,
    /// `b` is stored as `[n, k]`.
    pub trans_b: bool,
    /// Distances between stored rows of a, b and d.
    pub ld: [usize; 3],
    /// Products of the same sizes.
    pub batch: usize,
    /// Elements from one product's a, b and d to the next's.
    pub stride: [usize; 3],
    /// Factor.
    pub alpha: f32,
    /// Share of what `d` holds already.
    pub beta: f32,
    /// f32 operands may be rounded to tf32.
    pub tf32: bool,
}

impl Product {
    /// One product of contiguous matrices, without rounding to tf32.
    pub fn new(m: usize, n: usize, k: usize, trans_a: bool, trans_b: bool) -> Self {
        let ld = [if trans_a { m } else { k }, if trans_b { k } else { n }, n];
        Product { m, n, k, trans_a, trans_b, ld, batch: 1, stride: [0; 3], alpha: 1.0, beta: 0.0, tf32: false }
    }
}

/// What the tensor memory accelerator has to know of a matrix: `TensorMap` of `kernels/hopper.cuh`.
#[derive(Clone, Copy, Debug, Default)]
#[repr(C)]
pub(crate) struct TensorMap(pub(crate) [u64; 16]);

/// Which of a convolution's products.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum ConvPass {
    /// y from x and w.
    Forward,
    /// dx from dy and w.
    Data,
    /// dw from x and dy.
    Filter,
}

/// A device: memory, launches, library products, all in the order of one stream; and copies from the host beside it, in the
/// order of a stream of their own.
pub(crate) trait Driver: Debug {
    /// What it is, for messages.
    fn name(&self) -> String;
    /// Multiprocessors.
    fn processors(&self) -> usize;
    /// Compute capability as 10·major + minor.
    fn capability(&self) -> u32;
    /// Free and total bytes.
    fn memory(&self) -> (usize, usize);
    /// Memory of `bytes`, 256-byte aligned.
    fn alloc(&self, bytes: usize) -> Result<Address, CudaError>;
    /// Gives it back.
    fn free(&self, address: Address);
    /// Host to device.
    fn upload(&self, from: &[u8], to: Address) -> Result<(), CudaError>;
    /// Device to host, after all that was asked for before.
    fn download(&self, from: Address, to: &mut [u8]) -> Result<(), CudaError>;
    /// Device to device.
    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), CudaError>;
    /// Every byte.
    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<(), CudaError>;
    /// Runs a kernel.
    fn launch(&self, kernel: Kernel, shape: Shape, arguments: Arguments) -> Result<(), CudaError>;
    /// A map of bf16 `[rows, columns]`, rows `ld` elements apart, copied in boxes of `high` rows and 64 columns.
    fn tensor_map(&self, of: View, dims: [usize; 2], ld: usize, high: usize) -> Result<TensorMap, CudaError>;
    /// A dense product. `a` and `b` have one element type; `d` that type or f32; `bias` `[n]` the type of `d`.
    fn product(&self, p: &Product, a: View, b: View, d: View, bias: Option<View>) -> Result<(), CudaError>;
    /// A dense or grouped convolution over channels-last x `[B,H,W,Ci]`, y `[B,H',W',Co]` and weights
    /// `[Co,kh,kw,Ci/g]`; all of one element type. `Filter` overwrites dw, `Data` overwrites dx.
    fn convolution(&self, pass: ConvPass, d: &Conv2d, x: View, w: View, y: View, tf32: bool) -> Result<(), CudaError>;
    /// Memory of the host that the device reads by itself, without the host's help.
    fn pin(&self, bytes: usize) -> Result<NonNull<u8>, CudaError>;
    /// Gives it back: `bytes` of it were asked for.
    fn unpin(&self, at: NonNull<u8>, bytes: usize);
    /// Host to device beside the stream, once `open_beside` allows it. The device reads `from`, which is pinned, until
    /// `wait_beside` has returned.
    fn upload_beside(&self, from: &[u8], to: Address) -> Result<(), CudaError>;
    /// The stream goes on once the copies beside it that were asked for are done.
    fn join_beside(&self) -> Result<(), CudaError>;
    /// Copies beside the stream that are asked for from now on begin after what the stream was asked for until now.
    fn open_beside(&self) -> Result<(), CudaError>;
    /// Waits for the copies beside the stream.
    fn wait_beside(&self) -> Result<(), CudaError>;
    /// Waits for everything asked for of the stream.
    fn synchronize(&self) -> Result<(), CudaError>;
    /// Starts to record what is asked for instead of doing it; false where that can't be.
    fn begin_capture(&self) -> Result<bool, CudaError>;
    /// Ends the recording; gives its number.
    fn end_capture(&self) -> Result<usize, CudaError>;
    /// Does what recording `id` holds.
    fn replay(&self, id: usize) -> Result<(), CudaError>;
    /// Seconds that the device takes for what `work` asks for.
    fn time(&self, work: &mut dyn FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        self.synchronize()?;
        let start = std::time::Instant::now();
        work()?;
        self.synchronize()?;
        Ok(start.elapsed().as_secs_f64())
    }
}
