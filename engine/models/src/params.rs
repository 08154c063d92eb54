//! Sizes of a component as parameters of the file: the published ones, with what the user sets laid over them.

use schemars::{JsonSchema, Schema, SchemaGenerator};
use serde::Serialize;
use serde::de::DeserializeOwned;

use crate::error::ModelError;

/// The sizes of a model: a flat struct with `deny_unknown_fields`, whose published values are its defaults.
pub(crate) trait Sizes: Serialize + DeserializeOwned + JsonSchema {
    /// The first parameter that does not hold together with the others, and why.
    fn check(&self) -> Result<(), (&'static str, String)>;
}

/// `defaults` with the values of `set` laid over them.
///
/// # Errors
/// A parameter that the component lacks, of the wrong type, or that fails [`Sizes::check`].
pub(crate) fn decode<T: Sizes>(component: &str, defaults: &T, set: &toml::Table) -> Result<T, ModelError> {
    let refuse = |param: String, message: String| ModelError::Param { component: component.to_owned(), param, message };
    let mut table =
        toml::Table::try_from(defaults).map_err(|e| refuse(".".into(), format!("its defaults don't encode: {e}")))?;
    for (key, value) in set {
        table.insert(key.clone(), value.clone());
    }
    let sizes: T = serde_path_to_error::deserialize(toml::Value::Table(table)).map_err(|e| {
        let path = e.path().to_string();
        refuse(path, e.inner().message().to_owned())
    })?;
    sizes.check().map_err(|(param, message)| refuse(param.to_owned(), message))?;
    Ok(sizes)
}

/// The sizes as a table, for a resolved spec.
pub(crate) fn encode<T: Sizes>(sizes: &T) -> toml::Table {
    toml::Table::try_from(sizes).unwrap_or_default()
}

/// The schema of `T` with every parameter optional and `defaults` as its defaults.
pub(crate) fn schema<T: Sizes>(generator: &mut SchemaGenerator, defaults: &T) -> Schema {
    let mut schema = T::json_schema(generator);
    schema.remove("required");
    let values = serde_json::to_value(defaults).unwrap_or_default();
    if let Some(properties) = schema.get_mut("properties").and_then(|p| p.as_object_mut()) {
        for (name, property) in properties.iter_mut() {
            if let (Some(property), Some(value)) = (property.as_object_mut(), values.get(name)) {
                property.insert("default".into(), value.clone());
            }
        }
    }
    schema
}

/// Largest size that a parameter may name; products of a few stay far from overflow.
const LARGEST: usize = 1 << 20;

/// Refuses sizes that no model has: zero, or absurdly large.
pub(crate) fn positive(param: &'static str, values: &[usize]) -> Result<(), (&'static str, String)> {
    match values.iter().find(|v| !(1..=LARGEST).contains(*v)) {
        Some(v) => Err((param, format!("must be 1 to {LARGEST}, not {v}"))),
        None => Ok(()),
    }
}

/// Refuses a factor of a width that is not in 1/16 .. 64.
pub(crate) fn positive_factor(param: &'static str, value: f64) -> Result<(), (&'static str, String)> {
    if (0.0625..=64.0).contains(&value) { Ok(()) } else { Err((param, format!("must be 0.0625 to 64, not {value}"))) }
}

/// Refuses a value that is not in 0 .. `largest`.
pub(crate) fn rate(param: &'static str, value: f64, largest: f64) -> Result<(), (&'static str, String)> {
    if (0.0..=largest).contains(&value) { Ok(()) } else { Err((param, format!("must be 0 to {largest}, not {value}"))) }
}
