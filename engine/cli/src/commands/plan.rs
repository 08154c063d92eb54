//! `mcpipe plan`.

use std::fmt::Write;

use mcpipe_run::draw::short_number;
use mcpipe_run::{Description, ModelLine, RunError, TrainingLine, describe};

use super::open;
use crate::args::{Format, PlanArgs};
use crate::output::{print, table};

/// Shows what a run would do.
pub fn plan(args: &PlanArgs) -> Result<u8, RunError> {
    let (pipeline, settings) = open(&args.file, &args.machine)?;
    let description = describe(&pipeline, &settings)?;
    match args.format {
        Format::Json => {
            let value = serde_json::to_value(&description).map_err(|e| RunError::Usage(e.to_string()))?;
            print(&format!("{value:#}\n"))?;
        }
        Format::Text => print(&text(&description))?,
    }
    Ok(0)
}

fn text(description: &Description) -> String {
    let mut out = format!("{}\n\nSTAGES\n", description.name);
    let rows: Vec<Vec<String>> = description
        .stages
        .iter()
        .map(|s| vec![s.stage.clone(), s.status.to_owned(), s.hash[..12].to_owned(), s.needs.join(", ")])
        .collect();
    out.push_str(&left_table(&["stage", "status", "hash", "needs"], &rows));
    out.push_str("\nMODELS\n");
    let rows: Vec<Vec<String>> = description.models.iter().map(model_row).collect();
    out.push_str(&table(&["model", "component", "input", "parameters", "FLOPs/sample", "embedding"], &rows));
    for (model, note) in description.models.iter().filter_map(|m| Some((m, m.note.as_ref()?))) {
        let _ = writeln!(out, "\n{} ({}): {note}", model.model, model.component);
    }
    for model in description.models.iter().filter(|m| !m.taps.is_empty()) {
        taps(&mut out, model);
    }
    out.push_str("\nMEMORY AND WORK OF A STEP\n");
    for step in &description.steps {
        training(&mut out, step);
    }
    out
}

fn model_row(m: &ModelLine) -> Vec<String> {
    let input = if m.taps.is_empty() { format!("{} tokens", m.input) } else { format!("{0}x{0}", m.input) };
    vec![
        m.model.clone(),
        m.component.clone(),
        input,
        short_number(m.parameters as f64),
        short_number(m.flops as f64),
        m.dim.to_string(),
    ]
}

fn taps(out: &mut String, model: &ModelLine) {
    let _ = writeln!(out, "\nTAPS of {} ({}); * compared by a distillation term", model.model, model.component);
    let rows: Vec<Vec<String>> = model
        .taps
        .iter()
        .map(|tap| {
            let shape: Vec<String> = tap.shape.iter().map(usize::to_string).collect();
            let mark = if tap.used { "* " } else { "  " };
            vec![format!("{mark}{}", tap.name), tap.kind.to_owned(), shape.join(" x ")]
        })
        .collect();
    out.push_str(&left_table(&["  tap", "holds", "shape"], &rows));
}

fn training(out: &mut String, step: &TrainingLine) {
    let plan = &step.plan;
    let _ = writeln!(
        out,
        "\n{}: {} steps of {} images ({} at a time), {} and {} FLOPs a step",
        step.training,
        step.steps,
        plan.batch_size,
        plan.micro_batch,
        bytes(step.bytes),
        short_number(step.flops as f64)
    );
    let mut rows: Vec<Vec<String>> = plan
        .parts
        .iter()
        .map(|part| {
            vec![
                part.name.clone(),
                bytes(part.activation_bytes),
                bytes(part.weight_bytes),
                short_number(part.parameters as f64),
                short_number(part.flops as f64),
            ]
        })
        .collect();
    let others = [
        ("gradients", plan.gradient_bytes),
        ("optimizer state", plan.optimizer_bytes),
        ("running averages", plan.average_bytes),
        ("batch", plan.batch_bytes),
    ];
    for (name, size) in others.into_iter().filter(|(_, size)| *size > 0) {
        rows.push(vec![name.to_owned(), bytes(size), String::new(), String::new(), String::new()]);
    }
    out.push_str(&table(&["part", "memory", "weights", "parameters", "FLOPs"], &rows));
}

fn bytes(size: usize) -> String {
    match size as f64 {
        s if s >= 1e9 => format!("{:.2} GB", s / 1e9),
        s if s >= 1e5 => format!("{:.1} MB", s / 1e6),
        s => format!("{:.1} kB", s / 1e3),
    }
}

/// A table whose columns all stand to the left.
fn left_table(header: &[&str], rows: &[Vec<String>]) -> String {
    let width = |c: usize| {
        let cells = rows.iter().map(|row| row[c].chars().count());
        cells.chain([header[c].chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..header.len()).map(width).collect();
    let line = |cells: Vec<&str>| {
        let padded: Vec<String> = cells.iter().zip(&widths).map(|(cell, w)| format!("{cell:w$}")).collect();
        format!("{}\n", padded.join("  ").trim_end())
    };
    let mut out = line(header.to_vec());
    rows.iter().for_each(|row| out.push_str(&line(row.iter().map(String::as_str).collect())));
    out
}
