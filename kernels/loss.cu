// Losses and what they are made of; definitions as in engine/cpu/src/{elementwise,softmax,loss,sigmoid_loss}.rs.
//
// A scalar loss is summed in two stages, each in a fixed order: every block leaves its sums in f64, `finish_sums` adds
// those. Gradients of losses read dl, the gradient of the scalar, on the device.
#include "rows.cuh"

// ---- rows ----------------------------------------------------------------------------------------------------------

// y = x / max(‖x‖₂, 1e-12) by rows; norms keeps ‖x‖₂
template <int V>
__device__ __forceinline__ void normalize(const View& x, const View& y, const View& norms, i64 rows, i64 c, int team,
                                          float* room) {
  Team t = team_of(team, rows, c);
  float sum = 0.0f;
  each_column<V>(t, [&](i64 i) {
    float v[V];
    load_some<V>(x, i, v);
#pragma unroll
    for (int k = 0; k < V; k++) sum += v[k] * v[k];
  });
  float norm = sqrtf(team_sum(t, sum, room)), inverse = 1.0f / (norm < LEAST_NORM ? LEAST_NORM : norm);
  if (t.there && t.rank == 0) store(norms, t.row, norm);
  each_column<V>(t, [&](i64 i) {
    float v[V];
    load_some<V>(x, i, v);
#pragma unroll
    for (int k = 0; k < V; k++) v[k] *= inverse;
    give_some<V>(y, i, v, 0);
  });
}

extern "C" __global__ void __launch_bounds__(256, 5)
    l2_normalize(View x, View y, View norms, i64 rows, i64 c, int wide, int team) {
  __shared__ float room[32];
  if (wide) normalize<8>(x, y, norms, rows, c, team, room);
  else normalize<1>(x, y, norms, rows, c, team, room);
}

// dx (+)= (dy − y·(y·dy)) / ‖x‖; a row below the bound is only scaled
template <int V>
__device__ __forceinline__ void normalize_back(const View& y, const View& norms, const View& dy, const View& dx,
                                               i64 rows, i64 c, int team, int accumulate, float* room) {
  Team t = team_of(team, rows, c);
  float along = 0.0f, norm = t.there ? load(norms, t.row) : 0.0f;
  each_column<V>(t, [&](i64 i) {
    float v[V], g[V];
    load_some<V>(y, i, v);
    load_some<V>(dy, i, g);
#pragma unroll
    for (int k = 0; k < V; k++) along += v[k] * g[k];
  });
  along = team_sum(t, along, room);
  if (norm < LEAST_NORM) along = 0.0f;
  float inverse = 1.0f / (norm < LEAST_NORM ? LEAST_NORM : norm);
  each_column<V>(t, [&](i64 i) {
    float v[V], g[V];
    load_some<V>(y, i, v);
    load_some<V>(dy, i, g);
#pragma unroll
    for (int k = 0; k < V; k++) g[k] = (g[k] - v[k] * along) * inverse;
    give_some<V>(dx, i, g, accumulate);
  });
}

extern "C" __global__ void __launch_bounds__(256)
    l2_normalize_vjp(View y, View norms, View dy, View dx, i64 rows, i64 c, int wide, int team, int accumulate) {
  __shared__ float room[32];
  if (wide) normalize_back<8>(y, norms, dy, dx, rows, c, team, accumulate, room);
  else normalize_back<1>(y, norms, dy, dx, rows, c, team, accumulate, room);
}

// The maximum of scale·x over a row and Σ e^(scale·x − maximum), in one pass; every thread of the team gets both. A NaN
// makes both NaN, and so do a row of −∞ and one with +∞ its sum.
template <int V>
__device__ __forceinline__ void log_sum(const Team& t, const View& x, float scale, float* room, float& top,
                                        float& total) {
  float best = -INFINITY, sum = 0.0f;
  each_column<V>(t, [&](i64 i) {
    float v[V], most = -INFINITY;
    load_some<V>(x, i, v);
#pragma unroll
    for (int k = 0; k < V; k++) v[k] *= scale, most = max_nan(most, v[k]);
    if (!(most <= best)) {
      sum *= __expf(best - most);
      best = most;
    }
    // Nothing but −∞ so far adds nothing.
    if (best != -INFINITY)
#pragma unroll
      for (int k = 0; k < V; k++) sum += __expf(v[k] - best);
  });
  top = team_max(t, best, room);
  total = team_sum(t, best == -INFINITY ? 0.0f : sum * __expf(best - top), room);
  if (top == -INFINITY) total = NAN;
}

