//! Tests of whole steps, on towers small enough for finite differences.

mod accumulate;
mod bytes;
mod checkpoints;
mod device;
mod gradients;
mod levels;
#[cfg(feature = "shim")]
mod memory;
mod non_finite;
mod pairs;
mod recompute;
mod steps;

use std::rc::Rc;
use std::sync::Arc;

use mcpipe_data::Rng;
use mcpipe_graph::{Activation, BatchNormArgs, ConvArgs, GraphBuilder, Init, Kernels, ParamStore, Path, Tensor};
use mcpipe_models::{ModelError, Tap, TapInfo, TapShape};
use mcpipe_spec::{NonFinite, Training};

use crate::distill::level;
use crate::graphs::Graphs;
use crate::machine::CpuMachine;
use crate::*;

/// The CPU's steps; completes `store`.
pub(super) fn on_the_cpu(setup: &Rc<TrainSetup>, store: &mut ParamStore) -> CpuMachine {
    let graphs = Graphs::new(setup).unwrap();
    graphs.trained().into_iter().for_each(|g| store.init(g, setup.seed).unwrap());
    CpuMachine::new(Rc::clone(setup), graphs, store, Kernels::Native).unwrap()
}

pub(super) const SIDE: usize = 8;
const CONTEXT: usize = 6;
const VOCABULARY: usize = 32;

/// Convolution, (batch norm,) ReLU, attention between the positions of patches as MobileViT does it, mean, linear.
/// Taps: `conv` (map), `attn` (probabilities of four sequences an image).
#[derive(Clone, Debug)]
pub(super) struct ConvTower {
    pub path: &'static str,
    pub channels: usize,
    pub batch_norm: bool,
    pub dim: usize,
}

impl ImageTower for ConvTower {
    fn image_size(&self) -> usize {
        SIDE
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn taps(&self) -> Result<Vec<TapInfo>, ModelError> {
        let map = TapShape::Image { height: SIDE / 2, width: SIDE / 2, channels: self.channels };
        let attention = TapShape::Attention { groups: 4, heads: 2, prefix: 0, grid: [2, 2] };
        Ok(vec![TapInfo { name: "conv".into(), shape: map }, TapInfo { name: "attn".into(), shape: attention }])
    }

    fn build(&self, g: &mut GraphBuilder, x_bhwc: &Tensor, taps: &[String]) -> Result<Encoded, ModelError> {
        let path = Path::new(self.path);
        let c = self.channels;
        let x = g.conv2d(&path.at("conv"), x_bhwc, ConvArgs::new(c, 3).stride(2))?;
        let act = if self.batch_norm { Activation::Silu } else { Activation::Gelu };
        let x = if self.batch_norm {
            g.batch_norm(&path.at("bn"), &x, BatchNormArgs::new(act))?
        } else {
            g.activation(&x, act)
        };
        let tokens = g.unfold_patches(&x, [2, 2])?;
        let qkv = g.linear(&path.at("qkv"), &tokens, 3 * c, true, Init::Normal(0.5))?;
        let y = g.attention(&qkv, 2, false)?;
        let y = g.fold_patches(&y, SIDE / 2, SIDE / 2, [2, 2])?;
        let pooled = g.global_avg_pool(&y)?;
        let embedding_bd = g.linear(&path.at("proj"), &pooled, self.dim, false, Init::Normal(0.7))?;
        let infos = self.taps()?;
        let mut found = Vec::new();
        for name in taps {
            let value = if name == "conv" { x.clone() } else { g.attention_map(&qkv, 2, false)? };
            let info = infos.iter().find(|i| i.name == *name).unwrap();
            found.push((name.clone(), Tap { value, shape: info.shape }));
        }
        Ok(Encoded { embedding_bd, taps: found })
    }
}

/// Mean of token embeddings, linear.
#[derive(Clone, Debug)]
pub(super) struct BagOfTokens {
    pub dim: usize,
}

impl TextTower for BagOfTokens {
    fn context_length(&self) -> usize {
        CONTEXT
    }

