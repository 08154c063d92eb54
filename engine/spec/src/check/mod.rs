//! Walks the tree of values against the JSON schema and reports every mistake at its place.
//!
//! Covers the keywords that schemars emits for the pipeline's and the components' types: `type`,
//! `const`, `enum`, numeric bounds, lengths, `items`, `properties`, `required`,
//! `additionalProperties`, `uniqueItems`, `$ref`, `allOf`, `anyOf`, `oneOf`, and `pattern` for names.

mod branches;
mod expected;
mod scalar;
mod table;

use serde_json::Value as Schema;

use crate::code::Code;
use crate::diagnostic::Diagnostic;
use crate::path::Path;
use crate::tree::{Node, Value};

use expected::expected;

/// The walk and what it found.
pub(crate) struct Checker<'a> {
    root: &'a Schema,
    /// Names of the teachers that the file declares.
    teachers: Vec<&'a str>,
    path: Path,
    /// Paths of the values that are themselves paths of files.
    pub file_paths: Vec<Path>,
    pub diagnostics: Vec<Diagnostic>,
}

/// Checks a whole pipeline.
pub(crate) fn check<'a>(tree: &'a Node, schema: &'a Schema) -> Checker<'a> {
    // A single table in place of the list is reported; its name counts all the same.
    let teachers = tree.get("teacher").map(|node| match &node.value {
        Value::Table(_) => std::slice::from_ref(node),
        _ => node.items(),
    });
    let teachers = teachers.unwrap_or_default();
    let mut checker = Checker {
        root: schema,
        teachers: teachers.iter().filter_map(|teacher| teacher.get("name")?.as_str()).collect(),
        path: Path::default(),
        file_paths: Vec::new(),
        diagnostics: Vec::new(),
    };
    // A file of another version may differ anywhere: nothing else is worth saying about it.
    if let Some(version) = tree.get("version")
        && let Value::Integer(number) = version.value
        && number != i64::from(crate::types::VERSION)
    {
        checker.path.push_key("version");
        let supported = crate::types::VERSION;
        checker.report(
            Code::UnsupportedVersion,
            version,
            format!("version {number} of the pipeline format is not supported"),
            |diagnostic| {
                diagnostic
                    .with_label(format!("expected {supported}"))
                    .with_help(format!("this mcpipe reads version {supported}"))
            },
        );
        checker.path.pop();
        return checker;
    }
    checker.node(tree, schema, None);
    checker
}

/// The alternative of a tagged table that is being checked, for keys that belong to another one.
#[derive(Clone, Copy)]
struct Chosen<'s> {
    tag: &'s str,
    value: &'s str,
    others: &'s [(&'s str, &'s Schema)],
}

impl<'a> Checker<'a> {
    fn report(
        &mut self,
        code: Code,
        node: &Node,
        message: impl Into<String>,
        fill: impl FnOnce(Diagnostic) -> Diagnostic,
    ) {
        let diagnostic = Diagnostic::new(code, self.path.to_string(), Some(node.location.clone()), message);
        self.diagnostics.push(fill(diagnostic));
    }

    /// Follows references, and the `allOf` around one that carries a description of its own.
    fn resolve<'s>(&self, mut schema: &'s Schema) -> &'s Schema
    where
        'a: 's,
    {
        for _ in 0..16 {
            let next = if let Some(Schema::String(reference)) = schema.get("$ref") {
                reference.strip_prefix('#').and_then(|pointer| self.root.pointer(pointer))
            } else {
                match array(schema, "allOf") {
                    [part] if schema.get("type").is_none() => Some(part),
                    _ => None,
                }
            };
            match next {
                Some(next) => schema = next,
                None => break,
            }
        }
        schema
    }

    fn node(&mut self, node: &Node, schema: &'a Schema, chosen: Option<Chosen<'_>>) {
        let schema = self.resolve(schema);
        for part in array(schema, "allOf") {
            self.node(node, part, None);
        }
        for keyword in ["oneOf", "anyOf"] {
            let branches = array(schema, keyword);
            if !branches.is_empty() {
                self.branches(node, schema, branches);
                return;
            }
        }
        if !self.value(node, schema) {
            return;
        }
        match &node.value {
            Value::Array(items) => self.array(node, items, schema),
            Value::Table(entries) => self.table(node, entries, schema, chosen),
            _ => {}
        }
    }

    fn array(&mut self, node: &Node, items: &[Node], schema: &'a Schema) {
        let bound = |key| schema.get(key).and_then(Schema::as_u64);
        let count = items.len() as u64;
        if bound("minItems").is_some_and(|least| count < least) || bound("maxItems").is_some_and(|most| count > most) {
            let name = self.name();
            let items = if count == 1 { "item" } else { "items" };
            let form = expected(self, schema);
            self.report(Code::WrongLength, node, format!("{name} has {count} {items}"), |d| {
                d.with_label(format!("expected {form}"))
            });
        }
        if schema.get("uniqueItems") == Some(&Schema::Bool(true)) {
            for (at, item) in items.iter().enumerate() {
                let Some(text) = item.as_str() else { continue };
                if let Some(first) = items[..at].iter().find(|earlier| earlier.as_str() == Some(text)) {
                    self.path.push_index(at);
                    self.report(Code::Duplicate, item, format!("`{text}` is listed twice"), |d| {
                        d.with_label("again here").with_related(first.location.clone(), "first here")
                    });
                    self.path.pop();
                }
            }
        }
        let tuple = schema.get("items").and_then(Schema::as_array);
        for (at, item) in items.iter().enumerate() {
            let item_schema = match tuple {
                Some(schemas) => schemas.get(at),
                None => schema.get("items"),
            };
            if let Some(item_schema) = item_schema {
                self.path.push_index(at);
                self.node(item, item_schema, None);
                self.path.pop();
            }
        }
    }

    /// The value's name in a sentence.
    fn name(&self) -> String {
        if self.path.0.is_empty() { "the pipeline".to_owned() } else { format!("`{}`", self.path) }
    }
}

fn array<'s>(schema: &'s Schema, key: &str) -> &'s [Schema] {
    schema.get(key).and_then(Schema::as_array).map(Vec::as_slice).unwrap_or_default()
}

fn text<'s>(schema: &'s Schema, key: &str) -> Option<&'s str> {
    schema.get(key).and_then(Schema::as_str)
}
