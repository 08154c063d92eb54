//! Convolutions by cuDNN.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cudnn::{result as dnn, sys};
use mcpipe_cpu::conv::Conv2d;

use super::ConvPass;
use crate::error::CudaError;
use crate::library::{self, Library};
use crate::view::{Address, Element, View};

/// Most bytes that an algorithm may use on the way.
const MOST: usize = 1 << 30;

/// What the choice of an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    pass: ConvPass,
    dims: [usize; 10],
    element: u32,
    tf32: bool,
}

/// A convolution that is ready to run.
#[derive(Debug)]
struct Ready {
    x: sys::cudnnTensorDescriptor_t,
    y: sys::cudnnTensorDescriptor_t,
    w: sys::cudnnFilterDescriptor_t,
    conv: sys::cudnnConvolutionDescriptor_t,
    algo: u32,
    workspace: usize,
}

impl Drop for Ready {
    fn drop(&mut self) {
        // SAFETY: made in `prepare`, destroyed once.
        unsafe {
            let _ = dnn::destroy_tensor_descriptor(self.x);
            let _ = dnn::destroy_tensor_descriptor(self.y);
            let _ = dnn::destroy_filter_descriptor(self.w);
            let _ = dnn::destroy_convolution_descriptor(self.conv);
        }
    }
}

/// cuDNN with the convolutions seen so far.
#[derive(Debug)]
pub(crate) struct Dnn {
    handle: sys::cudnnHandle_t,
    ready: RefCell<HashMap<Key, Ready>>,
}

fn failed(call: &str, what: &dyn std::fmt::Debug, e: dnn::CudnnError) -> CudaError {
    CudaError::Call { call: format!("{call} of {what:?}"), reason: format!("{:?}", e.0) }
}

impl Dnn {
    /// cuDNN on `stream`.
    ///
    /// # Errors
    /// The library is missing or refuses the device.
    pub(crate) fn new(stream: *mut c_void) -> Result<Self, CudaError> {
        library::load(Library::Cudnn)?;
        let handle = dnn::create_handle().map_err(|e| failed("cudnnCreate", &"the device", e))?;
        // SAFETY: handle and stream are alive.
        unsafe { dnn::set_stream(handle, stream.cast()) }.map_err(|e| failed("cudnnSetStream", &"the device", e))?;
        Ok(Dnn { handle, ready: RefCell::default() })
    }

    /// Version, for `mcpipe doctor`: 91900 is 9.19.0.
    pub(crate) fn version() -> usize {
        dnn::get_version()
    }

    /// One of a convolution's products; `room` gives memory of a size on the device.
    pub(crate) fn run(
        &self,
        pass: ConvPass,
        d: &Conv2d,
        x: View,
        w: View,
        y: View,
        tf32: bool,
        room: impl FnOnce(usize) -> Result<Address, CudaError>,
    ) -> Result<(), CudaError> {
        let dims = [d.batch, d.h, d.w, d.c_in, d.c_out, d.kh, d.kw, d.stride, d.pad, d.groups];
        let key = Key { pass, dims, element: x.element as u32, tf32 };
        let mut ready = self.ready.borrow_mut();
        let r = match ready.entry(key) {
            std::collections::hash_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::hash_map::Entry::Vacant(e) => e.insert(self.prepare(&key, d, x.element)?),
        };
        let at = if r.workspace > 0 { room(r.workspace)? } else { 0 };
        let (one, zero) = (1.0f32, 0.0f32);
        let (alpha, beta): (*const c_void, *const c_void) = ((&raw const one).cast(), (&raw const zero).cast());
        let [x, w, y] = [x, w, y].map(|v| v.address as *mut c_void);
        let room = at as *mut c_void;
        // SAFETY: descriptors are alive, views cover their tensors, the workspace has the size asked for; algorithm numbers
        // came from cuDNN.
        let ran = unsafe {
            match pass {
                ConvPass::Forward => sys::cudnnConvolutionForward(
                    self.handle,
                    alpha,
                    r.x,
                    x,
                    r.w,
                    w,
                    r.conv,
                    std::mem::transmute::<u32, sys::cudnnConvolutionFwdAlgo_t>(r.algo),
                    room,
                    r.workspace,
                    beta,
                    r.y,
                    y,
                ),
                ConvPass::Data => sys::cudnnConvolutionBackwardData(
                    self.handle,
                    alpha,
                    r.w,
                    w,
                    r.y,
                    y,
                    r.conv,
                    std::mem::transmute::<u32, sys::cudnnConvolutionBwdDataAlgo_t>(r.algo),
                    room,
                    r.workspace,
                    beta,
                    r.x,
                    x,
                ),
                ConvPass::Filter => sys::cudnnConvolutionBackwardFilter(
                    self.handle,
                    alpha,
                    r.x,
                    x,
                    r.y,
                    y,
                    r.conv,
                    std::mem::transmute::<u32, sys::cudnnConvolutionBwdFilterAlgo_t>(r.algo),
                    room,
                    r.workspace,
                    beta,
                    r.w,
                    w,
                ),
            }
        };
        ran.result().map_err(|e| failed("a convolution by cuDNN", &key, e))
    }

