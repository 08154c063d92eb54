// Losses of the distillation levels in one op each: their inner values (normalised rows, maps, activations with a bias) are
// made in registers and stored nowhere. What they are made of: engine/graph/src/fuse/losses.rs; definitions as in
// engine/cpu/src/{elementwise,loss}.rs. Scalars are summed as in loss.cu.
//
// A distance of rows a and b, each normalised or not, has gradients in the plane of the two: da = dl·(α·a + β·b) and
// db = dl·(γ·b + β·a). The forward leaves α, β, γ of each row, and the backward is one pass. With n = max(‖a‖, 1e-12) and
// i = 1/n, or i = 1 where a is not normalised, u = i·a; the same for b with m, j and v = j·b:
//   mse     f = 2/(R·C):  β = −f·i·j, α = f·i²·(1 − u·(u − v)), γ = f·j²·(1 − v·(v − u))
//   cosine  s = max(‖u‖, 1e-12), r = max(‖v‖, 1e-12), x = u·v/(s·r):  β = −i·j/(R·s·r), α = x·(i/s)²/R, γ = x·(j/r)²/R
// where a product with u is 0 if a is not normalised or ‖a‖ lies below the bound, and x is 0 in α if ‖u‖ lies below it.
#include "columns.cuh"
#include "rows.cuh"

enum Distance { MSE = 0, COSINE = 1 };

// ---- rows ----------------------------------------------------------------------------------------------------------

// One side of a row: 1/n where it is normalised, its norm then, and whether the norm is a constant.
struct Side {
  float inverse, norm;
  bool bound;
};

__device__ __forceinline__ Side side_of(float squares, int normalize) {
  Side s;
  float norm = sqrtf(squares), n = norm < LEAST_NORM ? LEAST_NORM : norm;
  s.inverse = normalize ? 1.0f / n : 1.0f;
  s.norm = norm * s.inverse;
  s.bound = normalize && norm < LEAST_NORM;
  return s;
}

// parts[row] = the row's distance, to be multiplied by 1/(R·C) or 1/R; coefficients[3·row..] = α, β, γ
template <int V>
__device__ __forceinline__ void compare_rows(const View& a, const View& b, const View& parts, const View& coefficients,
                                             i64 rows, i64 c, int distance, int norm_a, int norm_b, int team,
                                             float* room, double* wide_room) {
  Team t = team_of(team, rows, c);
  float aa = 0.0f, bb = 0.0f, ab = 0.0f;
  each_column<V>(t, [&](i64 i) {
    float x[V], y[V];
    load_some<V>(a, i, x);
    load_some<V>(b, i, y);
#pragma unroll
    for (int k = 0; k < V; k++) aa += x[k] * x[k], bb += y[k] * y[k], ab += x[k] * y[k];
  });
  aa = team_sum(t, aa, room), bb = team_sum(t, bb, room), ab = team_sum(t, ab, room);
  Side p = side_of(aa, norm_a), q = side_of(bb, norm_b);
  double loss;
  float alpha, beta, gamma;
  if (distance == COSINE) {
    float s = p.norm < LEAST_NORM ? LEAST_NORM : p.norm, r = q.norm < LEAST_NORM ? LEAST_NORM : q.norm;
    float i = p.inverse / s, j = q.inverse / r, x = ab * i * j, share = 1.0f / (float)rows;
    loss = 1.0 - (double)x;
    beta = -share * i * j;
    // At the bound a norm is a constant. x is NaN where an argument is.
    alpha = p.norm > LEAST_NORM ? share * x * i * i : 0.0f;
    gamma = q.norm > LEAST_NORM ? share * x * j * j : 0.0f;
  } else {
    float difference = 0.0f, along_a = 0.0f, along_b = 0.0f;
    each_column<V>(t, [&](i64 i) {
      float x[V], y[V];
      load_some<V>(a, i, x);
      load_some<V>(b, i, y);
#pragma unroll
      for (int k = 0; k < V; k++) {
        float u = x[k] * p.inverse, v = y[k] * q.inverse, d = u - v;
        difference += d * d, along_a += u * d, along_b -= v * d;
      }
    });
    loss = team_sum_f64(t, (double)difference, wide_room);
    along_a = team_sum(t, along_a, room), along_b = team_sum(t, along_b, room);
    if (!norm_a || p.bound) along_a = 0.0f;
    if (!norm_b || q.bound) along_b = 0.0f;
    float share = (float)(2.0 / ((double)rows * (double)c));
    beta = -share * p.inverse * q.inverse;
    alpha = share * p.inverse * p.inverse * (1.0f - along_a);
    gamma = share * q.inverse * q.inverse * (1.0f - along_b);
  }
  if (t.there && t.rank == 0) {
    ((double*)parts.data)[t.row] = loss;
    store(coefficients, 3 * t.row, finite(alpha));
    store(coefficients, 3 * t.row + 1, finite(beta));
    store(coefficients, 3 * t.row + 2, finite(gamma));
  }
}

