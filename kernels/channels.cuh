// Rows of channels in memory: how a thread holds the neighbouring channels it owns, as loaded and as floats.
#pragma once
#include "activation.cuh"

// A row's values stay packed (`Raw`) from load to use, so that several rows are in flight in few registers. The host
// picks the kind: a vector type where every tensor of the op has that element type and the channels are a multiple of
// its width, else one that looks at the element type of each tensor. ROWS is how many a thread has in flight.
struct Bf16x8 {
  static constexpr int N = 8, ROWS = 4;
  struct Raw { uint4 v; };
  static __device__ __forceinline__ Raw get(const View& x, i64 i) {
    CHECK_INDEX(x, i, 8);
    return Raw{*(const uint4*)((const u16*)x.data + i)};
  }
  static __device__ __forceinline__ Raw zero() { return Raw{make_uint4(0, 0, 0, 0)}; }
  static __device__ __forceinline__ void open(const Raw& r, float (&x)[8]) {
    unpack_bf16(r.v.x, x[0], x[1]), unpack_bf16(r.v.y, x[2], x[3]);
    unpack_bf16(r.v.z, x[4], x[5]), unpack_bf16(r.v.w, x[6], x[7]);
  }
  static __device__ __forceinline__ void put(const View& y, i64 i, const float (&x)[8]) {
    CHECK_INDEX(y, i, 8);
    *(uint4*)((u16*)y.data + i) =
        make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
  }
};

struct F32x8 {
  static constexpr int N = 8, ROWS = 2;
  struct Raw { float4 a, b; };
  static __device__ __forceinline__ Raw get(const View& x, i64 i) {
    CHECK_INDEX(x, i, 8);
    const float4* p = (const float4*)((const float*)x.data + i);
    return Raw{p[0], p[1]};
  }
  static __device__ __forceinline__ Raw zero() {
    return Raw{make_float4(0.0f, 0.0f, 0.0f, 0.0f), make_float4(0.0f, 0.0f, 0.0f, 0.0f)};
  }
  static __device__ __forceinline__ void open(const Raw& r, float (&x)[8]) {
    x[0] = r.a.x, x[1] = r.a.y, x[2] = r.a.z, x[3] = r.a.w, x[4] = r.b.x, x[5] = r.b.y, x[6] = r.b.z, x[7] = r.b.w;
  }
  static __device__ __forceinline__ void put(const View& y, i64 i, const float (&x)[8]) {
    CHECK_INDEX(y, i, 8);
    float4* p = (float4*)((float*)y.data + i);
    p[0] = make_float4(x[0], x[1], x[2], x[3]), p[1] = make_float4(x[4], x[5], x[6], x[7]);
  }
};

struct Any8 {
  static constexpr int N = 8, ROWS = 2;
  struct Raw { float v[8]; };
  static __device__ __forceinline__ Raw get(const View& x, i64 i) {
    Raw r;
    load8(x, i, r.v);
    return r;
  }
  static __device__ __forceinline__ Raw zero() { return Raw{}; }
  static __device__ __forceinline__ void open(const Raw& r, float (&x)[8]) {
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = r.v[k];
  }
  static __device__ __forceinline__ void put(const View& y, i64 i, const float (&x)[8]) { store8(y, i, x); }
};

struct Any1 {
  static constexpr int N = 1, ROWS = 4;
  struct Raw { float v; };
  static __device__ __forceinline__ Raw get(const View& x, i64 i) { return Raw{load(x, i)}; }
  static __device__ __forceinline__ Raw zero() { return Raw{0.0f}; }
  static __device__ __forceinline__ void open(const Raw& r, float (&x)[1]) { x[0] = r.v; }
  static __device__ __forceinline__ void put(const View& y, i64 i, const float (&x)[1]) { store(y, i, x[0]); }
};

// Kinds as engine/cuda/src/ops/norm.rs numbers them.
#define BY_KIND(kind, body, ...)                  \
  switch (kind) {                                 \
    case 0: body<Bf16x8>(__VA_ARGS__); break;     \
    case 1: body<F32x8>(__VA_ARGS__); break;      \
    case 2: body<Any8>(__VA_ARGS__); break;       \
    default: body<Any1>(__VA_ARGS__); break;      \
  }

// The f32 constants of channels i..i + N (N is 1 or 8), or one constant for all of them.
template <int N>
__device__ __forceinline__ void constants(const View& v, i64 i, bool shared, float (&x)[N]) {
  if constexpr (N == 8) {
    if (!shared) return load8(v, i, x);
  }
  float one = load(v, i);
#pragma unroll
  for (int k = 0; k < N; k++) x[k] = one;
}

// What `act_value` and `act_slope` give for each element; the activation is chosen once for all of them.
#define EACH_ACT(F)                                                                                          \
  F(RELU) F(RELU6) F(SILU) F(GELU) F(GELU_TANH) F(QUICK_GELU) F(HARD_SWISH) F(HARD_SIGMOID) F(SIGMOID) F(TANH)

template <int N>
__device__ __forceinline__ void act_each(int act, float (&z)[N]) {
#define ONE(A)                                                      \
  case A: {                                                         \
    _Pragma("unroll") for (int k = 0; k < N; k++) z[k] = act_value(A, z[k]); \
    break;                                                          \
  }
  switch (act) {
    EACH_ACT(ONE)
    default: break;
  }
#undef ONE
}

// g *= act'(z)
template <int N>
__device__ __forceinline__ void slope_each(int act, const float (&z)[N], float (&g)[N]) {
#define ONE(A)                                                      \
  case A: {                                                         \
    _Pragma("unroll") for (int k = 0; k < N; k++) g[k] *= act_slope(A, z[k]); \
    break;                                                          \
  }
  switch (act) {
    EACH_ACT(ONE)
    default: break;
  }
#undef ONE
}
