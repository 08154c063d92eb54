//! Bilinear resize of [B, H, W, C], as torch's `F.interpolate(mode="bilinear")` without antialiasing.

use rayon::prelude::*;

/// The two source positions of one output position and the weight of the second.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Tap {
    pub(crate) low: usize,
    pub(crate) high: usize,
    pub(crate) frac: f32,
}

/// Sizes of a resize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Resize {
    /// Images.
    pub batch: usize,
    /// Height.
    pub h: usize,
    /// Width.
    pub w: usize,
    /// Channels.
    pub c: usize,
    /// Height of the result.
    pub oh: usize,
    /// Width of the result.
    pub ow: usize,
    /// Whether the centres of the corner pixels stay where they are (torch's `align_corners`); else pixels are areas
    /// whose outer edges do.
    pub aligned: bool,
}

impl Resize {
    fn check(&self, x: usize, y: usize) {
        assert_eq!(x, self.batch * self.h * self.w * self.c, "x is [B, H, W, C]");
        assert_eq!(y, self.batch * self.oh * self.ow * self.c, "y is [B, OH, OW, C]");
    }
}

/// Source of output position `o`: (o + ½)·in/out − ½, clamped at 0, or if aligned o·(in − 1)/(out − 1); the upper
/// neighbour stays inside.
///
/// The position is computed in `f32` as torch does, so that both round to the same neighbours.
pub(crate) fn tap(o: usize, input: usize, output: usize, aligned: bool) -> Tap {
    let source = if aligned {
        let scale = if output > 1 { (input - 1) as f32 / (output - 1) as f32 } else { 0.0 };
        scale * o as f32
    } else {
        let scale = input as f32 / output as f32;
        (scale * (o as f32 + 0.5) - 0.5).max(0.0)
    };
    let low = (source as usize).min(input - 1);
    let high = if low + 1 < input { low + 1 } else { low };
    Tap { low, high, frac: source - low as f32 }
}

/// Resizes x [B, H, W, C] to y [B, OH, OW, C].
pub fn resize_bilinear_forward(d: &Resize, x: &[f32], y: &mut [f32]) {
    d.check(x.len(), y.len());
    let Resize { h, w, c, oh, ow, aligned, .. } = *d;
    if y.is_empty() {
        return;
    }
    assert!(h > 0 && w > 0, "cannot resize an empty image");
    let image = h * w * c;
    y.par_chunks_mut(ow * c).enumerate().for_each(|(row, y_wc)| {
        let (b, oy) = (row / oh, row % oh);
        let x_hwc = &x[b * image..(b + 1) * image];
        let ty = tap(oy, h, oh, aligned);
        for (ox, y_c) in y_wc.chunks_exact_mut(c).enumerate() {
            let tx = tap(ox, w, ow, aligned);
            let pixel = |iy: usize, ix: usize| &x_hwc[(iy * w + ix) * c..][..c];
            let (x00, x01) = (pixel(ty.low, tx.low), pixel(ty.low, tx.high));
            let (x10, x11) = (pixel(ty.high, tx.low), pixel(ty.high, tx.high));
            for i in 0..c {
                let top = (1.0 - tx.frac) * x00[i] + tx.frac * x01[i];
                let bottom = (1.0 - tx.frac) * x10[i] + tx.frac * x11[i];
                y_c[i] = (1.0 - ty.frac) * top + ty.frac * bottom;
            }
        }
    });
}

/// VJP of [`resize_bilinear_forward`]: the transposed interpolation.
pub fn resize_bilinear_backward(d: &Resize, dy: &[f32], dx: &mut [f32], accumulate: bool) {
    d.check(dx.len(), dy.len());
    let Resize { h, w, c, oh, ow, aligned, .. } = *d;
    if dx.is_empty() {
        return;
    }
    // One task owns one image: pixels of the input are shared between output rows.
    dx.par_chunks_mut(h * w * c).enumerate().for_each(|(b, dx_hwc)| {
        if !accumulate {
            dx_hwc.fill(0.0);
        }
        let dy_hwc = &dy[b * oh * ow * c..(b + 1) * oh * ow * c];
        for oy in 0..oh {
            let ty = tap(oy, h, oh, aligned);
            for ox in 0..ow {
                let tx = tap(ox, w, ow, aligned);
                let dy_c = &dy_hwc[(oy * ow + ox) * c..][..c];
                let corners = [
                    (ty.low, tx.low, (1.0 - ty.frac) * (1.0 - tx.frac)),
                    (ty.low, tx.high, (1.0 - ty.frac) * tx.frac),
                    (ty.high, tx.low, ty.frac * (1.0 - tx.frac)),
                    (ty.high, tx.high, ty.frac * tx.frac),
                ];
                for (iy, ix, weight) in corners {
                    for (d, g) in dx_hwc[(iy * w + ix) * c..][..c].iter_mut().zip(dy_c) {
                        *d += weight * g;
                    }
                }
            }
        }
    });
}
