//! The CPU in a GPU's place, for tests: kernels from a library that `tests/kernels/run` builds of the same sources,
//! products and convolutions by mcpipe-cpu. Everything is done when the call returns.
//!
//! Memory starts as NaN, lies between guard bytes that are looked at after each launch and at the end, and a view that
//! leaves its memory is refused.

mod dense;
mod recording;
#[cfg(test)]
mod tests;

use std::alloc::Layout;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::ffi::{CString, c_char, c_int, c_uint, c_void};
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::ptr::NonNull;

use libloading::Library;
use mcpipe_cpu::conv::Conv2d;

use self::recording::Job;
use super::{ConvPass, Driver, Product, TensorMap};
use crate::error::CudaError;
use crate::launch::{Arguments, Kernel, Kind, Shape};
use crate::view::{Address, View};

/// Bytes before and after each range of memory that nothing may write.
const GUARD: usize = 256;
const GUARD_BYTE: u8 = 0xc3;
/// Bytes of the device, where `MCPIPE_SHIM_MEMORY` does not say.
const TOTAL: usize = 16 << 30;

type Launch = unsafe extern "C" fn(
    *const c_char,
    *const c_char,
    *const c_uint,
    *const c_uint,
    c_uint,
    *mut *mut c_void,
    *const c_uint,
    c_uint,
    *mut c_char,
    usize,
) -> c_int;

/// See the module.
pub(crate) struct Shim {
    launch: Launch,
    total: usize,
    /// Bytes by address.
    held: RefCell<BTreeMap<Address, usize>>,
    /// What is being recorded, and what was.
    recording: RefCell<Option<Vec<Job>>>,
    recordings: RefCell<Vec<Vec<Job>>>,
    /// Keeps `launch` loaded.
    _library: Library,
}

impl fmt::Debug for Shim {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shim").field("held", &self.held.borrow().len()).finish_non_exhaustive()
    }
}

fn failed(call: impl Into<String>, reason: impl fmt::Display) -> CudaError {
    CudaError::Call { call: call.into(), reason: reason.to_string() }
}

fn layout(bytes: usize) -> Layout {
    Layout::from_size_align(bytes + 2 * GUARD, 256).expect("a size that fits")
}

impl Shim {
    /// With the library that `MCPIPE_SHIM` names.
    pub(crate) fn from_env() -> Result<Self, CudaError> {
        let total = std::env::var("MCPIPE_SHIM_MEMORY").ok().and_then(|s| s.parse().ok()).unwrap_or(TOTAL);
        Shim::from_env_of(total)
    }

    /// The same as a device of `total` bytes.
    pub(crate) fn from_env_of(total: usize) -> Result<Self, CudaError> {
        let Some(path) = std::env::var_os("MCPIPE_SHIM") else {
            let text =
                "MCPIPE_SHIM names no library of kernels: `tests/kernels/run shim` builds one and prints its path";
            return Err(CudaError::Unavailable(text.into()));
        };
        Shim::open(Path::new(&path), total)
    }

    /// With a library, as a device of `total` bytes.
    pub(crate) fn open(path: &Path, total: usize) -> Result<Self, CudaError> {
        let unavailable = |e: libloading::Error| CudaError::Unavailable(format!("{}: {e}", path.display()));
        // SAFETY: the library is our own; loading it only registers its kernels.
        let library = unsafe { Library::new(path) }.map_err(unavailable)?;
        // Never unloaded: its thread-local storage is large, and the loader may lack room for it a second time.
        // SAFETY: as above.
        std::mem::forget(unsafe { Library::new(path) }.map_err(unavailable)?);
        // SAFETY: tests/kernels/shim/runtime.cpp declares it so.
        let launch = *unsafe { library.get::<Launch>(b"mcpipe_launch\0") }.map_err(unavailable)?;
        let (recording, recordings) = (RefCell::default(), RefCell::default());
        Ok(Shim { launch, total, held: RefCell::default(), recording, recordings, _library: library })
    }

    /// The memory that holds `bytes` bytes from `address` on.
    fn holder(&self, address: Address, bytes: usize) -> Option<Range<Address>> {
        let held = self.held.borrow();
        let (&start, &size) = held.range(..=address).next_back()?;
        let end = start + size as u64;
        (address + bytes as u64 <= end).then_some(start..end)
    }

    fn check(&self, what: &str, address: Address, bytes: usize) -> Result<(), CudaError> {
        if bytes == 0 || self.holder(address, bytes).is_some() {
            return Ok(());
        }
        Err(failed(what, format!("{bytes} bytes at {address:#x} are not within one range of memory")))
    }

