// Layer norm (Ba, Kiros and Hinton 2016): mean and biased variance of each row.
//
//   forward   y = γ·x̂ + β, x̂ = (x − mean)·rstd, rstd = 1/√(var + eps)
//   backward  g = γ·dy, dx = rstd·(g − Σg/C − x̂·Σ(g·x̂)/C), dγ = Σ_rows dy·x̂, dβ = Σ_rows dy
//
// Rows of at most 1,024 channels, a multiple of eight, stay in registers: `lanes` threads (a power of two, at most 32) own
// a row, lane i its channels 8·i + 8·lanes·n for n below SLOTS. Others take a block a row and read it again.
#include "channels.cuh"
#include "mma.cuh"

#define SLOTS 4

// Over `lanes` neighbouring lanes, in a fixed order; all 32 lanes of the warp call it.
__device__ __forceinline__ float lanes_sum(float x, int lanes) {
  for (int o = lanes / 2; o > 0; o /= 2) x += __shfl_xor_sync(0xffffffffu, x, o);
  return x;
}

template <class T>
__device__ __forceinline__ void forward_body(const View& x, const View& gamma, const View& beta, const View& y,
                                             const View& means, const View& rstd, i64 rows, int c, int lanes,
                                             float eps) {
  constexpr int U = T::ROWS >= 4 ? 2 : 1;
  int lane = threadIdx.x % lanes, owners = blockDim.x / lanes;
  i64 first = ((i64)blockIdx.x * owners + threadIdx.x / lanes) * U;
  typename T::Raw raw[U][SLOTS];
#pragma unroll
  for (int u = 0; u < U; u++) {
#pragma unroll
    for (int n = 0; n < SLOTS; n++) {
      int at = 8 * (lane + n * lanes);
      raw[u][n] = first + u < rows && at < c ? T::get(x, (first + u) * c + at) : T::zero();
    }
  }
  float mean[U], scale[U];
#pragma unroll
  for (int u = 0; u < U; u++) {
    float sum = 0.0f, square = 0.0f, v[8];
#pragma unroll
    for (int n = 0; n < SLOTS; n++) {
      T::open(raw[u][n], v);
#pragma unroll
      for (int k = 0; k < 8; k++) sum += v[k];
    }
    mean[u] = lanes_sum(sum, lanes) / (float)c;
#pragma unroll
    for (int n = 0; n < SLOTS; n++) {
      if (8 * (lane + n * lanes) >= c) continue;
      T::open(raw[u][n], v);
#pragma unroll
      for (int k = 0; k < 8; k++) square += (v[k] - mean[u]) * (v[k] - mean[u]);
    }
    scale[u] = 1.0f / sqrtf(lanes_sum(square, lanes) / (float)c + eps);
    if (lane == 0 && first + u < rows) {
      store(means, first + u, mean[u]);
      store(rstd, first + u, scale[u]);
    }
  }
#pragma unroll
  for (int n = 0; n < SLOTS; n++) {
    int at = 8 * (lane + n * lanes);
    if (at >= c) continue;
    float weight[8], offset[8];
    load8(gamma, at, weight);
    load8(beta, at, offset);
#pragma unroll
    for (int u = 0; u < U; u++) {
      float v[8];
      T::open(raw[u][n], v);
#pragma unroll
      for (int k = 0; k < 8; k++) v[k] = (v[k] - mean[u]) * scale[u] * weight[k] + offset[k];
      if (first + u < rows) T::put(y, (first + u) * c + at, v);
    }
  }
}

#define LAYER_KINDS(kind, body, ...)          \
  switch (kind) {                             \
    case 0: body<Bf16x8>(__VA_ARGS__); break; \
    case 1: body<F32x8>(__VA_ARGS__); break;  \
    default: body<Any8>(__VA_ARGS__); break;  \
  }

extern "C" __global__ void __launch_bounds__(256, 3)
    layer_norm(View x, View gamma, View beta, View y, View mean, View rstd, i64 rows, int c, int lanes, float eps,
               int kind) {
  LAYER_KINDS(kind, forward_body, x, gamma, beta, y, mean, rstd, rows, c, lanes, eps)
}

