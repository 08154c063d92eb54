//! A device whose memory does not suffice; with the feature `shim` and the library that `MCPIPE_SHIM` names, else unseen.

use super::*;

/// A training on a device of so many bytes, and what it ends with.
#[cfg(feature = "shim")]
fn refused(total: usize, setup: TrainSetup) -> Option<String> {
    std::env::var_os("MCPIPE_SHIM")?;
    let compute = Compute::Cuda(mcpipe_cuda::Device::shim_of(total).unwrap());
    let batch = Random::new(setup.training.batch_size, false).batch(0);
    let ran = Trainer::new(TrainSetup { compute, ..setup }).and_then(|mut t| t.one(&batch).map(drop));
    let e = ran.expect_err("too little memory");
    assert!(matches!(e, TrainError::OutOfMemory { .. }), "{e}");
    Some(e.to_string())
}

#[cfg(feature = "shim")]
#[test]
fn full_memory_names_what_fits() {
    let said = |bytes| refused(bytes, setup(conv(6, false), training(1, 64, 1)));
    let cases = [
        (
            4_000,
            "memory at `the optimizer's state` failed: out of GPU memory: 1536 bytes wanted, 928 bytes of 4000 bytes free; \
             the step needs 271916 bytes by the plan, and there is room for 3600 bytes; no smaller batch fits: another model or \
             a larger GPU is needed",
        ),
        (
            200_000,
            "memory at `the activations of the student` failed: out of GPU memory: 49152 bytes wanted, 20800 bytes of 200000 \
             bytes free; the step needs 271916 bytes by the plan, and there is room for 180000 bytes; what fits: `accumulate = \
             4` with 160556 bytes for the same steps, or `batch_size = 41` with 179128 bytes",
        ),
        (
            256_000,
            "conv2d at `visual.conv` failed: out of GPU memory: 13312 bytes wanted, 554 bytes of 256000 bytes free; the step \
             needs 271916 bytes by the plan, and there is room for 230400 bytes; what fits: `accumulate = 4` with 160556 bytes \
             for the same steps, or `batch_size = 53` with 227520 bytes",
        ),
    ];
    for (bytes, expected) in cases {
        let Some(text) = said(bytes) else { return };
        assert_eq!(text, expected);
    }
}
