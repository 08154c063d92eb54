//! What the trainings of students and teachers share: resuming, metrics, progress, results.

use std::fs::{File, OpenOptions};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::Instant;

use mcpipe_data::TrainLoader;
use mcpipe_train::{Checkpoints, EvalReport, Evaluate, LoaderSource, Observer, Outcome, StepReport, Stop, Trainer};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::assemble::{WEIGHTS, loader_options, open_training_data, write_weights};
use crate::error::RunError;
use crate::pipeline::Resolved;
use crate::plan::Context;
use crate::progress::Event;
use crate::records::{METRICS, TrainingRecord};
use crate::setups::Setup;
use crate::store::{read_json, write_file, write_json};

/// Folder of the checkpoints below the stage's.
const CHECKPOINTS: &str = "checkpoints";
/// Time spent before an interruption.
const ELAPSED: &str = "elapsed.json";
/// The trained weights, where [`WEIGHTS`] holds their average.
const TRAINED: &str = "trained.safetensors";
/// The weights' average, where [`WEIGHTS`] holds the trained ones.
const AVERAGE: &str = "average.safetensors";

#[derive(Debug, Default, Serialize, Deserialize)]
struct Elapsed {
    seconds: f64,
}

/// Trains from where an interrupted run stopped, or from the start, and writes weights and metrics.
///
/// # Errors
/// [`RunError::Interrupted`] with the state saved; whatever keeps the training from its end.
pub fn run(
    resolved: &Resolved,
    context: &Context<'_>,
    setup: Setup,
    shards: Vec<PathBuf>,
    evaluate: &mut dyn Evaluate,
) -> Result<TrainingRecord, RunError> {
    let started = Instant::now();
    let Setup { train, views, start } = setup;
    let (training, seed) = (train.training.clone(), train.seed);
    let data = open_training_data(shards)?;
    let checkpoints = Checkpoints::new(context.dir.join(CHECKPOINTS), training.checkpoint.keep);
    let mut trainer = Trainer::new(train)?;
    let (newest, refused) = checkpoints.newest_whole()?;
    for error in refused {
        (context.tell)(Event::Warning(error.to_string()));
    }
    if let Some(checkpoint) = newest {
        trainer.restore(&checkpoint)?;
    }
    let from = trainer.step();
    let before = if from > 0 { read_json(&context.dir.join(ELAPSED)).unwrap_or_default() } else { Elapsed::default() };
    let options = loader_options(resolved.spec(), seed, training.batch_size, &views);
    let loader = TrainLoader::start(data, options, from)?;
    let mut source = LoaderSource::new(loader, views.0);
    let mut told = Told::open(context, from)?;
    (context.tell)(Event::Started { steps: Some(training.steps), from });
    if let Some(start) = start.filter(|_| from == 0) {
        (context.tell)(Event::Note(start));
    }
    let stop = Stop::from_flag(context.interrupt.flag());
    let outcome = trainer.run(&mut source, evaluate, &mut told, Some(&checkpoints), &stop)?;
    let seconds = before.seconds + started.elapsed().as_secs_f64();
    if let Some(error) = told.failed {
        return Err(error);
    }
    if let Outcome::Interrupted { .. } = outcome {
        write_json(&context.dir.join(ELAPSED), &Elapsed { seconds })?;
        context.interrupt.check()?;
    }
    finish(context, &trainer)?;
    let _ = std::fs::remove_file(context.dir.join(ELAPSED));
    let stats = source.loader().stats();
    if stats.bad_samples > 0 {
        let first = stats.first_bad.first().cloned().unwrap_or_default();
        (context.tell)(Event::Warning(format!("{} bad samples were replaced; the first: {first}", stats.bad_samples)));
    }
    let images = (training.steps * training.batch_size as u64) as f64;
    Ok(TrainingRecord {
        steps: training.steps,
        batch_size: training.batch_size,
        seconds,
        images_per_second: images / seconds.max(1e-9),
        final_loss: told.last_loss,
        skipped_steps: trainer.counters().skipped,
        bad_samples: stats.bad_samples,
        first_bad: stats.first_bad.clone(),
        peak_memory: peak_memory(),
    })
}

