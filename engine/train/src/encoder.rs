//! Towers run forward in batches of a fixed size: for evaluation, and the frozen text encoder with its cache.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::fmt;
use std::rc::Rc;
use std::sync::Arc;

use mcpipe_graph::{Feed, GraphBuilder, ParamStore, StepGraph};
use mcpipe_models::{LastToken, ModelError};

use crate::compute::Compute;
use crate::error::TrainError;
use crate::forward::Forward;
use crate::tower::{Head, ImageTower, TextTower};

/// Turns a caption into exactly the text tower's context length of token ids.
pub type Tokenize = Arc<dyn Fn(&str) -> Vec<i32> + Send + Sync>;

/// Token ids `[n, L]` and last positions `[n]` of captions.
pub(crate) fn tokens(
    tokenize: &Tokenize,
    context_length: usize,
    last: LastToken,
    captions: &[&str],
) -> Result<(Vec<i32>, Vec<i32>), TrainError> {
    let mut ids = Vec::with_capacity(captions.len() * context_length);
    for caption in captions {
        let row = tokenize(caption);
        if row.len() != context_length {
            let got = row.len();
            return Err(TrainError::Setup(format!(
                "the tokenizer gave {got} ids where the text tower takes {context_length}"
            )));
        }
        ids.extend(row);
    }
    let eot = last.positions(&ids, context_length);
    Ok((ids, eot))
}

enum Input {
    Images { values: usize },
    Embeddings { dim: usize },
    Captions { tokenize: Tokenize, context_length: usize, last: LastToken },
}

/// What a tower gives for some samples.
struct Outputs {
    embedding: Vec<f32>,
    taps: Vec<Vec<f32>>,
}

/// A tower in evaluation mode, run in batches of a fixed size; short batches are filled up with zeros. It holds no
/// weights: each call names the store, so that one encoder serves the trained and the averaged weights.
pub struct Encoder {
    executor: Forward,
    input: Input,
    batch: usize,
    dim: usize,
    taps: Vec<String>,
}

impl fmt::Debug for Encoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Encoder").field("batch", &self.batch).field("dim", &self.dim).finish_non_exhaustive()
    }
}

const EMBEDDING: &str = "embedding";

/// Output of the graph that holds a tap.
fn tap_output(tap: &str) -> String {
    format!("tap {tap}")
}

impl Encoder {
    fn graph(
        batch: usize,
        build: impl FnOnce(&mut GraphBuilder) -> Result<mcpipe_graph::Tensor, ModelError>,
    ) -> Result<(StepGraph, usize), ModelError> {
        if batch == 0 {
            return Err(ModelError::Dims("an encoder needs a batch of one at least".into()));
        }
        let mut g = GraphBuilder::new(false);
        let embedding_bd = build(&mut g)?;
        g.output(EMBEDDING, &embedding_bd);
        Ok((g.finish(), embedding_bd.shape().last().copied().unwrap_or(0)))
    }

    fn image_graph(tower: &dyn ImageTower, taps: &[String], batch: usize) -> Result<(StepGraph, usize), ModelError> {
        let side = tower.image_size();
        Self::graph(batch, |g| {
            let x_bhwc = g.input("images", &[batch, side, side, 3]);
            let encoded = tower.build(g, &x_bhwc, taps)?;
            for (name, tap) in &encoded.taps {
                g.output(tap_output(name), &tap.value);
            }
            Ok(encoded.embedding_bd)
        })
    }

    fn text_graph(tower: &dyn TextTower, batch: usize) -> Result<(StepGraph, usize), ModelError> {
        Self::graph(batch, |g| {
            let ids_bl = g.int_input("ids", &[batch, tower.context_length()]);
            let eot_b = g.int_input("eot", &[batch]);
            tower.build(g, &ids_bl, &eot_b)
        })
    }

    fn new(
        built: (StepGraph, usize),
        input: Input,
        batch: usize,
        store: &ParamStore,
        compute: &Compute,
    ) -> Result<Self, TrainError> {
        let (graph, dim) = built;
        let executor = Forward::new(graph, store, compute)?;
        Ok(Encoder { executor, input, batch, dim, taps: Vec::new() })
    }

