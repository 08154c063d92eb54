//! Weight files of any kind as safetensors, under the names that timm and open_clip load strictly.

use std::borrow::Cow;
use std::collections::BTreeMap;

use super::{Checkpoint, Element, Entry, WeightsError, fit, fits, rules};
use crate::backbone::{Backbone, Naming};

/// Whose model the written names are of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// `timm.create_model(..)`: the image trunk alone.
    Timm,
    /// `open_clip.create_model(..)`: trunk, text tower and logit scale.
    OpenClip,
}

/// What is changed on the way.
#[derive(Clone, Copy, Debug, Default)]
pub struct ConvertOptions<'a> {
    /// Names; none leaves them as [`Checkpoint`] gives them.
    pub form: Option<Form>,
    /// The image tower must be this, parameter by parameter.
    pub backbone: Option<&'a dyn Backbone>,
    /// Patterns of the names, as they are written, that are kept, `*` for any characters; none keeps all.
    pub include: &'a [String],
    /// Type of real numbers; none leaves them as they are. F32, F16 or BF16.
    pub element: Option<Element>,
}

/// Prefixes of image towers in open_clip's models: a timm trunk, open_clip's own.
const TRUNK: &str = "visual.trunk.";
const VISUAL: &str = "visual.";

/// The tensors of a file in the form asked for.
///
/// # Errors
/// An image tower that is not the backbone asked for or has no place in the form; a pattern that names nothing; an
/// element type that values can't be written in.
pub fn convert<'c>(
    checkpoint: &'c Checkpoint,
    options: ConvertOptions<'_>,
) -> Result<BTreeMap<String, Entry<'c>>, WeightsError> {
    if let Some(backbone) = options.backbone {
        let fit = fit(checkpoint, backbone).map_err(|e| WeightsError::Export(e.to_string()))?;
        if !fit.is_exact() {
            return Err(WeightsError::Mismatch {
                path: checkpoint.path().to_owned(),
                mismatch: Box::new(fit.mismatch),
            });
        }
    }
    let (from, to) = match options.form {
        Some(form) => prefixes(checkpoint, form, options.backbone)?,
        None => (String::new(), String::new()),
    };
    let only_trunk = options.form == Some(Form::Timm);
    let renamed = |name: &str| match name.strip_prefix(&from) {
        Some(rest) => Some(format!("{to}{rest}")),
        None => (!only_trunk).then(|| name.to_owned()),
    };
    for pattern in options.include {
        if !checkpoint.names().filter_map(renamed).any(|name| rules::names(pattern, &name)) {
            return Err(WeightsError::Pattern { path: checkpoint.path().to_owned(), pattern: pattern.clone() });
        }
    }
    let kept = |name: &str| {
        let new = renamed(name)?;
        (options.include.is_empty() || options.include.iter().any(|p| rules::names(p, &new))).then_some(new)
    };
    let mut entries = BTreeMap::new();
    for name in checkpoint.names() {
        let (Some(new), Some(element), Some(shape), Some(bytes)) =
            (kept(name), checkpoint.element(name), checkpoint.shape(name), checkpoint.bytes(name))
        else {
            continue;
        };
        // PyTorch's batch norm counts its batches in a buffer that a strict load of either library asks for.
        if options.form.is_some()
            && let Some(norm) = new.strip_suffix("running_mean")
        {
            entries.entry(format!("{norm}num_batches_tracked")).or_insert(Entry::I64(Vec::new(), vec![0]));
        }
        let entry = match options.element {
            Some(wanted) if element.is_float() && element != wanted => {
                let values = element.decode(&bytes).unwrap_or_default();
                let bytes = wanted.encode(&values).ok_or_else(|| {
                    WeightsError::Export(format!("weights are written as F32, F16 or BF16, not as {wanted}"))
                })?;
                Entry::Raw(wanted, shape.to_vec(), Cow::Owned(bytes))
            }
            _ => Entry::Raw(element, shape.to_vec(), bytes),
        };
        entries.insert(new, entry);
    }
    for (name, batches) in checkpoint.counters() {
        let norm = name.strip_suffix("num_batches_tracked").unwrap_or(name);
        if let Some(new) = renamed(name)
            && kept(&format!("{norm}running_mean")).is_some()
        {
            entries.insert(new, Entry::I64(Vec::new(), vec![batches]));
        }
    }
    Ok(entries)
}

/// What the image tower's names start with in the file, and in the form.
fn prefixes(
    checkpoint: &Checkpoint,
    form: Form,
    backbone: Option<&dyn Backbone>,
) -> Result<(String, String), WeightsError> {
    let refuse = |message: &str| Err(WeightsError::Export(format!("{}: {message}", checkpoint.path().display())));
    let has = |prefix: &str| checkpoint.names().any(|name| name.starts_with(prefix));
    let naming = || match backbone {
        Some(backbone) => Some(backbone.naming()),
        // A trunk by itself tells by what it fits.
        None => {
            let name = fits(checkpoint).first()?.backbone;
            Some(crate::backbone(name, &toml::Table::new()).ok()?.naming())
        }
    };
    let from = if has(TRUNK) {
        TRUNK
    } else if has(VISUAL) {
        VISUAL
    } else {
        ""
    };
    let naming = match from {
        TRUNK => Some(Naming::Timm),
        VISUAL => Some(Naming::OpenClip),
        _ => naming(),
    };
    match (form, naming) {
        (_, None) => refuse("its image tower is of no registered backbone; say which it is by --backbone"),
        (Form::Timm, Some(Naming::OpenClip)) => {
            refuse("its image tower has open_clip's names, and timm has no such model; write it as open_clip")
        }
        (Form::Timm, Some(Naming::Timm)) => Ok((from.to_owned(), String::new())),
        (Form::OpenClip, Some(naming)) => {
            let to = if naming == Naming::Timm { TRUNK } else { VISUAL };
            Ok((from.to_owned(), to.to_owned()))
        }
    }
}
