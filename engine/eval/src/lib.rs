//! mcpipe's evaluation: zero-shot classification and retrieval, as CLIP_benchmark defines them.
//!
//! The crate knows no model: images and prompts become embeddings through functions that the caller gives
//! ([`EncodeImages`], [`EncodeTexts`]). Every measure is a fraction between 0 and 1, never percent.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod classifier;
mod error;
mod metrics;
mod retrieval;
mod zero_shot;

use mcpipe_spec::{Component, ComponentKind, NoParams, params_schema};

pub use classifier::{Classifier, normalize};
pub use error::{BoxError, EvalError};
pub use metrics::{Confusion, RANK_DEPTH, softmax, top_k};
pub use retrieval::{Retrieval, RetrievalMetrics, retrieval};
pub use zero_shot::{Prediction, SamplePrediction, ZeroShot, ZeroShotMetrics, ZeroShotOptions, zero_shot};

/// Embeds `n` normalised images `[n, S, S, 3]` → `[n, D]`; need not normalise.
pub type EncodeImages<'a> = dyn FnMut(&[f32], usize) -> Result<Vec<f32>, BoxError> + 'a;

/// Embeds texts → `[n, D]`; need not normalise.
pub type EncodeTexts<'a> = dyn FnMut(&[&str]) -> Result<Vec<f32>, BoxError> + 'a;

/// Name of zero-shot classification in pipeline files.
pub const ZERO_SHOT: &str = "zero_shot";
/// Name of retrieval in pipeline files.
pub const RETRIEVAL: &str = "retrieval";

/// The evaluations as components.
pub fn components() -> Vec<Component> {
    let component =
        |name, summary| Component { kind: ComponentKind::Evaluation, name, summary, params: params_schema::<NoParams> };
    vec![
        component(ZERO_SHOT, "zero-shot classification by prompts: acc1, acc5, mean per-class recall"),
        component(RETRIEVAL, "image and text retrieval: recall@1, @5, @10 both ways"),
    ]
}
