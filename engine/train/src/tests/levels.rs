//! Levels against closed forms, and what they refuse.

use std::rc::Rc;
use std::sync::Arc;

use super::*;
use crate::distill::{Problem, terms};

fn losses(setup: TrainSetup, batch: &Batch) -> Vec<f64> {
    let setup = Rc::new(setup);
    let mut store = setup.initial.clone();
    let mut step = on_the_cpu(&setup, &mut store);
    let averages = vec![Average::new("mean", &store, 0.9, None)];
    let weights = vec![1.0; 1 + setup.objective.terms.len()];
    step.pass(&mut store, &averages, batch, 0, &weights).unwrap().terms
}

fn unit(x: &[f32], dim: usize) -> Vec<Vec<f64>> {
    let norm = |r: &[f32]| r.iter().map(|v| f64::from(*v).powi(2)).sum::<f64>().sqrt();
    x.chunks(dim).map(|r| r.iter().map(|v| f64::from(*v) / norm(r)).collect()).collect()
}

fn similarities(a: &[Vec<f64>], b: &[Vec<f64>], scale: f64) -> Vec<Vec<f64>> {
    a.iter().map(|a| b.iter().map(|b| scale * a.iter().zip(b).map(|(x, y)| x * y).sum::<f64>()).collect()).collect()
}

fn softmax(row: &[f64]) -> Vec<f64> {
    let sum: f64 = row.iter().map(|v| v.exp()).sum();
    row.iter().map(|v| v.exp() / sum).collect()
}

fn transpose(m: &[Vec<f64>]) -> Vec<Vec<f64>> {
    (0..m[0].len()).map(|j| m.iter().map(|r| r[j]).collect()).collect()
}

/// Σ p·ln(p/q), or −Σ p·ln q without the entropy.
fn divergence(p: &[f64], q: &[f64], entropy: bool) -> f64 {
    p.iter().zip(q).filter(|(p, _)| **p > 0.0).map(|(p, q)| if entropy { p * (p / q).ln() } else { -p * q.ln() }).sum()
}

fn mean(rows: &[Vec<f64>], targets: &[Vec<f64>], entropy: bool) -> f64 {
    rows.iter().zip(targets).map(|(r, t)| divergence(t, &softmax(r), entropy)).sum::<f64>() / rows.len() as f64
}

struct Embedded {
    image: Vec<Vec<f64>>,
    text: Vec<Vec<f64>>,
    teacher_image: Vec<Vec<f64>>,
    teacher_text: Vec<Vec<f64>>,
}

/// The embeddings of a setup's student and first teacher, by encoders that know nothing of the step.
fn embed(s: &TrainSetup, batch: &Batch) -> Embedded {
    let mut store = s.initial.clone();
    let tower = s.model.image.as_ref();
    Encoder::init_images(tower, &mut store, s.seed).unwrap();
    let mut encoder = Encoder::images(tower, 3, &store, &s.compute).unwrap();
    let image = encoder.encode_images(&store, &batch.views[0]).unwrap();
    let TeacherModel::Frozen { image: Some(theirs), text: Some(text), .. } = &s.teachers[0].model else { panic!() };
    let mut other = Encoder::images(theirs.tower.as_ref(), 2, &theirs.store, &s.compute).unwrap();
    let teacher = other.encode_images(&theirs.store, &batch.views[0]).unwrap();
    let texts = |i: usize| unit(&s.texts[i].embed(&batch.captions).unwrap(), s.texts[i].dim());
    Embedded {
        image: unit(&image, tower.dim()),
        text: texts(0),
        teacher_image: unit(&teacher, theirs.tower.dim()),
        teacher_text: texts(*text),
    }
}

fn with_teacher(terms: Vec<Term>) -> TrainSetup {
    let mut s = setup(conv(6, false), training(10, 5, 1));
    s.texts.push(caption_encoder(6, 12));
    s.teachers = vec![frozen("clip", Arc::new(vit("visual", 2, 8, 6)), Some(1), 21)];
    s.objective = Objective { lambda: 0.5, terms, ..Objective::default() };
    s
}

fn close(a: f64, b: f64) {
    assert!((a - b).abs() < 2e-5 * b.abs().max(1.0), "{a} instead of {b}");
}

