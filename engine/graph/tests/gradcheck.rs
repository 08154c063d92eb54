//! Every op through the executor: gradients against central finite differences, own kernels against the reference
//! formulations, and gradients that add up where a value is read twice.
//!
//! Finite differences are of `f32` forwards, so the tolerance is 2e-2 of the gradient's scale; the kernels' tighter
//! bounds, against `f64`, are tested in `mcpipe-cpu`.

use std::sync::Arc;

use mcpipe_cpu::loss::Contrastive;
use mcpipe_cpu::sigmoid_loss::SigmoidLoss;
use mcpipe_graph::{
    Activation, BatchNormArgs, ConvArgs, Cpu, Executor, Feed, Grads, GraphBuilder, GraphError, Init, Kernels, Mode,
    ParamKind, ParamStore, Path, StepGraph, Tensor,
};

type Build = fn(&mut GraphBuilder, &[Tensor]) -> Result<Tensor, GraphError>;

struct Case {
    name: &'static str,
    inputs: &'static [&'static [usize]],
    build: Build,
}

const fn case(name: &'static str, inputs: &'static [&'static [usize]], build: Build) -> Case {
    Case { name, inputs, build }
}

fn p(name: &str) -> Path {
    Path::new(name)
}

const CASES: &[Case] = &[
    case("conv3x3", &[&[2, 5, 6, 3]], |g, x| g.conv2d(&p("c"), &x[0], ConvArgs { bias: true, ..ConvArgs::new(4, 3) })),
    case("conv3x3_stride2", &[&[2, 7, 6, 3]], |g, x| g.conv2d(&p("c"), &x[0], ConvArgs::new(4, 3).stride(2))),
    case("conv1x1", &[&[2, 3, 4, 5]], |g, x| g.conv2d(&p("c"), &x[0], ConvArgs::new(3, 1))),
    case("depthwise3x3", &[&[2, 5, 5, 4]], |g, x| g.conv2d(&p("c"), &x[0], ConvArgs::new(4, 3).groups(4))),
    case("depthwise3x3_stride2", &[&[2, 6, 5, 4]], |g, x| {
        g.conv2d(&p("c"), &x[0], ConvArgs::new(4, 3).groups(4).stride(2))
    }),
    case("depthwise_multiplied", &[&[2, 6, 5, 3]], |g, x| {
        g.conv2d(&p("c"), &x[0], ConvArgs { bias: true, ..ConvArgs::new(6, 3).groups(3).stride(2) })
    }),
    case("patch_embedding", &[&[2, 6, 6, 3]], |g, x| {
        g.conv2d(&p("c"), &x[0], ConvArgs { stride: 3, pad: 0, ..ConvArgs::new(5, 3) })
    }),
    case("linear", &[&[3, 2, 5]], |g, x| g.linear(&p("l"), &x[0], 4, true, Init::FanInUniform)),
    case("linear_with_value_weight", &[&[3, 5], &[4, 5]], |g, x| g.linear_with(&x[0], &x[1], None)),
    case("matmul", &[&[3, 5], &[5, 4]], |g, x| g.matmul(&x[0], false, &x[1], false, 0.5)),
    case("matmul_tn", &[&[5, 3], &[5, 4]], |g, x| g.matmul(&x[0], true, &x[1], false, 2.0)),
    case("matmul_nt", &[&[3, 5], &[4, 5]], |g, x| g.matmul(&x[0], false, &x[1], true, 1.0)),
    case("matmul_tt", &[&[5, 3], &[4, 5]], |g, x| g.matmul(&x[0], true, &x[1], true, 1.0)),
    case("batch_norm_silu", &[&[2, 3, 3, 5]], |g, x| {
        g.batch_norm(&p("n"), &x[0], BatchNormArgs::new(Activation::Silu))
    }),
    case("batch_norm", &[&[12, 5]], |g, x| g.batch_norm(&p("n"), &x[0], BatchNormArgs::new(Activation::Identity))),
    case("layer_norm", &[&[4, 7]], |g, x| g.layer_norm(&p("n"), &x[0], 1e-5)),
    case("group_norm", &[&[4, 3, 5]], |g, x| g.group_norm(&p("n"), &x[0], 2, 1e-5)),
    case("silu", &[&[4, 7]], |g, x| Ok(g.activation(&x[0], Activation::Silu))),
    case("gelu", &[&[4, 7]], |g, x| Ok(g.activation(&x[0], Activation::Gelu))),
    case("gelu_tanh", &[&[4, 7]], |g, x| Ok(g.activation(&x[0], Activation::GeluTanh))),
    case("quick_gelu", &[&[4, 7]], |g, x| Ok(g.activation(&x[0], Activation::QuickGelu))),
    case("attention", &[&[2, 5, 12]], |g, x| g.attention(&x[0], 2, false)),
    case("attention_causal", &[&[2, 5, 12]], |g, x| g.attention(&x[0], 2, true)),
    case("masked_attention", &[&[2, 5, 12]], |g, x| {
        let last = g.int_input("rows", &[2]);
        g.masked_attention(&x[0], &last, 2, false)
    }),
    case("attention_pool", &[&[6], &[2, 5, 12]], |g, x| g.attention_pool(&x[0], &x[1], 2)),
    case("token_conv", &[&[2, 5, 3]], |g, x| g.token_conv(&p("c"), &x[0], 3, Init::FanInUniform)),
    case("sigmoid_loss", &[&[3, 6], &[3, 6], &[1], &[1]], |g, x| {
        let (a, b) = (g.l2_normalize(&x[0]), g.l2_normalize(&x[1]));
        let rows = g.input("targets", &[3, 3]);
        let targets = g.softmax(&rows, 1.0);
        g.sigmoid_loss(SigmoidLoss { rows: 3, cols: 3, dim: 6 }, &a, &b, [&x[2], &x[3]], &targets)
    }),
    case("attention_map", &[&[2, 4, 12]], |g, x| g.attention_map(&x[0], 2, false)),
    case("separable_attention", &[&[2, 5, 7]], |g, x| g.separable_attention(&x[0])),
    case("separable_attention_of_few_tokens", &[&[3, 2, 11]], |g, x| g.separable_attention(&x[0])),
    case("add", &[&[4, 3], &[4, 3]], |g, x| g.add(&x[0], &x[1])),
    case("add_to_itself", &[&[4, 3]], |g, x| g.add(&x[0], &x[0])),
    case("residuals", &[&[4, 3]], |g, x| {
        let branch = g.activation(&x[0], Activation::Silu);
        let y = g.add(&x[0], &branch)?;
        let branch = g.activation(&y, Activation::Tanh);
        let z = g.add(&branch, &y)?;
        g.mul(&z, &y)
    }),
    case("add_broadcast", &[&[4, 3, 2], &[3, 2]], |g, x| g.add_broadcast(&x[0], &x[1])),
    case("mul", &[&[4, 3], &[4, 3]], |g, x| g.mul(&x[0], &x[1])),
    case("square", &[&[4, 3]], |g, x| g.mul(&x[0], &x[0])),
    case("scale_channels", &[&[2, 3, 2, 5], &[2, 5]], |g, x| g.scale_channels(&x[0], &x[1])),
    case("layer_scale", &[&[2, 3, 2, 5], &[5]], |g, x| g.scale_channels(&x[0], &x[1])),
    case("drop_path", &[&[3, 2, 4]], |g, x| {
        let y = g.drop_path(&x[0], 0.25)?;
        g.mul(&y, &x[0])
    }),
    case("scale", &[&[4, 3]], |g, x| Ok(g.scale(&x[0], -1.5))),
    case("exp", &[&[4, 3]], |g, x| Ok(g.exp(&x[0]))),
    case("unfold", &[&[2, 4, 6, 3]], |g, x| g.unfold_patches(&x[0], [2, 2])),
    case("fold", &[&[8, 6, 3]], |g, x| g.fold_patches(&x[0], 4, 6, [2, 2])),
    case("global_avg_pool", &[&[2, 3, 3, 5]], |g, x| g.global_avg_pool(&x[0])),
    case("avg_pool", &[&[2, 4, 6, 3]], |g, x| g.avg_pool(&x[0], 2, 2, 0)),
    // Few windows: two largest values closer than the finite step would spoil the comparison.
    case("max_pool", &[&[1, 4, 5, 2]], |g, x| g.max_pool(&x[0], 3, 2, 1)),
    case("resize_up", &[&[2, 3, 4, 3]], |g, x| g.resize_bilinear(&x[0], 5, 6)),
    case("resize_down", &[&[2, 7, 6, 3]], |g, x| g.resize_bilinear(&x[0], 4, 3)),
    case("resize_aligned", &[&[2, 3, 4, 3]], |g, x| g.resize_bilinear_aligned(&x[0], 4, 6)),
    case("embedding", &[&[6, 3]], |g, x| {
        let ids = g.int_input("ids", &[2, 3]);
        g.embedding(&x[0], &ids)
    }),
    case("gather_rows", &[&[2, 5, 3]], |g, x| {
        let index = g.int_input("rows", &[2]);
        g.gather_rows(&x[0], &index)
    }),
    case("concat", &[&[4, 3], &[4, 2]], |g, x| g.concat(&x[0], &x[1])),
    case("prepend_token", &[&[3], &[2, 4, 3]], |g, x| g.prepend_token(&x[0], &x[1])),
    case("slice_rows", &[&[2, 5, 3]], |g, x| g.slice_rows(&x[0], 1, 3)),
    case("permute", &[&[2, 3, 4, 5]], |g, x| g.permute(&x[0], &[0, 2, 3, 1])),
    case("l2_normalize", &[&[4, 6]], |g, x| Ok(g.l2_normalize(&x[0]))),
    case("softmax", &[&[4, 6]], |g, x| Ok(g.softmax(&x[0], 0.7))),
    case("contrastive", &[&[3, 6], &[3, 6], &[1]], |g, x| {
        let (a, b) = (g.l2_normalize(&x[0]), g.l2_normalize(&x[1]));
        let rows = g.input("targets", &[3, 3]);
        let targets = g.softmax(&rows, 1.0);
        let d = Contrastive { rows: 3, cols: 3, dim: 6, w_row: 0.5, w_col: 0.5, subtract_entropy: true };
        g.contrastive(d, &a, &b, &x[2], [&targets, &targets])
    }),
    case("mse", &[&[4, 3], &[4, 3]], |g, x| g.mse(&x[0], &x[1])),
    case("cosine", &[&[4, 3], &[4, 3]], |g, x| g.cosine(&x[0], &x[1])),
    case("kl", &[&[4, 5]], |g, x| {
        let target = g.input("target", &[4, 5]);
        let (p, q) = (g.softmax(&target, 1.0), g.softmax(&x[0], 1.0));
        g.kl(&p, &q)
    }),
    case("attention_transfer_map", &[&[2, 3, 3, 4]], |g, x| g.attention_transfer_map(&x[0])),
];

/// Values in ±1 that depend on nothing but `seed` and the position.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    Init::Uniform(1.0).sample(seed, "noise", &[len])
}

