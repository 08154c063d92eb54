// The contrastive loss and relational distillation, both directions, without a B×B matrix in memory: embeddings in bf16.
//
// S = scale·a·bᵀ, T_k = u_k·v_kᵀ; p_row, p_col the targets (engine/cpu/src/relational.rs); p̄ the mean over K teachers of
// softmax T_k, of rows and of columns its own.
//   CE = ½[mean_i H(p_row_i, softmax S_i) + mean_j H(p_col_j, softmax Sᵀ_j)]            (CLIP, Radford et al. 2021)
//   KD = ½[mean_i KL(p̄_i ‖ softmax S_i) + the same by columns]     (MobileCLIP, Vasu et al. 2024, eq. 3; CLIP-KD's CRD)
// With r, c the log-sum-exp of S by rows and columns, R_k and U_k the softmax of T_k by rows and columns:
//   Σ_j H-terms of row i = r_i − Σ_j p_row_ij·S_ij,
//   KL of row i, K = 1: Σ_j R_ij·(T − S)_ij − rᵗ_i + r_i;   K > 1: Σ_j p̄_ij·ln p̄_ij − 1/K·Σ_k Σ_j R_k,ij·S_ij + r_i,
//   G = dL/dS = 1/(2B)·[w_ce·(P + Q − p_row − p_col) + w_kd·(P + Q − 1/K·Σ_k (R_k + U_k))],  P = e^(S−r), Q = e^(S−c),
//   da = scale·G·b, db = scale·Gᵀ·a, dscale = Σ G∘(a·bᵀ).
// The sums stream like those of flash attention (Dao et al. 2022), here in both directions:
//   1. `relational_statistics`: each tile of S and T once. Per row and column of a tile: log-sum-exps and the averages under
//      T's softmax. Rows are merged in the block along its columns; columns leave as partials of 64 rows.
//   2. `relational_merge`: partials to statistics, in a fixed order. 1 and 2 run by strips of rows, so that the partials
//      fit a bounded room.
//   3. `relational_finish`: the two losses (after `relational_entropy` where K > 1).
//   4. `relational_gradient`: scale·G of a part of the matrix in bf16, from recomputed tiles; products do the rest.
#include "mma.cuh"
#include "relational_tile.cuh"

// Rows and columns of a block's tile, and what it takes of the inner dimension at a time: 64 bf16 are 128 bytes, the
// width of all banks.
constexpr int ROWS = 128, DEPTH = 64, THREADS = 256, ROW_BYTES = 2 * DEPTH;

// Where 16 bytes of a tile's row lie: rows are rotated, so that ldmatrix's eight rows are in different banks.
__device__ __forceinline__ int swizzled(int row, int chunk) { return row * ROW_BYTES + ((chunk ^ (row & 7)) << 4); }

// A block's products, one after another: tiles of 128 × COLS, each of several sets (a·bᵀ, u_1·v_1ᵀ, ...), the copies of
// later ones under way while one is multiplied. `Walk` says which: `tiles`, `sets`, `set(s)` and `at(tile, row0, col0)`.
// Eight warps, two along the rows and four along the columns, 64 × COLS/4 each.
template <int COLS, class Walk> struct Products {
  static constexpr int MF = 4, NF = COLS / 32, STAGE = (ROWS + COLS) * ROW_BYTES;
  const Operands& sides;
  const Problem& p;
  const Walk& walk;
  unsigned char* room;
  int stages;
  // The copy that is asked for next, and the stages it goes to and that is read next.
  int tile, place, depth, to, from;

  __device__ __forceinline__ Products(const Operands& sides, const Problem& p, const Walk& walk, unsigned char* room,
                                      int stages)
      : sides(sides), p(p), walk(walk), room(room), stages(stages), tile(0), place(0), depth(0), to(0), from(0) {
    for (int i = 0; i < stages - 1; i++) copy_next();
  }

  __device__ __forceinline__ void copy(const Operand& from, int dim, int first, int rows, int count,
                                       unsigned char* stage) const {
#pragma unroll
    for (int i = 0; i < count * (DEPTH / 8) / THREADS; i++) {
      int chunk = threadIdx.x + i * THREADS, row = chunk >> 3, k = depth + (chunk & 7) * 8;
      bool valid = first + row < rows && k < dim;
      const u16* at = (const u16*)from.data + (valid ? (first + row) * from.ld + k : 0);
      cp_async_16(stage + swizzled(row, chunk & 7), at, valid);
    }
  }

  __device__ __forceinline__ void copy_next() {
    if (tile < walk.tiles) {
      int set = walk.set(place), dim = sides.dim[set], row0, col0;
      walk.at(tile, row0, col0);
      unsigned char* stage = room + to * STAGE;
      copy(sides.left[set], dim, row0, p.rows, ROWS, stage);
      copy(sides.right[set], dim, col0, p.cols, COLS, stage + ROWS * ROW_BYTES);
      to = to + 1 == stages ? 0 : to + 1;
      depth += DEPTH;
      if (depth >= dim) {
        depth = 0;
        if (++place == walk.sets) place = 0, tile++;
      }
    }
    cp_async_commit();
  }

  // The next product of the walk; `set` is its set.
  __device__ __forceinline__ void multiply(int set, float (&x)[MF][NF][4]) {
    int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, dim = sides.dim[set];
    int wm = (warp >> 2) * 64, wn = (warp & 3) * (COLS / 4);
#pragma unroll
    for (int m = 0; m < MF; m++)
#pragma unroll
      for (int n = 0; n < NF; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) x[m][n][e] = 0.0f;
    for (int k = 0; k < dim; k += DEPTH) {
      if (stages == 4) cp_async_wait<2>();
      else if (stages == 3) cp_async_wait<1>();
      else cp_async_wait<0>();
      // What was copied is there for all; what the copy below overwrites was read by all.
      __syncthreads();
      copy_next();
      const unsigned char* left = room + from * STAGE;
      const unsigned char* right = left + ROWS * ROW_BYTES;
      from = from + 1 == stages ? 0 : from + 1;
#pragma unroll
      for (int c = 0; c < DEPTH / 8; c += 2) {
        u32 a[MF][4], b[NF][2];
#pragma unroll
        for (int m = 0; m < MF; m++) {
          int row = wm + 16 * m + (lane & 15);
          ldmatrix_x4(a[m], left + swizzled(row, c + (lane >> 4)));
        }
#pragma unroll
        for (int n = 0; n < NF; n += 2) {
          u32 both[4];
          int row = wn + 8 * n + (lane & 7) + (lane >> 4 << 3);
          ldmatrix_x4(both, right + swizzled(row, c + (lane >> 3 & 1)));
          b[n][0] = both[0], b[n][1] = both[1], b[n + 1][0] = both[2], b[n + 1][1] = both[3];
        }
#pragma unroll
        for (int m = 0; m < MF; m++)
#pragma unroll
          for (int n = 0; n < NF; n++) mma_m16n8k16_bf16(x[m][n], a[m], b[n]);
      }
    }
  }
};

