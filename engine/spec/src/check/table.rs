//! Keys of tables.

use serde_json::Value as Schema;

use super::expected::{expected, first_sentence};
use super::{Checker, Chosen, array};
use crate::code::Code;
use crate::diagnostic::Diagnostic;
use crate::names::{Listed, nearest};
use crate::path::Step;
use crate::tree::Node;

impl<'a> Checker<'a> {
    pub(super) fn table(
        &mut self,
        node: &Node,
        entries: &[(String, Node)],
        schema: &'a Schema,
        chosen: Option<Chosen<'_>>,
    ) {
        let properties = schema.get("properties").and_then(Schema::as_object);
        let additional = schema.get("additionalProperties");
        let mut meant = Vec::new();
        for (key, child) in entries {
            let known = properties.and_then(|properties| properties.get(key));
            match (known, additional) {
                (Some(known), _) => {
                    self.path.push_key(key);
                    self.node(child, known, None);
                    self.path.pop();
                }
                (None, Some(Schema::Bool(false))) => {
                    let keys: Vec<&str> = properties
                        .map(|properties| properties.keys().map(String::as_str).collect())
                        .unwrap_or_default();
                    // A key that is not there yet is the likelier one to have been meant.
                    let free = keys.iter().copied().filter(|key| node.get(key).is_none());
                    let near = nearest(key, free).or_else(|| nearest(key, keys.iter().copied()));
                    meant.extend(near);
                    self.unknown_key(key, child, &keys, near, chosen);
                }
                (None, Some(additional @ Schema::Object(_))) => {
                    self.path.push_key(key);
                    self.node(child, additional, None);
                    self.path.pop();
                }
                (None, _) => {}
            }
        }
        for required in array(schema, "required").iter().filter_map(Schema::as_str) {
            // An unknown key that stands for it is the one mistake to report.
            if node.get(required).is_none() && !meant.contains(&required) {
                let schema = properties.and_then(|properties| properties.get(required));
                self.missing_key(node, required, schema);
            }
        }
    }

    fn unknown_key(&mut self, key: &str, child: &Node, keys: &[&str], near: Option<&str>, chosen: Option<Chosen<'_>>) {
        let table = self.table_name();
        let location = child.key.clone().unwrap_or_else(|| child.location.clone());
        self.path.push_key(key);
        let path = self.path.to_string();
        self.path.pop();
        let diagnostic = |message: String| Diagnostic::new(Code::UnknownKey, path, Some(location), message);
        let owners: Vec<String> = chosen
            .map(|chosen| {
                chosen
                    .others
                    .iter()
                    .filter(|(_, branch)| {
                        let branch = self.resolve(branch);
                        branch.get("properties").is_some_and(|p| p.get(key).is_some())
                    })
                    .map(|(value, _)| format!("{} = \"{value}\"", chosen.tag))
                    .collect()
            })
            .unwrap_or_default();
        let diagnostic = match chosen {
            Some(Chosen { tag, value, .. }) if near.is_none() && !owners.is_empty() => {
                diagnostic(format!("`{key}` does not go with `{tag} = \"{value}\"`"))
                    .with_label("not a key here")
                    .with_help(format!("it is a key with {}", Listed(&owners)))
                    .with_help(format!("keys with `{tag} = \"{value}\"`: {}", Listed(keys)))
            }
            _ => {
                let mut diagnostic = diagnostic(format!("{table} has no key `{key}`"));
                match near {
                    Some(near) => {
                        diagnostic.label = format!("did you mean `{near}`?");
                        diagnostic.nearest = Some(near.to_owned());
                    }
                    None => {
                        diagnostic.label = "unknown key".to_owned();
                        let elsewhere = self.elsewhere(key);
                        if !elsewhere.is_empty() {
                            diagnostic = diagnostic.with_help(format!("`{key}` is a key of {}", elsewhere.join(", ")));
                        }
                    }
                }
                if keys.is_empty() {
                    diagnostic.with_help(format!("{table} has no keys"))
                } else {
                    diagnostic.with_help(format!("keys of {table}: {}", Listed(keys)))
                }
            }
        };
        self.diagnostics.push(diagnostic);
    }

    /// The tables at the top level that have a key of this name.
    fn elsewhere(&self, key: &str) -> Vec<String> {
        let Some(tables) = self.root.get("properties").and_then(Schema::as_object) else {
            return Vec::new();
        };
        let here = self.path.0.first();
        tables
            .iter()
            .filter(|(name, _)| !matches!(here, Some(Step::Key(here)) if here == *name))
            .filter_map(|(name, table)| {
                let table = self.resolve(table);
                let (table, list) = match table.get("items") {
                    Some(items) => (self.resolve(items), true),
                    None => (table, false),
                };
                let has = |schema: &Schema| schema.get("properties").is_some_and(|p| p.get(key).is_some());
                let found = has(table)
                    || ["oneOf", "anyOf"]
                        .iter()
                        .any(|keyword| array(table, keyword).iter().any(|branch| has(self.resolve(branch))));
                match (found, list) {
                    (false, _) => None,
                    (true, false) => Some(format!("`[{name}]`")),
                    (true, true) => Some(format!("`[[{name}]]`")),
                }
            })
            .collect()
    }

    pub(super) fn missing_key(&mut self, node: &Node, key: &str, schema: Option<&'a Schema>) {
        let table = self.table_name();
        let form = schema.map(|schema| expected(self, schema));
        let about = schema.and_then(|schema| first_sentence(schema).or_else(|| first_sentence(self.resolve(schema))));
        let is = |name: &str, schema: &Schema| schema.get("type").and_then(Schema::as_str) == Some(name);
        let resolved = schema.map(|schema| self.resolve(schema));
        let at_top = self.path.0.is_empty();
        let what = match resolved {
            Some(schema) if at_top && is("object", schema) => format!("add a table `[{key}]`"),
            Some(schema) if at_top && schema.get("anyOf").is_some() => format!("add a table `[{key}]`"),
            Some(schema) if schema.get("const").is_some_and(|constant| !constant.is_string()) => {
                format!("add `{key} = {}`", schema["const"])
            }
            _ => match form {
                Some(form) => format!("add `{key} = ..`: {form}"),
                None => format!("add `{key} = ..`"),
            },
        };
        self.path.push_key(key);
        let path = self.path.to_string();
        self.path.pop();
        let mut diagnostic =
            Diagnostic::new(Code::MissingKey, path, Some(node.location.clone()), format!("{table} lacks `{key}`"))
                .with_label(format!("`{key}` is missing"))
                .with_help(what);
        if let Some(about) = about {
            diagnostic = diagnostic.with_help(format!("{key}: {about}"));
        }
        self.diagnostics.push(diagnostic);
    }

    /// The table that is being checked, in a sentence.
    pub(super) fn table_name(&self) -> String {
        match self.path.0.as_slice() {
            [] => "the pipeline".to_owned(),
            [Step::Key(key)] => format!("`[{key}]`"),
            [Step::Key(key), Step::Index(index)] => format!("`[[{key}]]` number {}", index + 1),
            _ => format!("`{}`", self.path),
        }
    }
}
