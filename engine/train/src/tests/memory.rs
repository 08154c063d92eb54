//! A device whose memory does not suffice; with the feature `shim` and the library that `MCPIPE_SHIM` names, else unseen.

use super::recompute::Deep;
use super::*;

/// A step on a device of so many bytes; none without the library.
fn step(total: usize, setup: TrainSetup) -> Option<Result<(), TrainError>> {
    std::env::var_os("MCPIPE_SHIM")?;
    let compute = Compute::Cuda(mcpipe_cuda::Device::shim_of(total).unwrap().in_one_arena());
    let batch = Random::new(setup.training.batch_size, false).batch(0);
    Some(Trainer::new(TrainSetup { compute, ..setup }).and_then(|mut t| t.one(&batch).map(drop)))
}

fn shallow() -> TrainSetup {
    setup(conv(6, false), training(1, 64, 1))
}

fn deep(recompute: bool) -> TrainSetup {
    setup(Arc::new(Deep { blocks: 6 }), Training { recompute, ..training(1, 16, 1) })
}

#[test]
fn full_memory_names_what_fits() {
    let cases = [
        (
            4_000,
            shallow(),
            "memory at `the optimizer's state` failed: out of GPU memory: 1536 bytes wanted, 928 bytes of 4000 bytes free; \
             the step needs 256212 bytes by the plan, and there is room for 3600 bytes; no smaller batch fits: another model \
             or a larger GPU is needed",
        ),
        (
            200_000,
            shallow(),
            "memory at `the activations of the student` failed: out of GPU memory: 222720 bytes wanted, 193856 bytes of \
             200000 bytes free; the step needs 256212 bytes by the plan, and there is room for 180000 bytes; what fits: \
             `accumulate = 4` with 156756 bytes for the same steps, or `batch_size = 43` with 178460 bytes",
        ),
        // By the plan it fits, but for an op's memory on the way.
        (
            500_000,
            deep(false),
            "conv2d at `visual.0.conv` failed: out of GPU memory: 40960 bytes wanted, 15239 bytes of 500000 bytes free; the \
             step needs 391988 bytes by the plan, and there is room for 450000 bytes; what fits: `recompute = true` with \
             162612 bytes for the same steps, or `accumulate = 2` with 252500 bytes for the same steps, or `batch_size = 11` \
             with 290164 bytes",
        ),
    ];
    for (bytes, setup, expected) in cases {
        let Some(ran) = step(bytes, setup) else { return };
        let e = ran.expect_err("too little memory");
        assert!(matches!(e, TrainError::OutOfMemory { .. }), "{e}");
        assert_eq!(e.to_string(), expected);
    }
    // What was advised runs.
    step(500_000, deep(true)).unwrap().unwrap();
    step(400_000, deep(true)).unwrap().unwrap();
}