    fn prepare(&self, key: &Key, d: &Conv2d, element: Element) -> Result<Ready, CudaError> {
        use sys::cudnnDataType_t as T;
        use sys::cudnnMathType_t as M;
        let nhwc = sys::cudnnTensorFormat_t::CUDNN_TENSOR_NHWC;
        let (kind, math) = match element {
            Element::Bf16 => (T::CUDNN_DATA_BFLOAT16, M::CUDNN_TENSOR_OP_MATH),
            Element::F32 if key.tf32 => (T::CUDNN_DATA_FLOAT, M::CUDNN_DEFAULT_MATH),
            Element::F32 => (T::CUDNN_DATA_FLOAT, M::CUDNN_FMA_MATH),
            other => return Err(CudaError::Unsupported(format!("convolutions of {other:?}"))),
        };
        let int = |n: usize| n as i32;
        let fail = |e| failed("a convolution's preparation by cuDNN", key, e);
        // SAFETY: every descriptor is made here and kept with the result.
        unsafe {
            let mut r = Ready {
                x: dnn::create_tensor_descriptor().map_err(fail)?,
                y: dnn::create_tensor_descriptor().map_err(fail)?,
                w: dnn::create_filter_descriptor().map_err(fail)?,
                conv: dnn::create_convolution_descriptor().map_err(fail)?,
                algo: 0,
                workspace: 0,
            };
            dnn::set_tensor4d_descriptor(r.x, nhwc, kind, [d.batch, d.c_in, d.h, d.w].map(int)).map_err(fail)?;
            dnn::set_tensor4d_descriptor(r.y, nhwc, kind, [d.batch, d.c_out, d.out_h(), d.out_w()].map(int))
                .map_err(fail)?;
            dnn::set_filter4d_descriptor(r.w, kind, nhwc, [d.c_out, d.c_in / d.groups, d.kh, d.kw].map(int))
                .map_err(fail)?;
            let (pad, stride) = (int(d.pad), int(d.stride));
            let cross = sys::cudnnConvolutionMode_t::CUDNN_CROSS_CORRELATION;
            dnn::set_convolution2d_descriptor(r.conv, pad, pad, stride, stride, 1, 1, cross, T::CUDNN_DATA_FLOAT)
                .map_err(fail)?;
            dnn::set_convolution_group_count(r.conv, int(d.groups)).map_err(fail)?;
            dnn::set_convolution_math_type(r.conv, math).map_err(fail)?;
            // The first choice of cuDNN's heuristic that gives the same bits each time.
            macro_rules! choose {
                ($get:ident, $perf:ty, $($descriptor:expr),*) => {{
                    let mut list: [$perf; 10] = std::mem::zeroed();
                    let mut count = 0;
                    sys::$get(self.handle, $($descriptor,)* 10, &mut count, list.as_mut_ptr()).result().map_err(fail)?;
                    let fits = |p: &&$perf| {
                        p.status == sys::cudnnStatus_t::CUDNN_STATUS_SUCCESS
                            && p.determinism == sys::cudnnDeterminism_t::CUDNN_DETERMINISTIC
                            && p.memory <= MOST
                    };
                    let found = list[..count.max(0) as usize].iter().find(fits);
                    found.map(|p| (p.algo as u32, p.memory))
                }};
            }
            let found = match key.pass {
                ConvPass::Forward => choose!(
                    cudnnGetConvolutionForwardAlgorithm_v7,
                    sys::cudnnConvolutionFwdAlgoPerf_t,
                    r.x,
                    r.w,
                    r.conv,
                    r.y
                ),
                ConvPass::Data => choose!(
                    cudnnGetConvolutionBackwardDataAlgorithm_v7,
                    sys::cudnnConvolutionBwdDataAlgoPerf_t,
                    r.w,
                    r.y,
                    r.conv,
                    r.x
                ),
                ConvPass::Filter => choose!(
                    cudnnGetConvolutionBackwardFilterAlgorithm_v7,
                    sys::cudnnConvolutionBwdFilterAlgoPerf_t,
                    r.x,
                    r.y,
                    r.conv,
                    r.w
                ),
            };
            let (algo, workspace) = found
                .ok_or_else(|| CudaError::Unsupported(format!("cuDNN has no deterministic algorithm for {key:?}")))?;
            (r.algo, r.workspace) = (algo, workspace);
            Ok(r)
        }
    }
}

impl Drop for Dnn {
    fn drop(&mut self) {
        self.ready.borrow_mut().clear();
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { dnn::destroy_handle(self.handle) };
    }
}
