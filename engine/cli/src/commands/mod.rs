//! One file for each command.

pub mod check;
pub mod classify;
pub mod data;
pub mod doctor;
pub mod embed;
pub mod export;
pub mod graph;
pub mod list;
pub mod plan;
pub mod run;
pub mod weights;

use std::path::Path;

use mcpipe_graph::Kernels;
use mcpipe_run::{EmbedOptions, ModelSource, Pipeline, RunError, Settings, WeightFile, compile};
use mcpipe_spec::{Document, Style};

use crate::args::{FileArgs, KernelsArg, MachineArgs, ModelArgs};
use crate::output::eprint;

/// Reads and checks a pipeline file.
pub fn load(args: &FileArgs) -> Result<Document, RunError> {
    mcpipe_spec::load(&args.file, &args.set, &mcpipe_run::components()).map_err(RunError::Spec)
}

/// Settings from the arguments and the file.
pub fn settings(args: &MachineArgs, document: &Document) -> Settings {
    let mut settings = Settings::default();
    if let Some(store) = &args.store {
        settings.store.clone_from(store);
    }
    match (args.threads, document.spec.run.threads) {
        (Some(threads), _) => settings.threads = usize::from(threads),
        (None, threads) if threads > 0 => settings.threads = threads,
        _ => {}
    }
    settings.kernels = match args.kernels {
        KernelsArg::Native => Kernels::Native,
        KernelsArg::Reference => Kernels::Reference,
    };
    let device = args.device.or_else(|| document.spec.run.device.as_ref()?.parse().ok()).unwrap_or_default();
    settings.choose_device(device);
    settings
}

/// Reads, checks and plans a pipeline file, warnings shown.
pub fn open(file: &FileArgs, machine: &MachineArgs) -> Result<(Pipeline, Settings), RunError> {
    let document = load(file)?;
    let warnings = document.warnings.clone();
    let settings = settings(machine, &document);
    let pipeline = compile(document, &settings)?;
    if !warnings.is_empty() {
        eprint(&warnings.render(Style::for_stderr()));
    }
    Ok((pipeline, settings))
}

/// The model that arguments name, and what follows it among `paths`.
pub fn model<'a>(args: &ModelArgs, paths: &'a [String]) -> Result<(ModelSource, &'a [String]), RunError> {
    if let (Some(backbone), Some(file)) = (&args.backbone, &args.weights) {
        let weights = WeightFile {
            file: file.clone(),
            backbone: backbone.clone(),
            params: args.params.clone().unwrap_or_default(),
            image_size: args.image_size.map(usize::from),
            text: args.text_weights.clone(),
            text_params: args.text_params.clone().unwrap_or_default(),
        };
        return Ok((ModelSource::Weights(weights), paths));
    }
    match paths {
        [model, inputs @ ..] => Ok((ModelSource::Described(model.into()), inputs)),
        [] => Err(RunError::Usage("give a run directory or an exported file, or --backbone and --weights".into())),
    }
}

/// Lines of a file that an option names. One that can't be used is bad usage.
pub fn lines(file: &Path, what: &'static str) -> Result<Vec<String>, RunError> {
    mcpipe_data::read_lines(file, what).map_err(|error| RunError::Usage(error.to_string()))
}

/// Starts the threads that a model is run by, and how it is run.
pub fn model_options(args: &ModelArgs) -> Result<EmbedOptions, RunError> {
    let mut settings = Settings::default();
    settings.threads = args.threads.map_or(settings.threads, usize::from);
    settings.install_threads()?;
    settings.choose_device(args.device);
    settings.check_device()?;
    let (batch, workers) = (usize::from(args.batch), settings.threads.min(8));
    Ok(EmbedOptions { batch, workers, device: settings.device, ..EmbedOptions::default() })
}