extern "C" __global__ void __launch_bounds__(256)
    row_loss(View a, View b, View parts, View coefficients, i64 rows, i64 c, int distance, int norm_a, int norm_b,
             int wide, int team) {
  __shared__ float room[32];
  __shared__ double wide_room[32];
  if (wide) compare_rows<8>(a, b, parts, coefficients, rows, c, distance, norm_a, norm_b, team, room, wide_room);
  else compare_rows<1>(a, b, parts, coefficients, rows, c, distance, norm_a, norm_b, team, room, wide_room);
}

template <int V>
__device__ __forceinline__ void row_gradients(const View& a, const View& b, const View& coefficients, const View& dl,
                                              const View& da, const View& db, i64 rows, i64 c, int add_a, int add_b) {
  i64 i = V * ((i64)blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= rows * c) return;
  float x[V], y[V], u[V], v[V], factor = load(dl, 0);
  load_some<V>(a, i, x);
  load_some<V>(b, i, y);
  i64 row = quotient(i, c);
  float alpha = load(coefficients, 3 * row), beta = load(coefficients, 3 * row + 1);
  float gamma = load(coefficients, 3 * row + 2);
#pragma unroll
  for (int k = 0; k < V; k++) {
    u[k] = factor * (alpha * x[k] + beta * y[k]);
    v[k] = factor * (gamma * y[k] + beta * x[k]);
  }
  if (da.len) give_some<V>(da, i, u, add_a);
  if (db.len) give_some<V>(db, i, v, add_b);
}

// da (+)= dl·(α·a + β·b), db (+)= dl·(γ·b + β·a); either may be absent. A thread for eight elements or for one.
extern "C" __global__ void __launch_bounds__(256)
    row_loss_vjp(View a, View b, View coefficients, View dl, View da, View db, i64 rows, i64 c, int wide, int add_a,
                 int add_b) {
  if (wide) row_gradients<8>(a, b, coefficients, dl, da, db, rows, c, add_a, add_b);
  else row_gradients<1>(a, b, coefficients, dl, da, db, rows, c, add_a, add_b);
}

// ---- attention transfer --------------------------------------------------------------------------------------------

