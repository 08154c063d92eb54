//! What holds for every op of these families: all of the result is written, gradients add where asked, NaN stays.

use mcpipe_cpu::attention::Attention;
use mcpipe_cpu::layout::Patches;
use mcpipe_cpu::loss::Contrastive;
use mcpipe_cpu::pooling::Pool2d;
use mcpipe_cpu::resize::Resize;
use mcpipe_cpu::sigmoid_loss::SigmoidLoss;
use mcpipe_graph::{Activation, Distance, Init, Layout, Op};

use crate::backend::DeviceLayout;
use crate::device::{Device, Memory};
use crate::view::{Element, Forward, Grad, View, Vjp};

fn device() -> Option<Device> {
    #[cfg(feature = "shim")]
    if std::env::var_os("MCPIPE_SHIM").is_some() {
        return Some(Device::shim().expect("the library of kernels loads"));
    }
    if std::env::var_os("MCPIPE_TEST_GPU").is_some() {
        return Some(Device::open(0).expect("a GPU answers"));
    }
    eprintln!("skipped: neither MCPIPE_SHIM nor MCPIPE_TEST_GPU is set");
    None
}

/// An op, the lengths of its float arguments, its ids, the length of its value.
struct Case {
    op: Op,
    ins: Vec<usize>,
    ids: Option<Vec<i32>>,
    out: usize,
}

fn case(op: Op, ins: &[usize], out: usize) -> Case {
    Case { op, ins: ins.to_vec(), ids: None, out }
}

fn cases() -> Vec<Case> {
    let pool = |c| Pool2d { batch: 2, h: 7, w: 5, c, k: 3, stride: 2, pad: 1 };
    let resize = |c, aligned| Resize { batch: 2, h: 7, w: 5, c, oh: 4, ow: 9, aligned };
    let patches = |c| Patches { batch: 2, h: 4, w: 6, c, ph: 2, pw: 2 };
    let mut all = vec![
        case(Op::Exp, &[5], 5),
        case(
            Op::Contrastive(Contrastive { rows: 5, cols: 9, dim: 3, w_row: 0.5, w_col: 0.5, subtract_entropy: true }),
            &[15, 27, 1, 45, 45],
            1,
        ),
        case(Op::SigmoidLoss(SigmoidLoss { rows: 5, cols: 9, dim: 3 }), &[15, 27, 1, 1, 45], 1),
    ];
    for n in [1, 3, 127, 129, 1000, 5000] {
        all.extend([
            case(Op::Add, &[n, n], n),
            case(Op::Mul, &[n, n], n),
            case(Op::Scale(0.5), &[n], n),
            case(Op::Activation(Activation::Silu), &[n], n),
            case(Op::Mse, &[n, n], 1),
            case(Op::AddBroadcast, &[3 * n, n], 3 * n),
            case(Op::ScaleSamples { batch: 3, len: n }, &[3 * n, 3], 3 * n),
            case(Op::ScaleChannels { batch: 2, hw: n, c: 3 }, &[6 * n, 6], 6 * n),
            case(Op::ScaleChannels { batch: 2, hw: 3, c: n }, &[6 * n, 2 * n], 6 * n),
            case(Op::GlobalAvgPool { batch: 2, hw: n, c: 3 }, &[6 * n], 6),
            case(Op::L2Normalize { rows: 3, c: n }, &[3 * n], 3 * n),
            case(Op::Softmax { rows: 3, c: n, temperature: 0.5 }, &[3 * n], 3 * n),
            case(Op::Softmax { rows: n, c: 8, temperature: 0.5 }, &[8 * n], 8 * n),
            case(Op::Cosine { rows: 3, c: n }, &[3 * n, 3 * n], 1),
            case(Op::KlRows { rows: 3, c: n }, &[3 * n, 3 * n], 1),
            case(Op::AttentionTransferMap { batch: 2, hw: n, c: 8 }, &[16 * n], 2 * n),
            case(Op::RowLoss { rows: 3, c: n, distance: Distance::Mse, normalize: [true, false] }, &[3 * n, 3 * n], 1),
            case(Op::RowLoss { rows: n, c: 8, distance: Distance::Cosine, normalize: [true; 2] }, &[8 * n, 8 * n], 1),
            case(Op::TransferLoss { batch: 2, hw: n, c: 8 }, &[16 * n, 2 * n], 1),
            case(Op::TransferLoss { batch: 2, hw: 5, c: n }, &[10 * n, 10], 1),
            case(Op::PixelLoss { rows: n, c: 8, distance: Distance::Mse }, &[8 * n, 8 * n, 8], 1),
            case(Op::PixelLoss { rows: 5, c: n, distance: Distance::Cosine }, &[5 * n, 5 * n, n], 1),
            case(Op::ConcatLast { rows: 3, ca: n, cb: 8 }, &[3 * n, 24], 3 * n + 24),
            case(Op::PrependToken { batch: 2, tokens: 3, width: n }, &[n, 6 * n], 8 * n),
            case(Op::SliceRows { batch: 2, tokens: 4, width: n, start: 1, len: 2 }, &[8 * n], 4 * n),
            case(Op::Permute { shape: vec![2, 3, n], axes: vec![1, 0, 2] }, &[6 * n], 6 * n),
            case(Op::Permute { shape: vec![2, 3, n], axes: vec![2, 0, 1] }, &[6 * n], 6 * n),
            Case {
                ids: Some((0..n as i32).map(|i| i * i % 7).collect()),
                ..case(Op::Embedding { width: 9 }, &[9 * 9], 9 * n)
            },
            Case {
                ids: Some((0..n as i32).map(|i| i % 4).collect()),
                ..case(Op::GatherRows { batch: n, tokens: 4, width: 8 }, &[32 * n], 8 * n)
            },
        ]);
    }
    for (tokens, head_dim, causal) in [(1, 3, false), (17, 16, true), (65, 32, false), (130, 8, false)] {
        let d = Attention { batch: 4, tokens, heads: 3, head_dim, causal };
        let ins = [4 * tokens * 9 * head_dim, 2 * tokens * tokens];
        all.push(case(Op::MapLoss { attention: d, images: 2 }, &ins, 1));
    }
    for c in [3, 16] {
        let d = pool(c);
        let (x, y) = (2 * 7 * 5 * c, 2 * d.out_h() * d.out_w() * c);
        all.extend([
            case(Op::AvgPool(d), &[x], y),
            case(Op::MaxPool(d), &[x], y),
            case(Op::Resize(resize(c, false)), &[x], 2 * 4 * 9 * c),
            case(Op::Resize(resize(c, true)), &[x], 2 * 4 * 9 * c),
            case(Op::Unfold(patches(c)), &[48 * c], 48 * c),
            case(Op::Fold(patches(c)), &[48 * c], 48 * c),
        ]);
    }
    all
}

