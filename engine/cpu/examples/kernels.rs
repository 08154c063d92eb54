//! Speed of the convolution and linear kernels at every layer shape of MobileViT-XXS (128 px, batch 16).
//!
//! `cargo run --release -p mcpipe-cpu --example kernels [-- FILTER]` prints GFLOP/s of the forward pass and of the
//! gradients by data and by weights, and each as a fraction of the rate of a large square matrix product measured
//! just before. `RAYON_NUM_THREADS` sets the thread count, `MCPIPE_SIMD` the instruction set.

use mcpipe_cpu::{
    Conv2d, Gemm, Level, Linear, Workspace, conv2d_backward_data, conv2d_backward_weights, conv2d_forward, gemm,
    linear_backward_data, linear_backward_weights, linear_forward,
};
use std::time::{Duration, Instant};

const BATCH: usize = 16;

enum Layer {
    Conv(Conv2d),
    Linear(Linear),
}

fn conv(px: usize, c_in: usize, c_out: usize, k: usize, stride: usize) -> Layer {
    Layer::Conv(Conv2d { batch: BATCH, h: px, w: px, c_in, c_out, kh: k, kw: k, stride, pad: k / 2, groups: 1 })
}

fn depthwise(px: usize, c: usize, stride: usize) -> Layer {
    let d = Conv2d { batch: BATCH, h: px, w: px, c_in: c, c_out: c, kh: 3, kw: 3, stride, pad: 1, groups: c };
    Layer::Conv(d)
}

/// An inverted residual of expansion 2: 1x1, depthwise 3x3, 1x1.
fn inverted_residual(
    layers: &mut Vec<(String, Layer)>,
    name: &str,
    px: usize,
    c_in: usize,
    c_out: usize,
    stride: usize,
) {
    layers.push((format!("{name}.expand"), conv(px, c_in, 2 * c_in, 1, 1)));
    layers.push((format!("{name}.depthwise"), depthwise(px, 2 * c_in, stride)));
    layers.push((format!("{name}.project"), conv(px / stride, 2 * c_in, c_out, 1, 1)));
}

/// A MobileViT block: local 3x3, 1x1 in, transformer, 1x1 out, fusion 3x3.
fn mobilevit_block(layers: &mut Vec<(String, Layer)>, name: &str, px: usize, c: usize, dim: usize) {
    let rows = BATCH * px * px;
    layers.push((format!("{name}.conv_kxk"), conv(px, c, c, 3, 1)));
    layers.push((format!("{name}.conv_1x1"), conv(px, c, dim, 1, 1)));
    for (part, c_in, c_out) in [("qkv", dim, 3 * dim), ("proj", dim, dim), ("fc1", dim, 2 * dim), ("fc2", 2 * dim, dim)]
    {
        layers.push((format!("{name}.{part}"), Layer::Linear(Linear { rows, c_in, c_out })));
    }
    layers.push((format!("{name}.conv_proj"), conv(px, dim, c, 1, 1)));
    layers.push((format!("{name}.conv_fusion"), conv(px, 2 * c, c, 3, 1)));
}

fn mobilevit_xxs() -> Vec<(String, Layer)> {
    let mut layers = vec![("stem".to_owned(), conv(128, 3, 16, 3, 2))];
    inverted_residual(&mut layers, "stages.0.0", 64, 16, 16, 1);
    inverted_residual(&mut layers, "stages.1.0", 64, 16, 24, 2);
    inverted_residual(&mut layers, "stages.1.1", 32, 24, 24, 1);
    inverted_residual(&mut layers, "stages.2.0", 32, 24, 48, 2);
    mobilevit_block(&mut layers, "stages.2.1", 16, 48, 64);
    inverted_residual(&mut layers, "stages.3.0", 16, 48, 64, 2);
    mobilevit_block(&mut layers, "stages.3.1", 8, 64, 80);
    inverted_residual(&mut layers, "stages.4.0", 8, 64, 80, 2);
    mobilevit_block(&mut layers, "stages.4.1", 4, 80, 96);
    layers.push(("final_conv".to_owned(), conv(4, 80, 320, 1, 1)));
    layers
}

