// The part of CUDA C++ that kernels/ uses, for a C++ compiler: types, qualifiers, intrinsics. Included before every
// kernel file (-include). What has to know of other threads is in runtime.hpp.
//
// It is a test's tool: what a GPU leaves undefined (shuffling from a lane that left, reading shared memory before
// writing it) gives NaN or all ones here, and what it forbids (a misaligned access, a barrier that not all threads
// reach) ends the launch with a message.
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include "runtime.hpp"

#define __global__
#define __device__
#define __host__
#define __constant__ static const
#define __shared__ static thread_local
#define __forceinline__ inline __attribute__((always_inline))
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))
#define __restrict__ __restrict
#define __grid_constant__

#define threadIdx (mcpipe_shim::tls.thread)
#define blockIdx (mcpipe_shim::tls.block)
#define blockDim (mcpipe_shim::tls.threads)
#define gridDim (mcpipe_shim::tls.blocks)
static constexpr int warpSize = 32;

#define DYNAMIC_SHARED(name) unsigned char* const name = mcpipe_shim::tls.shared
// Elements i to i + n of a view, read or written in one access: they must exist and be aligned.
#define CHECK_INDEX(view, i, n)                                                                            \
  (__builtin_expect(mcpipe_shim::outside((view).data, (view).len, (view).dtype, (long long)(i), (n)), 0)   \
       ? mcpipe_shim::fail_index(#view, (view).data, (view).len, (view).dtype, (long long)(i), (n))        \
       : (void)0)

// ---- vector types -------------------------------------------------------------------------------------------------

#define MCPIPE_VECTORS(T, name, bytes)                                                                       \
  struct __attribute__((aligned(2 * bytes))) name##2 { T x, y; };                                            \
  struct name##3 { T x, y, z; };                                                                             \
  struct __attribute__((aligned(4 * bytes < 16 ? 4 * bytes : 16))) name##4 { T x, y, z, w; };                \
  static inline name##2 make_##name##2(T x, T y) { return {x, y}; }                                          \
  static inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                                  \
  static inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }
MCPIPE_VECTORS(signed char, char, 1)
MCPIPE_VECTORS(unsigned char, uchar, 1)
MCPIPE_VECTORS(short, short, 2)
MCPIPE_VECTORS(unsigned short, ushort, 2)
MCPIPE_VECTORS(int, int, 4)
MCPIPE_VECTORS(unsigned, uint, 4)
MCPIPE_VECTORS(float, float, 4)
MCPIPE_VECTORS(long long, longlong, 8)
MCPIPE_VECTORS(unsigned long long, ulonglong, 8)
MCPIPE_VECTORS(double, double, 8)
#undef MCPIPE_VECTORS
using dim3 = mcpipe_shim::Index;

// ---- bits ---------------------------------------------------------------------------------------------------------

template <class To, class From> static inline To mcpipe_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "bits of one size");
  To out;
  memcpy(&out, &x, sizeof out);
  return out;
}
static inline unsigned __float_as_uint(float x) { return mcpipe_bits<unsigned>(x); }
static inline int __float_as_int(float x) { return mcpipe_bits<int>(x); }
static inline float __uint_as_float(unsigned x) { return mcpipe_bits<float>(x); }
static inline float __int_as_float(int x) { return mcpipe_bits<float>(x); }
static inline long long __double_as_longlong(double x) { return mcpipe_bits<long long>(x); }
static inline double __longlong_as_double(long long x) { return mcpipe_bits<double>(x); }
static inline int __popc(unsigned x) { return __builtin_popcount(x); }
static inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
static inline int __clz(int x) { return x ? __builtin_clz((unsigned)x) : 32; }
static inline int __clzll(long long x) { return x ? __builtin_clzll((unsigned long long)x) : 64; }
static inline int __ffs(int x) { return __builtin_ffs(x); }
static inline int __ffsll(long long x) { return __builtin_ffsll(x); }
static inline unsigned __brev(unsigned x) {
  unsigned out = 0;
  for (int i = 0; i < 32; i++) out |= (x >> i & 1u) << (31 - i);
  return out;
}
static inline unsigned __byte_perm(unsigned a, unsigned b, unsigned s) {
  unsigned long long both = (unsigned long long)b << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; i++) {
    unsigned char byte = (unsigned char)(both >> 8 * (s >> 4 * i & 7));
    if (s >> 4 * i & 8) byte = byte & 0x80 ? 0xff : 0;
    out |= (unsigned)byte << 8 * i;
  }
  return out;
}
static inline unsigned __umulhi(unsigned a, unsigned b) { return (unsigned)((unsigned long long)a * b >> 32); }
static inline int __mulhi(int a, int b) { return (int)((long long)a * b >> 32); }
static inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) {
  return (unsigned long long)((unsigned __int128)a * b >> 64);
}

