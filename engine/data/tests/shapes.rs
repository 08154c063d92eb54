//! The shapes data set, `check` and `index`.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Arc;

use common::{coloured_shard, png, write_tar};
use mcpipe_data::{
    CheckOptions, DataError, EvalOptions, EvalSet, EvalTransform, LoaderOptions, Manifest, OnBadSample, Report,
    SampleSet, Severity, ShapesParams, TrainLoader, check, index, make_shapes, split_shards,
};

fn params() -> ShapesParams {
    ShapesParams { train: 1100, eval: 96, image_size: 32, difficulty: 0.5 }
}

fn make(dir: &Path, params: &ShapesParams, seed: u64) -> mcpipe_data::Result<Manifest> {
    make_shapes(dir, params, seed, &mut |_, _| {})
}

fn check_one(path: &Path) -> Report {
    check(&[path.to_str().unwrap()], &CheckOptions::default())
}

#[test]
fn the_set_is_whole_and_the_same_again() {
    let dir = tempfile::tempdir().unwrap();
    let (first, second) = (dir.path().join("a"), dir.path().join("deep/b"));
    let mut last = (0, 0);
    let manifest = make_shapes(&first, &params(), 3, &mut |done, total| last = (done, total)).unwrap();
    assert_eq!(last, (1196, 1196));
    assert_eq!(make(&second, &params(), 3).unwrap(), manifest);
    assert_ne!(make(&dir.path().join("c"), &params(), 4).unwrap().content_hash, manifest.content_hash);
    manifest.verify(&first, true).unwrap();
    assert_eq!(Manifest::read(&first).unwrap().unwrap(), manifest);
    // Nothing is left beside the set.
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 3);

    let report = check_one(&first);
    assert!(report.problems.is_empty(), "{report}");
    assert_eq!((report.shards, report.samples, report.with_caption, report.with_class), (3, 1196, 1196, 1196));

    let set = EvalSet::open(&first, "test", None).unwrap();
    assert_eq!(set.classnames.len(), 48);
    let mut classes: HashMap<u32, usize> = HashMap::new();
    for batch in set.read(&EvalOptions::new(vec![EvalTransform::new(32)])).unwrap() {
        batch.unwrap().class.iter().for_each(|c| *classes.entry(c.unwrap()).or_default() += 1);
    }
    assert!(classes.len() == 48 && classes.values().all(|&n| n == 2));

    let samples = Arc::new(SampleSet::open(split_shards(&first.join("train")).unwrap()).unwrap());
    let options =
        LoaderOptions { forms: vec![32.into()], on_bad_sample: OnBadSample::Fail, ..LoaderOptions::default() };
    let batch = TrainLoader::start(samples, options, 0).unwrap().next_batch().unwrap();
    for (caption, class) in batch.captions.iter().zip(&batch.class) {
        let name = &set.classnames[class.unwrap() as usize];
        assert!(caption.contains(name), "{caption}: {name}");
    }
}

#[test]
fn the_same_set_is_reused_and_another_refused() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().join("set");
    let small = ShapesParams { train: 20, eval: 10, image_size: 16, difficulty: 1.0 };
    let made = make(&root, &small, 0).unwrap();
    let time = fs::metadata(root.join("train/0.tar")).unwrap().modified().unwrap();
    assert_eq!(make(&root, &small, 0).unwrap(), made);
    assert_eq!(fs::metadata(root.join("train/0.tar")).unwrap().modified().unwrap(), time);
    assert!(matches!(make(&root, &small, 1), Err(DataError::Exists { .. })));
    fs::write(root.join("train/0.tar"), b"changed").unwrap();
    let error = make(&root, &small, 0).unwrap_err();
    assert!(error.to_string().contains("train/0.tar"), "{error}");
    fs::create_dir(dir.path().join("other")).unwrap();
    assert!(matches!(make(&dir.path().join("other"), &small, 0), Err(DataError::Exists { .. })));
}

#[test]
fn parameters_are_checked() {
    let dir = tempfile::tempdir().unwrap();
    for bad in [
        ShapesParams { train: 0, ..params() },
        ShapesParams { eval: 0, ..params() },
        ShapesParams { image_size: 8, ..params() },
        ShapesParams { difficulty: f64::NAN, ..params() },
    ] {
        assert!(matches!(make(&dir.path().join("x"), &bad, 0), Err(DataError::Option(_))));
    }
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
}

#[test]
fn writing_fails_with_the_path() {
    // A file where a directory is needed fails for every user, root included.
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("file"), b"").unwrap();
    let error = make(&dir.path().join("file/set"), &params(), 0).unwrap_err();
    assert_eq!(error.code(), "data::write");
    assert!(error.to_string().contains("file"), "{error}");
    // A read-only file system.
    #[cfg(target_os = "linux")]
    {
        let error = make(Path::new("/proc/mcpipe-set"), &params(), 0).unwrap_err();
        assert!(error.to_string().contains("/proc/"), "{error}");
    }
}

