//! Types, bounds and choices of single values.

use serde_json::Value as Schema;

use super::expected::{constants, expected, plain};
use super::{Checker, text};
use crate::code::Code;
use crate::names::Listed;
use crate::tree::{Node, Value};

/// Whether a value has the type that a schema asks for; an integer stands for a number.
pub(super) fn has_type(value: &Value, schema: &Schema) -> bool {
    let fits = |name: &str| match name {
        "integer" => matches!(value, Value::Integer(_)),
        "number" => matches!(value, Value::Integer(_) | Value::Float(_)),
        "string" => matches!(value, Value::String(_)),
        "boolean" => matches!(value, Value::Bool(_)),
        "array" => matches!(value, Value::Array(_)),
        "object" => matches!(value, Value::Table(_)),
        _ => true,
    };
    match schema.get("type") {
        Some(Schema::String(name)) => fits(name),
        Some(Schema::Array(names)) => names.iter().filter_map(Schema::as_str).any(fits),
        _ => true,
    }
}

impl<'a> Checker<'a> {
    /// Checks what concerns the value itself; false where its type is wrong.
    pub(super) fn value(&mut self, node: &Node, schema: &'a Schema) -> bool {
        if !has_type(&node.value, schema) {
            self.wrong_type(node, schema);
            return false;
        }
        if let Some(constant) = schema.get("const")
            && !equals(&node.value, constant)
        {
            let name = self.name();
            self.report(Code::UnknownValue, node, format!("{name} has a value that it does not take"), |d| {
                d.with_label(format!("expected {}", plain(constant)))
            });
            return false;
        }
        let choices = constants(self, schema);
        if !choices.is_empty() && !self.choice(node, &choices) {
            return false;
        }
        match &node.value {
            Value::Integer(number) => self.bounds(node, *number as f64, schema),
            Value::Float(number) => self.bounds(node, *number, schema),
            Value::String(value) => self.string(node, value, schema),
            _ => {}
        }
        true
    }

    /// Checks a string against the only ones allowed.
    pub(super) fn choice(&mut self, node: &Node, choices: &[String]) -> bool {
        let name = self.name();
        let Some(value) = node.as_str() else {
            let form = format!("expected one of {}", Listed(choices));
            let message = format!("{name} is {}, not a string", node.value.type_name());
            self.report(Code::WrongType, node, message, |d| d.with_label(form));
            return false;
        };
        if choices.iter().any(|choice| choice == value) {
            return true;
        }
        self.report(Code::UnknownValue, node, format!("{name} does not take `{value}`"), |d| {
            d.with_label("not a value of this key").with_choices(value, "values", choices.iter().map(String::as_str))
        });
        false
    }

    pub(super) fn wrong_type(&mut self, node: &Node, schema: &Schema) {
        let form = expected(self, schema);
        let name = self.name();
        let message = format!("{name} is {}", node.value.type_name());
        let advice = self.advice(node, schema);
        self.report(Code::WrongType, node, message, |d| {
            let d = d.with_label(format!("expected {form}"));
            match advice {
                Some(advice) => d.with_help(advice),
                None => d,
            }
        });
    }

    /// How the value as written becomes what was meant.
    fn advice(&self, node: &Node, schema: &Schema) -> Option<String> {
        let last_key = self.path.0.iter().rev().find_map(|step| match step {
            crate::path::Step::Key(key) => Some(key.as_str()),
            crate::path::Step::Index(_) => None,
        });
        match (&node.value, text(schema, "type")?) {
            (Value::String(value), "integer") if value.trim().parse::<i64>().is_ok() => {
                Some(format!("a number stands without quotes: `{}`", value.trim()))
            }
            (Value::String(value), "number") if value.trim().parse::<f64>().is_ok() => {
                Some(format!("a number stands without quotes: `{}`", value.trim()))
            }
            (Value::String(value), "boolean") if matches!(value.trim(), "true" | "false") => {
                Some(format!("a boolean stands without quotes: `{}`", value.trim()))
            }
            (Value::Float(value), "integer") if value.fract() == 0.0 && value.abs() < 9e15 => {
                Some(format!("a whole number has no point and no exponent: `{value:.0}`"))
            }
            (Value::Integer(value), "string") => Some(format!("text stands in quotes: `\"{value}\"`")),
            (Value::Float(value), "string") => Some(format!("text stands in quotes: `\"{value}\"`")),
            (Value::Bool(value), "string") => Some(format!("text stands in quotes: `\"{value}\"`")),
            (Value::Table(_), "array") => {
                last_key.map(|key| format!("each of several has a header in double brackets: `[[{key}]]`"))
            }
            (Value::Array(items), "object") if items.iter().all(|item| matches!(item.value, Value::Table(_))) => {
                last_key.map(|key| format!("there is only one, so its header has single brackets: `[{key}]`"))
            }
            (Value::String(value), "array") => {
                Some(format!("a list stands in brackets, also a list of one: `[\"{value}\"]`"))
            }
            (Value::Integer(_) | Value::Float(_), "array") => {
                Some("a list stands in brackets, also a list of one".to_owned())
            }
            _ => None,
        }
    }

