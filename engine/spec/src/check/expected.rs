//! The expected form of a value, in words.

use serde_json::{Number, Value as Schema};

use super::{Checker, array, text};
use crate::names::Listed;

/// What a schema takes, as "an integer from 8 to 4096".
pub(super) fn expected(checker: &Checker<'_>, schema: &Schema) -> String {
    phrase(checker, schema, 0)
}

fn phrase<'a>(checker: &Checker<'a>, schema: &Schema, depth: usize) -> String {
    let schema = checker.resolve(schema);
    if depth > 4 {
        return "a value".to_owned();
    }
    if let Some(value) = schema.get("const") {
        return plain(value);
    }
    let choices = constants(checker, schema);
    if !choices.is_empty() {
        return match choices.as_slice() {
            [single] => format!("`{single}`"),
            _ => format!("one of {}", Listed(&choices)),
        };
    }
    if text(schema, "type").is_none() {
        let mut forms: Vec<String> = Vec::new();
        for keyword in ["oneOf", "anyOf"] {
            for branch in array(schema, keyword) {
                let form = phrase(checker, branch, depth + 1);
                if !forms.contains(&form) {
                    forms.push(form);
                }
            }
        }
        if !forms.is_empty() {
            return forms.join(" or ");
        }
    }
    match text(schema, "type") {
        Some("integer") => with_bounds("an integer", schema),
        Some("number") => with_bounds("a number", schema),
        Some("string") => {
            if schema.get("x-mcpipe-path").is_some() {
                "a path in quotes".to_owned()
            } else {
                "a string".to_owned()
            }
        }
        Some("boolean") => "`true` or `false`".to_owned(),
        Some("array") => array_form(checker, schema, depth),
        Some("object") => "a table".to_owned(),
        _ => "a value".to_owned(),
    }
}

fn array_form(checker: &Checker<'_>, schema: &Schema, depth: usize) -> String {
    let count = |key| schema.get(key).and_then(Schema::as_u64);
    let item = schema.get("items").filter(|items| items.is_object()).map(|items| phrase(checker, items, depth + 1));
    let items = match item.as_deref() {
        None | Some("a value") => "items".to_owned(),
        Some(item) => plural(item),
    };
    match (count("minItems"), count("maxItems")) {
        (Some(least), Some(most)) if least == most => format!("an array of {least} {items}"),
        (Some(1), None) => format!("an array of one or more {items}"),
        (Some(least), None) => format!("an array of {least} or more {items}"),
        (None, Some(most)) => format!("an array of at most {most} {items}"),
        (Some(least), Some(most)) => format!("an array of {least} to {most} {items}"),
        (None, None) => format!("an array of {items}"),
    }
}

/// "an integer from 1 to 9" as "integers from 1 to 9".
fn plural(form: &str) -> String {
    let Some(rest) = form.strip_prefix("an ").or_else(|| form.strip_prefix("a ")) else {
        return format!("items, each {form}");
    };
    match rest.split_once(' ') {
        Some((noun, rest)) => format!("{noun}s {rest}"),
        None => format!("{rest}s"),
    }
}

fn with_bounds(noun: &str, schema: &Schema) -> String {
    let bound = |key: &str| match schema.get(key) {
        Some(Schema::Number(number)) => Some(number_text(number)),
        _ => None,
    };
    let low = bound("minimum").map(|low| (low, true)).or_else(|| bound("exclusiveMinimum").map(|low| (low, false)));
    let high =
        bound("maximum").map(|high| (high, true)).or_else(|| bound("exclusiveMaximum").map(|high| (high, false)));
    match (low, high) {
        (None, None) => noun.to_owned(),
        (Some((low, true)), None) => format!("{noun} of {low} or more"),
        (Some((low, false)), None) => format!("{noun} above {low}"),
        (None, Some((high, true))) => format!("{noun} of at most {high}"),
        (None, Some((high, false))) => format!("{noun} below {high}"),
        (Some((low, true)), Some((high, true))) => format!("{noun} from {low} to {high}"),
        (Some((low, true)), Some((high, false))) => format!("{noun} from {low} to below {high}"),
        (Some((low, false)), Some((high, true))) => format!("{noun} above {low}, at most {high}"),
        (Some((low, false)), Some((high, false))) => {
            format!("{noun} above {low} and below {high}")
        }
    }
}

/// A bound as TOML writes it: without a needless `.0`, great ones with `_` between thousands.
fn number_text(number: &Number) -> String {
    let whole = match number.as_f64() {
        Some(value) if value.fract() == 0.0 && value.abs() < 1e16 => format!("{value:.0}"),
        _ => return number.to_string(),
    };
    let digits = whole.trim_start_matches('-');
    if digits.len() < 6 {
        return whole;
    }
    let mut text = whole[..whole.len() - digits.len()].to_owned();
    for (at, digit) in digits.chars().enumerate() {
        if at > 0 && (digits.len() - at).is_multiple_of(3) {
            text.push('_');
        }
        text.push(digit);
    }
    text
}

/// A schema's constant as it is written in a file.
pub(super) fn plain(value: &Schema) -> String {
    format!("`{value}`")
}

/// The strings that a schema takes where it takes only certain ones.
pub(super) fn constants<'s>(checker: &Checker<'_>, schema: &'s Schema) -> Vec<String> {
    let mut values: Vec<&'s Schema> = array(schema, "enum").iter().collect();
    if values.is_empty() {
        for keyword in ["oneOf", "anyOf"] {
            for branch in array(schema, keyword) {
                let branch = checker.resolve(branch);
                match branch.get("const") {
                    Some(_) => {}
                    None if !array(branch, "enum").is_empty() => {}
                    None => return Vec::new(),
                }
            }
        }
        return ["oneOf", "anyOf"]
            .iter()
            .flat_map(|keyword| array(schema, keyword))
            .flat_map(|branch| {
                let branch = checker.resolve(branch);
                branch
                    .get("const")
                    .into_iter()
                    .chain(array(branch, "enum"))
                    .filter_map(Schema::as_str)
                    .map(str::to_owned)
                    .collect::<Vec<_>>()
            })
            .collect();
    }
    values.retain(|value| value.is_string());
    values.into_iter().filter_map(Schema::as_str).map(str::to_owned).collect()
}

/// The first sentence of a schema's description.
pub(super) fn first_sentence(schema: &Schema) -> Option<String> {
    let description = text(schema, "description")?.replace('\n', " ");
    let end = description.match_indices(". ").map(|(at, _)| at + 1).next().unwrap_or(description.len());
    Some(description[..end].to_owned())
}
