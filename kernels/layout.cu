// Ops that move values; definitions as in engine/cpu/src/layout.rs. Kernels with `wide` take eight elements a thread:
// then every length and pitch is a multiple of 8.
#include "vector.cuh"

// to (+)= the image [batch, h, w, c] as patches [batch·ph·pw, (h/ph)·(w/pw), c], or back. A block walks along rows of
// the image, whose pixels lie together. Grid: batch · h, tiles of a row.
template <int V>
__device__ __forceinline__ void move_patches(const View& from, const View& to, int h, int w, int c, int ph, int pw,
                                             int to_image, int accumulate) {
  int j = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (j >= w * c) return;
  int b = blockIdx.x / h, y = blockIdx.x % h, x = j / c, channel = j - x * c;
  i64 count = (i64)(h / ph) * (w / pw);
  i64 patch = (i64)(y / ph) * (w / pw) + x / pw, position = (y % ph) * pw + x % pw;
  i64 image = (i64)blockIdx.x * w * c + j;
  i64 sequence = (((i64)b * ph * pw + position) * count + patch) * c + channel;
  float v[V];
  load_some<V>(from, to_image ? sequence : image, v);
  give_some<V>(to, to_image ? image : sequence, v, accumulate);
}

extern "C" __global__ void __launch_bounds__(256)
    patches(View from, View to, int h, int w, int c, int ph, int pw, int to_image, int wide, int accumulate) {
  if (wide) move_patches<8>(from, to, h, w, c, ph, pw, to_image, accumulate);
  else move_patches<1>(from, to, h, w, c, ph, pw, to_image, accumulate);
}

// to[o·to_pitch + i] (+)= from[o·from_pitch + i] for i < len of each o: slices, concatenation, a token in front
// (from_pitch 0).
template <int V>
__device__ __forceinline__ void move_rows(const View& from, const View& to, i64 n, i64 len, i64 from_pitch,
                                          i64 to_pitch, i64 from_start, i64 to_start, int accumulate) {
  i64 at[2];
  float x[2][V];
#pragma unroll
  for (int u = 0; u < 2; u++) {
    i64 i = (i64)blockIdx.x * (2 * blockDim.x) + u * blockDim.x + threadIdx.x;
    i64 o = quotient(i, len / V), k = (i - o * (len / V)) * V;
    at[u] = i * V < n ? to_start + o * to_pitch + k : -1;
    if (at[u] >= 0) load_some<V>(from, from_start + o * from_pitch + k, x[u]);
  }
#pragma unroll
  for (int u = 0; u < 2; u++)
    if (at[u] >= 0) give_some<V>(to, at[u], x[u], accumulate);
}

extern "C" __global__ void __launch_bounds__(256)
    copy_rows(View from, View to, i64 n, i64 len, i64 from_pitch, i64 to_pitch, i64 from_start, i64 to_start, int wide,
              int accumulate) {
  if (wide) move_rows<8>(from, to, n, len, from_pitch, to_pitch, from_start, to_start, accumulate);
  else move_rows<1>(from, to, n, len, from_pitch, to_pitch, from_start, to_start, accumulate);
}

// y[i] = x[i·group + ids[i]], rows of `width`: with group 0 an embedding. An id outside 0..rows makes its row NaN.
template <int V>
__device__ __forceinline__ void read_rows(const View& x, const View& ids, const View& y, i64 n, i64 width, i64 group,
                                          i64 rows) {
  i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (i >= n) return;
  i64 row = quotient(i / V, width / V), column = i - row * width;
  int id = load_int(ids, row);
  float v[V];
  if (id >= 0 && id < rows) {
    load_some<V>(x, (row * group + id) * width + column, v);
  } else {
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = NAN;
  }
  give_some<V>(y, i, v, 0);
}

extern "C" __global__ void __launch_bounds__(256)
    gather_rows(View x, View ids, View y, i64 n, i64 width, i64 group, i64 rows, int wide) {
  if (wide) read_rows<8>(x, ids, y, n, width, group, rows);
  else read_rows<1>(x, ids, y, n, width, group, rows);
}

// dx[b·tokens + ids[b]] += dy[b], rows of `width`; no two b share a row.
extern "C" __global__ void __launch_bounds__(256)
    gather_rows_vjp(View dy, View ids, View dx, i64 n, i64 width, i64 tokens) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  i64 row = quotient(i, width);
  int id = load_int(ids, row);
  if (id >= 0 && id < tokens) give(dx, (row * tokens + id) * width + (i - row * width), load(dy, i), 1);
}

// engine/cuda/src/ops/layout.rs mirrors this: axes that a block's number counts, last one fastest, with their strides in
// x and y.
struct Axes {
  int count, pad;
  i64 size[8], from[8], to[8];
};

__device__ __forceinline__ void decode(const Axes& a, i64 number, i64& from, i64& to) {
  for (int k = a.count - 1; k >= 0; k--) {
    i64 rest = quotient(number, a.size[k]), i = number - rest * a.size[k];
    from += i * a.from[k], to += i * a.to[k];
    number = rest;
  }
}

// Axes reordered where the last one stays: y (+)= x in runs of `run` elements; the axes are those before.
template <int V>
__device__ __forceinline__ void move_runs(const View& x, const View& y, const Axes& axes, i64 n, i64 run,
                                          int accumulate) {
  i64 i = ((i64)blockIdx.x * blockDim.x + threadIdx.x) * V;
  if (i >= n) return;
  i64 number = quotient(i / V, run / V), from = i - number * run, to = from;
  decode(axes, number, from, to);
  float v[V];
  load_some<V>(x, from, v);
  give_some<V>(y, to, v, accumulate);
}

extern "C" __global__ void __launch_bounds__(256)
    permute_runs(View x, View y, Axes axes, i64 n, i64 run, int wide, int accumulate) {
  if (wide) move_runs<8>(x, y, axes, n, run, accumulate);
  else move_runs<1>(x, y, axes, n, run, accumulate);
}

// Axes reordered where the last one moves: tiles of 64 by 64 of x's last axis (`rows`, apart by `rows_to` in y) and of
// y's last (`columns`, apart by `columns_from` in x), through shared memory. Grid: numbers of the other axes, tiles of
// rows, tiles of columns.
extern "C" __global__ void __launch_bounds__(256)
    permute_tiles(View x, View y, Axes axes, i64 rows, i64 rows_to, i64 columns, i64 columns_from, int accumulate) {
  __shared__ float tile[64][65];
  i64 from = 0, to = 0;
  decode(axes, blockIdx.x, from, to);
  i64 row = (i64)blockIdx.y * 64, column = (i64)blockIdx.z * 64;
  int tx = threadIdx.x & 63, ty = threadIdx.x >> 6;
#pragma unroll
  for (int k = 0; k < 64; k += 4)
    if (row + tx < rows && column + ty + k < columns)
      tile[ty + k][tx] = load(x, from + (column + ty + k) * columns_from + row + tx);
  __syncthreads();
#pragma unroll
  for (int k = 0; k < 64; k += 4)
    if (column + tx < columns && row + ty + k < rows)
      give(y, to + (row + ty + k) * rows_to + column + tx, tile[tx][ty + k], accumulate);
}
