// Sums over rows: the gradients of biases and of tokens, means over space.
#include "columns.cuh"

template <int V>
__device__ __forceinline__ void plain_sums(const View& x, const Columns& d, float* room) {
  const View in[1] = {x};
  sum_columns<V, 1>(in, d, room, [&](i64, float(&x)[1][V], float(&term)[V]) {
#pragma unroll
    for (int k = 0; k < V; k++) term[k] = x[0][k];
  });
}

// sums[b, chunk, c] = factor · Σ_r x[b, r, c] over the rows of the chunk
extern "C" __global__ void __launch_bounds__(256) column_sums(View x, Columns d) {
  __shared__ float room[256 * 8];
  if (d.wide) plain_sums<8>(x, d, room);
  else plain_sums<1>(x, d, room);
}

// out[b, c] (+)= Σ_chunk sums[b, chunk, c]; 32 columns and 32 chunks at a time. Grid: column tiles, batch.
extern "C" __global__ void __launch_bounds__(1024)
    merge_columns(View sums, View out, i64 chunks, i64 c, int accumulate) {
  __shared__ double room[32][33];
  int tx = threadIdx.x & 31, ty = threadIdx.x >> 5;
  i64 column = (i64)blockIdx.x * 32 + tx, b = blockIdx.y;
  double sum = 0.0;
  if (column < c)
    for (i64 k = ty; k < chunks; k += 32) sum += (double)load(sums, (b * chunks + k) * c + column);
  room[ty][tx] = sum;
  for (int half = 16; half > 0; half /= 2) {
    __syncthreads();
    if (ty < half) room[ty][tx] += room[ty + half][tx];
  }
  __syncthreads();
  if (ty == 0 && column < c) give(out, b * c + column, (float)room[0][tx], accumulate);
}
