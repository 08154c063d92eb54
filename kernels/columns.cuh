// Sums over the rows of [batch, rows, c], in an order that the sizes alone decide.
//
// A block takes a tile of columns and a chunk of rows; its threads are `lanes` columns (of eight or of one element)
// times as many rows as fit. What a block finds is merged over its threads by a tree, and over the chunks by
// `merge_columns` (columns.cu).
#pragma once
#include "vector.cuh"

// engine/cuda/src/ops/columns.rs mirrors this.
struct Columns {
  // [batch, chunks, c] partial sums, or with one chunk the result.
  View sums;
  i64 rows, c;
  // Elements between batch entries and between rows.
  i64 batch_pitch, row_pitch;
  // Rows of a chunk.
  i64 chunk;
  float factor;
  // Threads side by side.
  int lanes;
  // Eight elements a thread.
  int wide;
  // With one chunk: add to what is there.
  int accumulate;

  template <int V>
  __device__ __forceinline__ i64 column() const {
    return (i64)V * ((i64)blockIdx.x * lanes + threadIdx.x % lanes);
  }
};

// Grid: column tiles, chunks, batch. f(i, x, term) gets the place and the V values of each of N tensors there, and says
// what is summed. `room` holds 256·V floats. Block of 256.
template <int V, int N, class F>
__device__ __forceinline__ void sum_columns(const View (&in)[N], const Columns& d, float* room, F f) {
  constexpr int ROWS = N == 1 ? 4 : 2;
  int high = blockDim.x / d.lanes, ty = threadIdx.x / d.lanes;
  i64 column = d.column<V>();
  i64 begin = blockIdx.y * d.chunk, end = begin + d.chunk < d.rows ? begin + d.chunk : d.rows;
  i64 base = blockIdx.z * d.batch_pitch + column;
  bool mine = column < d.c && ty < high;
  float sum[V];
#pragma unroll
  for (int k = 0; k < V; k++) sum[k] = 0.0f;
  if (mine) {
    i64 r = begin + ty;
    for (; r + (ROWS - 1) * high < end; r += ROWS * high) {
      float x[ROWS][N][V];
      if constexpr (V == 8) {
        Raw8 raw[ROWS][N];
#pragma unroll
        for (int u = 0; u < ROWS; u++)
#pragma unroll
          for (int j = 0; j < N; j++) raw[u][j] = fetch8(in[j], base + (r + u * high) * d.row_pitch);
#pragma unroll
        for (int u = 0; u < ROWS; u++)
#pragma unroll
          for (int j = 0; j < N; j++) unpack8(in[j], raw[u][j], x[u][j]);
      } else {
#pragma unroll
        for (int u = 0; u < ROWS; u++)
#pragma unroll
          for (int j = 0; j < N; j++) load_some<V>(in[j], base + (r + u * high) * d.row_pitch, x[u][j]);
      }
#pragma unroll
      for (int u = 0; u < ROWS; u++) {
        float term[V];
        f(base + (r + u * high) * d.row_pitch, x[u], term);
#pragma unroll
        for (int k = 0; k < V; k++) sum[k] += term[k];
      }
    }
    for (; r < end; r += high) {
      float x[N][V], term[V];
#pragma unroll
      for (int j = 0; j < N; j++) load_some<V>(in[j], base + r * d.row_pitch, x[j]);
      f(base + r * d.row_pitch, x, term);
#pragma unroll
      for (int k = 0; k < V; k++) sum[k] += term[k];
    }
  }
#pragma unroll
  for (int k = 0; k < V; k++) room[k * 256 + threadIdx.x] = sum[k];
  int half = 1;
  while (2 * half < high) half *= 2;
  for (; half > 0; half /= 2) {
    __syncthreads();
    if (ty < half && ty + half < high)
#pragma unroll
      for (int k = 0; k < V; k++) room[k * 256 + threadIdx.x] += room[k * 256 + threadIdx.x + half * d.lanes];
  }
  if (mine && ty == 0) {
#pragma unroll
    for (int k = 0; k < V; k++) sum[k] = d.factor * room[k * 256 + threadIdx.x];
    give_some<V>(d.sums, ((i64)blockIdx.z * gridDim.y + blockIdx.y) * d.c + column, sum, d.accumulate);
  }
}
