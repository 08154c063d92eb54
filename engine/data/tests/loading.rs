//! The training stream and evaluation sets over shards on disk.
#![allow(clippy::unwrap_used)]

mod common;

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use common::{coloured_shard, png, write_tar};
use mcpipe_data::{
    Augment, Batch, DataError, DatasetType, EvalOptions, EvalSet, EvalTransform, Filter, ImageForm, LoaderOptions,
    MixOptions, MixPolicy, OnBadSample, RandomCrop, SampleFault, SampleSet, TrainLoader,
};

fn set_of(dir: &Path, shards: usize, each: usize) -> Arc<SampleSet> {
    let paths: Vec<PathBuf> =
        (0..shards).map(|i| coloured_shard(&dir.join(format!("{i}.tar")), i * each..(i + 1) * each)).collect();
    Arc::new(SampleSet::open(paths).unwrap())
}

fn options(batch_size: usize) -> LoaderOptions {
    LoaderOptions {
        seed: 5,
        batch_size,
        forms: vec![16.into(), 24.into()],
        context_lengths: vec![8, 16],
        augment: Augment { crop: Some(RandomCrop::default()), flip: 0.5 },
        mix: MixPolicy { mixup: Some(MixOptions { alpha: 0.2, probability: 0.5 }), cutmix: None },
        ..LoaderOptions::default()
    }
}

fn take(set: &Arc<SampleSet>, options: &LoaderOptions, first: u64, steps: usize) -> Vec<Batch> {
    let mut loader = TrainLoader::start(set.clone(), options.clone(), first).unwrap();
    (0..steps).map(|_| loader.next_batch().unwrap()).collect()
}

#[test]
fn batches_hold_what_the_shards_hold() {
    let dir = tempfile::tempdir().unwrap();
    let set = set_of(dir.path(), 3, 10);
    for batch in take(&set, &options(7), 0, 5) {
        assert_eq!(batch.len(), 7);
        assert_eq!(batch.images_of(24).unwrap().len(), 7 * 24 * 24 * 3);
        assert_eq!(batch.images_of(32), None);
        assert_eq!(batch.tokens_of(16).unwrap().len(), 7 * 16);
        for row in 0..7 {
            let number: usize = batch.keys[row][1..].parse().unwrap();
            let class = (number % 20) as u32;
            assert_eq!(batch.class[row], Some(class));
            assert_eq!(batch.captions[row], format!("caption {number}"));
            assert_eq!(set.entries()[batch.samples[row] as usize].key.as_ref(), batch.keys[row]);
            for (images, size) in batch.images.iter().zip([16, 24]) {
                let bytes = size * size * 3;
                assert!(images[row * bytes..][..bytes].iter().all(|&v| u32::from(v) == class * 10));
            }
        }
    }
}

#[test]
fn the_number_of_threads_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let set = set_of(dir.path(), 2, 15);
    let one = take(&set, &LoaderOptions { workers: 1, prefetch: 1, ..options(8) }, 0, 12);
    let four = take(&set, &LoaderOptions { workers: 4, prefetch: 9, ..options(8) }, 0, 12);
    assert_eq!(one, four);
    assert_ne!(one, take(&set, &LoaderOptions { seed: 6, ..options(8) }, 0, 12));
}

#[test]
fn a_resumed_stream_goes_on_exactly() {
    let dir = tempfile::tempdir().unwrap();
    let set = set_of(dir.path(), 2, 15);
    let whole = take(&set, &options(8), 0, 20);
    for first in [1, 3, 4, 11] {
        assert_eq!(take(&set, &options(8), first, 5), whole[first as usize..first as usize + 5]);
    }
    let mut loader = TrainLoader::start(set, options(8), 3).unwrap();
    assert_eq!(loader.step(), 3);
    loader.next_batch().unwrap();
    assert_eq!(loader.step(), 4);
    assert_eq!(loader.stats().rows, 8);
}

