//! The committed pipelines and what a checked file gives.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::{Path, PathBuf};

use common::{VALID, components};
use mcpipe_spec::{Shards, Spec, Style, Teacher, TextEncoder, load, load_text, schema};

fn pipelines() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../pipelines")
}

fn valid(text: &str, overrides: &[&str]) -> Spec {
    let overrides: Vec<String> = overrides.iter().map(|&o| o.to_owned()).collect();
    match load_text(Path::new("dir/small.toml"), text, &overrides, &components()) {
        Ok(document) => document.spec,
        Err(found) => panic!("{}", found.render(Style::Plain)),
    }
}

#[test]
fn committed_pipelines_have_no_mistakes() {
    for file in ["mobilevit.toml", "cifar10.toml"] {
        match load(&pipelines().join(file), &[], &components()) {
            Ok(document) => assert!(document.warnings.is_empty(), "{}", document.warnings.render(Style::Plain)),
            Err(found) => panic!("{}", found.render(Style::Plain)),
        }
    }
}

#[test]
fn defaults_are_filled_in() {
    let spec = valid(VALID, &[]);
    assert_eq!(spec.loss.lambda, 0.7);
    assert_eq!(spec.eval.len(), 1);
    assert_eq!(spec.eval[0].kind, "zero_shot");
    assert_eq!(spec.training.micro_batch(), 32);
    assert_eq!(spec.distill[0].params.get("temperature"), Some(&toml::Value::Float(2.0)));
    assert!(matches!(&spec.text, TextEncoder::Teacher(text) if text.teacher == "clip"));
    let Teacher::Train(teacher) = &spec.teachers[0] else { panic!("a trained teacher") };
    assert_eq!(spec.optimizer_of(teacher).kind, "adamw");
    assert_eq!(spec.optimizer_of(teacher).params.decode::<common::AdamW>().unwrap().lr, 1e-3);
}

#[test]
fn without_distillation_the_loss_is_clips() {
    let cut = VALID.replace("[[distill]]\nlevel = \"logits\"\ntemperature = 2.0\n", "");
    let at = cut.find("[[distill]]").unwrap();
    let end = cut.find("[optimizer]").unwrap();
    let spec = valid(&format!("{}{}", &cut[..at], &cut[end..]), &[]);
    assert!(spec.distill.is_empty());
    assert_eq!(spec.loss.lambda, 0.0);
}

#[test]
fn resolved_pipeline_loads_to_the_same() {
    for text in [VALID, &std::fs::read_to_string(pipelines().join("mobilevit.toml")).unwrap()] {
        let spec = valid(text, &[]);
        let resolved = spec.to_toml().unwrap();
        assert_eq!(valid(&resolved, &[]), spec, "{resolved}");
    }
}

#[test]
fn overrides_replace_add_and_make() {
    let spec = valid(
        VALID,
        &[
            "training.steps=7",
            "teacher.0.dim = 64",
            "teacher[0].image.params.width=256",
            "distill[1].taps[0].student=stages.2",
            "distill.2.level=icl",
            "eval.0.name=photos",
            "eval.0.kind=retrieval",
            "augment.mixup = { alpha = 0.2 }",
            "data.train.shards=../x/{0..3}.tar",
            "student.ema.momentum=0.99",
            "seed=12",
        ],
    );
    assert_eq!(spec.training.steps, 7);
    assert_eq!(spec.seed, 12);
    assert_eq!(spec.teachers[0].dim(), Some(64));
    assert_eq!(spec.teachers[0].image().unwrap().params.get("width"), Some(&toml::Value::Integer(256)));
    assert_eq!(spec.distill[2].level, "icl");
    assert_eq!(spec.eval[0].name, "photos");
    assert_eq!(spec.augment.mixup.as_ref().unwrap().probability, 1.0);
    assert_eq!(spec.student.ema.as_ref().unwrap().momentum, 0.99);
    // Given on the command line: as seen from the current folder.
    assert_eq!(spec.data.train.shards, Some(Shards::One("../x/{0..3}.tar".to_owned())));
}

#[test]
fn paths_in_the_file_start_at_its_folder() {
    let text = format!("{VALID}\n[data.train]\nshards = [\"a/{{0..1}}.tar\", \"/abs/b.tar\"]\n")
        .replace("[data]\nmake = { kind = \"shapes\", train = 256 }\n", "");
    let spec = valid(&text, &["run.dir=out"]);
    let shards = spec.data.train.shards.unwrap();
    assert_eq!(shards.patterns(), ["dir/a/{0..1}.tar", "/abs/b.tar"]);
    assert_eq!(spec.run.dir, Some(PathBuf::from("out")));
}

#[test]
fn places_are_found_by_path() {
    let document = load_text(Path::new("s.toml"), VALID, &["training.steps=7".to_owned()], &components()).unwrap();
    let text = |path: &str| document.sources().text(&document.span_of(path)).to_owned();
    assert_eq!(text("distill[1].taps[0].student"), "\"stages.3\"");
    assert_eq!(text("teacher.0.image.params.patch_size"), "8");
    assert_eq!(text("training.steps"), "7");
    assert_eq!(document.origin_of("training.steps"), mcpipe_spec::Origin::Set);
    let given = document.diagnostic(mcpipe_spec::Code::UnknownTap, "distill.1.taps.0.student", "");
    assert_eq!(given.path, "distill[1].taps[0].student");
    assert_eq!(text("student.baseline"), "[student]", "left out: the table's header");
    assert!(!document.is_set("student.baseline"));
    assert!(document.is_set("student.image_size"));
}

#[test]
fn schema_is_closed_and_names_the_components() {
    let schema = schema(&components());
    let text = serde_json::to_string(&schema).unwrap();
    assert!(!text.contains("x-mcpipe"), "only the checker's keywords stay inside");
    assert!(!text.contains("\"null\""), "TOML has no null");
    let backbones = schema["definitions"]["Student"]["properties"]["backbone"]["enum"].as_array().unwrap();
    assert_eq!(backbones.len(), 4);
    for (name, definition) in schema["definitions"].as_object().unwrap() {
        if definition.get("properties").is_some() && definition.get("oneOf").is_none() {
            assert_eq!(definition["additionalProperties"], false, "{name}");
            for (key, property) in definition["properties"].as_object().unwrap() {
                let constant = property.get("const").is_some();
                assert!(constant || property.get("description").is_some(), "{name}.{key} has no description");
            }
        }
    }
}

#[test]
fn declared_components_match_the_types() {
    let schema = schema(&components());
    let keys =
        |name: &str| schema["definitions"][name]["properties"].as_object().unwrap().keys().cloned().collect::<Vec<_>>();
    let constants = |name: &str| {
        let branches = schema["definitions"][name]["oneOf"].as_array().unwrap();
        branches.iter().map(|branch| branch["const"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let declared = |kind| {
        let of_kind = mcpipe_spec::declared().into_iter().filter(move |component| component.kind == kind);
        of_kind.map(|component| component.name.to_owned()).collect::<Vec<_>>()
    };
    assert_eq!(declared(mcpipe_spec::ComponentKind::Augmentation), keys("Augment"));
    assert_eq!(declared(mcpipe_spec::ComponentKind::Projection), constants("ProjectionKind"));
    assert_eq!(declared(mcpipe_spec::ComponentKind::Export), constants("ExportFormat"));
}
