//! Normalisations: `kernels/norm.cu` (batch and group norm) and `kernels/layer_norm.cu`.

use mcpipe_cpu::norm::{GroupNorm, Norm};
use mcpipe_graph::{Activation, Op};

use super::elementwise::code;
use crate::device::Device;
use crate::error::CudaError;
use crate::launch::{Argument, Arguments, Kernel, Kind, Shape, launch};
use crate::view::{Element, Forward, Grad, View, Vjp};

/// Threads of a block in `norm.cu`.
const THREADS: usize = 256;
/// Most channels of a row that `layer_norm` holds in registers.
const NARROW: usize = 1024;
/// Threads of a block of `layer_norm_vjp`.
const LAYER_THREADS: usize = 128;

/// `Layout` of `norm.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Layout {
    rows: i64,
    per_block: i64,
    c: i32,
    tx: i32,
    ty: i32,
    kind: i32,
}

// SAFETY: repr(C), the fields of the C++ struct in order.
unsafe impl Argument for Layout {
    const KIND: Kind = Kind::Struct;
}

/// `Constants` of `norm.cu`.
#[derive(Clone, Copy, Debug)]
#[repr(C)]
struct Constants {
    mean: View,
    second: View,
    gamma: View,
    beta: View,
    eps: f32,
    from_variance: i32,
    per_image: i32,
    act: i32,
}

// SAFETY: as above.
unsafe impl Argument for Constants {
    const KIND: Kind = Kind::Struct;
}

/// Which of `channels.cuh`'s kinds holds the channels of these tensors.
fn kind(c: usize, tensors: &[View]) -> i32 {
    let all = |e| tensors.iter().all(|t| t.element == e);
    match c.is_multiple_of(8) {
        false => 3,
        true if all(Element::Bf16) => 0,
        true if all(Element::F32) => 1,
        true => 2,
    }
}

/// How `images` images of `[rows, c]` are cut into blocks, and the grid.
fn cut(dev: &Device, images: usize, rows: usize, c: usize, kind: i32) -> (Layout, [usize; 3]) {
    let groups = if kind == 3 { c } else { c / 8 };
    let tiles = groups.div_ceil(64);
    // Whole groups of four start at 64 bytes of bf16.
    let tx = if tiles > 1 { groups.div_ceil(tiles).next_multiple_of(4) } else { groups };
    let tiles = groups.div_ceil(tx);
    let ty = THREADS / tx;
    // Two blocks fit on a multiprocessor; four make waves that even out. A thread has eight rows or more.
    let wanted = (4 * dev.processors() / (tiles * images)).max(1);
    let blocks = rows.div_ceil(8 * ty).clamp(1, wanted);
    let per_block = rows.div_ceil(blocks);
    let (per_block, c, tx_, ty) = (per_block as i64, c as i32, tx as i32, ty as i32);
    let blocks = rows.div_ceil(per_block as usize);
    (Layout { rows: rows as i64, per_block, c, tx: tx_, ty, kind }, [blocks, tiles, images])
}

fn shape(grid: [usize; 3]) -> Shape {
    Shape::grid(grid, THREADS as u32)
}

/// An optional gradient as a kernel takes it.
fn target(g: Option<Grad>) -> (View, i32) {
    g.map_or((View::none(), 0), |g| (g.view, i32::from(g.accumulate)))
}

pub(crate) fn forward(dev: &Device, op: &Op, io: Forward<'_>) -> Result<(), CudaError> {
    if io.out.len == 0 {
        return Ok(());
    }
    match op {
        Op::BatchNorm { dims, act, .. } => batch_norm(dev, dims, *act, io),
        Op::BatchNormEval { dims, act } => {
            let (layout, grid) = cut(dev, 1, dims.rows, dims.c, kind(dims.c, &[io.ins[0], io.out]));
            let k = constants(&io.ins[1..3], [io.ins[3], io.ins[4]], *act, Some(dims.eps), false);
            launch!(dev, "norm", "norm_apply", shape(grid), io.ins[0], io.out, k, layout)
        }
        Op::LayerNorm(dims) => layer_norm(dev, dims, io),
        Op::GroupNorm(dims) => group_norm(dev, dims, io),
        _ => Err(super::unsupported(op)),
    }
}

