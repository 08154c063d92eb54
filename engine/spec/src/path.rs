//! Paths to values: `distill[1].taps[0].student`.

use std::fmt;
use std::ops::Range;

/// Keys and indices deeper than this belong to no pipeline.
pub(crate) const MAX_DEPTH: usize = 32;

/// One step of a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    Key(String),
    Index(usize),
}

/// The way from the top of the pipeline to a value.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Path(pub Vec<Step>);

impl Path {
    pub fn push_key(&mut self, key: &str) {
        self.0.push(Step::Key(key.to_owned()));
    }

    pub fn push_index(&mut self, index: usize) {
        self.0.push(Step::Index(index));
    }

    pub fn pop(&mut self) {
        self.0.pop();
    }
}

impl fmt::Display for Path {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (at, step) in self.0.iter().enumerate() {
            match step {
                Step::Index(index) => write!(f, "[{index}]")?,
                Step::Key(key) => {
                    if at > 0 {
                        f.write_str(".")?;
                    }
                    if !key.is_empty() && key.chars().all(is_bare) {
                        f.write_str(key)?;
                    } else {
                        write!(f, "{key:?}")?;
                    }
                }
            }
        }
        Ok(())
    }
}

fn is_bare(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_' || c == '-'
}

/// Why a text is no path, and where.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct PathError {
    pub message: String,
    pub span: Range<usize>,
}

/// Reads a path: keys between dots, bare or in quotes, and indices in brackets. Gives each step with
/// its place in the text.
pub(crate) fn parse(text: &str) -> Result<Vec<(Step, Range<usize>)>, PathError> {
    let fail = |message: &str, span: Range<usize>| Err(PathError { message: message.to_owned(), span });
    let mut steps = Vec::new();
    let mut rest = text;
    // Whether a key must follow: at the start and after a dot.
    let mut key_expected = true;
    loop {
        let at = text.len() - rest.len();
        let Some(first) = rest.chars().next() else {
            break;
        };
        if steps.len() >= MAX_DEPTH {
            return fail("the path is nested too deeply", at..text.len());
        }
        if first == '[' {
            if key_expected {
                return fail("a key is expected before an index", at..at + 1);
            }
            let Some(end) = rest.find(']') else {
                return fail("the bracket is not closed", at..text.len());
            };
            let Ok(index) = rest[1..end].trim().parse::<usize>() else {
                return fail("an index is a whole number from 0", at + 1..at + end);
            };
            steps.push((Step::Index(index), at..at + end + 1));
            rest = &rest[end + 1..];
        } else if first == '.' {
            if key_expected {
                return fail("a key is missing here", at..at + 1);
            }
            key_expected = true;
            rest = &rest[1..];
            continue;
        } else if !key_expected {
            let end = at + first.len_utf8();
            return fail("`.` or `[` is expected between keys", at..end);
        } else if first == '"' || first == '\'' {
            let Some(end) = rest[1..].find(first) else {
                return fail("the quote is not closed", at..text.len());
            };
            steps.push((Step::Key(rest[1..=end].to_owned()), at..at + end + 2));
            rest = &rest[end + 2..];
        } else {
            let end = rest.find(|c| !is_bare(c)).unwrap_or(rest.len());
            if end == 0 {
                let end = at + first.len_utf8();
                return fail("a key holds letters, digits, `_` and `-`", at..end);
            }
            steps.push((Step::Key(rest[..end].to_owned()), at..at + end));
            rest = &rest[end..];
        }
        key_expected = false;
    }
    if key_expected {
        return fail("a key is missing here", text.len()..text.len());
    }
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn show(text: &str) -> Result<String, String> {
        parse(text)
            .map(|steps| Path(steps.into_iter().map(|(step, _)| step).collect()).to_string())
            .map_err(|error| format!("{} at {:?}", error.message, error.span))
    }

    #[test]
    fn paths_are_read_and_printed() {
        assert_eq!(show("a.b[0].c").as_deref(), Ok("a.b[0].c"));
        assert_eq!(show("teacher.0.name").as_deref(), Ok("teacher.0.name"));
        assert_eq!(show("a.'b c'[ 12 ][3]").as_deref(), Ok("a.\"b c\"[12][3]"));
    }

    #[test]
    fn broken_paths_say_where() {
        for (text, expected) in [
            ("", "a key is missing here at 0..0"),
            ("a.", "a key is missing here at 2..2"),
            ("a..b", "a key is missing here at 2..3"),
            ("[0]", "a key is expected before an index at 0..1"),
            ("a[x]", "an index is a whole number from 0 at 2..3"),
            ("a[0", "the bracket is not closed at 1..3"),
            ("a'b'", "`.` or `[` is expected between keys at 1..2"),
            ("a.'b", "the quote is not closed at 2..4"),
            ("ä", "a key holds letters, digits, `_` and `-` at 0..2"),
        ] {
            assert_eq!(show(text), Err(expected.to_owned()), "{text}");
        }
        assert!(show(&"a.".repeat(100)).is_err());
    }
}