    /// The bytes of a range that `check` accepted.
    fn bytes(&self, what: &str, address: Address, bytes: usize) -> Result<&[u8], CudaError> {
        self.check(what, address, bytes)?;
        if bytes == 0 {
            return Ok(&[]);
        }
        // SAFETY: it lies in memory that this object holds; each call's slice is used before anything else is written.
        Ok(unsafe { std::slice::from_raw_parts(address as *const u8, bytes) })
    }

    /// Whether a guard of the memory at `start` was written to: where, relative to the memory.
    fn trespass(&self, start: Address, bytes: usize) -> Option<isize> {
        let base = start as *const u8;
        // SAFETY: the guards are part of the allocation.
        let before = unsafe { std::slice::from_raw_parts(base.sub(GUARD), GUARD) };
        // SAFETY: as above.
        let after = unsafe { std::slice::from_raw_parts(base.add(bytes), GUARD) };
        if let Some(i) = after.iter().position(|b| *b != GUARD_BYTE) {
            return Some((bytes + i) as isize);
        }
        before.iter().rposition(|b| *b != GUARD_BYTE).map(|i| i as isize - GUARD as isize)
    }

    fn check_guards(&self, call: &str) -> Result<(), CudaError> {
        for (&start, &bytes) in &*self.held.borrow() {
            if let Some(at) = self.trespass(start, bytes) {
                return Err(failed(call, format!("wrote at byte {at} of a memory of {bytes} bytes")));
            }
        }
        Ok(())
    }
}

impl Driver for Shim {
    fn name(&self) -> String {
        "the CPU as a CUDA device".into()
    }

    fn processors(&self) -> usize {
        // Odd, and unlike any GPU.
        3
    }

    fn capability(&self) -> u32 {
        90
    }

    fn memory(&self) -> (usize, usize) {
        let used: usize = self.held.borrow().values().sum();
        (self.total.saturating_sub(used), self.total)
    }

    fn alloc(&self, bytes: usize) -> Result<Address, CudaError> {
        self.not_recorded("alloc")?;
        let (free, total) = self.memory();
        if bytes > free {
            return Err(CudaError::OutOfMemory { wanted: bytes, free, total });
        }
        // SAFETY: the size is not zero.
        let base = unsafe { std::alloc::alloc(layout(bytes)) };
        if base.is_null() {
            return Err(CudaError::OutOfMemory { wanted: bytes, free: 0, total });
        }
        // SAFETY: all within the allocation.
        unsafe {
            base.write_bytes(GUARD_BYTE, GUARD);
            base.add(GUARD).write_bytes(0xff, bytes);
            base.add(GUARD + bytes).write_bytes(GUARD_BYTE, GUARD);
        }
        let address = base as Address + GUARD as Address;
        self.held.borrow_mut().insert(address, bytes);
        Ok(address)
    }

    fn free(&self, address: Address) {
        let bytes = self.held.borrow_mut().remove(&address).expect("memory of this device");
        let trespass = self.trespass(address, bytes);
        // SAFETY: `alloc` made it with this layout, and it was removed above, so only once.
        unsafe { std::alloc::dealloc((address as *mut u8).sub(GUARD), layout(bytes)) };
        if let Some(at) = trespass
            && !std::thread::panicking()
        {
            panic!("something wrote at byte {at} of a memory of {bytes} bytes");
        }
    }

    fn upload(&self, from: &[u8], to: Address) -> Result<(), CudaError> {
        self.not_recorded("upload")?;
        self.check("upload", to, from.len())?;
        // SAFETY: checked; host slices are never this object's memory.
        unsafe { std::ptr::copy_nonoverlapping(from.as_ptr(), to as *mut u8, from.len()) };
        Ok(())
    }

    fn download(&self, from: Address, to: &mut [u8]) -> Result<(), CudaError> {
        self.not_recorded("download")?;
        to.copy_from_slice(self.bytes("download", from, to.len())?);
        Ok(())
    }

    fn copy(&self, from: Address, to: Address, bytes: usize) -> Result<(), CudaError> {
        if self.records(|| Job::Copy(from, to, bytes)) {
            return Ok(());
        }
        self.check("copy", from, bytes)?;
        self.check("copy", to, bytes)?;
        // SAFETY: checked; the ranges may overlap.
        unsafe { std::ptr::copy(from as *const u8, to as *mut u8, bytes) };
        Ok(())
    }

    fn fill(&self, to: Address, byte: u8, bytes: usize) -> Result<(), CudaError> {
        if self.records(|| Job::Fill(to, byte, bytes)) {
            return Ok(());
        }
        self.check("fill", to, bytes)?;
        // SAFETY: checked.
        unsafe { (to as *mut u8).write_bytes(byte, bytes) };
        Ok(())
    }

