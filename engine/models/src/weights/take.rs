//! Weights of a file for a model that does not take all of it as it is: parts by pattern, another head, another number
//! of positions, a larger model's layers and channels.

use std::collections::BTreeSet;

use mcpipe_graph::{Param, ParamStore};

use super::inherit::{Layers, kept, select};
use super::load::{path_prefix, same_shape};
use super::resize::{grid_prefix, resize_grid, resize_line};
use super::{Checkpoint, Mismatch, NameMap, WeightsError, rules};

/// How weights are taken over.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TakeOptions {
    /// Patterns of the parameters that are taken, `*` for any characters; none takes all.
    pub include: Vec<String>,
    /// Patterns of parameters that are not taken.
    pub exclude: Vec<String>,
    /// A head that the file lacks, or has with other dimensions, is initialised anew; one that only the file has is
    /// left.
    pub resize_head: bool,
    /// Position embeddings are resized to the model's grid.
    pub resize_position: bool,
    /// The file is of a larger model of the same family: layers and channels of it are taken.
    pub inherit: bool,
}

/// A model that takes weights.
#[derive(Clone, Copy, Debug)]
pub struct Target<'a> {
    /// Its parameters under `path`; their values don't matter. Others in the store are left.
    pub params: &'a ParamStore,
    /// Path of the model.
    pub path: &'a str,
    /// Names of its head's parameters, without the path.
    pub head: &'a [String],
}

/// Which tensors of a file become which parameters, found without reading a value.
#[derive(Clone, Debug, Default)]
pub struct Takeover {
    items: Vec<Item>,
    /// Parameters that are initialised anew, by their names in the store.
    pub left: Vec<String>,
    /// Parameters whose tensors are resized or cut, by their names in the store.
    pub changed: Vec<String>,
}

#[derive(Clone, Debug)]
struct Item {
    /// Parameter in the store.
    target: String,
    /// Tensor in the file.
    source: String,
    shape: Vec<usize>,
    how: How,
}

