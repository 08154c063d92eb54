//! From the `[data]` and `[[eval]]` tables to the files that are meant.

use std::path::{Path, PathBuf};

use mcpipe_data::DataError;
use mcpipe_spec::{Code, Diagnostic, Document, Evaluation};
use serde_json::{Value, json};

use crate::error::RunError;
use crate::hash::{file_digest, file_identity};

/// Where the training samples are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TrainSource {
    /// In the data set that the pipeline makes.
    Made,
    /// In these shards.
    Shards(Vec<PathBuf>),
}

/// Where an evaluation's samples are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum EvalSource {
    /// In the data set that the pipeline makes.
    Made,
    /// Below this folder, in CLIP_benchmark's layout.
    Root(PathBuf),
}

/// The data of one evaluation.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct EvalData {
    /// Where it is.
    pub source: EvalSource,
    /// Which split.
    pub split: String,
    /// Prompt templates that stand in for the set's own.
    pub templates: Option<Vec<String>>,
    /// Images in one forward pass.
    pub batch_size: usize,
}

impl TrainSource {
    /// The training shards that a pipeline means. Only their presence is checked.
    pub fn resolve(document: &Document, found: &mut Vec<Diagnostic>) -> Self {
        let Some(shards) = &document.spec.data.train.shards else { return Self::Made };
        let patterns = shards.patterns();
        let mut all = Vec::new();
        for (at, pattern) in patterns.iter().enumerate() {
            let path = match shards {
                mcpipe_spec::Shards::One(_) => "data.train.shards".to_owned(),
                mcpipe_spec::Shards::Many(_) => format!("data.train.shards[{at}]"),
            };
            match mcpipe_data::list_shards(&[pattern]) {
                Ok(mut shards) => all.append(&mut shards),
                Err(error) => found.push(of_data(document, &path, "shard", &error)),
            }
        }
        Self::Shards(all)
    }

    /// What tells these data from others; nothing for the pipeline's own, whose stage has a hash.
    ///
    /// # Errors
    /// A shard went away.
    pub fn identity(&self) -> Result<Value, RunError> {
        match self {
            Self::Made => Ok(Value::Null),
            Self::Shards(shards) => shards.iter().map(|s| identity(s)).collect(),
        }
    }
}

impl EvalData {
    /// The data that evaluation number `at` of a pipeline means; nothing where they can't be found.
    pub fn resolve(
        document: &Document,
        at: usize,
        evaluation: &Evaluation,
        train: &TrainSource,
        found: &mut Vec<Diagnostic>,
    ) -> Option<Self> {
        let defaults = &document.spec.data.eval;
        let own = evaluation.root.as_ref().map(|root| (root, format!("eval[{at}].root")));
        let named = own.or_else(|| defaults.root.as_ref().map(|root| (root, "data.eval.root".to_owned())));
        let above = match train {
            TrainSource::Shards(shards) => shards.first().and_then(|s| root_above(s)),
            TrainSource::Made => None,
        };
        // Where no split is written, its troubles are those of the root.
        let (split, split_path) = match &evaluation.split {
            Some(split) => (split.clone(), Some(format!("eval[{at}].split"))),
            None => {
                let path = "data.eval.split".to_owned();
                (defaults.split.clone(), Some(path).filter(|path| document.is_set(path)))
            }
        };
        let split_path = split_path.as_deref();
        let templates = evaluation.templates.clone().or_else(|| defaults.templates.clone());
        let source = match (named, above) {
            (Some((root, path)), _) => {
                check_root(document, root, &path, &split, split_path, templates.is_none(), found)?;
                EvalSource::Root(root.clone())
            }
            (None, Some(root)) => {
                let path = "data.train.shards";
                check_root(document, &root, path, &split, split_path, templates.is_none(), found)?;
                EvalSource::Root(root)
            }
            (None, None) if document.spec.data.make.is_some() => EvalSource::Made,
            // The shards that the set would be looked for beside are missing, which is reported already.
            (None, None) if matches!(train, TrainSource::Shards(shards) if shards.is_empty()) => return None,
            (None, None) => {
                let message = format!("the evaluation `{}` has no data", evaluation.name);
                let diagnostic = document.diagnostic(Code::MissingKey, "data.eval.root", message).with_help(
                    "name the folder that holds `classnames.txt` and the splits: `data.eval.root = \"path\"`; it may be \
                     left out where the training shards lie in such a folder, as `root/train/0.tar`",
                );
                found.push(diagnostic);
                return None;
            }
        };
        Some(Self { source, split, templates, batch_size: defaults.batch_size })
    }

