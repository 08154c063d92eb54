//! The sizes of a text tower from its weights and, for what these don't show, open_clip's configuration beside them.

use std::path::Path as FilePath;

use mcpipe_data::CaptionTokenizer;
use mcpipe_graph::Path;
use mcpipe_models::{Checkpoint, text_encoder};
use mcpipe_train::EncoderTower;
use serde_json::Value;
use toml::Table;

use crate::error::RunError;
use crate::resolve::models::TEXT;
use crate::store::read_json;

/// Configuration that open_clip keeps beside its weights.
const CONFIG: &str = "open_clip_config.json";
/// Width of an attention head in CLIP's own models.
const HEAD_WIDTH: usize = 64;
const EMBEDDING: &str = "token_embedding.weight";

/// What stands before the names of the text tower; none where the file has no such tower.
fn prefix(file: &Checkpoint) -> Option<&'static str> {
    ["text.", ""].into_iter().find(|prefix| file.contains(&format!("{prefix}{EMBEDDING}")))
}

/// Whether a file holds a text tower under open_clip's names.
pub fn holds_text(file: &Checkpoint) -> bool {
    prefix(file).is_some()
}

/// The text tower whose weights `file` holds. `params`, in TOML, come before what is found.
///
/// # Errors
/// A tower of another form, or one whose heads nothing tells.
pub fn tower(file: &Checkpoint, params: &str) -> Result<EncoderTower, RunError> {
    let given: Table = params.parse().map_err(|e| RunError::Usage(format!("--text-params is no TOML: {e}")))?;
    let before = prefix(file).unwrap_or_default();
    let path = file.path().display();
    let matrix = |name: &str| match file.shape(&format!("{before}{name}")) {
        Some(&[rows, cols]) => Ok((rows, cols)),
        Some(shape) => Err(RunError::Usage(format!("{path}: `{before}{name}` is no matrix but {shape:?}"))),
        None => Err(RunError::Usage(format!("{path}: the text tower has no `{before}{name}`"))),
    };
    let (vocabulary, width) = matrix(EMBEDDING)?;
    let (context_length, _) = matrix("positional_embedding")?;
    let (_, dim) = matrix("text_projection")?;
    let (hidden, _) = matrix("transformer.resblocks.0.mlp.c_fc.weight")?;
    let block = format!("{before}transformer.resblocks.");
    let number = |name: &str| name.strip_prefix(&block)?.split('.').next()?.parse::<usize>().ok();
    let depth = file.names().filter_map(number).max().map_or(0, |last| last + 1);
    let mut table = Table::new();
    for (key, size) in
        [("vocab_size", vocabulary), ("width", width), ("context_length", context_length), ("depth", depth)]
    {
        table.insert(key.into(), integer(size));
    }
    table.insert("mlp_ratio".into(), toml::Value::Float(hidden as f64 / width.max(1) as f64));
    let (heads, quick) = configured(file.path())?;
    let heads = heads.or_else(|| width.is_multiple_of(HEAD_WIDTH).then_some(width / HEAD_WIDTH));
    if let Some(heads) = heads {
        table.insert("heads".into(), integer(heads));
    } else if !given.contains_key("heads") {
        return Err(RunError::Usage(format!(
            "{path}: the weights of a text tower of width {width} don't tell its heads, and no {CONFIG} stands beside \
             them; give --backbone, --weights and `--text-params 'heads = N'`"
        )));
    }
    if quick {
        table.insert("act".into(), toml::Value::String("quick_gelu".into()));
    }
    table.extend(given);
    let encoder = text_encoder("transformer", &table).map_err(|e| RunError::Usage(format!("{path}: {e}")))?;
    if encoder.vocab_size() < mcpipe_data::VOCABULARY {
        return Err(RunError::Usage(format!(
            "{path}: the text tower knows {} token ids, CLIP's tokenizer has {}",
            encoder.vocab_size(),
            mcpipe_data::VOCABULARY
        )));
    }
    Ok(EncoderTower { encoder: encoder.into(), path: Path::new(TEXT), dim, tokenizer: CaptionTokenizer::Clip })
}

fn integer(size: usize) -> toml::Value {
    toml::Value::Integer(i64::try_from(size).unwrap_or(i64::MAX))
}

/// Heads of the text tower and whether QuickGELU is used, as the configuration beside `weights` says.
fn configured(weights: &FilePath) -> Result<(Option<usize>, bool), RunError> {
    let path = weights.with_file_name(CONFIG);
    if !path.is_file() {
        return Ok((None, false));
    }
    let config: Value = read_json(&path)?;
    // open_clip's own configurations are the model's alone; in a folder of a hub it is one part of several.
    let model = config.get("model_cfg").unwrap_or(&config);
    let heads = model["text_cfg"]["heads"].as_u64().and_then(|heads| usize::try_from(heads).ok());
    Ok((heads, model["quick_gelu"].as_bool().unwrap_or(false)))
}
