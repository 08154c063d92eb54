//! The contrastive and relational loss: `kernels/relational*.cu`.
//!
//! In three stages, so that processes that hold rows each can merge their columns' statistics between the first two:
//! [`Pairs::statistics`], ([`Pairs::merge_ranks`],) [`Pairs::finish`]; then [`Pairs::backward`].

mod arguments;
mod strips;

use mcpipe_cpu::relational::{MOST_TEACHERS, Relational};
use mcpipe_graph::Op;

use self::arguments::{MAPPED, Maps, Operand, Operands, Problem, SETS, Targets};
use self::strips::Strips;
use super::elementwise;
use crate::device::Device;
use crate::driver::{Product, TensorMap};
use crate::error::CudaError;
use crate::launch::{Shape, launch};
use crate::view::{Element, Forward, Grad, View, Vjp};

/// Columns and rows are padded to whole tiles.
const TILE: usize = 128;
/// Threads of a block with a tile.
const THREADS: u32 = 256;
/// Teachers of one launch of statistics: as many as shared memory holds running sums of.
const GROUP: usize = 4;
/// Bytes of the columns' partials of a strip of rows.
const PARTIALS: usize = 24 << 20;
/// Bytes of the part of G that is in memory at a time, and its most rows: a product of so many keeps a large GPU busy.
const GRADIENT: usize = 48 << 20;
const GRADIENT_ROWS: usize = 6144;
/// Threads of a block of `relational_*_sm90a`, and row tiles that two blocks have between them.
const THREADS_SM90A: u32 = 384;
const PAIR: usize = 2;
/// Stages of the copies to shared memory there, 32 kB each.
const STAGES_SM90A: usize = 6;

/// An embedding as the kernels and the products take it: rows `ld` apart, in bf16 or f32.
#[derive(Clone, Copy)]
struct Side {
    view: View,
    ld: usize,
}

/// What every stage reads.
struct Ready {
    sets: Vec<[Side; 2]>,
    targets: Targets,
}

/// The loss over the rows that this process holds.
#[derive(Clone, Debug)]
pub struct Pairs<'a> {
    d: &'a Relational,
    /// Products' operands in bf16, not in f32.
    rounded: bool,
    /// Only kernels that run everywhere.
    portable: bool,
}

impl<'a> Pairs<'a> {
    /// Of dims `d`; `rounded`: embeddings are rounded to bf16.
    ///
    /// # Errors
    /// Dims that describe no op.
    pub fn new(d: &'a Relational, rounded: bool) -> Result<Self, CudaError> {
        match d.problem() {
            Some(problem) => Err(CudaError::Unsupported(format!("relational: {problem}"))),
            None if d.cols > i32::MAX as usize / 64 => {
                Err(CudaError::Unsupported("relational: a batch too large".into()))
            }
            None => Ok(Pairs { d, rounded, portable: false }),
        }
    }

    /// Without the kernels that are for one kind of device.
    pub fn portable(self) -> Self {
        Pairs { portable: true, ..self }
    }

    /// Whether `teachers` go through `relational_sm90a.cu`.
    fn by_groups(&self, dev: &Device, teachers: usize) -> bool {
        self.rounded && !self.portable && teachers < MAPPED && dev.capability() == 90
    }

    fn teachers(&self) -> usize {
        self.d.teachers.len()
    }

    fn strides(&self) -> [usize; 2] {
        [self.d.rows, self.d.cols].map(|n| n.next_multiple_of(TILE))
    }

    /// Lengths of what is kept between stages, f32: the rows' statistics, the columns' (those that ranks merge), scalars.
    pub fn saved(&self) -> [usize; 3] {
        let [rows, cols] = self.strides().map(|n| 2 * (1 + 2 * self.teachers()) * n);
        [rows, cols, 8 + MOST_TEACHERS]
    }

    fn problem(&self, teachers: usize) -> Problem {
        let [rows, cols] = self.strides();
        let numbers = [self.d.rows, self.d.first_row, self.d.cols, teachers, self.teachers(), rows, cols];
        let [rows, first_row, cols, teachers, all_teachers, row_stride, col_stride] = numbers.map(|n| n as i32);
        Problem { rows, first_row, cols, teachers, all_teachers, row_stride, col_stride }
    }

