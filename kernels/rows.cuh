// What kernels of losses share: rows shared out to threads, sums in f64, terms of divergences.
#pragma once
#include "vector.cuh"

#define LEAST_NORM 1e-12f
#define LEAST_NORMAL 1.17549435e-38f
#define GREATEST 3.40282347e38f

// Threads that share a row of c columns: 1, 2, 4, ... 32 lanes of a warp (blocks of 256), or more: a whole block. Teams
// without a row have no columns and store nothing, but take part in barriers and shuffles.
struct Team {
  i64 row, begin, c;
  int rank, size;
  bool there;
};

__device__ __forceinline__ Team team_of(int size, i64 rows, i64 c) {
  Team t;
  t.size = size > 32 ? blockDim.x : size;
  t.rank = threadIdx.x & (t.size - 1);
  t.row = size > 32 ? (i64)blockIdx.x : ((i64)blockIdx.x * blockDim.x + threadIdx.x) / size;
  t.there = t.row < rows;
  t.c = t.there ? c : 0;
  t.begin = t.row * c;
  return t;
}

__device__ __forceinline__ float team_sum(const Team& t, float x, float* room) {
  if (t.size > 32) return block_sum(x, room);
  for (int o = t.size >> 1; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

__device__ __forceinline__ float team_max(const Team& t, float x, float* room) {
  if (t.size > 32) return block_max(x, room);
  for (int o = t.size >> 1; o > 0; o >>= 1) x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, o));
  return x;
}

__device__ __forceinline__ double warp_sum_f64(double x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

// Over the block, in the first thread.
__device__ __forceinline__ double block_sum_f64(double x, double* room) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = blockDim.x >> 5;
  x = warp_sum_f64(x);
  __syncthreads();
  if (lane == 0) room[warp] = x;
  __syncthreads();
  return warp_sum_f64(warp == 0 && lane < warps ? room[lane] : 0.0);
}

// f(place) for the team's own columns, V at a time.
template <int V, class F>
__device__ __forceinline__ void each_column(const Team& t, F f) {
#pragma unroll 2
  for (i64 i = (i64)t.rank * V; i < t.c; i += (i64)t.size * V) f(t.begin + i);
}

__device__ __forceinline__ double team_sum_f64(const Team& t, double x, double* room) {
  if (t.size > 32) return block_sum_f64(x, room);
  for (int o = t.size >> 1; o > 0; o >>= 1) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

// p·ln(p/q), 0 where p is 0; q at least the smallest normal number. Close to p it is the quotient that loses nothing.
__device__ __forceinline__ float divergence(float p, float q) {
  if (p == 0.0f && q == q) return 0.0f;
  if (q < LEAST_NORMAL) q = LEAST_NORMAL;
  if (p > 0.5f * q && p < 2.0f * q) return p * log1pf((p - q) / q);
  return p * (logf(p) - logf(q));
}

// x, or the nearest finite number; NaN stays.
__device__ __forceinline__ float finite(float x) { return x > GREATEST ? GREATEST : (x < -GREATEST ? -GREATEST : x); }
