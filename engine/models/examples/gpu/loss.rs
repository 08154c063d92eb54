//! The fused contrastive and relational loss: forward and VJP over growing batches.

use std::sync::Arc;

use mcpipe_cpu::relational::Relational;
use mcpipe_cuda::{Buffer, Cuda, Device, Element, Gradients, Parameters, Precision};

use mcpipe_graph::{
    Dtype, Executor, Feed, GraphBuilder, GraphError, Init, Mode, PairInputs, ParamStore, Part, StepGraph, Tensor,
};

use crate::{Failure, median};

/// Widths of the student's and the teacher's embeddings.
const DIM: usize = 512;
const TEACHER: usize = 768;

fn graph(batch: usize) -> Result<(StepGraph, [Tensor; 3], Tensor), GraphError> {
    let mut g = GraphBuilder::new(true);
    let x = [
        g.input_with_grad("a", &[batch, DIM]),
        g.input_with_grad("b", &[batch, DIM]),
        g.input_with_grad("scale", &[1]),
    ];
    let targets = PairInputs {
        own: g.int_input("own", &[batch]),
        other: g.int_input("other", &[batch]),
        keep: g.input("keep", &[batch]),
        group: g.int_input("group", &[batch]),
        share: g.input("share", &[batch]),
        column_total: g.input("total", &[batch]),
    };
    let (u, v) = (g.input("u", &[batch, TEACHER]), g.input("v", &[batch, TEACHER]));
    let y = g.relational(&Relational::whole(batch, DIM, &[TEACHER]), &x[0], &x[1], &x[2], &targets, &[(&u, &v)])?;
    g.output("y", &y);
    Ok((g.finish(), x, y))
}

/// Rows of unit length times `scale`.
fn rows(seed: u64, batch: usize, dim: usize, scale: f32) -> Vec<f32> {
    let mut x = Init::Normal(1.0).sample(seed, "rows", &[batch * dim]);
    for row in x.chunks_exact_mut(dim) {
        let norm = row.iter().map(|v| v * v).sum::<f32>().sqrt();
        row.iter_mut().for_each(|v| *v *= scale / norm);
    }
    x
}

/// Seconds of cuBLASLt for the products that the loss is made of: S and T forward; S, T, G·b and Gᵀ·a backward.
fn products(device: &Device, batch: usize) -> Result<[f64; 2], Failure> {
    // A strip of rows stands for all: the whole matrix of a large batch would not fit.
    let rows = batch.min(8192);
    let factor = batch as f64 / rows as f64;
    let make = |n: usize| -> Result<Buffer, Failure> {
        let buffer = Buffer::new(device.alloc(2 * n)?);
        let noise = Init::Normal(1.0).sample(3, "matrix", &[n.min(1 << 22)]);
        let narrow: Vec<u16> = noise.iter().map(|v| (v.to_bits() >> 16) as u16).cycle().take(n).collect();
        device.upload(&narrow, buffer.view(n, Element::Bf16))?;
        Ok(buffer)
    };
    let (left, right, square) = (make(rows * TEACHER)?, make(batch * TEACHER)?, make(rows * batch)?);
    let view = |b: &Buffer, n: usize| b.view(n, Element::Bf16);
    let time = |[m, n, k]: [usize; 3], a: &Buffer, b: &Buffer, d: &Buffer| {
        let (a, b, d) = (view(a, m * k), view(b, n * k), view(d, m * n));
        Ok::<f64, Failure>(factor * median(device, 7, || Ok(device.matmul([m, n, k], a, b, d)?))?)
    };
    let s = time([rows, batch, DIM], &left, &right, &square)?;
    let t = time([rows, batch, TEACHER], &left, &right, &square)?;
    let back = time([rows, DIM, batch], &square, &right, &left)?;
    Ok([s + t, s + t + 2.0 * back])
}

/// Times the loss at `batch`, with bf16 products.
pub fn time(device: &Device, batch: usize) -> Result<(), Failure> {
    let (graph, _, y) = graph(batch)?;
    let graph = Arc::new(graph);
    let store = ParamStore::default();
    let params = Parameters::upload(device, &store)?;
    let mut grads = Gradients::zeros_like(device, &store)?;
    let mut executor =
        Executor::new(Arc::clone(&graph), &params.store, Mode::Train, Cuda::new(device.clone(), Precision::Bf16))?;
    let ids: Vec<i32> = (0..batch as i32).collect();
    let ones = vec![1.0f32; batch];
    let (a, b) = (rows(1, batch, DIM, 1.0), rows(2, batch, DIM, 1.0));
    let (u, v) = (rows(3, batch, TEACHER, 70.0), rows(4, batch, TEACHER, 1.0));
    executor.feed(&[
        ("a", Feed::F32(&a)),
        ("b", Feed::F32(&b)),
        ("scale", Feed::F32(&[100.0])),
        ("own", Feed::I32(&ids)),
        ("other", Feed::I32(&ids)),
        ("keep", Feed::F32(&ones)),
        ("group", Feed::I32(&ids)),
        ("share", Feed::F32(&ones)),
        ("total", Feed::F32(&ones)),
        ("u", Feed::F32(&u)),
        ("v", Feed::F32(&v)),
    ])?;
    let before = device.memory().0;
    let forward = median(device, 7, || Ok(executor.walk(&params.store, &mut |_, _| {})?))?;
    let seed = Buffer::new(device.alloc(8)?);
    device.upload(&[0.3f32, 0.7], seed.view(2, Element::F32))?;
    let backward = median(device, 7, || {
        executor.clear_seeds();
        executor.seed(&y, Part { buffer: &seed, dtype: Dtype::F32, start: 0, len: 2 })?;
        Ok(executor.walk_backward(&params.store, &mut grads.grads)?)
    })?;
    let extra = before.saturating_sub(device.memory().0) as f64 / 1e6;
    let value = executor.value(&y).into_owned();
    let [least_forward, least_backward] = products(device, batch)?;
    println!(
        r#"{{"case": "loss {batch}", "ms": {:.3}, "forward_ms": {:.3}, "backward_ms": {:.3}, "forward_share": {:.2}, "backward_share": {:.2}, "extra_MB": {extra:.0}, "value": {value:?}}}"#,
        (forward + backward) * 1e3,
        forward * 1e3,
        backward * 1e3,
        least_forward / forward,
        least_backward / backward,
    );
    Ok(())
}