    fn side(&self, dev: &Device, view: View, rows: usize, dim: usize) -> Result<Side, CudaError> {
        if view.len != rows * dim {
            return Err(CudaError::Unsupported(format!("relational: {} elements for {rows} rows of {dim}", view.len)));
        }
        let ld = if self.rounded { dim.next_multiple_of(8) } else { dim };
        let wanted = if self.rounded { Element::Bf16 } else { Element::F32 };
        if view.element == wanted && ld == dim {
            return Ok(Side { view, ld });
        }
        let to = dev.scratch(rows * ld, wanted)?;
        if self.rounded {
            let (n, dims) = (rows * ld, [rows, dim, ld].map(|n| n as i32));
            let shape = Shape::eights(n);
            launch!(dev, "relational_merge", "relational_round", shape, view, to.address, dims[0], dims[1], dims[2])?;
        } else {
            elementwise::copy(dev, view, to, false)?;
        }
        Ok(Side { view: to, ld })
    }

    /// Checks the arguments ([`Op::Relational`]'s) and brings the embeddings to the type of the products.
    fn ready(&self, dev: &Device, ins: &[View]) -> Result<Ready, CudaError> {
        let (d, k) = (self.d, self.teachers());
        let wanted = [Element::I32, Element::I32, Element::F32, Element::I32, Element::F32, Element::F32];
        let lens = [d.rows, d.rows, d.rows, d.cols, d.cols, d.cols];
        let fits = ins.len() == 9 + 2 * k
            && ins[3..9].iter().zip(wanted.iter().zip(lens)).all(|(v, (e, len))| v.element == *e && v.len == len);
        if !fits {
            return Err(CudaError::Unsupported("relational: arguments of other types or lengths".into()));
        }
        let widths = std::iter::once(&d.dim).chain(&d.teachers);
        let views = std::iter::once(&ins[..2]).chain(ins[9..].chunks_exact(2));
        let mut sets = Vec::new();
        for (v, &dim) in views.zip(widths) {
            sets.push([self.side(dev, v[0], d.rows, dim)?, self.side(dev, v[1], d.cols, dim)?]);
        }
        // Two i32 each.
        let tiles = d.cols.div_ceil(TILE);
        let spans = dev.scratch(2 * tiles, Element::I32)?;
        let (group, cols) = (ins[6].address, d.cols as i32);
        launch!(dev, "relational_merge", "relational_spans", Shape::row(tiles, 128), group, spans.address, cols)?;
        let [own, other, keep, group, share, column_total] = std::array::from_fn(|i| ins[3 + i].address);
        let targets = Targets { own, other, keep, group, share, column_total, spans: spans.address };
        Ok(Ready { sets, targets })
    }

    /// The student, then `teachers`.
    fn operands(&self, ready: &Ready, teachers: std::ops::Range<usize>) -> Operands {
        let none = Operand { data: 0, ld: 0 };
        let mut out = Operands { left: [none; SETS], right: [none; SETS], dim: [0; SETS] };
        let widths: Vec<usize> = std::iter::once(self.d.dim).chain(self.d.teachers.iter().copied()).collect();
        for (place, set) in std::iter::once(0).chain(teachers.map(|k| 1 + k)).enumerate() {
            let [left, right] = ready.sets[set].map(|s| Operand { data: s.view.address, ld: s.ld as i64 });
            (out.left[place], out.right[place], out.dim[place]) = (left, right, widths[set] as i32);
        }
        out
    }

    /// The same for `relational_sm90a.cu`: boxes of 128 rows left, of 64 right.
    fn maps(&self, dev: &Device, ready: &Ready, teachers: std::ops::Range<usize>) -> Result<Maps, CudaError> {
        let none = [TensorMap::default(); MAPPED];
        let mut out = Maps { left: none, right: none, dim: [0; 16] };
        for (place, set) in std::iter::once(0).chain(teachers.map(|k| 1 + k)).enumerate() {
            let dim = if set == 0 { self.d.dim } else { self.d.teachers[set - 1] };
            let [left, right] = ready.sets[set];
            out.left[place] = dev.tensor_map(left.view, [self.d.rows, dim], left.ld, TILE)?;
            out.right[place] = dev.tensor_map(right.view, [self.d.cols, dim], right.ld, TILE / 2)?;
            out.dim[place] = dim as i32;
        }
        Ok(out)
    }