pub(crate) fn vjp(dev: &Device, op: &Op, io: Vjp<'_>) -> Result<(), CudaError> {
    if io.dout.len == 0 {
        return Ok(());
    }
    match op {
        Op::BatchNorm { dims, act, .. } => {
            let k = constants(&io.ins[1..3], [io.saved[0], io.saved[1]], *act, None, false);
            batch_norm_vjp(dev, dims, k, true, io)
        }
        Op::BatchNormEval { dims, act } => {
            let k = constants(&io.ins[1..3], [io.ins[3], io.ins[4]], *act, Some(dims.eps), false);
            batch_norm_vjp(dev, dims, k, false, io)
        }
        Op::LayerNorm(dims) => layer_norm_vjp(dev, dims, io),
        Op::GroupNorm(dims) => group_norm_vjp(dev, dims, io),
        _ => Err(super::unsupported(op)),
    }
}

/// `statistics` are mean and 1/std, or, with an epsilon, mean and variance.
fn constants(affine: &[View], statistics: [View; 2], act: Activation, eps: Option<f32>, per_image: bool) -> Constants {
    let [mean, second] = statistics;
    Constants {
        mean,
        second,
        gamma: affine[0],
        beta: affine[1],
        eps: eps.unwrap_or(0.0),
        from_variance: i32::from(eps.is_some()),
        per_image: i32::from(per_image),
        act: code(act),
    }
}

fn batch_norm(dev: &Device, d: &Norm, act: Activation, io: Forward<'_>) -> Result<(), CudaError> {
    let (x, mean, rstd) = (io.ins[0], io.saved[0], io.saved[1]);
    let (layout, grid) = cut(dev, 1, d.rows, d.c, kind(d.c, &[x, io.out]));
    let partials = dev.scratch(grid[0] * 2 * d.c, Element::F32)?;
    launch!(dev, "norm", "norm_moments", shape(grid), x, partials, layout)?;
    let merge = Shape::row(d.c.div_ceil(8), THREADS as u32);
    launch!(dev, "norm", "norm_merge_moments", merge, partials, mean, rstd, layout, grid[0] as i32, d.eps)?;
    let k = constants(&io.ins[1..3], [mean, rstd], act, None, false);
    launch!(dev, "norm", "norm_apply", shape(grid), x, io.out, k, layout)
}

/// `batch`: the statistics depend on x.
fn batch_norm_vjp(dev: &Device, d: &Norm, k: Constants, batch: bool, io: Vjp<'_>) -> Result<(), CudaError> {
    let (x, dy, dx) = (io.ins[0], io.dout, io.grads[0]);
    let (dgamma, add_gamma) = target(io.grads[1]);
    let (dbeta, add_beta) = target(io.grads[2]);
    let through = batch && dx.is_some();
    let lines = if through { dev.scratch(2 * d.c, Element::F32)? } else { View::none() };
    if through || io.grads[1].is_some() || io.grads[2].is_some() {
        let (layout, grid) = cut(dev, 1, d.rows, d.c, kind(d.c, &[x, dy]));
        let partials = dev.scratch(grid[0] * 2 * d.c, Element::F32)?;
        launch!(dev, "norm", "norm_sums", shape(grid), x, dy, partials, k, layout)?;
        let (blocks, rows) = (grid[0] as i32, d.rows as f32);
        let sums = Sums { partials, blocks, c: d.c, dgamma, dbeta, add: [add_gamma, add_beta] };
        merge_sums(dev, sums, lines, k.second, k.gamma, rows)?;
    }
    let Some(dx) = dx else { return Ok(()) };
    let (layout, grid) = cut(dev, 1, d.rows, d.c, kind(d.c, &[x, dy, dx.view]));
    let accumulate = i32::from(dx.accumulate);
    launch!(dev, "norm", "norm_input", shape(grid), x, dy, dx.view, lines, k, layout, accumulate)
}

/// Partial sums `[blocks, 2, c]` and where they go.
struct Sums {
    partials: View,
    blocks: i32,
    c: usize,
    dgamma: View,
    dbeta: View,
    add: [i32; 2],
}

fn merge_sums(dev: &Device, s: Sums, lines: View, rstd: View, gamma: View, rows: f32) -> Result<(), CudaError> {
    let shape = Shape::row(s.c.div_ceil(8), THREADS as u32);
    let (c, [add_gamma, add_beta]) = (s.c as i32, s.add);
    let (p, b) = (s.partials, s.blocks);
    launch!(
        dev,
        "norm",
        "norm_merge_sums",
        shape,
        p,
        s.dgamma,
        s.dbeta,
        add_gamma,
        add_beta,
        lines,
        rstd,
        gamma,
        c,
        b,
        rows
    )
}

