//! Convolutions: a product over pixels, a product over windows, or cuDNN's; depthwise ones are here where they are fused
//! with what follows.

use mcpipe_cpu::activation::Activation;
use mcpipe_cpu::conv::Conv2d;
use mcpipe_cpu::linear::Linear;
use mcpipe_graph::{FusedConv, Op};

use super::weights::{Fold, Layout};
use super::{Operand, cast, common, copied, epilogue, layer, layer_vjp, product_into};
use crate::device::Device;
use crate::driver::{ConvPass, Product};
use crate::error::CudaError;
use crate::launch::{Shape, launch};
use crate::ops::{depthwise, elementwise};
use crate::view::{Element, Forward, Grad, View, Vjp};

/// How a convolution is computed.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Way {
    /// A product over pixels.
    Pointwise(Linear),
    /// A product over windows that are gathered first.
    Windows,
    /// A kernel of ours.
    Depthwise,
    /// cuDNN.
    Library,
}

/// Images of so few channels are gathered: a library's kernels pad each pixel to eight channels or more.
const FEW_CHANNELS: usize = 4;

/// Bytes of windows that are gathered at a time: about what stays in the second-level cache until the product reads it.
/// Tests on the CPU gather in several parts, too.
const GATHERED: usize = if cfg!(feature = "shim") { 64 << 10 } else { 64 << 20 };

fn way(d: &Conv2d) -> Way {
    let apart = d.kh == d.stride && d.kw == d.stride && d.pad == 0;
    if d.groups > 1 {
        if d.groups == d.c_in { Way::Depthwise } else { Way::Library }
    } else if apart && d.stride == 1 {
        Way::Pointwise(Linear { rows: d.batch * d.h * d.w, c_in: d.c_in, c_out: d.c_out })
    } else if apart || d.c_in <= FEW_CHANNELS {
        Way::Windows
    } else {
        Way::Library
    }
}

/// How cuDNN takes the weights.
fn channels_last(d: &Conv2d) -> Layout {
    Layout::channels_last(d.c_in / d.groups, d.kh * d.kw)
}

/// The windows of some images, as rows of a matrix.
struct Windows<'a> {
    d: &'a Conv2d,
    /// Elements of a row, a multiple of 8: rows are then aligned for the product.
    ld: usize,
    /// Images gathered at a time, a multiple of 8: parts of tensors then start aligned.
    images: usize,
}

impl<'a> Windows<'a> {
    fn new(d: &'a Conv2d, element: Element) -> Self {
        let ld = (d.kh * d.kw * d.c_in).next_multiple_of(8);
        let image = (d.out_h() * d.out_w() * ld * element.bytes()).max(1);
        Windows { d, ld, images: (GATHERED / image / 8 * 8).clamp(8, d.batch.next_multiple_of(8)) }
    }

    fn layout(&self) -> Layout {
        channels_last(self.d).padded(self.ld)
    }

    /// Rows of an image.
    fn places(&self) -> usize {
        self.d.out_h() * self.d.out_w()
    }

    /// First image and number of images of each part.
    fn parts(&self) -> impl Iterator<Item = (usize, usize)> {
        let (step, batch) = (self.images, self.d.batch);
        (0..batch).step_by(step).map(move |first| (first, step.min(batch - first)))
    }

    /// Memory for a part.
    fn scratch(&self, dev: &Device, element: Element) -> Result<View, CudaError> {
        dev.scratch(self.images.min(self.d.batch) * self.places() * self.ld, element)
    }

    fn dims(&self) -> [i32; 10] {
        let d = self.d;
        [d.h, d.w, d.c_in, d.kh, d.kw, d.stride, d.pad, d.out_h(), d.out_w(), self.ld].map(|n| n as i32)
    }

    fn gather(&self, dev: &Device, x: View, to: View, first: usize, images: usize) -> Result<(), CudaError> {
        let [h, w, c, kh, kw, stride, pad, oh, ow, ld] = self.dims();
        let (start, rows) = ((first * self.places()) as i64, images * self.places());
        let shape = Shape::eights(rows * self.ld);
        launch!(
            dev,
            "dense",
            "dense_columns",
            shape,
            x,
            to,
            start,
            rows as i64,
            h,
            w,
            c,
            kh,
            kw,
            stride,
            pad,
            oh,
            ow,
            ld
        )
    }

