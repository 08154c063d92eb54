//! The GPU driver, through cudarc.
