//! Parity with timm and open_clip on the fixtures of `fixtures/make.py`: same weights and inputs by formula, compared
//! outputs, taps, running statistics, gradients, names and initialisation. Every fixture of the folder is walked over,
//! and of the folder that `MCPIPE_FIXTURES` names (`make.py --all DIR`), if set.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::any::Any;
use std::collections::BTreeSet;
use std::panic::catch_unwind;
use std::path::PathBuf;
use std::sync::Arc;

use mcpipe_graph::backend::Cpu;
use mcpipe_graph::{Executor, Feed, Grads, GraphBuilder, Mode, Param, ParamKind, ParamStore, Path, StepGraph, Tensor};
use mcpipe_models::{Backbone, Checkpoint, ModelError, Tap, backbone, backbones, eot_positions, text_encoder};

/// SplitMix64's finaliser.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// Words by (name, position), as `make.py` has them.
fn bits(name: &str) -> impl Iterator<Item = u64> + use<> {
    let key = mix(fnv1a(name));
    (1u64..).map(move |i| mix(key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))))
}

/// Numbers in (0, 1) by (name, position).
fn uniform(name: &str) -> impl Iterator<Item = f64> + use<> {
    bits(name).map(|bits| ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64)
}

fn centred(name: &str) -> impl Iterator<Item = f64> + use<> {
    uniform(name).map(|u| 2.0 * u - 1.0)
}

/// The value of parameter `name`.
fn formula(name: &str, shape: &[usize]) -> Vec<f32> {
    let fan_in: usize = shape.iter().skip(1).product();
    let bound = (3.0 / fan_in as f64).sqrt();
    let value = |v: f64| {
        if name.ends_with("running_var") {
            1.0 + 0.3 * v
        } else if name.ends_with("gamma") {
            0.5 + 0.2 * v
        } else if shape.len() >= 2 {
            bound * v
        } else if name.ends_with("weight") {
            1.0 + 0.2 * v
        } else {
            0.1 * v
        }
    };
    centred(name).take(shape.iter().product()).map(|v| value(v) as f32).collect()
}

fn data(name: &str, len: usize) -> Vec<f32> {
    centred(name).take(len).map(|v| v as f32).collect()
}

const SAMPLES: usize = 96;
const RUNNING: usize = 8;
const SIGNS: usize = 8;

fn samples(name: &str, values: &[f32], count: usize) -> Vec<f32> {
    let places = uniform(&format!("places {name}")).take(count);
    places.map(|u| values[(u * values.len() as f64) as usize]).collect()
}

/// Largest absolute difference.
fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().all(|v| v.is_finite()), "not finite");
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Largest absolute value.
fn scale(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |m, v| m.max(v.abs()))
}

/// What `make.py` wrote of one model.
struct Fixture {
    file: Checkpoint,
}

impl Fixture {
    fn open(path: &std::path::Path) -> Fixture {
        Fixture { file: Checkpoint::open(path).unwrap() }
    }

    /// The files of the committed folder or of another.
    fn all(folder: &std::path::Path) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut files: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
        files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
        files.sort();
        files
    }

    fn meta(&self, key: &str) -> &str {
        self.file.metadata().get(key).unwrap_or_else(|| panic!("the fixture has no `{key}`"))
    }

    fn number(&self, key: &str) -> usize {
        self.meta(key).parse().unwrap()
    }

    fn list(&self, key: &str) -> Vec<&str> {
        self.meta(key).lines().collect()
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.file.values(name).unwrap().unwrap_or_else(|| panic!("the fixture has no `{name}`"))
    }

    /// The rows of a table of `width` numbers for each name of the list `names`.
    fn table(&self, name: &str, names: &str, width: usize) -> Vec<(&str, Vec<f32>)> {
        let (names, values) = (self.list(names), self.values(name));
        assert_eq!(values.len(), names.len() * width, "{name}");
        names.into_iter().zip(values.chunks_exact(width).map(<[f32]>::to_vec)).collect()
    }
}

fn formula_store(graph: &StepGraph) -> ParamStore {
    let mut store = ParamStore::default();
    for p in graph.params() {
        let data = formula(&p.name, &p.shape);
        store.insert(Param { name: p.name.clone(), shape: p.shape.clone(), kind: p.kind, data });
    }
    store
}