#[test]
fn clip_logits_projection_and_icl_follow_their_formulas() {
    let s = with_teacher(vec![
        term("logits", "logits", "", &[0], 1.0),
        term("soft", "logits", "temperature = 4.0", &[0], 1.0),
        term("projection", "projection", "", &[0], 1.0),
        term("icl", "icl", "", &[0], 1.0),
    ]);
    let mut batch = Random::new(5, false).batch(1);
    batch.captions = ["red", "blue", "square", "red", "zebra"].map(String::from).to_vec();
    batch.mix = Some(Mix { partner: vec![4, 0, 1, 2, 3], keep: vec![0.8; 5] });
    let e = embed(&s, &batch);
    let got = losses(s, &batch);
    let targets = SoftTargets::new(&batch.captions, batch.mix.as_ref());
    let rows =
        |p: &[f32]| -> Vec<Vec<f64>> { p.chunks(5).map(|r| r.iter().map(|v| f64::from(*v)).collect()).collect() };
    let (to_text, to_image) = (rows(&targets.image_to_text), rows(&targets.text_to_image));
    let student = similarities(&e.image, &e.text, 5.0);
    close(got[0], 0.5 * (mean(&student, &to_text, false) + mean(&transpose(&student), &to_image, false)));
    let teacher = similarities(&e.teacher_image, &e.teacher_text, 20.0);
    let soft =
        |m: &[Vec<f64>], t: f64| -> Vec<Vec<f64>> { m.iter().map(|r| r.iter().map(|v| v / t).collect()).collect() };
    for (got, t) in [(got[1], 1.0), (got[2], 4.0)] {
        let (s, p) = (soft(&student, t), soft(&teacher, t));
        let target = |m: &[Vec<f64>]| m.iter().map(|r| softmax(r)).collect::<Vec<_>>();
        let by_rows = mean(&s, &target(&p), true);
        let by_columns = mean(&transpose(&s), &target(&transpose(&p)), true);
        close(got, t * t * 0.5 * (by_rows + by_columns));
    }
    let squares = e.image.iter().flatten().zip(e.teacher_image.iter().flatten()).map(|(a, b)| (a - b).powi(2));
    close(got[3], squares.sum::<f64>() / 30.0);
    let images = mean(&similarities(&e.image, &e.teacher_text, 5.0), &to_text, false);
    let texts = mean(&similarities(&e.text, &e.teacher_image, 5.0), &to_image, false);
    close(got[4], 0.5 * (images + texts));
}

#[test]
fn an_ensemble_is_the_mean_of_its_teachers_distributions() {
    let mut s = with_teacher(vec![term("logits", "logits", "", &[0, 1], 1.0)]);
    s.teachers.push(Teacher {
        name: "words".into(),
        model: TeacherModel::Frozen { image: None, text: Some(1), logit_scale: 3.0 },
    });
    let batch = Random::new(5, false).batch(2);
    let e = embed(&s, &batch);
    let got = losses(s, &batch)[1];
    let student = similarities(&e.image, &e.text, 5.0);
    let first = similarities(&e.teacher_image, &e.teacher_text, 20.0);
    let words = similarities(&e.teacher_text, &e.teacher_text, 3.0);
    let both = |a: &[Vec<f64>], b: &[Vec<f64>]| -> Vec<Vec<f64>> {
        let mix =
            |(a, b): (&Vec<f64>, &Vec<f64>)| softmax(a).iter().zip(softmax(b)).map(|(a, b)| 0.5 * (a + b)).collect();
        a.iter().zip(b).map(mix).collect()
    };
    let rows = mean(&student, &both(&first, &words), true);
    let columns = mean(&transpose(&student), &both(&transpose(&first), &transpose(&words)), true);
    close(got, 0.5 * (rows + columns));
}

#[test]
fn a_teacher_that_is_the_student_has_nothing_to_teach() {
    let mut s = everything(false, training(10, 4, 1));
    let own = "taps = [{ student = 'conv', teacher = 'conv' }]";
    let maps = "taps = [{ student = 'attn', teacher = 'attn' }]";
    s.objective.terms = vec![
        term("logits", "logits", "", &[3], 1.0),
        term("projection", "projection", "", &[3], 1.0),
        term("attention", "attention", own, &[3], 1.0),
        term("maps", "attention", maps, &[3], 1.0),
    ];
    let got = losses(s, &Random::new(4, true).batch(0));
    assert!(got[0] > 0.1 && got[1..].iter().all(|v| v.abs() < 1e-6), "{got:?}");
}

#[test]
fn attention_of_another_grid_and_with_a_class_token() {
    // The student's four tokens have no class token; one teacher has 4 and a class token, one 16 and a class token.
    let maps = "taps = [{ student = 'attn', teacher = 'transformer.resblocks.1.attn' }]";
    let mut s = everything(false, training(10, 4, 1));
    s.objective.terms = vec![term("a", "attention", maps, &[0], 1.0), term("b", "attention", maps, &[1], 1.0)];
    let got = losses(s, &Random::new(4, false).batch(0));
    assert!(got[1..].iter().all(|v| v.is_finite() && *v >= 0.0), "{got:?}");
    // The other way: a student with a class token learns from maps without one.
    let mut s = setup(Arc::new(vit("visual", 2, 8, 6)), training(10, 4, 1));
    s.teachers = vec![frozen("conv", conv(6, false), None, 4)];
    let maps = "taps = [{ student = 'transformer.resblocks.1.attn', teacher = 'attn' }]";
    s.objective =
        Objective { lambda: 1.0, terms: vec![term("a", "attention", maps, &[0], 1.0)], ..Objective::default() };
    let got = losses(s, &Random::new(4, false).batch(0));
    assert!(got[1] > 0.0 && got[1].is_finite(), "{got:?}");
}