struct Built {
    graph: Arc<StepGraph>,
    store: ParamStore,
    values: Vec<Vec<f32>>,
}

const IDS: [i32; 6] = [0, 5, 2, 5, 1, 0];

impl Built {
    fn new(case: &Case) -> Self {
        let mut g = GraphBuilder::new(true);
        let inputs: Vec<Tensor> =
            case.inputs.iter().enumerate().map(|(i, s)| g.input_with_grad(format!("x{i}"), s)).collect();
        let y = (case.build)(&mut g, &inputs).expect(case.name);
        g.output("y", &y);
        let graph = Arc::new(g.finish());
        let mut store = ParamStore::default();
        store.init(&graph, 7).expect("an empty store takes any graph");
        for (i, param) in store.params_mut().iter_mut().enumerate() {
            if param.kind == ParamKind::NoDecay {
                // Ones and zeros would hide a mistake in a norm's scale and shift.
                param.data.iter_mut().zip(noise(40 + i as u64, 64)).for_each(|(v, n)| *v += 0.3 * n);
            }
        }
        let values = case.inputs.iter().enumerate().map(|(i, s)| noise(i as u64, s.iter().product())).collect();
        Built { graph, store, values }
    }

    fn executor(&self, kernels: Kernels) -> Executor {
        Executor::new(Arc::clone(&self.graph), &self.store, Mode::Train, Cpu::new(kernels)).expect("the store fits")
    }

