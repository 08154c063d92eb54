//! Our side of the whole distillation step in `tests/bench/gpu`: a MobileViT-S student at 256 pixels, a ViT-B/16 teacher at
//! 224, the four levels (logits, projection, attention, features) and CLIP's loss, on one batch given again and again.
//!
//! `cargo run --release -p mcpipe-train --example distill -- 256 30 [DEVICE] [PRECISION]`: batch, steps. Prints one line of
//! JSON with the median time of a step as the trainer runs it, images moved to the device included.

use std::sync::Arc;
use std::time::{Duration, Instant};

use mcpipe_data::Normalize;
use mcpipe_graph::{Kernels, ParamStore, Path};
use mcpipe_models::{Backbone, LastToken, ModelError};
use mcpipe_spec::{Checkpoint, NonFinite, Params, Precision, Training};
use mcpipe_train::{
    AdamW, BackboneTower, Batch, BatchSource, BoxError, ByteView, CaptionEncoder, Compute, Constant, Encoder,
    FormBytes, FrozenImage, ImageBytes, ImageTower, LrConfig, ModelText, NoEval, NoObserver, Objective, ProjectionHead,
    Stop, Teacher, TeacherModel, Term, TextTower, TrainSetup, TrainedModel, Trainer, distill,
};

type Failure = Box<dyn std::error::Error + Send + Sync>;

const DIM: usize = 512;

/// Stands for a frozen text encoder, whose embeddings are cached: one row of a table a caption.
#[derive(Debug)]
struct Table;

impl TextTower for Table {
    fn context_length(&self) -> usize {
        1
    }

    fn dim(&self) -> usize {
        DIM
    }

    fn last_token(&self) -> LastToken {
        LastToken::LargestId
    }

    fn build(
        &self,
        g: &mut mcpipe_graph::GraphBuilder,
        ids_bl: &mcpipe_graph::Tensor,
        _: &mcpipe_graph::Tensor,
    ) -> Result<mcpipe_graph::Tensor, ModelError> {
        let batch = ids_bl.shape()[0];
        let table = g.param(&Path::new("table"), &[4096, DIM], mcpipe_graph::Init::Normal(1.0))?;
        let rows = g.embedding(&table, ids_bl)?;
        Ok(g.reshape(&rows, &[batch, DIM])?)
    }
}

/// The same batch each time.
struct Same(Batch, Vec<Instant>);

impl BatchSource for Same {
    fn next_batch(&mut self) -> Result<Batch, BoxError> {
        self.1.push(Instant::now());
        Ok(self.0.clone())
    }
}

fn tower(name: &str, path: &str, image_size: usize, head: Option<usize>) -> Result<Arc<BackboneTower>, Failure> {
    let backbone: Arc<dyn Backbone> = mcpipe_models::backbone(name, &toml::Table::new())?.into();
    let projection: Option<Arc<ProjectionHead>> = None;
    let projection = projection.map(|p| p as Arc<dyn mcpipe_train::Head>);
    Ok(Arc::new(BackboneTower { backbone, path: Path::new(path), image_size, head, projection }))
}

fn term(kind: &str, params: &str) -> Result<Term, Failure> {
    let level = distill::level(kind, &Params(params.parse()?)).map_err(|p| p.to_string())?;
    Ok(Term { name: kind.into(), level, teachers: vec![0], weight: 1.0, schedule: None })
}

fn main() -> Result<(), Failure> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let arg = |i: usize, default: &str| args.get(i).map_or(default, String::as_str).to_owned();
    let (batch_size, steps): (usize, u64) = (arg(0, "256").parse()?, arg(1, "30").parse()?);
    let (compute, _) = Compute::open(arg(2, "cuda").parse()?, Kernels::Native)?;
    let precision = match arg(3, "bf16").as_str() {
        "f32" => Precision::F32,
        "tf32" => Precision::Tf32,
        _ => Precision::Bf16,
    };
    let student = tower("mobilevit_s", "visual.trunk", 256, Some(DIM))?;
    let teacher = tower("vit_base", "visual", 224, Some(DIM))?;
    let mut frozen = ParamStore::default();
    Encoder::init_images(teacher.as_ref(), &mut frozen, 1)?;
    let mut texts = ParamStore::default();
    Encoder::init_captions(&Table, &mut texts, 2)?;
    let tokenize = Arc::new(|caption: &str| vec![caption.parse::<i32>().unwrap_or(0)]);
    let text = CaptionEncoder::new(&Table, tokenize, Arc::new(texts), &compute)?;
    let taps = "taps = [{ student = 'stages.4', teacher = 'transformer.resblocks.11' }]";
    let image = FrozenImage { tower: teacher, store: Arc::new(frozen), view: 1 };
    let setup = TrainSetup {
        model: TrainedModel {
            image: student.clone(),
            view: 0,
            text: ModelText::Frozen { encoder: 0, projection: None },
            logit_scale: 14.3,
            train_logit_scale: true,
        },
        initial: ParamStore::default(),
        teachers: vec![Teacher {
            name: "clip".into(),
            model: TeacherModel::Frozen { image: Some(image), text: Some(0), logit_scale: 100.0 },
        }],
        texts: vec![text],
        objective: Objective {
            lambda: 0.7,
            terms: vec![
                term("logits", "")?,
                term("projection", "")?,
                term("attention", taps)?,
                term("features", &format!("loss = 'mse'\n{taps}"))?,
            ],
            ..Objective::default()
        },
        average: None,
        optimizer: Arc::new(AdamW { lr: 1e-4, ..AdamW::default() }),
        schedule: LrConfig::Constant(Constant::default()),
        training: Training {
            steps,
            batch_size,
            accumulate: 1,
            recompute: false,
            precision,
            clip_norm: Some(1.0),
            log_every: 1000,
            checkpoint: Checkpoint { every_steps: 0, every_minutes: 0.0, keep: 1 },
            non_finite: NonFinite { max_in_a_row: 3 },
        },
        seed: 0,
        compute,
        identity: "bench".into(),
    };
    // As the loader gives them: bytes, one form and one view for each model.
    let noise = |size: usize| {
        let values = mcpipe_graph::Init::Normal(50.0).sample(size as u64, "x", &[batch_size * size * size * 3]);
        FormBytes { size, bytes: values.iter().map(|v| (v + 128.0) as u8).collect() }
    };
    let normalize = Normalize { mean: [0.48, 0.46, 0.41], std: [0.27, 0.26, 0.28] };
    let images = ImageBytes {
        forms: vec![noise(student.image_size()), noise(224)],
        views: (0..2).map(|form| ByteView { form, normalize }).collect(),
        mix: None,
    };
    let captions = (0..batch_size).map(|i| i.to_string()).collect();
    let batch = Batch { bytes: Some(images), captions, ..Batch::default() };
    let mut trainer = Trainer::new(setup)?;
    let mut source = Same(batch, Vec::new());
    trainer.run(&mut source, &mut NoEval, &mut NoObserver, None, &Stop::default())?;
    let mut times: Vec<Duration> = source.1.windows(2).skip(8).map(|w| w[1] - w[0]).collect();
    times.sort_unstable();
    let ms = times.get(times.len() / 2).map_or(f64::NAN, |t| t.as_secs_f64() * 1e3);
    println!(r#"{{"case": "distill {batch_size}", "ms": {ms:.2}, "img_s": {:.0}}}"#, batch_size as f64 / ms * 1e3);
    Ok(())
}
