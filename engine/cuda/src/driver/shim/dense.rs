//! Products and convolutions by mcpipe-cpu's kernels, over copies in f32.

use half::bf16;
use mcpipe_cpu::conv::Conv2d;
use mcpipe_cpu::{
    Level, Mat, Workspace, conv2d_backward_data, conv2d_backward_weights, conv2d_forward, gemm::gemm_serial,
};

use super::{Shim, failed};
use crate::driver::{ConvPass, Driver, Product};
use crate::error::CudaError;
use crate::view::{Element, View};

/// Round to nearest, ties away, as a GPU's products do: 10 bits of mantissa.
fn to_tf32(x: f32) -> f32 {
    if x.is_finite() { f32::from_bits((x.to_bits() + 0x1000) & !0x1fff) } else { x }
}

fn read(shim: &Shim, what: &str, v: View, tf32: bool) -> Result<Vec<f32>, CudaError> {
    let bytes = shim.bytes(what, v.address, v.bytes())?;
    match v.element {
        Element::F32 => {
            let float = |b: &[u8]| f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
            let floats = bytes.chunks_exact(4).map(float);
            Ok(if tf32 { floats.map(to_tf32).collect() } else { floats.collect() })
        }
        Element::Bf16 => Ok(bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f32()).collect()),
        other => Err(failed(what, format!("an operand of {other:?}"))),
    }
}

fn write(shim: &Shim, values: &[f32], v: View) -> Result<(), CudaError> {
    let bytes: Vec<u8> = match v.element {
        Element::Bf16 => values.iter().flat_map(|x| bf16::from_f32(*x).to_le_bytes()).collect(),
        _ => values.iter().flat_map(|x| x.to_le_bytes()).collect(),
    };
    shim.upload(&bytes, v.address)
}

/// Fails where a view is shorter than its matrices.
fn span(
    what: &str,
    name: &str,
    v: View,
    [rows, cols, ld]: [usize; 3],
    batch: usize,
    stride: usize,
) -> Result<(), CudaError> {
    if rows == 0 || cols == 0 || batch == 0 {
        return Ok(());
    }
    let end = (batch - 1) * stride + (rows - 1) * ld + cols;
    if ld < cols || end > v.len {
        let dims = format!("{batch} of {rows}×{cols}, rows {ld} and matrices {stride} apart");
        return Err(failed(what, format!("{name} of {} elements is {dims}", v.len)));
    }
    Ok(())
}

pub(super) fn product(
    shim: &Shim,
    p: &Product,
    a: View,
    b: View,
    d: View,
    bias: Option<View>,
) -> Result<(), CudaError> {
    const WHAT: &str = "product";
    let mixed = a.element != b.element || (d.element != Element::F32 && d.element != a.element);
    if mixed || bias.is_some_and(|v| v.element != d.element || v.len != p.n) {
        return Err(failed(WHAT, format!("operands {:?}, {:?}, {:?}, {bias:?}", a.element, b.element, d.element)));
    }
    let (m, n, k) = (p.m, p.n, p.k);
    let stored = |trans: bool, rows: usize, cols: usize| if trans { [cols, rows] } else { [rows, cols] };
    let ([ar, ac], [br, bc]) = (stored(p.trans_a, m, k), stored(p.trans_b, k, n));
    span(WHAT, "a", a, [ar, ac, p.ld[0]], p.batch, p.stride[0])?;
    span(WHAT, "b", b, [br, bc, p.ld[1]], p.batch, p.stride[1])?;
    span(WHAT, "d", d, [m, n, p.ld[2]], p.batch, p.stride[2])?;
    let (a, b) = (read(shim, WHAT, a, p.tf32)?, read(shim, WHAT, b, p.tf32)?);
    let bias = bias.map(|v| read(shim, WHAT, v, false)).transpose()?;
    let mut values = read(shim, WHAT, d, false)?;
    let mut one = vec![0.0; m * n];
    for i in 0..p.batch {
        let (a, b) = (a.get(i * p.stride[0]..).unwrap_or_default(), b.get(i * p.stride[1]..).unwrap_or_default());
        let a = Mat { data: a, ld: p.ld[0], trans: p.trans_a };
        let b = Mat { data: b, ld: p.ld[1], trans: p.trans_b };
        one.fill(0.0);
        if k > 0 {
            gemm_serial(Level::active(), (m, n, k), p.alpha, a, b, false, &mut one, n);
        }
        for (row, sums) in one.chunks_exact(n.max(1)).enumerate() {
            let start = i * p.stride[2] + row * p.ld[2];
            for (j, (old, sum)) in values[start..start + n].iter_mut().zip(sums).enumerate() {
                // With beta = 0 what d holds is not read, NaN or not.
                let kept = if p.beta == 0.0 { 0.0 } else { p.beta * *old };
                *old = sum + kept + bias.as_ref().map_or(0.0, |b| b[j]);
            }
        }
    }
    write(shim, &values, d)
}

/// `[Co,taps,Ci/g]` from `[Co,Ci/g,taps]`, or back.
fn permuted(d: &Conv2d, w: &[f32], to_taps_first: bool) -> Vec<f32> {
    let (taps, channels) = (d.kh * d.kw, d.c_in / d.groups);
    let mut out = vec![0.0; w.len()];
    for o in 0..d.c_out {
        for t in 0..taps {
            for c in 0..channels {
                let (first, last) = ((o * taps + t) * channels + c, (o * channels + c) * taps + t);
                if to_taps_first { out[first] = w[last] } else { out[last] = w[first] }
            }
        }
    }
    out
}

pub(super) fn convolution(
    shim: &Shim,
    pass: ConvPass,
    d: &Conv2d,
    [x, w, y]: [View; 3],
    tf32: bool,
) -> Result<(), CudaError> {
    const WHAT: &str = "convolution";
    let lens = [d.batch * d.h * d.w * d.c_in, d.weights(), d.batch * d.out_h() * d.out_w() * d.c_out];
    if [x.len, w.len, y.len] != lens || [w.element, y.element] != [x.element; 2] {
        return Err(failed(WHAT, format!("{x:?}, {w:?}, {y:?} for {d:?}")));
    }
    let mut ws = Workspace::new();
    let get = |v: View| read(shim, WHAT, v, tf32);
    match pass {
        ConvPass::Forward => {
            let mut out = vec![0.0; y.len];
            conv2d_forward(d, &get(x)?, &permuted(d, &get(w)?, false), None, &mut out, &mut ws);
            write(shim, &out, y)
        }
        ConvPass::Data => {
            let mut dx = vec![0.0; x.len];
            conv2d_backward_data(d, &permuted(d, &get(w)?, false), &get(y)?, &mut dx, false, &mut ws);
            write(shim, &dx, x)
        }
        ConvPass::Filter => {
            let mut dw = vec![0.0; w.len];
            conv2d_backward_weights(d, &get(x)?, &get(y)?, &mut dw, None, &mut ws);
            write(shim, &permuted(d, &dw, true), w)
        }
    }
}
