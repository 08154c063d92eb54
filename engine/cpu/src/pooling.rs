//! Pooling over space, channels-last.
//!
//! Shapes: B batch, H and W height and width, C channels, OH and OW output height and width.

use rayon::prelude::*;

/// y[b, c] = mean over space of x[b, :, c]; x [B, HW, C], y [B, C].
pub fn global_avg_pool_forward(batch: usize, hw: usize, c: usize, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), batch * hw * c, "x is [B, HW, C]");
    assert_eq!(y.len(), batch * c, "y is [B, C]");
    if y.is_empty() {
        return;
    }
    let scale = 1.0 / hw as f32;
    y.par_chunks_mut(c).enumerate().for_each(|(b, y_c)| {
        let x_c = &x[b * hw * c..(b + 1) * hw * c];
        y_c.fill(0.0);
        for row in x_c.chunks_exact(c) {
            for (acc, value) in y_c.iter_mut().zip(row) {
                *acc += value;
            }
        }
        for acc in y_c.iter_mut() {
            *acc *= scale;
        }
    });
}

/// VJP of [`global_avg_pool_forward`]: dx[b, :, c] = dy[b, c] / HW.
pub fn global_avg_pool_backward(batch: usize, hw: usize, c: usize, dy: &[f32], dx: &mut [f32], accumulate: bool) {
    assert_eq!(dx.len(), batch * hw * c, "dx is [B, HW, C]");
    assert_eq!(dy.len(), batch * c, "dy is [B, C]");
    if dx.is_empty() {
        return;
    }
    let scale = 1.0 / hw as f32;
    dx.par_chunks_mut(hw * c).zip(dy.par_chunks(c)).for_each(|(dx_c, dy_c)| {
        for row in dx_c.chunks_exact_mut(c) {
            if accumulate {
                for (d, g) in row.iter_mut().zip(dy_c) {
                    *d += g * scale;
                }
            } else {
                for (d, g) in row.iter_mut().zip(dy_c) {
                    *d = g * scale;
                }
            }
        }
    });
}

/// A square pooling window over [B, H, W, C], with symmetric padding.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pool2d {
    /// Images.
    pub batch: usize,
    /// Input height.
    pub h: usize,
    /// Input width.
    pub w: usize,
    /// Channels.
    pub c: usize,
    /// Side of the window.
    pub k: usize,
    /// Step of the window.
    pub stride: usize,
    /// Padding on each side; less than `k`, so that each window holds at least one pixel.
    pub pad: usize,
}

impl Pool2d {
    /// Output height: floor((H + 2·pad − k) / stride) + 1.
    pub fn out_h(&self) -> usize {
        (self.h + 2 * self.pad - self.k) / self.stride + 1
    }

    /// Output width: floor((W + 2·pad − k) / stride) + 1.
    pub fn out_w(&self) -> usize {
        (self.w + 2 * self.pad - self.k) / self.stride + 1
    }

    /// Rows (or columns) of the input under window `o`, clipped to the image.
    fn window(&self, o: usize, size: usize) -> std::ops::Range<usize> {
        let start = (o * self.stride).saturating_sub(self.pad);
        let end = (o * self.stride + self.k).saturating_sub(self.pad).min(size);
        start..end
    }

    fn check(&self, x: usize, y: usize) {
        assert!(
            self.k > 0 && self.stride > 0 && self.pad < self.k,
            "window k {} stride {} pad {}",
            self.k,
            self.stride,
            self.pad
        );
        assert!(
            self.h + 2 * self.pad >= self.k && self.w + 2 * self.pad >= self.k,
            "window larger than the padded image"
        );
        assert_eq!(x, self.batch * self.h * self.w * self.c, "x is [B, H, W, C]");
        assert_eq!(y, self.batch * self.out_h() * self.out_w() * self.c, "y is [B, OH, OW, C]");
    }
}

