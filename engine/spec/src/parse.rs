//! Text to a tree of values, and `--set` arguments applied to it.

use std::ops::Range;

use toml::de::{DeTable, DeValue, Error};

use crate::code::Code;
use crate::diagnostic::Diagnostic;
use crate::path::{self, MAX_DEPTH, Path, Step};
use crate::source::{Location, Origin, Sources, floor_boundary};
use crate::tree::{Builder, Node, Value};

/// Parses the text of a source; reports every mistake of syntax.
pub(crate) fn parse_file(text: &str, source: usize, diagnostics: &mut Vec<Diagnostic>) -> Node {
    let mut root = Node {
        value: Value::Table(Vec::new()),
        // What the top level lacks is to be added at the end.
        location: Location { source, span: text.trim_end().len()..text.trim_end().len() },
        key: None,
    };
    if let Some(span) = too_deep(text) {
        diagnostics.push(Diagnostic::new(
            Code::Syntax,
            "",
            Some(Location { source, span }),
            "the key is nested too deeply",
        ));
        return root;
    }
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut builder = Builder { source, offset: 0, diagnostics };
    root.value = builder.table(table.get_ref(), 0);
    let mut slips: Vec<Diagnostic> = errors.iter().map(|error| syntax(error, text, source, 0)).collect();
    slips.sort_by_key(|slip| slip.location.as_ref().map(|location| location.span.start));
    let mut last_line = None;
    for mut slip in slips {
        let Some(location) = slip.location.clone() else { continue };
        // One slip makes the parser stumble several times in its line: the first says what it was.
        let line = text[..location.span.start].matches('\n').count();
        if last_line == Some(line) {
            continue;
        }
        last_line = Some(line);
        if slip.code == Code::DuplicateKey
            && let Some(first) = first_written(&root, text, &location)
        {
            slip = slip.with_related(first, "first here");
        }
        diagnostics.push(slip);
    }
    root
}

/// Where the key that stands a second time at `again` stands first: in the innermost table that starts
/// before and has it, the top level else; for a header, the same header earlier.
fn first_written(root: &Node, text: &str, again: &Location) -> Option<Location> {
    fn innermost<'a>(node: &'a Node, key: &str, before: usize, best: &mut Option<(usize, &'a Location)>) {
        let start = node.location.span.start;
        if let Some(location) = node.get(key).and_then(|found| found.key.as_ref())
            && location.span.start < before
            && start < before
            && best.is_none_or(|(other, _)| other <= start)
        {
            *best = Some((start, location));
        }
        match &node.value {
            Value::Table(entries) => entries.iter().for_each(|(_, child)| innermost(child, key, before, best)),
            Value::Array(items) => items.iter().for_each(|item| innermost(item, key, before, best)),
            _ => {}
        }
    }
    let key = text.get(again.span.clone())?;
    let before = again.span.start;
    let line_start = text[..before].rfind('\n').map_or(0, |at| at + 1);
    let header =
        |line: &str| line.trim_start().starts_with('[').then(|| line.trim().trim_matches(['[', ']']).to_owned());
    if let Some(name) = header(text[line_start..].lines().next()?) {
        let mut start = 0;
        for line in text[..line_start].split_inclusive('\n') {
            if header(line).as_deref() == Some(&name) {
                let at = start + line.find(&name)?;
                return Some(Location { source: again.source, span: at..at + name.len() });
            }
            start += line.len();
        }
        return None;
    }
    let mut best = None;
    innermost(root, key, before, &mut best);
    let at_top = || root.get(key)?.key.as_ref().filter(|first| first.span.start < before);
    best.map(|(_, location)| location).or_else(at_top).cloned()
}

/// Where a chain of dotted keys is longer than any pipeline's. Nested tables are built and dropped
/// recursively, so a chain without end would exhaust the stack.
fn too_deep(text: &str) -> Option<Range<usize>> {
    let mut start = 0;
    let mut dots = 0;
    let mut last = ' ';
    for (at, c) in text.char_indices() {
        match c {
            // Dots in a row, as in a ruler of dots, join no keys.
            '.' if last == '.' => {}
            '.' => {
                dots += 1;
                if dots > MAX_DEPTH {
                    return Some(start..at);
                }
            }
            'a'..='z' | 'A'..='Z' | '0'..='9' | '_' | '-' | ' ' | '\t' | '"' | '\'' => {}
            _ => {
                start = at + c.len_utf8();
                dots = 0;
            }
        }
        last = c;
    }
    None
}

fn syntax(error: &Error, text: &str, source: usize, offset: usize) -> Diagnostic {
    let message = error.message();
    let (what, expected) = match message.rsplit_once(", expected ") {
        Some((what, "nothing")) => (what, None),
        Some((what, expected)) => (what, Some(expected)),
        None => (message, None),
    };
    let span = error.span().unwrap_or(0..0);
    let start = floor_boundary(text, span.start);
    let end = floor_boundary(text, span.end).max(start);
    let location = Location { source, span: start + offset..end + offset };
    if what.starts_with("duplicate key") {
        let key = &text[start..end];
        return Diagnostic::new(Code::DuplicateKey, "", Some(location), format!("`{}` is written twice", key.trim()))
            .with_label("again here")
            .with_help("keep one of the two; each table of a list has a header in double brackets, as `[[teacher]]`");
    }
    let diagnostic = Diagnostic::new(Code::Syntax, "", Some(location), what).with_label("here");
    let line_start = text[..start].rfind('\n').map_or(0, |at| at + 1);
    let line = text[line_start..].lines().next().unwrap_or_default();
    let written = line.split_once('=').map(|(_, value)| value.trim());
    match (written, expected) {
        (Some(word @ ("True" | "False")), _) => diagnostic.with_help(format!("TOML writes `{}`", word.to_lowercase())),
        (Some("None" | "null" | "nil"), _) => diagnostic.with_help("TOML has no empty value: leave the key out"),
        (_, Some("literal string")) => match text[start..end].contains(' ') {
            true => diagnostic
                .with_label("expected a value")
                .with_help("text stands in quotes: `\"text\"`; between two values stands a comma"),
            false => diagnostic.with_label("expected a value").with_help("text stands in quotes: `\"text\"`"),
        },
        (_, Some(expected)) => diagnostic.with_label(format!("expected {expected}")),
        (_, None) => diagnostic,
    }
}