    fn bounds(&mut self, node: &Node, number: f64, schema: &'a Schema) {
        let bound = |key| schema.get(key).and_then(Schema::as_f64);
        let fits = number.is_finite()
            && bound("minimum").is_none_or(|low| number >= low)
            && bound("exclusiveMinimum").is_none_or(|low| number > low)
            && bound("maximum").is_none_or(|high| number <= high)
            && bound("exclusiveMaximum").is_none_or(|high| number < high);
        if fits {
            return;
        }
        let name = self.name();
        let form = expected(self, schema);
        self.report(Code::OutOfRange, node, format!("{name} is out of range: {}", shown(&node.value)), |d| {
            d.with_label(format!("expected {form}"))
        });
    }

    fn string(&mut self, node: &Node, value: &str, schema: &'a Schema) {
        let length = |key| schema.get(key).and_then(Schema::as_u64);
        let count = value.chars().count() as u64;
        if length("minLength").is_some_and(|least| count < least)
            || length("maxLength").is_some_and(|most| count > most)
        {
            let name = self.name();
            let (message, label) = match (count, length("maxLength")) {
                (0, _) => (format!("{name} is empty"), "expected some text".to_owned()),
                (_, Some(most)) if count > most => {
                    (format!("{name} has {count} characters"), format!("expected at most {most}"))
                }
                _ => (
                    format!("{name} has {count} characters"),
                    format!("expected at least {}", length("minLength").unwrap_or(1)),
                ),
            };
            self.report(Code::WrongLength, node, message, |d| d.with_label(label));
        }
        if text(schema, "pattern") == Some(crate::types::NAME_PATTERN) && !is_name(value) {
            let name = self.name();
            self.report(Code::BadName, node, format!("{name} is no name: `{value}`"), |d| {
                d.with_label("becomes part of a file name")
                    .with_help("a name starts with a letter or digit; letters, digits, `.`, `_` and `-` follow")
            });
        }
        if text(schema, "pattern") == Some(crate::types::DEVICE_PATTERN) && !is_device(value) {
            self.report(Code::UnknownDevice, node, format!("there is no device `{value}`"), |d| {
                d.with_choices(value, "devices", ["auto", "cpu", "cuda", "cuda:N"])
            });
        }
        if schema.get("x-mcpipe-template").is_some() && !value.contains("{c}") {
            self.template(node, value);
        }
        if schema.get("x-mcpipe-path").is_some() {
            self.file_paths.push(self.path.clone());
        }
        if text(schema, "x-mcpipe-ref") == Some("teacher") && !self.teachers.contains(&value) {
            let teachers = std::mem::take(&mut self.teachers);
            self.report(Code::UnknownTeacher, node, format!("there is no teacher `{value}`"), |d| {
                d.with_label("not a teacher of this pipeline").with_choices(value, "teachers", teachers.iter().copied())
            });
            self.teachers = teachers;
        }
    }

    fn template(&mut self, node: &Node, value: &str) {
        // Other systems' placeholders, so that a list taken from one says what to write.
        let foreign = ["{}", "{class}", "{classname}", "{label}", "{name}", "{0}", "%s"]
            .into_iter()
            .find(|placeholder| value.contains(placeholder));
        self.report(
            Code::TemplatePlaceholder,
            node,
            "the template has no place for the class name",
            |d| match foreign {
                Some(foreign) => d
                    .with_label(format!("`{foreign}` is written `{{c}}` here"))
                    .with_help(format!("write \"{}\"", value.replace(foreign, "{c}"))),
                None => d
                    .with_label("lacks `{c}`")
                    .with_help("`{c}` stands for the class name, as in \"a photo of a {c}.\""),
            },
        );
    }
}

fn is_name(value: &str) -> bool {
    value.starts_with(|c: char| c.is_ascii_alphanumeric())
        && value.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-'))
}

fn is_device(value: &str) -> bool {
    let index = |i: &str| (1..=3).contains(&i.len()) && i.bytes().all(|b| b.is_ascii_digit());
    matches!(value, "auto" | "cpu" | "cuda") || value.strip_prefix("cuda:").is_some_and(index)
}

fn equals(value: &Value, constant: &Schema) -> bool {
    match (value, constant) {
        (Value::String(value), Schema::String(constant)) => value == constant,
        (Value::Bool(value), Schema::Bool(constant)) => value == constant,
        (Value::Integer(value), Schema::Number(constant)) => constant.as_i64() == Some(*value),
        (Value::Float(value), Schema::Number(constant)) => constant.as_f64() == Some(*value),
        _ => false,
    }
}

/// A number as it is shown in a message.
fn shown(value: &Value) -> String {
    match value {
        Value::Integer(number) => number.to_string(),
        Value::Float(number) if number.is_nan() => "nan".to_owned(),
        Value::Float(number) => format!("{number:?}"),
        other => other.type_name().to_owned(),
    }
}
