//! Text towers and two-tower models: parity with transformers, open_clip and a PyTorch formulation on the fixtures of
//! `fixtures/make_text.py`, whole checkpoints under three libraries' names, SigLIP's loss.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

mod support;

use std::path::PathBuf;
use std::sync::Arc;

use mcpipe_cpu::sigmoid_loss::SigmoidLoss;
use mcpipe_graph::backend::Cpu;
use mcpipe_graph::{Executor, Feed, Grads, GraphBuilder, Mode, Param, ParamKind, ParamStore, Path, StepGraph, Tensor};
use mcpipe_models::weights::{NameMap, WeightsError};
use mcpipe_models::{Checkpoint, TextEncoder, backbone, text_encoder};
use support::*;

fn folder() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/text")
}

/// The captions of `make.py`.
fn clip_ids(batch: usize, length: usize, vocab: usize) -> Vec<i32> {
    let mut ids = vec![0; batch * length];
    for (b, row) in ids.chunks_exact_mut(length).enumerate() {
        let words = length - 2 - b;
        row[0] = vocab as i32 - 2;
        for (id, u) in row[1..=words].iter_mut().zip(uniform(&format!("caption {b}"))) {
            *id = (u * (vocab - 2) as f64) as i32;
        }
        row[words + 1] = vocab as i32 - 1;
    }
    ids
}

/// The padded rows of `make_text.py`.
fn padded_ids(batch: usize, length: usize, vocab: usize) -> Vec<i32> {
    let mut ids = vec![0; batch * length];
    for (b, row) in ids.chunks_exact_mut(length).enumerate() {
        for (id, u) in row[..length - 3 * b].iter_mut().zip(uniform(&format!("caption {b}"))) {
            *id = 1 + (u * (vocab - 1) as f64) as i32;
        }
    }
    ids
}

fn encoder(name: &str, params: &str) -> Box<dyn TextEncoder> {
    text_encoder(name, &params.parse().unwrap()).unwrap()
}

fn tower(fixture: &Fixture, train: bool) -> Built {
    let model = encoder(fixture.meta("model"), fixture.meta("params"));
    let (length, vocab) = (model.context_length(), fixture.number("vocab"));
    let ids = if fixture.meta("ids") == "padded" { padded_ids(4, length, vocab) } else { clip_ids(4, length, vocab) };
    let mut g = GraphBuilder::new(train);
    let (id_input, last) = (g.int_input("ids", &[4, length]), g.int_input("last", &[4]));
    let out = model.build(&mut g, &Path::default(), &id_input, &last, Some(fixture.number("dim"))).unwrap();
    assert_eq!(out.features.shape(), [4, model.features()]);
    let mut built = Built::new(g, out.embedding, Vec::new(), &[]);
    built.ids = vec![("last".into(), model.last_token().positions(&ids, length)), ("ids".into(), ids)];
    built
}

#[test]
fn text_towers_are_the_published_ones() {
    let files = Fixture::all(&folder());
    let mut seen = Vec::new();
    for path in &files {
        let fixture = Fixture::open(path);
        if !fixture.file.metadata().contains_key("kind") {
            continue;
        }
        let name = path.file_stem().unwrap().to_string_lossy();
        let eval = tower(&fixture, false);
        let mut store = formula_store(&eval.graph);
        let in_eval = eval.check_values(&eval.run(&store), &fixture, "eval", 1e-4);
        let train = tower(&fixture, true);
        let mut executor = train.run(&store);
        let in_train = train.check_values(&executor, &fixture, "train", 1e-4);
        let gradients = train.check_gradients(&mut executor, &store, &fixture);
        executor.update_running_statistics(&mut store);
        let running = check_running(&store, &fixture);
        check_initial(&train.graph, &fixture);
        println!("{name}: eval {in_eval:.1e}, train {in_train:.1e}, gradients {gradients:.1e}, running {running:.1e}");
        seen.push(name.into_owned());
    }
    assert_eq!(seen, ["bert_cls", "bert_mean", "bert_pooler", "mobileclip_mct", "siglip_text"]);
}

