//! `mcpipe weights inspect` and `mcpipe weights convert`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;

use mcpipe_models::weights::{ConvertOptions, Element, Fit, Form, Source, fits, write_safetensors};
use mcpipe_models::{Checkpoint, WeightsError};
use mcpipe_run::RunError;
use serde_json::{Value, json};

use crate::args::{ConvertArgs, DtypeArg, Format, InspectArgs, NamesArg};
use crate::output::{print, table};

/// Backbones that are shown when none fits exactly.
const NEAREST: usize = 3;

/// A file that can't be used is the caller's mistake; one that can't be written is a failure.
fn refused(error: WeightsError) -> RunError {
    match error {
        WeightsError::Io { .. } => RunError::Weights(error),
        other => RunError::Usage(other.to_string()),
    }
}

fn open(path: &std::path::Path) -> Result<Checkpoint, RunError> {
    Checkpoint::open(path).map_err(|error| RunError::Usage(error.to_string()))
}

/// Shows what a weight file holds.
pub fn inspect(args: &InspectArgs) -> Result<u8, RunError> {
    let file = open(&args.file)?;
    let fits = fits(&file);
    match args.format {
        Format::Text => print(&text(&file, &fits))?,
        Format::Json => print(&format!("{:#}\n", object(&file, &fits)))?,
    }
    Ok(0)
}

struct Line<'a> {
    name: &'a str,
    element: Element,
    shape: &'a [usize],
}

impl Line<'_> {
    fn elements(&self) -> usize {
        self.shape.iter().product()
    }
}

fn lines(file: &Checkpoint) -> Vec<Line<'_>> {
    let line = |name| Some(Line { name, element: file.element(name)?, shape: file.shape(name)? });
    file.names().filter_map(line).collect()
}

fn text(file: &Checkpoint, fits: &[Fit]) -> String {
    let lines = lines(file);
    let rows: Vec<Vec<String>> = lines
        .iter()
        .map(|l| vec![l.name.to_owned(), l.element.to_string(), format!("{:?}", l.shape), l.elements().to_string()])
        .collect();
    let mut out = table(&["tensor", "type", "shape", "elements"], &rows);
    let (elements, bytes) = totals(&lines);
    let types: BTreeSet<&str> = lines.iter().map(|l| l.element.name()).collect();
    let types = types.into_iter().collect::<Vec<_>>().join(", ");
    let _ = writeln!(out, "\n{} tensors ({types}), {elements} elements, {bytes} bytes", lines.len());
    let _ = writeln!(out, "file: {}", describe(file.source()));
    match fits {
        [] => out.push_str("fits: no registered backbone\n"),
        [best, ..] if best.is_exact() => {
            let _ = writeln!(out, "fits: {} exactly, {}", best.backbone, head(best.dim));
        }
        several => {
            for fit in several.iter().take(NEAREST) {
                let m = &fit.mismatch;
                let _ = writeln!(
                    out,
                    "near: {}, {} of {} parameters ({:.0} %); {} missing, {} unexpected, {} of another shape",
                    fit.backbone,
                    fit.matched,
                    fit.parameters,
                    100.0 * fit.share(),
                    m.missing.len(),
                    m.unexpected.len(),
                    m.wrong_shape.len()
                );
            }
        }
    }
    out
}

fn totals(lines: &[Line<'_>]) -> (usize, usize) {
    lines
        .iter()
        .fold((0, 0), |(elements, bytes), l| (elements + l.elements(), bytes + l.elements() * l.element.width()))
}

fn head(dim: Option<usize>) -> String {
    dim.map_or_else(|| "without a head".to_owned(), |dim| format!("with a head of {dim} outputs"))
}

fn describe(source: &Source) -> String {
    let mut text = source.container.to_string();
    if source.gzipped {
        text.push_str(", gzipped");
    }
    if !source.wrappers.is_empty() {
        let _ = write!(text, "; weights under `{}`", source.wrappers.join("."));
    }
    if !source.prefixes.is_empty() {
        let _ = write!(text, "; `{}` stripped from names", source.prefixes.join("`, `"));
    }
    if let Some(names) = source.names_of {
        let _ = write!(text, "; names of {names}, shown as open_clip's");
    }
    text
}

fn object(file: &Checkpoint, fits: &[Fit]) -> Value {
    let lines = lines(file);
    let (elements, bytes) = totals(&lines);
    let tensors: Vec<Value> =
        lines.iter().map(|l| json!({ "name": l.name, "dtype": l.element.name(), "shape": l.shape })).collect();
    let fit = |f: &Fit| {
        let wrong: Vec<Value> = f
            .mismatch
            .wrong_shape
            .iter()
            .map(|(name, file, model)| json!({ "name": name, "file": file, "model": model }))
            .collect();
        json!({
            "backbone": f.backbone,
            "exact": f.is_exact(),
            "share": f.share(),
            "matched": f.matched,
            "parameters": f.parameters,
            "head": f.dim,
            "missing": f.mismatch.missing,
            "unexpected": f.mismatch.unexpected,
            "wrong_shape": wrong,
        })
    };
    let source = file.source();
    json!({
        "file": file.path(),
        "container": source.container.to_string(),
        "gzipped": source.gzipped,
        "wrappers": source.wrappers,
        "prefixes": source.prefixes,
        "names_of": source.names_of,
        "metadata": file.metadata().iter().collect::<BTreeMap<_, _>>(),
        "elements": elements,
        "bytes": bytes,
        "fits": fits.iter().take(NEAREST).map(fit).collect::<Vec<_>>(),
        "tensors": tensors,
    })
}

/// Writes a weight file in another form.
pub fn convert(args: &ConvertArgs) -> Result<u8, RunError> {
    let file = open(&args.input)?;
    let backbone = match &args.backbone {
        Some(name) => Some(
            mcpipe_models::backbone(name, &Default::default()).map_err(|error| RunError::Usage(error.to_string()))?,
        ),
        None => None,
    };
    let options = ConvertOptions {
        form: args.to.map(|to| match to {
            NamesArg::Timm => Form::Timm,
            NamesArg::OpenClip => Form::OpenClip,
        }),
        backbone: backbone.as_deref(),
        include: &args.include,
        element: args.dtype.map(|dtype| match dtype {
            DtypeArg::F32 => Element::F32,
            DtypeArg::F16 => Element::F16,
            DtypeArg::Bf16 => Element::Bf16,
        }),
    };
    let tensors = mcpipe_models::weights::convert(&file, options).map_err(refused)?;
    // transformers and other readers ask for the key `format`.
    let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
    write_safetensors(&args.output, &tensors, &metadata).map_err(refused)?;
    print(&format!("{}: {} tensors\n", args.output.display(), tensors.len()))?;
    Ok(0)
}
