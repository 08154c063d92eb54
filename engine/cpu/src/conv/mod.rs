//! 2-d convolution on channels-last images: forward, gradient by the input, gradient by the weights.

mod dense;
mod multiplied;

use crate::depthwise;
use crate::linear::{Linear, linear_backward_data, linear_backward_weights, linear_forward};
use crate::reduce::add_column_sums;
use crate::reference;
use crate::workspace::Workspace;

/// Sizes of a 2-d convolution. `x` is `[batch, h, w, c_in]`, `w` (weights) is `[c_out, c_in / groups, kh, kw]`, `y` is
/// `[batch, out_h, out_w, c_out]`; zero padding, the same stride in both directions, no dilation.
///
/// Dense (`groups == 1`) and depthwise (`groups == c_in`, one or several outputs per channel) convolutions are fast;
/// other group counts are computed by the plain formulation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Conv2d {
    /// Images.
    pub batch: usize,
    /// Input height.
    pub h: usize,
    /// Input width.
    pub w: usize,
    /// Input channels.
    pub c_in: usize,
    /// Output channels.
    pub c_out: usize,
    /// Kernel height.
    pub kh: usize,
    /// Kernel width.
    pub kw: usize,
    /// Distance between neighbouring outputs, in input pixels; at least 1.
    pub stride: usize,
    /// Rows and columns of zeros on each side.
    pub pad: usize,
    /// Groups of channels that do not see each other; divides `c_in` and `c_out`.
    pub groups: usize,
}

impl Conv2d {
    /// Output height: 0 if the kernel is taller than the padded image.
    pub fn out_h(&self) -> usize {
        (self.h + 2 * self.pad).checked_sub(self.kh).map_or(0, |free| free / self.stride + 1)
    }

    /// Output width: 0 if the kernel is wider than the padded image.
    pub fn out_w(&self) -> usize {
        (self.w + 2 * self.pad).checked_sub(self.kw).map_or(0, |free| free / self.stride + 1)
    }

    /// Elements of the weights.
    pub fn weights(&self) -> usize {
        self.c_out * (self.c_in / self.groups) * self.kh * self.kw
    }

    /// Floating-point operations of the forward pass, taps in the padding included; the two gradients take as many
    /// each.
    pub fn flops(&self) -> u64 {
        2 * (self.batch * self.out_h() * self.out_w()) as u64 * self.weights() as u64
    }

    /// Panics unless the sizes fit together and the arrays have these lengths.
    pub(crate) fn check(&self, x: usize, w: usize, y: usize) {
        assert!(self.stride > 0 && self.groups > 0, "stride and groups are at least 1");
        assert!(
            self.c_in.is_multiple_of(self.groups) && self.c_out.is_multiple_of(self.groups),
            "groups divide the channels"
        );
        assert_eq!(x, self.batch * self.h * self.w * self.c_in, "x's length");
        assert_eq!(w, self.weights(), "w's length");
        assert_eq!(y, self.batch * self.out_h() * self.out_w() * self.c_out, "y's length");
    }

    fn path(&self) -> Path {
        if self.groups == 1 {
            if self.kh == 1 && self.kw == 1 && self.stride == 1 && self.pad == 0 {
                Path::Pointwise
            } else {
                Path::Dense
            }
        } else if self.groups == self.c_in {
            if self.c_in == self.c_out { Path::Depthwise } else { Path::Multiplied }
        } else {
            Path::Grouped
        }
    }

    /// The layer that a 1x1 convolution is on channels-last images.
    fn pointwise(&self) -> Linear {
        Linear { rows: self.batch * self.h * self.w, c_in: self.c_in, c_out: self.c_out }
    }
}

enum Path {
    Pointwise,
    Dense,
    Depthwise,
    Multiplied,
    Grouped,
}

/// `y = conv(x, w) + bias`. Panics if the sizes do not fit together, as all functions here do.
pub fn conv2d_forward(d: &Conv2d, x: &[f32], w: &[f32], bias: Option<&[f32]>, y: &mut [f32], ws: &mut Workspace) {
    d.check(x.len(), w.len(), y.len());
    if let Some(bias) = bias {
        assert_eq!(bias.len(), d.c_out, "bias's length");
    }
    match d.path() {
        Path::Pointwise => linear_forward(&d.pointwise(), x, w, bias, y, ws),
        Path::Dense => dense::forward(d, x, w, bias, y, ws),
        Path::Depthwise => depthwise::forward(d, x, w, bias, y, ws),
        Path::Multiplied => multiplied::forward(d, x, w, bias, y, ws),
        Path::Grouped => reference::conv2d_forward(d, x, w, bias, y),
    }
}

/// The gradient by the input, `dx = conv^T(dy, w)`, added to `dx` if `accumulate`.
pub fn conv2d_backward_data(d: &Conv2d, w: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool, ws: &mut Workspace) {
    d.check(dx.len(), w.len(), dy.len());
    match d.path() {
        Path::Pointwise => linear_backward_data(&d.pointwise(), w, dy, dx, accumulate, ws),
        Path::Dense => dense::backward_data(d, w, dy, dx, accumulate, ws),
        Path::Depthwise => depthwise::backward_data(d, w, dy, dx, accumulate, ws),
        Path::Multiplied => multiplied::backward_data(d, w, dy, dx, accumulate, ws),
        Path::Grouped => reference::conv2d_backward_data(d, w, dy, dx, accumulate),
    }
}

/// The gradients by the weights and the bias, added to `dw` and `dbias`.
pub fn conv2d_backward_weights(
    d: &Conv2d,
    x: &[f32],
    dy: &[f32],
    dw: &mut [f32],
    dbias: Option<&mut [f32]>,
    ws: &mut Workspace,
) {
    d.check(x.len(), dw.len(), dy.len());
    match d.path() {
        Path::Pointwise => linear_backward_weights(&d.pointwise(), x, dy, dw, None, ws),
        Path::Dense => dense::backward_weights(d, x, dy, dw, ws),
        Path::Depthwise => depthwise::backward_weights(d, x, dy, dw, ws),
        Path::Multiplied => multiplied::backward_weights(d, x, dy, dw, ws),
        Path::Grouped => reference::conv2d_backward_weights(d, x, dy, dw, None),
    }
    if let Some(dbias) = dbias {
        assert_eq!(dbias.len(), d.c_out, "dbias's length");
        add_column_sums(dy, d.c_out, dbias, ws);
    }
}

#[cfg(test)]
mod tests;
