//! The command line.

use std::path::PathBuf;

use clap::{Args, Parser, Subcommand, ValueEnum};
use mcpipe_run::DeviceChoice;

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
    /// Turn images or texts into embeddings.
    ///
    /// MODEL is the directory of a run, whose student is taken, or a file that mcpipe exported; with --backbone and
    /// --weights every argument is an INPUT. An INPUT is an image file, a folder (searched, sorted by name), or a shard
    /// (.tar); braces name several ({00..07}.tar). Images are resized, cropped and normalised as the model wants them.
    /// An image that cannot be read ends the command and nothing is written.
    Embed(EmbedArgs),
    /// Tell which of some classes images show, by prompts.
    ///
    /// MODEL and images are given as for `embed`; the model must have a text tower.
    Classify(ClassifyArgs),
    /// Tell whether a GPU can be used: driver, GPUs, libraries, kernels; where each was found, or how to get it.
    Doctor,
    /// Print the JSON schema of pipeline files, for editors.
    Schema,
    /// List the components that a pipeline file may name, with their parameters.
    List(ListArgs),
    /// Check and index data sets.
    #[command(subcommand)]
    Data(DataCommand),
    /// Look into weight files and convert them.
    #[command(subcommand)]
    Weights(WeightsCommand),
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
    /// What trainings and evaluations run on: auto, cpu, cuda or cuda:N [default: the file's `run.device`].
    #[arg(long, value_name = "DEVICE", env = "MCPIPE_DEVICE")]
    pub device: Option<DeviceChoice>,
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

/// A model that is used.
#[derive(Debug, Args)]
pub struct ModelArgs {
    /// Backbone of the weights, in place of MODEL.
    #[arg(long, value_name = "NAME", requires = "weights")]
    pub backbone: Option<String>,
    /// Weights under timm's or open_clip's names (safetensors or a PyTorch checkpoint).
    #[arg(long, value_name = "FILE", requires = "backbone")]
    pub weights: Option<PathBuf>,
    /// Parameters of the backbone that differ from the published ones, as TOML.
    #[arg(long, value_name = "TOML", requires = "weights")]
    pub params: Option<String>,
    /// Side of the images [default: the published one].
    #[arg(long, value_name = "PIXELS", requires = "weights", value_parser = clap::value_parser!(u16).range(8..=4096))]
    pub image_size: Option<u16>,
    /// Weights of the text tower, as open_clip or `mcpipe export` writes them [default: those of --weights].
    #[arg(long, value_name = "FILE", requires = "weights")]
    pub text_weights: Option<PathBuf>,
    /// Parameters of the text tower that weights don't show, as TOML: `heads = 8`, `act = "quick_gelu"` [default: as
    /// open_clip_config.json beside the weights says, else a head for 64 channels, and GELU].
    #[arg(long, value_name = "TOML", requires = "weights")]
    pub text_params: Option<String>,
    /// Samples of one forward pass.
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=8192))]
    pub batch: u16,
    /// Threads for computing [default: one for each core].
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=4096))]
    pub threads: Option<u16>,
    /// What the model runs on: auto (the first GPU that can be used, else the CPU), cpu, cuda or cuda:N.
    #[arg(long, value_name = "DEVICE", env = "MCPIPE_DEVICE", default_value = "auto")]
    pub device: DeviceChoice,
}

