//! Stopping and resuming, and checkpoints that can't be used.

use std::fs;

use super::accumulate::Dropping;
use super::*;

/// All that makes a resume hard: averages, batch statistics, mixing, parts, a plateau, skipped steps, stochastic depth.
fn hard() -> TrainSetup {
    let mut s = everything(true, training(12, 4, 2));
    s.model.image = Arc::new(Dropping(ConvTower { path: "visual", channels: 4, batch_norm: true, dim: 6 }));
    s.average = Some(AverageSetup { momentum: 0.8, evaluate: true });
    s.training.clip_norm = Some(0.5);
    let plateau =
        Plateau { warmup_steps: 2, every_steps: 2, patience: 0, factor: 0.7, threshold: 0.5, ..Plateau::default() };
    s.schedule = LrConfig::Plateau(plateau);
    s.objective.terms[0].schedule =
        Some(mcpipe_spec::WeightSchedule::Linear(mcpipe_spec::Ramp { from: 1.0, to: 0.1, start: 2, end: None }));
    s
}

struct WithOneBad(Random);

impl BatchSource for WithOneBad {
    fn next_batch(&mut self) -> Result<Batch, BoxError> {
        let mut batch = self.0.next_batch()?;
        if self.0.step == 4 {
            batch.views[0][0] = f32::NAN;
        }
        Ok(batch)
    }
}

fn source(step: u64) -> WithOneBad {
    WithOneBad(Random { step, batch_size: 4, mix: true })
}

/// Asks for a stop after so many steps.
struct StopAfter(u64, Stop);

impl Observer for StopAfter {
    fn step(&mut self, report: &StepReport) {
        if report.step == self.0 {
            self.1.request();
        }
    }
    fn eval(&mut self, _: &EvalReport) {}
    fn message(&mut self, _: &str) {}
}

#[test]
fn a_resumed_run_is_the_run_bit_for_bit() {
    let whole = tempfile::tempdir().unwrap();
    let mut trainer = Trainer::new(hard()).unwrap();
    let checkpoints = Checkpoints::new(whole.path(), 2);
    let outcome = trainer.run(&mut source(0), &mut NoEval, &mut NoObserver, Some(&checkpoints), &Stop::default());
    assert_eq!(outcome.unwrap(), Outcome::Finished);
    assert_eq!(trainer.counters().skipped, 1);
    for at in [1, 4, 7, 11] {
        let dir = tempfile::tempdir().unwrap();
        let checkpoints = Checkpoints::new(dir.path(), 2);
        let stop = Stop::default();
        let mut first = Trainer::new(hard()).unwrap();
        let outcome =
            first.run(&mut source(0), &mut NoEval, &mut StopAfter(at, stop.clone()), Some(&checkpoints), &stop);
        let Outcome::Interrupted { step, checkpoint: Some(path) } = outcome.unwrap() else { panic!() };
        assert_eq!(step, at);
        let mut second = Trainer::new(hard()).unwrap();
        second.restore(&Checkpoint::open(&path).unwrap()).unwrap();
        let cursor = second.cursor()["step"].as_u64().unwrap();
        assert_eq!(cursor, at);
        second.run(&mut source(cursor), &mut NoEval, &mut NoObserver, Some(&checkpoints), &Stop::default()).unwrap();
        for file in ["model.safetensors", "state.safetensors", "state.json"] {
            let read = |dir: &std::path::Path| fs::read(dir.join("step-000012").join(file)).unwrap();
            assert!(read(dir.path()) == read(whole.path()), "{file} differs after a stop at {at}");
        }
    }
}

