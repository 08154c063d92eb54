//! What every image backbone offers: its input, its taps, its graph.

use std::fmt::Debug;

use mcpipe_graph::{GraphBuilder, GraphError, ParamStore, Path, Tensor};

use crate::error::{ModelError, nearest};
use crate::reparam::Folded;

/// How an image is made ready for a backbone; it belongs to the model, not to the loader.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Preprocess {
    /// Side of the published input, in pixels.
    pub image_size: usize,
    /// Mean per channel (RGB, of values in 0..1) that is subtracted.
    pub mean: [f32; 3],
    /// Standard deviation per channel, divided by.
    pub std: [f32; 3],
    /// For evaluation: share of the resized image's side that the centre crop keeps.
    pub crop_pct: f32,
    /// Filter of the resize.
    pub interpolation: Interpolation,
}

/// A filter for resizing images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Interpolation {
    /// Triangle filter.
    Bilinear,
    /// Keys' cubic filter, a = −½.
    Bicubic,
}

/// OpenAI CLIP's mean per channel.
pub const CLIP_MEAN: [f32; 3] = [0.481_454_66, 0.457_827_5, 0.408_210_73];
/// OpenAI CLIP's standard deviation per channel.
pub const CLIP_STD: [f32; 3] = [0.268_629_54, 0.261_302_6, 0.275_777_1];

/// ImageNet's mean per channel.
pub const IMAGENET_MEAN: [f32; 3] = [0.485, 0.456, 0.406];
/// ImageNet's standard deviation per channel.
pub const IMAGENET_STD: [f32; 3] = [0.229, 0.224, 0.225];

/// The preparation that most of timm's ImageNet models share.
pub(crate) const IMAGENET: Preprocess = Preprocess {
    image_size: 224,
    mean: IMAGENET_MEAN,
    std: IMAGENET_STD,
    crop_pct: 0.875,
    interpolation: Interpolation::Bicubic,
};

/// What a tap holds for a batch of B images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TapShape {
    /// Feature map `[B, height, width, channels]`.
    Image {
        /// Height.
        height: usize,
        /// Width.
        width: usize,
        /// Channels.
        channels: usize,
    },
    /// Token features `[B, prefix + height·width, channels]`: `prefix` tokens (class token), then a grid row by row.
    Tokens {
        /// Tokens before the grid.
        prefix: usize,
        /// Height and width of the grid.
        grid: [usize; 2],
        /// Width of a token.
        channels: usize,
    },
    /// Attention probabilities `[B·groups, heads, N, N]`, N = `prefix` + height·width of the grid; rows sum to 1.
    /// `groups` sequences belong to one image (MobileViT: one per position inside a patch), an image's side by side.
    Attention {
        /// Sequences of one image.
        groups: usize,
        /// Heads.
        heads: usize,
        /// Tokens before the grid.
        prefix: usize,
        /// Height and width of the grid of tokens.
        grid: [usize; 2],
    },
}

impl TapShape {
    /// Shape of the tap's tensor for `batch` images.
    pub fn shape(&self, batch: usize) -> Vec<usize> {
        match *self {
            TapShape::Image { height, width, channels } => vec![batch, height, width, channels],
            TapShape::Tokens { prefix, grid, channels } => vec![batch, prefix + grid[0] * grid[1], channels],
            TapShape::Attention { groups, heads, prefix, grid } => {
                let tokens = prefix + grid[0] * grid[1];
                vec![batch * groups, heads, tokens, tokens]
            }
        }
    }

    /// Channels of a feature tap; none for an attention map.
    pub fn channels(&self) -> Option<usize> {
        match *self {
            TapShape::Image { channels, .. } | TapShape::Tokens { channels, .. } => Some(channels),
            TapShape::Attention { .. } => None,
        }
    }

    /// Whether the tap holds attention maps.
    pub fn is_attention(&self) -> bool {
        matches!(self, TapShape::Attention { .. })
    }
}

/// A tap that a backbone offers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TapInfo {
    /// Name: the module's path in timm or open_clip; attention maps end in `attn`.
    pub name: String,
    /// What it holds.
    pub shape: TapShape,
}

impl TapInfo {
    /// A tap that holds a square map.
    pub(crate) fn map(name: impl Into<String>, side: usize, channels: usize) -> Self {
        TapInfo { name: name.into(), shape: TapShape::Image { height: side, width: side, channels } }
    }
}

/// A tapped value.
#[derive(Clone, Debug)]
pub struct Tap {
    /// The value, of shape [`TapShape::shape`].
    pub value: Tensor,
    /// What it holds.
    pub shape: TapShape,
}

impl Tap {
    /// The features as an image `[B, height, width, channels]`; the tokens before the grid are left out.
    ///
    /// # Errors
    /// An attention map, which is no image.
    pub fn image(&self, g: &mut GraphBuilder) -> Result<Tensor, GraphError> {
        match self.shape {
            TapShape::Image { .. } => Ok(self.value.clone()),
            TapShape::Tokens { prefix, grid: [h, w], channels } => {
                let batch = self.value.shape()[0];
                let grid = if prefix == 0 { self.value.clone() } else { g.slice_rows(&self.value, prefix, h * w)? };
                g.reshape(&grid, &[batch, h, w, channels])
            }
            TapShape::Attention { .. } => Err(GraphError::Invalid("an attention map is no image".into())),
        }
    }
}

