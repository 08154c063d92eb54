//! Parity with timm and open_clip on the fixtures of `fixtures/make.py`: same weights and inputs by formula, compared
//! outputs, taps, running statistics, gradients, names and initialisation.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::path::PathBuf;
use std::sync::Arc;

use mcpipe_graph::backend::Cpu;
use mcpipe_graph::{Executor, Feed, Grads, GraphBuilder, Mode, Param, ParamKind, ParamStore, Path, StepGraph, Tensor};
use mcpipe_models::{Checkpoint, Tap, backbone, eot_positions, text_encoder};

/// SplitMix64's finaliser.
fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// Numbers in (0, 1) by (name, position), as `make.py` has them.
fn uniform(name: &str) -> impl Iterator<Item = f64> + use<> {
    let hash = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3));
    let key = mix(hash);
    (1u64..).map(move |i| {
        let bits = mix(key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15)));
        ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64
    })
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

fn samples(name: &str, values: &[f32]) -> Vec<f32> {
    if values.len() <= SAMPLES {
        return values.to_vec();
    }
    let places = uniform(&format!("places {name}")).take(SAMPLES);
    places.map(|u| values[(u * values.len() as f64) as usize]).collect()
}

fn fixture(name: &str) -> Checkpoint {
    let path = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures").join(name);
    Checkpoint::open(&path).unwrap()
}

fn get(fixture: &Checkpoint, name: &str) -> Vec<f32> {
    fixture.values(name).unwrap().unwrap_or_else(|| panic!("the fixture has no `{name}`"))
}

/// Largest absolute difference.
fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
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

    fn run(&self, store: &ParamStore) -> Executor<Cpu> {
        let mode = if self.loss.is_some() { Mode::Train } else { Mode::Forward };
        let mut executor = Executor::new(Arc::clone(&self.graph), store, mode, Cpu::default()).unwrap();
        let floats = self.feeds.iter().map(|(n, v)| (n.as_str(), Feed::F32(v)));
        let ints = self.ids.iter().map(|(n, v)| (n.as_str(), Feed::I32(v)));
        executor.forward(store, &floats.chain(ints).collect::<Vec<_>>()).unwrap();
        executor
    }

    /// Output and every tap within 1e-4 of the fixture's `mode`.
    fn check_values(&self, executor: &Executor<Cpu>, fixture: &Checkpoint, mode: &str) -> f32 {
        let mut worst = gap(&executor.value(&self.out), &get(fixture, &format!("{mode}/out")));
        assert!(worst < 1e-4, "{mode} output differs by {worst:e}");
        for (name, tap) in &self.taps {
            let d = gap(&samples(name, &executor.value(&tap.value)), &get(fixture, &format!("{mode}/tap/{name}")));
            assert!(d < 1e-4, "{mode} tap {name} differs by {d:e}");
            worst = worst.max(d);
        }
        let tapped = fixture.names().filter(|n| n.starts_with(&format!("{mode}/tap/"))).count();
        assert_eq!(tapped, self.taps.len(), "every tap is compared");
        worst
    }

    /// Loss within 1e-4 and every gradient within 1e-3, relative. A gradient's distance is estimated from eight random
    /// projections, whose mean square is an unbiased estimate of the squared distance. Where a batch norm follows, a
    /// bias has no gradient: there ours is to be rounding noise, 1e-5 of the largest gradient.
    fn check_gradients(&self, executor: &mut Executor<Cpu>, store: &ParamStore, fixture: &Checkpoint) -> f32 {
        let loss = self.loss.as_ref().unwrap();
        let value = executor.value(loss)[0];
        let expected = get(fixture, "train/loss")[0];
        assert!((value / expected - 1.0).abs() < 1e-4, "loss {value}, expected {expected}");
        let mut grads = Grads::zeros_like(store);
        executor.backward(store, &[(loss, &[1.0])], &mut grads).unwrap();
        let norms = fixture.names().filter(|n| n.starts_with("grad/")).map(|n| get(fixture, n)[0]);
        let largest = norms.fold(0.0, f32::max);
        let (mut worst, mut compared) = (0f32, 0);
        for (p, grad) in store.params().iter().zip(grads.all()) {
            if p.kind == ParamKind::Buffer {
                continue;
            }
            let expected = get(fixture, &format!("grad/{}", p.name));
            let square = |k: usize| {
                let signs = centred(&format!("signs {k} {}", p.name)).map(|v| if v < 0.0 { -1.0 } else { 1.0 });
                let ours: f64 = signs.zip(grad).map(|(s, &x)| s * f64::from(x)).sum();
                (ours - f64::from(expected[k + 1])).powi(2)
            };
            compared += 1;
            let distance = ((0..8).map(square).sum::<f64>() / 8.0).sqrt() as f32;
            if expected[0] < 1e-9 * largest {
                assert!(distance < 1e-5 * largest, "gradient of {} is {distance:e}, expected none", p.name);
                continue;
            }
            let distance = distance / expected[0];
            assert!(distance < 1e-3, "gradient of {} differs by {distance:e} relative", p.name);
            worst = worst.max(distance);
        }
        let in_fixture = fixture.names().filter(|n| n.starts_with("grad/")).count();
        assert_eq!(compared, in_fixture, "every gradient is compared");
        worst
    }
}