// dx, and Σ dy and Σ dy·x̂ of the block's rows, [blocks, 2, C].
template <class T>
__device__ __forceinline__ void backward_body(const View& x, const View& gamma, const View& dy, const View& dx,
                                              const View& means, const View& rstds, const View& partials, i64 rows,
                                              int c, int lanes, int accumulate, float* room) {
  int lane = threadIdx.x % lanes, owner = threadIdx.x / lanes, owners = blockDim.x / lanes;
  float sum_g[SLOTS][8] = {}, sum_gx[SLOTS][8] = {};
  i64 step = (i64)gridDim.x * owners;
  // Every thread of a warp takes part in each round's sums, with zeros where its row isn't there.
  for (i64 base = (i64)blockIdx.x * owners; base < rows; base += step) {
    i64 row = base + owner;
    bool there = row < rows;
    typename T::Raw raw_x[SLOTS], raw_g[SLOTS];
#pragma unroll
    for (int n = 0; n < SLOTS; n++) {
      int at = 8 * (lane + n * lanes);
      raw_x[n] = there && at < c ? T::get(x, row * c + at) : T::zero();
      raw_g[n] = there && at < c ? T::get(dy, row * c + at) : T::zero();
    }
    float mean = there ? load(means, row) : 0.0f, rstd = there ? load(rstds, row) : 0.0f;
    float all_g = 0.0f, all_gx = 0.0f;
#pragma unroll
    for (int n = 0; n < SLOTS; n++) {
      int at = 8 * (lane + n * lanes);
      if (at >= c) continue;
      float v[8], g[8], weight[8];
      T::open(raw_x[n], v), T::open(raw_g[n], g);
      load8(gamma, at, weight);
#pragma unroll
      for (int k = 0; k < 8; k++) {
        float normal = (v[k] - mean) * rstd, weighed = g[k] * weight[k];
        sum_g[n][k] += g[k];
        sum_gx[n][k] += g[k] * normal;
        all_g += weighed;
        all_gx += weighed * normal;
      }
    }
    all_g = lanes_sum(all_g, lanes) / (float)c;
    all_gx = lanes_sum(all_gx, lanes) / (float)c;
    if (!dx.len || !there) continue;
#pragma unroll
    for (int n = 0; n < SLOTS; n++) {
      int at = 8 * (lane + n * lanes);
      if (at >= c) continue;
      float v[8], g[8], weight[8], d[8] = {};
      T::open(raw_x[n], v), T::open(raw_g[n], g);
      load8(gamma, at, weight);
      if (accumulate) T::open(T::get(dx, row * c + at), d);
#pragma unroll
      for (int k = 0; k < 8; k++) d[k] += rstd * (g[k] * weight[k] - all_g - (v[k] - mean) * rstd * all_gx);
      T::put(dx, row * c + at, d);
    }
  }
  if (!partials.len) return;
#pragma unroll
  for (int n = 0; n < SLOTS; n++) {
    int at = 8 * (lane + n * lanes);
    if (at >= c) continue;
#pragma unroll
    for (int k = 0; k < 8; k++) {
      room[owner * 2 * c + at + k] = sum_g[n][k];
      room[owner * 2 * c + c + at + k] = sum_gx[n][k];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * c; i += blockDim.x) {
    float sum = 0.0f;
    for (int o = 0; o < owners; o++) sum += room[o * 2 * c + i];
    store(partials, (i64)blockIdx.x * 2 * c + i, sum);
  }
}

// The same where all is bf16: each thread's next rows come by asynchronous copies to places of its own. It has at
// most N of SLOTS groups.
template <int N>
__device__ __forceinline__ void backward_ahead(const View& x, const View& gamma, const View& dy, const View& dx,
                                               const View& means, const View& rstds, const View& partials, i64 rows,
                                               int c, int lanes, int accumulate, float* room) {
  constexpr int AHEAD = 3, THREADS = 128;
  const int lane = threadIdx.x % lanes, owner = threadIdx.x / lanes, owners = THREADS / lanes;
  const i64 step = (i64)gridDim.x * owners;
  uint4* rows_ahead = (uint4*)room + threadIdx.x;
  float sum_g[N][8] = {}, sum_gx[N][8] = {}, held[N][8] = {};
  // Four groups leave no registers for γ.
  auto weights = [&](int n, float (&w)[8]) {
    int at = 8 * (lane + n * lanes);
    if (at < c) load8(gamma, at, w);
  };
#pragma unroll
  for (int n = 0; n < N; n++) {
    if (N < 4) weights(n, held[n]);
  }
  auto copy = [&](i64 base, int stage) {
    i64 row = base + owner;
#pragma unroll
    for (int n = 0; n < N; n++) {
      int at = 8 * (lane + n * lanes);
      bool there = row < rows && at < c;
      i64 i = there ? row * c + at : 0;
      if (there) {
        CHECK_INDEX(x, i, 8);
        CHECK_INDEX(dy, i, 8);
      }
      uint4* to = rows_ahead + (stage * 2 * N + n) * THREADS;
      cp_async_16(to, (const u16*)x.data + i, there);
      cp_async_16(to + N * THREADS, (const u16*)dy.data + i, there);
    }
    cp_async_commit();
  };
  i64 base = (i64)blockIdx.x * owners;
  float mean = 0.0f, rstd = 0.0f;
  if (base + owner < rows) mean = load(means, base + owner), rstd = load(rstds, base + owner);
#pragma unroll
  for (int i = 0; i < AHEAD; i++) copy(base + i * step, i);
  // Every thread of a warp takes part in each round's sums, with zeros where its row isn't there.
  for (int stage = 0; base < rows; base += step, stage = stage + 1 == AHEAD ? 0 : stage + 1) {
    const i64 row = base + owner, next = row + step;
    const bool there = row < rows;
    float next_mean = 0.0f, next_rstd = 0.0f;
    if (next < rows) next_mean = load(means, next), next_rstd = load(rstds, next);
    cp_async_wait<AHEAD - 1>();
    uint4 raw_x[N], raw_g[N];
#pragma unroll
    for (int n = 0; n < N; n++) {
      raw_x[n] = rows_ahead[(stage * 2 * N + n) * THREADS];
      raw_g[n] = rows_ahead[(stage * 2 * N + N + n) * THREADS];
    }
    copy(base + AHEAD * step, stage);
    float all_g = 0.0f, all_gx = 0.0f;
#pragma unroll
    for (int n = 0; n < N; n++) {
      float v[8], g[8];
      if (N == 4) weights(n, held[n]);
      Bf16x8::open(Bf16x8::Raw{raw_x[n]}, v), Bf16x8::open(Bf16x8::Raw{raw_g[n]}, g);
#pragma unroll
      for (int k = 0; k < 8; k++) {
        float normal = (v[k] - mean) * rstd, weighed = g[k] * held[n][k];
        sum_g[n][k] += g[k];
        sum_gx[n][k] += g[k] * normal;
        all_g += weighed;
        all_gx += weighed * normal;
      }
    }
    all_g = lanes_sum(all_g, lanes) / (float)c;
    all_gx = lanes_sum(all_gx, lanes) / (float)c;
    if (dx.len && there) {
#pragma unroll
      for (int n = 0; n < N; n++) {
        int at = 8 * (lane + n * lanes);
        if (at >= c) continue;
        float v[8], g[8], d[8] = {};
        if (N == 4) weights(n, held[n]);
        Bf16x8::open(Bf16x8::Raw{raw_x[n]}, v), Bf16x8::open(Bf16x8::Raw{raw_g[n]}, g);
        if (accumulate) Bf16x8::open(Bf16x8::get(dx, row * c + at), d);
#pragma unroll
        for (int k = 0; k < 8; k++) d[k] += rstd * (g[k] * held[n][k] - all_g - (v[k] - mean) * rstd * all_gx);
        Bf16x8::put(dx, row * c + at, d);
      }
    }
    mean = next_mean, rstd = next_rstd;
  }
  if (!partials.len) return;
  cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int n = 0; n < N; n++) {
    int at = 8 * (lane + n * lanes);
    if (at >= c) continue;
#pragma unroll
    for (int k = 0; k < 8; k++) {
      room[owner * 2 * c + at + k] = sum_g[n][k];
      room[owner * 2 * c + c + at + k] = sum_gx[n][k];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 2 * c; i += THREADS) {
    float sum = 0.0f;
    for (int o = 0; o < owners; o++) sum += room[o * 2 * c + i];
    store(partials, (i64)blockIdx.x * 2 * c + i, sum);
  }
}

// bf16 throughout, with two, three or SLOTS groups a thread. The sums of the block's threads need owners·2·C floats; C is
// at most 8·SLOTS·lanes.
extern "C" __global__ void __launch_bounds__(128, 4)
    layer_norm_vjp_2(View x, View gamma, View dy, View dx, View mean, View rstd, View partials, i64 rows, int c,
                     int lanes, int accumulate) {
  __shared__ __align__(16) float room[128 * 2 * 8 * 3];
  backward_ahead<2>(x, gamma, dy, dx, mean, rstd, partials, rows, c, lanes, accumulate, room);
}

extern "C" __global__ void __launch_bounds__(128, 3)
    layer_norm_vjp_3(View x, View gamma, View dy, View dx, View mean, View rstd, View partials, i64 rows, int c,
                     int lanes, int accumulate) {
  __shared__ __align__(16) float room[128 * 2 * 4 * 3 * 3];
  backward_ahead<3>(x, gamma, dy, dx, mean, rstd, partials, rows, c, lanes, accumulate, room);
}

extern "C" __global__ void __launch_bounds__(128, 2)
    layer_norm_vjp(View x, View gamma, View dy, View dx, View mean, View rstd, View partials, i64 rows, int c,
                   int lanes, int accumulate) {
  __shared__ __align__(16) float room[128 * 2 * 4 * 4 * 3];
  backward_ahead<4>(x, gamma, dy, dx, mean, rstd, partials, rows, c, lanes, accumulate, room);
}

// Any element types: twice the registers.
extern "C" __global__ void __launch_bounds__(128, 2)
    layer_norm_vjp_any(View x, View gamma, View dy, View dx, View mean, View rstd, View partials, i64 rows, int c,
                       int lanes, int accumulate) {
  __shared__ __align__(16) float room[128 * 2 * 8 * SLOTS];
  backward_body<Any8>(x, gamma, dy, dx, mean, rstd, partials, rows, c, lanes, accumulate, room);
}

extern "C" __global__ void __launch_bounds__(256)
    layer_norm_wide(View x, View gamma, View beta, View y, View means, View rstd, int c, float eps) {
  __shared__ float room[32];
  i64 base = (i64)blockIdx.x * c;
  float sum = 0.0f, square = 0.0f;
  for (int i = threadIdx.x; i < c; i += blockDim.x) sum += load(x, base + i);
  float mean = block_sum(sum, room) / (float)c;
  for (int i = threadIdx.x; i < c; i += blockDim.x) {
    float d = load(x, base + i) - mean;
    square += d * d;
  }
  float scale = 1.0f / sqrtf(block_sum(square, room) / (float)c + eps);
  for (int i = threadIdx.x; i < c; i += blockDim.x)
    store(y, base + i, (load(x, base + i) - mean) * scale * load(gamma, i) + load(beta, i));
  if (threadIdx.x == 0) {
    store(means, blockIdx.x, mean);
    store(rstd, blockIdx.x, scale);
  }
}

extern "C" __global__ void __launch_bounds__(256)
    layer_norm_wide_vjp(View x, View gamma, View dy, View dx, View means, View rstds, int c, int accumulate) {
  __shared__ float room[32];
  i64 base = (i64)blockIdx.x * c;
  float mean = load(means, blockIdx.x), rstd = load(rstds, blockIdx.x), sum_g = 0.0f, sum_gx = 0.0f;
  for (int i = threadIdx.x; i < c; i += blockDim.x) {
    float g = load(dy, base + i) * load(gamma, i);
    sum_g += g;
    sum_gx += g * (load(x, base + i) - mean) * rstd;
  }
  sum_g = block_sum(sum_g, room) / (float)c;
  sum_gx = block_sum(sum_gx, room) / (float)c;
  for (int i = threadIdx.x; i < c; i += blockDim.x) {
    float g = load(dy, base + i) * load(gamma, i), normal = (load(x, base + i) - mean) * rstd;
    give(dx, base + i, rstd * (g - sum_g - normal * sum_gx), accumulate);
  }
}

// Σ dy and Σ dy·x̂ of `per_block` rows, [blocks, 2, C]; a thread a channel.
extern "C" __global__ void __launch_bounds__(256)
    layer_norm_wide_sums(View x, View dy, View means, View rstds, View partials, i64 rows, i64 per_block, int c) {
  int i = blockIdx.y * blockDim.x + threadIdx.x;
  if (i >= c) return;
  i64 first = blockIdx.x * per_block, end = first + per_block < rows ? first + per_block : rows;
  float sum_g = 0.0f, sum_gx = 0.0f;
#pragma unroll 4
  for (i64 row = first; row < end; row++) {
    float g = load(dy, row * c + i);
    sum_g += g;
    sum_gx += g * (load(x, row * c + i) - load(means, row)) * load(rstds, row);
  }
  store(partials, (i64)blockIdx.x * 2 * c + i, sum_g);
  store(partials, ((i64)blockIdx.x * 2 + 1) * c + i, sum_gx);
}
