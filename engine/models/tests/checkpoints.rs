//! PyTorch's checkpoints: what torch.save wrote is read without executing anything, and damaged files are refused.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};

use mcpipe_models::weights::{Container, Element, Entry, write_safetensors};
use mcpipe_models::{Checkpoint, WeightsError};
use proptest::prelude::*;

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints").join(name)
}

fn open(name: &str) -> Checkpoint {
    Checkpoint::open(&fixture(name)).unwrap_or_else(|e| panic!("{e}"))
}

fn refusal(name: &str) -> WeightsError {
    Checkpoint::open(&fixture(name)).map(|c| c.names().count()).expect_err(name)
}

/// The same names, shapes, types and values.
fn same(read: &Checkpoint, expected: &Checkpoint) {
    let names = |c: &Checkpoint| c.names().map(str::to_owned).collect::<BTreeSet<_>>();
    assert_eq!(names(read), names(expected), "{}", read.path().display());
    for name in expected.names() {
        assert_eq!(read.shape(name), expected.shape(name), "{name}");
        let element = expected.element(name).unwrap();
        assert_eq!(read.element(name), Some(element), "{name}");
        if element.is_float() {
            assert_eq!(read.values(name).unwrap(), expected.values(name).unwrap(), "{name}");
        } else {
            assert!(matches!(read.values(name), Err(WeightsError::Dtype { .. })), "{name}");
        }
    }
}

#[test]
fn every_form_of_torch_save_is_read() {
    let expected = open("zip.safetensors");
    for (name, container, gzipped) in [
        ("zip.pt", Container::TorchZip, false),
        ("protocol4.pt", Container::TorchZip, false),
        ("legacy.pt", Container::TorchLegacy, false),
        ("zip_gz.pt", Container::TorchZip, true),
        ("legacy_gz.pt", Container::TorchLegacy, true),
        ("nested.pt", Container::TorchZip, false),
    ] {
        let read = open(name);
        same(&read, &expected);
        assert_eq!((read.source().container, read.source().gzipped), (container, gzipped), "{name}");
    }
    let nested = open("nested.pt");
    assert_eq!(
        (&nested.source().wrappers[..], &nested.source().prefixes[..]),
        (&["state_dict".to_owned()][..], &["module."][..])
    );
    assert!(open("zip.pt").source().wrappers.is_empty());
    // The average comes before the weights.
    same(&open("ema.pt"), &open("ema.safetensors"));
    assert_eq!(open("ema.pt").source().wrappers, ["state_dict_ema"]);
}

/// A file's kind is known by its content.
#[test]
fn the_suffix_says_nothing() {
    let dir = tempfile::tempdir().unwrap();
    for (name, suffix) in
        [("zip.pt", "safetensors"), ("legacy.pt", "bin"), ("zip.safetensors", "pth"), ("zip_gz.pt", "ckpt")]
    {
        let file = dir.path().join(format!("weights.{suffix}"));
        fs::copy(fixture(name), &file).unwrap();
        same(&Checkpoint::open(&file).unwrap(), &open("zip.safetensors"));
    }
}

#[test]
fn strides_offsets_and_types_are_honoured() {
    for name in ["strided.pt", "strided_legacy.pt"] {
        same(&open(name), &open("strided.safetensors"));
    }
    same(&open("types.pt"), &open("types.safetensors"));
    assert_eq!(open("types.pt").element("bf16"), Some(Element::Bf16));
    assert_eq!(open("types.pt").values("f16").unwrap().unwrap(), [1.5, -2.0, 0.0]);
}

#[test]
fn what_would_run_is_refused_by_name() {
    for name in ["malicious.pt", "malicious_legacy.pt"] {
        let error = refusal(name);
        let text = error.to_string();
        assert!(matches!(error, WeightsError::Refused { .. }), "{text}");
        // On Linux `os.system` is pickled as `posix.system`.
        assert!(text.contains("`posix.system`") && text.contains("byte ") && text.contains(name), "{text}");
    }
    let text = refusal("module.pt").to_string();
    assert!(text.contains("`torch.nn.modules.linear.Linear`"), "{text}");
    let text = refusal("big_endian.pt").to_string();
    assert!(text.contains("big-endian"), "{text}");
    let text = refusal("deflated.pt").to_string();
    assert!(text.contains("compressed"), "{text}");
    assert!(matches!(refusal("list.pt"), WeightsError::Kind { .. }));
}

