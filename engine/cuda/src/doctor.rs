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

/// What is asked of a machine. Tests answer for machines of any kind.
trait Machine {
    /// Loads a library and says where it is.
    fn load(&self, library: Library) -> Result<Place, CudaError>;
    /// The GPUs that the driver sees.
    fn gpus(&self) -> Result<Vec<GpuInfo>, CudaError>;
    /// The newest CUDA version that the driver runs: 13000 is 13.0.
    fn driver_version(&self) -> i32;
}

/// The machine that this runs on.
struct Here;

impl Machine for Here {
    fn load(&self, library: Library) -> Result<Place, CudaError> {
        library::load(library)
    }

    fn gpus(&self) -> Result<Vec<GpuInfo>, CudaError> {
        gpus()
    }

    fn driver_version(&self) -> i32 {
        driver_version()
    }
}

/// GPU number `index`, where it and all that is required are there. Quick: starts and compiles nothing.
///
/// # Errors
/// [`CudaError::Unavailable`]: what is missing first.
pub fn usable(index: usize) -> Result<GpuInfo, CudaError> {
    usable_on(&Here, index)
}

fn usable_on(machine: &impl Machine, index: usize) -> Result<GpuInfo, CudaError> {
    machine.load(Library::Driver)?;
    let list = machine.gpus()?;
    let Some(gpu) = list.get(index).cloned() else {
        let names: Vec<String> = list.iter().map(|g| format!("{} ({})", g.index, g.name)).collect();
        return Err(CudaError::Unavailable(format!("there is no GPU {index}; there is {}", names.join(", "))));
    };
    if gpu.capability < LEAST_CAPABILITY {
        let (have, least) = (f64::from(gpu.capability) / 10.0, f64::from(LEAST_CAPABILITY) / 10.0);
        return Err(CudaError::Unavailable(format!(
            "GPU {index} ({}) has compute capability {have:.1}, but {least:.1} is needed (A100, RTX 30 and newer)",
            gpu.name
        )));
    }
    for library in Library::ALL.into_iter().filter(|l| *l != Library::Nccl) {
        let place = machine.load(library)?;
        if let Some(reason) = too_new(library, &place, machine.driver_version()) {
            return Err(CudaError::Unavailable(reason));
        }
    }
    Ok(gpu)
}

/// Why the driver can't run a library of CUDA's own, whose major version must not be above the driver's.
fn too_new(library: Library, place: &Place, driver: i32) -> Option<String> {
    if !matches!(library, Library::Nvrtc | Library::CublasLt) {
        return None;
    }
    let (have, need) = (driver / 1000, place.major()?);
    (have < need).then(|| {
        format!(
            "the driver is too old: it runs CUDA {have}.{} at most, but {} is of CUDA {need} ({place}); update the driver, or \
             install {} of CUDA {have}",
            driver % 1000 / 10,
            library.name(),
            library.name()
        )
    })
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
        let found = library::load(library).and_then(|place| match too_new(library, &place, driver_version()) {
            Some(reason) => Err(CudaError::Unavailable(reason)),
            None => Ok(format!("{} at {place}", version(library, &place))),
        });
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

#[cfg(test)]
mod tests {
    use super::*;

    /// A machine with one GPU.
    struct Made {
        missing: Option<Library>,
        driver: i32,
        capability: u32,
        gpus: Result<usize, CudaError>,
    }

    impl Default for Made {
        fn default() -> Self {
            Made { missing: None, driver: 13000, capability: 90, gpus: Ok(1) }
        }
    }

    impl Machine for Made {
        fn load(&self, library: Library) -> Result<Place, CudaError> {
            let folders = ["/usr/lib/x86_64-linux-gnu".into()];
            match self.missing {
                Some(missing) if missing == library => Err(library::missing(library, &[], &folders)),
                _ => Ok(Place::Loader(library.files()[0].to_owned())),
            }
        }

        fn gpus(&self) -> Result<Vec<GpuInfo>, CudaError> {
            let gpu =
                |index| GpuInfo { index, name: "NVIDIA H200".into(), capability: self.capability, memory: 1 << 37 };
            Ok((0..self.gpus.clone()?).map(gpu).collect())
        }

        fn driver_version(&self) -> i32 {
            self.driver
        }
    }

    fn said(machine: &Made, index: usize) -> String {
        match usable_on(machine, index) {
            Ok(gpu) => gpu.name,
            Err(CudaError::Unavailable(text)) => text,
            Err(e) => panic!("`auto` would not go on with the CPU: {e}"),
        }
    }

    #[test]
    fn each_thing_that_lacks_is_told() {
        assert_eq!(said(&Made::default(), 0), "NVIDIA H200");
        let lacking = |library| said(&Made { missing: Some(library), ..Made::default() }, 0);
        assert_eq!(
            lacking(Library::Driver),
            "CUDA driver not found: looked for libcuda.so.1 by the system's loader and in /usr/lib/x86_64-linux-gnu; \
             install NVIDIA's driver (nvidia-smi must work), or run the container with its GPUs"
        );
        assert_eq!(
            lacking(Library::Nvrtc),
            "NVRTC not found: looked for libnvrtc.so.13 and libnvrtc.so.12 by the system's loader and in \
             /usr/lib/x86_64-linux-gnu; install the CUDA toolkit, or `pip install nvidia-cuda-nvrtc`"
        );
        assert_eq!(
            lacking(Library::CublasLt),
            "cuBLASLt not found: looked for libcublasLt.so.13 and libcublasLt.so.12 by the system's loader and in \
             /usr/lib/x86_64-linux-gnu; install the CUDA toolkit, or `pip install nvidia-cublas`"
        );
        assert_eq!(
            lacking(Library::Cudnn),
            "cuDNN not found: looked for libcudnn.so.9 by the system's loader and in /usr/lib/x86_64-linux-gnu; install \
             cuDNN 9, or `pip install nvidia-cudnn-cu13`"
        );
        // One GPU does without.
        assert_eq!(lacking(Library::Nccl), "NVIDIA H200");
    }

    #[test]
    fn an_old_driver_an_old_gpu_and_a_number_too_high_are_told() {
        assert_eq!(
            said(&Made { driver: 12040, ..Made::default() }, 0),
            "the driver is too old: it runs CUDA 12.4 at most, but NVRTC is of CUDA 13 (libnvrtc.so.13 (system's loader)); \
             update the driver, or install NVRTC of CUDA 12"
        );
        assert_eq!(
            said(&Made { capability: 75, ..Made::default() }, 0),
            "GPU 0 (NVIDIA H200) has compute capability 7.5, but 8.0 is needed (A100, RTX 30 and newer)"
        );
        assert_eq!(
            said(&Made { gpus: Ok(2), ..Made::default() }, 2),
            "there is no GPU 2; there is 0 (NVIDIA H200), 1 (NVIDIA H200)"
        );
        let hidden = CudaError::Unavailable("the CUDA driver sees no GPU".into());
        assert_eq!(said(&Made { gpus: Err(hidden), ..Made::default() }, 0), "the CUDA driver sees no GPU");
    }
}
