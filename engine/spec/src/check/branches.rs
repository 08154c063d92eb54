//! Values that take one of several forms.

use serde_json::Value as Schema;

use super::expected::constants;
use super::scalar::has_type;
use super::{Checker, Chosen, array, text};
use crate::code::Code;
use crate::components::ComponentKind;
use crate::names::{Listed, nearest};
use crate::tree::{Node, Value};

impl<'a> Checker<'a> {
    /// Picks the alternative that the value was meant for and checks it against that one.
    pub(super) fn branches(&mut self, node: &Node, schema: &'a Schema, branches: &'a [Schema]) {
        let choices = constants(self, schema);
        let resolved: Vec<&'a Schema> = branches.iter().map(|branch| self.resolve(branch)).collect();
        let all_constant =
            resolved.iter().all(|branch| branch.get("const").is_some() || !array(branch, "enum").is_empty());
        if all_constant {
            self.choice(node, &choices);
            return;
        }
        let fitting: Vec<&'a Schema> =
            resolved.iter().copied().filter(|branch| has_type(&node.value, branch)).collect();
        if fitting.is_empty() || !has_type(&node.value, schema) {
            // A table's alternatives all say the same about the type.
            let narrow = match resolved.as_slice() {
                [single] => single,
                _ => schema,
            };
            self.wrong_type(node, narrow);
            return;
        }
        if !matches!(node.value, Value::Table(_)) {
            match fitting.as_slice() {
                [single] => self.node(node, single, None),
                // Several forms of one type: enough that one of them takes the value.
                several => {
                    let before = self.diagnostics.len();
                    let mut least: Option<Vec<_>> = None;
                    for branch in several {
                        self.node(node, branch, None);
                        let found = self.diagnostics.split_off(before);
                        if found.is_empty() {
                            return;
                        }
                        if least.as_ref().is_none_or(|least| found.len() < least.len()) {
                            least = Some(found);
                        }
                    }
                    self.diagnostics.extend(least.unwrap_or_default());
                }
            }
            return;
        }
        match tag_of(&fitting) {
            Some(tag) => self.tagged(node, schema, &fitting, tag),
            None => {
                let best = fitting
                    .iter()
                    .copied()
                    .enumerate()
                    .max_by_key(|(at, branch)| (self.likeness(node, branch), std::cmp::Reverse(*at)))
                    .map(|(_, branch)| branch);
                if let Some(best) = best {
                    self.node(node, best, None);
                }
            }
        }
    }

