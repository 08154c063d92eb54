//! mcpipe's training: distillation levels, optimisers, schedules, the trainer and its checkpoints.
//!
//! The crate knows tensors, not files: [`TrainSetup`] holds towers, teachers and the objective as things that can be
//! built into a graph; [`Trainer`] runs the steps and tells an [`Observer`] about them.
//!
//! One step: the *tower graph* runs for each part of the batch and gives embeddings, and the losses that are
//! local to a sample (features, attention); the *loss graph* takes the embeddings of the whole batch and gives the
//! contrastive losses and the embeddings' gradients; these, with the terms' weights, seed the towers' backward walk.
//! With `accumulate = 1` the tower's activations are kept. With more parts the towers run forward twice (gradient
//! caching; Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"), which keeps the
//! large batch's gradient exactly where no layer uses batch statistics. Batch norm normalises each part by its own
//! statistics, the same in both forwards, and running statistics move once for each part, in the second.
//!
//! Shape suffixes: `b` batch, `h` height, `w` width, `c` channels, `n` tokens, `l` context length, `d` embedding.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::panic))]

mod batch;
mod checkpoint;
mod compute;
mod diagnose;
pub mod distill;
mod ema;
mod encoder;
mod error;
mod forward;
mod graphs;
mod inputs;
mod losses;
mod machine;
mod observer;
mod optim;
mod plan;
mod prepared;
mod schedule;
mod setup;
mod source;
mod step;
mod stochastic;
mod tower;
mod trainer;

#[cfg(test)]
mod tests;

pub use batch::{Batch, BatchSource, ByteView, FormBytes, ImageBytes, Mix, SoftTargets, SparseTargets};
pub use checkpoint::{CHECKPOINT_FORMAT, Checkpoint, CheckpointState, Checkpoints, Counters};
pub use compute::{Compute, DeviceChoice};
pub use ema::Average;
pub use encoder::{CaptionEncoder, Encoder, Tokenize};
pub use error::{BoxError, Origin, TrainError};
pub use observer::{EvalReport, EvalWeights, Evaluate, NoEval, NoObserver, Observer, SkippedStep, StepReport};
pub use optim::{
    AdamW, OPTIMIZERS, Optimizer, OptimizerConfig, OptimizerEntry, OptimizerState, Sgd, Update, optimizer,
};
pub use plan::{Part, StepPlan};
pub use schedule::{Constant, Cosine, LrConfig, LrState, Plateau};
pub use setup::{
    AverageSetup, Contrast, FrozenImage, LOGIT_BIAS, LOGIT_SCALE, MAX_LOGIT_SCALE, ModelText, Objective, Teacher,
    TeacherModel, Term, TrainSetup, TrainedModel,
};
pub use source::{LoaderSource, ViewSpec};
pub use tower::{
    BackboneTower, Encoded, EncoderTower, Head, ImageTower, ProjectionHead, StudentShape, TeacherShape, TextTower,
    TowerShape,
};
pub use trainer::{Outcome, Stop, Trainer};

/// Everything that this crate registers: distillation levels, optimisers and schedules.
pub fn components() -> Vec<mcpipe_spec::Component> {
    let mut all = distill::components();
    all.extend(optim::components());
    all.extend(schedule::components());
    all
}