    /// What tells these data from others.
    ///
    /// # Errors
    /// A file went away.
    pub fn identity(&self) -> Result<Value, RunError> {
        let files = match &self.source {
            EvalSource::Made => Value::Null,
            EvalSource::Root(root) => {
                let shards = mcpipe_data::split_shards(&root.join(&self.split))?;
                let texts = [mcpipe_data::CLASSNAMES, mcpipe_data::TEMPLATES, mcpipe_data::DATASET_TYPE];
                let texts: Vec<Value> = texts
                    .iter()
                    .map(|name| json!(file_digest(&root.join(name)).ok().map(|(digest, _)| digest)))
                    .collect();
                json!([shards.iter().map(|s| identity(s)).collect::<Result<Vec<_>, _>>()?, texts])
            }
        };
        Ok(json!({ "files": files, "split": self.split, "templates": self.templates, "batch_size": self.batch_size }))
    }
}

fn identity(path: &Path) -> Result<Value, RunError> {
    file_identity(path).map_err(|e| RunError::read(path, e))
}

/// The folder above a shard's split, where it has CLIP_benchmark's layout.
fn root_above(shard: &Path) -> Option<PathBuf> {
    let root = shard.parent()?.parent()?;
    let root = if root.as_os_str().is_empty() { Path::new(".") } else { root };
    root.join(mcpipe_data::CLASSNAMES).is_file().then(|| root.to_owned())
}

/// Checks that an evaluation set's files are there; their content is left to the run and to `mcpipe data check`.
fn check_root(
    document: &Document,
    root: &Path,
    path: &str,
    split: &str,
    split_path: Option<&str>,
    own_templates: bool,
    found: &mut Vec<Diagnostic>,
) -> Option<()> {
    let before = found.len();
    let split_path = split_path.unwrap_or(path);
    if !root.is_dir() {
        found.push(document.missing_file(path, "evaluation set", root));
        return None;
    }
    let retrieval = match mcpipe_data::dataset_type(root) {
        Ok(kind) => kind == mcpipe_data::DatasetType::Retrieval,
        Err(error) => {
            found.push(of_data(document, path, "evaluation set", &error));
            return None;
        }
    };
    let list = |name: &str| root.join(name);
    if !retrieval && !list(mcpipe_data::CLASSNAMES).is_file() {
        found.push(document.missing_file(path, "list of classes", &list(mcpipe_data::CLASSNAMES)));
    }
    if !retrieval && own_templates && !list(mcpipe_data::TEMPLATES).is_file() {
        let help = "or write them into the file: `data.eval.templates = [\"a photo of a {c}.\"]`";
        found.push(document.missing_file(path, "list of templates", &list(mcpipe_data::TEMPLATES)).with_help(help));
    }
    if !root.join(split).is_dir() {
        found.push(document.missing_file(split_path, "split", &root.join(split)));
    } else if let Err(error) = mcpipe_data::split_shards(&root.join(split)) {
        found.push(of_data(document, split_path, "shard", &error));
    }
    (found.len() == before).then_some(())
}

/// An error about data at the line that names them.
fn of_data(document: &Document, path: &str, what: &str, error: &DataError) -> Diagnostic {
    match error {
        DataError::MissingShards { missing, total } if *total == 1 && missing.len() == 1 => {
            document.missing_file(path, what, &missing[0])
        }
        DataError::MissingFile { path: file, what } => document.missing_file(path, what, file),
        DataError::MissingShards { .. } | DataError::MissingNshards { .. } | DataError::NoShards(_) => {
            document.diagnostic(Code::MissingFile, path, error.to_string()).with_label("not found")
        }
        _ => document.diagnostic(Code::BadFile, path, error.to_string()).with_label("cannot be used"),
    }
}
