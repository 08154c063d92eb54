//! Every kind of diagnostic as the user sees it. The snapshots are the product: read them when they change.
#![allow(clippy::unwrap_used)]

mod common;

use std::path::Path;

use common::{VALID, components};
use insta::assert_snapshot;
use mcpipe_spec::{Code, Diagnostics, Document, Style, load, load_text};

/// The diagnostics of a text with overrides; `codes` are those expected, in order.
fn found(text: &str, overrides: &[&str], codes: &[Code]) -> Diagnostics {
    let overrides: Vec<String> = overrides.iter().map(|&o| o.to_owned()).collect();
    let found = match load_text(Path::new("small.toml"), text, &overrides, &components()) {
        Ok(document) => document.warnings,
        Err(found) => found,
    };
    let given: Vec<Code> = found.iter().map(|diagnostic| diagnostic.code).collect();
    assert_eq!(given, codes, "{}", found.render(Style::Plain));
    found
}

/// The valid pipeline with pieces of its text replaced.
fn edited(edits: &[(&str, &str)]) -> String {
    edits.iter().fold(VALID.to_owned(), |text, (from, to)| {
        assert!(text.contains(from), "{from}");
        text.replacen(from, to, 1)
    })
}

fn rendered(edits: &[(&str, &str)], codes: &[Code]) -> String {
    found(&edited(edits), &[], codes).render(Style::Plain)
}

fn overridden(overrides: &[&str], codes: &[Code]) -> String {
    found(VALID, overrides, codes).render(Style::Plain)
}

fn document() -> Document {
    load_text(Path::new("small.toml"), VALID, &[], &components()).unwrap()
}

#[test]
fn unreadable() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR"));
    let read = |path: &Path| load(path, &[], &components()).unwrap_err().render(Style::Plain);
    assert!(read(&folder.join("no-such.toml")).contains("cannot read"));
    assert!(read(&folder.join("src")).contains("cannot read"));
    let temporary = std::env::temp_dir().join(format!("mcpipe-spec-{}", std::process::id()));
    std::fs::create_dir_all(&temporary).unwrap();
    let file = temporary.join("bytes.toml");
    std::fs::write(&file, b"version = 1\nname = \"caf\xe9\"\n").unwrap();
    let latin = read(&file);
    std::fs::write(&file, [0u8; 64]).unwrap();
    assert!(read(&file).contains("is no text file"));
    std::fs::write(&file, vec![b'#'; (1 << 20) + 1]).unwrap();
    assert!(read(&file).contains("too long for a pipeline file"));
    std::fs::remove_dir_all(&temporary).unwrap();
    assert_snapshot!(latin.replace(temporary.to_str().unwrap(), "DIR"));
}

#[test]
fn syntax() {
    assert_snapshot!(rendered(
        &[
            ("name = \"small\"", "name = \"small"),
            ("steps = 30, batch_size", "steps = 30 batch_size"),
            ("image_size = 64\n\n[text]", "image_size = 64\nbaseline = True\nema =\n\n[text]"),
            ("accumulate = 2", "accumulate 2"),
        ],
        &[Code::Syntax; 5]
    ));
}

#[test]
fn duplicate_key() {
    assert_snapshot!(rendered(
        &[("dim = 128\ntraining", "dim = 128\ndim = 64\ntraining"), ("[training]", "[student]\n[training]")],
        &[Code::DuplicateKey; 2]
    ));
}

#[test]
fn bad_override() {
    assert_snapshot!(overridden(
        &[
            "training.steps",
            "=3",
            "training..steps=3",
            "training.steps=",
            "training.steps.more=3",
            "teacher[3].dim=3",
            "teacher.dim=3",
            "student[1]=3",
            "distill=[{ level = \"icl\" ]",
        ],
        &[Code::BadOverride; 9]
    ));
}

#[test]
fn override_is_checked_like_the_file() {
    assert_snapshot!(overridden(
        &["studnt.image_size=64", "training.steps=many", "student.backbone=mobilevit", "training.batch_size=1e3"],
        &[Code::UnknownKey, Code::WrongType, Code::UnknownComponent, Code::WrongType]
    ));
}

#[test]
fn unsupported_version() {
    assert_snapshot!(rendered(&[("version = 1", "version = 2"), ("[text]", "[texts]")], &[Code::UnsupportedVersion]));
}

