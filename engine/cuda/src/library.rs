//! Where the CUDA libraries are.
//!
//! cudarc loads each library by its bare name, and panics where there is none. So each is looked for here first: by the
//! system's loader, in CUDA's usual folders, and among a Python environment's packages (PyTorch's wheels bring all but the
//! driver). One found by its path is loaded and kept, and the loader then gives the same one for the bare name.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use crate::error::CudaError;

/// A library that the GPU path needs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Library {
    /// The driver.
    Driver,
    /// The run-time compiler of kernels.
    Nvrtc,
    /// Matrix products.
    CublasLt,
    /// Convolutions.
    Cudnn,
    /// Collectives of several GPUs.
    Nccl,
}

impl Library {
    /// All, in the order that they are needed.
    pub const ALL: [Library; 5] = [Library::Driver, Library::Nvrtc, Library::CublasLt, Library::Cudnn, Library::Nccl];

    /// What it is called.
    pub fn name(self) -> &'static str {
        match self {
            Library::Driver => "CUDA driver",
            Library::Nvrtc => "NVRTC",
            Library::CublasLt => "cuBLASLt",
            Library::Cudnn => "cuDNN",
            Library::Nccl => "NCCL",
        }
    }

    /// What it is needed for.
    pub fn purpose(self) -> &'static str {
        match self {
            Library::Driver => "anything on the GPU",
            Library::Nvrtc => "compiling the kernels",
            Library::CublasLt => "matrix products",
            Library::Cudnn => "convolutions",
            Library::Nccl => "training on several GPUs",
        }
    }

    /// File names, newest first; each is the name that the library itself declares.
    pub(crate) fn files(self) -> &'static [&'static str] {
        match self {
            Library::Driver => &["libcuda.so.1"],
            Library::Nvrtc => &["libnvrtc.so.13", "libnvrtc.so.12"],
            Library::CublasLt => &["libcublasLt.so.13", "libcublasLt.so.12"],
            Library::Cudnn => &["libcudnn.so.9"],
            Library::Nccl => &["libnccl.so.2"],
        }
    }

    /// How to get it.
    pub fn advice(self) -> &'static str {
        match self {
            Library::Driver => "install NVIDIA's driver (nvidia-smi must work), or run the container with its GPUs",
            Library::Nvrtc => "install the CUDA toolkit, or `pip install nvidia-cuda-nvrtc`",
            Library::CublasLt => "install the CUDA toolkit, or `pip install nvidia-cublas`",
            Library::Cudnn => "install cuDNN 9, or `pip install nvidia-cudnn-cu13`",
            Library::Nccl => "install NCCL, or `pip install nvidia-nccl-cu13`",
        }
    }
}

/// Where a library was found.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Place {
    /// By the system's loader under this name.
    Loader(String),
    /// In a folder that the loader doesn't know.
    File(PathBuf),
}

impl Place {
    /// The major version in the file's name: 13 of `libnvrtc.so.13`.
    pub(crate) fn major(&self) -> Option<i32> {
        let name = match self {
            Place::Loader(name) => name.as_str(),
            Place::File(path) => path.file_name()?.to_str()?,
        };
        name.split_once(".so.")?.1.split('.').next()?.parse().ok()
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Loader(name) => write!(f, "{name} (system's loader)"),
            Place::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Loads `library`, once, and says where it was found.
///
/// # Errors
/// [`CudaError::Unavailable`] with the folders that were looked through and how to get it.
pub fn load(library: Library) -> Result<Place, CudaError> {
    static FOUND: Mutex<Option<HashMap<Library, Result<Place, CudaError>>>> = Mutex::new(None);
    let mut found = FOUND.lock().unwrap_or_else(PoisonError::into_inner);
    found.get_or_insert_default().entry(library).or_insert_with(|| search(library)).clone()
}

fn search(library: Library) -> Result<Place, CudaError> {
    let mut refused = Vec::new();
    for file in library.files() {
        match open(Path::new(file)) {
            Ok(()) => return Ok(Place::Loader((*file).to_owned())),
            Err(reason) => refused.push(reason),
        }
    }
    let folders = folders();
    for file in library.files() {
        for folder in &folders {
            let path = folder.join(file);
            if path.exists() {
                match open(&path) {
                    Ok(()) => return Ok(Place::File(path)),
                    Err(reason) => refused.push(reason),
                }
            }
        }
    }
    Err(missing(library, &refused, &folders))
}

/// `library` is in none of `folders`; with what the loader said of each file that it tried.
pub(crate) fn missing(library: Library, refused: &[String], folders: &[PathBuf]) -> CudaError {
    // A file that is there but can't be loaded is the better reason.
    let broken = refused.iter().find(|r| !r.contains("No such file"));
    let reason = broken.map(|r| format!(" ({r})")).unwrap_or_default();
    CudaError::Unavailable(format!(
        "{} not found: looked for {} by the system's loader and in {}{reason}; {}",
        library.name(),
        library.files().join(" and "),
        list(folders),
        library.advice(),
    ))
}

fn list(folders: &[PathBuf]) -> String {
    let shown: Vec<String> = folders.iter().take(3).map(|f| f.display().to_string()).collect();
    let more = folders.len().saturating_sub(shown.len());
    if more > 0 { format!("{} and {more} more folders", shown.join(", ")) } else { shown.join(", ") }
}

/// Loads a library for the rest of the process.
fn open(path: &Path) -> Result<(), String> {
    #[cfg(unix)]
    {
        use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};
        // SAFETY: NVIDIA's libraries do nothing but set themselves up when loaded.
        let opened = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) };
        opened.map(std::mem::forget).map_err(|e| reason(&e))
    }
    #[cfg(not(unix))]
    {
        // SAFETY: as above.
        unsafe { libloading::Library::new(path) }.map(std::mem::forget).map_err(|e| reason(&e))
    }
}

