//! Weights that a student starts from.

use mcpipe_graph::ParamStore;
use mcpipe_models::weights::{NameMap, TakeOptions, Takeover, Target, head_of};
use mcpipe_models::{Checkpoint, WeightsError};
use mcpipe_spec::{Code, Diagnostic, Document, Resize, Weights};
use mcpipe_train::BackboneTower;

use crate::assemble::{declared, image_graph};
use crate::error::RunError;
use crate::pipeline::of_weights;
use crate::resolve::models::image_path;

/// A weight file, and what of it a student takes.
#[derive(Debug)]
pub struct Initial {
    file: Checkpoint,
    takeover: Takeover,
    /// The student's parameters, without values.
    params: ParamStore,
    path: &'static str,
    head: Vec<String>,
}

fn options(weights: &Weights) -> TakeOptions {
    let Some(table) = weights.table() else { return TakeOptions::default() };
    TakeOptions {
        include: table.include.clone(),
        exclude: table.exclude.clone(),
        resize_head: table.resize.contains(&Resize::Head),
        resize_position: table.resize.contains(&Resize::Position),
        inherit: table.inherit,
    }
}

impl Initial {
    /// Finds what of a file the student's backbone takes; no values are read.
    ///
    /// # Errors
    /// A file that can't be read, or whose tensors are not the backbone's.
    pub fn find(tower: &BackboneTower, weights: &Weights) -> Result<Self, RunError> {
        let file = Checkpoint::open(weights.path())?;
        let params = declared(&[image_graph(tower)?]);
        let path = image_path(tower.backbone.as_ref());
        let head = head_of(tower.backbone.as_ref(), tower.image_size)?.into_iter().map(|(name, _)| name).collect();
        let names = NameMap::new().and_image(&file, path);
        let mut found = Self { file, takeover: Takeover::default(), params, path, head };
        found.takeover = found.file.plan(found.target(), &names, &options(weights))?;
        Ok(found)
    }

    fn target(&self) -> Target<'_> {
        Target { params: &self.params, path: self.path, head: &self.head }
    }

    /// The parameters that the file gives.
    ///
    /// # Errors
    /// An element type that is no floating-point one.
    pub fn read(&self) -> Result<ParamStore, RunError> {
        Ok(self.file.take(&self.takeover, self.target())?)
    }

    /// What is taken, in one line.
    pub fn summary(&self) -> String {
        let (taken, changed, left) = (self.takeover.taken(), self.takeover.changed.len(), self.takeover.left.len());
        format!(
            "starts from {}: {taken} tensors taken, {changed} of them resized or cut; {left} initialised anew",
            self.file.path().display()
        )
    }
}

/// Finds what is wrong with the student's weights, at the line that names them.
pub fn check(document: &Document, tower: &BackboneTower, found: &mut Vec<Diagnostic>) {
    let Some(weights) = &document.spec.student.weights else { return };
    let path = if weights.table().is_some() { "student.weights.path" } else { "student.weights" };
    if !weights.path().exists() {
        found.push(document.missing_file(path, "weight file", weights.path()));
        return;
    }
    let Err(error) = Initial::find(tower, weights) else { return };
    found.push(match &error {
        RunError::Weights(WeightsError::Pattern { pattern, .. }) => {
            of_pattern(document, weights, pattern, tower.backbone.name())
        }
        RunError::Weights(WeightsError::Mismatch { .. }) => of_weights(document, path, &error),
        other => document.diagnostic(Code::BadFile, path, other.to_string()).with_label("cannot be used"),
    });
}

fn of_pattern(document: &Document, weights: &Weights, pattern: &str, backbone: &str) -> Diagnostic {
    let place = weights.table().and_then(|table| {
        let at = |list: &[String]| list.iter().position(|p| p == pattern);
        let include = at(&table.include).map(|i| format!("student.weights.include[{i}]"));
        include.or_else(|| at(&table.exclude).map(|i| format!("student.weights.exclude[{i}]")))
    });
    let place = place.unwrap_or_else(|| "student.weights".to_owned());
    document
        .diagnostic(Code::UnknownValue, &place, format!("the pattern names no parameter of `{backbone}`"))
        .with_label("no such parameter")
        .with_help("`*` stands for any characters: `stages.*`; `mcpipe weights inspect FILE` lists the names of a file")
}