// ---- arithmetic ---------------------------------------------------------------------------------------------------

#define MCPIPE_MINMAX(T, A, B)                                             \
  static inline T min(A a, B b) { return (T)a < (T)b ? (T)a : (T)b; }      \
  static inline T max(A a, B b) { return (T)a > (T)b ? (T)a : (T)b; }
MCPIPE_MINMAX(int, int, int)
MCPIPE_MINMAX(unsigned, unsigned, unsigned)
MCPIPE_MINMAX(unsigned, int, unsigned)
MCPIPE_MINMAX(unsigned, unsigned, int)
MCPIPE_MINMAX(long, long, long)
MCPIPE_MINMAX(unsigned long, unsigned long, unsigned long)
MCPIPE_MINMAX(long long, long long, long long)
MCPIPE_MINMAX(unsigned long long, unsigned long long, unsigned long long)
#undef MCPIPE_MINMAX
static inline float min(float a, float b) { return fminf(a, b); }
static inline float max(float a, float b) { return fmaxf(a, b); }
static inline double min(double a, double b) { return fmin(a, b); }
static inline double max(double a, double b) { return fmax(a, b); }

// Macros: the C library declares these names itself.
#define __expf expf
#define __exp10f exp10f
#define __logf logf
#define __log2f log2f
#define __log10f log10f
#define __powf powf
#define __sinf sinf
#define __cosf cosf
#define __tanf tanf
static inline float __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
static inline float rsqrtf(float x) { return 1.0f / sqrtf(x); }
static inline double rsqrt(double x) { return 1.0 / sqrt(x); }
static inline float __frsqrt_rn(float x) { return (float)(1.0 / sqrt((double)x)); }
static inline float __fsqrt_rn(float x) { return sqrtf(x); }
static inline float __frcp_rn(float x) { return 1.0f / x; }
static inline float __fdividef(float x, float y) { return x / y; }
static inline float __fdiv_rn(float x, float y) { return x / y; }
static inline float __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
// Not to be contracted to a fused multiply-add: volatile keeps the rounding between.
static inline float __fmul_rn(float x, float y) { volatile float p = x * y; return p; }
static inline float __fadd_rn(float x, float y) { volatile float s = x + y; return s; }
static inline float __fsub_rn(float x, float y) { volatile float s = x - y; return s; }
static inline double __dmul_rn(double x, double y) { volatile double p = x * y; return p; }
static inline double __dadd_rn(double x, double y) { volatile double s = x + y; return s; }
static inline double __fma_rn(double x, double y, double z) { return fma(x, y, z); }
// NaN is 0, and what does not fit is the nearest that does.
static inline int mcpipe_to_int(double x) {
  return x != x ? 0 : (x >= 2147483647.0 ? 2147483647 : (x <= -2147483648.0 ? (int)0x80000000u : (int)x));
}
static inline unsigned mcpipe_to_uint(double x) {
  return x != x || x <= 0.0 ? 0u : (x >= 4294967295.0 ? 4294967295u : (unsigned)x);
}
static inline int __float2int_rn(float x) { return mcpipe_to_int(rint((double)x)); }
static inline int __float2int_rd(float x) { return mcpipe_to_int(floor((double)x)); }
static inline int __float2int_ru(float x) { return mcpipe_to_int(ceil((double)x)); }
static inline int __float2int_rz(float x) { return mcpipe_to_int(trunc((double)x)); }
static inline unsigned __float2uint_rn(float x) { return mcpipe_to_uint(rint((double)x)); }
static inline unsigned __float2uint_rd(float x) { return mcpipe_to_uint(floor((double)x)); }
static inline unsigned __float2uint_rz(float x) { return mcpipe_to_uint(trunc((double)x)); }
static inline float __int2float_rn(int x) { return (float)x; }
static inline float __uint2float_rn(unsigned x) { return (float)x; }
static inline float __ll2float_rn(long long x) { return (float)x; }
static inline float __double2float_rn(double x) { return (float)x; }

// ---- memory -------------------------------------------------------------------------------------------------------

#define MCPIPE_LOAD(name) template <class T> static inline T name(const T* p) { return *p; }
MCPIPE_LOAD(__ldg) MCPIPE_LOAD(__ldca) MCPIPE_LOAD(__ldcg) MCPIPE_LOAD(__ldcs) MCPIPE_LOAD(__ldlu) MCPIPE_LOAD(__ldcv)
#undef MCPIPE_LOAD
#define MCPIPE_STORE(name) template <class T> static inline void name(T* p, T x) { *p = x; }
MCPIPE_STORE(__stwb) MCPIPE_STORE(__stcg) MCPIPE_STORE(__stcs) MCPIPE_STORE(__stwt)
#undef MCPIPE_STORE
static inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
static inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

