// Batch norm with a fused activation, and group norm of one group.
//
//   forward   z = (x − mean)·rstd·γ + β, y = act(z), rstd = 1/√(var + eps), var biased
//   backward  g = dy·act'(z), x̂ = (x − mean)·rstd
//             dγ = Σ g·x̂, dβ = Σ g, dx = γ·rstd·(g − Σg/R − x̂·Σ(g·x̂)/R)
// after Ioffe and Szegedy 2015; mean and rstd of a channel over the R rows of the batch. Group norm (Wu and He 2018) has
// them of an image, over its rows and channels, and sums γ·g in place of g.
//
// x, y, dy, dx are [images, rows, C]; batch norm has one image. A block of 256 threads takes `per_block` rows (grid x) of
// `tx` groups of channels (grid y) of an image (grid z): thread t owns group t % tx of rows t / tx, + ty, + 2·ty, …
// Sums leave a block as one partial per channel; a small kernel merges them in f64, in order. The passes that write run
// through their rows backward, so that they meet in L2 what the pass before read last.
#include "channels.cuh"

struct Layout {
  i64 rows, per_block;
  int c, tx, ty, kind;
};

// Where a thread works.
struct Place {
  int gx, gy;
  i64 c0, first, end, base;  // first channel; rows of the block; element 0 of the image
  bool active;
};

template <int N>
__device__ __forceinline__ Place place(const Layout& l) {
  Place p;
  p.gx = threadIdx.x % l.tx, p.gy = threadIdx.x / l.tx;
  p.c0 = (i64)(blockIdx.y * l.tx + p.gx) * N;
  p.first = blockIdx.x * l.per_block;
  p.end = p.first + l.per_block < l.rows ? p.first + l.per_block : l.rows;
  p.base = blockIdx.z * l.rows * l.c;
  p.active = p.gy < l.ty && p.c0 < l.c;
  return p;
}

// Rows of the block that the thread owns.
__device__ __forceinline__ int own_rows(const Place& p, const Layout& l) {
  return p.active ? (int)((p.end - p.first - p.gy + l.ty - 1) / l.ty) : 0;
}

// Sums a and b over the block's threads of the same channels, into those of gy 0. `room` holds 2·256·N floats.
template <int N>
__device__ __forceinline__ void sum_over_rows(float (&a)[N], float (&b)[N], const Place& p, const Layout& l,
                                              float* room) {
  float* mine = room + threadIdx.x * 2 * N;
  for (int n = l.ty; n > 1;) {
    int half = (n + 1) / 2;
    if (p.gy >= half && p.gy < n) {
#pragma unroll
      for (int k = 0; k < N; k++) mine[k] = a[k], mine[N + k] = b[k];
    }
    __syncthreads();
    if (p.gy + half < n) {
      const float* other = mine + half * l.tx * 2 * N;
#pragma unroll
      for (int k = 0; k < N; k++) a[k] += other[k], b[k] += other[N + k];
    }
    __syncthreads();
    n = half;
  }
}

// 1/√(var + eps) of a channel, from the variance or as it was saved.
template <int N>
__device__ __forceinline__ void rstds(const View& v, i64 i, bool shared, int from_variance, float eps, float (&r)[N]) {
  constants(v, i, shared, r);
  if (from_variance) {
#pragma unroll
    for (int k = 0; k < N; k++) r[k] = 1.0f / sqrtf(r[k] + eps);
  }
}

// Mean and squared deviations of a block's rows, [blocks, 2, C]. The sums are about the block's first row, so that a
// mean far from zero costs no digits.
template <class T>
__device__ __forceinline__ void moments_body(const View& x, const View& partials, const Layout& l, float* room) {
  constexpr int N = T::N, U = T::ROWS;
  Place p = place<N>(l);
  float pivot[N] = {}, sum[N] = {}, square[N] = {};
  int count = own_rows(p, l);
  if (p.active) T::open(T::get(x, p.base + p.first * l.c + p.c0), pivot);
  for (int i = 0; i < count; i += U) {
    typename T::Raw raw[U];
#pragma unroll
    for (int u = 0; u < U; u++) {
      // Rows past the end read the pivot again, which adds zeros.
      i64 row = i + u < count ? p.first + p.gy + (i64)(i + u) * l.ty : p.first;
      raw[u] = T::get(x, p.base + row * l.c + p.c0);
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      float v[N];
      T::open(raw[u], v);
#pragma unroll
      for (int k = 0; k < N; k++) {
        float d = v[k] - pivot[k];
        sum[k] += d;
        square[k] += d * d;
      }
    }
  }
  sum_over_rows(sum, square, p, l, room);
  if (!p.active || p.gy != 0) return;
  float n = (float)(p.end - p.first);
#pragma unroll
  for (int k = 0; k < N; k++) {
    float offset = sum[k] / n;
    store(partials, (i64)blockIdx.x * 2 * l.c + p.c0 + k, pivot[k] + offset);
    store(partials, ((i64)blockIdx.x * 2 + 1) * l.c + p.c0 + k, square[k] - offset * sum[k]);
  }
}

