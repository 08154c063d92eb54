//! The JSON schema of a pipeline file: the types' own, with every registered component worked in.
//!
//! Draft 7, which editors understand. Keywords of ours start with `x-mcpipe-`; the checker reads
//! them and the published schema leaves them out:
//! - `x-mcpipe-component`, `x-mcpipe-tag`: which kind of component the table asks for, by which key;
//! - `x-mcpipe-path`: the text is a path;
//! - `x-mcpipe-template`: the text is a prompt template;
//! - `x-mcpipe-ref`: the text is the name of something else in the file.

use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::components::{Component, ComponentKind, Components};
use crate::types::Spec;

const COMPONENT: &str = "x-mcpipe-component";
const TAG: &str = "x-mcpipe-tag";
const DEFINITIONS: &str = "#/definitions/";

/// The schema of a pipeline file with these components, to be published for editors.
pub fn schema(components: &Components) -> Value {
    let mut schema = full_schema(components);
    strip(&mut schema);
    schema
}

/// The schema of a component's parameters alone, self-contained, as `mcpipe list` prints it.
pub fn component_schema(component: &Component) -> Value {
    let mut generator = SchemaSettings::draft07().with(|settings| settings.inline_subschemas = true).into_generator();
    let mut schema = (component.params)(&mut generator).to_value();
    tidy(&mut schema);
    strip(&mut schema);
    schema
}

/// The schema with the keywords that only the checker reads.
pub(crate) fn full_schema(components: &Components) -> Value {
    let mut generator = SchemaSettings::draft07().into_generator();
    let params: Vec<(&Component, Value)> = components
        .iter()
        .map(|component| {
            let mut schema = (component.params)(&mut generator);
            // The generator puts only its definitions into draft 7's form, not what a component hands back.
            generator.transforms_mut().for_each(|transform| transform.transform(&mut schema));
            let mut schema = schema.to_value();
            tidy(&mut schema);
            (component, schema)
        })
        .collect();
    let mut root = generator.into_root_schema_for::<Spec>().to_value();
    tidy(&mut root);
    let Some(Value::Object(mut definitions)) = root.get_mut("definitions").map(Value::take) else {
        return root;
    };
    let names: Vec<String> = definitions.keys().cloned().collect();
    for name in names {
        expand(&name, &mut definitions, &params);
    }
    keep_used(&root, &mut definitions);
    root["definitions"] = Value::Object(definitions);
    root
}

/// Rewrites what schemars writes for Rust's sake: TOML has no null, and a number's width says
/// nothing to a reader.
fn tidy(schema: &mut Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(tidy),
        Value::Object(map) => {
            map.values_mut().for_each(tidy);
            if let Some(Value::Array(types)) = map.get_mut("type") {
                types.retain(|name| name != "null");
                if let [single] = types.as_slice() {
                    let single = single.clone();
                    map.insert("type".to_owned(), single);
                }
            }
            if let Some(Value::Array(branches)) = map.get_mut("anyOf") {
                branches.retain(|branch| branch != &json!({"type": "null"}));
                if branches.len() == 1
                    && let Some(branches) = map.shift_remove("anyOf")
                {
                    map.insert("allOf".to_owned(), branches);
                }
            }
            if map.get("default").is_some_and(Value::is_null) {
                map.shift_remove("default");
            }
            if map
                .get("format")
                .and_then(Value::as_str)
                .is_some_and(|f| f.starts_with("int") || f.starts_with("uint") || f == "float" || f == "double")
            {
                map.shift_remove("format");
            }
            if map.contains_key("properties") && !map.contains_key("additionalProperties") {
                map.insert("additionalProperties".to_owned(), Value::Bool(false));
            }
            if let Some(Value::String(description)) = map.get_mut("description") {
                *description = joined(description);
            }
        }
        _ => {}
    }
}

/// A doc comment without the line breaks of the source.
fn joined(description: &str) -> String {
    let paragraphs = description.split("\n\n").map(|paragraph| {
        paragraph.lines().fold(String::new(), |mut text, line| {
            if !text.is_empty() {
                text.push(if line.trim_start().starts_with("- ") { '\n' } else { ' ' });
            }
            text.push_str(line.trim_end());
            text
        })
    });
    paragraphs.collect::<Vec<_>>().join("\n\n")
}

fn strip(schema: &mut Value) {
    match schema {
        Value::Array(items) => items.iter_mut().for_each(strip),
        Value::Object(map) => {
            map.retain(|key, _| !key.starts_with("x-mcpipe-"));
            map.values_mut().for_each(strip);
        }
        _ => {}
    }
}