/// `mcpipe embed`.
#[derive(Debug, Args)]
pub struct EmbedArgs {
    /// Directory of a run or exported file, then image files, folders, shards; or, with --texts, texts.
    #[arg(value_name = "MODEL|INPUT")]
    pub paths: Vec<String>,
    #[command(flatten)]
    pub model: ModelArgs,
    /// The inputs are texts.
    #[arg(long)]
    pub texts: bool,
    /// Texts from a file, one a line.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["texts", "raw"])]
    pub texts_from: Option<PathBuf>,
    /// Images as a tensor (safetensors with one tensor or one called `images`, or npy), float, [n, h, w, 3] or
    /// [n, 3, h, w], resized and normalised already: what another program's model was given, to compare with.
    #[arg(long, value_name = "FILE", conflicts_with = "texts")]
    pub raw: Option<PathBuf>,
    /// Also keep what lies at a tap of the backbone (`mcpipe plan` lists them); may be given again.
    #[arg(long, value_name = "NAME", conflicts_with_all = ["texts", "texts_from"])]
    pub tap: Vec<String>,
    /// Leave the embeddings as they are instead of dividing each by its L2 norm.
    #[arg(long)]
    pub no_normalize: bool,
    /// File to write: .safetensors (`embedding` [n, d], taps by name; the inputs' names in the metadata, as a JSON
    /// array) or .npy (the embedding alone; the names in a .npy.txt beside it).
    #[arg(short, long, value_name = "FILE")]
    pub output: PathBuf,
}

/// `mcpipe classify`.
#[derive(Debug, Args)]
pub struct ClassifyArgs {
    /// Directory of a run or exported file, then images.
    #[arg(value_name = "MODEL|IMAGE", required = true)]
    pub paths: Vec<String>,
    #[command(flatten)]
    pub model: ModelArgs,
    /// Names of the classes, commas between them.
    #[arg(long, value_name = "NAME,..", value_delimiter = ',', required_unless_present = "classes_from")]
    pub classes: Vec<String>,
    /// Names of the classes from a file, one a line.
    #[arg(long, value_name = "FILE", conflicts_with = "classes")]
    pub classes_from: Option<PathBuf>,
    /// Prompt with `{c}` for the class; may be given again, a class is then the mean of its prompts [default: "a photo
    /// of a {c}."].
    #[arg(long, value_name = "TEXT")]
    pub template: Vec<String>,
    /// Classes shown of each image.
    #[arg(long, value_name = "K", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..))]
    pub top: u16,
    /// Form of the output.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
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

/// `mcpipe weights`.
#[derive(Debug, Subcommand)]
pub enum WeightsCommand {
    /// Show what a weight file holds: tensors, how they are wrapped, which backbone they fit.
    ///
    /// FILE is a safetensors file or a PyTorch checkpoint (.pt, .pth, .bin; zip or older, also gzipped), known by its
    /// content. Nothing in it is executed.
    Inspect(InspectArgs),
    /// Write the tensors of a weight file as safetensors, under the names of timm or open_clip.
    Convert(ConvertArgs),
}

/// `mcpipe weights inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// Weight file.
    #[arg(value_name = "FILE")]
    pub file: PathBuf,
    /// Form of the output.
    #[arg(long, value_enum, default_value_t)]
    pub format: Format,
}

/// Whose names are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
#[value(rename_all = "snake_case")]
pub enum NamesArg {
    /// The image trunk alone, for `timm.create_model`.
    Timm,
    /// Trunk under `visual.`, with the text tower and logit scale that the file holds.
    OpenClip,
}

/// Element type of written weights.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum DtypeArg {
    /// Single precision.
    F32,
    /// Half precision.
    F16,
    /// The upper half of single precision.
    Bf16,
}

/// `mcpipe weights convert`.
#[derive(Debug, Args)]
pub struct ConvertArgs {
    /// Weight file, as for `inspect`.
    #[arg(value_name = "IN")]
    pub input: PathBuf,
    /// Safetensors file to write.
    #[arg(value_name = "OUT")]
    pub output: PathBuf,
    /// Whose names [default: the file's, without wrappers].
    #[arg(long, value_enum)]
    pub to: Option<NamesArg>,
    /// Check that the image tower is exactly this backbone (see `mcpipe list backbone`).
    #[arg(long, value_name = "NAME")]
    pub backbone: Option<String>,
    /// Keep only the names that a pattern fits, `*` for any characters; may be given again.
    #[arg(long, value_name = "PATTERN")]
    pub include: Vec<String>,
    /// Type of the weights [default: the file's].
    #[arg(long, value_enum)]
    pub dtype: Option<DtypeArg>,
}
