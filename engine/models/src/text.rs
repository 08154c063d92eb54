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
use crate::repmixer::text_block;
use crate::transformer::{BlockInit, MlpActivation, Transformer, project};
use crate::vit::check_transformer;
use crate::weights::TEXT_ROOTS;

/// What a text encoder's graph gives.
#[derive(Clone, Debug)]
pub struct TextOutputs {
    /// Pooled features `[B, features]`.
    pub features: Tensor,
    /// Their projection `[B, dim]`; the features where no dimension was asked for.
    pub embedding: Tensor,
}

/// Which tokenizer a text encoder reads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Vocabulary {
    /// CLIP's byte pairs, built in.
    Clip,
    /// WordPiece, from a file that the pipeline names.
    WordPiece {
        /// Whether texts are lowered and accents stripped.
        lowercase: bool,
    },
}

/// Which position of a row of token ids is the last that counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum LastToken {
    /// That of the end-of-text token: the first of the largest id, which is CLIP's rule.
    LargestId,
    /// The row's last, whatever stands there.
    End,
    /// That of the last id that is not this padding.
    BeforePadding(i32),
}

impl LastToken {
    /// The position in each row of `length` ids. A trailing part row is left out.
    pub fn positions(self, ids: &[i32], length: usize) -> Vec<i32> {
        if length == 0 {
            return Vec::new();
        }
        let position = |row: &[i32]| match self {
            LastToken::LargestId => largest_id(row),
            LastToken::End => length as i32 - 1,
            LastToken::BeforePadding(padding) => row.iter().rposition(|&id| id != padding).unwrap_or(0) as i32,
        };
        ids.chunks_exact(length).map(position).collect()
    }
}

fn largest_id(row: &[i32]) -> i32 {
    let larger = |best: (usize, i32), (i, &id): (usize, &i32)| if id > best.1 { (i, id) } else { best };
    row.iter().enumerate().fold((0, i32::MIN), larger).0 as i32
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

    /// The tokenizer whose ids it reads.
    fn vocabulary(&self) -> Vocabulary {
        Vocabulary::Clip
    }

    /// Beginnings of its parameters' names, by which they are found in a file that holds more.
    fn roots(&self) -> &'static [&'static str] {
        &TEXT_ROOTS
    }

    /// Which position of a caption is the last that counts.
    fn last_token(&self) -> LastToken {
        LastToken::LargestId
    }

    /// Adds the encoder to `g`, its parameters under `path`, over token ids `ids [B, L]` (an `i32` input, L up to
    /// [`context_length`](Self::context_length)) and the positions `eot [B]` of their last tokens (an `i32` input, see
    /// [`last_token`](Self::last_token)).
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
    LastToken::LargestId.positions(ids, length)
}

/// Which token's features are the text's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum TextPool {
    /// The end-of-text token's.
    Eot,
    /// The last position's, whatever stands there.
    Last,
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
    /// Whether a token sees only itself and those before it. Then what stands behind the end-of-text token changes
    /// nothing.
    pub causal: bool,
    /// Which token's features are the text's.
    pub pool: TextPool,
    /// Whether the projection onto the embedding is a linear layer with a bias (names `text_projection.weight`,
    /// `text_projection.bias`) instead of a matrix.
    pub proj_bias: bool,
    /// Added to the variance in layer norms.
    #[schemars(range(min = 0.0, max = 1.0))]
    pub norm_eps: f64,
    /// Taps of the convolutions over tokens in a RepMixer block before and another behind the attention blocks
    /// (MobileCLIP-S0); an odd number, 0 for no such blocks.
    #[schemars(range(max = 255))]
    pub mixer_kernel: usize,
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
        if self.mixer_kernel != 0 && self.mixer_kernel.is_multiple_of(2) {
            return Err(("mixer_kernel", format!("must be odd, or 0, not {}", self.mixer_kernel)));
        }
        if !(0.0..=1.0).contains(&self.norm_eps) {
            return Err(("norm_eps", format!("must be 0 to 1, not {}", self.norm_eps)));
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
    causal: true,
    pool: TextPool::Eot,
    proj_bias: false,
    norm_eps: 1e-5,
    mixer_kernel: 0,
    frozen_embedding: false,
};