/// 30 samples, batches of 8: epochs end inside batches, and each epoch has every sample once.
#[test]
fn epochs_are_permutations() {
    let dir = tempfile::tempdir().unwrap();
    let set = set_of(dir.path(), 2, 15);
    let stream: Vec<u32> = take(&set, &options(8), 0, 15).into_iter().flat_map(|b| b.samples).collect();
    let epochs: Vec<&[u32]> = stream.chunks(30).collect();
    for epoch in &epochs {
        let mut sorted = epoch.to_vec();
        sorted.sort_unstable();
        assert_eq!(sorted, (0..30).collect::<Vec<_>>());
    }
    assert_ne!(epochs[0], epochs[1]);
    let in_order = LoaderOptions { shuffle: false, ..options(8) };
    let stream: Vec<u32> = take(&set, &in_order, 0, 5).into_iter().flat_map(|b| b.samples).collect();
    assert!(stream.iter().enumerate().all(|(i, &s)| s == i as u32 % 30));
}

/// A shard with one image that cannot be decoded, one caption that is not UTF-8, one sample without an image.
fn damaged(dir: &Path) -> Arc<SampleSet> {
    let image = png(4, 4, [9; 3]);
    let mut members: Vec<(String, Vec<u8>)> = Vec::new();
    for i in 0..20 {
        if i != 13 {
            let bytes = if i == 7 { b"not an image".to_vec() } else { image.clone() };
            members.push((format!("k{i:02}.png"), bytes));
        }
        let text = if i == 11 { b"\xff\xfe".to_vec() } else { format!("caption {i}").into_bytes() };
        members.push((format!("k{i:02}.txt"), text));
    }
    let borrowed: Vec<(&str, &[u8])> = members.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
    Arc::new(SampleSet::open(vec![write_tar(&dir.join("0.tar"), &borrowed)]).unwrap())
}

#[test]
fn bad_samples_are_skipped_counted_and_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let set = damaged(dir.path());
    assert_eq!((set.len(), set.bad().len()), (19, 1));
    let mut loader = TrainLoader::start(set.clone(), options(5), 0).unwrap();
    let mut first = Vec::new();
    for _ in 0..8 {
        let batch = loader.next_batch().unwrap();
        assert_eq!(batch.len(), 5);
        assert!(!batch.keys.iter().any(|k| k == "k07" || k == "k11" || k == "k13"));
        first.push(batch);
    }
    assert_eq!(loader.stats().bad_samples, 3);
    let messages = loader.stats().first_bad.join("\n");
    for part in ["0.tar", "`k07`", "`k11`", "`k13`", "not a JPEG", "UTF-8"] {
        assert!(messages.contains(part), "{part} not in {messages}");
    }
    let threads = LoaderOptions { workers: 3, ..options(5) };
    assert_eq!(take(&set, &threads, 0, 8), first);
    assert_eq!(take(&set, &threads, 6, 2), first[6..]);
}

#[test]
fn bad_samples_stop_the_run_where_asked() {
    let dir = tempfile::tempdir().unwrap();
    let set = damaged(dir.path());
    let fail = LoaderOptions { on_bad_sample: OnBadSample::Fail, ..options(5) };
    match TrainLoader::start(set.clone(), fail, 0) {
        Err(DataError::Sample { key, fault: SampleFault::NoImage(_), .. }) => assert_eq!(key, "k13"),
        other => panic!("{other:?}"),
    }
    let capped = LoaderOptions { on_bad_sample: OnBadSample::Skip { max: 2 }, ..options(5) };
    let mut loader = TrainLoader::start(set.clone(), capped, 0).unwrap();
    let error = (0..8).find_map(|_| loader.next_batch().err()).unwrap();
    assert!(matches!(&error, DataError::TooManyBadSamples { count: 3, max: 2, first } if first.len() == 3), "{error}");
    let none = LoaderOptions { on_bad_sample: OnBadSample::Skip { max: 0 }, ..options(5) };
    assert!(matches!(TrainLoader::start(set, none, 0), Err(DataError::TooManyBadSamples { .. })));
}

#[test]
fn a_set_of_nothing_but_bad_samples_ends() {
    let dir = tempfile::tempdir().unwrap();
    let members: Vec<(String, Vec<u8>)> =
        (0..12).flat_map(|i| [(format!("k{i}.png"), b"junk".to_vec()), (format!("k{i}.txt"), b"t".to_vec())]).collect();
    let borrowed: Vec<(&str, &[u8])> = members.iter().map(|(n, b)| (n.as_str(), b.as_slice())).collect();
    let set = Arc::new(SampleSet::open(vec![write_tar(&dir.path().join("0.tar"), &borrowed)]).unwrap());
    let mut loader = TrainLoader::start(set, options(4), 0).unwrap();
    assert!(matches!(loader.next_batch(), Err(DataError::TooManyBadSamples { .. })));
    assert!(matches!(loader.next_batch(), Err(DataError::Worker(_))));
}

