// Element-wise ops and products with factors per channel or sample; definitions as in engine/cpu/src/elementwise.rs.
#include "activation.cuh"
#include "columns.cuh"
#include "vector.cuh"

// y = a + b
extern "C" __global__ void __launch_bounds__(256) add(View a, View b, View y, i64 n) {
  const View in[2] = {a, b};
  map8(in, y, n, 0, [&](i64, float(&x)[2][8], float(&o)[8]) {
#pragma unroll
    for (int k = 0; k < 8; k++) o[k] = x[0][k] + x[1][k];
  });
}

// y (+)= a · b
extern "C" __global__ void __launch_bounds__(256) mul(View a, View b, View y, i64 n, int accumulate) {
  const View in[2] = {a, b};
  map8(in, y, n, accumulate, [&](i64, float(&x)[2][8], float(&o)[8]) {
#pragma unroll
    for (int k = 0; k < 8; k++) o[k] = x[0][k] * x[1][k];
  });
}

// da (+)= b·dy and db (+)= a·dy in one pass; a and b may be one tensor, da and db one gradient.
extern "C" __global__ void __launch_bounds__(256)
    mul_vjp(View a, View b, View dy, View da, View db, i64 n, int add_a, int add_b) {
  const View in[3] = {a, b, dy};
  map8(in, da, n, add_a, [&](i64 i, float(&x)[3][8], float(&o)[8]) {
    float other[8];
#pragma unroll
    for (int k = 0; k < 8; k++) other[k] = x[0][k] * x[2][k], o[k] = x[1][k] * x[2][k];
    give8_partial(db, i, n, other, add_b);
  });
}

// y (+)= factor · x
extern "C" __global__ void __launch_bounds__(256) scale(View x, View y, i64 n, float factor, int accumulate) {
  const View in[1] = {x};
  map8(in, y, n, accumulate, [&](i64, float(&x)[1][8], float(&o)[8]) {
#pragma unroll
    for (int k = 0; k < 8; k++) o[k] = factor * x[0][k];
  });
}

// y = e^x, of a handful of elements
extern "C" __global__ void __launch_bounds__(256) exponential(View x, View y, i64 n) {
  const View in[1] = {x};
  map8(in, y, n, 0, [&](i64, float(&x)[1][8], float(&o)[8]) {
#pragma unroll
    for (int k = 0; k < 8; k++) o[k] = expf(x[0][k]);
  });
}

// y = act(x)
extern "C" __global__ void __launch_bounds__(256) activation(View x, View y, i64 n, int act) {
  const View in[1] = {x};
  map8(in, y, n, 0, [&](i64, float(&x)[1][8], float(&o)[8]) {
#pragma unroll
    for (int k = 0; k < 8; k++) o[k] = act_value(act, x[0][k]);
  });
}

// dx (+)= dy · act'(x)
extern "C" __global__ void __launch_bounds__(256)
    activation_vjp(View x, View dy, View dx, i64 n, int act, int accumulate) {
  const View in[2] = {x, dy};
  map8(in, dx, n, accumulate, [&](i64, float(&x)[2][8], float(&o)[8]) {
#pragma unroll
    for (int k = 0; k < 8; k++) o[k] = x[1][k] * act_slope(act, x[0][k]);
  });
}

// The factors of places i..i+8 of a tensor [batch, rows, c] whose batch entries have c factors each.
__device__ __forceinline__ void channel_factors(const View& s, i64 i, i64 n, i64 rows, i64 c, float (&f)[8]) {
  if (c % 8 == 0) {
    i64 group = i / 8, wide = c / 8;
    i64 b = quotient(group, rows * wide);
    load8(s, b * c + 8 * remainder_of(group, wide), f);
    return;
  }
  i64 row = quotient(i, c), column = i - row * c, b = quotient(row, rows), left = rows - (row - b * rows);
#pragma unroll
  for (int k = 0; k < 8; k++) {
    f[k] = i + k < n ? load(s, b * c + column) : 0.0f;
    if (++column == c) {
      column = 0;
      if (--left == 0) left = rows, b++;
    }
  }
}

