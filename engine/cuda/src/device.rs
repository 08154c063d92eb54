//! A device as the ops use it: memory, scratch, launches and library products.

use std::cell::{Cell, RefCell};
use std::rc::{Rc, Weak};

use mcpipe_cpu::conv::Conv2d;

use crate::driver::gpu::Gpu;
use crate::driver::{ConvPass, Driver, Product, TensorMap};
use crate::error::CudaError;
use crate::launch::{Arguments, Kernel, Shape};
use crate::ops::dense::Weights;
use crate::view::{Address, Element, View};

/// Memory of a device, given back when dropped.
#[derive(Debug)]
pub struct Memory {
    driver: Rc<dyn Driver>,
    address: Address,
    bytes: usize,
    weights: Weak<RefCell<Weights>>,
    held: Rc<Cell<usize>>,
}

impl Memory {
    /// Its first elements.
    pub fn view(&self, len: usize, element: Element) -> View {
        debug_assert!(len * element.bytes() <= self.bytes, "{len} elements in {} bytes", self.bytes);
        View::new(self.address, len, element)
    }

    /// Bytes.
    pub fn bytes(&self) -> usize {
        self.bytes
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        // Parameters that lay here are gone. Whoever holds the copies of weights frees such copies, which are none.
        if let Some(weights) = self.weights.upgrade()
            && let Ok(mut weights) = weights.try_borrow_mut()
        {
            weights.forget(View::new(self.address, self.bytes, Element::U8));
        }
        self.held.set(self.held.get() - self.bytes);
        self.driver.free(self.address);
    }
}

/// A device with its stream. Cheap to clone; clones are the same device.
#[derive(Clone, Debug)]
pub struct Device {
    driver: Rc<dyn Driver>,
    scratch: Rc<RefCell<Vec<Memory>>>,
    taken: Rc<Cell<usize>>,
    tf32: Rc<Cell<bool>>,
    /// Whether something was recorded, and scratch memory that recordings may name.
    recorded: Rc<Cell<bool>>,
    retired: Rc<RefCell<Vec<Memory>>>,
    bf16: Rc<Cell<bool>>,
    /// Bytes of memory that were given out.
    held: Rc<Cell<usize>>,
    /// Whether an executor's values are ranges of one memory.
    one_arena: bool,
    pub(crate) weights: Rc<RefCell<Weights>>,
}

impl Device {
    pub(crate) fn from_driver(driver: Rc<dyn Driver>) -> Self {
        Device {
            driver,
            scratch: Rc::default(),
            taken: Rc::default(),
            tf32: Rc::default(),
            recorded: Rc::default(),
            retired: Rc::default(),
            bf16: Rc::default(),
            held: Rc::default(),
            // In tests each value lies in memory of its own, whose end is guarded.
            one_arena: !cfg!(feature = "shim"),
            weights: Rc::default(),
        }
    }

    /// GPU number `index`.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`]: no driver, no such device, a library that is missing.
    pub fn open(index: usize) -> Result<Self, CudaError> {
        Ok(Device::from_driver(Rc::new(Gpu::open(index)?)))
    }

    /// The CPU, on the library of kernels that `MCPIPE_SHIM` names (`tests/kernels/run` builds it). For tests.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`]: no such library.
    #[cfg(feature = "shim")]
    pub fn shim() -> Result<Self, CudaError> {
        Ok(Device::from_driver(Rc::new(crate::driver::shim::Shim::from_env()?)))
    }

    /// The same device with an executor's values as ranges of one memory, as on a GPU.
    #[cfg(feature = "shim")]
    pub fn in_one_arena(self) -> Self {
        Device { one_arena: true, ..self }
    }

    /// The CPU as [`shim`](Self::shim) with `total` bytes of memory.
    ///
    /// # Errors
    /// As [`shim`](Self::shim).
    #[cfg(feature = "shim")]
    pub fn shim_of(total: usize) -> Result<Self, CudaError> {
        Ok(Device::from_driver(Rc::new(crate::driver::shim::Shim::from_env_of(total)?)))
    }

    pub(crate) fn one_arena(&self) -> bool {
        self.one_arena
    }

