//! `mcpipe embed` and `mcpipe classify`: what a finished run's student says of images and texts.

use std::fs;
use std::path::Path;

use serde_json::Value;
use snapbox::str;

mod common;
use common::{Bench, borrowed, good_samples, metadata, png, shard, tensor};

/// A folder with a finished run in `one`, and eight images in `images` and in `shard.tar`.
fn trained() -> Bench {
    let bench = Bench::new();
    ran(&bench, "tiny.toml", "one");
    let samples = good_samples();
    for (key, members) in &samples {
        let (_, image) = members.iter().find(|(extension, _)| *extension == "png").expect("an image");
        bench.write(&format!("images/{key}.png"), image);
    }
    bench.write("shard.tar", borrowed(&samples, shard));
    bench
}

fn ran(bench: &Bench, file: &str, out: &str) {
    let (code, _, err) = bench.output(&["run", file, "--out", out, "-q", "--set", "student.baseline=false"]);
    assert_eq!(code, 0, "{err}");
}

/// Runs a command that must succeed and gives its standard output.
fn done(bench: &Bench, args: &[&str]) -> String {
    let (code, out, err) = bench.output(args);
    assert_eq!((code, err.as_str()), (0, ""), "{args:?}");
    out
}

fn embedding(bench: &Bench, file: &str) -> (Vec<usize>, Vec<f32>) {
    tensor(&bench.path().join(file), "embedding")
}

/// Values of an npy file that mcpipe wrote: its header takes 128 bytes.
fn npy(path: &Path) -> Vec<f32> {
    let bytes = fs::read(path).expect("a file");
    assert!(bytes.starts_with(b"\x93NUMPY\x01\x00\x76\x00{'descr': '<f4', 'fortran_order': False, "));
    bytes[128..].as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
}

fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

fn dot(a: &[f32], b: &[f32]) -> f32 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

#[test]
fn images_come_from_files_folders_shards_and_tensors() {
    let bench = trained();
    let tap = "stages.2.1.transformer.0.attn";
    let out = done(&bench, &["embed", "one", "images", "-o", "a.safetensors", "--tap", "stages.2", "--tap", tap]);
    assert_eq!(out, format!("a.safetensors: embedding [8, 16], stages.2 [8, 8, 8, 48], {tap} [32, 4, 16, 16]\n"));
    let (shape, folder) = embedding(&bench, "a.safetensors");
    assert_eq!(shape, [8, 16]);
    assert!(folder.chunks(16).all(|row| (dot(row, row) - 1.0).abs() < 1e-5), "of length 1");
    let a = bench.path().join("a.safetensors");
    let names: Vec<String> = serde_json::from_str(&metadata(&a, "names")).expect("names");
    assert_eq!((names.len(), names[1].as_str()), (8, "images/s0000001.png"));
    let (shape, attention) = tensor(&a, tap);
    assert_eq!(shape, [32, 4, 16, 16]);
    assert!(attention.chunks(16).all(|row| (row.iter().sum::<f32>() - 1.0).abs() < 1e-5), "rows of attention");
    assert_eq!(tensor(&a, "stages.2").0, [8, 8, 8, 48]);

    // The same images from a shard, and by braces; another batch is the same to rounding.
    done(&bench, &["embed", "one", "shard.tar", "-o", "b.safetensors"]);
    assert_eq!(embedding(&bench, "b.safetensors").1, folder);
    let names: Vec<String> =
        serde_json::from_str(&metadata(&bench.path().join("b.safetensors"), "names")).expect("names");
    assert_eq!(names[7], "shard.tar:s0000007");
    done(&bench, &["embed", "one", "images/s000000{0..7}.png", "-o", "c.npy", "--batch", "3"]);
    assert!(worst(&npy(&bench.path().join("c.npy")), &folder) < 1e-6);
    assert_eq!(
        fs::read_to_string(bench.path().join("c.npy.txt")).expect("names").lines().next(),
        Some("images/s0000000.png")
    );

    // MobileViT takes values from 0 to 1, and images of its own size are not resized: the tensor is known.
    bench.write("grey.png", png(64));
    done(&bench, &["embed", "one", "grey.png", "-o", "grey.safetensors", "--no-normalize"]);
    let (_, grey) = embedding(&bench, "grey.safetensors");
    assert!((dot(&grey, &grey) - 1.0).abs() > 1e-3, "not of length 1");
    let factor = 1.0_f32 / 255.0;
    for (shape, file) in [("(1, 64, 64, 3)", "last.npy"), ("(1, 3, 64, 64)", "first.npy")] {
        let dict = format!("{{'descr': '<f4', 'fortran_order': False, 'shape': {shape}, }}\n");
        let mut bytes = b"\x93NUMPY\x01\x00".to_vec();
        bytes.extend((dict.len() as u16).to_le_bytes());
        bytes.extend(dict.bytes());
        bytes.extend(std::iter::repeat_n((90.0 * factor).to_le_bytes(), 64 * 64 * 3).flatten());
        bench.write(file, bytes);
        done(&bench, &["embed", "one", "--raw", file, "-o", "raw.safetensors", "--no-normalize"]);
        assert_eq!(embedding(&bench, "raw.safetensors").1, grey, "to the last bit: {file}");
    }
    // What a file exported for timm holds is the same model, its projection folded into the head.
    let timm = "one/export/timm.safetensors";
    let weights = ["--backbone", "mobilevit_xxs", "--image-size", "64", "--weights", timm];
    done(&bench, &[&["embed"], &weights[..], &["images", "-o", "d.safetensors"]].concat());
    assert!(worst(&embedding(&bench, "d.safetensors").1, &folder) < 1e-5);
    done(&bench, &["embed", timm, "images", "-o", "e.safetensors"]);
    assert_eq!(embedding(&bench, "e.safetensors"), embedding(&bench, "d.safetensors"));
}

