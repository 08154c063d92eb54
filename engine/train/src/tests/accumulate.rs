//! Parts of a batch give the whole batch's gradient.

use std::rc::Rc;
use std::sync::Arc;

use super::*;

fn gradients(setup: TrainSetup, batch: &Batch) -> (Vec<f64>, Vec<Vec<f32>>) {
    let setup = Rc::new(setup);
    let mut store = setup.initial.clone();
    let mut step = on_the_cpu(&setup, &mut store);
    let averages = vec![Average::new("mean", &store, 0.9, None)];
    let mut weights = vec![0.4];
    weights.extend(setup.objective.terms.iter().map(|t| t.weight));
    let values = step.pass(&mut store, &averages, batch, 0, &weights).unwrap();
    (values.terms, step.grads.all().to_vec())
}

/// ‖a − b‖ / ‖b‖ over all parameters.
fn distance(a: &[Vec<f32>], b: &[Vec<f32>]) -> f64 {
    let norm = |f: &dyn Fn(f32, f32) -> f32| -> f64 {
        a.iter().flatten().zip(b.iter().flatten()).map(|(a, b)| f64::from(f(*a, *b)).powi(2)).sum::<f64>().sqrt()
    };
    norm(&|a, b| a - b) / norm(&|_, b| b)
}

fn vit_student(accumulate: usize) -> TrainSetup {
    let mut s = everything(false, training(10, 8, accumulate));
    s.model.image = Arc::new(vit("visual", 2, 8, 6));
    let tokens = "taps = [{ student = 'transformer.resblocks.1', teacher = 'transformer.resblocks.1' }]";
    let attention = "taps = [{ student = 'transformer.resblocks.1.attn', teacher = 'transformer.resblocks.1.attn' }]";
    s.objective.terms.retain(|t| t.level.pairs().is_empty());
    s.objective.terms.push(term("features", "features", tokens, &[0], 1.0));
    s.objective.terms.push(term("attention", "attention", attention, &[0, 1], 1.0));
    s
}

#[test]
fn four_parts_give_the_gradient_of_one() {
    let batch = Random::new(8, true).batch(0);
    let (terms, whole) = gradients(vit_student(1), &batch);
    for accumulate in [2, 4, 8] {
        let (parts_terms, parts) = gradients(vit_student(accumulate), &batch);
        for (a, b) in terms.iter().zip(&parts_terms) {
            assert!((a - b).abs() < 1e-5 * b.abs().max(1.0), "{terms:?} {parts_terms:?}");
        }
        let apart = distance(&parts, &whole);
        assert!(apart < 1e-5, "{accumulate} parts: {apart}");
    }
}

/// A residual map with stochastic depth behind another tower.
#[derive(Clone, Debug)]
pub(super) struct Dropping(pub ConvTower);

impl ImageTower for Dropping {
    fn image_size(&self) -> usize {
        self.0.image_size()
    }

    fn dim(&self) -> usize {
        self.0.dim
    }

    fn taps(&self) -> Result<Vec<TapInfo>, ModelError> {
        self.0.taps()
    }

    fn build(&self, g: &mut GraphBuilder, x_bhwc: &Tensor, taps: &[String]) -> Result<Encoded, ModelError> {
        let encoded = self.0.build(g, x_bhwc, taps)?;
        let x_bd = &encoded.embedding_bd;
        let y_bd = g.linear(&Path::new("visual.branch"), x_bd, self.0.dim, true, Init::Normal(0.7))?;
        let y_bd = g.drop_path(&y_bd, 0.5)?;
        Ok(Encoded { embedding_bd: g.add(x_bd, &y_bd)?, taps: encoded.taps })
    }
}

#[test]
fn stochastic_depth_drops_the_same_samples_in_parts_and_others_at_each_step() {
    let tower = ConvTower { path: "visual", channels: 4, batch_norm: false, dim: 6 };
    let setup = |accumulate| setup(Arc::new(Dropping(tower.clone())), training(10, 8, accumulate));
    let batch = Random::new(8, false).batch(0);
    let at = |accumulate: usize, number: u64| {
        let setup = Rc::new(setup(accumulate));
        let mut store = setup.initial.clone();
        let mut step = on_the_cpu(&setup, &mut store);
        step.pass(&mut store, &[], &batch, number, &[1.0]).unwrap();
        step.grads.all().to_vec()
    };
    let whole = at(1, 0);
    assert!(distance(&at(4, 0), &whole) < 1e-5);
    assert_eq!(at(4, 0), at(4, 0));
    assert!(distance(&at(1, 1), &whole) > 1e-2);
}

#[test]
fn both_trained_towers_too() {
    let setup = |accumulate| {
        let mut s = setup(conv(6, false), training(10, 8, accumulate));
        s.model.text = ModelText::Trained { tower: Arc::new(BagOfTokens { dim: 6 }), tokenize: tokenize() };
        s
    };
    let batch = Random::new(8, false).batch(0);
    let (_, whole) = gradients(setup(1), &batch);
    let apart = distance(&gradients(setup(4), &batch).1, &whole);
    assert!(apart < 1e-5, "{apart}");
}

#[test]
fn running_statistics_move_once_for_each_part() {
    let moved = |accumulate: usize| {
        let mut trainer = Trainer::new(setup(conv(6, true), training(1, 8, accumulate))).unwrap();
        trainer.one(&Random::new(8, false).batch(0)).unwrap();
        trainer.store().get("visual.bn.running_mean").unwrap().data.clone()
    };
    // With momentum 0.1, m parts of equal mean would move the statistic by 1 − 0.9^m of the way.
    let (one, two) = (moved(1), moved(2));
    let ratio = two[0] / one[0];
    assert!((1.5..2.3).contains(&ratio), "{one:?} {two:?}");
}

#[test]
fn a_batch_that_does_not_split_is_refused() {
    let e = Trainer::new(setup(conv(6, false), training(1, 8, 3))).unwrap_err();
    assert_eq!(e.to_string(), "a batch of 8 can't be split into 3 equal parts");
}
