//! BERT (Devlin et al. 2019) as a language encoder, under the names of Hugging Face's `BertModel`.

use mcpipe_graph::{Activation, GraphBuilder, Init, Path, Tensor};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use crate::error::ModelError;
use crate::params::{Sizes, decode, encode, positive, schema};
use crate::registry::TextEncoderEntry;
use crate::text::{LastToken, TextEncoder, TextOutputs, Vocabulary};
use crate::transformer::project;
use crate::vit::check_transformer;

/// LayerNorm's epsilon.
const EPS: f32 = 1e-12;
/// Deviation of the first weights.
const INIT: Init = Init::Normal(0.02);

/// How the tokens' features become the text's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
#[schemars(inline)]
pub enum BertPool {
    /// Those of the first token, `[CLS]`.
    Cls,
    /// Their mean over the tokens that are no padding.
    Mean,
    /// tanh of a linear map of the first token's: BERT's own pooler.
    Pooler,
}

/// Sizes of a BERT; the defaults are BERT-base's, uncased.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct BertSizes {
    /// Width of a token.
    #[schemars(range(min = 1, max = 65536))]
    pub width: usize,
    /// Number of layers.
    #[schemars(range(min = 1, max = 256))]
    pub depth: usize,
    /// Attention heads; they divide the width.
    #[schemars(range(min = 1, max = 256))]
    pub heads: usize,
    /// Hidden width of a feed-forward layer per width.
    #[schemars(range(min = 0.125, max = 16.0))]
    pub mlp_ratio: f64,
    /// Most tokens of a caption that are read, `[CLS]` and `[SEP]` included.
    #[schemars(range(min = 3, max = 4096))]
    pub context_length: usize,
    /// Rows of the table of positions; the context's length at least.
    #[schemars(range(min = 3, max = 65536))]
    pub positions: usize,
    /// Number of token ids, at least as many as the vocabulary has lines.
    #[schemars(range(min = 1, max = 4_000_000))]
    pub vocab_size: usize,
    /// Rows of the table of token types; a caption's tokens all have the first.
    #[schemars(range(min = 1, max = 1024))]
    pub token_types: usize,
    /// How the tokens' features become the text's.
    pub pool: BertPool,
    /// Whether captions are lowered and accents stripped, as for uncased vocabularies.
    pub lowercase: bool,
    /// Id of `[PAD]`: tokens behind the last other one are padding.
    #[schemars(range(min = 0, max = 4_000_000))]
    pub padding_id: i32,
}

impl Sizes for BertSizes {
    fn check(&self) -> Result<(), (&'static str, String)> {
        positive("depth", &[self.depth])?;
        if !(1..=4_000_000).contains(&self.vocab_size) {
            return Err(("vocab_size", format!("must be 1 to 4000000, not {}", self.vocab_size)));
        }
        positive("token_types", &[self.token_types])?;
        if self.context_length < 3 {
            return Err(("context_length", "must hold the start, a token and the end: 3 or more".into()));
        }
        if self.positions < self.context_length {
            let message = format!("has fewer rows than the context's {} tokens", self.context_length);
            return Err(("positions", message));
        }
        check_transformer(self.width, self.heads, self.mlp_ratio)
    }
}

const BASE: BertSizes = BertSizes {
    width: 768,
    depth: 12,
    heads: 12,
    mlp_ratio: 4.0,
    context_length: 77,
    positions: 512,
    vocab_size: 30522,
    token_types: 2,
    pool: BertPool::Cls,
    lowercase: true,
    padding_id: 0,
};

/// `bert`.
pub const BERT: TextEncoderEntry = TextEncoderEntry {
    name: "bert",
    summary: "BERT, any size; BERT-base by default (Hugging Face's names; needs a `vocab` file)",
    params: |generator| schema(generator, &BASE),
    make: |set| {
        let sizes = decode("bert", &BASE, set)?;
        Ok(Box::new(Bert { sizes }))
    },
};

/// A BERT.
#[derive(Clone, Debug)]
pub struct Bert {
    sizes: BertSizes,
}

impl Bert {
    fn embeddings(&self, g: &mut GraphBuilder, path: &Path, ids: &Tensor) -> Result<Tensor, ModelError> {
        let (s, length) = (&self.sizes, ids.shape()[1]);
        let words = g.param(&path.at("word_embeddings.weight"), &[s.vocab_size, s.width], INIT)?;
        let x_bnc = g.embedding(&words, ids)?;
        let mut first_rows = |name: &str, rows: usize, len: usize| -> Result<Tensor, ModelError> {
            let table = g.param(&path.at(name), &[rows, s.width], INIT)?;
            let one = g.reshape(&table, &[1, rows, s.width])?;
            Ok(g.slice_rows(&one, 0, len)?)
        };
        let positions = first_rows("position_embeddings.weight", s.positions, length)?;
        let types = first_rows("token_type_embeddings.weight", s.token_types, 1)?;
        let x_bnc = g.add_broadcast(&x_bnc, &positions)?;
        let x_bnc = g.add_broadcast(&x_bnc, &types)?;
        Ok(g.layer_norm(&path.at("LayerNorm"), &x_bnc, EPS)?)
    }

