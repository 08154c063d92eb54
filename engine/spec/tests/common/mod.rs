//! Components with the names and parameters of the engine's own, without their code.
#![allow(dead_code, missing_docs)]

use mcpipe_spec::{Component, ComponentKind, Components, NoParams, params_schema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

macro_rules! params {
    ($name:ident { $($(#[$attribute:meta])* $field:ident: $type:ty = $default:expr,)* }) => {
        #[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
        #[serde(deny_unknown_fields, default)]
        pub struct $name { $($(#[$attribute])* pub $field: $type,)* }

        impl Default for $name {
            fn default() -> Self {
                Self { $($field: $default,)* }
            }
        }
    };
}

params!(VitSizes {
    /// Side of a square patch in pixels.
    #[schemars(range(min = 1, max = 1024))]
    patch_size: usize = 16,
    /// Dimension of a token.
    #[schemars(range(min = 1, max = 65536))]
    width: usize = 768,
    /// Transformer blocks.
    #[schemars(range(min = 1, max = 256))]
    depth: usize = 12,
    /// Attention heads.
    #[schemars(range(min = 1, max = 256))]
    heads: usize = 12,
});

params!(MobileVitSizes {
    /// Channels after the stem.
    #[schemars(range(min = 1, max = 65536))]
    stem: usize = 16,
    /// Channels after each stage.
    #[schemars(inner(range(min = 1, max = 65536)))]
    channels: [usize; 5] = [16, 24, 48, 64, 80],
});

params!(TextSizes {
    /// Dimension of a token.
    #[schemars(range(min = 1, max = 65536))]
    width: usize = 512,
    /// Transformer blocks.
    #[schemars(range(min = 1, max = 256))]
    depth: usize = 12,
    /// Attention heads.
    #[schemars(range(min = 1, max = 256))]
    heads: usize = 8,
    /// Tokens of a caption.
    #[schemars(range(min = 3, max = 4096))]
    context_length: usize = 77,
    /// Keep the token table as it is drawn.
    frozen_embedding: bool = false,
});

params!(Logits {
    /// Softens both sides.
    #[schemars(range(max = 1000.0), extend("exclusiveMinimum" = 0))]
    temperature: f64 = 1.0,
});

/// Taps that are compared.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct TapPair {
    /// Tap of the student's backbone.
    pub student: String,
    /// Tap of the teacher's backbone.
    pub teacher: String,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Distance {
    /// Mean squared error.
    Mse,
    /// One minus the cosine.
    Cosine,
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Features {
    /// Pairs of taps.
    #[schemars(length(min = 1))]
    pub taps: Vec<TapPair>,
    /// What is minimised.
    #[serde(default = "mse")]
    pub loss: Distance,
}

fn mse() -> Distance {
    Distance::Mse
}

#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Pairs of taps.
    #[schemars(length(min = 1))]
    pub taps: Vec<TapPair>,
}

params!(AdamW {
    /// Learning rate at its peak.
    #[schemars(range(max = 10.0), extend("exclusiveMinimum" = 0))]
    lr: f64 = 1e-3,
    /// Decoupled weight decay.
    #[schemars(range(min = 0.0, max = 10.0))]
    weight_decay: f64 = 0.1,
    /// Decay of the running means of gradient and square.
    #[schemars(inner(range(min = 0.0, max = 1.0)))]
    betas: [f64; 2] = [0.9, 0.98],
    /// Added to the denominator.
    #[schemars(extend("exclusiveMinimum" = 0))]
    eps: f64 = 1e-8,
});

params!(Sgd {
    /// Learning rate at its peak.
    #[schemars(range(max = 100.0), extend("exclusiveMinimum" = 0))]
    lr: f64 = 0.1,
    /// Share of the last step that is kept.
    #[schemars(range(min = 0.0, max = 1.0))]
    momentum: f64 = 0.9,
});

params!(Cosine {
    /// Steps of linear warm-up.
    warmup_steps: u64 = 0,
});

params!(Shapes {
    /// Image-caption pairs to train on.
    #[schemars(range(min = 1, max = 10_000_000))]
    train: usize = 4096,
    /// Labelled images to evaluate on.
    #[schemars(range(min = 1, max = 10_000_000))]
    eval: usize = 720,
    /// Side of an image in pixels.
    #[schemars(range(min = 8, max = 1024))]
    image_size: usize = 64,
    /// From 0, plain, to 1, cluttered.
    #[schemars(range(min = 0.0, max = 1.0))]
    difficulty: f64 = 0.5,
});

params!(Retrieval {
    /// Ranks to report.
    recall: Vec<usize> = vec![1, 5, 10],
});

pub fn components() -> Components {
    use ComponentKind::*;
    let component = |kind, name, summary, params| Component { kind, name, summary, params };
    Components::new([
        component(Backbone, "mobilevit_xxs", "MobileViT-XXS", params_schema::<MobileVitSizes>),
        component(Backbone, "mobilevit_xs", "MobileViT-XS", params_schema::<MobileVitSizes>),
        component(Backbone, "mobilevit_s", "MobileViT-S", params_schema::<MobileVitSizes>),
        component(Backbone, "vit", "vision transformer", params_schema::<VitSizes>),
        component(TextEncoder, "transformer", "CLIP's text transformer", params_schema::<TextSizes>),
        component(Level, "logits", "similarities within the batch", params_schema::<Logits>),
        component(Level, "projection", "embeddings", params_schema::<NoParams>),
        component(Level, "attention", "attention maps", params_schema::<Attention>),
        component(Level, "features", "taps through regressors", params_schema::<Features>),
        component(Level, "icl", "interactive contrastive learning", params_schema::<NoParams>),
        component(Optimizer, "adamw", "Adam with decoupled weight decay", params_schema::<AdamW>),
        component(Optimizer, "sgd", "gradient descent with momentum", params_schema::<Sgd>),
        component(Schedule, "cosine", "warm-up, then half a cosine", params_schema::<Cosine>),
        component(Schedule, "constant", "warm-up, then constant", params_schema::<Cosine>),
        component(Evaluation, "zero_shot", "zero-shot classification", params_schema::<NoParams>),
        component(Evaluation, "retrieval", "image-text retrieval", params_schema::<Retrieval>),
        component(DataMaker, "shapes", "coloured shapes with captions", params_schema::<Shapes>),
    ])
}

/// A small valid pipeline.
pub const VALID: &str = r#"version = 1
name = "small"

[data]
make = { kind = "shapes", train = 256 }

[[teacher]]
name = "clip"
kind = "train"
image = { backbone = "vit", image_size = 64, params = { patch_size = 8 } }
text = { encoder = "transformer", params = { context_length = 16 } }
dim = 128
training = { steps = 30, batch_size = 64 }

[student]
backbone = "mobilevit_xxs"
image_size = 64

[text]
teacher = "clip"

[projection]
kind = "linear"
dim = 128

[[distill]]
level = "logits"
temperature = 2.0

[[distill]]
level = "features"
taps = [{ student = "stages.3", teacher = "transformer.resblocks.2" }]
weight = 0.5

[optimizer]
kind = "adamw"
lr = 1e-3

[schedule]
kind = "cosine"
warmup_steps = 5

[training]
steps = 40
batch_size = 64
accumulate = 2
"#;