const MOBILECLIP_S0: TextSizes = TextSizes { depth: 4, causal: false, mixer_kernel: 11, ..CLIP };

const SIGLIP_B: TextSizes = TextSizes {
    width: 768,
    heads: 12,
    context_length: 64,
    vocab_size: 32000,
    causal: false,
    pool: TextPool::Last,
    proj_bias: true,
    norm_eps: 1e-6,
    ..CLIP
};

/// `transformer`.
pub const TRANSFORMER: TextEncoderEntry = TextEncoderEntry {
    name: "transformer",
    summary: "CLIP's causal text transformer, any size; ViT-B's by default (open_clip's names)",
    params: |generator| schema(generator, &CLIP),
    make: |set| TextTransformer::boxed("transformer", &CLIP, set),
};

/// `mobileclip_mct`.
pub const MOBILECLIP: TextEncoderEntry = TextEncoderEntry {
    name: "mobileclip_mct",
    summary: "MobileCLIP-S0's text tower: four attention blocks between two RepMixer blocks (Vasu et al. 2024, §4.1)",
    params: |generator| schema(generator, &MOBILECLIP_S0),
    make: |set| TextTransformer::boxed("mobileclip_mct", &MOBILECLIP_S0, set),
};

/// `siglip_text`.
pub const SIGLIP: TextEncoderEntry = TextEncoderEntry {
    name: "siglip_text",
    summary: "SigLIP's text transformer: no causal mask, the last token's features (open_clip's names)",
    params: |generator| schema(generator, &SIGLIP_B),
    make: |set| TextTransformer::boxed("siglip_text", &SIGLIP_B, set),
};

/// CLIP's text transformer.
#[derive(Clone, Debug)]
pub struct TextTransformer {
    name: &'static str,
    sizes: TextSizes,
}

impl TextTransformer {
    fn boxed(name: &'static str, defaults: &TextSizes, set: &toml::Table) -> Result<Box<dyn TextEncoder>, ModelError> {
        let sizes = decode(name, defaults, set)?;
        Ok(Box::new(TextTransformer { name, sizes }))
    }

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
            causal: s.causal,
            first: usize::from(s.mixer_kernel > 0),
            eps: s.norm_eps as f32,
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
        self.name
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

    fn last_token(&self) -> LastToken {
        match self.sizes.pool {
            TextPool::Eot => LastToken::LargestId,
            TextPool::Last => LastToken::End,
        }
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
                    "`{}` needs ids [batch, up to {}] and one end position each, got {:?} and {:?}",
                    self.name,
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
        let transformer = self.transformer();
        let block = |i: usize| path.at("transformer.resblocks").at(i);
        let x_bnc = if s.mixer_kernel > 0 { text_block(g, &block(0), &x_bnc, s.mixer_kernel)? } else { x_bnc };
        let x_bnc = transformer.build(g, &path.at("transformer"), &x_bnc, &mut taps)?;
        let x_bnc = match s.mixer_kernel {
            0 => x_bnc,
            kernel => text_block(g, &block(s.depth + 1), &x_bnc, kernel)?,
        };
        // The norm works on each token by itself, so only the pooled one needs it.
        let end = g.gather_rows(&x_bnc, eot)?;
        debug_assert_eq!(end.shape(), [batch, s.width]);
        let features = g.layer_norm(&path.at("ln_final"), &end, s.norm_eps as f32)?;
        let embedding = match dim {
            Some(dim) if s.proj_bias => {
                let init = Init::Normal((s.width as f32).powf(-0.5));
                g.linear(&path.at("text_projection"), &features, dim, true, init)?
            }
            Some(dim) => project(g, &path.at("text_projection"), &features, dim)?,
            None => features.clone(),
        };
        Ok(TextOutputs { features, embedding })
    }
}
