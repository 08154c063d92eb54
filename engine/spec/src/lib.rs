//! mcpipe's pipeline file: TOML to a checked, typed specification with diagnostics.

mod components;
pub mod types;

pub use components::{Component, ComponentKind, Components, NoParams, params_schema};
pub use types::*;
