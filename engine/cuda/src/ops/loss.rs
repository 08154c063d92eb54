//! Losses and what they are made of: `kernels/loss.cu`.

use mcpipe_cpu::loss::Contrastive;
use mcpipe_cpu::sigmoid_loss::SigmoidLoss;
use mcpipe_graph::Op;

use super::elementwise::{scale, sixteens};
use crate::device::Device;
use crate::driver::Product;
use crate::error::CudaError;
use crate::launch::{Shape, launch};
use crate::view::{Element, Forward, Grad, View, Vjp};

/// How rows of `c` are shared out: launch shape, whether threads take eight elements, threads a row (above 32: a block).
#[derive(Clone, Copy)]
pub(super) struct Teams {
    pub(super) shape: Shape,
    pub(super) wide: i32,
    pub(super) team: i32,
}

impl Teams {
    pub(super) fn new(rows: usize, c: usize) -> Self {
        let wide = c.is_multiple_of(8);
        let columns = if wide { c / 8 } else { c };
        // A long row keeps a block busy; few rows need all of its threads.
        if columns >= 512 || (columns > 64 && rows < 4096) {
            return Teams { shape: Shape::row(rows, 256), wide: i32::from(wide), team: 256 };
        }
        let team = columns.next_power_of_two().clamp(1, 32);
        Teams { shape: Shape::row((rows * team).div_ceil(256), 256), wide: i32::from(wide), team: team as i32 }
    }
}

/// Sums in f64 that kernels leave, `per` a row or block.
pub(super) struct Parts {
    pub(super) view: View,
    pub(super) count: usize,
    per: usize,
}

impl Parts {
    pub(super) fn new(dev: &Device, count: usize, per: usize) -> Result<Self, CudaError> {
        // An f64 is two elements.
        Ok(Parts { view: dev.scratch(2 * count * per, Element::F32)?, count, per })
    }

    /// to (+)= factor·Σ of those number `start`.
    pub(super) fn finish(&self, dev: &Device, start: usize, factor: f64, to: Grad) -> Result<(), CudaError> {
        let (n, stride, start, add) = (self.count as i64, self.per as i32, start as i32, i32::from(to.accumulate));
        let shape = Shape::row(1, 1024);
        launch!(dev, "loss", "finish_sums", shape, self.view, to.view, n, stride, start, factor, add)
    }
}

/// A gradient's view and flag, for kernels that take none too.
pub(super) fn target(g: Option<Grad>) -> (View, i32) {
    g.map_or((View::none(), 0), |g| (g.view, i32::from(g.accumulate)))
}

pub(super) fn set(view: View) -> Grad {
    Grad { view, accumulate: false }
}

/// Blocks of a kernel that walks over n elements, `each` a block at a time.
pub(super) fn blocks(dev: &Device, n: usize, each: usize) -> usize {
    n.div_ceil(each).clamp(1, 8 * dev.processors())
}

pub(super) fn clear(dev: &Device, g: Option<Grad>) -> Result<(), CudaError> {
    match g {
        Some(g) if !g.accumulate => dev.fill(g.view, 0),
        _ => Ok(()),
    }
}

/// The mean of squares, or of Kullback–Leibler terms.
fn pairs(dev: &Device, a: View, b: View, divergences: bool, factor: f64, out: View) -> Result<(), CudaError> {
    let n = a.len;
    if n == 0 {
        return dev.fill(out, 0);
    }
    let parts = Parts::new(dev, blocks(dev, n, 4096), 1)?;
    let (shape, kind) = (Shape::row(parts.count, 256), i32::from(divergences));
    launch!(dev, "loss", "pair_sums", shape, a, b, parts.view, n as i64, kind)?;
    parts.finish(dev, 0, factor, set(out))
}

/// The same values as f32.
fn widened(dev: &Device, x: View) -> Result<View, CudaError> {
    if x.element == Element::F32 {
        return Ok(x);
    }
    let y = dev.scratch(x.len, Element::F32)?;
    scale(dev, x, 1.0, set(y))?;
    Ok(y)
}

/// d (+)= op(a)·op(b), f32 without rounding to tf32: logits are up to 100 times as large as the cosines' errors.
fn product(dev: &Device, p: Product, a: View, b: View, d: View, add: bool) -> Result<(), CudaError> {
    dev.product_exact(&Product { beta: if add { 1.0 } else { 0.0 }, ..p }, a, b, d, None)
}

