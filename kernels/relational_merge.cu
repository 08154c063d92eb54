// Around the tiles of the contrastive and relational loss (relational.cu): embeddings in bf16, partials to statistics,
// statistics to losses. All sums in f64 and in a fixed order.
//
// Statistics lie as [1 + 2K quantities][2][stride]: the log-sum of S, of each T, then each T's average, in base 2, each as
// the sum of two f32.
#include "relational.cuh"

// x [rows, dim] to bf16 rows of `ld`, zeros behind.
extern "C" __global__ void __launch_bounds__(256) relational_round(View x, u16* y, int rows, int dim, int ld) {
  i64 i = 8 * ((i64)blockIdx.x * blockDim.x + threadIdx.x);
  if (i >= (i64)rows * ld) return;
  i64 row = i / ld;
  int k = (int)(i - row * ld);
  float v[8];
  if (dim % 8 == 0) {
    load8(x, row * dim + k, v);
  } else {
#pragma unroll
    for (int e = 0; e < 8; e++) v[e] = k + e < dim ? load(x, row * dim + k + e) : 0.0f;
  }
  *(uint4*)(y + i) = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}

// The least and the largest group of each 128 columns.
extern "C" __global__ void __launch_bounds__(128) relational_spans(const int* group, int2* spans, int cols) {
  __shared__ int least[4], most[4];
  int j = blockIdx.x * 128 + threadIdx.x, lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int lo = 0x7fffffff, hi = -0x7fffffff - 1;
  if (j < cols) lo = hi = group[j];
#pragma unroll
  for (int o = 16; o > 0; o >>= 1) {
    lo = min(lo, __shfl_xor_sync(FULL, lo, o));
    hi = max(hi, __shfl_xor_sync(FULL, hi, o));
  }
  if (lane == 0) least[warp] = lo, most[warp] = hi;
  __syncthreads();
  if (threadIdx.x == 0)
    spans[blockIdx.x] = make_int2(min(min(least[0], least[1]), min(least[2], least[3])),
                                  max(max(most[0], most[1]), max(most[2], most[3])));
}

// Warps that share the partials of a row or column.
constexpr int MERGERS = 8;

// Running log-sum and average of partials.
struct Merged {
  double top, sum, weighted;

  __device__ __forceinline__ void add(const Merged& p) {
    if (p.top == -(double)INFINITY) return;
    // A NaN is no larger than anything, and stays in the sums.
    double high = p.top > top ? p.top : top;
    double mine = top == -(double)INFINITY ? 0.0 : ex2((float)(top - high)), w = ex2((float)(p.top - high));
    sum = sum * mine + w * p.sum, weighted = weighted * mine + w * p.weighted, top = high;
  }
  __device__ __forceinline__ double log_sum() const { return top == -(double)INFINITY && sum == sum ? top : top + log2(sum); }
  __device__ __forceinline__ double average() const { return sum == 0.0 ? 0.0 : weighted / sum; }
};

// Merges `count` partials [1 + 2K][stride] of the row or column i of n into statistics, at `teacher` and on of their K_all;
// S's too if `student`. Adds to what is there unless `fresh`. Each warp of the block takes every eighth partial of the same
// 32 rows or columns; `room` holds what they found.
template <class Real>
__device__ __forceinline__ void merge(const Real* parts, int count, i64 stride, int teachers, float* state, i64 state_stride,
                                      int teacher, int all, bool student, bool fresh, i64 i, i64 n,
                                      Merged (&room)[MERGERS][32]) {
  i64 part = (1 + 2 * teachers) * stride;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  for (int q = student ? 0 : 1; q <= teachers; q++) {
    Merged m = {-(double)INFINITY, 0.0, 0.0};
    if (i < n) {
#pragma unroll 4
      for (int b = warp; b < count; b += MERGERS) {
        const Real* from = parts + b * part + i;
        m.add({(double)from[q * stride], 1.0, q == 0 ? 0.0 : (double)from[(teachers + q) * stride]});
      }
    }
    room[warp][lane] = m;
    __syncthreads();
    if (warp == 0 && i < n) {
      // Places among the quantities: log-sum, average.
      float* to = state + 2 * (q == 0 ? 0 : teacher + q) * state_stride;
      float* mean = state + 2 * (all + teacher + q) * state_stride;
      if (!fresh) m = {load_wide(to, state_stride), 1.0, q == 0 ? 0.0 : load_wide(mean, state_stride)};
      for (int w = fresh ? 1 : 0; w < MERGERS; w++) m.add(room[w][lane]);
      store_wide(to, state_stride, m.log_sum());
      if (q > 0) store_wide(mean, state_stride, m.average());
    }
    __syncthreads();
  }
}

