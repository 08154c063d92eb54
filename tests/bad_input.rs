//! What is wrong with files and data is said clearly, with the place, the right exit code and no panic.

use std::fs;
use std::path::Path;

use snapbox::str;

mod common;
use common::{Bench, Sample, borrowed, good_samples, huge_png, labelled_set, png, shard};

/// A pipeline file over the labelled set in `set/`.
fn over_set(bench: &Bench) {
    bench.variant(
        "own.toml",
        "[data.make]\nkind = \"shapes\"\ntrain = 48\neval = 16\nimage_size = 32\n",
        "[data.train]\nshards = \"set/train/0.tar\"\non_bad_sample = \"fail\"\n",
    );
}

fn run_own(bench: &Bench) -> snapbox::cmd::OutputAssert {
    bench.mcpipe(&["run", "own.toml", "-q"]).assert()
}

#[test]
fn typo_in_a_key() {
    let bench = Bench::new();
    bench.variant("typo.toml", "batch_size = 8\nlog_every", "batch_sise = 8\nlog_every");
    bench.mcpipe(&["run", "typo.toml"]).assert().code(2).stderr_eq(str![[r#"
unknown-key

  x `[training]` has no key `batch_sise`
    ,-[typo.toml:41:1]
 40 | steps = 3
 41 | batch_sise = 8
    : ^^^^^|^^^^
    :      `-- did you mean `batch_size`?
 42 | log_every = 1
    `----
  help: keys of `[training]`: `steps`, `batch_size`, `accumulate`, `recompute`, `precision`, `clip_norm`,
        `log_every`, `checkpoint`, `non_finite`

1 error

"#]]);
}

#[test]
fn a_folder_for_a_pipeline() {
    let bench = Bench::new();
    bench.mcpipe(&["run", "."]).assert().code(2).stderr_eq(str![[r#"
unreadable

  x cannot read `.`: Is a directory (os error 21)
  help: expected a pipeline file: TOML in UTF-8

1 error

"#]]);
}

#[test]
fn a_missing_pipeline() {
    let bench = Bench::new();
    bench.mcpipe(&["check", "nowhere.toml"]).assert().code(2).stderr_eq(str![[r#"
unreadable

  x cannot read `nowhere.toml`: No such file or directory (os error 2)
  help: expected a pipeline file: TOML in UTF-8

1 error

"#]]);
}

#[test]
fn a_binary_for_a_pipeline() {
    let bench = Bench::new();
    bench.write("image.png", png(4));
    bench.mcpipe(&["plan", "image.png"]).assert().code(2).stderr_eq(str![[r#"
unreadable

  x `image.png` is no text file
  help: expected a pipeline file: TOML in UTF-8

1 error

"#]]);
}

#[test]
fn a_pipeline_that_is_not_utf8() {
    let bench = Bench::new();
    bench.write("latin1.toml", b"version = 1\nname = \"caf\xe9\"\n");
    bench.mcpipe(&["check", "latin1.toml"]).assert().code(2).stderr_eq(str![[r#"
unreadable

  x `latin1.toml` is not UTF-8 text
   ,-[latin1.toml:2:12]
 1 | version = 1
 2 | name = "caf�"
   :            ^
   `----
  help: expected a pipeline file: TOML in UTF-8

1 error

"#]]);
}

#[test]
fn bad_usage() {
    let bench = Bench::new();
    bench.mcpipe(&["run"]).assert().code(2);
    bench.mcpipe(&["run", "tiny.toml", "--threads", "0"]).assert().code(2);
    bench.mcpipe(&["run", "tiny.toml", "--set", "training.steps"]).assert().code(2).stderr_eq(str![[r#"
bad-override

  x the override `training.steps` has no `=`
   ,-[--set:1:14]
 1 | training.steps
   :              |
   :              `-- here
   `----
  help: expected `path=value`, as in `--set training.steps=100` or `--set teacher[0].dim=64`

1 error

"#]]);
}

#[test]
fn mistakes_of_shapes_and_files_come_together() {
    let bench = Bench::new();
    let text = common::TINY
        .replace("image_size = 32, params", "image_size = 30, params")
        .replace("[data.make]", "[data.train]\nshards = \"none/{0..2}.tar\"\n\n[data.make]");
    bench.write("many.toml", text);
    bench.mcpipe(&["check", "many.toml"]).assert().code(2).stderr_eq(str![[r#"
missing-file

  x 3 of 3 shards missing: none/0.tar, none/1.tar, none/2.tar
   ,-[many.toml:5:10]
 4 | [data.train]
 5 | shards = "none/{0..2}.tar"
   :          ^^^^^^^^|^^^^^^^^
   :                  `-- not found
 6 | 
   `----

image-size

  x `vit` cannot take images of 30x30 pixels
    ,-[many.toml:16:42]
 15 | kind = "train"
 16 | image = { backbone = "vit", image_size = 30, params = { patch_size = 16, width = 16, depth = 1, heads = 2 } }
    :                                          ^|
    :                                           `-- the side is a multiple of its 16-pixel patches
 17 | text = { encoder = "transformer", params = { width = 16, depth = 1, heads = 2, context_length = 12, frozen_embedding = true } }
    `----
  help: for example `image_size = 16` or `image_size = 32`

2 errors

"#]]);
}

#[test]
fn a_tap_that_a_model_lacks() {
    let bench = Bench::new();
    bench.variant(
        "taps.toml",
        "level = \"logits\"",
        "level = \"features\"\ntaps = [{ student = \"stage.3\", teacher = \"transformer.resblocks.7\" }]",
    );
    bench.mcpipe(&["check", "taps.toml"]).assert().code(2).stderr_eq(str![[r#"
unknown-tap

  x the student has no tap `stage.3`
    ,-[taps.toml:31:21]
 30 | level = "features"
 31 | taps = [{ student = "stage.3", teacher = "transformer.resblocks.7" }]
    :                     ^^^^|^^^^
    :                         `-- did you mean `stages.3`?
 32 | 
    `----
  help: its taps: `stem`, `stages.0`, `stages.1`, `stages.2.1.transformer.0.attn`,
        `stages.2.1.transformer.1.attn`, `stages.2`, `stages.3.1.transformer.0.attn`,
        `stages.3.1.transformer.1.attn`, `stages.3.1.transformer.2.attn`, `stages.3.1.transformer.3.attn`,
        `stages.3`, `stages.4.1.transformer.0.attn`, `stages.4.1.transformer.1.attn`,
        `stages.4.1.transformer.2.attn`, `stages.4`, `final_conv`

unknown-tap

  x teacher `clip` has no tap `transformer.resblocks.7`
    ,-[taps.toml:31:42]
 30 | level = "features"
 31 | taps = [{ student = "stage.3", teacher = "transformer.resblocks.7" }]
    :                                          ^^^^^^^^^^^^|^^^^^^^^^^^^
    :                                                      `-- did you mean `transformer.resblocks.0`?
 32 | 
    `----
  help: its taps: `transformer.resblocks.0.attn`, `transformer.resblocks.0`

2 errors

"#]]);
}

#[test]
fn dims_that_no_projection_joins() {
    let bench = Bench::new();
    bench.variant("dims.toml", "kind = \"linear\"", "kind = \"none\"");
    bench.mcpipe(&["check", "dims.toml"]).assert().code(2).stderr_eq(str![[r#"
dim-mismatch

  x the embedding of `mobilevit_xxs` has dimension 320, the text embedding has 16, and no projection joins
  | them
    ,-[dims.toml:27:8]
 26 | [projection]
 27 | kind = "none"
    :        ^^^|^^
    :           `-- 320 meets 16
 28 | 
    `----
  help: join them by a projection: `projection = { kind = "linear" }`

1 error

"#]]);
    bench.variant("dims.toml", "kind = \"linear\"", "kind = \"linear\"\ndim = 24");
    bench.mcpipe(&["check", "dims.toml"]).assert().code(2).stderr_eq(str![[r#"
dim-mismatch

  x the projection of the image embedding has dimension 24, the text embedding has 16, and no projection
  | joins them
    ,-[dims.toml:28:7]
 27 | kind = "linear"
 28 | dim = 24
    :       ^|
    :        `-- 24 meets 16
 29 | 
    `----
  help: give the projection the text's dimension (`dim = 16`), or send the text through it as well (`shared
        = true`)

1 error

"#]]);
}

#[test]
fn a_checkpoint_of_another_model() {
    let bench = Bench::new();
    let (code, _, err) = bench.output(&["run", "tiny.toml", "--out", "run", "-q"]);
    assert_eq!(code, 0, "{err}");
    let load = |weights: &str| {
        bench.variant(
            "load.toml",
            "kind = \"train\"\nimage",
            &format!("kind = \"load\"\nweights = \"{weights}\"\nimage"),
        );
        let text = fs::read_to_string(bench.path().join("load.toml")).expect("the file");
        bench.write("load.toml", text.replace("training = { steps = 2, batch_size = 8 }\n", ""));
        bench.mcpipe(&["check", "load.toml"]).assert()
    };
    load("run/checkpoints/clip/weights.safetensors").code(0);
    load("run/export/timm.safetensors").code(2).stderr_eq(str![[r#"
bad-file

  x run/export/timm.safetensors: the weights don't fit the model
    ,-[load.toml:13:11]
 12 | kind = "load"
 13 | weights = "run/export/timm.safetensors"
    :           ^^^^^^^^^^^^^^|^^^^^^^^^^^^^^
    :                         `-- weights of another model
 14 | image = { backbone = "vit", image_size = 32, params = { patch_size = 16, width = 16, depth = 1, heads = 2 } }
    `----
  help:   37 missing from the file:
            conv1.weight
            class_embedding
            positional_embedding
            ln_pre.weight
            ln_pre.bias
            transformer.resblocks.0.ln_1.weight
            transformer.resblocks.0.ln_1.bias
            transformer.resblocks.0.attn.in_proj_weight
            transformer.resblocks.0.attn.in_proj_bias
            transformer.resblocks.0.attn.out_proj.weight
            and 27 more
          279 not in the model:
            final_conv.bn.bias
            final_conv.bn.running_mean
            final_conv.bn.running_var
            final_conv.bn.weight
            final_conv.conv.weight
            head.fc.bias
            head.fc.weight
            stages.0.0.conv1_1x1.bn.bias
            stages.0.0.conv1_1x1.bn.running_mean
            stages.0.0.conv1_1x1.bn.running_var
            and 269 more

1 error

"#]]);
    load("tiny.toml").code(2).stderr_eq(str![[r#"
bad-file

  x tiny.toml is no weight file: neither safetensors nor a PyTorch checkpoint
    ,-[load.toml:13:11]
 12 | kind = "load"
 13 | weights = "tiny.toml"
    :           ^^^^^|^^^^^
    :                `-- cannot be used
 14 | image = { backbone = "vit", image_size = 32, params = { patch_size = 16, width = 16, depth = 1, heads = 2 } }
    `----

1 error

"#]]);
    load("none.safetensors").code(2).stderr_eq(str![[r#"
missing-file

  x there is no weight file `none.safetensors`
    ,-[load.toml:13:11]
 12 | kind = "load"
 13 | weights = "none.safetensors"
    :           ^^^^^^^^^|^^^^^^^^
    :                    `-- not found
 14 | image = { backbone = "vit", image_size = 32, params = { patch_size = 16, width = 16, depth = 1, heads = 2 } }
    `----
  help: a relative path starts at the folder of the pipeline file

1 error

"#]]);
}

#[test]
fn an_empty_tar() {
    let bench = Bench::new();
    borrowed(&good_samples(), |samples| labelled_set(&bench, samples));
    bench.write("set/train/0.tar", "");
    over_set(&bench);
    run_own(&bench).code(1).stderr_eq(str![[r#"
mcpipe: error: stage train_teacher clip: shard set/train/0.tar: the tar holds no members

"#]]);
}

#[test]
fn a_truncated_tar() {
    let bench = Bench::new();
    borrowed(&good_samples(), |samples| labelled_set(&bench, samples));
    let whole = fs::read(bench.path().join("set/train/0.tar")).expect("the tar");
    bench.write("set/train/0.tar", &whole[..2300]);
    over_set(&bench);
    run_own(&bench).code(1).stderr_eq(str![[r#"
mcpipe: error: stage train_teacher clip: shard set/train/0.tar: truncated: no end-of-archive marker after member `s0000000.png` (byte 2048)

"#]]);
    bench.mcpipe(&["data", "check", "set"]).assert().code(1).stdout_eq(str![[r#"
error[data::tar_truncated]: shard set/train/0.tar: truncated: no end-of-archive marker after member `s0000000.png` (byte 2048)
2 shards, 8 usable samples (8 with caption, 8 with class), 1 errors, 0 warnings

"#]]);
}

#[test]
fn a_missing_shard_and_a_missing_count() {
    let bench = Bench::new();
    borrowed(&good_samples(), |samples| labelled_set(&bench, samples));
    over_set(&bench);
    fs::remove_file(bench.path().join("set/test/nshards.txt")).expect("removed");
    bench.mcpipe(&["check", "own.toml"]).assert().code(2).stderr_eq(str![[r#"
missing-file

  x set/test/nshards.txt is missing; `mcpipe data index set/test` writes it
   ,-[own.toml:5:10]
 4 | [data.train]
 5 | shards = "set/train/0.tar"
   :          ^^^^^^^^|^^^^^^^^
   :                  `-- not found
 6 | on_bad_sample = "fail"
   `----

1 error

"#]]);
    bench.mcpipe(&["data", "index", "set"]).assert().code(0).stdout_eq(str![[r#"
set/test/nshards.txt: 1 shards
set/train/nshards.txt: 1 shards

"#]]);
    bench.mcpipe(&["check", "own.toml"]).assert().code(0);
    fs::remove_file(bench.path().join("set/train/0.tar")).expect("removed");
    bench.mcpipe(&["check", "own.toml"]).assert().code(2).stderr_eq(str![[r#"
missing-file

  x there is no shard `set/train/0.tar`
   ,-[own.toml:5:10]
 4 | [data.train]
 5 | shards = "set/train/0.tar"
   :          ^^^^^^^^|^^^^^^^^
   :                  `-- not found
 6 | on_bad_sample = "fail"
   `----
  help: the folder `set/train` exists, the shard does not
        a relative path starts at the folder of the pipeline file

1 error

"#]]);
}

/// The labelled set with one more training sample.
fn with_sample(bench: &Bench, key: &str, members: &[(&str, &[u8])]) {
    borrowed(&good_samples(), |samples| {
        labelled_set(bench, samples);
        let all: Vec<Sample<'_>> = samples.iter().copied().chain([(key, members)]).collect();
        bench.write("set/train/0.tar", shard(&all));
    });
    over_set(bench);
}

#[test]
fn a_corrupt_image() {
    let bench = Bench::new();
    let picture = png(16);
    with_sample(&bench, "broken", &[("png", &picture[..40]), ("txt", b"a red square")]);
    run_own(&bench).code(1).stderr_eq(str![[r#"
mcpipe: error: stage train_teacher clip: reading the training data failed at step 0: shard set/train/0.tar, sample `broken`: corrupt PNG image: unexpected end of file

"#]]);
}

#[test]
fn a_corrupt_image_is_skipped_where_the_file_says_so() {
    let bench = Bench::new();
    let picture = png(16);
    with_sample(&bench, "broken", &[("png", &picture[..40]), ("txt", b"a red square")]);
    let set = ["--set", "data.train.on_bad_sample=skip"];
    let (code, _, err) = bench.output(&["run", "own.toml", set[0], set[1]]);
    assert_eq!(code, 0, "{err}");
    assert!(err.contains("sample `broken`"), "{err}");
}

#[test]
fn a_huge_image() {
    let bench = Bench::new();
    with_sample(&bench, "huge", &[("png", &huge_png()), ("txt", b"a red square")]);
    run_own(&bench).code(1).stderr_eq(str![[r#"
mcpipe: error: stage train_teacher clip: reading the training data failed at step 0: shard set/train/0.tar, sample `huge`: image of 30000x30000 pixels, 67108864 allowed in all

"#]]);
}

#[test]
fn a_caption_that_is_not_utf8() {
    let bench = Bench::new();
    with_sample(&bench, "latin1", &[("png", &png(16)), ("txt", b"caf\xe9")]);
    run_own(&bench).code(1).stderr_eq(str![[r#"
mcpipe: error: stage train_teacher clip: reading the training data failed at step 0: shard set/train/0.tar, sample `latin1`: the caption is not UTF-8 (byte 3)

"#]]);
}

#[test]
fn an_over_long_caption_is_cut_and_an_absurd_one_refused() {
    let bench = Bench::new();
    with_sample(&bench, "long", &[("png", &png(16)), ("txt", "red ".repeat(500).as_bytes())]);
    run_own(&bench).code(0);
    with_sample(&bench, "endless", &[("png", &png(16)), ("txt", "red ".repeat(50_000).as_bytes())]);
    run_own(&bench).code(1).stderr_eq(str![[r#"
mcpipe: error: stage train_teacher clip: reading the training data failed at step 0: shard set/train/0.tar, sample `endless`: the caption has 200000 bytes, 65536 allowed

"#]]);
}

#[test]
fn classes_beyond_the_list() {
    let bench = Bench::new();
    let mut samples = good_samples();
    samples[3].1[0].1 = b"7".to_vec();
    borrowed(&samples, |samples| labelled_set(&bench, samples));
    over_set(&bench);
    run_own(&bench).code(1).stderr_eq(str![[r#"
mcpipe: error: stage evaluate student zero_shot: shard set/test/0.tar, sample `s0000003`: class index 7, but the class list has 2 names

"#]]);
    bench.mcpipe(&["data", "check", "set", "--format", "json"]).assert().code(1);
}

#[test]
fn a_run_directory_of_something_else() {
    let bench = Bench::new();
    bench.write("mine/letter.txt", "dear");
    bench.mcpipe(&["run", "tiny.toml", "--out", "mine"]).assert().code(2).stderr_eq(str![[r#"
mcpipe: error: mine holds files of something else; give an empty or a new folder, or one of an earlier run

"#]]);
    bench.mcpipe(&["run", "tiny.toml", "--out", "tiny.toml/x"]).assert().code(1).stderr_eq(str![[r#"
mcpipe: error: cannot write tiny.toml/x: Not a directory (os error 20)

"#]]);
}

#[test]
fn a_full_standard_output() {
    if Path::new("/dev/full").exists() {
        let full = fs::OpenOptions::new().write(true).open("/dev/full").expect("/dev/full");
        let status = std::process::Command::new(snapbox::cmd::cargo_bin!("mcpipe"))
            .arg("schema")
            .stdout(full)
            .stderr(std::process::Stdio::null())
            .status()
            .expect("mcpipe starts");
        assert_eq!(status.code(), Some(1));
    }
}

#[test]
fn a_reader_that_goes_away() {
    let bench = Bench::new();
    let mut child = std::process::Command::new(snapbox::cmd::cargo_bin!("mcpipe"))
        .current_dir(bench.path())
        .arg("schema")
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("mcpipe starts");
    drop(child.stdout.take());
    let output = child.wait_with_output().expect("its end");
    assert_eq!(String::from_utf8_lossy(&output.stderr), "");
    assert_eq!(output.status.code(), Some(0));
}

/// A small file system of its own, gone with the value. Needs root; tests that can't have one say so and pass.
struct Mount(std::path::PathBuf);

impl Mount {
    fn new(at: &Path, options: &str) -> Option<Self> {
        fs::create_dir_all(at).expect("a folder");
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", options, "tmpfs"])
            .arg(at)
            .stderr(std::process::Stdio::null())
            .status()
            .is_ok_and(|status| status.success());
        if !mounted {
            eprintln!("skipped: no file system can be mounted here");
        }
        mounted.then(|| Self(at.to_owned()))
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(&self.0).status();
    }
}

#[test]
fn a_full_disk() {
    let bench = Bench::new();
    let store = bench.path().join("small");
    let Some(_mount) = Mount::new(&store, "size=600k") else { return };
    let (code, _, err) = bench.output(&["run", "tiny.toml", "--store", "small", "-q"]);
    assert_eq!(code, 1, "{err}");
    assert!(err.contains("No space left on device") && err.contains("stage "), "{err}");
    // Nothing that is half-written counts as a result.
    for entry in fs::read_dir(&store).expect("the store") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        let whole = path.is_dir() && !name.ends_with(".partial");
        assert!(!whole || path.join("done.json").is_file(), "{name}");
    }
    let (code, _, err) = bench.output(&["run", "tiny.toml", "-q"]);
    assert_eq!(code, 0, "{err}");
}

#[test]
fn a_read_only_run_directory() {
    let bench = Bench::new();
    let dir = bench.path().join("locked");
    let Some(_mount) = Mount::new(&dir, "ro,size=600k") else { return };
    bench.mcpipe(&["run", "tiny.toml", "--out", "locked/run"]).assert().code(1).stderr_eq(str![[r#"
mcpipe: error: cannot write locked/run: Read-only file system (os error 30); choose another folder by --store and --out

"#]]);
    bench.mcpipe(&["run", "tiny.toml", "--store", "locked", "--out", "run"]).assert().code(1).stderr_eq(str![[r#"
mcpipe: error: stage make_data: cannot write locked/make_data-[..].lock: Read-only file system (os error 30); choose another folder by --store and --out

"#]]);
}
