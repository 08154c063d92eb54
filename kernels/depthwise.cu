// Depthwise convolution over channels-last images: y[b,oy,ox,c] = Σ x[b, oy·s + ky − p, ox·s + kx − p, c/m]·w[c,ky,kx], zeros
// outside, m outputs a channel; its VJPs. Over tokens: an image of one column.
//
// A thread owns a few neighbouring channels of a block of TH x TW pixels; the threads of a warp lie along channels, then
// columns, so that what they load is contiguous. It reads the columns of the window one after the other: each value is
// loaded once and serves all taps. A block keeps one tile of channels, whose weights it holds in shared memory as
// [taps][channels], and walks over blocks of pixels.
#include "depthwise.cuh"

// acc[r][o] += v[r·S + ky]·w[ky] over the rows of a column; `at` is the thread's weight of kernel row 0.
template <int V, int K, int S, int TH, int TW, int ROWS>
__device__ __forceinline__ void add_column(const float (&v)[ROWS][V], const float* at, int step, int o,
                                           float (&acc)[TH][TW][V]) {
#pragma unroll
  for (int ky = 0; ky < K; ky++) {
    float weight[V];
    shared_weights<V>(at + ky * step, weight);
#pragma unroll
    for (int r = 0; r < TH; r++) {
#pragma unroll
      for (int k = 0; k < V; k++) acc[r][o][k] += v[r * S + ky][k] * weight[k];
    }
  }
}

// `Conv` has the image read in h, w and the image written in oh, ow; with `flip` the weights are turned around, which is
// the gradient by x at stride 1. TW is 2 at stride 1, else 1.
template <class T, int K, int S, int TH, int TW>
__device__ __forceinline__ void correlate(const View& x, const View& w, const View& bias, const View& y, const Conv& d,
                                          int flip, int accumulate, float* weights) {
  constexpr int V = T::N, ROWS = (TH - 1) * S + K, COLUMNS = K + TW - 1;
  Tile t = tile<V>(d);
  stage_weights(w, weights, t, d, K * K, flip);
  if (!t.active) return;
  const float* taps = weights + t.gx * V;
  const int step = K * t.width;
  int strips = (d.oh + TH - 1) / TH, columns = (d.ow + TW - 1) / TW, items = d.batch * strips * columns;
  float start[V] = {};
  if (bias.len) {
#pragma unroll
    for (int k = 0; k < V; k++) start[k] = load(bias, t.c0 + k);
  }
  for (int item = blockIdx.x * t.columns + t.gy; item < items; item += gridDim.x * t.columns) {
    int ox = item % columns * TW, oy = item / columns % strips * TH, b = item / columns / strips;
    int left = ox * S - d.pad_w, top = oy * S - d.pad_h;
    float acc[TH][TW][V], v[ROWS][V];
#pragma unroll
    for (int i = 0; i < TH * TW * V; i++) acc[i / V / TW][i / V % TW][i % V] = start[i % V];
    i64 image = (i64)b * d.h * d.w;
    typename T::Raw raw[ROWS];
    load_column<T, ROWS>(x, image, top, left, t, d, raw);
    // The column after is on its way while one is used. Column j is tap j of the first output, j − 1 of the second.
#pragma unroll 1
    for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) T::open(raw[r], v[r]);
      if (j + 1 < COLUMNS) load_column<T, ROWS>(x, image, top, left + j + 1, t, d, raw);
      if (j < K) add_column<V, K, S, TH, TW>(v, taps + j * t.width, step, 0, acc);
      if constexpr (TW == 2) {
        if (j > 0) add_column<V, K, S, TH, TW>(v, taps + (j - 1) * t.width, step, 1, acc);
      }
    }
    store_block<T, TH, TW>(y, b, oy, ox, t, d, accumulate, acc);
  }
}

