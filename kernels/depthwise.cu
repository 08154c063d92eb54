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
    Window from = window<ROWS>(b, d.h, d.w, oy * S - d.pad_h, ox * S - d.pad_w, t, d);
    float acc[TH][TW][V], v[ROWS][V];
#pragma unroll
    for (int i = 0; i < TH * TW * V; i++) acc[i / V / TW][i / V % TW][i % V] = start[i % V];
    typename T::Raw raw[ROWS];
    load_column<T, ROWS>(x, from, 0, raw);
    // The column after is on its way while one is used. Column j is tap j of the first output, j − 1 of the second.
#pragma unroll 1
    for (int j = 0; j < COLUMNS; j++) {
#pragma unroll
      for (int r = 0; r < ROWS; r++) T::open(raw[r], v[r]);
      if (j + 1 < COLUMNS) load_column<T, ROWS>(x, from, j + 1, raw);
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
    Window from = window<ROWS>(b, d.h, d.w, iy / 2 - BEFORE, ix / 2 - BEFORE, t, d);
#pragma unroll
    for (int j = 0; j < (TW - 1 + P) / 2 + BEFORE + 1; j++) {
      typename T::Raw raw[ROWS];
      float v[ROWS][V];
      load_column<T, ROWS>(dy, from, j, raw);
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

// f32 at stride 1; bf16 and f32 at stride 2; their gradients by x.
template <int K, int SHORT>
__device__ __forceinline__ void square(const View& x, const View& w, const View& bias, const View& y,
                                             const Conv& d, int flip, int accumulate, int variant, float* weights) {
  switch (variant) {
    case 0: correlate<F32x4, K, 1, 4, 2>(x, w, bias, y, d, flip, accumulate, weights); break;
    case 1: correlate<Bf16x4, K, 2, 4, 1>(x, w, bias, y, d, flip, accumulate, weights); break;
    case 2: correlate<F32x4, K, 2, 4, 1>(x, w, bias, y, d, flip, accumulate, weights); break;
    case 3: transpose_by_2<Bf16x4, K, 4, 2>(x, w, y, d, accumulate, weights); break;
    default: transpose_by_2<F32x4, K, SHORT, 2>(x, w, y, d, accumulate, weights); break;
  }
}

extern "C" __global__ void __launch_bounds__(128, 3)
    depthwise_3(View x, View w, View bias, View y, Conv d, int flip, int accumulate, int variant) {
  __shared__ __align__(16) float weights[9 * 64];
  square<3, 4>(x, w, bias, y, d, flip, accumulate, variant, weights);
}

extern "C" __global__ void __launch_bounds__(128, 3)
    depthwise_5(View x, View w, View bias, View y, Conv d, int flip, int accumulate, int variant) {
  __shared__ __align__(16) float weights[25 * 64];
  square<5, 4>(x, w, bias, y, d, flip, accumulate, variant, weights);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    depthwise_7(View x, View w, View bias, View y, Conv d, int flip, int accumulate, int variant) {
  __shared__ __align__(16) float weights[49 * 64];
  square<7, 2>(x, w, bias, y, d, flip, accumulate, variant, weights);
}

// Any size, multiplier and element type: a thread an element of y.
extern "C" __global__ void __launch_bounds__(256)
    depthwise_any(View x, View w, View bias, View y, Conv d, i64 n) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int c = i % d.c, ox = i / d.c % d.ow, oy = i / d.c / d.ow % d.oh;
  i64 image = i / d.c / d.ow / d.oh * d.h;
  float sum = bias.len ? load(bias, c) : 0.0f;
  for (int ky = 0; ky < d.kh; ky++) {
    int iy = oy * d.stride + ky - d.pad_h;
    if (iy < 0 || iy >= d.h) continue;
    for (int kx = 0; kx < d.kw; kx++) {
      int ix = ox * d.stride + kx - d.pad_w;
      if (ix < 0 || ix >= d.w) continue;
      float v = load(x, ((image + iy) * d.w + ix) * (d.c / d.m) + c / d.m);
      sum += v * load(w, ((i64)c * d.kh + ky) * d.kw + kx);
    }
  }
  store(y, i, sum);
}

// Its gradient by x; here `Conv` is the forward's: h, w of dx, oh, ow of dy.
extern "C" __global__ void __launch_bounds__(256)
    depthwise_any_data(View w, View dy, View dx, Conv d, i64 n, int accumulate) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  int width = d.c / d.m, c = i % width, ix = i / width % d.w, iy = i / width / d.w % d.h;
  i64 image = i / width / d.w / d.h * d.oh;
  float sum = 0.0f;
  for (int ky = 0; ky < d.kh; ky++) {
    int up = iy + d.pad_h - ky, oy = up / d.stride;
    if (up < 0 || up % d.stride != 0 || oy >= d.oh) continue;
    for (int kx = 0; kx < d.kw; kx++) {
      int left = ix + d.pad_w - kx, ox = left / d.stride;
      if (left < 0 || left % d.stride != 0 || ox >= d.ow) continue;
      for (int m = 0; m < d.m; m++) {
        i64 co = (i64)c * d.m + m;
        sum += load(dy, ((image + oy) * d.ow + ox) * d.c + co) * load(w, (co * d.kh + ky) * d.kw + kx);
      }
    }
  }
  give(dx, i, sum, accumulate);
}