/// What becomes of a tensor.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum How {
    Same,
    /// Another number of positions (the second axis from behind), then the places kept of each axis.
    Changed {
        positions: Option<Positions>,
        kept: Option<Vec<Vec<usize>>>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Positions {
    Grid(usize),
    Line,
}

/// Whether a parameter holds position embeddings.
fn is_position(name: &str) -> bool {
    matches!(name.rsplit('.').next(), Some("positional_embedding" | "pos_embed" | "position_embedding"))
}

/// A name with its numbers left out: what layers of a row have in common.
fn form(name: &str) -> String {
    let plain = |s: &str| if s.parse::<usize>().is_ok() { "#".to_owned() } else { s.to_owned() };
    name.split('.').map(plain).collect::<Vec<_>>().join(".")
}

impl TakeOptions {
    fn selects(&self, name: &str) -> bool {
        let any = |patterns: &[String]| patterns.iter().any(|p| rules::names(p, name));
        (self.include.is_empty() || any(&self.include)) && !any(&self.exclude)
    }
}

impl Checkpoint {
    /// Finds which tensors `target` takes under the names that `names` gives. Nothing is read yet.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] with everything that does not fit and is not allowed for, and with what would allow
    /// for it; [`WeightsError::Pattern`] where a pattern names no parameter.
    pub fn plan(&self, target: Target<'_>, names: &NameMap, options: &TakeOptions) -> Result<Takeover, WeightsError> {
        let prefix = path_prefix(target.path);
        let params: Vec<(&Param, &str)> =
            target.params.params().iter().filter_map(|p| Some((p, p.name.strip_prefix(&prefix)?))).collect();
        for pattern in options.include.iter().chain(&options.exclude) {
            if !params.iter().any(|(_, name)| rules::names(pattern, name)) {
                return Err(WeightsError::Pattern { path: self.path().to_owned(), pattern: pattern.clone() });
            }
        }
        let in_file: Vec<(&str, String)> =
            self.names().filter_map(|n| Some((n, names.to_store(n)?.strip_prefix(&prefix)?.to_owned()))).collect();
        let layers = options
            .inherit
            .then(|| (Layers::of(in_file.iter().map(|(_, n)| n.as_str())), Layers::of(params.iter().map(|(_, n)| *n))));
        let mut takeover = Takeover::default();
        let mut mismatch = Mismatch::default();
        let mut hints: BTreeSet<&str> = BTreeSet::new();
        for (param, name) in &params {
            if !options.selects(name) {
                takeover.left.push(param.name.clone());
                continue;
            }
            let head = target.head.iter().any(|h| h == name);
            let found = match &layers {
                Some((larger, smaller)) => larger.source(name, smaller),
                None => Some((*name).to_owned()),
            };
            let source = found.and_then(|n| names.to_file(&format!("{prefix}{n}")));
            let shape = source.as_deref().and_then(|source| self.shape(source));
            let (Some(source), Some(shape)) = (source, shape) else {
                if head && options.resize_head {
                    takeover.left.push(param.name.clone());
                } else {
                    hints.extend((layers.is_some() && !head).then_some(LARGER));
                    mismatch.missing.push(names.to_file(&param.name).unwrap_or_else(|| param.name.clone()));
                    hints.extend(head.then_some(HEAD));
                }
                continue;
            };
            let how = match change(param, name, shape, options) {
                Some(how) => how,
                None if head && options.resize_head => {
                    takeover.left.push(param.name.clone());
                    continue;
                }
                None => {
                    hints.extend(head.then_some(HEAD));
                    hints.extend(is_position(name).then_some(POSITION));
                    match kept(name, shape, &param.shape) {
                        Some(_) => hints.insert(INHERIT),
                        None => options.inherit && hints.insert(LARGER),
                    };
                    mismatch.wrong_shape.push((source, shape.to_vec(), param.shape.clone()));
                    continue;
                }
            };
            if how != How::Same {
                takeover.changed.push(param.name.clone());
            }
            takeover.items.push(Item { target: param.name.clone(), source, shape: param.shape.clone(), how });
        }
        let ours: BTreeSet<&str> = params.iter().map(|(_, name)| *name).collect();
        let forms: BTreeSet<String> = ours.iter().map(|name| form(name)).collect();
        for (file_name, name) in &in_file {
            // A layer that is not inherited.
            let passed_over = options.inherit && forms.contains(&form(name));
            if ours.contains(name.as_str()) || passed_over || !options.selects(name) {
                continue;
            }
            let head = target.head.iter().any(|h| h == name);
            if !(head && options.resize_head) {
                mismatch.unexpected.push((*file_name).to_owned());
                hints.extend(head.then_some(HEAD));
            }
        }
        if mismatch.is_empty() {
            return Ok(takeover);
        }
        mismatch.hints = hints.into_iter().map(str::to_owned).collect();
        Err(WeightsError::Mismatch { path: self.path().to_owned(), mismatch: Box::new(mismatch) })
    }

    /// Reads what was planned: a store of the parameters that are taken, in the order of `target`.
    ///
    /// # Errors
    /// An element type that is no floating-point one.
    pub fn take(&self, takeover: &Takeover, target: Target<'_>) -> Result<ParamStore, WeightsError> {
        let mut store = ParamStore::default();
        for item in &takeover.items {
            let (Some(values), Some(shape)) = (self.values(&item.source)?, self.shape(&item.source)) else { continue };
            let data = item.how.apply(values, shape, &item.shape);
            if let Some(param) = target.params.get(&item.target) {
                store.insert(Param { data, ..param.clone() });
            }
        }
        Ok(store)
    }
}

impl Takeover {
    /// Number of tensors that are taken.
    pub fn taken(&self) -> usize {
        self.items.len()
    }
}

const HEAD: &str = "`resize = [\"head\"]` leaves the file's head and starts the model's own anew";
const POSITION: &str = "`resize = [\"position\"]` resizes the position embedding to the model's grid";
const LARGER: &str =
    "`inherit` takes from a larger model of the same family: one with as many layers and channels, or more";
const INHERIT: &str = "`inherit = true` takes layers and channels of a larger model of the same family";

impl How {
    /// The parameter of shape `to` from the values of a tensor of shape `from`.
    pub(super) fn apply(&self, values: Vec<f32>, from: &[usize], to: &[usize]) -> Vec<f32> {
        match self {
            How::Same => values,
            How::Changed { positions, kept } => changed(values, from, to, *positions, kept.as_deref()),
        }
    }
}

/// How a tensor of `shape` becomes the parameter; none where it does not.
pub(super) fn change(param: &Param, name: &str, shape: &[usize], options: &TakeOptions) -> Option<How> {
    if same_shape(shape, &param.shape) {
        return Some(How::Same);
    }
    let mut shape = shape.to_vec();
    let mut positions = None;
    if is_position(name) && (options.resize_position || options.inherit) {
        let axis = shape.len().checked_sub(2)?;
        let (old, new) = (shape[axis], *param.shape.get(axis)?);
        if old != new {
            let text = param.name.starts_with("text.");
            positions = Some(if text { Positions::Line } else { Positions::Grid(grid_prefix(old, new)?) });
            shape[axis] = new;
        }
    }
    if shape == param.shape {
        return Some(How::Changed { positions, kept: None });
    }
    if !options.inherit {
        return None;
    }
    let kept = kept(name, &shape, &param.shape)?;
    Some(How::Changed { positions, kept: Some(kept) })
}

fn changed(
    values: Vec<f32>,
    from: &[usize],
    to: &[usize],
    positions: Option<Positions>,
    kept: Option<&[Vec<usize>]>,
) -> Vec<f32> {
    let mut shape = from.to_vec();
    let mut values = values;
    if let (Some(positions), Some(axis)) = (positions, shape.len().checked_sub(2)) {
        let (old, new, width) = (from[axis], to[axis], from[axis + 1]);
        values = match positions {
            Positions::Grid(prefix) => {
                resize_grid(&values, prefix, (old - prefix).isqrt(), (new - prefix).isqrt(), width)
            }
            Positions::Line => resize_line(&values, old, new, width),
        };
        shape[axis] = new;
    }
    match kept {
        Some(kept) => select(&values, &shape, kept),
        None => values,
    }
}
