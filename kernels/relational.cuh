// What the kernels of the contrastive and relational loss share: the problem, sums over a warp's tile, the targets.
//
// S = scale·a·bᵀ and T_k = u_k·v_kᵀ are never stored: a block computes a tile of each, on tensor cores or in f32, and goes
// on in registers. Logits are kept times log₂e, so that every exponential is one ex2.
//
// A warp's tile is held as by mma.m16n8k16 (kernels/mma.cuh): of 16·MF rows and 8·NF columns, lane l has, with g = l / 4 and
// t = l % 4, in x[m][n][e] row 16·m + g + 8·(e / 2), column 8·n + 2·t + e % 2. Its rows are numbered r = 2·m + e / 2, its
// columns c = 2·n + e % 2.
#pragma once
#include "common.cuh"

// As engine/cpu/src/relational.rs.
constexpr int MOST_TEACHERS = 11;
constexpr int MOST_SETS = 1 + MOST_TEACHERS;
constexpr float LOG2E = 1.44269504f;
constexpr double LOG2E_WIDE = 1.4426950408889634;
// Below it a number is 0 to ex2 and lg2.
constexpr float LEAST_NORMAL = 1.17549435e-38f;
constexpr double LN2 = 0.6931471805599453;
// Rows that share a column partial.
constexpr int BLOCK_ROWS = 64;

// Rows of an embedding, `ld` elements apart.
struct Operand {
  const void* data;
  i64 ld;
};

// The pairs of embeddings whose products are the logits: (a, b), then each teacher's (u, v).
struct Operands {
  Operand left[MOST_SETS], right[MOST_SETS];
  int dim[MOST_SETS];
};

// Which captions an image shows; see engine/cpu/src/relational.rs. `spans` holds the least and the largest group of each
// 128 columns.
struct Targets {
  const int *own, *other;
  const float* keep;
  const int* group;
  const float *share, *column_total;
  const int2* spans;
};

// The rows held, where they lie among the columns' images, and all columns; the teachers of this launch and of the op.
struct Problem {
  int rows, first_row, cols, teachers, all_teachers;
  // Rows and columns rounded up to whole tiles of 128: strides of statistics.
  int row_stride, col_stride;
};

#ifndef MCPIPE_SHIM
__device__ __forceinline__ float ex2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float lg2(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
static inline float flushed(float x) { return fabsf(x) < LEAST_NORMAL ? 0.0f : x; }
static inline float ex2(float x) { return flushed(exp2f(flushed(x))); }
static inline float lg2(float x) { return log2f(flushed(x)); }
#endif
__device__ __forceinline__ float log2_of(float x) { return lg2(x); }
__device__ __forceinline__ double log2_of(double x) { return log2(x); }

constexpr unsigned FULL = 0xffffffffu;

// ---- sums over the lanes that share rows or columns ---------------------------------------------------------------

struct Sum {
  template <class T> __device__ __forceinline__ T operator()(T a, T b) const { return a + b; }
};
// NaN is dropped; it comes back through the sums.
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
  __device__ __forceinline__ double operator()(double a, double b) const { return fmax(a, b); }
};

// One step of a reduction that also deals the values out: the lane keeps that half of them that `up` says.
template <int N, class T, class Op> __device__ __forceinline__ void halve(T (&v)[N], int bit, bool up, Op op) {
#pragma unroll
  for (int i = 0; i < N / 2; i++) {
    T given = up ? v[i] : v[i + N / 2], kept = up ? v[i + N / 2] : v[i];
    v[i] = op(kept, __shfl_xor_sync(FULL, given, bit));
  }
}
template <int N, class T> __device__ __forceinline__ void pick(T (&v)[N], bool up) {
#pragma unroll
  for (int i = 0; i < N / 2; i++) v[i] = up ? v[i + N / 2] : v[i];
}

