//! Matrix products by cuBLASLt.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::ffi::c_void;

use cudarc::cublaslt::{result as lt, sys};

use super::Product;
use crate::error::CudaError;
use crate::library::{self, Library};
use crate::view::{Address, Element, View};

/// Bytes of memory that products may use on the way.
pub(crate) const WORKSPACE: usize = 64 << 20;

/// What the choice of an algorithm depends on.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
struct Key {
    dims: [usize; 3],
    trans: [bool; 2],
    ld: [usize; 3],
    batch: usize,
    stride: [usize; 3],
    input: u32,
    output: u32,
    bias: bool,
    tf32: bool,
    align: [u32; 3],
    reads: bool,
}

/// A product that is ready to run.
#[derive(Debug)]
struct Ready {
    desc: sys::cublasLtMatmulDesc_t,
    layouts: [sys::cublasLtMatrixLayout_t; 3],
    algo: sys::cublasLtMatmulAlgo_t,
}

impl Drop for Ready {
    fn drop(&mut self) {
        // SAFETY: made in `prepare`, destroyed once.
        unsafe {
            let _ = lt::destroy_matmul_desc(self.desc);
            for layout in self.layouts {
                let _ = lt::destroy_matrix_layout(layout);
            }
        }
    }
}

/// cuBLASLt with the products seen so far.
#[derive(Debug)]
pub(crate) struct Blas {
    handle: sys::cublasLtHandle_t,
    ready: RefCell<HashMap<Key, Ready>>,
    workspace: Cell<Address>,
}

fn failed(call: &str, what: &dyn std::fmt::Debug, e: lt::CublasError) -> CudaError {
    CudaError::Call { call: format!("{call} of {what:?}"), reason: format!("{:?}", e.0) }
}

fn data_type(e: Element) -> Result<sys::cudaDataType, CudaError> {
    match e {
        Element::F32 => Ok(sys::cudaDataType::CUDA_R_32F),
        Element::Bf16 => Ok(sys::cudaDataType::CUDA_R_16BF),
        other => Err(CudaError::Unsupported(format!("products of {other:?}"))),
    }
}

/// Largest power of two up to 256 that divides the address.
fn alignment(address: Address) -> u32 {
    1 << address.trailing_zeros().min(8)
}

impl Blas {
    /// cuBLASLt, with memory of [`WORKSPACE`] bytes at `workspace`.
    ///
    /// # Errors
    /// The library is missing or refuses the device.
    pub(crate) fn new(workspace: Address) -> Result<Self, CudaError> {
        library::load(Library::CublasLt)?;
        let handle = lt::create_handle().map_err(|e| failed("cublasLtCreate", &"the device", e))?;
        Ok(Blas { handle, ready: RefCell::default(), workspace: Cell::new(workspace) })
    }

    /// Version, for `mcpipe doctor`.
    pub(crate) fn version() -> usize {
        // SAFETY: the library was loaded.
        unsafe { sys::cublasLtGetVersion() }
    }

    /// `d = alpha·op(a)·op(b) + beta·d + bias` on `stream`.
    pub(crate) fn product(
        &self,
        p: &Product,
        a: View,
        b: View,
        d: View,
        bias: Option<View>,
        stream: *mut c_void,
    ) -> Result<(), CudaError> {
        if a.element != b.element {
            return Err(CudaError::Unsupported(format!("a product of {:?} by {:?}", a.element, b.element)));
        }
        let key = Key {
            dims: [p.m, p.n, p.k],
            trans: [p.trans_a, p.trans_b],
            ld: p.ld,
            batch: p.batch,
            stride: p.stride,
            input: a.element as u32,
            output: d.element as u32,
            bias: bias.is_some(),
            tf32: p.tf32,
            align: [a, b, d].map(|v| alignment(v.address)),
            reads: p.beta != 0.0,
        };
        let mut ready = self.ready.borrow_mut();
        let entry = match ready.entry(key) {
            std::collections::hash_map::Entry::Occupied(e) => e.into_mut(),
            std::collections::hash_map::Entry::Vacant(e) => e.insert(self.prepare(&key, a.element, d.element)?),
        };
        if let Some(bias) = bias {
            let attr = sys::cublasLtMatmulDescAttributes_t::CUBLASLT_MATMUL_DESC_BIAS_POINTER;
            set(entry.desc, attr, &bias.address)?;
        }
        // SAFETY: descriptors are alive, views cover their matrices, alpha and beta are host values read at once. Row-major
        // D = A·B is column-major Dᵀ = Bᵀ·Aᵀ, so b comes first.
        unsafe {
            lt::matmul(
                self.handle,
                entry.desc,
                (&raw const p.alpha).cast(),
                (&raw const p.beta).cast(),
                b.address as *const c_void,
                entry.layouts[0],
                a.address as *const c_void,
                entry.layouts[1],
                d.address as *const c_void,
                entry.layouts[2],
                d.address as *mut c_void,
                entry.layouts[2],
                &raw const entry.algo,
                self.workspace.get() as *mut c_void,
                WORKSPACE,
                stream.cast(),
            )
        }
        .map_err(|e| failed("cublasLtMatmul", &key, e))
    }

