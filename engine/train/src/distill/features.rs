//! The features level: chosen activations of the student follow the teacher's through a 1x1 regressor (FitNets, Romero
//! et al. 2015).

use mcpipe_graph::{GraphBuilder, Path, Tensor};
use mcpipe_models::projection::regressor;
use mcpipe_models::{ModelError, Tap, TapInfo};
use mcpipe_spec::params_schema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Level, LevelEntry, Pairing, Problem, TapPair, check_pairs, grid, has_taps, make};
use crate::tower::{StudentShape, TeacherShape};

/// How features are compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "snake_case")]
pub enum Distance {
    /// Mean squared error over all values.
    #[default]
    Mse,
    /// One minus the cosine of the channels at each position, mean over positions.
    Cosine,
}

/// Activations at chosen taps, the student's through a trained 1x1 regressor to the teacher's channels. Tokens are laid
/// out as their grid (class tokens left out) and the teacher's grid is resized to the student's; mean over pairs and
/// teachers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Features {
    /// Pairs of taps to compare.
    #[schemars(length(min = 1))]
    pub taps: Vec<TapPair>,
    /// How they are compared.
    #[serde(default)]
    pub loss: Distance,
}

pub(super) const ENTRY: LevelEntry = LevelEntry {
    name: "features",
    summary: "activations at chosen taps match the teacher's through a 1x1 regressor (MSE or cosine)",
    params: params_schema::<Features>,
    make: make::<Features>,
};

fn comparable(student: &TapInfo, teacher: &TapInfo) -> Option<String> {
    let map = [student, teacher].into_iter().find(|t| t.shape.is_attention())?;
    Some(format!("`{}` holds attention probabilities; the level `features` compares maps and tokens", map.name))
}

impl Level for Features {
    fn name(&self) -> &'static str {
        ENTRY.name
    }

    fn accepts(&self, _: &StudentShape, teacher: &TeacherShape) -> bool {
        has_taps(&self.taps, teacher)
    }

    fn check(&self, student: &StudentShape, teachers: &[&TeacherShape]) -> Vec<Problem> {
        check_pairs(&self.taps, student, teachers, comparable)
    }

    fn uses_embeddings(&self) -> bool {
        false
    }

    fn pairs(&self) -> &[TapPair] {
        &self.taps
    }

    fn tap_target(&self, g: &mut GraphBuilder, tap: &Tap, pair: Pairing<'_>) -> Result<Tensor, ModelError> {
        let x_bhwc = tap.image(g)?;
        let [h, w] = grid(pair.student);
        Ok(g.resize_bilinear(&x_bhwc, h, w)?)
    }

    fn tap_loss(
        &self,
        g: &mut GraphBuilder,
        path: &Path,
        tap: &Tap,
        target: &Tensor,
        _: Pairing<'_>,
    ) -> Result<Tensor, ModelError> {
        let x_bhwc = tap.image(g)?;
        let channels = target.shape().last().copied().unwrap_or(0);
        let y_bhwc = regressor(g, path, &x_bhwc, channels)?;
        Ok(match self.loss {
            Distance::Mse => g.mse(&y_bhwc, target)?,
            Distance::Cosine => g.cosine(&y_bhwc, target)?,
        })
    }
}
