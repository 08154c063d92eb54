//! Dense products and convolutions: cuBLASLt and cuDNN, with `kernels/dense.cu` around them.
//!
//! An op computes in bf16 as soon as its input or its value is bf16, else in f32; parameters are f32 and read through the
//! copies of [`weights`].

mod conv;
mod weights;

use mcpipe_cpu::activation::Activation;
use mcpipe_cpu::gemm::Gemm;
use mcpipe_cpu::linear::Linear;
use mcpipe_graph::Op;

use crate::device::Device;
use crate::driver::Product;
use crate::error::CudaError;
use crate::launch::{Shape, launch};
use crate::ops::columns::Sum;
use crate::ops::elementwise;
use crate::view::{Element, Forward, Grad, View, Vjp};
use conv::Then;
use weights::{Fold, Layout, weights as copied};
pub(crate) use weights::{Weights, refresh_weights};

pub(crate) fn forward(dev: &Device, op: &Op, io: Forward<'_>) -> Result<(), CudaError> {
    if io.out.len == 0 {
        return Ok(());
    }
    match op {
        Op::Linear(d) => {
            let operand = Operand::new(&io);
            let bias = operand.offset(dev, io.out.element)?;
            layer(dev, d, &operand, bias, io.ins[0], io.out)
        }
        Op::MatMul { dims, alpha } => matmul(dev, dims, *alpha, io),
        Op::Conv2d(d) => conv::forward(dev, d, &Operand::new(&io), Then::default(), io.ins[0], io.out),
        Op::FusedConv(f) => conv::fused(dev, f, io),
        _ => Err(super::unsupported(op)),
    }
}

pub(crate) fn vjp(dev: &Device, op: &Op, io: Vjp<'_>) -> Result<(), CudaError> {
    match op {
        Op::Linear(d) => {
            bias_vjp(dev, &io)?;
            let element = common(&[io.ins[0], io.dout]);
            let dout = cast(dev, io.dout, element)?;
            layer_vjp(dev, d, io.ins[0], io.ins[1], dout, [io.grads[0], io.grads[1]])
        }
        Op::MatMul { dims, alpha } => matmul_vjp(dev, dims, *alpha, io),
        Op::Conv2d(d) => {
            bias_vjp(dev, &io)?;
            conv::vjp(dev, d, io)
        }
        _ => Err(super::unsupported(op)),
    }
}

/// Weights and bias of a product, with what is folded into them.
#[derive(Clone, Copy)]
struct Operand {
    w: View,
    bias: Option<View>,
    fold: Option<Fold>,
}

impl Operand {
    fn new(io: &Forward<'_>) -> Self {
        Operand { w: io.ins[1], bias: io.ins.get(2).copied(), fold: None }
    }

    fn weights(&self, dev: &Device, element: Element, layout: Layout) -> Result<View, CudaError> {
        copied(dev, self.w, self.fold, element, layout)
    }

    fn offset(&self, dev: &Device, element: Element) -> Result<Option<View>, CudaError> {
        weights::offset(dev, self.bias, self.fold, element)
    }
}

/// The type to compute in: bf16 as soon as one of them is.
fn common(views: &[View]) -> Element {
    if views.iter().any(|v| v.element == Element::Bf16) { Element::Bf16 } else { Element::F32 }
}

/// The same values in another type.
fn cast(dev: &Device, x: View, element: Element) -> Result<View, CudaError> {
    if x.element == element {
        return Ok(x);
    }
    let to = dev.scratch(x.len, element)?;
    elementwise::copy(dev, x, to, false)?;
    Ok(to)
}

/// A product into a gradient.
fn product_into(dev: &Device, p: Product, a: View, b: View, to: Grad) -> Result<(), CudaError> {
    if to.view.element == Element::F32 || to.view.element == a.element {
        let beta = if to.accumulate { 1.0 } else { 0.0 };
        return dev.product(&Product { beta, ..p }, a, b, to.view, None);
    }
    let wide = dev.scratch(to.view.len, Element::F32)?;
    dev.product(&p, a, b, wide, None)?;
    elementwise::copy(dev, wide, to.view, to.accumulate)
}