    fn tagged(&mut self, node: &Node, schema: &'a Schema, branches: &[&'a Schema], tag: &'a str) {
        let named: Vec<(&'a str, &'a Schema)> =
            branches.iter().filter_map(|branch| Some((tag_value(branch, tag)?, *branch))).collect();
        let names: Vec<&str> = named.iter().map(|(name, _)| *name).collect();
        let Some(given) = node.get(tag) else {
            let tag_schema = named.first().and_then(|(_, branch)| branch.get("properties")?.get(tag));
            let about = schema
                .get("properties")
                .and_then(|properties| properties.get(tag))
                .or(tag_schema.filter(|_| named.len() == 1));
            self.missing_tag(node, tag, &names, about);
            return;
        };
        self.path.push_key(tag);
        let name = self.name();
        let value = match &given.value {
            Value::String(value) => value.as_str(),
            other => {
                let message = format!("{name} is {}", other.type_name());
                let label = format!("expected one of {}", Listed(&names));
                self.report(Code::WrongType, given, message, |d| d.with_label(label));
                self.path.pop();
                return;
            }
        };
        let mut picked = named.iter().find(|(name, _)| *name == value).copied();
        if picked.is_none() {
            let kind = text(schema, "x-mcpipe-component").and_then(ComponentKind::from_id);
            match kind {
                Some(kind) => {
                    self.report(Code::UnknownComponent, given, format!("there is no {} `{value}`", kind.noun()), |d| {
                        d.with_label(format!("unknown {}", kind.noun())).with_choices(
                            value,
                            "registered (`mcpipe list` tells more)",
                            names.iter().copied(),
                        )
                    })
                }
                None => self.report(Code::UnknownValue, given, format!("{name} does not take `{value}`"), |d| {
                    d.with_label("not a value of this key").with_choices(value, "values", names.iter().copied())
                }),
            }
            // The rest of the table is checked as what was likely meant.
            let near = nearest(value, names.iter().copied());
            picked = named.iter().find(|(name, _)| Some(*name) == near).copied();
            if let Some((_, branch)) = picked {
                self.path.pop();
                self.rest(node, branch, tag);
                return;
            }
        }
        self.path.pop();
        if let Some((value, branch)) = picked {
            let chosen = Chosen { tag, value, others: &named };
            self.node(node, branch, Some(chosen));
        }
    }

    /// Checks a table against an alternative without its tag.
    fn rest(&mut self, node: &Node, branch: &'a Schema, tag: &str) {
        let before = self.diagnostics.len();
        self.node(node, branch, None);
        self.path.push_key(tag);
        let tag_path = self.path.to_string();
        self.path.pop();
        let found = self.diagnostics.split_off(before);
        self.diagnostics.extend(found.into_iter().filter(|d| d.path != tag_path));
    }

    fn missing_tag(&mut self, node: &Node, tag: &'a str, names: &[&str], about: Option<&'a Schema>) {
        // A misspelt tag is reported as the unknown key that it is.
        let misspelt = match &node.value {
            Value::Table(entries) => entries.iter().find(|(key, value)| {
                value.as_str().is_some_and(|v| names.contains(&v)) && nearest(key, [tag]).is_some()
            }),
            _ => None,
        };
        let table = self.table_name();
        if let Some((key, value)) = misspelt {
            let location = value.key.clone().unwrap_or_else(|| value.location.clone());
            self.path.push_key(key);
            let path = self.path.to_string();
            self.path.pop();
            let mut diagnostic = crate::diagnostic::Diagnostic::new(
                Code::UnknownKey,
                path,
                Some(location),
                format!("{table} has no key `{key}`"),
            )
            .with_label(format!("did you mean `{tag}`?"));
            diagnostic.nearest = Some(tag.to_owned());
            self.diagnostics.push(diagnostic);
            return;
        }
        let before = self.diagnostics.len();
        self.missing_key(node, tag, about);
        for diagnostic in &mut self.diagnostics[before..] {
            if let Some(help) = &mut diagnostic.help
                && !help.contains(&Listed(names).to_string())
            {
                *help = format!("add `{tag} = ..`: one of {}", Listed(names));
            }
        }
    }

    /// How much a table looks like an alternative: exact keys count double, near ones once.
    fn likeness(&self, node: &Node, branch: &'a Schema) -> usize {
        let mut keys = Vec::new();
        self.keys_of(branch, &mut keys, 0);
        let Value::Table(entries) = &node.value else {
            return 0;
        };
        entries
            .iter()
            .map(|(key, _)| {
                if keys.contains(&key.as_str()) { 2 } else { usize::from(nearest(key, keys.iter().copied()).is_some()) }
            })
            .sum()
    }

    fn keys_of(&self, schema: &'a Schema, into: &mut Vec<&'a str>, depth: usize) {
        let schema = self.resolve(schema);
        if let Some(properties) = schema.get("properties").and_then(Schema::as_object) {
            into.extend(properties.keys().map(String::as_str));
        }
        if depth < 4 {
            for keyword in ["oneOf", "anyOf"] {
                for branch in array(schema, keyword) {
                    self.keys_of(branch, into, depth + 1);
                }
            }
        }
    }
}

/// The key that is a constant in every alternative.
fn tag_of<'a>(branches: &[&'a Schema]) -> Option<&'a str> {
    let properties = branches.first()?.get("properties")?.as_object()?;
    properties.keys().map(String::as_str).find(|key| branches.iter().all(|branch| tag_value(branch, key).is_some()))
}

fn tag_value<'a>(branch: &'a Schema, tag: &str) -> Option<&'a str> {
    branch.get("properties")?.get(tag)?.get("const")?.as_str()
}
