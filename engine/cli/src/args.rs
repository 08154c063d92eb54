//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};

/// Trains light CLIP image encoders by distillation: one TOML file says everything.
#[derive(Debug, Parser)]
#[command(name = "mcpipe", version, propagate_version = true, arg_required_else_help = true, max_term_width = 100)]
pub struct Cli {
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
    /// Say less: no progress, only results and errors.
    #[arg(short, long, global = true, conflicts_with = "verbose")]
    pub quiet: bool,
    /// Say more; twice for details.
    #[arg(short, long, global = true, action = clap::ArgAction::Count)]
    pub verbose: u8,
}

/// A command.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Run a pipeline: make or read data, train, evaluate, export, report.
    ///
    /// Results of stages are kept in the store; a stage whose inputs did not change is not run again. Ctrl-C finishes
    /// the step, saves, and ends with code 130; the same command goes on from there. A second Ctrl-C stops at once.
    Run(RunArgs),
    /// Check a pipeline file; needs neither its data set nor a device.
    Check(CheckArgs),
    /// Show what a run would do: stages, shapes at every tap, parameters, FLOPs, memory of a step.
    Plan(PlanArgs),
    /// Draw the stages of a pipeline.
    Graph(GraphArgs),
    /// Write a student under timm's or open_clip's names, folded for inference if asked.
    ///
    /// Takes a run directory (or a file that mcpipe exported), which says whose weights it holds, or any weights with
    /// the name of their backbone.
    Export(ExportArgs),
    /// Print the JSON schema of pipeline files, for editors.
    Schema,
    /// List the components that a pipeline file may name, with their parameters.
    List(ListArgs),
    /// Check and index data sets.
    #[command(subcommand)]
    Data(DataCommand),
}

/// The pipeline file and what is changed in it.
#[derive(Debug, Args)]
pub struct FileArgs {
    /// The pipeline file (TOML).
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Override a value, as `training.steps=100` or `teacher[0].dim=64`; may be given again.
    #[arg(long = "set", value_name = "PATH=VALUE")]
    pub set: Vec<String>,
}

/// How the machine is used and where results are kept.
#[derive(Debug, Args)]
pub struct MachineArgs {
    /// Folder of the store of results [default: .mcpipe/store].
    #[arg(long, value_name = "DIR", env = "MCPIPE_STORE")]
    pub store: Option<PathBuf>,
    /// Threads for computing [default: the file's `run.threads`, else one for each core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub threads: Option<u16>,
    /// Which kernels run: our own, or the dfdx formulation of every op that dfdx can express (slow; to compare).
    #[arg(long, value_enum, default_value_t = KernelsArg::Native)]
    pub kernels: KernelsArg,
}

/// Which kernels.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum KernelsArg {
    /// Our own.
    Native,
    /// dfdx where it can.
    Reference,
}

/// Form of what is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Text,
    /// For programs.
    Json,
}

/// `mcpipe run`.
#[derive(Debug, Args)]
pub struct RunArgs {
    #[command(flatten)]
    pub file: FileArgs,
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Directory of the run [default: runs/<name>-<n>].
    #[arg(long, value_name = "DIR")]
    pub out: Option<PathBuf>,
    /// Take nothing from the store; run every stage.
    #[arg(long)]
    pub fresh: bool,
    /// Trainings and evaluations that may run at the same time; each uses all threads.
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u8).range(1..=64))]
    pub jobs: u8,
    /// Form of the result on standard output.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// `mcpipe check`.
#[derive(Debug, Args)]
pub struct CheckArgs {
    #[command(flatten)]
    pub file: FileArgs,
    /// Form of the messages; `json` prints one object a line on standard output.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// `mcpipe plan`.
#[derive(Debug, Args)]
pub struct PlanArgs {
    #[command(flatten)]
    pub file: FileArgs,
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Form of the output.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// Form of a drawing.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum GraphFormat {
    /// A picture for browsers.
    #[default]
    Svg,
    /// Graphviz.
    Dot,
}

/// `mcpipe graph`.
#[derive(Debug, Args)]
pub struct GraphArgs {
    #[command(flatten)]
    pub file: FileArgs,
    #[command(flatten)]
    pub machine: MachineArgs,
    /// Form of the drawing.
    #[arg(long, value_enum, default_value_t)]
    pub format: GraphFormat,
    /// File to write instead of standard output.
    #[arg(short, long, value_name = "FILE")]
    pub output: Option<PathBuf>,
}

/// Whose names an exported file has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum FormArg {
    /// The trunk, as timm.create_model(..).load_state_dict takes it.
    #[default]
    Timm,
    /// The trunk as a part of an open_clip model, beside whatever else the weights hold.
    #[value(name = "open_clip")]
    OpenClip,
}

/// `mcpipe export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// Directory of a run, whose student is exported, or a file that mcpipe exported.
    #[arg(value_name = "RUN_DIR|FILE", required_unless_present = "weights", conflicts_with = "weights")]
    pub source: Option<PathBuf>,
    /// Backbone of the weights.
    #[arg(long, value_name = "NAME", requires = "weights")]
    pub backbone: Option<String>,
    /// Weights under timm's or open_clip's names (safetensors).
    #[arg(long, value_name = "FILE", requires = "backbone")]
    pub weights: Option<PathBuf>,
    /// Parameters of the backbone that differ from the published ones, as TOML.
    #[arg(long, value_name = "TOML", requires = "weights")]
    pub params: Option<String>,
    /// Side of the images, where the backbone's parameters depend on it [default: the published one].
    #[arg(long, value_name = "PIXELS", requires = "weights", value_parser = clap::value_parser!(u16).range(8..=4096))]
    pub image_size: Option<u16>,
    /// Whose names the file has.
    #[arg(long, value_enum, default_value_t)]
    pub format: FormArg,
    /// Fold the branches that a backbone has for training only (FastViT).
    #[arg(long)]
    pub reparam: bool,
    /// File to write (safetensors).
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

/// `mcpipe list`.
#[derive(Debug, Args)]
pub struct ListArgs {
    /// Only this kind (as `backbone` or `level`) or only the component of this name.
    #[arg(value_name = "KIND|NAME")]
    pub only: Option<String>,
    /// Form of the output.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// `mcpipe data`.
#[derive(Debug, Subcommand)]
pub enum DataCommand {
    /// Find what is wrong with a data set: structure of the shards, samples, images, labels.
    ///
    /// PATH is a shard, a shard pattern with braces, a split's folder or the root of an evaluation set.
    Check(DataArgs),
    /// Write `nshards.txt` of every split of a folder.
    Index(DataIndexArgs),
}

/// `mcpipe data check`.
#[derive(Debug, Args)]
pub struct DataArgs {
    /// Shard, shard pattern or folder.
    #[arg(value_name = "PATH")]
    pub path: PathBuf,
    /// Form of the output.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// `mcpipe data index`.
#[derive(Debug, Args)]
pub struct DataIndexArgs {
    /// Folder of a split, or the folder above its splits.
    #[arg(value_name = "DIR")]
    pub path: PathBuf,
    /// Form of the output.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}
