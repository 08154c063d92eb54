//! Exported students compute what the trained ones do.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::sync::Arc;

use mcpipe_graph::backend::Cpu;
use mcpipe_graph::{Executor, Feed, GraphBuilder, Mode, ParamStore, Path};
use mcpipe_models::export::{
    Conversion, Described, Form as Names, Student, StudentText, convert, described, export_open_clip, export_timm,
    name_note,
};
use mcpipe_models::projection::{Projection, ProjectionKind};
use mcpipe_models::weights::NameMap;
use mcpipe_models::{Backbone, Checkpoint, TextEncoder, WeightsError, backbone, eot_positions, text_encoder};

const SIDE: usize = 32;
const IDS: [i32; 10] = [18, 3, 4, 19, 0, 18, 5, 6, 7, 19];

fn small() -> Box<dyn Backbone> {
    let sizes = "stem = 8\nchannels = [8, 8, 16, 16, 16]\ndepths = [1, 2, 1, 1, 1]\ntransformer_dims = [16, 16, 16]\n\
                 transformer_depths = [1, 1, 1]\nfeatures = 24";
    backbone("mobilevit_xxs", &sizes.parse().unwrap()).unwrap()
}

fn vit() -> Box<dyn Backbone> {
    backbone("vit", &"patch_size = 8\nwidth = 24\ndepth = 1\nheads = 2".parse().unwrap()).unwrap()
}

fn text() -> Box<dyn TextEncoder> {
    let sizes = "width = 16\nheads = 2\ndepth = 1\nvocab_size = 20\ncontext_length = 5".parse().unwrap();
    text_encoder("transformer", &sizes).unwrap()
}

/// How a model is put together.
struct Form<'a> {
    image: &'a dyn Backbone,
    image_path: &'a str,
    text_path: &'a str,
    head: Option<usize>,
    text_dim: usize,
    projection: Option<(Projection, &'a str)>,
    shared: bool,
}

/// Embeddings `[image, text]` of a fixed batch; parameters that the store lacks are drawn.
fn embeddings(form: &Form<'_>, store: &mut ParamStore) -> [Vec<f32>; 2] {
    let mut g = GraphBuilder::new(false);
    let x = g.input("x", &[2, SIDE, SIDE, 3]);
    let mut image = form.image.build(&mut g, &Path::new(form.image_path), &x, form.head, &[]).unwrap().embedding;
    let (ids, eot) = (g.int_input("ids", &[2, 5]), g.int_input("eot", &[2]));
    let mut words =
        text().build(&mut g, &Path::new(form.text_path), &ids, &eot, Some(form.text_dim)).unwrap().embedding;
    if let Some((projection, path)) = form.projection {
        image = projection.build(&mut g, &Path::new(path), &image).unwrap();
        if form.shared {
            words = projection.build(&mut g, &Path::new(path), &words).unwrap();
        }
    }
    g.output("image", &image);
    g.output("text", &words);
    let graph = Arc::new(g.finish());
    store.init(&graph, 5).unwrap();
    let mut executor = Executor::new(graph, store, Mode::Forward, Cpu::default()).unwrap();
    let pixels: Vec<f32> = (0..2 * SIDE * SIDE * 3).map(|i| ((i * 7919 % 1000) as f32 - 500.0) / 300.0).collect();
    let feeds = [("x", Feed::F32(&pixels)), ("ids", Feed::I32(&IDS)), ("eot", Feed::I32(&eot_positions(&IDS, 5)))];
    executor.forward(store, &feeds).unwrap();
    [executor.value(&image).into_owned(), executor.value(&words).into_owned()]
}

/// Non-zero biases, and statistics that are not the initial ones.
fn disturb(store: &mut ParamStore) {
    for p in store.params_mut().iter_mut().filter(|p| p.shape.len() == 1) {
        p.data.iter_mut().enumerate().for_each(|(i, v)| *v += 0.1 + 0.01 * i as f32);
    }
}

fn close(a: &[f32], b: &[f32]) {
    assert_eq!(a.len(), b.len());
    let gap = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0f32, f32::max);
    assert!(gap < 1e-4, "embeddings differ by {gap}");
}

const LINEAR: Projection = Projection { kind: ProjectionKind::Linear, dim: 6 };
const MLP: Projection = Projection { kind: ProjectionKind::Mlp { hidden: 12 }, dim: 6 };

