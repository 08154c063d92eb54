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
  static __device__ __forceinline__ Raw get(const View& x, i64 i) {
    CHECK_INDEX(x, i, V);
    return *(const Raw*)((const Element*)x.data + i);
  }
  static __device__ __forceinline__ Raw zero() { return Raw{}; }
  static __device__ __forceinline__ void open(const Raw& r, float (&x)[V]) { r.open(x); }
  static __device__ __forceinline__ void put(const View& y, i64 i, const float (&x)[V]) {
    CHECK_INDEX(y, i, V);
    *(Raw*)((Element*)y.data + i) = Raw::pack(x);
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

// A window of ROWS rows from row `top` and column `left` of image b.
struct Window {
  i64 start, row;  // element of its first pixel (not always there), and from a row to the next
  u32 rows;        // bit r: row r is in the image
  int left, width, c;
};

template <int ROWS>
__device__ __forceinline__ Window window(int b, int h, int w, int top, int left, const Tile& t, const Conv& d) {
  Window v;
  v.start = (((i64)b * h + top) * w + left) * d.c + t.c0;
  v.row = (i64)w * d.c, v.left = left, v.width = w, v.c = d.c, v.rows = 0;
#pragma unroll
  for (int r = 0; r < ROWS; r++) v.rows |= (u32)(top + r >= 0 && top + r < h) << r;
  return v;
}

// Column j of a window; zeros outside the image.
template <class T, int ROWS>
__device__ __forceinline__ void load_column(const View& x, const Window& v, int j, typename T::Raw (&raw)[ROWS]) {
  u32 rows = v.left + j >= 0 && v.left + j < v.width ? v.rows : 0;
  i64 i = v.start + (i64)j * v.c;
#pragma unroll
  for (int r = 0; r < ROWS; r++) raw[r] = rows >> r & 1 ? T::get(x, i + r * v.row) : T::zero();
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
      i64 i = (((i64)b * d.oh + oy + r) * d.ow + ox + o) * d.c + t.c0;
      if (accumulate) {
        float old[T::N];
        T::open(T::get(y, i), old);
#pragma unroll
        for (int k = 0; k < T::N; k++) acc[r][o][k] += old[k];
      }
      T::put(y, i, acc[r][o]);
    }
  }
}
