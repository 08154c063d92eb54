//! The pipeline as written: every value with the place it comes from.

use std::ops::Range;

use toml::de::{DeTable, DeValue};

use crate::code::Code;
use crate::diagnostic::Diagnostic;
use crate::path::{MAX_DEPTH, Path, Step};
use crate::source::Location;

/// A value and where it is written.
#[derive(Clone, Debug)]
pub(crate) struct Node {
    pub value: Value,
    /// The value's place; for a table of its own, that of its header.
    pub location: Location,
    /// The place of the key that holds it.
    pub key: Option<Location>,
}

#[derive(Clone, Debug)]
pub(crate) enum Value {
    Bool(bool),
    Integer(i64),
    Float(f64),
    String(String),
    Datetime(toml::value::Datetime),
    Array(Vec<Node>),
    Table(Vec<(String, Node)>),
}

impl Node {
    /// The value of a key, where this is a table that has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.value {
            Value::Table(entries) => entries.iter().find_map(|(name, node)| (name == key).then_some(node)),
            _ => None,
        }
    }

    pub fn as_str(&self) -> Option<&str> {
        match &self.value {
            Value::String(text) => Some(text),
            _ => None,
        }
    }

    pub fn items(&self) -> &[Node] {
        match &self.value {
            Value::Array(items) => items,
            _ => &[],
        }
    }

    fn step(&self, step: &Step) -> Option<&Node> {
        match (step, &self.value) {
            (Step::Index(index), Value::Array(items)) => items.get(*index),
            (Step::Key(key), Value::Array(items)) => items.get(key.parse::<usize>().ok()?),
            (Step::Key(key), Value::Table(_)) => self.get(key),
            _ => None,
        }
    }

    /// The node at a path, or the last one on the way that exists and `false`.
    pub fn find<'a>(&self, path: impl IntoIterator<Item = &'a Step>) -> (&Node, bool) {
        let mut node = self;
        for step in path {
            match node.step(step) {
                Some(next) => node = next,
                None => return (node, false),
            }
        }
        (node, true)
    }

    /// The path with a number in an array written as an index, whether it came as one or as a key.
    pub fn canonical(&self, path: &[Step]) -> Path {
        let mut node = Some(self);
        let mut canonical = Path::default();
        for step in path {
            let in_array = node.is_some_and(|node| matches!(node.value, Value::Array(_)));
            match step {
                Step::Key(key) => match key.parse() {
                    Ok(index) if in_array => canonical.push_index(index),
                    _ => canonical.push_key(key),
                },
                Step::Index(index) => canonical.push_index(*index),
            }
            node = node.and_then(|node| node.step(step));
        }
        canonical
    }

    pub fn find_mut(&mut self, path: &Path) -> Option<&mut Node> {
        let mut node = self;
        for step in &path.0 {
            node = match (step, &mut node.value) {
                (Step::Index(index), Value::Array(items)) => items.get_mut(*index)?,
                (Step::Key(key), Value::Table(entries)) => &mut entries.iter_mut().find(|(name, _)| name == key)?.1,
                _ => return None,
            };
        }
        Some(node)
    }

    /// The plain value, for decoding.
    pub fn to_toml(&self) -> toml::Value {
        match &self.value {
            Value::Bool(value) => toml::Value::Boolean(*value),
            Value::Integer(value) => toml::Value::Integer(*value),
            Value::Float(value) => toml::Value::Float(*value),
            Value::String(value) => toml::Value::String(value.clone()),
            Value::Datetime(value) => toml::Value::Datetime(*value),
            Value::Array(items) => toml::Value::Array(items.iter().map(Self::to_toml).collect()),
            Value::Table(entries) => {
                toml::Value::Table(entries.iter().map(|(key, node)| (key.clone(), node.to_toml())).collect())
            }
        }
    }
}

/// Turns parsed TOML into nodes of one source; what 64 bits cannot hold goes to `diagnostics`.
pub(crate) struct Builder<'a> {
    /// Number of the source.
    pub source: usize,
    /// Added to every span: where the parsed text starts in the source.
    pub offset: usize,
    pub diagnostics: &'a mut Vec<Diagnostic>,
}

impl Builder<'_> {
    pub fn location(&self, span: Range<usize>) -> Location {
        Location { source: self.source, span: span.start + self.offset..span.end + self.offset }
    }

    pub fn table(&mut self, table: &DeTable<'_>, depth: usize) -> Value {
        Value::Table(
            table
                .iter()
                .map(|(key, value)| {
                    let key_location = self.location(key.span());
                    let mut node = self.node(value.get_ref(), value.span(), depth + 1);
                    node.key = Some(key_location);
                    (key.get_ref().to_string(), node)
                })
                .collect(),
        )
    }

    pub fn node(&mut self, value: &DeValue<'_>, span: Range<usize>, depth: usize) -> Node {
        let location = self.location(span);
        if depth > MAX_DEPTH {
            self.diagnostics.push(Diagnostic::new(
                Code::Syntax,
                "",
                Some(location.clone()),
                "the value is nested too deeply",
            ));
            return Node { value: Value::Bool(false), location, key: None };
        }
        let value = match value {
            DeValue::String(text) => Value::String(text.to_string()),
            DeValue::Boolean(value) => Value::Bool(*value),
            DeValue::Datetime(value) => Value::Datetime(*value),
            DeValue::Integer(number) => match i64::from_str_radix(number.as_str(), number.radix()) {
                Ok(value) => Value::Integer(value),
                Err(_) => {
                    self.too_great(&location, "an integer in TOML has 64 bits");
                    Value::Integer(0)
                }
            },
            DeValue::Float(number) => match number.as_str().parse::<f64>() {
                Ok(value) if value.is_finite() || !number.as_str().contains(|c: char| c.is_ascii_digit()) => {
                    Value::Float(value)
                }
                _ => {
                    self.too_great(&location, "a number in TOML is at most about 1.8e308");
                    Value::Float(0.0)
                }
            },
            DeValue::Array(items) => {
                Value::Array(items.iter().map(|item| self.node(item.get_ref(), item.span(), depth + 1)).collect())
            }
            DeValue::Table(table) => self.table(table, depth),
        };
        Node { value, location, key: None }
    }

    fn too_great(&mut self, location: &Location, help: &str) {
        self.diagnostics.push(
            Diagnostic::new(Code::OutOfRange, "", Some(location.clone()), "the number is too great")
                .with_label("does not fit")
                .with_help(help),
        );
    }
}

impl Value {
    /// The word for the type in a sentence.
    pub fn type_name(&self) -> &'static str {
        match self {
            Self::Bool(_) => "a boolean",
            Self::Integer(_) => "an integer",
            Self::Float(_) => "a float",
            Self::String(_) => "a string",
            Self::Datetime(_) => "a date",
            Self::Array(_) => "an array",
            Self::Table(_) => "a table",
        }
    }
}
