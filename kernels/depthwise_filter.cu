// Depthwise convolution's gradient by its weights: dw[c,ky,kx] = Σ dy[b,oy,ox,c]·x[b, oy·s + ky − p, ox·s + kx − p, c/m], and
// by its bias, Σ dy.
//
// As in depthwise.cu a thread owns a few channels and walks over blocks of pixels, here with all taps' sums in registers.
// A block sums over its threads and leaves a partial [taps + 1, C] (the last line the bias's); another kernel adds the
// partials in order.
#include "depthwise.cuh"

// Sums a[0..COLUMNS] over the block's threads of the same channels into a line of the partials. `room` holds 128·COLUMNS·V
// floats.
template <int COLUMNS, int V>
__device__ __forceinline__ void leave(const float (&a)[COLUMNS][V], const View& partials, i64 line, const Tile& t,
                                      const Conv& d, float* room) {
  if (t.gy < t.columns) {
#pragma unroll
    for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
      for (int k = 0; k < V; k++) room[(t.gy * COLUMNS + j) * t.width + t.gx * V + k] = a[j][k];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < COLUMNS * t.width; i += blockDim.x) {
    float sum = 0.0f;
    for (int p = 0; p < t.columns; p++) sum += room[p * COLUMNS * t.width + i];
    int c = t.from + i % t.width;
    if (c < d.c) store(partials, (line + i / t.width) * d.c + c, sum);
  }
  __syncthreads();
}

template <class T, int K, int S, int TH, int TW>
__device__ __forceinline__ void filter(const View& x, const View& dy, const View& partials, const Conv& d,
                                       float* room) {
  constexpr int V = T::N, ROWS = (TH - 1) * S + K;
  Tile t = tile<V>(d);
  float acc[K][K][V] = {}, bias[1][V] = {};
  if (t.active) {
    int strips = (d.oh + TH - 1) / TH, columns = (d.ow + TW - 1) / TW, items = d.batch * strips * columns;
    for (int item = blockIdx.x * t.columns + t.gy; item < items; item += gridDim.x * t.columns) {
      int ox = item % columns * TW, oy = item / columns % strips * TH, b = item / columns / strips;
      Window from = window<ROWS>(b, d.h, d.w, oy * S - d.pad_h, ox * S - d.pad_w, t, d);
      Window out = window<TH>(b, d.oh, d.ow, oy, ox, t, d);
      float g[TW][TH][V];
#pragma unroll
      for (int o = 0; o < TW; o++) {
        typename T::Raw raw[TH];
        load_column<T, TH>(dy, out, o, raw);
#pragma unroll
        for (int r = 0; r < TH; r++) {
          T::open(raw[r], g[o][r]);
#pragma unroll
          for (int k = 0; k < V; k++) bias[0][k] += g[o][r][k];
        }
      }
#pragma unroll
      for (int j = 0; j < (TW - 1) * S + K; j++) {
        typename T::Raw raw[ROWS];
        load_column<T, ROWS>(x, from, j, raw);
#pragma unroll
        for (int i = 0; i < ROWS; i++) {
          float v[V];
          T::open(raw[i], v);
#pragma unroll
          for (int r = 0; r < TH; r++) {
            const int ky = i - r * S;
            if (ky < 0 || ky >= K) continue;
#pragma unroll
            for (int o = 0; o < TW; o++) {
              const int kx = j - o * S;
              if (kx < 0 || kx >= K) continue;
#pragma unroll
              for (int k = 0; k < V; k++) acc[ky][kx][k] += g[o][r][k] * v[k];
            }
          }
        }
      }
    }
  }
  i64 line = (i64)blockIdx.x * (K * K + 1);
#pragma unroll
  for (int ky = 0; ky < K; ky++) leave<K, V>(acc[ky], partials, line + ky * K, t, d, room);
  leave<1, V>(bias, partials, line + K * K, t, d, room);
}

