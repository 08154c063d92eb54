//! FastViT's blocks, each in its training form (several branches) and folded into one convolution.

use mcpipe_graph::{Activation, BatchNormArgs, ConvArgs, GraphBuilder, Init, Path, Tensor};

use crate::error::ModelError;
use crate::layers::{conv2d_with, layer_scale, torch_bias};
use crate::reparam::{Folding, Kernel};

/// Batch norm's epsilon.
const BN_EPS: f64 = 1e-5;

/// Initialisation of the linear layers and of the convolutions inside the MLPs. (timm cuts its normal draws at ±2, a
/// hundred deviations: not at all.)
pub(super) const WEIGHT: Init = Init::Normal(0.02);

/// Convolution without bias at `{path}.conv`, batch norm at `{path}.bn`.
fn conv_norm(g: &mut GraphBuilder, path: &Path, x: &Tensor, conv: ConvArgs, init: Init) -> Result<Tensor, ModelError> {
    let x = conv2d_with(g, &path.at("conv"), x, conv, init, Init::Zeros)?;
    Ok(g.batch_norm(&path.at("bn"), &x, BatchNormArgs::new(Activation::Identity))?)
}

/// The kernel of [`conv_norm`].
fn read_conv_norm(f: &Folding<'_>, path: &Path) -> Result<Kernel, ModelError> {
    Kernel::read(f.store, &path.at("conv"))?.normed(f.store, &path.at("bn"), BN_EPS)
}

/// A convolution with bias in PyTorch's default initialisation.
fn plain_conv(g: &mut GraphBuilder, path: &Path, x: &Tensor, conv: ConvArgs) -> Result<Tensor, ModelError> {
    let c_in = x.shape()[3];
    let fan_in = c_in / conv.groups * conv.kernel * conv.kernel;
    conv2d_with(g, path, x, ConvArgs { bias: true, ..conv }, Init::FanInUniform, torch_bias(fan_in))
}

/// MobileOne block (Vasu et al. 2023, arXiv:2206.04040, §3.2) before its activation: a normed convolution, the same
/// 1x1, and a normed skip connection where the shape stays.
#[derive(Clone, Copy, Debug)]
pub(super) struct MobileOne {
    /// Channels in.
    pub c_in: usize,
    /// Channels out.
    pub out: usize,
    /// Side of the kernel.
    pub kernel: usize,
    /// Stride.
    pub stride: usize,
    /// Whether every input channel is a group.
    pub depthwise: bool,
    /// Whether there is a branch with the whole kernel.
    pub whole: bool,
    /// Whether there is a 1x1 branch beside a larger kernel.
    pub scale: bool,
}

impl MobileOne {
    /// All branches, dense, stride 1.
    pub fn new(c_in: usize, out: usize, kernel: usize) -> Self {
        MobileOne { c_in, out, kernel, stride: 1, depthwise: false, whole: true, scale: true }
    }

    fn groups(&self) -> usize {
        if self.depthwise { self.c_in } else { 1 }
    }

    fn conv(&self, kernel: usize) -> ConvArgs {
        ConvArgs::new(self.out, kernel).stride(self.stride).groups(self.groups())
    }

    fn has_scale(&self) -> bool {
        self.scale && self.kernel > 1
    }

    fn has_identity(&self) -> bool {
        self.c_in == self.out && self.stride == 1
    }

    /// Adds it to `g`.
    pub fn build(&self, g: &mut GraphBuilder, path: &Path, x: &Tensor, folded: bool) -> Result<Tensor, ModelError> {
        if folded {
            return plain_conv(g, &path.at("reparam_conv"), x, self.conv(self.kernel));
        }
        let mut branches = Vec::new();
        if self.has_identity() {
            branches.push(g.batch_norm(&path.at("identity"), x, BatchNormArgs::new(Activation::Identity))?);
        }
        if self.whole {
            let path = path.at("conv_kxk").at(0);
            branches.push(conv_norm(g, &path, x, self.conv(self.kernel), Init::FanInUniform)?);
        }
        if self.has_scale() {
            branches.push(conv_norm(g, &path.at("conv_scale"), x, self.conv(1), Init::FanInUniform)?);
        }
        let mut branches = branches.into_iter();
        let first = branches.next().ok_or_else(|| ModelError::Dims(format!("`{path}` has no branch")))?;
        branches.try_fold(first, |sum, branch| Ok(g.add(&sum, &branch)?))
    }

    /// Its branches as one kernel.
    pub fn kernel(&self, f: &Folding<'_>, path: &Path) -> Result<Kernel, ModelError> {
        let mut branches = Vec::new();
        if self.has_identity() {
            let identity = Kernel::identity(self.c_in, self.groups(), self.kernel)?;
            branches.push(identity.normed(f.store, &path.at("identity"), BN_EPS)?);
        }
        if self.whole {
            branches.push(read_conv_norm(f, &path.at("conv_kxk").at(0))?);
        }
        if self.has_scale() {
            branches.push(read_conv_norm(f, &path.at("conv_scale"))?.padded(self.kernel)?);
        }
        let mut branches = branches.into_iter();
        let first = branches.next().ok_or_else(|| ModelError::Dims(format!("`{path}` has no branch")))?;
        branches.try_fold(first, |sum, branch| sum.plus(&branch))
    }

    /// Folds it in place.
    pub fn fold(&self, f: &mut Folding<'_>, path: &Path) -> Result<(), ModelError> {
        let kernel = self.kernel(f, path)?;
        f.replace(path, &["identity", "conv_kxk", "conv_scale"], kernel);
        Ok(())
    }
}