#[test]
fn captions_may_be_optional_and_long_ones_are_counted() {
    let dir = tempfile::tempdir().unwrap();
    let image = png(4, 4, [9; 3]);
    let long = "many words ".repeat(50);
    let shard =
        write_tar(&dir.path().join("0.tar"), &[("a.png", &image), ("b.png", &image), ("b.txt", long.as_bytes())]);
    let set = Arc::new(SampleSet::open(vec![shard]).unwrap());
    let optional = LoaderOptions { captions: false, shuffle: false, ..options(2) };
    let mut loader = TrainLoader::start(set.clone(), optional, 0).unwrap();
    let batch = loader.next_batch().unwrap();
    assert_eq!(batch.captions[0], "");
    assert_eq!(&batch.tokens[0][..3], [49406, 49407, 0]);
    assert_eq!(loader.stats().truncated_captions, 1);
    let needed = LoaderOptions { on_bad_sample: OnBadSample::Fail, shuffle: false, ..options(2) };
    let error = TrainLoader::start(set, needed, 0).unwrap().next_batch().unwrap_err();
    assert_eq!(error.code(), "data::no_caption");
}

#[test]
fn too_few_samples_and_bad_options() {
    let dir = tempfile::tempdir().unwrap();
    let set = set_of(dir.path(), 1, 5);
    assert!(matches!(
        TrainLoader::start(set.clone(), options(6), 0),
        Err(DataError::TooFewSamples { samples: 5, batch_size: 6 })
    ));
    for bad in [
        LoaderOptions { batch_size: 0, ..options(1) },
        LoaderOptions { workers: 0, ..options(1) },
        LoaderOptions { forms: vec![], ..options(1) },
        LoaderOptions { forms: vec![0.into()], ..options(1) },
        LoaderOptions { context_lengths: vec![2], ..options(1) },
        LoaderOptions { augment: Augment { crop: None, flip: 1.5 }, ..options(1) },
    ] {
        assert!(matches!(TrainLoader::start(set.clone(), bad, 0), Err(DataError::Option(_))));
    }
}

/// The crop is chosen once: the 48-pixel picture of a sample, halved, is its 24-pixel picture.
#[test]
fn every_size_shows_the_same_pixels() {
    let dir = tempfile::tempdir().unwrap();
    let photo = common::fixture("images/photo.png");
    let mut members: Vec<(String, &[u8])> = Vec::new();
    for i in 0..6 {
        members.push((format!("k{i}.png"), &photo));
        members.push((format!("k{i}.txt"), b"a photo"));
    }
    let borrowed: Vec<(&str, &[u8])> = members.iter().map(|(n, b)| (n.as_str(), *b)).collect();
    let set = Arc::new(SampleSet::open(vec![write_tar(&dir.path().join("0.tar"), &borrowed)]).unwrap());
    let batch = &take(&set, &LoaderOptions { forms: vec![48.into(), 24.into()], ..options(6) }, 0, 1)[0];
    let image = |size: usize, row: usize| &batch.images_of(size).unwrap()[row * size * size * 3..][..size * size * 3];
    let distance = |a: usize, b: usize| -> f64 {
        let (large, small) = (image(48, a), image(24, b));
        let at = |y: usize, x: usize, c: usize| f64::from(large[(y * 48 + x) * 3 + c]);
        let mut sum = 0.0;
        for (i, &v) in small.iter().enumerate() {
            let (y, x, c) = (i / 72 * 2, i / 3 % 24 * 2, i % 3);
            let mean = (at(y, x, c) + at(y + 1, x, c) + at(y, x + 1, c) + at(y + 1, x + 1, c)) / 4.0;
            sum += (mean - f64::from(v)).abs();
        }
        sum / small.len() as f64
    };
    // Another filter at the same side: the same pixels, resized otherwise.
    let bilinear = ImageForm { size: 48, filter: Filter::Bilinear };
    assert_eq!(batch.images_of(bilinear), None);
    let both = &take(&set, &LoaderOptions { forms: vec![48.into(), bilinear], ..options(6) }, 0, 1)[0];
    assert_eq!(both.images_of(48), batch.images_of(48));
    let (a, b) = (both.images_of(48).unwrap(), both.images_of(bilinear).unwrap());
    let mean = a.iter().zip(b).map(|(a, b)| f64::from(a.abs_diff(*b))).sum::<f64>() / a.len() as f64;
    assert!(mean > 0.1 && mean < 6.0, "{mean}");
    for row in 0..6 {
        assert!(distance(row, row) < 6.0, "row {row}: {}", distance(row, row));
        assert!(distance(row, (row + 1) % 6) > 9.0, "rows {row} look alike: {}", distance(row, (row + 1) % 6));
    }
}