// y = softmax(scale·x) by rows
template <int V>
__device__ __forceinline__ void softmax_of(const View& x, const View& y, i64 rows, i64 c, float scale, int team,
                                           float* room) {
  Team t = team_of(team, rows, c);
  float top, total;
  log_sum<V>(t, x, scale, room, top, total);
  float inverse = 1.0f / total;
  each_column<V>(t, [&](i64 i) {
    float v[V];
    load_some<V>(x, i, v);
#pragma unroll
    for (int k = 0; k < V; k++) v[k] = expf(v[k] * scale - top) * inverse;
    give_some<V>(y, i, v, 0);
  });
}

extern "C" __global__ void __launch_bounds__(256, 5)
    softmax_rows(View x, View y, i64 rows, i64 c, float scale, int wide, int team) {
  __shared__ float room[32];
  if (wide) softmax_of<8>(x, y, rows, c, scale, team, room);
  else softmax_of<1>(x, y, rows, c, scale, team, room);
}

// dx (+)= scale·y·(dy − Σ y·dy)
template <int V>
__device__ __forceinline__ void softmax_back(const View& y, const View& dy, const View& dx, i64 rows, i64 c,
                                             float scale, int team, int accumulate, float* room) {
  Team t = team_of(team, rows, c);
  float dot = 0.0f;
  each_column<V>(t, [&](i64 i) {
    float v[V], g[V];
    load_some<V>(y, i, v);
    load_some<V>(dy, i, g);
#pragma unroll
    for (int k = 0; k < V; k++) dot += v[k] * g[k];
  });
  dot = team_sum(t, dot, room);
  each_column<V>(t, [&](i64 i) {
    float v[V], g[V];
    load_some<V>(y, i, v);
    load_some<V>(dy, i, g);
#pragma unroll
    for (int k = 0; k < V; k++) g[k] = scale * v[k] * (g[k] - dot);
    give_some<V>(dx, i, g, accumulate);
  });
}

extern "C" __global__ void __launch_bounds__(256)
    softmax_rows_vjp(View y, View dy, View dx, i64 rows, i64 c, float scale, int wide, int team, int accumulate) {
  __shared__ float room[32];
  if (wide) softmax_back<8>(y, dy, dx, rows, c, scale, team, accumulate, room);
  else softmax_back<1>(y, dy, dx, rows, c, scale, team, accumulate, room);
}

// ---- scalar losses -------------------------------------------------------------------------------------------------

// out = factor·Σ parts of every `stride`-th f64 from `start` on; one block
extern "C" __global__ void __launch_bounds__(1024)
    finish_sums(View parts, View out, i64 n, int stride, int start, double factor, int accumulate) {
  __shared__ double room[32];
  double sum = 0.0;
  for (i64 i = threadIdx.x; i < n; i += 1024) sum += ((const double*)parts.data)[i * stride + start];
  sum = block_sum_f64(sum, room);
  if (threadIdx.x == 0) give(out, 0, (float)(factor * sum), accumulate);
}

// parts[block] = Σ (a − b)², or Σ a·ln(a/b); a grid of any size
extern "C" __global__ void __launch_bounds__(256) pair_sums(View a, View b, View parts, i64 n, int divergences) {
  __shared__ double room[32];
  double sum = 0.0;
  i64 step = (i64)gridDim.x * 2048;
  for (i64 i = 8 * ((i64)blockIdx.x * 256 + threadIdx.x); i < n; i += step) {
    float x[8], y[8], own = 0.0f;
    if (i + 8 <= n) {
      Raw8 p = fetch8(a, i), q = fetch8(b, i);
      unpack8(a, p, x), unpack8(b, q, y);
    } else {
      load8_partial(a, i, n, x), load8_partial(b, i, n, y);
    }
#pragma unroll
    for (int k = 0; k < 8; k++) own += divergences ? divergence(x[k], y[k]) : (x[k] - y[k]) * (x[k] - y[k]);
    sum += (double)own;
  }
  sum = block_sum_f64(sum, room);
  if (threadIdx.x == 0) ((double*)parts.data)[blockIdx.x] = sum;
}