// map holds the mean squares m of an image's hw pixels. With y = m/‖m‖ and d = y − t: parts[image] = Σ d², and the map
// becomes the factors of dx for dl = 1, scale·(d − y·(y·d))/‖m‖ with scale = 4/(n·c). A block an image.
extern "C" __global__ void __launch_bounds__(256) transfer_loss(View map, View target, View parts, i64 hw, float scale) {
  __shared__ float room[32];
  __shared__ double wide_room[32];
  i64 base = blockIdx.x * hw;
  float squares = 0.0f;
  for (i64 i = threadIdx.x; i < hw; i += blockDim.x) {
    float m = load(map, base + i);
    squares += m * m;
  }
  float norm = sqrtf(block_sum(squares, room));
  bool bound = norm <= LEAST_NORM;
  if (norm < LEAST_NORM) norm = LEAST_NORM;
  float along = 0.0f, inverse = 1.0f / norm;
  double sum = 0.0;
  for (i64 i = threadIdx.x; i < hw; i += blockDim.x) {
    float y = load(map, base + i) * inverse, d = y - load(target, base + i);
    sum += (double)(d * d);
    along += y * d;
  }
  along = block_sum(along, room);
  if (bound) along = 0.0f;
  scale *= inverse;
  for (i64 i = threadIdx.x; i < hw; i += blockDim.x) {
    float y = load(map, base + i) * inverse, d = y - load(target, base + i);
    store(map, base + i, (d - y * along) * scale);
  }
  sum = block_sum_f64(sum, wide_room);
  if (threadIdx.x == 0) ((double*)parts.data)[blockIdx.x] = sum;
}

// dx (+)= dl·factor of the row·x, rows of c; launch shape as for map8
extern "C" __global__ void __launch_bounds__(256)
    transfer_loss_vjp(View x, View factors, View dl, View dx, i64 n, i64 c, int accumulate) {
  const View in[1] = {x};
  float all = load(dl, 0);
  map8(in, dx, n, accumulate, [&](i64 i, float(&v)[1][8], float(&o)[8]) {
    i64 row = quotient(i, c), end = (row + 1) * c;
    float factor = all * load(factors, row);
#pragma unroll
    for (int k = 0; k < 8; k++) {
      if (i + k == end && i + k < n) {
        row++, end += c;
        factor = all * load(factors, row);
      }
      o[k] = factor * v[0][k];
    }
  });
}

// ---- activations against a target, a bias added on the way ---------------------------------------------------------

// Eight places of y, their bias and the target as loaded.
struct Pixels {
  Raw8 y, t;
  float bias[8];
};

__device__ __forceinline__ void squares_of(const View& y, const View& t, const Pixels& p, float& sum) {
  float a[8], b[8];
  unpack8(y, p.y, a), unpack8(t, p.t, b);
#pragma unroll
  for (int k = 0; k < 8; k++) {
    float d = a[k] + p.bias[k] - b[k];
    sum += d * d;
  }
}

// parts[block] = Σ (y + bias − t)²; a grid of any size
extern "C" __global__ void __launch_bounds__(256)
    pixel_squares(View y, View bias, View t, View parts, i64 n, i64 c, int wide) {
  __shared__ double room[32];
  double sum = 0.0;
  i64 first = (i64)blockIdx.x * 256 + threadIdx.x, step = (i64)gridDim.x * 256;
  if (wide) {
    i64 i = 8 * first;
    for (; i + 8 * step < n; i += 16 * step) {
      Pixels p[2];
      float own = 0.0f;
#pragma unroll
      for (int u = 0; u < 2; u++) p[u].y = fetch8(y, i + 8 * u * step), p[u].t = fetch8(t, i + 8 * u * step);
#pragma unroll
      for (int u = 0; u < 2; u++) load8(bias, remainder_of(i + 8 * u * step, c), p[u].bias);
#pragma unroll
      for (int u = 0; u < 2; u++) squares_of(y, t, p[u], own);
      sum += (double)own;
    }
    if (i < n) {
      Pixels p;
      float own = 0.0f;
      p.y = fetch8(y, i), p.t = fetch8(t, i);
      load8(bias, remainder_of(i, c), p.bias);
      squares_of(y, t, p, own);
      sum += (double)own;
    }
  } else {
    for (i64 i = first; i < n; i += step) {
      float d = load(y, i) + load(bias, remainder_of(i, c)) - load(t, i);
      sum += (double)(d * d);
    }
  }
  sum = block_sum_f64(sum, room);
  if (threadIdx.x == 0) ((double*)parts.data)[blockIdx.x] = sum;
}

