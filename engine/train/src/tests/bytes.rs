//! Batches of bytes: the views made of them on the host and on a device, and batches taken ahead.

use std::fs;

use mcpipe_data::{
    Augment, CutBox, LoaderOptions, MixOptions, MixPolicy, Normalize, SampleSet, ShapesParams, TrainLoader,
    make_shapes, shapes_paths, tar_files,
};

use super::device::{bits, device};
use super::*;
use crate::machine::{At, CudaMachine, State};
use crate::step::{running, trained};

/// Side of a teacher's images, unlike the student's.
const OTHER: usize = 12;

/// Seeded bytes in two forms and three views; plain, Mixup and CutMix in turn. After `fails_at` batches it fails.
struct Bytes {
    step: u64,
    batch_size: usize,
    sizes: [usize; 2],
    fails_at: u64,
}

impl Bytes {
    fn new(batch_size: usize) -> Self {
        Bytes { step: 0, batch_size, sizes: [SIDE, OTHER], fails_at: u64::MAX }
    }

    fn batch(&self, step: u64) -> Batch {
        let b = self.batch_size;
        let captions: Vec<String> =
            (0..b).map(|i| ["red", "blue", "square", "a dog"][(i + step as usize) % 4].to_owned()).collect();
        let bytes = |size: usize| {
            let image = |i: usize| {
                let mut rng = Rng::new(5, "bytes", step, i as u64);
                (0..size * size * 3).map(move |p| (rng.below(200) as usize + 50 * usize::from(p % 4 == i % 4)) as u8)
            };
            FormBytes { size, bytes: (0..b).flat_map(image).collect() }
        };
        let cut = CutBox { grid: 4, top: 1, left: 0, bottom: 3, right: 3 };
        let mix = match step % 3 {
            0 => None,
            1 => Some(mcpipe_data::Mix { offset: 1, lambda: 0.7, cut: None }),
            _ => Some(mcpipe_data::Mix { offset: 1, lambda: cut.kept() as f32, cut: Some(cut) }),
        };
        let view = |form, normalize| ByteView { form, normalize };
        let views = vec![view(0, Normalize::CLIP), view(1, Normalize::IMAGENET), view(0, Normalize::UNIT)];
        let images = ImageBytes { forms: self.sizes.map(bytes).into(), views, mix };
        Batch::of_bytes(images, captions, serde_json::json!({ "step": step + 1 }))
    }
}

impl BatchSource for Bytes {
    fn next_batch(&mut self) -> Result<Batch, BoxError> {
        if self.step == self.fails_at {
            return Err("the disk is gone".into());
        }
        self.step += 1;
        Ok(self.batch(self.step - 1))
    }
}

/// Teachers of all three views, one of them the student's.
fn teachers(s: &mut TrainSetup, other: usize) {
    let vit_of = |size, patch, dim| BackboneTower { image_size: size, ..vit("visual", patch, 8, dim) };
    let at = |name: &str, tower, view, seed| {
        let mut teacher = frozen(name, Arc::new(tower), None, seed);
        if let TeacherModel::Frozen { image: Some(image), .. } = &mut teacher.model {
            image.view = view;
        }
        teacher
    };
    s.teachers = vec![
        at("same", vit_of(SIDE, 4, 5), 0, 21),
        at("larger", vit_of(other, other / 3, 7), 1, 22),
        at("other", vit_of(SIDE, 2, 6), 2, 23),
    ];
    s.objective.lambda = 0.5;
    s.objective.terms = vec![term("logits", "logits", "", &[0, 1, 2], 1.0)];
}

fn with_teachers(training: Training) -> TrainSetup {
    let mut s = setup(conv(6, true), training);
    s.optimizer = Arc::new(Sgd { lr: 0.05, ..Sgd::default() });
    teachers(&mut s, OTHER);
    s
}

fn run(s: TrainSetup, source: &mut dyn BatchSource) -> (Trainer, Log) {
    let mut log = Log::default();
    let mut trainer = Trainer::new(s).unwrap();
    trainer.run(source, &mut NoEval, &mut log, None, &Stop::default()).unwrap();
    (trainer, log)
}

/// The bytes' views as a source of values.
struct Values(Bytes);

impl BatchSource for Values {
    fn next_batch(&mut self) -> Result<Batch, BoxError> {
        let batch = self.0.next_batch()?;
        let views = batch.values()?.into_owned();
        Ok(Batch { views, bytes: None, ..batch })
    }
}

#[test]
fn bytes_are_the_values_that_they_make_bit_for_bit() {
    let (of_bytes, log) = run(with_teachers(training(4, 4, 2)), &mut Bytes::new(4));
    let (of_values, other) = run(with_teachers(training(4, 4, 2)), &mut Values(Bytes::new(4)));
    assert_eq!(bits(&of_bytes), bits(&of_values));
    assert!(log.steps.iter().zip(&other.steps).all(|(a, b)| a.loss.to_bits() == b.loss.to_bits()));
}