/// Seconds of a call, after one warm-up: the first decile of at least 10 calls and 40 ms, so that what else runs
/// on the machine counts for little.
fn time(mut call: impl FnMut()) -> f64 {
    call();
    let (mut all, start) = (Vec::new(), Instant::now());
    while all.len() < 10 || start.elapsed() < Duration::from_millis(40) {
        let from = Instant::now();
        call();
        all.push(from.elapsed().as_secs_f64());
    }
    all.sort_by(f64::total_cmp);
    all[all.len() / 10]
}

fn values(len: usize) -> Vec<f32> {
    (0..len).map(|i| ((i * 2_654_435_761) % 1000) as f32 / 500.0 - 1.0).collect()
}

/// Seconds of forward, by data, by weights.
fn measure(layer: &Layer, ws: &mut Workspace) -> [f64; 3] {
    match layer {
        Layer::Conv(d) => {
            let (x, w) = (values(d.batch * d.h * d.w * d.c_in), values(d.weights()));
            let mut y = values(d.batch * d.out_h() * d.out_w() * d.c_out);
            let forward = time(|| conv2d_forward(d, &x, &w, None, &mut y, ws));
            let (mut dx, mut dw) = (x.clone(), w.clone());
            let data = time(|| conv2d_backward_data(d, &w, &y, &mut dx, false, ws));
            [forward, data, time(|| conv2d_backward_weights(d, &x, &y, &mut dw, None, ws))]
        }
        Layer::Linear(d) => {
            let (x, w, mut y) = (values(d.rows * d.c_in), values(d.c_out * d.c_in), values(d.rows * d.c_out));
            let forward = time(|| linear_forward(d, &x, &w, None, &mut y, ws));
            let (mut dx, mut dw) = (x.clone(), w.clone());
            let data = time(|| linear_backward_data(d, &w, &y, &mut dx, false, ws));
            [forward, data, time(|| linear_backward_weights(d, &x, &y, &mut dw, None, ws))]
        }
    }
}

fn run(filter: &str) {
    let mut ws = Workspace::new();
    let d = Gemm { m: 480, n: 480, k: 480, trans_a: false, trans_b: false };
    let (a, b, mut c) = (values(d.m * d.k), values(d.k * d.n), values(d.m * d.n));
    let peak = d.flops() as f64 / time(|| gemm(&d, 1.0, &a, &b, 0.0, &mut c, &mut ws)) / 1e9;
    println!("{} threads, {}: 480x480x480 {peak:.0} GFLOP/s", rayon::current_num_threads(), Level::active());
    println!("{:24} {:>8}  {:>18}  {:>18}  {:>18}", "layer", "MFLOP", "forward", "by data", "by weights");
    println!("{:24} {:>8}  {}", "", "", "    us GFLOP/s peak ".repeat(3));
    let mut total = [0.0; 3];
    for (name, layer) in mobilevit_xxs() {
        if !name.contains(filter) {
            continue;
        }
        let flops = match &layer {
            Layer::Conv(d) => d.flops(),
            Layer::Linear(d) => d.flops(),
        } as f64;
        let seconds = measure(&layer, &mut ws);
        print!("{name:24} {:8.1} ", flops / 1e6);
        for (sum, s) in total.iter_mut().zip(seconds) {
            let rate = flops / s / 1e9;
            print!(" {:6.0} {rate:7.1} {:3.0}% ", s * 1e6, 100.0 * rate / peak);
            *sum += s;
        }
        println!();
    }
    println!(
        "{:24} {:8}  {:6.0} us{:12}{:6.0} us{:12}{:6.0} us",
        "sum",
        "",
        total[0] * 1e6,
        "",
        total[1] * 1e6,
        "",
        total[2] * 1e6
    );
}

fn main() {
    let filter = std::env::args().nth(1).unwrap_or_default();
    // Inside the pool, as a training step is: entering it from outside costs a thread switch per call.
    rayon::scope(|_| run(&filter));
}
