// What a warp does with its tile of logits, once the products are there: statistics forward, the gradient backward, the
// entropy of several teachers' mean. Formulas in relational.cu.
#pragma once
#include "relational.cuh"

// ---- forward: statistics -------------------------------------------------------------------------------------------

// Where a column's statistics over some rows go: `columns`, [quantity][col_stride].
template <class Real>
__device__ __forceinline__ void write_column(Real* columns, const Problem& p, int set, i64 j, const Part<Real>& part) {
  columns[set * (i64)p.col_stride + j] = part.log_sum();
  if (set > 0) columns[(p.teachers + set) * (i64)p.col_stride + j] = part.average();
}

// Of the warp's rows, each by itself: what `Statistics` does with columns where a warp has all rows of a partial.
template <int NF, class Real> struct WarpColumns {
  Real* columns;
  const Problem& p;
  int lane;

  __device__ __forceinline__ void keep(int set, const Part<Real> (&cols)[Columns<NF>::OWN], int col0) const {
    if (!Columns<NF>::mine(lane)) return;
#pragma unroll
    for (int i = 0; i < Columns<NF>::OWN; i++)
      write_column(columns, p, set, col0 + Columns<NF>::place(Columns<NF>::first(lane) + i, lane), cols[i]);
  }
};

// A warp's share of a block that walks along columns for fixed rows.
template <int MF, int NF, class Real, class Kept = WarpColumns<NF, Real>> struct Statistics {
  using Tile = Real[MF][NF][4];

  const Problem& p;
  const Targets& t;
  int lane;
  int row0;          // the warp's first row
  Real scale;        // of the cosines, times log₂e
  bool dots;         // whether to sum targets times logits
  Part<Real>* room;  // [set][...][rows]: the warp's rows, running
  int room_stride;   // from one set to the next
  Kept columns;      // what becomes of the columns
  Real dot_row, dot_col;

  __device__ __forceinline__ void keep_rows(int set, const Part<Real> (&rows)[Rows<MF>::OWN]) {
    if (!Rows<MF>::mine(lane)) return;
#pragma unroll
    for (int i = 0; i < Rows<MF>::OWN; i++) {
      Part<Real>* at = room + set * room_stride + Rows<MF>::place(Rows<MF>::first(lane) + i, lane);
      Part<Real> held = *at;
      held.add(rows[i]);
      *at = held;
    }
  }

  template <bool AVERAGE, class Y> __device__ __forceinline__ void sums(int set, Tile& x, Y y, int col0) {
    Part<Real> rows[Rows<MF>::OWN], cols[Columns<NF>::OWN];
    if (sizeof(Real) == 4 && plain(x, col0)) {
      plain_sums<AVERAGE, MF, NF>(x, y, lane, rows, cols);
      keep_rows(set, rows);
    } else {
      mask<MF, NF>(x, lane, row0, col0, p);
      line_sums<AVERAGE, Rows<MF>, MF, NF>(x, y, lane, rows);
      keep_rows(set, rows);
      line_sums<AVERAGE, Columns<NF>, MF, NF>(x, y, lane, cols);
    }
    columns.keep(set, cols, col0);
  }

  // Whether plain sums do: no element out of the problem or out of range.
  __device__ __forceinline__ bool plain(const Tile& x, int col0) const {
    bool inside = row0 + 16 * MF <= p.rows && col0 + 8 * NF <= p.cols;
    float largest = 0.0f;
#pragma unroll
    for (int m = 0; m < MF; m++)
#pragma unroll
      for (int n = 0; n < NF; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) largest = fmaxf(largest, fabsf((float)x[m][n][e]));
    return __all_sync(FULL, inside && largest <= PLAIN_RANGE);
  }

  // Cosines in, logits in base 2 out.
  __device__ __forceinline__ void student(Tile& x, int col0) {
#pragma unroll
    for (int m = 0; m < MF; m++)
#pragma unroll
      for (int n = 0; n < NF; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) x[m][n][e] *= scale;
    if (dots && may_hold_targets<16 * MF>(p, t, lane, row0, col0, 8 * NF)) {
      for_each_target<MF, NF>(p, t, lane, row0, col0, [&](int m, int n, int e, float row, float col) {
        if (row != 0.0f) dot_row += row * x[m][n][e];
        if (col != 0.0f) dot_col += col * x[m][n][e];
      });
    }
    sums<false>(0, x, [](int, int, int) { return Real(0); }, col0);
  }

  // A teacher's logits y, where x holds the student's as `student` left them.
  __device__ __forceinline__ void teacher(int set, const Tile& x, Tile& y, int col0) {
    const Real log2e = sizeof(Real) == 8 ? (Real)LOG2E_WIDE : (Real)LOG2E;
#pragma unroll
    for (int m = 0; m < MF; m++)
#pragma unroll
      for (int n = 0; n < NF; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) y[m][n][e] *= log2e;
    // Under one teacher's softmax T − S is averaged, under each of several −S.
    Real share = p.all_teachers == 1 ? Real(1) : Real(0);
    sums<true>(set, y, [&](int m, int n, int e) { return share * y[m][n][e] - x[m][n][e]; }, col0);
  }
};

