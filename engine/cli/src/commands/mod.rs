//! One file for each command.

pub mod check;
pub mod data;
pub mod export;
pub mod graph;
pub mod list;
pub mod plan;
pub mod run;

use mcpipe_graph::Kernels;
use mcpipe_run::{Pipeline, RunError, Settings, compile};
use mcpipe_spec::{Document, Style};

use crate::args::{FileArgs, KernelsArg, MachineArgs};
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
