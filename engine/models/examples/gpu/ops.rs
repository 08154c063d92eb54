//! Single ops: how near memory-bound ones come to the copy rate.

use std::sync::Arc;

use mcpipe_cuda::{Buffer, Cuda, Device, Element, Gradients, Parameters, Precision};
use mcpipe_graph::{
    Activation, BatchNormArgs, ConvArgs, Distance, Dtype, Executor, Feed, GraphBuilder, GraphError, Init, Layout, Mode,
    ParamStore, Part, Path, Tensor,
};

use crate::{Failure, median};

/// Bytes read and written a second by a copy of 4 GiB, and FLOP/s of a large bf16 product.
pub fn ceilings(device: &Device) -> Result<(), Failure> {
    let copy = copy_rate(device)?;
    let n = 8192;
    let matrix = |seed| -> Result<Buffer, Failure> {
        let buffer = Buffer::new(device.alloc(2 * n * n)?);
        let values = Init::Normal(1.0).sample(seed, "matrix", &[n * n]);
        let narrow: Vec<u16> = values.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
        device.upload(&narrow, buffer.view(n * n, Element::Bf16))?;
        Ok(buffer)
    };
    let (a, b, d) = (matrix(0)?, matrix(1)?, matrix(2)?);
    let [a, b, d] = [&a, &b, &d].map(|m| m.view(n * n, Element::Bf16));
    let seconds = median(device, 15, || Ok(device.matmul([n, n, n], a, b, d)?))?;
    let flops = 2.0 * (n as f64).powi(3) / seconds;
    println!(r#"{{"case": "ceilings", "copy_TBps": {:.3}, "matmul_TFLOPs": {:.1}}}"#, copy / 1e12, flops / 1e12);
    Ok(())
}

/// The faster of the driver's copy and of an element-wise kernel's.
fn copy_rate(device: &Device) -> Result<f64, Failure> {
    let bytes = 2usize << 30;
    let (from, to) = (Buffer::new(device.alloc(bytes)?), Buffer::new(device.alloc(bytes)?));
    device.fill(from.view(bytes, Element::U8), 1)?;
    let driver = median(device, 15, || Ok(device.copy(from.view(bytes, Element::U8), to.view(bytes, Element::U8))?))?;
    let (mut backend, mut to) = (Cuda::new(device.clone(), Precision::F32), to);
    let kernel = median(device, 15, || {
        let part = Part { buffer: &from, dtype: Dtype::F32, start: 0, len: bytes / 4 };
        mcpipe_graph::Backend::copy(&mut backend, part, &mut to, Dtype::F32, 0, false);
        Ok(())
    })?;
    Ok(2.0 * bytes as f64 / driver.min(kernel))
}

type Build = fn(&mut GraphBuilder, &[Tensor]) -> Result<Tensor, GraphError>;

/// Name, inputs' shapes, graph of one op.
const OPS: &[(&str, &[&[usize]], Build)] = &[
    ("batch_norm_silu 256x56x56x96", &[&[256, 56, 56, 96]], |g, x| {
        g.batch_norm(&Path::new("n"), &x[0], BatchNormArgs::new(Activation::Silu))
    }),
    ("batch_norm 256x112x112x64", &[&[256, 112, 112, 64]], |g, x| {
        g.batch_norm(&Path::new("n"), &x[0], BatchNormArgs::new(Activation::Identity))
    }),
    ("batch_norm_silu 256x14x14x672", &[&[256, 14, 14, 672]], |g, x| {
        g.batch_norm(&Path::new("n"), &x[0], BatchNormArgs::new(Activation::Silu))
    }),
    ("batch_norm_silu 256x7x7x960", &[&[256, 7, 7, 960]], |g, x| {
        g.batch_norm(&Path::new("n"), &x[0], BatchNormArgs::new(Activation::Silu))
    }),
    ("layer_norm 256x3136x96", &[&[256, 3136, 96]], |g, x| g.layer_norm(&Path::new("n"), &x[0], 1e-6)),
    ("layer_norm 256x784x192", &[&[256, 784, 192]], |g, x| g.layer_norm(&Path::new("n"), &x[0], 1e-6)),
    ("layer_norm 256x196x384", &[&[256, 196, 384]], |g, x| g.layer_norm(&Path::new("n"), &x[0], 1e-6)),
    ("layer_norm 256x196x768", &[&[256, 196, 768]], |g, x| g.layer_norm(&Path::new("n"), &x[0], 1e-5)),
    ("layer_norm 1024x256x144", &[&[1024, 256, 144]], |g, x| g.layer_norm(&Path::new("n"), &x[0], 1e-5)),
    ("silu 256x56x56x96", &[&[256, 56, 56, 96]], |g, x| Ok(g.activation(&x[0], Activation::Silu))),
    ("gelu 256x56x56x384", &[&[256, 56, 56, 384]], |g, x| Ok(g.activation(&x[0], Activation::Gelu))),
    ("add 256x56x56x96", &[&[256, 56, 56, 96], &[256, 56, 56, 96]], |g, x| g.mul(&x[0], &x[1])),
    ("scale_channels 256x56x56x96", &[&[256, 56, 56, 96], &[256, 96]], |g, x| g.scale_channels(&x[0], &x[1])),
    ("global_avg_pool 256x28x28x240", &[&[256, 28, 28, 240]], |g, x| g.global_avg_pool(&x[0])),
    ("unfold 256x32x32x144", &[&[256, 32, 32, 144]], |g, x| g.unfold_patches(&x[0], [2, 2])),
    ("depthwise3 256x112x112x64", &[&[256, 112, 112, 64]], |g, x| {
        g.conv2d(&Path::new("c"), &x[0], ConvArgs::new(64, 3).groups(64))
    }),
    ("depthwise3s2 256x112x112x96", &[&[256, 112, 112, 96]], |g, x| {
        g.conv2d(&Path::new("c"), &x[0], ConvArgs::new(96, 3).groups(96).stride(2))
    }),
    ("depthwise3 256x14x14x480", &[&[256, 14, 14, 480]], |g, x| {
        g.conv2d(&Path::new("c"), &x[0], ConvArgs::new(480, 3).groups(480))
    }),
    ("depthwise3 256x56x56x144", &[&[256, 56, 56, 144]], |g, x| {
        g.conv2d(&Path::new("c"), &x[0], ConvArgs::new(144, 3).groups(144))
    }),
    ("depthwise5s2 256x56x56x144", &[&[256, 56, 56, 144]], |g, x| {
        g.conv2d(&Path::new("c"), &x[0], ConvArgs::new(144, 5).groups(144).stride(2))
    }),
    ("depthwise5 256x7x7x1152", &[&[256, 7, 7, 1152]], |g, x| {
        g.conv2d(&Path::new("c"), &x[0], ConvArgs::new(1152, 5).groups(1152))
    }),
    ("depthwise5 256x28x28x240", &[&[256, 28, 28, 240]], |g, x| {
        g.conv2d(&Path::new("c"), &x[0], ConvArgs::new(240, 5).groups(240))
    }),
    ("depthwise5 256x14x14x672", &[&[256, 14, 14, 672]], |g, x| {
        g.conv2d(&Path::new("c"), &x[0], ConvArgs::new(672, 5).groups(672))
    }),
    ("depthwise7 256x56x56x96", &[&[256, 56, 56, 96]], |g, x| {
        g.conv2d(&Path::new("c"), &x[0], ConvArgs { bias: true, ..ConvArgs::new(96, 7).groups(96) })
    }),
    ("depthwise7 256x28x28x192", &[&[256, 28, 28, 192]], |g, x| {
        g.conv2d(&Path::new("c"), &x[0], ConvArgs { bias: true, ..ConvArgs::new(192, 7).groups(192) })
    }),
    ("depthwise7 256x7x7x768", &[&[256, 7, 7, 768]], |g, x| {
        g.conv2d(&Path::new("c"), &x[0], ConvArgs { bias: true, ..ConvArgs::new(768, 7).groups(768) })
    }),
    ("depthwise7 256x14x14x384", &[&[256, 14, 14, 384]], |g, x| {
        g.conv2d(&Path::new("c"), &x[0], ConvArgs { bias: true, ..ConvArgs::new(384, 7).groups(384) })
    }),
    ("row_loss 8192x768", &[&[8192, 768], &[8192, 768]], |g, x| g.row_loss(Distance::Mse, &x[0], &x[1], [true, false])),
    ("transfer_loss 256x14x14x768", &[&[256, 14, 14, 768], &[256, 196]], |g, x| g.transfer_loss(&x[0], &x[1])),
    ("map_loss 256x197x12x64", &[&[256, 197, 2304], &[256, 197, 197]], |g, x| g.map_loss(&x[0], 12, &x[1])),
    ("pixel_loss_mse 256x14x14x768", &[&[256, 14, 14, 768], &[256, 14, 14, 768]], |g, x| {
        let bias = g.param(&Path::new("b"), &[768], Init::Constant(0.1))?;
        g.pixel_loss(Distance::Mse, &x[0], &x[1], &bias)
    }),
    ("pixel_loss_cosine 256x14x14x768", &[&[256, 14, 14, 768], &[256, 14, 14, 768]], |g, x| {
        let bias = g.param(&Path::new("b"), &[768], Init::Constant(0.1))?;
        g.pixel_loss(Distance::Cosine, &x[0], &x[1], &bias)
    }),
];

/// Forward and VJP of each op whose name contains `wanted`, in bf16: seconds, bytes that must move (each operand once), share of the copy rate.
pub fn all(device: &Device, wanted: &str) -> Result<(), Failure> {
    let copy = copy_rate(device)?;
    println!(r#"{{"case": "copy", "TBps": {:.3}}}"#, copy / 1e12);
    for (name, inputs, build) in OPS.iter().filter(|(name, ..)| name.contains(wanted)) {
        if let Err(e) = one(device, copy, name, inputs, *build) {
            println!(r#"{{"case": "op {name}", "error": {:?}}}"#, e.to_string());
        }
    }
    Ok(())
}

/// Normal values; they repeat, which saves the host's time.
fn noise(seed: u64, n: usize) -> Vec<f32> {
    Init::Normal(1.0).sample(seed, "x", &[n.min((1 << 22) - 3)]).into_iter().cycle().take(n).collect()
}

/// One op's times and the bytes that must move.
struct Times {
    forward: f64,
    backward: f64,
    forward_bytes: usize,
    backward_bytes: usize,
    /// Bytes of the first input and of the value.
    sizes: [usize; 2],
}

/// With `wanted`, gradients of the inputs too.
fn times(device: &Device, inputs: &[&[usize]], build: Build, wanted: bool) -> Result<Times, Failure> {
    let mut g = GraphBuilder::new(true);
    let x: Vec<Tensor> = inputs
        .iter()
        .enumerate()
        .map(|(i, s)| match wanted {
            true => g.input_with_grad(format!("x{i}"), s),
            false => g.input(format!("x{i}"), s),
        })
        .collect();
    let y = build(&mut g, &x)?;
    g.output("y", &y);
    let graph = Arc::new(g.finish());
    let mut store = ParamStore::default();
    store.init(&graph, 0)?;
    let params = Parameters::upload(device, &store)?;
    let mut grads = Gradients::zeros_like(device, &store)?;
    let backend = Cuda::new(device.clone(), Precision::Bf16);
    let size = |t: &Tensor| t.numel() * backend.dtype(&graph, t.id()).bytes();
    let (out, ins): (usize, Vec<usize>) = (size(&y), x.iter().map(size).collect());
    let op = graph.node(y.id()).op().ok_or("the output is no op")?.clone();
    let read: usize =
        ins.iter().enumerate().filter(|(i, _)| backend.needs(&op).inputs >> i & 1 == 1).map(|(_, b)| b).sum();
    // What must move at least; batch norm's statistics want a second reading of what they normalise.
    let twice = matches!(op, mcpipe_graph::Op::BatchNorm { .. });
    let forward_bytes = ins.iter().sum::<usize>() + out + if twice { ins[0] } else { 0 };
    let written: usize = ins.iter().enumerate().filter(|(i, _)| op.differentiable(*i)).map(|(_, b)| b).sum();
    let backward_bytes = read + out + written + if twice { ins[0] + out } else { 0 };
    let mut executor = Executor::new(Arc::clone(&graph), &params.store, Mode::Train, backend)?;
    for (i, shape) in inputs.iter().enumerate() {
        let values = noise(i as u64, shape.iter().product());
        let feeds: Vec<(String, Feed<'_>)> = (0..inputs.len())
            .map(|j| (format!("x{j}"), if i == j { Feed::F32(&values) } else { Feed::Held }))
            .collect();
        let feeds: Vec<(&str, Feed<'_>)> = feeds.iter().map(|(n, f)| (n.as_str(), *f)).collect();
        executor.feed(&feeds)?;
    }
    let forward = median(device, 11, || Ok(executor.walk(&params.store, &mut |_, _| {})?))?;
    let seed = Buffer::new(device.alloc(out.max(4))?);
    let noise = noise(9, y.numel());
    let dtype = Layout::dtype(executor.backend(), &graph, y.id());
    match dtype {
        Dtype::F32 => device.upload(&noise, seed.view(y.numel(), Element::F32))?,
        Dtype::Bf16 => {
            let narrow: Vec<u16> = noise.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
            device.upload(&narrow, seed.view(y.numel(), Element::Bf16))?;
        }
    }
    let part = || Part { buffer: &seed, dtype, start: 0, len: y.numel() };
    let seeding = median(device, 11, || {
        executor.clear_seeds();
        Ok(executor.seed(&y, part())?)
    })?;
    let backward = median(device, 11, || {
        executor.clear_seeds();
        executor.seed(&y, part())?;
        Ok(executor.walk_backward(&params.store, &mut grads.grads)?)
    })? - seeding;
    Ok(Times { forward, backward, forward_bytes, backward_bytes, sizes: [ins[0], out] })
}

fn one(device: &Device, copy: f64, name: &str, inputs: &[&[usize]], build: Build) -> Result<(), Failure> {
    let t = times(device, inputs, build, true)?;
    let share = |bytes: usize, seconds: f64| 100.0 * bytes as f64 / seconds / copy;
    let mut parts = String::new();
    if name.starts_with("depthwise") {
        // Two kernels, each with two images to read or write.
        let filter = times(device, inputs, build, false)?.backward;
        let bytes = t.sizes.iter().sum();
        parts = format!(
            r#", "data_share": {:.0}, "filter_share": {:.0}"#,
            share(bytes, t.backward - filter),
            share(bytes, filter)
        );
    }
    println!(
        r#"{{"case": "op {name}", "forward_us": {:.1}, "forward_share": {:.0}, "vjp_us": {:.1}, "vjp_share": {:.0}{parts}}}"#,
        t.forward * 1e6,
        share(t.forward_bytes, t.forward),
        t.backward * 1e6,
        share(t.backward_bytes, t.backward)
    );
    Ok(())
}