#[test]
fn old_checkpoints_go_and_temporaries_too() {
    let dir = tempfile::tempdir().unwrap();
    let mut s = setup(conv(6, false), training(7, 4, 1));
    s.training.checkpoint.every_steps = 2;
    fs::create_dir(dir.path().join(".step-000001.tmp")).unwrap();
    let checkpoints = Checkpoints::new(dir.path(), 2);
    let mut log = Log::default();
    Trainer::new(s)
        .unwrap()
        .run(&mut Random::new(4, false), &mut NoEval, &mut log, Some(&checkpoints), &Stop::default())
        .unwrap();
    let mut names: Vec<_> =
        fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    assert_eq!(names, ["step-000006", "step-000007"]);
    assert_eq!(checkpoints.list().unwrap().len(), 2);
    assert_eq!(log.messages.len(), 4);
}

fn saved(setup: TrainSetup, dir: &std::path::Path) -> std::path::PathBuf {
    let mut trainer = Trainer::new(setup).unwrap();
    trainer.one(&Random::new(4, false).batch(0)).unwrap();
    trainer.save(&Checkpoints::new(dir, 2)).unwrap()
}

#[test]
fn foreign_checkpoints_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let path = saved(setup(conv(6, false), training(5, 4, 1)), dir.path());
    let refused = |s: TrainSetup| {
        let mut trainer = Trainer::new(s).unwrap();
        let before = trainer.store().params().iter().map(|p| p.data.clone()).collect::<Vec<_>>();
        let e = trainer.restore(&Checkpoint::open(&path).unwrap()).unwrap_err();
        assert!(trainer.store().params().iter().zip(before).all(|(p, b)| p.data == b), "nothing may change");
        e.to_string().split("can't be used: ").nth(1).unwrap().to_owned()
    };
    assert_eq!(
        refused(setup(conv(6, true), training(5, 4, 1))),
        "it is of another model: missing visual.bn.weight, visual.bn.bias, visual.bn.running_mean and 1 more"
    );
    let wide = ConvTower { path: "visual", channels: 8, batch_norm: false, dim: 6 };
    let text = refused(setup(Arc::new(wide), training(5, 4, 1)));
    assert!(text.contains("wrong shape visual.conv.weight [4, 3, 3, 3] instead of [8, 3, 3, 3]"), "{text}");
    let other = TrainSetup { identity: "other".into(), ..setup(conv(6, false), training(5, 4, 1)) };
    assert!(refused(other).starts_with("it was written by a training with other settings"));
    let sgd = TrainSetup { optimizer: Arc::new(Sgd::default()), ..setup(conv(6, false), training(5, 4, 1)) };
    assert!(refused(sgd).contains("optimizer `adamw`"));
}

#[test]
fn damaged_checkpoints_are_refused_and_the_one_before_is_found() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(dir.path(), 5);
    let mut trainer = Trainer::new(setup(conv(6, false), training(9, 4, 1))).unwrap();
    let mut paths = Vec::new();
    for step in 0..5 {
        trainer.one(&Random::new(4, false).batch(step)).unwrap();
        paths.push(trainer.save(&checkpoints).unwrap());
    }
    fs::remove_file(paths[1].join("state.json")).unwrap();
    let text = fs::read_to_string(paths[2].join("state.json")).unwrap();
    fs::write(paths[2].join("state.json"), text.replace("\"step\": 3", "\"step\": 9")).unwrap();
    let mut bytes = fs::read(paths[3].join("model.safetensors")).unwrap();
    *bytes.last_mut().unwrap() ^= 1;
    fs::write(paths[3].join("model.safetensors"), bytes).unwrap();
    let bytes = fs::read(paths[4].join("state.safetensors")).unwrap();
    fs::write(paths[4].join("state.safetensors"), &bytes[..bytes.len() / 2]).unwrap();
    let (found, refused) = checkpoints.newest_whole().unwrap();
    assert_eq!(found.unwrap().path(), paths[0]);
    let texts: Vec<String> = refused.iter().map(ToString::to_string).collect();
    assert!(texts[0].contains("state.safetensors") && texts[1].contains("checksum"), "{texts:#?}");
    assert!(texts[2].contains("checksum of `state.json`") && texts[3].contains("no `state.json`"), "{texts:#?}");
    assert!(Checkpoints::new(dir.path().join("none"), 1).newest_whole().unwrap().0.is_none());
}