    fn prepare(&self, key: &Key, input: Element, output: Element) -> Result<Ready, CudaError> {
        let compute = match (input, key.tf32) {
            (Element::F32, true) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let fail = |e| failed("cublasLtMatmul's preparation", key, e);
        let desc = lt::create_matmul_desc(compute, sys::cudaDataType::CUDA_R_32F).map_err(fail)?;
        use sys::cublasLtMatmulDescAttributes_t as D;
        // CUBLAS_OP_N is 0, CUBLAS_OP_T is 1; the bindings of cuBLASLt leave the type out.
        let op = i32::from;
        set(desc, D::CUBLASLT_MATMUL_DESC_TRANSA, &op(key.trans[1]))?;
        set(desc, D::CUBLASLT_MATMUL_DESC_TRANSB, &op(key.trans[0]))?;
        if key.bias {
            set(desc, D::CUBLASLT_MATMUL_DESC_EPILOGUE, &sys::cublasLtEpilogue_t::CUBLASLT_EPILOGUE_BIAS)?;
            set(desc, D::CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, &(data_type(output)? as i32))?;
        }
        let [m, n, k] = key.dims;
        // A stored row-major matrix of r rows and c columns is a column-major one of c rows and r columns.
        let stored = |trans: bool, rows: usize, cols: usize| if trans { (cols, rows) } else { (rows, cols) };
        let shapes = [stored(key.trans[1], k, n), stored(key.trans[0], m, k), (m, n)];
        let places = [1, 0, 2];
        let mut layouts = [std::ptr::null_mut(); 3];
        for (i, (layout, (rows, cols))) in layouts.iter_mut().zip(shapes).enumerate() {
            let kind = data_type(if i == 2 { output } else { input })?;
            let at = places[i];
            *layout = lt::create_matrix_layout(kind, cols as u64, rows as u64, key.ld[at] as i64).map_err(fail)?;
            use sys::cublasLtMatrixLayoutAttribute_t as L;
            if key.batch > 1 {
                let (count, stride) = (key.batch as i32, key.stride[at] as i64);
                // SAFETY: the layout is alive; values are read at once.
                unsafe {
                    lt::set_matrix_layout_attribute(
                        *layout,
                        L::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                        (&raw const count).cast(),
                        size_of::<i32>(),
                    )
                    .map_err(fail)?;
                    lt::set_matrix_layout_attribute(
                        *layout,
                        L::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                        (&raw const stride).cast(),
                        size_of::<i64>(),
                    )
                    .map_err(fail)?;
                }
            }
        }
        let pref = lt::create_matmul_pref().map_err(fail)?;
        use sys::cublasLtMatmulPreferenceAttributes_t as P;
        let aligns = [
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, key.align[1]),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, key.align[0]),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, key.align[2]),
            (P::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, key.align[2]),
        ];
        // SAFETY: the preference is alive until destroyed below; values are read at once.
        let found = unsafe {
            let bytes = WORKSPACE;
            let room = P::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES;
            lt::set_matmul_pref_attribute(pref, room, (&raw const bytes).cast(), size_of::<usize>()).map_err(fail)?;
            for (attr, align) in aligns {
                lt::set_matmul_pref_attribute(pref, attr, (&raw const align).cast(), size_of::<u32>()).map_err(fail)?;
            }
            let [x, y, z] = layouts;
            let found = lt::get_matmul_algo_heuristic(self.handle, desc, x, y, z, z, pref);
            let _ = lt::destroy_matmul_pref(pref);
            found.map_err(fail)?
        };
        Ok(Ready { desc, layouts, algo: found.algo })
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        self.ready.borrow_mut().clear();
        // SAFETY: made in `new`, destroyed once.
        let _ = unsafe { lt::destroy_handle(self.handle) };
    }
}

fn set<T>(
    desc: sys::cublasLtMatmulDesc_t,
    attr: sys::cublasLtMatmulDescAttributes_t,
    value: &T,
) -> Result<(), CudaError> {
    // SAFETY: the descriptor is alive; the value is read at once.
    unsafe { lt::set_matmul_desc_attribute(desc, attr, (&raw const *value).cast(), size_of::<T>()) }
        .map_err(|e| failed("cublasLtMatmulDescSetAttribute", &attr, e))
}