struct Held {
    memory: Memory,
    len: usize,
    element: Element,
}

impl Held {
    /// Values above 0, as rounded to the type.
    fn new(dev: &Device, values: &[f32], element: Element) -> Self {
        let memory = dev.alloc(values.len() * element.bytes()).expect("memory");
        let held = Held { memory, len: values.len(), element };
        let narrow: Vec<u16> = values.iter().map(|v| (v.to_bits() >> 16) as u16).collect();
        if element == Element::Bf16 { dev.upload(&narrow, held.view()) } else { dev.upload(values, held.view()) }
            .expect("an upload");
        held
    }

    fn view(&self) -> View {
        self.memory.view(self.len, self.element)
    }
}

struct Run {
    value: Vec<f32>,
    grads: Vec<Vec<f32>>,
}

fn run(dev: &Device, case: &Case, element: Element, ins: &[Vec<f32>], accumulate: bool) -> Run {
    // Scalars and what gradients of parameters flow to are f32 in every precision.
    let kind = |len: usize| if len < 2 { Element::F32 } else { element };
    let held: Vec<Held> = ins.iter().map(|v| Held::new(dev, v, kind(v.len()))).collect();
    let ids = case.ids.as_ref().map(|ids| {
        let memory = dev.alloc(4 * ids.len()).expect("memory");
        dev.upload(ids, memory.view(ids.len(), Element::I32)).expect("an upload");
        memory
    });
    let mut views: Vec<View> = held.iter().map(Held::view).collect();
    if let (Some(memory), Some(ids)) = (&ids, &case.ids) {
        views.push(memory.view(ids.len(), Element::I32));
    }
    let poisoned = |len: usize| Held::new(dev, &vec![f32::NAN; len], kind(len));
    let (out, saved) = (
        poisoned(case.out),
        DeviceLayout::default()
            .saved(&case.op)
            .iter()
            .map(|&n| Held::new(dev, &vec![f32::NAN; n], Element::F32))
            .collect::<Vec<_>>(),
    );
    let saved: Vec<View> = saved.iter().map(Held::view).collect();
    super::forward(dev, &case.op, Forward { ins: &views, out: out.view(), saved: &saved }).expect("launches");
    dev.release_scratch();
    let seed: Vec<f32> = noise(99, case.out);
    let dout = Held::new(dev, &seed, kind(case.out));
    let before = if accumulate { 1.0 } else { f32::NAN };
    let grads: Vec<Held> = ins.iter().map(|v| Held::new(dev, &vec![before; v.len()], Element::F32)).collect();
    let targets: Vec<Option<Grad>> = views
        .iter()
        .enumerate()
        .map(|(i, _)| {
            let wanted = i < grads.len() && case.op.differentiable(i);
            wanted.then(|| Grad { view: grads[i].view(), accumulate })
        })
        .collect();
    let io = Vjp { ins: &views, out: Some(out.view()), saved: &saved, dout: dout.view(), grads: &targets };
    super::vjp(dev, &case.op, io).expect("launches");
    dev.release_scratch();
    let wanted = targets.iter().zip(&grads).filter(|(t, _)| t.is_some());
    let grads = wanted.map(|(_, g)| dev.download(g.view()).expect("a download")).collect();
    Run { value: dev.download(out.view()).expect("a download"), grads }
}

