//! Text encoders with a vocabulary of their own, and the student's own loss.

use std::fs;
use std::path::Path;

mod common;
use common::{Bench, TINY};

const OWN: &str = r#"[text]
encoder = "bert"
params = { width = 32, depth = 2, heads = 4, mlp_ratio = 2.0, positions = 20, context_length = 12, vocab_size = 90 }
vocab = "vocab.txt"
weights = "bert.safetensors"
dim = 32
"#;

/// A frozen BERT as the student's text encoder, and `loss` as its loss. The files are a tiny model's of
/// `engine/models/tests/fixtures/make_text.py` and the beginning of a tiny vocabulary.
fn with_bert(bench: &Bench, loss: &str) -> String {
    let engine = Path::new(env!("CARGO_MANIFEST_DIR")).join("engine");
    let vocab = fs::read_to_string(engine.join("data/tests/fixtures/vocab.txt")).expect("a vocabulary");
    let lines: String = vocab.lines().take(90).map(|line| format!("{line}\n")).collect();
    bench.write("vocab.txt", lines);
    let weights = engine.join("models/tests/fixtures/text/hf_bert.ckpt");
    bench.write("bert.safetensors", fs::read(weights).expect("weights"));
    TINY.replacen("[text]\nteacher = \"clip\"\n", &format!("{OWN}\n{loss}"), 1)
}

/// Exit code and message of checking `pipeline`.
fn check(bench: &Bench, pipeline: &str) -> (i32, String) {
    bench.write("own.toml", pipeline);
    let (code, _, stderr) = bench.output(&["check", "own.toml"]);
    (code, stderr)
}

#[test]
fn bert_teaches_by_siglips_loss() {
    let bench = Bench::new();
    let pipeline = with_bert(&bench, "[loss]\nkind = \"siglip\"\nlogit_scale = 10.0\nlambda = 0.5\n");
    bench.write("own.toml", pipeline);
    let (code, _, stderr) = bench.output(&["run", "own.toml", "-q", "--out", "run"]);
    assert_eq!(code, 0, "{stderr}");
}

#[test]
fn a_vocabulary_that_does_not_fit() {
    let bench = Bench::new();
    let good = with_bert(&bench, "");
    assert_eq!(check(&bench, &good), (0, String::new()));
    let refused = |from: &str, to: &str, said: &[&str]| {
        assert!(good.contains(from), "{from}");
        let (code, stderr) = check(&bench, &good.replacen(from, to, 1));
        assert_eq!(code, 2, "{stderr}");
        for said in said {
            assert!(stderr.contains(said), "`{said}` is not in\n{stderr}");
        }
    };
    refused("vocab = \"vocab.txt\"\n", "", &["missing-key", "`vocab` is missing"]);
    refused("vocab.txt", "none.txt", &["missing-file", "there is no vocabulary"]);
    refused("vocab.txt", "own.toml", &["bad-file", "no `[UNK]`"]);
    refused("vocab.txt", "bert.safetensors", &["bad-file", "not UTF-8"]);
    refused("vocab_size = 90", "vocab_size = 89", &["bad-params", "knows 89 token ids", "has 90"]);
    refused("vocab_size = 90", "vocab_size = 90, padding_id = 4", &["bad-params", "`[PAD]` is 0"]);
    refused("dim = 32\n", "dim = 24\n", &["bad-file", "text_projection"]);
    refused("encoder = \"bert\"", "encoder = \"berd\"", &["bert"]);
    let (code, stderr) = check(&bench, &with_bert(&bench, "[loss]\nlogit_bias = -5.0\n"));
    assert!(stderr.contains("CLIP's loss has no bias"), "{code} {stderr}");
}

#[test]
fn a_vocabulary_that_nobody_reads() {
    let bench = Bench::new();
    bench.write("vocab.txt", "[PAD]\n");
    let (code, stderr) = check(
        &bench,
        &TINY.replacen("encoder = \"transformer\"", "encoder = \"transformer\", vocab = \"vocab.txt\"", 1),
    );
    assert!(stderr.contains("reads CLIP's vocabulary"), "{code} {stderr}");
}
