//! The contrastive and relational loss in f64, written out, on problems of many kinds; and the same on a device.

use half::bf16;
use mcpipe_cpu::relational::{PairTargets, Relational};
use mcpipe_cuda::{CudaError, Device, Element, Grad, Memory, Pairs, View};

/// How embeddings lie.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Kind {
    /// Anywhere.
    Random,
    /// Each image near its caption.
    Matched,
    /// ± one vector: cosines of ±1.
    Opposed,
    /// Few vectors, many times each.
    Repeated,
}

/// A loss with all its arguments.
#[derive(Clone, Debug)]
pub struct Problem {
    pub d: Relational,
    pub a: Vec<f32>,
    pub b: Vec<f32>,
    pub scale: f32,
    pub own: Vec<i32>,
    pub other: Vec<i32>,
    pub keep: Vec<f32>,
    pub group: Vec<i32>,
    pub share: Vec<f32>,
    pub column_total: Vec<f32>,
    pub teachers: Vec<(Vec<f32>, Vec<f32>)>,
}

/// Numbers in ±1 by SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> f32 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    }

    pub fn below(&mut self, n: usize) -> usize {
        (((self.next() + 1.0) * 0.5 * n as f32) as usize).min(n - 1)
    }

    fn unit(&mut self, n: usize) -> Vec<f32> {
        let v: Vec<f32> = (0..n).map(|_| self.next()).collect();
        let norm = v.iter().map(|x| x * x).sum::<f32>().sqrt();
        v.iter().map(|x| x / norm).collect()
    }
}

fn rounded(x: &[f32], round: bool) -> Vec<f32> {
    x.iter().map(|v| if round { bf16::from_f32(*v).to_f32() } else { *v }).collect()
}

impl Problem {
    /// All of a batch. `round`: embeddings are numbers of bf16.
    pub fn new(batch: usize, dim: usize, widths: &[usize], kind: Kind, scale: f32, seed: u64, round: bool) -> Self {
        let mut r = Random(seed);
        let pair = |r: &mut Random, n: usize, by: f32| {
            let few: Vec<Vec<f32>> = (0..3).map(|_| r.unit(n)).collect();
            let (mut left, mut right) = (Vec::new(), Vec::new());
            for i in 0..batch {
                let (mut u, mut v) = (r.unit(n), r.unit(n));
                match kind {
                    Kind::Random => {}
                    Kind::Matched => u.iter_mut().zip(&v).for_each(|(u, v)| *u = 0.6 * *u + 0.8 * v),
                    Kind::Opposed => {
                        u.clone_from(&few[0]);
                        v = few[0].iter().map(|x| if i % 3 == 1 { -x } else { *x }).collect();
                    }
                    Kind::Repeated => (u, v) = (few[i % 3].clone(), few[(i / 2) % 3].clone()),
                }
                left.extend(u.iter().map(|x| x * by));
                right.extend(v);
            }
            (rounded(&left, round), rounded(&right, round))
        };
        let (a, b) = pair(&mut r, dim, 1.0);
        let teachers = widths.iter().map(|&n| pair(&mut r, n, 0.7 * scale)).collect();
        // Some captions occur twice or thrice, some images are mixed, some show nothing of their own caption.
        let mut group: Vec<i32> = (0..batch as i32).collect();
        for i in 0..batch {
            if r.below(8) == 0 {
                group[i] = group[r.below(i + 1)];
            }
        }
        let mut sizes = vec![0.0f32; batch];
        group.iter().for_each(|&g| sizes[g as usize] += 1.0);
        let own = group.clone();
        let (mut other, mut keep) = (own.clone(), vec![1.0; batch]);
        for i in 0..batch {
            if r.below(3) == 0 {
                (other[i], keep[i]) = (group[r.below(batch)], [0.0, 0.25, 0.8][r.below(3)]);
            }
        }
        let share: Vec<f32> = group.iter().map(|&g| 1.0 / sizes[g as usize]).collect();
        let mut masses = vec![0.0f64; batch];
        for i in 0..batch {
            masses[own[i] as usize] += f64::from(keep[i]);
            masses[other[i] as usize] += f64::from(1.0 - keep[i]);
        }
        let total = |j: usize| (masses[group[j] as usize] / f64::from(sizes[group[j] as usize])) as f32;
        let column_total = (0..batch).map(total).collect();
        let d = Relational::whole(batch, dim, widths);
        Problem { d, a, b, scale, own, other, keep, group, share, column_total, teachers }
    }