// Integers only: a sum of floats in the order of arrival would differ from run to run.
#define MCPIPE_ATOMICS(T)                                                                                       \
  static inline T atomicAdd(T* p, T x) { return __atomic_fetch_add(p, x, __ATOMIC_SEQ_CST); }                   \
  static inline T atomicSub(T* p, T x) { return __atomic_fetch_sub(p, x, __ATOMIC_SEQ_CST); }                   \
  static inline T atomicAnd(T* p, T x) { return __atomic_fetch_and(p, x, __ATOMIC_SEQ_CST); }                   \
  static inline T atomicOr(T* p, T x) { return __atomic_fetch_or(p, x, __ATOMIC_SEQ_CST); }                     \
  static inline T atomicXor(T* p, T x) { return __atomic_fetch_xor(p, x, __ATOMIC_SEQ_CST); }                   \
  static inline T atomicExch(T* p, T x) { return __atomic_exchange_n(p, x, __ATOMIC_SEQ_CST); }                 \
  static inline T atomicCAS(T* p, T old, T x) {                                                                 \
    __atomic_compare_exchange_n(p, &old, x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);                         \
    return old;                                                                                                 \
  }                                                                                                             \
  static inline T atomicMax(T* p, T x) {                                                                        \
    T old = *p;                                                                                                 \
    while (!__atomic_compare_exchange_n(p, &old, old > x ? old : x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) \
      ;                                                                                                         \
    return old;                                                                                                 \
  }                                                                                                             \
  static inline T atomicMin(T* p, T x) {                                                                        \
    T old = *p;                                                                                                 \
    while (!__atomic_compare_exchange_n(p, &old, old < x ? old : x, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST)) \
      ;                                                                                                         \
    return old;                                                                                                 \
  }
MCPIPE_ATOMICS(int)
MCPIPE_ATOMICS(unsigned)
MCPIPE_ATOMICS(unsigned long long)
#undef MCPIPE_ATOMICS
static inline unsigned atomicInc(unsigned* p, unsigned most) {
  unsigned old = *p;
  while (!__atomic_compare_exchange_n(p, &old, old >= most ? 0 : old + 1, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST))
    ;
  return old;
}

// ---- time, traps --------------------------------------------------------------------------------------------------

static inline long long clock64() { return (long long)mcpipe_shim::ticks(); }
static inline void __nanosleep(unsigned) {}
[[noreturn]] static inline void __trap() { mcpipe_shim::fail("a trap"); }

// ---- threads of a block and lanes of a warp -----------------------------------------------------------------------

static inline void __syncthreads() { mcpipe_shim::barrier(0); }
static inline int __syncthreads_count(int p) { return mcpipe_shim::barrier(p != 0).count; }
static inline int __syncthreads_or(int p) { return mcpipe_shim::barrier(p != 0).count != 0; }
static inline int __syncthreads_and(int p) {
  auto r = mcpipe_shim::barrier(p != 0);
  return r.count == r.threads;
}

namespace mcpipe_shim {
static inline unsigned lane_id() { return tls.linear & 31u; }

template <class T> struct Shuffled {
  T value;
  unsigned source;
};
template <class T> static void merge_shuffle(void* const* payloads, unsigned lanes) {
  T out[32];
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) {
      unsigned source = ((Shuffled<T>*)payloads[l])->source & 31;
      if (lanes >> source & 1) out[l] = ((Shuffled<T>*)payloads[source])->value;
      else memset(&out[l], 0xff, sizeof(T));
    }
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) ((Shuffled<T>*)payloads[l])->value = out[l];
}
template <class T> static inline T shuffle(unsigned mask, T value, unsigned source) {
  Shuffled<T> s = {value, source};
  collective(mask, merge_shuffle<T>, &s, "a shuffle");
  return s.value;
}
struct Voted {
  unsigned value, ballot;
};
static inline void merge_vote(void* const* payloads, unsigned lanes) {
  unsigned ballot = 0;
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) ballot |= (unsigned)(((Voted*)payloads[l])->value != 0) << l;
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) ((Voted*)payloads[l])->ballot = ballot;
}
static inline unsigned vote(unsigned mask, int p) {
  Voted v = {(unsigned)(p != 0), 0};
  collective(mask, merge_vote, &v, "a vote");
  return v.ballot;
}
static inline void merge_nothing(void* const*, unsigned) {}

