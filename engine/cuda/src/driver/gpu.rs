//! A GPU, through cudarc.

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;
use std::ffi::CString;
use std::fmt;
use std::ptr::NonNull;

use cudarc::driver::{result as cuda, sys};
use mcpipe_cpu::conv::Conv2d;

use super::blas::{Blas, WORKSPACE};
use super::compile::machine_code;
use super::dnn::Dnn;
use super::{ConvPass, Driver, Product, TensorMap};
use crate::doctor;
use crate::error::CudaError;
use crate::launch::{Arguments, Kernel, Shape};
use crate::library::{self, Library};
use crate::view::{Address, View};

/// Compute capability from which all kernels run (bf16 on tensor cores, asynchronous copies).
pub(crate) const LEAST_CAPABILITY: u32 = 80;

/// Shared memory, static and dynamic, that needs no leave.
const PLAIN_SHARED: u32 = 48 << 10;

/// A stream of copies beside another stream, with the events by which they wait for each other.
#[derive(Clone, Copy)]
struct Beside {
    stream: sys::CUstream,
    /// The copies so far.
    copied: sys::CUevent,
    /// The other stream's work so far.
    opened: sys::CUevent,
}

impl Beside {
    fn new() -> Result<Self, CudaError> {
        let event = || {
            let flags = sys::CUevent_flags::CU_EVENT_DISABLE_TIMING;
            cuda::event::create(flags).map_err(|e| failed("cuEventCreate", e))
        };
        let (copied, opened) = (event()?, event()?);
        let stream = new_stream()?;
        Ok(Beside { stream, copied, opened })
    }
}

fn new_stream() -> Result<sys::CUstream, CudaError> {
    cuda::stream::create(cuda::stream::StreamKind::NonBlocking).map_err(|e| failed("cuStreamCreate", e))
}

/// `stream` goes on after what `other` was asked for until now.
///
/// # Safety
/// All are alive.
unsafe fn wait_for(stream: sys::CUstream, other: sys::CUstream, event: sys::CUevent) -> Result<(), CudaError> {
    // SAFETY: as the caller says.
    unsafe {
        cuda::event::record(event, other).map_err(|e| failed("cuEventRecord", e))?;
        cuda::stream::wait_event(stream, event, sys::CUevent_wait_flags::CU_EVENT_WAIT_DEFAULT)
            .map_err(|e| failed("cuStreamWaitEvent", e))
    }
}

/// A GPU with one stream, and one for copies.
pub(crate) struct Gpu {
    name: String,
    device: sys::CUdevice,
    processors: usize,
    capability: u32,
    stream: sys::CUstream,
    beside: Beside,
    modules: RefCell<HashMap<&'static str, sys::CUmodule>>,
    functions: RefCell<HashMap<Kernel, (sys::CUfunction, u32)>>,
    blas: OnceCell<Blas>,
    dnn: OnceCell<Dnn>,
    /// Memory that convolutions use on the way.
    room: RefCell<(Address, usize)>,
    graphs: RefCell<Vec<sys::CUgraphExec>>,
}

impl fmt::Debug for Gpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Gpu").field("name", &self.name).finish_non_exhaustive()
    }
}

fn failed(call: impl Into<String>, e: cuda::DriverError) -> CudaError {
    let reason = match (e.error_name(), e.error_string()) {
        (Ok(name), Ok(text)) => format!("{} ({})", text.to_string_lossy(), name.to_string_lossy()),
        _ => format!("error {:?}", e.0),
    };
    CudaError::Call { call: call.into(), reason }
}

/// What the driver says of a GPU.
#[derive(Clone, Debug)]
pub struct GpuInfo {
    /// Its number.
    pub index: usize,
    /// Its name.
    pub name: String,
    /// Compute capability as 10·major + minor.
    pub capability: u32,
    /// Bytes of memory.
    pub memory: usize,
}

