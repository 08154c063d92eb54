//! From one weight file to another: timm's names to open_clip's and back, folded for inference if asked.

use std::borrow::Cow;
use std::path::Path as File;

use mcpipe_graph::{GraphBuilder, Param, ParamStore, Path};

use super::{HeadNames, Tensors, batch_counter, metadata};
use crate::backbone::{Backbone, Naming};
use crate::registry::backbone;
use crate::weights::{Checkpoint, Entry, NameMap, WeightsError, write_safetensors};

/// Whose names a file has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// timm's: the trunk by itself.
    Timm,
    /// open_clip's: the trunk under `visual.trunk.` or `visual.`, beside whatever else the model has.
    OpenClip,
}

impl Form {
    /// Its name in metadata and pipeline files.
    pub fn name(self) -> &'static str {
        match self {
            Form::Timm => "timm",
            Form::OpenClip => "open_clip",
        }
    }
}

/// What is to be written from a file.
#[derive(Clone, Copy, Debug)]
pub struct Conversion<'a> {
    /// The backbone whose weights the file holds.
    pub backbone: &'a dyn Backbone,
    /// Side of its images; parameters may depend on it.
    pub image_size: usize,
    /// Whose names.
    pub form: Form,
    /// Whether branches are folded.
    pub reparam: bool,
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Converted {
    /// Tensors of the trunk, as they were read.
    pub read: usize,
    /// Tensors written, counters of batches excluded.
    pub written: usize,
    /// Outputs of the trunk's head; 0 where it has none.
    pub num_classes: usize,
    /// Tensors beside the trunk that the form has no place for.
    pub left_out: Vec<String>,
}

/// Whose weights a file that mcpipe exported holds.
#[derive(Debug)]
pub struct Described {
    /// The backbone.
    pub backbone: Box<dyn Backbone>,
    /// Side of its images.
    pub image_size: usize,
}

/// What mcpipe noted in a file that it exported; none in another's file.
///
/// # Errors
/// A note of a backbone that this program does not know.
pub fn described(source: &Checkpoint) -> Result<Option<Described>, WeightsError> {
    let note = |key: &str| source.metadata().get(key);
    let (Some(name), Some(params), Some(size)) =
        (note("mcpipe.backbone"), note("mcpipe.params"), note("mcpipe.image_size"))
    else {
        return Ok(None);
    };
    let unreadable = |why: String| WeightsError::Kind {
        path: source.path().to_owned(),
        message: format!("has notes that can't be read: {why}"),
    };
    let params: toml::Table = serde_json::from_str(params).map_err(|e| unreadable(e.to_string()))?;
    let image_size = size.parse().map_err(|_| unreadable(format!("`{size}` is no image size")))?;
    let backbone = backbone(name, &params).map_err(|e| unreadable(e.to_string()))?;
    Ok(Some(Described { backbone, image_size }))
}

/// The trunk's parameters without values, the head's among them where `dim` outputs are known.
fn declared(to: &Conversion<'_>, dim: Option<usize>) -> Result<ParamStore, WeightsError> {
    let refuse = |e: crate::ModelError| WeightsError::Export(e.to_string());
    let mut g = GraphBuilder::new(false);
    let image = g.input("image", &[1, to.image_size, to.image_size, 3]);
    to.backbone.build(&mut g, &Path::default(), &image, dim, &[]).map_err(refuse)?;
    let mut store = ParamStore::default();
    for spec in g.finish().params() {
        let (name, shape) = (spec.name.clone(), spec.shape.clone());
        store.insert(Param { name, shape, kind: spec.kind, data: Vec::new() });
    }
    Ok(store)
}

/// Reads the backbone's weights from `source`, which must be its own but for what stands beside the trunk, and writes
/// them to `file`.
///
/// # Errors
/// Tensors that are not the backbone's; a form or a folding that the backbone has none of; a file that can't be written.
pub fn convert(source: &Checkpoint, to: &Conversion<'_>, file: &File) -> Result<Converted, WeightsError> {
    let name = to.backbone.name();
    let naming = to.backbone.naming();
    if naming == Naming::OpenClip && to.form == Form::Timm {
        let message = format!("`{name}` has open_clip's names, not timm's; export it as `open_clip`");
        return Err(WeightsError::Export(message));
    }
    let visual = match naming {
        Naming::Timm => "visual.trunk.",
        Naming::OpenClip => "visual.",
    };
    let prefix = if source.names().any(|n| n.starts_with(visual)) { visual } else { "" };
    let head = HeadNames::of(to.backbone, to.image_size)?;
    let dim = source.shape(&format!("{prefix}{}", head.weight)).and_then(|shape| shape.get(head.outputs).copied());
    let mut store = declared(to, dim)?;
    source.load(&mut store, &NameMap::new().and(prefix, ""))?;
    let read = store.params().len();
    let mut folded = None;
    if to.reparam {
        let form = to.backbone.reparam(&store, &Path::default());
        folded = form.map_err(|e| WeightsError::Export(e.to_string()))?;
        if folded.is_none() {
            return Err(WeightsError::Export(format!("`{name}` has no branches to fold")));
        }
    }
    let (trunk, backbone) = match &folded {
        Some(folded) => (&folded.store, folded.backbone.as_ref()),
        None => (&store, to.backbone),
    };

    let under = if to.form == Form::OpenClip { visual } else { "" };
    let mut tensors = Tensors::new();
    let (mut written, mut left_out) = (0, Vec::new());
    for p in trunk.params() {
        let name = format!("{under}{}", p.name);
        // How many batches the source's norms have seen is not read; PyTorch asks for it without using it.
        tensors.extend(batch_counter(&name, 0));
        tensors.insert(name, Entry::F32(p.shape.clone(), Cow::Borrowed(&p.data)));
        written += 1;
    }
    for other in source.names().filter(|n| !n.starts_with(prefix)) {
        match (to.form, source.values(other)?) {
            (Form::OpenClip, Some(values)) => {
                let shape = source.shape(other).unwrap_or_default().to_vec();
                tensors.insert(other.to_owned(), Entry::F32(shape, Cow::Owned(values)));
                written += 1;
            }
            _ => left_out.push(other.to_owned()),
        }
    }
    write_safetensors(file, &tensors, &metadata(backbone, to.image_size, to.form.name()))?;
    Ok(Converted { read, written, num_classes: dim.unwrap_or(0), left_out })
}
