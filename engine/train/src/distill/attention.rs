//! The attention level: where the student looks follows where the teacher looks.
//!
//! Between maps (or tokens on their grid) it is attention transfer (Zagoruyko & Komodakis 2017). Between transformers'
//! attention probabilities it is MiniLM's KL (Wang et al. 2020) with heads averaged.

use mcpipe_graph::{GraphBuilder, Path, Tensor};
use mcpipe_models::{ModelError, Tap, TapInfo, TapShape};
use mcpipe_spec::params_schema;
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Level, LevelEntry, Pairing, Problem, TapPair, check_pairs, grid, has_taps, make};
use crate::tower::{StudentShape, TeacherShape};

/// Spatial attention. Between maps: MSE of the L2-normalised mean squares over channels. Between attention
/// probabilities: KL(teacher ‖ student) of each token's attention, heads averaged. The teacher's side is resized to the
/// student's grid; mean over pairs and teachers.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct Attention {
    /// Pairs of taps to compare: both maps or tokens, or both attention probabilities.
    #[schemars(length(min = 1))]
    pub taps: Vec<TapPair>,
}

pub(super) const ENTRY: LevelEntry = LevelEntry {
    name: "attention",
    summary: "attention transfer between feature maps, KL between attention probabilities",
    params: params_schema::<Attention>,
    make: make::<Attention>,
};

fn comparable(student: &TapInfo, teacher: &TapInfo) -> Option<String> {
    (student.shape.is_attention() != teacher.shape.is_attention()).then(|| {
        let what = |t: &TapInfo| if t.shape.is_attention() { "attention probabilities" } else { "activations" };
        format!(
            "the student's `{}` holds {}, the teacher's `{}` holds {}: the level `attention` compares like with like",
            student.name,
            what(student),
            teacher.name,
            what(teacher)
        )
    })
}

/// Tokens before the grid and tokens in all of attention probabilities.
fn tokens(tap: &TapInfo) -> Option<(usize, usize)> {
    match tap.shape {
        TapShape::Attention { prefix, grid, .. } => Some((prefix, prefix + grid[0] * grid[1])),
        _ => None,
    }
}

/// Whether both sides have the same tokens, class tokens included: then rows are compared as they are. Else only the
/// grid's rows are, the teacher's resized and normalised again, and a class token that the student has besides gets no
/// mass.
fn same_tokens(pair: Pairing<'_>) -> bool {
    grid(pair.student) == grid(pair.teacher) && tokens(pair.student).map(|t| t.0) == tokens(pair.teacher).map(|t| t.0)
}

/// `[B·r, heads, N, N]` → `[B, N, N]`, mean over heads and over the r sequences of an image.
fn mean_heads(g: &mut GraphBuilder, tap: &Tap, batch: usize) -> Result<Tensor, ModelError> {
    let (sequences, heads, n) = match *tap.value.shape() {
        [s, h, n, m] if n == m && batch > 0 && s % batch == 0 => (s, h, n),
        _ => {
            return Err(ModelError::Dims(format!(
                "attention probabilities can't have the shape {:?}",
                tap.value.shape()
            )));
        }
    };
    let flat = g.reshape(&tap.value, &[batch, sequences / batch * heads, n * n])?;
    let mean = g.global_avg_pool(&flat)?;
    Ok(g.reshape(&mean, &[batch, n, n])?)
}

fn transfer_map(g: &mut GraphBuilder, tap: &Tap) -> Result<Tensor, ModelError> {
    let x_bhwc = tap.image(g)?;
    Ok(g.attention_transfer_map(&x_bhwc)?)
}

impl Level for Attention {
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
        let ([h, w], [sh, sw]) = (grid(pair.teacher), grid(pair.student));
        let Some((prefix, n)) = tokens(pair.teacher) else {
            let map = transfer_map(g, tap)?;
            if [h, w] == [sh, sw] {
                return Ok(map);
            }
            let map = g.reshape(&map, &[pair.batch, h, w, 1])?;
            let map = g.resize_bilinear(&map, sh, sw)?;
            let map = g.reshape(&map, &[pair.batch, sh * sw])?;
            return Ok(g.l2_normalize(&map));
        };
        let p_bnn = mean_heads(g, tap, pair.batch)?;
        if same_tokens(pair) {
            return Ok(p_bnn);
        }
        let (hw, mut p) = (h * w, p_bnn);
        if prefix > 0 {
            let rows = g.slice_rows(&p, prefix, hw)?;
            let keys = g.reshape(&rows, &[pair.batch * hw, n, 1])?;
            p = g.slice_rows(&keys, prefix, hw)?;
        }
        // Keys: each row is a picture of one channel. Queries: the rows' grid is a picture with keys as channels.
        let keys = g.reshape(&p, &[pair.batch * hw, h, w, 1])?;
        let keys = g.resize_bilinear(&keys, sh, sw)?;
        let queries = g.reshape(&keys, &[pair.batch, h, w, sh * sw])?;
        let queries = g.resize_bilinear(&queries, sh, sw)?;
        Ok(g.reshape(&queries, &[pair.batch, sh * sw, sh * sw])?)
    }

    fn target_shape(&self, pair: Pairing<'_>) -> Option<Vec<usize>> {
        let (prefix, n) = tokens(pair.student)?;
        let rows = if same_tokens(pair) { n } else { n - prefix };
        Some(vec![pair.batch, rows, n])
    }

    fn finishes_target(&self, pair: Pairing<'_>) -> bool {
        tokens(pair.student).is_some() && !same_tokens(pair)
    }

    fn finish_target(&self, computed: &[f32], pair: Pairing<'_>) -> Option<Vec<f32>> {
        let (prefix, n) = tokens(pair.student).filter(|_| !same_tokens(pair))?;
        let mut target = Vec::with_capacity(computed.len() / (n - prefix).max(1) * n);
        for row in computed.chunks_exact(n - prefix) {
            let sum: f32 = row.iter().sum();
            target.extend(std::iter::repeat_n(0.0, prefix));
            target.extend(row.iter().map(|p| p / sum));
        }
        Some(target)
    }

    fn tap_loss(
        &self,
        g: &mut GraphBuilder,
        _: &Path,
        tap: &Tap,
        target: &Tensor,
        pair: Pairing<'_>,
    ) -> Result<Tensor, ModelError> {
        let Some((prefix, n)) = tokens(pair.student) else {
            let map = transfer_map(g, tap)?;
            return Ok(g.mse(&map, target)?);
        };
        let mut q_bnn = mean_heads(g, tap, pair.batch)?;
        if !same_tokens(pair) && prefix > 0 {
            q_bnn = g.slice_rows(&q_bnn, prefix, n - prefix)?;
        }
        Ok(g.kl(target, &q_bnn)?)
    }
}