#[test]
fn a_linear_projection_is_folded_into_the_head() {
    let dir = tempfile::tempdir().unwrap();
    for (n, (image, head, shared)) in
        [(small(), Some(10), true), (small(), None, false), (vit(), Some(10), true), (vit(), None, false)]
            .into_iter()
            .enumerate()
    {
        let text_dim = if shared { 10 } else { 6 };
        let projection = Some((LINEAR, "student.projection"));
        let form = Form {
            image: &*image,
            image_path: "student.image",
            text_path: "t.text",
            head,
            text_dim,
            projection,
            shared,
        };
        let mut store = ParamStore::default();
        embeddings(&form, &mut store);
        disturb(&mut store);
        let expected = embeddings(&form, &mut store);

        let student = Student {
            store: &store,
            backbone: &*image,
            image_path: "student.image",
            image_size: SIDE,
            projection,
            batches: 11,
        };
        let encoder = text();
        let student_text = StudentText {
            store: &store,
            encoder: &*encoder,
            path: "t.text",
            shared_projection: shared,
            logit_scale: 2.5,
        };
        let out = export_open_clip(&student, &student_text, &dir.path().join(n.to_string())).unwrap();
        let checkpoint = Checkpoint::open(&out.weights).unwrap();
        let plain = Form {
            image: &*image,
            image_path: "i",
            text_path: "t",
            head: Some(6),
            text_dim: 6,
            projection: None,
            shared: false,
        };
        let mut exported = ParamStore::default();
        embeddings(&plain, &mut exported);
        checkpoint.load(&mut exported, &NameMap::new().and_image(&checkpoint, "i").and_text(&checkpoint, "t")).unwrap();
        let [a, b] = embeddings(&plain, &mut exported);
        close(&a, &expected[0]);
        close(&b, &expected[1]);
        let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&out.config).unwrap()).unwrap();
        assert_eq!(config["model_cfg"]["embed_dim"], 6);

        let file = dir.path().join(format!("{n}.safetensors"));
        if image.name() == "vit" {
            assert!(matches!(export_timm(&student, &file), Err(WeightsError::Export(_))));
            continue;
        }
        let timm = export_timm(&student, &file).unwrap();
        assert_eq!((timm.num_classes, timm.projection_left_out), (6, false));
        let checkpoint = Checkpoint::open(&file).unwrap();
        let mut exported = ParamStore::default();
        embeddings(&plain, &mut exported);
        checkpoint.load(&mut exported, &NameMap::whole("i")).unwrap();
        close(&embeddings(&plain, &mut exported)[0], &expected[0]);
    }
}

/// Families differ in the name of the head, and in where an embedding of the features' width has one.
#[test]
fn the_head_has_the_name_of_its_family() {
    let dir = tempfile::tempdir().unwrap();
    let cases = [
        ("resnet18", "channels = [4, 4, 8, 8]\ndepths = [1, 1, 1, 1]", "fc"),
        ("mobilenetv3_small_050", "width = 0.25\nlast = 64\nfeatures = 32", "classifier"),
        ("efficientnet_lite0", "width = 0.25", "classifier"),
        ("convmixer_1024_20_ks9_p14", "width = 8\ndepth = 1\npatch_size = 8", "head"),
        ("convnext_atto", "depths = [1, 1, 1, 1]\ndims = [8, 8, 8, 8]", "head.fc"),
        ("vit_base_patch16_siglip_224", "width = 16\ndepth = 1\nheads = 2", "head"),
    ];
    for (name, sizes, head) in cases {
        let image = backbone(name, &sizes.parse().unwrap()).unwrap();
        let mut kinds = Vec::new();
        for (own, kind) in [(Some(10), Some(LINEAR)), (None, Some(LINEAR)), (Some(6), None)] {
            let projection = kind.map(|p| (p, "projection"));
            let paths = ("student", "text");
            let form = |image_path, head, projection| Form {
                image: &*image,
                image_path,
                text_path: paths.1,
                head,
                text_dim: 6,
                projection,
                shared: false,
            };
            let trained = form(paths.0, own, projection);
            let mut store = ParamStore::default();
            embeddings(&trained, &mut store);
            disturb(&mut store);
            let expected = embeddings(&trained, &mut store);
            let (store, backbone) = (&store, &*image);
            let student = Student { store, backbone, image_path: paths.0, image_size: SIDE, projection, batches: 1 };
            let file = dir.path().join("timm.safetensors");
            assert_eq!(export_timm(&student, &file).unwrap().num_classes, 6, "{name}");
            let checkpoint = Checkpoint::open(&file).unwrap();
            for part in ["weight", "bias"] {
                assert!(checkpoint.shape(&format!("{head}.{part}")).is_some(), "{name}");
            }
            // Nothing missing and nothing beside.
            let plain = form("i", Some(6), None);
            let mut exported = ParamStore::default();
            embeddings(&plain, &mut exported);
            checkpoint.load(&mut exported, &NameMap::whole("i")).unwrap();
            close(&embeddings(&plain, &mut exported)[0], &expected[0]);

            let encoder = text();
            let text =
                StudentText { store, encoder: &*encoder, path: paths.1, shared_projection: false, logit_scale: 2.5 };
            let out = export_open_clip(&student, &text, &dir.path().join("open_clip")).unwrap();
            let checkpoint = Checkpoint::open(&out.weights).unwrap();
            assert!(checkpoint.shape(&format!("visual.trunk.{head}.weight")).is_some(), "{name}");
            let config: serde_json::Value = serde_json::from_slice(&std::fs::read(&out.config).unwrap()).unwrap();
            kinds.push(config["model_cfg"]["vision_cfg"]["timm_pool"].as_str().unwrap().to_owned());
            // And back, by the names in the file.
            let to = Conversion { backbone, image_size: SIDE, form: Names::Timm, reparam: false };
            let again = convert(&checkpoint, &to, &dir.path().join("again.safetensors")).unwrap();
            assert_eq!(again.num_classes, 6, "{name}");
        }
        let pool = if name.contains("siglip") { "map" } else { "avg" };
        assert!(kinds.iter().all(|kind| kind == pool), "{name}: {kinds:?}");
    }
}

