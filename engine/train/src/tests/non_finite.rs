//! Steps whose loss or gradient is not finite.

use super::*;

#[test]
fn a_bad_step_is_skipped_and_changes_nothing() {
    let mut s = setup(conv(6, true), training(10, 4, 1));
    s.average = Some(AverageSetup { momentum: 0.9, evaluate: true });
    let mut trainer = Trainer::new(s).unwrap();
    let source = Random::new(4, false);
    trainer.one(&source.batch(0)).unwrap();
    let before = (trainer.store().clone(), trainer.average().unwrap().clone());
    let mut bad = source.batch(1);
    bad.views[0][17] = f32::NAN;
    let report = trainer.one(&bad).unwrap();
    let skipped = report.skipped.unwrap();
    assert_eq!((skipped.in_a_row, skipped.total, skipped.lr_scale, report.step), (1, 1, 0.5, 2));
    assert_eq!(skipped.origin, "loss of term `clip`");
    for (a, b) in [(trainer.store(), &before.0), (trainer.average().unwrap(), &before.1)] {
        for (p, q) in a.params().iter().zip(b.params()) {
            assert_eq!(p.data, q.data, "{}", p.name);
        }
    }
    let report = trainer.one(&source.batch(2)).unwrap();
    assert!(report.skipped.is_none() && report.lr == 0.005);
    assert_eq!(trainer.counters().skipped_in_a_row, 0);
}

#[test]
fn the_learning_rate_recovers() {
    let mut trainer = Trainer::new(setup(conv(6, false), training(100, 4, 1))).unwrap();
    let source = Random::new(4, false);
    let mut bad = source.batch(0);
    bad.views[0][0] = f32::INFINITY;
    trainer.one(&bad).unwrap();
    for step in 1..=50 {
        assert_eq!(trainer.counters().lr_scale, 0.5);
        trainer.one(&source.batch(step)).unwrap();
    }
    assert_eq!(trainer.counters().lr_scale, 1.0);
}

/// Batches of which those from `from` on are bad in one pixel.
struct Spoilt(Random, u64);

impl BatchSource for Spoilt {
    fn next_batch(&mut self) -> Result<Batch, BoxError> {
        let step = self.0.step;
        let mut batch = self.0.next_batch()?;
        if step >= self.1 {
            batch.views[0][5] = f32::NAN;
        }
        Ok(batch)
    }
}

#[test]
fn too_many_in_a_row_stop_at_the_last_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let mut t = training(20, 4, 1);
    t.checkpoint.every_steps = 2;
    let mut trainer = Trainer::new(setup(conv(6, false), t)).unwrap();
    let checkpoints = Checkpoints::new(dir.path(), 2);
    let mut log = Log::default();
    let mut source = Spoilt(Random::new(4, false), 5);
    let e = trainer.run(&mut source, &mut NoEval, &mut log, Some(&checkpoints), &Stop::default()).unwrap_err();
    let TrainError::NonFinite { step, in_a_row, origin, checkpoint } = &e else { panic!("{e}") };
    assert_eq!((*step, *in_a_row, origin.what), (7, 3, "image"));
    assert_eq!(checkpoint.as_deref(), Some(dir.path().join("step-000006").as_path()));
    assert_eq!(log.steps.iter().filter(|r| r.skipped.is_some()).count(), 2);
    // Skipped steps change no weight, so a checkpoint between them is good.
    let kept = Checkpoint::open(&dir.path().join("step-000006")).unwrap();
    assert_eq!(kept.state().counters.skipped_in_a_row, 1);
}

/// The origin that is named when the training starts from spoilt weights.
fn origin(spoil: impl FnOnce(&mut TrainSetup, &mut ParamStore)) -> String {
    let mut t = training(20, 4, 1);
    t.non_finite.max_in_a_row = 1;
    let mut s = everything(false, t);
    let mut store = Trainer::new(s.clone()).unwrap().store().clone();
    spoil(&mut s, &mut store);
    s.initial = store;
    let e = Trainer::new(s).unwrap().one(&Random::new(4, false).batch(0)).unwrap_err();
    match e {
        TrainError::NonFinite { origin, .. } => origin.to_string(),
        other => panic!("{other}"),
    }
}

#[test]
fn the_first_culprit_is_named() {
    let nan = origin(|_, store| store.get_mut("visual.proj.weight").unwrap().data[0] = f32::NAN);
    assert_eq!(nan, "weight, first at `visual.proj.weight`");
    let overflow = origin(|_, store| store.get_mut("visual.conv.weight").unwrap().data.fill(f32::MAX));
    assert!(overflow.contains("`visual.conv` (conv2d)"), "{overflow}");
    let regressor = "distill.features.clip.regressor.0.weight";
    let local = origin(|_, store| store.get_mut(regressor).unwrap().data.fill(1e38));
    assert!(local.contains("term `features`") && local.contains("distill.features"), "{local}");
    let teacher = origin(|s, _| {
        let TeacherModel::Frozen { image: Some(image), .. } = &mut s.teachers[1].model else { panic!() };
        let mut weights = (*image.store).clone();
        weights.params_mut()[0].data.fill(f32::NAN);
        image.store = Arc::new(weights);
    });
    assert_eq!(teacher, "embedding, first at teacher `images`");
}

#[test]
fn a_gradient_that_overflows_names_its_term() {
    let mut t = training(20, 4, 1);
    t.non_finite.max_in_a_row = 2;
    let mut s = everything(false, t);
    // The weighted loss is finite in f64; its gradient is not in f32.
    s.objective.terms[4].weight = 1e39;
    let mut trainer = Trainer::new(s).unwrap();
    let source = Random::new(4, false);
    let skipped = trainer.one(&source.batch(0)).unwrap().skipped.unwrap();
    assert!(skipped.origin.starts_with("gradient, first at"), "{}", skipped.origin);
    let e = trainer.one(&source.batch(1)).unwrap_err().to_string();
    assert!(e.contains("gradient of term `features`") && e.contains("there is no checkpoint yet"), "{e}");
}