/// What a backbone's graph gives.
#[derive(Clone, Debug)]
pub struct ImageOutputs {
    /// Pooled features `[B, features]`.
    pub features: Tensor,
    /// Output of the head `[B, dim]`; the features where no head was asked for.
    pub embedding: Tensor,
    /// The taps asked for, in the order asked.
    pub taps: Vec<(String, Tap)>,
}

/// In which public library's names a backbone keeps its parameters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Naming {
    /// timm's: `timm.create_model(name)` takes them; open_clip holds them under `visual.trunk.`.
    Timm,
    /// open_clip's own image tower, held under `visual.`.
    OpenClip,
}

/// An image encoder of some size.
pub trait Backbone: Debug + Send + Sync {
    /// Registered name.
    fn name(&self) -> &'static str;

    /// Its sizes, defaults filled in.
    fn params(&self) -> toml::Table;

    /// Whether the sizes are the published ones of its name; how it is trained, or that it is folded, changes none.
    fn is_published(&self) -> bool {
        let sizes = |mut params: toml::Table| {
            params.retain(|name, _| !["drop_path", "layer_scale", "reparam"].contains(&name));
            params
        };
        let published = crate::registry::backbone(self.name(), &toml::Table::new());
        published.is_ok_and(|published| sizes(published.params()) == sizes(self.params()))
    }

    /// How images are made ready for it.
    fn preprocess(&self) -> Preprocess;

    /// Whose parameter names it keeps.
    fn naming(&self) -> Naming {
        Naming::Timm
    }

    /// Width of its pooled features.
    fn features(&self) -> usize;

    /// Refuses an image size that it can't take.
    ///
    /// # Errors
    /// [`ModelError::ImageSize`].
    fn check_image_size(&self, size: usize) -> Result<(), ModelError>;

    /// Its taps at an image size, from input to output.
    ///
    /// # Errors
    /// As [`check_image_size`](Self::check_image_size).
    fn taps(&self, image_size: usize) -> Result<Vec<TapInfo>, ModelError>;

    /// Adds the backbone to `g`, its parameters under `path`, over `image [B, size, size, 3]` (normalised as
    /// [`preprocess`](Self::preprocess) says). With `dim` it ends in its head to that many outputs; without, the
    /// pooled features are the embedding.
    ///
    /// # Errors
    /// An image size or a tap that the backbone can't serve, or parameters that another model of the graph holds with
    /// other shapes.
    fn build(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        image: &Tensor,
        dim: Option<usize>,
        taps: &[String],
    ) -> Result<ImageOutputs, ModelError>;

    /// Its inference form, where blocks have several branches for training only: that backbone, and a copy of `store`
    /// in which the parameters under `path` are folded, with the same outputs in evaluation. None where there is
    /// nothing to fold.
    ///
    /// # Errors
    /// `store` lacks parameters of the backbone.
    fn reparam(&self, store: &ParamStore, path: &Path) -> Result<Option<Folded>, ModelError> {
        let _ = (store, path);
        Ok(None)
    }
}

/// The side of a batch of square RGB images.
pub(crate) fn image_side(backbone: &str, image: &Tensor) -> Result<usize, ModelError> {
    match *image.shape() {
        [_, h, w, 3] if h == w => Ok(h),
        _ => {
            Err(ModelError::Dims(format!("`{backbone}` needs images [batch, side, side, 3], got {:?}", image.shape())))
        }
    }
}

/// Collects the taps asked for while a backbone is built.
pub(crate) struct Taps<'a> {
    backbone: &'a str,
    wanted: &'a [String],
    offered: Vec<TapInfo>,
    found: Vec<(String, Tap)>,
}

impl<'a> Taps<'a> {
    /// # Errors
    /// A name that is not among the taps offered.
    pub(crate) fn new(backbone: &'a str, wanted: &'a [String], offered: Vec<TapInfo>) -> Result<Self, ModelError> {
        for tap in wanted {
            if !offered.iter().any(|o| o.name == *tap) {
                return Err(ModelError::UnknownTap {
                    backbone: backbone.to_owned(),
                    tap: tap.clone(),
                    nearest: nearest(tap, offered.iter().map(|o| o.name.as_str())),
                    known: offered.into_iter().map(|o| o.name).collect(),
                });
            }
        }
        Ok(Taps { backbone, wanted, offered, found: Vec::new() })
    }

    pub(crate) fn wants(&self, name: &str) -> bool {
        self.wanted.iter().any(|w| w == name) && !self.found.iter().any(|(n, _)| n == name)
    }

    /// Keeps `value` if `name` was asked for.
    pub(crate) fn add(&mut self, name: &str, value: &Tensor) {
        if self.wants(name)
            && let Some(info) = self.offered.iter().find(|o| o.name == name)
        {
            self.found.push((name.to_owned(), Tap { value: value.clone(), shape: info.shape }));
        }
    }

    /// The taps in the order asked, each once for each time it was asked for.
    pub(crate) fn finish(self) -> Result<Vec<(String, Tap)>, ModelError> {
        let get = |name: &String| {
            let tap = self.found.iter().find(|(n, _)| n == name).cloned();
            tap.ok_or_else(|| {
                ModelError::Dims(format!("`{}` offers the tap `{name}` but did not build it", self.backbone))
            })
        };
        self.wanted.iter().map(get).collect()
    }
}