/// What [`mcpipe_graph::fuse_losses`] looks for is what the levels add.
#[test]
fn levels_can_be_fused() {
    let graphs = Graphs::new(&everything(false, training(10, 4, 1))).unwrap();
    let losses = |graph: &mcpipe_graph::StepGraph| -> Vec<&str> {
        let fused = mcpipe_graph::fuse_losses(graph);
        let names = fused.nodes().filter_map(|(_, n)| n.op().map(mcpipe_graph::Op::name)).collect::<Vec<_>>();
        let one_of = ["row_loss", "pixel_loss", "transfer_loss", "map_loss", "mse", "cosine", "kl"];
        names.into_iter().filter(|n| one_of.contains(n)).collect()
    };
    let local = ["pixel_loss", "pixel_loss", "transfer_loss", "transfer_loss", "map_loss", "map_loss"];
    assert_eq!(losses(&graphs.tower), local);
    // Where the dimensions are the same, the contrastive loss reads the normalised rows too.
    assert_eq!(losses(&graphs.loss), ["row_loss", "mse"]);
}

fn problems(level: &str, toml: &str, teachers: Option<&[&str]>) -> Vec<Problem> {
    let s = everything(false, training(10, 4, 1));
    let entry = mcpipe_spec::Distill {
        level: level.into(),
        teachers: teachers.map(|t| t.iter().map(|&n| n.to_owned()).collect()),
        weight: 1.0,
        schedule: None,
        params: mcpipe_spec::Params(toml.parse().unwrap()),
    };
    let found = terms(&[entry], &s.student_shape().unwrap(), &s.teacher_shapes().unwrap());
    found.map_or_else(|p| p.into_iter().map(|(_, p)| p).collect(), |_| Vec::new())
}

#[test]
fn problems_name_their_place() {
    let at = |p: &Problem| p.path.join(".");
    let p = problems("features", "taps = [{ student = 'cnv', teacher = 'transformer.resblocks.9' }]", Some(&["clip"]));
    assert_eq!(p.iter().map(at).collect::<Vec<_>>(), ["taps.0.student", "taps.0.teacher"]);
    assert_eq!(p[0].known, ["conv", "attn"]);
    assert!(p[1].message.contains("teacher `clip` has no tap `transformer.resblocks.9`"), "{p:?}");
    let p =
        problems("attention", "taps = [{ student = 'attn', teacher = 'transformer.resblocks.0' }]", Some(&["clip"]));
    assert!(at(&p[0]) == "taps.0" && p[0].message.contains("like with like"), "{p:?}");
    let p = problems("icl", "", Some(&["images", "nobody"]));
    assert_eq!(p.iter().map(at).collect::<Vec<_>>(), ["teachers.1", "teachers"]);
    assert_eq!(problems("projection", "", Some(&["texts"]))[0].message, "teacher `texts` has no image tower");
    assert_eq!(at(&problems("logit", "", None)[0]), "level");
    assert_eq!(problems("logits", "temperature = -1.0", None)[0].path, ["temperature"]);
    assert!(problems("logits", "", None).is_empty());
    assert!(problems("features", "taps = [{ student = 'conv', teacher = 'conv' }]", None).is_empty());
}

#[test]
fn entries_of_one_level_get_names_of_their_own() {
    let s = everything(false, training(10, 4, 1));
    let entry = mcpipe_spec::Distill {
        level: "logits".into(),
        teachers: None,
        weight: 1.0,
        schedule: None,
        params: Default::default(),
    };
    let found = terms(&[entry.clone(), entry], &s.student_shape().unwrap(), &s.teacher_shapes().unwrap()).unwrap();
    assert_eq!(found.iter().map(|t| t.name.as_str()).collect::<Vec<_>>(), ["logits", "logits.2"]);
    assert_eq!(found[0].teachers, [0, 1, 2, 3]);
}

#[test]
fn captions_are_embedded_once_and_alike() {
    let encoder = caption_encoder(6, 1);
    let first = encoder.embed(&["red", "blue", "red"]).unwrap();
    assert_eq!((encoder.computed(), first.len()), (2, 18));
    assert_eq!(first[..6], first[12..]);
    let captions: Vec<String> = (0..70).map(|i| format!("c{i}")).chain(["red".into()]).collect();
    let many = encoder.embed(&captions).unwrap();
    assert_eq!(encoder.computed(), 72);
    assert_eq!(many[70 * 6..], first[..6]);
    // Whatever else is in the batch, the bits are the same: resuming with an empty cache changes nothing.
    let fresh = caption_encoder(6, 1);
    assert_eq!(fresh.embed(&captions[5..]).unwrap(), many[5 * 6..]);
}
