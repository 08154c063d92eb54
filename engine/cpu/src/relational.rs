//! The contrastive loss and relational distillation in one op, with sparse targets: both directions, any teachers.

use rayon::prelude::*;

use crate::gemm::{Gemm, gemm};
use crate::layout::transpose_2d_backward;
use crate::workspace::Workspace;

/// Most teachers of one op.
pub const MOST_TEACHERS: usize = 11;

/// CLIP's loss and the relational distillation of B pairs (MobileCLIP, Vasu et al. 2024; CLIP-KD's CRD, Yang et al.
/// 2024), of which a process holds the rows `first_row..first_row + rows` and all `cols = B` columns.
///
/// With S = scale·a·bᵀ and T_k = u_k·v_kᵀ, p̄ the mean over the teachers of softmax T_k (0 teachers: KD = 0):
///   CE = ½·[mean_i H(p_row_i, softmax S_i) + mean_j H(p_col_j, softmax Sᵀ_j)],  H(p, q) = −Σ p·ln q;
///   KD = ½·[mean_i KL(p̄_i ‖ softmax S_i) + the same by columns, with p̄ of each direction its own].
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Relational {
    /// Rows held: images.
    pub rows: usize,
    /// Which of the B rows the first one is.
    pub first_row: usize,
    /// B columns: captions.
    pub cols: usize,
    /// Width of a and b.
    pub dim: usize,
    /// Width of each teacher's u and v.
    pub teachers: Vec<usize>,
}

impl Relational {
    /// All of B pairs in one process.
    pub fn whole(batch: usize, dim: usize, teachers: &[usize]) -> Self {
        Relational { rows: batch, first_row: 0, cols: batch, dim, teachers: teachers.to_vec() }
    }

    /// Why these dims describe no op.
    pub fn problem(&self) -> Option<&'static str> {
        if self.first_row + self.rows > self.cols {
            return Some("the rows reach past the batch");
        }
        (self.teachers.len() > MOST_TEACHERS).then_some("one op compares with at most 11 teachers")
    }

    /// Floating-point operations of the forward's products.
    pub fn flops(&self) -> u64 {
        2 * (self.rows * self.cols) as u64 * (self.dim + self.teachers.iter().sum::<usize>()) as u64
    }
}

/// Which captions an image shows. With g the group of equal captions that column j belongs to:
///   p_row[i, j] = share_j·(keep_i·[own_i = g_j] + (1 − keep_i)·[other_i = g_j]),
///   p_col[j, i] = p_row[i, j] / column_total_j, and where column_total_j is 0: 1 at the image j, else 0.
#[derive(Clone, Copy, Debug)]
pub struct PairTargets<'a> {
    /// Group of the caption of each row's image.
    pub own: &'a [i32],
    /// Group of the caption of the image that is mixed into it; `own` where none is.
    pub other: &'a [i32],
    /// Share of the image itself; 1 where nothing is mixed in.
    pub keep: &'a [f32],
    /// Group of each column's caption.
    pub group: &'a [i32],
    /// One by the size of the group.
    pub share: &'a [f32],
    /// Σ_i p_row[i, j] over all B rows.
    pub column_total: &'a [f32],
}

impl PairTargets<'_> {
    /// p_row[i, j], row i of those held.
    pub fn row(&self, i: usize, j: usize) -> f32 {
        let mut mass = 0.0;
        if self.own[i] == self.group[j] {
            mass += self.keep[i];
        }
        if self.other[i] == self.group[j] {
            mass += 1.0 - self.keep[i];
        }
        // A NaN share counts only where there is something to share, as in the kernels.
        if mass == 0.0 { 0.0 } else { mass * self.share[j] }
    }

    /// p_col[j, i], row i of those held.
    pub fn column(&self, first_row: usize, i: usize, j: usize) -> f32 {
        if self.column_total[j] == 0.0 {
            return if first_row + i == j { 1.0 } else { 0.0 };
        }
        let p = self.row(i, j);
        if p == 0.0 { 0.0 } else { p / self.column_total[j] }
    }

    fn check(&self, d: &Relational) {
        let fits = |len: usize, lens: [usize; 3]| lens == [len; 3];
        assert!(fits(d.rows, [self.own.len(), self.other.len(), self.keep.len()]), "own, other and keep are [rows]");
        let columns = [self.group.len(), self.share.len(), self.column_total.len()];
        assert!(fits(d.cols, columns), "group, share and column_total are [cols]");
    }
}

