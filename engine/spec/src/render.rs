//! Diagnostics as text for people and as JSON for editors.

use std::fmt::{self, Write as _};
use std::io::IsTerminal;
use std::ops::Range;

use miette::{GraphicalReportHandler, GraphicalTheme, LabeledSpan, NamedSource, NarratableReportHandler, SourceCode};
use serde_json::{Value, json};

use crate::code::Severity;
use crate::diagnostic::{Diagnostic, Diagnostics};
use crate::source::{Location, Position, Sources, floor_boundary};

/// How diagnostics are rendered.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Style {
    /// With the source lines, drawn with box characters, in colour.
    Fancy,
    /// With the source lines, in ASCII, without colour.
    Plain,
    /// In sentences, without drawing, as a screen reader wants it.
    Narrated,
}

impl Style {
    /// The style for standard error: fancy on a terminal, plain elsewhere and under `NO_COLOR`,
    /// narrated under `NO_GRAPHICS`.
    pub fn for_stderr() -> Self {
        let set = |name: &str| std::env::var_os(name).is_some_and(|value| !value.is_empty());
        if set("NO_GRAPHICS") {
            Self::Narrated
        } else if set("NO_COLOR") || !std::io::stderr().is_terminal() {
            Self::Plain
        } else {
            Self::Fancy
        }
    }
}

/// Columns that text is wrapped to.
const WIDTH: usize = 110;

impl Diagnostics {
    /// All diagnostics as text, in one go, closed by a line that counts them.
    pub fn render(&self, style: Style) -> String {
        let mut out = String::new();
        for diagnostic in &self.list {
            let report = Report::new(diagnostic, &self.sources);
            // Writing to a string does not fail; should a handler refuse, the message still shows.
            if report.render(style, &mut out).is_err() {
                let _ = writeln!(out, "{}: {}", diagnostic.code, diagnostic.message);
            }
            if !out.ends_with("\n\n") {
                out.push('\n');
            }
        }
        let count = |severity, one: &str| {
            let count = self.list.iter().filter(|d| d.severity == severity).count();
            match count {
                0 => None,
                1 => Some(format!("1 {one}")),
                _ => Some(format!("{count} {one}s")),
            }
        };
        let counts: Vec<String> =
            [count(Severity::Error, "error"), count(Severity::Warning, "warning")].into_iter().flatten().collect();
        if !counts.is_empty() {
            out.push_str(&counts.join(", "));
            out.push('\n');
        }
        out
    }

    /// One object for each diagnostic: `file` (absent for an override), `origin`, `line`, `column`,
    /// `end_line`, `end_column` (from 1, in characters), `start`, `end` (bytes), `code`,
    /// `severity`, `path`, `message`, `label`, `help`, `nearest`, `related`.
    pub fn to_json(&self) -> Vec<Value> {
        self.list
            .iter()
            .map(|diagnostic| {
                let mut object = place(diagnostic.location.as_ref(), &self.sources);
                let related: Vec<Value> = diagnostic
                    .related
                    .iter()
                    .map(|(location, label)| {
                        let mut object = place(Some(location), &self.sources);
                        object["message"] = json!(label);
                        object
                    })
                    .collect();
                object["code"] = json!(diagnostic.code.id());
                object["severity"] = json!(diagnostic.severity.id());
                object["path"] = json!(diagnostic.path);
                object["message"] = json!(diagnostic.message);
                object["label"] = json!(diagnostic.label);
                object["help"] = json!(diagnostic.help);
                object["nearest"] = json!(diagnostic.nearest);
                object["related"] = json!(related);
                object
            })
            .collect()
    }

    /// [`Self::to_json`] as text, one object a line.
    pub fn to_json_lines(&self) -> String {
        self.to_json().iter().fold(String::new(), |mut out, object| {
            let _ = writeln!(out, "{object}");
            out
        })
    }
}

fn place(location: Option<&Location>, sources: &Sources) -> Value {
    // A file that cannot be read has no place in it, but is still the file.
    let source = sources.get(location.map_or(0, |location| location.source));
    let mut object = json!({
        "file": source.map(|source| &source.name),
        "origin": source.map(|source| source.origin.id()),
    });
    if let Some(location) = location
        && let Some((start, end)) = sources.positions(location)
    {
        let Position { line, column } = start;
        object["line"] = json!(line);
        object["column"] = json!(column);
        object["end_line"] = json!(end.line);
        object["end_column"] = json!(end.column);
        object["start"] = json!(location.span.start);
        object["end"] = json!(location.span.end);
    }
    object
}