#[test]
fn unknown_key() {
    assert_snapshot!(rendered(
        &[
            ("image_size = 64, params = { patch_size", "image_size = 64, params = { pach_size"),
            ("image_size = 64\n\n", "imge_size = 64\n\n"),
            ("temperature = 2.0", "tau = 2.0"),
            ("weight = 0.5", "weight = 0.5\ntemperature = 1.0"),
            ("accumulate = 2", "accumulate = 2\nlr = 1e-3"),
            ("[projection]", "[projecton]"),
        ],
        &[Code::UnknownKey; 6]
    ));
}

#[test]
fn key_of_another_kind() {
    assert_snapshot!(rendered(
        &[("dim = 128\n", "dim = 128\nmomentum = 0.9\nweights = \"a.safetensors\"\n")],
        &[Code::UnknownKey; 2]
    ));
}

#[test]
fn missing_key() {
    assert_snapshot!(rendered(
        &[
            ("steps = 30, ", ""),
            ("image_size = 64\n\n", "\n"),
            ("level = \"logits\"\n", ""),
            ("taps = [{ student = \"stages.3\", teacher = \"transformer.resblocks.2\" }]\n", ""),
            ("[schedule]\nkind = \"cosine\"\nwarmup_steps = 5\n", ""),
        ],
        &[Code::MissingKey; 5]
    ));
}

#[test]
fn wrong_type() {
    assert_snapshot!(rendered(
        &[
            ("dim = 128\ntraining", "dim = \"128\"\ntraining"),
            ("lr = 1e-3", "lr = true"),
            ("temperature = 2.0", "temperature = 2.0\nteachers = \"clip\""),
            ("steps = 40", "steps = 4e1"),
            ("name = \"small\"", "name = 5"),
            ("[student]", "[[student]]"),
            ("[[teacher]]", "[teacher]"),
        ],
        &[Code::WrongType; 6]
    ));
}

#[test]
fn out_of_range() {
    assert_snapshot!(rendered(
        &[
            ("lr = 1e-3", "lr = 0.0"),
            ("temperature = 2.0", "temperature = nan"),
            ("batch_size = 64\naccumulate = 2", "batch_size = 1\naccumulate = 0"),
            ("[optimizer]", "[loss]\nlambda = 1.5\n[optimizer]"),
            ("[student]", "[augment]\ncrop = { scale = [0.0, 1.0] }\n[student]"),
        ],
        &[Code::OutOfRange; 6]
    ));
    assert_snapshot!(
        "number_too_great",
        rendered(
            &[("steps = 40", "steps = 99999999999999999999"), ("lr = 1e-3", "lr = 1e999")],
            &[Code::OutOfRange; 2]
        )
    );
}

#[test]
fn wrong_length() {
    assert_snapshot!(rendered(
        &[
            ("lr = 1e-3", "lr = 1e-3\nbetas = [0.9]"),
            ("temperature = 2.0", "teachers = []"),
            ("taps = [{ student = \"stages.3\", teacher = \"transformer.resblocks.2\" }]", "taps = []"),
            ("[student]", "[augment]\ncrop = { scale = [0.1, 0.2, 0.3] }\n[student]"),
            ("train = 256 }", "train = 256 }\ntrain.shards = \"\""),
        ],
        &[Code::WrongLength; 5]
    ));
}

#[test]
fn unknown_component() {
    assert_snapshot!(rendered(
        &[
            ("backbone = \"mobilevit_xxs\"\nimage_size = 64", "backbone = \"mobilvit_xxs\"\nimage_size = \"64\""),
            ("level = \"logits\"", "level = \"hints\""),
            ("kind = \"adamw\"", "kind = \"Adam\""),
            ("encoder = \"transformer\"", "encoder = \"bert\""),
        ],
        &[
            Code::UnknownComponent,
            Code::UnknownComponent,
            Code::WrongType,
            Code::UnknownComponent,
            Code::UnknownComponent
        ]
    ));
}

#[test]
fn unknown_value() {
    assert_snapshot!(rendered(
        &[
            ("kind = \"train\"", "kind = \"trained\""),
            ("kind = \"linear\"", "kind = \"Linear\""),
            ("weight = 0.5", "weight = 0.5\nloss = \"l2\"\nschedule = { kind = \"step\" }"),
            ("[student]", "[export]\nformats = [\"openclip\"]\n[student]"),
        ],
        &[Code::UnknownValue; 5]
    ));
}

