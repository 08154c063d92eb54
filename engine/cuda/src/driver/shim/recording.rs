//! Work that is recorded and done again later, as a GPU's graphs do it: with the addresses, sizes and scalars that it had.

use mcpipe_cpu::conv::Conv2d;

use super::{Shim, failed};
use crate::driver::{ConvPass, Driver, Product};
use crate::error::CudaError;
use crate::launch::{Arguments, Kernel, Shape};
use crate::view::{Address, View};

/// One call.
#[derive(Clone)]
pub(super) enum Job {
    Copy(Address, Address, usize),
    Fill(Address, u8, usize),
    Launch(Kernel, Shape, Box<Arguments>),
    Product(Product, View, View, View, Option<View>),
    Convolution(ConvPass, Conv2d, [View; 3], bool),
}

impl Job {
    fn run(self, on: &Shim) -> Result<(), CudaError> {
        match self {
            Job::Copy(from, to, bytes) => on.copy(from, to, bytes),
            Job::Fill(to, byte, bytes) => on.fill(to, byte, bytes),
            Job::Launch(kernel, shape, arguments) => on.launch(kernel, shape, *arguments),
            Job::Product(p, a, b, d, bias) => on.product(&p, a, b, d, bias),
            Job::Convolution(pass, d, [x, w, y], tf32) => on.convolution(pass, &d, x, w, y, tf32),
        }
    }
}

impl Shim {
    /// Whether `job` was recorded, and so is not to be done.
    pub(super) fn records(&self, job: impl FnOnce() -> Job) -> bool {
        match &mut *self.recording.borrow_mut() {
            Some(jobs) => {
                jobs.push(job());
                true
            }
            None => false,
        }
    }

    /// Refuses what a GPU can't record.
    pub(super) fn not_recorded(&self, call: &str) -> Result<(), CudaError> {
        match &*self.recording.borrow() {
            Some(_) => Err(failed(call, "it can't be recorded")),
            None => Ok(()),
        }
    }

    pub(super) fn begin(&self) {
        *self.recording.borrow_mut() = Some(Vec::new());
    }

    pub(super) fn end(&self) -> Result<usize, CudaError> {
        let jobs = self.recording.borrow_mut().take().ok_or_else(|| failed("end_capture", "nothing is recorded"))?;
        let mut recordings = self.recordings.borrow_mut();
        recordings.push(jobs);
        Ok(recordings.len() - 1)
    }

    pub(super) fn again(&self, id: usize) -> Result<(), CudaError> {
        let jobs = self.recordings.borrow().get(id).cloned();
        jobs.ok_or_else(|| failed("replay", format!("no recording {id}")))?.into_iter().try_for_each(|j| j.run(self))
    }
}
