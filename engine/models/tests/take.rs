//! Weights for a model that does not take a file as it is: in part, resized, inherited from a larger model; and files
//! in another form.
#![allow(clippy::unwrap_used)] // a panic is how a test fails

use std::borrow::Cow;
use std::collections::BTreeMap;
use std::path::{Path as File, PathBuf};

use mcpipe_graph::{GraphBuilder, ParamStore, Path};
use mcpipe_models::weights::{
    ConvertOptions, Element, Entry, Form, NameMap, TakeOptions, Target, convert, fits, head_of, write_safetensors,
};
use mcpipe_models::{Backbone, Checkpoint, WeightsError, backbone};

fn model(name: &str, params: &str) -> Box<dyn Backbone> {
    backbone(name, &params.parse().unwrap()).unwrap()
}

fn vit(sizes: &str) -> Box<dyn Backbone> {
    model("vit", &format!("patch_size = 8\n{sizes}"))
}

/// An initialised store of a backbone under `path`.
fn store(backbone: &dyn Backbone, path: &str, side: usize, dim: Option<usize>, seed: u64) -> ParamStore {
    let mut g = GraphBuilder::new(true);
    let x = g.input("image", &[1, side, side, 3]);
    backbone.build(&mut g, &Path::new(path), &x, dim, &[]).unwrap();
    let mut store = ParamStore::default();
    store.init(&g.finish(), seed).unwrap();
    store
}

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Bench {
        Bench { dir: tempfile::tempdir().unwrap() }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn write(&self, store: &ParamStore) -> Checkpoint {
        let path = self.path("w.safetensors");
        let entry = |v: &[f32], shape: &[usize]| Entry::F32(shape.to_vec(), Cow::Owned(v.to_vec()));
        let tensors = store.params().iter().map(|p| (p.name.clone(), entry(&p.data, &p.shape))).collect();
        write_safetensors(&path, &tensors, &BTreeMap::new()).unwrap();
        Checkpoint::open(&path).unwrap()
    }
}

/// Parameters taken by a model, parameters left, parameters changed.
type Taken = (ParamStore, Vec<String>, Vec<String>);

fn take(
    file: &Checkpoint,
    backbone: &dyn Backbone,
    side: usize,
    dim: Option<usize>,
    options: &TakeOptions,
) -> Result<Taken, WeightsError> {
    let ours = store(backbone, "visual", side, dim, 9);
    let head: Vec<String> = head_of(backbone, side).unwrap().into_iter().map(|(name, _)| name).collect();
    let target = Target { params: &ours, path: "visual", head: &head };
    let names = NameMap::new().and_image(file, "visual");
    let plan = file.plan(target, &names, options)?;
    let taken = file.take(&plan, target)?;
    assert_eq!(taken.params().len(), plan.taken());
    assert_eq!(plan.taken() + plan.left.len(), ours.params().len());
    for p in taken.params() {
        assert_eq!(p.shape, ours.get(&p.name).unwrap().shape);
        assert_eq!(p.data.len(), p.shape.iter().product::<usize>(), "{}", p.name);
    }
    Ok((taken, plan.left, plan.changed))
}

fn mismatch(result: Result<Taken, WeightsError>) -> mcpipe_models::weights::Mismatch {
    match result {
        Err(WeightsError::Mismatch { mismatch, .. }) => *mismatch,
        other => panic!("{other:?}"),
    }
}

const SMALL: &str = "width = 16\nheads = 2\ndepth = 2";