// Merges what `count` warps hold of a row, `stride` apart, and writes it: [quantity][row_stride].
template <class Real>
__device__ __forceinline__ void write_row(const Part<Real>* room, int set_stride, int count, int stride, int teachers,
                                          Real* out, i64 row_stride) {
  for (int set = 0; set <= teachers; set++) {
    Part<Real> sum = room[(i64)set * set_stride];
    for (int w = 1; w < count; w++) sum.add(room[(i64)set * set_stride + w * stride]);
    out[set * row_stride] = sum.log_sum();
    if (set > 0) out[(teachers + set) * row_stride] = sum.average();
  }
}

// ---- backward ------------------------------------------------------------------------------------------------------

// Log-sums of rows and columns in base 2, +∞ past the end; for f32, too, 2^(λ − μ) of a row and 2^(μ − λ) of a column with
// a common μ (NaN where it is out of range), so that a column's softmax is a row's times two factors.
template <class Real> struct Factors;
template <> struct Factors<float> {
  const float *row, *col;  // [set][2][stride]
};
template <> struct Factors<double> {
  const double *row, *col;  // [set][stride]
};

template <int MF, int NF, class Real> struct Slopes {
  using Tile = Real[MF][NF][4];
  using Sums = float[MF][NF][4];

  const Problem& p;
  const Factors<Real>& f;
  int lane, row0, col0;

  // to (+)= weight·(softmax by rows + softmax by columns), of the logits in base 2 unit·x.
  template <bool ADD>
  __device__ __forceinline__ void both(int set, const Tile& x, Real unit, float weight, Sums& to) const {
    Real row_sum[2 * MF];
    if constexpr (sizeof(Real) == 4) {
      const float* row = f.row + (i64)set * 2 * p.row_stride + row0;
      const float* col = f.col + (i64)set * 2 * p.col_stride + col0;
      float row_factor[2 * MF], col_factor[2 * NF];
      bool good = true;
#pragma unroll
      for (int r = 0; r < 2 * MF; r++) {
        int i = Rows<MF>::place(r, lane);
        row_sum[r] = row[i], row_factor[r] = weight * row[p.row_stride + i];
        good &= row_factor[r] == row_factor[r];
      }
#pragma unroll
      for (int c = 0; c < 2 * NF; c++) {
        col_factor[c] = col[p.col_stride + Columns<NF>::place(c, lane)];
        good &= col_factor[c] == col_factor[c];
      }
      if (__all_sync(FULL, good)) {
#pragma unroll
        for (int m = 0; m < MF; m++)
#pragma unroll
          for (int n = 0; n < NF; n++)
#pragma unroll
            for (int e = 0; e < 4; e++) {
              float share = ex2(fmaf(x[m][n][e], unit, -row_sum[2 * m + e / 2]));
              float more = fmaf(row_factor[2 * m + e / 2], col_factor[2 * n + e % 2], weight);
              to[m][n][e] = ADD ? fmaf(share, more, to[m][n][e]) : share * more;
            }
        return;
      }
    } else {
#pragma unroll
      for (int r = 0; r < 2 * MF; r++)
        row_sum[r] = f.row[(i64)set * p.row_stride + row0 + Rows<MF>::place(r, lane)];
    }
    Real col_sum[2 * NF];
#pragma unroll
    for (int c = 0; c < 2 * NF; c++) {
      i64 at = (i64)set * (sizeof(Real) == 4 ? 2 : 1) * p.col_stride + col0 + Columns<NF>::place(c, lane);
      col_sum[c] = f.col[at];
    }
#pragma unroll
    for (int m = 0; m < MF; m++)
#pragma unroll
      for (int n = 0; n < NF; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          Real logit = x[m][n][e] * unit;
          float share = ex2((float)(logit - row_sum[2 * m + e / 2])) + ex2((float)(logit - col_sum[2 * n + e % 2]));
          to[m][n][e] = ADD ? fmaf(weight, share, to[m][n][e]) : weight * share;
        }
  }
};

