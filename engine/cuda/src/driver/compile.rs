//! Kernels' sources, embedded, and their compilation by NVRTC with a cache on disk.

use std::ffi::{CStr, CString, c_char};
use std::path::PathBuf;

use cudarc::nvrtc::{result as nvrtc, sys};

use crate::error::CudaError;
use crate::library::{self, Library};

// HEADERS and FILES: name and text of each file of `kernels/`. A file whose name ends in `_sm90a` uses what only compute
// capability 9.0 has.
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// Options besides the architecture; part of the cache's key.
const OPTIONS: &[&str] = &["--std=c++17", "--device-int128", "--restrict"];

/// The machine code of a kernel file for compute capability `capability` (90 for 9.0), from the cache where it is there.
///
/// # Errors
/// NVRTC is missing or refuses the source. A cache that can't be written is no error.
pub(crate) fn machine_code(file: &str, capability: u32) -> Result<Vec<u8>, CudaError> {
    library::load(Library::Nvrtc)?;
    let source = FILES.iter().find(|(name, _)| name.strip_suffix(".cu") == Some(file));
    let (_, source) = source.ok_or_else(|| CudaError::Unsupported(format!("there is no kernels/{file}.cu")))?;
    let arch = if file.ends_with("_sm90a") { "sm_90a".to_owned() } else { format!("sm_{capability}") };
    let cached = cache_file(file, &arch, source);
    if let Some(code) = cached.as_ref().and_then(|path| std::fs::read(path).ok()) {
        // ELF: a file cut short by a full disk was never renamed to this name.
        if code.starts_with(b"\x7fELF") {
            return Ok(code);
        }
    }
    let code = compile(file, source, &arch)?;
    if let Some(path) = cached {
        if let Err(e) = keep(&path, &code) {
            tracing::debug!("kernels are not cached at {}: {e}", path.display());
        }
    }
    Ok(code)
}

fn version() -> (i32, i32) {
    let (mut major, mut minor) = (0, 0);
    // SAFETY: the library was loaded; both pointers are valid.
    let status = unsafe { sys::nvrtcVersion(&mut major, &mut minor) };
    if status == sys::nvrtcResult::NVRTC_SUCCESS { (major, minor) } else { (0, 0) }
}

/// NVRTC's version, for `mcpipe doctor`.
pub(crate) fn nvrtc_version() -> String {
    let (major, minor) = version();
    format!("{major}.{minor}")
}

/// Names of the kernel files, without their ending.
pub(crate) fn files() -> Vec<&'static str> {
    FILES.iter().filter_map(|(name, _)| name.strip_suffix(".cu")).collect()
}

/// Where compiled kernels are kept: below `MCPIPE_CACHE_DIR`, else the user's cache folder; none without a home.
pub(crate) fn cache_folder() -> Option<PathBuf> {
    let folder = match (std::env::var_os("MCPIPE_CACHE_DIR"), std::env::var_os("XDG_CACHE_HOME")) {
        (Some(folder), _) => PathBuf::from(folder),
        (None, Some(folder)) => PathBuf::from(folder).join("mcpipe"),
        (None, None) => PathBuf::from(std::env::var_os("HOME")?).join(".cache/mcpipe"),
    };
    Some(folder.join("kernels"))
}

fn cache_file(file: &str, arch: &str, source: &str) -> Option<PathBuf> {
    let folder = cache_folder()?;
    let mut hash = blake3::Hasher::new();
    for (name, text) in HEADERS.iter().chain([&(file, source)]) {
        hash.update(name.as_bytes()).update(&(text.len() as u64).to_le_bytes()).update(text.as_bytes());
    }
    hash.update(format!("{arch} {OPTIONS:?} {:?}", version()).as_bytes());
    let hash = hash.finalize().to_hex();
    Some(folder.join(format!("{file}-{arch}-{}.cubin", &hash[..16])))
}

fn keep(path: &std::path::Path, code: &[u8]) -> std::io::Result<()> {
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    let part = path.with_extension(format!("{}.part", std::process::id()));
    std::fs::write(&part, code).and_then(|()| std::fs::rename(&part, path)).inspect_err(|_| {
        let _ = std::fs::remove_file(&part);
    })
}

/// A program that is destroyed when dropped.
struct Program(sys::nvrtcProgram);

impl Drop for Program {
    fn drop(&mut self) {
        // SAFETY: made by nvrtcCreateProgram, destroyed once.
        let _ = unsafe { nvrtc::destroy_program(self.0) };
    }
}

fn compile(file: &str, source: &str, arch: &str) -> Result<Vec<u8>, CudaError> {
    let failed = |call: &str, e: &dyn std::fmt::Debug| CudaError::Call { call: call.into(), reason: format!("{e:?}") };
    let c = |text: &str| CString::new(text).map_err(|e| failed("nvrtcCreateProgram", &e));
    let (source, name) = (c(source)?, c(&format!("{file}.cu"))?);
    let texts: Vec<CString> = HEADERS.iter().map(|(_, text)| c(text)).collect::<Result<_, _>>()?;
    let names: Vec<CString> = HEADERS.iter().map(|(name, _)| c(name)).collect::<Result<_, _>>()?;
    let pointers = |list: &[CString]| -> Vec<*const c_char> { list.iter().map(|c| c.as_ptr()).collect() };
    let (texts_at, names_at) = (pointers(&texts), pointers(&names));
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings end in NUL and outlive the program.
    let made = unsafe {
        sys::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            name.as_ptr(),
            HEADERS.len() as i32,
            texts_at.as_ptr(),
            names_at.as_ptr(),
        )
    };
    made.result().map_err(|e| failed("nvrtcCreateProgram", &e))?;
    let program = Program(program);
    let mut options: Vec<String> = OPTIONS.iter().map(|&o| o.to_owned()).collect();
    options.push(format!("--gpu-architecture={arch}"));
    // SAFETY: the program is alive.
    if unsafe { nvrtc::compile_program(program.0, &options) }.is_err() {
        // SAFETY: as above.
        let log = unsafe { nvrtc::get_program_log(program.0) }.unwrap_or_default();
        // SAFETY: NVRTC ends its log with NUL.
        let log = if log.is_empty() {
            String::new()
        } else {
            unsafe { CStr::from_ptr(log.as_ptr()) }.to_string_lossy().into_owned()
        };
        return Err(CudaError::Compile { file: file.into(), arch: arch.into(), log });
    }
    let mut size = 0;
    // SAFETY: the program was compiled for a real architecture, so there is machine code.
    unsafe { sys::nvrtcGetCUBINSize(program.0, &mut size) }.result().map_err(|e| failed("nvrtcGetCUBINSize", &e))?;
    let mut code = vec![0u8; size];
    // SAFETY: the buffer has the size asked for.
    unsafe { sys::nvrtcGetCUBIN(program.0, code.as_mut_ptr().cast()) }
        .result()
        .map_err(|e| failed("nvrtcGetCUBIN", &e))?;
    Ok(code)
}