    fn layer(&self, g: &mut GraphBuilder, path: &Path, x_bnc: &Tensor, last: &Tensor) -> Result<Tensor, ModelError> {
        let s = &self.sizes;
        let hidden = (s.width as f64 * s.mlp_ratio) as usize;
        let own = path.at("attention.self");
        let mut part = |name: &str| g.linear(&own.at(name), x_bnc, s.width, true, INIT);
        let [q, k, v] = [part("query")?, part("key")?, part("value")?];
        let qkv = g.concat(&q, &k)?;
        let qkv = g.concat(&qkv, &v)?;
        let y = g.masked_attention(&qkv, last, s.heads, false)?;
        let y = g.linear(&path.at("attention.output.dense"), &y, s.width, true, INIT)?;
        let y = g.add(&y, x_bnc)?;
        let x_bnc = g.layer_norm(&path.at("attention.output.LayerNorm"), &y, EPS)?;
        let y = g.linear(&path.at("intermediate.dense"), &x_bnc, hidden, true, INIT)?;
        let y = g.activation(&y, Activation::Gelu);
        let y = g.linear(&path.at("output.dense"), &y, s.width, true, INIT)?;
        let y = g.add(&y, &x_bnc)?;
        Ok(g.layer_norm(&path.at("output.LayerNorm"), &y, EPS)?)
    }

    fn pool(&self, g: &mut GraphBuilder, path: &Path, x_bnc: &Tensor, last: &Tensor) -> Result<Tensor, ModelError> {
        let (batch, width) = (x_bnc.shape()[0], self.sizes.width);
        let x_bnc = match self.sizes.pool {
            BertPool::Mean => {
                // With queries and keys of zeros, attention is the mean of the visible values.
                let zeros = g.scale(x_bnc, 0.0);
                let qk = g.concat(&zeros, &zeros)?;
                let qkv = g.concat(&qk, x_bnc)?;
                g.masked_attention(&qkv, last, 1, false)?
            }
            BertPool::Cls | BertPool::Pooler => x_bnc.clone(),
        };
        let first = g.slice_rows(&x_bnc, 0, 1)?;
        let first = g.reshape(&first, &[batch, width])?;
        if self.sizes.pool != BertPool::Pooler {
            return Ok(first);
        }
        let y = g.linear(&path.at("pooler.dense"), &first, width, true, INIT)?;
        Ok(g.activation(&y, Activation::Tanh))
    }
}

impl TextEncoder for Bert {
    fn name(&self) -> &'static str {
        BERT.name
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

    fn vocabulary(&self) -> Vocabulary {
        Vocabulary::WordPiece { lowercase: self.sizes.lowercase }
    }

    fn roots(&self) -> &'static [&'static str] {
        match self.sizes.pool {
            BertPool::Pooler => &["embeddings.", "encoder.layer.", "pooler.", "text_projection"],
            BertPool::Cls | BertPool::Mean => &["embeddings.", "encoder.layer.", "text_projection"],
        }
    }

    fn last_token(&self) -> LastToken {
        LastToken::BeforePadding(self.sizes.padding_id)
    }

    /// With a `dim` other than the width, the pooled features are projected onto it by `text_projection [width, dim]`,
    /// which no BERT has: such a tower is one to train.
    fn build(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        ids: &Tensor,
        eot: &Tensor,
        dim: Option<usize>,
    ) -> Result<TextOutputs, ModelError> {
        let s = &self.sizes;
        match *ids.shape() {
            [b, l] if (1..=s.context_length).contains(&l) && eot.shape() == [b] => {}
            _ => {
                return Err(ModelError::Dims(format!(
                    "`bert` needs ids [batch, up to {}] and one last position each, got {:?} and {:?}",
                    s.context_length,
                    ids.shape(),
                    eot.shape()
                )));
            }
        }
        let mut x_bnc = self.embeddings(g, &path.at("embeddings"), ids)?;
        for i in 0..s.depth {
            x_bnc = self.layer(g, &path.at("encoder.layer").at(i), &x_bnc, eot)?;
        }
        let features = self.pool(g, path, &x_bnc, eot)?;
        let embedding = match dim {
            Some(dim) if dim != s.width => project(g, &path.at("text_projection"), &features, dim)?,
            _ => features.clone(),
        };
        Ok(TextOutputs { features, embedding })
    }
}