    /// Statistics of the rows held, and of the columns over these rows.
    ///
    /// # Errors
    /// Arguments that don't fit; what the device refuses.
    pub fn statistics(&self, dev: &Device, ins: &[View], saved: &[View]) -> Result<(), CudaError> {
        let ready = self.ready(dev, ins)?;
        let groups: Vec<std::ops::Range<usize>> = match self.teachers() {
            0 => std::iter::once(0..0).collect(),
            all => (0..all).step_by(GROUP).map(|k| k..(k + GROUP).min(all)).collect(),
        };
        let [_, stride] = self.strides();
        let side = if self.rounded { TILE } else { TILE / 2 };
        let (rows, cols) = (self.d.rows.div_ceil(side), self.d.cols.div_ceil(side));
        // Partials of columns are of 64 rows each, in f32 or f64.
        let [blocks, words] = if self.rounded { [2, 1] } else { [1, 2] };
        let quantities = 1 + 2 * groups.iter().map(|g| g.len()).max().unwrap_or(0);
        let each = blocks * quantities * stride * words;
        let most = groups.iter().map(|g| g.len()).max().unwrap_or(0);
        let by_groups = self.by_groups(dev, most);
        let together = if by_groups { PAIR } else { 1 };
        let strips = Strips::new(rows, cols, dev.processors(), PARTIALS / (4 * each), together);
        let col_parts = dev.scratch(strips.tiles * each, Element::F32)?;
        let strip_rows = strips.tiles * side;
        let row_parts = dev.scratch(strips.parts * quantities * strip_rows * words, Element::F32)?;
        // Two f64 a block, or each of its eight warps with a tile.
        let summing = if by_groups { 8 } else { 1 };
        let dots = dev.scratch(4 * summing * strips.tiles * strips.parts, Element::F32)?;
        for group in groups {
            let (p, sides) = (self.problem(group.len()), self.operands(&ready, group.clone()));
            for first in (0..rows).step_by(strips.tiles) {
                let tiles = strips.tiles.min(rows - first);
                let (row0, grid) = ((first * side) as i32, tiles.next_multiple_of(together) * strips.parts);
                // The first launch sums the targets' logits too.
                let to_dots = if group.start == 0 { dots.address } else { 0 };
                let (scale, t, count) = (ins[2], ready.targets, tiles as i32);
                let parts = [row_parts, col_parts].map(|v| v.address);
                if by_groups {
                    let maps = self.maps(dev, &ready, group.clone())?;
                    // Columns' partials of 16 rows, rows' statistics.
                    let room = (4 * 4 + 1 + group.len()) * TILE * 12;
                    let shape = Shape::row(grid, THREADS_SM90A).shared(1024 + STAGES_SM90A * 2 * TILE * TILE + room);
                    launch!(
                        dev,
                        "relational_sm90a",
                        "relational_statistics_sm90a",
                        shape,
                        maps,
                        p,
                        t,
                        scale,
                        parts[0],
                        parts[1],
                        to_dots,
                        row0,
                        count,
                        STAGES_SM90A as i32
                    )?;
                } else if self.rounded {
                    let stages = stages(dev);
                    let shared = stages * 2 * TILE * TILE + (1 + group.len()) * 4 * TILE * 12;
                    let shape = Shape::row(grid, THREADS).shared(shared);
                    launch!(
                        dev,
                        "relational",
                        "relational_statistics",
                        shape,
                        sides,
                        p,
                        t,
                        scale,
                        parts[0],
                        parts[1],
                        to_dots,
                        row0,
                        count,
                        stages as i32
                    )?;
                } else {
                    let shape = Shape::row(grid, THREADS).shared((1 + group.len()) * 8 * side * 24);
                    launch!(
                        dev,
                        "relational_f32",
                        "relational_statistics_f32",
                        shape,
                        sides,
                        p,
                        t,
                        scale,
                        parts[0],
                        parts[1],
                        to_dots,
                        row0,
                        count
                    )?;
                }
                let strip_rows = tiles * side;
                let [col_blocks, row_blocks] = [self.d.cols, strip_rows].map(|n| n.div_ceil(32));
                let [row_state, col_state, scalars] = [saved[0], saved[1], saved[2]].map(|v| v.address);
                launch!(
                    dev,
                    "relational_merge",
                    "relational_merge",
                    Shape::row(col_blocks + row_blocks + 1, 256),
                    p,
                    parts[0],
                    strips.parts as i32,
                    strip_rows as i32,
                    row0,
                    parts[1],
                    (blocks * tiles) as i32,
                    row_state,
                    col_state,
                    to_dots,
                    (summing * grid) as i32,
                    scalars,
                    group.start as i32,
                    i32::from(first == 0),
                    i32::from(!self.rounded),
                    col_blocks as i32
                )?;
            }
        }
        Ok(())
    }

