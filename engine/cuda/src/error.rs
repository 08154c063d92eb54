//! What can go wrong on a device.

/// A device that refuses.
#[derive(Clone, Debug, thiserror::Error, PartialEq, Eq)]
pub enum CudaError {
    /// No usable device, library or precision; the text says what was looked for and what to do.
    #[error("{0}")]
    Unavailable(String),
    /// The device's memory is full.
    #[error("out of GPU memory: {} wanted, {} of {} free", size(*wanted), size(*free), size(*total))]
    OutOfMemory {
        /// Bytes asked for.
        wanted: usize,
        /// Bytes free at that moment.
        free: usize,
        /// Bytes of the device.
        total: usize,
    },
    /// A kernel that NVRTC refuses; a defect of this program.
    #[error("kernels/{file}.cu does not compile for {arch}:\n{log}")]
    Compile {
        /// File.
        file: String,
        /// Architecture.
        arch: String,
        /// The compiler's log.
        log: String,
    },
    /// A call that failed.
    #[error("{call} failed: {reason}")]
    Call {
        /// What was called.
        call: String,
        /// The library's words.
        reason: String,
    },
    /// Something that the CUDA backend has no kernel for.
    #[error("{0}")]
    Unsupported(String),
}

/// A number of bytes, for messages.
pub fn size(bytes: usize) -> String {
    match bytes as f64 {
        b if b >= f64::from(1 << 30) => format!("{:.2} GiB", b / f64::from(1 << 30)),
        b if b >= f64::from(1 << 20) => format!("{:.1} MiB", b / f64::from(1 << 20)),
        _ => format!("{bytes} bytes"),
    }
}
