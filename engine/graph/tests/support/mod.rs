//! One small graph for each op; used by the tests of every backend.

use std::sync::Arc;

use mcpipe_cpu::loss::Contrastive;
use mcpipe_cpu::relational::Relational;
use mcpipe_cpu::sigmoid_loss::SigmoidLoss;
use mcpipe_graph::{
    Activation, Backend, BatchNormArgs, ConvArgs, Executor, Feed, Grads, GraphBuilder, GraphError, Init, Mode,
    PairInputs, ParamKind, ParamStore, Path, StepGraph, Tensor,
};

pub type Build = fn(&mut GraphBuilder, &[Tensor]) -> Result<Tensor, GraphError>;

/// An op with its inputs' shapes; all take gradients.
pub struct Case {
    pub name: &'static str,
    pub inputs: &'static [&'static [usize]],
    pub build: Build,
}

pub const fn case(name: &'static str, inputs: &'static [&'static [usize]], build: Build) -> Case {
    Case { name, inputs, build }
}

pub fn p(name: &str) -> Path {
    Path::new(name)
}

pub const CASES: &[Case] = &[
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
    case("relational", &[&[3, 6], &[3, 6], &[1]], |g, x| relational(g, x, &[])),
    case("relational_teacher", &[&[3, 6], &[3, 6], &[1]], |g, x| relational(g, x, &[5])),
    case("relational_teachers", &[&[3, 6], &[3, 6], &[1]], |g, x| relational(g, x, &[5, 4])),
    case("mse", &[&[4, 3], &[4, 3]], |g, x| g.mse(&x[0], &x[1])),
    case("cosine", &[&[4, 3], &[4, 3]], |g, x| g.cosine(&x[0], &x[1])),
    case("kl", &[&[4, 5]], |g, x| {
        let target = g.input("target", &[4, 5]);
        let (p, q) = (g.softmax(&target, 1.0), g.softmax(&x[0], 1.0));
        g.kl(&p, &q)
    }),
    case("attention_transfer_map", &[&[2, 3, 3, 4]], |g, x| g.attention_transfer_map(&x[0])),
];

/// Captions 0 and 2 are equal, image 1 is mixed with image 0; the weights of both terms differ.
fn relational(g: &mut GraphBuilder, x: &[Tensor], widths: &[usize]) -> Result<Tensor, GraphError> {
    let (a, b) = (g.l2_normalize(&x[0]), g.l2_normalize(&x[1]));
    let targets = PairInputs {
        own: g.int_input("pairs.own", &[3]),
        other: g.int_input("pairs.other", &[3]),
        keep: g.input("pairs.keep", &[3]),
        group: g.int_input("pairs.group", &[3]),
        share: g.input("pairs.share", &[3]),
        column_total: g.input("pairs.column_total", &[3]),
    };
    let teacher = |&width: &usize| {
        let target = g.input(format!("teacher.{width}"), &[6, width]);
        let u = g.slice_rows(&g.reshape(&target, &[1, 6, width])?, 0, 3)?;
        let v = g.slice_rows(&g.reshape(&target, &[1, 6, width])?, 3, 3)?;
        Ok((g.reshape(&u, &[3, width])?, g.reshape(&v, &[3, width])?))
    };
    let teachers = widths.iter().map(teacher).collect::<Result<Vec<_>, GraphError>>()?;
    let teachers: Vec<(&Tensor, &Tensor)> = teachers.iter().map(|(u, v)| (u, v)).collect();
    g.relational(&Relational::whole(3, 6, widths), &a, &b, &x[2], &targets, &teachers)
}

/// Values in ±1 that depend on nothing but `seed` and the position.
pub fn noise(seed: u64, len: usize) -> Vec<f32> {
    Init::Uniform(1.0).sample(seed, "noise", &[len])
}

/// A case's graph with its parameters and inputs.
pub struct Built {
    pub graph: Arc<StepGraph>,
    pub store: ParamStore,
    pub values: Vec<Vec<f32>>,
}

pub const IDS: [i32; 6] = [0, 5, 2, 5, 1, 0];

/// The value and the gradients of every input, then of every parameter.
pub type Found = (Vec<f32>, Vec<Vec<f32>>);

impl Built {
    pub fn new(case: &Case) -> Self {
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
                let len = param.data.len();
                param.data.iter_mut().zip(noise(40 + i as u64, len)).for_each(|(v, n)| *v += 0.3 * n);
            }
        }
        let values = case.inputs.iter().enumerate().map(|(i, s)| noise(i as u64, s.iter().product())).collect();
        Built { graph, store, values }
    }

    pub fn executor<B: Backend>(&self, store: &ParamStore<B::Buffer>, backend: B) -> Executor<B> {
        Executor::new(Arc::clone(&self.graph), store, Mode::Train, backend).expect("the store fits")
    }

    pub fn forward<B: Backend>(&self, store: &ParamStore<B::Buffer>, executor: &mut Executor<B>) -> Vec<f32> {
        let names: Vec<String> = (0..self.values.len()).map(|i| format!("x{i}")).collect();
        let targets = noise(90, 9);
        let target = noise(91, 20);
        let [wide, narrow] = [(92, 30), (93, 24)].map(|(seed, len)| noise(seed, len));
        let mut feeds: Vec<(&str, Feed<'_>)> =
            names.iter().zip(&self.values).map(|(n, v)| (n.as_str(), Feed::F32(v))).collect();
        feeds.push(("ids", Feed::I32(&IDS)));
        feeds.push(("rows", Feed::I32(&[4, 1])));
        feeds.push(("targets", Feed::F32(&targets)));
        feeds.push(("target", Feed::F32(&target)));
        feeds.push(("pairs.own", Feed::I32(&[0, 1, 0])));
        feeds.push(("pairs.other", Feed::I32(&[0, 0, 0])));
        feeds.push(("pairs.keep", Feed::F32(&[1.0, 0.75, 1.0])));
        feeds.push(("pairs.group", Feed::I32(&[0, 1, 0])));
        feeds.push(("pairs.share", Feed::F32(&[0.5, 1.0, 0.5])));
        feeds.push(("pairs.column_total", Feed::F32(&[1.125, 0.75, 1.125])));
        feeds.push(("teacher.5", Feed::F32(&wide)));
        feeds.push(("teacher.4", Feed::F32(&narrow)));
        feeds.push(("drop_path.0", Feed::F32(&[4.0 / 3.0, 0.0, 4.0 / 3.0])));
        executor.forward(store, &feeds).expect("the feeds fit");
        let y = self.graph.output("y").expect("marked");
        executor.value(y).into_owned()
    }

    /// The value, and the gradients of `Σ seed ∘ y` for every input; those of parameters are added to `grads`.
    pub fn run<B: Backend>(
        &self,
        store: &ParamStore<B::Buffer>,
        backend: B,
        seed: &[f32],
        grads: &mut Grads<B::Buffer>,
    ) -> Found {
        let mut executor = self.executor(store, backend);
        let value = self.forward(store, &mut executor);
        let y = self.graph.output("y").expect("marked");
        executor.backward(store, &[(y, seed)], grads).expect("the seed fits");
        let inputs = (0..self.values.len()).map(|i| {
            let x = self.graph.input(&format!("x{i}")).expect("declared");
            executor.grad(&x).expect("reached").into_owned()
        });
        (value, inputs.collect())
    }

    /// Elements of the value.
    pub fn numel(&self) -> usize {
        self.graph.output("y").expect("marked").numel()
    }
}

pub fn norm(v: &[f32]) -> f64 {
    v.iter().map(|x| f64::from(*x).powi(2)).sum::<f64>().sqrt()
}

pub fn difference(a: &[f32], b: &[f32]) -> f64 {
    let d: Vec<f32> = a.iter().zip(b).map(|(x, y)| x - y).collect();
    norm(&d)
}
