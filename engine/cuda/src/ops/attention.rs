//! Attention: `kernels/attention*.cu`, `kernels/separable.cu`.

use mcpipe_cpu::attention::Attention;
use mcpipe_cpu::attention_pool::AttentionPool;
use mcpipe_cpu::separable::SeparableAttention;
use mcpipe_graph::Op;

use crate::device::Device;
use crate::error::CudaError;
use crate::launch::{Argument, Arguments, Kernel, Kind, Shape, launch};
use crate::view::{Element, Forward, View, Vjp};

/// `AttentionDims` of `kernels/attention.cuh`.
#[derive(Clone, Copy)]
#[repr(C)]
pub(super) struct Dims {
    batch: i32,
    tokens: i32,
    heads: i32,
    dim: i32,
    pairs: i32,
    causal: i32,
    scale: f32,
}

// SAFETY: repr(C), the same fields in the same order as in C++.
unsafe impl Argument for Dims {
    const KIND: Kind = Kind::Struct;
}

impl From<&Attention> for Dims {
    fn from(d: &Attention) -> Self {
        Dims {
            batch: d.batch as i32,
            tokens: d.tokens as i32,
            heads: d.heads as i32,
            dim: d.head_dim as i32,
            pairs: (d.batch * d.heads) as i32,
            causal: i32::from(d.causal),
            scale: 1.0 / (d.head_dim as f32).sqrt(),
        }
    }
}

/// Threads of a block.
pub(super) const THREADS: u32 = 128;
/// Warps of a block.
const WARPS: usize = 4;
/// Rows of a tile.
pub(super) const TILE: usize = 64;
/// More tokens than this: 128 queries a block pay.
const WIDE: usize = 128;

/// A set of kernels: element type of the tiles and a head's size rounded up.
#[derive(Clone, Copy)]
pub(super) struct Tiles {
    pub(super) bf16: bool,
    pub(super) dim: usize,
}

impl Tiles {
    /// Tensor cores where all `views` are bf16.
    pub(super) fn choose(
        op: &Op,
        dim: usize,
        views: &[View],
        bf16: &[usize],
        f32: &[usize],
    ) -> Result<Self, CudaError> {
        let narrow = views.iter().all(|v| v.element == Element::Bf16);
        let sizes = if narrow { bf16 } else { f32 };
        let found = sizes.iter().find(|s| **s >= dim).ok_or_else(|| super::unsupported(op))?;
        Ok(Tiles { bf16: narrow, dim: *found })
    }

    /// Bytes of shared memory for `tiles` tiles of 64 rows, `stage` columns of which f32 kernels put weights for each warp.
    pub(super) fn bytes(self, tiles: usize, stage: usize) -> usize {
        if self.bf16 { tiles * TILE * (self.dim + 8) * 2 } else { 4 * (tiles * TILE * (self.dim + 4) + stages(stage)) }
    }
}

/// Floats in which f32 kernels hand weights of `columns` columns from lane to lane.
fn stages(columns: usize) -> usize {
    WARPS * 16 * (columns + 4)
}

/// Blocks: one for `rows` tokens of a pair of batch entry and head, or for as many whole pairs as a tile holds.
fn blocks(d: &Attention, rows: usize) -> usize {
    let pairs = d.batch * d.heads;
    match d.tokens {
        0 => 0,
        1..=16 => pairs.div_ceil(4),
        17..=32 => pairs.div_ceil(2),
        t => pairs * t.div_ceil(rows),
    }
}

/// Launches kernel `name` for one of the sizes, each written out as `bf16 N` or `f32 N`.
macro_rules! launch_sized {
    ($dev:expr, $tiles:expr, $stem:literal, { $($bf16:literal)* }, { $($f32:literal)* }, $file:literal, $file_f32:literal,
     $shape:expr $(, $arg:expr)* $(,)?) => {{
        let mut arguments = Arguments::default();
        $(arguments.push($arg);)*
        let kernel = match ($tiles.bf16, $tiles.dim) {
            $((true, $bf16) => Kernel { file: $file, name: concat!($stem, "_bf16_", $bf16) },)*
            $((false, $f32) => Kernel { file: $file_f32, name: concat!($stem, "_f32_", $f32) },)*
            (_, dim) => unreachable!("no kernel for heads of {dim}"),
        };
        $dev.launch(kernel, $shape, arguments)
    }};
}
pub(super) use launch_sized;

const BF16: &[usize] = &[16, 32, 48, 64, 80, 128];
const F32: &[usize] = &[32, 64, 128];

