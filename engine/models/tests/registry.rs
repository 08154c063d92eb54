//! The registry: names, parameters, schemas, and what is refused.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use mcpipe_graph::{GraphBuilder, Path};
use mcpipe_models::{ModelError, TapShape, backbone, backbones, eot_positions, text_encoder, text_encoders};
use schemars::generate::SchemaSettings;

fn table(text: &str) -> toml::Table {
    text.parse().unwrap()
}

#[test]
fn an_unknown_name_gets_the_nearest_one() {
    let error = backbone("mobilevit_xxss", &table("")).unwrap_err();
    let message = error.to_string();
    assert!(message.contains("did you mean `mobilevit_xxs`?") && message.contains("vit"), "{message}");
    let error = text_encoder("transfomer", &table("")).unwrap_err();
    assert!(error.to_string().contains("did you mean `transformer`?"), "{error}");
    assert!(!backbone("zzz", &table("")).unwrap_err().to_string().contains("did you mean"));
}

/// Each wrong parameter is refused at its path.
#[test]
fn wrong_parameters_name_their_path() {
    let cases = [
        ("mobilevit_xxs", "chanels = [1, 2, 3, 4, 5]", "chanels"),
        ("mobilevit_xxs", "channels = [16, 24]", "channels"),
        ("mobilevit_xxs", "channels = [16, 24, \"x\", 64, 80]", "channels[2]"),
        ("mobilevit_xxs", "channels = [16, 24, 0, 64, 80]", "channels"),
        ("mobilevit_xxs", "channels = [16, 24, -1, 64, 80]", "channels[2]"),
        ("mobilevit_xxs", "heads = 7", "transformer_dims"),
        ("mobilevit_xxs", "expansion = 0.0", "expansion"),
        ("mobilevit_xxs", "expansion = nan", "expansion"),
        ("mobilevit_xxs", "patch_size = 9999999999", "patch_size"),
        ("mobilevit_xxs", "drop_path = 1.0", "drop_path"),
        ("resnet18", "act = \"tanh\"", "act"),
        ("convnext_atto", "kernel_size = 4", "kernel_size"),
        ("convnext_atto", "drop_path = 1.0", "drop_path"),
        ("convnext_tiny", "depths = [3, 3, 9]", "depths"),
        ("fastvit_mci0", "dims = [64, 128, 256, 500]", "dims"),
        ("fastvit_mci0", "dims = [8, 16, 32, 48]", "dims"),
        ("fastvit_mci1", "layer_scale = -1.0", "layer_scale"),
        ("vit_tiny", "heads = 5", "heads"),
        ("vit", "width = 100\nheads = 3", "heads"),
        ("vit", "act = \"relu\"", "act"),
        ("vit", "depth = 1.5", "depth"),
    ];
    for (name, params, path) in cases {
        match backbone(name, &table(params)) {
            Err(ModelError::Param { component, param, message }) => {
                assert_eq!((component.as_str(), param.as_str()), (name, path), "{params}: {message}");
            }
            other => panic!("{params}: {other:?}"),
        }
    }
    assert!(matches!(
        text_encoder("transformer", &table("context_length = 2")),
        Err(ModelError::Param { param, .. }) if param == "context_length"
    ));
}

/// The schema has every parameter, optional, with the published value as its default.
#[test]
fn schemas_hold_the_published_sizes() {
    let generator = || SchemaSettings::draft07().into_generator();
    let entries =
        backbones().iter().map(|e| (e.name, (e.params)(&mut generator()), (e.make)(&table("")).unwrap().params()));
    let texts =
        text_encoders().iter().map(|e| (e.name, (e.params)(&mut generator()), (e.make)(&table("")).unwrap().params()));
    for (name, schema, defaults) in entries.chain(texts) {
        let schema = schema.to_value();
        assert!(schema.get("required").is_none(), "{name}");
        assert_eq!(schema["additionalProperties"], false, "{name}");
        let properties = schema["properties"].as_object().unwrap();
        assert_eq!(properties.len(), defaults.len(), "{name}");
        for (key, value) in &defaults {
            assert_eq!(properties[key]["default"], serde_json::to_value(value).unwrap(), "{name}.{key}");
            assert!(properties[key]["description"].is_string(), "{name}.{key}");
        }
    }
}

