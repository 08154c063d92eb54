//! Convolutions, pooling and resizing of images.

use mcpipe_cpu::conv::Conv2d;
use mcpipe_cpu::pooling::Pool2d;

use super::{ConvArgs, GraphBuilder, Path};
use crate::graph::{GraphError, Tensor};
use crate::init::Init;
use crate::op::Op;

impl GraphBuilder {
    /// Convolution over `x [B,H,W,C]` with `{path}.weight` `[out, C/groups, k, k]` and, if asked, `{path}.bias`.
    ///
    /// # Errors
    /// Not an image, channels that the groups don't divide, or an image smaller than the kernel.
    pub fn conv2d(&mut self, path: &Path, x: &Tensor, a: ConvArgs) -> Result<Tensor, GraphError> {
        self.label = path.as_str().to_owned();
        let i = self.image("conv2d", x)?;
        if a.groups == 0 || !i.c.is_multiple_of(a.groups) || !a.out.is_multiple_of(a.groups) {
            return Err(self.refuse("conv2d", &[x], format!("{} groups don't divide the channels", a.groups)));
        }
        if i.h + 2 * a.pad < a.kernel || i.w + 2 * a.pad < a.kernel || a.stride == 0 {
            return Err(self.refuse("conv2d", &[x], format!("the image is smaller than the {0}x{0} kernel", a.kernel)));
        }
        let init = Init::KaimingFanOut { groups: a.groups };
        let w = self.param(&path.at("weight"), &[a.out, i.c / a.groups, a.kernel, a.kernel], init)?;
        let d = Conv2d {
            batch: i.batch,
            h: i.h,
            w: i.w,
            c_in: i.c,
            c_out: a.out,
            kh: a.kernel,
            kw: a.kernel,
            stride: a.stride,
            pad: a.pad,
            groups: a.groups,
        };
        let shape = vec![i.batch, d.out_h(), d.out_w(), a.out];
        if a.bias {
            let b = self.param(&path.at("bias"), &[a.out], Init::Zeros)?;
            return Ok(self.op(Op::Conv2d(d), &[x, &w, &b], shape));
        }
        Ok(self.op(Op::Conv2d(d), &[x, &w], shape))
    }

    /// Mean over all but the first and last axes: `[B, …, C]` → `[B, C]`.
    ///
    /// # Errors
    /// Fewer than three axes.
    pub fn global_avg_pool(&mut self, x: &Tensor) -> Result<Tensor, GraphError> {
        if x.shape.len() < 3 {
            return Err(self.refuse("global_avg_pool", &[x], "three axes or more are needed"));
        }
        let (batch, c) = (x.shape[0], x.shape[x.shape.len() - 1]);
        let hw = x.numel() / (batch * c).max(1);
        Ok(self.op(Op::GlobalAvgPool { batch, hw, c }, &[x], vec![batch, c]))
    }

    /// The window's dims and the shape of the result.
    fn pool(
        &self,
        op: &'static str,
        x: &Tensor,
        [k, stride, pad]: [usize; 3],
    ) -> Result<(Pool2d, Vec<usize>), GraphError> {
        let i = self.image(op, x)?;
        if k == 0 || stride == 0 || pad >= k {
            return Err(self.refuse(op, &[x], format!("no window has side {k}, stride {stride} and padding {pad}")));
        }
        if i.h + 2 * pad < k || i.w + 2 * pad < k {
            return Err(self.refuse(op, &[x], "the image is smaller than the window"));
        }
        let d = Pool2d { batch: i.batch, h: i.h, w: i.w, c: i.c, k, stride, pad };
        Ok((d, vec![i.batch, d.out_h(), d.out_w(), i.c]))
    }

    /// Average over k×k windows; zeros of the padding count.
    ///
    /// # Errors
    /// Not an image, smaller than the window, or padding as wide as the window.
    pub fn avg_pool(&mut self, x: &Tensor, k: usize, stride: usize, pad: usize) -> Result<Tensor, GraphError> {
        let (d, shape) = self.pool("avg_pool", x, [k, stride, pad])?;
        Ok(self.op(Op::AvgPool(d), &[x], shape))
    }

    /// Maximum over k×k windows; padding never wins.
    ///
    /// # Errors
    /// As [`avg_pool`](Self::avg_pool).
    pub fn max_pool(&mut self, x: &Tensor, k: usize, stride: usize, pad: usize) -> Result<Tensor, GraphError> {
        let (d, shape) = self.pool("max_pool", x, [k, stride, pad])?;
        Ok(self.op(Op::MaxPool(d), &[x], shape))
    }

    /// Bilinear resize to `h`×`w` (half-pixel centres, no antialiasing); the value itself where the size is the same.
    ///
    /// # Errors
    /// Not an image, or an empty size.
    pub fn resize_bilinear(&mut self, x: &Tensor, h: usize, w: usize) -> Result<Tensor, GraphError> {
        let from = self.image("resize_bilinear", x)?;
        if h == 0 || w == 0 {
            return Err(self.refuse("resize_bilinear", &[x], "the target is empty"));
        }
        if [from.h, from.w] == [h, w] {
            return Ok(x.clone());
        }
        Ok(self.op(Op::Resize { from, to: [h, w] }, &[x], vec![from.batch, h, w, from.c]))
    }
}