#[test]
fn bad_name() {
    assert_snapshot!(rendered(&[("name = \"small\"", "name = \"../small job\"")], &[Code::BadName]));
}

#[test]
fn unknown_device() {
    assert_snapshot!(rendered(&[("[student]", "[run]\ndevice = \"gpu:0\"\n[student]")], &[Code::UnknownDevice]));
}

#[test]
fn duplicate() {
    let twin = "kind = \"zero_shot\"\nname = \"photos\"\n";
    assert_snapshot!(rendered(
        &[
            ("temperature = 2.0", "teachers = [\"clip\", \"clip\"]"),
            ("[student]", &format!("[[eval]]\n{twin}[[eval]]\n{twin}[student]")),
        ],
        &[Code::Duplicate; 2]
    ));
    assert_snapshot!(
        "listed_twice",
        rendered(&[("[student]", "[export]\nformats = [\"timm\", \"timm\"]\n[student]")], &[Code::Duplicate])
    );
}

#[test]
fn unknown_teacher() {
    assert_snapshot!(rendered(
        &[("teacher = \"clip\"", "teacher = \"clp\""), ("temperature = 2.0", "teachers = [\"clip\", \"openai\"]")],
        &[Code::UnknownTeacher; 2]
    ));
}

#[test]
fn missing_tower() {
    assert_snapshot!(rendered(
        &[
            ("teacher = \"clip\"", "teacher = \"self\""),
            (
                "[student]",
                "[[teacher]]\nname = \"self\"\nkind = \"ema\"\nmomentum = 0.9\n\n[[teacher]]\nname = \"empty\"\nkind = \"load\"\ndim = 8\nweights = \"w.safetensors\"\n\n[student]"
            ),
        ],
        &[Code::MissingTower; 2]
    ));
}

#[test]
fn template_placeholder() {
    assert_snapshot!(rendered(
        &[
            ("[student]", "[data.eval]\ntemplates = [\"a photo of a {c}.\", \"a photo\", \"a {} in snow\"]\n[student]"),
            ("[optimizer]", "[[eval]]\nname = \"z\"\nkind = \"zero_shot\"\ntemplates = [\"{classname}\"]\n[optimizer]"),
        ],
        &[Code::TemplatePlaceholder; 3]
    ));
}

#[test]
fn cycle() {
    let teacher = |name: &str, other: &str| {
        format!(
            "[[teacher]]\nname = \"{name}\"\nkind = \"load\"\ndim = 8\nweights = \"{name}.safetensors\"\ntext = {{ teacher = \"{other}\" }}\n\n"
        )
    };
    let all = format!("{}{}{}{}[student]", teacher("a", "b"), teacher("b", "c"), teacher("c", "a"), teacher("d", "d"));
    assert_snapshot!(rendered(&[("[student]", &all)], &[Code::Cycle; 2]));
}

#[test]
fn conflict() {
    assert_snapshot!(rendered(
        &[
            ("accumulate = 2", "accumulate = 3"),
            ("kind = \"linear\"\ndim = 128", "kind = \"none\"\ndim = 128"),
            ("weight = 0.5", "weight = 0.5\nschedule = { kind = \"linear\", start = 20, end = 10 }"),
            (
                "[student]",
                "[augment]\ncrop = { scale = [1.0, 0.5] }\nmixup = { alpha = 0.2, probability = 0.6 }\ncutmix = { alpha = 1.0 }\n\n[student]"
            ),
        ],
        &[Code::Conflict; 5]
    ));
    assert_snapshot!("conflict_with_override", overridden(&["training.accumulate=5"], &[Code::Conflict]));
    assert_snapshot!("no_data", rendered(&[("make = { kind = \"shapes\", train = 256 }\n", "")], &[Code::MissingKey]));
    assert_snapshot!(
        "lambda_without_distillation",
        found(VALID, &["distill=[]", "loss.lambda=0.5"], &[Code::Conflict]).render(Style::Plain)
    );
}

#[test]
fn unused() {
    assert_snapshot!(rendered(
        &[
            ("[optimizer]", "[loss]\nlambda = 0\n[optimizer]"),
            ("temperature = 2.0", "teachers = [\"clip\"]"),
            ("weight = 0.5", "teachers = [\"clip\"]\nschedule = { kind = \"cosine\", start = 400 }"),
            ("[student]", "[[teacher]]\nname = \"self\"\nkind = \"ema\"\nmomentum = 0.9\n\n[student]"),
        ],
        &[Code::Unused; 3]
    ));
}