    fn scatter(&self, dev: &Device, from: View, dx: Grad, first: usize, images: usize) -> Result<(), CudaError> {
        let [h, w, c, kh, kw, stride, pad, oh, ow, ld] = self.dims();
        let elements = images * self.d.h * self.d.w * self.d.c_in;
        let shape = if self.d.c_in.is_multiple_of(8) { Shape::eights(elements) } else { Shape::items(elements) };
        let accumulate = i32::from(dx.accumulate);
        let (first, images) = (first as i64, images as i64);
        launch!(
            dev,
            "dense",
            "dense_columns_vjp",
            shape,
            from,
            dx.view,
            first,
            images,
            accumulate,
            h,
            w,
            c,
            kh,
            kw,
            stride,
            pad,
            oh,
            ow,
            ld
        )
    }

    fn forward(
        &self,
        dev: &Device,
        operand: &Operand,
        bias: Option<View>,
        x: View,
        out: View,
    ) -> Result<(), CudaError> {
        let element = common(&[x, out]);
        let x = cast(dev, x, element)?;
        let w = operand.weights(dev, element, self.layout())?;
        let columns = self.scratch(dev, element)?;
        for (first, images) in self.parts() {
            self.gather(dev, x, columns, first, images)?;
            let rows = images * self.places();
            let y = out.slice(first * self.places() * self.d.c_out, rows * self.d.c_out);
            dev.product(&Product::new(rows, self.d.c_out, self.ld, false, true), columns, w, y, bias)?;
        }
        Ok(())
    }

    fn dx(&self, dev: &Device, w: View, dout: View, dx: Grad) -> Result<(), CudaError> {
        let w = copied(dev, w, None, dout.element, self.layout())?;
        // Sums over windows that overlap keep their digits.
        let apart = self.d.kh <= self.d.stride && self.d.kw <= self.d.stride;
        let columns = self.scratch(dev, if apart { dout.element } else { Element::F32 })?;
        for (first, images) in self.parts() {
            let rows = images * self.places();
            let dy = dout.slice(first * self.places() * self.d.c_out, rows * self.d.c_out);
            dev.product(&Product::new(rows, self.ld, self.d.c_out, false, false), dy, w, columns, None)?;
            self.scatter(dev, columns, dx, first, images)?;
        }
        Ok(())
    }

    fn dw(&self, dev: &Device, x: View, dout: View, dw: Grad) -> Result<(), CudaError> {
        let x = cast(dev, x, dout.element)?;
        let columns = self.scratch(dev, dout.element)?;
        let sum = dev.scratch(self.d.c_out * self.ld, Element::F32)?;
        for (first, images) in self.parts() {
            self.gather(dev, x, columns, first, images)?;
            let rows = images * self.places();
            let dy = dout.slice(first * self.places() * self.d.c_out, rows * self.d.c_out);
            let p = Product::new(self.d.c_out, self.ld, rows, true, false);
            product_into(dev, p, dy, columns, Grad { view: sum, accumulate: first > 0 })?;
        }
        weight_gradient(dev, self.d, sum, self.ld, dw)
    }
}

/// dw `[Co,Ci/g,kh,kw]` (+)= from `[Co,kh,kw,Ci/g]`, whose rows are `ld` apart.
fn weight_gradient(dev: &Device, d: &Conv2d, from: View, ld: usize, dw: Grad) -> Result<(), CudaError> {
    let [channels, taps, ld] = [d.c_in / d.groups, d.kh * d.kw, ld].map(|n| n as i64);
    let (shape, accumulate) = (Shape::items(dw.view.len), i32::from(dw.accumulate));
    launch!(dev, "dense", "dense_weight_gradient", shape, from, dw.view, channels, taps, ld, accumulate)
}

/// What follows a convolution and its bias.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Then {
    /// Added.
    pub residual: Option<View>,
    /// Last.
    pub act: Activation,
}

