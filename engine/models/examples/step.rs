//! Our side of `tests/bench/run`: a training step (forward, backward, AdamW) and an eval forward of one backbone.
//!
//! `cargo run --release -p mcpipe-models --example step -- mobilevit_xxs 128 16 2 4 [bf16] [eval] [profile]`: model,
//! image size, batch, threads, seconds per figure. Prints one line of JSON: images/s and the process's peak memory.
//! `bf16` rounds the training step's products, `eval` leaves the training out, and `profile` adds where the time goes
//! and how far the step is from its roofline.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mcpipe_cpu::alloc::CacheAligned;
use mcpipe_cpu::optim::adamw_step;
use mcpipe_cpu::{Linear, Precision, Workspace, linear_forward};
use mcpipe_graph::{
    Cpu, Executor, Feed, Grads, GraphBuilder, Init, Kernels, Mode, Op, ParamKind, ParamStore, Path, StepGraph,
};

use rayon::prelude::*;

#[global_allocator]
static ALLOCATOR: CacheAligned = CacheAligned;

type Failure = Box<dyn std::error::Error + Send + Sync>;

struct Setup {
    backbone: String,
    size: usize,
    batch: usize,
}

impl Setup {
    fn graph(&self, train: bool) -> Result<Arc<StepGraph>, Failure> {
        let backbone = mcpipe_models::backbone(&self.backbone, &toml::Table::new())?;
        let mut g = GraphBuilder::new(train);
        let image = g.input("image", &[self.batch, self.size, self.size, 3]);
        let out = backbone.build(&mut g, &Path::default(), &image, Some(512), &[])?;
        g.output("embedding", &out.embedding);
        Ok(Arc::new(g.finish()))
    }

    /// Images/s from the median time of `step`, over `time`, after three warm-up steps.
    fn rate(&self, time: Duration, mut step: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
        for _ in 0..3 {
            step()?;
        }
        let (mut times, end) = (Vec::new(), Instant::now() + time);
        while Instant::now() < end || times.len() < 5 {
            let start = Instant::now();
            step()?;
            times.push(start.elapsed());
        }
        times.sort_unstable();
        Ok(self.batch as f64 / times[times.len() / 2].as_secs_f64())
    }
}

struct Training {
    graph: Arc<StepGraph>,
    executor: Executor,
    store: ParamStore,
    grads: Grads,
    moments: Vec<[Vec<f32>; 2]>,
    step: u64,
}

impl Training {
    fn new(graph: Arc<StepGraph>, precision: Precision) -> Result<Self, Failure> {
        let mut store = ParamStore::default();
        store.init(&graph, 0)?;
        let executor = Executor::new(Arc::clone(&graph), &store, Mode::Train, backend(precision))?;
        let grads = Grads::zeros_like(&store);
        let moments = grads.all().iter().map(|g| [vec![0.0; g.len()], vec![0.0; g.len()]]).collect();
        Ok(Training { graph, executor, store, grads, moments, step: 0 })
    }

    /// Forward, backward of the mean square of the embedding, AdamW.
    fn step(&mut self, image: &[f32]) -> Result<(), Failure> {
        self.executor.forward(&self.store, &[("image", Feed::F32(image))])?;
        self.executor.update_running_statistics(&mut self.store);
        let y = self.graph.output("embedding")?;
        let scale = 2.0 / y.numel() as f32;
        let seed: Vec<f32> = self.executor.value(y).iter().map(|v| v * scale).collect();
        self.grads.zero();
        self.executor.backward(&self.store, &[(y, &seed)], &mut self.grads)?;
        self.step += 1;
        for ((param, grad), [m, v]) in self.store.params_mut().iter_mut().zip(self.grads.all()).zip(&mut self.moments) {
            let weight_decay = match param.kind {
                ParamKind::Decay => 0.01,
                ParamKind::NoDecay => 0.0,
                ParamKind::Buffer => continue,
            };
            adamw_step(&mut param.data, grad, m, v, 1e-3, 0.9, 0.999, 1e-8, weight_decay, self.step);
        }
        Ok(())
    }
}

fn backend(precision: Precision) -> Cpu {
    Cpu::new(Kernels::Native).with_precision(precision)
}