    /// Merges the columns' statistics of all ranks, one after another in `from`, into `saved`.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn merge_ranks(&self, dev: &Device, from: View, ranks: usize, saved: &[View]) -> Result<(), CudaError> {
        assert_eq!(from.len, ranks * saved[1].len, "each rank gives its columns' statistics");
        let (p, shape) = (self.problem(self.teachers()), Shape::items(self.d.cols));
        launch!(
            dev,
            "relational_merge",
            "relational_merge_ranks",
            shape,
            p,
            from.address,
            ranks as i32,
            saved[1].address
        )
    }

    /// Log-sums in f64, `[1 + K][stride]`, of rows and columns.
    fn log_sums(&self, dev: &Device, saved: &[View]) -> Result<[View; 2], CudaError> {
        let strides = self.strides();
        let mut views = [View::none(); 2];
        for side in 0..2 {
            // An f64 is two elements.
            views[side] = dev.scratch(2 * (1 + self.teachers()) * strides[side], Element::F32)?;
            self.factors(dev, saved, side, View::none(), views[side])?;
        }
        Ok(views)
    }

    fn factors(&self, dev: &Device, saved: &[View], side: usize, narrow: View, wide: View) -> Result<(), CudaError> {
        let (n, stride) = ([self.d.rows, self.d.cols][side], self.strides()[side]);
        let shape = Shape::grid([stride.div_ceil(256), 1 + self.teachers(), 1], 256);
        let (sign, numbers) = ([1i32, -1][side], [n, stride].map(|n| n as i32));
        let (state, scalars) = (saved[side].address, saved[2].address);
        launch!(
            dev,
            "relational_merge",
            "relational_factors",
            shape,
            state,
            scalars,
            narrow.address,
            wide.address,
            numbers[0],
            numbers[1],
            sign
        )
    }

    /// This process's part of CE and KD, from statistics whose columns are merged: parts of all ranks sum to the whole.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn finish(&self, dev: &Device, ins: &[View], saved: &[View], out: View) -> Result<(), CudaError> {
        let p = self.problem(self.teachers());
        let mut entropies = (View::none(), 0);
        if self.teachers() > 1 {
            let ready = self.ready(dev, ins)?;
            let sides = self.operands(&ready, 0..self.teachers());
            let [row, col] = self.log_sums(dev, saved)?;
            let (high, wide) = if self.rounded { (TILE, TILE / 2) } else { (TILE / 2, TILE / 2) };
            let tiles = self.d.rows.div_ceil(high) * self.d.cols.div_ceil(wide);
            let blocks = tiles.min(dev.processors());
            let sums = dev.scratch(2 * blocks, Element::F32)?;
            let [row, col, to] = [row, col, sums].map(|v| v.address);
            if self.rounded {
                let stages = stages(dev);
                let shape = Shape::row(blocks, THREADS).shared(stages * (TILE + TILE / 2) * TILE);
                launch!(dev, "relational", "relational_entropy", shape, sides, p, row, col, to, stages as i32)?;
            } else {
                let shape = Shape::row(blocks, THREADS);
                launch!(dev, "relational_f32", "relational_entropy_f32", shape, sides, p, row, col, to)?;
            }
            entropies = (sums, blocks);
        }
        let (shape, count) = (Shape::row(1, 1024), entropies.1 as i32);
        let [rows, cols, scalars] = [saved[0], saved[1], saved[2]].map(|v| v.address);
        let (file_sums, out) = (entropies.0.address, out);
        launch!(dev, "relational_merge", "relational_finish", shape, p, rows, cols, scalars, file_sums, count, out)
    }

    /// Gradients of a, b and the scale, from those of CE and KD: complete for a, this process's part for b and the scale.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn backward(
        &self,
        dev: &Device,
        ins: &[View],
        saved: &[View],
        dout: View,
        grads: [Option<Grad>; 3],
    ) -> Result<(), CudaError> {
        let ready = self.ready(dev, ins)?;
        let (p, sides) = (self.problem(self.teachers()), self.operands(&ready, 0..self.teachers()));
        let side = if self.rounded { TILE } else { TILE / 2 };
        let room = GRADIENT / if self.rounded { 2 } else { 4 };
        // Equal parts of the matrix, at most `room` elements each.
        let equal = |n: usize, most: usize| n.div_ceil(n.div_ceil(most).max(1)).next_multiple_of(TILE);
        let high = equal(self.d.rows, GRADIENT_ROWS);
        let wide = equal(self.d.cols, (room / high / TILE * TILE).max(TILE));
        let element = if self.rounded { Element::Bf16 } else { Element::F32 };
        let g = dev.scratch(high * wide, element)?;
        let strides = self.strides();
        let mut factors = [View::none(); 2];
        if self.rounded {
            for i in 0..2 {
                factors[i] = dev.scratch(2 * (1 + self.teachers()) * strides[i], Element::F32)?;
                self.factors(dev, saved, i, factors[i], View::none())?;
            }
        } else {
            factors = self.log_sums(dev, saved)?;
        }
        let by_groups = self.by_groups(dev, self.teachers());
        let maps = by_groups.then(|| self.maps(dev, &ready, 0..self.teachers())).transpose()?;
        let blocks = if by_groups {
            PAIR * (high.div_ceil(PAIR * side) * (wide / side)).min((dev.processors() / PAIR).max(1))
        } else {
            ((high / side) * (wide / side)).min(dev.processors())
        };
        let sums = dev.scratch(2 * blocks, Element::F32)?;
        let mut wanted = Vec::new();
        for grad in &grads[..2] {
            // Sums over parts are kept in f32.
            wanted.push(match grad {
                Some(g) if g.view.element != Element::F32 => {
                    let view = dev.scratch(g.view.len, Element::F32)?;
                    Some(Grad { view, accumulate: false })
                }
                other => *other,
            });
        }
        for col0 in (0..self.d.cols).step_by(wide) {
            for row0 in (0..self.d.rows).step_by(high) {
                let (cols, rows) = (wide.min(self.d.cols - col0), high.min(self.d.rows - row0));
                let places = [row0, col0, rows.div_ceil(side), cols.div_ceil(side)].map(|n| n as i32);
                let fresh = i32::from(row0 == 0 && col0 == 0);
                let (t, ld) = (ready.targets, wide as i64);
                let [row, col, to, sum] = [factors[0], factors[1], g, sums].map(|v| v.address);
                if let Some(maps) = maps {
                    let shape = Shape::row(blocks, THREADS_SM90A).shared(1024 + STAGES_SM90A * 2 * TILE * TILE);
                    launch!(
                        dev,
                        "relational_sm90a",
                        "relational_gradient_sm90a",
                        shape,
                        maps,
                        p,
                        t,
                        ins[2],
                        dout,
                        row,
                        col,
                        to,
                        ld,
                        sum,
                        places[0],
                        places[1],
                        places[2],
                        places[3],
                        fresh,
                        STAGES_SM90A as i32
                    )?;
                } else if self.rounded {
                    let stages = stages(dev);
                    let shape = Shape::row(blocks, THREADS).shared(stages * 2 * TILE * TILE);
                    launch!(
                        dev,
                        "relational",
                        "relational_gradient",
                        shape,
                        sides,
                        p,
                        t,
                        ins[2],
                        dout,
                        row,
                        col,
                        to,
                        ld,
                        sum,
                        places[0],
                        places[1],
                        places[2],
                        places[3],
                        fresh,
                        stages as i32
                    )?;
                } else {
                    launch!(
                        dev,
                        "relational_f32",
                        "relational_gradient_f32",
                        Shape::row(blocks, THREADS),
                        sides,
                        p,
                        t,
                        ins[2],
                        dout,
                        row,
                        col,
                        to,
                        ld,
                        sum,
                        places[0],
                        places[1],
                        places[2],
                        places[3],
                        fresh
                    )?;
                }
                let [a, b] = ready.sets[0];
                let dim = self.d.dim;
                let rest = |side: Side, first: usize| side.view.slice(first * side.ld, side.view.len - first * side.ld);
                let beta = |grad: Grad, first: bool| if first && !grad.accumulate { 0.0 } else { 1.0 };
                if let Some(da) = wanted[0] {
                    let product = Product {
                        ld: [wide, b.ld, dim],
                        beta: beta(da, col0 == 0),
                        ..Product::new(rows, dim, cols, false, false)
                    };
                    dev.product_exact(&product, g, rest(b, col0), da.view.slice(row0 * dim, rows * dim), None)?;
                }
                if let Some(db) = wanted[1] {
                    let product = Product {
                        ld: [wide, a.ld, dim],
                        beta: beta(db, row0 == 0),
                        ..Product::new(cols, dim, rows, true, false)
                    };
                    dev.product_exact(&product, g, rest(a, row0), db.view.slice(col0 * dim, cols * dim), None)?;
                }
            }
        }
        for (grad, found) in grads[..2].iter().zip(&wanted) {
            if let (Some(grad), Some(found)) = (grad, found)
                && found.view.address != grad.view.address
            {
                elementwise::copy(dev, found.view, grad.view, grad.accumulate)?;
            }
        }
        let Some(ds) = grads[2] else { return Ok(()) };
        let (shape, count) = (Shape::row(1, 256), blocks as i32);
        let add = i32::from(ds.accumulate);
        launch!(dev, "relational_merge", "relational_scale_vjp", shape, sums.address, count, ds.view, add)
    }
}

