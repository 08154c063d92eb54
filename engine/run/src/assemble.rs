//! From resolved models and stored results to what the trainer takes: towers with weights, batches, objective.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use mcpipe_data::{Filter, ImageForm, LoaderOptions, Normalize, SampleSet};
use mcpipe_graph::{GraphBuilder, Param, ParamStore, StepGraph};
use mcpipe_models::weights::{Entry, NameMap, write_safetensors};
use mcpipe_models::{Checkpoint, Interpolation, Preprocess};
use mcpipe_spec::Spec;
use mcpipe_train::{ImageTower, LOGIT_SCALE, TextTower, ViewSpec};

use crate::error::RunError;
use crate::resolve::models::TEXT;

/// File of a stage's trained or loaded weights.
pub const WEIGHTS: &str = "weights.safetensors";

/// The graph of an image tower for one image, for its parameters, shapes and cost.
///
/// # Errors
/// A tower that can't be built.
pub fn image_graph(tower: &dyn ImageTower) -> Result<StepGraph, RunError> {
    let mut g = GraphBuilder::new(false);
    let side = tower.image_size();
    let x_bhwc = g.input("images", &[1, side, side, 3]);
    let encoded = tower.build(&mut g, &x_bhwc, &[])?;
    g.output("embedding", &encoded.embedding_bd);
    Ok(g.finish())
}

/// The graph of a text tower for one caption.
///
/// # Errors
/// A tower that can't be built.
pub fn text_graph(tower: &dyn TextTower) -> Result<StepGraph, RunError> {
    let mut g = GraphBuilder::new(false);
    let ids_bl = g.int_input("ids", &[1, tower.context_length()]);
    let eot_b = g.int_input("eot", &[1]);
    let embedding_bd = tower.build(&mut g, &ids_bl, &eot_b)?;
    g.output("embedding", &embedding_bd);
    Ok(g.finish())
}

/// Weights of a model and the logit scale (not its logarithm) that the file holds.
#[derive(Clone, Debug)]
pub struct Weights {
    /// The weights, under the names that the towers use.
    pub store: ParamStore,
    /// exp(logit scale).
    pub logit_scale: Option<f64>,
}

/// Reads the weights of towers from a file under timm's and open_clip's names. All their parameters must be there
/// with their shapes, but for position embeddings where `resize_position`; whatever else the file holds is left.
///
/// # Errors
/// A file that can't be read or whose tensors are not the model's.
pub fn read_weights(
    path: &Path,
    image: Option<(&dyn ImageTower, &str)>,
    text: Option<&dyn TextTower>,
    resize_position: bool,
) -> Result<Weights, RunError> {
    let file = Checkpoint::open(path)?;
    let mut store = ParamStore::default();
    let mut names = NameMap::new();
    if let Some((tower, at)) = image {
        declare(&mut store, &image_graph(tower)?);
        names = names.and_image(&file, at);
    }
    if let Some(tower) = text {
        declare(&mut store, &text_graph(tower)?);
        names = names.and_text_of(&file, TEXT, tower.roots());
    }
    if resize_position {
        file.load_resized(&mut store, &names)?;
    } else {
        file.load(&mut store, &names)?;
    }
    let logit_scale = file.values(LOGIT_SCALE)?.and_then(|v| v.first().map(|&log| f64::from(log).exp()));
    Ok(Weights { store, logit_scale })
}

/// Reads a file that this program wrote for a model whose graph is `graph`; its names are the store's.
///
/// # Errors
/// As [`read_weights`].
pub fn read_own(path: &Path, graphs: &[StepGraph]) -> Result<Weights, RunError> {
    let file = Checkpoint::open(path)?;
    let mut store = ParamStore::default();
    graphs.iter().for_each(|graph| declare(&mut store, graph));
    let asked: Vec<String> = store.params().iter().map(|p| p.name.clone()).collect();
    let names = asked.iter().fold(NameMap::new(), |names, name| names.and(name.clone(), name.clone()));
    file.load(&mut store, &names)?;
    let logit_scale = file.values(LOGIT_SCALE)?.and_then(|v| v.first().map(|&log| f64::from(log).exp()));
    Ok(Weights { store, logit_scale })
}

/// A store with the parameters of graphs, all zero: enough to plan, not to run.
pub fn declared(graphs: &[StepGraph]) -> ParamStore {
    let mut store = ParamStore::default();
    graphs.iter().for_each(|graph| declare(&mut store, graph));
    for param in store.params_mut() {
        // Zeroed memory is taken from the system only when it is touched, which planning does not.
        param.data = vec![0.0; param.shape.iter().product()];
    }
    store
}

