// Around dense products and convolutions: weights in the layout and type that a product takes, windows of images as rows of
// a matrix, and what follows a fused product.
//
// Batch norm with running statistics folded into a convolution (Jacob et al. 2018, eq. 14), per output channel o:
//   s = γ_o / √(var_o + ε),   w'_o = w_o · s,   bias'_o = (bias_o − mean_o) · s + β_o
// Windows as rows, so that a convolution is one product (Chellapilla et al. 2006, "im2col"), b, oy, ox a row's image and place:
//   columns[(b, oy, ox), (ky·kw + kx)·C + c] = x[b, oy·stride + ky − pad, ox·stride + kx − pad, c],  0 outside the image
#include "activation.cuh"

// One copy of weights or of a bias; mirrors `Copy` of engine/cuda/src/ops/dense/weights.rs.
struct WeightCopy {
  View from;   // [rows, channels, taps] f32 or bf16; nothing where `to` is the folded bias
  View to;     // [rows, ld], a row holding [taps, channels], then zeros
  View bias, gamma, beta, mean, var;  // [rows] each; nothing folded without gamma
  i64 first;                          // its first block among all copies' blocks
  i64 channels, taps, ld;
  float eps;
  u32 pad;
};

// Elements of a copy that a block writes.
#define COPY_BLOCK 2048

__device__ __forceinline__ void weight_copy(const WeightCopy& e, i64 block) {
  i64 n = e.to.len, i = block * COPY_BLOCK + 8 * threadIdx.x;
  if (i >= n) return;
  float v[8] = {};
  bool folded = e.gamma.len > 0;
  if (e.from.len == 0) {
#pragma unroll
    for (int k = 0; k < 8; k++) {
      i64 o = i + k;
      if (o >= n) continue;
      float s = load(e.gamma, o) / sqrtf(load(e.var, o) + e.eps);
      float bias = e.bias.len > 0 ? load(e.bias, o) : 0.0f;
      v[k] = (bias - load(e.mean, o)) * s + load(e.beta, o);
    }
  } else if (e.taps == 1 && e.ld == e.channels && !folded) {
    load8_partial(e.from, i, n, v);
  } else {
    i64 o = i / e.ld, r = i - o * e.ld, row = e.channels * e.taps;
    i64 t = r / e.channels, c = r - t * e.channels;
    float s = folded ? load(e.gamma, o) / sqrtf(load(e.var, o) + e.eps) : 1.0f;
#pragma unroll
    for (int k = 0; k < 8; k++) {
      v[k] = i + k < n && r < row ? load(e.from, (o * e.channels + c) * e.taps + t) * s : 0.0f;
      r++;
      if (++c == e.channels) c = 0, t++;
      if (r == e.ld) {
        r = c = t = 0, o++;
        if (folded && i + k + 1 < n) s = load(e.gamma, o) / sqrtf(load(e.var, o) + e.eps);
      }
    }
  }
  store8_partial(e.to, i, n, v);
}

// The `count` copies of a table, whose blocks are numbered from `base` on.
extern "C" __global__ void __launch_bounds__(256) dense_weights(View table, int count, i64 base) {
  const WeightCopy* copies = (const WeightCopy*)table.data;
  i64 block = base + blockIdx.x;
  int low = 0, high = count;  // the last copy whose first block is not behind this one
  while (high - low > 1) {
    int middle = (low + high) / 2;
    if (copies[middle].first <= block) low = middle;
    else high = middle;
  }
  weight_copy(copies[low], block - copies[low].first);
}

// One copy.
extern "C" __global__ void __launch_bounds__(256)
    dense_weight(View from, View to, View bias, View gamma, View beta, View mean, View var, i64 channels, i64 taps, i64 ld,
                 float eps) {
  weight_copy({from, to, bias, gamma, beta, mean, var, 0, channels, taps, ld, eps, 0}, blockIdx.x);
}

// to [rows, channels, taps] (+)= from [rows, ld], a row holding [taps, channels]: a weight gradient back in its parameter's
// layout.
extern "C" __global__ void __launch_bounds__(256)
    dense_weight_gradient(View from, View to, i64 channels, i64 taps, i64 ld, int accumulate) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= to.len) return;
  i64 row = i / taps, t = i - row * taps, o = row / channels, c = row - o * channels;
  give(to, i, load(from, o * ld + t * channels + c), accumulate);
}

// Sizes of windows over images: x [batch, h, w, c], windows of kh x kw at [batch, oh, ow]. ld: elements from one row of
// columns to the next, a multiple of 8; those behind kh·kw·c are zeros.
#define WINDOWS int h, int w, int c, int kh, int kw, int stride, int pad, int oh, int ow, int ld

