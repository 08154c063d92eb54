//! Weight files: what is written comes back bit for bit; what does not fit is refused, all at once.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::fs;
use std::path::Path as File;

use mcpipe_graph::{GraphBuilder, Param, ParamKind, ParamStore, Path};
use mcpipe_models::weights::{Entry, NameMap, write_atomic, write_safetensors};
use mcpipe_models::{Checkpoint, WeightsError, backbone, text_encoder};
use safetensors::Dtype;
use safetensors::tensor::{TensorView, serialize};

fn store(params: &[(&str, &[usize], f32)]) -> ParamStore {
    let mut store = ParamStore::default();
    for (name, shape, value) in params {
        let len = shape.iter().product();
        let data = (0..len).map(|i| value + i as f32).collect();
        store.insert(Param { name: (*name).into(), shape: shape.to_vec(), kind: ParamKind::Decay, data });
    }
    store
}

fn entries(store: &ParamStore) -> BTreeMap<String, Entry<'_>> {
    let entry = |p: &'_ Param| Entry::F32(p.shape.clone(), Cow::Owned(p.data.clone()));
    store.params().iter().map(|p| (p.name.clone(), entry(p))).collect()
}

fn write(file: &File, store: &ParamStore) {
    write_safetensors(file, &entries(store), &BTreeMap::from([("k".into(), "v \"quoted\"".into())])).unwrap();
}

#[test]
fn what_is_written_comes_back() {
    let dir = tempfile::tempdir().unwrap();
    let (a, b) = (dir.path().join("a.safetensors"), dir.path().join("b.safetensors"));
    let written = store(&[("m.w", &[2, 3], 0.1), ("m.b", &[3], -7.5), ("m.s", &[], 2.5)]);
    write(&a, &written);
    write(&b, &written);
    assert_eq!(fs::read(&a).unwrap(), fs::read(&b).unwrap(), "the same bytes for the same tensors");
    let checkpoint = Checkpoint::open(&a).unwrap();
    assert_eq!(checkpoint.metadata()["k"], "v \"quoted\"");
    let mut read = store(&[("x.m.w", &[2, 3], 0.0), ("x.m.b", &[3], 0.0), ("x.m.s", &[1], 0.0), ("other", &[1], 4.0)]);
    let loaded = checkpoint.load(&mut read, &NameMap::whole("x")).unwrap();
    assert_eq!((loaded.taken, loaded.not_asked_for), (3, 0));
    for p in written.params() {
        assert_eq!(read.get(&format!("x.{}", p.name)).unwrap().data, p.data);
    }
    assert_eq!(read.get("other").unwrap().data, [4.0]);
    let left: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
    assert_eq!(left.len(), 2, "no temporary file is left: {left:?}");
}

#[test]
fn a_mismatch_lists_everything_and_changes_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("w.safetensors");
    let mut in_file = store(&[("a", &[2], 1.0), ("b", &[2, 2], 1.0), ("extra", &[1], 1.0)]);
    for i in 0..30 {
        in_file.insert(Param { name: format!("many.{i}"), shape: vec![1], kind: ParamKind::Decay, data: vec![0.0] });
    }
    write(&file, &in_file);
    let mut model = store(&[("a", &[2], 5.0), ("b", &[2, 3], 5.0), ("absent", &[4], 5.0)]);
    let before = model.clone();
    let error = Checkpoint::open(&file).unwrap().load(&mut model, &NameMap::whole("")).unwrap_err();
    let WeightsError::Mismatch { mismatch, .. } = &error else { panic!("{error}") };
    assert_eq!(mismatch.missing, ["absent"]);
    assert_eq!(mismatch.unexpected.len(), 31);
    assert_eq!(mismatch.wrong_shape, [("b".to_owned(), vec![2, 2], vec![2, 3])]);
    let message = error.to_string();
    assert!(message.contains("31 not in the model") && message.contains("and 21 more"), "{message}");
    assert_eq!(model.get("a").unwrap().data, before.get("a").unwrap().data);
}

#[test]
fn other_element_types_and_wrappers_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("w.safetensors");
    let (bf16, f16, f64): (Vec<u8>, Vec<u8>, Vec<u8>) = (
        [0x3fc0u16, 0xc000].iter().flat_map(|x| x.to_le_bytes()).collect(),
        [0x3e00u16, 0xc000].iter().flat_map(|x| x.to_le_bytes()).collect(),
        [1.5f64, -2.0].iter().flat_map(|x| x.to_le_bytes()).collect(),
    );
    let count = 7i64.to_le_bytes();
    let view = |dtype, shape: &[usize], data| TensorView::new(dtype, shape.to_vec(), data).unwrap();
    let tensors = [
        ("module.a", view(Dtype::BF16, &[2], &bf16)),
        ("module._orig_mod.b", view(Dtype::F16, &[2], &f16)),
        ("module.c", view(Dtype::F64, &[2], &f64)),
        ("module.bn.num_batches_tracked", view(Dtype::I64, &[], &count)),
    ];
    fs::write(&file, serialize(tensors, None).unwrap()).unwrap();
    let mut model = store(&[("a", &[2], 0.0), ("b", &[2], 0.0), ("c", &[2], 0.0)]);
    Checkpoint::open(&file).unwrap().load(&mut model, &NameMap::whole("")).unwrap();
    assert!(model.params().iter().all(|p| p.data == [1.5, -2.0]), "{model:?}");

    fs::write(&file, serialize([("a", view(Dtype::I64, &[], &count))], None).unwrap()).unwrap();
    let mut model = store(&[("a", &[], 0.0)]);
    let error = Checkpoint::open(&file).unwrap().load(&mut model, &NameMap::whole("")).unwrap_err();
    assert!(matches!(&error, WeightsError::Dtype { name, .. } if name == "a"), "{error}");

    let twice = [("a", view(Dtype::BF16, &[2], &bf16)), ("module.a", view(Dtype::BF16, &[2], &bf16))];
    fs::write(&file, serialize(twice, None).unwrap()).unwrap();
    assert!(matches!(Checkpoint::open(&file), Err(WeightsError::Corrupt { .. })));
}