/// Replaces the definition of a table that asks for a component by one alternative for each
/// registered component, with the component's parameters in place.
fn expand(name: &str, definitions: &mut Map<String, Value>, params: &[(&Component, Value)]) {
    let Some(Value::Object(base)) = definitions.get(name).cloned() else {
        return;
    };
    let text = |key| base.get(key).and_then(Value::as_str);
    let (Some(kind), Some(tag)) = (text(COMPONENT).and_then(ComponentKind::from_id), text(TAG)) else {
        return;
    };
    let mut names = Vec::new();
    let mut branches = Vec::new();
    for (component, params) in params.iter().filter(|(component, _)| component.kind == kind) {
        let definition = format!("{name}.{}", component.name);
        let branch = alternative(&base, tag, component, params, definitions);
        definitions.insert(definition.clone(), branch);
        branches.push(json!({ "$ref": format!("{DEFINITIONS}{definition}") }));
        names.push(component.name);
    }
    if names.is_empty() {
        return;
    }
    let tag_description = base["properties"][tag]["description"].clone();
    let mut table = Map::new();
    if let Some(description) = base.get("description") {
        table.insert("description".to_owned(), description.clone());
    }
    table.insert("type".to_owned(), json!("object"));
    // Beside the alternatives, so that an editor names the valid choices for a wrong one.
    table.insert(
        "properties".to_owned(),
        json!({ tag: { "description": tag_description, "type": "string", "enum": names } }),
    );
    table.insert("required".to_owned(), json!([tag]));
    table.insert("oneOf".to_owned(), Value::Array(branches));
    table.insert(COMPONENT.to_owned(), json!(kind.id()));
    definitions.insert(name.to_owned(), Value::Object(table));
}

fn alternative(
    base: &Map<String, Value>,
    tag: &str,
    component: &Component,
    params: &Value,
    definitions: &Map<String, Value>,
) -> Value {
    let params_table = resolve(params, definitions);
    let mut branch = base.clone();
    branch.shift_remove(COMPONENT);
    branch.shift_remove(TAG);
    branch.insert("description".to_owned(), json!(component.summary));
    let own_required: Vec<Value> = list(params_table.get("required"));
    let mut required: Vec<Value> = list(base.get("required"));
    let Some(Value::Object(properties)) = branch.get_mut("properties") else {
        return Value::Object(branch);
    };
    properties
        .insert(tag.to_owned(), json!({ "description": component.summary, "type": "string", "const": component.name }));
    if let Some(slot) = properties.get_mut("params") {
        let description = slot["description"].clone();
        *slot = json!({ "description": description, "allOf": [params] });
        if !own_required.is_empty() {
            required.push(json!("params"));
        }
    } else if let Some(Value::Object(own)) = params_table.get("properties") {
        for (key, value) in own {
            // A table's common keys win over a component's of the same name.
            if !properties.contains_key(key) {
                properties.insert(key.clone(), value.clone());
            }
        }
        required.extend(own_required);
    }
    branch.insert("additionalProperties".to_owned(), Value::Bool(false));
    branch.insert("required".to_owned(), Value::Array(required));
    Value::Object(branch)
}

fn list(value: Option<&Value>) -> Vec<Value> {
    value.and_then(Value::as_array).cloned().unwrap_or_default()
}

/// Follows references and single `allOf`s to the schema itself.
fn resolve<'a>(mut schema: &'a Value, definitions: &'a Map<String, Value>) -> &'a Value {
    for _ in 0..16 {
        let target = match (schema.get("$ref"), schema.get("allOf")) {
            (Some(Value::String(reference)), _) => {
                reference.strip_prefix(DEFINITIONS).and_then(|name| definitions.get(name))
            }
            (None, Some(Value::Array(parts))) if schema.get("properties").is_none() => parts.first(),
            _ => None,
        };
        match target {
            Some(target) => schema = target,
            None => break,
        }
    }
    schema
}

/// Drops definitions that nothing refers to.
fn keep_used(root: &Value, definitions: &mut Map<String, Value>) {
    fn collect(value: &Value, into: &mut Vec<String>) {
        match value {
            Value::Array(items) => items.iter().for_each(|item| collect(item, into)),
            Value::Object(map) => {
                if let Some(Value::String(reference)) = map.get("$ref")
                    && let Some(name) = reference.strip_prefix(DEFINITIONS)
                {
                    into.push(name.to_owned());
                }
                map.values().for_each(|item| collect(item, into));
            }
            _ => {}
        }
    }
    let mut queue = Vec::new();
    collect(root, &mut queue);
    let mut used = std::collections::BTreeSet::new();
    while let Some(name) = queue.pop() {
        if let Some(definition) = definitions.get(&name)
            && used.insert(name)
        {
            collect(definition, &mut queue);
        }
    }
    definitions.retain(|name, _| used.contains(name));
}