extern "C" __global__ void __launch_bounds__(256, 4) norm_moments(View x, View partials, Layout l) {
  __shared__ __align__(16) float room[2 * 256 * 8];
  BY_KIND(l.kind, moments_body, x, partials, l, room)
}

// Sums a and b over the 32 threads of the same column (t % 8) of a block of 256, into those below 8.
__device__ __forceinline__ void sum_columns(double& a, double& b, double* room) {
  int t = threadIdx.x;
  for (int half = 128; half >= 8; half /= 2) {
    if (t >= half && t < 2 * half) room[t] = a, room[256 + t] = b;
    __syncthreads();
    if (t < half) a += room[t + half], b += room[256 + t + half];
    __syncthreads();
  }
}

// Merges the partials of `blocks` blocks (Chan, Golub and LeVeque 1983), eight channels a block.
extern "C" __global__ void __launch_bounds__(256)
    norm_merge_moments(View partials, View mean, View rstd, Layout l, int blocks, float eps) {
  __shared__ double room[512];
  i64 c = (i64)blockIdx.x * 8 + threadIdx.x % 8;
  bool active = c < l.c;
  double s1 = 0.0, s2 = 0.0, pivot = active ? (double)load(partials, c) : 0.0;
  if (active) {
#pragma unroll 4
    for (i64 b = threadIdx.x / 8; b < blocks; b += 32) {
      i64 left = l.rows - b * l.per_block;
      double n = (double)(left < l.per_block ? left : l.per_block);
      double d = (double)load(partials, b * 2 * l.c + c) - pivot;
      s1 += n * d;
      s2 += (double)load(partials, (b * 2 + 1) * l.c + c) + n * d * d;
    }
  }
  sum_columns(s1, s2, room);
  if (!active || threadIdx.x >= 8) return;
  double n = (double)l.rows, m2 = s2 - s1 * s1 / n;
  // A rounding error may leave a constant channel slightly negative; NaN has to stay NaN.
  double variance = m2 < 0.0 ? 0.0 : m2 / n;
  store(mean, c, (float)(pivot + s1 / n));
  store(rstd, c, (float)(1.0 / sqrt(variance + (double)eps)));
}

struct Constants {
  View mean, second, gamma, beta;  // `second` is rstd, or the variance
  float eps;
  int from_variance, per_image, act;
};

template <class T>
__device__ __forceinline__ void apply_body(const View& x, const View& y, const Constants& k, const Layout& l) {
  constexpr int N = T::N, U = T::ROWS;
  Place p = place<N>(l);
  if (!p.active) return;
  i64 at = k.per_image ? blockIdx.z : p.c0;
  float mean[N], scale[N], beta[N], gamma[N];
  constants(k.mean, at, k.per_image, mean);
  rstds(k.second, at, k.per_image, k.from_variance, k.eps, scale);
  constants(k.gamma, p.c0, false, gamma);
  constants(k.beta, p.c0, false, beta);
#pragma unroll
  for (int i = 0; i < N; i++) scale[i] *= gamma[i];
  i64 origin = p.base + (p.first + p.gy) * l.c + p.c0;
  for (int i = own_rows(p, l) - 1; i >= 0; i -= U) {
    typename T::Raw raw[U];
    float z[U * N];
#pragma unroll
    for (int u = 0; u < U; u++) raw[u] = i >= u ? T::get(x, origin + (i64)(i - u) * l.ty * l.c) : T::zero();
#pragma unroll
    for (int u = 0; u < U; u++) {
      float v[N];
      T::open(raw[u], v);
#pragma unroll
      for (int j = 0; j < N; j++) z[u * N + j] = (v[j] - mean[j]) * scale[j] + beta[j];
    }
    act_each(k.act, z);
#pragma unroll
    for (int u = 0; u < U; u++) {
      float v[N];
#pragma unroll
      for (int j = 0; j < N; j++) v[j] = z[u * N + j];
      if (i >= u) T::put(y, origin + (i64)(i - u) * l.ty * l.c, v);
    }
  }
}

