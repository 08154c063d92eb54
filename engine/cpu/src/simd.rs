//! SIMD levels and a portable vector type, so that a kernel is written once and compiled for each level.
//!
//! A kernel is a `#[inline(always)]` function generic over [`Simd`]; [`simd_fn!`](crate::simd_fn) wraps it in one
//! function per level with the right `#[target_feature]` and dispatches on a [`Level`]:
//!
//! ```
//! use mcpipe_cpu::{simd::{Level, Simd}, simd_fn};
//!
//! #[inline(always)]
//! fn axpy_impl<S: Simd>(s: S, a: f32, x: &[f32], y: &mut [f32]) {
//!     let va = s.splat(a);
//!     let mut i = 0;
//!     while i + S::LANES <= x.len() {
//!         let v = s.fma(va, s.load(&x[i..]), s.load(&y[i..]));
//!         s.store(&mut y[i..], v);
//!         i += S::LANES;
//!     }
//!     if i < x.len() {
//!         let v = s.fma(va, s.load_partial(&x[i..]), s.load_partial(&y[i..]));
//!         s.store_partial(&mut y[i..], v);
//!     }
//! }
//! simd_fn! {
//!     /// `y += a * x`.
//!     pub fn axpy(a: f32, x: &[f32], y: &mut [f32]) = axpy_impl;
//! }
//!
//! let mut y = [1.0; 5];
//! axpy(Level::active(), 2.0, &[1.0; 5], &mut y);
//! assert_eq!(y, [3.0; 5]);
//! ```
//!
//! Everything called inside a kernel body must be inlined into it (`#[inline(always)]`, also on helpers generic over
//! `S`), or it is compiled without the level's instructions. Plain loops over slices inside such a body are
//! auto-vectorised for the level too.

use std::sync::OnceLock;

/// Which instruction set a [`Level`] stands for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// No explicit instructions: 4-lane arrays that the compiler vectorises for the baseline target.
    Scalar,
    /// AVX2 and FMA, 8 lanes.
    Avx2,
    /// AVX-512 F, VL, BW and DQ, 16 lanes.
    Avx512,
}

/// An instruction set that this machine is known to have: only this module makes one, after asking the CPU.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Level(Kind);

impl Level {
    /// The level that every machine has.
    pub const SCALAR: Level = Level(Kind::Scalar);

    /// The best level of this machine, lowered by the environment variable `MCPIPE_SIMD` (`avx512`, `avx2`,
    /// `scalar`; another value, or a level that the machine lacks, is ignored). Read once.
    pub fn active() -> Level {
        static ACTIVE: OnceLock<Level> = OnceLock::new();
        *ACTIVE.get_or_init(|| {
            let best = Self::detect();
            let asked = match std::env::var("MCPIPE_SIMD").as_deref() {
                Ok("scalar") => Level(Kind::Scalar),
                Ok("avx2") => Level(Kind::Avx2),
                _ => best,
            };
            asked.min(best)
        })
    }

    /// Every level of this machine, lowest first: for tests that compare them.
    pub fn available() -> Vec<Level> {
        let best = Self::detect();
        [Kind::Scalar, Kind::Avx2, Kind::Avx512].into_iter().map(Level).filter(|level| *level <= best).collect()
    }

    /// The instruction set.
    pub fn kind(self) -> Kind {
        self.0
    }

    /// f32 lanes of a vector at this level.
    pub fn lanes(self) -> usize {
        match self.0 {
            Kind::Scalar => 4,
            Kind::Avx2 => 8,
            Kind::Avx512 => 16,
        }
    }

    /// Whether this level multiplies pairs of bf16 by an instruction of its own (AVX512_BF16); else two f32 ones do.
    pub fn has_bf16(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        return self.0 == Kind::Avx512 && is_x86_feature_detected!("avx512bf16");
        #[cfg(not(target_arch = "x86_64"))]
        false
    }

