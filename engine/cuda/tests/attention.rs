//! Attention on the CUDA backend against the CPU's kernels, at sizes that meet each way of tiling: tokens below, at and
//! beyond a tile, several pairs a tile, heads that fill their tile or not, masks, gradients that add up, NaN.
//! Runs as `ops.rs` does.

use std::sync::Arc;

use mcpipe_cuda::{Cuda, Device, Gradients, Parameters, Precision};
use mcpipe_graph::{
    Backend, Cpu, Executor, Feed, Grads, GraphBuilder, GraphError, Init, Kernels, Mode, ParamStore, StepGraph, Tensor,
};

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

#[derive(Clone, Copy, Debug, PartialEq)]
enum Kind {
    Plain,
    Causal,
    Masked,
    MaskedCausal,
    /// Read by two ops, so that the second VJP adds to the first's gradient.
    Twice,
    Map,
    CausalMap,
    /// The map and the attention of the same qkv.
    MapAndPlain,
    Pool,
    Separable,
}

/// Batch, tokens, heads, size of a head.
#[derive(Clone, Copy, Debug)]
struct Case(Kind, [usize; 4]);

impl Case {
    /// Inputs' shapes.
    fn shapes(&self) -> Vec<Vec<usize>> {
        let [b, n, h, d] = self.1;
        match self.0 {
            Kind::Pool => vec![vec![h * d], vec![b, n, 2 * h * d]],
            Kind::Separable => vec![vec![b, n, 1 + 2 * d]],
            _ => vec![vec![b, n, 3 * h * d]],
        }
    }

    fn build(&self, g: &mut GraphBuilder, x: &[Tensor]) -> Result<Tensor, GraphError> {
        let [b, _, h, _] = self.1;
        match self.0 {
            Kind::Plain => g.attention(&x[0], h, false),
            Kind::Causal => g.attention(&x[0], h, true),
            Kind::Masked | Kind::MaskedCausal => {
                let last = g.int_input("last", &[b]);
                g.masked_attention(&x[0], &last, h, self.0 == Kind::MaskedCausal)
            }
            Kind::Twice => {
                let (a, b) = (g.attention(&x[0], h, false)?, g.attention(&x[0], h, true)?);
                g.add(&a, &b)
            }
            Kind::Map => g.attention_map(&x[0], h, false),
            Kind::CausalMap => g.attention_map(&x[0], h, true),
            Kind::MapAndPlain => {
                let (y, map) = (g.attention(&x[0], h, false)?, g.attention_map(&x[0], h, false)?);
                let zeros = g.scale(&y, 0.0);
                let (one, other) = (g.mse(&y, &zeros)?, {
                    let half = g.scale(&map, 0.5);
                    g.mse(&map, &half)?
                });
                g.add(&one, &other)
            }
            Kind::Pool => g.attention_pool(&x[0], &x[1], h),
            Kind::Separable => g.separable_attention(&x[0]),
        }
    }

    fn last(&self) -> Vec<i32> {
        let [b, n, ..] = self.1;
        (0..b).map(|i| ((i * 37 + 5) % n) as i32).collect()
    }
}

type Found = (Vec<f32>, Vec<Vec<f32>>);

struct Built {
    case: Case,
    graph: Arc<StepGraph>,
    values: Vec<Vec<f32>>,
}

impl Built {
    fn new(case: Case) -> Self {
        let mut g = GraphBuilder::new(true);
        let shapes = case.shapes();
        let inputs: Vec<Tensor> =
            shapes.iter().enumerate().map(|(i, s)| g.input_with_grad(format!("x{i}"), s)).collect();
        let y = case.build(&mut g, &inputs).expect("shapes fit");
        g.output("y", &y);
        // Scores of several units, so that some probabilities are near 1.
        let noise = |(i, s): (usize, &Vec<usize>)| {
            let values = Init::Uniform(2.5).sample(i as u64, "noise", &[s.iter().product()]);
            // What bf16 holds, so that both precisions see the same.
            values.iter().map(|v| f32::from_bits(v.to_bits() & 0xffff_0000)).collect()
        };
        let values = shapes.iter().enumerate().map(noise).collect();
        Built { case, graph: Arc::new(g.finish()), values }
    }

