// What the depthwise convolutions share: sizes, tiles of channels, columns of pixels.
#pragma once
#include "common.cuh"

// `Conv` of engine/cuda/src/ops/depthwise.rs. The image read is [batch, h, w, c/m], the one written [batch, oh, ow, c].
struct Conv {
  int batch, h, w, oh, ow, c, m, kh, kw, stride, pad_h, pad_w;
  int lanes;  // threads along the channels of a tile
};

// Channels of a pixel that a thread owns: V of them, from c0 on. `Raw` is what one load brings. They need c to be a
// multiple of V, one output a channel and one element type; other sizes take plain kernels, an element a thread.
template <int V, class R>
struct VectorOf {
  static constexpr int N = V;
  using Raw = R;
  using Element = typename R::Element;
  static __device__ __forceinline__ Raw get(const View& x, i64 pixel, int c0, const Conv& d) {
    CHECK_INDEX(x, pixel * d.c + c0, V);
    return *(const Raw*)((const Element*)x.data + pixel * d.c + c0);
  }
  static __device__ __forceinline__ Raw zero() { return Raw{}; }
  static __device__ __forceinline__ void open(const Raw& r, float (&x)[V]) { r.open(x); }
  static __device__ __forceinline__ void put(const View& y, i64 pixel, int c0, const Conv& d, const float (&x)[V]) {
    CHECK_INDEX(y, pixel * d.c + c0, V);
    *(Raw*)((Element*)y.data + pixel * d.c + c0) = Raw::pack(x);
  }
};

struct __align__(8) FourBf16 {
  using Element = u16;
  u32 a, b;
  __device__ __forceinline__ void open(float (&x)[4]) const { unpack_bf16(a, x[0], x[1]), unpack_bf16(b, x[2], x[3]); }
  static __device__ __forceinline__ FourBf16 pack(const float (&x)[4]) {
    return FourBf16{pack_bf16(x[0], x[1]), pack_bf16(x[2], x[3])};
  }
};
struct __align__(16) FourF32 {
  using Element = float;
  float v[4];
  __device__ __forceinline__ void open(float (&x)[4]) const { x[0] = v[0], x[1] = v[1], x[2] = v[2], x[3] = v[3]; }
  static __device__ __forceinline__ FourF32 pack(const float (&x)[4]) { return FourF32{{x[0], x[1], x[2], x[3]}}; }
};
struct __align__(4) TwoBf16 {
  using Element = u16;
  u32 a;
  __device__ __forceinline__ void open(float (&x)[2]) const { unpack_bf16(a, x[0], x[1]); }
  static __device__ __forceinline__ TwoBf16 pack(const float (&x)[2]) { return TwoBf16{pack_bf16(x[0], x[1])}; }
};
struct __align__(8) TwoF32 {
  using Element = float;
  float v[2];
  __device__ __forceinline__ void open(float (&x)[2]) const { x[0] = v[0], x[1] = v[1]; }
  static __device__ __forceinline__ TwoF32 pack(const float (&x)[2]) { return TwoF32{{x[0], x[1]}}; }
};

using Bf16x4 = VectorOf<4, FourBf16>;
using F32x4 = VectorOf<4, FourF32>;
using Bf16x2 = VectorOf<2, TwoBf16>;
using F32x2 = VectorOf<2, TwoF32>;

// A block's tile of channels (grid y) and a thread's place in it.
struct Tile {
  int gx, gy, columns;  // lane along channels; along pixels, of so many
  int c0, width, from;  // thread's first channel; channels of a tile; the tile's first
  bool active;
};

template <int V>
__device__ __forceinline__ Tile tile(const Conv& d) {
  Tile t;
  t.gx = threadIdx.x % d.lanes, t.gy = threadIdx.x / d.lanes, t.columns = blockDim.x / d.lanes;
  t.width = d.lanes * V, t.from = blockIdx.y * t.width, t.c0 = t.from + t.gx * V;
  t.active = t.gy < t.columns && t.c0 < d.c;
  return t;
}

// The tile's weights [c][taps] as [taps][width], the taps in reverse with `flip`.
__device__ __forceinline__ void stage_weights(const View& w, float* weights, const Tile& t, const Conv& d, int taps,
                                              int flip) {
  for (int i = threadIdx.x; i < t.width * taps; i += blockDim.x) {
    int c = i / taps, tap = i % taps;
    float v = t.from + c < d.c ? load(w, (i64)t.from * taps + i) : 0.0f;
    weights[(flip ? taps - 1 - tap : tap) * t.width + c] = v;
  }
  __syncthreads();
}

template <int V>
__device__ __forceinline__ void shared_weights(const float* at, float (&w)[V]) {
  if constexpr (V == 4) {
    float4 v = *(const float4*)at;
    w[0] = v.x, w[1] = v.y, w[2] = v.z, w[3] = v.w;
  } else {
#pragma unroll
    for (int k = 0; k < V; k++) w[k] = at[k];
  }
}

// Rows top.. of a column of an image that starts at pixel `image`; zeros outside.
template <class T, int ROWS>
__device__ __forceinline__ void load_column(const View& x, i64 image, int top, int column, const Tile& t,
                                            const Conv& d, typename T::Raw (&raw)[ROWS]) {
  bool inside = column >= 0 && column < d.w;
#pragma unroll
  for (int r = 0; r < ROWS; r++) {
    bool there = inside && top + r >= 0 && top + r < d.h;
    raw[r] = there ? T::get(x, image + (i64)((top + r) * d.w + column), t.c0, d) : T::zero();
  }
}

// A block of TH x TW pixels from (oy, ox) of image b.
template <class T, int TH, int TW>
__device__ __forceinline__ void store_block(const View& y, int b, int oy, int ox, const Tile& t, const Conv& d,
                                            int accumulate, float (&acc)[TH][TW][T::N]) {
#pragma unroll
  for (int r = 0; r < TH; r++) {
#pragma unroll
    for (int o = 0; o < TW; o++) {
      if (oy + r >= d.oh || ox + o >= d.ow) continue;
      i64 pixel = ((i64)b * d.oh + oy + r) * d.ow + ox + o;
      if (accumulate) {
        float old[T::N];
        T::open(T::get(y, pixel, t.c0, d), old);
#pragma unroll
        for (int k = 0; k < T::N; k++) acc[r][o][k] += old[k];
      }
      T::put(y, pixel, t.c0, d, acc[r][o]);
    }
  }
}