// Weights of a tile's softmaxes and targets in G.
struct Weights {
  float student, teacher, target, scale;

  // From the gradients of CE and KD.
  __device__ __forceinline__ Weights(const Problem& p, const View& dout, const View& scale_) {
    float each = 0.5f / p.cols, ce = load(dout, 0), kd = p.teachers > 0 ? load(dout, 1) : 0.0f;
    student = each * (ce + kd), teacher = p.teachers > 0 ? -each * kd / p.teachers : 0.0f;
    target = each * ce, scale = load(scale_, 0);
  }
};

// G of a tile: added to `g`, the teachers' part. Returns the lane's Σ G∘cosine.
template <int MF, int NF, class Real>
__device__ __forceinline__ Real gradient(const Slopes<MF, NF, Real>& s, const Targets& t, const Weights& w,
                                         const Real (&cosines)[MF][NF][4], float (&g)[MF][NF][4]) {
  Real unit = sizeof(Real) == 8 ? (Real)((double)w.scale * LOG2E_WIDE) : (Real)(w.scale * LOG2E);
  s.template both<true>(0, cosines, unit, w.student, g);
  if (w.target != 0.0f && may_hold_targets<16 * MF>(s.p, t, s.lane, s.row0, s.col0, 8 * NF)) {
    for_each_target<MF, NF>(s.p, t, s.lane, s.row0, s.col0,
                            [&](int m, int n, int e, float row, float col) { g[m][n][e] -= w.target * (row + col); });
  }
  // Past the edge a cosine of 0 may be far above a row's log-sum.
  if (s.row0 + 16 * MF > s.p.rows || s.col0 + 8 * NF > s.p.cols) {
#pragma unroll
    for (int m = 0; m < MF; m++)
#pragma unroll
      for (int n = 0; n < NF; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          bool inside = s.row0 + Rows<MF>::place(2 * m + e / 2, s.lane) < s.p.rows &&
                        s.col0 + Columns<NF>::place(2 * n + e % 2, s.lane) < s.p.cols;
          if (!inside) g[m][n][e] = 0.0f;
        }
  }
  Real sum = 0;
#pragma unroll
  for (int m = 0; m < MF; m++)
#pragma unroll
    for (int n = 0; n < NF; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sum += g[m][n][e] * cosines[m][n][e];
  return sum;
}

// ---- several teachers' mean ----------------------------------------------------------------------------------------

// Adds a teacher's softmax by rows and by columns.
template <int MF, int NF, class Real>
__device__ __forceinline__ void add_teacher(const Problem& p, const double* row, const double* col, int lane, int row0,
                                            int col0, const Real (&x)[MF][NF][4], float (&by_row)[MF][NF][4],
                                            float (&by_col)[MF][NF][4]) {
  const Real log2e = sizeof(Real) == 8 ? (Real)LOG2E_WIDE : (Real)LOG2E;
  Real row_sum[2 * MF], col_sum[2 * NF];
#pragma unroll
  for (int r = 0; r < 2 * MF; r++) row_sum[r] = (Real)row[row0 + Rows<MF>::place(r, lane)];
#pragma unroll
  for (int c = 0; c < 2 * NF; c++) col_sum[c] = (Real)col[col0 + Columns<NF>::place(c, lane)];
#pragma unroll
  for (int m = 0; m < MF; m++)
#pragma unroll
    for (int n = 0; n < NF; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        Real logit = x[m][n][e] * log2e;
        by_row[m][n][e] += ex2((float)(logit - row_sum[2 * m + e / 2]));
        by_col[m][n][e] += ex2((float)(logit - col_sum[2 * n + e % 2]));
      }
}

// The lane's Σ p̄·log₂p̄ of both directions, from the teachers' sums.
template <int MF, int NF>
__device__ __forceinline__ float mean_entropy(const Problem& p, int lane, int row0, int col0,
                                              const float (&by_row)[MF][NF][4], const float (&by_col)[MF][NF][4]) {
  float share = 1.0f / p.teachers, sum = 0.0f;
#pragma unroll
  for (int m = 0; m < MF; m++)
#pragma unroll
    for (int n = 0; n < NF; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        bool inside = row0 + Rows<MF>::place(2 * m + e / 2, lane) < p.rows &&
                      col0 + Columns<NF>::place(2 * n + e % 2, lane) < p.cols;
        float a = share * by_row[m][n][e], b = share * by_col[m][n][e];
        if (inside && !(a < LEAST_NORMAL)) sum += a * lg2(a);
        if (inside && !(b < LEAST_NORMAL)) sum += b * lg2(b);
      }
  return sum;
}