// da (+)= 2·dl/n·(a − b), db (+)= −that; either may be absent
extern "C" __global__ void __launch_bounds__(256)
    mse_vjp(View a, View b, View dl, View da, View db, i64 n, int add_a, int add_b) {
  i64 i = 8 * ((i64)blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= n) return;
  float factor = (float)(2.0 * (double)load(dl, 0) / (double)n), x[8], y[8];
  load8_partial(a, i, n, x), load8_partial(b, i, n, y);
#pragma unroll
  for (int k = 0; k < 8; k++) x[k] = factor * (x[k] - y[k]), y[k] = -x[k];
  if (da.len) give8_partial(da, i, n, x, add_a);
  if (db.len) give8_partial(db, i, n, y, add_b);
}

// dq (+)= −dl/rows·p/q, kept finite
extern "C" __global__ void __launch_bounds__(256)
    kl_rows_vjp(View p, View q, View dl, View dq, i64 n, float rows, int accumulate) {
  const View in[2] = {p, q};
  float factor = -load(dl, 0) / rows;
  map8(in, dq, n, accumulate, [&](i64, float(&x)[2][8], float(&o)[8]) {
#pragma unroll
    for (int k = 0; k < 8; k++)
      o[k] = finite(factor * x[0][k] / (x[1][k] < LEAST_NORMAL ? LEAST_NORMAL : x[1][k]));
  });
}

// ‖a‖, ‖b‖ (at least 1e-12) and the cosine of a row
struct Angle {
  float a, b, cosine;
};

template <int V>
__device__ __forceinline__ Angle angle_of(const Team& t, const View& a, const View& b, float* room) {
  float aa = 0.0f, bb = 0.0f, ab = 0.0f;
  each_column<V>(t, [&](i64 i) {
    float x[V], y[V];
    load_some<V>(a, i, x);
    load_some<V>(b, i, y);
#pragma unroll
    for (int k = 0; k < V; k++) aa += x[k] * x[k], bb += y[k] * y[k], ab += x[k] * y[k];
  });
  aa = sqrtf(team_sum(t, aa, room)), bb = sqrtf(team_sum(t, bb, room)), ab = team_sum(t, ab, room);
  Angle g;
  g.a = aa < LEAST_NORM ? LEAST_NORM : aa, g.b = bb < LEAST_NORM ? LEAST_NORM : bb;
  g.cosine = ab / g.a / g.b;
  return g;
}

// parts[row] = 1 − cos(a, b)
extern "C" __global__ void __launch_bounds__(256)
    cosine_rows(View a, View b, View parts, i64 rows, i64 c, int wide, int team) {
  __shared__ float room[32];
  Team t = team_of(team, rows, c);
  Angle g = wide ? angle_of<8>(t, a, b, room) : angle_of<1>(t, a, b, room);
  if (t.there && t.rank == 0) ((double*)parts.data)[t.row] = 1.0 - (double)g.cosine;
}

// da (+)= −dl/R/‖a‖·(b/‖b‖ − cos·a/‖a‖) and the same for b; at the bound a norm is a constant
template <int V>
__device__ __forceinline__ void cosine_back(const View& a, const View& b, const View& dl, const View& da,
                                            const View& db, i64 rows, i64 c, int team, int add_a, int add_b,
                                            float* room) {
  Team t = team_of(team, rows, c);
  Angle g = angle_of<V>(t, a, b, room);
  float factor = -load(dl, 0) / (float)rows;
  // cosine is NaN where an argument is.
  float along_a = g.a > LEAST_NORM ? g.cosine : 0.0f, along_b = g.b > LEAST_NORM ? g.cosine : 0.0f;
  each_column<V>(t, [&](i64 i) {
    float x[V], y[V], u[V], v[V];
    load_some<V>(a, i, x);
    load_some<V>(b, i, y);
#pragma unroll
    for (int k = 0; k < V; k++) {
      x[k] /= g.a, y[k] /= g.b;
      u[k] = factor / g.a * (y[k] - along_a * x[k]), v[k] = factor / g.b * (x[k] - along_b * y[k]);
    }
    if (da.len) give_some<V>(da, i, u, add_a);
    if (db.len) give_some<V>(db, i, v, add_b);
  });
}

