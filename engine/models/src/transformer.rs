//! CLIP's residual attention blocks (Radford et al. 2021), shared by the image and the text tower, under open_clip's
//! names.

use mcpipe_graph::{Activation, GraphBuilder, Init, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backbone::Taps;
use crate::error::ModelError;

/// LayerNorm's epsilon in CLIP's towers.
pub(crate) const LN_EPS: f32 = 1e-5;

/// Activation of the MLPs.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum MlpActivation {
    /// x·Φ(x), exact.
    Gelu,
    /// x·σ(1.702·x), as in OpenAI's published weights.
    QuickGelu,
    /// GELU by its tanh formula, as in SigLIP 2.
    GeluTanh,
}

impl From<MlpActivation> for Activation {
    fn from(act: MlpActivation) -> Activation {
        match act {
            MlpActivation::Gelu => Activation::Gelu,
            MlpActivation::QuickGelu => Activation::QuickGelu,
            MlpActivation::GeluTanh => Activation::GeluTanh,
        }
    }
}

/// Initialisation of a block's matrices.
#[derive(Clone, Copy, Debug)]
pub(crate) struct BlockInit {
    pub(crate) in_proj: Init,
    pub(crate) out_proj: Init,
    pub(crate) c_fc: Init,
    pub(crate) c_proj: Init,
}

/// A stack of residual attention blocks.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Transformer {
    pub(crate) depth: usize,
    pub(crate) heads: usize,
    /// Hidden width of the MLPs.
    pub(crate) hidden: usize,
    pub(crate) act: MlpActivation,
    /// Whether a token sees only itself and those before it.
    pub(crate) causal: bool,
    /// Number of the first block in names.
    pub(crate) first: usize,
    /// LayerNorm's epsilon.
    pub(crate) eps: f32,
    pub(crate) init: BlockInit,
}

impl Transformer {
    /// Adds the blocks `{path}.resblocks.N` over `x [B, N, width]`. Taps: `transformer.resblocks.N` (a block's output)
    /// and `transformer.resblocks.N.attn` (its attention map).
    pub(crate) fn build(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        x: &Tensor,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor, ModelError> {
        let mut x = x.clone();
        for i in self.first..self.first + self.depth {
            let name = format!("transformer.resblocks.{i}");
            x = self.block(g, &path.at("resblocks").at(i), &name, &x, taps)?;
            taps.add(&name, &x);
        }
        Ok(x)
    }

    fn block(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        name: &str,
        x: &Tensor,
        taps: &mut Taps<'_>,
    ) -> Result<Tensor, ModelError> {
        let width = x.shape()[2];
        let y = g.layer_norm(&path.at("ln_1"), x, self.eps)?;
        let w = g.param(&path.at("attn.in_proj_weight"), &[3 * width, width], self.init.in_proj)?;
        let b = g.param(&path.at("attn.in_proj_bias"), &[3 * width], Init::Zeros)?;
        let qkv = g.linear_with(&y, &w, Some(&b))?;
        let tap = format!("{name}.attn");
        if taps.wants(&tap) {
            let map = g.attention_map(&qkv, self.heads, self.causal)?;
            taps.add(&tap, &map);
        }
        let y = g.attention(&qkv, self.heads, self.causal)?;
        let y = g.linear(&path.at("attn.out_proj"), &y, width, true, self.init.out_proj)?;
        let x = g.add(x, &y)?;
        let y = g.layer_norm(&path.at("ln_2"), &x, self.eps)?;
        let y = torch_linear(g, &path.at("mlp.c_fc"), &y, self.hidden, self.init.c_fc)?;
        let y = g.activation(&y, self.act.into());
        let y = torch_linear(g, &path.at("mlp.c_proj"), &y, width, self.init.c_proj)?;
        Ok(g.add(&x, &y)?)
    }
}

/// A linear layer whose bias starts as PyTorch's default does, uniform in ±1/√fan_in.
pub(crate) fn torch_linear(
    g: &mut GraphBuilder,
    path: &Path,
    x: &Tensor,
    out: usize,
    init: Init,
) -> Result<Tensor, ModelError> {
    let fan_in = x.shape().last().copied().unwrap_or(1).max(1);
    g.param(&path.at("bias"), &[out], Init::Uniform(1.0 / (fan_in as f32).sqrt()))?;
    Ok(g.linear(path, x, out, true, init)?)
}

/// The map of CLIP's towers onto the embedding: `x [B, width] · {path} [width, dim]`.
pub(crate) fn project(g: &mut GraphBuilder, path: &Path, x: &Tensor, dim: usize) -> Result<Tensor, ModelError> {
    let width = x.shape()[1];
    let w = g.param(path, &[width, dim], Init::Normal((width as f32).powf(-0.5)))?;
    Ok(g.matmul(x, false, &w, false, 1.0)?)
}