// f32 at stride 1, bf16 and f32 at stride 2.
template <int K, class B, class F>
__device__ __forceinline__ void square(const View& x, const View& dy, const View& partials, const Conv& d, int variant,
                                       float* room) {
  switch (variant) {
    case 1: filter<F, K, 1, 4, 1>(x, dy, partials, d, room); break;
    case 2: filter<B, K, 2, 2, 1>(x, dy, partials, d, room); break;
    default: filter<F, K, 2, 2, 1>(x, dy, partials, d, room); break;
  }
}

extern "C" __global__ void __launch_bounds__(128, 3)
    depthwise_filter_3(View x, View dy, View partials, Conv d, int variant) {
  __shared__ float room[128 * 12];
  square<3, Bf16x4, F32x4>(x, dy, partials, d, variant, room);
}

extern "C" __global__ void __launch_bounds__(128, 3)
    depthwise_filter_5(View x, View dy, View partials, Conv d, int variant) {
  __shared__ float room[128 * 10];
  square<5, Bf16x2, F32x2>(x, dy, partials, d, variant, room);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    depthwise_filter_7(View x, View dy, View partials, Conv d, int variant) {
  __shared__ float room[128 * 14];
  square<7, Bf16x2, F32x2>(x, dy, partials, d, variant, room);
}

// Any size, multiplier and element type: a block sums one tap (grid z; the last one the bias) of 32 channels (grid y) over
// pixels blockIdx.x·8 + t/32, + 8·gridDim.x, …
extern "C" __global__ void __launch_bounds__(256) depthwise_any_filter(View x, View dy, View partials, Conv d) {
  __shared__ float room[256];
  int c = blockIdx.y * 32 + threadIdx.x % 32, tap = blockIdx.z, taps = d.kh * d.kw, ky = tap / d.kw, kx = tap % d.kw;
  float sum = 0.0f;
  if (c < d.c) {
    i64 pixels = (i64)d.batch * d.oh * d.ow;
    for (i64 p = (i64)blockIdx.x * 8 + threadIdx.x / 32; p < pixels; p += 8 * gridDim.x) {
      int iy = (int)(p / d.ow % d.oh) * d.stride + ky - d.pad_h, ix = (int)(p % d.ow) * d.stride + kx - d.pad_w;
      if (tap < taps && (iy < 0 || iy >= d.h || ix < 0 || ix >= d.w)) continue;
      i64 source = (p / d.ow / d.oh * d.h + iy) * d.w + ix;
      float v = tap < taps ? load(x, source * (d.c / d.m) + c / d.m) : 1.0f;
      sum += load(dy, p * d.c + c) * v;
    }
  }
  room[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || c >= d.c) return;
  for (int i = 1; i < 8; i++) sum += room[i * 32 + threadIdx.x];
  store(partials, ((i64)blockIdx.x * (taps + 1) + tap) * d.c + c, sum);
}

// dw (+)= and dbias (+)= the sums over [blocks, taps + 1, C]; 32 columns a block, 8 threads a column.
extern "C" __global__ void __launch_bounds__(256)
    depthwise_filter_merge(View partials, View dw, View dbias, int taps, int c, int blocks, int add_w, int add_bias) {
  __shared__ double room[256];
  i64 width = (i64)(taps + 1) * c, i = (i64)blockIdx.x * 32 + threadIdx.x % 32;
  double sum = 0.0;
  if (i < width) {
#pragma unroll 8
    for (i64 b = threadIdx.x / 32; b < blocks; b += 8) sum += (double)load(partials, b * width + i);
  }
  room[threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.x >= 32 || i >= width) return;
  for (int k = 1; k < 8; k++) sum += room[k * 32 + threadIdx.x];
  i64 tap = i / c, channel = i % c;
  if (tap < taps) {
    if (dw.len) give(dw, channel * taps + tap, (float)sum, add_w);
  } else if (dbias.len) {
    give(dbias, channel, (float)sum, add_bias);
  }
}