#[test]
fn bytes_that_do_not_fit_are_refused() {
    let mut trainer = Trainer::new(with_teachers(training(5, 4, 1))).unwrap();
    let good = Bytes::new(4).batch(2);
    let mut refused = |change: &dyn Fn(&mut ImageBytes)| {
        let mut bad = good.clone();
        change(bad.bytes.as_mut().unwrap());
        trainer.one(&bad).unwrap_err().to_string()
    };
    let e = refused(&|b| b.forms[1].bytes.truncate(1727));
    assert!(e.contains("1727 bytes are not 4 images of 12x12"), "{e}");
    let e = refused(&|b| b.views[1].form = 0);
    assert!(e.contains("view 1 has Some(768) values"), "{e}");
    let e = refused(&|b| b.views[2].form = 2);
    assert!(e.contains("view 2 is of form 2"), "{e}");
    let e = refused(&|b| b.mix.as_mut().unwrap().cut.as_mut().unwrap().right = 5);
    assert!(e.contains("lies outside its grid"), "{e}");
}

/// The machine of a new training on a device.
fn machine(s: TrainSetup) -> CudaMachine {
    let setup = Rc::new(s);
    let Compute::Cuda(device) = &setup.compute else { panic!("a device") };
    let graphs = Graphs::new(&setup).unwrap();
    let mut store = ParamStore::default();
    graphs.trained().into_iter().for_each(|g| store.init(g, setup.seed).unwrap());
    let (trained, running) = (trained(&graphs, &store), running(&graphs, &store));
    let optimizer = OptimizerState::new(setup.optimizer.as_ref(), &store, &trained);
    let state = State { store, averages: Vec::new(), optimizer, trained, running };
    CudaMachine::new(Rc::clone(&setup), graphs, &state, device).unwrap()
}

#[test]
fn a_device_makes_the_hosts_views() {
    let Some(compute) = device() else { return };
    let precisions = [(mcpipe_spec::Precision::F32, 0.0), (mcpipe_spec::Precision::Bf16, 1.0 / 256.0)];
    for (precision, rounding) in precisions {
        for accumulate in [1, 2] {
            let s = with_teachers(Training { precision, ..training(3, 4, accumulate) });
            let mut machine = machine(TrainSetup { compute: compute.clone(), ..s });
            for step in 0..3 {
                let batch = Bytes::new(4).batch(step);
                let expected = batch.values().unwrap();
                let at = At { step, weights: &[0.5, 0.5], lr: 0.1, momenta: &[], taken_ahead: false };
                let made = machine.images(&batch, at).unwrap();
                let mut views: Vec<usize> = made.iter().map(|(view, _)| *view).collect();
                views.sort_unstable();
                // Several parts read one memory; a single one has each model's own.
                assert_eq!(views, if accumulate == 1 { vec![0, 0, 1, 2] } else { vec![0, 1, 2] });
                // Where parts are staged, they are rounded only when a tower reads them.
                let rounding = if accumulate == 1 { rounding } else { 0.0 };
                for (view, values) in made {
                    assert_eq!(values.len(), expected[view].len());
                    for (i, (a, b)) in values.iter().zip(&expected[view]).enumerate() {
                        let bar = 1e-6f32.max(1e-6 * b.abs()) + rounding * b.abs();
                        assert!((a - b).abs() <= bar, "step {step}, view {view}, {i}: {a}, {b}");
                    }
                }
            }
        }
    }
}

#[test]
fn fifty_steps_of_bytes_are_those_of_the_cpu() {
    let Some(compute) = device() else { return };
    for (steps, accumulate) in [(50, 1), (6, 2)] {
        let s = || with_teachers(training(steps, 4, accumulate));
        let on_device = || TrainSetup { compute: compute.clone(), ..s() };
        let (_, cpu) = run(s(), &mut Bytes::new(4));
        let (trainer, log) = run(on_device(), &mut Bytes::new(4));
        assert_eq!(cpu.steps.len(), log.steps.len());
        for (a, b) in cpu.steps.iter().zip(&log.steps) {
            assert!((a.loss - b.loss).abs() <= 1e-3 * a.loss, "{a:?}\n{b:?}");
        }
        assert_eq!(bits(&trainer), bits(&run(on_device(), &mut Bytes::new(4)).0));
        // One after another instead of ahead.
        let mut alone = Trainer::new(on_device()).unwrap();
        (0..steps).for_each(|step| drop(alone.one(&Bytes::new(4).batch(step)).unwrap()));
        alone.sync().unwrap();
        assert_eq!(bits(&trainer), bits(&alone));
    }
}

