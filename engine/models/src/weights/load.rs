//! From a file's names to a store's.

use mcpipe_graph::ParamStore;

use super::take::{TakeOptions, change};
use super::{Checkpoint, Mismatch, WeightsError};

/// Which names of a file are which parameters of a store: prefixes of both, the file's longest match deciding. Names
/// that no prefix covers belong to models that are not asked for.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct NameMap {
    pairs: Vec<(String, String)>,
}

/// What [`Checkpoint::load`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Loaded {
    /// Tensors taken.
    pub taken: usize,
    /// Tensors of the file that the name map does not cover.
    pub not_asked_for: usize,
}

/// Top-level names of a text tower in open_clip's `CLIP` form.
pub const TEXT_ROOTS: [&str; 5] =
    ["token_embedding.", "positional_embedding", "transformer.", "ln_final.", "text_projection"];

impl NameMap {
    /// An empty map.
    pub fn new() -> Self {
        NameMap::default()
    }

    /// Names that start with `file` in the file start with `store` in the store. Either may be empty, or a whole name.
    pub fn and(mut self, file: impl Into<String>, store: impl Into<String>) -> Self {
        self.pairs.push((file.into(), store.into()));
        self
    }

    /// A file that holds just one model, whose parameters stand under `path` in the store (`student.image`).
    pub fn whole(path: &str) -> Self {
        NameMap::new().and("", path_prefix(path))
    }

    /// Where `checkpoint` keeps the image tower of a CLIP model: `visual.trunk.` (timm tower), `visual.` (open_clip's
    /// own), or everything (a trunk by itself).
    pub fn and_image(self, checkpoint: &Checkpoint, path: &str) -> Self {
        let has = |p: &str| checkpoint.names().any(|n| n.starts_with(p));
        let file = ["visual.trunk.", "visual."].into_iter().find(|p| has(p)).unwrap_or("");
        self.and(file, path_prefix(path))
    }

    /// Where `checkpoint` keeps the text tower of a CLIP model: `text.` (`CustomTextCLIP`), the top level beside
    /// `visual.` (`CLIP`), or everything (a text tower by itself).
    pub fn and_text(self, checkpoint: &Checkpoint, path: &str) -> Self {
        self.and_text_of(checkpoint, path, &TEXT_ROOTS)
    }

    /// As [`and_text`](Self::and_text), for a tower whose names begin with `roots` where it stands at the top level (see
    /// [`TextEncoder::roots`](crate::TextEncoder::roots)).
    pub fn and_text_of(self, checkpoint: &Checkpoint, path: &str, roots: &[&str]) -> Self {
        if checkpoint.names().any(|n| n.starts_with("text.")) {
            return self.and("text.", path_prefix(path));
        }
        let path = path_prefix(path);
        roots.iter().fold(self, |map, root| map.and(*root, format!("{path}{root}")))
    }

    /// The store's name of the file's `name`.
    pub fn to_store(&self, name: &str) -> Option<String> {
        let covers = self.pairs.iter().filter(|(file, _)| name.starts_with(file.as_str()));
        let (file, store) = covers.max_by_key(|(file, _)| file.len())?;
        Some(format!("{store}{}", &name[file.len()..]))
    }

    /// The file's name of the store's `name`.
    pub fn to_file(&self, name: &str) -> Option<String> {
        let covers = self.pairs.iter().filter(|(_, store)| name.starts_with(store.as_str()));
        let (file, store) = covers.max_by_key(|(_, store)| store.len())?;
        Some(format!("{file}{}", &name[store.len()..]))
    }
}

/// `path` as a prefix of names.
pub(crate) fn path_prefix(path: &str) -> String {
    if path.is_empty() { String::new() } else { format!("{path}.") }
}

/// Whether a tensor can stand for a parameter. A scalar may be written with or without an axis.
pub(super) fn same_shape(a: &[usize], b: &[usize]) -> bool {
    a == b || (a.iter().product::<usize>() == 1 && b.iter().product::<usize>() == 1 && a.len() <= 1 && b.len() <= 1)
}

impl Checkpoint {
    /// Copies the tensors that `names` covers into `store`, which must hold every one of their parameters already
    /// (after [`ParamStore::init`]). All is checked before anything is changed.
    ///
    /// # Errors
    /// [`WeightsError::Mismatch`] with every missing, unexpected and wrong-shape name; element types that are not read.
    pub fn load(&self, store: &mut ParamStore, names: &NameMap) -> Result<Loaded, WeightsError> {
        self.load_with(store, names, &TakeOptions::default())
    }

    /// As [`load`](Self::load), with position embeddings resized to the model's grid or context.
    ///
    /// # Errors
    /// As [`load`](Self::load).
    pub fn load_resized(&self, store: &mut ParamStore, names: &NameMap) -> Result<Loaded, WeightsError> {
        self.load_with(store, names, &TakeOptions { resize_position: true, ..TakeOptions::default() })
    }

    fn load_with(
        &self,
        store: &mut ParamStore,
        names: &NameMap,
        options: &TakeOptions,
    ) -> Result<Loaded, WeightsError> {
        let mut mismatch = Mismatch::default();
        let mut values = Vec::new();
        let mut not_asked_for = 0;
        for name in self.names() {
            let Some(target) = names.to_store(name) else {
                not_asked_for += 1;
                continue;
            };
            let shape = self.shape(name).unwrap_or_default();
            match store.get(&target) {
                None => mismatch.unexpected.push(name.to_owned()),
                Some(p) => match change(p, name, shape, options) {
                    Some(how) => values.push((name, target, how)),
                    None => mismatch.wrong_shape.push((name.to_owned(), shape.to_vec(), p.shape.clone())),
                },
            }
        }
        for p in store.params() {
            if let Some(name) = names.to_file(&p.name)
                && !self.contains(&name)
            {
                mismatch.missing.push(name);
            }
        }
        if !mismatch.is_empty() {
            return Err(WeightsError::Mismatch { path: self.path().to_owned(), mismatch: Box::new(mismatch) });
        }
        let taken = values.len();
        let read = values.into_iter().map(|(name, target, how)| Ok((name, target, how, self.values(name)?)));
        for (name, target, how, data) in read.collect::<Result<Vec<_>, WeightsError>>()? {
            if let (Some(p), Some(data), Some(shape)) = (store.get_mut(&target), data, self.shape(name)) {
                p.data = how.apply(data, shape, &p.shape);
            }
        }
        Ok(Loaded { taken, not_asked_for })
    }
}