#[test]
fn a_tensor_with_channels_first_is_turned() {
    let bench = trained();
    // Values that tell every place and channel apart, in both orders.
    let value = |y: usize, x: usize, c: usize| ((y * 64 + x) * 3 + c) as f32 / (64.0 * 64.0 * 3.0);
    let all = |n: usize| (0..n).flat_map(move |a| (0..64).flat_map(move |b| (0..64).map(move |c| (a, b, c))));
    let first: Vec<f32> = all(3).map(|(c, y, x)| value(y, x, c)).collect();
    let last: Vec<f32> =
        all(1).flat_map(|(_, y, x)| (0..3).map(move |c| (y, x, c))).map(|(y, x, c)| value(y, x, c)).collect();
    for (name, shape, values) in [("first", "[1,3,64,64]", first), ("last", "[1,64,64,3]", last)] {
        let header = format!(r#"{{"x":{{"dtype":"F32","shape":{shape},"data_offsets":[0,{}]}}}}"#, 4 * values.len());
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.bytes());
        bytes.extend(values.iter().flat_map(|v| v.to_le_bytes()));
        bench.write(&format!("{name}.safetensors"), bytes);
        let (from, to) = (format!("{name}.safetensors"), format!("{name}.out.safetensors"));
        done(&bench, &["embed", "one", "--raw", &from, "-o", &to]);
    }
    assert_eq!(embedding(&bench, "first.out.safetensors"), embedding(&bench, "last.out.safetensors"));
}

#[test]
fn classify_agrees_with_the_embeddings() {
    let bench = trained();
    let classes = ["red square", "blue circle", "green star"];
    let prompts: Vec<String> = classes.iter().flat_map(|c| [format!("a {c}"), format!("a photo of a {c}")]).collect();
    bench.write("prompts.txt", prompts.join("\n"));
    bench.write("classes.txt", classes.join("\n"));
    done(&bench, &["embed", "one", "--texts-from", "prompts.txt", "-o", "prompts.safetensors"]);
    let (shape, texts) = embedding(&bench, "prompts.safetensors");
    assert_eq!(shape, [6, 16]);
    done(&bench, &["embed", "one", "--texts", &prompts[0], &prompts[1], "-o", "two.npy"]);
    assert!(worst(&npy(&bench.path().join("two.npy")), &texts[..32]) < 1e-6);
    done(&bench, &["embed", "one", "images", "-o", "images.safetensors"]);
    let (_, images) = embedding(&bench, "images.safetensors");
    let scale = tensor(&bench.path().join("one/checkpoints/student/weights.safetensors"), "logit_scale").1[0].exp();
    // A class is the mean of its prompts, on the sphere again.
    let class = |pair: &[f32]| -> Vec<f32> {
        let mean: Vec<f32> = (0..16).map(|i| (pair[i] + pair[16 + i]) / 2.0).collect();
        let norm = dot(&mean, &mean).sqrt();
        mean.into_iter().map(|v| v / norm).collect()
    };
    let weights: Vec<Vec<f32>> = texts.chunks(32).map(class).collect();

    let templates = ["--template", "a {c}", "--template", "a photo of a {c}"];
    let args = [&["classify", "one", "images", "--classes-from", "classes.txt", "--format", "json"], &templates[..]];
    let found: Value = serde_json::from_str(&done(&bench, &args.concat())).expect("JSON");
    let found = found.as_array().expect("a list");
    assert_eq!(found.len(), 8);
    for (one, image) in found.iter().zip(images.chunks(16)) {
        let top = one["top"].as_array().expect("classes");
        let number = |guess: &Value, key: &str| guess[key].as_f64().expect("a number");
        assert!((top.iter().map(|guess| number(guess, "probability")).sum::<f64>() - 1.0).abs() < 1e-6);
        assert!(top.is_sorted_by(|a, b| number(a, "probability") >= number(b, "probability")));
        let cosines: Vec<f32> = weights.iter().map(|class| dot(image, class)).collect();
        let sum: f32 = cosines.iter().map(|cosine| (scale * cosine).exp()).sum();
        for guess in top {
            let at = classes.iter().position(|c| guess["class"] == *c).expect("a class");
            assert!((number(guess, "cosine") - f64::from(cosines[at])).abs() < 1e-5);
            let expected = (scale * cosines[at]).exp() / sum;
            assert!((number(guess, "probability") - f64::from(expected)).abs() < 1e-4);
        }
    }
    let best = found[0]["top"][0]["class"].as_str().expect("a class");
    let text = done(
        &bench,
        &[
            &["classify", "one", "images/s0000000.png", "--classes", "red square,blue circle,green star", "--top", "1"],
            &templates[..],
        ]
        .concat(),
    );
    assert!(text.starts_with("images/s0000000.png\n") && text.ends_with(&format!(" %  {best}\n")), "{text}");

    // The exported model says the same: its own text tower, or that of another file.
    let exported = "one/export/open_clip/open_clip_model.safetensors";
    let weights = [
        "--backbone",
        "mobilevit_xxs",
        "--image-size",
        "64",
        "--weights",
        "one/export/timm.safetensors",
        "--text-weights",
        exported,
    ];
    for model in [&[exported][..], &weights] {
        let args = [&["classify"], model, &["images", "--classes-from", "classes.txt", "--format", "json"], &templates];
        let other: Value = serde_json::from_str(&done(&bench, &args.concat())).expect("JSON");
        for (a, b) in found.iter().zip(other.as_array().expect("a list")) {
            for (a, b) in a["top"].as_array().expect("classes").iter().zip(b["top"].as_array().expect("classes")) {
                assert_eq!(a["class"], b["class"]);
                let p = |guess: &Value| guess["probability"].as_f64().expect("a number");
                assert!((p(a) - p(b)).abs() < 1e-4, "{a} {b}");
            }
        }
    }
}