#[test]
fn parts_are_taken_by_pattern() {
    let bench = Bench::new();
    let vit = vit(SMALL);
    let theirs = store(vit.as_ref(), "", 16, None, 1);
    let file = bench.write(&theirs);
    let (whole, left, changed) = take(&file, vit.as_ref(), 16, None, &TakeOptions::default()).unwrap();
    assert_eq!((whole.params().len(), left.len(), changed.len()), (theirs.params().len(), 0, 0));
    let options = TakeOptions {
        include: vec!["conv1.*".into(), "transformer.resblocks.*".into()],
        exclude: vec!["*.resblocks.1.*".into()],
        ..TakeOptions::default()
    };
    let (part, left, _) = take(&file, vit.as_ref(), 16, None, &options).unwrap();
    assert!(part.params().iter().all(|p| p.data == theirs.get(&p.name["visual.".len()..]).unwrap().data));
    assert_eq!(part.params().len(), 1 + 12);
    assert!(left.iter().any(|n| n == "visual.transformer.resblocks.1.ln_1.weight"));
    let options = TakeOptions { include: vec!["stages.*".into()], ..TakeOptions::default() };
    let error = take(&file, vit.as_ref(), 16, None, &options).unwrap_err();
    assert!(matches!(&error, WeightsError::Pattern { pattern, .. } if pattern == "stages.*"), "{error}");
}

#[test]
fn another_head_is_left_on_request() {
    let bench = Bench::new();
    let vit = vit(SMALL);
    let file = bench.write(&store(vit.as_ref(), "visual", 16, Some(8), 1));
    let resize = TakeOptions { resize_head: true, ..TakeOptions::default() };
    for dim in [None, Some(4)] {
        let found = mismatch(take(&file, vit.as_ref(), 16, dim, &TakeOptions::default()));
        assert_eq!((found.unexpected.len(), found.wrong_shape.len()), if dim.is_none() { (1, 0) } else { (0, 1) });
        assert!(found.to_string().contains("resize = [\"head\"]"), "{found}");
        let (taken, left, _) = take(&file, vit.as_ref(), 16, dim, &resize).unwrap();
        assert!(taken.get("visual.proj").is_none());
        assert_eq!(left.len(), usize::from(dim.is_some()));
    }
    let file = bench.write(&store(vit.as_ref(), "", 16, None, 1));
    let found = mismatch(take(&file, vit.as_ref(), 16, Some(4), &TakeOptions::default()));
    assert_eq!((found.missing.as_slice(), found.hints.len()), (&["proj".to_owned()][..], 1));
    assert_eq!(take(&file, vit.as_ref(), 16, Some(4), &resize).unwrap().1, ["visual.proj"]);
}

#[test]
fn positions_are_resized_on_request() {
    let bench = Bench::new();
    let vit = vit(SMALL);
    let theirs = store(vit.as_ref(), "visual", 16, None, 1);
    let file = bench.write(&theirs);
    let found = mismatch(take(&file, vit.as_ref(), 32, None, &TakeOptions::default()));
    assert!(found.to_string().contains("resize = [\"position\"]"), "{found}");
    let options = TakeOptions { resize_position: true, ..TakeOptions::default() };
    let (taken, left, changed) = take(&file, vit.as_ref(), 32, None, &options).unwrap();
    assert_eq!((left.len(), changed), (0, vec!["visual.positional_embedding".to_owned()]));
    let (old, new) =
        (theirs.get("visual.positional_embedding").unwrap(), taken.get("visual.positional_embedding").unwrap());
    assert_eq!(new.shape, [17, 16]);
    assert_eq!(new.data[..16], old.data[..16], "the class token's position stays");
}

