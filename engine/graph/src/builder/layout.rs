//! Ops that only move values.

use mcpipe_cpu::layout::Patches;

use super::GraphBuilder;
use crate::graph::{GraphError, Tensor};
use crate::op::{Image, Op};

impl GraphBuilder {
    /// The same value seen with another shape.
    ///
    /// # Errors
    /// The sizes differ.
    pub fn reshape(&self, x: &Tensor, shape: &[usize]) -> Result<Tensor, GraphError> {
        if shape.iter().product::<usize>() != x.numel() {
            return Err(self.refuse("reshape", &[x], format!("{shape:?} has another size")));
        }
        Ok(Tensor { id: x.id, shape: shape.to_vec() })
    }

    fn patches(&self, i: Image, patch: [usize; 2]) -> Patches {
        Patches { batch: i.batch, h: i.h, w: i.w, c: i.c, ph: patch[0], pw: patch[1] }
    }

    /// MobileViT's unfold (Mehta & Rastegari 2022, §3.1): `[B,H,W,C]` → `[B·P, N, C]`, P positions inside a patch, N
    /// patches.
    ///
    /// # Errors
    /// The patch does not divide the image.
    pub fn unfold_patches(&mut self, x: &Tensor, patch: [usize; 2]) -> Result<Tensor, GraphError> {
        let i = self.image("unfold_patches", x)?;
        if patch.contains(&0) || i.h % patch[0] != 0 || i.w % patch[1] != 0 {
            return Err(self.refuse("unfold_patches", &[x], format!("patches of {patch:?} don't tile it")));
        }
        let p = patch[0] * patch[1];
        Ok(self.op(Op::Unfold(self.patches(i, patch)), &[x], vec![i.batch * p, i.h * i.w / p, i.c]))
    }

    /// Inverse of [`unfold_patches`](Self::unfold_patches), to an image of `h`×`w`.
    ///
    /// # Errors
    /// The sizes don't fit.
    pub fn fold_patches(&mut self, x: &Tensor, h: usize, w: usize, patch: [usize; 2]) -> Result<Tensor, GraphError> {
        let (_, c) = Self::rows(x);
        let pixels = x.numel() / c.max(1);
        let tiled = !patch.contains(&0) && h.is_multiple_of(patch[0]) && w.is_multiple_of(patch[1]);
        if !tiled || h * w == 0 || !pixels.is_multiple_of(h * w) {
            return Err(self.refuse(
                "fold_patches",
                &[x],
                format!("it is no image of {h}x{w} in patches of {patch:?}"),
            ));
        }
        let i = Image { batch: pixels / (h * w), h, w, c };
        Ok(self.op(Op::Fold(self.patches(i, patch)), &[x], vec![i.batch, h, w, c]))
    }

    /// `y[b] = x[b, index[b]]`.
    ///
    /// # Errors
    /// `x` is not `[batch, tokens, width]`.
    pub fn gather_rows(&mut self, x: &Tensor, index: &Tensor) -> Result<Tensor, GraphError> {
        let [batch, tokens, width] = self.tokens("gather_rows", x)?;
        Ok(self.op(Op::GatherRows { batch, tokens, width }, &[x, index], vec![batch, width]))
    }

    pub(super) fn tokens(&self, op: &'static str, x: &Tensor) -> Result<[usize; 3], GraphError> {
        match x.shape[..] {
            [b, n, c] => Ok([b, n, c]),
            _ => Err(self.refuse(op, &[x], "[batch, tokens, width] is needed")),
        }
    }

    /// Concatenation along the last axis.
    ///
    /// # Errors
    /// Leading sizes differ.
    pub fn concat(&mut self, a: &Tensor, b: &Tensor) -> Result<Tensor, GraphError> {
        let ((rows, ca), (rb, cb)) = (Self::rows(a), Self::rows(b));
        if rows != rb {
            return Err(self.refuse("concat", &[a, b], "the leading sizes differ"));
        }
        let mut shape = a.shape.clone();
        if let Some(last) = shape.last_mut() {
            *last = ca + cb;
        }
        Ok(self.op(Op::ConcatLast { rows, ca, cb }, &[a, b], shape))
    }

    /// `token [width]` before every sequence of `x [B, N, width]`.
    ///
    /// # Errors
    /// Widths differ.
    pub fn prepend_token(&mut self, token: &Tensor, x: &Tensor) -> Result<Tensor, GraphError> {
        let [batch, tokens, width] = self.tokens("prepend_token", x)?;
        if token.numel() != width {
            return Err(self.refuse("prepend_token", &[token, x], "the widths differ"));
        }
        Ok(self.op(Op::PrependToken { batch, tokens, width }, &[token, x], vec![batch, tokens + 1, width]))
    }

    /// Tokens `start..start+len` of every sequence.
    ///
    /// # Errors
    /// The range leaves the sequence.
    pub fn slice_rows(&mut self, x: &Tensor, start: usize, len: usize) -> Result<Tensor, GraphError> {
        let [batch, tokens, width] = self.tokens("slice_rows", x)?;
        if len == 0 || start + len > tokens {
            return Err(self.refuse("slice_rows", &[x], format!("tokens {start}..{} don't exist", start + len)));
        }
        Ok(self.op(Op::SliceRows { batch, tokens, width, start, len }, &[x], vec![batch, len, width]))
    }

    /// Element `i` of a list → scalar, which stays `f32` wherever the list does.
    ///
    /// # Errors
    /// There is no such element.
    pub fn pick(&mut self, x: &Tensor, i: usize) -> Result<Tensor, GraphError> {
        let tokens = x.numel();
        if i >= tokens {
            return Err(self.refuse("pick", &[x], format!("it has no element {i}")));
        }
        Ok(self.op(Op::SliceRows { batch: 1, tokens, width: 1, start: i, len: 1 }, &[x], vec![1]))
    }

    /// Axes reordered: output axis i is input axis `axes[i]`.
    ///
    /// # Errors
    /// `axes` is no permutation of `x`'s axes.
    pub fn permute(&mut self, x: &Tensor, axes: &[usize]) -> Result<Tensor, GraphError> {
        let mut sorted = axes.to_vec();
        sorted.sort_unstable();
        if sorted != (0..x.shape.len()).collect::<Vec<_>>() {
            return Err(self.refuse("permute", &[x], format!("{axes:?} does not order its axes")));
        }
        let shape = axes.iter().map(|&a| x.shape[a]).collect();
        Ok(self.op(Op::Permute { shape: x.shape.clone(), axes: axes.to_vec() }, &[x], shape))
    }
}