#[test]
fn a_folder_that_can_t_be_written_is_named() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("file");
    fs::write(&file, "x").unwrap();
    let mut s = setup(conv(6, false), training(2, 4, 1));
    s.training.checkpoint.every_steps = 1;
    let checkpoints = Checkpoints::new(file.join("checkpoints"), 1);
    let e = Trainer::new(s).unwrap().run(
        &mut Random::new(4, false),
        &mut NoEval,
        &mut NoObserver,
        Some(&checkpoints),
        &Stop::default(),
    );
    let text = e.unwrap_err().to_string();
    assert!(text.starts_with("could not create ") && text.contains("file/checkpoints"), "{text}");
}

#[test]
fn a_checkpoint_that_can_t_be_written_leaves_the_one_before() {
    let dir = tempfile::tempdir().unwrap();
    let checkpoints = Checkpoints::new(dir.path(), 1);
    let path = saved(setup(conv(6, false), training(5, 4, 1)), dir.path());
    let mut trainer = Trainer::new(setup(conv(6, false), training(5, 4, 1))).unwrap();
    trainer.restore(&Checkpoint::open(&path).unwrap()).unwrap();
    trainer.one(&Random::new(4, false).batch(1)).unwrap();
    // A file where the temporary folder is to be made.
    fs::write(dir.path().join(".step-000002.tmp"), "x").unwrap();
    let e = trainer.save(&checkpoints).unwrap_err();
    assert!(e.to_string().contains(".step-000002.tmp"), "{e}");
    assert_eq!(checkpoints.latest().unwrap(), Some(path), "the good one stays");
}

/// Blocks of 512 bytes between the sizes of the two tensor files of [`wide`]'s checkpoint.
#[cfg(unix)]
const LIMIT: &str = "48";

#[cfg(unix)]
fn wide() -> TrainSetup {
    let tower = ConvTower { path: "visual", channels: 32, batch_norm: false, dim: 6 };
    setup(Arc::new(tower), training(5, 4, 1))
}

/// A disk that fills up within the write, for which a limit on the size of files stands in: this test runs itself
/// once more under that limit, as the process that writes.
#[cfg(unix)]
#[test]
fn a_write_that_stops_halfway_leaves_the_checkpoint_before() {
    const FOLDER: &str = "MCPIPE_TEST_CHECKPOINTS";
    if let Some(dir) = std::env::var_os(FOLDER) {
        let checkpoints = Checkpoints::new(dir, 1);
        let mut trainer = Trainer::new(wide()).unwrap();
        trainer.restore(&Checkpoint::open(&checkpoints.latest().unwrap().unwrap()).unwrap()).unwrap();
        trainer.one(&Random::new(4, false).batch(1)).unwrap();
        let text = trainer.save(&checkpoints).unwrap_err().to_string();
        assert!(text.contains(".step-000002.tmp/state.safetensors: can't write: "), "{text}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = saved(wide(), dir.path());
    let size = |file: &str| fs::metadata(path.join(file)).unwrap().len();
    let limit = 512 * LIMIT.parse::<u64>().unwrap();
    assert!(size("model.safetensors") < limit && limit < size("state.safetensors"));
    // Without the signal, a write beyond the limit is an error like that of a full disk.
    let child = std::process::Command::new("sh")
        .args(["-c", "trap '' XFSZ; ulimit -f \"$0\"; exec \"$@\"", LIMIT])
        .arg(std::env::current_exe().unwrap())
        .args(["--exact", "tests::checkpoints::a_write_that_stops_halfway_leaves_the_checkpoint_before"])
        .env(FOLDER, dir.path())
        .output()
        .unwrap();
    let said = String::from_utf8_lossy(&child.stdout);
    assert!(child.status.success() && said.contains("1 passed"), "{said}");
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().path()).collect();
    assert_eq!(left, [path], "nothing of the new one, all of the old one");
    assert!(Checkpoints::new(dir.path(), 1).newest_whole().unwrap().0.is_some());
}