extern "C" __global__ void __launch_bounds__(256, 3) norm_apply(View x, View y, Constants k, Layout l) {
  BY_KIND(l.kind, apply_body, x, y, k, l)
}

// Σ g and Σ g·x̂ of a block's rows, [images, blocks, 2, C].
template <class T>
__device__ __forceinline__ void sums_body(const View& x, const View& dy, const View& partials, const Constants& k,
                                          const Layout& l, float* room) {
  constexpr int N = T::N, U = T::ROWS;
  Place p = place<N>(l);
  i64 at = k.per_image ? blockIdx.z : p.c0;
  float sum_g[N] = {}, sum_gx[N] = {};
  if (p.active) {
    float mean[N], scale[N], gamma[N], beta[N] = {};
    constants(k.mean, at, k.per_image, mean);
    rstds(k.second, at, k.per_image, k.from_variance, k.eps, scale);
    constants(k.gamma, p.c0, false, gamma);
#pragma unroll
    for (int j = 0; j < N; j++) scale[j] *= gamma[j];
    if (k.act != IDENTITY) constants(k.beta, p.c0, false, beta);
    i64 origin = p.base + (p.first + p.gy) * l.c + p.c0;
    int count = own_rows(p, l);
    for (int i = 0; i < count; i += U) {
      typename T::Raw raw_x[U], raw_g[U];
#pragma unroll
      for (int u = 0; u < U; u++) {
        // A row past the end is an earlier one with a gradient of zero.
        i64 e = origin + (i64)(i + u < count ? i + u : i) * l.ty * l.c;
        raw_x[u] = T::get(x, e);
        raw_g[u] = i + u < count ? T::get(dy, e) : T::zero();
      }
#pragma unroll
      for (int u = 0; u < U; u++) {
        float v[N], z[N], g[N];
        T::open(raw_x[u], v), T::open(raw_g[u], g);
#pragma unroll
        for (int j = 0; j < N; j++) {
          v[j] -= mean[j];
          z[j] = v[j] * scale[j] + beta[j];
        }
        slope_each(k.act, z, g);
#pragma unroll
        for (int j = 0; j < N; j++) {
          sum_g[j] += g[j];
          sum_gx[j] += g[j] * v[j];
        }
      }
    }
  }
  sum_over_rows(sum_g, sum_gx, p, l, room);
  if (!p.active || p.gy != 0) return;
  float rstd[N];
  rstds(k.second, at, k.per_image, k.from_variance, k.eps, rstd);
  i64 block = (i64)blockIdx.z * gridDim.x + blockIdx.x;
#pragma unroll
  for (int j = 0; j < N; j++) {
    store(partials, block * 2 * l.c + p.c0 + j, sum_g[j]);
    store(partials, (block * 2 + 1) * l.c + p.c0 + j, sum_gx[j] * rstd[j]);
  }
}

extern "C" __global__ void __launch_bounds__(256, 2) norm_sums(View x, View dy, View partials, Constants k, Layout l) {
  __shared__ __align__(16) float room[2 * 256 * 8];
  BY_KIND(l.kind, sums_body, x, dy, partials, k, l, room)
}

