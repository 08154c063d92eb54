//! The distillation levels' fused losses against the CPU's kernels: by themselves, and made of the plain ops that the levels
//! add, which the CUDA backend fuses and the CPU runs one by one.

#[path = "../../graph/tests/support/mod.rs"]
mod support;

use mcpipe_cuda::{Cuda, Device, Gradients, Parameters, Precision};
use mcpipe_graph::{Activation, ConvArgs, Cpu, Distance, Grads, GraphBuilder, GraphError, Init, Kernels, Tensor};
use support::{Built, CASES, Case, case, difference, noise, norm, p};

/// Targets `[images, N, N]` for maps of qkv `[B, N, 3·width]`: one head's, far steeper.
fn maps(g: &mut GraphBuilder, qkv: &Tensor, images: usize) -> Result<Tensor, GraphError> {
    let (batch, n) = (qkv.shape()[0], qkv.shape()[1]);
    let x = g.scale(qkv, 3.0);
    let maps = g.attention_map(&x, 1, false)?;
    let maps = g.reshape(&maps, &[1, batch, n * n])?;
    let own = g.slice_rows(&maps, 0, images)?;
    g.reshape(&own, &[images, n, n])
}

/// What `mean_heads` of the attention level adds.
fn mean_heads(g: &mut GraphBuilder, qkv: &Tensor, heads: usize, images: usize) -> Result<Tensor, GraphError> {
    let (batch, n) = (qkv.shape()[0], qkv.shape()[1]);
    let maps = g.attention_map(qkv, heads, false)?;
    let flat = g.reshape(&maps, &[images, batch / images * heads, n * n])?;
    let mean = g.global_avg_pool(&flat)?;
    g.reshape(&mean, &[images, n, n])
}

