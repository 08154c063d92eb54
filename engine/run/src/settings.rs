//! How a run uses the machine.

use std::num::NonZero;
use std::path::PathBuf;

use mcpipe_cuda::CudaError;
use mcpipe_graph::Kernels;
use mcpipe_train::{Compute, DeviceChoice};

use crate::error::RunError;

/// How a run uses the machine and where it keeps results; none of it comes from the pipeline file but `threads` and
/// `device`.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Folder of the store.
    pub store: PathBuf,
    /// Take no result from the store.
    pub fresh: bool,
    /// Heavy stages (training, evaluation) that may run at the same time. Their kernels use all threads each, so that
    /// more than one pays only where a stage can't fill the machine.
    pub jobs: usize,
    /// Threads for computing, at least 1.
    pub threads: usize,
    /// Which kernels run the graphs.
    pub kernels: Kernels,
    /// What trainings and evaluations run on; `auto` is resolved by [`choose_device`](Self::choose_device).
    pub device: DeviceChoice,
    /// Why that is the CPU, where a GPU would have been taken.
    pub device_note: Option<String>,
}

impl Default for Settings {
    fn default() -> Self {
        Self {
            store: default_store(),
            fresh: false,
            jobs: 1,
            threads: all_threads(),
            kernels: Kernels::Native,
            device: DeviceChoice::Cpu,
            device_note: None,
        }
    }
}

/// The store's folder where nothing else is asked for: `MCPIPE_STORE`, or `.mcpipe/store` in the current folder.
pub fn default_store() -> PathBuf {
    std::env::var_os("MCPIPE_STORE").map_or_else(|| PathBuf::from(".mcpipe/store"), PathBuf::from)
}

/// One thread for each core that this process may use.
pub fn all_threads() -> usize {
    std::thread::available_parallelism().map_or(1, NonZero::get)
}

impl Settings {
    /// Gives the process its pool of threads; to be called once, before the first computation.
    ///
    /// # Errors
    /// The system refuses the threads, or a pool of another size is in place already.
    pub fn install_threads(&self) -> Result<(), RunError> {
        let built = rayon::ThreadPoolBuilder::new()
            .num_threads(self.threads)
            .thread_name(|i| format!("compute-{i}"))
            .build_global();
        match built {
            Err(_) if rayon::current_num_threads() == self.threads => Ok(()),
            Err(error) => Err(RunError::Usage(format!("{} threads can't be started: {error}", self.threads))),
            Ok(()) => Ok(()),
        }
    }

    /// Settles the device: for `auto`, the first GPU where it can be used, else the CPU, with the reason noted.
    pub fn choose_device(&mut self, choice: DeviceChoice) {
        (self.device, self.device_note) = (choice, None);
        if choice != DeviceChoice::Auto {
            return;
        }
        self.device = DeviceChoice::Cpu;
        if self.kernels != Kernels::Native {
            return;
        }
        match mcpipe_cuda::doctor::usable(0) {
            Ok(_) => self.device = DeviceChoice::Cuda(0),
            Err(e @ CudaError::Unavailable(_)) => self.device_note = Some(e.to_string()),
            // A GPU that answers and then fails: told when it is checked.
            Err(_) => self.device = DeviceChoice::Cuda(0),
        }
    }

    /// Refuses a GPU that was asked for by name and can't be used, before anything starts.
    ///
    /// # Errors
    /// What is missing.
    pub fn check_device(&self) -> Result<(), RunError> {
        let DeviceChoice::Cuda(index) = self.device else { return Ok(()) };
        let refuse = |reason: String| RunError::Usage(format!("the device `{}` can't be used: {reason}", self.device));
        if self.kernels != Kernels::Native {
            return Err(refuse("`--kernels reference` is for the CPU".into()));
        }
        mcpipe_cuda::doctor::usable(index).map(drop).map_err(|e| refuse(e.to_string()))
    }

    /// Whether it is a GPU.
    pub fn on_gpu(&self) -> bool {
        !matches!(self.device, DeviceChoice::Auto | DeviceChoice::Cpu)
    }

    /// What runs graphs, for the calling thread.
    ///
    /// # Errors
    /// A GPU that can't be used.
    pub fn compute(&self) -> Result<Compute, RunError> {
        open(self.device, self.kernels)
    }

    /// The word for the kernels in hashes and lock files.
    pub fn kernels_id(&self) -> &'static str {
        match (self.device, self.kernels) {
            (DeviceChoice::Auto | DeviceChoice::Cpu, Kernels::Native) => "native",
            (DeviceChoice::Auto | DeviceChoice::Cpu, Kernels::Reference) => "reference",
            _ => "cuda",
        }
    }
}

/// What `device` names, for the calling thread.
///
/// # Errors
/// A GPU that can't be used.
pub fn open(device: DeviceChoice, kernels: Kernels) -> Result<Compute, RunError> {
    Ok(Compute::open(device, kernels).map_err(mcpipe_train::TrainError::from)?.0)
}