#[test]
fn a_smaller_transformer_inherits_layers_and_channels() {
    let bench = Bench::new();
    let (large, small) = (vit("width = 32\nheads = 4\ndepth = 4"), vit(SMALL));
    let theirs = store(large.as_ref(), "visual", 32, None, 1);
    let file = bench.write(&theirs);
    let found = mismatch(take(&file, small.as_ref(), 16, None, &TakeOptions::default()));
    assert!(found.to_string().contains("inherit = true"), "{found}");
    let inherit = TakeOptions { inherit: true, ..TakeOptions::default() };
    let (taken, left, _) = take(&file, small.as_ref(), 16, None, &inherit).unwrap();
    assert!(left.is_empty());
    let of = |store: &ParamStore, name: &str| store.get(&format!("visual.{name}")).unwrap().data.clone();
    // The last block inherits from the last: of queries, keys and values each the leading 16 rows and columns.
    let (a, b) = (
        of(&taken, "transformer.resblocks.1.attn.in_proj_weight"),
        of(&theirs, "transformer.resblocks.3.attn.in_proj_weight"),
    );
    for (row, source) in [(0, 0), (15, 15), (16, 32), (31, 47), (32, 64), (47, 79)] {
        assert_eq!(a[row * 16..][..16], b[source * 32..][..16], "row {row}");
    }
    let (a, b) = (
        of(&taken, "transformer.resblocks.0.mlp.c_proj.weight"),
        of(&theirs, "transformer.resblocks.0.mlp.c_proj.weight"),
    );
    assert_eq!((&a[..64], &a[64..128]), (&b[..64], &b[128..192]));
    // The other way round there is nothing to inherit.
    let file = bench.write(&store(small.as_ref(), "visual", 16, None, 1));
    let found = mismatch(take(&file, large.as_ref(), 32, None, &inherit));
    assert!(!found.is_empty());
    assert!(found.to_string().contains("takes from a larger model of the same family"), "{found}");
}

#[test]
fn a_smaller_mobilevit_inherits_everything_from_a_larger_one() {
    let bench = Bench::new();
    let (large, small) = (model("mobilevit_xs", ""), model("mobilevit_xxs", ""));
    let theirs = store(large.as_ref(), "visual.trunk", 64, None, 1);
    let file = bench.write(&theirs);
    let inherit = TakeOptions { inherit: true, ..TakeOptions::default() };
    let (taken, left, changed) = take(&file, small.as_ref(), 64, None, &inherit).unwrap();
    assert!(left.is_empty() && changed.len() > 100, "{left:?}");
    let mean = |s: &ParamStore, n: &str| s.get(n).unwrap().data.len();
    assert_eq!(mean(&taken, "visual.final_conv.bn.running_mean"), 320);
    assert_eq!(mean(&theirs, "visual.trunk.final_conv.bn.running_mean"), 384);
}

#[test]
fn files_tell_which_backbone_they_fit() {
    let bench = Bench::new();
    let xxs = model("mobilevit_xxs", "");
    for (path, dim) in [("", None), ("visual.trunk", Some(24))] {
        let file = bench.write(&store(xxs.as_ref(), path, 64, dim, 1));
        let fits = fits(&file);
        assert_eq!((fits[0].backbone, fits[0].is_exact(), fits[0].dim), ("mobilevit_xxs", true, dim));
        assert_eq!((fits[0].matched, fits[0].share()), (fits[0].parameters, 1.0));
        let xs = fits.iter().find(|f| f.backbone == "mobilevit_xs").unwrap();
        assert!(!xs.is_exact() && xs.share() < 1.0 && !xs.mismatch.wrong_shape.is_empty());
    }
}

#[test]
fn trunks_are_converted_both_ways() {
    let bench = Bench::new();
    let xxs = model("mobilevit_xxs", "");
    let theirs = store(xxs.as_ref(), "", 64, None, 1);
    let file = bench.write(&theirs);
    let to = |file: &Checkpoint, form, element| {
        let options = ConvertOptions { form: Some(form), backbone: Some(xxs.as_ref()), include: &[], element };
        let out = bench.path("out.safetensors");
        write_safetensors(&out, &convert(file, options).unwrap(), &BTreeMap::new()).unwrap();
        out
    };
    let raw = std::fs::read(to(&file, Form::OpenClip, None)).unwrap();
    let header =
        String::from_utf8_lossy(&raw[8..8 + u64::from_le_bytes(raw[..8].try_into().unwrap()) as usize]).into_owned();
    assert!(header.contains("\"visual.trunk.stem.bn.num_batches_tracked\":{\"dtype\":\"I64\""), "{header}");
    std::fs::rename(bench.path("out.safetensors"), bench.path("clip.safetensors")).unwrap();
    let clip = Checkpoint::open(&bench.path("clip.safetensors")).unwrap();
    let back = Checkpoint::open(&to(&clip, Form::Timm, None)).unwrap();
    for p in theirs.params() {
        assert_eq!(clip.values(&format!("visual.trunk.{}", p.name)).unwrap().unwrap(), p.data);
        assert_eq!(back.values(&p.name).unwrap().unwrap(), p.data);
    }
    let half = Checkpoint::open(&to(&clip, Form::Timm, Some(Element::F16))).unwrap();
    let name = "stem.conv.weight";
    assert_eq!(half.element(name), Some(Element::F16));
    let worst = half
        .values(name)
        .unwrap()
        .unwrap()
        .iter()
        .zip(&theirs.get(name).unwrap().data)
        .map(|(a, b)| (a - b).abs() / b.abs().max(1e-4))
        .fold(0.0, f32::max);
    assert!(worst > 0.0 && worst < 1.0 / 1024.0, "{worst}");
}