/// The loader's own words.
fn reason(e: &libloading::Error) -> String {
    std::error::Error::source(e).map_or_else(|| e.to_string(), ToString::to_string)
}

/// NCCL's version, once it was found at `place`.
pub(crate) fn nccl_version(place: &Place) -> Option<String> {
    let path = match place {
        Place::Loader(name) => PathBuf::from(name),
        Place::File(path) => path.clone(),
    };
    let mut v = 0i32;
    // SAFETY: the library is loaded already; ncclGetVersion writes one int and returns 0 when it did.
    unsafe {
        let library = libloading::Library::new(path).ok()?;
        let get: libloading::Symbol<'_, unsafe extern "C" fn(*mut i32) -> i32> =
            library.get(b"ncclGetVersion\0").ok()?;
        (get(&mut v) == 0).then(|| format!("{}.{}.{}", v / 10_000, v / 100 % 100, v % 100))
    }
}

/// Folders that exist and may hold CUDA's libraries: those named by variables first, then the usual ones, then Python's.
fn folders() -> Vec<PathBuf> {
    let mut found: Vec<PathBuf> = Vec::new();
    let mut add = |path: PathBuf| {
        if path.is_dir() && !found.contains(&path) {
            found.push(path);
        }
    };
    for variable in ["MCPIPE_CUDA_PATH", "CUDA_HOME", "CUDA_PATH"] {
        if let Some(root) = std::env::var_os(variable).map(PathBuf::from) {
            for sub in ["lib64", "lib", "targets/x86_64-linux/lib", ""] {
                add(root.join(sub));
            }
        }
    }
    add("/usr/local/nvidia/lib64".into());
    for root in matching(Path::new("/usr/local"), "cuda") {
        add(root.join("lib64"));
    }
    add("/usr/lib/x86_64-linux-gnu".into());
    add("/usr/lib/wsl/lib".into());
    for packages in site_packages() {
        for package in matching(&packages.join("nvidia"), "") {
            add(package.join("lib"));
        }
        add(packages.join("torch/lib"));
    }
    found
}

/// Entries of `folder` whose name starts with `prefix`, last name first: newest versions before older ones.
fn matching(folder: &Path, prefix: &str) -> Vec<PathBuf> {
    let entries = std::fs::read_dir(folder).into_iter().flatten().flatten();
    let mut list: Vec<PathBuf> =
        entries.filter(|e| e.file_name().to_string_lossy().starts_with(prefix)).map(|e| e.path()).collect();
    list.sort();
    list.reverse();
    list
}

/// Package folders of the Python environments at hand: the active one, that of the `python3` on the path, the system's.
fn site_packages() -> Vec<PathBuf> {
    let mut roots: Vec<PathBuf> =
        ["VIRTUAL_ENV", "CONDA_PREFIX"].iter().filter_map(std::env::var_os).map(PathBuf::from).collect();
    let paths = std::env::var_os("PATH").unwrap_or_default();
    if let Some(python) = std::env::split_paths(&paths).map(|p| p.join("python3")).find(|p| p.exists()) {
        roots.extend(python.parent().and_then(Path::parent).map(Path::to_path_buf));
        let real = std::fs::canonicalize(&python).unwrap_or(python);
        roots.extend(real.parent().and_then(Path::parent).map(Path::to_path_buf));
    }
    roots.extend(["/usr/local".into(), "/usr".into()]);
    roots.extend(std::env::var_os("HOME").map(|home| PathBuf::from(home).join(".local")));
    let mut found: Vec<PathBuf> = Vec::new();
    for lib in roots.iter().map(|r| r.join("lib")) {
        for python in matching(&lib, "python3") {
            for name in ["site-packages", "dist-packages"] {
                let packages = python.join(name);
                if packages.is_dir() && !found.contains(&packages) {
                    found.push(packages);
                }
            }
        }
    }
    found
}
