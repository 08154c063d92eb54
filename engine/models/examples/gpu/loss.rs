//! The fused contrastive and relational loss: forward and VJP over growing batches. The student's embeddings and their
//! gradients are f32, the teacher's embeddings, which need no gradient, bf16; products are in bf16.

use mcpipe_cpu::relational::Relational;
use mcpipe_cuda::{Buffer, Device, Element, Grad, Pairs, View};
use mcpipe_graph::Init;

use crate::{Failure, median};

/// Widths of the student's and the teacher's embeddings.
const DIM: usize = 512;
const TEACHER: usize = 768;

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

fn narrow(x: &[f32]) -> Vec<u16> {
    x.iter().map(|v| (v.to_bits() >> 16) as u16).collect()
}

/// Memory on the device, and views of it.
#[derive(Default)]
struct Room(Vec<Buffer>);

impl Room {
    fn empty(&mut self, device: &Device, len: usize, element: Element) -> Result<View, Failure> {
        let buffer = Buffer::new(device.alloc(len * 4)?);
        let view = buffer.view(len, element);
        self.0.push(buffer);
        Ok(view)
    }

    fn f32(&mut self, device: &Device, x: &[f32]) -> Result<View, Failure> {
        let view = self.empty(device, x.len(), Element::F32)?;
        device.upload(x, view)?;
        Ok(view)
    }

    fn i32(&mut self, device: &Device, x: &[i32]) -> Result<View, Failure> {
        let view = self.empty(device, x.len(), Element::I32)?;
        device.upload(x, view)?;
        Ok(view)
    }

    fn bf16(&mut self, device: &Device, x: &[f32]) -> Result<View, Failure> {
        let view = self.empty(device, x.len(), Element::Bf16)?;
        device.upload(&narrow(x), view)?;
        Ok(view)
    }
}

/// Times the loss at `batch`. Its memory is right for the first batch of a process: scratch memory stays.
pub fn time(device: &Device, batch: usize) -> Result<(), Failure> {
    // Kernels' code and stacks are the device's, loaded once for all batches.
    run(device, 128, false)?;
    run(device, batch, true)
}

/// Forward and VJP at `batch`, once, or `timed` and printed.
fn run(device: &Device, batch: usize, timed: bool) -> Result<(), Failure> {
    let dims = Relational::whole(batch, DIM, &[TEACHER]);
    let pairs = Pairs::new(&dims, true)?;
    let ids: Vec<i32> = (0..batch as i32).collect();
    let ones = vec![1.0f32; batch];
    let mut room = Room::default();
    let r = &mut room;
    let ins = [
        r.f32(device, &rows(1, batch, DIM, 1.0))?,
        r.f32(device, &rows(2, batch, DIM, 1.0))?,
        r.f32(device, &[100.0])?,
        r.i32(device, &ids)?,
        r.i32(device, &ids)?,
        r.f32(device, &ones)?,
        r.i32(device, &ids)?,
        r.f32(device, &ones)?,
        r.f32(device, &ones)?,
        r.bf16(device, &rows(3, batch, TEACHER, 70.0))?,
        r.bf16(device, &rows(4, batch, TEACHER, 1.0))?,
    ];
    let (out, dout) = (r.f32(device, &[0.0, 0.0])?, r.f32(device, &[0.3, 0.7])?);
    let mut grads = [None; 3];
    for (grad, len) in grads.iter_mut().zip([batch * DIM, batch * DIM, 1]) {
        *grad = Some(Grad { view: r.empty(device, len, Element::F32)?, accumulate: false });
    }
    // All that follows is beyond inputs and gradients.
    let before = device.memory().0;
    let saved = pairs.saved();
    let saved: Vec<View> = saved.iter().map(|n| r.empty(device, *n, Element::F32)).collect::<Result<_, _>>()?;
    let forward = || -> Result<(), Failure> {
        pairs.statistics(device, &ins, &saved)?;
        device.release_scratch();
        pairs.finish(device, &ins, &saved, out)?;
        device.release_scratch();
        Ok(())
    };
    let backward = || -> Result<(), Failure> {
        pairs.backward(device, &ins, &saved, dout, grads)?;
        device.release_scratch();
        Ok(())
    };
    // Both before either is recorded: recordings keep scratch memory that a later op finds too small.
    forward()?;
    backward()?;
    if !timed {
        return Ok(device.synchronize()?);
    }
    let (forward, backward) = (median(device, 9, forward)?, median(device, 9, backward)?);
    let extra = before.saturating_sub(device.memory().0) as f64 / 1e6;
    let allowed = 1024.0 * batch as f64 * 2.0 / 1e6 + 64.0;
    let value = device.download(out)?;
    // Last: it records products, and scratch memory that grows after a recording is kept for it.
    let [least_forward, least_backward] = products(device, batch)?;
    println!(
        r#"{{"case": "loss {batch}", "ms": {:.3}, "forward_ms": {:.3}, "backward_ms": {:.3}, "forward_share": {:.2}, "backward_share": {:.2}, "extra_MB": {extra:.0}, "allowed_MB": {allowed:.0}, "value": {value:?}}}"#,
        (forward + backward) * 1e3,
        forward * 1e3,
        backward * 1e3,
        least_forward / forward,
        least_backward / backward,
    );
    Ok(())
}