fn eval_root(dir: &Path, classes: usize) {
    std::fs::create_dir_all(dir.join("test")).unwrap();
    let names: String = (0..classes).map(|i| format!("class {i}\n")).collect();
    std::fs::write(dir.join("classnames.txt"), names).unwrap();
    std::fs::write(dir.join("zeroshot_classification_templates.txt"), "a photo of a {c}.\na {c}\n").unwrap();
    std::fs::write(dir.join("test/nshards.txt"), "2\n").unwrap();
    coloured_shard(&dir.join("test/0.tar"), 0..11);
    coloured_shard(&dir.join("test/1.tar"), 11..20);
}

fn eval_options() -> EvalOptions {
    EvalOptions {
        batch_size: 6,
        ..EvalOptions::new(vec![EvalTransform::new(16), EvalTransform { crop_pct: 0.9, ..EvalTransform::new(8) }])
    }
}

#[test]
fn evaluation_reads_in_order() {
    let dir = tempfile::tempdir().unwrap();
    eval_root(dir.path(), 20);
    let set = EvalSet::open(dir.path(), "test", None).unwrap();
    assert_eq!(set.kind, DatasetType::Classification);
    assert_eq!(set.prompts()[..3], ["a photo of a class 0.", "a class 0", "a photo of a class 1."]);
    let batches: Vec<_> = set.read(&eval_options()).unwrap().map(Result::unwrap).collect();
    assert_eq!(batches.iter().map(|b| b.len()).collect::<Vec<_>>(), [6, 6, 6, 2]);
    let keys: Vec<_> = batches.iter().flat_map(|b| &b.keys).collect();
    assert!(keys.iter().enumerate().all(|(i, k)| **k == format!("k{i:04}")));
    for batch in &batches {
        assert_eq!(batch.images[0].len(), batch.len() * 16 * 16 * 3);
        assert_eq!(batch.images[1].len(), batch.len() * 8 * 8 * 3);
        for row in 0..batch.len() {
            assert_eq!(u32::from(batch.images[0][row * 768]), batch.class[row].unwrap() * 10);
        }
    }
    let given = ["this is {c}".to_owned()];
    assert_eq!(EvalSet::open(dir.path(), "test", Some(&given)).unwrap().prompts()[19], "this is class 19");
}

#[test]
fn a_class_list_that_disagrees_with_cls() {
    let dir = tempfile::tempdir().unwrap();
    eval_root(dir.path(), 18);
    let set = EvalSet::open(dir.path(), "test", None).unwrap();
    let error = set.read(&eval_options()).unwrap().find_map(Result::err).unwrap();
    let text = error.to_string();
    assert_eq!(error.code(), "data::class_out_of_range");
    assert!(text.contains("1.tar") && text.contains("`k0018`") && text.contains("18 names"), "{text}");
    let skip = EvalOptions { on_bad_sample: OnBadSample::Skip { max: 5 }, ..eval_options() };
    let mut reader = set.read(&skip).unwrap();
    let rows: usize = reader.by_ref().map(|b| b.unwrap().len()).sum();
    assert_eq!((rows, reader.bad_samples()), (18, 2));
    let skip = EvalOptions { on_bad_sample: OnBadSample::Skip { max: 1 }, ..eval_options() };
    assert!(set.read(&skip).unwrap().any(|b| matches!(b, Err(DataError::TooManyBadSamples { .. }))));
}