/// y = act(conv(x, w) + bias + residual). A bias alone is the product's epilogue; everything else is one more pass.
pub(super) fn forward(
    dev: &Device,
    d: &Conv2d,
    operand: &Operand,
    then: Then,
    x: View,
    out: View,
) -> Result<(), CudaError> {
    let way = way(d);
    let last = then.residual.is_some() || then.act != Activation::Identity;
    let within = match way {
        _ if last => None,
        Way::Pointwise(_) | Way::Windows => operand.offset(dev, out.element)?,
        Way::Depthwise => operand.offset(dev, Element::F32)?,
        Way::Library => None,
    };
    let y = match way {
        Way::Pointwise(d) => layer(dev, &d, operand, within, x, out).map(|()| out),
        Way::Windows => Windows::new(d, common(&[x, out])).forward(dev, operand, within, x, out).map(|()| out),
        Way::Depthwise => {
            let w = operand.weights(dev, Element::F32, Layout::plain(d.kh * d.kw))?;
            depthwise::convolve(dev, d, x, w, within, out).map(|()| out)
        }
        Way::Library => library(dev, d, operand, x, out),
    }?;
    let bias = if within.is_none() { operand.offset(dev, Element::F32)? } else { None };
    if !last && bias.is_none() && y == out {
        return Ok(());
    }
    epilogue(dev, y, bias, then.residual, then.act, d.c_out, out)
}

/// conv(x, w) by cuDNN: in `out`, or, if that has another type than the operands, in scratch memory.
fn library(dev: &Device, d: &Conv2d, operand: &Operand, x: View, out: View) -> Result<View, CudaError> {
    let element = common(&[x, out]);
    let x = cast(dev, x, element)?;
    let w = operand.weights(dev, element, channels_last(d))?;
    let y = if out.element == element { out } else { dev.scratch(out.len, element)? };
    dev.convolution(ConvPass::Forward, d, x, w, y)?;
    Ok(y)
}

/// The gradients of x and w.
pub(super) fn vjp(dev: &Device, d: &Conv2d, io: Vjp<'_>) -> Result<(), CudaError> {
    let (x, w, dx, dw) = (io.ins[0], io.ins[1], io.grads[0], io.grads[1]);
    if io.dout.len == 0 {
        // The value is empty: nothing depends on x.
        return match dx.filter(|g| !g.accumulate) {
            Some(dx) => dev.fill(dx.view, 0),
            None => Ok(()),
        };
    }
    let dout = cast(dev, io.dout, common(&[x, io.dout]))?;
    match way(d) {
        Way::Depthwise => depthwise::vjp(dev, &Op::Conv2d(*d), io),
        Way::Pointwise(d) => layer_vjp(dev, &d, x, w, dout, [dx, dw]),
        Way::Windows => {
            let windows = Windows::new(d, Element::F32);
            dx.map_or(Ok(()), |dx| windows.dx(dev, w, dout, dx))?;
            dw.map_or(Ok(()), |dw| windows.dw(dev, x, dout, dw))
        }
        Way::Library => {
            if let Some(dx) = dx {
                let w = copied(dev, w, None, dout.element, channels_last(d))?;
                let direct = !dx.accumulate && dx.view.element == dout.element;
                let to = if direct { dx.view } else { dev.scratch(dx.view.len, dout.element)? };
                dev.convolution(ConvPass::Data, d, to, w, dout)?;
                if !direct {
                    elementwise::copy(dev, to, dx.view, dx.accumulate)?;
                }
            }
            if let Some(dw) = dw {
                let x = cast(dev, x, dout.element)?;
                let own = dev.scratch(dw.view.len, dout.element)?;
                dev.convolution(ConvPass::Filter, d, x, own, dout)?;
                weight_gradient(dev, d, own, d.kh * d.kw * (d.c_in / d.groups), dw)?;
            }
            Ok(())
        }
    }
}

/// y = act(norm(conv(x, w) + bias) + residual), the norm folded into weights and bias.
pub(super) fn fused(dev: &Device, f: &FusedConv, io: Forward<'_>) -> Result<(), CudaError> {
    let mut rest = io.ins[2..].iter().copied();
    let bias = if f.bias { rest.next() } else { None };
    let fold = f.norm.map(|eps| Fold { norm: std::array::from_fn(|_| rest.next().unwrap_or(View::none())), eps });
    let residual = if f.residual { rest.next() } else { None };
    let operand = Operand { w: io.ins[1], bias, fold };
    forward(dev, &f.conv, &operand, Then { residual, act: f.act }, io.ins[0], io.out)
}