#[test]
fn sizes_of_ones_own_are_noted() {
    assert!(name_note(&*small()).is_some_and(|note| note.contains("timm.create_model(\"mobilevit_xxs\")")));
    // open_clip's configuration holds the sizes of its own tower.
    assert_eq!(name_note(&*vit()), None);
    let published = backbone("mobilevit_xxs", &toml::Table::new()).unwrap();
    assert_eq!(name_note(&*published), None);
}

#[test]
fn an_mlp_projection_becomes_open_clips_or_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (image, encoder) = (small(), text());
    let projection = Some((MLP, "student.projection"));
    let form = Form {
        image: &*image,
        image_path: "student.image",
        text_path: "t.text",
        head: Some(10),
        text_dim: 6,
        projection,
        shared: false,
    };
    let mut store = ParamStore::default();
    embeddings(&form, &mut store);
    disturb(&mut store);
    let expected = embeddings(&form, &mut store);
    let student = Student {
        store: &store,
        backbone: &*image,
        image_path: "student.image",
        image_size: SIDE,
        projection,
        batches: 0,
    };
    let mut student_text =
        StudentText { store: &store, encoder: &*encoder, path: "t.text", shared_projection: false, logit_scale: 2.5 };
    let out = export_open_clip(&student, &student_text, &dir.path().join("out")).unwrap();
    let checkpoint = Checkpoint::open(&out.weights).unwrap();
    // open_clip's form: pooled features, then the MLP of the tower's head.
    let plain = Form { image_path: "i", head: None, projection: Some((MLP, "mlp")), ..form };
    let mut exported = ParamStore::default();
    embeddings(&plain, &mut exported);
    let names = NameMap::new().and_image(&checkpoint, "i").and("visual.head.mlp.", "mlp.");
    checkpoint.load(&mut exported, &names).unwrap();
    close(&embeddings(&plain, &mut exported)[0], &expected[0]);

    let timm = export_timm(&student, &dir.path().join("t.safetensors")).unwrap();
    assert_eq!((timm.num_classes, timm.projection_left_out), (0, true));
    student_text.shared_projection = true;
    assert!(matches!(export_open_clip(&student, &student_text, dir.path()), Err(WeightsError::Export(_))));
    let nowhere = Student { image_path: "nobody", ..student };
    assert!(matches!(export_timm(&nowhere, &dir.path().join("n.safetensors")), Err(WeightsError::Export(_))));
    assert!(!dir.path().join("n.safetensors").exists());
}

fn fastvit() -> Box<dyn Backbone> {
    let sizes = "layers = [1, 1, 1, 1]\ndims = [8, 16, 32, 32]\nlayer_scale = 0.5";
    backbone("fastvit_mci0", &sizes.parse().unwrap()).unwrap()
}

