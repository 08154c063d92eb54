//! Checkpoints: folders `step-000100` that appear whole or not at all.
//!
//! `model.safetensors` holds the trained weights under their published names; `state.safetensors` the optimiser's state
//! and the running averages; `state.json` everything else. They are written into a folder with a temporary name, synced,
//! and the folder is renamed. Each file carries a checksum.

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use mcpipe_graph::ParamStore;
use mcpipe_models::weights::{self, Entry, write_atomic, write_safetensors};
use serde::{Deserialize, Serialize};

use crate::ema::Average;
use crate::error::TrainError;
use crate::optim::OptimizerState;
use crate::schedule::LrState;

/// Version of the checkpoint's layout.
pub const CHECKPOINT_FORMAT: u32 = 1;

const MODEL: &str = "model.safetensors";
const TENSORS: &str = "state.safetensors";
const STATE: &str = "state.json";

/// What the training counts.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Counters {
    /// Steps skipped since the last good one.
    pub skipped_in_a_row: u32,
    /// Steps skipped in all.
    pub skipped: u64,
    /// Good steps since the last skipped one.
    pub good_in_a_row: u64,
    /// Factor on the learning rate, halved by a skipped step.
    pub lr_scale: f64,
}

impl Default for Counters {
    fn default() -> Self {
        Counters { skipped_in_a_row: 0, skipped: 0, good_in_a_row: 0, lr_scale: 1.0 }
    }
}

/// A training's state apart from its tensors.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CheckpointState {
    /// [`CHECKPOINT_FORMAT`].
    pub format: u32,
    /// The setup's identity.
    pub identity: String,
    /// Steps done.
    pub step: u64,
    /// Where the data source stands, in its own form.
    pub cursor: serde_json::Value,
    /// What the learning-rate schedule remembers.
    pub schedule: LrState,
    /// Counters.
    pub counters: Counters,
    /// Name of the optimiser.
    pub optimizer: String,
    /// Updates that it did.
    pub updates: u64,
}

#[derive(Serialize, Deserialize)]
struct Sealed {
    /// BLAKE3 of `state` as compact JSON.
    checksum: String,
    state: serde_json::Value,
}

fn slot_name(slot: &str, param: &str) -> String {
    format!("optimizer.{slot}/{param}")
}

fn average_name(average: &str, param: &str) -> String {
    format!("average.{average}/{param}")
}

/// What a checkpoint holds, borrowed from a training.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Contents<'a> {
    pub state: &'a CheckpointState,
    pub store: &'a ParamStore,
    pub slot_names: &'a [&'static str],
    pub optimizer: &'a OptimizerState,
    pub averages: &'a [Average],
}

/// The folder of a training's checkpoints.
#[derive(Clone, Debug)]
pub struct Checkpoints {
    dir: PathBuf,
    keep: usize,
}

impl Checkpoints {
    /// Checkpoints below `dir` (made when the first is written), of which the newest `keep` are kept.
    pub fn new(dir: impl Into<PathBuf>, keep: usize) -> Self {
        Checkpoints { dir: dir.into(), keep: keep.max(1) }
    }

    /// The folder.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The checkpoints by step, oldest first. A folder that does not exist holds none.
    ///
    /// # Errors
    /// A folder that can't be read.
    pub fn list(&self) -> Result<Vec<(u64, PathBuf)>, TrainError> {
        let entries = match fs::read_dir(&self.dir) {
            Ok(entries) => entries,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
            Err(e) => return Err(TrainError::io("list", &self.dir)(e)),
        };
        let mut found = Vec::new();
        for entry in entries {
            let path = entry.map_err(TrainError::io("list", &self.dir))?.path();
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if let Some(step) = name.strip_prefix("step-").and_then(|n| n.parse().ok()) {
                found.push((step, path));
            }
        }
        found.sort();
        Ok(found)
    }

    /// The newest checkpoint.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    pub fn latest(&self) -> Result<Option<PathBuf>, TrainError> {
        Ok(self.list()?.pop().map(|(_, path)| path))
    }

    /// The newest checkpoint that is whole, and what is wrong with newer ones.
    ///
    /// # Errors
    /// As [`list`](Self::list).
    pub fn newest_whole(&self) -> Result<(Option<Checkpoint>, Vec<TrainError>), TrainError> {
        let mut refused = Vec::new();
        for (_, path) in self.list()?.into_iter().rev() {
            match Checkpoint::open(&path) {
                Ok(checkpoint) => return Ok((Some(checkpoint), refused)),
                Err(e) => refused.push(e),
            }
        }
        Ok((None, refused))
    }

    /// Writes a checkpoint, then deletes those that are too many. On an error nothing is left behind.
    pub(crate) fn save(&self, contents: Contents<'_>) -> Result<PathBuf, TrainError> {
        fs::create_dir_all(&self.dir).map_err(TrainError::io("create", &self.dir))?;
        let path = self.dir.join(format!("step-{:06}", contents.state.step));
        let temporary = self.dir.join(format!(".step-{:06}.tmp", contents.state.step));
        self.clear_temporaries();
        let written = write(&temporary, contents).and_then(|()| put_in_place(&temporary, &path));
        if let Err(e) = written {
            // Best effort: the error that is reported is the one that matters.
            let _ = fs::remove_dir_all(&temporary);
            return Err(e);
        }
        sync(&self.dir)?;
        let all = self.list()?;
        for (_, old) in all.iter().rev().filter(|(_, p)| *p != path).skip(self.keep - 1) {
            fs::remove_dir_all(old).map_err(TrainError::io("delete the old checkpoint", old))?;
        }
        Ok(path)
    }

    /// Removes what an interrupted write left.
    fn clear_temporaries(&self) {
        let Ok(entries) = fs::read_dir(&self.dir) else { return };
        for path in entries.flatten().map(|e| e.path()) {
            let name = path.file_name().and_then(|n| n.to_str()).unwrap_or_default();
            if name.starts_with(".step-") && name.ends_with(".tmp") {
                // What can't be removed shows when the folder is made again.
                let _ = fs::remove_dir_all(&path);
            }
        }
    }
}