// The values of a tile's rows, one for each of the lane's, summed over the tile's columns. Four lanes share a row; each
// gets OWN of them: v[i] is then row `first + i` of the lane's numbering.
template <int MF> struct Rows {
  static constexpr int N = 2 * MF, OWN = MF == 1 ? 1 : N / 4;
  template <class T, class Op> static __device__ __forceinline__ void reduce(T (&v)[N], int lane, Op op) {
    halve<N>(v, 1, lane & 1, op);
    if constexpr (MF == 1) {
      v[0] = op(v[0], __shfl_xor_sync(FULL, v[0], 2));
    } else {
      halve<N / 2>((T(&)[N / 2])v, 2, lane & 2, op);
    }
  }
  template <class T> static __device__ __forceinline__ void select(T (&v)[N], int lane) {
    pick<N>(v, lane & 1);
    if constexpr (MF > 1) pick<N / 2>((T(&)[N / 2])v, lane & 2);
  }
  static __device__ __forceinline__ int first(int lane) {
    return MF == 1 ? (lane & 1) : (lane & 1) * (N / 2) + (lane >> 1 & 1) * (N / 4);
  }
  // Whether the lane's are not another lane's too.
  static __device__ __forceinline__ bool mine(int lane) { return MF > 1 || !(lane & 2); }
  static __device__ __forceinline__ int place(int r, int lane) { return 16 * (r >> 1) + (lane >> 2) + 8 * (r & 1); }
  static constexpr __device__ __forceinline__ int of(int m, int, int e) { return 2 * m + e / 2; }
  // Largest over the lanes that share a row; all of them get it.
  template <class T> static __device__ __forceinline__ T max(T v) {
    v = Max()(v, __shfl_xor_sync(FULL, v, 1));
    return Max()(v, __shfl_xor_sync(FULL, v, 2));
  }
};

// The same of columns, which eight lanes share.
template <int NF> struct Columns {
  static constexpr int N = 2 * NF, OWN = N < 8 ? 1 : N / 8;
  template <class T, class Op> static __device__ __forceinline__ void reduce(T (&v)[N], int lane, Op op) {
    halve<N>(v, 4, lane & 4, op);
    if constexpr (N >= 4) halve<N / 2>((T(&)[N / 2])v, 8, lane & 8, op);
    else v[0] = op(v[0], __shfl_xor_sync(FULL, v[0], 8));
    if constexpr (N >= 8) halve<N / 4>((T(&)[N / 4])v, 16, lane & 16, op);
    else v[0] = op(v[0], __shfl_xor_sync(FULL, v[0], 16));
  }
  template <class T> static __device__ __forceinline__ void select(T (&v)[N], int lane) {
    pick<N>(v, lane & 4);
    if constexpr (N >= 4) pick<N / 2>((T(&)[N / 2])v, lane & 8);
    if constexpr (N >= 8) pick<N / 4>((T(&)[N / 4])v, lane & 16);
  }
  static __device__ __forceinline__ int first(int lane) {
    int b = lane >> 2;
    if (N == 2) return b & 1;
    if (N == 4) return (b & 1) * 2 + (b >> 1 & 1);
    return (b & 1) * (N / 2) + (b >> 1 & 1) * (N / 4) + (b >> 2) * (N / 8);
  }
  static __device__ __forceinline__ bool mine(int lane) {
    return N >= 8 || (N == 4 ? !(lane & 16) : !(lane & 24));
  }
  static __device__ __forceinline__ int place(int c, int lane) { return 8 * (c >> 1) + 2 * (lane & 3) + (c & 1); }
  static constexpr __device__ __forceinline__ int of(int, int n, int e) { return 2 * n + e % 2; }
  template <class T> static __device__ __forceinline__ T max(T v) {
    v = Max()(v, __shfl_xor_sync(FULL, v, 4));
    v = Max()(v, __shfl_xor_sync(FULL, v, 8));
    return Max()(v, __shfl_xor_sync(FULL, v, 16));
  }
};

// ---- statistics of a part of a row or column -----------------------------------------------------------------------