// After a strip of relational_statistics: blocks below `col_blocks` merge columns, the next ones rows, the last one sums
// the dots. `wide` partials are f64.
extern "C" __global__ void __launch_bounds__(256)
    relational_merge(const __grid_constant__ Problem p, const void* row_parts, int row_count, int strip_rows, int row0,
                     const void* col_parts, int col_count, float* row_state, float* col_state, const double* dots,
                     int dot_count, float* scalars, int teacher, int fresh, int wide, int col_blocks) {
  __shared__ double room[32];
  if (blockIdx.x + 1 == gridDim.x) {
    if (!dots) return;
    double row = 0.0, col = 0.0;
    for (int i = threadIdx.x; i < dot_count; i += blockDim.x) row += dots[2 * i], col += dots[2 * i + 1];
    row = block_sum_wide(row, room), col = block_sum_wide(col, room);
    if (threadIdx.x == 0) {
      store_wide(scalars, 1, fresh ? row : load_wide(scalars, 1) + row);
      store_wide(scalars + 2, 1, fresh ? col : load_wide(scalars + 2, 1) + col);
    }
    return;
  }
  __shared__ Merged found[MERGERS][32];
  bool student = teacher == 0;
  int all = p.all_teachers, lane = threadIdx.x & 31;
  if ((int)blockIdx.x < col_blocks) {
    i64 j = (i64)blockIdx.x * 32 + lane;
    if (wide) {
      merge((const double*)col_parts, col_count, p.col_stride, p.teachers, col_state + j, p.col_stride, teacher, all, student,
            fresh, j, p.cols, found);
    } else {
      merge((const float*)col_parts, col_count, p.col_stride, p.teachers, col_state + j, p.col_stride, teacher, all, student,
            fresh, j, p.cols, found);
    }
  } else {
    i64 i = (i64)(blockIdx.x - col_blocks) * 32 + lane, n = min(strip_rows, p.rows - row0);
    float* state = row_state + row0 + i;
    if (wide) {
      merge((const double*)row_parts, row_count, strip_rows, p.teachers, state, p.row_stride, teacher, all, student, true, i, n,
            found);
    } else {
      merge((const float*)row_parts, row_count, strip_rows, p.teachers, state, p.row_stride, teacher, all, student, true, i, n,
            found);
    }
  }
}

// Merges the columns' statistics of all ranks, [ranks][1 + 2K][2][col_stride], in their order.
extern "C" __global__ void __launch_bounds__(256)
    relational_merge_ranks(const __grid_constant__ Problem p, const float* from, int ranks, float* to) {
  i64 j = (i64)blockIdx.x * blockDim.x + threadIdx.x, stride = p.col_stride;
  if (j >= p.cols) return;
  for (int q = 0; q <= p.teachers; q++) {
    Merged m = {-(double)INFINITY, 0.0, 0.0};
    for (int r = 0; r < ranks; r++) {
      const float* one = from + r * (1 + 2 * p.teachers) * 2 * stride + j;
      m.add({load_wide(one + 2 * q * stride, stride), 1.0,
             q == 0 ? 0.0 : load_wide(one + 2 * (p.teachers + q) * stride, stride)});
    }
    store_wide(to + 2 * q * stride + j, stride, m.log_sum());
    if (q > 0) store_wide(to + 2 * (p.teachers + q) * stride + j, stride, m.average());
  }
}

