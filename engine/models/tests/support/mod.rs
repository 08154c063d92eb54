//! What the parity tests share: weights and inputs by formula, fixtures of `fixtures/make.py`, and the comparison.
#![allow(dead_code, unreachable_pub)] // each test binary uses a part
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Arc;

use mcpipe_graph::backend::Cpu;
use mcpipe_graph::{Executor, Feed, Grads, GraphBuilder, Mode, Param, ParamKind, ParamStore, Path, StepGraph, Tensor};
use mcpipe_models::{Checkpoint, Tap, backbone};

/// SplitMix64's finaliser.
pub fn mix(mut z: u64) -> u64 {
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

pub fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xcbf2_9ce4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

/// Words by (name, position), as `make.py` has them.
pub fn bits(name: &str) -> impl Iterator<Item = u64> + use<> {
    let key = mix(fnv1a(name));
    (1u64..).map(move |i| mix(key.wrapping_add(i.wrapping_mul(0x9e37_79b9_7f4a_7c15))))
}

/// Numbers in (0, 1) by (name, position).
pub fn uniform(name: &str) -> impl Iterator<Item = f64> + use<> {
    bits(name).map(|bits| ((bits >> 11) as f64 + 0.5) / (1u64 << 53) as f64)
}

pub fn centred(name: &str) -> impl Iterator<Item = f64> + use<> {
    uniform(name).map(|u| 2.0 * u - 1.0)
}

/// The value of parameter `name`.
pub fn formula(name: &str, shape: &[usize]) -> Vec<f32> {
    let fan_in: usize = shape.iter().skip(1).product();
    let bound = (3.0 / fan_in as f64).sqrt();
    let value = |v: f64| {
        if name.ends_with("running_var") {
            1.0 + 0.3 * v
        } else if name.ends_with("gamma") {
            0.2 + 0.1 * v
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

pub fn data(name: &str, len: usize) -> Vec<f32> {
    centred(name).take(len).map(|v| v as f32).collect()
}

pub const SAMPLES: usize = 96;
pub const RUNNING: usize = 8;
pub const SIGNS: usize = 8;

pub fn samples(name: &str, values: &[f32], count: usize) -> Vec<f32> {
    let places = uniform(&format!("places {name}")).take(count);
    places.map(|u| values[(u * values.len() as f64) as usize]).collect()
}

/// Largest absolute difference.
pub fn gap(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    assert!(a.iter().all(|v| v.is_finite()), "not finite");
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Largest absolute value.
pub fn scale(values: &[f32]) -> f32 {
    values.iter().fold(0.0, |m, v| m.max(v.abs()))
}

/// What `make.py` wrote of one model.
pub struct Fixture {
    pub file: Checkpoint,
}

impl Fixture {
    pub fn open(path: &std::path::Path) -> Fixture {
        Fixture { file: Checkpoint::open(path).unwrap() }
    }

    /// The files of the committed folder or of another.
    pub fn all(folder: &std::path::Path) -> Vec<PathBuf> {
        let entries = std::fs::read_dir(folder).unwrap_or_else(|e| panic!("{}: {e}", folder.display()));
        let mut files: Vec<PathBuf> = entries.map(|e| e.unwrap().path()).collect();
        files.retain(|f| f.extension().is_some_and(|e| e == "safetensors"));
        files.sort();
        files
    }

    pub fn meta(&self, key: &str) -> &str {
        self.file.metadata().get(key).unwrap_or_else(|| panic!("the fixture has no `{key}`"))
    }

    pub fn number(&self, key: &str) -> usize {
        self.meta(key).parse().unwrap()
    }

    pub fn list(&self, key: &str) -> Vec<&str> {
        self.meta(key).lines().collect()
    }

    pub fn values(&self, name: &str) -> Vec<f32> {
        self.file.values(name).unwrap().unwrap_or_else(|| panic!("the fixture has no `{name}`"))
    }

    /// The rows of a table of `width` numbers for each name of the list `names`.
    pub fn table(&self, name: &str, names: &str, width: usize) -> Vec<(&str, Vec<f32>)> {
        let (names, values) = (self.list(names), self.values(name));
        assert_eq!(values.len(), names.len() * width, "{name}");
        names.into_iter().zip(values.chunks_exact(width).map(<[f32]>::to_vec)).collect()
    }
}

pub fn formula_store(graph: &StepGraph) -> ParamStore {
    let mut store = ParamStore::default();
    for p in graph.params() {
        let data = formula(&p.name, &p.shape);
        store.insert(Param { name: p.name.clone(), shape: p.shape.clone(), kind: p.kind, data });
    }
    store
}

/// A model built with its taps, inputs by name.
pub struct Built {
    pub graph: Arc<StepGraph>,
    pub out: Tensor,
    pub taps: Vec<(String, Tap)>,
    pub loss: Option<Tensor>,
    pub feeds: Vec<(String, Vec<f32>)>,
    pub ids: Vec<(String, Vec<i32>)>,
}

impl Built {
    /// Finishes the graph; `wanted` taps and the output enter the loss with fixed targets.
    pub fn new(mut g: GraphBuilder, out: Tensor, taps: Vec<(String, Tap)>, wanted: &[&str]) -> Built {
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
    pub fn image(fixture: &Fixture, train: bool) -> Built {
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

    pub fn run(&self, store: &ParamStore) -> Executor<Cpu> {
        let mode = if self.loss.is_some() { Mode::Train } else { Mode::Forward };
        let mut executor = Executor::new(Arc::clone(&self.graph), store, mode, Cpu::default()).unwrap();
        let floats = self.feeds.iter().map(|(n, v)| (n.as_str(), Feed::F32(v)));
        let ints = self.ids.iter().map(|(n, v)| (n.as_str(), Feed::I32(v)));
        executor.forward(store, &floats.chain(ints).collect::<Vec<_>>()).unwrap();
        executor
    }

    /// Output and every tap of the fixture's `mode` within `bar` of their scale.
    pub fn check_values(&self, executor: &Executor<Cpu>, fixture: &Fixture, mode: &str, bar: f32) -> f32 {
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

    /// Loss within 1e-4 and every gradient within 1e-3 (or the fixture's own bar), relative. A gradient's distance is estimated from eight random
    /// projections, whose mean square is an unbiased estimate of the squared distance. Where a batch norm follows, a
    /// bias has no gradient: there ours is to be rounding noise, 1e-5 of the largest gradient.
    pub fn check_gradients(&self, executor: &mut Executor<Cpu>, store: &ParamStore, fixture: &Fixture) -> f32 {
        let loss = self.loss.as_ref().unwrap();
        let (value, expected) = (executor.value(loss)[0], fixture.values("loss")[0]);
        assert!((value / expected - 1.0).abs() < 1e-4, "loss {value}, expected {expected}");
        let mut grads = Grads::zeros_like(store);
        executor.backward(store, &[(loss, &[1.0])], &mut grads).unwrap();
        let table = fixture.table("grads", "params_of", 1 + SIGNS);
        let largest = table.iter().map(|(_, row)| row[0]).fold(0.0, f32::max);
        let bar: f32 = fixture.file.metadata().get("gradient_bar").map_or(1e-3, |bar| bar.parse().unwrap());
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
            assert!(distance < bar, "gradient of {name} differs by {distance:e} relative");
            worst = worst.max(distance);
        }
        let trained = store.params().iter().filter(|p| p.kind != ParamKind::Buffer).count();
        assert_eq!(trained, table.len(), "every gradient is compared");
        worst
    }
}

/// Running statistics after a step within 1e-3 of their scale.
pub fn check_running(store: &ParamStore, fixture: &Fixture) -> f32 {
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
pub fn check_initial(graph: &StepGraph, fixture: &Fixture) {
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