/// A student with a FastViT, exported both ways; what its images and captions give.
fn exported_fastvit(dir: &std::path::Path) -> [Vec<f32>; 2] {
    let image = fastvit();
    let (image_path, text_path) = ("visual.trunk", "text");
    let form =
        Form { image: &*image, image_path, text_path, head: Some(6), text_dim: 6, projection: None, shared: false };
    let mut store = ParamStore::default();
    embeddings(&form, &mut store);
    disturb(&mut store);
    let expected = embeddings(&form, &mut store);
    let (encoder, text_store) = (text(), store.clone());
    let student = Student {
        store: &store,
        backbone: &*image,
        image_path: "visual.trunk",
        image_size: SIDE,
        projection: None,
        batches: 3,
    };
    let text = StudentText {
        store: &text_store,
        encoder: &*encoder,
        path: "text",
        shared_projection: false,
        logit_scale: 1.0,
    };
    export_timm(&student, &dir.join("timm.safetensors")).unwrap();
    export_open_clip(&student, &text, dir).unwrap();
    expected
}

#[test]
fn exported_weights_are_converted_and_folded() {
    let dir = tempfile::tempdir().unwrap();
    let expected = exported_fastvit(dir.path());
    let folded_file = dir.path().join("folded.safetensors");
    for source in ["timm.safetensors", "open_clip_model.safetensors"] {
        let source = Checkpoint::open(&dir.path().join(source)).unwrap();
        let Described { backbone: image, image_size: size } = described(&source).unwrap().unwrap();
        assert_eq!((image.params(), size), (fastvit().params(), SIDE));
        for (form, path) in [(Names::Timm, ""), (Names::OpenClip, "visual.trunk")] {
            let to = Conversion { backbone: &*image, image_size: size, form, reparam: true };
            let done = convert(&source, &to, &folded_file).unwrap();
            assert_eq!(done.num_classes, 6);
            let folded = Checkpoint::open(&folded_file).unwrap();
            assert_eq!(folded.names().count(), done.written);
            // The text tower and the logit scale stay where there is a place for them.
            let beside = source.names().filter(|n| n.starts_with("text.") || *n == "logit_scale").count();
            match form {
                Names::Timm => assert_eq!(done.left_out.len(), beside),
                Names::OpenClip => assert!(done.left_out.is_empty() && done.written < done.read + beside),
            }
            let image = described(&folded).unwrap().unwrap().backbone;
            assert_eq!(image.params()["reparam"].as_bool(), Some(true));
            let form = Form {
                image: &*image,
                image_path: path,
                text_path: "text",
                head: Some(6),
                text_dim: 6,
                projection: None,
                shared: false,
            };
            let mut store = ParamStore::default();
            embeddings(&form, &mut store);
            let mut trunk = ParamStore::default();
            for p in store.params().iter().filter(|p| !p.name.starts_with("text.")) {
                trunk.insert(p.clone());
            }
            let prefix = if path.is_empty() { "" } else { "visual.trunk." };
            folded.load(&mut trunk, &NameMap::new().and(prefix, prefix)).unwrap();
            trunk.params().iter().for_each(|p| store.insert(p.clone()));
            close(&embeddings(&form, &mut store)[0], &expected[0]);
        }
    }
}

#[test]
fn conversions_that_make_no_sense_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    exported_fastvit(dir.path());
    let source = Checkpoint::open(&dir.path().join("timm.safetensors")).unwrap();
    let out = dir.path().join("out.safetensors");
    let (image, mobile, vit) = (fastvit(), small(), vit());
    let to = |backbone, form, reparam| Conversion { backbone, image_size: SIDE, form, reparam };
    assert!(matches!(convert(&source, &to(&*mobile, Names::Timm, false), &out), Err(WeightsError::Mismatch { .. })));
    assert!(matches!(convert(&source, &to(&*vit, Names::Timm, false), &out), Err(WeightsError::Export(_))));
    assert!(!out.exists());
    // Twice folded.
    convert(&source, &to(&*image, Names::Timm, true), &out).unwrap();
    let folded = Checkpoint::open(&out).unwrap();
    let plain = described(&folded).unwrap().unwrap().backbone;
    let again = convert(&folded, &to(&*plain, Names::Timm, true), &dir.path().join("twice.safetensors"));
    assert!(matches!(again, Err(WeightsError::Export(message)) if message.contains("no branches")));
}
