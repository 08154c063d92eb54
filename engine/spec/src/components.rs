//! Plain descriptions of the registered components, passed in by the crates that hold their code.

use schemars::{JsonSchema, Schema, SchemaGenerator};

use crate::types;

/// What a component is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum ComponentKind {
    /// An image backbone, of students and of teachers.
    Backbone,
    /// A text encoder.
    TextEncoder,
    /// A form of projection head.
    Projection,
    /// A distillation level.
    Level,
    /// A random change to training images.
    Augmentation,
    /// An optimiser.
    Optimizer,
    /// A learning-rate schedule.
    Schedule,
    /// An evaluation.
    Evaluation,
    /// A maker of a data set.
    DataMaker,
    /// A stage of the plan.
    Stage,
    /// A form of export.
    Export,
}

impl ComponentKind {
    /// Every kind, in the order in which they are listed.
    pub const ALL: [Self; 11] = [
        Self::Backbone,
        Self::TextEncoder,
        Self::Projection,
        Self::Level,
        Self::Augmentation,
        Self::Optimizer,
        Self::Schedule,
        Self::Evaluation,
        Self::DataMaker,
        Self::Stage,
        Self::Export,
    ];

    /// The word for this kind in the schema and in messages' paths.
    pub fn id(self) -> &'static str {
        match self {
            Self::Backbone => "backbone",
            Self::TextEncoder => "text-encoder",
            Self::Projection => "projection",
            Self::Level => "level",
            Self::Augmentation => "augmentation",
            Self::Optimizer => "optimizer",
            Self::Schedule => "schedule",
            Self::Evaluation => "evaluation",
            Self::DataMaker => "data-maker",
            Self::Stage => "stage",
            Self::Export => "export",
        }
    }

    /// The word for this kind in a sentence.
    pub fn noun(self) -> &'static str {
        match self {
            Self::Backbone => "backbone",
            Self::TextEncoder => "text encoder",
            Self::Projection => "projection",
            Self::Level => "distillation level",
            Self::Augmentation => "augmentation",
            Self::Optimizer => "optimizer",
            Self::Schedule => "schedule",
            Self::Evaluation => "evaluation",
            Self::DataMaker => "data set",
            Self::Stage => "stage",
            Self::Export => "export format",
        }
    }

    pub(crate) fn from_id(id: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.id() == id)
    }
}

/// A registered component: what the parser, the schema and `mcpipe list` know of it.
#[derive(Clone, Debug)]
pub struct Component {
    /// What it is.
    pub kind: ComponentKind,
    /// The name by which a pipeline file asks for it.
    pub name: &'static str,
    /// One line about it, for the schema and `mcpipe list`.
    pub summary: &'static str,
    /// Schema of its parameters: an object. [`params_schema`] gives it for a type.
    pub params: fn(&mut SchemaGenerator) -> Schema,
}

/// The schema of a component's parameter type, for [`Component::params`].
///
/// The type is a struct that derives `JsonSchema` and `Deserialize`, with
/// `#[serde(deny_unknown_fields)]`; doc comments of its fields are what the user reads.
pub fn params_schema<T: JsonSchema>(generator: &mut SchemaGenerator) -> Schema {
    generator.subschema_for::<T>()
}

/// The parameter type of a component that has none.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, serde::Serialize, serde::Deserialize, JsonSchema)]
#[serde(deny_unknown_fields)]
pub struct NoParams {}

/// The registered components.
#[derive(Clone, Debug, Default)]
pub struct Components {
    list: Vec<Component>,
}

impl Components {
    /// The components of these registries, in the order given.
    pub fn new(components: impl IntoIterator<Item = Component>) -> Self {
        Self { list: components.into_iter().collect() }
    }

    /// Adds the components of another registry.
    pub fn extend(&mut self, components: impl IntoIterator<Item = Component>) {
        self.list.extend(components);
    }

    /// All components.
    pub fn iter(&self) -> impl Iterator<Item = &Component> {
        self.list.iter()
    }

    /// The components of one kind.
    pub fn of(&self, kind: ComponentKind) -> impl Iterator<Item = &Component> {
        self.list.iter().filter(move |component| component.kind == kind)
    }

    /// The component of this kind and name.
    pub fn get(&self, kind: ComponentKind, name: &str) -> Option<&Component> {
        self.of(kind).find(|component| component.name == name)
    }
}

/// What a pipeline file can ask for that has its keys in the pipeline's own types rather than in a
/// registry: changes to images, forms of projection, forms of export. For `mcpipe list`; the schema
/// has them already.
pub fn declared() -> Vec<Component> {
    use ComponentKind::{Augmentation, Export, Projection};
    use params_schema as schema;
    let component = |kind, name, summary, params| Component { kind, name, summary, params };
    vec![
        component(Augmentation, "crop", "random resized crop", schema::<types::Crop>),
        component(Augmentation, "flip", "left-right flip, by its probability", schema::<NoParams>),
        component(Augmentation, "mixup", "blends of two images and their targets", schema::<types::Mixup>),
        component(Augmentation, "cutmix", "a box of one image in another", schema::<types::CutMix>),
        component(Projection, "none", "the backbone's embedding as it is", schema::<NoParams>),
        component(Projection, "linear", "one matrix", schema::<NoParams>),
        component(Projection, "mlp", "linear, GELU, linear; `hidden` is the width between", schema::<NoParams>),
        component(Export, "timm", "the image trunk under timm's names", schema::<NoParams>),
        component(Export, "open_clip", "trunk, projection and text tower under open_clip's names", schema::<NoParams>),
    ]
}