// Rows `first`.. of the columns of x, into the rows 0.. of `to`. Elements of one window's line of pixels lie side by side
// in x, too.
extern "C" __global__ void __launch_bounds__(256) dense_columns(View x, View to, i64 first, i64 rows, WINDOWS) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  int eights = ld / 8;
  if (i >= rows * eights) return;
  i64 row = i / eights;
  int k = 8 * (int)(i - row * eights), line = kw * c;
  row += first;
  i64 b = row / (oh * ow);
  int at = (int)(row - b * (oh * ow)), oy = at / ow, ox = at - oy * ow;
  int ky = k / line, r = k - ky * line;
  int iy = oy * stride - pad + ky, left = (ox * stride - pad) * c;
  float v[8];
  i64 source = ((b * h + iy) * w) * (i64)c + left + r;
  bool whole = ky < kh && r + 8 <= line && iy >= 0 && iy < h && left + r >= 0 && left + r + 8 <= w * c;
  if (whole && source % 8 == 0) {
    load8(x, source, v);
  } else {
#pragma unroll
    for (int j = 0; j < 8; j++) {
      int e = left + r;
      bool inside = ky < kh && iy >= 0 && iy < h && e >= 0 && e < w * c;
      v[j] = inside ? load(x, ((b * h + iy) * w) * (i64)c + e) : 0.0f;
      if (++r == line) r = 0, ky++, iy++;
    }
  }
  store8(to, 8 * i, v);
}

// The sum over all windows that hold pixel (iy, ix), of what they hold of channels ch.. of it.
template <int N> __device__ __forceinline__ void windows_sum(const View& columns, i64 row0, int iy, int ix, int ch,
                                                             float (&sum)[N], WINDOWS) {
#pragma unroll
  for (int k = 0; k < N; k++) sum[k] = 0.0f;
  for (int ky = (iy + pad) % stride; ky < kh && ky <= iy + pad; ky += stride) {
    int oy = (iy + pad - ky) / stride;
    if (oy >= oh) continue;
    for (int kx = (ix + pad) % stride; kx < kw && kx <= ix + pad; kx += stride) {
      int ox = (ix + pad - kx) / stride;
      if (ox >= ow) continue;
      i64 at = (row0 + (i64)oy * ow + ox) * ld + (ky * kw + kx) * c + ch;
      if constexpr (N == 8) {
        float v[8];
        load8(columns, at, v);
#pragma unroll
        for (int k = 0; k < 8; k++) sum[k] += v[k];
      } else {
        sum[0] += load(columns, at);
      }
    }
  }
}

// dx (+)= the adjoint of dense_columns, for the images from `image` (a multiple of 8) on; row 0 of `columns` is that image's
// first. Eight elements a thread where 8 divides c, else one.
extern "C" __global__ void __launch_bounds__(256)
    dense_columns_vjp(View columns, View dx, i64 image, i64 images, int accumulate, WINDOWS) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, size = (i64)h * w * c;
  bool eight = c % 8 == 0;
  if (eight) i *= 8;
  if (i >= images * size) return;
  i64 b = i / size, row = b * oh * ow;
  int at = (int)(i - b * size), pixel = at / c, iy = pixel / w, ix = pixel - iy * w, ch = at - pixel * c;
  i += image * size;
  if (eight) {
    float sum[8];
    windows_sum<8>(columns, row, iy, ix, ch, sum, h, w, c, kh, kw, stride, pad, oh, ow, ld);
    give8_partial(dx, i, i + 8, sum, accumulate);
  } else {
    float sum[1];
    windows_sum<1>(columns, row, iy, ix, ch, sum, h, w, c, kh, kw, stride, pad, oh, ow, ld);
    give(dx, i, sum[0], accumulate);
  }
}

// y [n/c, c] = act(x + bias [c] + residual); bias and residual where they are there. y may be x.
extern "C" __global__ void __launch_bounds__(256) dense_epilogue(View x, View bias, View residual, View y, i64 n, int c, int act) {
  i64 i = 8 * ((i64)blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  float v[8], u[8];
  load8_partial(x, i, n, v);
  if (residual.len > 0) {
    load8_partial(residual, i, n, u);
#pragma unroll
    for (int k = 0; k < 8; k++) v[k] += u[k];
  }
  if (bias.len > 0) {
    // 32-bit division is several times as fast.
    int column = n <= 0x7fffffff ? (int)((u32)i % (u32)c) : (int)(i % c);
    if (c % 8 == 0) {
      load8(bias, column, u);
#pragma unroll
      for (int k = 0; k < 8; k++) v[k] += u[k];
    } else {
#pragma unroll
      for (int k = 0; k < 8; k++) {
        v[k] += load(bias, column);
        if (++column == c) column = 0;
      }
    }
  }
#pragma unroll
  for (int k = 0; k < 8; k++) v[k] = act_value(act, v[k]);
  store8_partial(y, i, n, v);
}