template <class F, class T> static void merge_reduce(void* const* payloads, unsigned lanes) {
  bool first = true;
  T sum = T();
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) {
      T v = *(T*)payloads[l];
      sum = first ? v : F::of(sum, v);
      first = false;
    }
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) *(T*)payloads[l] = sum;
}
template <class T> static void merge_match(void* const* payloads, unsigned lanes) {
  unsigned out[32];
  for (unsigned l = 0; l < 32; l++) {
    out[l] = 0;
    for (unsigned k = 0; k < 32; k++)
      if ((lanes >> l & 1) && (lanes >> k & 1) && *(T*)payloads[l] == *(T*)payloads[k]) out[l] |= 1u << k;
  }
  for (unsigned l = 0; l < 32; l++)
    if (lanes >> l & 1) memcpy(payloads[l], &out[l], sizeof(unsigned));
}
}  // namespace mcpipe_shim

template <class T> static inline T __shfl_sync(unsigned mask, T x, int source, int width = 32) {
  unsigned lane = mcpipe_shim::lane_id(), start = lane & ~(unsigned)(width - 1);
  return mcpipe_shim::shuffle(mask, x, start | ((unsigned)source & (unsigned)(width - 1)));
}
template <class T> static inline T __shfl_xor_sync(unsigned mask, T x, int flip, int width = 32) {
  unsigned lane = mcpipe_shim::lane_id(), end = (lane & ~(unsigned)(width - 1)) + (unsigned)width;
  unsigned source = lane ^ (unsigned)flip;
  return mcpipe_shim::shuffle(mask, x, source < end ? source : lane);
}
template <class T> static inline T __shfl_up_sync(unsigned mask, T x, unsigned by, int width = 32) {
  unsigned lane = mcpipe_shim::lane_id(), start = lane & ~(unsigned)(width - 1);
  return mcpipe_shim::shuffle(mask, x, lane - start >= by ? lane - by : lane);
}
template <class T> static inline T __shfl_down_sync(unsigned mask, T x, unsigned by, int width = 32) {
  unsigned lane = mcpipe_shim::lane_id(), end = (lane & ~(unsigned)(width - 1)) + (unsigned)width;
  return mcpipe_shim::shuffle(mask, x, lane + by < end ? lane + by : lane);
}
static inline void __syncwarp(unsigned mask = 0xffffffffu) {
  mcpipe_shim::collective(mask, mcpipe_shim::merge_nothing, nullptr, "a warp barrier");
}
static inline unsigned __ballot_sync(unsigned mask, int p) { return mcpipe_shim::vote(mask, p); }
static inline int __any_sync(unsigned mask, int p) { return mcpipe_shim::vote(mask, p) != 0; }
static inline int __all_sync(unsigned mask, int p) { return mcpipe_shim::vote(mask, !p) == 0; }
template <class T> static inline unsigned __match_any_sync(unsigned mask, T x) {
  mcpipe_shim::collective(mask, mcpipe_shim::merge_match<T>, &x, "a match");
  return mcpipe_bits<unsigned>(x);
}
#define MCPIPE_REDUCE(name, T, expression)                                                              \
  struct name##_of { static T of(T a, T b) { return expression; } };                                    \
  static inline T name(unsigned mask, T x) {                                                            \
    mcpipe_shim::collective(mask, mcpipe_shim::merge_reduce<name##_of, T>, &x, "a warp's reduction");   \
    return x;                                                                                           \
  }
MCPIPE_REDUCE(__reduce_add_sync, unsigned, a + b)
MCPIPE_REDUCE(__reduce_min_sync, unsigned, a < b ? a : b)
MCPIPE_REDUCE(__reduce_max_sync, unsigned, a > b ? a : b)
MCPIPE_REDUCE(__reduce_and_sync, unsigned, a & b)
MCPIPE_REDUCE(__reduce_or_sync, unsigned, a | b)
MCPIPE_REDUCE(__reduce_xor_sync, unsigned, a ^ b)
#undef MCPIPE_REDUCE
struct mcpipe_int_min { static int of(int a, int b) { return a < b ? a : b; } };
struct mcpipe_int_max { static int of(int a, int b) { return a > b ? a : b; } };
static inline int __reduce_add_sync(unsigned mask, int x) { return (int)__reduce_add_sync(mask, (unsigned)x); }
static inline int __reduce_min_sync(unsigned mask, int x) {
  mcpipe_shim::collective(mask, mcpipe_shim::merge_reduce<mcpipe_int_min, int>, &x, "a warp's reduction");
  return x;
}
static inline int __reduce_max_sync(unsigned mask, int x) {
  mcpipe_shim::collective(mask, mcpipe_shim::merge_reduce<mcpipe_int_max, int>, &x, "a warp's reduction");
  return x;
}
