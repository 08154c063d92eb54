//! `mcpipe classify`: the classes that images are most like, by prompts.

use mcpipe_data::{ImageList, PLACEHOLDER, check_template};
use mcpipe_eval::{Classifier, EvalError, softmax, top_k};
use mcpipe_graph::Kernels;
use serde::Serialize;

use crate::embed::{EmbedOptions, embed_images};
use crate::error::RunError;
use crate::model::{Model, ModelSource};
use crate::settings::open;

/// Template of prompts where none is given.
pub const TEMPLATE: &str = "a photo of a {c}.";

/// What images are told apart by.
#[derive(Clone, Debug)]
pub struct Classes {
    /// Names of the classes.
    pub names: Vec<String>,
    /// Templates of prompts with `{c}` for the name; a class is the mean of its prompts.
    pub templates: Vec<String>,
}

/// A class that an image may be of.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Guess {
    /// The class.
    pub class: String,
    /// Softmax over all classes of logit scale times cosine.
    pub probability: f32,
    /// Cosine of the image's embedding and the class's.
    pub cosine: f32,
}

/// An image's best classes.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct Classified {
    /// The image: a path, or shard and key.
    pub image: String,
    /// The best classes, best first.
    pub top: Vec<Guess>,
}

impl Classes {
    /// Checks the names and templates.
    ///
    /// # Errors
    /// No class, an empty one or one given twice, a template without `{c}`.
    pub fn check(&self) -> Result<(), RunError> {
        for (at, name) in self.names.iter().enumerate() {
            if name.is_empty() {
                return Err(RunError::Usage("a class has an empty name".into()));
            }
            if self.names[..at].contains(name) {
                return Err(RunError::Usage(format!("the class `{name}` is given twice")));
            }
        }
        if self.names.is_empty() || self.templates.is_empty() {
            return Err(RunError::Usage("at least one class and one template are needed".into()));
        }
        self.templates.iter().try_for_each(|template| check_template(template)).map_err(RunError::Usage)
    }

    /// Every prompt, class after class: `[classes, templates]`, row-major.
    fn prompts(&self) -> Vec<String> {
        let of = |name: &String| self.templates.iter().map(|t| t.replace(PLACEHOLDER, name)).collect::<Vec<_>>();
        self.names.iter().flat_map(of).collect()
    }
}

/// The `top` best classes of each image. `tell` hears how many images of how many are done.
///
/// # Errors
/// A model without a text tower or whose towers don't meet, classes that can't be served, an image that can't be used
/// (named).
pub fn classify(
    source: &ModelSource,
    images: &[String],
    classes: &Classes,
    top: usize,
    options: &EmbedOptions,
    tell: &dyn Fn(usize, usize),
) -> Result<Vec<Classified>, RunError> {
    classes.check()?;
    let list = ImageList::open(images)?;
    let mut model = Model::open(source, true, &open(options.device, Kernels::Native)?)?;
    let failed = |error: EvalError| RunError::Eval(error.to_string());
    let prompts = classes.prompts();
    let prompts = model.embed_texts(&prompts.iter().map(String::as_str).collect::<Vec<_>>())?;
    let classifier = Classifier::new(&prompts, classes.names.len(), classes.templates.len()).map_err(failed)?;
    let embedded = embed_images(&model, &list, options, tell)?.embedding;
    let dim = embedded.len() / list.len().max(1);
    if dim != classifier.dim() {
        return Err(RunError::Usage(format!(
            "image embeddings have {dim} dimensions, text embeddings {}: the towers are of different models",
            classifier.dim()
        )));
    }
    let cosines = classifier.cosines(&embedded).map_err(failed)?;
    let one = |(image, cosines): (String, &[f32])| {
        let logits: Vec<f32> = cosines.iter().map(|&cosine| (f64::from(cosine) * model.logit_scale) as f32).collect();
        let probability = softmax(&logits);
        let best = top_k(&logits, top).into_iter();
        let guess = |(class, _): (usize, f32)| Guess {
            class: classes.names[class].clone(),
            probability: probability[class],
            cosine: cosines[class],
        };
        Classified { image, top: best.map(guess).collect() }
    };
    Ok(list.names().into_iter().zip(cosines.chunks_exact(classes.names.len())).map(one).collect())
}