    /// An image tower over normalised images. `store` must hold its parameters.
    ///
    /// # Errors
    /// A tower that can't be built, or weights that don't fit it.
    pub fn images(
        tower: &dyn ImageTower,
        batch: usize,
        store: &ParamStore,
        compute: &Compute,
    ) -> Result<Self, TrainError> {
        Self::tapped(tower, &[], batch, store, compute)
    }

    /// As [`images`](Self::images), for [`encode_images_and_taps`](Self::encode_images_and_taps).
    ///
    /// # Errors
    /// As [`images`](Self::images), or a tap that the tower lacks.
    pub fn tapped(
        tower: &dyn ImageTower,
        taps: &[String],
        batch: usize,
        store: &ParamStore,
        compute: &Compute,
    ) -> Result<Self, TrainError> {
        let side = tower.image_size();
        let input = Input::Images { values: side * side * 3 };
        let encoder = Self::new(Self::image_graph(tower, taps, batch)?, input, batch, store, compute)?;
        Ok(Encoder { taps: taps.to_vec(), ..encoder })
    }

    /// A text tower over captions.
    ///
    /// # Errors
    /// As [`images`](Self::images).
    pub fn captions(
        tower: &dyn TextTower,
        tokenize: Tokenize,
        batch: usize,
        store: &ParamStore,
        compute: &Compute,
    ) -> Result<Self, TrainError> {
        let (context_length, last) = (tower.context_length(), tower.last_token());
        let input = Input::Captions { tokenize, context_length, last };
        Self::new(Self::text_graph(tower, batch)?, input, batch, store, compute)
    }

    /// A projection over embeddings of `dim` (the frozen text encoder's).
    ///
    /// # Errors
    /// As [`images`](Self::images).
    pub fn embeddings(
        head: &dyn Head,
        dim: usize,
        batch: usize,
        store: &ParamStore,
        compute: &Compute,
    ) -> Result<Self, TrainError> {
        let built = Self::graph(batch, |g| {
            let x_bd = g.input("embeddings", &[batch, dim]);
            head.build(g, &x_bd)
        })?;
        Self::new(built, Input::Embeddings { dim }, batch, store, compute)
    }

    /// Parameters that an image tower declares, initialised from `seed`, beside those that `store` holds.
    ///
    /// # Errors
    /// As [`images`](Self::images).
    pub fn init_images(tower: &dyn ImageTower, store: &mut ParamStore, seed: u64) -> Result<(), TrainError> {
        Ok(store.init(&Self::image_graph(tower, &[], 1)?.0, seed)?)
    }

    /// Parameters that a text tower declares, initialised from `seed`, beside those that `store` holds.
    ///
    /// # Errors
    /// As [`images`](Self::images).
    pub fn init_captions(tower: &dyn TextTower, store: &mut ParamStore, seed: u64) -> Result<(), TrainError> {
        Ok(store.init(&Self::text_graph(tower, 1)?.0, seed)?)
    }

    /// Dimension of the embeddings.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Samples of one forward pass.
    pub fn batch(&self) -> usize {
        self.batch
    }

    /// Bytes of its activations.
    pub fn bytes(&self) -> usize {
        self.executor.bytes()
    }

    /// Room for what `n` samples give.
    fn outputs(&self, n: usize) -> Outputs {
        Outputs { embedding: Vec::with_capacity(n * self.dim), taps: vec![Vec::new(); self.taps.len()] }
    }

