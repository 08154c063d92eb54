//! The vectors of x86-64.

use super::Simd;
use std::arch::x86_64::*;

/// 16 lanes. A value exists only where AVX-512 F, VL, BW and DQ do.
#[derive(Clone, Copy, Debug)]
pub struct Avx512(());

impl Avx512 {
    /// The token.
    ///
    /// # Safety
    /// The machine has AVX-512 F, VL, BW and DQ, AVX2 and FMA.
    #[inline(always)]
    pub const unsafe fn new() -> Self {
        Avx512(())
    }
}

/// 8 lanes. A value exists only where AVX2 and FMA do.
#[derive(Clone, Copy, Debug)]
pub struct Avx2(());

impl Avx2 {
    /// The token.
    ///
    /// # Safety
    /// The machine has AVX2 and FMA.
    #[inline(always)]
    pub const unsafe fn new() -> Self {
        Avx2(())
    }
}

macro_rules! ops {
    ($($name:ident($($a:ident),*) = $e:expr;)*) => {$(
        #[inline(always)]
        fn $name(self, $($a: Self::V),*) -> Self::V {
            // SAFETY: `self` proves that the instructions exist; they touch no memory.
            unsafe { $e }
        }
    )*};
}

impl Simd for Avx512 {
    const LANES: usize = 16;
    type V = __m512;