/// Depthwise convolution with a large and a small kernel (Ding et al. 2022, arXiv:2203.06717, §3.1), each normed.
#[derive(Clone, Copy, Debug)]
pub(super) struct LargeKernel {
    /// Channels in, which divide those out.
    pub c_in: usize,
    /// Channels out.
    pub out: usize,
    /// Sides of the kernels.
    pub kernels: [usize; 2],
    /// Stride.
    pub stride: usize,
}

impl LargeKernel {
    fn conv(&self, kernel: usize) -> ConvArgs {
        ConvArgs::new(self.out, kernel).stride(self.stride).groups(self.c_in)
    }

    /// Adds it to `g`.
    pub fn build(&self, g: &mut GraphBuilder, path: &Path, x: &Tensor, folded: bool) -> Result<Tensor, ModelError> {
        let [large, small] = self.kernels;
        if folded {
            return plain_conv(g, &path.at("reparam_conv"), x, self.conv(large));
        }
        let a = conv_norm(g, &path.at("large_conv"), x, self.conv(large), Init::FanInUniform)?;
        let b = conv_norm(g, &path.at("small_conv"), x, self.conv(small), Init::FanInUniform)?;
        Ok(g.add(&a, &b)?)
    }

    /// Folds it in place.
    pub fn fold(&self, f: &mut Folding<'_>, path: &Path) -> Result<(), ModelError> {
        let small = read_conv_norm(f, &path.at("small_conv"))?.padded(self.kernels[0])?;
        let kernel = read_conv_norm(f, &path.at("large_conv"))?.plus(&small)?;
        f.replace(path, &["large_conv", "small_conv"], kernel);
        Ok(())
    }
}

/// RepMixer (§3.2 of FastViT's paper): `x + γ ∘ (mixer(x) − norm(x))`, one depthwise convolution once folded.
#[derive(Clone, Copy, Debug)]
pub(super) struct RepMixer {
    /// Channels.
    pub dim: usize,
    /// Side of the kernel.
    pub kernel: usize,
}

impl RepMixer {
    fn mixer(&self) -> MobileOne {
        MobileOne { depthwise: true, ..MobileOne::new(self.dim, self.dim, self.kernel) }
    }

    fn norm(&self) -> MobileOne {
        MobileOne { whole: false, scale: false, ..self.mixer() }
    }

    /// Adds it to `g`, the layer scale starting at `scale`.
    pub fn build(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        x: &Tensor,
        scale: f32,
        folded: bool,
    ) -> Result<Tensor, ModelError> {
        if folded {
            return plain_conv(g, &path.at("reparam_conv"), x, self.mixer().conv(self.kernel));
        }
        let norm = self.norm().build(g, &path.at("norm"), x, false)?;
        let norm = g.scale(&norm, -1.0);
        let mixed = self.mixer().build(g, &path.at("mixer"), x, false)?;
        let mixed = g.add(&mixed, &norm)?;
        let mixed = layer_scale(g, &path.at("layer_scale.gamma"), &mixed, scale)?;
        Ok(g.add(x, &mixed)?)
    }

    /// Folds it in place.
    pub fn fold(&self, f: &mut Folding<'_>, path: &Path) -> Result<(), ModelError> {
        let gamma = f.vector(&path.at("layer_scale.gamma"))?;
        let norm = self.norm().kernel(f, &path.at("norm"))?;
        let mixed = self.mixer().kernel(f, &path.at("mixer"))?.minus(&norm)?.scaled(&gamma)?;
        let kernel = Kernel::identity(self.dim, self.dim, self.kernel)?.plus(&mixed)?;
        f.replace(path, &["norm", "mixer", "layer_scale"], kernel);
        Ok(())
    }
}

/// Conditional positional encoding (Chu et al. 2021, arXiv:2102.10882): `x` plus a depthwise convolution of it.
#[derive(Clone, Copy, Debug)]
pub(super) struct PositionalEncoding {
    /// Channels.
    pub dim: usize,
    /// Side of the kernel.
    pub kernel: usize,
}

impl PositionalEncoding {
    /// Adds it to `g`.
    pub fn build(&self, g: &mut GraphBuilder, path: &Path, x: &Tensor, folded: bool) -> Result<Tensor, ModelError> {
        let conv = ConvArgs::new(self.dim, self.kernel).groups(self.dim);
        if folded {
            return plain_conv(g, &path.at("reparam_conv"), x, conv);
        }
        let position = plain_conv(g, &path.at("pos_enc"), x, conv)?;
        Ok(g.add(&position, x)?)
    }

    /// Folds it in place.
    pub fn fold(&self, f: &mut Folding<'_>, path: &Path) -> Result<(), ModelError> {
        let identity = Kernel::identity(self.dim, self.dim, self.kernel)?;
        let kernel = Kernel::read(f.store, &path.at("pos_enc"))?.plus(&identity)?;
        f.replace(path, &["pos_enc"], kernel);
        Ok(())
    }
}

/// Convolutional MLP (§3.2 of FastViT's paper): normed 7x7 depthwise convolution, then two 1x1 convolutions.
pub(super) fn conv_mlp(g: &mut GraphBuilder, path: &Path, x: &Tensor, hidden: usize) -> Result<Tensor, ModelError> {
    let c = x.shape()[3];
    let dense = |out: usize| ConvArgs { bias: true, ..ConvArgs::new(out, 1) };
    let y = conv_norm(g, &path.at("conv"), x, ConvArgs::new(c, 7).groups(c), WEIGHT)?;
    let y = conv2d_with(g, &path.at("fc1"), &y, dense(hidden), WEIGHT, Init::Zeros)?;
    let y = g.activation(&y, Activation::Gelu);
    conv2d_with(g, &path.at("fc2"), &y, dense(c), WEIGHT, Init::Zeros)
}
