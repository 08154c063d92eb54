//! Text encoders: CLIP's causal transformer (Radford et al. 2021) with the names and initialisation of open_clip's
//! `TextTransformer`.

use std::fmt::Debug;

use mcpipe_graph::{GraphBuilder, Init, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::backbone::Taps;
use crate::error::ModelError;
use crate::params::{Sizes, decode, encode, positive, schema};
use crate::registry::TextEncoderEntry;
use crate::transformer::{BlockInit, LN_EPS, MlpActivation, Transformer, project};
use crate::vit::check_transformer;

/// What a text encoder's graph gives.
#[derive(Clone, Debug)]
pub struct TextOutputs {
    /// Pooled features `[B, features]`.
    pub features: Tensor,
    /// Their projection `[B, dim]`; the features where no dimension was asked for.
    pub embedding: Tensor,
}

/// A text encoder of some size.
pub trait TextEncoder: Debug + Send + Sync {
    /// Registered name.
    fn name(&self) -> &'static str;

    /// Its sizes, defaults filled in.
    fn params(&self) -> toml::Table;

    /// Most tokens that it takes, start and end included.
    fn context_length(&self) -> usize;

    /// Number of token ids that it knows.
    fn vocab_size(&self) -> usize;

    /// Width of its pooled features.
    fn features(&self) -> usize;

    /// Adds the encoder to `g`, its parameters under `path`, over token ids `ids [B, L]` (an `i32` input, L up to
    /// [`context_length`](Self::context_length)) and the positions `eot [B]` of their end-of-text tokens (an `i32`
    /// input, see [`eot_positions`]).
    ///
    /// As attention is causal and pooling takes the end-of-text token, what stands behind that token changes nothing:
    /// a batch may be cut to its longest caption.
    ///
    /// # Errors
    /// A length that the encoder can't take, or parameters that another model of the graph holds with other shapes.
    fn build(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        ids: &Tensor,
        eot: &Tensor,
        dim: Option<usize>,
    ) -> Result<TextOutputs, ModelError>;
}

/// Position of the end-of-text token in each row of `length` ids: the first of the largest id, which is CLIP's rule.
/// A trailing part row is left out.
pub fn eot_positions(ids: &[i32], length: usize) -> Vec<i32> {
    let row = |row: &[i32]| {
        let largest =
            row.iter().enumerate().fold((0, i32::MIN), |best, (i, &id)| if id > best.1 { (i, id) } else { best });
        largest.0 as i32
    };
    if length == 0 { Vec::new() } else { ids.chunks_exact(length).map(row).collect() }
}

/// Sizes of CLIP's text transformer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TextSizes {
    /// Width of a token.
    #[schemars(range(min = 1, max = 65536))]
    pub width: usize,
    /// Number of blocks.
    #[schemars(range(min = 1, max = 256))]
    pub depth: usize,
    /// Attention heads; they divide the width.
    #[schemars(range(min = 1, max = 256))]
    pub heads: usize,
    /// Most tokens of a caption, start and end included.
    #[schemars(range(min = 3, max = 4096))]
    pub context_length: usize,
    /// Number of token ids; CLIP's vocabulary has 49408.
    #[schemars(range(min = 1, max = 1_000_000))]
    pub vocab_size: usize,
    /// Hidden width of an MLP per width.
    #[schemars(range(min = 0.125, max = 16.0))]
    pub mlp_ratio: f64,
    /// Activation of the MLPs.
    pub act: MlpActivation,
    /// Leave the token embedding as it starts. It holds most of a small encoder's parameters (vocabulary x width), so
    /// that on a CPU the optimiser spends more on it than on all else.
    pub frozen_embedding: bool,
}

impl Sizes for TextSizes {
    fn check(&self) -> Result<(), (&'static str, String)> {
        positive("depth", &[self.depth])?;
        positive("vocab_size", &[self.vocab_size])?;
        if self.context_length < 3 {
            return Err(("context_length", "must hold the start, a token and the end: 3 or more".into()));
        }
        check_transformer(self.width, self.heads, self.mlp_ratio)
    }
}