/// y = x wᵀ + bias, a bias of y's type.
fn layer(dev: &Device, d: &Linear, operand: &Operand, bias: Option<View>, x: View, out: View) -> Result<(), CudaError> {
    let element = common(&[x, out]);
    let x = cast(dev, x, element)?;
    let w = operand.weights(dev, element, Layout::plain(d.c_in))?;
    dev.product(&Product::new(d.rows, d.c_out, d.c_in, false, true), x, w, out, bias)
}

/// dx (+)= dy w, dw (+)= dyᵀ x; `dout` is in the type to compute in.
fn layer_vjp(
    dev: &Device,
    d: &Linear,
    x: View,
    w: View,
    dout: View,
    [dx, dw]: [Option<Grad>; 2],
) -> Result<(), CudaError> {
    if let Some(dx) = dx {
        let w = copied(dev, w, None, dout.element, Layout::plain(d.c_in))?;
        product_into(dev, Product::new(d.rows, d.c_in, d.c_out, false, false), dout, w, dx)?;
    }
    if let Some(dw) = dw {
        let x = cast(dev, x, dout.element)?;
        product_into(dev, Product::new(d.c_out, d.c_in, d.rows, true, false), dout, x, dw)?;
    }
    Ok(())
}

/// The gradient of argument 2, where there is one.
fn bias_vjp(dev: &Device, io: &Vjp<'_>) -> Result<(), CudaError> {
    match io.grads.get(2) {
        Some(Some(dbias)) => {
            let c = dbias.view.len;
            Sum::new(1, io.dout.len / c.max(1), c).of(dev, io.dout, *dbias)
        }
        _ => Ok(()),
    }
}

/// y [n/c, c] = act(x + bias + residual); y may be x.
fn epilogue(
    dev: &Device,
    x: View,
    bias: Option<View>,
    residual: Option<View>,
    act: Activation,
    c: usize,
    y: View,
) -> Result<(), CudaError> {
    let [bias, residual] = [bias, residual].map(|v| v.unwrap_or(View::none()));
    let (n, act) = (y.len as i64, elementwise::code(act));
    launch!(dev, "dense", "dense_epilogue", Shape::eights(y.len), x, bias, residual, y, n, c as i32, act)
}

/// y = alpha · op(a) · op(b).
fn matmul(dev: &Device, d: &Gemm, alpha: f32, io: Forward<'_>) -> Result<(), CudaError> {
    let element = common(&[io.ins[0], io.ins[1], io.out]);
    let (a, b) = (cast(dev, io.ins[0], element)?, cast(dev, io.ins[1], element)?);
    let p = Product { alpha, ..Product::new(d.m, d.n, d.k, d.trans_a, d.trans_b) };
    dev.product(&p, a, b, io.out, None)
}

/// da (+)= alpha · dy · op(b)ᵀ, db (+)= alpha · op(a)ᵀ · dy, each transposed where its operand is.
fn matmul_vjp(dev: &Device, d: &Gemm, alpha: f32, io: Vjp<'_>) -> Result<(), CudaError> {
    let element = common(&[io.ins[0], io.ins[1], io.dout]);
    let dy = cast(dev, io.dout, element)?;
    let &Gemm { m, n, k, trans_a, trans_b } = d;
    if let Some(da) = io.grads[0] {
        let b = cast(dev, io.ins[1], element)?;
        let (p, l, r) = if trans_a {
            (Product::new(k, m, n, trans_b, true), b, dy)
        } else {
            (Product::new(m, k, n, false, !trans_b), dy, b)
        };
        product_into(dev, Product { alpha, ..p }, l, r, da)?;
    }
    if let Some(db) = io.grads[1] {
        let a = cast(dev, io.ins[0], element)?;
        let (p, l, r) = if trans_b {
            (Product::new(n, k, m, true, trans_a), dy, a)
        } else {
            (Product::new(k, n, m, !trans_a, false), a, dy)
        };
        product_into(dev, Product { alpha, ..p }, l, r, db)?;
    }
    Ok(())
}