/// A model built with its taps, inputs by name.
struct Built {
    graph: Arc<StepGraph>,
    out: Tensor,
    taps: Vec<(String, Tap)>,
    loss: Option<Tensor>,
    feeds: Vec<(String, Vec<f32>)>,
    ids: Vec<(String, Vec<i32>)>,
}

impl Built {
    /// Finishes the graph; `wanted` taps and the output enter the loss with fixed targets.
    fn new(mut g: GraphBuilder, out: Tensor, taps: Vec<(String, Tap)>, wanted: &[&str]) -> Built {
        g.output("out", &out);
        for (name, tap) in &taps {
            g.output(name, &tap.value);
        }
        let mut feeds = Vec::new();
        let mut loss = None;
        if g.is_train() {
            let mut term = |g: &mut GraphBuilder, name: String, t: &Tensor| {
                let target = g.input(&name, t.shape());
                feeds.push((name.clone(), data(&name, t.numel())));
                g.mse(t, &target).unwrap()
            };
            let mut sum = term(&mut g, "target".into(), &out);
            for name in wanted {
                let tap = &taps.iter().find(|(n, _)| n == name).unwrap().1;
                let part = term(&mut g, format!("target {name}"), &tap.value);
                sum = g.add(&sum, &part).unwrap();
            }
            g.output("loss", &sum);
            loss = Some(sum);
        }
        Built { graph: Arc::new(g.finish()), out, taps, loss, feeds, ids: Vec::new() }
    }

    /// The image backbone of a fixture.
    fn image(fixture: &Fixture, train: bool) -> Built {
        let model = backbone(fixture.meta("model"), &fixture.meta("params").parse().unwrap()).unwrap();
        let (batch, size, dim) = (fixture.number("batch"), fixture.number("size"), fixture.number("dim"));
        let mut g = GraphBuilder::new(train);
        let image = g.input("image", &[batch, size, size, 3]);
        let taps: Vec<String> = model.taps(size).unwrap().into_iter().map(|t| t.name).collect();
        let outputs = model.build(&mut g, &Path::default(), &image, Some(dim), &taps).unwrap();
        for (name, tap) in &outputs.taps {
            assert_eq!(tap.value.shape(), tap.shape.shape(batch), "{name}");
        }
        let mut built = Built::new(g, outputs.embedding, outputs.taps, &fixture.list("wanted"));
        built.feeds.push(("image".into(), data("image", batch * size * size * 3)));
        built
    }

    fn run(&self, store: &ParamStore) -> Executor<Cpu> {
        let mode = if self.loss.is_some() { Mode::Train } else { Mode::Forward };
        let mut executor = Executor::new(Arc::clone(&self.graph), store, mode, Cpu::default()).unwrap();
        let floats = self.feeds.iter().map(|(n, v)| (n.as_str(), Feed::F32(v)));
        let ints = self.ids.iter().map(|(n, v)| (n.as_str(), Feed::I32(v)));
        executor.forward(store, &floats.chain(ints).collect::<Vec<_>>()).unwrap();
        executor
    }

    /// Output and every tap of the fixture's `mode` within `bar` of their scale.
    fn check_values(&self, executor: &Executor<Cpu>, fixture: &Fixture, mode: &str, bar: f32) -> f32 {
        let expected = fixture.values(&format!("{mode}/out"));
        let mut worst = gap(&executor.value(&self.out), &expected) / scale(&expected);
        assert!(worst < bar, "{mode} output differs by {worst:e}");
        let ours: BTreeSet<&str> = self.taps.iter().map(|(name, _)| name.as_str()).collect();
        assert_eq!(ours, fixture.list("taps").into_iter().collect(), "every tap is compared");
        if ours.is_empty() {
            return worst;
        }
        for (name, expected) in fixture.table(&format!("{mode}/taps"), "taps", SAMPLES) {
            let tap = &self.taps.iter().find(|(n, _)| n == name).unwrap().1;
            let d = gap(&samples(name, &executor.value(&tap.value), SAMPLES), &expected) / scale(&expected);
            assert!(d < bar, "{mode} tap {name} differs by {d:e}");
            worst = worst.max(d);
        }
        worst
    }

