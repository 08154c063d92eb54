//! The commands that look without running.

use serde_json::Value;
use snapbox::str;

mod common;
use common::Bench;

#[test]
fn check_speaks_to_people_and_to_editors() {
    let bench = Bench::new();
    bench
        .mcpipe(&["check", "tiny.toml"])
        .assert()
        .code(0)
        .stdout_eq(str![[r#"
tiny.toml: fine, 9 stages

"#]])
        .stderr_eq(str![]);
    bench.variant("bad.toml", "templates = [\"a photo of a {c}\"]", "templates = [\"a photo\"]");
    let (code, out, err) = bench.output(&["check", "bad.toml", "--format", "json"]);
    assert_eq!((code, err.as_str()), (2, ""));
    let object: Value = serde_json::from_str(out.trim()).expect("one object");
    assert_eq!(object["code"], "template-placeholder");
    assert_eq!(object["path"], "eval[0].templates[0]");
    assert_eq!(object["line"], 47);
}

#[test]
fn plan_shows_stages_models_and_memory() {
    let bench = Bench::new();
    bench.mcpipe(&["plan", "tiny.toml", "--threads", "2"]).assert().code(0).stdout_eq(str![[r#"
tiny

STAGES
stage                        status  hash          needs
make_data                    to run  [..]
train_teacher clip           to run  [..]  make_data
train_student student        to run  [..]  make_data, train_teacher clip
train_student baseline       to run  [..]  make_data, train_teacher clip
evaluate student zero_shot   to run  [..]  make_data, train_teacher clip, train_student student
evaluate baseline zero_shot  to run  [..]  make_data, train_teacher clip, train_student baseline
evaluate clip zero_shot      to run  [..]  make_data, train_teacher clip
export                       to run  [..]  train_teacher clip, train_student student
report                       to run  [..]  train_teacher clip, train_student student, train_student baseline, evaluate student zero_shot, evaluate baseline zero_shot, evaluate clip zero_shot

MODELS
model                  component      input  parameters  FLOPs/sample  embedding
─────────────────  ─────────────  ─────────  ──────────  ────────────  ─────────
student            mobilevit_xxs      64x64      956.1k        42.85M         16
student text         transformer  12 tokens        3760           88k         16
teacher clip                 vit      32x32      15.98k        133.7k         16
teacher clip text    transformer  12 tokens        3760           88k         16

TAPS of student (mobilevit_xxs); * compared by a distillation term
  tap                            holds      shape
  stem                           map        1 x 32 x 32 x 16
  stages.0                       map        1 x 32 x 32 x 16
  stages.1                       map        1 x 16 x 16 x 24
  stages.2.1.transformer.0.attn  attention  4 x 4 x 16 x 16
  stages.2.1.transformer.1.attn  attention  4 x 4 x 16 x 16
  stages.2                       map        1 x 8 x 8 x 48
  stages.3.1.transformer.0.attn  attention  4 x 4 x 4 x 4
  stages.3.1.transformer.1.attn  attention  4 x 4 x 4 x 4
  stages.3.1.transformer.2.attn  attention  4 x 4 x 4 x 4
  stages.3.1.transformer.3.attn  attention  4 x 4 x 4 x 4
  stages.3                       map        1 x 4 x 4 x 64
  stages.4.1.transformer.0.attn  attention  4 x 4 x 1 x 1
  stages.4.1.transformer.1.attn  attention  4 x 4 x 1 x 1
  stages.4.1.transformer.2.attn  attention  4 x 4 x 1 x 1
  stages.4                       map        1 x 2 x 2 x 80
  final_conv                     map        1 x 2 x 2 x 320

TAPS of teacher clip (vit); * compared by a distillation term
  tap                           holds      shape
  transformer.resblocks.0.attn  attention  1 x 2 x 5 x 5
  transformer.resblocks.0       tokens     1 x 5 x 16

MEMORY AND WORK OF A STEP
...
teacher clip: 2 steps of 8 images (8 at a time), [..] MB and [..] FLOPs a step
part [..] memory  weights  parameters   FLOPs
...

"#]]);
    let (code, out, _) = bench.output(&["plan", "tiny.toml", "--format", "json"]);
    assert_eq!(code, 0);
    let plan: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(plan["stages"].as_array().map(Vec::len), Some(9));
    assert!(plan["steps"][0]["bytes"].as_u64().is_some_and(|bytes| bytes > 1_000_000));
    assert!(plan["models"][0]["taps"].as_array().is_some_and(|taps| !taps.is_empty()));
    assert!(plan["models"][0].get("note").is_none());
}

#[test]
fn plan_says_when_timm_does_not_know_the_sizes() {
    let bench = Bench::new();
    let note = "\nstudent (mobilevit_xxs): its sizes are not timm's: timm.create_model(\"mobilevit_xxs\") alone does not build it\n";
    for (set, noted) in [("features = 64", true), ("heads = 2", true), ("drop_path = 0.1", false)] {
        let set = format!("student.params={{ {set} }}");
        let (code, out, err) = bench.output(&["plan", "tiny.toml", "--set", &set]);
        assert_eq!(code, 0, "{err}");
        assert_eq!(out.contains(note), noted, "{set}: {out}");
    }
    let (_, out, _) =
        bench.output(&["plan", "tiny.toml", "--set", "student.params.heads=2", "--set", "export.formats=[]"]);
    assert!(!out.contains("timm.create_model"), "nothing is exported: {out}");
}

#[test]
fn graph_draws_the_stages() {
    let bench = Bench::new();
    bench.mcpipe(&["graph", "tiny.toml", "--format", "dot"]).assert().code(0).stdout_eq(str![[r#"
digraph "tiny" {
  rankdir=LR;
  node [shape=box, style=rounded, fontname="sans-serif"];
  edge [fontname="sans-serif", fontsize=10];
  n0 [label="make data"];
  n1 [label="train teacher/nclip"];
  n2 [label="train student/nstudent"];
  n3 [label="train student/nbaseline"];
  n4 [label="evaluate/nstudent zero_shot"];
  n5 [label="evaluate/nbaseline zero_shot"];
  n6 [label="evaluate/nclip zero_shot"];
  n7 [label="export"];
  n8 [label="report"];
  n0 -> n1 [label="data set"];
  n0 -> n2 [label="data set"];
  n0 -> n3 [label="data set"];
  n0 -> n4 [label="data set"];
  n0 -> n5 [label="data set"];
  n0 -> n6 [label="data set"];
  n1 -> n2 [label="teacher"];
  n1 -> n3 [label="teacher"];
  n1 -> n4 [label="teacher"];
  n1 -> n5 [label="teacher"];
  n1 -> n6 [label="teacher"];
  n1 -> n7 [label="teacher"];
  n1 -> n8 [label="teacher"];
  n2 -> n4 [label="student"];
  n2 -> n7 [label="student"];
  n2 -> n8 [label="student"];
  n3 -> n5 [label="student"];
  n3 -> n8 [label="student"];
  n4 -> n8 [label="scores"];
  n5 -> n8 [label="scores"];
  n6 -> n8 [label="scores"];
}

"#]]);
    let (code, svg, _) = bench.output(&["graph", "tiny.toml"]);
    assert_eq!(code, 0);
    assert!(svg.starts_with("<svg xmlns=") && svg.contains(">train student<"), "{svg}");
    assert_eq!(bench.output(&["graph", "tiny.toml", "-o", "graph.svg"]).0, 0);
    assert!(bench.path().join("graph.svg").is_file());
}

#[test]
fn list_knows_every_kind() {
    let bench = Bench::new();
    let (code, out, _) = bench.output(&["list"]);
    assert_eq!(code, 0);
    for name in
        ["mobilevit_xxs", "vit", "transformer", "logits", "adamw", "cosine", "zero_shot", "shapes", "train_student"]
    {
        assert!(out.contains(name), "{name}");
    }
    let (code, out, _) = bench.output(&["list", "vit", "--format", "json"]);
    assert_eq!(code, 0);
    let list: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(list[0]["parameters"]["properties"]["patch_size"]["default"], 16);
    bench.mcpipe(&["list", "nonsense"]).assert().code(2).stderr_eq(str![[r#"
mcpipe: error: `nonsense` is neither a kind nor a component; kinds: backbone, text-encoder, projection, level, augmentation, optimizer, schedule, evaluation, data-maker, stage, export

"#]]);
}

#[test]
fn export_says_what_it_lacks() {
    let bench = Bench::new();
    bench.mcpipe(&["export", ".", "-o", "out.safetensors"]).assert().code(2).stdout_eq(str![]).stderr_eq(str![[r#"
mcpipe: error: . holds no exported student; name `timm` in the pipeline's export.formats and run it again into this folder (finished stages are taken from the store)

"#]]);
    let (code, _, err) = bench.output(&["export", "--weights", "w.safetensors", "-o", "out.safetensors"]);
    assert_eq!(code, 2);
    assert!(err.contains("--backbone <NAME>"), "{err}");
    let unknown = ["export", "--weights", "w.safetensors", "--backbone", "fastvit_mci9", "-o", "out.safetensors"];
    let (code, _, err) = bench.output(&unknown);
    assert_ne!(code, 0);
    assert!(err.contains("did you mean `fastvit_mci"), "{err}");
    bench.write("w.safetensors", "no tensors");
    let of_file = ["export", "--weights", "w.safetensors", "--backbone", "fastvit_mci0", "-o", "out.safetensors"];
    for (args, words) in [
        (&["export", "none", "-o", "out.safetensors"][..], "none: can't open"),
        (&["export", "w.safetensors", "-o", "out.safetensors"], "w.safetensors is no weight file"),
        (&of_file, "w.safetensors is no weight file"),
    ] {
        let (code, _, err) = bench.output(args);
        assert!(code == 2 && err.contains(words), "{args:?}: {code} {err}");
    }
}