#[test]
fn pickles_by_hand_are_refused_where_they_go_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("hand.pkl");
    for (pickle, expected) in [
        (&b"\x80\x02cos\nsystem\nX\x02\0\0\0ls\x85R."[..], "`os.system`"),
        (b"\x80\x02cbuiltins\neval\n.", "`builtins.eval`"),
        (b"\x80\x02ctorch.storage\n_load_from_bytes\n.", "`torch.storage._load_from_bytes`"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "`os.system`"),
        (b"\x80\x02(S'ls'\nios\nsystem\n.", "opcode 0x53"),
        (b"\x80\x02\x82\x01.", "opcode 0x82"),
        (b"\x80\x02K\x01.", "none of torch.save"),
        (b"\x80\x020.", "empty stack"),
        (b"\x80\x02}K\x01\x85.", "none of torch.save"),
        (b"\x80\x02h\x07.", "memo 7 is empty"),
        (b"\x80\x02K\x01K\x02a.", "no list"),
        (b"\x80\x02X\xff\xff\xff\xffab", "ends in the middle"),
        (b"\x80\x02]q\0", "ends in the middle"),
    ] {
        fs::write(&file, pickle).unwrap();
        let text = Checkpoint::open(&file).unwrap_err().to_string();
        assert!(text.contains(expected) && text.contains("hand.pkl"), "{text} lacks {expected}");
    }
}

/// Values that repeat themselves may not outgrow the file.
#[test]
fn small_files_stay_small() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("w.pt");
    let mut legacy = fs::read(fixture("strided_legacy.pt")).unwrap();
    // `expanded` is [5, 3] with strides (0, 1): its first size becomes 2³¹ − 1.
    let expanded: &[u8] = b"K\x05K\x03\x86";
    let at = legacy.windows(expanded.len()).position(|w| w == expanded).unwrap();
    legacy.splice(at..at + 2, *b"J\xff\xff\xff\x7f");
    fs::write(&file, legacy).unwrap();
    let text = Checkpoint::open(&file).unwrap_err().to_string();
    assert!(text.contains("its tensors take over"), "{text}");
    // A thousand-fold copy of a growing dict: OrderedDict of a list of pairs, again and again.
    let mut pickle = b"\x80\x02ccollections\nOrderedDict\nq\0(".to_vec();
    (0..20_000).for_each(|_| pickle.extend(b"K\x01K\x02\x86"));
    pickle.extend(b"lq\x01");
    (0..20_000).for_each(|_| pickle.extend(b"h\0h\x01\x85R"));
    pickle.push(b'.');
    fs::write(&file, pickle).unwrap();
    let text = Checkpoint::open(&file).unwrap_err().to_string();
    assert!(text.contains("values"), "{text}");
}

const REAL: [&str; 9] = [
    "zip.pt",
    "legacy.pt",
    "zip_gz.pt",
    "legacy_gz.pt",
    "nested.pt",
    "strided.pt",
    "strided_legacy.pt",
    "protocol4.pt",
    "malicious.pt",
];

fn read_all(file: &Path) {
    let Ok(checkpoint) = Checkpoint::open(file) else { return };
    for name in checkpoint.names() {
        if let Ok(Some(values)) = checkpoint.values(name) {
            assert!(values.len() <= 1 << 25);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(768))]

    /// Whatever is done to a file, it is read or refused: no panic, no absurd allocation.
    #[test]
    fn damaged_files_are_read_or_refused(
        which in 0..REAL.len(),
        flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6),
        cut in prop::option::weighted(0.3, any::<prop::sample::Index>()),
        moved in prop::option::weighted(0.3, (any::<prop::sample::Index>(), any::<prop::sample::Index>(), 1usize..16)),
    ) {
        let mut bytes = fs::read(fixture(REAL[which])).unwrap();
        for (at, value) in flips {
            let at = at.index(bytes.len());
            bytes[at] = value;
        }
        if let Some((from, to, len)) = moved {
            let (from, to) = (from.index(bytes.len()), to.index(bytes.len()));
            let len = len.min(bytes.len() - from.max(to));
            bytes.copy_within(from..from + len, to);
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("w.pt");
        fs::write(&file, &bytes).unwrap();
        read_all(&file);
    }

    /// Pickles of random opcodes with plausible arguments.
    #[test]
    fn random_pickles_are_read_or_refused(
        ops in prop::collection::vec(prop::sample::select(vec![
            &b"("[..], b")", b"]", b"}", b"N", b"K\x03", b"J\xff\xff\xff\xff", b"\x8a\x02\x01\x80", b"X\x01\0\0\0a", b"2",
            b"0", b"1", b"a", b"e", b"s", b"u", b"t", b"l", b"d", b"\x85", b"\x86", b"\x87", b"q\x01", b"h\x01", b"\x94",
            b"ccollections\nOrderedDict\n", b"ctorch\nFloatStorage\n", b"ctorch._utils\n_rebuild_tensor_v2\n", b"Q", b"R",
            b"ctorch._tensor\n_rebuild_from_type_v2\n", b"X\x07\0\0\0storage", b"\x81", b"b", b"\x90", b"\x91", b".",
        ]), 0..40),
    ) {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("w.pkl");
        fs::write(&file, [b"\x80\x02", &ops.concat()[..]].concat()).unwrap();
        read_all(&file);
    }
}

