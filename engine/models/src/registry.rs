//! The registered models. A new one is a file with its entry, and one line here.

use schemars::{Schema, SchemaGenerator};

use crate::backbone::Backbone;
use crate::error::{ModelError, nearest};
use crate::text::TextEncoder;
use crate::{
    bert, convmixer, convnext, efficientnet, fastvit, mobilenetv3, mobilevit, mobilevitv2, resnet, siglip, text, vit,
};

/// A registered image backbone.
#[derive(Clone, Copy, Debug)]
pub struct BackboneEntry {
    /// Name in pipeline files.
    pub name: &'static str,
    /// The architecture that variants share.
    pub family: &'static str,
    /// One line for `mcpipe list` and the schema.
    pub summary: &'static str,
    /// Schema of its parameters, an object in which each has its published value as default.
    pub params: fn(&mut SchemaGenerator) -> Schema,
    /// Makes it with the given parameters over the published ones.
    pub make: fn(&toml::Table) -> Result<Box<dyn Backbone>, ModelError>,
}

/// A registered text encoder.
#[derive(Clone, Copy, Debug)]
pub struct TextEncoderEntry {
    /// Name in pipeline files.
    pub name: &'static str,
    /// One line for `mcpipe list` and the schema.
    pub summary: &'static str,
    /// Schema of its parameters, an object in which each has its published value as default.
    pub params: fn(&mut SchemaGenerator) -> Schema,
    /// Makes it with the given parameters over the published ones.
    pub make: fn(&toml::Table) -> Result<Box<dyn TextEncoder>, ModelError>,
}

static BACKBONES: &[BackboneEntry] = &[
    mobilevit::XXS,
    mobilevit::XS,
    mobilevit::S,
    mobilevitv2::HALF,
    mobilevitv2::WHOLE,
    mobilenetv3::SMALL_050,
    mobilenetv3::SMALL_075,
    mobilenetv3::SMALL_100,
    mobilenetv3::LARGE_075,
    mobilenetv3::LARGE_100,
    efficientnet::B0,
    efficientnet::B1,
    efficientnet::B2,
    efficientnet::B3,
    efficientnet::LITE0,
    resnet::R18,
    resnet::R50,
    convmixer::KS9_P14,
    convnext::ATTO,
    convnext::FEMTO,
    convnext::PICO,
    convnext::NANO,
    convnext::TINY,
    fastvit::MCI0,
    fastvit::MCI1,
    fastvit::MCI2,
    vit::VIT,
    vit::TINY,
    vit::SMALL,
    vit::BASE,
    vit::BASE_32,
    siglip::BASE,
    siglip::BASE_32,
];

static TEXT_ENCODERS: &[TextEncoderEntry] = &[text::TRANSFORMER, text::MOBILECLIP, text::SIGLIP, bert::BERT];

/// The registered backbones.
pub fn backbones() -> &'static [BackboneEntry] {
    BACKBONES
}

/// The registered text encoders.
pub fn text_encoders() -> &'static [TextEncoderEntry] {
    TEXT_ENCODERS
}

/// The backbone called `name`, with `params` over its published sizes.
///
/// # Errors
/// [`ModelError::Unknown`] with the nearest name, or [`ModelError::Param`] with the parameter's path.
pub fn backbone(name: &str, params: &toml::Table) -> Result<Box<dyn Backbone>, ModelError> {
    match BACKBONES.iter().find(|e| e.name == name) {
        Some(entry) => (entry.make)(params),
        None => Err(unknown("backbone", name, BACKBONES.iter().map(|e| e.name).collect())),
    }
}

/// The text encoder called `name`, with `params` over its published sizes.
///
/// # Errors
/// As [`backbone`].
pub fn text_encoder(name: &str, params: &toml::Table) -> Result<Box<dyn TextEncoder>, ModelError> {
    match TEXT_ENCODERS.iter().find(|e| e.name == name) {
        Some(entry) => (entry.make)(params),
        None => Err(unknown("text encoder", name, TEXT_ENCODERS.iter().map(|e| e.name).collect())),
    }
}

fn unknown(kind: &'static str, name: &str, known: Vec<&'static str>) -> ModelError {
    ModelError::Unknown {
        kind,
        name: name.to_owned(),
        nearest: nearest(name, known.iter().copied()),
        known: known.into_iter().map(str::to_owned).collect(),
    }
}
