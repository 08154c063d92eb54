//! Every registered component, gathered from the crates that hold their code.

use mcpipe_models::{BackboneEntry, TextEncoderEntry};
use mcpipe_spec::{Component, ComponentKind, Components, NoParams, params_schema};

use crate::stages;

/// Every registered component.
pub fn components() -> Components {
    let backbone = |e: &BackboneEntry| Component {
        kind: ComponentKind::Backbone,
        name: e.name,
        summary: e.summary,
        params: e.params,
    };
    let text = |e: &TextEncoderEntry| Component {
        kind: ComponentKind::TextEncoder,
        name: e.name,
        summary: e.summary,
        params: e.params,
    };
    let mut all = Components::new(mcpipe_models::backbones().iter().map(backbone));
    all.extend(mcpipe_models::text_encoders().iter().map(text));
    all.extend(FIXED.iter().map(|&(kind, name, summary)| Component {
        kind,
        name,
        summary,
        params: params_schema::<NoParams>,
    }));
    all.extend(mcpipe_train::components());
    all.extend(mcpipe_eval::components());
    all.extend(mcpipe_data::components());
    all.extend(stages::components());
    all
}

/// Components whose parameters are keys of the file's own tables.
const FIXED: [(ComponentKind, &str, &str); 9] = [
    (ComponentKind::Projection, "none", "No map: the backbone's embedding has the shared dimension"),
    (ComponentKind::Projection, "linear", "One matrix"),
    (ComponentKind::Projection, "mlp", "Linear, GELU, linear"),
    (ComponentKind::Augmentation, "crop", "Random resized crop"),
    (ComponentKind::Augmentation, "flip", "Left-right flip"),
    (ComponentKind::Augmentation, "mixup", "Blends of two images with their captions' targets"),
    (ComponentKind::Augmentation, "cutmix", "A box of one image pasted into another, with their captions' targets"),
    (ComponentKind::Export, "timm", "The image trunk, as timm.create_model(..).load_state_dict takes it"),
    (
        ComponentKind::Export,
        "open_clip",
        "Image trunk, projection and text tower, as open_clip.create_model takes them",
    ),
];

/// The JSON schema of pipeline files as text, as `schemas/pipeline.schema.json` holds it.
pub fn schema_text() -> String {
    format!("{:#}\n", mcpipe_spec::schema(&components()))
}