// Fixed rows, columns from `first` on; the student, then its teachers.
struct AlongColumns {
  int tiles, sets, row0, first;
  __device__ __forceinline__ int set(int s) const { return s; }
  __device__ __forceinline__ void at(int tile, int& row, int& col) const { row = row0, col = (first + tile) * 128; }
};

// Tiles of a part of the matrix, this block's of all blocks': in bands of BAND rows of tiles, so that blocks at work at one
// time share rows and columns in the cache. The teachers, then the student.
template <int COLS> struct Bands {
  static constexpr int BAND = 12;
  int tiles, sets, teachers, row0, col0, high, wide;
  bool student;
  __device__ __forceinline__ Bands(int teachers, bool student, int row0, int col0, int high, int wide)
      : teachers(teachers), row0(row0), col0(col0), high(high), wide(wide), student(student) {
    int total = high * wide;
    tiles = total <= (int)blockIdx.x ? 0 : (total - blockIdx.x - 1) / gridDim.x + 1;
    sets = teachers + student;
  }
  __device__ __forceinline__ int set(int s) const { return s < teachers ? s + 1 : 0; }
  __device__ __forceinline__ void at(int tile, int& row, int& col) const {
    int i = blockIdx.x + tile * gridDim.x, band = i / (BAND * wide), first = band * BAND;
    int rows = min(BAND, high - first), in_band = i - band * BAND * wide;
    row = row0 + (first + in_band % rows) * ROWS, col = col0 + in_band / rows * COLS;
  }
};

// Statistics of `row_tiles` tiles of rows from row `row0` on: block b has row tile b % row_tiles and part b / row_tiles of
// the columns. Dynamic shared memory: `stages` stages of 32 kB, then 4·128 running parts for each set.
//   row_parts [parts of columns][1 + 2K][128·row_tiles], col_parts [2·row_tiles][1 + 2K][col_stride]: log-sums of S and of
//   each T, then T's averages. dots [blocks][2] (or none): Σ p_row·S, Σ p_col·S, in base 2.
extern "C" __global__ void __launch_bounds__(THREADS)
    relational_statistics(const __grid_constant__ Operands sides, const __grid_constant__ Problem p,
                          const __grid_constant__ Targets targets, View scale, float* row_parts, float* col_parts,
                          double* dots, int row0, int row_tiles, int stages) {
  DYNAMIC_SHARED(room);
  __shared__ double sums[32];
  using Work = Products<128, AlongColumns>;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, K = p.teachers;
  int tile = blockIdx.x % row_tiles, part = blockIdx.x / row_tiles, parts = gridDim.x / row_tiles;
  int wide = (p.cols + 127) / 128, first = (int)((i64)wide * part / parts), last = (int)((i64)wide * (part + 1) / parts);
  Part<float>* held = (Part<float>*)(room + stages * Work::STAGE);
  for (int i = threadIdx.x; i < (1 + K) * 4 * ROWS; i += THREADS) held[i] = {-INFINITY, 0.0f, 0.0f};

  AlongColumns walk = {last - first, 1 + K, row0 + tile * ROWS, first};
  Work work(sides, p, walk, room, stages);
  int half = warp >> 2, quarter = warp & 3;
  float* columns = col_parts + (i64)(2 * tile + half) * (1 + 2 * K) * p.col_stride;
  Statistics<4, 4, float> s = {p, targets, lane, walk.row0 + half * 64, load(scale, 0) * LOG2E, dots != nullptr,
                               held + quarter * ROWS + half * 64, 4 * ROWS, {columns, p, lane}, 0.0f, 0.0f};
  __syncthreads();
  for (int j = first; j < last; j++) {
    int col0 = j * 128 + quarter * 32;
    float x[4][4][4], y[4][4][4];
    work.multiply(0, x);
    s.student(x, col0);
    for (int k = 1; k <= K; k++) {
      work.multiply(k, y);
      s.teacher(k, x, y, col0);
    }
  }
  __syncthreads();
  if (threadIdx.x < ROWS) {
    i64 stride = (i64)row_tiles * ROWS;
    float* out = row_parts + (i64)part * (1 + 2 * K) * stride + tile * ROWS + threadIdx.x;
    write_row(held + threadIdx.x, 4 * ROWS, 4, ROWS, K, out, stride);
  }
  if (dots) {
    double row = block_sum_wide(s.dot_row, sums), col = block_sum_wide(s.dot_col, sums);
    if (threadIdx.x == 0) dots[2 * blockIdx.x] = row, dots[2 * blockIdx.x + 1] = col;
  }
}