// y = x + b for each row of x [n / c, c], b [c]
extern "C" __global__ void __launch_bounds__(256) add_broadcast(View x, View b, View y, i64 n, i64 c) {
  const View in[1] = {x};
  map8(in, y, n, 0, [&](i64 i, float(&x)[1][8], float(&o)[8]) {
    float f[8];
    channel_factors(b, i, n, n, c, f);
#pragma unroll
    for (int k = 0; k < 8; k++) o[k] = x[0][k] + f[k];
  });
}

// y (+)= x · s; x [batch, rows, c], s [batch, c]
extern "C" __global__ void __launch_bounds__(256)
    scale_channels(View x, View s, View y, i64 n, i64 rows, i64 c, int accumulate) {
  const View in[1] = {x};
  map8(in, y, n, accumulate, [&](i64 i, float(&x)[1][8], float(&o)[8]) {
    float f[8];
    channel_factors(s, i, n, rows, c, f);
#pragma unroll
    for (int k = 0; k < 8; k++) o[k] = x[0][k] * f[k];
  });
}

// dx (+)= factor · dy; dx [batch, rows, c], dy [batch, c]
extern "C" __global__ void __launch_bounds__(256)
    spread_channels(View dy, View dx, i64 n, i64 rows, i64 c, float factor, int accumulate) {
  i64 i = 8 * ((i64)blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  float f[8];
  channel_factors(dy, i, n, rows, c, f);
#pragma unroll
  for (int k = 0; k < 8; k++) f[k] *= factor;
  give8_partial(dx, i, n, f, accumulate);
}

// y (+)= x · m; x [batch, len], m [batch]
extern "C" __global__ void __launch_bounds__(256)
    scale_samples(View x, View m, View y, i64 n, i64 len, int accumulate) {
  const View in[1] = {x};
  map8(in, y, n, accumulate, [&](i64 i, float(&x)[1][8], float(&o)[8]) {
    i64 b = quotient(i, len), left = len - (i - b * len);
    float f = load(m, b);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      if (left == 0 && i + k < n) f = load(m, ++b), left = len;
      o[k] = x[0][k] * f;
      left--;
    }
  });
}

template <int V>
__device__ __forceinline__ void scale_channels_rows(const View& x, const View& dy, const View& s, const View& dx,
                                                    const Columns& d, int accumulate, float* room) {
  const View in[2] = {x, dy};
  float f[V];
  i64 column = d.column<V>();
#pragma unroll
  for (int k = 0; k < V; k++) f[k] = 0.0f;
  if (column < d.c) load_some<V>(s, blockIdx.z * d.c + column, f);
  sum_columns<V, 2>(in, d, room, [&](i64 i, float(&x)[2][V], float(&term)[V]) {
    float g[V];
#pragma unroll
    for (int k = 0; k < V; k++) g[k] = x[1][k] * f[k], term[k] = x[1][k] * x[0][k];
    give_some<V>(dx, i, g, accumulate);
  });
}

// dx (+)= dy·s and the partial sums of ds = Σ_rows dy·x; see columns.cuh
extern "C" __global__ void __launch_bounds__(256, 2)
    scale_channels_vjp(View x, View dy, View s, View dx, Columns d, int accumulate) {
  __shared__ float room[256 * 8];
  if (d.wide) scale_channels_rows<8>(x, dy, s, dx, d, accumulate, room);
  else scale_channels_rows<1>(x, dy, s, dx, d, accumulate, room);
}

// to (+)= from, of views that may start anywhere
extern "C" __global__ void __launch_bounds__(256) copy_unaligned(View from, View to, i64 n, int accumulate) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (i < n) give(to, i, load(from, i), accumulate);
}