/// What stands behind a caption's last token is padding to BERT, whatever its features.
#[test]
fn padding_changes_nothing() {
    let params = "width = 16\ndepth = 2\nheads = 2\nvocab_size = 50\npositions = 12\ncontext_length = 12\npool = ";
    for pool in ["\"cls\"", "\"mean\"", "\"pooler\""] {
        let model = encoder("bert", &format!("{params}{pool}"));
        let run = |ids: &[i32], length: usize| {
            let mut g = GraphBuilder::new(false);
            let (id_input, last) = (g.int_input("ids", &[1, length]), g.int_input("last", &[1]));
            let out = model.build(&mut g, &Path::default(), &id_input, &last, None).unwrap();
            let mut built = Built::new(g, out.embedding, Vec::new(), &[]);
            built.ids = vec![("ids".into(), ids.to_vec()), ("last".into(), model.last_token().positions(ids, length))];
            let store = formula_store(&built.graph);
            built.run(&store).value(&built.out).into_owned()
        };
        let cut = run(&[2, 7, 9, 3], 4);
        let padded = run(&[2, 7, 9, 3, 0, 0, 0, 0, 0, 0, 0, 0], 12);
        assert!(gap(&cut, &padded) < 1e-6, "{pool}");
        assert!(gap(&cut, &run(&[2, 7, 9, 3, 4, 0], 6)) > 1e-3, "{pool}: a token more changes the text");
    }
    let model = encoder("bert", "padding_id = 5");
    assert_eq!(model.last_token().positions(&[1, 5, 0, 5, 5, 5, 5, 5], 4), [2, 0]);
    assert!(model.last_token().positions(&[], 0).is_empty());
}

#[test]
fn siglip_takes_the_last_position() {
    assert_eq!(encoder("siglip_text", "").last_token().positions(&[1, 9, 2, 0, 0, 0], 3), [2, 2]);
    assert!(encoder("siglip_text", "").last_token().positions(&[], 0).is_empty());
}

#[test]
fn wrong_sizes_are_refused() {
    let refused = |name: &str, params: &str| text_encoder(name, &params.parse().unwrap()).unwrap_err().to_string();
    assert!(refused("bert", "positions = 20").contains("positions"));
    assert!(refused("bert", "vocab_size = 0").contains("vocab_size"));
    assert!(refused("bert", "pool = \"max\"").contains("pool"));
    assert!(refused("mobileclip_mct", "mixer_kernel = 4").contains("odd"));
    assert!(refused("siglip_text", "norm_eps = -1.0").contains("norm_eps"));
    let mut g = GraphBuilder::new(false);
    let (ids, last) = (g.int_input("ids", &[2, 78]), g.int_input("last", &[2]));
    assert!(encoder("bert", "").build(&mut g, &Path::default(), &ids, &last, None).is_err());
}

/// Parameters without values, for a file to bring.
fn declare(store: &mut ParamStore, graph: &StepGraph) {
    for p in graph.params() {
        store.insert(Param { name: p.name.clone(), shape: p.shape.clone(), kind: p.kind, data: Vec::new() });
    }
}