/// Apple's names become those that timm's own loader makes of them.
#[test]
fn apples_names_become_timms() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("apple.safetensors");
    let table = fs::read_to_string(fixture("apple.txt")).unwrap();
    let pairs: Vec<(&str, &str)> = table.lines().map(|line| line.split_once(' ').unwrap()).collect();
    let value = |n: usize| match pairs[n].0 {
        "image_encoder.model.head.proj" => Entry::F32(vec![3, 2], (0..6).map(|i| i as f32).collect::<Vec<_>>().into()),
        _ => Entry::F32(vec![1], vec![n as f32].into()),
    };
    let mut tensors: std::collections::BTreeMap<String, Entry<'_>> =
        (0..pairs.len()).map(|n| (pairs[n].0.to_owned(), value(n))).collect();
    let layer = "text_encoder.transformer.3";
    let text = [
        ("text_encoder.embedding_layer.weight".to_owned(), "text.token_embedding.weight"),
        (format!("{layer}.pre_norm_mha.0.bias"), "text.transformer.resblocks.3.ln_1.bias"),
        (format!("{layer}.pre_norm_mha.1.qkv_proj.weight"), "text.transformer.resblocks.3.attn.in_proj_weight"),
        (format!("{layer}.pre_norm_mha.1.out_proj.bias"), "text.transformer.resblocks.3.attn.out_proj.bias"),
        (format!("{layer}.pre_norm_ffn.4.weight"), "text.transformer.resblocks.3.mlp.c_proj.weight"),
        ("text_encoder.final_layer_norm.weight".to_owned(), "text.ln_final.weight"),
        ("text_encoder.projection_layer".to_owned(), "text.text_projection"),
        ("logit_scale".to_owned(), "logit_scale"),
    ];
    for (theirs, _) in &text {
        tensors.insert(theirs.clone(), Entry::F32(vec![1], vec![0.5].into()));
    }
    let position = "text_encoder.positional_embedding.pos_embed.pos_embed";
    tensors.insert(position.into(), Entry::F32(vec![1, 1, 5, 2], vec![0.25; 10].into()));
    write_safetensors(&file, &tensors, &Default::default()).unwrap();
    let read = Checkpoint::open(&file).unwrap();
    assert_eq!(read.source().names_of, Some("Apple's MobileCLIP"));
    for (n, (_, timm)) in pairs.iter().enumerate() {
        let values =
            read.values(&format!("visual.trunk.{timm}")).unwrap().unwrap_or_else(|| panic!("{timm} is missing"));
        if *timm != "head.fc.weight" {
            assert_eq!(values, [n as f32], "{timm}");
        }
    }
    assert_eq!(read.shape("visual.trunk.head.fc.weight"), Some(&[2, 3][..]));
    assert_eq!(read.values("visual.trunk.head.fc.weight").unwrap().unwrap(), [0.0, 2.0, 4.0, 1.0, 3.0, 5.0]);
    assert_eq!(read.values("visual.trunk.head.fc.bias").unwrap().unwrap(), [0.0, 0.0]);
    assert_eq!(read.shape("text.positional_embedding"), Some(&[5, 2][..]));
    for (_, ours) in &text {
        assert!(read.contains(ours), "{ours}");
    }
    assert_eq!(read.names().count(), pairs.len() + text.len() + 2);
}
