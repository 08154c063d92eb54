//! Elementary functions on SIMD vectors, NaN in always NaN out, and the activations built of them.

use crate::simd::Simd;

/// `1 / (1 + e^-x)`, relative error below 3e-7.
#[inline(always)]
pub(crate) fn sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    s.recip(s.add(s.splat(1.0), s.exp(s.sub(s.zero(), x))))
}

/// `tanh x`, relative error below 4e-7: an odd polynomial near 0, where the quotient of exponentials cancels.
#[inline(always)]
pub(crate) fn tanh<S: Simd>(s: S, x: S::V) -> S::V {
    let one = s.splat(1.0);
    let magnitude = s.select_gt(s.zero(), x, s.sub(s.zero(), x), x);
    let e = s.exp_bounded(s.mul(magnitude, s.splat(-2.0)));
    let large = s.mul(s.sub(one, e), s.recip(s.add(one, e)));
    let large = s.select_gt(s.zero(), x, s.sub(s.zero(), large), large);
    // Taylor series to x^15, good to 1e-8 relative on |x| <= 0.4.
    let x2 = s.mul(x, x);
    let mut p = s.splat(-929_569.0 / 638_512_875.0);
    for coefficient in
        [21_844.0 / 6_081_075.0, -1_382.0 / 155_925.0, 62.0 / 2_835.0, -17.0 / 315.0, 2.0 / 15.0, -1.0 / 3.0, 1.0]
    {
        p = s.fma(p, x2, s.splat(coefficient));
    }
    s.select_gt(magnitude, s.splat(0.4), large, s.mul(x, p))
}

/// The standard normal distribution function and its density at `x`.
///
/// With t = |x|, Φ(−t) = e^(−t²/2)·h(t), where h(t) = erfcx(t/√2)/2 is a degree-9 polynomial in
/// u = 1/(1 + t/4), fitted by least squares of the relative error (6.4e-8 at most on 0 <= t <= 14). Both
/// tails keep their relative precision.
#[inline(always)]
fn normal<S: Simd>(s: S, x: S::V) -> (S::V, S::V) {
    let one = s.splat(1.0);
    let t = s.select_gt(s.zero(), x, s.sub(s.zero(), x), x);
    let bell = s.exp_bounded(s.mul(s.mul(x, x), s.splat(-0.5)));
    // Far out the density is 0 and only finiteness matters.
    let u = s.recip(s.fma(s.min(s.splat(1e3), t), s.splat(0.25), one));
    let mut p = s.splat(0.026_194_198);
    for coefficient in [
        -0.155_024_28,
        0.300_541_2,
        -0.210_654_72,
        0.204_995_45,
        0.031_602_813,
        0.104_072_43,
        0.098_472_92,
        0.099_799_97,
    ] {
        p = s.fma(p, u, s.splat(coefficient));
    }
    let lower = s.mul(bell, s.mul(p, u));
    let cdf = s.select_gt(s.zero(), x, lower, s.sub(one, lower));
    // 1/√(2π)
    (cdf, s.mul(bell, s.splat(0.398_942_3)))
}

/// `clamp(x + 3, 0, 6) / 6`.
#[inline(always)]
fn hard_sigmoid<S: Simd>(s: S, x: S::V) -> S::V {
    let shifted = s.add(x, s.splat(3.0));
    s.mul(s.min(s.splat(6.0), s.max(s.zero(), shifted)), s.splat(1.0 / 6.0))
}

/// 2·√(2/π).
const GELU_TANH: f32 = 1.595_769;

/// 2·√(2/π)·(x + 0.044715·x³): (1 + tanh z)/2 = σ(2z), which keeps the lower tail's relative precision.
#[inline(always)]
fn gelu_tanh_argument<S: Simd>(s: S, x: S::V) -> S::V {
    // 2·√(2/π)·0.044715
    s.mul(x, s.fma(s.mul(x, x), s.splat(0.071_354_814), s.splat(GELU_TANH)))
}

/// A scalar function and its derivative, on vectors.
pub(crate) trait Act: Copy + Send + Sync + 'static {
    /// f(x).
    fn value<S: Simd>(s: S, x: S::V) -> S::V;
    /// f'(x).
    fn slope<S: Simd>(s: S, x: S::V) -> S::V;
}

macro_rules! acts {
    ($($name:ident: $s:ident, $x:ident => $value:expr, $slope:expr;)*) => {$(
        #[derive(Clone, Copy)]
        pub(crate) struct $name;
        impl Act for $name {
            #[inline(always)]
            fn value<S: Simd>($s: S, $x: S::V) -> S::V {
                $value
            }
            #[inline(always)]
            fn slope<S: Simd>($s: S, $x: S::V) -> S::V {
                $slope
            }
        }
    )*};
}

acts! {
    Identity: _s, x => x, { let _ = x; _s.splat(1.0) };
    Relu: s, x => s.select_gt(s.zero(), x, s.zero(), x), s.select_gt(x, s.zero(), s.splat(1.0), s.zero());
    Relu6: s, x => s.min(s.splat(6.0), s.max(s.zero(), x)), {
        let inside = s.select_gt(s.splat(6.0), x, s.splat(1.0), s.zero());
        s.select_gt(x, s.zero(), inside, s.zero())
    };
    Silu: s, x => s.mul(x, sigmoid(s, x)), {
        let y = sigmoid(s, x);
        let one = s.splat(1.0);
        s.mul(y, s.fma(x, s.sub(one, y), one))
    };
    Gelu: s, x => s.mul(x, normal(s, x).0), {
        let (cdf, density) = normal(s, x);
        s.fma(x, density, cdf)
    };
    GeluTanh: s, x => s.mul(x, sigmoid(s, gelu_tanh_argument(s, x))), {
        // Beyond ±20 the slope is 0 or 1 already; the bound keeps the products finite.
        let x = s.min(s.splat(20.0), s.max(s.splat(-20.0), x));
        let y = sigmoid(s, gelu_tanh_argument(s, x));
        let one = s.splat(1.0);
        // The argument's derivative: 2·√(2/π)·(1 + 3·0.044715·x²).
        let rise = s.fma(s.mul(x, x), s.splat(0.214_066_12), s.splat(GELU_TANH));
        s.mul(y, s.fma(s.mul(x, rise), s.sub(one, y), one))
    };
    QuickGelu: s, x => s.mul(x, sigmoid(s, s.mul(x, s.splat(1.702)))), {
        let scaled = s.mul(x, s.splat(1.702));
        let y = sigmoid(s, scaled);
        let one = s.splat(1.0);
        s.mul(y, s.fma(scaled, s.sub(one, y), one))
    };
    HardSwish: s, x => s.mul(x, hard_sigmoid(s, x)), {
        let inner = s.fma(x, s.splat(1.0 / 3.0), s.splat(0.5));
        let upper = s.select_gt(x, s.splat(3.0), s.splat(1.0), inner);
        s.select_gt(s.splat(-3.0), x, s.zero(), upper)
    };
    HardSigmoid: s, x => hard_sigmoid(s, x), {
        let inside = s.select_gt(s.splat(3.0), x, s.splat(1.0 / 6.0), s.zero());
        s.select_gt(x, s.splat(-3.0), inside, s.zero())
    };
    Sigmoid: s, x => sigmoid(s, x), {
        let y = sigmoid(s, x);
        s.mul(y, s.sub(s.splat(1.0), y))
    };
    Tanh: s, x => tanh(s, x), {
        let y = tanh(s, x);
        s.sub(s.splat(1.0), s.mul(y, y))
    };
}