fn write(dir: &Path, c: Contents<'_>) -> Result<(), TrainError> {
    fs::create_dir(dir).map_err(TrainError::io("create", dir))?;
    let metadata: BTreeMap<String, String> =
        [("identity".to_owned(), c.state.identity.clone()), ("step".to_owned(), c.state.step.to_string())].into();
    let mut model: BTreeMap<String, Entry<'_>> = BTreeMap::new();
    for p in c.store.params() {
        model.insert(p.name.clone(), Entry::F32(p.shape.clone(), Cow::Borrowed(&p.data)));
    }
    write_safetensors(&dir.join(MODEL), &model, &metadata)?;
    let mut tensors: BTreeMap<String, Entry<'_>> = BTreeMap::new();
    for (p, slots) in c.store.params().iter().zip(&c.optimizer.slots) {
        for (slot, data) in c.slot_names.iter().zip(slots) {
            tensors.insert(slot_name(slot, &p.name), Entry::F32(p.shape.clone(), Cow::Borrowed(data)));
        }
    }
    for average in c.averages {
        for p in average.store.params() {
            tensors.insert(average_name(&average.name, &p.name), Entry::F32(p.shape.clone(), Cow::Borrowed(&p.data)));
        }
    }
    write_safetensors(&dir.join(TENSORS), &tensors, &metadata)?;
    let path = dir.join(STATE);
    let text = |e: serde_json::Error| TrainError::Checkpoint { path: path.clone(), reason: e.to_string() };
    let state = serde_json::to_value(c.state).map_err(text)?;
    let sealed = Sealed { checksum: checksum(&state), state };
    let json = serde_json::to_vec_pretty(&sealed).map_err(text)?;
    write_atomic(&path, |file| file.write_all(&json))?;
    sync(dir)
}

fn checksum(state: &serde_json::Value) -> String {
    blake3::hash(state.to_string().as_bytes()).to_hex().to_string()
}

/// Renames the finished folder; one of the same step, written before a resume, makes way for it.
fn put_in_place(temporary: &Path, path: &Path) -> Result<(), TrainError> {
    if path.exists() {
        let old = temporary.with_extension("old.tmp");
        fs::rename(path, &old).map_err(TrainError::io("move away", path))?;
        fs::rename(temporary, path).map_err(TrainError::io("put in place", path))?;
        return fs::remove_dir_all(&old).map_err(TrainError::io("delete", &old));
    }
    fs::rename(temporary, path).map_err(TrainError::io("put in place", path))
}

fn sync(dir: &Path) -> Result<(), TrainError> {
    if cfg!(unix) {
        fs::File::open(dir).and_then(|d| d.sync_all()).map_err(TrainError::io("sync", dir))?;
    }
    Ok(())
}

/// A checkpoint that was found whole.
#[derive(Debug)]
pub struct Checkpoint {
    path: PathBuf,
    state: CheckpointState,
    model: weights::Checkpoint,
    tensors: weights::Checkpoint,
}

impl Checkpoint {
    /// Opens a checkpoint's folder and verifies that it is whole.
    ///
    /// # Errors
    /// A missing or damaged file, or another format.
    pub fn open(path: &Path) -> Result<Self, TrainError> {
        let refuse = |reason: String| TrainError::Checkpoint { path: path.to_owned(), reason };
        for name in [STATE, MODEL, TENSORS] {
            if !path.join(name).is_file() {
                return Err(refuse(format!("it has no `{name}`: it is no checkpoint, or not whole")));
            }
        }
        let file = path.join(STATE);
        let text = fs::read_to_string(&file).map_err(TrainError::io("read", &file))?;
        let sealed: Sealed = serde_json::from_str(&text).map_err(|e| refuse(format!("`{STATE}` is damaged: {e}")))?;
        if let Some(format) = sealed.state.get("format").and_then(serde_json::Value::as_u64)
            && format != u64::from(CHECKPOINT_FORMAT)
        {
            return Err(refuse(format!("its format is {format}, this version reads {CHECKPOINT_FORMAT}")));
        }
        if checksum(&sealed.state) != sealed.checksum {
            return Err(refuse(format!("the checksum of `{STATE}` does not match its content")));
        }
        let state: CheckpointState =
            serde_json::from_value(sealed.state).map_err(|e| refuse(format!("`{STATE}` is damaged: {e}")))?;
        let open = |name: &str| weights::Checkpoint::open(&path.join(name)).map_err(|e| refuse(e.to_string()));
        let (model, tensors) = (open(MODEL)?, open(TENSORS)?);
        for file in [&model, &tensors] {
            if file.metadata().get("step") != Some(&state.step.to_string()) {
                return Err(refuse(format!("{} is not of the same step as `{STATE}`", file.path().display())));
            }
        }
        Ok(Checkpoint { path: path.to_owned(), state, model, tensors })
    }

