//! Kernels' sources, embedded, and their compilation by NVRTC with a cache on disk.

use std::borrow::Cow;
use std::ffi::{CString, c_char};
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};

use cudarc::nvrtc::{result as nvrtc, sys};

use crate::error::CudaError;
use crate::library::{self, Library};

// HEADERS and FILES: name and text of each file of `kernels/`. A file whose name ends in `_sm90a` uses what only compute
// capability 9.0 has.
include!(concat!(env!("OUT_DIR"), "/kernels.rs"));

/// A header's name and text.
type Header = (&'static str, Cow<'static, str>);

/// The texts of a kernel file and of all headers: those embedded, or, for whoever works on the kernels, those in the folder
/// that `MCPIPE_KERNELS` names.
fn texts(file: &str) -> Option<(Cow<'static, str>, Vec<Header>)> {
    let folder = std::env::var_os("MCPIPE_KERNELS").map(PathBuf::from);
    let text = |&(name, embedded): &(&'static str, &'static str)| {
        let read = folder.as_ref().and_then(|f| std::fs::read_to_string(f.join(name)).ok());
        (name, read.map_or(Cow::Borrowed(embedded), Cow::Owned))
    };
    let source = FILES.iter().find(|(name, _)| name.strip_suffix(".cu") == Some(file)).map(text)?.1;
    Some((source, HEADERS.iter().map(text).collect()))
}

/// Options besides the architecture; part of the cache's key.
const OPTIONS: &[&str] = &["--std=c++17", "--device-int128", "--restrict"];

/// The machine code of a kernel file for compute capability `capability` (90 for 9.0), from the cache where it is there.
///
/// # Errors
/// NVRTC is missing or refuses the source. A cache that can't be written is no error.
pub(crate) fn machine_code(file: &str, capability: u32) -> Result<Vec<u8>, CudaError> {
    library::load(Library::Nvrtc)?;
    let texts = texts(file);
    let (source, headers) = texts.ok_or_else(|| CudaError::Unsupported(format!("there is no kernels/{file}.cu")))?;
    let arch = arch(file, capability);
    let cached = cache_file(file, &arch, &source, &headers);
    if let Some(code) = cached.as_ref().and_then(|path| std::fs::read(path).ok()) {
        // ELF: a file cut short by a full disk was never renamed to this name.
        if code.starts_with(b"\x7fELF") {
            return Ok(code);
        }
    }
    let code = compile(file, &source, &headers, &arch)?;
    if let Some(path) = cached
        && let Err(e) = keep(&path, &code)
    {
        tracing::debug!("kernels are not cached at {}: {e}", path.display());
    }
    Ok(code)
}

/// Compiles every kernel file that the cache lacks, in parallel: on a first run this takes seconds instead of a minute of
/// stops at each op's first use.
///
/// # Errors
/// As [`machine_code`].
pub(crate) fn prepare(capability: u32) -> Result<(), CudaError> {
    library::load(Library::Nvrtc)?;
    let fits = |file: &&str| !file.ends_with("_sm90a") || capability == 90;
    let missing: Vec<&str> = files().into_iter().filter(fits).filter(|f| !is_cached(f, capability)).collect();
    if missing.is_empty() || cache_folder().is_none() {
        return Ok(());
    }
    tracing::info!("compiling {} kernel files for compute capability {capability}, once", missing.len());
    let workers = std::thread::available_parallelism().map_or(1, usize::from).min(missing.len());
    let next = AtomicUsize::new(0);
    let work = || -> Result<(), CudaError> {
        while let Some(file) = missing.get(next.fetch_add(1, Ordering::Relaxed)) {
            machine_code(file, capability)?;
        }
        Ok(())
    };
    std::thread::scope(|s| {
        let running: Vec<_> = (0..workers).map(|_| s.spawn(work)).collect();
        let lost = || CudaError::Unsupported("compiling the kernels was broken off".into());
        running.into_iter().try_for_each(|w| w.join().map_err(|_| lost())?)
    })
}

fn is_cached(file: &str, capability: u32) -> bool {
    let Some((source, headers)) = texts(file) else { return false };
    cache_file(file, &arch(file, capability), &source, &headers).is_some_and(|path| path.exists())
}

fn arch(file: &str, capability: u32) -> String {
    if file.ends_with("_sm90a") { "sm_90a".to_owned() } else { format!("sm_{capability}") }
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

fn cache_file(file: &str, arch: &str, source: &str, headers: &[Header]) -> Option<PathBuf> {
    let folder = cache_folder()?;
    let mut hash = blake3::Hasher::new();
    for (name, text) in headers.iter().map(|(n, t)| (*n, t.as_ref())).chain([(file, source)]) {
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

fn compile(file: &str, source: &str, headers: &[Header], arch: &str) -> Result<Vec<u8>, CudaError> {
    let failed = |call: &str, e: &dyn std::fmt::Debug| CudaError::Call { call: call.into(), reason: format!("{e:?}") };
    let c = |text: &str| CString::new(text).map_err(|e| failed("nvrtcCreateProgram", &e));
    let (source, name) = (c(source)?, c(&format!("{file}.cu"))?);
    let texts: Vec<CString> = headers.iter().map(|(_, text)| c(text)).collect::<Result<_, _>>()?;
    let names: Vec<CString> = headers.iter().map(|(name, _)| c(name)).collect::<Result<_, _>>()?;
    let pointers = |list: &[CString]| -> Vec<*const c_char> { list.iter().map(|c| c.as_ptr()).collect() };
    let (texts_at, names_at) = (pointers(&texts), pointers(&names));
    let mut program = std::ptr::null_mut();
    // SAFETY: all strings end in NUL and outlive the program.
    let made = unsafe {
        sys::nvrtcCreateProgram(
            &mut program,
            source.as_ptr(),
            name.as_ptr(),
            headers.len() as i32,
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
        let bytes: Vec<u8> = log.iter().map(|c| *c as u8).take_while(|b| *b != 0).collect();
        let log = String::from_utf8_lossy(&bytes).into_owned();
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