#[test]
fn every_backbone_builds_with_all_its_taps() {
    for entry in backbones() {
        let params = if entry.family == "vit" { "width = 96\ndepth = 2\nheads = 3\npatch_size = 16" } else { "" };
        let model = (entry.make)(&table(params)).unwrap();
        let mut g = GraphBuilder::new(true);
        let image = g.input("image", &[2, 96, 96, 3]);
        let offered = model.taps(96).unwrap();
        let names: Vec<String> = offered.iter().map(|t| t.name.clone()).collect();
        let outputs = model.build(&mut g, &Path::new("student.image"), &image, Some(24), &names).unwrap();
        assert_eq!(outputs.embedding.shape(), [2, 24]);
        assert_eq!(outputs.features.shape(), [2, model.features()]);
        for (info, (name, tap)) in offered.iter().zip(&outputs.taps) {
            assert_eq!((&info.name, tap.value.shape()), (name, &info.shape.shape(2)[..]), "{}", entry.name);
            match tap.shape {
                TapShape::Attention { .. } => assert!(tap.image(&mut g).is_err() && tap.shape.channels().is_none()),
                _ => assert_eq!(tap.image(&mut g).unwrap().shape().last().copied(), tap.shape.channels()),
            }
        }
        let graph = g.finish();
        assert!(graph.params().iter().all(|p| p.name.starts_with("student.image.")));
    }
}

#[test]
fn unfit_images_and_taps_are_refused() {
    let mobilevit = backbone("mobilevit_xxs", &table("")).unwrap();
    let vit = backbone("vit", &table("patch_size = 8")).unwrap();
    assert!(matches!(mobilevit.check_image_size(16), Err(ModelError::ImageSize { size: 16, .. })));
    assert!(mobilevit.check_image_size(0).is_err() && mobilevit.check_image_size(33).is_ok());
    assert!(vit.check_image_size(60).is_err() && vit.check_image_size(0).is_err() && vit.check_image_size(64).is_ok());
    let mut g = GraphBuilder::new(false);
    let image = g.input("image", &[1, 64, 64, 3]);
    let taps = ["stages.5".to_owned()];
    let error = mobilevit.build(&mut g, &Path::default(), &image, None, &taps).unwrap_err();
    assert!(matches!(&error, ModelError::UnknownTap { nearest: Some(n), .. } if n.starts_with("stages.")), "{error}");
    let flat = g.input("flat", &[1, 64, 32, 3]);
    assert!(matches!(vit.build(&mut g, &Path::default(), &flat, None, &[]), Err(ModelError::Dims(_))));
}

#[test]
fn sizes_of_ones_own_change_the_model() {
    let small =
        table("channels = [8, 8, 16, 16, 24]\ndepths = [1, 1, 2, 1, 1]\ntransformer_depths = [1, 1, 1]\nfeatures = 64");
    let model = backbone("mobilevit_xxs", &small).unwrap();
    assert!(!model.is_published() && backbone("mobilevit_xxs", &table("heads = 4")).unwrap().is_published());
    // What changes no shape leaves the published sizes.
    assert!(backbone("fastvit_mci0", &table("reparam = true\ndrop_path = 0.1")).unwrap().is_published());
    assert!(backbone("mobilevit_xxs", &table("drop_path = 0.1")).unwrap().is_published());
    assert!(!backbone("convnext_atto", &table("kernel_size = 5")).unwrap().is_published());
    assert!(!backbone("resnet18", &table("act = \"silu\"")).unwrap().is_published());
    let names: Vec<String> = model.taps(64).unwrap().into_iter().map(|t| t.name).collect();
    assert!(names.contains(&"stages.2.2.transformer.0.attn".to_owned()), "{names:?}");
    let mut g = GraphBuilder::new(true);
    let image = g.input("image", &[1, 64, 64, 3]);
    let out = model.build(&mut g, &Path::default(), &image, None, &names).unwrap();
    assert_eq!(out.embedding.shape(), [1, 64]);
    assert_eq!(out.taps.len(), names.len());
}