/// to (+)= the sum of products, through scratch where the gradient is not f32.
fn give_products(dev: &Device, products: &[(Product, View, View)], to: Option<Grad>) -> Result<(), CudaError> {
    let Some(to) = to else { return Ok(()) };
    let direct = to.view.element == Element::F32;
    let d = if direct { to.view } else { dev.scratch(to.view.len, Element::F32)? };
    for (i, (p, a, b)) in products.iter().enumerate() {
        product(dev, *p, *a, *b, d, i > 0 || (direct && to.accumulate))?;
    }
    if direct { Ok(()) } else { scale(dev, d, 1.0, to) }
}

/// One direction of the contrastive loss: cosines of `rows` against `cols` and their targets.
struct Direction {
    cosines: View,
    targets: View,
    rows: usize,
    cols: usize,
    weight: f32,
}

/// The directions whose weight is not 0, their cosines a·bᵀ and b·aᵀ computed.
fn directions(dev: &Device, d: &Contrastive, ins: &[View], ab: [View; 2]) -> Result<[Option<Direction>; 2], CudaError> {
    let one = |weight: f32, [a, b]: [View; 2], [rows, cols]: [usize; 2], targets: View| {
        if weight == 0.0 {
            return Ok(None);
        }
        let cosines = dev.scratch(rows * cols, Element::F32)?;
        product(dev, Product::new(rows, cols, d.dim, false, true), a, b, cosines, false)?;
        Ok(Some(Direction { cosines, targets, rows, cols, weight }))
    };
    Ok([one(d.w_row, ab, [d.rows, d.cols], ins[3])?, one(d.w_col, [ab[1], ab[0]], [d.cols, d.rows], ins[4])?])
}

fn contrastive(dev: &Device, d: &Contrastive, ins: &[View], out: View) -> Result<(), CudaError> {
    dev.fill(out, 0)?;
    if d.rows * d.cols == 0 {
        return Ok(());
    }
    let ab = [widened(dev, ins[0])?, widened(dev, ins[1])?];
    let entropy = i32::from(d.subtract_entropy);
    for way in directions(dev, d, ins, ab)?.iter().flatten() {
        let (t, parts) = (Teams::new(way.rows, way.cols), Parts::new(dev, way.rows, 1)?);
        let (x, p, rows, c) = (way.cosines, way.targets, way.rows as i64, way.cols as i64);
        launch!(dev, "loss", "contrast_rows", t.shape, x, p, ins[2], parts.view, rows, c, entropy, t.wide, t.team)?;
        parts.finish(dev, 0, f64::from(way.weight) / way.rows as f64, Grad { view: out, accumulate: true })?;
    }
    Ok(())
}

fn contrastive_vjp(dev: &Device, d: &Contrastive, io: &Vjp<'_>) -> Result<(), CudaError> {
    if d.rows * d.cols == 0 || (d.w_row == 0.0 && d.w_col == 0.0) {
        return io.grads.iter().try_for_each(|g| clear(dev, *g));
    }
    let (ins, grads) = (io.ins, io.grads);
    let ab = [widened(dev, ins[0])?, widened(dev, ins[1])?];
    let ways = directions(dev, d, ins, ab)?;
    let mut first = true;
    for way in ways.iter().flatten() {
        let (t, parts) = (Teams::new(way.rows, way.cols), Parts::new(dev, way.rows, 1)?);
        let (x, p, rows, c) = (way.cosines, way.targets, way.rows as i64, way.cols as i64);
        let (scale, weight) = (ins[2], way.weight / way.rows as f32);
        launch!(
            dev,
            "loss",
            "contrast_rows_vjp",
            t.shape,
            x,
            p,
            scale,
            io.dout,
            parts.view,
            rows,
            c,
            weight,
            t.wide,
            t.team
        )?;
        if let Some(ds) = grads[2] {
            parts.finish(dev, 0, 1.0, Grad { view: ds.view, accumulate: ds.accumulate || !first })?;
        }
        first = false;
    }
    // The cosines are now scale·g: [B, B'] by rows, [B', B] by columns.
    for (i, grad) in grads.iter().take(2).enumerate() {
        let other = ab[1 - i];
        let part = |k: usize, way: &Direction| {
            let n = if i == 0 { d.rows } else { d.cols };
            let inner = if i == 0 { d.cols } else { d.rows };
            (Product::new(n, d.dim, inner, k != i, false), way.cosines, other)
        };
        let products: Vec<_> =
            ways.iter().enumerate().filter_map(|(k, way)| way.as_ref().map(|way| part(k, way))).collect();
        give_products(dev, &products, *grad)?;
    }
    Ok(())
}