// Σ over the rows held and the columns of the same numbers of what the losses are made of; CE and KD to `out`. Writes the
// mean log-sum of S and of each T over the rows held to scalars[4 + q], a reference for `relational_factors`. One block.
extern "C" __global__ void __launch_bounds__(1024)
    relational_finish(const __grid_constant__ Problem p, const float* row_state, const float* col_state, float* scalars,
                      const double* entropies, int entropy_count, View out) {
  __shared__ double room[32];
  int K = p.teachers;
  double ce = 0.0, kd = 0.0;
  for (int side = 0; side < 2; side++) {
    const float* state = side == 0 ? row_state : col_state + p.first_row;
    i64 stride = side == 0 ? p.row_stride : p.col_stride;
#pragma unroll 4
    for (int i = threadIdx.x; i < p.rows; i += blockDim.x) {
      double log_sum = load_wide(state + i, stride), mean = 0.0;
      for (int k = 1; k <= K; k++) {
        mean += load_wide(state + i + 2 * (K + k) * stride, stride);
        // One teacher: its average is of T − S; its own log-sum stands for the entropy.
        if (K == 1) mean -= load_wide(state + i + 2 * k * stride, stride);
      }
      ce += log_sum;
      if (K > 0) kd += mean / K + log_sum;
    }
  }
  for (int i = threadIdx.x; i < entropy_count; i += blockDim.x) kd += entropies[i];
  ce = block_sum_wide(ce, room), kd = block_sum_wide(kd, room);
  double each = 0.5 * LN2 / p.cols;
  if (threadIdx.x == 0) {
    store(out, 0, (float)(each * (ce - load_wide(scalars, 1) - load_wide(scalars + 2, 1))));
    store(out, 1, (float)(each * kd));
  }
  for (int q = 0; q <= K; q++) {
    double sum = 0.0;
    for (int i = threadIdx.x; i < p.rows; i += blockDim.x) sum += row_state[2 * q * (i64)p.row_stride + i];
    sum = block_sum_wide(sum, room);
    if (threadIdx.x == 0) scalars[4 + q] = (float)(sum / p.rows);
  }
}

// Factors of kernels/relational_tile.cuh from the statistics: f32 [1 + K][2][stride] (λ and 2^±(λ−μ)) where `narrow` is
// given, f64 [1 + K][stride] where `wide` is. `sign` is 1 for rows, −1 for columns.
extern "C" __global__ void __launch_bounds__(256)
    relational_factors(const float* state, const float* scalars, float* narrow, double* wide, int n, int stride, int sign) {
  i64 i = (i64)blockIdx.x * blockDim.x + threadIdx.x, q = blockIdx.y;
  if (i >= stride) return;
  double log_sum = i < n ? load_wide(state + 2 * q * stride + i, stride) : (double)INFINITY;
  if (wide) wide[q * stride + i] = log_sum;
  if (!narrow) return;
  float away = (float)(log_sum - (double)scalars[4 + q]);
  narrow[2 * q * stride + i] = (float)log_sum;
  // Within 2^±30 a softmax that underflows by rows is below 2^−66 by columns, too.
  narrow[(2 * q + 1) * stride + i] = i >= n ? 0.0f : (fabsf(away) <= 30.0f ? ex2(sign * away) : NAN);
}

// dscale (+)= Σ of the blocks' sums. One block.
extern "C" __global__ void __launch_bounds__(256) relational_scale_vjp(const double* sums, int count, View dscale, int accumulate) {
  __shared__ double room[32];
  double sum = 0.0;
  for (int i = threadIdx.x; i < count; i += blockDim.x) sum += sums[i];
  sum = block_sum_wide(sum, room);
  if (threadIdx.x == 0) give(dscale, 0, (float)sum, accumulate);
}