/// Stochastic depth's rates of the residual branches are those of timm's `drop_path_rate`.
#[test]
fn stochastic_depth_is_timms() {
    let last = 0.5;
    // Of each branch that may be dropped: its rate is last·n/d.
    let runs = |parts: &[(usize, usize)]| parts.iter().flat_map(|&(n, times)| vec![n; times]).collect::<Vec<_>>();
    let cases = [
        ("mobilevit_xxs", runs(&[(2, 1), (3, 1), (5, 4), (7, 8), (9, 6)]), 9),
        ("mobilevitv2_050", runs(&[(2, 1), (4, 4), (6, 8), (8, 6)]), 8),
        ("resnet18", (1..=7).collect(), 7),
        ("efficientnet_b0", vec![2, 4, 6, 7, 9, 10, 12, 13, 14], 16),
        ("mobilenetv3_small_050", vec![2, 4, 5, 6, 7, 9, 10], 12),
        ("convnext_atto", (1..=11).collect(), 11),
        ("fastvit_mci0", (1..=17).chain([18, 18, 19, 19]).collect(), 19),
    ];
    for (name, numerators, d) in cases {
        let model = backbone(name, &table(&format!("drop_path = {last}"))).unwrap();
        let mut g = GraphBuilder::new(true);
        let image = g.input("image", &[2, 64, 64, 3]);
        model.build(&mut g, &Path::default(), &image, None, &[]).unwrap();
        let graph = g.finish();
        let ours: Vec<f32> = graph.stochastic().iter().map(|s| 1.0 - s.keep).collect();
        assert_eq!(ours.len(), numerators.len(), "{name}: {ours:?}");
        for (rate, n) in ours.iter().zip(&numerators) {
            assert!((rate - last * *n as f32 / d as f32).abs() < 1e-6, "{name}: {ours:?}");
        }
        // MobileViT drops a sequence's branch, of which an image has one for each position inside a patch.
        let most = if name == "mobilevit_xxs" { 8 } else { 2 };
        assert_eq!(graph.stochastic().iter().map(|s| s.samples).max(), Some(most), "{name}");
    }
}

#[test]
fn a_frozen_embedding_is_a_buffer() {
    let encoder = text_encoder(
        "transformer",
        &table("width = 32\nheads = 2\ndepth = 1\nvocab_size = 100\nfrozen_embedding = true"),
    );
    let encoder = encoder.unwrap();
    let mut g = GraphBuilder::new(true);
    let (ids, eot) = (g.int_input("ids", &[2, 5]), g.int_input("eot", &[2]));
    encoder.build(&mut g, &Path::default(), &ids, &eot, Some(8)).unwrap();
    let graph = g.finish();
    let table = graph.params().iter().find(|p| p.name == "token_embedding.weight").unwrap();
    assert_eq!(table.kind, mcpipe_graph::ParamKind::Buffer);
    let mut g = GraphBuilder::new(true);
    let (ids, eot) = (g.int_input("ids", &[2, 78]), g.int_input("eot", &[2]));
    assert!(matches!(encoder.build(&mut g, &Path::default(), &ids, &eot, Some(8)), Err(ModelError::Dims(_))));
}

#[test]
fn the_end_of_text_is_the_first_largest_id() {
    assert_eq!(eot_positions(&[5, 9, 2, 0, 5, 1, 2, 9, 9, 3, 9, 0], 4), [1, 3, 0]);
    assert_eq!(eot_positions(&[], 4), [0i32; 0]);
    assert_eq!(eot_positions(&[1, 2], 0), [0i32; 0]);
}