// dx of a convolution of stride 2 with padding K/2: of rows iy0 + t (iy0 even), output row iy0/2 + r reaches those with
// ky = t + K/2 − 2r within the kernel. The image read is dy (h, w), the one written dx (oh, ow).
template <class T, int K, int TH, int TW>
__device__ __forceinline__ void transpose_by_2(const View& dy, const View& w, const View& dx, const Conv& d,
                                               int accumulate, float* weights) {
  constexpr int V = T::N, P = K / 2, BEFORE = P / 2, ROWS = (TH - 1 + P) / 2 + BEFORE + 1;
  Tile t = tile<V>(d);
  stage_weights(w, weights, t, d, K * K, 0);
  if (!t.active) return;
  const float* taps = weights + t.gx * V;
  int strips = (d.oh + TH - 1) / TH, columns = (d.ow + TW - 1) / TW, items = d.batch * strips * columns;
  for (int item = blockIdx.x * t.columns + t.gy; item < items; item += gridDim.x * t.columns) {
    int ix = item % columns * TW, iy = item / columns % strips * TH, b = item / columns / strips;
    float acc[TH][TW][V] = {};
    i64 image = (i64)b * d.h * d.w;
#pragma unroll
    for (int j = 0; j < (TW - 1 + P) / 2 + BEFORE + 1; j++) {
      typename T::Raw raw[ROWS];
      float v[ROWS][V];
      load_column<T, ROWS>(dy, image, iy / 2 - BEFORE, ix / 2 - BEFORE + j, t, d, raw);
#pragma unroll
      for (int r = 0; r < ROWS; r++) T::open(raw[r], v[r]);
#pragma unroll
      for (int o = 0; o < TW; o++) {
        const int kx = o + P - 2 * (j - BEFORE);
        if (kx < 0 || kx >= K) continue;
#pragma unroll
        for (int ky = 0; ky < K; ky++) {
          float weight[V];
          shared_weights<V>(taps + (ky * K + kx) * t.width, weight);
#pragma unroll
          for (int r = 0; r < ROWS; r++) {
            const int at = ky - P + 2 * (r - BEFORE);
            if (at < 0 || at >= TH) continue;
#pragma unroll
            for (int k = 0; k < V; k++) acc[at][o][k] += v[r][k] * weight[k];
          }
        }
      }
    }
    store_block<T, TH, TW>(dx, b, iy, ix, t, d, accumulate, acc);
  }
}

// `variant`: 0 and 1 bf16 in strips of 7 or 4 rows, 2 f32; 3 and 4 at stride 2; 5 and 6 the gradient by x of stride 2.
#define SQUARE(NAME, K, BLOCKS)                                                                                     \
  extern "C" __global__ void __launch_bounds__(128, BLOCKS)                                                         \
      NAME(View x, View w, View bias, View y, Conv d, int flip, int accumulate, int variant) {                      \
    __shared__ __align__(16) float weights[K * K * 64];                                                             \
    switch (variant) {                                                                                              \
      case 0: correlate<Bf16x4, K, 1, 7, 2>(x, w, bias, y, d, flip, accumulate, weights); break;                    \
      case 1: correlate<Bf16x4, K, 1, 4, 2>(x, w, bias, y, d, flip, accumulate, weights); break;                    \
      case 2: correlate<F32x4, K, 1, 4, 2>(x, w, bias, y, d, flip, accumulate, weights); break;                     \
      case 3: correlate<Bf16x4, K, 2, 4, 1>(x, w, bias, y, d, flip, accumulate, weights); break;                    \
      case 4: correlate<F32x4, K, 2, 4, 1>(x, w, bias, y, d, flip, accumulate, weights); break;                     \
      case 5: transpose_by_2<Bf16x4, K, 4, 2>(x, w, y, d, accumulate, weights); break;                              \
      default: transpose_by_2<F32x4, K, 4, 2>(x, w, y, d, accumulate, weights); break;                              \
    }                                                                                                               \
  }

SQUARE(depthwise_3, 3, 4)
SQUARE(depthwise_5, 5, 3)
SQUARE(depthwise_7, 7, 3)
