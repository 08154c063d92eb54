//! Products and convolutions: ragged sizes, every way that a convolution is computed, evaluation with what follows fused.

use std::sync::Arc;

use mcpipe_cuda::{Cuda, Device, Parameters, Precision};
use mcpipe_graph::{
    Activation, Backend, BatchNormArgs, ConvArgs, Cpu, Executor, Feed, GraphBuilder, GraphError, Init, Kernels, Mode,
    ParamStore, StepGraph, Tensor,
};

use crate::support::{Case, case, difference, noise, norm, p};
use crate::{check, device};

const LARGE: &[Case] = &[
    case("conv1x1", &[&[3, 9, 7, 13]], |g, x| g.conv2d(&p("c"), &x[0], bias(ConvArgs::new(21, 1)))),
    case("conv1x1_aligned", &[&[2, 13, 11, 64]], |g, x| g.conv2d(&p("c"), &x[0], bias(ConvArgs::new(40, 1)))),
    case("conv1x1_stride2", &[&[2, 9, 8, 16]], |g, x| g.conv2d(&p("c"), &x[0], ConvArgs::new(24, 1).stride(2))),
    case("conv3x3", &[&[2, 13, 11, 24]], |g, x| g.conv2d(&p("c"), &x[0], bias(ConvArgs::new(40, 3)))),
    case("conv3x3_stride2", &[&[3, 15, 17, 19]], |g, x| g.conv2d(&p("c"), &x[0], ConvArgs::new(21, 3).stride(2))),
    case("conv3x3_groups", &[&[2, 9, 8, 12]], |g, x| g.conv2d(&p("c"), &x[0], bias(ConvArgs::new(18, 3).groups(3)))),
    case("conv_accumulates_dx", &[&[2, 9, 8, 16]], |g, x| {
        let y = g.conv2d(&p("c"), &x[0], ConvArgs::new(16, 3))?;
        let y = g.mul(&y, &x[0])?;
        let z = g.conv2d(&p("d"), &x[0], ConvArgs::new(16, 1))?;
        g.mul(&y, &z)
    }),
    case("stem3x3", &[&[19, 21, 19, 3]], |g, x| g.conv2d(&p("c"), &x[0], bias(ConvArgs::new(16, 3).stride(2)))),
    case("stem7x7", &[&[3, 23, 26, 3]], |g, x| g.conv2d(&p("c"), &x[0], ConvArgs::new(9, 7).stride(2))),
    case("gray_stem", &[&[3, 12, 11, 1]], |g, x| g.conv2d(&p("c"), &x[0], ConvArgs::new(8, 3).stride(2))),
    case("patches16", &[&[17, 32, 48, 3]], |g, x| g.conv2d(&p("c"), &x[0], bias(patches(24, 16)))),
    case("patches14", &[&[2, 30, 28, 3]], |g, x| g.conv2d(&p("c"), &x[0], bias(patches(24, 14)))),
    case("patches4_with_a_rest", &[&[9, 10, 11, 3]], |g, x| g.conv2d(&p("c"), &x[0], patches(13, 4))),
    case("downsample2x2", &[&[18, 8, 14, 16]], |g, x| g.conv2d(&p("c"), &x[0], bias(patches(24, 2)))),
    case("downsample2x2_with_a_rest", &[&[3, 9, 7, 12]], |g, x| {
        let y = g.conv2d(&p("c"), &x[0], patches(24, 2))?;
        let z = g.conv2d(&p("d"), &x[0], patches(24, 2))?;
        g.mul(&y, &z)
    }),
    case("linear", &[&[4, 37, 48]], |g, x| g.linear(&p("l"), &x[0], 20, true, Init::FanInUniform)),
    case("linear_ragged", &[&[3, 19, 29]], |g, x| g.linear(&p("l"), &x[0], 31, true, Init::FanInUniform)),
    case("linear_of_rows", &[&[70, 48]], |g, x| g.linear(&p("l"), &x[0], 33, true, Init::FanInUniform)),
    case("linear_to_an_embedding", &[&[5, 2, 24]], |g, x| {
        let x = g.reshape(&x[0], &[5, 48])?;
        g.linear(&p("l"), &x, 33, true, Init::FanInUniform)
    }),
    case("linear_with_value_weight", &[&[3, 19, 24], &[16, 24]], |g, x| g.linear_with(&x[0], &x[1], None)),
    case("matmul_of_two_types", &[&[2, 9, 24], &[24, 13]], |g, x| {
        let a = g.reshape(&x[0], &[18, 24])?;
        g.matmul(&a, false, &x[1], false, 0.5)
    }),
    case("matmul_with_itself", &[&[21, 13]], |g, x| g.matmul(&x[0], false, &x[0], true, 0.5)),
];

fn bias(args: ConvArgs) -> ConvArgs {
    ConvArgs { bias: true, ..args }
}

fn patches(channels: usize, size: usize) -> ConvArgs {
    ConvArgs { stride: size, pad: 0, ..ConvArgs::new(channels, size) }
}

#[test]
fn large_cases_match_dfdx_in_f32() {
    check(LARGE, Precision::F32, [1e-5, 1e-5]);
}

#[test]
fn large_cases_match_dfdx_in_bf16() {
    check(LARGE, Precision::Bf16, [1e-2, 1e-2]);
}

/// A net for evaluation with its input.
struct Net {
    graph: Arc<StepGraph>,
    y: Tensor,
    image: Vec<f32>,
}

