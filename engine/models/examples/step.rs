//! Our side of `tests/bench/run`: a training step (forward, backward, AdamW) and an eval forward of one backbone.
//!
//! `cargo run --release -p mcpipe-models --example step -- mobilevit_xxs 128 16 2 4 [profile]`: model, image size,
//! batch, threads, seconds per figure. Prints one line of JSON; with `profile`, also where the time goes and which
//! share of the machine's GEMM peak the step reaches.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mcpipe_cpu::optim::adamw_step;
use mcpipe_cpu::{Gemm, Workspace, gemm};
use mcpipe_graph::{
    Cpu, Executor, Feed, Grads, GraphBuilder, Init, Kernels, Mode, ParamKind, ParamStore, Path, StepGraph,
};

type Failure = Box<dyn std::error::Error>;

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
    fn new(graph: Arc<StepGraph>) -> Result<Self, Failure> {
        let mut store = ParamStore::default();
        store.init(&graph, 0)?;
        let executor = Executor::new(Arc::clone(&graph), &store, Mode::Train, Cpu::new(Kernels::Native))?;
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

/// FLOP/s of a large square matrix product, the median of some: the peak that a step is held against.
fn gemm_peak() -> f64 {
    let n = 1024;
    let d = Gemm { m: n, n, k: n, trans_a: false, trans_b: false };
    let (a, b) = (Init::Uniform(1.0).sample(1, "a", &[n * n]), Init::Uniform(1.0).sample(2, "b", &[n * n]));
    let (mut c, mut ws) = (vec![0.0; n * n], Workspace::new());
    let mut times: Vec<Duration> = (0..9)
        .map(|_| {
            let start = Instant::now();
            gemm(&d, 1.0, &a, &b, 0.0, &mut c, &mut ws);
            start.elapsed()
        })
        .collect();
    times.sort_unstable();
    2.0 * (n * n * n) as f64 / times[4].as_secs_f64()
}

fn print_profile(training: &mut Training, image: &[f32], steps: u32) -> Result<(), Failure> {
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
    let (peak, step) = (gemm_peak(), 3.0 * training.graph.forward_flops() as f64 / whole.as_secs_f64());
    println!(
        "step {:.1} ms, {:.1} GFLOP/s = {:.0}% of the measured GEMM peak of {:.1} GFLOP/s; activations {:.1} MB",
        whole.as_secs_f64() * 1e3,
        step / 1e9,
        100.0 * step / peak,
        peak / 1e9,
        training.executor.plan().bytes() as f64 / 1e6,
    );
    Ok(())
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |i: usize, default: &str| args.get(i).map_or(default, String::as_str).to_owned();
    let setup = Setup { backbone: arg(0, "mobilevit_xxs"), size: arg(1, "128").parse()?, batch: arg(2, "16").parse()? };
    rayon::ThreadPoolBuilder::new().num_threads(arg(3, "2").parse()?).build_global()?;
    let time = Duration::from_secs_f64(arg(4, "4").parse()?);
    let image = Init::Normal(1.0).sample(0, "image", &[setup.batch * setup.size * setup.size * 3]);

    let mut training = Training::new(setup.graph(true)?)?;
    let train = setup.rate(time, || training.step(&image))?;
    let graph = setup.graph(false)?;
    let mut executor = Executor::new(graph, &training.store, Mode::Forward, Cpu::new(Kernels::Native))?;
    let eval = setup.rate(time, || Ok(executor.forward(&training.store, &[("image", Feed::F32(&image))])?))?;
    println!("{{\"mode\": \"mcpipe\", \"train\": {train:.2}, \"eval\": {eval:.2}}}");
    if args.get(5).is_some_and(|a| a == "profile") {
        print_profile(&mut training, &image, 20)?;
    }
    Ok(())
}