#[test]
fn conversions_that_make_no_sense_are_refused() {
    let bench = Bench::new();
    let (xxs, xs) = (model("mobilevit_xxs", ""), model("mobilevit_xs", ""));
    let file = bench.write(&store(xxs.as_ref(), "", 64, None, 1));
    let options = ConvertOptions { backbone: Some(xs.as_ref()), ..ConvertOptions::default() };
    assert!(matches!(convert(&file, options), Err(WeightsError::Mismatch { .. })));
    let include = ["nothing.*".to_owned()];
    let options = ConvertOptions { include: &include, ..ConvertOptions::default() };
    assert!(matches!(convert(&file, options), Err(WeightsError::Pattern { .. })));
    let include = ["stem.*".to_owned()];
    let part = convert(&file, ConvertOptions { include: &include, ..ConvertOptions::default() }).unwrap();
    assert!(part.len() == 5 && part.keys().all(|name| name.starts_with("stem.")), "{:?}", part.keys());
    let options = ConvertOptions { element: Some(Element::I8), ..ConvertOptions::default() };
    assert!(matches!(convert(&file, options), Err(WeightsError::Export(_))));
    let native = bench.write(&store(vit(SMALL).as_ref(), "visual", 16, None, 1));
    let options = ConvertOptions { form: Some(Form::Timm), ..ConvertOptions::default() };
    assert!(convert(&native, options).unwrap_err().to_string().contains("open_clip"));
    let fixture = File::new(env!("CARGO_MANIFEST_DIR")).join("tests/fixtures/checkpoints/zip.pt");
    let strange = Checkpoint::open(&fixture).unwrap();
    let options = ConvertOptions { form: Some(Form::OpenClip), ..ConvertOptions::default() };
    assert!(convert(&strange, options).unwrap_err().to_string().contains("--backbone"));
}

/// A teacher's towers at another image size and context.
#[test]
fn loading_resizes_positions_of_both_towers() {
    let bench = Bench::new();
    let vit = vit(SMALL);
    let theirs = store(vit.as_ref(), "visual", 16, None, 1);
    let file = bench.write(&theirs);
    let mut ours = store(vit.as_ref(), "visual", 32, None, 2);
    let names = NameMap::new().and_image(&file, "visual");
    let before = ours.get("visual.ln_pre.weight").unwrap().data.clone();
    assert!(matches!(file.load(&mut ours, &names), Err(WeightsError::Mismatch { .. })));
    assert_eq!(ours.get("visual.ln_pre.weight").unwrap().data, before);
    file.load_resized(&mut ours, &names).unwrap();
    let of = |store: &ParamStore, name: &str| store.get(name).unwrap().data.clone();
    assert_eq!(of(&ours, "visual.conv1.weight"), of(&theirs, "visual.conv1.weight"));
    let (old, new) = (of(&theirs, "visual.positional_embedding"), of(&ours, "visual.positional_embedding"));
    assert_eq!((new.len(), &new[..16]), (17 * 16, &old[..16]));
    // A resized grid keeps its mean, as its filter's weights sum to one and lie symmetrically.
    let mean = |grid: &[f32]| grid.iter().map(|&v| f64::from(v)).sum::<f64>() / grid.len() as f64;
    assert!((mean(&new[16..]) - mean(&old[16..])).abs() < 1e-6);
}