#[test]
fn damaged_and_foreign_files_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("w.safetensors");
    write(&file, &store(&[("a", &[64], 1.0)]));
    let whole = fs::read(&file).unwrap();
    for cut in [0, 3, 8, 20, whole.len() / 2, whole.len() - 1] {
        fs::write(&file, &whole[..cut]).unwrap();
        assert!(matches!(Checkpoint::open(&file), Err(WeightsError::Corrupt { .. })), "cut at {cut}");
    }
    let mut flipped = whole.clone();
    *flipped.last_mut().unwrap() ^= 1;
    fs::write(&file, &flipped).unwrap();
    let error = Checkpoint::open(&file).unwrap_err();
    assert!(error.to_string().contains("checksum"), "{error}");
    let mut longer = whole;
    longer.extend([0; 4]);
    fs::write(&file, &longer).unwrap();
    assert!(matches!(Checkpoint::open(&file), Err(WeightsError::Corrupt { .. })));

    let disguised = dir.path().join("model.safetensors");
    fs::write(&disguised, b"PK\x03\x04 and more").unwrap();
    let error = Checkpoint::open(&disguised).unwrap_err();
    assert!(matches!(error, WeightsError::Corrupt { .. }) && error.to_string().contains("directory"), "{error}");
    assert!(matches!(Checkpoint::open(dir.path()), Err(WeightsError::Kind { .. })));
    assert!(matches!(Checkpoint::open(&dir.path().join("none.safetensors")), Err(WeightsError::Io { .. })));
}

#[test]
fn a_failed_write_leaves_what_was_there() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("state");
    fs::write(&file, "old").unwrap();
    let full = |_: &mut dyn std::io::Write| Err(std::io::Error::from(std::io::ErrorKind::StorageFull));
    assert!(matches!(write_atomic(&file, full), Err(WeightsError::Io { .. })));
    assert_eq!(fs::read_to_string(&file).unwrap(), "old");
    assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
    assert!(write_atomic(&dir.path().join("no/such/dir/file"), |_| Ok(())).is_err());
    let short = BTreeMap::from([("a".to_owned(), Entry::F32(vec![3], Cow::Owned(vec![1.0])))]);
    assert!(write_safetensors(&file, &short, &BTreeMap::new()).is_err());
    assert_eq!(fs::read_to_string(&file).unwrap(), "old");
}

/// The towers of a CLIP checkpoint are found in each of open_clip's forms.
#[test]
fn towers_are_found_in_clip_files() {
    let sizes = "width = 16\nheads = 2\ndepth = 1\nvocab_size = 20\ncontext_length = 4".parse().unwrap();
    let text = text_encoder("transformer", &sizes).unwrap();
    let image = backbone("vit", &"width = 16\nheads = 2\ndepth = 1\npatch_size = 8".parse().unwrap()).unwrap();
    let built = |image_path: &str, text_path: &str| {
        let mut g = GraphBuilder::new(true);
        let x = g.input("image", &[1, 16, 16, 3]);
        image.build(&mut g, &Path::new(image_path), &x, Some(8), &[]).unwrap();
        let (ids, eot) = (g.int_input("ids", &[1, 4]), g.int_input("eot", &[1]));
        text.build(&mut g, &Path::new(text_path), &ids, &eot, Some(8)).unwrap();
        g.finish()
    };
    let dir = tempfile::tempdir().unwrap();
    for (n, (visual, textual)) in [("visual", "text"), ("visual", ""), ("visual.trunk", "text")].into_iter().enumerate()
    {
        let mut published = ParamStore::default();
        published.init(&built(visual, textual), 1).unwrap();
        let file = dir.path().join(format!("{n}.safetensors"));
        write(&file, &published);
        let checkpoint = Checkpoint::open(&file).unwrap();
        let mut ours = ParamStore::default();
        ours.init(&built("t.image", "t.text"), 2).unwrap();
        let both = NameMap::new().and_image(&checkpoint, "t.image").and_text(&checkpoint, "t.text");
        let loaded = checkpoint.load(&mut ours, &both).unwrap();
        assert_eq!((loaded.taken, loaded.not_asked_for), (ours.params().len(), 0));
        let find = |name: &str| {
            let at = |path: &str, rest: &str| if path.is_empty() { rest.into() } else { format!("{path}.{rest}") };
            let theirs = match name.strip_prefix("t.image.") {
                Some(rest) => at(visual, rest),
                None => at(textual, &name["t.text.".len()..]),
            };
            published.get(&theirs).unwrap().data.clone()
        };
        assert!(ours.params().iter().all(|p| p.data == find(&p.name)));
        // One tower alone: the other's names are not unexpected.
        let mut one = ParamStore::default();
        one.init(&built("t.image", "t.text"), 3).unwrap();
        let loaded = checkpoint.load(&mut one, &NameMap::new().and_text(&checkpoint, "t.text")).unwrap();
        assert!(loaded.taken > 0 && loaded.not_asked_for > 0);
    }
}
