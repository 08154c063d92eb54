//! Our side of `tests/bench/gpu`: times on a GPU, by events. One line of JSON for each case.
//!
//! `cargo run --release -p mcpipe-models --example gpu -- CASE...`, where a case is one of
//! * `ceilings`: the device's copy rate and cuBLASLt's bf16 rate;
//! * `student:MODEL@SIZE/BATCH[:PRECISION]`: a training step (forward, backward, AdamW) as one CUDA graph;
//! * `forward:MODEL@SIZE/BATCH[:PRECISION]`: an evaluation forward;
//! * `profile:MODEL@SIZE/BATCH[:PRECISION]`: where a training step's time goes, op by op;
//! * `loss:BATCH`: the fused contrastive and relational loss, against cuBLASLt's time for the products it is made of;
//! * `ops`, `ops:NAME`: bytes that memory-bound ops (those with NAME in their name) move a second, against the copy
//!   rate.
//!
//! PRECISION is `bf16` (default), `tf32` or `f32`.

mod loss;
mod ops;

use std::sync::Arc;

use mcpipe_cuda::optim::{Rule, StepValues, Tensor, Updater};
use mcpipe_cuda::{Buffer, Cuda, CudaError, Device, Element, Gradients, Parameters, Precision, Recording};
use mcpipe_graph::{Executor, Feed, GraphBuilder, Init, Mode, OpTime, ParamKind, ParamStore, Path, StepGraph};

/// Whatever went wrong.
pub type Failure = Box<dyn std::error::Error>;

struct Case {
    model: String,
    size: usize,
    batch: usize,
    precision: Precision,
}

impl Case {
    /// `MODEL@SIZE/BATCH[:PRECISION]`.
    fn parse(text: &str) -> Result<Self, Failure> {
        let (name, precision) = text.split_once(':').unwrap_or((text, "bf16"));
        let precision = match precision {
            "bf16" => Precision::Bf16,
            "tf32" => Precision::Tf32,
            "f32" => Precision::F32,
            other => return Err(format!("`{other}` is no precision").into()),
        };
        let (model, sizes) = name.split_once('@').ok_or("a case reads MODEL@SIZE/BATCH")?;
        let (size, batch) = sizes.split_once('/').ok_or("a case reads MODEL@SIZE/BATCH")?;
        Ok(Case { model: model.to_owned(), size: size.parse()?, batch: batch.parse()?, precision })
    }

    /// The model with 512 outputs; in training the mean of 1 − cosine to a target.
    fn graph(&self, train: bool) -> Result<StepGraph, Failure> {
        let backbone = mcpipe_models::backbone(&self.model, &toml::Table::new())?;
        let mut g = GraphBuilder::new(train);
        let image = g.input("image", &[self.batch, self.size, self.size, 3]);
        let out = backbone.build(&mut g, &Path::default(), &image, Some(512), &[])?;
        if train {
            let target = g.input("target", &[self.batch, 512]);
            let loss = g.cosine(&out.embedding, &target)?;
            g.output("loss", &loss);
        } else {
            g.output("embedding", &out.embedding);
        }
        Ok(g.finish())
    }

    fn image(&self) -> Vec<f32> {
        Init::Normal(1.0).sample(0, "image", &[self.batch * self.size * self.size * 3])
    }
}

/// A training step on the device.
struct Training {
    executor: Executor<Cuda>,
    params: Parameters,
    grads: Gradients,
    updater: Updater,
    /// The moments.
    _slots: Vec<Buffer>,
    one: Buffer,
    device: Device,
}

impl Training {
    fn new(device: &Device, case: &Case) -> Result<Self, Failure> {
        let graph = Arc::new(case.graph(true)?);
        let mut store = ParamStore::default();
        store.init(&graph, 0)?;
        let params = Parameters::upload(device, &store)?;
        let grads = Gradients::zeros_like(device, &store)?;
        let backend = Cuda::new(device.clone(), case.precision);
        let mut executor = Executor::new(graph, &params.store, Mode::Train, backend)?;
        let target = Init::Normal(1.0).sample(1, "target", &[case.batch * 512]);
        executor.feed(&[("image", Feed::F32(&case.image())), ("target", Feed::F32(&target))])?;
        let (updater, slots) = updater(device, &store, &params, &grads)?;
        let one = Buffer::new(device.alloc(4)?);
        device.upload(&[1.0f32], one.view(1, Element::F32))?;
        Ok(Training { executor, params, grads, updater, _slots: slots, one, device: device.clone() })
    }

    fn step(&mut self) -> Result<(), Failure> {
        self.device.weights_changed(self.params.all());
        self.grads.zero(&self.device)?;
        self.executor.walk(&self.params.store, &mut |_, _| {})?;
        self.executor.update_running_statistics(&mut self.params.store);
        self.executor.clear_seeds();
        let loss = self.executor.graph().output("loss")?.clone();
        let seed = mcpipe_graph::Part { buffer: &self.one, dtype: mcpipe_graph::Dtype::F32, start: 0, len: 1 };
        self.executor.seed(&loss, seed)?;
        self.executor.walk_backward(&self.params.store, &mut self.grads.grads)?;
        self.updater.run()?;
        Ok(())
    }
}

