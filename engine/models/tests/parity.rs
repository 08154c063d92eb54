//! Parity with timm and open_clip on the fixtures of `fixtures/make.py`: same weights and inputs by formula, compared
//! outputs, taps, running statistics, gradients, names and initialisation. Every fixture of the folder is walked over,
//! and of the folder that `MCPIPE_FIXTURES` names (`make.py --all DIR`), if set.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::any::Any;
use std::collections::BTreeSet;
use std::panic::catch_unwind;
use std::path::PathBuf;

use mcpipe_graph::{GraphBuilder, Param, ParamKind, ParamStore, Path};
use mcpipe_models::{Backbone, ModelError, backbone, backbones, eot_positions, text_encoder};
use support::*;

/// One fixture of an image backbone, in evaluation and in training.
fn check_image(fixture: &Fixture) -> String {
    let eval = Built::image(fixture, false);
    let mut store = formula_store(&eval.graph);
    let in_eval = eval.check_values(&eval.run(&store), fixture, "eval", 1e-4);
    let train = Built::image(fixture, true);
    let mut executor = train.run(&store);
    let in_train = train.check_values(&executor, fixture, "train", 1e-3);
    executor.update_running_statistics(&mut store);
    let running = check_running(&store, fixture);
    let gradient = train.check_gradients(&mut executor, &store, fixture);
    if fixture.file.contains("init") {
        check_initial(&train.graph, fixture);
    }
    format!("eval {in_eval:.1e}, train {in_train:.1e}, gradients {gradient:.1e}, running {running:.1e}")
}