    fn dim(&self) -> usize {
        self.dim
    }

    fn build(&self, g: &mut GraphBuilder, ids_bl: &Tensor, eot_b: &Tensor) -> Result<Tensor, ModelError> {
        let path = Path::new("text");
        let table = g.param(&path.at("token_embedding.weight"), &[VOCABULARY, 8], Init::Normal(1.0))?;
        let x_blc = g.embedding(&table, ids_bl)?;
        let mean = g.global_avg_pool(&x_blc)?;
        let last = g.gather_rows(&x_blc, eot_b)?;
        let x = g.add(&mean, &last)?;
        Ok(g.linear(&path.at("proj"), &x, self.dim, false, Init::Normal(0.5))?)
    }
}

/// Bytes as tokens.
pub(super) fn tokenize() -> Tokenize {
    Arc::new(|caption| {
        let mut ids: Vec<i32> = caption.bytes().map(|b| i32::from(b) % VOCABULARY as i32).take(CONTEXT).collect();
        ids.resize(CONTEXT, 0);
        ids
    })
}

/// A vision transformer of two blocks; taps `transformer.resblocks.{0,1}` and `….attn`.
pub(super) fn vit(path: &str, patch_size: usize, width: usize, dim: usize) -> BackboneTower {
    let params = format!("patch_size = {patch_size}\nwidth = {width}\ndepth = 2\nheads = 2\nmlp_ratio = 2.0");
    let backbone = mcpipe_models::backbone("vit", &params.parse().unwrap()).unwrap();
    let backbone = Arc::from(backbone);
    BackboneTower { backbone, path: Path::new(path), image_size: SIDE, head: Some(dim), projection: None }
}

pub(super) fn caption_encoder(dim: usize, seed: u64) -> CaptionEncoder {
    let tower = BagOfTokens { dim };
    let mut store = ParamStore::default();
    Encoder::init_captions(&tower, &mut store, seed).unwrap();
    CaptionEncoder::new(&tower, tokenize(), Arc::new(store), &Compute::default()).unwrap()
}

pub(super) fn frozen(name: &str, tower: Arc<dyn ImageTower>, text: Option<usize>, seed: u64) -> Teacher {
    let mut store = ParamStore::default();
    Encoder::init_images(tower.as_ref(), &mut store, seed).unwrap();
    let image = Some(FrozenImage { tower, store: Arc::new(store), view: 0 });
    Teacher { name: name.into(), model: TeacherModel::Frozen { image, text, logit_scale: 20.0 } }
}

/// A term from TOML parameters.
pub(super) fn term(name: &str, kind: &str, params: &str, teachers: &[usize], weight: f64) -> Term {
    let params = mcpipe_spec::Params(params.parse().unwrap());
    let level = level(kind, &params).unwrap();
    Term { name: name.into(), level, teachers: teachers.to_vec(), weight, schedule: None }
}

pub(super) fn training(steps: u64, batch_size: usize, accumulate: usize) -> Training {
    Training {
        steps,
        batch_size,
        accumulate,
        recompute: false,
        precision: mcpipe_spec::Precision::F32,
        clip_norm: None,
        log_every: 10,
        checkpoint: mcpipe_spec::Checkpoint { every_steps: 0, every_minutes: 0.0, keep: 2 },
        non_finite: NonFinite { max_in_a_row: 3 },
    }
}

/// A student with a frozen text encoder, without teachers.
pub(super) fn setup(image: Arc<dyn ImageTower>, training: Training) -> TrainSetup {
    let text = caption_encoder(image.dim(), 11);
    TrainSetup {
        model: TrainedModel {
            image,
            view: 0,
            text: ModelText::Frozen { encoder: 0, projection: None },
            logit_scale: 5.0,
            train_logit_scale: true,
        },
        initial: ParamStore::default(),
        teachers: Vec::new(),
        texts: vec![text],
        objective: Objective::default(),
        average: None,
        optimizer: Arc::new(AdamW { lr: 1e-2, ..AdamW::default() }),
        schedule: LrConfig::Constant(Constant::default()),
        training,
        seed: 3,
        compute: Compute::default(),
        identity: "tests".into(),
    }
}

/// Seeded batches: random images whose brightness follows the caption.
#[derive(Debug)]
pub(super) struct Random {
    pub step: u64,
    pub batch_size: usize,
    pub mix: bool,
}

impl Random {
    pub fn new(batch_size: usize, mix: bool) -> Self {
        Random { step: 0, batch_size, mix }
    }

