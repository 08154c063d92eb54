//! The loss graph: losses over the whole batch's embeddings.

use mcpipe_cpu::relational::{MOST_TEACHERS, Relational};
use mcpipe_graph::{GraphBuilder, Init, PairInputs, Path, StepGraph, Tensor};
use mcpipe_models::ModelError;

use crate::distill::{BatchContext, TeacherInputs, clip_loss, siglip_loss};
use crate::error::TrainError;
use crate::graphs::{CLIP_SLOT, DISTILL, IMAGE, TEXT, loss_name};
use crate::setup::{Contrast, LOGIT_BIAS, LOGIT_SCALE, Term, TrainSetup};

/// Targets as matrices `[B, B]`, by name.
pub(crate) const IMAGE_TO_TEXT: &str = "targets.image_to_text";
pub(crate) const TEXT_TO_IMAGE: &str = "targets.text_to_image";
pub(crate) const PAIRS: &str = "targets.pairs";
/// Targets as lists `[B]`, in the order of [`PairInputs`].
pub(crate) const SPARSE: [&str; 6] =
    ["targets.own", "targets.other", "targets.keep", "targets.group", "targets.share", "targets.column_total"];

/// How CLIP's loss and the logits levels are written as ops.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PairForm {
    /// Logits and targets are matrices `[B, B]` of the graph.
    Matrices,
    /// As [`Op::Relational`](mcpipe_graph::Op::Relational): logits pass by tile by tile, targets are lists.
    Streamed,
}

/// The form for a setup: the one place that decides. Streamed wherever the contrast is CLIP's and no logits level asks more
/// teachers than one op takes: on a GPU no matrix over pairs is held then, and the CPU's kernel is faster than dfdx's
/// products and sums in f64.
pub(crate) fn pair_form(setup: &TrainSetup) -> PairForm {
    let fits = |t: &Term| t.level.relational_temperature().is_none() || t.teachers.len() <= MOST_TEACHERS;
    let clip = matches!(setup.objective.contrast, Contrast::Clip);
    if clip && setup.objective.terms.iter().all(fits) { PairForm::Streamed } else { PairForm::Matrices }
}

/// Builds the graph; with the slots of its losses.
pub(crate) fn graph(setup: &TrainSetup, form: PairForm) -> Result<(StepGraph, Vec<usize>), TrainError> {
    let mut g = GraphBuilder::new(true);
    let batch = setup.training.batch_size;
    let student = setup.student_shape()?;
    let image_bd = g.input_with_grad(IMAGE, &[batch, student.image.dim]);
    let text_bd = if student.text_trained {
        g.input_with_grad(TEXT, &[batch, student.text])
    } else {
        g.input(TEXT, &[batch, student.text])
    };
    let log_scale = Init::Constant(setup.model.logit_scale.ln() as f32);
    let path = Path::new(LOGIT_SCALE);
    let log_scale = if setup.model.train_logit_scale {
        g.param(&path, &[], log_scale)?
    } else {
        g.frozen(|g| g.param(&path, &[], log_scale))?
    };
    let sigmoid = match setup.objective.contrast {
        Contrast::Clip => None,
        Contrast::Sigmoid { bias } => {
            let bias = g.param(&Path::new(LOGIT_BIAS), &[], Init::Constant(bias as f32))?;
            Some((bias, g.input(PAIRS, &[batch, batch])))
        }
    };
    let outputs = g.on_dfdx(|g| -> Result<Vec<(usize, Tensor)>, TrainError> {
        let image_bd = g.l2_normalize(&image_bd);
        let text_bd = g.l2_normalize(&text_bd);
        let scale = g.exp(&log_scale);
        let scale = g.reshape(&scale, &[1]).map_err(ModelError::from)?;
        let context = BatchContext {
            path: Path::new(DISTILL),
            batch,
            image_bd,
            text_bd,
            text_trained: student.text_trained,
            scale,
            teachers: Vec::new(),
        };
        losses(g, setup, &context, sigmoid.as_ref(), form)
    })?;
    let whole = outputs.iter().map(|(slot, _)| *slot).collect();
    for (slot, loss) in outputs {
        g.output(loss_name(setup, slot), &loss);
    }
    Ok((g.finish(), whole))
}