const LEVELS: &[Case] = &[
    case("rows mse 129x127", &[&[129, 127], &[129, 127]], |g, x| g.row_loss(Distance::Mse, &x[0], &x[1], [true, true])),
    case("rows mse 3x1000", &[&[3, 1000], &[3, 1000]], |g, x| g.row_loss(Distance::Mse, &x[0], &x[1], [false, true])),
    case("rows mse 4100x8", &[&[4100, 8], &[4100, 8]], |g, x| g.row_loss(Distance::Mse, &x[0], &x[1], [true, false])),
    case("rows mse 5x4104", &[&[5, 4104], &[5, 4104]], |g, x| g.row_loss(Distance::Mse, &x[0], &x[1], [true, false])),
    case("rows mse of themselves", &[&[7, 24]], |g, x| {
        let y = g.scale(&x[0], 2.0);
        let z = g.add(&y, &x[0])?;
        let z = g.mul(&z, &x[0])?;
        g.row_loss(Distance::Mse, &z, &x[0], [true, true])
    }),
    case("rows cosine 129x24", &[&[3, 43, 24], &[3, 43, 24]], |g, x| {
        g.row_loss(Distance::Cosine, &x[0], &x[1], [true, false])
    }),
    case("rows cosine 3x1000", &[&[3, 1000], &[3, 1000]], |g, x| {
        g.row_loss(Distance::Cosine, &x[0], &x[1], [false, false])
    }),
    case("transfer 49x64", &[&[3, 7, 7, 64]], |g, x| {
        let y = g.activation(&x[0], Activation::Gelu);
        let target = g.attention_transfer_map(&y)?;
        g.transfer_loss(&x[0], &target)
    }),
    case("transfer 300x5, accumulated", &[&[2, 30, 10, 5]], |g, x| {
        let y = g.activation(&x[0], Activation::Gelu);
        let target = g.attention_transfer_map(&y)?;
        let (a, b) = (g.transfer_loss(&x[0], &target)?, g.mse(&x[0], &y)?);
        g.add(&a, &b)
    }),
    case("transfer 6x1030", &[&[2, 3, 2, 1030]], |g, x| {
        let seed = g.input("target", &[1, 20]);
        let target = g.frozen(|g| g.linear(&p("t"), &seed, 12, true, Init::FanInUniform))?;
        let target = g.reshape(&target, &[2, 6])?;
        g.transfer_loss(&x[0], &target)
    }),
    case("maps of 50 tokens", &[&[2, 50, 96]], |g, x| {
        let target = maps(g, &x[0], 2)?;
        g.map_loss(&x[0], 4, &target)
    }),
    case("maps of 17 tokens, 3 sequences an image", &[&[6, 17, 144]], |g, x| {
        let target = maps(g, &x[0], 2)?;
        g.map_loss(&x[0], 3, &target)
    }),
    case("maps of 197 tokens, accumulated", &[&[1, 197, 120]], |g, x| {
        let target = maps(g, &x[0], 1)?;
        let (loss, y) = (g.map_loss(&x[0], 1, &target)?, g.activation(&x[0], Activation::Silu));
        let other = g.mse(&y, &x[0])?;
        g.add(&loss, &other)
    }),
    case("maps of 128 tokens, heads of 96", &[&[2, 128, 288]], |g, x| {
        let target = maps(g, &x[0], 2)?;
        g.map_loss(&x[0], 1, &target)
    }),
    case("maps of ragged heads", &[&[2, 65, 45]], |g, x| {
        let target = maps(g, &x[0], 2)?;
        g.map_loss(&x[0], 3, &target)
    }),
    case("maps of one token", &[&[4, 1, 24]], |g, x| {
        let target = maps(g, &x[0], 4)?;
        let (loss, y) = (g.map_loss(&x[0], 2, &target)?, g.activation(&x[0], Activation::Silu));
        let other = g.mse(&y, &x[0])?;
        g.add(&loss, &other)
    }),
    case("pixels mse 147x96", &[&[3, 7, 7, 96], &[96]], |g, x| {
        let target = g.activation(&x[0], Activation::Gelu);
        g.pixel_loss(Distance::Mse, &x[0], &target, &x[1])
    }),
    case("pixels mse 4000x13", &[&[10, 20, 20, 13], &[13]], |g, x| {
        let target = g.activation(&x[0], Activation::Gelu);
        g.pixel_loss(Distance::Mse, &x[0], &target, &x[1])
    }),
    case("pixels cosine 147x96", &[&[3, 7, 7, 96], &[96]], |g, x| {
        let target = g.activation(&x[0], Activation::Gelu);
        g.pixel_loss(Distance::Cosine, &x[0], &target, &x[1])
    }),
    case("pixels cosine 300x259", &[&[3, 10, 10, 259], &[259]], |g, x| {
        let target = g.activation(&x[0], Activation::Gelu);
        g.pixel_loss(Distance::Cosine, &x[0], &target, &x[1])
    }),
    case("the projection level", &[&[37, 48]], |g, x| {
        let own = g.l2_normalize(&x[0]);
        let y = g.linear(&p("r"), &own, 40, false, Init::FanInUniform)?;
        let y = g.l2_normalize(&y);
        let seed = g.input("target", &[1, 20]);
        let target = g.frozen(|g| g.linear(&p("t"), &seed, 37 * 40, true, Init::FanInUniform))?;
        let target = g.reshape(&target, &[37, 40])?;
        g.mse(&y, &target)
    }),
    case("the features level", &[&[3, 9, 9, 40]], |g, x| {
        let y = g.linear(&p("r"), &x[0], 20, true, Init::FanInUniform)?;
        let seed = g.input("target", &[1, 20]);
        let target = g.frozen(|g| g.linear(&p("t"), &seed, 3 * 81 * 20, true, Init::FanInUniform))?;
        let target = g.reshape(&target, &[3, 9, 9, 20])?;
        g.cosine(&y, &target)
    }),
    case("the features level, a convolution", &[&[3, 9, 9, 40]], |g, x| {
        let args = ConvArgs { bias: true, ..ConvArgs::new(20, 1) };
        let y = g.conv2d(&p("r"), &x[0], args)?;
        let seed = g.input("target", &[1, 20]);
        let target = g.frozen(|g| g.linear(&p("t"), &seed, 3 * 81 * 20, true, Init::FanInUniform))?;
        let target = g.reshape(&target, &[3, 9, 9, 20])?;
        g.mse(&target, &y)
    }),
    case("the attention level between maps", &[&[4, 7, 7, 24]], |g, x| {
        let map = g.attention_transfer_map(&x[0])?;
        let seed = g.input("target", &[1, 20]);
        let target = g.frozen(|g| g.linear(&p("t"), &seed, 4 * 49, true, Init::FanInUniform))?;
        let target = g.reshape(&target, &[4, 49])?;
        g.mse(&map, &target)
    }),
    case("the attention level between probabilities", &[&[4, 33, 96]], |g, x| {
        let q = mean_heads(g, &x[0], 2, 2)?;
        let target = maps(g, &x[0], 2)?;
        g.kl(&target, &q)
    }),
];

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