fn embed(graph: StepGraph, out: &Tensor, store: &ParamStore, feeds: &[(&str, Feed<'_>)]) -> Vec<f32> {
    let mut executor = Executor::new(Arc::new(graph), store, Mode::Forward, Cpu::default()).unwrap();
    executor.forward(store, feeds).unwrap();
    executor.value(out).into_owned()
}

fn image_tower(act: &str) -> (StepGraph, Tensor) {
    let params = format!("patch_size = 8\nwidth = 16\ndepth = 2\nheads = 2\nact = \"{act}\"");
    let model = backbone("vit", &params.parse().unwrap()).unwrap();
    let mut g = GraphBuilder::new(false);
    let image = g.input("image", &[3, 16, 16, 3]);
    let out = model.build(&mut g, &Path::new("visual"), &image, Some(12), &[]).unwrap().embedding;
    g.output("out", &out);
    (g.finish(), out)
}

fn text_tower(model: &dyn TextEncoder, dim: usize) -> (StepGraph, Tensor) {
    let mut g = GraphBuilder::new(false);
    let (ids, last) = (g.int_input("ids", &[3, 12]), g.int_input("last", &[3]));
    let out = model.build(&mut g, &Path::new("text"), &ids, &last, Some(dim)).unwrap().embedding;
    g.output("out", &out);
    (g.finish(), out)
}

/// Loads both towers of a tiny checkpoint and gives the worst difference of their embeddings from the library's.
fn whole_model(name: &str, act: &str, encoder_name: &str, more: &str) -> f32 {
    let file = Checkpoint::open(&folder().join(format!("{name}.ckpt"))).unwrap();
    let expected = Checkpoint::open(&folder().join(format!("{name}.out"))).unwrap();
    let sizes = "context_length = 12\nvocab_size = 60\nwidth = 16\nheads = 2\ndepth = 2\n";
    let model = encoder(encoder_name, &format!("{sizes}act = \"{act}\"\n{more}"));
    let ((image, image_out), (text, text_out)) = (image_tower(act), text_tower(model.as_ref(), 12));
    let mut store = ParamStore::default();
    declare(&mut store, &image);
    declare(&mut store, &text);
    let names = NameMap::new().and_image(&file, "visual").and_text_of(&file, "text", model.roots());
    let loaded = file.load(&mut store, &names).unwrap();
    assert_eq!(loaded.taken, store.params().len(), "{name}");
    assert!(file.contains("logit_scale"), "{name}");
    let images = data("image", 3 * 16 * 16 * 3);
    let ids = clip_ids(3, 12, 60);
    let last = model.last_token().positions(&ids, 12);
    let image = embed(image, &image_out, &store, &[("image", Feed::F32(&images))]);
    let text = embed(text, &text_out, &store, &[("ids", Feed::I32(&ids)), ("last", Feed::I32(&last))]);
    let [by_image, by_text] = [("image", image), ("text", text)].map(|(side, ours)| {
        let theirs = expected.values(side).unwrap().unwrap();
        gap(&ours, &theirs) / scale(&theirs)
    });
    println!("{name}: image {by_image:.1e}, text {by_text:.1e}");
    by_image.max(by_text)
}

#[test]
fn whole_checkpoints_load_under_every_librarys_names() {
    assert!(whole_model("open_clip", "quick_gelu", "transformer", "") < 1e-4);
    assert!(whole_model("open_clip_custom", "gelu", "siglip_text", "") < 1e-4);
    assert!(whole_model("hf_clip", "quick_gelu", "transformer", "") < 1e-4);
    let file = Checkpoint::open(&folder().join("hf_clip.ckpt")).unwrap();
    assert_eq!(file.source().names_of, Some("Hugging Face's CLIPModel"));
    assert_eq!(file.shape("transformer.resblocks.1.attn.in_proj_weight"), Some(&[48, 16][..]));
    assert_eq!(file.shape("visual.proj"), Some(&[16, 12][..]));
    assert!(file.names().all(|n| !n.contains("_model.") && !n.contains("_projection.")), "every name has its rule");
}

/// A masked-language model's file of old: prefix, gamma and beta, a head that is not asked for.
#[test]
fn bert_loads_from_an_old_file() {
    let params =
        "vocab_size = 90\nwidth = 32\ndepth = 2\nheads = 4\nmlp_ratio = 2.0\npositions = 20\ncontext_length = 12";
    let file = Checkpoint::open(&folder().join("hf_bert.ckpt")).unwrap();
    let expected = Checkpoint::open(&folder().join("hf_bert.out")).unwrap().values("text").unwrap().unwrap();
    let load = |pool: &str, dim: usize| {
        let model = encoder("bert", &format!("{params}\npool = \"{pool}\""));
        let (graph, out) = text_tower(model.as_ref(), dim);
        let mut store = ParamStore::default();
        declare(&mut store, &graph);
        let names = NameMap::new().and_text_of(&file, "text", model.roots());
        file.load(&mut store, &names).map(|_| (model, graph, out, store))
    };
    let (model, graph, out, store) = load("pooler", 32).unwrap();
    let ids = padded_ids(3, 12, 90);
    let last = model.last_token().positions(&ids, 12);
    let ours = embed(graph, &out, &store, &[("ids", Feed::I32(&ids)), ("last", Feed::I32(&last))]);
    let worst = gap(&ours, &expected) / scale(&expected);
    println!("hf_bert: {worst:.1e}");
    assert!(worst < 1e-4);
    assert!(load("mean", 32).is_ok(), "the pooler may be left");
    let error = load("cls", 24).err().unwrap();
    assert!(matches!(&error, WeightsError::Mismatch { mismatch, .. } if mismatch.missing == ["text_projection"]));
}

#[test]
fn siglips_loss_is_open_clips() {
    let expected = Checkpoint::open(&folder().join("siglip_loss.safetensors")).unwrap();
    let get = |name: &str| expected.values(name).unwrap().unwrap();
    let mut g = GraphBuilder::new(true);
    let inputs = [("image", vec![5, 8]), ("text", vec![5, 8]), ("scale", vec![1]), ("bias", vec![1])];
    let given: Vec<Tensor> = inputs.iter().map(|(name, shape)| g.input_with_grad(*name, shape)).collect();
    let targets = g.input("targets", &[5, 5]);
    let (image, text) = (g.l2_normalize(&given[0]), g.l2_normalize(&given[1]));
    let d = SigmoidLoss { rows: 5, cols: 5, dim: 8 };
    let loss = g.sigmoid_loss(d, &image, &text, [&given[2], &given[3]], &targets).unwrap();
    g.output("loss", &loss);
    let identity: Vec<f32> = (0..25).map(|i| if i % 6 == 0 { 1.0 } else { 0.0 }).collect();
    let store = ParamStore::default();
    let mut executor = Executor::new(Arc::new(g.finish()), &store, Mode::Train, Cpu::default()).unwrap();
    let (image, text) = (data("image", 40), data("text", 40));
    let feeds = [
        ("image", Feed::F32(&image)),
        ("text", Feed::F32(&text)),
        ("scale", Feed::F32(&[10.0])),
        ("bias", Feed::F32(&[-3.0])),
        ("targets", Feed::F32(&identity)),
    ];
    executor.forward(&store, &feeds).unwrap();
    assert!((executor.value(&loss)[0] / get("loss")[0] - 1.0).abs() < 1e-5);
    let mut grads = Grads::zeros_like(&store);
    executor.backward(&store, &[(&loss, &[1.0])], &mut grads).unwrap();
    for ((name, _), tensor) in inputs.iter().zip(&given) {
        let (ours, theirs) = (executor.grad(tensor).unwrap(), get(name));
        assert!(gap(&ours, &theirs) / scale(&theirs) < 1e-4, "{name}: {ours:?}, expected {theirs:?}");
    }
}

/// Blocks by open_clip's names, Apple's within the two RepMixer blocks; as many parameters as Apple publishes.
#[test]
fn mobileclips_names_are_apples_within_a_block() {
    let (graph, _) = text_tower(encoder("mobileclip_mct", "context_length = 12").as_ref(), 512);
    let names: Vec<&str> = graph.params().iter().map(|p| p.name.as_str()).collect();
    for name in [
        "text.transformer.resblocks.0.token_mixer.norm.rbr_skip.running_mean",
        "text.transformer.resblocks.0.token_mixer.mixer.rbr_conv.0.conv.weight",
        "text.transformer.resblocks.0.token_mixer.layer_scale",
        "text.transformer.resblocks.1.attn.in_proj_weight",
        "text.transformer.resblocks.4.mlp.c_proj.bias",
        "text.transformer.resblocks.5.convffn.conv.bn.weight",
        "text.transformer.resblocks.5.convffn.fc2.weight",
    ] {
        assert!(names.contains(&name), "{name} is not among {names:?}");
    }
    assert!(!names.iter().any(|n| n.contains("resblocks.6")));
    let trained: usize =
        graph.params().iter().filter(|p| p.kind != ParamKind::Buffer).map(|p| p.shape.iter().product::<usize>()).sum();
    // Apple's README has 42.4 M, for 77 positions; here are 65 rows of 512 less.
    assert_eq!((trained as f64 / 1e5).round(), 424.0);
}
