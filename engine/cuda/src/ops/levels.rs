//! Losses of the distillation levels: `kernels/levels.cu`, `kernels/map_loss.cu`.

use mcpipe_cpu::attention::Attention;
use mcpipe_graph::{Distance, Op};

use super::attention::{Dims, MAP, THREADS, TILE, Tiles, launch_sized};
use super::columns::Sum;
use super::elementwise::sixteens;
use super::loss::{Parts, Teams, blocks, clear, set, target};
use crate::device::Device;
use crate::error::CudaError;
use crate::launch::{Arguments, Kernel, Shape, launch};
use crate::view::{Element, Forward, Grad, View, Vjp};

/// Lengths of the tensors that an op's forward saves; none for an op of another family.
pub(crate) fn saved(op: &Op) -> Option<Vec<usize>> {
    Some(match op {
        // Three coefficients a row.
        Op::RowLoss { rows, .. } => vec![3 * rows],
        // The map, then the factor of each pixel.
        Op::TransferLoss { batch, hw, .. } => vec![batch * hw],
        // Maximum and reciprocal sum of each row; the slope of the loss at the mean map.
        Op::MapLoss { attention: d, images } => {
            vec![2 * d.batch * d.heads * d.tokens, images * d.tokens * d.tokens]
        }
        Op::PixelLoss { rows, distance: Distance::Cosine, .. } => vec![2 * rows],
        Op::PixelLoss { distance: Distance::Mse, .. } => Vec::new(),
        _ => return None,
    })
}

/// What a sum of `rows` distances is multiplied by.
fn share(distance: Distance, rows: usize, c: usize) -> f64 {
    match distance {
        Distance::Mse => 1.0 / (rows * c) as f64,
        Distance::Cosine => 1.0 / rows as f64,
    }
}

fn code(distance: Distance) -> i32 {
    match distance {
        Distance::Mse => 0,
        Distance::Cosine => 1,
    }
}

/// How the maps' kernels run: their tiles, the dims, the maps of an image, the blocks of 64 tokens of `ones` images or
/// pairs.
struct Maps {
    tiles: Tiles,
    dims: Dims,
    group: i32,
    blocks: usize,
}

impl Maps {
    fn new(op: &Op, d: &Attention, images: usize, views: &[View], ones: usize) -> Result<Self, CudaError> {
        let tiles = Tiles::choose(op, d.head_dim, views, MAP, MAP)?;
        let group = (d.batch * d.heads / images.max(1)) as i32;
        Ok(Maps { tiles, dims: Dims::from(d), group, blocks: ones * d.tokens.div_ceil(TILE) })
    }

    /// Blocks with `tiles` tiles; those that weigh their rows need room for that in f32.
    fn shape(&self, tiles: usize, weighs: bool) -> Shape {
        Shape::row(self.blocks, THREADS).shared(self.tiles.bytes(tiles, if weighs { TILE / 2 } else { 0 }))
    }
}

fn map_loss(dev: &Device, op: &Op, d: &Attention, images: usize, io: Forward<'_>) -> Result<(), CudaError> {
    let (qkv, t, rows, slopes) = (io.ins[0], io.ins[1], io.saved[0], io.saved[1]);
    let maps = Maps::new(op, d, images, &[qkv], images)?;
    let parts = Parts::new(dev, maps.blocks, 1)?;
    let (tiles, dims, group) = (maps.tiles, maps.dims, maps.group);
    launch_sized!(
        dev, tiles, "map_loss", { 32 64 128 }, { 32 64 128 }, "map_loss", "map_loss", maps.shape(4, false), qkv, t, rows,
        slopes, parts.view, dims, group,
    )?;
    parts.finish(dev, 0, 1.0 / (images * d.tokens) as f64, set(io.out))
}

fn map_loss_vjp(dev: &Device, op: &Op, d: &Attention, images: usize, io: Vjp<'_>) -> Result<(), CudaError> {
    let Some(dqkv) = io.grads[0] else { return Ok(()) };
    let (qkv, rows, slopes, dl, to) = (io.ins[0], io.saved[0], io.saved[1], io.dout, dqkv.view);
    let maps = Maps::new(op, d, images, &[qkv, to], d.batch * d.heads)?;
    let delta = dev.scratch(d.batch * d.heads * d.tokens, Element::F32)?;
    let (tiles, dims, group, add) = (maps.tiles, maps.dims, maps.group, i32::from(dqkv.accumulate));
    let shape = maps.shape(3, true);
    launch_sized!(
        dev, tiles, "map_loss_query_gradient", { 32 64 128 }, { 32 64 128 }, "map_loss", "map_loss", shape, qkv, rows,
        slopes, dl, delta, to, dims, group, add,
    )?;
    launch_sized!(
        dev, tiles, "map_loss_key_gradient", { 32 64 128 }, { 32 64 128 }, "map_loss", "map_loss", shape, qkv, rows,
        slopes, dl, delta, to, dims, group, add,
    )
}

