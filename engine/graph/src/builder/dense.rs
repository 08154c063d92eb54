//! Products with matrices and rows of tables.

use mcpipe_cpu::gemm::Gemm;
use mcpipe_cpu::linear::Linear;

use super::{GraphBuilder, Path};
use crate::graph::{GraphError, Tensor};
use crate::init::Init;
use crate::op::Op;

impl GraphBuilder {
    /// Linear map of the last axis with `{path}.weight` `[out, in]` and, if asked, `{path}.bias`.
    ///
    /// # Errors
    /// A parameter of that path with another shape.
    pub fn linear(
        &mut self,
        path: &Path,
        x: &Tensor,
        out: usize,
        bias: bool,
        init: Init,
    ) -> Result<Tensor, GraphError> {
        let (_, c_in) = Self::rows(x);
        let w = self.param(&path.at("weight"), &[out, c_in], init)?;
        let b = if bias { Some(self.param(&path.at("bias"), &[out], Init::Zeros)?) } else { None };
        self.linear_with(x, &w, b.as_ref())
    }

    /// Linear map of the last axis with given `w [out, in]` and bias.
    ///
    /// # Errors
    /// `w` does not fit the last axis.
    pub fn linear_with(&mut self, x: &Tensor, w: &Tensor, bias: Option<&Tensor>) -> Result<Tensor, GraphError> {
        let (rows, c_in) = Self::rows(x);
        let c_out = match w.shape[..] {
            [o, i] if i == c_in => o,
            _ => return Err(self.refuse("linear", &[x, w], "the weight's second axis is not the input's last")),
        };
        let mut shape = x.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = c_out;
        }
        let op = Op::Linear(Linear { rows, c_in, c_out });
        Ok(match bias {
            Some(b) => self.op(op, &[x, w, b], shape),
            None => self.op(op, &[x, w], shape),
        })
    }

    /// `alpha · op(a) · op(b)` of two matrices.
    ///
    /// # Errors
    /// Not matrices, or inner dims that differ.
    pub fn matmul(
        &mut self,
        a: &Tensor,
        trans_a: bool,
        b: &Tensor,
        trans_b: bool,
        alpha: f32,
    ) -> Result<Tensor, GraphError> {
        let ([ar, ac], [br, bc]) = (self.matrix("matmul", a)?, self.matrix("matmul", b)?);
        let (m, k) = if trans_a { (ac, ar) } else { (ar, ac) };
        let (k2, n) = if trans_b { (bc, br) } else { (br, bc) };
        if k != k2 {
            return Err(self.refuse("matmul", &[a, b], "the inner dims differ"));
        }
        let dims = Gemm { m, n, k, trans_a, trans_b };
        Ok(self.op(Op::MatMul { dims, alpha }, &[a, b], vec![m, n]))
    }

    fn matrix(&self, op: &'static str, x: &Tensor) -> Result<[usize; 2], GraphError> {
        match x.shape[..] {
            [r, c] => Ok([r, c]),
            _ => Err(self.refuse(op, &[x], "a matrix is needed")),
        }
    }

    /// Rows of `table [V, width]` by `ids`.
    ///
    /// # Errors
    /// `table` is no matrix.
    pub fn embedding(&mut self, table: &Tensor, ids: &Tensor) -> Result<Tensor, GraphError> {
        let [_, width] = self.matrix("embedding", table)?;
        let mut shape = ids.shape.clone();
        shape.push(width);
        Ok(self.op(Op::Embedding { width }, &[table, ids], shape))
    }
}
