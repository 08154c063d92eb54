//! Where graphs run.

use std::cell::RefCell;
use std::fmt;
use std::str::FromStr;

use mcpipe_cuda::{CudaError, Device};
use mcpipe_graph::Kernels;

/// What a user asks for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum DeviceChoice {
    /// The first GPU that answers, else the CPU.
    #[default]
    Auto,
    /// The CPU.
    Cpu,
    /// GPU number so many.
    Cuda(usize),
    /// The CPU through the kernels of the CUDA backend, for tests.
    #[cfg(feature = "shim")]
    Shim,
}

impl fmt::Display for DeviceChoice {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceChoice::Auto => f.write_str("auto"),
            DeviceChoice::Cpu => f.write_str("cpu"),
            DeviceChoice::Cuda(0) => f.write_str("cuda"),
            DeviceChoice::Cuda(i) => write!(f, "cuda:{i}"),
            #[cfg(feature = "shim")]
            DeviceChoice::Shim => f.write_str("shim"),
        }
    }
}

impl FromStr for DeviceChoice {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let index = |i: &str| i.parse().ok().filter(|_| i.bytes().all(|b| b.is_ascii_digit()));
        match text {
            "auto" => Ok(DeviceChoice::Auto),
            "cpu" => Ok(DeviceChoice::Cpu),
            "cuda" => Ok(DeviceChoice::Cuda(0)),
            #[cfg(feature = "shim")]
            "shim" => Ok(DeviceChoice::Shim),
            _ => text.strip_prefix("cuda:").and_then(index).map(DeviceChoice::Cuda).ok_or_else(|| {
                format!("there is no device `{text}`; there are `auto`, `cpu`, `cuda` and `cuda:N` (GPU number N)")
            }),
        }
    }
}

/// What runs graphs. Cheap to clone; not for other threads.
#[derive(Clone, Debug)]
pub enum Compute {
    /// The CPU.
    Cpu(Kernels),
    /// A GPU.
    Cuda(Device),
}

impl Default for Compute {
    fn default() -> Self {
        Compute::Cpu(Kernels::Native)
    }
}

thread_local! {
    /// Devices that were opened, by index: contexts and compiled kernels are kept.
    static OPEN: RefCell<Vec<(DeviceChoice, Device)>> = const { RefCell::new(Vec::new()) };
}

/// The device of a choice that is not `auto`, opened once in this thread.
fn opened(choice: DeviceChoice, open: impl FnOnce() -> Result<Device, CudaError>) -> Result<Device, CudaError> {
    let held = OPEN.with_borrow(|all| all.iter().find(|(c, _)| *c == choice).map(|(_, d)| d.clone()));
    match held {
        Some(device) => Ok(device),
        None => {
            let device = open()?;
            OPEN.with_borrow_mut(|all| all.push((choice, device.clone())));
            Ok(device)
        }
    }
}

impl Compute {
    /// What `choice` names; with the reason, where it is `auto` and no GPU can be used, so that it is the CPU. `kernels` are
    /// those of the CPU: any but its native ones keep `auto` there.
    ///
    /// # Errors
    /// A GPU that was asked for by name and can't be used, or one that answers and then fails.
    pub fn open(choice: DeviceChoice, kernels: Kernels) -> Result<(Self, Option<CudaError>), CudaError> {
        match choice {
            DeviceChoice::Cpu => Ok((Compute::Cpu(kernels), None)),
            DeviceChoice::Auto if kernels != Kernels::Native => Ok((Compute::Cpu(kernels), None)),
            DeviceChoice::Auto => Self::auto(opened(DeviceChoice::Cuda(0), || Device::open(0)), kernels),
            #[cfg(feature = "shim")]
            DeviceChoice::Shim => Ok((Compute::Cuda(opened(choice, Device::shim)?), None)),
            DeviceChoice::Cuda(_) if kernels != Kernels::Native => {
                Err(CudaError::Unavailable(format!("`--kernels reference` runs on the CPU alone, not on `{choice}`")))
            }
            DeviceChoice::Cuda(index) => Ok((Compute::Cuda(opened(choice, || Device::open(index))?), None)),
        }
    }

    fn auto(first: Result<Device, CudaError>, kernels: Kernels) -> Result<(Self, Option<CudaError>), CudaError> {
        match first {
            Ok(device) => Ok((Compute::Cuda(device), None)),
            // Full counts as not usable: others hold its memory. The note says so.
            Err(e @ (CudaError::Unavailable(_) | CudaError::OutOfMemory { .. })) => {
                Ok((Compute::Cpu(kernels), Some(e)))
            }
            Err(e) => Err(e),
        }
    }

    /// Its name, for messages.
    pub fn name(&self) -> String {
        match self {
            Compute::Cpu(_) => "the CPU".into(),
            Compute::Cuda(device) => device.name(),
        }
    }

    /// The word for it in lock files: results differ in their bits between `cpu` and `cuda`.
    pub fn kind(&self) -> &'static str {
        match self {
            Compute::Cpu(_) => "cpu",
            Compute::Cuda(_) => "cuda",
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn auto_takes_the_cpu_only_where_no_gpu_can_be_used() {
        let none = CudaError::Unavailable("the CUDA driver sees no GPU".into());
        let (compute, note) = Compute::auto(Err(none.clone()), Kernels::Native).unwrap();
        assert_eq!((compute.kind(), note), ("cpu", Some(none)));
        let full = CudaError::OutOfMemory { wanted: 3 << 30, free: 5 << 20, total: 80 << 30 };
        let (compute, note) = Compute::auto(Err(full), Kernels::Native).unwrap();
        assert_eq!(compute.kind(), "cpu");
        assert_eq!(note.unwrap().to_string(), "out of GPU memory: 3.00 GiB wanted, 5.0 MiB of 80.00 GiB free");
        let broken = CudaError::Call { call: "cuInit".into(), reason: "unknown error".into() };
        assert!(Compute::auto(Err(broken), Kernels::Native).is_err());
    }

    #[test]
    fn devices_are_read_as_they_are_written() {
        for text in ["auto", "cpu", "cuda", "cuda:3"] {
            assert_eq!(text.parse::<DeviceChoice>().unwrap().to_string(), text);
        }
        assert_eq!("cuda:0".parse::<DeviceChoice>(), Ok(DeviceChoice::Cuda(0)));
        for text in ["gpu", "cuda:", "cuda:x", "cuda:-1", "cuda:+1", "CUDA", ""] {
            let e = text.parse::<DeviceChoice>().unwrap_err();
            assert!(e.contains("`cuda:N`"), "{e}");
        }
    }
}