fn attention_forward(dev: &Device, op: &Op, d: &Attention, io: Forward<'_>) -> Result<(), CudaError> {
    let (qkv, last) = (io.ins[0], io.ins.get(1).copied().unwrap_or(View::none()));
    let tiles = Tiles::choose(op, d.head_dim, &[qkv, io.out], BF16, F32)?;
    let (dims, lse) = (Dims::from(d), io.saved[0]);
    if tiles.bf16 && d.tokens > WIDE && (tiles.dim == 48 || tiles.dim == 64) {
        let shape = Shape::row(blocks(d, 2 * TILE), THREADS).shared(tiles.bytes(6, 0));
        return if tiles.dim == 48 {
            launch!(dev, "attention_forward", "attention_forward_wide_bf16_48", shape, qkv, last, io.out, lse, dims)
        } else {
            launch!(dev, "attention_forward", "attention_forward_wide_bf16_64", shape, qkv, last, io.out, lse, dims)
        };
    }
    let bytes = if tiles.bf16 { tiles.bytes(5, 0) } else { tiles.bytes(3, TILE) };
    let shape = Shape::row(blocks(d, TILE), THREADS).shared(bytes);
    launch_sized!(
        dev, tiles, "attention_forward", { 16 32 48 64 80 128 }, { 32 64 128 }, "attention_forward", "attention_f32",
        shape, qkv, last, io.out, lse, dims,
    )
}

fn attention_vjp(dev: &Device, op: &Op, d: &Attention, io: Vjp<'_>) -> Result<(), CudaError> {
    let Some(dqkv) = io.grads[0] else { return Ok(()) };
    let (qkv, last) = (io.ins[0], io.ins.get(1).copied().unwrap_or(View::none()));
    let out = io.out.ok_or_else(|| super::unsupported(op))?;
    let tiles = Tiles::choose(op, d.head_dim, &[qkv, out, io.dout, dqkv.view], BF16, F32)?;
    let (dims, lse, accumulate) = (Dims::from(d), io.saved[0], i32::from(dqkv.accumulate));
    let delta = dev.scratch(lse.len, Element::F32)?;
    let bytes = if tiles.bf16 { tiles.bytes(6, 0) } else { tiles.bytes(4, TILE / 2) };
    let shape = Shape::row(blocks(d, TILE), THREADS).shared(bytes);
    launch_sized!(
        dev, tiles, "attention_query_gradient", { 16 32 48 64 80 128 }, { 32 64 128 }, "attention_backward",
        "attention_f32", shape, qkv, last, out, io.dout, lse, delta, dqkv.view, dims, accumulate,
    )?;
    let columns = 4 * 2 * TILE * if tiles.bf16 { 2 } else { 1 };
    let shape = shape.shared(bytes + columns);
    launch_sized!(
        dev, tiles, "attention_key_gradient", { 16 32 48 64 80 128 }, { 32 64 128 }, "attention_backward",
        "attention_f32", shape, qkv, last, io.dout, lse, delta, dqkv.view, dims, accumulate,
    )
}

pub(super) const MAP: &[usize] = &[32, 64, 128];

fn map_forward(dev: &Device, op: &Op, d: &Attention, io: Forward<'_>) -> Result<(), CudaError> {
    let qkv = io.ins[0];
    let tiles = Tiles::choose(op, d.head_dim, &[qkv], MAP, MAP)?;
    let shape = Shape::row(blocks(d, TILE), THREADS).shared(tiles.bytes(2, 0));
    launch_sized!(
        dev, tiles, "attention_map", { 32 64 128 }, { 32 64 128 }, "attention_map", "attention_map", shape, qkv, io.out,
        Dims::from(d),
    )
}

fn map_vjp(dev: &Device, op: &Op, d: &Attention, io: Vjp<'_>) -> Result<(), CudaError> {
    let Some(dqkv) = io.grads[0] else { return Ok(()) };
    let qkv = io.ins[0];
    let map = io.out.ok_or_else(|| super::unsupported(op))?;
    let tiles = Tiles::choose(op, d.head_dim, &[qkv, dqkv.view], MAP, MAP)?;
    let (dims, accumulate) = (Dims::from(d), i32::from(dqkv.accumulate));
    let delta = dev.scratch(d.batch * d.heads * d.tokens, Element::F32)?;
    let shape = Shape::row(blocks(d, TILE), THREADS).shared(tiles.bytes(2, 16));
    launch_sized!(
        dev, tiles, "attention_map_query_gradient", { 32 64 128 }, { 32 64 128 }, "attention_map", "attention_map",
        shape, qkv, map, io.dout, delta, dqkv.view, dims, accumulate,
    )?;
    launch_sized!(
        dev, tiles, "attention_map_key_gradient", { 32 64 128 }, { 32 64 128 }, "attention_map", "attention_map",
        shape, qkv, map, io.dout, delta, dqkv.view, dims, accumulate,
    )
}

/// Floats that a block of the pooling kernels needs besides one for each token.
const POOL_ROOM: usize = 32 + 16 * 64;

