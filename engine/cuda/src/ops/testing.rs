//! Runs one op on the shim or a GPU, for the tests beside the ops.

use mcpipe_graph::Op;

use crate::device::{Device, Memory};
use crate::view::{Element, Forward, Grad, View, Vjp};

/// The shim where its library is named, a GPU where that is asked for.
pub(crate) fn device() -> Option<Device> {
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

/// `n` values between −1 and 1.
pub(crate) fn noise(seed: u64, n: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

/// The values as bf16 has them.
pub(crate) fn rounded(values: &[f32], element: Element) -> Vec<f32> {
    match element {
        Element::Bf16 => values.iter().map(|v| half::bf16::from_f32(*v).to_f32()).collect(),
        _ => values.to_vec(),
    }
}

/// A tensor on the device.
pub(crate) struct Held {
    memory: Memory,
    len: usize,
    element: Element,
}

impl Held {
    pub(crate) fn new(dev: &Device, values: &[f32], element: Element) -> Self {
        let held = Held::empty(dev, values.len(), element);
        let narrow: Vec<u16> = values.iter().map(|v| half::bf16::from_f32(*v).to_bits()).collect();
        let sent = match element {
            Element::Bf16 => dev.upload(&narrow, held.view()),
            _ => dev.upload(values, held.view()),
        };
        sent.expect("values go up");
        held
    }

    /// Holding NaN.
    pub(crate) fn empty(dev: &Device, len: usize, element: Element) -> Self {
        let held = Held { memory: dev.alloc(len * element.bytes()).expect("memory"), len, element };
        dev.fill(held.view(), 0xff).expect("memory is filled");
        held
    }

    pub(crate) fn view(&self) -> View {
        self.memory.view(self.len, self.element)
    }

    pub(crate) fn get(&self, dev: &Device) -> Vec<f32> {
        dev.download(self.view()).expect("values come down")
    }
}

/// What an op gave: value, saved tensors, gradients (those asked for).
pub(crate) struct Ran {
    pub(crate) value: Vec<f32>,
    pub(crate) saved: Vec<Vec<f32>>,
    pub(crate) grads: Vec<Vec<f32>>,
}

/// Forward and VJP. The first input and the value are of type `element`; a gradient that accumulates starts with ones.
/// Every other gradient takes memory that holds NaN.
pub(crate) fn run(
    dev: &Device,
    op: &Op,
    inputs: &[&[f32]],
    wanted: usize,
    numel: usize,
    dy: &[f32],
    element: Element,
    accumulate: bool,
) -> Ran {
    let kind = |i: usize| if i == 0 { element } else { Element::F32 };
    let ins: Vec<Held> = inputs.iter().enumerate().map(|(i, v)| Held::new(dev, v, kind(i))).collect();
    let views: Vec<View> = ins.iter().map(Held::view).collect();
    let out = Held::empty(dev, numel, element);
    let saved: Vec<Held> = op.saved().iter().map(|&n| Held::empty(dev, n, Element::F32)).collect();
    let saved_views: Vec<View> = saved.iter().map(Held::view).collect();
    super::forward(dev, op, Forward { ins: &views, out: out.view(), saved: &saved_views }).expect("forward");
    dev.release_scratch();
    let dout = Held::new(dev, dy, element);
    let grads: Vec<Held> = (0..wanted)
        .map(|i| match accumulate {
            true => Held::new(dev, &vec![1.0; inputs[i].len()], kind(i)),
            false => Held::empty(dev, inputs[i].len(), kind(i)),
        })
        .collect();
    let mut targets: Vec<Option<Grad>> = grads.iter().map(|g| Some(Grad { view: g.view(), accumulate })).collect();
    targets.resize(inputs.len(), None);
    let io = Vjp { ins: &views, out: Some(out.view()), saved: &saved_views, dout: dout.view(), grads: &targets };
    super::vjp(dev, op, io).expect("vjp");
    dev.release_scratch();
    Ran {
        value: out.get(dev),
        saved: saved.iter().map(|s| s.get(dev)).collect(),
        grads: grads.iter().map(|g| g.get(dev)).collect(),
    }
}

/// |a − b| / |b|; NaN where either has one.
pub(crate) fn error(a: &[f32], b: &[f32]) -> f64 {
    assert_eq!(a.len(), b.len());
    let square = |it: &mut dyn Iterator<Item = f64>| it.map(|v| v * v).sum::<f64>().sqrt();
    let difference = square(&mut a.iter().zip(b).map(|(a, b)| f64::from(*a) - f64::from(*b)));
    difference / (square(&mut b.iter().map(|b| f64::from(*b))) + 1e-4)
}

/// Panics unless the error is within the bar of the element type.
pub(crate) fn close(what: &str, a: &[f32], b: &[f32], element: Element) {
    let (error, bar) = (error(a, b), if element == Element::Bf16 { 1e-2 } else { 1e-5 });
    assert!(error <= bar, "{what} ({element:?}): {error:.2e} > {bar:.0e}");
}
