//! A pipeline file, read and checked.

use std::io::Read;
use std::path::{Path as FilePath, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use crate::check;
use crate::code::Code;
use crate::components::Components;
use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::parse;
use crate::path::{self, Step};
use crate::schema::full_schema;
use crate::semantics;
use crate::source::{Location, Origin, Sources};
use crate::tree::{Node, Value};
use crate::types::Spec;

/// No pipeline file is longer; a greater one is some other file.
const MAX_BYTES: u64 = 1 << 20;

/// The values as written, and the texts that they are written in.
#[derive(Clone, Debug)]
pub(crate) struct Map {
    tree: Node,
    sources: Arc<Sources>,
}

impl Map {
    fn steps(path: &str) -> Vec<Step> {
        path::parse(path).map(|steps| steps.into_iter().map(|(step, _)| step).collect()).unwrap_or_default()
    }

    pub fn span_of(&self, path: &str) -> Location {
        self.tree.find(&Self::steps(path)).0.location.clone()
    }

    pub fn is_set(&self, path: &str) -> bool {
        self.tree.find(&Self::steps(path)).1
    }

    pub fn diagnostic(&self, code: Code, path: &str, message: impl Into<String>) -> Diagnostic {
        let steps = Self::steps(path);
        let location = self.tree.find(&steps).0.location.clone();
        let path = match steps.is_empty() {
            true => path.to_owned(),
            false => self.tree.canonical(&steps).to_string(),
        };
        Diagnostic::new(code, path, Some(location), message)
    }
}

/// A checked pipeline with the place of every value.
#[derive(Clone, Debug)]
pub struct Document {
    /// The pipeline, defaults filled in. Relative paths in the file are joined to its folder; those
    /// given by `--set` stay relative to the current folder.
    pub spec: Spec,
    /// What is allowed but likely not meant.
    pub warnings: Diagnostics,
    map: Map,
}

impl Document {
    /// The place of the value at a path such as `distill[1].taps[0].student`; of the nearest table
    /// above it where the file leaves the value out.
    pub fn span_of(&self, path: &str) -> Location {
        self.map.span_of(path)
    }

    /// Whether the file or an override writes a value at this path, rather than its default.
    pub fn is_set(&self, path: &str) -> bool {
        self.map.is_set(path)
    }

    /// Where the value at a path comes from.
    pub fn origin_of(&self, path: &str) -> Origin {
        self.map.sources.get(self.span_of(path).source).map_or(Origin::File, |source| source.origin)
    }

    /// A diagnostic at the value of a path.
    pub fn diagnostic(&self, code: Code, path: &str, message: impl Into<String>) -> Diagnostic {
        self.map.diagnostic(code, path, message)
    }

    /// Diagnostics that later phases found, ready to be rendered.
    pub fn report(&self, diagnostics: Vec<Diagnostic>) -> Diagnostics {
        Diagnostics::new(diagnostics, Arc::clone(&self.map.sources))
    }

    /// The texts that values come from.
    pub fn sources(&self) -> &Sources {
        &self.map.sources
    }

    /// A model lacks a tap; `taps` are those it has.
    pub fn unknown_tap<'a>(
        &self,
        path: &str,
        tap: &str,
        model: &str,
        taps: impl IntoIterator<Item = &'a str>,
    ) -> Diagnostic {
        self.diagnostic(Code::UnknownTap, path, format!("`{model}` has no tap `{tap}`"))
            .with_label("no such tap")
            .with_choices(tap, &format!("taps of `{model}`"), taps)
    }

    /// Two embeddings of different dimension meet; each is given as its name and dimension.
    pub fn dim_mismatch(&self, path: &str, one: (&str, usize), other: (&str, usize), help: &str) -> Diagnostic {
        let ((one, one_dim), (other, other_dim)) = (one, other);
        self.diagnostic(
            Code::DimMismatch,
            path,
            format!("{one} has dimension {one_dim}, {other} has {other_dim}, and no projection joins them"),
        )
        .with_label(format!("{one_dim} meets {other_dim}"))
        .with_help(help)
    }

    /// A backbone cannot take images of this size; `form` says which it takes, as "a multiple of 32".
    pub fn image_size(&self, path: &str, backbone: &str, size: usize, form: &str) -> Diagnostic {
        self.diagnostic(Code::ImageSize, path, format!("`{backbone}` cannot take images of {size}x{size} pixels"))
            .with_label(format!("expected {form}"))
    }

    /// A file or folder does not exist; `what` says what it should be, as "shard".
    pub fn missing_file(&self, path: &str, what: &str, file: &FilePath) -> Diagnostic {
        let mut diagnostic = self
            .diagnostic(Code::MissingFile, path, format!("there is no {what} `{}`", file.display()))
            .with_label("not found");
        if let Some(parent) = file.parent().filter(|parent| !parent.as_os_str().is_empty()) {
            diagnostic = diagnostic.with_help(if parent.is_dir() {
                format!("the folder `{}` exists, the {what} does not", parent.display())
            } else {
                format!("the folder `{}` does not exist either", parent.display())
            });
        }
        diagnostic.with_help(match self.origin_of(path) {
            Origin::File => "a relative path starts at the folder of the pipeline file",
            Origin::Set | Origin::Sweep => "a relative path in `--set` starts at the current folder",
        })
    }

    /// A component refuses its parameters; `reason` says why.
    pub fn bad_params(&self, path: &str, component: &str, reason: impl Into<String>) -> Diagnostic {
        self.diagnostic(Code::BadParams, path, format!("`{component}` cannot be built with these parameters"))
            .with_label(reason)
    }
}