/// Initial values have the published initialisation's moments.
fn check_initial(graph: &StepGraph, fixture: &Checkpoint) {
    let mut store = ParamStore::default();
    store.init(graph, 1).unwrap();
    for p in store.params().iter().filter(|p| p.kind != ParamKind::Buffer) {
        let expected = get(fixture, &format!("init/{}", p.name));
        let n = p.data.len() as f64;
        let mean = p.data.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
        let std = (p.data.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n).sqrt();
        let largest = p.data.iter().fold(0f32, |m, x| m.max(x.abs()));
        let (m0, s0) = (f64::from(expected[0]), f64::from(expected[1]));
        // Six standard errors of each side's estimate.
        assert!((mean - m0).abs() <= 6.0 * 1.5 * s0 / n.sqrt(), "{}: mean {mean}, published {m0}", p.name);
        assert!((std - s0).abs() <= 6.0 * s0 / n.sqrt(), "{}: std {std}, published {s0}", p.name);
        assert!(largest <= 1.8 * expected[2] && expected[2] <= 1.8 * largest, "{}: largest {largest}", p.name);
    }
}

fn mobilevit(train: bool, size: usize) -> Built {
    let model = backbone("mobilevit_xxs", &toml::Table::new()).unwrap();
    let mut g = GraphBuilder::new(train);
    let image = g.input("image", &[4, size, size, 3]);
    let taps: Vec<String> = model.taps(size).unwrap().into_iter().map(|t| t.name).collect();
    let outputs = model.build(&mut g, &Path::default(), &image, Some(10), &taps).unwrap();
    for (name, tap) in &outputs.taps {
        assert_eq!(tap.value.shape(), tap.shape.shape(4), "{name}");
    }
    let wanted = ["stages.3", "stages.4.1.transformer.0.attn"];
    let mut built = Built::new(g, outputs.embedding, outputs.taps, &wanted);
    built.feeds.push(("image".into(), data("image", 4 * size * size * 3)));
    built
}

fn mobilevit_matches(size: usize) {
    let fixture = fixture(&format!("mobilevit_xxs_{size}.safetensors"));
    let eval = mobilevit(false, size);
    let mut store = formula_store(&eval.graph);
    let in_eval = eval.check_values(&eval.run(&store), &fixture, "eval");
    let train = mobilevit(true, size);
    let mut executor = train.run(&store);
    let in_train = train.check_values(&executor, &fixture, "train");
    let gradient = train.check_gradients(&mut executor, &store, &fixture);
    executor.update_running_statistics(&mut store);
    let mut running = 0f32;
    for name in fixture.names().filter_map(|n| n.strip_prefix("running/")) {
        let d = gap(&samples(name, &store.get(name).unwrap().data), &get(&fixture, &format!("running/{name}")));
        assert!(d < 1e-4, "{name} differs by {d:e}");
        running = running.max(d);
    }
    println!("{size} px: eval {in_eval:e}, train {in_train:e}, gradients {gradient:e}, running {running:e}");
    if size == 64 {
        check_initial(&train.graph, &fixture);
    }
}

