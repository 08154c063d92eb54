//! Checkpoints of `torch.save`: the zip form of today, and the form of pickles one after the other of releases before
//! 1.6. From either come the tensors of its state dict; nothing of it is executed.

use std::collections::{BTreeMap, HashMap};

use super::element::Element;
use super::pickle::{Fault, Id, Node, Pickle};
use super::slot::{Slot, count};
use super::torch_zip::Archive;

/// Why a checkpoint is not read.
#[derive(Debug)]
pub(super) enum Problem {
    /// Of another kind than is read.
    Kind(String),
    /// Damaged.
    Corrupt(String),
    /// Whole, but asks for what is not done.
    Refused(String),
}

/// The tensors of a state dict under the file's names.
#[derive(Debug)]
pub(super) struct Contents {
    pub tensors: BTreeMap<String, Slot>,
    /// Keys under which the state dict lay, outermost first.
    pub wrappers: Vec<String>,
}

/// Keys of state dicts in checkpoints of trainings. The average of the weights comes before the weights, as in timm's
/// loader: it is what the published figures are of.
const WRAPPERS: [&str; 4] = ["state_dict_ema", "model_ema", "state_dict", "model"];
/// Dicts in dicts that are looked into.
const DEPTH: usize = 4;

/// First value of the old form, little-endian.
const MAGIC: [u8; 10] = [0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19];
/// Second value of the old form.
const PROTOCOL: i64 = 1001;

/// Bytes that tensors may take together beyond what the file suggests: views may repeat and overlap.
const SLACK: usize = 64 << 20;
const REPEATS: usize = 16;

type Places<'a> = HashMap<&'a str, (usize, usize)>;

fn fault(part: &str, base: usize) -> impl FnOnce(Fault) -> Problem + use<'_> {
    move |fault| {
        let text = format!("{part}, byte {}: {}", base + fault.at, fault.message);
        if fault.refused { Problem::Refused(text) } else { Problem::Corrupt(text) }
    }
}

/// Reads the zip form.
pub(super) fn read_zip(file: &[u8]) -> Result<Contents, Problem> {
    let archive = Archive::open(file).map_err(Problem::Corrupt)?;
    let Some(folder) = archive.folder() else {
        return Err(Problem::Kind("is a zip archive, but none of torch.save: it holds no data.pkl".into()));
    };
    if archive.member(&format!("{folder}constants.pkl")).is_some() {
        let message = "is a TorchScript program; save its state_dict() instead, which holds the weights without code";
        return Err(Problem::Kind(message.into()));
    }
    let bytes = |(start, end): (usize, usize)| &file[start..end];
    if archive.member(&format!("{folder}byteorder")).map(bytes).is_some_and(|order| order != b"little") {
        return Err(Problem::Refused("it is written in big-endian order; only little-endian files are read".into()));
    }
    let at = archive.member(&format!("{folder}data.pkl")).unwrap_or_default();
    let pickle = Pickle::read(bytes(at)).map_err(fault("data.pkl", 0))?;
    let mut places = Places::new();
    for storage in pickle.storages() {
        let name = format!("{folder}data/{}", storage.key);
        let place = archive.member(&name);
        let place = place.ok_or_else(|| Problem::Corrupt(format!("member `{}` is missing", name.escape_debug())))?;
        let len = storage.whole.checked_mul(storage.element.width());
        if len.is_none_or(|len| len > place.1 - place.0) {
            let message = format!("member `{}` holds fewer than {} elements", name.escape_debug(), storage.whole);
            return Err(Problem::Corrupt(message));
        }
        places.insert(storage.key, place);
    }
    state_dict(&pickle, &places, file.len())
}

