//! Depthwise convolutions: `kernels/depthwise.cu` and `kernels/depthwise_filter.cu`; on tensor cores where
//! `depthwise_band` takes the sizes.

use mcpipe_cpu::conv::Conv2d;
use mcpipe_cpu::token_conv::TokenConv;
use mcpipe_graph::Op;

use super::depthwise_band::Band;
use crate::device::Device;
use crate::error::CudaError;
use crate::launch::{Argument, Arguments, Kernel, Kind, Shape, launch};
use crate::view::{Element, Forward, Grad, View, Vjp};

/// `Conv` of `depthwise.cuh`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
pub(super) struct Conv {
    pub batch: i32,
    pub h: i32,
    pub w: i32,
    pub oh: i32,
    pub ow: i32,
    pub c: i32,
    m: i32,
    pub kh: i32,
    kw: i32,
    pub stride: i32,
    pub pad_h: i32,
    pub pad_w: i32,
    lanes: i32,
}

// SAFETY: repr(C), the fields of the C++ struct in order.
unsafe impl Argument for Conv {
    const KIND: Kind = Kind::Struct;
}

/// Threads of a block of the vector kernels.
const THREADS: usize = 128;

impl Conv {
    fn new(d: &Conv2d) -> Self {
        let [batch, h, w, oh, ow] = [d.batch, d.h, d.w, d.out_h(), d.out_w()].map(|v| v as i32);
        let [c, kh, kw, stride, pad] = [d.c_out, d.kh, d.kw, d.stride, d.pad].map(|v| v as i32);
        let m = (d.c_out / d.c_in) as i32;
        Conv { batch, h, w, oh, ow, c, m, kh, kw, stride, pad_h: pad, pad_w: pad, lanes: 0 }
    }

    /// Over tokens: an image of one column.
    fn tokens(d: &TokenConv) -> Self {
        let [batch, h, c, kh] = [d.batch, d.tokens, d.channels, d.kernel].map(|v| v as i32);
        let (w, pad_h) = (1, kh / 2);
        Conv { batch, h, w, oh: h, ow: w, c, m: 1, kh, kw: 1, stride: 1, pad_h, pad_w: 0, lanes: 0 }
    }

    pub fn inputs(&self) -> usize {
        [self.batch, self.h, self.w, self.c / self.m].map(|v| v as usize).iter().product()
    }

    pub fn outputs(&self) -> usize {
        [self.batch, self.oh, self.ow, self.c].map(|v| v as usize).iter().product()
    }

    pub fn taps(&self) -> usize {
        (self.kh * self.kw) as usize
    }

    /// Whether the kernels with vector loads, `width` channels a thread, take these sizes, and of which element type.
    pub fn vector(&self, width: i32, tensors: [View; 2]) -> Option<Element> {
        let [a, b] = tensors.map(|t| t.element);
        let square = self.kh == self.kw && matches!(self.kh, 3 | 5 | 7) && matches!(self.stride, 1 | 2);
        // Pixel blocks are counted in 32 bits.
        let few = self.outputs().max(self.inputs()) / self.c.max(1) as usize <= i32::MAX as usize / 2;
        (square && few && self.m == 1 && self.c % width == 0 && a == b).then_some(a)
    }

    /// Cuts the channels, `width` a thread, into tiles of at most `most` threads; the tiles.
    fn cut(&mut self, width: usize, most: usize) -> usize {
        let groups = self.c as usize / width;
        let lanes = groups.div_ceil(groups.div_ceil(most));
        self.lanes = lanes as i32;
        groups.div_ceil(lanes)
    }

    /// Blocks along pixels when a thread takes `rows` by `columns` pixels, and `per_processor` blocks fit.
    fn blocks(&self, dev: &Device, rows: i32, columns: i32, tiles: usize, per_processor: usize) -> usize {
        let items = self.batch as usize * (self.oh as usize).div_ceil(rows as usize);
        let items = items * (self.ow as usize).div_ceil(columns as usize);
        let wanted = (per_processor * dev.processors() / tiles).max(1);
        items.div_ceil(THREADS / self.lanes as usize).min(wanted).max(1)
    }
}

