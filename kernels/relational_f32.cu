// The contrastive and relational loss (relational.cu) for embeddings in f32: products are summed 32 at a time in f32 and
// on in f64, logits stay in f64, because an error of a logit of 100 is an error of its exponential.
#include "relational_tile.cuh"

// Tiles of 64 × 64; eight warps side by side, 64 × 8 each.
constexpr int SIDE = 64, DEPTH = 32, THREADS = 256, PITCH = DEPTH + 4;

// One product's tile: x = left·rightᵀ from (row0, col0) on. Rows are padded so that the rows a warp reads lie in different
// banks.
__device__ __forceinline__ void multiply(const Operands& sides, const Problem& p, int set, int row0, int col0,
                                         float (&left)[SIDE * PITCH], float (&right)[SIDE * PITCH],
                                         double (&x)[4][1][4]) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, dim = sides.dim[set];
#pragma unroll
  for (int m = 0; m < 4; m++)
#pragma unroll
    for (int e = 0; e < 4; e++) x[m][0][e] = 0.0;
  const float *a = (const float*)sides.left[set].data, *b = (const float*)sides.right[set].data;
  i64 lda = sides.left[set].ld, ldb = sides.right[set].ld;
  for (int first = 0; first < dim; first += DEPTH) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < SIDE * DEPTH / THREADS; i++) {
      int at = threadIdx.x + i * THREADS, row = at / DEPTH, k = at % DEPTH;
      bool inner = first + k < dim;
      left[row * PITCH + k] = inner && row0 + row < p.rows ? a[(row0 + row) * lda + first + k] : 0.0f;
      right[row * PITCH + k] = inner && col0 + row < p.cols ? b[(col0 + row) * ldb + first + k] : 0.0f;
    }
    __syncthreads();
    float sum[4][4] = {};
#pragma unroll
    for (int k = 0; k < DEPTH; k += 4) {
      float4 v[2];
#pragma unroll
      for (int c = 0; c < 2; c++) v[c] = *(const float4*)&right[(8 * warp + Columns<1>::place(c, lane)) * PITCH + k];
#pragma unroll
      for (int r = 0; r < 8; r++) {
        float4 u = *(const float4*)&left[Rows<4>::place(r, lane) * PITCH + k];
#pragma unroll
        for (int c = 0; c < 2; c++) {
          float& s = sum[r / 2][2 * (r % 2) + c];
          s = fmaf(u.x, v[c].x, s), s = fmaf(u.y, v[c].y, s), s = fmaf(u.z, v[c].z, s), s = fmaf(u.w, v[c].w, s);
        }
      }
    }
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) x[m][0][e] += sum[m][e];
  }
}

