//! Writes exported models with random weights, and what they compute, for `tests/check_export.py`.
//!
//! `cargo run -p mcpipe-models --example export_samples -- DIRECTORY`

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::error::Error;
use std::path::Path as File;
use std::sync::Arc;

use mcpipe_graph::backend::Cpu;
use mcpipe_graph::{Executor, Feed, GraphBuilder, Mode, ParamKind, ParamStore, Path};
use mcpipe_models::export::{Student, StudentText, export_open_clip, export_timm};
use mcpipe_models::projection::{INIT_LOGIT_SCALE, Projection, ProjectionKind};
use mcpipe_models::weights::{Entry, write_safetensors};
use mcpipe_models::{backbone, eot_positions, text_encoder};

const BATCH: usize = 2;
const LENGTH: usize = 10;

/// One model: directory, backbone, its parameters, image size, head, projection.
type Case = (&'static str, &'static str, &'static str, usize, Option<usize>, ProjectionKind);

const CASES: [Case; 11] = [
    ("xxs_head", "mobilevit_xxs", "", 64, Some(32), ProjectionKind::None),
    ("xxs_linear", "mobilevit_xxs", "", 80, Some(48), ProjectionKind::Linear),
    ("s_linear", "mobilevit_s", "", 64, None, ProjectionKind::Linear),
    ("xxs_mlp", "mobilevit_xxs", "", 64, None, ProjectionKind::Mlp { hidden: 64 }),
    ("resnet", "resnet18", "", 64, Some(48), ProjectionKind::Linear),
    ("mobilenet", "mobilenetv3_small_050", "", 64, None, ProjectionKind::Linear),
    ("efficientnet", "efficientnet_lite0", "", 64, None, ProjectionKind::Linear),
    ("convmixer", "convmixer_1024_20_ks9_p14", "", 56, None, ProjectionKind::Linear),
    ("convnext", "convnext_atto", "", 64, None, ProjectionKind::Linear),
    ("siglip", "vit_base_patch16_siglip_224", "", 224, None, ProjectionKind::Linear),
    ("vit", "vit", "patch_size = 8\nwidth = 64\ndepth = 2\nheads = 4", 64, Some(32), ProjectionKind::None),
];

fn write_case(root: &File, case: &Case) -> Result<(), Box<dyn Error>> {
    let (name, backbone_name, params, side, head, kind) = *case;
    let model = backbone(backbone_name, &params.parse()?)?;
    let text = text_encoder(
        "transformer",
        &"width = 64\ndepth = 2\nheads = 4\ncontext_length = 10\nvocab_size = 500".parse()?,
    )?;
    let projection = Projection { kind, dim: 32 };
    let mut g = GraphBuilder::new(false);
    let image = g.input("image", &[BATCH, side, side, 3]);
    let image = model.build(&mut g, &Path::new("student"), &image, head, &[])?.embedding;
    let image = projection.build(&mut g, &Path::new("projection"), &image)?;
    let (ids, eot) = (g.int_input("ids", &[BATCH, LENGTH]), g.int_input("eot", &[BATCH]));
    let words = text.build(&mut g, &Path::new("text"), &ids, &eot, Some(32))?.embedding;
    g.output("image", &image);
    g.output("text", &words);
    let graph = Arc::new(g.finish());
    let mut store = ParamStore::default();
    store.init(&graph, 3)?;
    for p in store.params_mut().iter_mut().filter(|p| p.shape.len() == 1) {
        let shift = if p.kind == ParamKind::Buffer { 0.02 } else { 0.1 };
        p.data.iter_mut().enumerate().for_each(|(i, v)| *v += shift * ((i % 7) as f32 / 7.0 + 0.1));
    }
    let pixels: Vec<f32> = (0..BATCH * side * side * 3).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 300.0).collect();
    let ids: [i32; BATCH * LENGTH] = [498, 5, 6, 7, 499, 0, 0, 0, 0, 0, 498, 1, 2, 3, 4, 5, 6, 7, 8, 499];
    let mut executor = Executor::new(graph, &store, Mode::Forward, Cpu::default())?;
    let eot = eot_positions(&ids, LENGTH);
    executor.forward(&store, &[("image", Feed::F32(&pixels)), ("ids", Feed::I32(&ids)), ("eot", Feed::I32(&eot))])?;

    let student = Student {
        store: &store,
        backbone: &*model,
        image_path: "student",
        image_size: side,
        projection: Some((projection, "projection")),
        batches: 100,
    };
    let student_text = StudentText {
        store: &store,
        encoder: &*text,
        path: "text",
        shared_projection: false,
        logit_scale: INIT_LOGIT_SCALE,
    };
    let directory = root.join(name);
    export_open_clip(&student, &student_text, &directory)?;
    if backbone_name != "vit" {
        let out = export_timm(&student, &directory.join("timm.safetensors"))?;
        println!("{name}: timm.create_model({:?}, num_classes={})", out.model, out.num_classes);
    }
    let f32s = |shape: &[usize], values: &[f32]| Entry::F32(shape.to_vec(), Cow::Owned(values.to_vec()));
    let expected = BTreeMap::from([
        ("pixels".into(), f32s(&[BATCH, side, side, 3], &pixels)),
        ("ids".into(), Entry::I64(vec![BATCH, LENGTH], ids.iter().map(|&i| i64::from(i)).collect())),
        ("image".into(), f32s(&[BATCH, 32], &executor.value(&image))),
        ("text".into(), f32s(&[BATCH, 32], &executor.value(&words))),
    ]);
    write_safetensors(&directory.join("expected.safetensors"), &expected, &BTreeMap::new())?;
    Ok(())
}

fn main() -> Result<(), Box<dyn Error>> {
    let root = std::env::args_os().nth(1).ok_or("usage: export_samples DIRECTORY")?;
    CASES.iter().try_for_each(|case| write_case(File::new(&root), case))
}
