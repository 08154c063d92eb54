//! `mcpipe run`.

use std::sync::Mutex;

use mcpipe_run::draw::short_number;
use mcpipe_run::{Finished, Interrupt, Role, RunError, Summary};
use serde_json::json;
use tracing_subscriber::filter::LevelFilter;

use super::open;
use crate::args::{Format, RunArgs};
use crate::output::{eprint, print, table};
use crate::progress::{Loudness, Progress};
use crate::signals;

/// Runs a pipeline.
pub fn run(args: &RunArgs, quiet: bool, verbose: u8) -> Result<u8, RunError> {
    let (pipeline, mut settings) = open(&args.file, &args.machine)?;
    settings.fresh = args.fresh;
    settings.jobs = usize::from(args.jobs);
    settings.check_device()?;
    settings.install_threads()?;
    if let Some(reason) = settings.device_note.as_ref().filter(|_| !quiet) {
        eprint(&format!("note: this runs on the CPU: {reason}\n"));
    }
    let progress = Progress::new(if quiet { Loudness::Quiet } else { Loudness::Normal });
    log_to(&progress, verbose);
    let interrupt = Interrupt::default();
    signals::listen(&interrupt).map_err(|e| RunError::Usage(format!("signals can't be listened to: {e}")))?;
    let finished = mcpipe_run::run(&pipeline, &settings, args.out.as_deref(), &progress, &interrupt)?;
    match args.format {
        Format::Json => {
            let value = json!({ "directory": finished.dir, "results": finished.summary });
            print(&format!("{value:#}\n"))?;
        }
        Format::Text => print(&text(&finished))?,
    }
    Ok(0)
}

fn log_to(progress: &Progress, verbose: u8) {
    let level = match verbose {
        0 => LevelFilter::WARN,
        1 => LevelFilter::INFO,
        _ => LevelFilter::DEBUG,
    };
    let writer = progress.writer();
    let subscriber = tracing_subscriber::fmt()
        .with_max_level(level)
        .with_target(false)
        .without_time()
        .with_ansi(false)
        .with_writer(Mutex::new(writer));
    // Only a second subscriber of one process is refused, and the first does as well.
    let _ = subscriber.try_init();
}

fn text(finished: &Finished) -> String {
    let summary = &finished.summary;
    let dir = finished.dir.display();
    let mut out = String::from("\n");
    let rows: Vec<Vec<String>> = summary.rows.iter().flat_map(|row| rows(summary, row)).collect();
    let header = ["model", "evaluation", "score", "× chance", "parameters", "steps", "training images/s", "time"];
    out.push_str(&table(&header, &rows));
    out.push_str(&format!(
        "\n{} stages run, {} from the store\nrun directory: {dir}\n",
        summary.ran, summary.from_store
    ));
    out.push_str(&format!("report:        {}\n", finished.dir.join("report.html").display()));
    out
}

/// One line for each evaluation of a model.
fn rows(summary: &Summary, row: &mcpipe_run::Row) -> Vec<Vec<String>> {
    let model = &row.model;
    let name = match model.role {
        Role::Student if summary.has_baseline() => "student, distilled".to_owned(),
        Role::Student => "student".to_owned(),
        Role::Baseline => "student, not distilled".to_owned(),
        Role::Teacher => format!("teacher {}", model.name),
    };
    let training =
        |f: &dyn Fn(&mcpipe_run::TrainingRecord) -> String| model.training.as_ref().map_or_else(|| "–".to_owned(), f);
    let line = |evaluation: String, score: String, chance: String| {
        vec![
            name.clone(),
            evaluation,
            score,
            chance,
            short_number(model.image_parameters as f64),
            training(&|t| t.steps.to_string()),
            training(&|t| format!("{:.0}", t.images_per_second)),
            training(&|t| format!("{:.1} s", t.seconds)),
        ]
    };
    if row.scores.is_empty() {
        return vec![line("–".into(), "–".into(), "–".into())];
    }
    let scores = row.scores.iter();
    scores
        .map(|s| {
            let h = &s.headline;
            let chance = format!("{:.1}× of {:.1} %", h.value / h.chance.max(1e-12), 100.0 * h.chance);
            line(s.evaluation.clone(), format!("{} {:.1} %", h.label, 100.0 * h.value), chance)
        })
        .collect()
}