// relational_statistics for f32: rows by tiles of 64, col_parts [row_tiles][1 + 2K][col_stride], all partials f64. Dynamic
// shared memory: 8·64 running parts for each set.
extern "C" __global__ void __launch_bounds__(THREADS)
    relational_statistics_f32(const __grid_constant__ Operands sides, const __grid_constant__ Problem p,
                              const __grid_constant__ Targets targets, View scale, double* row_parts, double* col_parts,
                              double* dots, int row0, int row_tiles) {
  DYNAMIC_SHARED(room);
  __shared__ __align__(16) float left[SIDE * PITCH], right[SIDE * PITCH];
  __shared__ double sums[32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, K = p.teachers;
  int tile = blockIdx.x % row_tiles, part = blockIdx.x / row_tiles, parts = gridDim.x / row_tiles;
  int wide = (p.cols + SIDE - 1) / SIDE, first = (int)((i64)wide * part / parts);
  int last = (int)((i64)wide * (part + 1) / parts);
  Part<double>* held = (Part<double>*)room;
  for (int i = threadIdx.x; i < (1 + K) * 8 * SIDE; i += THREADS) held[i] = {-(double)INFINITY, 0.0, 0.0};
  __syncthreads();

  int row = row0 + tile * SIDE;
  double* columns = col_parts + (i64)tile * (1 + 2 * K) * p.col_stride;
  Statistics<4, 1, double> s = {p, targets, lane, row, (double)load(scale, 0) * LOG2E_WIDE, dots != nullptr,
                                held + warp * SIDE, 8 * SIDE, {columns, p, lane}, 0.0, 0.0};
  for (int j = first; j < last; j++) {
    double x[4][1][4], y[4][1][4];
    multiply(sides, p, 0, row, j * SIDE, left, right, x);
    s.student(x, j * SIDE + 8 * warp);
    for (int k = 1; k <= K; k++) {
      multiply(sides, p, k, row, j * SIDE, left, right, y);
      s.teacher(k, x, y, j * SIDE + 8 * warp);
    }
  }
  __syncthreads();
  if (threadIdx.x < SIDE) {
    i64 stride = (i64)row_tiles * SIDE;
    double* out = row_parts + (i64)part * (1 + 2 * K) * stride + tile * SIDE + threadIdx.x;
    write_row(held + threadIdx.x, 8 * SIDE, 8, SIDE, K, out, stride);
  }
  if (dots) {
    double row_sum = block_sum_wide(s.dot_row, sums), col_sum = block_sum_wide(s.dot_col, sums);
    if (threadIdx.x == 0) dots[2 * blockIdx.x] = row_sum, dots[2 * blockIdx.x + 1] = col_sum;
  }
}

// relational_gradient for f32: g [64·high, ld] in f32.
extern "C" __global__ void __launch_bounds__(THREADS)
    relational_gradient_f32(const __grid_constant__ Operands sides, const __grid_constant__ Problem p,
                            const __grid_constant__ Targets targets, View scale, View dout, const double* row_sums,
                            const double* col_sums, float* g, i64 ld, double* sums, int row0, int col0, int high, int wide,
                            int fresh) {
  __shared__ __align__(16) float left[SIDE * PITCH], right[SIDE * PITCH];
  __shared__ double warps[32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Weights w(p, dout, scale);
  int teachers = w.teacher == 0.0f ? 0 : p.teachers;
  Factors<double> factors = {row_sums, col_sums};
  double sum = 0.0;
  for (int i = blockIdx.x; i < high * wide; i += gridDim.x) {
    int row = row0 + i % high * SIDE, col = col0 + i / high * SIDE;
    Slopes<4, 1, double> s = {p, factors, lane, row, col + 8 * warp};
    double x[4][1][4];
    float out[4][1][4] = {};
    for (int k = 1; k <= teachers; k++) {
      multiply(sides, p, k, row, col, left, right, x);
      s.both<true>(k, x, LOG2E_WIDE, w.teacher, out);
    }
    multiply(sides, p, 0, row, col, left, right, x);
    sum += gradient(s, targets, w, x, out);
#pragma unroll
    for (int r = 0; r < 8; r++) {
      float* to = g + (row - row0 + Rows<4>::place(r, lane)) * ld + col - col0 + 8 * warp + 2 * (lane & 3);
      *(float2*)to = make_float2(w.scale * out[r / 2][0][2 * (r % 2)], w.scale * out[r / 2][0][2 * (r % 2) + 1]);
    }
  }
  sum = block_sum_wide(sum, warps);
  if (threadIdx.x == 0) sums[blockIdx.x] = fresh ? sum : sums[blockIdx.x] + sum;
}

// relational_entropy for f32.
extern "C" __global__ void __launch_bounds__(THREADS)
    relational_entropy_f32(const __grid_constant__ Operands sides, const __grid_constant__ Problem p, const double* row_sums,
                           const double* col_sums, double* sums) {
  __shared__ __align__(16) float left[SIDE * PITCH], right[SIDE * PITCH];
  __shared__ double warps[32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  int high = (p.rows + SIDE - 1) / SIDE, wide = (p.cols + SIDE - 1) / SIDE;
  double sum = 0.0;
  for (int i = blockIdx.x; i < high * wide; i += gridDim.x) {
    int row = i % high * SIDE, col = i / high * SIDE;
    double x[4][1][4];
    float by_row[4][1][4] = {}, by_col[4][1][4] = {};
    for (int k = 1; k <= p.teachers; k++) {
      multiply(sides, p, k, row, col, left, right, x);
      add_teacher<4, 1>(p, row_sums + (i64)k * p.row_stride, col_sums + (i64)k * p.col_stride, lane, row, col + 8 * warp, x,
                        by_row, by_col);
    }
    sum += mean_entropy(p, lane, row, col + 8 * warp, by_row, by_col);
  }
  sum = block_sum_wide(sum, warps);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
