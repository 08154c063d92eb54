use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

/// A component's own parameters, already checked against the schema that the component registered.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(transparent)]
pub struct Params(#[schemars(with = "std::collections::BTreeMap<String, serde_json::Value>")] pub toml::Table);

/// A component's parameters do not decode to its parameter type.
///
/// Happens only where a component's schema allows more than its type takes.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{message}")]
pub struct ParamsError {
    /// What the decoder said.
    pub message: String,
}

impl Params {
    /// Decodes the parameters to the component's own type.
    ///
    /// # Errors
    /// When a value does not fit the type.
    pub fn decode<T: DeserializeOwned>(&self) -> Result<T, ParamsError> {
        T::deserialize(toml::Value::Table(self.0.clone()))
            .map_err(|error| ParamsError { message: error.message().to_owned() })
    }

    /// The value of a parameter that the file sets.
    pub fn get(&self, key: &str) -> Option<&toml::Value> {
        self.0.get(key)
    }

    /// Whether the file sets no parameter.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(String, toml::Value)> for Params {
    fn from_iter<I: IntoIterator<Item = (String, toml::Value)>>(iter: I) -> Self {
        Self(iter.into_iter().collect())
    }
}