    /// Its folder.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Everything but the tensors.
    pub fn state(&self) -> &CheckpointState {
        &self.state
    }

    /// The trained weights, as a weight file.
    pub fn model(&self) -> &weights::Checkpoint {
        &self.model
    }

    /// Where the weights lie: a safetensors file under the parameters' published names.
    pub fn model_file(&self) -> PathBuf {
        self.path.join(MODEL)
    }

    /// Fills a training's tensors. Either all are replaced or none.
    pub(crate) fn restore(
        &self,
        identity: &str,
        store: &mut ParamStore,
        optimizer: (&str, &[&'static str], &mut OptimizerState),
        averages: &mut [Average],
    ) -> Result<(), TrainError> {
        let refuse = |reason: String| TrainError::Checkpoint { path: self.path.clone(), reason };
        let mut expected: Vec<(&weights::Checkpoint, String, Vec<usize>)> = Vec::new();
        for p in store.params() {
            expected.push((&self.model, p.name.clone(), p.shape.clone()));
        }
        if let Some(reason) = mismatch(&self.model, &expected) {
            return Err(refuse(format!("it is of another model: {reason}")));
        }
        if self.state.identity != identity {
            return Err(refuse(
                "it was written by a training with other settings or data; start anew with `--fresh`".into(),
            ));
        }
        let (name, slot_names, state) = optimizer;
        if self.state.optimizer != name {
            return Err(refuse(format!(
                "it was written with the optimizer `{}`, this training has `{name}`",
                self.state.optimizer
            )));
        }
        expected.clear();
        for (p, slots) in store.params().iter().zip(&state.slots) {
            for (slot, _) in slot_names.iter().zip(slots) {
                expected.push((&self.tensors, slot_name(slot, &p.name), p.shape.clone()));
            }
        }
        for average in &*averages {
            for p in average.store.params() {
                expected.push((&self.tensors, average_name(&average.name, &p.name), p.shape.clone()));
            }
        }
        if let Some(reason) = mismatch(&self.tensors, &expected) {
            return Err(refuse(format!("its optimizer state or averages are of another training: {reason}")));
        }
        let read = |file: &weights::Checkpoint, name: &str| {
            let values = file.values(name).map_err(|e| refuse(e.to_string()))?;
            values.ok_or_else(|| refuse(format!("`{name}` is missing")))
        };
        let model: Vec<Vec<f32>> =
            store.params().iter().map(|p| read(&self.model, &p.name)).collect::<Result<_, _>>()?;
        let others: Vec<Vec<f32>> =
            expected.iter().map(|(file, name, _)| read(file, name)).collect::<Result<_, _>>()?;
        for (p, data) in store.params_mut().iter_mut().zip(model) {
            p.data = data;
        }
        let mut others = others.into_iter();
        for held in state.slots.iter_mut().flatten() {
            *held = others.next().unwrap_or_default();
        }
        for p in averages.iter_mut().flat_map(|a| a.store.params_mut()) {
            p.data = others.next().unwrap_or_default();
        }
        state.step = self.state.updates;
        Ok(())
    }
}

/// How a file's tensors differ from those expected; at most a few names of each kind.
fn mismatch(file: &weights::Checkpoint, expected: &[(&weights::Checkpoint, String, Vec<usize>)]) -> Option<String> {
    let names: std::collections::HashSet<&str> = expected.iter().map(|(_, n, _)| n.as_str()).collect();
    let mut missing = Vec::new();
    let mut shapes = Vec::new();
    for (_, name, shape) in expected {
        match file.shape(name) {
            None => missing.push(name.clone()),
            Some(held) if held != shape => shapes.push(format!("{name} {held:?} instead of {shape:?}")),
            Some(_) => {}
        }
    }
    let unexpected: Vec<String> = file.names().filter(|n| !names.contains(n)).map(str::to_owned).collect();
    let part = |what: &str, list: &[String]| {
        let shown = list.iter().take(3).cloned().collect::<Vec<_>>().join(", ");
        let more = if list.len() > 3 { format!(" and {} more", list.len() - 3) } else { String::new() };
        (!list.is_empty()).then(|| format!("{what} {shown}{more}"))
    };
    let parts = [part("missing", &missing), part("unexpected", &unexpected), part("wrong shape", &shapes)];
    let parts: Vec<String> = parts.into_iter().flatten().collect();
    (!parts.is_empty()).then(|| parts.join("; "))
}
