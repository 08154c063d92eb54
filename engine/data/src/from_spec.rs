//! From the pipeline file's types to this crate's options, and what this crate registers.

use mcpipe_spec as spec;

use crate::loader::OnBadSample;
use crate::mix::{MixOptions, MixPolicy};
use crate::shapes::ShapesParams;
use crate::transform::{Augment, RandomCrop};

impl From<&spec::Augment> for Augment {
    fn from(augment: &spec::Augment) -> Self {
        let crop = augment
            .crop
            .as_ref()
            .map(|c| RandomCrop { scale: (c.scale[0], c.scale[1]), ratio: (c.ratio[0], c.ratio[1]) });
        Self { crop, flip: augment.flip }
    }
}

impl From<&spec::Augment> for MixPolicy {
    fn from(augment: &spec::Augment) -> Self {
        let mixup = augment.mixup.as_ref();
        let cutmix = augment.cutmix.as_ref();
        Self {
            mixup: mixup.map(|m| MixOptions { alpha: m.alpha, probability: m.probability }),
            cutmix: cutmix.map(|m| MixOptions { alpha: m.alpha, probability: m.probability }),
        }
    }
}

impl From<&spec::TrainData> for OnBadSample {
    fn from(train: &spec::TrainData) -> Self {
        match train.on_bad_sample {
            spec::OnBadSample::Fail => Self::Fail,
            spec::OnBadSample::Skip => Self::Skip { max: usize::try_from(train.max_bad_samples).unwrap_or(usize::MAX) },
        }
    }
}

/// The data sets that the engine can make itself.
pub fn components() -> Vec<spec::Component> {
    vec![spec::Component {
        kind: spec::ComponentKind::DataMaker,
        name: "shapes",
        summary: "rendered coloured shapes with captions: 8 shapes x 6 colours, written as real shards",
        params: spec::params_schema::<ShapesParams>,
    }]
}