/// Stages of the copies to shared memory that fit: 32 kB each.
fn stages(dev: &Device) -> usize {
    // Compute capabilities with 100 kB a block; the others have 163 kB and more.
    if matches!(dev.capability(), 86 | 89 | 120 | 121) { 2 } else { 4 }
}

fn pairs<'a>(dev: &Device, op: &'a Op, ins: &[View]) -> Result<Pairs<'a>, CudaError> {
    let Op::Relational(d) = op else { return Err(super::unsupported(op)) };
    if d.rows != d.cols {
        return Err(super::unsupported(op));
    }
    Pairs::new(d, dev.bf16() || ins[0].element == Element::Bf16)
}

pub(crate) fn forward(dev: &Device, op: &Op, io: Forward<'_>) -> Result<(), CudaError> {
    let pairs = pairs(dev, op, io.ins)?;
    if pairs.d.rows == 0 {
        return dev.fill(io.out, 0);
    }
    pairs.statistics(dev, io.ins, io.saved)?;
    pairs.finish(dev, io.ins, io.saved, io.out)
}

pub(crate) fn vjp(dev: &Device, op: &Op, io: Vjp<'_>) -> Result<(), CudaError> {
    let pairs = pairs(dev, op, io.ins)?;
    let grads = [io.grads[0], io.grads[1], io.grads[2]];
    if pairs.d.rows == 0 {
        let mut fresh = grads.iter().flatten().filter(|g| !g.accumulate);
        return fresh.try_for_each(|g| dev.fill(g.view, 0));
    }
    pairs.backward(dev, io.ins, io.saved, io.dout, grads)
}

/// What the forward saves on the device.
pub(crate) fn saved(d: &Relational) -> Vec<usize> {
    Pairs { d, rounded: false, portable: true }.saved().to_vec()
}