fn sigmoid_cosines(dev: &Device, d: &SigmoidLoss, ab: [View; 2]) -> Result<View, CudaError> {
    let x = dev.scratch(d.rows * d.cols, Element::F32)?;
    product(dev, Product::new(d.rows, d.cols, d.dim, false, true), ab[0], ab[1], x, false)?;
    Ok(x)
}

fn sigmoid_loss(dev: &Device, d: &SigmoidLoss, ins: &[View], out: View) -> Result<(), CudaError> {
    let n = d.rows * d.cols;
    if n == 0 {
        return dev.fill(out, 0);
    }
    let x = sigmoid_cosines(dev, d, [widened(dev, ins[0])?, widened(dev, ins[1])?])?;
    let parts = Parts::new(dev, blocks(dev, n, 1024), 1)?;
    let shape = Shape::row(parts.count, 256);
    launch!(dev, "loss", "sigmoid_pairs", shape, x, ins[4], ins[2], ins[3], parts.view, n as i64)?;
    parts.finish(dev, 0, 1.0 / d.rows as f64, set(out))
}

fn sigmoid_loss_vjp(dev: &Device, d: &SigmoidLoss, io: &Vjp<'_>) -> Result<(), CudaError> {
    let (ins, grads, n) = (io.ins, io.grads, d.rows * d.cols);
    if n == 0 {
        return grads.iter().try_for_each(|g| clear(dev, *g));
    }
    let ab = [widened(dev, ins[0])?, widened(dev, ins[1])?];
    let x = sigmoid_cosines(dev, d, ab)?;
    let parts = Parts::new(dev, blocks(dev, n, 1024), 2)?;
    let (shape, weight) = (Shape::row(parts.count, 256), 1.0 / d.rows as f64);
    let (dl, t) = (io.dout, ins[4]);
    launch!(dev, "loss", "sigmoid_pairs_vjp", shape, x, t, ins[2], ins[3], dl, parts.view, n as i64, weight)?;
    for (start, grad) in [grads[2], grads[3]].into_iter().enumerate() {
        let Some(grad) = grad else { continue };
        parts.finish(dev, start, 1.0, grad)?;
    }
    give_products(dev, &[(Product::new(d.rows, d.dim, d.cols, false, false), x, ab[1])], grads[0])?;
    give_products(dev, &[(Product::new(d.cols, d.dim, d.rows, true, false), x, ab[0])], grads[1])
}

/// Mean squares over channels, `[batch, hw]`.
fn transfer_map(dev: &Device, x: View, rows: usize, c: usize) -> Result<View, CudaError> {
    let map = dev.scratch(rows, Element::F32)?;
    let t = Teams::new(rows, c);
    launch!(dev, "loss", "mean_squares", t.shape, x, map, rows as i64, c as i64, t.wide, t.team)?;
    Ok(map)
}