// dγ and dβ from [blocks, 2, C]. Where `lines` has room for [2, C], also the two factors of batch norm's dx:
// dx = scale·g + (x − mean)·slope + offset, scale = γ·rstd, slope = −scale·rstd·Σ(g·x̂)/R, offset = −scale·Σg/R.
extern "C" __global__ void __launch_bounds__(256)
    norm_merge_sums(View partials, View dgamma, View dbeta, int add_gamma, int add_beta, View lines, View rstd,
                    View gamma, int c_all, int blocks, float rows) {
  __shared__ double room[512];
  i64 c = (i64)blockIdx.x * 8 + threadIdx.x % 8;
  bool active = c < c_all;
  double sum_g = 0.0, sum_gx = 0.0;
  if (active) {
#pragma unroll 4
    for (i64 b = threadIdx.x / 8; b < blocks; b += 32) {
      sum_g += (double)load(partials, b * 2 * c_all + c);
      sum_gx += (double)load(partials, (b * 2 + 1) * c_all + c);
    }
  }
  sum_columns(sum_g, sum_gx, room);
  if (!active || threadIdx.x >= 8) return;
  if (dgamma.len) give(dgamma, c, (float)sum_gx, add_gamma);
  if (dbeta.len) give(dbeta, c, (float)sum_g, add_beta);
  if (lines.len) {
    // The factor of g in dx, rounded as there.
    double r = load(rstd, c), factor = (double)(load(gamma, c) * load(rstd, c)) / (double)rows;
    store(lines, c, (float)(-factor * r * sum_gx));
    store(lines, c_all + c, (float)(-factor * sum_g));
  }
}

template <class T>
__device__ __forceinline__ void input_body(const View& x, const View& dy, const View& dx, const View& lines,
                                           const Constants& k, const Layout& l, int accumulate) {
  constexpr int N = T::N, U = 2;
  Place p = place<N>(l);
  if (!p.active) return;
  i64 at = k.per_image ? blockIdx.z : p.c0;
  float mean[N], scale[N], gamma[N], beta[N] = {}, slope[N] = {}, offset[N] = {};
  constants(k.mean, at, k.per_image, mean);
  rstds(k.second, at, k.per_image, k.from_variance, k.eps, scale);
  constants(k.gamma, p.c0, false, gamma);
#pragma unroll
  for (int j = 0; j < N; j++) scale[j] *= gamma[j];
  if (k.act != IDENTITY) constants(k.beta, p.c0, false, beta);
  if (lines.len) {
    constants(lines, at, k.per_image, slope);
    // The second line starts where the first ends: not a multiple of eight for images, which read one value.
    constants(lines, at + lines.len / 2, k.per_image, offset);
  }
  i64 origin = p.base + (p.first + p.gy) * l.c + p.c0;
  for (int i = own_rows(p, l) - 1; i >= 0; i -= U) {
    typename T::Raw raw_x[U], raw_g[U], raw_old[U];
    float v[U * N], g[U * N], z[U * N];
#pragma unroll
    for (int u = 0; u < U; u++) {
      i64 e = origin + (i64)(i - u) * l.ty * l.c;
      raw_x[u] = i >= u ? T::get(x, e) : T::zero();
      raw_g[u] = i >= u ? T::get(dy, e) : T::zero();
      raw_old[u] = accumulate && i >= u ? T::get(dx, e) : T::zero();
    }
#pragma unroll
    for (int u = 0; u < U; u++) {
      float a[N], b[N];
      T::open(raw_x[u], a), T::open(raw_g[u], b);
#pragma unroll
      for (int j = 0; j < N; j++) {
        v[u * N + j] = a[j] - mean[j];
        z[u * N + j] = v[u * N + j] * scale[j] + beta[j];
        g[u * N + j] = b[j];
      }
    }
    slope_each(k.act, z, g);
#pragma unroll
    for (int u = 0; u < U; u++) {
      float d[N];
      T::open(raw_old[u], d);
#pragma unroll
      for (int j = 0; j < N; j++) d[j] += scale[j] * g[u * N + j] + (v[u * N + j] * slope[j] + offset[j]);
      if (i >= u) T::put(dx, origin + (i64)(i - u) * l.ty * l.c, d);
    }
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    norm_input(View x, View dy, View dx, View lines, Constants k, Layout l, int accumulate) {
  BY_KIND(l.kind, input_body, x, dy, dx, lines, k, l, accumulate)
}

// running += momentum·(batch − running), with the unbiased variance R/(R − 1)·var, as torch does.
extern "C" __global__ void __launch_bounds__(256)
    norm_running(View mean, View rstd, View running_mean, View running_var, int c, float momentum, float eps,
                 double unbias) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= c) return;
  double r = load(rstd, i), variance = 1.0 / (r * r) - (double)eps;
  float var = variance < 0.0 ? 0.0f : (float)(variance * unbias), old = load(running_mean, i);
  store(running_mean, i, old + momentum * (load(mean, i) - old));
  old = load(running_var, i);
  store(running_var, i, old + momentum * (var - old));
}

