//! The texts that a pipeline's values come from, and places in them.

use std::ops::Range;

/// What kind of text a value comes from.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Origin {
    /// The pipeline file.
    File,
    /// The text of a `--set` argument.
    Set,
    /// A value that a sweep puts in.
    Sweep,
}

impl Origin {
    /// The word for it in JSON.
    pub fn id(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Set => "set",
            Self::Sweep => "sweep",
        }
    }
}

/// A text that values come from.
#[derive(Clone, Debug)]
pub struct Source {
    /// What kind of text it is.
    pub origin: Origin,
    /// The file's path, or the option that gave the text.
    pub name: String,
    /// The text.
    pub text: String,
}

/// A place in a source.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Location {
    /// Which source: its number in [`Sources`].
    pub source: usize,
    /// Bytes of the source's text.
    pub span: Range<usize>,
}

/// Line and column, both from 1; a column counts characters.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Position {
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
}

/// All texts of one pipeline: the file first, then overrides in their order.
#[derive(Clone, Debug, Default)]
pub struct Sources {
    list: Vec<Source>,
}

impl Sources {
    /// Adds a text and gives its number.
    pub fn add(&mut self, origin: Origin, name: impl Into<String>, text: impl Into<String>) -> usize {
        self.list.push(Source { origin, name: name.into(), text: text.into() });
        self.list.len() - 1
    }

    /// The source of a number.
    pub fn get(&self, source: usize) -> Option<&Source> {
        self.list.get(source)
    }

    /// The text at a place; empty where the place lies outside.
    pub fn text(&self, location: &Location) -> &str {
        self.get(location.source).and_then(|source| source.text.get(location.span.clone())).unwrap_or_default()
    }

    /// Line and column of both ends of a place.
    pub fn positions(&self, location: &Location) -> Option<(Position, Position)> {
        let text = &self.get(location.source)?.text;
        Some((position(text, location.span.start), position(text, location.span.end)))
    }
}

fn position(text: &str, offset: usize) -> Position {
    let offset = floor_boundary(text, offset);
    let before = &text[..offset];
    let line_start = before.rfind('\n').map_or(0, |at| at + 1);
    Position { line: before.matches('\n').count() + 1, column: before[line_start..].chars().count() + 1 }
}

/// The greatest character boundary not above `offset`.
pub(crate) fn floor_boundary(text: &str, offset: usize) -> usize {
    let mut offset = offset.min(text.len());
    while !text.is_char_boundary(offset) {
        offset -= 1;
    }
    offset
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_count_characters() {
        let mut sources = Sources::default();
        let source = sources.add(Origin::File, "f", "a\nüb = 1\n");
        let at = |span| sources.positions(&Location { source, span });
        let start = |span| at(span).map(|(start, _)| (start.line, start.column));
        assert_eq!(start(0..1), Some((1, 1)));
        assert_eq!(start(4..5), Some((2, 2)));
        assert_eq!(start(3..5), Some((2, 1)), "inside a character");
        assert_eq!(start(900..901), Some((3, 1)), "past the end");
    }
}
