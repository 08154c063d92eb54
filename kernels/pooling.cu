// Pooling over windows and bilinear resizing of [batch, h, w, c]; definitions as in engine/cpu/src/{pooling,resize}.rs.
// A thread takes eight channels (`wide`; c is a multiple of 8) or one of a pixel; a block walks along rows. Grid: rows of
// the result, tiles of a row. VJPs gather, in the order in which the CPU's scatter adds.
#include "vector.cuh"

// engine/cuda/src/ops/pooling.rs mirrors this; oh and ow are the result's height and width.
struct Window {
  int h, w, c, oh, ow, k, stride, pad;
};

struct Place {
  int b, y, x, channel;
};

template <int V>
__device__ __forceinline__ bool place_of(int h, int w, int c, Place& p) {
  int j = (blockIdx.y * blockDim.x + threadIdx.x) * V;
  if (j >= w * c) return false;
  p.b = blockIdx.x / h, p.y = blockIdx.x - p.b * h, p.x = j / c, p.channel = j - p.x * c;
  return true;
}

// Index of pixel (y, x) of image b, and of the channel there.
__device__ __forceinline__ i64 pixel(const Place& p, int h, int w, int c, int y, int x) {
  return (((i64)p.b * h + y) * w + x) * c + p.channel;
}

// y = mean over windows of k·k (padding counts as zeros), or their maxima with the winners' offsets ky·k + kx. The first
// of equal values wins; a NaN makes the result NaN.
template <int V>
__device__ __forceinline__ void pool(const View& x, const View& y, const View& winners, const Window& d, bool largest) {
  Place p;
  if (!place_of<V>(d.oh, d.ow, d.c, p)) return;
  float best[V], at[V];
#pragma unroll
  for (int k = 0; k < V; k++) best[k] = largest ? -INFINITY : 0.0f, at[k] = -1.0f;
  for (int ky = 0; ky < d.k; ky++) {
    int iy = p.y * d.stride - d.pad + ky;
    if (iy < 0 || iy >= d.h) continue;
    for (int kx = 0; kx < d.k; kx++) {
      int ix = p.x * d.stride - d.pad + kx;
      if (ix < 0 || ix >= d.w) continue;
      float v[V];
      load_some<V>(x, pixel(p, d.h, d.w, d.c, iy, ix), v);
#pragma unroll
      for (int k = 0; k < V; k++) {
        if (!largest) best[k] += v[k];
        else if (v[k] > best[k] || v[k] != v[k] || at[k] < 0.0f) best[k] = v[k], at[k] = (float)(ky * d.k + kx);
      }
    }
  }
  i64 i = pixel(p, d.oh, d.ow, d.c, p.y, p.x);
  if (largest) {
    give_some<V>(winners, i, at, 0);
  } else {
#pragma unroll
    for (int k = 0; k < V; k++) best[k] *= 1.0f / (float)(d.k * d.k);
  }
  give_some<V>(y, i, best, 0);
}

extern "C" __global__ void __launch_bounds__(256) avg_pool(View x, View y, Window d, int wide) {
  if (wide) pool<8>(x, y, y, d, false);
  else pool<1>(x, y, y, d, false);
}

extern "C" __global__ void __launch_bounds__(256) max_pool(View x, View y, View winners, Window d, int wide) {
  if (wide) pool<8>(x, y, winners, d, true);
  else pool<1>(x, y, winners, d, true);
}

// dx (+)= the gradients of the windows over a pixel: all by 1/k², or of those that it won.
template <int V>
__device__ __forceinline__ void pool_vjp(const View& dy, const View& winners, const View& dx, const Window& d,
                                         bool largest, int accumulate) {
  Place p;
  if (!place_of<V>(d.h, d.w, d.c, p)) return;
  // Windows o with o·stride − pad <= i < o·stride − pad + k.
  int y0 = max(0, (p.y + d.pad - d.k + d.stride) / d.stride), y1 = min(d.oh - 1, (p.y + d.pad) / d.stride);
  int x0 = max(0, (p.x + d.pad - d.k + d.stride) / d.stride), x1 = min(d.ow - 1, (p.x + d.pad) / d.stride);
  float sum[V];
#pragma unroll
  for (int k = 0; k < V; k++) sum[k] = 0.0f;
  for (int oy = y0; oy <= y1; oy++) {
    for (int ox = x0; ox <= x1; ox++) {
      i64 i = pixel(p, d.oh, d.ow, d.c, oy, ox);
      float g[V], at[V];
      load_some<V>(dy, i, g);
      if (largest) {
        float offset = (float)((p.y + d.pad - oy * d.stride) * d.k + p.x + d.pad - ox * d.stride);
        load_some<V>(winners, i, at);
#pragma unroll
        for (int k = 0; k < V; k++) sum[k] += at[k] == offset ? g[k] : 0.0f;
      } else {
#pragma unroll
        for (int k = 0; k < V; k++) sum[k] += g[k] * (1.0f / (float)(d.k * d.k));
      }
    }
  }
  give_some<V>(dx, pixel(p, d.h, d.w, d.c, p.y, p.x), sum, accumulate);
}

extern "C" __global__ void __launch_bounds__(256)
    avg_pool_vjp(View dy, View dx, Window d, int wide, int accumulate) {
  if (wide) pool_vjp<8>(dy, dy, dx, d, false, accumulate);
  else pool_vjp<1>(dy, dy, dx, d, false, accumulate);
}