#[test]
fn evaluation_sets_with_something_missing() {
    let open = |spoil: &dyn Fn(&Path)| {
        let dir = tempfile::tempdir().unwrap();
        eval_root(dir.path(), 20);
        spoil(dir.path());
        EvalSet::open(dir.path(), "test", None).unwrap_err()
    };
    let remove = |name: &'static str| move |root: &Path| std::fs::remove_file(root.join(name)).unwrap();
    let write =
        |name: &'static str, text: &'static [u8]| move |root: &Path| std::fs::write(root.join(name), text).unwrap();
    let codes: HashMap<&str, DataError> = [
        ("no classes", open(&remove("classnames.txt"))),
        ("no templates", open(&remove("zeroshot_classification_templates.txt"))),
        ("no nshards", open(&remove("test/nshards.txt"))),
        ("no shard", open(&remove("test/1.tar"))),
        ("template", open(&write("zeroshot_classification_templates.txt", b"a {c}\na {}\n"))),
        ("empty class", open(&write("classnames.txt", b"a\n\nb\n"))),
        ("utf8", open(&write("classnames.txt", b"a\nb\n\xff\n"))),
        ("multilabel", open(&write("dataset_type.txt", b"multilabel"))),
        ("kind", open(&write("dataset_type.txt", b"something"))),
        ("root", EvalSet::open(Path::new("/nowhere"), "test", None).unwrap_err()),
    ]
    .into();
    let code = |name: &str| codes[name].code();
    assert_eq!(code("no classes"), "data::missing_file");
    assert_eq!(code("no templates"), "data::missing_file");
    assert_eq!(code("no nshards"), "data::missing_nshards");
    assert_eq!(code("no shard"), "data::missing_shards");
    assert!(codes["template"].to_string().contains("txt:2: template `a {}` has `{}` where `{c}` is expected"));
    assert!(codes["empty class"].to_string().contains("classnames.txt:2"));
    assert!(codes["utf8"].to_string().contains("classnames.txt:3: not UTF-8"));
    assert!(codes["multilabel"].to_string().contains("not supported"));
    assert!(codes["kind"].to_string().contains("`something`"));
    assert_eq!(code("root"), "data::missing_file");
}

#[test]
fn retrieval_sets() {
    let dir = tempfile::tempdir().unwrap();
    std::fs::create_dir(dir.path().join("test")).unwrap();
    std::fs::write(dir.path().join("dataset_type.txt"), "retrieval\n").unwrap();
    std::fs::write(dir.path().join("test/nshards.txt"), "1").unwrap();
    let image = png(4, 4, [9; 3]);
    write_tar(
        &dir.path().join("test/0.tar"),
        &[("a.png", &image), ("a.txt", b"one caption\n\n another \r\n"), ("b.png", &image)],
    );
    let set = EvalSet::open(dir.path(), "test", None).unwrap();
    assert_eq!(set.kind, DatasetType::Retrieval);
    let skip = EvalOptions { on_bad_sample: OnBadSample::Skip { max: 1 }, ..eval_options() };
    let mut reader = set.read(&skip).unwrap();
    let batch = reader.next().unwrap().unwrap();
    assert_eq!(batch.captions, [["one caption", "another"]]);
    assert!(reader.next().is_none());
    assert_eq!(reader.bad_samples(), 1);
    assert!(reader.first_bad()[0].contains("`b`: no caption"));
}

/// Real photographs, where this machine has them.
#[test]
fn cifar10_where_it_is() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/data/cifar10");
    if !root.join("train/nshards.txt").exists() {
        eprintln!("skipped: no {}", root.display());
        return;
    }
    let set = EvalSet::open(&root, "test", None).unwrap();
    assert_eq!(set.classnames.len(), 10);
    let batch = set.read(&eval_options()).unwrap().next().unwrap().unwrap();
    assert_eq!(batch.len(), 6);
    let train = mcpipe_data::split_shards(&root.join("train")).unwrap();
    let samples = Arc::new(SampleSet::open(train).unwrap());
    let batch = &take(&samples, &options(32), 3, 1)[0];
    assert!(batch.captions.iter().all(|c| c.len() > 5));
}
