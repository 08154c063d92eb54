//! Trainings on a device: a GPU where `MCPIPE_TEST_GPU` is set; with the feature `shim` the CUDA backend's kernels on the
//! CPU, from the library that `MCPIPE_SHIM` names. Without either these tests pass unseen.

use super::*;

/// The device, where there is one.
pub(super) fn device() -> Option<Compute> {
    #[cfg(feature = "shim")]
    if std::env::var_os("MCPIPE_SHIM").is_some() {
        return Some(Compute::open(DeviceChoice::Shim, Kernels::Native).unwrap().0);
    }
    std::env::var_os("MCPIPE_TEST_GPU")?;
    Some(Compute::open(DeviceChoice::Cuda(0), Kernels::Native).unwrap().0)
}

fn run(s: TrainSetup, mix: bool) -> (Trainer, Log) {
    let mut log = Log::default();
    let batch_size = s.training.batch_size;
    let mut trainer = Trainer::new(s).unwrap();
    trainer.run(&mut Random::new(batch_size, mix), &mut NoEval, &mut log, None, &Stop::default()).unwrap();
    (trainer, log)
}

pub(super) fn bits(trainer: &Trainer) -> Vec<u32> {
    trainer.store().params().iter().flat_map(|p| p.data.iter().map(|v| v.to_bits())).collect()
}

/// Both runs' losses and norms agree at each step.
fn agree(s: impl Fn() -> TrainSetup, compute: &Compute, tolerance: f64) -> (Trainer, Log) {
    let (_, cpu) = run(s(), true);
    let (trainer, log) = run(TrainSetup { compute: compute.clone(), ..s() }, true);
    assert_eq!(cpu.steps.len(), log.steps.len());
    for (a, b) in cpu.steps.iter().zip(&log.steps) {
        let close = |a: f64, b: f64| (a - b).abs() <= tolerance * a.abs().max(1e-2);
        assert!(close(a.loss, b.loss) && close(a.grad_norm, b.grad_norm), "{a:?}\n{b:?}");
        assert!(close(a.logit_scale, b.logit_scale) && a.skipped.is_none() && b.skipped.is_none(), "{a:?}\n{b:?}");
        for ((name, x), (_, y)) in a.terms.iter().zip(&b.terms) {
            assert!(close(*x, *y), "step {}: {name}: {x} {y}", a.step);
        }
    }
    (trainer, log)
}

#[test]
fn fifty_steps_are_those_of_the_cpu() {
    let Some(compute) = device() else { return };
    let s = || {
        let mut s = setup(conv(6, true), training(50, 4, 1));
        s.training.clip_norm = Some(1.0);
        s.schedule = LrConfig::Cosine(Cosine { warmup_steps: 2, final_factor: 0.0 });
        s.teachers = vec![frozen("images", conv(5, false), None, 22)];
        let features = "loss = 'mse'\ntaps = [{ student = 'conv', teacher = 'conv' }]";
        s.objective.lambda = 0.5;
        s.objective.terms = vec![term("features", "features", features, &[0], 1.0)];
        s
    };
    let (trainer, log) = agree(s, &compute, 1e-3);
    let again = run(TrainSetup { compute, ..s() }, true);
    assert_eq!(bits(&trainer), bits(&again.0));
    assert_eq!(log.steps.last().unwrap().loss.to_bits(), again.1.steps.last().unwrap().loss.to_bits());
}

/// Every level, four teachers, one of them an average; averages of the student; in one part and in two.
#[test]
fn every_level_and_teacher() {
    let Some(compute) = device() else { return };
    for accumulate in [1, 2] {
        let s = || {
            let mut s = everything(true, training(3, 4, accumulate));
            s.average = Some(AverageSetup { momentum: 0.75, evaluate: true });
            s.optimizer = Arc::new(Sgd { lr: 0.01, ..Sgd::default() });
            s
        };
        let (trainer, _) = agree(s, &compute, 1e-3);
        let (cpu, _) = run(s(), true);
        for (p, q) in trainer.average().unwrap().params().iter().zip(cpu.average().unwrap().params()) {
            let apart = p.data.iter().zip(&q.data).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
            assert!(apart < 1e-3, "{}: {apart}", p.name);
        }
    }
}

#[test]
fn both_towers_and_pairs_judged_by_themselves_in_four_parts() {
    let Some(compute) = device() else { return };
    let s = || {
        let mut s = setup(conv(6, false), training(2, 8, 4));
        s.model.text = ModelText::Trained { tower: Arc::new(BagOfTokens { dim: 6 }), tokenize: tokenize() };
        s.objective.contrast = Contrast::Sigmoid { bias: -1.5 };
        s
    };
    agree(s, &compute, 1e-3);
}

/// Activations in bf16: losses move a little, and no more.
#[test]
fn bf16_is_f32_but_for_rounding() {
    let Some(compute) = device() else { return };
    let run_with = |precision| {
        let training = Training { precision, ..training(3, 4, 1) };
        run(TrainSetup { compute: compute.clone(), ..everything(true, training) }, true).1
    };
    let (whole, rounded) = (run_with(mcpipe_spec::Precision::F32), run_with(mcpipe_spec::Precision::Bf16));
    for (a, b) in whole.steps.iter().zip(&rounded.steps) {
        assert!((a.loss - b.loss).abs() < 0.05 * a.loss && a.loss != b.loss, "{} {}", a.loss, b.loss);
    }
}

