//! The optimiser over all parameters at once: `kernels/optim.cu`.

use crate::device::{Device, Memory};
use crate::error::CudaError;
use crate::launch::{Shape, launch};
use crate::view::{Element, View};

/// Elements of a block's piece, as in `kernels/optim.cu`.
const CHUNK: usize = 4096;
/// Where the momenta of the averages begin among a step's values.
const MOMENTA: usize = 8;

/// The update rule and what of it stays the same from step to step.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Rule {
    /// AdamW (Loshchilov and Hutter 2019); slots: first and second moment.
    Adamw {
        /// Decay of the moments.
        betas: [f32; 2],
        /// Added to the root of the second moment.
        eps: f32,
        /// Decoupled weight decay.
        weight_decay: f32,
    },
    /// SGD as torch's; slot: velocity.
    Sgd {
        /// Momentum; 0 turns it off.
        momentum: f32,
        /// Look ahead along the momentum.
        nesterov: bool,
        /// L2 penalty, added to the gradient.
        weight_decay: f32,
    },
}

/// A tensor of the update. All views are f32 but the shadow.
#[derive(Clone, Debug)]
pub struct Tensor {
    /// The values.
    pub param: View,
    /// The gradient; without one (running statistics) only the averages move.
    pub grad: Option<View>,
    /// What the rule keeps: two for AdamW, one for SGD.
    pub slots: Vec<View>,
    /// Its averages, one for each of the updater's; none where an average does not hold it.
    pub averages: Vec<Option<View>>,
    /// A bf16 copy, kept up to date.
    pub shadow: Option<View>,
    /// Whether weight decay applies.
    pub decay: bool,
    /// Bound of the values (the logit scale's ln 100).
    pub most: Option<f32>,
}

/// What changes from step to step.
#[derive(Clone, Debug, PartialEq)]
pub struct StepValues {
    /// Learning rate.
    pub lr: f32,
    /// Number of this update, from 1; skipped steps don't count.
    pub step: u64,
    /// Greatest norm of the whole gradient.
    pub clip_norm: Option<f32>,
    /// Momentum of each average.
    pub momenta: Vec<f32>,
}

/// What a step found.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct StepResult {
    /// Norm of the whole gradient before clipping.
    pub norm: f32,
    /// Whether it and the loss are finite; else nothing was changed.
    pub finite: bool,
}

/// `Tensor` of `kernels/optim.cu`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Row {
    param: View,
    grad: View,
    slots: [View; 2],
    shadow: View,
    most: f32,
    decay: i32,
}

/// A device-resident copy of plain data.
fn resident<T: Copy>(dev: &Device, rows: &[T]) -> Result<(Memory, View), CudaError> {
    let memory = dev.alloc(size_of_val(rows))?;
    let view = memory.view(size_of_val(rows), Element::U8);
    dev.upload(rows, view)?;
    Ok((memory, view))
}

/// (tensor, piece) for each piece of tensors of these lengths.
fn pieces(lengths: impl Iterator<Item = usize>) -> Vec<[i32; 2]> {
    lengths.enumerate().flat_map(|(i, n)| (0..n.div_ceil(CHUNK)).map(move |k| [i as i32, k as i32])).collect()
}

/// Pieces on the device, and how many they are.
#[derive(Debug)]
struct Pieces {
    memory: Memory,
    count: usize,
}

impl Pieces {
    fn new(dev: &Device, pieces: &[[i32; 2]]) -> Result<Self, CudaError> {
        Ok(Pieces { memory: resident(dev, pieces)?.0, count: pieces.len() })
    }

    fn view(&self) -> View {
        self.memory.view(2 * self.count, Element::I32)
    }
}

/// Updates a set of parameters, in three launches.
#[derive(Debug)]
pub struct Updater {
    dev: Device,
    rule: Rule,
    tensors: (Memory, View),
    averages: (Memory, View),
    count: usize,
    /// Pieces of tensors with a gradient, and of all.
    graded: Pieces,
    all: Pieces,
    parts: Memory,
    values: Memory,
    found: Memory,
    loss: View,
}

impl Updater {
    /// An updater of `tensors`, which must outlive it. `loss`, an f32 scalar, is looked at for finiteness too.
    ///
    /// # Errors
    /// No memory for the tables.
    ///
    /// # Panics
    /// Where a tensor's views differ in length or number.
    pub fn new(dev: &Device, tensors: &[Tensor], rule: Rule, loss: Option<View>) -> Result<Self, CudaError> {
        let slots = if matches!(rule, Rule::Adamw { .. }) { 2 } else { 1 };
        let count = tensors.first().map_or(0, |t| t.averages.len());
        let none = View::none();
        let mut rows = Vec::with_capacity(tensors.len());
        for t in tensors {
            assert_eq!(t.averages.len(), count, "every tensor names every average");
            assert!(t.grad.is_none() || t.slots.len() == slots, "{slots} slots for each trained tensor");
            let views = t.grad.iter().chain(&t.slots).chain(&t.shadow).chain(t.averages.iter().flatten());
            views.for_each(|v| assert_eq!(v.len, t.param.len, "a tensor's views have one length"));
            let slot = |i: usize| t.slots.get(i).copied().unwrap_or(none);
            rows.push(Row {
                param: t.param,
                grad: t.grad.unwrap_or(none),
                slots: [slot(0), slot(1)],
                shadow: t.shadow.unwrap_or(none),
                most: t.most.unwrap_or(f32::INFINITY),
                decay: i32::from(t.decay),
            });
        }
        let averages: Vec<View> = tensors.iter().flat_map(|t| &t.averages).map(|a| a.unwrap_or(none)).collect();
        let graded = pieces(tensors.iter().map(|t| t.grad.map_or(0, |g| g.len)));
        let moving = |t: &Tensor| t.grad.is_some() || t.averages.iter().any(Option::is_some);
        let all = pieces(tensors.iter().map(|t| if moving(t) { t.param.len } else { 0 }));
        let floats = |n: usize| dev.alloc(n * Element::F32.bytes());
        Ok(Updater {
            dev: dev.clone(),
            rule,
            tensors: resident(dev, &rows)?,
            averages: resident(dev, &averages)?,
            count,
            parts: dev.alloc(size_of::<f64>() * graded.len())?,
            graded: Pieces::new(dev, &graded)?,
            all: Pieces::new(dev, &all)?,
            values: floats(MOMENTA + count)?,
            found: floats(3)?,
            loss: loss.unwrap_or(none),
        })
    }