fn attribute(device: sys::CUdevice, which: sys::CUdevice_attribute) -> Result<i32, CudaError> {
    // SAFETY: the device came from the driver.
    unsafe { cuda::device::get_attribute(device, which) }.map_err(|e| failed("cuDeviceGetAttribute", e))
}

fn capability(device: sys::CUdevice) -> Result<u32, CudaError> {
    use sys::CUdevice_attribute as A;
    let major = attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?;
    let minor = attribute(device, A::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?;
    Ok((10 * major + minor) as u32)
}

/// The GPUs that the driver sees.
///
/// # Errors
/// No driver, a driver that is too old, or one that sees no GPU.
pub fn gpus() -> Result<Vec<GpuInfo>, CudaError> {
    let place = library::load(Library::Driver)?;
    let unusable = |e: cuda::DriverError| {
        let CudaError::Call { reason, .. } = failed("", e) else { return CudaError::Unavailable(String::new()) };
        CudaError::Unavailable(format!("the CUDA driver at {place} does not start: {reason}"))
    };
    cuda::init().map_err(unusable)?;
    let count = cuda::device::get_count().map_err(unusable)?;
    if count == 0 {
        return Err(CudaError::Unavailable(
            "the CUDA driver sees no GPU (is CUDA_VISIBLE_DEVICES set to hide it?)".into(),
        ));
    }
    let info = |i: i32| {
        let device = cuda::device::get(i).map_err(unusable)?;
        // SAFETY: the device came from the driver.
        let memory = unsafe { cuda::device::total_mem(device) }.map_err(unusable)?;
        let name = cuda::device::get_name(device).map_err(unusable)?;
        Ok(GpuInfo { index: i as usize, name, capability: capability(device)?, memory })
    };
    (0..count).map(info).collect()
}

/// The newest CUDA version that the driver can run: 13000 is 13.0.
pub(crate) fn driver_version() -> i32 {
    let mut version = 0;
    // SAFETY: the driver was loaded; the pointer is valid.
    let status = unsafe { sys::cuDriverGetVersion(&mut version) };
    if status == sys::CUresult::CUDA_SUCCESS { version } else { 0 }
}

impl Gpu {
    /// GPU number `index`, made current for this thread.
    ///
    /// # Errors
    /// [`CudaError::Unavailable`] where it can't be used.
    pub(crate) fn open(index: usize) -> Result<Self, CudaError> {
        let info = doctor::usable(index)?;
        super::compile::prepare(info.capability)?;
        let device = cuda::device::get(index as i32).map_err(|e| failed("cuDeviceGet", e))?;
        // SAFETY: the device came from the driver; the context is released when this is dropped.
        let context = unsafe { cuda::primary_ctx::retain(device) }.map_err(|e| failed("starting the GPU", e))?;
        // SAFETY: the context was just retained.
        unsafe { cuda::ctx::set_current(context) }.map_err(|e| failed("cuCtxSetCurrent", e))?;
        let (stream, beside) = (new_stream()?, Beside::new()?);
        let processors = attribute(device, sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        Ok(Gpu {
            name: format!("GPU {index}: {}", info.name),
            device,
            processors: processors as usize,
            capability: info.capability,
            stream,
            beside,
            modules: RefCell::default(),
            functions: RefCell::default(),
            blas: OnceCell::new(),
            dnn: OnceCell::new(),
            room: RefCell::default(),
            graphs: RefCell::default(),
        })
    }

    fn module(&self, file: &'static str) -> Result<sys::CUmodule, CudaError> {
        if let Some(module) = self.modules.borrow().get(file) {
            return Ok(*module);
        }
        let code = machine_code(file, self.capability)?;
        // SAFETY: the code is an ELF image that NVRTC made for this architecture.
        let module = unsafe { cuda::module::load_data(code.as_ptr().cast()) }
            .map_err(|e| failed(format!("loading kernels/{file}.cu"), e))?;
        self.modules.borrow_mut().insert(file, module);
        Ok(module)
    }

    fn function(&self, kernel: Kernel, shared: u32) -> Result<sys::CUfunction, CudaError> {
        let held = self.functions.borrow().get(&kernel).copied();
        let (function, allowed) = match held {
            Some(held) => held,
            None => {
                let module = self.module(kernel.file)?;
                let name = CString::new(kernel.name).map_err(|e| CudaError::Unsupported(e.to_string()))?;
                // SAFETY: the module is loaded.
                let function = unsafe { cuda::module::get_function(module, name) }
                    .map_err(|e| failed(format!("finding {} in kernels/{}.cu", kernel.name, kernel.file), e))?;
                let own = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES;
                // SAFETY: the function belongs to a loaded module.
                let own = unsafe { cuda::function::get_function_attribute(function, own) }
                    .map_err(|e| failed(format!("asking about {} in kernels/{}.cu", kernel.name, kernel.file), e))?;
                (function, PLAIN_SHARED.saturating_sub(own as u32))
            }
        };
        if shared > allowed {
            let most = sys::CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function belongs to a loaded module.
            unsafe { cuda::function::set_function_attribute(function, most, shared as i32) }.map_err(|e| {
                failed(format!("{shared} bytes of shared memory for {} in kernels/{}.cu", kernel.name, kernel.file), e)
            })?;
        }
        self.functions.borrow_mut().insert(kernel, (function, allowed.max(shared)));
        Ok(function)
    }

    fn blas(&self) -> Result<&Blas, CudaError> {
        if self.blas.get().is_none() {
            let blas = Blas::new(self.alloc(WORKSPACE)?)?;
            let _ = self.blas.set(blas);
        }
        self.blas.get().ok_or_else(|| CudaError::Unavailable("cuBLASLt did not start".into()))
    }

    fn dnn(&self) -> Result<&Dnn, CudaError> {
        if self.dnn.get().is_none() {
            let _ = self.dnn.set(Dnn::new(self.stream.cast())?);
        }
        self.dnn.get().ok_or_else(|| CudaError::Unavailable("cuDNN did not start".into()))
    }

    fn room(&self, bytes: usize) -> Result<Address, CudaError> {
        let mut room = self.room.borrow_mut();
        if room.1 < bytes {
            // Recordings go on using the room that they were made with.
            if room.1 > 0 && self.graphs.borrow().is_empty() {
                self.free(room.0);
                *room = (0, 0);
            }
            *room = (self.alloc(bytes)?, bytes);
        }
        Ok(room.0)
    }
}

impl Driver for Gpu {
    fn name(&self) -> String {
        self.name.clone()
    }

    fn processors(&self) -> usize {
        self.processors
    }

    fn capability(&self) -> u32 {
        self.capability
    }

    fn memory(&self) -> (usize, usize) {
        cuda::mem_get_info().unwrap_or((0, 0))
    }

    fn alloc(&self, bytes: usize) -> Result<Address, CudaError> {
        // SAFETY: the address is freed by `free` alone.
        unsafe { cuda::malloc_sync(bytes) }.map_err(|e| match e.0 {
            sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free, total) = self.memory();
                CudaError::OutOfMemory { wanted: bytes, free, total }
            }
            _ => failed("cuMemAlloc", e),
        })
    }

    fn free(&self, address: Address) {
        // SAFETY: it came from `alloc` and is freed once. An error here is the device's earlier failure.
        let _ = unsafe { cuda::free_sync(address) };
    }

    fn upload(&self, from: &[u8], to: Address) -> Result<(), CudaError> {
        // SAFETY: the caller answers for the range. From pageable memory the call returns when the bytes were read.
        unsafe { cuda::memcpy_htod_async(to, from, self.stream) }.map_err(|e| failed("a copy to the GPU", e))
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<(), CudaError> {
        // SAFETY: the caller answers for the range; the stream is waited for before the bytes are read.
        unsafe {
            cuda::memcpy_dtoh_async(to, from, self.stream).map_err(|e| failed("a copy from the GPU", e))?;
            cuda::stream::synchronize(self.stream).map_err(|e| failed("work on the GPU", e))
        }
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller answers for both ranges.
        unsafe { cuda::memcpy_dtod_async(to, from, bytes, self.stream) }.map_err(|e| failed("a copy within the GPU", e))
    }

    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<(), CudaError> {
        // SAFETY: the caller answers for the range.
        unsafe { cuda::memset_d8_async(to, byte, bytes, self.stream) }.map_err(|e| failed("cuMemsetD8Async", e))
    }

    fn launch(&self, kernel: Kernel, shape: Shape, mut arguments: Arguments) -> Result<(), CudaError> {
        let function = self.function(kernel, shape.shared)?;
        let [grid, block] = [shape.grid, shape.block].map(|[x, y, z]| (x, y, z));
        // SAFETY: the arguments are those of the kernel, in order, by construction of each launch; tests/kernels runs all of
        // them with checked bounds.
        unsafe { cuda::launch_kernel(function, grid, block, shape.shared, self.stream, &mut arguments.pointers()) }
            .map_err(|e| failed(format!("launching {} of kernels/{}.cu with {shape:?}", kernel.name, kernel.file), e))
    }

    fn tensor_map(&self, of: View, dims: [usize; 2], ld: usize, high: usize) -> Result<TensorMap, CudaError> {
        use sys::CUtensorMapDataType_enum::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
        let mut map = sys::CUtensorMap { opaque: [0; 16] };
        let (dims, strides) = ([dims[1] as u64, dims[0] as u64], [2 * ld as u64]);
        // SAFETY: all pointers are valid, the arrays as long as the rank asks for; the address is only noted.
        let status = unsafe {
            sys::cuTensorMapEncodeTiled(
                &mut map,
                CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
                2,
                of.address as *mut _,
                dims.as_ptr(),
                strides.as_ptr(),
                [64, high as u32].as_ptr(),
                [1, 1].as_ptr(),
                sys::CUtensorMapInterleave_enum::CU_TENSOR_MAP_INTERLEAVE_NONE,
                sys::CUtensorMapSwizzle_enum::CU_TENSOR_MAP_SWIZZLE_128B,
                sys::CUtensorMapL2promotion_enum::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                sys::CUtensorMapFloatOOBfill_enum::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
            )
        };
        status.result().map_err(|e| failed(format!("a tensor map of {dims:?}, rows {ld} apart"), e))?;
        Ok(TensorMap(map.opaque))
    }

    fn product(&self, p: &Product, a: View, b: View, d: View, bias: Option<View>) -> Result<(), CudaError> {
        self.blas()?.product(p, a, b, d, bias, self.stream.cast())
    }

    fn convolution(&self, pass: ConvPass, d: &Conv2d, x: View, w: View, y: View, tf32: bool) -> Result<(), CudaError> {
        self.dnn()?.run(pass, d, x, w, y, tf32, |bytes| self.room(bytes))
    }

    fn pin(&self, bytes: usize) -> Result<NonNull<u8>, CudaError> {
        // SAFETY: it is freed by `unpin` alone.
        let at = unsafe { cuda::malloc_host(bytes, 0) };
        let at = at.map_err(|e| failed(format!("pinning {bytes} bytes of the host's memory"), e))?;
        // SAFETY: it has this size. Memory is not to be read before it was written.
        unsafe { at.cast::<u8>().write_bytes(0, bytes) };
        NonNull::new(at.cast()).ok_or_else(|| CudaError::Unsupported("the driver pins no memory".into()))
    }

    fn unpin(&self, at: NonNull<u8>, _: usize) {
        // SAFETY: it came from `pin` and is freed once. An error here is the device's earlier failure.
        let _ = unsafe { cuda::free_host(at.as_ptr().cast()) };
    }

    fn upload_beside(&self, from: &[u8], to: Address) -> Result<(), CudaError> {
        // SAFETY: the caller answers for the range, and leaves the bytes alone until the copy is done.
        unsafe { cuda::memcpy_htod_async(to, from, self.beside.stream) }.map_err(|e| failed("a copy to the GPU", e))
    }

    fn join_beside(&self) -> Result<(), CudaError> {
        // SAFETY: streams and events live as long as this.
        unsafe { wait_for(self.stream, self.beside.stream, self.beside.copied) }
    }

    fn open_beside(&self) -> Result<(), CudaError> {
        // SAFETY: streams and events live as long as this.
        unsafe { wait_for(self.beside.stream, self.stream, self.beside.opened) }
    }

    fn wait_beside(&self) -> Result<(), CudaError> {
        // SAFETY: the stream is alive.
        unsafe { cuda::stream::synchronize(self.beside.stream) }.map_err(|e| failed("a copy to the GPU", e))
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        // SAFETY: the stream is alive.
        unsafe { cuda::stream::synchronize(self.stream) }.map_err(|e| failed("work on the GPU", e))
    }

    fn begin_capture(&self) -> Result<bool, CudaError> {
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is alive and not capturing: `end_capture` follows each of these.
        unsafe { cuda::stream::begin_capture(self.stream, mode) }.map_err(|e| failed("recording a step", e))?;
        Ok(true)
    }

    fn end_capture(&self) -> Result<usize, CudaError> {
        // SAFETY: a capture was begun; graph handles are used once.
        unsafe {
            let graph = cuda::stream::end_capture(self.stream).map_err(|e| failed("recording a step", e))?;
            let exec = cuda::graph::instantiate(graph, sys::CUgraphInstantiate_flags(0))
                .map_err(|e| failed("preparing a recorded step", e));
            let _ = cuda::graph::destroy(graph);
            let mut graphs = self.graphs.borrow_mut();
            graphs.push(exec?);
            Ok(graphs.len() - 1)
        }
    }

    fn replay(&self, id: usize) -> Result<(), CudaError> {
        let graph = self.graphs.borrow().get(id).copied();
        let graph = graph.ok_or_else(|| CudaError::Unsupported(format!("no step was recorded as {id}")))?;
        // SAFETY: the graph was instantiated and lives as long as this.
        unsafe { cuda::graph::launch(graph, self.stream) }.map_err(|e| failed("replaying a step", e))
    }

    fn time(&self, work: &mut dyn FnMut() -> Result<(), CudaError>) -> Result<f64, CudaError> {
        let event =
            || cuda::event::create(sys::CUevent_flags::CU_EVENT_DEFAULT).map_err(|e| failed("cuEventCreate", e));
        let (start, end) = (event()?, event()?);
        // SAFETY: events and stream are alive; events are destroyed once.
        unsafe {
            let record = |e| cuda::event::record(e, self.stream).map_err(|e| failed("cuEventRecord", e));
            let timed = record(start).and_then(|()| work()).and_then(|()| record(end)).and_then(|()| {
                cuda::event::synchronize(end).map_err(|e| failed("work on the GPU", e))?;
                cuda::event::elapsed(start, end).map_err(|e| failed("cuEventElapsedTime", e))
            });
            let _ = cuda::event::destroy(start);
            let _ = cuda::event::destroy(end);
            Ok(f64::from(timed?) * 1e-3)
        }
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        self.blas.take();
        self.dnn.take();
        // SAFETY: each handle was made here and is given back once, after all work on it.
        unsafe {
            let _ = cuda::stream::synchronize(self.beside.stream);
            let _ = cuda::stream::synchronize(self.stream);
            for graph in self.graphs.borrow_mut().drain(..) {
                let _ = cuda::graph::exec_destroy(graph);
            }
            for (_, module) in self.modules.borrow_mut().drain() {
                let _ = cuda::module::unload(module);
            }
            let _ = cuda::event::destroy(self.beside.copied);
            let _ = cuda::event::destroy(self.beside.opened);
            let _ = cuda::stream::destroy(self.beside.stream);
            let _ = cuda::stream::destroy(self.stream);
            let _ = cuda::primary_ctx::release(self.device);
        }
    }
}
