//! `mcpipe export`: the student of a finished run, or any weight file, under the names of timm or open_clip.

use std::path::{Path, PathBuf};

use mcpipe_models::export::{Conversion, Form, convert, described, name_note};
use mcpipe_models::{Checkpoint, WeightsError};

use crate::error::RunError;
use crate::model::named_backbone;

/// Where the weights come from.
#[derive(Clone, Debug)]
pub enum ExportSource {
    /// A run directory, or a file that mcpipe exported: it says itself whose weights it holds.
    Described(PathBuf),
    /// Weights under timm's or open_clip's names.
    Weights {
        /// The file.
        file: PathBuf,
        /// Registered name of the backbone.
        backbone: String,
        /// Its parameters that differ from the published ones, as TOML.
        params: String,
        /// Side of its images; the published one by default.
        image_size: Option<usize>,
    },
}

/// Writes the weights of `source` to `output`, folded for inference with `reparam`. Returns a line that says what was
/// written.
///
/// # Errors
/// A run that exported nothing, weights that are not the backbone's, a backbone that has no such form, or a file that
/// can't be read or written.
pub fn export(source: &ExportSource, form: Form, reparam: bool, output: &Path) -> Result<String, RunError> {
    let (file, model, size) = match source {
        ExportSource::Described(path) => {
            let path = if path.is_dir() { of_run(path, form)? } else { path.clone() };
            let file = Checkpoint::open(&path).map_err(RunError::of_input)?;
            let noted = described(&file).map_err(RunError::of_input)?.ok_or_else(|| {
                let path = path.display();
                RunError::Usage(format!("{path} does not say whose weights it holds; give --backbone and --weights"))
            })?;
            (file, noted.backbone, noted.image_size)
        }
        ExportSource::Weights { file, backbone: name, params, image_size } => {
            let (model, size) = named_backbone(name, params, *image_size)?;
            (Checkpoint::open(file).map_err(RunError::of_input)?, model, size)
        }
    };
    let to = Conversion { backbone: model.as_ref(), image_size: size, form, reparam };
    let done = convert(&file, &to, output).map_err(|error| match error {
        WeightsError::Io { .. } => RunError::Weights(error),
        // What was given does not fit what was asked for.
        other => RunError::of_input(other),
    })?;
    let mut line = format!("{}: {}", output.display(), model.name());
    if reparam {
        line += &format!(" folded from {} to {} tensors", done.read, done.written);
    }
    line += &match form {
        Form::Timm if reparam => format!(" (num_classes={}, inference_mode=True)", done.num_classes),
        Form::Timm => format!(" (num_classes={})", done.num_classes),
        Form::OpenClip => " (open_clip's names)".to_owned(),
    };
    if !done.left_out.is_empty() {
        line += &format!("; {} tensors beside the trunk left out", done.left_out.len());
    }
    if let Some(note) = name_note(model.as_ref()) {
        line += &format!("; {note}");
    }
    Ok(line)
}

/// The file of a run directory that has what `form` needs.
fn of_run(dir: &Path, form: Form) -> Result<PathBuf, RunError> {
    let export = dir.join("export");
    let (timm, open_clip) = (export.join("timm.safetensors"), export.join("open_clip/open_clip_model.safetensors"));
    let wanted = match form {
        Form::Timm => [timm, open_clip.clone()],
        Form::OpenClip => [open_clip.clone(), open_clip],
    };
    wanted.into_iter().find(|file| file.is_file()).ok_or_else(|| {
        let (dir, form) = (dir.display(), form.name());
        RunError::Usage(format!(
            "{dir} holds no exported student; name `{form}` in the pipeline's export.formats and run it again into \
             this folder (finished stages are taken from the store)"
        ))
    })
}