impl Net {
    fn new(shape: &[usize], build: fn(&mut GraphBuilder, &Tensor) -> Result<Tensor, GraphError>) -> Self {
        let mut g = GraphBuilder::new(false);
        let x = g.input("image", shape);
        let y = build(&mut g, &x).expect("shapes fit");
        g.output("y", &y);
        Net { graph: Arc::new(g.finish()), y, image: noise(3, shape.iter().product()) }
    }

    /// Random parameters and running statistics.
    fn store(&self, seed: u64) -> ParamStore {
        let mut store = ParamStore::default();
        store.init(&self.graph, seed).expect("an empty store takes any graph");
        for (i, p) in store.params_mut().iter_mut().enumerate() {
            let len = p.data.len();
            p.data.iter_mut().zip(noise(seed * 100 + i as u64, len)).for_each(|(v, n)| *v += 0.4 * n);
        }
        store
    }

    fn executor<B: Backend>(&self, store: &ParamStore<B::Buffer>, backend: B) -> Executor<B> {
        Executor::new(Arc::clone(&self.graph), store, Mode::Forward, backend).expect("the store fits")
    }

    fn run<B: Backend>(&self, store: &ParamStore<B::Buffer>, e: &mut Executor<B>) -> Vec<f32> {
        e.forward(store, &[("image", Feed::F32(&self.image))]).expect("the feeds fit");
        e.value(&self.y).into_owned()
    }

    fn expected(&self, store: &ParamStore) -> Vec<f32> {
        self.run(store, &mut self.executor(store, Cpu::new(Kernels::Reference)))
    }

    /// Runs with several parameters, one after another in the same memory, then in other memory.
    fn check(&self, device: &Device, precision: Precision, bar: f64) {
        let agree = |value: &[f32], store: &ParamStore, when: &str| {
            let expected = self.expected(store);
            let error = difference(value, &expected) / norm(&expected);
            assert!(error <= bar, "{when} in {precision:?}: {error:.2e}");
        };
        let (first, second) = (self.store(1), self.store(2));
        let params = Parameters::upload(device, &first).expect("memory");
        let mut e = self.executor(&params.store, Cuda::new(device.clone(), precision));
        agree(&self.run(&params.store, &mut e), &first, "at first");
        agree(&self.run(&params.store, &mut e), &first, "again");
        params.update(device, &second).expect("the same parameters");
        agree(&self.run(&params.store, &mut e), &second, "after an update");
        drop((e, params));
        let params = Parameters::upload(device, &first).expect("memory");
        let mut e = self.executor(&params.store, Cuda::new(device.clone(), precision));
        agree(&self.run(&params.store, &mut e), &first, "in other memory");
    }
}

fn norm_of(act: Activation) -> BatchNormArgs {
    BatchNormArgs::new(act)
}

/// Residuals, norms and activations behind each way of computing.
fn dense_net(g: &mut GraphBuilder, x: &Tensor) -> Result<Tensor, GraphError> {
    let y = g.conv2d(&p("stem"), x, ConvArgs::new(16, 3).stride(2))?;
    let x = g.batch_norm(&p("stem_bn"), &y, norm_of(Activation::Silu))?;
    let y = g.conv2d(&p("a"), &x, ConvArgs::new(24, 1))?;
    let y = g.batch_norm(&p("a_bn"), &y, norm_of(Activation::Identity))?;
    let y = g.conv2d(&p("b"), &y, bias(ConvArgs::new(16, 3)))?;
    let y = g.batch_norm(&p("b_bn"), &y, norm_of(Activation::Identity))?;
    let y = g.add(&y, &x)?;
    let y = g.activation(&y, Activation::Relu);
    let y = g.conv2d(&p("c"), &y, ConvArgs::new(20, 3).groups(4))?;
    let y = g.batch_norm(&p("c_bn"), &y, norm_of(Activation::HardSwish))?;
    let y = g.conv2d(&p("d"), &y, bias(patches(13, 2)))?;
    let y = g.batch_norm(&p("d_bn"), &y, norm_of(Activation::Gelu))?;
    let z = g.linear(&p("fc"), &y, 13, true, Init::FanInUniform)?;
    let z = g.activation(&z, Activation::Gelu);
    let z = g.linear(&p("fc2"), &z, 13, true, Init::FanInUniform)?;
    g.add(&y, &z)
}

fn depthwise_net(g: &mut GraphBuilder, x: &Tensor) -> Result<Tensor, GraphError> {
    let y = g.conv2d(&p("a"), x, ConvArgs::new(16, 3).groups(16))?;
    let y = g.batch_norm(&p("a_bn"), &y, norm_of(Activation::Silu))?;
    let y = g.conv2d(&p("b"), &y, bias(ConvArgs::new(16, 5).groups(16)))?;
    let y = g.batch_norm(&p("b_bn"), &y, norm_of(Activation::Identity))?;
    let y = g.add(&y, x)?;
    let y = g.conv2d(&p("c"), &y, ConvArgs::new(16, 3).groups(16).stride(2))?;
    g.batch_norm(&p("c_bn"), &y, norm_of(Activation::Identity))
}

#[test]
fn fused_values_match_dfdx() {
    let Some(device) = device() else { return };
    let net = Net::new(&[3, 22, 18, 3], dense_net);
    net.check(&device, Precision::F32, 1e-5);
    net.check(&device, Precision::Bf16, 1.5e-2);
}

#[test]
fn fused_depthwise_values_match_dfdx() {
    let Some(device) = device() else { return };
    let net = Net::new(&[2, 11, 9, 16], depthwise_net);
    net.check(&device, Precision::F32, 1e-5);
    net.check(&device, Precision::Bf16, 1.5e-2);
}