/// A diagnostic as miette's handlers take it.
struct Report {
    message: String,
    code: &'static str,
    severity: Severity,
    help: Option<String>,
    labels: Vec<LabeledSpan>,
    source: Option<NamedSource<String>>,
}

impl Report {
    fn new(diagnostic: &Diagnostic, sources: &Sources) -> Self {
        let mut report = Self {
            message: diagnostic.message.clone(),
            code: diagnostic.code.id(),
            severity: diagnostic.severity,
            help: diagnostic.help.clone(),
            labels: Vec::new(),
            source: None,
        };
        let Some(location) = &diagnostic.location else {
            return report;
        };
        let Some(source) = sources.get(location.source) else {
            return report;
        };
        if !drawable(&source.text, location) {
            let start = sources.positions(location).map_or((1, 1), |(start, _)| (start.line, start.column));
            report.message = format!("{}:{}:{}: {}", source.name, start.0, start.1, report.message);
            return report;
        }
        report.source = Some(NamedSource::new(&source.name, source.text.clone()));
        let label = |location: &Location, text: &str, primary: bool| {
            let span = visible(&source.text, location.span.clone());
            let (start, length) = (span.start, span.len());
            let text = (!text.is_empty()).then(|| text.to_owned());
            match primary {
                true => LabeledSpan::new_primary_with_span(text, (start, length)),
                false => LabeledSpan::new_with_span(text, (start, length)),
            }
        };
        report.labels.push(label(location, &diagnostic.label, true));
        for (other, text) in &diagnostic.related {
            if other.source == location.source && drawable(&source.text, other) {
                report.labels.push(label(other, text, false));
                continue;
            }
            // One drawing shows one text: what stands in another is told.
            let Some(source) = sources.get(other.source) else {
                continue;
            };
            let line = sources.positions(other).map_or(1, |(start, _)| start.line);
            let note = format!("{text}: `{}` ({}, line {line})", sources.text(other), source.name);
            report.help = Some(match report.help.take() {
                Some(help) => format!("{help}\n{note}"),
                None => note,
            });
        }
        report
    }

    fn render(&self, style: Style, out: &mut String) -> fmt::Result {
        let handler = match style {
            Style::Narrated => return NarratableReportHandler::new().render_report(out, self),
            Style::Fancy => GraphicalReportHandler::new_themed(GraphicalTheme::unicode()),
            Style::Plain => GraphicalReportHandler::new_themed(GraphicalTheme::none()),
        };
        handler.with_width(WIDTH).with_context_lines(1).with_links(false).render_report(out, self)
    }
}

/// Whether the lines at a place are of a length to be shown; no line that a person wrote is longer.
fn drawable(text: &str, location: &Location) -> bool {
    const LONGEST: usize = 2000;
    let start = floor_boundary(text, location.span.start);
    let end = floor_boundary(text, location.span.end).max(start);
    let is_short = |line: &str| line.len() <= LONGEST;
    // The lines of the place, and one before and after as context.
    let first = text[..start].rfind('\n').unwrap_or(0);
    let first = text[..first].rfind('\n').map_or(0, |at| at + 1);
    let lines = text[start..end].matches('\n').count() + 3;
    text[first..].split('\n').take(lines).all(is_short)
}

/// A place that can be underlined: nothing, as at the end of a line, gives way to the character before it.
fn visible(text: &str, span: Range<usize>) -> Range<usize> {
    let end = floor_boundary(text, span.end);
    let start = floor_boundary(text, span.start).min(end);
    if start < end {
        return start..end;
    }
    let after = text[start..].chars().next().filter(|c| !c.is_control());
    let before = text[..start].chars().next_back().filter(|c| !c.is_control());
    match (after, before) {
        (Some(after), _) => start..start + after.len_utf8(),
        (None, Some(before)) => start - before.len_utf8()..start,
        (None, None) => start..start,
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Report {}

impl miette::Diagnostic for Report {
    fn code<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        Some(Box::new(self.code))
    }

    fn severity(&self) -> Option<miette::Severity> {
        Some(match self.severity {
            Severity::Error => miette::Severity::Error,
            Severity::Warning => miette::Severity::Warning,
        })
    }

    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as Box<dyn fmt::Display>)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.source.as_ref().map(|source| source as &dyn SourceCode)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        match self.labels.is_empty() {
            true => None,
            false => Some(Box::new(self.labels.iter().cloned())),
        }
    }
}