/// Parts of an odd number of values have gaps between them: the host makes the views.
#[test]
fn parts_of_any_size() {
    let Some(compute) = device() else { return };
    let s = || {
        let mut s = with_teachers(training(3, 4, 4));
        teachers(&mut s, 6);
        s
    };
    let source = || Bytes { sizes: [SIDE, 6], ..Bytes::new(4) };
    let (_, cpu) = run(s(), &mut source());
    let (_, log) = run(TrainSetup { compute, ..s() }, &mut source());
    for (a, b) in cpu.steps.iter().zip(&log.steps) {
        assert!((a.loss - b.loss).abs() <= 1e-3 * a.loss, "{a:?}\n{b:?}");
    }
}

#[test]
fn a_source_that_fails_ahead_is_told_of_at_its_step() {
    let Some(compute) = device() else { return };
    for compute in [Compute::default(), compute] {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 9);
        let mut t = training(9, 4, 1);
        t.checkpoint.every_steps = 3;
        let mut trainer = Trainer::new(TrainSetup { compute, ..with_teachers(t) }).unwrap();
        let mut log = Log::default();
        let mut source = Bytes { fails_at: 6, ..Bytes::new(4) };
        let e = trainer.run(&mut source, &mut NoEval, &mut log, Some(&checkpoints), &Stop::default()).unwrap_err();
        assert!(matches!(e, TrainError::Data { step: 6, .. }), "{e}");
        assert_eq!((log.steps.len(), trainer.step()), (6, 6));
        assert_eq!(Checkpoint::open(&checkpoints.latest().unwrap().unwrap()).unwrap().state().step, 6);
    }
}

/// Asks for a stop when a step is told of.
struct StopAt(u64, Stop);

impl Observer for StopAt {
    fn step(&mut self, report: &StepReport) {
        if report.step == self.0 {
            self.1.request();
        }
    }

    fn eval(&mut self, _: &EvalReport) {}

    fn message(&mut self, _: &str) {}
}

/// The loader's batches on a device: stopped anywhere, resumed from the checkpoint, the same files.
#[test]
fn a_training_from_shards_resumes_bit_for_bit() {
    let Some(compute) = device() else { return };
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("shapes");
    let params = ShapesParams { train: 40, eval: 1, image_size: 24, ..ShapesParams::default() };
    make_shapes(&data, &params, 3, &mut |_, _| {}).unwrap();
    let set = Arc::new(SampleSet::open(tar_files(&shapes_paths(&data).0).unwrap()).unwrap());
    let source = |step: u64| {
        let options = LoaderOptions {
            batch_size: 4,
            forms: vec![SIDE.into(), OTHER.into()],
            augment: Augment { crop: Some(mcpipe_data::RandomCrop::default()), flip: 0.5 },
            mix: MixPolicy {
                mixup: Some(MixOptions { alpha: 0.8, probability: 0.4 }),
                cutmix: Some(MixOptions { alpha: 1.0, probability: 0.4 }),
            },
            ..LoaderOptions::default()
        };
        let view = |form: usize, normalize| ViewSpec { form: form.into(), normalize };
        let views = vec![view(SIDE, Normalize::CLIP), view(OTHER, Normalize::IMAGENET), view(SIDE, Normalize::UNIT)];
        LoaderSource::new(TrainLoader::start(Arc::clone(&set), options, step).unwrap(), views)
    };
    let s = || {
        let mut t = training(8, 4, 1);
        t.checkpoint.every_steps = 2;
        TrainSetup { compute: compute.clone(), ..with_teachers(t) }
    };
    let whole = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(whole.path(), 2);
    let mut trainer = Trainer::new(s()).unwrap();
    let mut first = source(0);
    trainer.run(&mut first, &mut NoEval, &mut NoObserver, Some(&checkpoints), &Stop::default()).unwrap();
    // No batch beyond the last step's.
    assert_eq!(first.loader().step(), 8);
    for at in [1, 2, 5] {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 2);
        let stop = Stop::default();
        let mut first = Trainer::new(s()).unwrap();
        let told = &mut StopAt(at, stop.clone());
        let mut read = source(0);
        let outcome = first.run(&mut read, &mut NoEval, told, Some(&checkpoints), &stop).unwrap();
        // The next batch was taken while the last step ran; the checkpoint does not count it.
        assert_eq!(read.loader().step(), at + 1);
        let Outcome::Interrupted { step, checkpoint: Some(path) } = outcome else { panic!() };
        let mut second = Trainer::new(s()).unwrap();
        second.restore(&Checkpoint::open(&path).unwrap()).unwrap();
        let cursor = LoaderSource::step_of(second.cursor());
        assert_eq!((step, cursor), (at, at));
        second.run(&mut source(cursor), &mut NoEval, &mut NoObserver, Some(&checkpoints), &Stop::default()).unwrap();
        for file in ["model.safetensors", "state.safetensors", "state.json"] {
            let read = |dir: &std::path::Path| fs::read(dir.join("step-000008").join(file)).unwrap();
            assert!(read(dir.path()) == read(whole.path()), "{file} differs after a stop at {at}");
        }
    }
}