// Of logits x in base 2 with weights w = 2^x, and of what is averaged over them: Σ w·2^-top and Σ w·y·2^-top. A part
// without elements has top −∞.
template <class Real> struct Part {
  Real top, sum, weighted;

  __device__ __forceinline__ void add(const Part& p) {
    if (p.top == -(Real)INFINITY) return;
    Real high = top > p.top ? top : p.top;
    float mine = top == -(Real)INFINITY ? 0.0f : ex2((float)(top - high)), other = ex2((float)(p.top - high));
    sum = sum * mine + p.sum * other;
    weighted = weighted * mine + p.weighted * other;
    top = high;
  }
  // log₂ Σ w.
  __device__ __forceinline__ Real log_sum() const { return top + log2_of(sum); }
  __device__ __forceinline__ Real average() const { return sum == Real(0) ? Real(0) : weighted / sum; }
};

// Beyond this a sum of many 2^x without a reference could leave f32's range.
constexpr float PLAIN_RANGE = 100.0f;

// Marks what lies outside the problem: no weight.
template <int MF, int NF, class Real>
__device__ __forceinline__ void mask(Real (&x)[MF][NF][4], int lane, int row0, int col0, const Problem& p) {
#pragma unroll
  for (int m = 0; m < MF; m++)
#pragma unroll
    for (int n = 0; n < NF; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        bool inside = row0 + Rows<MF>::place(2 * m + e / 2, lane) < p.rows &&
                      col0 + Columns<NF>::place(2 * n + e % 2, lane) < p.cols;
        if (!inside) x[m][n][e] = -(Real)INFINITY;
      }
}

// Sums of a warp's tile by rows or by columns (`Lines`), dealt out to the lanes as `Lines` says: of the weights 2^x, and with
// AVERAGE of 2^x·y, where `y(m, n, e)` gives what is averaged. Each relative to the largest x of the row or column.
template <bool AVERAGE, class Lines, int MF, int NF, class Real, class Y>
__device__ __forceinline__ void line_sums(const Real (&x)[MF][NF][4], Y y, int lane, Part<Real> (&out)[Lines::OWN]) {
  constexpr int N = Lines::N;
  Real top[N], sum[N] = {}, weighted[N] = {};
#pragma unroll
  for (int i = 0; i < N; i++) top[i] = -(Real)INFINITY;
#pragma unroll
  for (int m = 0; m < MF; m++)
#pragma unroll
    for (int n = 0; n < NF; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) top[Lines::of(m, n, e)] = Max()(top[Lines::of(m, n, e)], x[m][n][e]);
#pragma unroll
  for (int i = 0; i < N; i++) {
    top[i] = Lines::max(top[i]);
    // One without elements, or of NaN alone, is taken as it is.
    if (top[i] == -(Real)INFINITY) top[i] = 0;
  }
#pragma unroll
  for (int m = 0; m < MF; m++)
#pragma unroll
    for (int n = 0; n < NF; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float w = ex2((float)(x[m][n][e] - top[Lines::of(m, n, e)]));
        sum[Lines::of(m, n, e)] += w;
        // What has no weight may be infinite.
        if constexpr (AVERAGE) weighted[Lines::of(m, n, e)] += w == 0.0f ? Real(0) : w * y(m, n, e);
      }
  Lines::reduce(sum, lane, Sum());
  Lines::select(top, lane);
  if constexpr (AVERAGE) Lines::reduce(weighted, lane, Sum());
#pragma unroll
  for (int i = 0; i < Lines::OWN; i++) out[i] = {sum[i] == Real(0) ? -(Real)INFINITY : top[i], sum[i], weighted[i]};
}

// Both directions at once, with one exponential an element: x must be in range for sums without a reference.
template <bool AVERAGE, int MF, int NF, class Real, class Y>
__device__ __forceinline__ void plain_sums(const Real (&x)[MF][NF][4], Y y, int lane, Part<Real> (&by_row)[Rows<MF>::OWN],
                                           Part<Real> (&by_col)[Columns<NF>::OWN]) {
  using R = Rows<MF>;
  using C = Columns<NF>;
  Real rows[R::N] = {}, cols[C::N] = {}, row_w[R::N] = {}, col_w[C::N] = {};
#pragma unroll
  for (int m = 0; m < MF; m++)
#pragma unroll
    for (int n = 0; n < NF; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        float w = ex2((float)x[m][n][e]);
        rows[R::of(m, n, e)] += w, cols[C::of(m, n, e)] += w;
        if constexpr (AVERAGE) {
          Real value = w * y(m, n, e);
          row_w[R::of(m, n, e)] += value, col_w[C::of(m, n, e)] += value;
        }
      }
  R::reduce(rows, lane, Sum());
  C::reduce(cols, lane, Sum());
  if constexpr (AVERAGE) {
    R::reduce(row_w, lane, Sum());
    C::reduce(col_w, lane, Sum());
  }
#pragma unroll
  for (int i = 0; i < R::OWN; i++) by_row[i] = {0, rows[i], row_w[i]};
#pragma unroll
  for (int i = 0; i < C::OWN; i++) by_col[i] = {0, cols[i], col_w[i]};
}