/// The kernel for squares of side `k`.
pub(super) fn named(names: [&'static str; 3], k: i32) -> &'static str {
    names[(k as usize - 3) / 2]
}

/// y = conv(x, w) + bias, for evaluation's fused convolutions.
pub(crate) fn convolve(
    dev: &Device,
    d: &Conv2d,
    x: View,
    w: View,
    bias: Option<View>,
    y: View,
) -> Result<(), CudaError> {
    correlate(dev, Conv::new(d), x, w, bias, y)
}

/// y = conv(x, w) + bias.
fn correlate(dev: &Device, d: Conv, x: View, w: View, bias: Option<View>, y: View) -> Result<(), CudaError> {
    let bias = bias.unwrap_or(View::none());
    if let Some(band) = Band::new(&d, [x, y]) {
        return band.correlate(dev, [x, w, bias, y], false, false);
    }
    match (d.stride, d.vector(4, [x, y])) {
        (1, Some(Element::F32)) => square(dev, d, Variant::F32, [x, w, bias, y], false, false),
        (2, Some(element)) => square(dev, d, Variant::by_2(element), [x, w, bias, y], false, false),
        _ => {
            let n = d.outputs();
            launch!(dev, "depthwise", "depthwise_any", Shape::items(n), x, w, bias, y, d, n as i64)
        }
    }
}

/// What a square kernel of `depthwise.cu` computes, as `square` there numbers it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Variant {
    F32 = 0,
    Bf16By2,
    F32By2,
    Bf16TransposedBy2,
    F32TransposedBy2,
}

impl Variant {
    fn by_2(element: Element) -> Self {
        if element == Element::F32 { Variant::F32By2 } else { Variant::Bf16By2 }
    }

    fn transposed_by_2(element: Element) -> Self {
        if element == Element::F32 { Variant::F32TransposedBy2 } else { Variant::Bf16TransposedBy2 }
    }

    /// Rows and columns of the pixels of a thread.
    fn pixels(self, k: i32) -> [i32; 2] {
        match self {
            Variant::F32TransposedBy2 if k == 7 => [2, 2],
            Variant::Bf16By2 | Variant::F32By2 => [4, 1],
            _ => [4, 2],
        }
    }
}

/// Runs a square kernel, with the taps turned around on `flip`; `views`: image read, weights, bias, image written.
fn square(
    dev: &Device,
    mut d: Conv,
    variant: Variant,
    views: [View; 4],
    flip: bool,
    accumulate: bool,
) -> Result<(), CudaError> {
    let tiles = d.cut(4, 16);
    let name = named(["depthwise_3", "depthwise_5", "depthwise_7"], d.kh);
    let [rows, columns] = variant.pixels(d.kh);
    let blocks = d.blocks(dev, rows, columns, tiles, if d.kh == 7 { 2 } else { 3 });
    let mut arguments = Arguments::default();
    views.into_iter().for_each(|view| arguments.push(view));
    arguments.push(d);
    [i32::from(flip), i32::from(accumulate), variant as i32].into_iter().for_each(|value| arguments.push(value));
    dev.launch(Kernel { file: "depthwise", name }, Shape::grid([blocks, tiles, 1], THREADS as u32), arguments)
}

/// dx (+)= the transposed convolution of dy.
fn data(dev: &Device, d: Conv, w: View, dy: View, dx: Grad) -> Result<(), CudaError> {
    // The image read is dy, the one written dx.
    let mut back = Conv { h: d.oh, w: d.ow, oh: d.h, ow: d.w, ..d };
    let views = [dy, w, View::none(), dx.view];
    if d.stride == 1 {
        (back.pad_h, back.pad_w) = (d.kh - 1 - d.pad_h, d.kw - 1 - d.pad_w);
        if let Some(band) = Band::new(&back, [dy, dx.view]) {
            return band.correlate(dev, views, true, dx.accumulate);
        }
    }
    let same = d.pad_h == d.kh / 2 && d.pad_w == d.kw / 2;
    match (d.stride, d.vector(4, [dy, dx.view])) {
        (1, Some(Element::F32)) => square(dev, back, Variant::F32, views, true, dx.accumulate),
        (2, Some(element)) if same => square(dev, back, Variant::transposed_by_2(element), views, false, dx.accumulate),
        _ => {
            let (n, accumulate) = (d.inputs(), i32::from(dx.accumulate));
            launch!(dev, "depthwise", "depthwise_any_data", Shape::items(n), w, dy, dx.view, d, n as i64, accumulate)
        }
    }
}

/// dw and dbias.
fn filter(
    dev: &Device,
    mut d: Conv,
    x: View,
    dy: View,
    dw: Option<Grad>,
    dbias: Option<Grad>,
) -> Result<(), CudaError> {
    let line = (d.taps() + 1) * d.c as usize;
    let width = if d.kh == 3 { 4 } else { 2 };
    let (partials, blocks) = match d.vector(width, [x, dy]) {
        Some(_) if let Some(band) = Band::new(&d, [x, dy]) => band.filter(dev, d.taps(), [x, dy])?,
        Some(element) if d.stride == 2 || element == Element::F32 => {
            let tiles = d.cut(width as usize, 64 / width as usize);
            let f32s = element == Element::F32;
            let variant = i32::from(f32s) + if d.stride == 2 { 2 } else { 0 };
            let rows = if d.stride == 2 { 2 } else { 4 };
            let blocks = d.blocks(dev, rows, 1, tiles, if d.kh == 7 { 2 } else { 3 });
            let partials = dev.scratch(blocks * line, Element::F32)?;
            let name = named(["depthwise_filter_3", "depthwise_filter_5", "depthwise_filter_7"], d.kh);
            let mut arguments = Arguments::default();
            [x, dy, partials].into_iter().for_each(|view| arguments.push(view));
            arguments.push(d);
            arguments.push(variant);
            let shape = Shape::grid([blocks, tiles, 1], THREADS as u32);
            dev.launch(Kernel { file: "depthwise_filter", name }, shape, arguments)?;
            (partials, blocks)
        }
        _ => {
            let (tiles, pixels) = ((d.c as usize).div_ceil(32), d.outputs() / d.c as usize);
            let wanted = (8 * dev.processors() / (tiles * (d.taps() + 1))).max(1);
            let blocks = pixels.div_ceil(64).min(wanted);
            let partials = dev.scratch(blocks * line, Element::F32)?;
            let shape = Shape::grid([blocks, tiles, d.taps() + 1], 256);
            launch!(dev, "depthwise_filter", "depthwise_any_filter", shape, x, dy, partials, d)?;
            (partials, blocks)
        }
    };
    let target = |g: Option<Grad>| g.map_or((View::none(), 0), |g| (g.view, i32::from(g.accumulate)));
    let ((dw, add_w), (dbias, add_bias)) = (target(dw), target(dbias));
    let (shape, taps, blocks) = (Shape::row(line.div_ceil(32), 256), d.taps() as i32, blocks as i32);
    let c = d.c;
    launch!(
        dev,
        "depthwise_filter",
        "depthwise_filter_merge",
        shape,
        partials,
        dw,
        dbias,
        taps,
        c,
        blocks,
        add_w,
        add_bias
    )
}

fn sizes(op: &Op) -> Result<Conv, CudaError> {
    match op {
        Op::Conv2d(d) if d.c_out.is_multiple_of(d.c_in.max(1)) => Ok(Conv::new(d)),
        Op::TokenConv(d) => Ok(Conv::tokens(d)),
        _ => Err(super::unsupported(op)),
    }
}

pub(crate) fn forward(dev: &Device, op: &Op, io: Forward<'_>) -> Result<(), CudaError> {
    let d = sizes(op)?;
    if d.outputs() == 0 {
        return Ok(());
    }
    correlate(dev, d, io.ins[0], io.ins[1], io.ins.get(2).copied(), io.out)
}

pub(crate) fn vjp(dev: &Device, op: &Op, io: Vjp<'_>) -> Result<(), CudaError> {
    let d = sizes(op)?;
    if d.inputs() == 0 || d.outputs() == 0 {
        return Ok(());
    }
    if let Some(dx) = io.grads[0] {
        data(dev, d, io.ins[1], io.dout, dx)?;
    }
    let (dw, dbias) = (io.grads[1], io.grads.get(2).copied().flatten());
    if dw.is_some() || dbias.is_some() {
        filter(dev, d, io.ins[0], io.dout, dw, dbias)?;
    }
    Ok(())
}

#[cfg(test)]
#[path = "depthwise_tests.rs"]
mod tests;