#[test]
fn every_projection_and_text_side_is_understood() {
    let bench = trained();
    done(&bench, &["embed", "one", "--texts", "a blue circle", "-o", "one.safetensors"]);
    let exported = "export/open_clip/open_clip_model.safetensors";
    for (name, projection) in [("mlp", "kind = \"mlp\"\nhidden = 32"), ("shared", "kind = \"linear\"\nshared = true")] {
        bench.variant(&format!("{name}.toml"), "kind = \"linear\"", projection);
        ran(&bench, &format!("{name}.toml"), name);
        for inputs in [&["images"][..], &["--texts", "a blue circle", "a red square"]] {
            for (model, out) in [(name.to_owned(), "run"), (format!("{name}/{exported}"), "file")] {
                done(&bench, &[&["embed", &model], inputs, &["-o", &format!("{out}.safetensors")]].concat());
            }
            let (run, file) = (embedding(&bench, "run.safetensors"), embedding(&bench, "file.safetensors"));
            assert!(run.0 == file.0 && worst(&run.1, &file.1) < 1e-5, "{name}: {inputs:?}");
        }
    }
    // Weights alone don't tell a text tower's heads where these are not of CLIP's width.
    fs::copy(bench.path().join("one").join(exported), bench.path().join("bare.safetensors")).expect("copied");
    let bare =
        ["embed", "--backbone", "mobilevit_xxs", "--image-size", "64", "--weights", "bare.safetensors", "--texts"];
    let bare = [&bare[..], &["a blue circle", "-o", "bare.out.safetensors"]].concat();
    let (code, _, err) = bench.output(&bare);
    assert!(code == 2 && err.contains("don't tell its heads"), "{err}");
    done(&bench, &[&bare[..], &["--text-params", "heads = 2"]].concat());
    assert_eq!(embedding(&bench, "bare.out.safetensors"), embedding(&bench, "one.safetensors"));
    done(&bench, &[&bare[..], &["--text-params", "heads = 4"]].concat());
    assert_ne!(embedding(&bench, "bare.out.safetensors"), embedding(&bench, "one.safetensors"));

    // A teacher from a file, with and without an export beside it.
    fs::copy(bench.path().join("one/checkpoints/clip/weights.safetensors"), bench.path().join("clip.safetensors"))
        .expect("copied");
    let toml = common::TINY
        .replacen("kind = \"train\"", "kind = \"load\"\nweights = \"clip.safetensors\"", 1)
        .replacen("training = { steps = 2, batch_size = 8 }\n", "", 1)
        .replacen("[student]", "[export]\nformats = [\"open_clip\"]\n\n[student]", 1);
    bench.write("load.toml", toml);
    ran(&bench, "load.toml", "load");
    let texts = ["embed", "load", "--texts", "a blue circle", "-o", "load.safetensors"];
    done(&bench, &texts);
    assert_eq!(embedding(&bench, "load.safetensors"), embedding(&bench, "one.safetensors"));
    fs::remove_file(bench.path().join("clip.safetensors")).expect("removed");
    done(&bench, &texts);
    assert_eq!(embedding(&bench, "load.safetensors"), embedding(&bench, "one.safetensors"));
    fs::remove_dir_all(bench.path().join("load/export")).expect("removed");
    bench.mcpipe(&texts).assert().code(2).stderr_eq(str![[r#"
mcpipe: error: the text tower's weights, [..]/clip.safetensors, are not there; the run's spec.toml says where they are looked for

"#]]);
}

#[test]
fn what_can_not_be_used_is_named() {
    let bench = trained();
    let mut broken = fs::read(bench.path().join("images/s0000003.png")).expect("an image");
    broken.truncate(broken.len() / 2);
    bench.write("images/s0000003.png", &broken);
    bench.write("broken.tar", shard(&[("good", &[("png", &png(8))]), ("bad", &[("png", &broken)])]));
    let refused = |code: i32, args: &[&str], words: &[&str]| {
        let (found, out, err) = bench.output(args);
        assert_eq!((found, out.as_str()), (code, ""), "{args:?}: {err}");
        for word in words {
            assert!(err.contains(word), "`{word}` is not in\n{err}");
        }
    };
    bench.write("old.npy", "old");
    refused(1, &["embed", "one", "images", "-o", "old.npy", "--batch", "2"], &["images/s0000003.png", "corrupt PNG"]);
    assert_eq!(fs::read(bench.path().join("old.npy")).expect("kept"), b"old");
    assert!(!bench.path().join("old.npy.txt").exists());
    refused(1, &["embed", "one", "broken.tar", "-o", "out.npy"], &["shard broken.tar, sample `bad`", "corrupt PNG"]);
    refused(1, &["embed", "one", "none.png", "-o", "out.npy"], &["cannot read none.png"]);
    refused(1, &["classify", "one", "images", "--classes", "a,b"], &["images/s0000003.png"]);
    let tap = ["embed", "one", "shard.tar", "-o", "out.safetensors", "--tap", "stage.2"];
    refused(2, &tap, &["no tap `stage.2`", "did you mean `stages.2`?"]);
    refused(2, &["embed", "one", "shard.tar", "-o", "out.npy", "--tap", "stem"], &["the embedding alone"]);
    refused(2, &["embed", "one", "shard.tar", "-o", "out.txt"], &[".safetensors or an .npy"]);
    refused(2, &["embed", "one", "shard.tar", "-o", "none/out.npy"], &["no folder none"]);
    refused(2, &["embed", "images", "shard.tar", "-o", "out.npy"], &["images is no run directory"]);
    refused(2, &["embed", "shard.tar", "images", "-o", "out.npy"], &["shard.tar is a tar archive"]);
    refused(2, &["embed", "one", "-o", "out.npy"], &["give images behind the model"]);
    refused(2, &["embed", "one", "--raw", "old.npy", "-o", "out.npy"], &["old.npy: not an npy file"]);
    let timm = "one/export/timm.safetensors";
    refused(2, &["embed", "one", "--raw", timm, "-o", "out.npy"], &["one tensor is expected"]);
    refused(2, &["embed", timm, "--texts", "a", "-o", "out.npy"], &["no text tower", "--text-weights"]);
    let other = ["embed", "--backbone", "vit", "--weights", timm, "shard.tar", "-o", "out.npy"];
    refused(2, &other, &["the weights don't fit the model"]);
    let unknown = ["embed", "--backbone", "mobilevit_xsx", "--weights", timm, "shard.tar", "-o", "out.npy"];
    refused(2, &unknown, &["did you mean `mobilevit_xs"]);
    let classify =
        |rest: &[&str], words: &[&str]| refused(2, &[&["classify", "one", "shard.tar"], rest].concat(), words);
    classify(&["--classes", "a,b", "--template", "a photo"], &["lacks the placeholder `{c}`"]);
    classify(&["--classes", "a,b,a"], &["`a` is given twice"]);
    classify(&["--classes", "a,"], &["empty name"]);
    classify(&["--classes-from", "none.txt"], &["none.txt", "the class names, one a line"]);
    refused(2, &["embed", "one", "--texts-from", "none.txt", "-o", "out.npy"], &["none.txt", "the texts, one a line"]);
    classify(&[], &["--classes"]);
    fs::remove_file(bench.path().join("one/checkpoints/student/weights.safetensors")).expect("removed");
    refused(2, &["embed", "one", "shard.tar", "-o", "out.npy"], &["one holds no trained student"]);
    assert!(!bench.path().join("out.npy").exists() && !bench.path().join("out.safetensors").exists());
}