/// Moves running statistics towards a batch's.
pub(crate) fn running_statistics(
    dev: &Device,
    d: &Norm,
    momentum: f32,
    mean: View,
    rstd: View,
    running_mean: View,
    running_var: View,
) -> Result<(), CudaError> {
    let unbias = if d.rows > 1 { d.rows as f64 / (d.rows - 1) as f64 } else { 1.0 };
    let (shape, c) = (Shape::items(d.c), d.c as i32);
    launch!(dev, "norm", "norm_running", shape, mean, rstd, running_mean, running_var, c, momentum, d.eps, unbias)
}

fn group_norm(dev: &Device, d: &GroupNorm, io: Forward<'_>) -> Result<(), CudaError> {
    let (x, mean, rstd) = (io.ins[0], io.saved[0], io.saved[1]);
    let kind = kind(d.c, &[x, io.out]);
    let n = d.rows * d.c;
    let wanted = (8 * dev.processors() / d.batch).max(1);
    let chunks = n.div_ceil(64 * THREADS).clamp(1, wanted);
    let chunk = n.div_ceil(chunks).next_multiple_of(8);
    let chunks = n.div_ceil(chunk);
    let partials = dev.scratch(d.batch * chunks * 2, Element::F32)?;
    let (n, chunk) = (n as i64, chunk as i64);
    launch!(dev, "norm", "group_moments", shape([chunks, d.batch, 1]), x, partials, n, chunk, kind)?;
    let (images, parts) = (d.batch as i32, chunks as i32);
    let merge = Shape::items(d.batch);
    launch!(dev, "norm", "group_merge_moments", merge, partials, mean, rstd, images, parts, n, chunk, d.eps)?;
    let (layout, grid) = cut(dev, d.batch, d.rows, d.c, kind);
    let k = constants(&io.ins[1..3], [mean, rstd], Activation::Identity, None, true);
    launch!(dev, "norm", "norm_apply", shape(grid), x, io.out, k, layout)
}

fn group_norm_vjp(dev: &Device, d: &GroupNorm, io: Vjp<'_>) -> Result<(), CudaError> {
    let (x, dy, rstd) = (io.ins[0], io.dout, io.saved[1]);
    let k = constants(&[io.ins[1], io.ins[2]], [io.saved[0], rstd], Activation::Identity, None, true);
    let (layout, grid) = cut(dev, d.batch, d.rows, d.c, kind(d.c, &[x, dy]));
    let partials = dev.scratch(d.batch * grid[0] * 2 * d.c, Element::F32)?;
    launch!(dev, "norm", "norm_sums", shape(grid), x, dy, partials, k, layout)?;
    let (dgamma, add_gamma) = target(io.grads[1]);
    let (dbeta, add_beta) = target(io.grads[2]);
    if io.grads[1].is_some() || io.grads[2].is_some() {
        let blocks = (d.batch * grid[0]) as i32;
        let sums = Sums { partials, blocks, c: d.c, dgamma, dbeta, add: [add_gamma, add_beta] };
        merge_sums(dev, sums, View::none(), rstd, k.gamma, 0.0)?;
    }
    let Some(dx) = io.grads[0] else { return Ok(()) };
    let lines = dev.scratch(2 * d.batch, Element::F32)?;
    let (c, blocks, n) = (d.c as i32, grid[0] as i32, (d.rows * d.c) as f64);
    let images = Shape::row(d.batch, THREADS as u32);
    launch!(dev, "norm", "group_lines", images, partials, k.gamma, rstd, lines, c, blocks, n)?;
    let (layout, grid) = cut(dev, d.batch, d.rows, d.c, kind(d.c, &[x, dy, dx.view]));
    let accumulate = i32::from(dx.accumulate);
    launch!(dev, "norm", "norm_input", shape(grid), x, dy, dx.view, lines, k, layout, accumulate)
}

/// Threads that share a row of `c` channels, four groups of eight each at most.
fn lanes(c: usize) -> usize {
    c.div_ceil(8 * 4).next_power_of_two()
}

fn narrow(c: usize) -> bool {
    c <= NARROW && c.is_multiple_of(8)
}