// scale·G of the part of the matrix with `high` × `wide` tiles from (row0, col0) on, to g [128·high, ld] in bf16 (whole
// tiles: what lies outside the matrix holds anything), and each block's Σ G∘(a·bᵀ), added to `sums` unless `fresh`.
extern "C" __global__ void __launch_bounds__(THREADS)
    relational_gradient(const __grid_constant__ Operands sides, const __grid_constant__ Problem p,
                        const __grid_constant__ Targets targets, View scale, View dout, const float* row_factors,
                        const float* col_factors, u16* g, i64 ld, double* sums, int row0, int col0, int high, int wide,
                        int fresh, int stages) {
  DYNAMIC_SHARED(room);
  __shared__ double warps[32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Weights w(p, dout, scale);
  // Without a weight the teachers' products are not asked for.
  int teachers = w.teacher == 0.0f ? 0 : p.teachers;
  Bands<128> walk(teachers, true, row0, col0, high, wide);
  Products<128, Bands<128>> work(sides, p, walk, room, stages);
  Factors<float> factors = {row_factors, col_factors};
  double sum = 0.0;
  for (int i = 0; i < walk.tiles; i++) {
    int row, col;
    walk.at(i, row, col);
    row += (warp >> 2) * 64, col += (warp & 3) * 32;
    Slopes<4, 4, float> s = {p, factors, lane, row, col};
    float x[4][4][4], out[4][4][4] = {};
    for (int k = 1; k <= teachers; k++) {
      work.multiply(k, x);
      s.both<true>(k, x, LOG2E, w.teacher, out);
    }
    work.multiply(0, x);
    sum += gradient(s, targets, w, x, out);
#pragma unroll
    for (int m = 0; m < 4; m++)
#pragma unroll
      for (int r = 0; r < 2; r++) {
        u16* to = g + (row - row0 + 16 * m + 8 * r + (lane >> 2)) * ld + col - col0 + 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < 4; n++)
          *(u32*)(to + 8 * n) = pack_bf16(w.scale * out[m][n][2 * r], w.scale * out[m][n][2 * r + 1]);
      }
  }
  sum = block_sum_wide(sum, warps);
  if (threadIdx.x == 0) sums[blockIdx.x] = fresh ? sum : sums[blockIdx.x] + sum;
}

// Each block's Σ p̄·log₂p̄ over all pairs, both directions, K > 1. row_sums [1 + K][row_stride], col_sums.
extern "C" __global__ void __launch_bounds__(THREADS)
    relational_entropy(const __grid_constant__ Operands sides, const __grid_constant__ Problem p, const double* row_sums,
                       const double* col_sums, double* sums, int stages) {
  DYNAMIC_SHARED(room);
  __shared__ double warps[32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  Bands<64> walk(p.teachers, false, 0, 0, (p.rows + 127) / 128, (p.cols + 63) / 64);
  Products<64, Bands<64>> work(sides, p, walk, room, stages);
  double sum = 0.0;
  for (int i = 0; i < walk.tiles; i++) {
    int row, col;
    walk.at(i, row, col);
    row += (warp >> 2) * 64, col += (warp & 3) * 16;
    float x[4][2][4], by_row[4][2][4] = {}, by_col[4][2][4] = {};
    for (int k = 1; k <= p.teachers; k++) {
      work.multiply(k, x);
      add_teacher<4, 2>(p, row_sums + (i64)k * p.row_stride, col_sums + (i64)k * p.col_stride, lane, row, col, x, by_row,
                        by_col);
    }
    sum += mean_entropy(p, lane, row, col, by_row, by_col);
  }
  sum = block_sum_wide(sum, warps);
  if (threadIdx.x == 0) sums[blockIdx.x] = sum;
}