// ---- targets -------------------------------------------------------------------------------------------------------

// Whether a warp's tile of ROWS rows may hold a pair with a target: else its elements need not be looked at.
template <int ROWS>
__device__ __forceinline__ bool may_hold_targets(const Problem& p, const Targets& t, int lane, int row0, int col0, int cols) {
  int2 span = t.spans[col0 >> 7];
  int global = p.first_row + row0;
  bool found = global < col0 + cols && global + ROWS > col0;
  for (int i = row0 + lane; i < row0 + ROWS && i < p.rows; i += 32) {
    int own = t.own[i], other = t.other[i];
    found |= (own >= span.x && own <= span.y) || (other >= span.x && other <= span.y);
  }
  return __any_sync(FULL, found);
}

// Calls f(m, n, e, p_row, p_col) for each of the lane's elements with a target.
template <int MF, int NF, class F>
__device__ __forceinline__ void for_each_target(const Problem& p, const Targets& t, int lane, int row0, int col0, F f) {
  int group[2 * NF];
#pragma unroll
  for (int c = 0; c < 2 * NF; c++) {
    int j = col0 + Columns<NF>::place(c, lane);
    group[c] = j < p.cols ? t.group[j] : 0;
  }
#pragma unroll
  for (int m = 0; m < MF; m++)
#pragma unroll
    for (int half = 0; half < 2; half++) {
      int i = row0 + Rows<MF>::place(2 * m + half, lane);
      if (i >= p.rows) continue;
      int own = t.own[i], other = t.other[i];
#pragma unroll
      for (int n = 0; n < NF; n++)
#pragma unroll
        for (int e = 2 * half; e < 2 * half + 2; e++) {
          int j = col0 + Columns<NF>::place(2 * n + e % 2, lane), g = group[2 * n + e % 2];
          bool diagonal = p.first_row + i == j;
          if (j >= p.cols || (g != own && g != other && !diagonal)) continue;
          float keep = t.keep[i], total = t.column_total[j];
          float mass = (g == own ? keep : 0.0f) + (g == other ? 1.0f - keep : 0.0f);
          float row = mass == 0.0f ? 0.0f : mass * t.share[j];
          float col = total == 0.0f ? (diagonal ? 1.0f : 0.0f) : (row == 0.0f ? 0.0f : row / total);
          f(m, n, e, row, col);
        }
    }
}

__device__ __forceinline__ double warp_sum_wide(double x) {
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) x += __shfl_xor_sync(FULL, x, o);
  return x;
}

// A block's sum in a fixed order; thread 0 gets it. `room`: 32 doubles.
__device__ __forceinline__ double block_sum_wide(double x, double* room) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, warps = (blockDim.x + 31) >> 5;
  x = warp_sum_wide(x);
  if (lane == 0) room[warp] = x;
  __syncthreads();
  double sum = 0.0;
  if (threadIdx.x == 0)
    for (int w = 0; w < warps; w++) sum += room[w];
  __syncthreads();
  return sum;
}

// A number as two f32, and back.
__device__ __forceinline__ void store_wide(float* at, i64 stride, double x) {
  float high = (float)x;
  at[0] = high;
  at[stride] = isinf(high) || high != high ? 0.0f : (float)(x - (double)high);
}
__device__ __forceinline__ double load_wide(const float* at, i64 stride) { return (double)at[0] + (double)at[stride]; }