    fn run<B: Backend>(&self, store: &ParamStore<B::Buffer>, backend: B, grads: &mut Grads<B::Buffer>) -> Found {
        let mut executor = Executor::new(Arc::clone(&self.graph), store, Mode::Train, backend).expect("no parameters");
        let names: Vec<String> = (0..self.values.len()).map(|i| format!("x{i}")).collect();
        let last = self.case.last();
        let mut feeds: Vec<(&str, Feed<'_>)> =
            names.iter().zip(&self.values).map(|(n, v)| (n.as_str(), Feed::F32(v))).collect();
        feeds.push(("last", Feed::I32(&last)));
        executor.forward(store, &feeds).expect("the feeds fit");
        let y = self.graph.output("y").expect("marked");
        let value = executor.value(y).into_owned();
        let seed: Vec<f32> = Init::Uniform(1.0).sample(17, "noise", &[value.len()]);
        let seed: Vec<f32> = seed.iter().map(|v| f32::from_bits(v.to_bits() & 0xffff_0000)).collect();
        executor.backward(store, &[(y, &seed)], grads).expect("the seed fits");
        let inputs = names.iter().map(|n| {
            let x = self.graph.input(n).expect("declared");
            executor.grad(&x).expect("reached").into_owned()
        });
        (value, inputs.collect())
    }

    fn on_cpu(&self) -> Found {
        let store = ParamStore::default();
        self.run(&store, Cpu::new(Kernels::Native), &mut Grads::zeros_like(&store))
    }

    fn on_cuda(&self, device: &Device, precision: Precision) -> Found {
        let store = ParamStore::default();
        let params = Parameters::upload(device, &store).expect("memory");
        let mut grads = Gradients::zeros_like(device, &store).expect("memory");
        self.run(&params.store, Cuda::new(device.clone(), precision), &mut grads.grads)
    }
}

fn norm(v: &[f32]) -> f64 {
    v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

/// Relative to the norm; NaN stays.
fn error(a: &[f32], b: &[f32]) -> f64 {
    let d: Vec<f32> = a.iter().zip(b).map(|(x, y)| x - y).collect();
    norm(&d) / (norm(b) + 1e-4)
}

const CASES: &[Case] = {
    use Kind::*;
    &[
        Case(Plain, [3, 1, 2, 8]),
        Case(Plain, [2, 3, 3, 20]),
        Case(Plain, [2, 16, 4, 60]),
        Case(Plain, [3, 16, 2, 16]),
        Case(Plain, [3, 17, 3, 24]),
        Case(Plain, [2, 32, 1, 48]),
        Case(Plain, [2, 49, 2, 32]),
        Case(Plain, [2, 64, 2, 48]),
        Case(Plain, [1, 77, 2, 80]),
        Case(Plain, [1, 127, 1, 128]),
        Case(Plain, [1, 129, 2, 36]),
        Case(Plain, [1, 197, 2, 64]),
        Case(Plain, [1, 256, 2, 36]),
        Case(Plain, [1, 300, 1, 64]),
        Case(Plain, [1, 70, 1, 7]),
        Case(Plain, [1, 130, 1, 38]),
        Case(Causal, [3, 7, 3, 20]),
        Case(Causal, [2, 30, 1, 36]),
        Case(Causal, [2, 64, 1, 16]),
        Case(Causal, [2, 77, 2, 64]),
        Case(Causal, [1, 197, 1, 48]),
        Case(Causal, [1, 129, 1, 128]),
        Case(Masked, [5, 9, 2, 24]),
        Case(Masked, [3, 31, 1, 64]),
        Case(Masked, [4, 77, 2, 64]),
        Case(Masked, [3, 150, 1, 64]),
        Case(MaskedCausal, [3, 77, 1, 64]),
        Case(Twice, [2, 49, 2, 36]),
        Case(Twice, [3, 13, 2, 64]),
        Case(Twice, [1, 140, 1, 18]),
        Case(Map, [3, 5, 2, 12]),
        Case(Map, [2, 20, 3, 36]),
        Case(Map, [2, 49, 2, 32]),
        Case(Map, [1, 129, 2, 64]),
        Case(Map, [1, 100, 1, 80]),
        Case(CausalMap, [1, 77, 2, 64]),
        Case(CausalMap, [2, 15, 1, 16]),
        Case(MapAndPlain, [1, 66, 2, 36]),
        Case(Pool, [3, 5, 2, 12]),
        Case(Pool, [2, 49, 3, 64]),
        Case(Pool, [2, 130, 1, 72]),
        Case(Separable, [3, 1, 1, 7]),
        Case(Separable, [2, 16, 1, 64]),
        Case(Separable, [2, 70, 1, 150]),
    ]
};

fn check(precision: Precision, bars: [f64; 2]) {
    let Some(device) = device() else { return };
    let mut failed = Vec::new();
    for case in CASES {
        let built = Built::new(*case);
        let (expected, reference) = built.on_cpu();
        let (value, grads) = built.on_cuda(&device, precision);
        let forward = error(&value, &expected);
        let backward: Vec<f64> = grads.iter().zip(&reference).map(|(a, b)| error(a, b)).collect();
        if std::env::var_os("MCPIPE_ERRORS").is_some() {
            let backward: Vec<String> = backward.iter().map(|e| format!("{e:.1e}")).collect();
            println!("{case:?}: value {forward:.1e}, gradients {}", backward.join(" "));
        }
        if !(forward <= bars[0] && backward.iter().all(|e| *e <= bars[1])) {
            failed.push(format!("{case:?}: value {forward:.2e}, gradients {backward:?}"));
        }
        let again = built.on_cuda(&device, precision);
        assert!((again.0, again.1) == (value, grads), "{case:?}: a second run differs");
    }
    assert!(failed.is_empty(), "{} of {} cases:\n{}", failed.len(), CASES.len(), failed.join("\n"));
}

#[test]
fn attention_matches_the_cpu_in_f32() {
    check(Precision::F32, [1e-5, 1e-5]);
}

#[test]
fn attention_matches_the_cpu_in_bf16() {
    check(Precision::Bf16, [1e-2, 1e-2]);
}

#[test]
fn a_nan_reaches_the_rows_that_see_it() {
    let Some(device) = device() else { return };
    for precision in [Precision::F32, Precision::Bf16] {
        for case in
            [Case(Kind::Plain, [2, 70, 2, 20]), Case(Kind::Plain, [2, 150, 2, 64]), Case(Kind::Map, [2, 70, 2, 20])]
        {
            let [_, n, h, d] = case.1;
            let part = h * d;
            for (at, what) in [(0, "query"), (part, "key"), (2 * part, "value")] {
                if case.0 == Kind::Map && what == "value" {
                    continue;
                }
                let mut built = Built::new(case);
                // Token 3 of batch entry 0, head 0.
                built.values[0][3 * 3 * part + at] = f32::NAN;
                let (value, grads) = built.on_cuda(&device, precision);
                let row = value.len() / 2 / if case.0 == Kind::Map { n * h } else { n };
                let nan_rows: Vec<bool> = value.chunks(row).map(|r| r.iter().any(|v| v.is_nan())).collect();
                let expected = match what {
                    "query" => 1,
                    _ => n,
                };
                let found = nan_rows.iter().filter(|r| **r).count();
                assert_eq!(found, expected, "{precision:?} {case:?}: a NaN {what} reaches {found} rows");
                assert!(nan_rows[3] && grads[0].iter().any(|g| g.is_nan()), "{precision:?} {case:?} {what}");
            }
        }
    }
}