/// Applies the text of a `--set` argument, `path = value`, to the tree.
///
/// The value is read as TOML and, where it does not start like a TOML string, array or table, as bare
/// text failing that. Tables on the way are made where they are absent; the index one past the end
/// of an array adds an item.
pub(crate) fn apply_override(root: &mut Node, text: &str, sources: &mut Sources, diagnostics: &mut Vec<Diagnostic>) {
    let source = sources.add(Origin::Set, "--set", text);
    let at = |span: Range<usize>| Location { source, span };
    let fail = |span: Range<usize>, message: String| {
        Diagnostic::new(Code::BadOverride, "", Some(at(span)), message)
            .with_label("here")
            .with_help("expected `path=value`, as in `--set training.steps=100` or `--set teacher[0].dim=64`")
    };
    let Some(equals) = text.find('=') else {
        diagnostics.push(fail(text.len()..text.len(), format!("the override `{text}` has no `=`")));
        return;
    };
    let blank = text.len() - text.trim_start().len();
    let path_text = text[..equals].trim();
    let steps = match path::parse(path_text) {
        Ok(steps) => steps,
        Err(error) => {
            let span = error.span.start + blank..error.span.end + blank;
            diagnostics.push(fail(span, error.message));
            return;
        }
    };
    let steps: Vec<(Step, Location)> =
        steps.into_iter().map(|(step, span)| (step, at(span.start + blank..span.end + blank))).collect();
    let after = &text[equals + 1..];
    let value_text = after.trim();
    let value_start = equals + 1 + (after.len() - after.trim_start().len());
    let value_span = value_start..value_start + value_text.len();
    if let Some(span) = too_deep(value_text) {
        diagnostics
            .push(fail(span.start + value_start..span.end + value_start, "the value is nested too deeply".to_owned()));
        return;
    }
    let mut value = match DeValue::parse(value_text) {
        Ok(value) => {
            let mut builder = Builder { source, offset: value_start, diagnostics };
            builder.node(value.get_ref(), value.span(), 1)
        }
        Err(error) if value_text.starts_with(['[', '{', '"', '\'']) => {
            let mut diagnostic = syntax(&error, value_text, source, value_start);
            diagnostic.code = Code::BadOverride;
            diagnostics.push(diagnostic);
            return;
        }
        Err(_) if value_text.is_empty() => {
            diagnostics.push(fail(value_span, format!("the override of `{path_text}` has no value")));
            return;
        }
        Err(_) => Node { value: Value::String(value_text.to_owned()), location: at(value_span), key: None },
    };
    value.key = steps.last().map(|(_, location)| location.clone());
    if let Err((location, message)) = set(root, &steps, value) {
        diagnostics.push(Diagnostic::new(Code::BadOverride, path_text, Some(location), message).with_label("here"));
    }
}

fn set(root: &mut Node, steps: &[(Step, Location)], value: Node) -> Result<(), (Location, String)> {
    let mut node = root;
    let mut walked = Path::default();
    // Whether this path itself made the node.
    let mut made = false;
    for (step, location) in steps {
        let here = || match walked.0.is_empty() {
            true => "the top level".to_owned(),
            false => format!("`{walked}`"),
        };
        let empty =
            || Node { value: Value::Table(Vec::new()), location: location.clone(), key: Some(location.clone()) };
        // A number is an index in an array, whether in brackets or between dots.
        let index = match step {
            Step::Index(index) => Some(*index),
            Step::Key(key) => key.parse().ok(),
        };
        // A path into a list that the file does not have makes the list.
        if made && index == Some(0) {
            node.value = Value::Array(Vec::new());
        }
        made = false;
        let taken = match (&mut node.value, step, index) {
            (Value::Array(items), _, Some(index)) => {
                let count = items.len();
                if index > count {
                    let message = format!(
                        "{} has {count} {}, so there is no index {index}",
                        here(),
                        if count == 1 { "item" } else { "items" }
                    );
                    return Err((location.clone(), message));
                }
                if index == count {
                    made = true;
                    items.push(empty());
                }
                &mut items[index]
            }
            (Value::Table(entries), Step::Key(key), _) => {
                let at = match entries.iter().position(|(name, _)| name == key) {
                    Some(at) => at,
                    None => {
                        made = true;
                        entries.push((key.clone(), empty()));
                        entries.len() - 1
                    }
                };
                &mut entries[at].1
            }
            (Value::Table(_), ..) => {
                return Err((location.clone(), format!("{} is a table and has no index", here())));
            }
            (Value::Array(_), ..) => {
                return Err((
                    location.clone(),
                    format!("{} is an array: expected an index, as in `{walked}[0]`", here()),
                ));
            }
            (other, ..) => {
                let message = format!("{} is {}, which holds no further keys", here(), other.type_name());
                return Err((location.clone(), message));
            }
        };
        node = taken;
        match step {
            Step::Index(index) => walked.push_index(*index),
            Step::Key(key) => walked.push_key(key),
        }
    }
    *node = value;
    Ok(())
}
