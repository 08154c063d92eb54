//! `mcpipe export`.

use mcpipe_run::{ExportSource, Form, RunError};

use crate::args::{ExportArgs, FormArg};
use crate::output::print;

/// Writes weights under timm's or open_clip's names, folded for inference if asked.
pub fn export(args: &ExportArgs, quiet: bool) -> Result<u8, RunError> {
    let source = match (&args.source, &args.backbone, &args.weights) {
        (Some(path), None, None) => ExportSource::Described(path.clone()),
        (None, Some(backbone), Some(file)) => ExportSource::Weights {
            file: file.clone(),
            backbone: backbone.clone(),
            params: args.params.clone().unwrap_or_default(),
            image_size: args.image_size.map(usize::from),
        },
        _ => return Err(RunError::Usage("give a run directory, or --backbone and --weights".into())),
    };
    let form = match args.format {
        FormArg::Timm => Form::Timm,
        FormArg::OpenClip => Form::OpenClip,
    };
    let line = mcpipe_run::export(&source, form, args.reparam, &args.output)?;
    if !quiet {
        print(&format!("{line}\n"))?;
    }
    Ok(0)
}
