//! Schema-only stand-ins for list items whose constraints schemars' attributes cannot state.

use std::borrow::Cow;

use schemars::{JsonSchema, Schema, SchemaGenerator, json_schema};

macro_rules! marker {
    ($name:ident, $schema:tt) => {
        pub(crate) enum $name {}

        impl JsonSchema for $name {
            fn inline_schema() -> bool {
                true
            }
            fn schema_name() -> Cow<'static, str> {
                stringify!($name).into()
            }
            fn json_schema(_: &mut SchemaGenerator) -> Schema {
                json_schema!($schema)
            }
        }
    };
}

marker!(PathText, { "type": "string", "minLength": 1, "x-mcpipe-path": true });
marker!(TemplateText, { "type": "string", "x-mcpipe-template": true });
marker!(TeacherName, { "type": "string", "x-mcpipe-ref": "teacher" });
marker!(Share, { "type": "number", "exclusiveMinimum": 0, "maximum": 1 });
marker!(AspectRatio, { "type": "number", "exclusiveMinimum": 0, "maximum": 100 });