/// Adds a graph's parameters without values: a file is to bring them.
fn declare(store: &mut ParamStore, graph: &StepGraph) {
    for spec in graph.params() {
        let (name, shape) = (spec.name.clone(), spec.shape.clone());
        store.insert(Param { name, shape, kind: spec.kind, data: Vec::new() });
    }
}

/// Writes a store as a safetensors file, with the logit scale's logarithm where the store has none of its own.
///
/// # Errors
/// The file system's refusal.
pub fn write_weights(
    path: &Path,
    store: &ParamStore,
    logit_scale: Option<f64>,
    metadata: &[(&str, String)],
) -> Result<(), RunError> {
    let mut tensors: BTreeMap<String, Entry<'_>> = store
        .params()
        .iter()
        .map(|p| (p.name.clone(), Entry::F32(p.shape.clone(), Cow::Borrowed(p.data.as_slice()))))
        .collect();
    if let Some(scale) = logit_scale {
        tensors
            .entry(LOGIT_SCALE.to_owned())
            .or_insert_with(|| Entry::F32(Vec::new(), Cow::Owned(vec![scale.ln() as f32])));
    }
    let metadata = metadata.iter().map(|(k, v)| ((*k).to_owned(), v.clone())).collect();
    Ok(write_safetensors(path, &tensors, &metadata)?)
}

/// The form of a backbone's images at a size.
pub fn view_of(size: usize, preprocess: &Preprocess) -> ViewSpec {
    let filter = match preprocess.interpolation {
        Interpolation::Bilinear => Filter::Bilinear,
        Interpolation::Bicubic => Filter::Bicubic,
    };
    let normalize = Normalize { mean: preprocess.mean, std: preprocess.std };
    ViewSpec { form: ImageForm { size, filter }, normalize }
}

/// The distinct views of a step's models.
#[derive(Clone, Debug, Default)]
pub struct Views(pub Vec<ViewSpec>);

impl Views {
    /// The position of a view, added where it is new.
    pub fn position(&mut self, view: ViewSpec) -> usize {
        let found = self.0.iter().position(|held| *held == view);
        found.unwrap_or_else(|| {
            self.0.push(view);
            self.0.len() - 1
        })
    }
}

/// The shards of a pipeline's training data.
pub fn open_training_data(shards: Vec<PathBuf>) -> Result<Arc<SampleSet>, RunError> {
    Ok(Arc::new(SampleSet::open(shards)?))
}

/// The sizes and filters that images are resized to, each once.
fn forms(views: &Views) -> Vec<ImageForm> {
    let mut forms: Vec<ImageForm> = Vec::new();
    for view in &views.0 {
        if !forms.contains(&view.form) {
            forms.push(view.form);
        }
    }
    forms
}

/// The options of the training stream of a model.
pub fn loader_options(spec: &Spec, seed: u64, batch_size: usize, views: &Views) -> LoaderOptions {
    LoaderOptions {
        seed,
        batch_size,
        forms: forms(views),
        augment: (&spec.augment).into(),
        mix: (&spec.augment).into(),
        on_bad_sample: (&spec.data.train).into(),
        workers: spec.data.train.workers,
        prefetch: 2 * spec.data.train.workers,
        ..LoaderOptions::default()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use mcpipe_models::backbone;
    use mcpipe_train::BackboneTower;

    use super::*;
    use crate::model::evaluation_view;

    /// Evaluation and training resize with the filter that timm's configuration of the model names.
    #[test]
    fn images_are_resized_with_the_models_filter() {
        let mut views = Views::default();
        let names = ["mobilenetv3_large_100", "mobilenetv3_large_075", "resnet18"];
        for name in names {
            let backbone: Arc<_> = backbone(name, &toml::Table::new()).expect("registered").into();
            let (path, head) = (mcpipe_graph::Path::new("image"), None);
            let tower = BackboneTower { backbone, path, image_size: 64, head, projection: None };
            let filter = if name.ends_with("large_075") { Filter::Bilinear } else { Filter::Bicubic };
            let (transform, _) = evaluation_view(&tower);
            assert_eq!((transform.size, transform.filter), (64, filter), "{name}");
            views.position(view_of(tower.image_size, &tower.backbone.preprocess()));
        }
        let bilinear = ImageForm { size: 64, filter: Filter::Bilinear };
        assert_eq!(forms(&views), [64.into(), bilinear]);
    }
}