    /// What it is, for messages.
    pub fn name(&self) -> String {
        self.driver.name()
    }

    /// Multiprocessors.
    pub fn processors(&self) -> usize {
        self.driver.processors()
    }

    /// Compute capability as 10·major + minor.
    pub fn capability(&self) -> u32 {
        self.driver.capability()
    }

    /// Free and total bytes.
    pub fn memory(&self) -> (usize, usize) {
        self.driver.memory()
    }

    /// Bytes that are free or held by this device's user: what others don't have.
    pub fn room(&self) -> usize {
        self.memory().0 + self.held.get()
    }

    /// Memory of `bytes` (at least one), 256-byte aligned, holding anything.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn alloc(&self, bytes: usize) -> Result<Memory, CudaError> {
        // In tests exactly as much: what lies behind is guarded.
        let bytes = if cfg!(feature = "shim") { bytes.max(1) } else { bytes.max(1).next_multiple_of(256) };
        let address = self.driver.alloc(bytes)?;
        self.held.set(self.held.get() + bytes);
        let (driver, held) = (Rc::clone(&self.driver), Rc::clone(&self.held));
        Ok(Memory { driver, address, bytes, weights: Rc::downgrade(&self.weights), held })
    }

    /// Memory for one op's run, holding anything. Each call within an op gives other memory; the op's end gives all of
    /// it back ([`release_scratch`](Self::release_scratch)), and the next op gets the same again.
    ///
    /// # Errors
    /// [`CudaError::OutOfMemory`].
    pub fn scratch(&self, len: usize, element: Element) -> Result<View, CudaError> {
        let bytes = len * element.bytes();
        let mut held = self.scratch.borrow_mut();
        let i = self.taken.get();
        if i == held.len() {
            held.push(self.alloc(bytes)?);
        } else if held[i].bytes() < bytes {
            // Work that still reads the old memory was asked for before: free waits for it. Recordings read it for ever.
            let old = std::mem::replace(&mut held[i], self.alloc(bytes)?);
            if self.recorded.get() {
                self.retired.borrow_mut().push(old);
            }
        }
        self.taken.set(i + 1);
        let view = held[i].view(len, element);
        // In tests, NaN instead of what the last op left there.
        #[cfg(feature = "shim")]
        self.fill(view, 0xff)?;
        Ok(view)
    }

    /// Whether products may round f32 operands to tf32.
    pub fn set_tf32(&self, tf32: bool) {
        self.tf32.set(tf32);
    }

    /// Whether losses round embeddings to bf16.
    pub fn set_bf16(&self, bf16: bool) {
        self.bf16.set(bf16);
    }

    pub(crate) fn bf16(&self) -> bool {
        self.bf16.get()
    }

    /// Says that the weights in `range` were changed: copies of them in other types are out of date.
    pub fn weights_changed(&self, range: View) {
        self.weights.borrow_mut().changed(range);
    }

    /// Ends an op's use of its scratch memory.
    pub fn release_scratch(&self) {
        self.taken.set(0);
    }

    /// Host to device: `to` must have room for `from`.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn upload<T: Copy>(&self, from: &[T], to: View) -> Result<(), CudaError> {
        assert!(size_of_val(from) <= to.bytes(), "{} bytes into {}", size_of_val(from), to.bytes());
        // SAFETY: any plain data may be read as bytes.
        let bytes = unsafe { std::slice::from_raw_parts(from.as_ptr().cast::<u8>(), size_of_val(from)) };
        self.driver.upload(bytes, to.address)
    }

    /// The values of a view of floats, as f32, after all that was asked for before.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn download(&self, from: View) -> Result<Vec<f32>, CudaError> {
        let mut bytes = vec![0u8; from.bytes()];
        self.driver.download(from.address, &mut bytes)?;
        Ok(match from.element {
            Element::Bf16 => {
                let widen = |b: &[u8]| f32::from_bits(u32::from(u16::from_le_bytes([b[0], b[1]])) << 16);
                bytes.chunks_exact(2).map(widen).collect()
            }
            Element::F32 => bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect(),
            Element::I32 => {
                bytes.chunks_exact(4).map(|b| i32::from_le_bytes([b[0], b[1], b[2], b[3]]) as f32).collect()
            }
            Element::U8 => bytes.iter().map(|b| f32::from(*b)).collect(),
        })
    }

    /// Device to device, as bytes: both views have one size.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn copy(&self, from: View, to: View) -> Result<(), CudaError> {
        assert_eq!(from.bytes(), to.bytes(), "a copy is between views of one size");
        self.driver.copy(from.address, to.address, from.bytes())
    }

    /// Sets every byte of `to`.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn fill(&self, to: View, byte: u8) -> Result<(), CudaError> {
        self.driver.fill(to.address, byte, to.bytes())
    }

    pub(crate) fn driver(&self) -> &Rc<dyn Driver> {
        &self.driver
    }

    pub(crate) fn launch(&self, kernel: Kernel, shape: Shape, arguments: Arguments) -> Result<(), CudaError> {
        if shape.grid.contains(&0) {
            return Ok(());
        }
        self.driver.launch(kernel, shape, arguments)
    }

    pub(crate) fn tensor_map(
        &self,
        of: View,
        dims: [usize; 2],
        ld: usize,
        high: usize,
    ) -> Result<TensorMap, CudaError> {
        self.driver.tensor_map(of, dims, ld, high)
    }

    /// `d [m, n] = a [m, k] · b [n, k]ᵀ`, row-major and contiguous; `a` and `b` of one type.
    ///
    /// # Errors
    /// What the library refuses.
    pub fn matmul(&self, [m, n, k]: [usize; 3], a: View, b: View, d: View) -> Result<(), CudaError> {
        self.product(&Product::new(m, n, k, false, true), a, b, d, None)
    }

    pub(crate) fn product(&self, p: &Product, a: View, b: View, d: View, bias: Option<View>) -> Result<(), CudaError> {
        self.driver.product(&Product { tf32: self.tf32.get(), ..*p }, a, b, d, bias)
    }

    /// A product whose f32 operands are not rounded to tf32, whatever the precision.
    pub(crate) fn product_exact(
        &self,
        p: &Product,
        a: View,
        b: View,
        d: View,
        bias: Option<View>,
    ) -> Result<(), CudaError> {
        self.driver.product(&Product { tf32: false, ..*p }, a, b, d, bias)
    }

    pub(crate) fn convolution(&self, pass: ConvPass, d: &Conv2d, x: View, w: View, y: View) -> Result<(), CudaError> {
        self.driver.convolution(pass, d, x, w, y, self.tf32.get())
    }

    /// Waits for everything asked for.
    ///
    /// # Errors
    /// A kernel that failed.
    pub fn synchronize(&self) -> Result<(), CudaError> {
        self.driver.synchronize()
    }

    /// Seconds that the device takes for what `work` asks for.
    ///
    /// # Errors
    /// What `work` gives, or a kernel that failed.
    pub fn time(&self, mut work: impl FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        self.driver.time(&mut work)
    }

    /// Records what `work` asks for as a CUDA graph instead of doing it; none where the device can't record (then nothing
    /// was done). Within `work` nothing may be allocated, uploaded or downloaded: run it once before.
    ///
    /// # Errors
    /// What `work` gives, or a call that can't be recorded.
    pub fn record(&self, work: impl FnOnce() -> Result<(), CudaError>) -> Result<Option<Recording>, CudaError> {
        if !self.driver.begin_capture()? {
            return Ok(None);
        }
        self.recorded.set(true);
        let ran = work();
        // Also after a failure: the stream must leave the recording.
        let id = self.driver.end_capture();
        ran?;
        Ok(Some(Recording { driver: Rc::clone(&self.driver), id: id? }))
    }
}

/// Recorded work, to be done again and again on the same memory.
#[derive(Clone, Debug)]
pub struct Recording {
    driver: Rc<dyn Driver>,
    id: usize,
}

impl Recording {
    /// Does it.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn replay(&self) -> Result<(), CudaError> {
        self.driver.replay(self.id)
    }
}
