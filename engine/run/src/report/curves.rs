//! Metrics over the steps as charts.

use std::collections::BTreeMap;
use std::path::Path;

use serde::Deserialize;

use super::{Report, label};
use crate::draw::{Chart, Mark, Series};
use crate::error::RunError;
use crate::records::Role;

/// A line of metrics.
#[derive(Clone, Debug, Deserialize)]
pub struct Logged {
    /// Steps done.
    pub step: u64,
    /// Weighted sum of the terms; absent in a line of an evaluation.
    #[serde(default)]
    pub loss: Option<f64>,
    /// Loss terms.
    #[serde(default)]
    pub terms: Vec<(String, f64)>,
    /// Name of the evaluation, in a line of one.
    #[serde(default)]
    pub name: Option<String>,
    /// Its metrics.
    #[serde(default)]
    pub metrics: BTreeMap<String, f64>,
}

/// Reads a stage's metrics. A last line that was cut off is left out.
///
/// # Errors
/// The file can't be read.
pub fn read_metrics(path: &Path) -> Result<Vec<Logged>, RunError> {
    let text = std::fs::read_to_string(path).map_err(|e| RunError::read(path, e))?;
    Ok(text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect())
}

impl Report {
    /// The chart's name and colour of each training: the student's first.
    fn named(&self) -> impl Iterator<Item = (String, usize, &[Logged])> {
        let distils = self.distils();
        let mut teachers = 0;
        self.trainings.iter().map(move |(name, lines)| {
            let role = self.models.iter().find(|m| m.name == *name).map_or(Role::Teacher, |m| m.role);
            let color = match role {
                Role::Student => 0,
                Role::Baseline => 1,
                Role::Teacher => {
                    teachers += 1;
                    1 + teachers
                }
            };
            (label(name, role, distils), color, lines.as_slice())
        })
    }

    pub(super) fn distils(&self) -> bool {
        self.models.iter().any(|m| m.role == Role::Baseline)
            || self.trainings.iter().any(|(_, lines)| lines.iter().any(|l| l.terms.len() > 1))
    }

    /// Loss and its terms over the steps, all trainings in one chart. A full line is a training's whole loss, a
    /// dashed one a term of it.
    pub(super) fn loss_chart(&self) -> Chart {
        let mut series = Vec::new();
        for (name, color, lines) in self.named() {
            let whole = lines.iter().filter_map(|l| Some((l.step as f64, l.loss?))).collect();
            series.push(Series { name: format!("{name}: loss"), color, dash: 0, points: whole });
            let terms: Vec<&String> = lines
                .iter()
                .find(|l| l.loss.is_some())
                .map(|l| l.terms.iter().map(|t| &t.0).collect())
                .unwrap_or_default();
            // A single term is the loss itself.
            for (i, term) in terms.iter().enumerate().filter(|_| terms.len() > 1) {
                let value = |l: &Logged| l.terms.iter().find(|t| t.0 == **term).map(|t| (l.step as f64, t.1));
                let points = lines.iter().filter_map(value).collect();
                series.push(Series { name: format!("{name}: {term}"), color, dash: i + 1, points });
            }
        }
        Chart {
            title: "Loss over steps".into(),
            x_label: "step".into(),
            y_label: "loss (dashed: unweighted terms)".into(),
            series,
            ..Chart::default()
        }
    }

    /// Each evaluation's headline metric over the steps, with the value at the end of each training.
    pub(super) fn accuracy_charts(&self) -> Vec<Chart> {
        let mut evaluations: Vec<&str> = Vec::new();
        for scores in &self.scores {
            if !evaluations.contains(&scores.evaluation.as_str()) {
                evaluations.push(&scores.evaluation);
            }
        }
        evaluations.into_iter().filter_map(|evaluation| self.accuracy_chart(evaluation)).collect()
    }

    fn accuracy_chart(&self, evaluation: &str) -> Option<Chart> {
        let of = |model: &str| self.scores.iter().find(|s| s.evaluation == evaluation && s.model == model);
        let headline = &self.scores.iter().find(|s| s.evaluation == evaluation)?.headline;
        let mut series = Vec::new();
        for ((name, color, lines), (model, _)) in self.named().zip(&self.trainings) {
            let mut points: Vec<(f64, f64)> = lines
                .iter()
                .filter(|l| l.name.as_deref() == Some(evaluation))
                .filter_map(|l| Some((l.step as f64, *l.metrics.get(&headline.metric)?)))
                .collect();
            let last = lines.iter().map(|l| l.step).max().unwrap_or(0) as f64;
            if let Some(scores) = of(model)
                && points.last().is_none_or(|p| p.0 < last)
            {
                points.push((last, scores.headline.value));
            }
            series.push(Series { name, color, dash: 0, points });
        }
        Some(Chart {
            title: format!("{} of {evaluation} over steps", headline.label),
            x_label: "step".into(),
            y_label: format!("{evaluation}: {}", headline.label),
            percent: true,
            series,
            marks: vec![Mark { label: "chance".into(), y: headline.chance }],
        })
    }
}