    /// The rows `first..first + rows` of it.
    pub fn block(&self, first: usize, rows: usize) -> Self {
        let part = |x: &[f32], n: usize| x[first * n..][..rows * n].to_vec();
        let sides = self.teachers.iter().zip(&self.d.teachers);
        Problem {
            d: Relational { rows, first_row: first, ..self.d.clone() },
            a: part(&self.a, self.d.dim),
            own: self.own[first..][..rows].to_vec(),
            other: self.other[first..][..rows].to_vec(),
            keep: part(&self.keep, 1),
            teachers: sides.map(|((u, v), &n)| (part(u, n), v.clone())).collect(),
            ..self.clone()
        }
    }
}

/// Losses and gradients.
#[derive(Clone, Debug)]
pub struct Found {
    pub value: [f64; 2],
    pub da: Vec<f64>,
    pub db: Vec<f64>,
    pub dscale: f64,
}

/// Runs `body` for each of 0..n on all cores, and gives the results in order.
fn parallel<T: Send>(n: usize, body: impl Fn(usize) -> T + Sync) -> Vec<T> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from).min(n.max(1));
    let each = n.div_ceil(threads).max(1);
    std::thread::scope(|s| {
        let body = &body;
        let part = |t: usize| s.spawn(move || (t * each..((t + 1) * each).min(n)).map(body).collect::<Vec<T>>());
        let parts: Vec<_> = (0..threads).map(part).collect();
        parts.into_iter().flat_map(|p| p.join().expect("no panic")).collect()
    })
}

fn products(rows: usize, cols: usize, n: usize, u: &[f32], v: &[f32]) -> Vec<Vec<f64>> {
    parallel(rows, |i| {
        let row: Vec<f64> = u[i * n..][..n].iter().map(|x| f64::from(*x)).collect();
        let dot = |j: usize| row.iter().zip(&v[j * n..][..n]).map(|(x, y)| x * f64::from(*y)).sum();
        (0..cols).map(dot).collect()
    })
}

fn transposed(x: &[Vec<f64>], cols: usize) -> Vec<Vec<f64>> {
    (0..cols).map(|j| x.iter().map(|row| row[j]).collect()).collect()
}

fn softmax(x: &[f64]) -> (Vec<f64>, f64) {
    let top = x.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let sum: f64 = x.iter().map(|v| (v - top).exp()).sum();
    (x.iter().map(|v| (v - top).exp() / sum).collect(), top + sum.ln())
}

/// What does not change with the scale: cosines and teachers' logits.
pub struct Prepared {
    cosines: Vec<Vec<f64>>,
    teachers: Vec<Vec<Vec<f64>>>,
}

impl Prepared {
    pub fn new(p: &Problem) -> Self {
        let n = p.d.cols;
        let sides = p.teachers.iter().zip(&p.d.teachers);
        Prepared {
            cosines: products(n, n, p.d.dim, &p.a, &p.b),
            teachers: sides.map(|((u, v), &k)| products(n, n, k, u, v)).collect(),
        }
    }
}

