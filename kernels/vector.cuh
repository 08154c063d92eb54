// Eight elements at a time without a branch on their type, so that a thread's loads are all on their way before the
// first is used.
#pragma once
#include "common.cuh"

// Eight elements as they lie in memory: bf16 in `a`; f32 in `a` and `b`.
struct Raw8 {
  uint4 a, b;
};

__device__ __forceinline__ Raw8 fetch8(const View& v, i64 i) {
  CHECK_INDEX(v, i, 8);
  bool wide = v.dtype == F32;
  const uint4* p = (const uint4*)((const u8*)v.data + (wide ? 4 * i : 2 * i));
  Raw8 r;
  r.a = p[0];
  r.b = make_uint4(0, 0, 0, 0);
  if (wide) r.b = p[1];
  return r;
}

__device__ __forceinline__ void unpack8(const View& v, const Raw8& r, float (&x)[8]) {
  if (v.dtype == F32) {
    x[0] = __uint_as_float(r.a.x), x[1] = __uint_as_float(r.a.y);
    x[2] = __uint_as_float(r.a.z), x[3] = __uint_as_float(r.a.w);
    x[4] = __uint_as_float(r.b.x), x[5] = __uint_as_float(r.b.y);
    x[6] = __uint_as_float(r.b.z), x[7] = __uint_as_float(r.b.w);
  } else {
    unpack_bf16(r.a.x, x[0], x[1]), unpack_bf16(r.a.y, x[2], x[3]);
    unpack_bf16(r.a.z, x[4], x[5]), unpack_bf16(r.a.w, x[6], x[7]);
  }
}

// V elements from i: 8 of them aligned, or one.
template <int V>
__device__ __forceinline__ void load_some(const View& v, i64 i, float (&x)[V]) {
  if constexpr (V == 8) {
    unpack8(v, fetch8(v, i), x);
  } else {
    x[0] = load(v, i);
  }
}

template <int V>
__device__ __forceinline__ void give_some(const View& v, i64 i, float (&g)[V], int accumulate) {
  if constexpr (V == 8) {
    if (accumulate) {
      float old[8];
      load_some<8>(v, i, old);
#pragma unroll
      for (int k = 0; k < 8; k++) g[k] += old[k];
    }
    store8(v, i, g);
  } else {
    give(v, i, g[0], accumulate);
  }
}

// y (+)= f(in...) over n elements, 16 a thread (launch shape `Shape::row(n.div_ceil(4096), 256)`). f(i, x, o) makes the
// eight results o for places i..i+8 from the arguments' x[argument][place].
template <int N, class F>
__device__ __forceinline__ void map8(const View (&in)[N], const View& y, i64 n, int accumulate, F f) {
  i64 first = 8 * ((i64)blockIdx.x * (2 * blockDim.x) + threadIdx.x), step = 8 * (i64)blockDim.x;
  if (first + step + 8 <= n) {
    Raw8 raw[2][N], before[2];
#pragma unroll
    for (int u = 0; u < 2; u++) {
#pragma unroll
      for (int j = 0; j < N; j++) raw[u][j] = fetch8(in[j], first + u * step);
      if (accumulate) before[u] = fetch8(y, first + u * step);
    }
#pragma unroll
    for (int u = 0; u < 2; u++) {
      float x[N][8], o[8];
#pragma unroll
      for (int j = 0; j < N; j++) unpack8(in[j], raw[u][j], x[j]);
      f(first + u * step, x, o);
      if (accumulate) {
        float old[8];
        unpack8(y, before[u], old);
#pragma unroll
        for (int k = 0; k < 8; k++) o[k] += old[k];
      }
      store8(y, first + u * step, o);
    }
    return;
  }
#pragma unroll 1
  for (i64 i = first; i <= first + step && i < n; i += step) {
    float x[N][8], o[8];
#pragma unroll
    for (int j = 0; j < N; j++) load8_partial(in[j], i, n, x[j]);
    f(i, x, o);
    give8_partial(y, i, n, o, accumulate);
  }
}

// i mod n and i / n, in 32 bits where i fits: a 64-bit division takes about 100 instructions.
__device__ __forceinline__ i64 quotient(i64 i, i64 n) {
  return (u64)(i | n) >> 32 ? i / n : (i64)((u32)i / (u32)n);
}

__device__ __forceinline__ i64 remainder_of(i64 i, i64 n) { return i - quotient(i, n) * n; }
