//! Bytes that travel to the device while it works: copied from pinned memory on a stream of their own.

use std::ptr::NonNull;
use std::rc::Rc;

use crate::device::{Device, Memory};
use crate::driver::Driver;
use crate::error::CudaError;
use crate::view::{Element, View};

/// Pinned memory of the host and as much of the device. One of each is enough: the next bytes may be written and sent as
/// soon as the last were read, which is at the beginning of the work on what was made of them.
#[derive(Debug)]
pub struct Staging {
    driver: Rc<dyn Driver>,
    host: NonNull<u8>,
    bytes: usize,
    memory: Memory,
}

impl Staging {
    /// Room for `bytes` on both sides.
    ///
    /// # Errors
    /// Memory that is refused.
    pub fn new(device: &Device, bytes: usize) -> Result<Self, CudaError> {
        let bytes = bytes.max(1);
        let memory = device.alloc(bytes)?;
        let driver = Rc::clone(device.driver());
        let host = driver.pin(bytes)?;
        Ok(Staging { driver, host, bytes, memory })
    }

    /// Its size.
    pub fn bytes(&self) -> usize {
        self.bytes
    }

    /// Takes what `write` writes and sends it. Waits for what was sent before; does not wait for the device's work, but for
    /// that in [`read`](Self::read) the copy does.
    ///
    /// # Errors
    /// What the driver refuses.
    pub fn send(&mut self, write: impl FnOnce(&mut [u8])) -> Result<(), CudaError> {
        self.driver.wait_beside()?;
        // SAFETY: the memory has this size and was written when it was pinned; the device no longer reads it.
        let host = unsafe { std::slice::from_raw_parts_mut(self.host.as_ptr(), self.bytes) };
        write(host);
        self.driver.upload_beside(host, self.memory.view(self.bytes, Element::U8).address)
    }

    /// Asks for work that reads what was sent, in its place on the device; the work begins when it is there.
    ///
    /// # Errors
    /// What `work` gives, or the driver refuses.
    pub fn read(&self, work: impl FnOnce(View) -> Result<(), CudaError>) -> Result<(), CudaError> {
        self.driver.join_beside()?;
        let asked = work(self.memory.view(self.bytes, Element::U8));
        // Also after a failure: a part of it may run.
        self.driver.open_beside()?;
        asked
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        // A device that failed no longer reads it.
        let _ = self.driver.wait_beside();
        self.driver.unpin(self.host, self.bytes);
    }
}

#[cfg(all(test, feature = "shim"))]
mod tests {
    use super::*;

    #[test]
    fn what_is_sent_is_read() {
        if std::env::var_os("MCPIPE_SHIM").is_none() {
            return;
        }
        let device = Device::shim().expect("the library of kernels loads");
        let mut staging = Staging::new(&device, 1000).expect("memory");
        for round in 0..3u8 {
            staging.send(|bytes| bytes.fill(round)).expect("a copy");
            let mut seen = Vec::new();
            staging
                .read(|view| {
                    seen = device.download(view)?;
                    Ok(())
                })
                .expect("what was sent");
            assert!(seen.len() == 1000 && seen.iter().all(|v| *v == f32::from(round)));
        }
    }
}