    fn detect() -> Level {
        #[cfg(target_arch = "x86_64")]
        {
            let avx2 = is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma");
            if avx2
                && is_x86_feature_detected!("avx512f")
                && is_x86_feature_detected!("avx512vl")
                && is_x86_feature_detected!("avx512bw")
                && is_x86_feature_detected!("avx512dq")
            {
                return Level(Kind::Avx512);
            }
            if avx2 {
                return Level(Kind::Avx2);
            }
        }
        Level(Kind::Scalar)
    }
}

impl std::fmt::Display for Level {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self.0 {
            Kind::Scalar => "scalar",
            Kind::Avx2 => "avx2",
            Kind::Avx512 => "avx512",
        })
    }
}

/// A vector of f32 lanes and its operations. A value of a type with this trait is a proof that the machine has the
/// instructions; [`simd_fn!`](crate::simd_fn) makes it and hands it to the kernel.
pub trait Simd: Copy + Send + Sync + 'static {
    /// f32 lanes of a vector.
    const LANES: usize;
    /// The vector.
    type V: Copy;

    /// All lanes `x`.
    fn splat(self, x: f32) -> Self::V;
    /// Loads `LANES` elements.
    ///
    /// # Safety
    /// `p..p + LANES` is readable.
    unsafe fn load_ptr(self, p: *const f32) -> Self::V;
    /// Stores `LANES` elements.
    ///
    /// # Safety
    /// `p..p + LANES` is writable.
    unsafe fn store_ptr(self, p: *mut f32, v: Self::V);
    /// Loads the first `n <= LANES` elements; the other lanes are 0.
    ///
    /// # Safety
    /// `p..p + n` is readable.
    unsafe fn load_partial_ptr(self, p: *const f32, n: usize) -> Self::V;
    /// Stores the first `n <= LANES` lanes.
    ///
    /// # Safety
    /// `p..p + n` is writable.
    unsafe fn store_partial_ptr(self, p: *mut f32, n: usize, v: Self::V);

    /// `a + b`.
    fn add(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a - b`.
    fn sub(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b`.
    fn mul(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a / b`.
    fn div(self, a: Self::V, b: Self::V) -> Self::V;
    /// `a * b + c` (one rounding with FMA instructions, two at the scalar level).
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// `a0*b0 + a1*b1 + c`, the lanes of `a` and `b` being pairs of bf16: the first in the low half of the bits.
    fn dot_bf16(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V;
    /// [`Simd::dot_bf16`] by the machine's instruction. Only a function compiled with AVX512_BF16, entered where the
    /// machine has it, may call this.
    #[inline(always)]
    fn dot_bf16_native(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        self.dot_bf16(a, b, c)
    }
    /// Larger of each pair; `b` where one of them is NaN.
    fn max(self, a: Self::V, b: Self::V) -> Self::V;
    /// Smaller of each pair; `b` where one of them is NaN.
    fn min(self, a: Self::V, b: Self::V) -> Self::V;
    /// Square root.
    fn sqrt(self, a: Self::V) -> Self::V;
    /// Nearest integer, ties to even.
    fn round(self, a: Self::V) -> Self::V;
    /// `2^n` for integral lanes in `-126..=127`, 0 for -127.
    fn pow2(self, n: Self::V) -> Self::V;
    /// `x` where `a > b`, else `y`.
    fn select_gt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V;
    /// Sum of the lanes, in a fixed order.
    fn sum(self, a: Self::V) -> f32;
    /// Largest lane.
    fn max_lane(self, a: Self::V) -> f32;

    /// All lanes 0.
    #[inline(always)]
    fn zero(self) -> Self::V {
        self.splat(0.0)
    }
    /// `|a|`.
    #[inline(always)]
    fn abs(self, a: Self::V) -> Self::V {
        self.max(a, self.sub(self.zero(), a))
    }
    /// Loads the first `LANES` elements of `x`; panics if there are fewer.
    #[inline(always)]
    fn load(self, x: &[f32]) -> Self::V {
        assert!(x.len() >= Self::LANES);
        // SAFETY: the slice has at least LANES elements.
        unsafe { self.load_ptr(x.as_ptr()) }
    }
    /// Stores into the first `LANES` elements of `y`; panics if there are fewer.
    #[inline(always)]
    fn store(self, y: &mut [f32], v: Self::V) {
        assert!(y.len() >= Self::LANES);
        // SAFETY: the slice has at least LANES elements.
        unsafe { self.store_ptr(y.as_mut_ptr(), v) }
    }
    /// Loads up to `LANES` elements: all of `x` if it is shorter, the other lanes 0.
    #[inline(always)]
    fn load_partial(self, x: &[f32]) -> Self::V {
        if x.len() >= Self::LANES {
            return self.load(x);
        }
        // SAFETY: exactly the slice's elements are read, fewer than LANES.
        unsafe { self.load_partial_ptr(x.as_ptr(), x.len()) }
    }
    /// Stores up to `LANES` elements: all of `y` if it is shorter.
    #[inline(always)]
    fn store_partial(self, y: &mut [f32], v: Self::V) {
        if y.len() >= Self::LANES {
            return self.store(y, v);
        }
        // SAFETY: exactly the slice's elements are written, fewer than LANES.
        unsafe { self.store_partial_ptr(y.as_mut_ptr(), y.len(), v) }
    }
    /// `p * 2^n` for integral lanes `n <= 127`, 0 (or subnormal) where that underflows; NaN in `p` stays.
    #[inline(always)]
    fn scale_pow2(self, p: Self::V, n: Self::V) -> Self::V {
        self.mul(p, self.pow2(self.max(self.splat(-127.0), n)))
    }
    /// `1 / a`, relative error below 2e-7, for `|a|` in `2^-126..2^127`.
    #[inline(always)]
    fn recip(self, a: Self::V) -> Self::V {
        self.div(self.splat(1.0), a)
    }
    /// `e^a`, relative error below 2e-7; 0 below about -87.3 (or subnormal, down to -104), capped near 2e38 above 88,
    /// NaN where `a` is: a diverged activation must reach the loss.
    #[inline(always)]
    fn exp(self, a: Self::V) -> Self::V {
        // The order of the arguments lets NaN through.
        self.exp_bounded(self.min(self.splat(88.0), a))
    }
    /// [`Simd::exp`] of lanes known not to pass 88.
    ///
    /// Cody–Waite reduction to `|r| <= ln2/2`, then `1 + r q(r)` with q of degree 5 fitted by least squares of the
    /// relative error (2.3e-9 at most), then a scale by `2^n`.
    #[inline(always)]
    fn exp_bounded(self, a: Self::V) -> Self::V {
        let x = self.max(self.splat(-104.0), a);
        let n = self.round(self.mul(x, self.splat(std::f32::consts::LOG2_E)));
        let r = self.fma(n, self.splat(-0.693_359_4), x);
        let r = self.fma(n, self.splat(2.121_944_4e-4), r);
        let mut p = self.splat(0.001_385_926);
        for c in [0.008_374_805, 0.041_667_726, 0.166_664_2, 0.499_999_95, 1.0, 1.0] {
            p = self.fma(p, r, self.splat(c));
        }
        self.scale_pow2(p, n)
    }
}

/// 4 lanes as an array: the fallback on any machine.
#[derive(Clone, Copy, Debug)]
pub struct Scalar(());

impl Scalar {
    /// The fallback's token.
    pub const fn new() -> Self {
        Scalar(())
    }
}

impl Default for Scalar {
    fn default() -> Self {
        Self::new()
    }
}

macro_rules! each_lane {
    ($a:ident, $b:ident, $e:expr) => {{
        let mut out = [0.0f32; 4];
        for i in 0..4 {
            let ($a, $b) = ($a[i], $b[i]);
            out[i] = $e;
        }
        out
    }};
}

impl Simd for Scalar {
    const LANES: usize = 4;
    type V = [f32; 4];

    #[inline(always)]
    fn splat(self, x: f32) -> Self::V {
        [x; 4]
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> Self::V {
        // SAFETY: the caller's contract.
        unsafe { p.cast::<[f32; 4]>().read_unaligned() }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: Self::V) {
        // SAFETY: the caller's contract.
        unsafe { p.cast::<[f32; 4]>().write_unaligned(v) }
    }
    #[inline(always)]
    unsafe fn load_partial_ptr(self, p: *const f32, n: usize) -> Self::V {
        let mut v = [0.0; 4];
        for i in 0..n.min(4) {
            // SAFETY: i < n, readable by the caller's contract.
            v[i] = unsafe { *p.add(i) };
        }
        v
    }
    #[inline(always)]
    unsafe fn store_partial_ptr(self, p: *mut f32, n: usize, v: Self::V) {
        for i in 0..n.min(4) {
            // SAFETY: i < n, writable by the caller's contract.
            unsafe { *p.add(i) = v[i] };
        }
    }
    #[inline(always)]
    fn add(self, a: Self::V, b: Self::V) -> Self::V {
        each_lane!(a, b, a + b)
    }
    #[inline(always)]
    fn sub(self, a: Self::V, b: Self::V) -> Self::V {
        each_lane!(a, b, a - b)
    }
    #[inline(always)]
    fn mul(self, a: Self::V, b: Self::V) -> Self::V {
        each_lane!(a, b, a * b)
    }
    #[inline(always)]
    fn div(self, a: Self::V, b: Self::V) -> Self::V {
        each_lane!(a, b, a / b)
    }
    #[inline(always)]
    fn fma(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        // Not `mul_add`: without the instruction that is a library call per lane.
        self.add(self.mul(a, b), c)
    }
    #[inline(always)]
    fn dot_bf16(self, a: Self::V, b: Self::V, c: Self::V) -> Self::V {
        let halves = |x: f32| (f32::from_bits(x.to_bits() << 16), f32::from_bits(x.to_bits() & 0xffff_0000));
        std::array::from_fn(|i| {
            let ((a0, a1), (b0, b1)) = (halves(a[i]), halves(b[i]));
            a0 * b0 + (a1 * b1 + c[i])
        })
    }
    #[inline(always)]
    fn max(self, a: Self::V, b: Self::V) -> Self::V {
        each_lane!(a, b, if a > b { a } else { b })
    }
    #[inline(always)]
    fn min(self, a: Self::V, b: Self::V) -> Self::V {
        each_lane!(a, b, if a < b { a } else { b })
    }
    #[inline(always)]
    fn sqrt(self, a: Self::V) -> Self::V {
        a.map(f32::sqrt)
    }
    #[inline(always)]
    fn round(self, a: Self::V) -> Self::V {
        a.map(f32::round_ties_even)
    }
    #[inline(always)]
    fn pow2(self, n: Self::V) -> Self::V {
        n.map(|n| f32::from_bits(((n as i32 + 127) << 23) as u32))
    }
    #[inline(always)]
    fn select_gt(self, a: Self::V, b: Self::V, x: Self::V, y: Self::V) -> Self::V {
        let mut out = y;
        for i in 0..4 {
            if a[i] > b[i] {
                out[i] = x[i];
            }
        }
        out
    }
    #[inline(always)]
    fn sum(self, a: Self::V) -> f32 {
        (a[0] + a[2]) + (a[1] + a[3])
    }
    #[inline(always)]
    fn max_lane(self, a: Self::V) -> f32 {
        a[0].max(a[1]).max(a[2].max(a[3]))
    }
}

#[cfg(target_arch = "x86_64")]
pub use x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86;

/// Compiles a kernel for each SIMD level and makes a function that dispatches on a [`Level`].
///
/// `simd_fn! { pub fn name(a: A, b: B) -> R = kernel; }` makes `pub fn name(level: Level, a: A, b: B) -> R`, where
/// `kernel` is `#[inline(always)] fn kernel<S: Simd>(s: S, a: A, b: B) -> R`. With `unsafe fn` both are unsafe under
/// the same contract. Several functions may stand in one invocation.
#[macro_export]
macro_rules! simd_fn {
    () => {};
    ($(#[$meta:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $kernel:expr;
     $($rest:tt)*) => {
        $(#[$meta])*
        $vis fn $name(level: $crate::simd::Level, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: this function is entered only where its target features exist.
                    $kernel(unsafe { $crate::simd::Avx512::new() }, $($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: this function is entered only where its target features exist.
                    $kernel(unsafe { $crate::simd::Avx2::new() }, $($arg),*)
                }
                match level.kind() {
                    // SAFETY: a `Level` exists only for what the machine has.
                    $crate::simd::Kind::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: a `Level` exists only for what the machine has.
                    $crate::simd::Kind::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::simd::Kind::Scalar => {}
                }
            }
            let _ = level;
            $kernel($crate::simd::Scalar::new(), $($arg),*)
        }
        $crate::simd_fn! { $($rest)* }
    };
    ($(#[$meta:meta])* $vis:vis unsafe fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $kernel:expr;
     $($rest:tt)*) => {
        $(#[$meta])*
        // The kernel's name stands in an unsafe block: it has the same contract as this function.
        #[allow(clippy::macro_metavars_in_unsafe)]
        $vis unsafe fn $name(level: $crate::simd::Level, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512vl,avx512bw,avx512dq,avx2,fma")]
                unsafe fn avx512($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: the caller's contract; entered only where the target features exist.
                    unsafe { $kernel($crate::simd::Avx512::new(), $($arg),*) }
                }
                #[target_feature(enable = "avx2,fma")]
                unsafe fn avx2($($arg: $ty),*) $(-> $ret)? {
                    // SAFETY: the caller's contract; entered only where the target features exist.
                    unsafe { $kernel($crate::simd::Avx2::new(), $($arg),*) }
                }
                match level.kind() {
                    // SAFETY: the caller's contract; a `Level` exists only for what the machine has.
                    $crate::simd::Kind::Avx512 => return unsafe { avx512($($arg),*) },
                    // SAFETY: the caller's contract; a `Level` exists only for what the machine has.
                    $crate::simd::Kind::Avx2 => return unsafe { avx2($($arg),*) },
                    $crate::simd::Kind::Scalar => {}
                }
            }
            let _ = level;
            // SAFETY: the caller's contract.
            unsafe { $kernel($crate::simd::Scalar::new(), $($arg),*) }
        }
        $crate::simd_fn! { $($rest)* }
    };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[inline(always)]
    fn probe_impl<S: Simd>(s: S, x: &[f32], out: &mut Vec<f32>) {
        let mut y = vec![0.0; x.len()];
        let mut i = 0;
        while i < x.len() {
            let end = x.len().min(i + S::LANES);
            let v = s.load_partial(&x[i..end]);
            s.store_partial(&mut y[i..end], s.exp(v));
            i = end;
        }
        let head = s.load_partial(&x[..S::LANES - 1]);
        out.clear();
        out.extend_from_slice(&y);
        out.push(s.sum(head));
        out.push(s.max_lane(s.load(x)));
        out.push(s.sum(s.select_gt(head, s.splat(0.5), s.splat(1.0), s.zero())));
        out.push(s.sum(s.abs(s.splat(-1.0))));
    }
    simd_fn! { fn probe(x: &[f32], out: &mut Vec<f32>) = probe_impl; }

    #[test]
    fn lanes_agree_with_plain_arithmetic() {
        let x: Vec<f32> = (0..37).map(|i| (i as f32 - 18.0) * 4.7).collect();
        for level in Level::available() {
            let (mut out, n) = (Vec::new(), level.lanes());
            probe(level, &x, &mut out);
            for (got, x) in out.iter().zip(&x) {
                let want = f64::from(*x).exp();
                assert!((f64::from(*got) - want).abs() <= 2e-7 * want, "{level}: exp({x}) = {got}");
            }
            let head = &x[..n - 1];
            assert!((out[37] - head.iter().sum::<f32>()).abs() < 1e-3);
            assert_eq!(out[38], x[n - 1]);
            assert_eq!(out[39], head.iter().filter(|v| **v > 0.5).count() as f32);
            assert_eq!(out[40], n as f32);
        }
    }
}