/// Seconds of the median of nine runs.
fn median(mut run: impl FnMut()) -> f64 {
    let mut times: Vec<Duration> = (0..9)
        .map(|_| {
            let start = Instant::now();
            run();
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    times[4].as_secs_f64()
}

/// FLOP/s of a large matrix product.
fn gemm_peak(precision: Precision) -> f64 {
    let n = 1024;
    let d = Linear { rows: n, c_in: n, c_out: n };
    let (a, b) = (Init::Uniform(1.0).sample(1, "a", &[n * n]), Init::Uniform(1.0).sample(2, "b", &[n * n]));
    let (mut c, mut ws) = (vec![0.0; n * n], Workspace::new().with_precision(precision));
    d.flops() as f64 / median(|| linear_forward(&d, &a, &b, None, &mut c, &mut ws))
}

/// Bytes read and written per second by a copy far larger than the caches.
fn copy_rate() -> f64 {
    let n = 32 << 20;
    let (from, mut to) = (vec![1f32; n], vec![0f32; n]);
    let chunk = n / 64;
    let copy = || to.par_chunks_mut(chunk).zip(from.par_chunks(chunk)).for_each(|(to, from)| to.copy_from_slice(from));
    (2 * n * size_of::<f32>()) as f64 / median(copy)
}

/// Least time of a step if every op ran at the ceiling that binds it: its arithmetic at the GEMM rate, or its operands,
/// each moved once, at the copy rate. Also the step's FLOPs and bytes.
fn roofline(graph: &StepGraph, gemm: f64, copy: f64) -> (f64, f64, f64) {
    let (mut time, mut flops, mut bytes) = (0.0, 0.0, 0.0);
    let mut pass = |f: f64, elements: usize| {
        let b = (elements * size_of::<f32>()) as f64;
        time += (f / gemm).max(b / copy);
        flops += f;
        bytes += b;
    };
    for (_, node) in graph.nodes() {
        let Some(op) = node.op() else { continue };
        let held = |i: usize| graph.node(node.inputs[i]).numel();
        let inputs = 0..node.inputs.len();
        let f = op.flops(node.numel()) as f64;
        pass(f, inputs.clone().map(held).sum::<usize>() + node.numel());
        if node.requires_grad {
            let read: usize = inputs.clone().filter(|i| op.needs().inputs >> i & 1 == 1).map(held).sum();
            let wants = |i: &usize| op.differentiable(*i) && graph.node(node.inputs[*i]).requires_grad;
            let wanted: Vec<usize> = inputs.filter(wants).collect();
            // A product's VJP is one product for each operand's gradient.
            let products = if matches!(op, Op::Conv2d(_) | Op::Linear(_)) { wanted.len().min(2) } else { 2 };
            pass(products as f64 * f, node.numel() + read + wanted.into_iter().map(held).sum::<usize>());
        }
    }
    (time, flops, bytes)
}

/// Largest memory that this process held so far, in MB.
fn peak_memory() -> f64 {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let line = status.lines().find_map(|l| l.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|l| l.trim().trim_end_matches("kB").trim().parse::<f64>().ok());
    kilobytes.unwrap_or(f64::NAN) / 1e3
}

fn print_profile(training: &mut Training, image: &[f32], steps: u32, precision: Precision) -> Result<(), Failure> {
    training.executor.start_profile();
    let start = Instant::now();
    for _ in 0..steps {
        training.step(image)?;
    }
    let whole = start.elapsed() / steps;
    let ms = |d: Duration| d.as_secs_f64() * 1e3 / f64::from(steps);
    let mut rest = whole.as_secs_f64() * 1e3;
    println!("{:<34} {:>9} {:>9} {:>7} {:>9}", "op", "fwd ms", "bwd ms", "share", "GFLOP/s");
    for t in training.executor.take_profile() {
        let both = t.forward + t.backward;
        // A VJP of a product costs two products.
        let rate = 3.0 * t.flops as f64 / both.as_secs_f64() / 1e9;
        let share = 100.0 * ms(both) / (whole.as_secs_f64() * 1e3);
        rest -= ms(both);
        println!(
            "{:<34} {:>9.2} {:>9.2} {share:>6.1}% {rate:>9.1}",
            format!("{} {}", t.op, t.detail),
            ms(t.forward),
            ms(t.backward)
        );
    }
    println!("{:<34} {rest:>9.2}", "optimiser, seed, statistics");
    let (gemm, copy) = (gemm_peak(precision), copy_rate());
    let (bound, flops, bytes) = roofline(&training.graph, gemm, copy);
    let seconds = whole.as_secs_f64();
    println!(
        "step {:.1} ms: {:.2} GFLOP at {:.0}% of the GEMM rate of {:.1} GFLOP/s, {:.1} MB at {:.0}% of the copy rate of \
         {:.1} GB/s; bound by ops {:.1} ms, reached {:.0}%; activations {:.1} MB",
        seconds * 1e3,
        flops / 1e9,
        100.0 * flops / seconds / gemm,
        gemm / 1e9,
        bytes / 1e6,
        100.0 * bytes / seconds / copy,
        copy / 1e9,
        bound * 1e3,
        100.0 * bound / seconds,
        training.executor.plan().bytes() as f64 / 1e6,
    );
    Ok(())
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |i: usize, default: &str| args.get(i).map_or(default, String::as_str).to_owned();
    let has = |word: &str| args.iter().skip(5).any(|a| a == word);
    let precision = if has("bf16") { Precision::Bf16 } else { Precision::F32 };
    let (size, batch) = (arg(1, "128").parse()?, arg(2, "16").parse()?);
    let setup = Setup { backbone: arg(0, "mobilevit_xxs"), size, batch };
    rayon::ThreadPoolBuilder::new().num_threads(arg(3, "2").parse()?).build_global()?;
    let time = Duration::from_secs_f64(arg(4, "4").parse()?);
    let image = Init::Normal(1.0).sample(0, "image", &[setup.batch * setup.size * setup.size * 3]);
    // In the pool, as `mcpipe run` does it.
    rayon::scope(|_| -> Result<(), Failure> {
        let graph = setup.graph(false)?;
        let mut store = ParamStore::default();
        store.init(&graph, 0)?;
        let mut executor = Executor::new(graph, &store, Mode::Forward, backend(precision))?;
        let eval = setup.rate(time, || Ok(executor.forward(&store, &[("image", Feed::F32(&image))])?))?;
        drop((executor, store));
        let (mut train, mut training) = (f64::NAN, None);
        if !has("eval") {
            let t = training.insert(Training::new(setup.graph(true)?, precision)?);
            train = setup.rate(time, || t.step(&image))?;
        }
        let peak = peak_memory();
        let number = |v: f64| if v.is_finite() { format!("{v:.2}") } else { "null".into() };
        let (train, peak) = (number(train), number(peak));
        println!(r#"{{"mode": "mcpipe", "train": {train}, "eval": {eval:.2}, "peak_mb": {peak}}}"#);
        match training {
            Some(mut t) if has("profile") => print_profile(&mut t, &image, 10, precision),
            _ => Ok(()),
        }
    })
}