    fn launch(&self, kernel: Kernel, shape: Shape, mut arguments: Arguments) -> Result<(), CudaError> {
        if self.records(|| Job::Launch(kernel, shape, Box::new(arguments.clone()))) {
            return Ok(());
        }
        let call = format!("kernel {} of kernels/{}.cu", kernel.name, kernel.file);
        let mut pointers = arguments.pointers();
        for (&pointer, &(kind, bytes)) in pointers.iter().zip(arguments.types()) {
            if (kind, bytes) == (Kind::Struct, size_of::<View>()) {
                // SAFETY: View is the only struct that arguments hold.
                let view = unsafe { pointer.cast::<View>().read_unaligned() };
                self.check(&call, view.address, view.bytes())?;
                // Kernels that say so by their name take any address.
                if !view.address.is_multiple_of(16) && !kernel.name.ends_with("_unaligned") {
                    return Err(failed(call, format!("a view at {:#x}, which is not 16-byte aligned", view.address)));
                }
            }
        }
        let types: Vec<c_uint> =
            arguments.types().iter().map(|&(kind, bytes)| (kind as c_uint) << 24 | bytes as c_uint).collect();
        let [file, name] = [kernel.file, kernel.name].map(|s| CString::new(s).expect("a name without NUL"));
        let mut error = vec![0u8; 1024];
        // SAFETY: all pointers outlive the call; the library checks count, kinds and sizes of the arguments.
        let status = unsafe {
            (self.launch)(
                file.as_ptr(),
                name.as_ptr(),
                shape.grid.as_ptr(),
                shape.block.as_ptr(),
                shape.shared,
                pointers.as_mut_ptr(),
                types.as_ptr(),
                types.len() as c_uint,
                error.as_mut_ptr().cast(),
                error.len(),
            )
        };
        if status != 0 {
            let end = error.iter().position(|b| *b == 0).unwrap_or(error.len());
            return Err(failed(call, String::from_utf8_lossy(&error[..end])));
        }
        self.check_guards(&call)
    }

    fn tensor_map(&self, of: View, dims: [usize; 2], ld: usize, high: usize) -> Result<TensorMap, CudaError> {
        let bytes = 2 * ((dims[0] - 1) * ld + dims[1]);
        self.check("a tensor map", of.address, bytes)?;
        // What cuTensorMapEncodeTiled refuses.
        if !of.address.is_multiple_of(16) || !ld.is_multiple_of(8) || high > 256 {
            return Err(failed("a tensor map", format!("{dims:?} at {:#x}, rows {ld} apart", of.address)));
        }
        let mut map = TensorMap::default();
        map.0[..5].copy_from_slice(&[of.address, dims[1] as u64, dims[0] as u64, 2 * ld as u64, high as u64]);
        Ok(map)
    }

    fn product(&self, p: &Product, a: View, b: View, d: View, bias: Option<View>) -> Result<(), CudaError> {
        if self.records(|| Job::Product(*p, a, b, d, bias)) {
            return Ok(());
        }
        dense::product(self, p, a, b, d, bias)
    }

    fn convolution(&self, pass: ConvPass, d: &Conv2d, x: View, w: View, y: View, tf32: bool) -> Result<(), CudaError> {
        if self.records(|| Job::Convolution(pass, *d, [x, w, y], tf32)) {
            return Ok(());
        }
        dense::convolution(self, pass, d, [x, w, y], tf32)
    }

    fn pin(&self, bytes: usize) -> Result<NonNull<u8>, CudaError> {
        // SAFETY: the layout's size is not zero.
        let at = unsafe { std::alloc::alloc_zeroed(layout(bytes)) };
        NonNull::new(at).ok_or(CudaError::OutOfMemory { wanted: bytes, free: 0, total: self.total })
    }

    fn unpin(&self, at: NonNull<u8>, bytes: usize) {
        // SAFETY: `pin` made it with this layout.
        unsafe { std::alloc::dealloc(at.as_ptr(), layout(bytes)) };
    }

    fn upload_beside(&self, from: &[u8], to: Address) -> Result<(), CudaError> {
        self.upload(from, to)
    }

    fn join_beside(&self) -> Result<(), CudaError> {
        Ok(())
    }

    fn open_beside(&self) -> Result<(), CudaError> {
        Ok(())
    }

    fn wait_beside(&self) -> Result<(), CudaError> {
        Ok(())
    }

    fn synchronize(&self) -> Result<(), CudaError> {
        Ok(())
    }

    fn begin_capture(&self) -> Result<bool, CudaError> {
        self.begin();
        Ok(true)
    }

    fn end_capture(&self) -> Result<usize, CudaError> {
        self.end()
    }

    fn replay(&self, id: usize) -> Result<(), CudaError> {
        self.again(id)
    }
}