const CLIP: TextSizes = TextSizes {
    width: 512,
    depth: 12,
    heads: 8,
    context_length: 77,
    vocab_size: 49408,
    mlp_ratio: 4.0,
    act: MlpActivation::Gelu,
    frozen_embedding: false,
};

/// `transformer`.
pub const TRANSFORMER: TextEncoderEntry = TextEncoderEntry {
    name: "transformer",
    summary: "CLIP's causal text transformer, any size; ViT-B's by default (open_clip's names)",
    params: |generator| schema(generator, &CLIP),
    make: |set| {
        let sizes = decode("transformer", &CLIP, set)?;
        Ok(Box::new(TextTransformer { sizes }))
    },
};

/// CLIP's text transformer.
#[derive(Clone, Debug)]
pub struct TextTransformer {
    sizes: TextSizes,
}

impl TextTransformer {
    fn transformer(&self) -> Transformer {
        let s = &self.sizes;
        let width = s.width as f32;
        let attention = Init::Normal(width.powf(-0.5));
        let out = Init::Normal(width.powf(-0.5) * (2.0 * s.depth as f32).powf(-0.5));
        Transformer {
            depth: s.depth,
            heads: s.heads,
            hidden: (s.width as f64 * s.mlp_ratio) as usize,
            act: s.act,
            causal: true,
            init: BlockInit {
                in_proj: attention,
                out_proj: out,
                c_fc: Init::Normal((2.0 * width).powf(-0.5)),
                c_proj: out,
            },
        }
    }
}

impl TextEncoder for TextTransformer {
    fn name(&self) -> &'static str {
        TRANSFORMER.name
    }

    fn params(&self) -> toml::Table {
        encode(&self.sizes)
    }

    fn context_length(&self) -> usize {
        self.sizes.context_length
    }

    fn vocab_size(&self) -> usize {
        self.sizes.vocab_size
    }

    fn features(&self) -> usize {
        self.sizes.width
    }

    fn build(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        ids: &Tensor,
        eot: &Tensor,
        dim: Option<usize>,
    ) -> Result<TextOutputs, ModelError> {
        let s = &self.sizes;
        let (batch, length) = match *ids.shape() {
            [b, l] if (1..=s.context_length).contains(&l) && eot.shape() == [b] => (b, l),
            _ => {
                return Err(ModelError::Dims(format!(
                    "`transformer` needs ids [batch, up to {}] and one end position each, got {:?} and {:?}",
                    s.context_length,
                    ids.shape(),
                    eot.shape()
                )));
            }
        };
        let table_path = path.at("token_embedding.weight");
        let (shape, init) = ([s.vocab_size, s.width], Init::Normal(0.02));
        let table =
            if s.frozen_embedding { g.buffer(&table_path, &shape, init)? } else { g.param(&table_path, &shape, init)? };
        let x_bnc = g.embedding(&table, ids)?;
        let position = g.param(&path.at("positional_embedding"), &[s.context_length, s.width], Init::Normal(0.01))?;
        let position = if length == s.context_length {
            position
        } else {
            let one = g.reshape(&position, &[1, s.context_length, s.width])?;
            g.slice_rows(&one, 0, length)?
        };
        let x_bnc = g.add_broadcast(&x_bnc, &position)?;
        let mut taps = Taps::new(self.name(), &[], Vec::new())?;
        let x_bnc = self.transformer().build(g, &path.at("transformer"), &x_bnc, &mut taps)?;
        // The norm works on each token by itself, so only the pooled one needs it.
        let end = g.gather_rows(&x_bnc, eot)?;
        debug_assert_eq!(end.shape(), [batch, s.width]);
        let features = g.layer_norm(&path.at("ln_final"), &end, LN_EPS)?;
        let embedding = match dim {
            Some(dim) => project(g, &path.at("text_projection"), &features, dim)?,
            None => features.clone(),
        };
        Ok(TextOutputs { features, embedding })
    }
}