#[test]
fn mobilevit_xxs_is_timms() {
    mobilevit_matches(64);
}

/// Maps of 5 and 3 pixels, which patches of 2 don't divide.
#[test]
fn mobilevit_xxs_is_timms_where_it_interpolates() {
    mobilevit_matches(80);
}

#[test]
fn vit_is_open_clips() {
    let params = "patch_size = 8\nwidth = 64\ndepth = 3\nheads = 4\nact = \"quick_gelu\"".parse().unwrap();
    let model = backbone("vit", &params).unwrap();
    let mut g = GraphBuilder::new(true);
    let image = g.input("image", &[4, 32, 32, 3]);
    let taps: Vec<String> = model.taps(32).unwrap().into_iter().map(|t| t.name).collect();
    let outputs = model.build(&mut g, &Path::default(), &image, Some(24), &taps).unwrap();
    let wanted = ["transformer.resblocks.1", "transformer.resblocks.2.attn"];
    let mut built = Built::new(g, outputs.embedding, outputs.taps, &wanted);
    built.feeds.push(("image".into(), data("image", 4 * 32 * 32 * 3)));
    let fixture = fixture("vit.safetensors");
    let store = formula_store(&built.graph);
    let mut executor = built.run(&store);
    let values = built.check_values(&executor, &fixture, "train");
    let gradients = built.check_gradients(&mut executor, &store, &fixture);
    println!("vit: values {values:e}, gradients {gradients:e}");
    check_initial(&built.graph, &fixture);
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
    let mut fixture = fixture("text.safetensors");
    let built = text(true, 12, &token_ids(4, 12, 200));
    let store = formula_store(&built.graph);
    let mut executor = built.run(&store);
    let d = gap(&executor.value(&built.out), &get(&fixture, "train/out"));
    assert!(d < 1e-4, "output differs by {d:e}");
    let gradients = built.check_gradients(&mut executor, &store, &fixture);
    println!("text: values {d:e}, gradients {gradients:e}");
    check_initial(&built.graph, &fixture);

    // Captions of at most 9 tokens: the rest of the context changes nothing.
    let ids = token_ids(4, 12, 200);
    let cut: Vec<i32> = ids[3 * 12..3 * 12 + 9].to_vec();
    let short = text(false, 9, &cut);
    let out = short.run(&store).value(&short.out).into_owned();
    fixture = self::fixture("text.safetensors");
    let d = gap(&out, &get(&fixture, "train/out")[3 * 24..]);
    assert!(d < 1e-4, "the cut caption's embedding differs by {d:e}");
}

/// Names and shapes of every published size are timm's.
#[test]
fn mobilevit_names_are_timms() {
    let listed = include_str!("fixtures/names.txt");
    for name in ["mobilevit_xxs", "mobilevit_xs", "mobilevit_s"] {
        let theirs = listed.lines().filter_map(|l| l.strip_prefix(&format!("{name} ")));
        let mut theirs: Vec<String> =
            theirs.filter(|l| !l.contains("num_batches_tracked")).map(|l| l.trim().to_owned()).collect();
        let model = backbone(name, &toml::Table::new()).unwrap();
        let mut g = GraphBuilder::new(false);
        let image = g.input("image", &[1, 256, 256, 3]);
        model.build(&mut g, &Path::default(), &image, Some(16), &[]).unwrap();
        let graph = g.finish();
        let mut ours: Vec<String> = graph
            .params()
            .iter()
            .map(|p| format!("{} {}", p.name, p.shape.iter().map(usize::to_string).collect::<Vec<_>>().join("x")))
            .collect();
        theirs.sort();
        ours.sort();
        assert_eq!(ours, theirs);
    }
}
