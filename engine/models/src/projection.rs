//! Heads beside the backbones: the projection into the shared space, regressors for feature distillation, the logit
//! scale. All are parameters like any other.

use mcpipe_graph::{Activation, GraphBuilder, Init, Path, Tensor};

use crate::error::ModelError;

/// Form of a projection.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ProjectionKind {
    /// The input itself.
    None,
    /// One matrix without bias: `{path}.weight [dim, in]`.
    Linear,
    /// Linear with bias, GELU, linear without bias: `{path}.fc1.{weight,bias}`, `{path}.fc2.weight`. With a hidden
    /// width of twice `dim` it is open_clip's `mlp` projection of a timm tower.
    Mlp {
        /// Hidden width.
        hidden: usize,
    },
}

/// A map from an embedding to the shared space. Built twice at the same path, it is the same map on both sides.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Projection {
    /// Form.
    pub kind: ProjectionKind,
    /// Outputs.
    pub dim: usize,
}

impl Projection {
    /// Adds the map of `x [B, in]` to `g`; the result is `[B, dim]`, not normalised.
    ///
    /// # Errors
    /// Kind `None` where the input has another width than `dim`, or a map of that path with another shape.
    pub fn build(&self, g: &mut GraphBuilder, path: &Path, x: &Tensor) -> Result<Tensor, ModelError> {
        let width = x.shape().last().copied().unwrap_or(0);
        match self.kind {
            ProjectionKind::None if width == self.dim => Ok(x.clone()),
            ProjectionKind::None => Err(ModelError::Dims(format!(
                "embeddings of {width} don't fit a shared space of {} without a projection",
                self.dim
            ))),
            ProjectionKind::Linear => {
                let init = Init::Normal((width.max(1) as f32).powf(-0.5));
                Ok(g.linear(path, x, self.dim, false, init)?)
            }
            ProjectionKind::Mlp { hidden } => {
                let y = g.linear(&path.at("fc1"), x, hidden, true, Init::FanInUniform)?;
                let y = g.activation(&y, Activation::Gelu);
                Ok(g.linear(&path.at("fc2"), &y, self.dim, false, Init::FanInUniform)?)
            }
        }
    }
}

/// Maps features of the student (image or tokens, channels last) to `channels` of the teacher: a linear map of the last
/// axis, which is a 1x1 convolution (FitNets; Romero et al. 2015). Parameters `{path}.{weight [channels, in],bias}`; the
/// caller's path for tap pair i is `regressor.i`.
///
/// # Errors
/// A regressor of that path with another shape.
pub fn regressor(g: &mut GraphBuilder, path: &Path, x: &Tensor, channels: usize) -> Result<Tensor, ModelError> {
    Ok(g.linear(path, x, channels, true, Init::FanInUniform)?)
}

/// ln(1/0.07), CLIP's first logit scale.
pub const INIT_LOGIT_SCALE: f32 = 2.659_26;

/// ln 100, the logit scale's upper bound.
pub const MAX_LOGIT_SCALE: f32 = 4.605_170_2;

/// The trained logit scale: parameter `path` (a scalar, its logarithm, starting at ln(1/0.07)), returned as the factor
/// e^path.
///
/// # Errors
/// A parameter of that path with another shape.
pub fn logit_scale(g: &mut GraphBuilder, path: &Path) -> Result<Tensor, ModelError> {
    let log = g.param(path, &[], Init::Constant(INIT_LOGIT_SCALE))?;
    let scale = g.exp(&log);
    Ok(g.reshape(&scale, &[1])?)
}
