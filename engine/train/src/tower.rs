//! Towers as things that can be built into a graph, and the taps between their layers.

use std::fmt::Debug;
use std::sync::Arc;

use mcpipe_data::CaptionTokenizer;
use mcpipe_graph::{GraphBuilder, Path, Tensor};
use mcpipe_models::projection::Projection;
use mcpipe_models::weights::TEXT_ROOTS;
use mcpipe_models::{Backbone, LastToken, ModelError, Tap, TapInfo, TextEncoder};

use crate::encoder::Tokenize;

/// What an image tower gives.
#[derive(Clone, Debug)]
pub struct Encoded {
    /// Embedding `[B, D]` in the joint space, not normalised.
    pub embedding_bd: Tensor,
    /// The taps that were asked for, in the order asked.
    pub taps: Vec<(String, Tap)>,
}

/// An image tower: backbone and the projection to the joint space.
pub trait ImageTower: Debug + Send + Sync {
    /// Side of the square input image in pixels.
    fn image_size(&self) -> usize;

    /// Dimension of the embedding.
    fn dim(&self) -> usize;

    /// The taps that [`build`](Self::build) can give.
    ///
    /// # Errors
    /// An image size that the tower can't take.
    fn taps(&self) -> Result<Vec<TapInfo>, ModelError>;

    /// Adds the tower to `g` over normalised images `x_bhwc` `[B, S, S, 3]`, with the taps named in `taps`.
    ///
    /// # Errors
    /// Sizes that don't fit together, or a tap that the tower lacks.
    fn build(&self, g: &mut GraphBuilder, x_bhwc: &Tensor, taps: &[String]) -> Result<Encoded, ModelError>;
}

/// A text tower with the projection to the joint space.
pub trait TextTower: Debug + Send + Sync {
    /// Tokens of a caption, padding included.
    fn context_length(&self) -> usize;

    /// Dimension of the embedding.
    fn dim(&self) -> usize;

    /// Which position of a caption is the last that counts.
    fn last_token(&self) -> LastToken {
        LastToken::LargestId
    }

    /// Beginnings of its parameters' names in a file that holds more than the tower.
    fn roots(&self) -> &'static [&'static str] {
        &TEXT_ROOTS
    }

    /// Adds the tower to `g` over token ids `ids_bl` `[B, L]` and the position of each caption's last token
    /// `eot_b` `[B]`; gives the embedding `[B, D]`, not normalised.
    ///
    /// # Errors
    /// Sizes that don't fit together.
    fn build(&self, g: &mut GraphBuilder, ids_bl: &Tensor, eot_b: &Tensor) -> Result<Tensor, ModelError>;
}

/// A map of embeddings `[B, D]` → `[B, D']`.
pub trait Head: Debug + Send + Sync {
    /// Dimension of the output.
    fn dim(&self) -> usize;

    /// Adds the map to `g`. The same path of parameters used twice is one shared map.
    ///
    /// # Errors
    /// Sizes that don't fit together.
    fn build(&self, g: &mut GraphBuilder, x_bd: &Tensor) -> Result<Tensor, ModelError>;
}

/// A registered projection at its place among the parameters. Two of the same path are one shared map.
#[derive(Clone, Debug)]
pub struct ProjectionHead {
    /// The map.
    pub projection: Projection,
    /// Where its parameters lie.
    pub path: Path,
}

impl Head for ProjectionHead {
    fn dim(&self) -> usize {
        self.projection.dim
    }

    fn build(&self, g: &mut GraphBuilder, x_bd: &Tensor) -> Result<Tensor, ModelError> {
        g.on_dfdx(|g| self.projection.build(g, &self.path, x_bd))
    }
}

/// A registered backbone with its head as an image tower.
#[derive(Clone, Debug)]
pub struct BackboneTower {
    /// The backbone.
    pub backbone: Arc<dyn Backbone>,
    /// Where its parameters lie (`visual`, `visual.trunk`, empty).
    pub path: Path,
    /// Side of the square input image in pixels.
    pub image_size: usize,
    /// Outputs of the backbone's own head; none leaves the pooled features.
    pub head: Option<usize>,
    /// A map behind it.
    pub projection: Option<Arc<dyn Head>>,
}

impl ImageTower for BackboneTower {
    fn image_size(&self) -> usize {
        self.image_size
    }

    fn dim(&self) -> usize {
        match &self.projection {
            Some(projection) => projection.dim(),
            None => self.head.unwrap_or_else(|| self.backbone.features()),
        }
    }

    fn taps(&self) -> Result<Vec<TapInfo>, ModelError> {
        self.backbone.taps(self.image_size)
    }

    fn build(&self, g: &mut GraphBuilder, x_bhwc: &Tensor, taps: &[String]) -> Result<Encoded, ModelError> {
        let out = self.backbone.build(g, &self.path, x_bhwc, self.head, taps)?;
        let embedding_bd = match &self.projection {
            Some(projection) => projection.build(g, &out.embedding)?,
            None => out.embedding,
        };
        Ok(Encoded { embedding_bd, taps: out.taps })
    }
}

/// A registered text encoder with its projection as a text tower.
#[derive(Clone, Debug)]
pub struct EncoderTower {
    /// The encoder.
    pub encoder: Arc<dyn TextEncoder>,
    /// Where its parameters lie; empty for open_clip's own text tower.
    pub path: Path,
    /// Dimension of the projected embedding.
    pub dim: usize,
    /// The tokenizer whose ids it reads.
    pub tokenizer: CaptionTokenizer,
}

impl EncoderTower {
    /// Turns captions into the tower's token ids.
    pub fn tokenize(&self) -> Tokenize {
        let (tokenizer, context_length) = (self.tokenizer.clone(), self.encoder.context_length());
        Arc::new(move |caption| tokenizer.tokenize(caption, context_length).ids)
    }
}

impl TextTower for EncoderTower {
    fn context_length(&self) -> usize {
        self.encoder.context_length()
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn last_token(&self) -> LastToken {
        self.encoder.last_token()
    }

    fn roots(&self) -> &'static [&'static str] {
        self.encoder.roots()
    }

    fn build(&self, g: &mut GraphBuilder, ids_bl: &Tensor, eot_b: &Tensor) -> Result<Tensor, ModelError> {
        Ok(self.encoder.build(g, &self.path, ids_bl, eot_b, Some(self.dim))?.embedding)
    }
}

/// What a distillation level may ask of an image tower.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TowerShape {
    /// Dimension of the embedding.
    pub dim: usize,
    /// All taps.
    pub taps: Vec<TapInfo>,
}

impl TowerShape {
    /// The shapes of `tower`.
    ///
    /// # Errors
    /// An image size that the tower can't take.
    pub fn of(tower: &dyn ImageTower) -> Result<Self, ModelError> {
        Ok(TowerShape { dim: tower.dim(), taps: tower.taps()? })
    }

    /// The tap called `name`.
    pub fn tap(&self, name: &str) -> Option<&TapInfo> {
        self.taps.iter().find(|t| t.name == name)
    }
}

/// What a distillation level may ask of the model that is trained.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct StudentShape {
    /// The image tower.
    pub image: TowerShape,
    /// Dimension of the text embedding that the image embedding is compared with.
    pub text: usize,
    /// Whether the text embedding takes a gradient (trained, or sent through a trained projection).
    pub text_trained: bool,
}

/// What a distillation level may ask of a teacher.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TeacherShape {
    /// Its name.
    pub name: String,
    /// Its image tower.
    pub image: Option<TowerShape>,
    /// Dimension of its text embedding.
    pub text: Option<usize>,
}