/// The logits of both directions.
struct Logits {
    /// Cosines a·bᵀ, then each teacher's T: by rows, and transposed.
    by: [Vec<Vec<f32>>; 2],
}

impl Logits {
    fn new(d: &Relational, a: &[f32], b: &[f32], teachers: &[(&[f32], &[f32])], ws: &mut Workspace) -> Self {
        assert_eq!(teachers.len(), d.teachers.len(), "every teacher has u and v");
        assert!(d.rows == d.cols && d.first_row == 0, "one process holds all rows here");
        let sides = std::iter::once(((a, b), d.dim)).chain(teachers.iter().copied().zip(d.teachers.iter().copied()));
        let (mut rows, mut columns) = (Vec::new(), Vec::new());
        for ((left, right), k) in sides {
            assert!(left.len() == d.rows * k && right.len() == d.cols * k, "embeddings are [rows, D] and [cols, D]");
            let mut x = vec![0.0; d.rows * d.cols];
            let product = Gemm { m: d.rows, n: d.cols, k, trans_a: false, trans_b: true };
            gemm(&product, 1.0, left, right, 0.0, &mut x, ws);
            let mut transposed = vec![0.0; x.len()];
            transpose_2d_backward(d.cols, d.rows, &x, &mut transposed, false);
            rows.push(x);
            columns.push(transposed);
        }
        Logits { by: [rows, columns] }
    }
}

fn log_sum_exp(x: impl Iterator<Item = f64> + Clone) -> f64 {
    // A NaN that the maximum skips comes back through the sum.
    let top = x.clone().fold(f64::NEG_INFINITY, |m, v| if v > m { v } else { m });
    top + x.map(|v| (v - top).exp()).sum::<f64>().ln()
}

/// One row of one direction.
struct Row<'a> {
    scale: f64,
    cosines: &'a [f32],
    teachers: Vec<(&'a [f32], f64)>,
    log_sum: f64,
}

impl<'a> Row<'a> {
    fn new(scale: f64, logits: &'a [Vec<f32>], i: usize, n: usize) -> Self {
        let row = |x: &'a Vec<f32>| &x[i * n..][..n];
        let cosines = row(&logits[0]);
        let teachers = logits[1..].iter().map(|t| (row(t), log_sum_exp(row(t).iter().map(|v| f64::from(*v)))));
        let log_sum = log_sum_exp(cosines.iter().map(|v| scale * f64::from(*v)));
        Row { scale, cosines, teachers: teachers.collect(), log_sum }
    }

    /// ln softmax(S)_j.
    fn log_share(&self, j: usize) -> f64 {
        self.scale * f64::from(self.cosines[j]) - self.log_sum
    }

    /// p̄_j.
    fn mean(&self, j: usize) -> f64 {
        let sum: f64 = self.teachers.iter().map(|(t, log_sum)| (f64::from(t[j]) - log_sum).exp()).sum();
        sum / self.teachers.len() as f64
    }
}