fn pixel_loss(dev: &Device, [rows, c]: [usize; 2], distance: Distance, io: Forward<'_>) -> Result<(), CudaError> {
    let (y, t, bias, n) = (io.ins[0], io.ins[1], io.ins[2], rows * c);
    let parts = match distance {
        Distance::Mse => {
            let parts = Parts::new(dev, blocks(dev, n, 4096), 1)?;
            let (shape, wide) = (Shape::row(parts.count, 256), i32::from(c.is_multiple_of(8)));
            launch!(dev, "levels", "pixel_squares", shape, y, bias, t, parts.view, n as i64, c as i64, wide)?;
            parts
        }
        Distance::Cosine => {
            let (teams, parts) = (Teams::new(rows, c), Parts::new(dev, rows, 1)?);
            let (shape, wide, team) = (teams.shape, teams.wide, teams.team);
            let (r, c) = (rows as i64, c as i64);
            let found = io.saved[0];
            launch!(dev, "levels", "pixel_cosines", shape, y, bias, t, parts.view, found, r, c, wide, team)?;
            parts
        }
    };
    parts.finish(dev, 0, share(distance, rows, c), set(io.out))
}

fn pixel_loss_vjp(dev: &Device, [rows, c]: [usize; 2], distance: Distance, io: Vjp<'_>) -> Result<(), CudaError> {
    let (y, t, bias) = (io.ins[0], io.ins[1], io.ins[2]);
    let coefficients = match distance {
        Distance::Mse => View::none(),
        Distance::Cosine => io.saved[0],
    };
    let share = (2.0 / (rows * c) as f64) as f32;
    let (dy, add) = target(io.grads[0]);
    let sums = match io.grads[2] {
        Some(dbias) => dbias,
        None => set(dev.scratch(c, Element::F32)?),
    };
    let sum = Sum::new(1, rows, c);
    sum.run(dev, sums, |shape, d| {
        launch!(dev, "levels", "pixel_loss_vjp", shape, y, bias, t, coefficients, io.dout, dy, d, share, add)
    })
}

pub(crate) fn forward(dev: &Device, op: &Op, io: Forward<'_>) -> Result<(), CudaError> {
    if io.ins[0].len == 0 {
        return dev.fill(io.out, 0);
    }
    match op {
        Op::RowLoss { rows, c, distance, normalize } => {
            let (teams, parts) = (Teams::new(*rows, *c), Parts::new(dev, *rows, 1)?);
            let (shape, wide, team) = (teams.shape, teams.wide, teams.team);
            let [na, nb] = normalize.map(i32::from);
            let (a, b, found, r, width) = (io.ins[0], io.ins[1], io.saved[0], *rows as i64, *c as i64);
            let kind = code(*distance);
            launch!(dev, "levels", "row_loss", shape, a, b, parts.view, found, r, width, kind, na, nb, wide, team)?;
            parts.finish(dev, 0, share(*distance, *rows, *c), set(io.out))
        }
        Op::TransferLoss { batch, hw, c } => {
            let (x, t, map) = (io.ins[0], io.ins[1], io.saved[0]);
            let (teams, n) = (Teams::new(batch * hw, *c), batch * hw);
            launch!(dev, "loss", "mean_squares", teams.shape, x, map, n as i64, *c as i64, teams.wide, teams.team)?;
            let (parts, scale) = (Parts::new(dev, *batch, 1)?, (4.0 / (n * c) as f64) as f32);
            launch!(dev, "levels", "transfer_loss", Shape::row(*batch, 256), map, t, parts.view, *hw as i64, scale)?;
            parts.finish(dev, 0, 1.0 / n as f64, set(io.out))
        }
        Op::MapLoss { attention, images } => map_loss(dev, op, attention, *images, io),
        Op::PixelLoss { rows, c, distance } => pixel_loss(dev, [*rows, *c], *distance, io),
        _ => Err(super::unsupported(op)),
    }
}

pub(crate) fn vjp(dev: &Device, op: &Op, io: Vjp<'_>) -> Result<(), CudaError> {
    if io.ins[0].len == 0 {
        return io.grads.iter().try_for_each(|g: &Option<Grad>| clear(dev, *g));
    }
    match op {
        Op::RowLoss { rows, c, .. } => {
            let ((da, add_a), (db, add_b)) = (target(io.grads[0]), target(io.grads[1]));
            let (a, b, found, dl, wide) = (io.ins[0], io.ins[1], io.saved[0], io.dout, c.is_multiple_of(8));
            let shape = if wide { Shape::eights(rows * c) } else { Shape::items(rows * c) };
            let (rows, c, wide) = (*rows as i64, *c as i64, i32::from(wide));
            launch!(dev, "levels", "row_loss_vjp", shape, a, b, found, dl, da, db, rows, c, wide, add_a, add_b)
        }
        Op::TransferLoss { c, .. } => {
            let Some(dx) = io.grads[0] else { return Ok(()) };
            let (x, factors, dl, n, add) = (io.ins[0], io.saved[0], io.dout, dx.view.len, i32::from(dx.accumulate));
            launch!(dev, "levels", "transfer_loss_vjp", sixteens(n), x, factors, dl, dx.view, n as i64, *c as i64, add)
        }
        Op::MapLoss { attention, images } => map_loss_vjp(dev, op, attention, *images, io),
        Op::PixelLoss { rows, c, distance } => pixel_loss_vjp(dev, [*rows, *c], *distance, io),
        _ => Err(super::unsupported(op)),
    }
}
