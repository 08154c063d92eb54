//! `mcpipe graph`.

use mcpipe_run::{RunError, drawing, write_file};

use super::open;
use crate::args::{GraphArgs, GraphFormat};
use crate::output::print;

/// Draws the stages of a pipeline; those whose result is in the store have a dashed edge.
pub fn graph(args: &GraphArgs) -> Result<u8, RunError> {
    let (pipeline, settings) = open(&args.file, &args.machine)?;
    let drawing = drawing(&pipeline, &settings);
    let text = match args.format {
        GraphFormat::Svg => drawing.svg(true) + "\n",
        GraphFormat::Dot => drawing.dot(),
    };
    match &args.output {
        Some(path) => write_file(path, text.as_bytes())?,
        None => print(&text)?,
    }
    Ok(0)
}
