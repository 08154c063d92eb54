//! Activations: values and VJPs, and the choice of one inside fused kernels.

use rayon::prelude::*;

use crate::simd::{Level, Simd};
use crate::simd_fn;
use crate::vmath::Act;

/// An element-wise activation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Activation {
    /// x.
    #[default]
    Identity,
    /// max(x, 0).
    Relu,
    /// min(max(x, 0), 6).
    Relu6,
    /// x·σ(x) (swish).
    Silu,
    /// x·Φ(x) with the exact normal distribution function (torch's default `approximate="none"`).
    Gelu,
    /// x·(1 + tanh(√(2/π)·(x + 0.044715·x³)))/2 (torch's `approximate="tanh"`).
    GeluTanh,
    /// x·σ(1.702·x), the form of OpenAI's CLIP.
    QuickGelu,
    /// x·clamp(x + 3, 0, 6)/6.
    HardSwish,
    /// clamp(x + 3, 0, 6)/6.
    HardSigmoid,
    /// σ(x) = 1/(1 + e^−x).
    Sigmoid,
    /// tanh x.
    Tanh,
}

impl Activation {
    /// Every activation.
    pub const ALL: [Activation; 11] = [
        Activation::Identity,
        Activation::Relu,
        Activation::Relu6,
        Activation::Silu,
        Activation::Gelu,
        Activation::GeluTanh,
        Activation::QuickGelu,
        Activation::HardSwish,
        Activation::HardSigmoid,
        Activation::Sigmoid,
        Activation::Tanh,
    ];
}

/// Calls `$body` with the type alias `$act` naming the vector form of the activation `$a`, so that the
/// choice is made once per call and not once per element.
macro_rules! with_act {
    ($a:expr, $act:ident => $body:expr) => {
        match $a {
            $crate::activation::Activation::Identity => {
                type $act = $crate::vmath::Identity;
                $body
            }
            $crate::activation::Activation::Relu => {
                type $act = $crate::vmath::Relu;
                $body
            }
            $crate::activation::Activation::Relu6 => {
                type $act = $crate::vmath::Relu6;
                $body
            }
            $crate::activation::Activation::Silu => {
                type $act = $crate::vmath::Silu;
                $body
            }
            $crate::activation::Activation::Gelu => {
                type $act = $crate::vmath::Gelu;
                $body
            }
            $crate::activation::Activation::GeluTanh => {
                type $act = $crate::vmath::GeluTanh;
                $body
            }
            $crate::activation::Activation::QuickGelu => {
                type $act = $crate::vmath::QuickGelu;
                $body
            }
            $crate::activation::Activation::HardSwish => {
                type $act = $crate::vmath::HardSwish;
                $body
            }
            $crate::activation::Activation::HardSigmoid => {
                type $act = $crate::vmath::HardSigmoid;
                $body
            }
            $crate::activation::Activation::Sigmoid => {
                type $act = $crate::vmath::Sigmoid;
                $body
            }
            $crate::activation::Activation::Tanh => {
                type $act = $crate::vmath::Tanh;
                $body
            }
        }
    };
}
pub(crate) use with_act;

/// Elements of one task of an element-wise kernel: 64 KiB, so that a task's slices stay in L2.
pub(crate) const CHUNK: usize = 16 * 1024;

#[inline(always)]
fn forward_act<S: Simd, A: Act>(s: S, x: &[f32], y: &mut [f32]) {
    let mut x_vectors = x.chunks_exact(S::LANES);
    let mut y_vectors = y.chunks_exact_mut(S::LANES);
    for (xv, yv) in (&mut x_vectors).zip(&mut y_vectors) {
        s.store(yv, A::value(s, s.load(xv)));
    }
    s.store_partial(y_vectors.into_remainder(), A::value(s, s.load_partial(x_vectors.remainder())));
}

#[inline(always)]
fn forward_impl<S: Simd>(s: S, a: Activation, x: &[f32], y: &mut [f32]) {
    with_act!(a, A => forward_act::<S, A>(s, x, y))
}

#[inline(always)]
fn backward_act<S: Simd, A: Act>(s: S, x: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool) {
    let mut i = 0;
    while i + S::LANES <= dx.len() {
        let g = s.mul(s.load(&dy[i..]), A::slope(s, s.load(&x[i..])));
        let g = if accumulate { s.add(s.load(&dx[i..]), g) } else { g };
        s.store(&mut dx[i..], g);
        i += S::LANES;
    }
    let g = s.mul(s.load_partial(&dy[i..]), A::slope(s, s.load_partial(&x[i..])));
    let g = if accumulate { s.add(s.load_partial(&dx[i..]), g) } else { g };
    s.store_partial(&mut dx[i..], g);
}

#[inline(always)]
fn backward_impl<S: Simd>(s: S, a: Activation, x: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool) {
    with_act!(a, A => backward_act::<S, A>(s, x, dy, dx, accumulate))
}

simd_fn! {
    fn forward_chunk(a: Activation, x: &[f32], y: &mut [f32]) = forward_impl;
    fn backward_chunk(a: Activation, x: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool) = backward_impl;
}

/// y = a(x), element by element.
pub fn activation_forward(a: Activation, x: &[f32], y: &mut [f32]) {
    assert_eq!(x.len(), y.len(), "x and y have one length");
    let level = Level::active();
    if x.len() <= CHUNK {
        return forward_chunk(level, a, x, y);
    }
    y.par_chunks_mut(CHUNK).zip(x.par_chunks(CHUNK)).for_each(|(y, x)| forward_chunk(level, a, x, y));
}

/// VJP of [`activation_forward`]: dx (+)= dy·a'(x).
pub fn activation_backward(a: Activation, x: &[f32], dy: &[f32], dx: &mut [f32], accumulate: bool) {
    assert!(x.len() == dx.len() && dy.len() == dx.len(), "x, dy and dx have one length");
    let level = Level::active();
    if dx.len() <= CHUNK {
        return backward_chunk(level, a, x, dy, dx, accumulate);
    }
    dx.par_chunks_mut(CHUNK)
        .zip(x.par_chunks(CHUNK).zip(dy.par_chunks(CHUNK)))
        .for_each(|(dx, (x, dy))| backward_chunk(level, a, x, dy, dx, accumulate));
}
