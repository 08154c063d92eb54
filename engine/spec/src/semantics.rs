//! Mistakes that show only when several settings are read together, and need nothing but the file.

use crate::code::Code;
use crate::diagnostic::Diagnostic;
use crate::document::Map;
use crate::types::{
    Crop, Distill, LossKind, ProjectionKind, Ramp, Spec, Teacher, TeacherText, TextEncoder, Training, WeightSchedule,
};

/// Checks a decoded pipeline.
pub(crate) fn check(spec: &Spec, map: &Map) -> Vec<Diagnostic> {
    let mut checks = Checks { spec, map, found: Vec::new() };
    checks.names();
    checks.text_towers();
    checks.cycles();
    checks.data();
    checks.augment();
    checks.projection();
    checks.distill();
    checks.training("training", &spec.training);
    for (at, teacher) in spec.teachers.iter().enumerate() {
        match teacher {
            Teacher::Train(teacher) => checks.training(&format!("teacher[{at}].training"), &teacher.training),
            Teacher::Load(teacher) if teacher.image.is_none() && teacher.text.is_none() => {
                checks.add(
                    Code::MissingTower,
                    &format!("teacher[{at}]"),
                    format!("the teacher `{}` has no tower", teacher.name),
                    |d| {
                        d.with_label("neither `image` nor `text`")
                            .with_help("add `image = { .. }`, `text = { .. }` or both")
                    },
                );
            }
            Teacher::Load(_) | Teacher::Ema(_) => {}
        }
    }
    checks.unused_teachers();
    checks.found
}

struct Checks<'a> {
    spec: &'a Spec,
    map: &'a Map,
    found: Vec<Diagnostic>,
}