    #[inline(always)]
    fn splat(self, x: f32) -> __m512 {
        // SAFETY: `self` proves that the instruction exists.
        unsafe { _mm512_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> __m512 {
        // SAFETY: the caller's contract.
        unsafe { _mm512_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: __m512) {
        // SAFETY: the caller's contract.
        unsafe { _mm512_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_partial_ptr(self, p: *const f32, n: usize) -> __m512 {
        // SAFETY: lanes from n on are masked out; the rest is the caller's contract.
        unsafe { _mm512_maskz_loadu_ps(((1u32 << n) - 1) as u16, p) }
    }
    #[inline(always)]
    unsafe fn store_partial_ptr(self, p: *mut f32, n: usize, v: __m512) {
        // SAFETY: lanes from n on are masked out; the rest is the caller's contract.
        unsafe { _mm512_mask_storeu_ps(p, ((1u32 << n) - 1) as u16, v) }
    }
    ops! {
        add(a, b) = _mm512_add_ps(a, b);
        sub(a, b) = _mm512_sub_ps(a, b);
        mul(a, b) = _mm512_mul_ps(a, b);
        div(a, b) = _mm512_div_ps(a, b);
        fma(a, b, c) = _mm512_fmadd_ps(a, b, c);
        dot_bf16(a, b, c) = {
            let (a, b) = (_mm512_castps_si512(a), _mm512_castps_si512(b));
            let high = _mm512_set1_epi32(0xffff_0000_u32 as i32);
            let a1 = _mm512_castsi512_ps(_mm512_and_si512(a, high));
            let b1 = _mm512_castsi512_ps(_mm512_and_si512(b, high));
            let a0 = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(a));
            let b0 = _mm512_castsi512_ps(_mm512_slli_epi32::<16>(b));
            _mm512_fmadd_ps(a0, b0, _mm512_fmadd_ps(a1, b1, c))
        };
        dot_bf16_native(a, b, c) = {
            let bits = |v: __m512| std::mem::transmute::<__m512, __m512bh>(v);
            _mm512_dpbf16_ps(c, bits(a), bits(b))
        };
        max(a, b) = _mm512_max_ps(a, b);
        min(a, b) = _mm512_min_ps(a, b);
        sqrt(a) = _mm512_sqrt_ps(a);
        round(a) = _mm512_roundscale_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        pow2(n) = _mm512_castsi512_ps(_mm512_slli_epi32::<23>(_mm512_add_epi32(
            _mm512_cvtps_epi32(n),
            _mm512_set1_epi32(127),
        )));
        select_gt(a, b, x, y) = _mm512_mask_blend_ps(_mm512_cmp_ps_mask::<_CMP_GT_OQ>(a, b), y, x);
        scale_pow2(p, n) = _mm512_scalef_ps(p, n);
        // A 14-bit estimate and one Newton step.
        recip(a) = {
            let r = _mm512_rcp14_ps(a);
            _mm512_mul_ps(r, _mm512_fnmadd_ps(a, r, _mm512_set1_ps(2.0)))
        };
    }
    #[inline(always)]
    fn sum(self, a: __m512) -> f32 {
        // SAFETY: `self` proves that the instructions exist; they touch no memory.
        unsafe {
            let lo = _mm512_castps512_ps256(a);
            let hi = _mm512_extractf32x8_ps::<1>(a);
            Avx2(()).sum(_mm256_add_ps(lo, hi))
        }
    }
    #[inline(always)]
    fn max_lane(self, a: __m512) -> f32 {
        // SAFETY: `self` proves that the instructions exist; they touch no memory.
        unsafe {
            let lo = _mm512_castps512_ps256(a);
            let hi = _mm512_extractf32x8_ps::<1>(a);
            Avx2(()).max_lane(_mm256_max_ps(lo, hi))
        }
    }
}

/// `MASKS[8 - n..]` starts with n lanes of all ones, then zeros.
static MASKS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];

impl Simd for Avx2 {
    const LANES: usize = 8;
    type V = __m256;

    #[inline(always)]
    fn splat(self, x: f32) -> __m256 {
        // SAFETY: `self` proves that the instruction exists.
        unsafe { _mm256_set1_ps(x) }
    }
    #[inline(always)]
    unsafe fn load_ptr(self, p: *const f32) -> __m256 {
        // SAFETY: the caller's contract.
        unsafe { _mm256_loadu_ps(p) }
    }
    #[inline(always)]
    unsafe fn store_ptr(self, p: *mut f32, v: __m256) {
        // SAFETY: the caller's contract.
        unsafe { _mm256_storeu_ps(p, v) }
    }
    #[inline(always)]
    unsafe fn load_partial_ptr(self, p: *const f32, n: usize) -> __m256 {
        debug_assert!(n <= 8);
        // SAFETY: n <= 8 keeps the mask's load inside MASKS; masked lanes are not read.
        unsafe {
            let mask = _mm256_loadu_si256(MASKS.as_ptr().add(8 - n).cast());
            _mm256_maskload_ps(p, mask)
        }
    }
    #[inline(always)]
    unsafe fn store_partial_ptr(self, p: *mut f32, n: usize, v: __m256) {
        debug_assert!(n <= 8);
        // SAFETY: n <= 8 keeps the mask's load inside MASKS; masked lanes are not written.
        unsafe {
            let mask = _mm256_loadu_si256(MASKS.as_ptr().add(8 - n).cast());
            _mm256_maskstore_ps(p, mask, v)
        }
    }
    ops! {
        add(a, b) = _mm256_add_ps(a, b);
        sub(a, b) = _mm256_sub_ps(a, b);
        mul(a, b) = _mm256_mul_ps(a, b);
        div(a, b) = _mm256_div_ps(a, b);
        fma(a, b, c) = _mm256_fmadd_ps(a, b, c);
        dot_bf16(a, b, c) = {
            let (a, b) = (_mm256_castps_si256(a), _mm256_castps_si256(b));
            let high = _mm256_set1_epi32(0xffff_0000_u32 as i32);
            let a1 = _mm256_castsi256_ps(_mm256_and_si256(a, high));
            let b1 = _mm256_castsi256_ps(_mm256_and_si256(b, high));
            let a0 = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(a));
            let b0 = _mm256_castsi256_ps(_mm256_slli_epi32::<16>(b));
            _mm256_fmadd_ps(a0, b0, _mm256_fmadd_ps(a1, b1, c))
        };
        max(a, b) = _mm256_max_ps(a, b);
        min(a, b) = _mm256_min_ps(a, b);
        sqrt(a) = _mm256_sqrt_ps(a);
        round(a) = _mm256_round_ps::<{ _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC }>(a);
        pow2(n) = _mm256_castsi256_ps(_mm256_slli_epi32::<23>(_mm256_add_epi32(
            _mm256_cvtps_epi32(n),
            _mm256_set1_epi32(127),
        )));
        select_gt(a, b, x, y) = _mm256_blendv_ps(y, x, _mm256_cmp_ps::<_CMP_GT_OQ>(a, b));
    }
    #[inline(always)]
    fn sum(self, a: __m256) -> f32 {
        // SAFETY: `self` proves that the instructions exist; they touch no memory.
        unsafe {
            let q = _mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let d = _mm_add_ps(q, _mm_movehl_ps(q, q));
            _mm_cvtss_f32(_mm_add_ss(d, _mm_shuffle_ps::<1>(d, d)))
        }
    }
    #[inline(always)]
    fn max_lane(self, a: __m256) -> f32 {
        // SAFETY: `self` proves that the instructions exist; they touch no memory.
        unsafe {
            let q = _mm_max_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps::<1>(a));
            let d = _mm_max_ps(q, _mm_movehl_ps(q, q));
            _mm_cvtss_f32(_mm_max_ss(d, _mm_shuffle_ps::<1>(d, d)))
        }
    }
}