// parts[row] = 1 − cos(y + bias, t); coefficients[2·row..] = α, β with dy = dl·(α·(y + bias) + β·t)
template <int V>
__device__ __forceinline__ void pixel_angles(const View& y, const View& bias, const View& target, const View& parts,
                                             const View& coefficients, i64 rows, i64 c, int team, float* room) {
  Team t = team_of(team, rows, c);
  float aa = 0.0f, bb = 0.0f, ab = 0.0f;
  each_column<V>(t, [&](i64 i) {
    float a[V], b[V], offset[V];
    load_some<V>(y, i, a);
    load_some<V>(target, i, b);
    load_some<V>(bias, i - t.begin, offset);
#pragma unroll
    for (int k = 0; k < V; k++) {
      a[k] += offset[k];
      aa += a[k] * a[k], bb += b[k] * b[k], ab += a[k] * b[k];
    }
  });
  aa = sqrtf(team_sum(t, aa, room)), bb = sqrtf(team_sum(t, bb, room)), ab = team_sum(t, ab, room);
  float s = aa < LEAST_NORM ? LEAST_NORM : aa, r = bb < LEAST_NORM ? LEAST_NORM : bb, x = ab / s / r;
  if (t.there && t.rank == 0) {
    float share = 1.0f / (float)rows;
    ((double*)parts.data)[t.row] = 1.0 - (double)x;
    store(coefficients, 2 * t.row, s > LEAST_NORM ? finite(share * x / s / s) : 0.0f);
    store(coefficients, 2 * t.row + 1, finite(-share / s / r));
  }
}

extern "C" __global__ void __launch_bounds__(256)
    pixel_cosines(View y, View bias, View t, View parts, View coefficients, i64 rows, i64 c, int wide, int team) {
  __shared__ float room[32];
  if (wide) pixel_angles<8>(y, bias, t, parts, coefficients, rows, c, team, room);
  else pixel_angles<1>(y, bias, t, parts, coefficients, rows, c, team, room);
}

template <int V>
__device__ __forceinline__ void pixel_gradients(const View& y, const View& bias, const View& t,
                                                const View& coefficients, const View& dl, const View& dy,
                                                const Columns& d, float share, int accumulate, float* room) {
  const View in[2] = {y, t};
  float offset[V], all = load(dl, 0), alpha = share * all, beta = -alpha;
  i64 column = d.column<V>();
#pragma unroll
  for (int k = 0; k < V; k++) offset[k] = 0.0f;
  if (column < d.c) load_some<V>(bias, column, offset);
  sum_columns<V, 2>(in, d, room, [&](i64 i, float(&x)[2][V], float(&g)[V]) {
    if (coefficients.len) {
      i64 row = quotient(i, d.c);
      alpha = all * load(coefficients, 2 * row), beta = all * load(coefficients, 2 * row + 1);
    }
#pragma unroll
    for (int k = 0; k < V; k++)
      g[k] = coefficients.len ? alpha * (x[0][k] + offset[k]) + beta * x[1][k]
                              : alpha * (x[0][k] + offset[k] - x[1][k]);
    float given[V];
#pragma unroll
    for (int k = 0; k < V; k++) given[k] = g[k];
    if (dy.len) give_some<V>(dy, i, given, accumulate);
  });
}

// dy (+)= dl·(α·(y + bias) + β·t), or without coefficients dl·share·(y + bias − t); the sums of that over rows, which
// are the bias's gradient, as columns.cuh says
extern "C" __global__ void __launch_bounds__(256)
    pixel_loss_vjp(View y, View bias, View t, View coefficients, View dl, View dy, Columns d, float share,
                   int accumulate) {
  __shared__ float room[256 * 8];
  if (d.wide) pixel_gradients<8>(y, bias, t, coefficients, dl, dy, d, share, accumulate, room);
  else pixel_gradients<1>(y, bias, t, coefficients, dl, dy, d, share, accumulate, room);
}