/// Values in 0.1 to 0.9, so that they serve as probabilities too.
fn noise(seed: u64, len: usize) -> Vec<f32> {
    Init::Uniform(1.0).sample(seed, "noise", &[len]).iter().map(|v| 0.5 + 0.4 * v).collect()
}

#[test]
fn results_are_whole_gradients_add_and_nan_stays() {
    let Some(dev) = device() else { return };
    for case in cases() {
        let what = format!("{:?} of {:?}", case.op, case.ins);
        let ins: Vec<Vec<f32>> = case.ins.iter().enumerate().map(|(i, &n)| noise(i as u64, n)).collect();
        for element in [Element::F32, Element::Bf16] {
            let set = run(&dev, &case, element, &ins, false);
            assert!(set.value.iter().all(|v| v.is_finite()), "{what}: part of the value is missing");
            assert!(set.grads.iter().flatten().all(|v| v.is_finite()), "{what}: part of a gradient is missing");
            let again = run(&dev, &case, element, &ins, false);
            assert!(again.value == set.value && again.grads == set.grads, "{what}: not the same bits twice");
            let added = run(&dev, &case, element, &ins, true);
            for (a, g) in added.grads.iter().flatten().zip(set.grads.iter().flatten()) {
                assert!((a - g - 1.0).abs() <= 1e-5 * (1.0 + g.abs()), "{what}: {a} is not 1 + {g}");
            }
        }
        let mut bad = ins.clone();
        // The last of a packed qkv is a value, which maps don't read.
        let last = if matches!(case.op, Op::MapLoss { .. }) { 0 } else { bad[0].len() - 1 };
        // What slices and look-ups drop does not matter.
        if !matches!(case.op, Op::SliceRows { .. } | Op::Embedding { .. } | Op::GatherRows { .. } | Op::Resize(_)) {
            bad[0][last] = f32::NAN;
            let found = run(&dev, &case, Element::F32, &bad, false);
            assert!(found.value.iter().any(|v| v.is_nan()), "{what}: a NaN is lost");
        }
    }
}

#[test]
fn equal_ids_add_up_over_many_blocks() {
    let Some(dev) = device() else { return };
    // Runs of one id that cross pieces, ids that are never used, ids of more than two bytes.
    for (n, rows, width) in [(5000usize, 70000usize, 3usize), (3000, 5, 300), (1, 1, 1), (33, 2, 8)] {
        let ids: Vec<i32> = (0..n).map(|i| if i % 3 == 0 { 0 } else { (i * i % rows) as i32 }).collect();
        let dy = noise(3, n * width);
        let mut expected = vec![0.0f32; rows * width];
        mcpipe_cpu::embedding::embedding_backward(width, &ids, &dy, &mut expected);
        let held = Held::new(&dev, &dy, Element::F32);
        let table = Held::new(&dev, &vec![0.0; rows * width], Element::F32);
        let memory = dev.alloc(4 * n).expect("memory");
        dev.upload(&ids, memory.view(n, Element::I32)).expect("an upload");
        super::embedding::vjp(&dev, width, memory.view(n, Element::I32), held.view(), table.view()).expect("launches");
        dev.release_scratch();
        for (i, (f, e)) in dev.download(table.view()).expect("a download").iter().zip(&expected).enumerate() {
            assert!((f - e).abs() <= 1e-5 * (1.0 + e.abs()), "{n} of {rows}x{width}, {i}: {f}, expected {e}");
        }
    }
}