    /// Loss within 1e-4 and every gradient within 1e-3, relative. A gradient's distance is estimated from eight random
    /// projections, whose mean square is an unbiased estimate of the squared distance. Where a batch norm follows, a
    /// bias has no gradient: there ours is to be rounding noise, 1e-5 of the largest gradient.
    fn check_gradients(&self, executor: &mut Executor<Cpu>, store: &ParamStore, fixture: &Fixture) -> f32 {
        let loss = self.loss.as_ref().unwrap();
        let (value, expected) = (executor.value(loss)[0], fixture.values("loss")[0]);
        assert!((value / expected - 1.0).abs() < 1e-4, "loss {value}, expected {expected}");
        let mut grads = Grads::zeros_like(store);
        executor.backward(store, &[(loss, &[1.0])], &mut grads).unwrap();
        let table = fixture.table("grads", "params_of", 1 + SIGNS);
        let largest = table.iter().map(|(_, row)| row[0]).fold(0.0, f32::max);
        let mut worst = 0f32;
        for (name, expected) in &table {
            let index = store.index(name).unwrap_or_else(|| panic!("no parameter {name}"));
            let mut sums = [0f64; SIGNS];
            for (word, &x) in bits(&format!("signs {name}")).zip(&grads.all()[index]) {
                for (k, sum) in sums.iter_mut().enumerate() {
                    *sum += if word >> k & 1 == 1 { -f64::from(x) } else { f64::from(x) };
                }
            }
            let square = |(ours, theirs): (f64, &f32)| (ours - f64::from(*theirs)).powi(2);
            let distance = sums.into_iter().zip(&expected[1..]).map(square).sum::<f64>() / SIGNS as f64;
            let distance = distance.sqrt() as f32;
            if expected[0] < 1e-9 * largest {
                assert!(distance < 1e-5 * largest, "gradient of {name} is {distance:e}, expected none");
                continue;
            }
            // A weight's gradient may all but vanish, too, as along its own direction before a batch norm.
            let distance = distance / expected[0].max(1e-3 * largest);
            assert!(distance < 1e-3, "gradient of {name} differs by {distance:e} relative");
            worst = worst.max(distance);
        }
        let trained = store.params().iter().filter(|p| p.kind != ParamKind::Buffer).count();
        assert_eq!(trained, table.len(), "every gradient is compared");
        worst
    }
}

/// Running statistics after a step within 1e-3 of their scale.
fn check_running(store: &ParamStore, fixture: &Fixture) -> f32 {
    let buffers = store.params().iter().filter(|p| p.kind == ParamKind::Buffer).count();
    assert_eq!(buffers, 2 * fixture.list("norms").len(), "every statistic is compared");
    let mut worst = 0f32;
    if buffers == 0 {
        return worst;
    }
    for (norm, row) in fixture.table("running", "norms", 2 * RUNNING) {
        for (suffix, expected) in ["running_mean", "running_var"].iter().zip(row.chunks_exact(RUNNING)) {
            let name = format!("{norm}.{suffix}");
            let d = gap(&samples(&name, &store.get(&name).unwrap().data, RUNNING), expected) / scale(expected);
            assert!(d < 1e-3, "{name} differs by {d:e}");
            worst = worst.max(d);
        }
    }
    worst
}

/// Initial values have the published initialisation's moments.
fn check_initial(graph: &StepGraph, fixture: &Fixture) {
    let mut store = ParamStore::default();
    store.init(graph, 1).unwrap();
    for (name, expected) in fixture.table("init", "params_of", 3) {
        let data = &store.get(name).unwrap().data;
        let n = data.len() as f64;
        let mean = data.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let std = (data.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt();
        let largest = scale(data);
        let (m0, s0) = (f64::from(expected[0]), f64::from(expected[1]));
        // Six standard errors of each side's estimate; a constant is to be met but for its rounding.
        let rounding = 1e-6 * m0.abs();
        assert!((mean - m0).abs() <= 6.0 * 1.5 * s0 / n.sqrt() + rounding, "{name}: mean {mean}, published {m0}");
        assert!((std - s0).abs() <= 6.0 * s0 / n.sqrt() + rounding, "{name}: std {std}, published {s0}");
        assert!(largest <= 1.8 * expected[2] && expected[2] <= 1.8 * largest, "{name}: largest {largest}");
    }
}

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
