//! Normalisations.

use mcpipe_cpu::norm::{GroupNorm, Norm};

use super::{BatchNormArgs, GraphBuilder, Path};
use crate::graph::{GraphError, Source, Tensor};
use crate::init::Init;
use crate::op::Op;

impl GraphBuilder {
    /// Batch norm over all but the last axis, with the activation of `a` behind; parameters `{path}.{weight,bias,
    /// running_mean,running_var}`.
    ///
    /// # Errors
    /// A parameter of that path with another shape.
    pub fn batch_norm(&mut self, path: &Path, x: &Tensor, a: BatchNormArgs) -> Result<Tensor, GraphError> {
        let (rows, c) = Self::rows(x);
        let gamma = self.param(&path.at("weight"), &[c], Init::Ones)?;
        let beta = self.param(&path.at("bias"), &[c], Init::Zeros)?;
        let mean = self.buffer(&path.at("running_mean"), &[c], Init::Zeros)?;
        let var = self.buffer(&path.at("running_var"), &[c], Init::Ones)?;
        self.label = path.as_str().to_owned();
        let dims = Norm { rows, c, eps: a.eps };
        let shape = x.shape.clone();
        if !self.train {
            return Ok(self.op(Op::BatchNormEval { dims, act: a.act }, &[x, &gamma, &beta, &mean, &var], shape));
        }
        let id = |t: &Tensor| match self.dag[t.id].source {
            Source::Param(p) => p,
            _ => unreachable!("buffer() gives a parameter node"),
        };
        let op = Op::BatchNorm { dims, act: a.act, momentum: a.momentum, running: [id(&mean), id(&var)] };
        Ok(self.op(op, &[x, &gamma, &beta], shape))
    }

    /// Layer norm over the last axis, `{path}.{weight,bias}`.
    ///
    /// # Errors
    /// A parameter of that path with another shape.
    pub fn layer_norm(&mut self, path: &Path, x: &Tensor, eps: f32) -> Result<Tensor, GraphError> {
        let (rows, c) = Self::rows(x);
        let gamma = self.param(&path.at("weight"), &[c], Init::Ones)?;
        let beta = self.param(&path.at("bias"), &[c], Init::Zeros)?;
        Ok(self.op(Op::LayerNorm(Norm { rows, c, eps }), &[x, &gamma, &beta], x.shape.clone()))
    }

    /// Rows of the last axis scaled to unit length.
    pub fn l2_normalize(&mut self, x: &Tensor) -> Tensor {
        let (rows, c) = Self::rows(x);
        self.op(Op::L2Normalize { rows, c }, &[x], x.shape.clone())
    }

    /// Group norm of one group (Wu & He 2018, eq. 7 with G = 1), `{path}.{weight,bias}` per channel: `x` is seen as
    /// `[batch, rest, C]` and each of its `batch` parts has a mean and a variance of its own.
    ///
    /// # Errors
    /// `batch` does not divide the rows of `x`, or a parameter of that path with another shape.
    pub fn group_norm(&mut self, path: &Path, x: &Tensor, batch: usize, eps: f32) -> Result<Tensor, GraphError> {
        let (all, c) = Self::rows(x);
        if batch == 0 || !all.is_multiple_of(batch) {
            return Err(self.refuse("group_norm", &[x], format!("its rows don't make {batch} parts")));
        }
        let gamma = self.param(&path.at("weight"), &[c], Init::Ones)?;
        let beta = self.param(&path.at("bias"), &[c], Init::Zeros)?;
        let d = GroupNorm { batch, rows: all / batch, c, eps };
        Ok(self.op(Op::GroupNorm(d), &[x, &gamma, &beta], x.shape.clone()))
    }
}
