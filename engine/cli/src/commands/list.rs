//! `mcpipe list` and `mcpipe schema`.

use std::fmt::Write;

use mcpipe_run::{RunError, components};
use mcpipe_spec::{Component, ComponentKind, component_schema};
use serde_json::{Value, json};

use crate::args::{Format, ListArgs};
use crate::output::print;

/// Prints the JSON schema of pipeline files.
pub fn schema() -> Result<u8, RunError> {
    print(&mcpipe_run::schema_text())?;
    Ok(0)
}

/// Lists the registered components with their parameters.
pub fn list(args: &ListArgs) -> Result<u8, RunError> {
    let all = components();
    let wanted = |c: &&Component| args.only.as_ref().is_none_or(|only| c.kind.id() == only || c.name == only);
    let list: Vec<&Component> = all.iter().filter(wanted).collect();
    if list.is_empty() {
        let kinds: Vec<&str> = ComponentKind::ALL.iter().map(|kind| kind.id()).collect();
        let only = args.only.as_deref().unwrap_or_default();
        return Err(RunError::Usage(format!(
            "`{only}` is neither a kind nor a component; kinds: {}",
            kinds.join(", ")
        )));
    }
    match args.format {
        Format::Json => {
            let object = |c: &&Component| json!({ "kind": c.kind.id(), "name": c.name, "summary": c.summary, "parameters": component_schema(c) });
            let objects: Vec<Value> = list.iter().map(object).collect();
            print(&format!("{:#}\n", Value::Array(objects)))?;
        }
        Format::Text => print(&text(&list))?,
    }
    Ok(0)
}

fn text(list: &[&Component]) -> String {
    let mut out = String::new();
    for kind in ComponentKind::ALL {
        let of: Vec<&&Component> = list.iter().filter(|c| c.kind == kind).collect();
        if of.is_empty() {
            continue;
        }
        let _ = writeln!(out, "{}{}", if out.is_empty() { "" } else { "\n" }, kind.noun().to_uppercase());
        let width = of.iter().map(|c| c.name.len()).max().unwrap_or_default().max(16) + 2;
        let mut first: Option<(&str, Value)> = None;
        for component in of {
            let _ = writeln!(out, "  {:<width$}{}", component.name, component.summary);
            let schema = component_schema(component);
            match &first {
                // Sizes of one family: what they share was said above.
                Some((name, shown)) if names(shown).eq(names(&schema)) && names(&schema).next().is_some() => {
                    for line in wrap(&differing(name, shown, &schema), 92) {
                        let _ = writeln!(out, "      {line}");
                    }
                }
                _ => {
                    parameters(&mut out, &schema);
                    first = Some((component.name, schema));
                }
            }
        }
    }
    out
}

fn properties(schema: &Value) -> impl Iterator<Item = (&String, &Value)> {
    schema.get("properties").and_then(Value::as_object).into_iter().flatten()
}

fn names(schema: &Value) -> impl Iterator<Item = &String> {
    properties(schema).map(|(name, _)| name)
}

/// `parameters as NAME, but a = 1, b = 2`.
fn differing(name: &str, shown: &Value, schema: &Value) -> String {
    let default = |p: &Value| p.get("default").cloned().unwrap_or_default();
    let others = properties(shown).zip(properties(schema)).filter(|((_, a), (_, b))| default(a) != default(b));
    let list: Vec<String> = others.map(|(_, (name, p))| format!("{name} = {}", default(p))).collect();
    if list.is_empty() {
        format!("parameters as {name}")
    } else {
        format!("parameters as {name}, but {}", list.join(", "))
    }
}

fn parameters(out: &mut String, schema: &Value) {
    let required = |name: &str| {
        let list = schema.get("required").and_then(Value::as_array);
        list.is_some_and(|list| list.iter().any(|r| r == name))
    };
    for (name, property) in properties(schema) {
        let value = match property.get("default") {
            Some(default) => format!("= {default}"),
            None if required(name) => "(required)".to_owned(),
            None => "(optional)".to_owned(),
        };
        let form = form(property);
        let about = property.get("description").and_then(Value::as_str).unwrap_or_default();
        let _ = writeln!(out, "      {name} {value}: {form}");
        for line in wrap(about, 88) {
            let _ = writeln!(out, "          {line}");
        }
    }
}

/// Type and range of a parameter in a few words.
fn form(property: &Value) -> String {
    let text = |key: &str| property.get(key).and_then(Value::as_str);
    if let Some(values) = property.get("enum").and_then(Value::as_array) {
        return values.iter().map(Value::to_string).collect::<Vec<_>>().join(" | ");
    }
    if let Some(value) = property.get("const") {
        return value.to_string();
    }
    for key in ["oneOf", "anyOf", "allOf"] {
        if let Some(branches) = property.get(key).and_then(Value::as_array) {
            return branches.iter().map(form).collect::<Vec<_>>().join(" | ");
        }
    }
    let mut form = text("type").unwrap_or("value").to_owned();
    if let Some(items) = property.get("items").filter(|items| items.is_object()) {
        form = format!("array of {}", self::form(items));
    }
    let bound = |key: &str| property.get(key).map(Value::to_string);
    let low = bound("minimum").map(|v| format!("from {v}")).or(bound("exclusiveMinimum").map(|v| format!("above {v}")));
    let high = bound("maximum").map(|v| format!("to {v}")).or(bound("exclusiveMaximum").map(|v| format!("below {v}")));
    let range: Vec<String> = low.into_iter().chain(high).collect();
    if range.is_empty() { form } else { format!("{form}, {}", range.join(" ")) }
}

fn wrap(text: &str, width: usize) -> Vec<String> {
    let mut lines: Vec<String> = Vec::new();
    for word in text.split_whitespace() {
        match lines.last_mut() {
            Some(line) if line.chars().count() + 1 + word.chars().count() <= width => {
                line.push(' ');
                line.push_str(word);
            }
            _ => lines.push(word.to_owned()),
        }
    }
    lines
}