/// Largest errors of value and gradients, relative to each one's norm; NaN stays.
fn compare(case: &Case, device: &Device, precision: Precision) -> [f64; 2] {
    let built = Built::new(case);
    let seed = noise(17, built.numel());
    let mut grads = Grads::zeros_like(&built.store);
    let (expected, mut reference) = built.run(&built.store, Cpu::new(Kernels::Native), &seed, &mut grads);
    reference.extend(grads.all().iter().cloned());
    let params = Parameters::upload(device, &built.store).expect("memory for the parameters");
    let mut grads = Gradients::zeros_like(device, &built.store).expect("memory for the gradients");
    let backend = Cuda::new(device.clone(), precision);
    let (value, mut own) = built.run(&params.store, backend, &seed, &mut grads.grads);
    let download = |b: &mcpipe_cuda::Buffer| {
        device.download(b.view(b.bytes() / 4, mcpipe_cuda::Element::F32)).expect("gradients come back")
    };
    own.extend(grads.grads.all().iter().map(download));
    assert_eq!(value.len(), expected.len(), "{}", case.name);
    let forward = difference(&value, &expected) / (norm(&expected) + 1e-6);
    let backward = own.iter().zip(&reference).map(|(a, b)| difference(a, b) / (norm(b) + 1e-6));
    [forward, backward.fold(0.0, |m, e| if e > m || e.is_nan() { e } else { m })]
}

fn check(precision: Precision, bars: [f64; 2]) {
    let Some(device) = device() else { return };
    let (mut failed, mut worst) = (Vec::new(), [0.0f64; 2]);
    let small = CASES.iter().filter(|c| c.name.contains("_loss_") || c.name.ends_with("_loss"));
    for case in small.filter(|c| c.name != "sigmoid_loss").chain(LEVELS) {
        let run = || compare(case, &device, precision);
        match std::panic::catch_unwind(std::panic::AssertUnwindSafe(run)) {
            Ok(errors) => {
                if !(errors[0] <= bars[0] && errors[1] <= bars[1]) {
                    failed.push(format!("{}: value {:.2e}, gradient {:.2e}", case.name, errors[0], errors[1]));
                }
                worst = [worst[0].max(errors[0]), worst[1].max(errors[1])];
            }
            Err(e) => failed.push(format!("{}: {:?}", case.name, e.downcast_ref::<String>())),
        }
    }
    eprintln!("{precision:?}: worst value {:.1e}, gradient {:.1e}", worst[0], worst[1]);
    assert!(failed.is_empty(), "{} cases:\n{}", failed.len(), failed.join("\n"));
}

#[test]
fn levels_match_the_cpu_in_f32() {
    check(Precision::F32, [1e-5, 1e-5]);
}

#[test]
fn levels_match_the_cpu_in_bf16() {
    check(Precision::Bf16, [1e-2, 1e-2]);
}
