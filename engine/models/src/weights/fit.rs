//! Which registered backbone a file's image tower is of.

use std::collections::BTreeMap;

use mcpipe_graph::{GraphBuilder, Path};

use super::load::same_shape;
use super::{Checkpoint, Mismatch, NameMap};
use crate::backbone::Backbone;
use crate::error::ModelError;
use crate::registry::backbones;

/// How a file fits a backbone.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fit {
    /// Name of the backbone.
    pub backbone: &'static str,
    /// Parameters that the file holds with their shapes.
    pub matched: usize,
    /// Parameters of the backbone.
    pub parameters: usize,
    /// Everything else.
    pub mismatch: Mismatch,
    /// Outputs of the head that the file holds; none without a head.
    pub dim: Option<usize>,
}

impl Fit {
    /// Share of the backbone's parameters and the file's tensors that are the same, 0 to 1.
    pub fn share(&self) -> f64 {
        let all = self.parameters + self.mismatch.unexpected.len();
        self.matched as f64 / all.max(1) as f64
    }

    /// Whether the file holds the backbone and nothing else.
    pub fn is_exact(&self) -> bool {
        self.mismatch.is_empty()
    }
}

type Shapes = BTreeMap<String, Vec<usize>>;

/// Names and shapes of a backbone's parameters.
fn shapes(backbone: &dyn Backbone, image_size: usize, dim: Option<usize>) -> Result<Shapes, ModelError> {
    let mut g = GraphBuilder::new(false);
    let image = g.input("image", &[1, image_size, image_size, 3]);
    backbone.build(&mut g, &Path::new(""), &image, dim, &[])?;
    Ok(g.finish().params().iter().map(|p| (p.name.clone(), p.shape.clone())).collect())
}

/// Names of the parameters of a backbone's head, each with its axis of outputs.
///
/// # Errors
/// An image size that the backbone can't take.
pub fn head_of(backbone: &dyn Backbone, image_size: usize) -> Result<Vec<(String, usize)>, ModelError> {
    let (without, two, three) = (
        shapes(backbone, image_size, None)?,
        shapes(backbone, image_size, Some(2))?,
        shapes(backbone, image_size, Some(3))?,
    );
    let head = |(name, shape): (String, Vec<usize>)| {
        let other = three.get(&name)?;
        let axis = shape.iter().zip(other).position(|(a, b)| a != b);
        // A hidden layer of a head does not show its outputs.
        (!without.contains_key(&name)).then(|| (name, axis.unwrap_or(usize::MAX)))
    };
    Ok(two.into_iter().filter_map(head).collect())
}

/// Compares a file's image tower with a backbone at its published image size.
///
/// # Errors
/// A backbone that can't be built.
pub fn fit(checkpoint: &Checkpoint, backbone: &dyn Backbone) -> Result<Fit, ModelError> {
    let size = backbone.preprocess().image_size;
    let names = NameMap::new().and_image(checkpoint, "");
    let in_file: BTreeMap<String, &str> = checkpoint.names().filter_map(|n| Some((names.to_store(n)?, n))).collect();
    let shape_of = |name: &str| in_file.get(name).and_then(|n| checkpoint.shape(n));
    let head = head_of(backbone, size)?;
    let dim = head.iter().find_map(|(name, axis)| shape_of(name)?.get(*axis).copied());
    let expected = shapes(backbone, size, dim)?;
    let mut mismatch = Mismatch::default();
    let mut matched = 0;
    for (name, shape) in &expected {
        match (shape_of(name), in_file.get(name)) {
            (Some(found), _) if same_shape(found, shape) => matched += 1,
            (Some(found), Some(n)) => mismatch.wrong_shape.push(((*n).to_owned(), found.to_vec(), shape.clone())),
            _ => mismatch.missing.push(names.to_file(name).unwrap_or_else(|| name.clone())),
        }
    }
    let other = in_file.iter().filter(|(name, _)| !expected.contains_key(*name));
    mismatch.unexpected = other.map(|(_, n)| (*n).to_owned()).collect();
    Ok(Fit { backbone: backbone.name(), matched, parameters: expected.len(), mismatch, dim })
}

/// How a file fits each registered backbone of published size, the best first; those that share nothing with it are
/// left out.
pub fn fits(checkpoint: &Checkpoint) -> Vec<Fit> {
    let one = |entry: &crate::BackboneEntry| fit(checkpoint, (entry.make)(&toml::Table::new()).ok()?.as_ref()).ok();
    let mut fits: Vec<Fit> = backbones().iter().filter_map(one).filter(|fit| fit.matched > 0).collect();
    fits.sort_by(|a, b| b.share().total_cmp(&a.share()).then(a.backbone.cmp(b.backbone)));
    fits
}
