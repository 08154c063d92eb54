//! `mcpipe classify`.

use std::fmt::Write;

use mcpipe_run::{Classes, Classified, RunError, TEMPLATE};
use serde_json::json;

use super::{lines, model, model_options};
use crate::args::{ClassifyArgs, Format};
use crate::output::print;
use crate::progress::Counter;

/// Prints the classes that images are most like.
pub fn classify(args: &ClassifyArgs, quiet: bool) -> Result<u8, RunError> {
    let (source, images) = model(&args.model, &args.paths)?;
    if images.is_empty() {
        return Err(RunError::Usage("give images behind the model".into()));
    }
    let names = match &args.classes_from {
        Some(file) => lines(file, "the class names, one a line")?,
        None => args.classes.iter().map(|name| name.trim().to_owned()).collect(),
    };
    let templates = if args.template.is_empty() { vec![TEMPLATE.to_owned()] } else { args.template.clone() };
    let classes = Classes { names, templates };
    classes.check()?;
    let options = model_options(&args.model)?;
    let counter = Counter::new("classify", quiet);
    let tell = |done, all| counter.set(done, all);
    let found = mcpipe_run::classify(&source, images, &classes, usize::from(args.top), &options, &tell)?;
    drop(counter);
    match args.format {
        Format::Text => print(&text(&found))?,
        Format::Json => print(&format!("{:#}\n", json!(found)))?,
    }
    Ok(0)
}

fn text(found: &[Classified]) -> String {
    let mut out = String::new();
    for one in found {
        // Writing to a string does not fail.
        let _ = writeln!(out, "{}", one.image);
        for guess in &one.top {
            let _ = writeln!(out, "  {:6.2} %  {}", 100.0 * guess.probability, guess.class);
        }
    }
    out
}