/// Reads, overrides and checks a pipeline file.
///
/// `overrides` are the texts of `--set` arguments, `path=value`, applied in their order.
///
/// # Errors
/// All mistakes of the first phase that finds any: reading, syntax, form (keys, types, ranges,
/// names), then settings that contradict each other.
pub fn load(path: &FilePath, overrides: &[String], components: &Components) -> Result<Document, Diagnostics> {
    let name = path.display().to_string();
    let unreadable = |message: String, text: &str, span: Option<std::ops::Range<usize>>| {
        let mut sources = Sources::default();
        let source = sources.add(Origin::File, name.clone(), text);
        let location = span.map(|span| Location { source, span });
        let diagnostic = Diagnostic::new(Code::Unreadable, "", location, message)
            .with_help("expected a pipeline file: TOML in UTF-8");
        Diagnostics::new(vec![diagnostic], Arc::new(sources))
    };
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(MAX_BYTES + 1).read_to_end(&mut bytes));
    if let Err(error) = read {
        return Err(unreadable(format!("cannot read `{name}`: {error}"), "", None));
    }
    if bytes.len() as u64 > MAX_BYTES {
        return Err(unreadable(format!("`{name}` is longer than 1 MiB, too long for a pipeline file"), "", None));
    }
    // A binary file has no lines worth showing.
    if bytes.contains(&0) {
        return Err(unreadable(format!("`{name}` is no text file"), "", None));
    }
    match String::from_utf8(bytes) {
        Ok(text) => load_text(path, &text, overrides, components),
        Err(error) => {
            let at = error.utf8_error().valid_up_to();
            let bytes = error.into_bytes();
            let text = String::from_utf8_lossy(&bytes);
            let end = at + char::REPLACEMENT_CHARACTER.len_utf8();
            Err(unreadable(format!("`{name}` is not UTF-8 text"), &text, Some(at..end)))
        }
    }
}

/// [`load`] for a text that is at hand; `path` names it and says where relative paths start.
///
/// # Errors
/// As [`load`].
pub fn load_text(
    path: &FilePath,
    text: &str,
    overrides: &[String],
    components: &Components,
) -> Result<Document, Diagnostics> {
    let mut sources = Sources::default();
    let mut found = Vec::new();
    let source = sources.add(Origin::File, path.display().to_string(), text);
    let mut tree = parse::parse_file(text, source, &mut found);
    // Overrides of a broken file are checked for their own form all the same.
    for argument in overrides {
        parse::apply_override(&mut tree, argument, &mut sources, &mut found);
    }
    let sources = Arc::new(sources);
    if !found.is_empty() {
        return Err(Diagnostics::new(found, sources));
    }

    let schema = full_schema(components);
    let checker = check::check(&tree, &schema);
    let (found, file_paths) = (checker.diagnostics, checker.file_paths);
    if !found.is_empty() {
        return Err(Diagnostics::new(found, sources));
    }

    let mut resolved = tree.clone();
    let base = path.parent().unwrap_or(FilePath::new(""));
    for place in &file_paths {
        if let Some(node) = resolved.find_mut(place)
            && sources.get(node.location.source).is_some_and(|source| source.origin == Origin::File)
            && let Value::String(text) = &mut node.value
        {
            *text = join(base, text);
        }
    }
    let map = Map { tree, sources };
    let mut spec = match Spec::deserialize(resolved.to_toml()) {
        Ok(spec) => spec,
        Err(error) => {
            let diagnostic = undecodable(&map, &error.to_string());
            return Err(Diagnostics::new(vec![diagnostic], map.sources));
        }
    };
    // Without distillation the whole loss is CLIP's, unless the file says otherwise.
    if spec.distill.is_empty() && !map.is_set("loss.lambda") {
        spec.loss.lambda = 0.0;
    }

    let found = Diagnostics::new(semantics::check(&spec, &map), Arc::clone(&map.sources));
    if found.has_errors() {
        return Err(found);
    }
    Ok(Document { spec, warnings: found, map })
}

/// A path from the file, seen from the current folder. Plain text, for a shard pattern is no path yet.
fn join(base: &FilePath, text: &str) -> String {
    let joined: PathBuf = base.join(text);
    match joined.to_str() {
        Some(joined) => joined.to_owned(),
        // The folder's name is no UTF-8, which TOML cannot hold: the path stays as it was written.
        None => text.to_owned(),
    }
}

/// What passes the schema but not the types: a component or type whose schema allows too much.
fn undecodable(map: &Map, error: &str) -> Diagnostic {
    let mut lines = error.lines();
    let message = lines.next().unwrap_or("the pipeline does not decode").to_owned();
    let path = lines
        .find_map(|line| Some(line.trim().strip_prefix("in `")?.trim_end_matches('`').to_owned()))
        .unwrap_or_default();
    map.diagnostic(Code::WrongType, &path, message).with_label("not accepted")
}