/// By the definition, in f64, for the gradients `dl` of the two losses.
pub fn exact(p: &Problem, ready: &Prepared, dl: [f64; 2]) -> Found {
    let n = p.d.cols;
    let targets = PairTargets {
        own: &p.own,
        other: &p.other,
        keep: &p.keep,
        group: &p.group,
        share: &p.share,
        column_total: &p.column_total,
    };
    let mut value = [0.0; 2];
    let mut g = vec![vec![0.0; n]; n];
    for columns in [false, true] {
        let turned = |x: &Vec<Vec<f64>>| if columns { transposed(x, n) } else { x.clone() };
        let cosines = turned(&ready.cosines);
        let teachers: Vec<Vec<Vec<f64>>> = ready.teachers.iter().map(turned).collect();
        let rows = parallel(n, |i| {
            let logits: Vec<f64> = cosines[i].iter().map(|x| x * f64::from(p.scale)).collect();
            let (share, sum) = softmax(&logits);
            let mut mean = vec![0.0; n];
            for t in &teachers {
                let (r, _) = softmax(&t[i]);
                mean.iter_mut().zip(r).for_each(|(m, r)| *m += r / teachers.len() as f64);
            }
            let (mut ce, mut kd) = (0.0, 0.0);
            let mut slopes = vec![0.0; n];
            for j in 0..n {
                let target = f64::from(if columns { targets.column(0, j, i) } else { targets.row(i, j) });
                if target > 0.0 {
                    ce += target * (sum - logits[j]);
                }
                if mean[j] > 0.0 {
                    kd += mean[j] * (mean[j].ln() - logits[j] + sum);
                }
                slopes[j] = dl[0] * (share[j] - target);
                if !teachers.is_empty() {
                    slopes[j] += dl[1] * (share[j] - mean[j]);
                }
            }
            (ce, kd, slopes)
        });
        let each = 0.5 / n as f64;
        for (i, (ce, kd, slopes)) in rows.into_iter().enumerate() {
            (value[0], value[1]) = (value[0] + each * ce, value[1] + each * kd);
            for (j, slope) in slopes.into_iter().enumerate() {
                *(if columns { &mut g[j][i] } else { &mut g[i][j] }) += each * slope;
            }
        }
    }
    let scale = f64::from(p.scale);
    let dot = |g: &[f64], x: &[f32], k: usize| -> Vec<f64> {
        let mut sum = vec![0.0; k];
        for (g, row) in g.iter().zip(x.chunks_exact(k)) {
            sum.iter_mut().zip(row).for_each(|(s, x)| *s += scale * g * f64::from(*x));
        }
        sum
    };
    let turned = transposed(&g, n);
    let da = parallel(n, |i| dot(&g[i], &p.b, p.d.dim)).concat();
    let db = parallel(n, |j| dot(&turned[j], &p.a, p.d.dim)).concat();
    let each = g.iter().zip(&ready.cosines).map(|(g, x)| g.iter().zip(x).map(|(g, x)| g * x).sum::<f64>());
    Found { value, da, db, dscale: each.sum() }
}

/// Device memory with what was put there.
pub struct Held {
    _memory: Memory,
    pub view: View,
}

/// Floats in the given type.
pub fn floats(dev: &Device, x: &[f32], element: Element) -> Result<Held, CudaError> {
    let memory = dev.alloc(x.len() * element.bytes())?;
    let view = memory.view(x.len(), element);
    match element {
        Element::Bf16 => {
            let narrow: Vec<u16> = x.iter().map(|v| bf16::from_f32(*v).to_bits()).collect();
            dev.upload(&narrow, view)?;
        }
        _ => dev.upload(x, view)?,
    }
    Ok(Held { _memory: memory, view })
}

pub fn ids(dev: &Device, x: &[i32]) -> Result<Held, CudaError> {
    let memory = dev.alloc(4 * x.len())?;
    let view = memory.view(x.len(), Element::I32);
    dev.upload(x, view)?;
    Ok(Held { _memory: memory, view })
}

/// A problem's arguments and results on a device.
pub struct OnDevice {
    _held: Vec<Held>,
    pub ins: Vec<View>,
    pub saved: Vec<Held>,
    pub out: Held,
    pub dout: Held,
    pub grads: Vec<Held>,
}