    fn forward(
        &mut self,
        store: &ParamStore,
        feeds: &[(&str, Feed<'_>)],
        n: usize,
        out: &mut Outputs,
    ) -> Result<(), TrainError> {
        self.executor.run(store, feeds)?;
        out.embedding.extend_from_slice(&self.executor.output(EMBEDDING)?[..n * self.dim]);
        for (tap, kept) in self.taps.iter().zip(&mut out.taps) {
            let values = self.executor.output(&tap_output(tap))?;
            kept.extend_from_slice(&values[..values.len() / self.batch * n]);
        }
        Ok(())
    }

    fn rows(&mut self, store: &ParamStore, name: &str, width: usize, values: &[f32]) -> Result<Outputs, TrainError> {
        if !values.len().is_multiple_of(width.max(1)) {
            return Err(TrainError::Setup(format!("{} values are not whole samples of {width}", values.len())));
        }
        let mut out = self.outputs(values.len() / width.max(1));
        let mut padded = Vec::new();
        for part in values.chunks(self.batch * width) {
            let n = part.len() / width;
            let fed = if n == self.batch {
                part
            } else {
                padded.clear();
                padded.extend_from_slice(part);
                padded.resize(self.batch * width, 0.0);
                &padded
            };
            self.forward(store, &[(name, Feed::F32(fed))], n, &mut out)?;
        }
        Ok(out)
    }

    /// Embeddings `[n, D]`, not normalised, of normalised images `[n, S, S, 3]`.
    ///
    /// # Errors
    /// Another kind of encoder, values that are no whole images, or a node that fails.
    pub fn encode_images(&mut self, store: &ParamStore, images: &[f32]) -> Result<Vec<f32>, TrainError> {
        Ok(self.encode_images_and_taps(store, images)?.0)
    }

    /// As [`encode_images`](Self::encode_images), and each tap's values in the order asked, of
    /// [`TapShape::shape`](mcpipe_models::TapShape::shape) for n images.
    ///
    /// # Errors
    /// As [`encode_images`](Self::encode_images).
    pub fn encode_images_and_taps(
        &mut self,
        store: &ParamStore,
        images: &[f32],
    ) -> Result<(Vec<f32>, Vec<Vec<f32>>), TrainError> {
        match self.input {
            Input::Images { values } => {
                let out = self.rows(store, "images", values, images)?;
                Ok((out.embedding, out.taps))
            }
            _ => Err(TrainError::Setup("this encoder takes no images".into())),
        }
    }

    /// Projections `[n, D']` of embeddings `[n, D]`.
    ///
    /// # Errors
    /// As [`encode_images`](Self::encode_images).
    pub fn encode_embeddings(&mut self, store: &ParamStore, embeddings: &[f32]) -> Result<Vec<f32>, TrainError> {
        match self.input {
            Input::Embeddings { dim } => Ok(self.rows(store, "embeddings", dim, embeddings)?.embedding),
            _ => Err(TrainError::Setup("this encoder takes no embeddings".into())),
        }
    }

    /// Embeddings `[n, D]`, not normalised, of captions.
    ///
    /// # Errors
    /// As [`encode_images`](Self::encode_images).
    pub fn encode_captions(&mut self, store: &ParamStore, captions: &[&str]) -> Result<Vec<f32>, TrainError> {
        let Input::Captions { tokenize, context_length, last } = &self.input else {
            return Err(TrainError::Setup("this encoder takes no captions".into()));
        };
        let (tokenize, context_length, last) = (Arc::clone(tokenize), *context_length, *last);
        let mut out = self.outputs(captions.len());
        for part in captions.chunks(self.batch) {
            let (mut ids, mut eot) = tokens(&tokenize, context_length, last, part)?;
            ids.resize(self.batch * context_length, 0);
            eot.resize(self.batch, 0);
            self.forward(store, &[("ids", Feed::I32(&ids)), ("eot", Feed::I32(&eot))], part.len(), &mut out)?;
        }
        Ok(out.embedding)
    }
}

/// Captions of one forward pass of the frozen text encoder.
const CAPTION_BATCH: usize = 32;
/// Bytes of cached caption embeddings, beyond which those not asked for lately are dropped.
const CACHE_BYTES: usize = 256 << 20;

/// Embeddings by caption in two generations: when the young one is full it becomes the old one, and what was in the old
/// one and not asked for since is dropped.
#[derive(Debug, Default)]
struct Cache {
    young: HashMap<String, Arc<[f32]>>,
    old: HashMap<String, Arc<[f32]>>,
    generation: usize,
}

impl Cache {
    fn get(&mut self, caption: &str) -> Option<Arc<[f32]>> {
        if let Some(found) = self.young.get(caption) {
            return Some(Arc::clone(found));
        }
        let (key, value) = self.old.remove_entry(caption)?;
        self.insert(key, Arc::clone(&value));
        Some(value)
    }

    fn insert(&mut self, caption: String, embedding: Arc<[f32]>) {
        if self.young.len() >= self.generation {
            self.old = std::mem::take(&mut self.young);
        }
        self.young.insert(caption, embedding);
    }
}

struct Inner {
    encoder: Encoder,
    store: Arc<ParamStore>,
    cache: Cache,
    computed: u64,
}

/// A frozen text encoder: each caption's embedding is computed once and kept by the caption's text. Clones share the
/// encoder and its cache, within one thread: dfdx's tapes, which an executor can hold, don't cross threads.
#[derive(Clone)]
pub struct CaptionEncoder {
    inner: Rc<RefCell<Inner>>,
    dim: usize,
}

impl fmt::Debug for CaptionEncoder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("CaptionEncoder").field("dim", &self.dim).finish_non_exhaustive()
    }
}