impl Checks<'_> {
    fn add(&mut self, code: Code, path: &str, message: impl Into<String>, fill: impl FnOnce(Diagnostic) -> Diagnostic) {
        self.found.push(fill(self.map.diagnostic(code, path, message)));
    }

    /// A contradiction between the value at `path` and the one at `other`.
    fn conflict(&mut self, path: &str, message: String, label: &str, other: &str, other_label: &str, help: &str) {
        let related = self.map.is_set(other).then(|| self.map.span_of(other));
        self.add(Code::Conflict, path, message, |d| {
            let d = d.with_label(label).with_help(help);
            match related {
                Some(location) => d.with_related(location, other_label),
                None => d,
            }
        });
    }

    fn names(&mut self) {
        let spec = self.spec;
        let teachers: Vec<&str> = spec.teachers.iter().map(Teacher::name).collect();
        self.unique("teacher", "teachers", &teachers);
        let evals: Vec<&str> = spec.eval.iter().map(|eval| eval.name.as_str()).collect();
        self.unique("eval", "evaluations", &evals);
        for (at, distill) in spec.distill.iter().enumerate() {
            let names = distill.teachers.as_deref().unwrap_or_default();
            for (nth, name) in names.iter().enumerate() {
                if let Some(first) = names[..nth].iter().position(|earlier| earlier == name) {
                    let first = self.map.span_of(&format!("distill[{at}].teachers[{first}]"));
                    let path = format!("distill[{at}].teachers[{nth}]");
                    self.add(Code::Duplicate, &path, format!("the teacher `{name}` is listed twice"), |d| {
                        d.with_label("again here").with_related(first, "first here")
                    });
                }
            }
        }
    }

    fn unique(&mut self, table: &str, what: &str, names: &[&str]) {
        for (at, name) in names.iter().enumerate() {
            if let Some(first) = names[..at].iter().position(|earlier| earlier == name) {
                let first = self.map.span_of(&format!("{table}[{first}].name"));
                let path = format!("{table}[{at}].name");
                self.add(Code::Duplicate, &path, format!("two {what} are named `{name}`"), |d| {
                    d.with_label("again here")
                        .with_related(first, "first here")
                        .with_help("give each a name of its own")
                });
            }
        }
    }

    /// A text tower that is taken from a teacher must be there.
    fn text_towers(&mut self) {
        let spec = self.spec;
        let mut uses = Vec::new();
        if let TextEncoder::Teacher(text) = &spec.text {
            uses.push(("text.teacher".to_owned(), text.teacher.as_str()));
        }
        for (at, teacher) in spec.teachers.iter().enumerate() {
            if let Some(TeacherText::Teacher(text)) = teacher.text() {
                uses.push((format!("teacher[{at}].text.teacher"), text.teacher.as_str()));
            }
        }
        for (path, name) in uses {
            let Some(teacher) = spec.teacher(name) else {
                continue;
            };
            if teacher.text().is_some() {
                continue;
            }
            let why = match teacher {
                Teacher::Ema(_) => "it is the average of the student, whose text encoder this is",
                _ => "it has an image tower only",
            };
            let with_text: Vec<&str> =
                spec.teachers.iter().filter(|teacher| teacher.text().is_some()).map(Teacher::name).collect();
            self.add(Code::MissingTower, &path, format!("the teacher `{name}` has no text tower"), |d| {
                d.with_choices("", "teachers with a text tower", with_text).with_label(why)
            });
        }
    }

    /// Text towers taken from one teacher by the next, back to the first.
    fn cycles(&mut self) {
        let spec = self.spec;
        let next = |at: usize| match spec.teachers.get(at)?.text()? {
            TeacherText::Teacher(text) => spec.teachers.iter().position(|teacher| teacher.name() == text.teacher),
            TeacherText::Own(_) => None,
        };
        let mut reported = vec![false; spec.teachers.len()];
        for start in 0..spec.teachers.len() {
            let mut chain = vec![start];
            while let Some(at) = chain.last().and_then(|last| next(*last)) {
                if let Some(first) = chain.iter().position(|earlier| *earlier == at) {
                    // Only from a teacher that is in the circle, and once for each circle.
                    if first == 0 && !reported[start] {
                        chain.iter().for_each(|member| reported[*member] = true);
                        self.cycle(&chain);
                    }
                    break;
                }
                chain.push(at);
            }
        }
    }

    fn cycle(&mut self, chain: &[usize]) {
        let spec = self.spec;
        let name = |at: usize| spec.teachers.get(at).map(Teacher::name).unwrap_or_default();
        let path = |at: usize| format!("teacher[{at}].text.teacher");
        let mut text: Vec<String> = chain.iter().map(|at| format!("`{}`", name(*at))).collect();
        text.extend(text.first().cloned());
        let (Some(first), rest) = (chain.first().copied(), chain.get(1..).unwrap_or_default()) else {
            return;
        };
        let related: Vec<_> = rest
            .iter()
            .map(|at| (self.map.span_of(&path(*at)), format!("`{}` waits for this one", name(*at))))
            .collect();
        let message = match rest {
            [] => format!("the teacher {} takes its text tower from itself", text[0]),
            _ => format!("text towers are taken in a circle: {}", text.join(" -> ")),
        };
        self.add(Code::Cycle, &path(first), message, |d| {
            let d = d
                .with_label(format!("`{}` waits for this one", name(first)))
                .with_help("one of them needs a text tower of its own: `text = { encoder = \"transformer\" }`");
            related.into_iter().fold(d, |d, (location, label)| d.with_related(location, label))
        });
    }

    fn data(&mut self) {
        let data = &self.spec.data;
        if data.train.shards.is_none() && data.make.is_none() {
            self.add(Code::MissingKey, "data.train.shards", "the pipeline has no training data", |d| {
                d.with_label("neither `data.make` nor `data.train.shards`").with_help(
                    "name shards, as `data.train.shards = \"path/{00000..00009}.tar\"`, or let a set be made: `data.make = { kind = \"shapes\" }`",
                )
            });
        }
        if data.make.is_some() && data.train.shards.is_some() && data.eval.root.is_some() {
            self.add(Code::Unused, "data.make", "the data set that is made is not used", |d| {
                d.with_label("no effect").with_help(
                    "`data.train.shards` and `data.eval.root` name other data; remove `[data.make]` or one of them",
                )
            });
        }
    }

    fn augment(&mut self) {
        let augment = &self.spec.augment;
        if let Some(Crop { scale, ratio }) = &augment.crop {
            for (key, [low, high]) in [("scale", scale), ("ratio", ratio)] {
                if low > high {
                    let path = format!("augment.crop.{key}");
                    self.add(Code::Conflict, &path, format!("the least {key} is greater than the greatest"), |d| {
                        d.with_label(format!("{low:?} > {high:?}"))
                            .with_help(format!("write the smaller one first: `[{high:?}, {low:?}]`"))
                    });
                }
            }
        }
        if let (Some(mixup), Some(cutmix)) = (&augment.mixup, &augment.cutmix)
            && let sum = ((mixup.probability + cutmix.probability) * 1e6).round() / 1e6
            && sum > 1.0
        {
            self.conflict(
                "augment.cutmix.probability",
                format!("mixup and cutmix together take {sum} of the batches"),
                &format!("{} here", cutmix.probability),
                "augment.mixup.probability",
                &format!("{} here", mixup.probability),
                "a batch gets one of them or neither, so the two probabilities sum to at most 1 (a probability that is not written is 1)",
            );
        }
    }

    fn projection(&mut self) {
        let projection = &self.spec.projection;
        let kind = match projection.kind {
            ProjectionKind::None => "none",
            ProjectionKind::Linear => "linear",
            ProjectionKind::Mlp => return,
        };
        let none = projection.kind == ProjectionKind::None;
        for (key, set, needs) in [
            ("dim", none && projection.dim.is_some(), "\"linear\" or \"mlp\""),
            ("hidden", projection.hidden.is_some(), "\"mlp\""),
            ("shared", none && projection.shared, "\"linear\" or \"mlp\""),
        ] {
            if set {
                self.conflict(
                    &format!("projection.{key}"),
                    format!("`{key}` says nothing about a projection of kind \"{kind}\""),
                    "no effect",
                    "projection.kind",
                    "the kind",
                    &format!("remove it, or use kind = {needs}"),
                );
            }
        }
    }

    fn distill(&mut self) {
        let spec = self.spec;
        if spec.loss.kind == LossKind::Clip && spec.loss.logit_bias.is_some() {
            self.add(Code::Unused, "loss.logit_bias", "CLIP's loss has no bias", |d| {
                d.with_label("not used").with_help("remove it, or set `kind = \"siglip\"`")
            });
        }
        let lambda = spec.loss.lambda;
        if spec.distill.is_empty() && lambda > 0.0 {
            self.add(Code::Conflict, "loss.lambda", "`lambda` weighs distillation, but there is none", |d| {
                d.with_label(format!("{lambda} of the loss would be nothing"))
                    .with_help("add a `[[distill]]` table or set `lambda = 0.0`")
            });
        }
        if !spec.distill.is_empty() && lambda == 0.0 {
            self.add(Code::Unused, "loss.lambda", "`lambda = 0` switches every `[[distill]]` entry off", |d| {
                d.with_label("captions alone")
                    .with_help("with `student.baseline = true` the student without distillation is trained beside the distilled one")
            });
        }
        for (at, distill) in spec.distill.iter().enumerate() {
            if spec.teachers.is_empty() {
                let path = format!("distill[{at}]");
                self.add(Code::Conflict, &path, "there is no teacher to distil from", |d| {
                    d.with_label("needs a teacher").with_help("add a `[[teacher]]` table")
                });
            }
            self.ramp(at, distill);
        }
    }

    fn ramp(&mut self, at: usize, distill: &Distill) {
        let steps = self.spec.training.steps;
        let Some(WeightSchedule::Linear(ramp) | WeightSchedule::Cosine(ramp)) = &distill.schedule else {
            return;
        };
        let Ramp { start, end, .. } = ramp;
        let path = |key: &str| format!("distill[{at}].schedule.{key}");
        if let Some(end) = end
            && end <= start
        {
            self.conflict(
                &path("end"),
                format!("the schedule ends at step {end} but starts at step {start}"),
                "not after the start",
                &path("start"),
                "the start",
                "`end` comes after `start`",
            );
        } else if *start >= steps {
            self.add(
                Code::Unused,
                &path("start"),
                format!("the schedule starts at step {start}, after the training"),
                |d| {
                    d.with_label(format!("the training has {steps} steps"))
                        .with_help("the weight keeps the factor `from` throughout")
                },
            );
        }
    }

    fn training(&mut self, path: &str, training: &Training) {
        let Training { batch_size, accumulate, .. } = training;
        if !batch_size.is_multiple_of(*accumulate) {
            let near = (1..=*accumulate).rev().find(|parts| batch_size.is_multiple_of(*parts));
            self.conflict(
                &format!("{path}.accumulate"),
                format!("a batch of {batch_size} does not split into {accumulate} equal parts"),
                "does not divide the batch size",
                &format!("{path}.batch_size"),
                "the batch size",
                &format!("for example `accumulate = {}`", near.unwrap_or(1)),
            );
        }
    }

    fn unused_teachers(&mut self) {
        let spec = self.spec;
        // An entry without a list of its own learns from every teacher that can take part.
        if spec.distill.iter().any(|distill| distill.teachers.is_none()) {
            return;
        }
        for (at, teacher) in spec.teachers.iter().enumerate() {
            let name = teacher.name();
            let distils = spec
                .distill
                .iter()
                .filter_map(|distill| distill.teachers.as_ref())
                .any(|teachers| teachers.iter().any(|other| other == name));
            let gives_text = matches!(&spec.text, TextEncoder::Teacher(text) if text.teacher == name)
                || spec
                    .teachers
                    .iter()
                    .any(|other| matches!(other.text(), Some(TeacherText::Teacher(text)) if text.teacher == name));
            if !distils && !gives_text {
                let path = format!("teacher[{at}].name");
                self.add(Code::Unused, &path, format!("the teacher `{name}` is not used"), |d| {
                    d.with_label("no effect")
                        .with_help("no `[[distill]]` entry lists it, and no text tower is taken from it")
                });
            }
        }
    }
}