/// The model's own loss and the terms', each with its slot.
fn losses(
    g: &mut GraphBuilder,
    setup: &TrainSetup,
    own: &BatchContext,
    sigmoid: Option<&(Tensor, Tensor)>,
    form: PairForm,
) -> Result<Vec<(usize, Tensor)>, TrainError> {
    let shapes = setup.teacher_shapes()?;
    let terms = if setup.distils() { &setup.objective.terms[..] } else { &[] };
    let context = |i: usize| BatchContext {
        path: own.path.at(&terms[i].name),
        teachers: terms[i].teachers.iter().map(|&t| TeacherInputs::new(&shapes[t], own.batch)).collect(),
        ..own.clone()
    };
    // The level that shares one op with CLIP's loss: the student's logits serve both.
    let streamed = form == PairForm::Streamed;
    let shared = terms.iter().position(|t| streamed && t.level.relational_temperature() == Some(1.0));
    let mut shared_loss = None;
    let clip = match (sigmoid, shared) {
        (Some((bias, pairs)), _) => siglip_loss(g, own, bias, pairs)?,
        (None, Some(i)) => {
            let [clip, relational] = relational(g, &context(i), 1.0)?;
            shared_loss = Some(relational);
            clip
        }
        (None, None) if streamed => relational(g, own, 1.0)?[0].clone(),
        (None, None) => clip_loss(g, own)?,
    };
    let mut outputs = vec![(CLIP_SLOT, clip)];
    for (i, term) in terms.iter().enumerate() {
        let loss = match term.level.relational_temperature().filter(|_| streamed) {
            Some(_) if shared == Some(i) => shared_loss.take(),
            Some(temperature) => {
                let [_, relational] = relational(g, &context(i), temperature)?;
                Some(if temperature == 1.0 { relational } else { g.scale(&relational, temperature * temperature) })
            }
            None => term.level.batch_loss(g, &context(i))?,
        };
        outputs.extend(loss.map(|loss| (i + 1, loss)));
    }
    Ok(outputs)
}

/// CLIP's loss and the relational loss against the context's teachers, with all logits divided by the temperature.
fn relational(g: &mut GraphBuilder, c: &BatchContext, temperature: f32) -> Result<[Tensor; 2], ModelError> {
    let soften = |g: &mut GraphBuilder, x: Tensor| if temperature == 1.0 { x } else { g.scale(&x, 1.0 / temperature) };
    let mut teachers = Vec::new();
    for teacher in &c.teachers {
        let sides = teacher.sides(g);
        let (u_bd, v_bd) = sides.ok_or_else(|| ModelError::Dims(format!("`{}` has no embeddings", teacher.name)))?;
        teachers.push((soften(g, u_bd), v_bd));
    }
    let [own, other, keep, group, share, column_total] = SPARSE;
    let targets = PairInputs {
        own: g.int_input(own, &[c.batch]),
        other: g.int_input(other, &[c.batch]),
        keep: g.input(keep, &[c.batch]),
        group: g.int_input(group, &[c.batch]),
        share: g.input(share, &[c.batch]),
        column_total: g.input(column_total, &[c.batch]),
    };
    let widths: Vec<usize> = teachers.iter().map(|(u_bd, _)| u_bd.shape()[1]).collect();
    let teachers: Vec<(&Tensor, &Tensor)> = teachers.iter().map(|(u_bd, v_bd)| (u_bd, v_bd)).collect();
    let d = Relational::whole(c.batch, c.image_bd.shape()[1], &widths);
    let scale = soften(g, c.scale.clone());
    g.on_kernels(|g| {
        let both = g.relational(&d, &c.image_bd, &c.text_bd, &scale, &targets, &teachers)?;
        Ok([g.pick(&both, 0)?, g.pick(&both, 1)?])
    })
}
