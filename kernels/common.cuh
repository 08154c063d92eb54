// What every kernel shares: typed views of memory, 8-wide loads and stores, reductions in a fixed order.
//
// The same sources are compiled by NVRTC for a GPU and, with MCPIPE_SHIM defined, by a C++ compiler for the CPU
// (tests/kernels/shim.hpp), where they are tested without a GPU.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#ifndef MCPIPE_SHIM
// A block's dynamic shared memory, 128-byte aligned.
#define DYNAMIC_SHARED(name) extern __shared__ __align__(128) unsigned char name[]
#define CHECK_INDEX(view, i, n)
#define INFINITY __int_as_float(0x7f800000)
#define NAN __int_as_float(0x7fffffff)
#endif

// Element types, as engine/cuda/src/view.rs numbers them.
enum Dtype : u32 { F32 = 0, BF16 = 1, I32 = 2, U8 = 3 };

// A tensor's memory: `len` elements of one type, 16-byte aligned.
struct View {
  void* data;
  i64 len;
  u32 dtype;
  u32 pad;
};

__device__ __forceinline__ float bf16_to_float(u16 bits) { return __uint_as_float((u32)bits << 16); }

// Round to nearest even; NaN stays NaN.
__device__ __forceinline__ u16 float_to_bf16(float x) {
#if !defined(MCPIPE_SHIM)
  u16 out;
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(out) : "f"(x));
  return out;
#else
  u32 bits = __float_as_uint(x);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (u16)((bits >> 16) | 0x40u);
  return (u16)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#endif
}

// Two values in one word, the first in the low half.
__device__ __forceinline__ u32 pack_bf16(float lo, float hi) {
#if !defined(MCPIPE_SHIM)
  u32 out;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(out) : "f"(hi), "f"(lo));
  return out;
#else
  return (u32)float_to_bf16(lo) | ((u32)float_to_bf16(hi) << 16);
#endif
}

__device__ __forceinline__ void unpack_bf16(u32 word, float& lo, float& hi) {
  lo = __uint_as_float(word << 16);
  hi = __uint_as_float(word & 0xffff0000u);
}

__device__ __forceinline__ float load(const View& v, i64 i) {
  CHECK_INDEX(v, i, 1);
  return v.dtype == F32 ? ((const float*)v.data)[i] : bf16_to_float(((const u16*)v.data)[i]);
}

__device__ __forceinline__ void store(const View& v, i64 i, float x) {
  CHECK_INDEX(v, i, 1);
  if (v.dtype == F32) ((float*)v.data)[i] = x;
  else ((u16*)v.data)[i] = float_to_bf16(x);
}

__device__ __forceinline__ int load_int(const View& v, i64 i) {
  CHECK_INDEX(v, i, 1);
  return ((const int*)v.data)[i];
}

// Eight elements from i, a multiple of 8.
__device__ __forceinline__ void load8(const View& v, i64 i, float (&x)[8]) {
  CHECK_INDEX(v, i, 8);
  if (v.dtype == F32) {
    float4 a = ((const float4*)v.data)[i / 4], b = ((const float4*)v.data)[i / 4 + 1];
    x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w, x[4] = b.x, x[5] = b.y, x[6] = b.z, x[7] = b.w;
  } else {
    uint4 a = ((const uint4*)v.data)[i / 8];
    unpack_bf16(a.x, x[0], x[1]), unpack_bf16(a.y, x[2], x[3]);
    unpack_bf16(a.z, x[4], x[5]), unpack_bf16(a.w, x[6], x[7]);
  }
}

__device__ __forceinline__ void store8(const View& v, i64 i, const float (&x)[8]) {
  CHECK_INDEX(v, i, 8);
  if (v.dtype == F32) {
    ((float4*)v.data)[i / 4] = make_float4(x[0], x[1], x[2], x[3]);
    ((float4*)v.data)[i / 4 + 1] = make_float4(x[4], x[5], x[6], x[7]);
  } else {
    ((uint4*)v.data)[i / 8] =
        make_uint4(pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3]), pack_bf16(x[4], x[5]), pack_bf16(x[6], x[7]));
  }
}

// Eight elements from i (a multiple of 8), or those of them below n: the rest reads as 0, and is not stored.
__device__ __forceinline__ void load8_partial(const View& v, i64 i, i64 n, float (&x)[8]) {
  if (i + 8 <= n) {
    load8(v, i, x);
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = i + k < n ? load(v, i + k) : 0.0f;
  }
}

__device__ __forceinline__ void store8_partial(const View& v, i64 i, i64 n, const float (&x)[8]) {
  if (i + 8 <= n) {
    store8(v, i, x);
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++)
      if (i + k < n) store(v, i + k, x[k]);
  }
}

// The gradient g into place i of a gradient that may hold something already.
__device__ __forceinline__ void give(const View& v, i64 i, float g, int accumulate) {
  store(v, i, accumulate ? load(v, i) + g : g);
}

__device__ __forceinline__ void give8_partial(const View& v, i64 i, i64 n, float (&g)[8], int accumulate) {
  if (accumulate) {
    float old[8];
    load8_partial(v, i, n, old);
#pragma unroll
    for (int k = 0; k < 8; k++) g[k] += old[k];
  }
  store8_partial(v, i, n, g);
}

// Larger of two; a NaN on either side stays (fmaxf drops it).
__device__ __forceinline__ float max_nan(float a, float b) { return a > b || a != a ? a : b; }

// Over the 32 lanes of a warp; every lane gets the result. A butterfly: the same order each time.
__device__ __forceinline__ float warp_sum(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

__device__ __forceinline__ float warp_max(float x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, o));
  return x;
}

// Over a block of whole warps, at most 1,024 threads in x; every thread gets the result. `room` is shared memory of 32
// floats, free again on return.
__device__ __forceinline__ float block_sum(float x, float* room) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  x = warp_sum(x);
  if (lane == 0) room[warp] = x;
  __syncthreads();
  x = warp_sum(lane < warps ? room[lane] : 0.0f);
  __syncthreads();
  return x;
}

__device__ __forceinline__ float block_max(float x, float* room) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  x = warp_max(x);
  if (lane == 0) room[warp] = x;
  __syncthreads();
  x = warp_max(lane < warps ? room[lane] : -INFINITY);
  __syncthreads();
  return x;
}
