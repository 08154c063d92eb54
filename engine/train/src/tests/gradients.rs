//! Gradients of whole objectives against central differences.

use std::rc::Rc;
use std::sync::Arc;

use super::*;

/// Each parameter tensor is moved along its own random direction.
fn check(setup: TrainSetup, mix: bool) {
    let setup = Rc::new(setup);
    let mut store = setup.initial.clone();
    let mut step = on_the_cpu(&setup, &mut store);
    let averages = vec![Average::new("mean", &store, 0.9, None)];
    let batch = Random::new(setup.training.batch_size, mix).batch(0);
    let lambda = setup.objective.lambda;
    let mut weights = vec![1.0 - lambda];
    weights.extend(setup.objective.terms.iter().map(|t| lambda * t.weight));
    let values = step.pass(&mut store, &averages, &batch, 0, &weights).unwrap();
    assert!(values.finite, "{values:?}");
    let grads = step.grads.clone();
    let trained = crate::step::trained(&crate::graphs::Graphs::new(&setup).unwrap(), &store);
    let names: Vec<String> = store.params().iter().map(|p| p.name.clone()).collect();
    let mut checked = 0;
    for (i, name) in names.iter().enumerate().filter(|(i, _)| trained[*i]) {
        let mut rng = Rng::new(1, name, 0, 0);
        let len = store.params()[i].data.len();
        let norm = (len as f32).sqrt();
        let direction: Vec<f32> = (0..len).map(|_| if rng.chance(0.5) { 1.0 / norm } else { -1.0 / norm }).collect();
        let expected: f64 = grads.all()[i].iter().zip(&direction).map(|(g, d)| f64::from(g * d)).sum();
        let mut at = |eps: f32| {
            let mut moved = store.clone();
            moved.params_mut()[i].data.iter_mut().zip(&direction).for_each(|(p, d)| *p += eps * d);
            step.pass(&mut moved, &averages, &batch, 0, &weights).unwrap().total
        };
        // Two step widths (Richardson), so that curvature does not decide.
        let eps = 8e-3;
        let slope = |eps: f32, at: &mut dyn FnMut(f32) -> f64| (at(eps) - at(-eps)) / f64::from(2.0 * eps);
        let measured = (4.0 * slope(eps, &mut at) - slope(2.0 * eps, &mut at)) / 3.0;
        let error = (measured - expected).abs();
        assert!(error < 2e-3 + 0.02 * expected.abs(), "{name}: {expected} by gradient, {measured} by difference");
        checked += 1;
    }
    assert!(checked > 5, "{checked}");
}

#[test]
fn every_level_at_once() {
    check(everything(false, training(10, 4, 1)), false);
}

#[test]
fn every_level_at_once_mixed_and_in_parts() {
    check(everything(false, training(10, 4, 2)), true);
}

#[test]
fn batch_statistics() {
    check(everything(true, training(10, 6, 1)), false);
}

#[test]
fn both_towers() {
    let mut s = setup(conv(6, false), training(10, 5, 1));
    s.model.text = ModelText::Trained { tower: Arc::new(BagOfTokens { dim: 6 }), tokenize: tokenize() };
    check(s, true);
}

/// SigLIP's loss with its bias, beside a level; mixed, over two parts.
#[test]
fn pairs_judged_by_themselves() {
    let mut s = setup(conv(6, false), training(10, 4, 2));
    s.model.text = ModelText::Trained { tower: Arc::new(BagOfTokens { dim: 6 }), tokenize: tokenize() };
    s.objective.contrast = Contrast::Sigmoid { bias: -1.5 };
    check(s, true);
}

#[test]
fn shared_projection_and_text_side_of_the_projection_level() {
    #[derive(Debug)]
    struct Tower(ConvTower, ProjectionHead);
    impl ImageTower for Tower {
        fn image_size(&self) -> usize {
            SIDE
        }
        fn dim(&self) -> usize {
            self.1.dim()
        }
        fn taps(&self) -> Result<Vec<TapInfo>, ModelError> {
            self.0.taps()
        }
        fn build(&self, g: &mut GraphBuilder, x: &Tensor, taps: &[String]) -> Result<Encoded, ModelError> {
            let out = self.0.build(g, x, taps)?;
            Ok(Encoded { embedding_bd: self.1.build(g, &out.embedding_bd)?, ..out })
        }
    }
    let projection =
        mcpipe_models::projection::Projection { kind: mcpipe_models::projection::ProjectionKind::Linear, dim: 5 };
    let head = ProjectionHead { projection, path: Path::new("visual_projection") };
    let own = ConvTower { path: "visual", channels: 4, batch_norm: false, dim: 6 };
    let mut s = setup(Arc::new(Tower(own, head.clone())), training(10, 4, 2));
    s.texts = vec![caption_encoder(6, 11), caption_encoder(10, 12)];
    s.model.text = ModelText::Frozen { encoder: 0, projection: Some(Arc::new(head)) };
    s.teachers = vec![frozen("clip", Arc::new(vit("visual", 2, 8, 10)), Some(1), 21)];
    s.objective = Objective {
        lambda: 0.5,
        terms: vec![term("projection", "projection", "", &[0], 8.0), term("icl", "icl", "", &[0], 1.0)],
        ..Objective::default()
    };
    check(s, false);
}
