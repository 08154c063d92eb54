//! What is wrong with a pipeline, where, and what to do about it.

use std::fmt;
use std::sync::Arc;

use crate::code::{Code, Severity};
use crate::names::{Listed, nearest};
use crate::source::{Location, Sources};

/// One mistake in a pipeline.
#[derive(Clone, Debug, PartialEq)]
pub struct Diagnostic {
    /// Its kind.
    pub code: Code,
    /// How much it matters.
    pub severity: Severity,
    /// Path of the value, as `distill[1].taps[0].student`; empty for the whole file.
    pub path: String,
    /// Where the value is written; none where a file could not be read at all.
    pub location: Option<Location>,
    /// What is wrong, in one sentence.
    pub message: String,
    /// A few words at the value itself.
    pub label: String,
    /// Other places that belong to the matter, each with a few words.
    pub related: Vec<(Location, String)>,
    /// The expected form and what to do.
    pub help: Option<String>,
    /// The nearest valid name, where a name is wrong and one is near.
    pub nearest: Option<String>,
}

impl Diagnostic {
    /// A diagnostic at a place; see [`crate::Document::diagnostic`] for one at a path.
    pub fn new(code: Code, path: impl Into<String>, location: Option<Location>, message: impl Into<String>) -> Self {
        Self {
            code,
            severity: code.severity(),
            path: path.into(),
            location,
            message: message.into(),
            label: String::new(),
            related: Vec::new(),
            help: None,
            nearest: None,
        }
    }

    /// Sets the words at the value.
    pub fn with_label(mut self, label: impl Into<String>) -> Self {
        self.label = label.into();
        self
    }

    /// Adds a sentence to the help.
    pub fn with_help(mut self, help: impl AsRef<str>) -> Self {
        let help = help.as_ref();
        match &mut self.help {
            Some(text) => {
                text.push('\n');
                text.push_str(help);
            }
            None => self.help = Some(help.to_owned()),
        }
        self
    }

    /// Adds another place that belongs to the matter.
    pub fn with_related(mut self, location: Location, label: impl Into<String>) -> Self {
        self.related.push((location, label.into()));
        self
    }

    /// Names the valid choices: the nearest to `name` goes to the label, all of them to the help.
    /// `what` says what they are, as in "taps of `vit`".
    pub fn with_choices<'a>(mut self, name: &str, what: &str, choices: impl IntoIterator<Item = &'a str>) -> Self {
        let choices: Vec<&str> = choices.into_iter().collect();
        if let Some(near) = nearest(name, choices.iter().copied()) {
            self.label = format!("did you mean `{near}`?");
            self.nearest = Some(near.to_owned());
        }
        if choices.is_empty() {
            self.with_help(format!("there are no {what}"))
        } else {
            self.with_help(format!("{what}: {}", Listed(&choices)))
        }
    }
}

/// All mistakes that one phase found, with the texts they point into.
#[derive(Clone)]
pub struct Diagnostics {
    pub(crate) list: Vec<Diagnostic>,
    pub(crate) sources: Arc<Sources>,
}

impl Diagnostics {
    pub(crate) fn new(mut list: Vec<Diagnostic>, sources: Arc<Sources>) -> Self {
        // In the order of the text: the file first, then the overrides.
        list.sort_by_key(|diagnostic| {
            diagnostic.location.as_ref().map(|location| (location.source, location.span.start, location.span.end))
        });
        Self { list, sources }
    }

    /// The diagnostics, in the order of the text.
    pub fn iter(&self) -> std::slice::Iter<'_, Diagnostic> {
        self.list.iter()
    }

    /// Whether there is none.
    pub fn is_empty(&self) -> bool {
        self.list.is_empty()
    }

    /// How many there are.
    pub fn len(&self) -> usize {
        self.list.len()
    }

    /// Whether one of them is an error.
    pub fn has_errors(&self) -> bool {
        self.list.iter().any(|diagnostic| diagnostic.severity == Severity::Error)
    }

    /// The texts that they point into.
    pub fn sources(&self) -> &Sources {
        &self.sources
    }
}

impl<'a> IntoIterator for &'a Diagnostics {
    type Item = &'a Diagnostic;
    type IntoIter = std::slice::Iter<'a, Diagnostic>;

    fn into_iter(self) -> Self::IntoIter {
        self.iter()
    }
}

/// One line for each: `path: message [code]`.
impl fmt::Display for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, diagnostic) in self.list.iter().enumerate() {
            if at > 0 {
                f.write_str("\n")?;
            }
            if let Some(location) = &diagnostic.location
                && let Some(source) = self.sources.get(location.source)
                && let Some((start, _)) = self.sources.positions(location)
            {
                write!(f, "{}:{}:{}: ", source.name, start.line, start.column)?;
            }
            let Diagnostic { message, code, .. } = diagnostic;
            write!(f, "{message} [{code}]")?;
        }
        Ok(())
    }
}

impl fmt::Debug for Diagnostics {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl std::error::Error for Diagnostics {}