    pub fn batch(&self, step: u64) -> Batch {
        let b = self.batch_size;
        let mut view = Vec::new();
        let mut captions = Vec::new();
        for i in 0..b {
            let mut rng = Rng::new(5, "test", step, i as u64);
            let class = rng.below(6) as usize;
            captions.push(["red", "blue", "square", "a dog", "the sea", "zebra"][class].to_owned());
            view.extend((0..SIDE * SIDE * 3).map(|p| rng.uniform_f32() + if p % 6 == class { 0.5 } else { -0.5 }));
        }
        let partner = (0..b).map(|i| (i + 1) % b).collect();
        let mix = (self.mix && step.is_multiple_of(2)).then(|| Mix { partner, keep: vec![0.7; b] });
        let cursor = serde_json::json!({ "step": step + 1 });
        Batch { views: vec![view], captions, mix, cursor, ..Batch::default() }
    }
}

impl BatchSource for Random {
    fn next_batch(&mut self) -> Result<Batch, BoxError> {
        self.step += 1;
        Ok(self.batch(self.step - 1))
    }
}

/// Keeps the reports.
#[derive(Debug, Default)]
pub(super) struct Log {
    pub steps: Vec<StepReport>,
    pub messages: Vec<String>,
}

impl Observer for Log {
    fn step(&mut self, report: &StepReport) {
        self.steps.push(report.clone());
    }

    fn eval(&mut self, _: &EvalReport) {}

    fn message(&mut self, text: &str) {
        self.messages.push(text.into());
    }
}

pub(super) fn conv(dim: usize, batch_norm: bool) -> Arc<dyn ImageTower> {
    Arc::new(ConvTower { path: "visual", channels: 4, batch_norm, dim })
}

/// A student and one teacher of another architecture and dimension, with every level.
pub(super) fn everything(batch_norm: bool, training: Training) -> TrainSetup {
    let mut s = setup(conv(6, batch_norm), training);
    s.texts.push(caption_encoder(10, 12));
    s.teachers = vec![
        frozen("clip", Arc::new(vit("visual", 2, 8, 10)), Some(1), 21),
        frozen("images", Arc::new(vit("visual", 4, 4, 5)), None, 22),
        Teacher { name: "texts".into(), model: TeacherModel::Frozen { image: None, text: Some(1), logit_scale: 8.0 } },
        Teacher {
            name: "mean".into(),
            model: TeacherModel::Average { momentum: 0.9, final_momentum: Some(0.99), logit_scale: None },
        },
    ];
    let features = "loss = 'mse'\ntaps = [{ student = 'conv', teacher = 'transformer.resblocks.1' }]";
    let cosine = "loss = 'cosine'\ntaps = [{ student = 'conv', teacher = 'conv' }]";
    let transfer = "taps = [{ student = 'conv', teacher = 'transformer.resblocks.0' }]";
    let maps = "taps = [{ student = 'attn', teacher = 'transformer.resblocks.1.attn' }]";
    s.objective = Objective {
        lambda: 0.6,
        terms: vec![
            term("logits", "logits", "", &[0, 1, 2, 3], 1.0),
            term("logits.2", "logits", "temperature = 3.0", &[0], 0.3),
            term("projection", "projection", "", &[0, 3], 5.0),
            term("icl", "icl", "", &[0], 0.5),
            term("features", "features", features, &[0], 0.4),
            term("features.2", "features", cosine, &[3], 0.4),
            term("attention", "attention", transfer, &[0, 1], 2.0),
            term("attention.2", "attention", maps, &[0, 1], 2.0),
        ],
        ..Objective::default()
    };
    s
}