    /// What the next [`run`](Self::run) uses. Apart from it, so that the launches of `run` can be recorded once.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn set(&self, v: &StepValues) -> Result<(), CudaError> {
        assert_eq!(v.momenta.len(), self.count, "one momentum for each average");
        let mut values = vec![0.0f32; MOMENTA];
        match self.rule {
            Rule::Adamw { betas, weight_decay, .. } => {
                // In f64: with β₂ = 0.999 the correction of the first steps loses three digits in f32.
                let [c1, c2] = betas.map(|b| 1.0 - f64::from(b).powf(v.step as f64));
                values[0] = -(f64::from(v.lr) / c1) as f32;
                values[1] = (1.0 / c2.sqrt()) as f32;
                values[2] = 1.0 - v.lr * weight_decay;
            }
            Rule::Sgd { momentum, .. } => {
                values[0] = v.lr;
                values[3] = if v.step <= 1 { 0.0 } else { momentum };
            }
        }
        values[4] = v.clip_norm.unwrap_or(f32::INFINITY);
        values.extend(&v.momenta);
        self.dev.upload(&values, self.values())
    }

    fn values(&self) -> View {
        self.values.view(MOMENTA + self.count, Element::F32)
    }

    /// Where the step's result lies: norm, 1 or 0 for finite or not, clip factor; for kernels that depend on it.
    pub fn found(&self) -> View {
        self.found.view(3, Element::F32)
    }

    /// One step: norm and finite check, then parameters, averages and shadows.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn run(&self) -> Result<(), CudaError> {
        let (dev, tensors, values, found) = (&self.dev, self.tensors.1, self.values(), self.found());
        let parts = self.parts.view(2 * self.graded.count, Element::F32);
        let (graded, all) = (self.graded.view(), self.all.view());
        launch!(dev, "optim", "gradient_squares", Shape::row(self.graded.count, 256), tensors, graded, parts)?;
        let n = self.graded.count as i64;
        launch!(dev, "optim", "judge_step", Shape::row(1, 1024), parts, n, self.loss, values, found)?;
        let (shape, averages, count) = (Shape::row(self.all.count, 256), self.averages.1, self.count as i32);
        match self.rule {
            Rule::Adamw { betas: [b1, b2], eps, .. } => {
                launch!(dev, "optim", "update_adamw", shape, tensors, all, averages, count, values, found, b1, b2, eps)
            }
            Rule::Sgd { momentum, nesterov, weight_decay: wd } => {
                let ahead = i32::from(nesterov);
                launch!(
                    dev,
                    "optim",
                    "update_sgd",
                    shape,
                    tensors,
                    all,
                    averages,
                    count,
                    values,
                    found,
                    momentum,
                    wd,
                    ahead
                )
            }
        }
    }

    /// What the last step found; waits for it.
    ///
    /// # Errors
    /// A kernel that failed.
    pub fn result(&self) -> Result<StepResult, CudaError> {
        let found = self.dev.download(self.found())?;
        Ok(StepResult { norm: found[0], finite: found[1] != 0.0 })
    }
}

/// Copies between pairs of views, converted to the target's type, in one launch: bf16 shadows of weights, running
/// statistics kept aside.
#[derive(Debug)]
pub struct Copies {
    dev: Device,
    pairs: (Memory, View),
    pieces: Pieces,
}

impl Copies {
    /// Copies from the first of each pair to the second; the views must outlive it.
    ///
    /// # Errors
    /// No memory for the tables.
    ///
    /// # Panics
    /// Where a pair's views differ in length.
    pub fn new(dev: &Device, pairs: &[(View, View)]) -> Result<Self, CudaError> {
        let rows: Vec<[View; 2]> = pairs.iter().map(|&(from, to)| [from, to]).collect();
        rows.iter().for_each(|[from, to]| assert_eq!(from.len, to.len, "a copy is between views of one length"));
        let pieces = pieces(rows.iter().map(|r| r[1].len));
        Ok(Copies { dev: dev.clone(), pairs: resident(dev, &rows)?, pieces: Pieces::new(dev, &pieces)? })
    }

    /// Copies all.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn run(&self) -> Result<(), CudaError> {
        self.launch(View::none())
    }

    /// Copies all if the last step of `updater` was not finite.
    ///
    /// # Errors
    /// What the device refuses.
    pub fn run_if_skipped(&self, updater: &Updater) -> Result<(), CudaError> {
        self.launch(updater.found())
    }

    fn launch(&self, found: View) -> Result<(), CudaError> {
        let (shape, pieces) = (Shape::row(self.pieces.count, 256), self.pieces.view());
        launch!(self.dev, "optim", "copy_pairs", shape, self.pairs.1, pieces, found)
    }
}