/// AdamW over all trained parameters, with the memory of its moments.
fn updater(
    device: &Device,
    store: &ParamStore,
    params: &Parameters,
    grads: &Gradients,
) -> Result<(Updater, Vec<Buffer>), Failure> {
    let (mut tensors, mut slots) = (Vec::new(), Vec::new());
    for ((host, param), grad) in store.params().iter().zip(params.store.params()).zip(grads.grads.all()) {
        if host.kind == ParamKind::Buffer {
            continue;
        }
        let (n, mut moments) = (host.data.len(), Vec::new());
        for _ in 0..2 {
            let buffer = Buffer::new(device.alloc(4 * n)?);
            device.fill(buffer.view(n, Element::F32), 0)?;
            moments.push(buffer.view(n, Element::F32));
            slots.push(buffer);
        }
        tensors.push(Tensor {
            param: param.data.view(n, Element::F32),
            grad: Some(grad.view(n, Element::F32)),
            slots: moments,
            averages: Vec::new(),
            shadow: None,
            decay: host.kind == ParamKind::Decay,
            most: None,
        });
    }
    let updater =
        Updater::new(device, &tensors, Rule::Adamw { betas: [0.9, 0.999], eps: 1e-8, weight_decay: 0.01 }, None)?;
    updater.set(&StepValues { lr: 1e-3, step: 1, clip_norm: None, momenta: Vec::new() })?;
    Ok((updater, slots))
}

fn device_error(e: Failure) -> CudaError {
    CudaError::Unsupported(e.to_string())
}

/// Median seconds of `n` timed runs after warm-up, and the work as it is timed: replayed where it can be recorded.
fn median(device: &Device, n: usize, mut work: impl FnMut() -> Result<(), Failure>) -> Result<f64, Failure> {
    for _ in 0..3 {
        work()?;
    }
    device.synchronize()?;
    let recording: Option<Recording> = device.record(|| work().map_err(device_error))?;
    let mut run = || match &recording {
        Some(r) => r.replay(),
        None => work().map_err(device_error),
    };
    for _ in 0..3 {
        run()?;
    }
    let mut times = (0..n).map(|_| device.time(&mut run)).collect::<Result<Vec<f64>, _>>()?;
    times.sort_by(f64::total_cmp);
    Ok(times[n / 2])
}

fn used(device: &Device) -> f64 {
    let (free, total) = device.memory();
    (total - free) as f64 / 1e9
}

fn student(device: &Device, text: &str) -> Result<(), Failure> {
    let case = Case::parse(text)?;
    let mut training = Training::new(device, &case)?;
    training.step()?;
    let before = training.executor.value(&training.executor.graph().output("loss")?.clone())[0];
    let ms = 1e3 * median(device, 15, || training.step())?;
    let loss = training.executor.value(&training.executor.graph().output("loss")?.clone())[0];
    let arena = training.executor.plan().bytes() as f64 / 1e9;
    println!(
        r#"{{"case": "student:{text}", "ms": {ms:.3}, "img_s": {:.0}, "arena_GB": {arena:.3}, "used_GB": {:.2}, "loss": [{before}, {loss}]}}"#,
        case.batch as f64 / ms * 1e3,
        used(device)
    );
    Ok(())
}

fn forward(device: &Device, text: &str) -> Result<(), Failure> {
    let case = Case::parse(text)?;
    let graph = Arc::new(case.graph(false)?);
    let mut store = ParamStore::default();
    store.init(&graph, 0)?;
    let params = Parameters::upload(device, &store)?;
    let mut executor = Executor::new(graph, &params.store, Mode::Forward, Cuda::new(device.clone(), case.precision))?;
    executor.feed(&[("image", Feed::F32(&case.image()))])?;
    let ms = 1e3 * median(device, 15, || Ok(executor.walk(&params.store, &mut |_, _| {})?))?;
    println!(
        r#"{{"case": "forward:{text}", "ms": {ms:.3}, "img_s": {:.0}, "arena_GB": {:.3}}}"#,
        case.batch as f64 / ms * 1e3,
        executor.plan().bytes() as f64 / 1e9
    );
    Ok(())
}

fn profile(device: &Device, text: &str) -> Result<(), Failure> {
    let case = Case::parse(text)?;
    let mut training = Training::new(device, &case)?;
    for _ in 0..2 {
        training.step()?;
    }
    device.synchronize()?;
    training.executor.start_profile();
    for _ in 0..3 {
        training.step()?;
    }
    let times: Vec<OpTime> = training.executor.take_profile();
    let total: f64 = times.iter().map(|t| (t.forward + t.backward).as_secs_f64()).sum();
    println!("profile of {text} (host-timed, one op at a time): {:.2} ms a step", total / 3.0 * 1e3);
    for t in times.iter().take(24) {
        let ms = |d: std::time::Duration| d.as_secs_f64() / 3.0 * 1e3;
        println!("  {:<32} {:>9.3} fwd {:>9.3} bwd", format!("{} {}", t.op, t.detail), ms(t.forward), ms(t.backward));
    }
    Ok(())
}

fn main() -> Result<(), Failure> {
    let device = Device::open(0)?;
    for case in std::env::args().skip(1) {
        let ran = match case.split_once(':') {
            Some(("student", text)) => student(&device, text),
            Some(("forward", text)) => forward(&device, text),
            Some(("profile", text)) => profile(&device, text),
            Some(("loss", batch)) => batch.parse().map_err(Failure::from).and_then(|b| loss::time(&device, b)),
            _ if case == "ceilings" => ops::ceilings(&device),
            _ if case == "ops" => ops::all(&device, ""),
            Some(("ops", wanted)) => ops::all(&device, wanted),
            _ => Err(format!("`{case}` is no case").into()),
        };
        if let Err(e) = ran {
            println!(r#"{{"case": {case:?}, "error": {:?}}}"#, e.to_string());
        }
    }
    Ok(())
}
