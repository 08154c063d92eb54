//! Losses and the maps they compare, as ops.

use mcpipe_cpu::loss::Contrastive;
use mcpipe_cpu::relational::Relational;

use super::GraphBuilder;
use crate::graph::{GraphError, Tensor};
use crate::op::Op;

/// Which captions an image shows, as inputs of [`Op::Relational`]; see [`mcpipe_cpu::relational::PairTargets`].
#[derive(Clone, Debug)]
pub struct PairInputs {
    /// `[rows]`, ids.
    pub own: Tensor,
    /// `[rows]`, ids.
    pub other: Tensor,
    /// `[rows]`.
    pub keep: Tensor,
    /// `[cols]`, ids.
    pub group: Tensor,
    /// `[cols]`.
    pub share: Tensor,
    /// `[cols]`.
    pub column_total: Tensor,
}

impl PairInputs {
    /// In the order of the op's arguments.
    fn tensors(&self) -> [&Tensor; 6] {
        [&self.own, &self.other, &self.keep, &self.group, &self.share, &self.column_total]
    }
}

impl GraphBuilder {
    /// The contrastive loss; see [`Op::Contrastive`]. `p_row [B,B']`, `p_col [B',B]` hold rows that sum to 1.
    ///
    /// # Errors
    /// Sizes that don't fit together.
    pub fn contrastive(
        &mut self,
        d: Contrastive,
        a: &Tensor,
        b: &Tensor,
        scale: &Tensor,
        targets: [&Tensor; 2],
    ) -> Result<Tensor, GraphError> {
        let [p_row, p_col] = targets;
        let fits = a.shape == [d.rows, d.dim]
            && b.shape == [d.cols, d.dim]
            && scale.numel() == 1
            && p_row.shape == [d.rows, d.cols]
            && p_col.shape == [d.cols, d.rows];
        if !fits {
            return Err(self.refuse("contrastive", &[a, b, scale, p_row, p_col], "embeddings and targets don't fit"));
        }
        Ok(self.op(Op::Contrastive(d), &[a, b, scale, p_row, p_col], vec![1]))
    }

    /// CLIP's cross-entropy and the relational distillation from `teachers`' `(u, v)` → `[2]`; see [`Op::Relational`].
    ///
    /// # Errors
    /// Sizes that don't fit together, or too many teachers.
    pub fn relational(
        &mut self,
        d: &Relational,
        a: &Tensor,
        b: &Tensor,
        scale: &Tensor,
        targets: &PairInputs,
        teachers: &[(&Tensor, &Tensor)],
    ) -> Result<Tensor, GraphError> {
        let targets = targets.tensors();
        let lens = [d.rows, d.rows, d.rows, d.cols, d.cols, d.cols];
        let fits = a.shape == [d.rows, d.dim]
            && b.shape == [d.cols, d.dim]
            && scale.numel() == 1
            && targets.iter().zip(lens).all(|(t, len)| t.shape == [len])
            && teachers.len() == d.teachers.len()
            && teachers.iter().zip(&d.teachers).all(|((u, v), &k)| u.shape == [d.rows, k] && v.shape == [d.cols, k]);
        let mut inputs = vec![a, b, scale];
        inputs.extend(targets);
        inputs.extend(teachers.iter().flat_map(|(u, v)| [*u, *v]));
        if !fits {
            return Err(self.refuse("relational", &inputs, "embeddings and targets don't fit"));
        }
        if let Some(reason) = d.problem() {
            return Err(self.refuse("relational", &inputs, reason));
        }
        Ok(self.op(Op::Relational(d.clone()), &inputs, vec![2]))
    }

    /// Mean squared error → scalar.
    ///
    /// # Errors
    /// Sizes differ.
    pub fn mse(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor, GraphError> {
        let t = self.same_size(Op::Mse, a, b)?;
        Ok(self.scalar(t))
    }

    /// Mean over rows of one minus the cosine → scalar.
    ///
    /// # Errors
    /// Sizes differ.
    pub fn cosine(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor, GraphError> {
        let (rows, c) = Self::rows(a);
        let t = self.same_size(Op::Cosine { rows, c }, a, b)?;
        Ok(self.scalar(t))
    }

    /// Mean over rows of `KL(p ‖ q)`; no gradient to the target `p` → scalar.
    ///
    /// # Errors
    /// Sizes differ.
    pub fn kl(&mut self, p: &Tensor, q: &Tensor) -> Result<Tensor, GraphError> {
        let (rows, c) = Self::rows(p);
        let t = self.same_size(Op::KlRows { rows, c }, p, q)?;
        Ok(self.scalar(t))
    }

    fn scalar(&mut self, mut t: Tensor) -> Tensor {
        t.shape = vec![1];
        self.dag[t.id].shape = vec![1];
        t
    }

    /// Attention-transfer map (Zagoruyko & Komodakis 2017, eq. 1, p = 2): `[B, …, C]` → `[B, pixels]`.
    ///
    /// # Errors
    /// Fewer than three axes.
    pub fn attention_transfer_map(&mut self, x: &Tensor) -> Result<Tensor, GraphError> {
        if x.shape.len() < 3 {
            return Err(self.refuse("attention_transfer_map", &[x], "three axes or more are needed"));
        }
        let (batch, c) = (x.shape[0], x.shape[x.shape.len() - 1]);
        let hw = x.numel() / (batch * c).max(1);
        Ok(self.op(Op::AttentionTransferMap { batch, hw, c }, &[x], vec![batch, hw]))
    }
}