#[test]
fn check_names_every_trouble() {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path();
    fs::create_dir_all(root.join("test")).unwrap();
    fs::create_dir_all(root.join("train")).unwrap();
    fs::write(root.join("classnames.txt"), "a\nb\n").unwrap();
    fs::write(root.join("zeroshot_classification_templates.txt"), "a photo of {c}\na photo of {}\n").unwrap();
    fs::write(root.join("test/nshards.txt"), "3\n").unwrap();
    let image = png(4, 4, [9; 3]);
    write_tar(
        &root.join("test/0.tar"),
        &[
            ("ok.png", &image),
            ("ok.cls", b"1"),
            ("out.png", &image),
            ("out.cls", b"2"),
            ("corrupt.png", &image[..40]),
            ("corrupt.cls", b"x"),
            ("none.png", &image),
            ("alone.cls", b"1"),
            ("ok.txt", b"apart"),
            ("text.png", &image),
            ("text.cls", b"0"),
            ("text.txt", b"\xff"),
            ("text.json", b"]"),
        ],
    );
    let tar = fs::read(root.join("test/0.tar")).unwrap();
    fs::write(root.join("test/1.tar"), &tar[..700]).unwrap();
    fs::write(root.join("test/2.tar"), b"").unwrap();
    write_tar(&root.join("test/3.tar"), &[("z.png", &image), ("z.cls", b"0")]);
    coloured_shard(&root.join("train/0.tar"), 0..2);

    let report = check_one(root);
    let found: Vec<(&str, Option<&str>)> = report.problems.iter().map(|p| (p.code, p.key.as_deref())).collect();
    for expected in [
        ("data::bad_line", None),
        ("data::not_adjacent", Some("ok")),
        ("data::class_out_of_range", Some("out")),
        ("data::bad_class", Some("corrupt")),
        ("data::image_corrupt", Some("corrupt")),
        ("data::no_class", Some("none")),
        ("data::no_image", Some("alone")),
        ("data::caption_not_utf8", Some("text")),
        ("data::bad_json", Some("text")),
        ("data::tar_truncated", None),
        ("data::tar_empty", None),
        ("data::shards_beyond", None),
        ("data::missing_nshards", None),
    ] {
        assert!(found.contains(&expected), "{expected:?} not in\n{report}");
    }
    assert!(!report.is_ok());
    for problem in report.problems.iter().filter(|p| p.key.is_some()) {
        assert!(problem.message.contains("0.tar") && problem.path.ends_with("test/0.tar"), "{}", problem.message);
    }
    let json = serde_json::to_value(&report).unwrap();
    assert_eq!(json["problems"].as_array().unwrap().len(), report.problems.len());
}

#[test]
fn check_of_shards_and_of_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let image = png(4, 4, [9; 3]);
    let shard = write_tar(&dir.path().join("00000.tar"), &[("a.png", &image), ("a.cls", b"1")]);
    let options = CheckOptions { workers: 4, ..CheckOptions::default() };
    let report = check(&[shard.to_str().unwrap()], &options);
    let codes: Vec<_> = report.problems.iter().map(|p| (p.severity, p.code)).collect();
    assert_eq!(codes, [(Severity::Warning, "data::few_shards"), (Severity::Warning, "data::class_without_caption")]);
    assert!(report.is_ok());
    assert_eq!(check_one(dir.path()).shards, 1);
    let pattern = format!("{}/{{00000..00002}}.tar", dir.path().display());
    let report = check(&[pattern], &options);
    assert_eq!(report.problems[0].code, "data::missing_shards");
    assert!(report.to_string().contains("00002.tar"));
    let empty = tempfile::tempdir().unwrap();
    assert_eq!(check_one(empty.path()).problems[0].code, "data::no_shards");
    assert_eq!(check_one(Path::new("/nowhere/x.tar")).problems[0].code, "data::missing_shards");
}

#[test]
fn index_writes_every_split_or_none() {
    let dir = tempfile::tempdir().unwrap();
    for (split, shards) in [("train", 3), ("test", 1)] {
        fs::create_dir(dir.path().join(split)).unwrap();
        for i in 0..shards {
            coloured_shard(&dir.path().join(format!("{split}/{i}.tar")), i..i + 1);
        }
    }
    let counts: Vec<usize> = index(dir.path()).unwrap().into_iter().map(|(_, n)| n).collect();
    assert_eq!(counts, [1, 3]);
    assert_eq!(fs::read_to_string(dir.path().join("train/nshards.txt")).unwrap(), "3\n");
    fs::remove_file(dir.path().join("test/nshards.txt")).unwrap();
    fs::remove_file(dir.path().join("train/1.tar")).unwrap();
    assert!(matches!(index(dir.path()), Err(DataError::MissingShards { .. })));
    assert!(!dir.path().join("test/nshards.txt").exists());
    assert!(matches!(index(&dir.path().join("nowhere")), Err(DataError::Read { .. })));
}

#[test]
fn spec_types_convert() {
    let augment = mcpipe_spec::Augment {
        crop: Some(mcpipe_spec::Crop { scale: [0.5, 1.0], ratio: [0.75, 1.25] }),
        flip: 0.5,
        mixup: Some(mcpipe_spec::Mixup { alpha: 0.2, probability: 0.5 }),
        cutmix: None,
    };
    let own = mcpipe_data::Augment::from(&augment);
    assert_eq!(own.crop.unwrap().ratio, (0.75, 1.25));
    assert!(own.check().is_ok());
    assert_eq!(mcpipe_data::MixPolicy::from(&augment).mixup.unwrap().alpha, 0.2);
    let train = mcpipe_spec::TrainData::default();
    assert_eq!(OnBadSample::from(&train), OnBadSample::Skip { max: 100 });
    assert_eq!(mcpipe_data::components()[0].name, "shapes");
}