pub(crate) fn forward(dev: &Device, op: &Op, io: Forward<'_>) -> Result<(), CudaError> {
    let x = |i: usize| io.ins[i];
    match op {
        Op::L2Normalize { rows, c } => {
            let t = Teams::new(*rows, *c);
            let (rows, c) = (*rows as i64, *c as i64);
            launch!(dev, "loss", "l2_normalize", t.shape, x(0), io.out, io.saved[0], rows, c, t.wide, t.team)
        }
        Op::Softmax { rows, c, temperature } => {
            let t = Teams::new(*rows, *c);
            let (rows, c, factor) = (*rows as i64, *c as i64, 1.0 / temperature);
            launch!(dev, "loss", "softmax_rows", t.shape, x(0), io.out, rows, c, factor, t.wide, t.team)
        }
        Op::Contrastive(d) => contrastive(dev, d, io.ins, io.out),
        Op::SigmoidLoss(d) => sigmoid_loss(dev, d, io.ins, io.out),
        Op::Mse => pairs(dev, x(0), x(1), false, 1.0 / x(0).len.max(1) as f64, io.out),
        Op::KlRows { rows, .. } => pairs(dev, x(0), x(1), true, 1.0 / (*rows).max(1) as f64, io.out),
        Op::Cosine { rows, c } => {
            if rows * c == 0 {
                return dev.fill(io.out, 0);
            }
            let (t, parts) = (Teams::new(*rows, *c), Parts::new(dev, *rows, 1)?);
            let (r, c) = (*rows as i64, *c as i64);
            launch!(dev, "loss", "cosine_rows", t.shape, x(0), x(1), parts.view, r, c, t.wide, t.team)?;
            parts.finish(dev, 0, 1.0 / *rows as f64, set(io.out))
        }
        Op::AttentionTransferMap { batch, hw, c } => {
            let map = transfer_map(dev, x(0), batch * hw, *c)?;
            let (shape, none) = (Shape::row(*batch, 256), View::none());
            launch!(dev, "loss", "transfer_maps", shape, map, none, io.out, *hw as i64, *c as i64, 0i32)
        }
        _ => Err(super::unsupported(op)),
    }
}

pub(crate) fn vjp(dev: &Device, op: &Op, io: Vjp<'_>) -> Result<(), CudaError> {
    let (dy, x) = (io.dout, |i: usize| io.ins[i]);
    // Losses of two arguments.
    match op {
        Op::Contrastive(d) => return contrastive_vjp(dev, d, &io),
        Op::SigmoidLoss(d) => return sigmoid_loss_vjp(dev, d, &io),
        Op::Mse => {
            let ((da, add_a), (db, add_b)) = (target(io.grads[0]), target(io.grads[1]));
            let n = x(0).len;
            return launch!(dev, "loss", "mse_vjp", Shape::eights(n), x(0), x(1), dy, da, db, n as i64, add_a, add_b);
        }
        Op::Cosine { rows, c } => {
            let ((da, add_a), (db, add_b)) = (target(io.grads[0]), target(io.grads[1]));
            let t = Teams::new(*rows, *c);
            let (rows, c) = (*rows as i64, *c as i64);
            return launch!(
                dev,
                "loss",
                "cosine_rows_vjp",
                t.shape,
                x(0),
                x(1),
                dy,
                da,
                db,
                rows,
                c,
                t.wide,
                t.team,
                add_a,
                add_b
            );
        }
        Op::KlRows { rows, .. } => {
            let Some(dq) = io.grads[1] else { return Ok(()) };
            let (n, rows, add) = (x(0).len, *rows as f32, i32::from(dq.accumulate));
            return launch!(dev, "loss", "kl_rows_vjp", sixteens(n), x(0), x(1), dy, dq.view, n as i64, rows, add);
        }
        _ => {}
    }
    let Some(dx) = io.grads[0] else { return Ok(()) };
    let (to, add) = (dx.view, i32::from(dx.accumulate));
    match (op, io.out) {
        (Op::L2Normalize { rows, c }, Some(y)) => {
            let t = Teams::new(*rows, *c);
            let (norms, rows, c) = (io.saved[0], *rows as i64, *c as i64);
            launch!(dev, "loss", "l2_normalize_vjp", t.shape, y, norms, dy, to, rows, c, t.wide, t.team, add)
        }
        (Op::Softmax { rows, c, temperature }, Some(y)) => {
            let t = Teams::new(*rows, *c);
            let (rows, c, factor) = (*rows as i64, *c as i64, 1.0 / temperature);
            launch!(dev, "loss", "softmax_rows_vjp", t.shape, y, dy, to, rows, c, factor, t.wide, t.team, add)
        }
        (Op::AttentionTransferMap { batch, hw, c }, _) => {
            let map = transfer_map(dev, x(0), batch * hw, *c)?;
            let factors = dev.scratch(batch * hw, Element::F32)?;
            let shape = Shape::row(*batch, 256);
            launch!(dev, "loss", "transfer_maps", shape, map, dy, factors, *hw as i64, *c as i64, 1i32)?;
            launch!(
                dev,
                "elementwise",
                "scale_samples",
                sixteens(to.len),
                x(0),
                factors,
                to,
                to.len as i64,
                *c as i64,
                add
            )
        }
        _ => Err(super::unsupported(op)),
    }
}
