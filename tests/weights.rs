//! Weight files through the binary: looked into, converted, and as what a student starts from.

use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;
use snapbox::str;

mod common;
use common::Bench;

/// A bench with a fixture of the models' tests.
fn with(names: &[&str]) -> Bench {
    let bench = Bench::new();
    for name in names {
        let from = Path::new(env!("CARGO_MANIFEST_DIR")).join("engine/models/tests/fixtures/checkpoints").join(name);
        fs::copy(from, bench.path().join(name)).expect("copied");
    }
    bench
}

/// Values of an f32 tensor in a safetensors file.
fn values(file: &Path, name: &str) -> Vec<f32> {
    let bytes = fs::read(file).expect("a file");
    let header = u64::from_le_bytes(bytes[..8].try_into().expect("8 bytes")) as usize;
    let info: Value = serde_json::from_slice(&bytes[8..8 + header]).expect("JSON");
    let at = |i: usize| info[name]["data_offsets"][i].as_u64().expect("a tensor") as usize + 8 + header;
    bytes[at(0)..at(1)].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

#[test]
fn inspect_shows_what_a_file_holds() {
    let bench = with(&["nested.pt", "legacy_gz.pt"]);
    bench.mcpipe(&["weights", "inspect", "nested.pt"]).assert().code(0).stdout_eq(str![[r#"
tensor            type   shape  elements
────────────────  ────  ──────  ────────
scale              F32      []         1
stem.conv.bias     F32     [2]         2
stem.conv.weight   F32  [2, 3]         6

3 tensors (F32), 9 elements, 36 bytes
file: PyTorch zip archive; weights under `state_dict`; `module.` stripped from names
fits: no registered backbone

"#]]);
    let (code, out, err) = bench.output(&["weights", "inspect", "legacy_gz.pt", "--format", "json"]);
    assert_eq!((code, err.as_str()), (0, ""));
    let found: Value = serde_json::from_str(&out).expect("JSON");
    assert_eq!(found["gzipped"], true);
    assert_eq!(found["elements"], 9);
    assert_eq!(found["tensors"][2], serde_json::json!({"name": "stem.conv.weight", "dtype": "F32", "shape": [2, 3]}));
}

#[test]
fn files_that_would_run_something_are_refused() {
    let bench = with(&["malicious.pt", "module.pt"]);
    for command in
        [&["weights", "inspect", "malicious.pt"][..], &["weights", "convert", "malicious.pt", "out.safetensors"]]
    {
        bench.mcpipe(command).assert().code(2).stdout_eq(str![]).stderr_eq(str![[r#"
mcpipe: error: malicious.pt: refused: data.pkl, byte 340: the file asks for `posix.system`; nothing of a checkpoint is executed, and only tensors and plain values are read

"#]]);
    }
    assert!(!bench.path().join("out.safetensors").exists());
    let (code, _, err) = bench.output(&["weights", "inspect", "module.pt"]);
    assert!(code == 2 && err.contains("`torch.nn.modules.linear.Linear`"), "{err}");
    let (code, _, err) = bench.output(&["weights", "inspect", "none.pt"]);
    assert!(code == 2 && err.contains("none.pt"), "{err}");
}

#[test]
fn convert_writes_what_was_asked_for() {
    let bench = with(&["nested.pt"]);
    let convert = |args: &[&str]| {
        let args: Vec<&str> =
            ["weights", "convert", "nested.pt", "out.safetensors"].iter().chain(args).copied().collect();
        bench.output(&args)
    };
    let (code, out, err) = convert(&[]);
    assert_eq!((code, out.as_str(), err.as_str()), (0, "out.safetensors: 4 tensors\n", ""));
    let file = bench.path().join("out.safetensors");
    let weight: Vec<f32> = (0..6).map(|i| (f64::from(i) * 0.37 - 3.0) as f32).collect();
    assert_eq!(values(&file, "stem.conv.weight"), weight);
    let (code, out, _) = convert(&["--include", "stem.*", "--dtype", "bf16"]);
    assert_eq!((code, out.as_str()), (0, "out.safetensors: 2 tensors\n"));
    assert_eq!(fs::read(&file).expect("a file").len() % 8, 0);
    for (args, expected) in [
        (&["--to", "timm"][..], "--backbone"),
        (&["--backbone", "mobilevit_xxs"], "missing from the file"),
        (&["--backbone", "mobilevit_xx"], "did you mean"),
        (&["--include", "head.*"], "names no parameter"),
    ] {
        let (code, _, err) = convert(args);
        assert!(code == 2 && err.contains(expected), "{args:?}: {err}");
    }
    let (code, _, err) = bench.output(&["weights", "convert", "nested.pt", "no/such/folder/out.safetensors"]);
    assert!(code == 1 && err.contains("no/such/folder"), "{err}");
}

const STUDENT: &str = "backbone = \"mobilevit_xxs\"\nimage_size = 64\nbaseline = true\n";

/// The trained trunk of one run, and a pipeline file whose student starts from it.
fn trained() -> (Bench, PathBuf) {
    let bench = Bench::new();
    bench.variant("first.toml", "baseline = true\n", "");
    let (code, _, err) = bench.output(&["run", "first.toml", "-q", "--out", "one"]);
    assert_eq!(code, 0, "{err}");
    let file = bench.path().join("one/export/timm.safetensors");
    (bench, file)
}

#[test]
fn a_student_starts_from_a_file() {
    let (bench, file) = trained();
    let (code, out, _) = bench.output(&["weights", "inspect", "one/export/timm.safetensors"]);
    assert!(code == 0 && out.contains("fits: mobilevit_xxs exactly, with a head of 16 outputs"), "{out}");
    let (code, out, err) = bench.output(&[
        "weights",
        "convert",
        "one/export/timm.safetensors",
        "clip.safetensors",
        "--to",
        "open_clip",
        "--backbone",
        "mobilevit_xxs",
    ]);
    assert_eq!((code, err.as_str()), (0, ""), "{out}");
    let student =
        |weights: &str, more: &str| STUDENT.replace("baseline = true\n", &format!("{more}weights = {weights}\n"));
    let table = "{ path = \"clip.safetensors\", resize = [\"head\"], exclude = [\"stages.4.*\"] }";
    bench.variant("next.toml", STUDENT, &student(table, ""));
    // A step so small that it changes nothing.
    let run = ["run", "next.toml", "--out", "two", "--set", "optimizer.lr=1e-12"];
    let (code, _, err) = bench.output(&run);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("starts from ") && err.contains("clip.safetensors: "), "{err}");
    let next = bench.path().join("two/export/timm.safetensors");
    let (kept, new) = ("stages.3.0.conv2_kxk.conv.weight", "stages.4.0.conv2_kxk.conv.weight");
    let far = |name: &str| {
        let (a, b) = (values(&file, name), values(&next, name));
        a.iter().zip(&b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
    };
    assert!(far(kept) < 1e-6 && far(new) > 1e-4, "{} {}", far(kept), far(new));

    // The resolved pipeline names its files so that it is the same run from another folder.
    let elsewhere = bench.path().join("elsewhere");
    fs::create_dir(&elsewhere).expect("a folder");
    let again = ["run", "../two/spec.toml", "--store", "../.mcpipe/store", "--out", "three", "--format", "json", "-q"];
    let output = bench.mcpipe(&again).current_dir(&elsewhere).output().expect("mcpipe starts");
    let err = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(0), "{err}");
    let results: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    assert_eq!(results["results"]["ran"], 1, "the report, which shows the paths: {results}");
    let spec = |dir: &str| fs::read(bench.path().join(dir).join("spec.toml")).expect("the pipeline");
    assert_eq!(spec("two"), spec("elsewhere/three"));
}

#[test]
fn weights_that_do_not_fit_are_shown_at_their_line() {
    let (bench, _) = trained();
    let check = |name: &str, from: &str, to: &str| {
        bench.variant(name, from, to);
        bench.mcpipe(&["check", name])
    };
    let student = |weights: &str| STUDENT.replace("baseline = true\n", &format!("weights = {weights}\n"));
    let timm = "\"one/export/timm.safetensors\"";
    check("none.toml", STUDENT, &student("\"absent.pt\"")).assert().code(2).stderr_eq(str![[r#"
missing-file

  x there is no weight file `absent.pt`
    ,-[none.toml:21:11]
 20 | image_size = 64
 21 | weights = "absent.pt"
    :           ^^^^^|^^^^^
    :                `-- not found
 22 | 
    `----
  help: a relative path starts at the folder of the pipeline file

1 error

"#]]);
    check("head.toml", STUDENT, &student(timm)).assert().code(2).stderr_eq(str![[r#"
bad-file

  x one/export/timm.safetensors: the weights don't fit the model
    ,-[head.toml:21:11]
 20 | image_size = 64
 21 | weights = "one/export/timm.safetensors"
    :           ^^^^^^^^^^^^^^|^^^^^^^^^^^^^^
    :                         `-- weights of another model
 22 | 
    `----
  help:   2 not in the model:
            head.fc.bias
            head.fc.weight
          `resize = ["head"]` leaves the file's head and starts the model's own anew

1 error

"#]]);
    let other = student(&format!("{{ path = {timm}, resize = [\"head\"] }}")).replace("mobilevit_xxs", "mobilevit_xs");
    let output = check("other.toml", STUDENT, &other).output().expect("mcpipe starts");
    let err = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(
        output.status.code() == Some(2) && err.contains("of another shape") && err.contains("other.toml:21"),
        "{err}"
    );
    let pattern = student(&format!("{{ path = {timm}, resize = [\"head\"], include = [\"stem.*\", \"stagse.*\"] }}"));
    check("pattern.toml", STUDENT, &pattern).assert().code(2).stderr_eq(str![[r#"
unknown-value

  x the pattern names no parameter of `mobilevit_xxs`
    ,-[pattern.toml:21:91]
 20 | image_size = 64
 21 | weights = { path = "one/export/timm.safetensors", resize = ["head"], include = ["stem.*", "stagse.*"] }
    :                                                                                           ^^^^^|^^^^
    :                                                                                                `-- no such parameter
 22 | 
    `----
  help: `*` stands for any characters: `stages.*`; `mcpipe weights inspect FILE` lists the names of a file

1 error

"#]]);
    let key = student(&format!("{{ path = {timm}, resize = [\"neck\"] }}"));
    check("key.toml", STUDENT, &key).assert().code(2).stderr_eq(str![[r#"
unknown-value

  x `student.weights.resize[0]` does not take `neck`
    ,-[key.toml:21:61]
 20 | image_size = 64
 21 | weights = { path = "one/export/timm.safetensors", resize = ["neck"] }
    :                                                             ^^^|^^
    :                                                                `-- not a value of this key
 22 | 
    `----
  help: values: `head`, `position`

1 error

"#]]);
    // A larger model of the family gives its layers and channels.
    let inherit = student("{ path = \"clip.safetensors\", inherit = true, resize = [\"head\"] }");
    let larger = student("{ path = \"clip.safetensors\", inherit = true }").replace("mobilevit_xxs", "mobilevit_xs");
    let convert = ["weights", "convert", "one/export/timm.safetensors", "clip.safetensors", "--to", "open_clip"];
    assert_eq!(bench.output(&convert).0, 0);
    check("same.toml", STUDENT, &inherit).assert().code(0);
    let output = check("larger.toml", STUDENT, &larger).output().expect("mcpipe starts");
    assert_eq!(output.status.code(), Some(2));
}