#[test]
fn bad_params() {
    let document = document();
    let diagnostic = document.bad_params("teacher[0].image.params", "vit", "width 100 is not a multiple of heads 12");
    assert_snapshot!(document.report(vec![diagnostic]).render(Style::Plain));
}

#[test]
fn unknown_tap() {
    let document = document();
    let diagnostic = document.unknown_tap(
        "distill[1].taps[0].student",
        "stages.3",
        "mobilevit_xxs",
        ["stem", "stages.0", "stages.1", "stages.2", "final_conv"],
    );
    assert_snapshot!(document.report(vec![diagnostic]).render(Style::Plain));
}

#[test]
fn dim_mismatch() {
    let document = document();
    let diagnostic = document.dim_mismatch(
        "projection.dim",
        ("the student's embedding", 128),
        ("the text embedding of teacher `clip`", 64),
        "set `projection.dim = 64`",
    );
    assert_snapshot!(document.report(vec![diagnostic]).render(Style::Plain));
}

#[test]
fn image_size() {
    let document = document();
    let diagnostic = document.image_size("student.image_size", "mobilevit_xxs", 64, "a multiple of 48");
    assert_snapshot!(document.report(vec![diagnostic]).render(Style::Plain));
}

#[test]
fn missing_file() {
    let document = document();
    let diagnostic = document.missing_file("data.make", "shard", Path::new("no-such-folder/00000.tar"));
    assert_snapshot!(document.report(vec![diagnostic]).render(Style::Plain));
}

#[test]
fn bad_file() {
    let document = document();
    let diagnostic = document
        .diagnostic(Code::BadFile, "data.make", "the shard `0.tar` ends in the middle of a member")
        .with_label("from here")
        .with_help("`mcpipe data check` tells more");
    assert_snapshot!(document.report(vec![diagnostic]).render(Style::Plain));
}

#[test]
fn json_for_editors() {
    let found = found(
        &edited(&[("image_size = 64\n\n", "imge_size = 64\n\n"), ("accumulate = 2", "accumulate = 3")]),
        &["training.steps=x"],
        &[Code::UnknownKey, Code::WrongType],
    );
    assert_snapshot!(found.to_json_lines());
    assert_snapshot!("one_line_each", found.to_string());
}

#[test]
fn other_styles() {
    let text = edited(&[("backbone = \"mobilevit_xxs\"", "backbone = \"mobilvit_xxs\"")]);
    let found = found(&text, &[], &[Code::UnknownComponent]);
    assert_snapshot!("narrated", found.render(Style::Narrated));
    let fancy = found.render(Style::Fancy);
    assert!(fancy.contains("\u{1b}[") && fancy.contains('╭'), "{fancy}");
}

#[test]
fn empty_file_lacks_the_tables() {
    assert_snapshot!(found("", &[], &[Code::MissingKey; 8]).render(Style::Plain));
}

#[test]
fn tables_of_several_forms() {
    assert_snapshot!(rendered(
        &[
            ("make = { kind = \"shapes\", train = 256 }", "make = { train = 256 }"),
            ("kind = \"train\"\n", ""),
            ("[text]\nteacher = \"clip\"", "[text]\nencoder = \"transformer\""),
            ("kind = \"adamw\"", "knd = \"adamw\""),
        ],
        &[Code::MissingKey, Code::MissingKey, Code::MissingKey, Code::MissingKey, Code::UnknownKey]
    ));
    assert_snapshot!(
        "misspelt_form",
        rendered(&[("[text]\nteacher = \"clip\"", "[text]\ntecher = \"clip\"")], &[Code::UnknownKey])
    );
}

#[test]
fn every_code_has_a_snapshot() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/snapshots");
    let snapshots: Vec<String> =
        std::fs::read_dir(folder).unwrap().map(|file| std::fs::read_to_string(file.unwrap().path()).unwrap()).collect();
    for code in Code::ALL {
        let shown = snapshots.iter().any(|snapshot| snapshot.lines().any(|line| line == code.id()));
        assert!(shown, "no snapshot shows `{code}`");
    }
}