/// Writes the weights that evaluations and exports see, and the others of trained and averaged ones beside them.
fn finish(context: &Context<'_>, trainer: &Trainer) -> Result<(), RunError> {
    let write = |name: &str, store| write_weights(&context.dir.join(name), store, None, &[]);
    let evaluated = trainer.evaluated();
    write(WEIGHTS, evaluated.store)?;
    match trainer.average() {
        Some(_) if evaluated.averaged => write(TRAINED, trainer.store()),
        Some(average) => write(AVERAGE, average),
        None => Ok(()),
    }
}

/// Tells of a training and writes its metrics. The trainer's observer can't fail, so that the first failure waits for
/// the end of the step.
struct Told<'a> {
    context: &'a Context<'a>,
    path: PathBuf,
    file: File,
    failed: Option<RunError>,
    last_loss: Option<f64>,
}

impl<'a> Told<'a> {
    /// Goes on with the metrics that an interrupted run left, up to the step that it is resumed at.
    fn open(context: &'a Context<'a>, from: u64) -> Result<Self, RunError> {
        let path = context.dir.join(METRICS);
        let kept = if from > 0 { lines_to(&path, from) } else { Vec::new() };
        write_file(&path, kept.concat().as_bytes())?;
        kept.iter().filter_map(|line| serde_json::from_str(line).ok()).for_each(|line: Value| (context.metrics)(&line));
        let file = OpenOptions::new().append(true).open(&path).map_err(|e| RunError::write(&path, e))?;
        Ok(Self { context, path, file, failed: None, last_loss: None })
    }

    fn line(&mut self, value: serde_json::Result<Value>) {
        let Ok(value) = value else { return };
        (self.context.metrics)(&value);
        if let Err(e) = writeln!(self.file, "{value}")
            && self.failed.is_none()
        {
            self.failed = Some(RunError::write(&self.path, e));
            // The checkpoint that follows fails for the same reason or saves what there is; either way the run ends.
            self.context.interrupt.raise(crate::progress::FAILED);
        }
    }
}

/// The lines of metrics up to a step.
fn lines_to(path: &Path, step: u64) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap_or_default();
    let at = |line: &str| serde_json::from_str::<Value>(line).ok()?.get("step")?.as_u64();
    text.lines().filter(|line| at(line).is_some_and(|s| s <= step)).map(|line| format!("{line}\n")).collect()
}

impl Observer for Told<'_> {
    fn step(&mut self, report: &StepReport) {
        let mut terms = vec![("loss".to_owned(), report.loss)];
        if report.terms.len() > 1 {
            terms.extend(report.terms.iter().cloned());
        }
        let images_per_s = (report.images_per_second > 0.0).then_some(report.images_per_second);
        (self.context.tell)(Event::Step { step: report.step, terms, images_per_s });
        if let Some(skipped) = &report.skipped {
            let text = format!("step {} was skipped: {} is not finite", report.step, skipped.origin);
            (self.context.tell)(Event::Warning(text));
        }
        if report.log {
            self.last_loss = Some(report.loss);
            self.line(serde_json::to_value(report));
        }
    }

    fn eval(&mut self, report: &EvalReport) {
        let shown: Vec<String> =
            report.metrics.iter().map(|(name, value)| format!("{name} {:.1} %", 100.0 * value)).collect();
        (self.context.tell)(Event::Note(format!("step {}: {}: {}", report.step, report.name, shown.join(", "))));
        self.line(serde_json::to_value(report));
    }

    fn message(&mut self, text: &str) {
        tracing::info!("{text}");
    }
}

/// The process's largest resident memory so far, in bytes; nothing where the system has no `/proc`.
fn peak_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok().map(|kib| kib * 1024)
}
