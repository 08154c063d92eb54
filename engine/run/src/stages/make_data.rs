//! Makes the pipeline's own data set as real shards.

use std::path::PathBuf;
use std::sync::Arc;

use mcpipe_data::{ShapesParams, make_shapes, shapes_paths};
use mcpipe_spec::MakeData;
use serde_json::{Value, json};

use super::StageDef;
use crate::error::RunError;
use crate::pipeline::Resolved;
use crate::plan::{Context, Load, Need, Port, Stage, StageId};
use crate::progress::Event;
use crate::resolve::{EvalData, EvalSource, TrainSource};

const NAME: &str = "make_data";
/// Folder of the data set below the stage's.
const SET: &str = "set";

/// `make_data`.
pub const STAGE: StageDef = StageDef {
    name: NAME,
    summary: "Makes the pipeline's own data set and writes it as WebDataset shards",
    declare: |resolved| {
        let Some(make) = resolved.spec().data.make.clone().filter(|_| resolved.uses_made_data()) else {
            return Vec::new();
        };
        vec![Box::new(Make { make, seed: resolved.spec().seed })]
    },
};

/// The parameters of the set, which is of the one kind there is.
///
/// # Errors
/// Why they can't be served.
pub fn params(make: &MakeData) -> Result<ShapesParams, String> {
    let params: ShapesParams = make.params.decode().map_err(|e| e.to_string())?;
    params.check().map_err(|e| e.to_string())?;
    Ok(params)
}

/// Need of the made set.
pub fn need() -> Need {
    Need { stage: id(), port: Port::Dataset }
}

fn id() -> StageId {
    StageId::new(NAME, "")
}

/// The shards to train on.
///
/// # Errors
/// Shards that went away.
pub fn training_shards(source: &TrainSource, context: &Context<'_>) -> Result<Vec<PathBuf>, RunError> {
    match source {
        TrainSource::Shards(shards) => Ok(shards.clone()),
        TrainSource::Made => {
            let (train, _) = shapes_paths(&context.input(&id())?.join(SET));
            Ok(mcpipe_data::split_shards(&train)?)
        }
    }
}

/// The folder of an evaluation's set.
///
/// # Errors
/// The stage did not declare that it needs the made set.
pub fn evaluation_root(data: &EvalData, context: &Context<'_>) -> Result<PathBuf, RunError> {
    match &data.source {
        EvalSource::Root(root) => Ok(root.clone()),
        EvalSource::Made => Ok(shapes_paths(&context.input(&id())?.join(SET)).1),
    }
}

#[derive(Debug)]
struct Make {
    make: MakeData,
    seed: u64,
}

impl Stage for Make {
    fn id(&self) -> StageId {
        id()
    }

    fn path(&self) -> String {
        "data.make".into()
    }

    fn gives(&self) -> Port {
        Port::Dataset
    }

    fn needs(&self) -> Vec<Need> {
        Vec::new()
    }

    fn settings(&self) -> Result<Value, RunError> {
        // Decoded, so that a default written out gives the same hash as the default left out.
        let params = params(&self.make).map_err(RunError::Usage)?;
        Ok(json!({ "kind": self.make.kind, "params": params, "seed": self.seed }))
    }

    fn load(&self) -> Load {
        Load::Light
    }

    fn is_goal(&self) -> bool {
        false
    }

    fn run(&self, context: &Context<'_>) -> Result<String, RunError> {
        let params = params(&self.make).map_err(RunError::Usage)?;
        let total = (params.train + params.eval) as u64;
        (context.tell)(Event::Started { steps: Some(total), from: 0 });
        let mut tell = |done: usize, _: usize| {
            (context.tell)(Event::Step { step: done as u64, terms: Vec::new(), images_per_s: None });
        };
        let manifest = make_shapes(&context.dir.join(SET), &params, self.seed, &mut tell)?;
        context.interrupt.check()?;
        let bytes: u64 = manifest.files.iter().map(|f| f.bytes).sum();
        Ok(format!("{} training and {} evaluation samples, {:.1} MB", params.train, params.eval, bytes as f64 / 1e6))
    }
}

/// Whether a stage has to wait for the made set.
pub fn needs_of(resolved: &Arc<Resolved>, train: bool, evals: &[&EvalData]) -> Vec<Need> {
    let made =
        (train && resolved.train == TrainSource::Made) || evals.iter().any(|data| data.source == EvalSource::Made);
    if made { vec![need()] } else { Vec::new() }
}