#[test]
fn a_resumed_training_is_the_same_and_may_come_from_the_cpu() {
    let Some(compute) = device() else { return };
    let s = |steps, compute: &Compute| {
        let mut s = setup(conv(6, true), training(steps, 4, 1));
        // AdamW makes full steps of a gradient that is nothing but rounding, as the keys' bias has it.
        s.optimizer = Arc::new(Sgd { lr: 0.05, ..Sgd::default() });
        s.average = Some(AverageSetup { momentum: 0.9, evaluate: false });
        s.compute = compute.clone();
        s
    };
    let (whole, _) = run(s(4, &compute), false);
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(dir.path(), 2);
    let (mut half, _) = run(s(2, &compute), false);
    half.save(&checkpoints).unwrap();
    let resume = |compute: &Compute| {
        let checkpoint = Checkpoint::open(&checkpoints.latest().unwrap().unwrap()).unwrap();
        let mut trainer = Trainer::new(s(4, compute)).unwrap();
        trainer.restore(&checkpoint).unwrap();
        let mut source = Random { step: trainer.step(), ..Random::new(4, false) };
        trainer.run(&mut source, &mut NoEval, &mut Log::default(), None, &Stop::default()).unwrap();
        trainer
    };
    let resumed = resume(&compute);
    assert_eq!(bits(&whole), bits(&resumed));
    let average = |t: &Trainer| t.average().unwrap().get("visual.proj.weight").unwrap().data.clone();
    assert_eq!(average(&whole), average(&resumed));
    let elsewhere = resume(&Compute::default());
    for (p, q) in elsewhere.store().params().iter().zip(whole.store().params()) {
        let apart = p.data.iter().zip(&q.data).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(apart < 1e-4, "{}: {apart}", p.name);
    }
}

#[test]
fn a_bad_step_is_skipped_and_named() {
    let Some(compute) = device() else { return };
    let mut t = training(10, 4, 1);
    t.non_finite.max_in_a_row = 2;
    let mut s = setup(conv(6, true), t);
    s.average = Some(AverageSetup { momentum: 0.9, evaluate: true });
    s.compute = compute;
    let mut trainer = Trainer::new(s).unwrap();
    let source = Random::new(4, false);
    trainer.one(&source.batch(0)).unwrap();
    trainer.sync().unwrap();
    let before = (bits(&trainer), trainer.average().unwrap().clone());
    let mut bad = source.batch(1);
    bad.views[0][17] = f32::NAN;
    let skipped = trainer.one(&bad).unwrap().skipped.unwrap();
    assert_eq!((skipped.in_a_row, skipped.lr_scale, skipped.origin.as_str()), (1, 0.5, "loss of term `clip`"));
    trainer.sync().unwrap();
    assert_eq!(bits(&trainer), before.0);
    for (p, q) in trainer.average().unwrap().params().iter().zip(before.1.params()) {
        assert_eq!(p.data, q.data, "{}", p.name);
    }
    let e = trainer.one(&bad).unwrap_err();
    let TrainError::NonFinite { origin, in_a_row, .. } = &e else { panic!("{e}") };
    assert_eq!((origin.what, *in_a_row), ("image", 2));
    trainer.one(&source.batch(2)).unwrap();
}

#[test]
fn encoders_give_what_the_cpu_gives() {
    let Some(compute) = device() else { return };
    let tower = conv(6, true);
    let mut store = ParamStore::default();
    Encoder::init_images(tower.as_ref(), &mut store, 4).unwrap();
    let images = Random::new(3, false).batch(0).views.remove(0);
    let encode = |compute: &Compute, store: &ParamStore| {
        let mut encoder = Encoder::tapped(tower.as_ref(), &["conv".into()], 2, store, compute).unwrap();
        encoder.encode_images_and_taps(store, &images).unwrap()
    };
    let close = |a: &[f32], b: &[f32]| a.len() == b.len() && a.iter().zip(b).all(|(a, b)| (a - b).abs() < 1e-4);
    let (cpu, device) = (encode(&Compute::default(), &store), encode(&compute, &store));
    assert!(close(&cpu.0, &device.0) && close(&cpu.1[0], &device.1[0]));
    // Weights that change are taken over by an encoder that lives on.
    let mut encoder = Encoder::images(tower.as_ref(), 2, &store, &compute).unwrap();
    let first = encoder.encode_images(&store, &images).unwrap();
    store.get_mut("visual.proj.weight").unwrap().data.iter_mut().for_each(|v| *v *= 2.0);
    let second = encoder.encode_images(&store, &images).unwrap();
    let doubled: Vec<f32> = first.iter().map(|v| 2.0 * v).collect();
    assert!(close(&doubled, &second));
}

/// New captions make the text encoder run between steps, recorded ones too; each step sees the weights of the one before.
#[test]
fn captions_that_are_new_leave_recorded_steps_right() {
    let Some(compute) = device() else { return };
    let losses = |compute: &Compute| -> Vec<f64> {
        let mut s = setup(conv(6, true), training(8, 4, 1));
        let tower = BagOfTokens { dim: 6 };
        let mut store = ParamStore::default();
        Encoder::init_captions(&tower, &mut store, 11).unwrap();
        s.texts = vec![CaptionEncoder::new(&tower, tokenize(), Arc::new(store), compute).unwrap()];
        s.optimizer = Arc::new(Sgd { lr: 0.1, ..Sgd::default() });
        s.compute = compute.clone();
        let mut trainer = Trainer::new(s).unwrap();
        let source = Random::new(4, false);
        let step = |step: u64| {
            let mut batch = source.batch(step % 2);
            batch.captions = (0..4).map(|i| format!("{} at {step}", ["a", "lamp", "the sea", "zebra"][i])).collect();
            trainer.one(&batch).unwrap().loss
        };
        (0..8).map(step).collect()
    };
    let (cpu, device) = (losses(&Compute::default()), losses(&compute));
    for (a, b) in cpu.iter().zip(&device) {
        assert!((a - b).abs() <= 1e-3 * a.abs(), "{cpu:?}\n{device:?}");
    }
}