    fn forward(&self, executor: &mut Executor) -> Vec<f32> {
        let names: Vec<String> = (0..self.values.len()).map(|i| format!("x{i}")).collect();
        let targets = noise(90, 9);
        let target = noise(91, 20);
        let mut feeds: Vec<(&str, Feed<'_>)> =
            names.iter().zip(&self.values).map(|(n, v)| (n.as_str(), Feed::F32(v))).collect();
        feeds.push(("ids", Feed::I32(&IDS)));
        feeds.push(("rows", Feed::I32(&[4, 1])));
        feeds.push(("targets", Feed::F32(&targets)));
        feeds.push(("target", Feed::F32(&target)));
        feeds.push(("drop_path.0", Feed::F32(&[4.0 / 3.0, 0.0, 4.0 / 3.0])));
        executor.forward(&self.store, &feeds).expect("the feeds fit");
        let y = self.graph.output("y").expect("marked");
        executor.value(y).into_owned()
    }

    /// Gradients of `Σ seed ∘ y` for every input, then every parameter.
    fn gradients(&self, kernels: Kernels, seed: &[f32]) -> (Vec<f32>, Vec<Vec<f32>>) {
        let mut executor = self.executor(kernels);
        let mut grads = Grads::zeros_like(&self.store);
        let value = self.forward(&mut executor);
        let y = self.graph.output("y").expect("marked");
        executor.backward(&self.store, &[(y, seed)], &mut grads).expect("the seed fits");
        let inputs = (0..self.values.len()).map(|i| {
            let x = self.graph.input(&format!("x{i}")).expect("declared");
            executor.grad(&x).expect("reached").into_owned()
        });
        let found = inputs.chain(grads.all().iter().cloned()).collect();
        (value, found)
    }
}

fn norm(v: &[f32]) -> f64 {
    v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

fn difference(a: &[f32], b: &[f32]) -> f64 {
    let d: Vec<f32> = a.iter().zip(b).map(|(x, y)| x - y).collect();
    norm(&d)
}

#[test]
fn gradients_match_finite_differences() {
    for case in CASES {
        let mut built = Built::new(case);
        let mut executor = built.executor(Kernels::Native);
        let len = built.forward(&mut executor).len();
        let seed = noise(17, len);
        let (_, found) = built.gradients(Kernels::Native, &seed);
        let objective = |built: &Built, executor: &mut Executor| -> f64 {
            built.forward(executor).iter().zip(&seed).map(|(y, s)| f64::from(*y) * f64::from(*s)).sum()
        };
        let step = 4e-3f32;
        let inputs = built.values.len();
        for (k, grad) in found.iter().enumerate() {
            let mut numeric = vec![0.0; grad.len()];
            for (i, slope) in numeric.iter_mut().enumerate() {
                let mut at = |delta: f32| {
                    let v = if k < inputs {
                        &mut built.values[k][i]
                    } else {
                        &mut built.store.params_mut()[k - inputs].data[i]
                    };
                    let held = *v;
                    *v += delta;
                    let value = objective(&built, &mut executor);
                    let v = if k < inputs {
                        &mut built.values[k][i]
                    } else {
                        &mut built.store.params_mut()[k - inputs].data[i]
                    };
                    *v = held;
                    value
                };
                *slope = ((at(step) - at(-step)) / (2.0 * f64::from(step))) as f32;
            }
            let error = difference(grad, &numeric) / (norm(&numeric) + 1e-2);
            assert!(error < 2e-2, "{} argument {k}: {error:.2e}\n{grad:?}\n{numeric:?}", case.name);
        }
    }
}

#[test]
fn own_kernels_match_the_reference() {
    for case in CASES {
        let built = Built::new(case);
        let mut executor = built.executor(Kernels::Native);
        let seed = noise(17, built.forward(&mut executor).len());
        let (value, own) = built.gradients(Kernels::Native, &seed);
        let (expected, reference) = built.gradients(Kernels::Reference, &seed);
        let error = difference(&value, &expected) / (norm(&expected) + 1e-6);
        assert!(error < 1e-5, "{} value: {error:.2e}", case.name);
        for (k, (a, b)) in own.iter().zip(&reference).enumerate() {
            let error = difference(a, b) / (norm(b) + 1e-4);
            assert!(error < 5e-5, "{} gradient {k}: {error:.2e}", case.name);
        }
    }
}

#[test]
fn the_same_step_gives_the_same_bits() {
    for case in CASES {
        let built = Built::new(case);
        let mut executor = built.executor(Kernels::Native);
        let seed = noise(17, built.forward(&mut executor).len());
        let bits = |(value, grads): (Vec<f32>, Vec<Vec<f32>>)| -> Vec<u32> {
            value.iter().chain(grads.iter().flatten()).map(|v| v.to_bits()).collect()
        };
        let once = bits(built.gradients(Kernels::Native, &seed));
        assert_eq!(once, bits(built.gradients(Kernels::Native, &seed)), "{}", case.name);
    }
}

#[test]
fn stochastic_depth_is_an_input_of_training_graphs_alone() -> Result<(), GraphError> {
    let build = |train: bool, rate: f32| {
        let mut g = GraphBuilder::new(train);
        let x = g.input("x", &[4, 2, 3]);
        let y = g.drop_path(&x, rate)?;
        let z = g.drop_path(&y, rate)?;
        g.output("z", &z);
        Ok::<_, GraphError>(g.finish())
    };
    let graph = build(true, 0.2)?;
    let found: Vec<(&str, usize)> = graph.stochastic().iter().map(|s| (s.name.as_str(), s.samples)).collect();
    assert_eq!(found, [("drop_path.0", 4), ("drop_path.1", 4)]);
    assert!(graph.stochastic().iter().all(|s| s.keep == 0.8));
    assert!(build(false, 0.2)?.stochastic().is_empty());
    assert!(build(true, 0.0)?.stochastic().is_empty());
    assert!(build(true, 1.0).is_err());
    Ok(())
}