/// CE and KD; see [`Relational`]. An empty batch has losses 0.
pub fn relational_forward(
    d: &Relational,
    a: &[f32],
    b: &[f32],
    scale: f32,
    targets: &PairTargets<'_>,
    teachers: &[(&[f32], &[f32])],
    y: &mut [f32],
    ws: &mut Workspace,
) {
    targets.check(d);
    y.fill(0.0);
    if d.rows == 0 {
        return;
    }
    let logits = Logits::new(d, a, b, teachers, ws);
    let mut sums = [0.0; 2];
    for (columns, x) in logits.by.iter().enumerate() {
        let terms = |i: usize| {
            let row = Row::new(f64::from(scale), x, i, d.cols);
            let (mut ce, mut kd) = (0.0, 0.0);
            for j in 0..d.cols {
                let p = if columns == 0 { targets.row(i, j) } else { targets.column(0, j, i) };
                if p != 0.0 {
                    ce -= f64::from(p) * row.log_share(j);
                }
                let mean = if row.teachers.is_empty() { 0.0 } else { row.mean(j) };
                if mean != 0.0 {
                    kd += mean * (mean.ln() - row.log_share(j));
                }
            }
            // A NaN that nothing above gave a weight still reaches the loss.
            let touched = row.log_sum * 0.0;
            [ce + touched, kd + if row.teachers.is_empty() { 0.0 } else { touched }]
        };
        let rows: Vec<[f64; 2]> = (0..d.rows).into_par_iter().map(terms).collect();
        rows.iter().for_each(|[ce, kd]| (sums[0], sums[1]) = (sums[0] + ce, sums[1] + kd));
    }
    y[0] = (0.5 * sums[0] / d.cols as f64) as f32;
    y[1] = (0.5 * sums[1] / d.cols as f64) as f32;
}

/// VJP of [`relational_forward`] with respect to a, b and the scale, all overwritten, for the gradients `dl` of CE and
/// KD: with P and Q the softmax of S by rows and columns, R̄ and Ū the means of the teachers',
/// G = 1/(2B)·[dl₀·(P − p_row + Q − p_col) + dl₁·(P − R̄ + Q − Ū)]; da = scale·G·b, db = scale·Gᵀ·a, dscale = Σ G∘(a·bᵀ).
pub fn relational_backward(
    d: &Relational,
    a: &[f32],
    b: &[f32],
    scale: f32,
    targets: &PairTargets<'_>,
    teachers: &[(&[f32], &[f32])],
    dl: [f32; 2],
    da: &mut [f32],
    db: &mut [f32],
    dscale: &mut f32,
    ws: &mut Workspace,
) {
    targets.check(d);
    assert!(da.len() == a.len() && db.len() == b.len(), "gradients are as long as their arguments");
    *dscale = 0.0;
    if d.rows == 0 {
        da.fill(0.0);
        db.fill(0.0);
        return;
    }
    let logits = Logits::new(d, a, b, teachers, ws);
    let [ce, kd] = dl.map(|w| 0.5 * f64::from(w) / d.cols as f64);
    let [g, transposed] = [0, 1].map(|columns| {
        let mut g = vec![0.0; d.rows * d.cols];
        g.par_chunks_mut(d.cols).enumerate().for_each(|(i, g)| {
            let row = Row::new(f64::from(scale), &logits.by[columns], i, d.cols);
            for (j, g) in g.iter_mut().enumerate() {
                let p = if columns == 0 { targets.row(i, j) } else { targets.column(0, j, i) };
                let share = row.log_share(j).exp();
                let mut slope = ce * (share - f64::from(p));
                if !row.teachers.is_empty() {
                    slope += kd * (share - row.mean(j));
                }
                *g = slope as f32;
            }
        });
        g
    });
    let mut g = g;
    transpose_2d_backward(d.rows, d.cols, &transposed, &mut g, true);
    let rows = Gemm { m: d.rows, n: d.dim, k: d.cols, trans_a: false, trans_b: false };
    gemm(&rows, scale, &g, b, 0.0, da, ws);
    let columns = Gemm { m: d.cols, n: d.dim, k: d.rows, trans_a: true, trans_b: false };
    gemm(&columns, scale, &g, a, 0.0, db, ws);
    let dot = |(g, x): (&[f32], &[f32])| g.iter().zip(x).map(|(g, x)| f64::from(*g) * f64::from(*x)).sum::<f64>();
    let sums: Vec<f64> = g.par_chunks(d.cols).zip(logits.by[0][0].par_chunks(d.cols)).map(dot).collect();
    *dscale = sums.iter().sum::<f64>() as f32;
}