/// Reads the old form: magic number, protocol, system, object, keys of the storages, storages.
pub(super) fn read_legacy(file: &[u8]) -> Result<Contents, Problem> {
    let mut at = 0;
    let mut next = |part: &'static str| {
        let pickle = Pickle::read(&file[at..]).map_err(fault(part, at))?;
        at += pickle.end;
        Ok((pickle, at))
    };
    let (magic, _) = next("first value")?;
    if !matches!(magic.node(magic.root), Node::Long(bytes) if *bytes == MAGIC) {
        return Err(Problem::Kind("is a pickle, but none of torch.save".into()));
    }
    let (protocol, _) = next("protocol")?;
    if !matches!(protocol.node(protocol.root), Node::Int(PROTOCOL)) {
        return Err(Problem::Corrupt(format!("its protocol is not {PROTOCOL}")));
    }
    let (system, _) = next("system")?;
    if let Node::Dict(pairs) = system.node(system.root)
        && pairs.iter().any(|&(key, value)| {
            matches!((system.node(key), system.node(value)), (Node::Text("little_endian"), Node::Bool(false)))
        })
    {
        return Err(Problem::Refused("it is written in big-endian order; only little-endian files are read".into()));
    }
    let (pickle, _) = next("object")?;
    let (keys, mut at) = next("keys of storages")?;
    let Node::List(list) = keys.node(keys.root) else {
        return Err(Problem::Corrupt("the keys of the storages are no list".into()));
    };
    let held: HashMap<&str, (Element, usize)> = pickle.storages().map(|s| (s.key, (s.element, s.whole))).collect();
    let mut places = Places::new();
    for &key in list {
        let Node::Text(key) = keys.node(key) else {
            return Err(Problem::Corrupt("a storage's key is no text".into()));
        };
        let named = || format!("storage `{}` at byte {at}", key.escape_debug());
        let Some(&(element, whole)) = held.get(key) else {
            return Err(Problem::Corrupt(format!("{} belongs to no tensor", named())));
        };
        let cut = || Problem::Corrupt(format!("{} is cut off", named()));
        let len = file.get(at..at + 8).and_then(|b| b.first_chunk::<8>()).map(|b| u64::from_le_bytes(*b));
        let len = len.and_then(|n| usize::try_from(n).ok()).ok_or_else(cut)?;
        if len < whole {
            return Err(Problem::Corrupt(format!("{} holds {len} elements, not {whole}", named())));
        }
        let end = len.checked_mul(element.width()).and_then(|n| n.checked_add(at + 8));
        let end = end.filter(|&end| end <= file.len()).ok_or_else(cut)?;
        places.insert(key, (at + 8, end));
        at = end;
    }
    state_dict(&pickle, &places, file.len())
}

/// The dict of tensors in what was pickled.
fn state_dict(pickle: &Pickle<'_>, places: &Places<'_>, file_len: usize) -> Result<Contents, Problem> {
    let mut wrappers = Vec::new();
    let mut dict = pickle.root;
    for _ in 0..DEPTH {
        let Node::Dict(pairs) = pickle.node(dict) else { break };
        let get = |wanted: &str| {
            let found = pairs.iter().rev().find(|(key, _)| matches!(pickle.node(*key), Node::Text(k) if *k == wanted));
            found.map(|(_, value)| *value).filter(|&value| matches!(pickle.node(value), Node::Dict(_)))
        };
        match WRAPPERS.iter().find_map(|key| Some((*key, get(key)?))) {
            Some((key, inner)) => {
                wrappers.push(key.to_owned());
                dict = inner;
            }
            None => break,
        }
    }
    let Node::Dict(pairs) = pickle.node(dict) else {
        return Err(Problem::Kind("holds no dict of tensors, so no weights by name".into()));
    };
    let mut tensors = BTreeMap::new();
    for &(key, value) in pairs {
        if let (Node::Text(name), Some(slot)) = (pickle.node(key), slot(pickle, value, places)?) {
            tensors.insert((*name).to_owned(), slot);
        }
    }
    if tensors.is_empty() {
        let keys: Vec<String> = pairs.iter().take(8).filter_map(|&(k, _)| key_text(pickle, k)).collect();
        let found = if keys.is_empty() { "an empty dict".to_owned() } else { format!("keys {}", keys.join(", ")) };
        return Err(Problem::Kind(format!("holds no weights by name; found {found}")));
    }
    let most = file_len.saturating_mul(REPEATS).saturating_add(SLACK);
    let sum = tensors.values().try_fold(0usize, |sum, slot| sum.checked_add(slot.byte_len()?));
    if sum.is_none_or(|sum| sum > most) {
        return Err(Problem::Corrupt(format!("its tensors take over {most} bytes, the file {file_len}")));
    }
    Ok(Contents { tensors, wrappers })
}

fn key_text(pickle: &Pickle<'_>, key: Id) -> Option<String> {
    match pickle.node(key) {
        Node::Text(text) => Some(format!("`{}`", text.chars().take(40).collect::<String>().escape_debug())),
        _ => None,
    }
}

fn slot(pickle: &Pickle<'_>, value: Id, places: &Places<'_>) -> Result<Option<Slot>, Problem> {
    let Node::Tensor(tensor) = pickle.node(value) else { return Ok(None) };
    let storage = &tensor.storage;
    let lost = || Problem::Corrupt(format!("storage `{}` is missing", storage.key.escape_debug()));
    let (start, end) = *places.get(storage.key).ok_or_else(lost)?;
    let width = storage.element.width();
    // The view lies within the whole, and the whole within its place: both were checked where they were read.
    let first = start + storage.offset.saturating_mul(width).min(end - start);
    let last = first + storage.len.saturating_mul(width).min(end - first);
    debug_assert!(count(&[storage.len, width]).is_some());
    Slot::strided(storage.element, (first, last), tensor.offset, tensor.shape.clone(), tensor.strides.clone())
        .map(Some)
        .map_err(Problem::Corrupt)
}
