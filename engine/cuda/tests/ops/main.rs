//! Every op on the CUDA backend against dfdx on the CPU: the cases that the CPU backend is tested by, and larger, ragged
//! ones. Runs on a GPU where there is one and `MCPIPE_TEST_GPU` is set; with the feature `shim` on the CPU, on the library
//! that `tests/kernels/run` builds.

mod dense;
#[path = "../../../graph/tests/support/mod.rs"]
mod support;

use mcpipe_cuda::{Cuda, Device, Gradients, Parameters, Precision};
use mcpipe_graph::{Cpu, Grads, Kernels};
use support::{Built, CASES, Case, Found, difference, noise, norm};

fn device() -> Option<Device> {
    #[cfg(feature = "shim")]
    if std::env::var_os("MCPIPE_SHIM").is_some() {
        return Some(Device::shim().expect("the library of kernels loads"));
    }
    if std::env::var_os("MCPIPE_TEST_GPU").is_some() {
        return Some(Device::open(0).expect("a GPU answers"));
    }
    eprintln!("skipped: neither MCPIPE_SHIM nor MCPIPE_TEST_GPU is set");
    None
}

fn on_cpu(built: &Built, seed: &[f32]) -> Found {
    let mut grads = Grads::zeros_like(&built.store);
    let (value, mut found) = built.run(&built.store, Cpu::new(Kernels::Reference), seed, &mut grads);
    found.extend(grads.all().iter().cloned());
    (value, found)
}

fn on_cuda(built: &Built, device: &Device, precision: Precision, seed: &[f32]) -> Found {
    let params = Parameters::upload(device, &built.store).expect("memory for the parameters");
    let mut grads = Gradients::zeros_like(device, &built.store).expect("memory for the gradients");
    let backend = Cuda::new(device.clone(), precision);
    let (value, mut found) = built.run(&params.store, backend, seed, &mut grads.grads);
    let download = |b: &mcpipe_cuda::Buffer| {
        device.download(b.view(b.bytes() / 4, mcpipe_cuda::Element::F32)).expect("gradients come back")
    };
    found.extend(grads.grads.all().iter().map(download));
    (value, found)
}

/// Largest errors of value and gradients, relative to each one's norm.
fn compare(case: &Case, device: &Device, precision: Precision) -> [f64; 2] {
    let built = Built::new(case);
    let seed = noise(17, built.numel());
    let (expected, reference) = on_cpu(&built, &seed);
    let (value, own) = on_cuda(&built, device, precision, &seed);
    assert_eq!(value.len(), expected.len(), "{}", case.name);
    let forward = difference(&value, &expected) / (norm(&expected) + 1e-6);
    let backward = own.iter().zip(&reference).map(|(a, b)| difference(a, b) / (norm(b) + 1e-4));
    // NaN stays.
    [forward, backward.fold(0.0, |m, e| if e > m || e.is_nan() { e } else { m })]
}

fn check(cases: &[Case], precision: Precision, bars: [f64; 2]) {
    let Some(device) = device() else { return };
    let mut failed = Vec::new();
    for case in cases {
        let run = || compare(case, &device, precision);
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
            Ok([value, gradient]) if value <= bars[0] && gradient <= bars[1] => {}
            Ok([value, gradient]) => failed.push(format!("{}: value {value:.2e}, gradient {gradient:.2e}", case.name)),
            Err(e) => failed.push(format!("{}: {:?}", case.name, e.downcast_ref::<String>())),
        }
    }
    assert!(failed.is_empty(), "{} of {} cases:\n{}", failed.len(), cases.len(), failed.join("\n"));
}

#[test]
fn small_cases_match_dfdx_in_f32() {
    check(CASES, Precision::F32, [1e-5, 5e-5]);
}

#[test]
fn small_cases_match_dfdx_in_bf16() {
    check(CASES, Precision::Bf16, [1e-2, 3e-2]);
}