impl OnDevice {
    /// `element`: of the student's embeddings; the teachers' are bf16 if `rounded`. Gradients hold `start`.
    pub fn new(
        dev: &Device,
        p: &Problem,
        element: Element,
        rounded: bool,
        dl: [f32; 2],
        start: f32,
    ) -> Result<Self, CudaError> {
        let theirs = if rounded { Element::Bf16 } else { Element::F32 };
        let mut held =
            vec![floats(dev, &p.a, element)?, floats(dev, &p.b, element)?, floats(dev, &[p.scale], Element::F32)?];
        held.extend([ids(dev, &p.own)?, ids(dev, &p.other)?, floats(dev, &p.keep, Element::F32)?]);
        held.extend([ids(dev, &p.group)?, floats(dev, &p.share, Element::F32)?]);
        held.push(floats(dev, &p.column_total, Element::F32)?);
        for (u, v) in &p.teachers {
            held.extend([floats(dev, u, theirs)?, floats(dev, v, theirs)?]);
        }
        let empty = |len: usize| floats(dev, &vec![f32::NAN; len], Element::F32);
        let saved = Pairs::new(&p.d, rounded)?.saved().into_iter().map(empty).collect::<Result<_, _>>()?;
        let grads = [p.a.len(), p.b.len(), 1].map(|n| vec![start; n]);
        let kinds = [element, element, Element::F32];
        let grads = grads.iter().zip(kinds).map(|(g, e)| floats(dev, g, e)).collect::<Result<_, _>>()?;
        let ins = held.iter().map(|h| h.view).collect();
        Ok(OnDevice { _held: held, ins, saved, out: empty(2)?, dout: floats(dev, &dl, Element::F32)?, grads })
    }

    pub fn saved(&self) -> Vec<View> {
        self.saved.iter().map(|h| h.view).collect()
    }

    pub fn grads(&self, accumulate: bool) -> [Option<Grad>; 3] {
        std::array::from_fn(|i| Some(Grad { view: self.grads[i].view, accumulate }))
    }

    /// What is there now.
    pub fn found(&self, dev: &Device) -> Result<Found, CudaError> {
        let get = |h: &Held| Ok(dev.download(h.view)?.into_iter().map(f64::from).collect::<Vec<f64>>());
        let value = get(&self.out)?;
        let [da, db, ds] = [get(&self.grads[0])?, get(&self.grads[1])?, get(&self.grads[2])?];
        Ok(Found { value: [value[0], value[1]], da, db, dscale: ds[0] })
    }
}

/// All stages in one process, gradients overwritten.
pub fn run(dev: &Device, p: &Problem, element: Element, rounded: bool, dl: [f32; 2]) -> Result<Found, CudaError> {
    run_by(dev, p, &Pairs::new(&p.d, rounded)?, element, rounded, dl)
}

pub fn run_by(
    dev: &Device,
    p: &Problem,
    pairs: &Pairs<'_>,
    element: Element,
    rounded: bool,
    dl: [f32; 2],
) -> Result<Found, CudaError> {
    let on = OnDevice::new(dev, p, element, rounded, dl, f32::NAN)?;
    let saved = on.saved();
    pairs.statistics(dev, &on.ins, &saved)?;
    dev.release_scratch();
    pairs.finish(dev, &on.ins, &saved, on.out.view)?;
    dev.release_scratch();
    pairs.backward(dev, &on.ins, &saved, on.dout.view, on.grads(false))?;
    dev.release_scratch();
    on.found(dev)
}

/// Errors of values, da, db and dscale, relative to the largest magnitude of each.
pub fn errors(got: &Found, want: &Found) -> [f64; 4] {
    let worst = |got: &[f64], want: &[f64], floor: f64| {
        let largest = want.iter().fold(floor, |m, v| m.max(v.abs()));
        let each = got.iter().zip(want).map(|(g, w)| (g - w).abs() / largest);
        // NaN stays.
        each.fold(0.0, |m, e| if e > m || e.is_nan() { e } else { m })
    };
    // Losses are differences of log-sums of the order of 1 and more; below these a gradient is one of rounding.
    let floor = 1e-3 / (want.da.len() as f64).sqrt().max(1.0);
    let values = (0..2).map(|i| worst(&got.value[i..=i], &want.value[i..=i], 1.0)).fold(0.0, f64::max);
    [
        values,
        worst(&got.da, &want.da, floor),
        worst(&got.db, &want.db, floor),
        worst(&[got.dscale], &[want.dscale], 1e-3),
    ]
}