extern "C" __global__ void __launch_bounds__(256)
    cosine_rows_vjp(View a, View b, View dl, View da, View db, i64 rows, i64 c, int wide, int team, int add_a,
                    int add_b) {
  __shared__ float room[32];
  if (wide) cosine_back<8>(a, b, dl, da, db, rows, c, team, add_a, add_b, room);
  else cosine_back<1>(a, b, dl, da, db, rows, c, team, add_a, add_b, room);
}

// ---- attention transfer --------------------------------------------------------------------------------------------

// map = mean over the channels of x², by rows of c
extern "C" __global__ void __launch_bounds__(256)
    mean_squares(View x, View map, i64 rows, i64 c, int wide, int team) {
  __shared__ float room[32];
  Team t = team_of(team, rows, c);
  float sum = 0.0f;
  if (wide) {
    each_column<8>(t, [&](i64 i) {
      float v[8];
      load_some<8>(x, i, v);
#pragma unroll
      for (int k = 0; k < 8; k++) sum += v[k] * v[k];
    });
  } else {
    each_column<1>(t, [&](i64 i) {
      float v = load(x, i);
      sum += v * v;
    });
  }
  sum = team_sum(t, sum, room);
  if (t.there && t.rank == 0) store(map, t.row, sum / (float)c);
}

// y = map / ‖map‖ over the hw pixels of an image, or, with dy, the factors of dx: (dy − map·(map·dy)/‖map‖²)/‖map‖·2/c.
// A block an image.
extern "C" __global__ void __launch_bounds__(256)
    transfer_maps(View map, View dy, View y, i64 hw, i64 c, int backward) {
  __shared__ float room[32];
  i64 base = blockIdx.x * hw;
  float squares = 0.0f, along = 0.0f;
  for (i64 i = threadIdx.x; i < hw; i += blockDim.x) {
    float m = load(map, base + i);
    squares += m * m;
    if (backward) along += m * load(dy, base + i);
  }
  float norm = sqrtf(block_sum(squares, room));
  along = block_sum(along, room);
  if (norm < LEAST_NORM) norm = LEAST_NORM;
  along = norm > LEAST_NORM ? along / norm / norm : (norm == norm ? 0.0f : norm);
  for (i64 i = threadIdx.x; i < hw; i += blockDim.x) {
    float m = load(map, base + i);
    store(y, base + i, backward ? (load(dy, base + i) - m * along) / norm * 2.0f / (float)c : m / norm);
  }
}

// ---- pairwise losses of materialised cosines -----------------------------------------------------------------------

// With s = scale·x: parts[row] = Σ_j p_j·(lse(s) − s_j), plus Σ p·ln p if `entropy`. The rows of `contrastive` in
// engine/cpu/src/loss.rs.
template <int V>
__device__ __forceinline__ void contrast(const View& x, const View& p, const View& scale, const View& parts, i64 rows,
                                         i64 c, int entropy, int team, float* room, double* wide_room) {
  Team t = team_of(team, rows, c);
  float top, total, factor = load(scale, 0);
  log_sum<V>(t, x, factor, room, top, total);
  double sum = 0.0, log_total = log((double)total);
  each_column<V>(t, [&](i64 i) {
    float v[V], w[V];
    load_some<V>(x, i, v);
    load_some<V>(p, i, w);
#pragma unroll
    for (int k = 0; k < V; k++) {
      sum += (double)w[k] * (log_total - ((double)(factor * v[k]) - (double)top));
      if (entropy && w[k] > 0.0f) sum += (double)w[k] * (double)logf(w[k]);
    }
  });
  sum = team_sum_f64(t, sum, wide_room);
  if (t.there && t.rank == 0) ((double*)parts.data)[t.row] = sum;
}

extern "C" __global__ void __launch_bounds__(256)
    contrast_rows(View x, View p, View scale, View parts, i64 rows, i64 c, int entropy, int wide, int team) {
  __shared__ float room[32];
  __shared__ double wide_room[32];
  if (wide) contrast<8>(x, p, scale, parts, rows, c, entropy, team, room, wide_room);
  else contrast<1>(x, p, scale, parts, rows, c, entropy, team, room, wide_room);
}