/// Maximum of each window (padding never wins). A NaN in a window makes the output NaN.
///
/// `argmax` [B, OH, OW, C] keeps the winner's offset in its window, ky·k + kx, as an `f32` that holds
/// the integer exactly; the first of equal values wins, as in torch.
pub fn max_pool_forward(d: &Pool2d, x: &[f32], y: &mut [f32], argmax: &mut [f32]) {
    d.check(x.len(), y.len());
    assert_eq!(argmax.len(), y.len(), "argmax is [B, OH, OW, C]");
    if y.is_empty() {
        return;
    }
    let (oh, ow) = (d.out_h(), d.out_w());
    let image = d.h * d.w * d.c;
    y.par_chunks_mut(ow * d.c).zip(argmax.par_chunks_mut(ow * d.c)).enumerate().for_each(|(row, (y_wc, arg_wc))| {
        let (b, oy) = (row / oh, row % oh);
        let x_hwc = &x[b * image..(b + 1) * image];
        for ox in 0..ow {
            let y_c = &mut y_wc[ox * d.c..(ox + 1) * d.c];
            let arg_c = &mut arg_wc[ox * d.c..(ox + 1) * d.c];
            y_c.fill(f32::NEG_INFINITY);
            arg_c.fill(-1.0);
            for iy in d.window(oy, d.h) {
                for ix in d.window(ox, d.w) {
                    let offset = ((iy + d.pad - oy * d.stride) * d.k + ix + d.pad - ox * d.stride) as f32;
                    let x_c = &x_hwc[(iy * d.w + ix) * d.c..][..d.c];
                    for ((best, arg), value) in y_c.iter_mut().zip(arg_c.iter_mut()).zip(x_c) {
                        if *value > *best || value.is_nan() || *arg < 0.0 {
                            *best = *value;
                            *arg = offset;
                        }
                    }
                }
            }
        }
    });
}

/// VJP of [`max_pool_forward`]: each output's gradient goes to its winner.
pub fn max_pool_backward(d: &Pool2d, argmax: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool) {
    d.check(dx.len(), dy.len());
    assert_eq!(argmax.len(), dy.len(), "argmax is [B, OH, OW, C]");
    scatter_windows(d, dy, dx, accumulate, |index, iy, ix, g| {
        let offset = argmax[index] as usize;
        if offset == iy * d.k + ix { g } else { 0.0 }
    });
}

/// Mean of each window; the divisor is k², padding counted as zeros (torch's `count_include_pad`).
pub fn avg_pool_forward(d: &Pool2d, x: &[f32], y: &mut [f32]) {
    d.check(x.len(), y.len());
    if y.is_empty() {
        return;
    }
    let (oh, ow) = (d.out_h(), d.out_w());
    let image = d.h * d.w * d.c;
    let scale = 1.0 / (d.k * d.k) as f32;
    y.par_chunks_mut(ow * d.c).enumerate().for_each(|(row, y_wc)| {
        let (b, oy) = (row / oh, row % oh);
        let x_hwc = &x[b * image..(b + 1) * image];
        for ox in 0..ow {
            let y_c = &mut y_wc[ox * d.c..(ox + 1) * d.c];
            y_c.fill(0.0);
            for iy in d.window(oy, d.h) {
                for ix in d.window(ox, d.w) {
                    for (acc, value) in y_c.iter_mut().zip(&x_hwc[(iy * d.w + ix) * d.c..][..d.c]) {
                        *acc += value;
                    }
                }
            }
            for acc in y_c.iter_mut() {
                *acc *= scale;
            }
        }
    });
}

/// VJP of [`avg_pool_forward`].
pub fn avg_pool_backward(d: &Pool2d, dy: &[f32], dx: &mut [f32], accumulate: bool) {
    d.check(dx.len(), dy.len());
    let scale = 1.0 / (d.k * d.k) as f32;
    scatter_windows(d, dy, dx, accumulate, |_, _, _, g| g * scale);
}

/// Adds `weight(output index, ky, kx, dy)` of every output to the pixels under its window. One task
/// owns one image, so the order of additions is fixed.
fn scatter_windows(
    d: &Pool2d,
    dy: &[f32],
    dx: &mut [f32],
    accumulate: bool,
    weight: impl Fn(usize, usize, usize, f32) -> f32 + Sync,
) {
    if dx.is_empty() {
        return;
    }
    let (oh, ow) = (d.out_h(), d.out_w());
    dx.par_chunks_mut(d.h * d.w * d.c).enumerate().for_each(|(b, dx_hwc)| {
        if !accumulate {
            dx_hwc.fill(0.0);
        }
        for oy in 0..oh {
            for ox in 0..ow {
                let first = ((b * oh + oy) * ow + ox) * d.c;
                for iy in d.window(oy, d.h) {
                    for ix in d.window(ox, d.w) {
                        let (ky, kx) = (iy + d.pad - oy * d.stride, ix + d.pad - ox * d.stride);
                        let dx_c = &mut dx_hwc[(iy * d.w + ix) * d.c..][..d.c];
                        for (i, target) in dx_c.iter_mut().enumerate() {
                            *target += weight(first + i, ky, kx, dy[first + i]);
                        }
                    }
                }
            }
        }
    });
}