fn pool_forward(dev: &Device, d: &AttentionPool, io: Forward<'_>) -> Result<(), CudaError> {
    let shape = Shape::row(d.batch * d.heads, THREADS).shared(4 * (d.tokens + POOL_ROOM));
    let scale = 1.0 / (d.head_dim as f32).sqrt();
    let (q, kv, probs) = (io.ins[0], io.ins[1], io.saved[0]);
    let sizes = [d.tokens as i32, d.heads as i32, d.head_dim as i32];
    launch!(dev, "attention_pool", "attention_pool", shape, q, kv, io.out, probs, sizes[0], sizes[1], sizes[2], scale)
}

fn pool_vjp(dev: &Device, d: &AttentionPool, io: Vjp<'_>) -> Result<(), CudaError> {
    let (dq, dkv) = (io.grads[0], io.grads[1]);
    if dq.is_none() && dkv.is_none() {
        return Ok(());
    }
    let shape = Shape::row(d.batch * d.heads, THREADS).shared(4 * (d.tokens + POOL_ROOM));
    let (scale, width) = (1.0 / (d.head_dim as f32).sqrt(), d.heads * d.head_dim);
    let parts = match dq {
        Some(_) => dev.scratch(d.batch * width, Element::F32)?,
        None => View::none(),
    };
    let to = dkv.map_or(View::none(), |g| g.view);
    let accumulate = i32::from(dkv.is_some_and(|g| g.accumulate));
    let (q, kv, probs) = (io.ins[0], io.ins[1], io.saved[0]);
    let sizes = [d.tokens as i32, d.heads as i32, d.head_dim as i32];
    launch!(
        dev,
        "attention_pool",
        "attention_pool_vjp",
        shape,
        q,
        kv,
        probs,
        io.dout,
        to,
        parts,
        sizes[0],
        sizes[1],
        sizes[2],
        scale,
        accumulate
    )?;
    let Some(dq) = dq else { return Ok(()) };
    let shape = Shape::row(width.div_ceil(32), 256);
    let accumulate = i32::from(dq.accumulate);
    launch!(
        dev,
        "attention_pool",
        "attention_pool_query",
        shape,
        parts,
        dq.view,
        d.batch as i32,
        width as i32,
        accumulate
    )
}

/// Threads of a separable attention's block.
const SEPARABLE: u32 = 256;

/// Shared memory: a float for each token, one for each column, and a sum of each of 8 warps in 128 columns.
fn separable_shape(d: &SeparableAttention) -> Shape {
    Shape::row(d.batch, SEPARABLE).shared(4 * (d.tokens + d.dim + 32 + 8 * 128))
}

fn separable_forward(dev: &Device, d: &SeparableAttention, io: Forward<'_>) -> Result<(), CudaError> {
    let (p, context) = (io.saved[0], io.saved[1]);
    let (tokens, dim) = (d.tokens as i32, d.dim as i32);
    launch!(dev, "separable", "separable_attention", separable_shape(d), io.ins[0], io.out, p, context, tokens, dim)
}

fn separable_vjp(dev: &Device, d: &SeparableAttention, io: Vjp<'_>) -> Result<(), CudaError> {
    let Some(dqkv) = io.grads[0] else { return Ok(()) };
    let (p, context) = (io.saved[0], io.saved[1]);
    let (tokens, dim, accumulate) = (d.tokens as i32, d.dim as i32, i32::from(dqkv.accumulate));
    launch!(
        dev,
        "separable",
        "separable_attention_vjp",
        separable_shape(d),
        io.ins[0],
        p,
        context,
        io.dout,
        dqkv.view,
        tokens,
        dim,
        accumulate
    )
}

pub(crate) fn forward(dev: &Device, op: &Op, io: Forward<'_>) -> Result<(), CudaError> {
    match op {
        Op::Attention(d) | Op::MaskedAttention(d) => attention_forward(dev, op, d, io),
        Op::AttentionMap(d) => map_forward(dev, op, d, io),
        Op::AttentionPool(d) => pool_forward(dev, d, io),
        Op::SeparableAttention(d) => separable_forward(dev, d, io),
        _ => Err(super::unsupported(op)),
    }
}

pub(crate) fn vjp(dev: &Device, op: &Op, io: Vjp<'_>) -> Result<(), CudaError> {
    match op {
        Op::Attention(d) | Op::MaskedAttention(d) => attention_vjp(dev, op, d, io),
        Op::AttentionMap(d) => map_vjp(dev, op, d, io),
        Op::AttentionPool(d) => pool_vjp(dev, d, io),
        Op::SeparableAttention(d) => separable_vjp(dev, d, io),
        _ => Err(super::unsupported(op)),
    }
}