extern "C" __global__ void __launch_bounds__(256)
    max_pool_vjp(View dy, View winners, View dx, Window d, int wide, int accumulate) {
  if (wide) pool_vjp<8>(dy, winners, dx, d, true, accumulate);
  else pool_vjp<1>(dy, winners, dx, d, true, accumulate);
}

// The two source positions of an output position and the weight of the second. Rounded after each step as on the CPU, so
// that both choose the same neighbours.
struct Tap {
  int low, high;
  float share;
};

__device__ __forceinline__ Tap tap_of(int o, int in, int out, float scale, int aligned) {
  float at = aligned ? __fmul_rn(scale, (float)o) : __fadd_rn(__fmul_rn(scale, __fadd_rn((float)o, 0.5f)), -0.5f);
  if (at < 0.0f) at = 0.0f;
  Tap t;
  t.low = min((int)at, in - 1);
  t.high = t.low + 1 < in ? t.low + 1 : t.low;
  t.share = at - (float)t.low;
  return t;
}

// engine/cuda/src/ops/pooling.rs mirrors this; the scales are in/out, or aligned (in − 1)/(out − 1).
struct Resizing {
  int h, w, c, oh, ow, aligned;
  float scale_y, scale_x;
};

template <int V>
__device__ __forceinline__ void resize_rows(const View& x, const View& y, const Resizing& d) {
  Place p;
  if (!place_of<V>(d.oh, d.ow, d.c, p)) return;
  Tap ty = tap_of(p.y, d.h, d.oh, d.scale_y, d.aligned), tx = tap_of(p.x, d.w, d.ow, d.scale_x, d.aligned);
  float a[V], b[V], e[V], f[V];
  load_some<V>(x, pixel(p, d.h, d.w, d.c, ty.low, tx.low), a);
  load_some<V>(x, pixel(p, d.h, d.w, d.c, ty.low, tx.high), b);
  load_some<V>(x, pixel(p, d.h, d.w, d.c, ty.high, tx.low), e);
  load_some<V>(x, pixel(p, d.h, d.w, d.c, ty.high, tx.high), f);
#pragma unroll
  for (int k = 0; k < V; k++) {
    float top = (1.0f - tx.share) * a[k] + tx.share * b[k];
    float bottom = (1.0f - tx.share) * e[k] + tx.share * f[k];
    a[k] = (1.0f - ty.share) * top + ty.share * bottom;
  }
  give_some<V>(y, pixel(p, d.oh, d.ow, d.c, p.y, p.x), a, 0);
}

extern "C" __global__ void __launch_bounds__(256) resize(View x, View y, Resizing d, int wide) {
  if (wide) resize_rows<8>(x, y, d);
  else resize_rows<1>(x, y, d);
}

// Output positions whose taps may touch input i: their sources lie within one of it, with a margin for rounding.
__device__ __forceinline__ void touching(int i, int out, float scale, int aligned, int& first, int& last) {
  first = 0, last = out - 1;
  if (scale <= 0.0f) return;
  float shift = aligned ? 0.0f : 0.5f;
  if (i > 0) first = max(0, (int)(((float)i - 1.0f + shift) / scale - shift) - 1);
  last = min(last, (int)(((float)i + 1.0f + shift) / scale - shift) + 1);
}

__device__ __forceinline__ float weight_at(int i, const Tap& t) {
  return (t.low == i ? 1.0f - t.share : 0.0f) + (t.high == i ? t.share : 0.0f);
}

// dx (+)= the transposed interpolation: each input pixel gathers from the outputs that read it.
template <int V>
__device__ __forceinline__ void resize_gather(const View& dy, const View& dx, const Resizing& d, int accumulate) {
  Place p;
  if (!place_of<V>(d.h, d.w, d.c, p)) return;
  int y0, y1, x0, x1;
  touching(p.y, d.oh, d.scale_y, d.aligned, y0, y1);
  touching(p.x, d.ow, d.scale_x, d.aligned, x0, x1);
  float sum[V];
#pragma unroll
  for (int k = 0; k < V; k++) sum[k] = 0.0f;
  for (int oy = y0; oy <= y1; oy++) {
    Tap ty = tap_of(oy, d.h, d.oh, d.scale_y, d.aligned);
    if (ty.low != p.y && ty.high != p.y) continue;
    for (int ox = x0; ox <= x1; ox++) {
      Tap tx = tap_of(ox, d.w, d.ow, d.scale_x, d.aligned);
      if (tx.low != p.x && tx.high != p.x) continue;
      float weight = weight_at(p.y, ty) * weight_at(p.x, tx), g[V];
      load_some<V>(dy, pixel(p, d.oh, d.ow, d.c, oy, ox), g);
#pragma unroll
      for (int k = 0; k < V; k++) sum[k] += weight * g[k];
    }
  }
  give_some<V>(dx, pixel(p, d.h, d.w, d.c, p.y, p.x), sum, accumulate);
}

extern "C" __global__ void __launch_bounds__(256)
    resize_vjp(View dy, View dx, Resizing d, int wide, int accumulate) {
  if (wide) resize_gather<8>(dy, dx, d, accumulate);
  else resize_gather<1>(dy, dx, d, accumulate);
}