// With g = dl·weight·(softmax(s)·Σp − p): x ← scale·g, parts[row] = Σ g·x
template <int V>
__device__ __forceinline__ void contrast_back(const View& x, const View& p, const View& scale, const View& dl,
                                              const View& parts, i64 rows, i64 c, float weight, int team, float* room,
                                              double* wide_room) {
  Team t = team_of(team, rows, c);
  float top, total, factor = load(scale, 0), mass = 0.0f;
  weight *= load(dl, 0);
  log_sum<V>(t, x, factor, room, top, total);
  each_column<V>(t, [&](i64 i) {
    float w[V];
    load_some<V>(p, i, w);
#pragma unroll
    for (int k = 0; k < V; k++) mass += w[k];
  });
  mass = team_sum(t, mass, room) / total;
  double sum = 0.0;
  each_column<V>(t, [&](i64 i) {
    float v[V], w[V];
    load_some<V>(x, i, v);
    load_some<V>(p, i, w);
#pragma unroll
    for (int k = 0; k < V; k++) {
      float g = weight * (expf(factor * v[k] - top) * mass - w[k]);
      sum += (double)(g * v[k]);
      v[k] = factor * g;
    }
    give_some<V>(x, i, v, 0);
  });
  sum = team_sum_f64(t, sum, wide_room);
  if (t.there && t.rank == 0) ((double*)parts.data)[t.row] = sum;
}

extern "C" __global__ void __launch_bounds__(256)
    contrast_rows_vjp(View x, View p, View scale, View dl, View parts, i64 rows, i64 c, float weight, int wide,
                      int team) {
  __shared__ float room[32];
  __shared__ double wide_room[32];
  if (wide) contrast_back<8>(x, p, scale, dl, parts, rows, c, weight, team, room, wide_room);
  else contrast_back<1>(x, p, scale, dl, parts, rows, c, weight, team, room, wide_room);
}

// parts[block] = Σ −t·ln σ(l) − (1−t)·ln σ(−l), l = scale·x + bias, without cancellation at either end (Zhai et al. 2023,
// eq. 1); a grid of any size
extern "C" __global__ void __launch_bounds__(256)
    sigmoid_pairs(View x, View targets, View scale, View bias, View parts, i64 n) {
  __shared__ double room[32];
  double sum = 0.0, factor = (double)load(scale, 0), offset = (double)load(bias, 0);
  for (i64 i = (i64)blockIdx.x * 256 + threadIdx.x; i < n; i += (i64)gridDim.x * 256) {
    double l = factor * (double)load(x, i) + offset;
    sum += (l < 0.0 ? 0.0 : l) - (double)load(targets, i) * l + (double)log1pf(expf(-fabsf((float)l)));
  }
  sum = block_sum_f64(sum, room);
  if (threadIdx.x == 0) ((double*)parts.data)[blockIdx.x] = sum;
}

// With g = dl·weight·(σ(l) − t): x ← scale·g, parts[block] = Σ g·x, Σ g
extern "C" __global__ void __launch_bounds__(256)
    sigmoid_pairs_vjp(View x, View targets, View scale, View bias, View dl, View parts, i64 n, double weight) {
  __shared__ double room[32];
  float factor = load(scale, 0);
  double by_scale = 0.0, by_bias = 0.0, offset = (double)load(bias, 0);
  weight *= (double)load(dl, 0);
  for (i64 i = (i64)blockIdx.x * 256 + threadIdx.x; i < n; i += (i64)gridDim.x * 256) {
    float v = load(x, i), l = (float)((double)factor * (double)v + offset);
    double g = weight * ((double)(1.0f / (1.0f + expf(-l))) - (double)load(targets, i));
    by_scale += g * (double)v, by_bias += g;
    store(x, i, factor * (float)g);
  }
  by_scale = block_sum_f64(by_scale, room);
  by_bias = block_sum_f64(by_bias, room);
  if (threadIdx.x == 0) {
    ((double*)parts.data)[2 * blockIdx.x] = by_scale;
    ((double*)parts.data)[2 * blockIdx.x + 1] = by_bias;
  }
}