fn layer_norm(dev: &Device, d: &Norm, io: Forward<'_>) -> Result<(), CudaError> {
    let (x, y, gamma, beta) = (io.ins[0], io.out, io.ins[1], io.ins[2]);
    let (mean, rstd, c) = (io.saved[0], io.saved[1], d.c as i32);
    if !narrow(d.c) {
        let rows = Shape::row(d.rows, THREADS as u32);
        return launch!(dev, "layer_norm", "layer_norm_wide", rows, x, gamma, beta, y, mean, rstd, c, d.eps);
    }
    let (kind, lanes) = (kind(d.c, &[x, y]), lanes(d.c));
    let at_once = if kind == 0 { 2 } else { 1 };
    let shape = Shape::row(d.rows.div_ceil(THREADS / lanes * at_once), THREADS as u32);
    let (rows, lanes) = (d.rows as i64, lanes as i32);
    launch!(dev, "layer_norm", "layer_norm", shape, x, gamma, beta, y, mean, rstd, rows, c, lanes, d.eps, kind)
}

fn layer_norm_vjp(dev: &Device, d: &Norm, io: Vjp<'_>) -> Result<(), CudaError> {
    let (x, gamma, dy, mean, rstd) = (io.ins[0], io.ins[1], io.dout, io.saved[0], io.saved[1]);
    let (dgamma, add_gamma) = target(io.grads[1]);
    let (dbeta, add_beta) = target(io.grads[2]);
    let affine = io.grads[1].is_some() || io.grads[2].is_some();
    let (dx, accumulate) = target(io.grads[0]);
    let (rows, c) = (d.rows as i64, d.c as i32);
    let scratch = |blocks: usize| match affine {
        true => dev.scratch(blocks * 2 * d.c, Element::F32),
        false => Ok(View::none()),
    };
    let (partials, blocks) = if narrow(d.c) {
        let tensors = [x, dy, if io.grads[0].is_some() { dx } else { x }];
        let (kind, mut lanes) = (kind(d.c, &tensors), lanes(d.c));
        // Two groups a thread need fewer registers than four.
        if d.c.div_ceil(8 * lanes) == 4 && lanes < 32 {
            lanes *= 2;
        }
        let (name, fits) = match (kind, d.c.div_ceil(8 * lanes)) {
            (0, 0..=2) => ("layer_norm_vjp_2", 4),
            (0, 3) => ("layer_norm_vjp_3", 3),
            (0, _) => ("layer_norm_vjp", 2),
            _ => ("layer_norm_vjp_any", 2),
        };
        let blocks = d.rows.div_ceil(4 * LAYER_THREADS / lanes).min(fits * dev.processors()).max(1);
        let (partials, shape, lanes) = (scratch(blocks)?, Shape::row(blocks, LAYER_THREADS as u32), lanes as i32);
        let mut arguments = Arguments::default();
        [x, gamma, dy, dx, mean, rstd, partials].into_iter().for_each(|view| arguments.push(view));
        arguments.push(rows);
        [c, lanes, accumulate].into_iter().for_each(|value| arguments.push(value));
        dev.launch(Kernel { file: "layer_norm", name }, shape, arguments)?;
        (partials, blocks)
    } else {
        if io.grads[0].is_some() {
            let shape = Shape::row(d.rows, THREADS as u32);
            launch!(dev, "layer_norm", "layer_norm_wide_vjp", shape, x, gamma, dy, dx, mean, rstd, c, accumulate)?;
        }
        if !affine {
            return Ok(());
        }
        let tiles = d.c.div_ceil(THREADS);
        let wanted = (8 * dev.processors() / tiles).max(1);
        let per_block = d.rows.div_ceil(d.rows.div_ceil(16).min(wanted));
        let blocks = d.rows.div_ceil(per_block);
        let (partials, per_block, grid) = (scratch(blocks)?, per_block as i64, shape([blocks, tiles, 1]));
        launch!(dev, "layer_norm", "layer_norm_wide_sums", grid, x, dy, mean, rstd, partials, rows, per_block, c)?;
        (partials, blocks)
    };
    if !affine {
        return Ok(());
    }
    let sums = Sums { partials, blocks: blocks as i32, c: d.c, dgamma, dbeta, add: [add_gamma, add_beta] };
    merge_sums(dev, sums, View::none(), rstd, gamma, 0.0)
}

#[cfg(test)]
#[path = "norm_tests.rs"]
mod tests;
