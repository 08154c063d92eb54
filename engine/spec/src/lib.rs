//! mcpipe's pipeline file: TOML to a checked, typed specification with diagnostics.
//!
//! [`load`] takes a file from text to [`Spec`] in four phases, each of which reports all its
//! mistakes at once:
//! 1. reading and syntax: TOML to a tree whose every value knows its place, with `--set` applied;
//! 2. form: the tree against the JSON schema ([`schema`]), which the types and the registered
//!    [`Components`] make together;
//! 3. decoding to [`Spec`], which the schema lets succeed;
//! 4. settings that contradict each other.
//!
//! What needs shapes or files is checked by the crates above, which report through
//! [`Document::diagnostic`] so that every mistake looks alike.

mod check;
mod code;
mod components;
mod diagnostic;
mod document;
mod names;
mod parse;
mod path;
mod render;
mod schema;
mod semantics;
mod source;
mod tree;
pub mod types;

pub use code::{Code, Severity};
pub use components::{Component, ComponentKind, Components, NoParams, declared, params_schema};
pub use diagnostic::{Diagnostic, Diagnostics};
pub use document::{Document, load, load_text};
pub use render::Style;
pub use schema::{component_schema, schema};
pub use source::{Location, Origin, Position, Source, Sources};
pub use types::*;