// Mean and squared deviations of chunk blockIdx.x of image blockIdx.y, [images, chunks, 2]; `n` elements an image.
template <class T>
__device__ __forceinline__ void group_body(const View& x, const View& partials, i64 n, i64 chunk, float* room) {
  constexpr int N = T::N, U = 4;
  i64 first = blockIdx.x * chunk, end = first + chunk < n ? first + chunk : n, base = blockIdx.y * n;
  float pivot = load(x, base + first), sum = 0.0f, square = 0.0f;
  i64 step = (i64)blockDim.x * N;
  for (i64 i = first + threadIdx.x * N; i < end; i += U * step) {
    typename T::Raw raw[U];
#pragma unroll
    for (int u = 0; u < U; u++) raw[u] = T::get(x, base + (i + u * step < end ? i + u * step : i));
#pragma unroll
    for (int u = 0; u < U; u++) {
      float v[N];
      T::open(raw[u], v);
#pragma unroll
      for (int k = 0; k < N; k++) {
        float d = i + u * step < end ? v[k] - pivot : 0.0f;
        sum += d;
        square += d * d;
      }
    }
  }
  sum = block_sum(sum, room);
  square = block_sum(square, room);
  if (threadIdx.x == 0) {
    float offset = sum / (float)(end - first);
    i64 at = ((i64)blockIdx.y * gridDim.x + blockIdx.x) * 2;
    store(partials, at, pivot + offset);
    store(partials, at + 1, square - offset * sum);
  }
}

extern "C" __global__ void __launch_bounds__(256) group_moments(View x, View partials, i64 n, i64 chunk, int kind) {
  __shared__ float room[32];
  BY_KIND(kind, group_body, x, partials, n, chunk, room)
}

// One thread an image: there are few chunks.
extern "C" __global__ void __launch_bounds__(256)
    group_merge_moments(View partials, View mean, View rstd, int images, int chunks, i64 n, i64 chunk, float eps) {
  i64 b = (i64)blockIdx.x * blockDim.x + threadIdx.x;
  if (b >= images) return;
  double pivot = load(partials, b * chunks * 2), s1 = 0.0, s2 = 0.0;
  for (i64 i = 0; i < chunks; i++) {
    double m = (double)(n - i * chunk < chunk ? n - i * chunk : chunk);
    double d = (double)load(partials, (b * chunks + i) * 2) - pivot;
    s1 += m * d;
    s2 += (double)load(partials, (b * chunks + i) * 2 + 1) + m * d * d;
  }
  double m2 = s2 - s1 * s1 / (double)n, variance = m2 < 0.0 ? 0.0 : m2 / (double)n;
  store(mean, b, (float)(pivot + s1 / (double)n));
  store(rstd, b, (float)(1.0 / sqrt(variance + (double)eps)));
}

// Slope and offset of an image's dx, lines [2, images], from its [blocks, 2, C]: dx = γ·rstd·dy + (x − mean)·slope +
// offset, slope = −rstd²·Σ(γ·dy·x̂)/n, offset = −rstd·Σ(γ·dy)/n. One block an image.
extern "C" __global__ void __launch_bounds__(256)
    group_lines(View partials, View gamma, View rstd, View lines, int c, int blocks, double n) {
  __shared__ double room[512];
  double sum_g = 0.0, sum_gx = 0.0;
  i64 base = (i64)blockIdx.x * blocks * 2 * c;
  for (i64 i = threadIdx.x; i < (i64)blocks * c; i += blockDim.x) {
    i64 at = base + i / c * 2 * c + i % c;
    double weight = load(gamma, i % c);
    sum_g += weight * (double)load(partials, at);
    sum_gx += weight * (double)load(partials, at + c);
  }
  sum_columns(sum_g, sum_gx, room);
  if (threadIdx.x < 8) room[threadIdx.x] = sum_g, room[8 + threadIdx.x] = sum_gx;
  __syncthreads();
  if (threadIdx.x != 0) return;
  for (int i = 1; i < 8; i++) sum_g += room[i], sum_gx += room[8 + i];
  double r = load(rstd, blockIdx.x);
  store(lines, blockIdx.x, (float)(-r * r * sum_gx / n));
  store(lines, gridDim.x + blockIdx.x, (float)(-r * sum_g / n));
}
