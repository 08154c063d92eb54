//! `mcpipe doctor`: what of a GPU's needs is there.

use crate::driver::blas::Blas;
use crate::driver::compile;
use crate::driver::dnn::Dnn;
use crate::driver::gpu::{GpuInfo, LEAST_CAPABILITY, driver_version, gpus};
use crate::error::CudaError;
use crate::library::{self, Library, Place};

/// One thing that was looked for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Finding {
    /// What.
    pub name: String,
    /// Whether it is there and usable.
    pub ok: bool,
    /// Whether a GPU can't be used without it.
    pub required: bool,
    /// Version and place, or what is missing and how to get it.
    pub text: String,
}

/// GPU number `index`, where it and all that is required are there. Quick: starts and compiles nothing.
///
/// # Errors
/// [`CudaError::Unavailable`]: what is missing first.
pub fn usable(index: usize) -> Result<GpuInfo, CudaError> {
    library::load(Library::Driver)?;
    let list = gpus()?;
    let Some(gpu) = list.get(index).cloned() else {
        let names: Vec<String> = list.iter().map(|g| format!("{} ({})", g.index, g.name)).collect();
        return Err(CudaError::Unavailable(format!("there is no GPU {index}; there is {}", names.join(", "))));
    };
    if gpu.capability < LEAST_CAPABILITY {
        let (have, least) = (f64::from(gpu.capability) / 10.0, f64::from(LEAST_CAPABILITY) / 10.0);
        let text = format!("GPU {index} ({}) has compute capability {have:.1}, but {least:.1} is needed", gpu.name);
        return Err(CudaError::Unavailable(text));
    }
    for library in Library::ALL.into_iter().filter(|l| *l != Library::Nccl) {
        library::load(library)?;
    }
    Ok(gpu)
}

/// Looks for the driver, its GPUs and the libraries, and compiles the kernels for the first GPU (the newest known
/// architecture where there is none).
pub fn examine() -> Vec<Finding> {
    let mut list = Vec::new();
    let mut add = |name: &str, required: bool, found: Result<String, String>| {
        let (ok, text) = match found {
            Ok(text) => (true, text),
            Err(text) => (false, text),
        };
        list.push(Finding { name: name.to_owned(), ok, required, text });
    };
    let mut capability = None;
    for library in Library::ALL {
        let found = library::load(library).map(|place| format!("{} at {place}", version(library, &place)));
        let driver = found.is_ok() && library == Library::Driver;
        let found = found.map_err(|e| {
            let text = e.to_string();
            let text = text.strip_prefix(library.name()).unwrap_or(&text).trim_start();
            format!("for {}: {text}", library.purpose())
        });
        // Training on one GPU does without NCCL.
        add(library.name(), library != Library::Nccl, found);
        if driver {
            match gpus() {
                Ok(gpus) => {
                    for g in gpus {
                        let (major, minor) = (g.capability / 10, g.capability % 10);
                        let memory = g.memory as f64 / f64::from(1 << 30);
                        let text = format!("{}, compute capability {major}.{minor}, {memory:.1} GiB", g.name);
                        let usable = g.capability >= LEAST_CAPABILITY;
                        capability = capability.or(usable.then_some(g.capability));
                        let least = LEAST_CAPABILITY / 10;
                        let old = format!("{text}: too old, {least}.0 is needed (A100, RTX 30 and newer)");
                        add(&format!("GPU {}", g.index), g.index == 0, if usable { Ok(text) } else { Err(old) });
                    }
                }
                Err(e) => add("GPU", true, Err(e.to_string())),
            }
        }
    }
    let target = capability.unwrap_or(90);
    if library::load(Library::Nvrtc).is_ok() {
        add("kernels", true, kernels(target));
    }
    list
}

/// The library's version; it was loaded.
fn version(library: Library, place: &Place) -> String {
    // 91900 is 9.19.0.
    let dotted = |v: usize| format!("{}.{}.{}", v / 10_000, v / 100 % 100, v % 100);
    match library {
        Library::Driver => {
            let v = driver_version();
            format!("CUDA {}.{}", v / 1000, v % 1000 / 10)
        }
        Library::Nvrtc => compile::nvrtc_version(),
        Library::CublasLt => dotted(Blas::version()),
        Library::Cudnn => dotted(Dnn::version()),
        Library::Nccl => library::nccl_version(place).unwrap_or_else(|| "of unknown version".into()),
    }
}

fn kernels(capability: u32) -> Result<String, String> {
    let files = compile::files();
    compile::prepare(capability).map_err(|e| e.to_string())?;
    for file in files.iter().filter(|f| !f.ends_with("_sm90a") || capability == 90) {
        compile::machine_code(file, capability).map_err(|e| e.to_string())?;
    }
    let place = compile::cache_folder().map_or("not cached".into(), |f| format!("cached in {}", f.display()));
    Ok(format!("{} files compile for sm_{capability}, {place}", files.len()))
}