fn message(panic: &(dyn Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("panic")
}

/// Every fixture is checked, then all failures are told.
#[test]
fn backbones_are_timms_and_open_clips() {
    let mut files = Fixture::all(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"));
    if let Some(folder) = std::env::var_os("MCPIPE_FIXTURES") {
        files.extend(Fixture::all(&PathBuf::from(folder)));
    }
    let mut failures = Vec::new();
    for path in &files {
        let name = path.file_stem().unwrap().to_string_lossy();
        let checked = catch_unwind(|| {
            let fixture = Fixture::open(path);
            (fixture.meta("kind") == "image").then(|| check_image(&fixture))
        });
        match checked {
            Ok(Some(errors)) => println!("{name}: {errors}"),
            Ok(None) => {}
            Err(panic) => failures.push(format!("{name}: {}", message(&*panic))),
        }
    }
    assert!(failures.is_empty(), "\n{}", failures.join("\n"));
}

/// Of every family there is a fixture, at two sizes.
#[test]
fn every_family_has_fixtures() {
    let files = Fixture::all(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures"));
    let fixtures: Vec<Fixture> = files.iter().map(|f| Fixture::open(f)).collect();
    let images: Vec<&Fixture> = fixtures.iter().filter(|f| f.meta("kind") == "image").collect();
    for entry in backbones() {
        let family = |f: &&&Fixture| backbones().iter().any(|b| b.name == f.meta("model") && b.family == entry.family);
        let sizes: BTreeSet<usize> = images.iter().filter(family).map(|f| f.number("size")).collect();
        assert!(sizes.len() >= 2, "{}: {sizes:?}", entry.family);
    }
}

/// Folding gives the tensors of timm's `reparameterize_model` and, in evaluation, the outputs of the training form.
#[test]
fn folded_blocks_are_timms() {
    let fixture =
        Fixture::open(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/fastvit_folded.safetensors"));
    let branches = backbone(fixture.meta("model"), &fixture.meta("params").parse().unwrap()).unwrap();
    let build = |model: &dyn Backbone| {
        let mut g = GraphBuilder::new(false);
        let image = g.input("image", &[2, 64, 64, 3]);
        let path = Path::new("student");
        let out = model.build(&mut g, &path, &image, Some(fixture.number("dim")), &[]).unwrap().embedding;
        let mut built = Built::new(g, out, Vec::new(), &[]);
        built.feeds.push(("image".into(), data("image", 2 * 64 * 64 * 3)));
        built
    };
    let train = build(&*branches);
    let mut store = ParamStore::default();
    for p in train.graph.params() {
        let data = formula(p.name.strip_prefix("student.").unwrap(), &p.shape);
        store.insert(Param { name: p.name.clone(), shape: p.shape.clone(), kind: p.kind, data });
    }
    store.insert(Param { name: "projection.weight".into(), shape: vec![1], kind: ParamKind::Decay, data: vec![3.0] });
    let folded = branches.reparam(&store, &Path::new("student")).unwrap().unwrap();
    assert_eq!(folded.store.get("projection.weight").unwrap().data, [3.0], "what else the store holds stays");
    assert!(folded.backbone.reparam(&folded.store, &Path::new("student")).unwrap().is_none());

    let shapes = fixture.list("shapes");
    let expected = fixture.table("samples", "tensors", RUNNING);
    assert_eq!(folded.store.params().len(), expected.len() + 1);
    let mut worst = 0f32;
    for ((name, expected), shape) in expected.iter().zip(shapes) {
        let ours = folded.store.get(&format!("student.{name}")).unwrap_or_else(|| panic!("no {name}"));
        let dims: Vec<String> = ours.shape.iter().map(usize::to_string).collect();
        assert_eq!(dims.join("x"), shape, "{name}");
        let d = gap(&samples(name, &ours.data, RUNNING), expected);
        assert!(d < 1e-6, "{name} differs by {d:e}");
        worst = worst.max(d);
    }
    let plain = build(&*folded.backbone);
    let (before, after) = (train.run(&store), plain.run(&folded.store));
    let (before, after) = (before.value(&train.out), after.value(&plain.out));
    let d = gap(&before, &after) / scale(&before);
    assert!(d < 1e-5, "the folded form's outputs differ by {d:e}");
    println!("folded: tensors {worst:.1e}, outputs {d:.1e}");

    store = ParamStore::default();
    assert!(matches!(branches.reparam(&store, &Path::default()), Err(ModelError::Missing(_))));
}

/// The captions of `make.py`.
fn token_ids(batch: usize, length: usize, vocab: i32) -> Vec<i32> {
    let mut ids = vec![0; batch * length];
    for (b, row) in ids.chunks_exact_mut(length).enumerate() {
        let words = length - 2 - b;
        row[0] = vocab - 2;
        for (id, u) in row[1..=words].iter_mut().zip(uniform(&format!("caption {b}"))) {
            *id = (u * f64::from(vocab - 2)) as i32;
        }
        row[words + 1] = vocab - 1;
    }
    ids
}

fn text(train: bool, length: usize, ids: &[i32]) -> Built {
    let params = "width = 64\ndepth = 3\nheads = 4\ncontext_length = 12\nvocab_size = 200".parse().unwrap();
    let model = text_encoder("transformer", &params).unwrap();
    let mut g = GraphBuilder::new(train);
    let batch = ids.len() / length;
    let (id_input, eot) = (g.int_input("ids", &[batch, length]), g.int_input("eot", &[batch]));
    let outputs = model.build(&mut g, &Path::default(), &id_input, &eot, Some(24)).unwrap();
    let mut built = Built::new(g, outputs.embedding, Vec::new(), &[]);
    built.ids = vec![("ids".into(), ids.to_vec()), ("eot".into(), eot_positions(ids, length))];
    built
}

#[test]
fn text_transformer_is_open_clips() {
    let fixture = Fixture::open(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text.safetensors"));
    let ids = token_ids(4, 12, 200);
    let built = text(true, 12, &ids);
    let store = formula_store(&built.graph);
    let mut executor = built.run(&store);
    let d = built.check_values(&executor, &fixture, "train", 1e-4);
    let gradients = built.check_gradients(&mut executor, &store, &fixture);
    println!("text: values {d:e}, gradients {gradients:e}");
    check_initial(&built.graph, &fixture);

    // Captions of at most 9 tokens: the rest of the context changes nothing.
    let cut: Vec<i32> = ids[3 * 12..3 * 12 + 9].to_vec();
    let short = text(false, 9, &cut);
    let out = short.run(&store).value(&short.out).into_owned();
    let d = gap(&out, &fixture.values("eval/out")[3 * 24..]);
    assert!(d < 1e-4, "the cut caption's embedding differs by {d:e}");
}

/// Names and shapes of every published size are timm's or open_clip's, by the digests of `names.txt`.
#[test]
fn names_are_the_published_ones() {
    let listed = include_str!("fixtures/names.txt");
    let mut unlisted: BTreeSet<&str> = backbones().iter().map(|b| b.name).collect();
    for line in listed.lines() {
        let (name, expected) = line.split_once(' ').unwrap();
        let model = backbone(name, &toml::Table::new()).unwrap();
        let mut g = GraphBuilder::new(false);
        let size = model.preprocess().image_size;
        let image = g.input("image", &[1, size, size, 3]);
        model.build(&mut g, &Path::default(), &image, Some(16), &[]).unwrap();
        let graph = g.finish();
        let shape = |shape: &[usize]| shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x");
        let mut ours: Vec<String> =
            graph.params().iter().map(|p| format!("{} {}\n", p.name, shape(&p.shape))).collect();
        ours.sort();
        let digest = format!("{} {:016x}", ours.len(), fnv1a(&ours.concat()));
        assert_eq!(digest, expected, "`make.py --names {name}` lists other tensors than these:\n{}", ours.concat());
        unlisted.remove(name);
    }
    assert!(unlisted.is_empty(), "names.txt lacks {unlisted:?}");
}