impl CaptionEncoder {
    /// A text tower with its weights.
    ///
    /// # Errors
    /// A tower that can't be built, or weights that don't fit it.
    pub fn new(
        tower: &dyn TextTower,
        tokenize: Tokenize,
        store: Arc<ParamStore>,
        compute: &Compute,
    ) -> Result<Self, TrainError> {
        let encoder = Encoder::captions(tower, tokenize, CAPTION_BATCH, &store, compute)?;
        let dim = encoder.dim();
        let generation = (CACHE_BYTES / 2 / (dim.max(1) * size_of::<f32>())).max(2 * CAPTION_BATCH);
        let cache = Cache { generation, ..Cache::default() };
        Ok(CaptionEncoder { inner: Rc::new(RefCell::new(Inner { encoder, store, cache, computed: 0 })), dim })
    }

    /// Dimension of the embeddings.
    pub fn dim(&self) -> usize {
        self.dim
    }

    /// Captions that were run through the tower so far; the rest came from the cache.
    pub fn computed(&self) -> u64 {
        self.inner.borrow().computed
    }

    /// Bytes of the tower's activations.
    pub fn bytes(&self) -> usize {
        self.inner.borrow().encoder.bytes()
    }

    /// Number of the tower's trained values.
    pub fn parameters(&self) -> usize {
        self.inner.borrow().store.trained_len()
    }

    /// Embeddings `[n, D]`, not normalised.
    ///
    /// # Errors
    /// A node that fails.
    pub fn embed<S: AsRef<str>>(&self, captions: &[S]) -> Result<Vec<f32>, TrainError> {
        let mut guard = self.inner.borrow_mut();
        let Inner { encoder, store, cache, computed } = &mut *guard;
        // Held here as well as in the cache: a batch larger than a generation must not lose its own captions.
        let mut found: HashMap<&str, Arc<[f32]>> = HashMap::new();
        let (mut missing, mut asked): (Vec<&str>, HashSet<&str>) = (Vec::new(), HashSet::new());
        for caption in captions {
            let caption = caption.as_ref();
            if found.contains_key(caption) {
                continue;
            }
            match cache.get(caption) {
                Some(embedding) => drop(found.insert(caption, embedding)),
                None if asked.insert(caption) => missing.push(caption),
                None => {}
            }
        }
        let embeddings = encoder.encode_captions(store, &missing)?;
        *computed += missing.len() as u64;
        for (caption, embedding) in missing.iter().zip(embeddings.chunks_exact(self.dim.max(1))) {
            let embedding: Arc<[f32]> = embedding.into();
            cache.insert((*caption).to_owned(), Arc::clone(&embedding));
            found.insert(caption, embedding);
        }
        let mut out = Vec::with_capacity(captions.len() * self.dim);
        for caption in captions {
            if let Some(embedding) = found.get(caption.as_ref()) {
                out.extend_from_slice(embedding);
            }
        }
        Ok(out)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cache_keeps_what_is_asked_for_and_stays_bounded() {
        let mut cache = Cache { generation: 2, ..Cache::default() };
        let value = |x: f32| -> Arc<[f32]> { [x].into() };
        for (i, c) in ["a", "b", "c"].iter().enumerate() {
            cache.insert((*c).to_owned(), value(i as f32));
        }
        assert_eq!(cache.get("a").as_deref(), Some(&[0.0][..]), "moved from the old generation to the young");
        for c in ["d", "e", "f"] {
            cache.insert(c.to_owned(), value(9.0));
        }
        assert!(cache.young.len() + cache.old.len() <= 4);
        assert_eq!(cache.get("b"), None);
    }
}
