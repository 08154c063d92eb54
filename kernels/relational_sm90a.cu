// The contrastive and relational loss of relational.cu for compute capability 9.0: the same statistics and gradient, with
// the tensor memory accelerator and a warpgroup's products (hopper.cuh).
//
// A block has tiles of 128 × 128. One warp asks for the copies, up to `stages` stages ahead; two warpgroups have 64 rows of
// the tile each. A cluster of two blocks has tiles one above the other: each copies half of their common columns to both.
#include "hopper.cuh"
#include "relational_tile.cuh"

// Rows and columns of a block's tile, what a stage holds of the inner dimension, and the blocks with tiles side by side.
constexpr int TILE = 128, DEPTH = 64, PAIR = 2, THREADS = 3 * GROUP_THREADS;
constexpr int HALF_BYTES = 64 * 2 * DEPTH, STAGE = 4 * HALF_BYTES, MOST_STAGES = 6;
constexpr int MOST_MAPPED = 5;

// `Maps` of engine/cuda/src/ops/relational.rs: boxes of 128 rows left, of 64 rows right, 64 wide; the inner dimensions.
#ifdef MCPIPE_SHIM
struct Maps {
#else
struct __align__(64) Maps {
#endif
  TensorMap left[MOST_MAPPED], right[MOST_MAPPED];
  int dim[16];
};

// Stages in dynamic shared memory, and when each is full and may be filled again. `bars` holds 2·MOST_STAGES words.
struct Ring {
  unsigned char* room;
  u64* bars;
  int stages, stage;
  u32 phase;

  __device__ __forceinline__ u64* full() const { return bars + stage; }
  __device__ __forceinline__ u64* empty() const { return bars + MOST_STAGES + stage; }
  __device__ __forceinline__ unsigned char* at() const { return room + stage * STAGE; }
  __device__ __forceinline__ void advance() {
    if (++stage == stages) stage = 0, phase ^= 1;
  }

  // All threads of the cluster.
  __device__ __forceinline__ Ring(unsigned char* room, u64* bars, int stages)
      : room(room), bars(bars), stages(stages), stage(0), phase(0) {
    if (threadIdx.x == 0) {
      for (int i = 0; i < stages; i++) {
        barrier_init(bars + i, 1);
        // One arrival of each warp of both groups of the cluster's blocks.
        barrier_init(bars + MOST_STAGES + i, 8 * CLUSTER);
      }
      barrier_init_done();
    }
    cluster_barrier();
  }
};

// One thread: all copies of a walk, one product's tiles after another's.
template <class Walk>
__device__ __forceinline__ void copy_all(Ring ring, const Maps& maps, const Walk& walk) {
  int rank = blockIdx.x % PAIR;
  for (int tile = 0; tile < walk.tiles; tile++) {
    int row, col;
    walk.at(tile, row, col);
    for (int place = 0; place < walk.sets; place++) {
      int set = walk.set(place);
      for (int k = 0; k < maps.dim[set]; k += DEPTH) {
        barrier_wait(ring.empty(), ring.phase ^ 1);
        barrier_expect(ring.full(), STAGE);
        copy_box(&maps.left[set], ring.at(), ring.full(), k, row, false);
#pragma unroll
        for (int half = 0; half < 2; half++)
          if (CLUSTER == 1 || half == rank)
            copy_box(&maps.right[set], ring.at() + (2 + half) * HALF_BYTES, ring.full(), k, col + 64 * half, CLUSTER > 1);
        ring.advance();
      }
    }
  }
}

// A warpgroup's next product of the walk: its 64 rows, all columns.
__device__ __forceinline__ void multiply(Ring& ring, int dim, float (&x)[1][16][4]) {
  int lane = threadIdx.x & 31, group = threadIdx.x / GROUP_THREADS - 1;
  // The stage before is free once its products are done.
  auto leave = [&](int stage) {
    __syncwarp();
    if (lane < CLUSTER) barrier_arrive(ring.bars + MOST_STAGES + stage, lane);
  };
  pin_registers(x[0]);
  int before = -1;
  for (int k = 0; k < dim; k += DEPTH) {
    barrier_wait(ring.full(), ring.phase);
    products_begin();
    const unsigned char *left = ring.at() + group * HALF_BYTES, *right = ring.at() + 2 * HALF_BYTES;
#pragma unroll
    for (int step = 0; step < DEPTH / 16; step++) multiply_tiles(x[0], left, right, step, k + step > 0);
    products_commit();
    if (before >= 0) {
      products_wait<1>();
      leave(before);
    }
    before = ring.stage;
    ring.advance();
  }
  products_wait<0>();
  leave(before);
  pin_registers(x[0]);
}

// Fixed rows, columns from tile `first` on; the student, then its teachers.
struct AlongColumns {
  int tiles, sets, row0, first;
  __device__ __forceinline__ int set(int place) const { return place; }
  __device__ __forceinline__ void at(int tile, int& row, int& col) const { row = row0, col = (first + tile) * TILE; }
};

// This cluster's tiles of a part of the matrix, the block's one of each pair: in bands of BAND pairs, so that blocks at work
// at one time share rows and columns in the cache. The teachers, then the student.
struct Bands {
  static constexpr int BAND = 6;
  int tiles, sets, teachers, row0, col0, pairs, wide;
  __device__ __forceinline__ Bands(int teachers, int row0, int col0, int high, int wide)
      : teachers(teachers), row0(row0), col0(col0), pairs((high + PAIR - 1) / PAIR), wide(wide) {
    int total = pairs * wide, clusters = gridDim.x / PAIR, cluster = blockIdx.x / PAIR;
    tiles = total <= cluster ? 0 : (total - cluster - 1) / clusters + 1;
    sets = teachers + 1;
  }
  __device__ __forceinline__ int set(int place) const { return place < teachers ? place + 1 : 0; }
  __device__ __forceinline__ void at(int tile, int& row, int& col) const {
    int i = blockIdx.x / PAIR + tile * (gridDim.x / PAIR), band = i / (BAND * wide), first = band * BAND;
    int rows = min(BAND, pairs - first), in_band = i - band * BAND * wide;
    row = row0 + ((first + in_band % rows) * PAIR + blockIdx.x % PAIR) * TILE, col = col0 + in_band / rows * TILE;
  }
};

// The columns of a warpgroup's tile: its warps have 16 rows each.
struct GroupColumns {
  Part<float>* room;  // [2][4][128]
  float* columns;
  const Problem& p;
  int turn;

  __device__ __forceinline__ void keep(int set, const Part<float> (&cols)[Columns<16>::OWN], int col0) {
    using C = Columns<16>;
    int lane = threadIdx.x & 31, warp = threadIdx.x / 32 & 3, group = threadIdx.x / GROUP_THREADS, j = threadIdx.x & 127;
    Part<float>* all = room + turn * 4 * TILE;
#pragma unroll
    for (int i = 0; i < C::OWN; i++) all[warp * TILE + C::place(C::first(lane) + i, lane)] = cols[i];
    // Two rooms in turn: who is here has read the other one.
    group_barrier(group);
    turn ^= 1;
    Part<float> sum = all[j];
#pragma unroll
    for (int w = 1; w < 4; w++) sum.add(all[w * TILE + j]);
    write_column(columns, p, set, col0 + j, sum);
  }
};

// The part of dynamic shared memory that tiles may lie in.
__device__ __forceinline__ unsigned char* aligned(unsigned char* room) {
  return room + (1024 - (u32)(size_t)room % 1024) % 1024;
}

// relational_statistics of relational.cu: pairs of tiles of rows, the last one alone where `row_tiles` is odd. Block b has
// row tile b % n of n, row_tiles rounded up to pairs, and part b / n of the columns. Dynamic shared memory: 1 kB to align,
// `stages` stages of 32 kB, the columns' rooms of 4·4·128 parts, 128 running parts for each set. dots [8·blocks][2].
extern "C" __global__ void CLUSTER_OF_TWO __launch_bounds__(THREADS, 1)
    relational_statistics_sm90a(const __grid_constant__ Maps maps, const __grid_constant__ Problem p,
                                const __grid_constant__ Targets targets, View scale, float* row_parts, float* col_parts,
                                double* dots, int row0, int row_tiles, int stages) {
  DYNAMIC_SHARED(shared);
  __shared__ __align__(8) u64 bars[2 * MOST_STAGES];
  unsigned char* room = aligned(shared);
  int lane = threadIdx.x & 31, group = threadIdx.x / GROUP_THREADS - 1, K = p.teachers;
  int padded = (row_tiles + PAIR - 1) / PAIR * PAIR, tile = blockIdx.x % padded;
  int part = blockIdx.x / padded, parts = gridDim.x / padded, wide = (p.cols + TILE - 1) / TILE;
  int first = (int)((i64)wide * part / parts), last = (int)((i64)wide * (part + 1) / parts);
  Part<float>* rooms = (Part<float>*)(room + stages * STAGE);
  Part<float>* held = rooms + 4 * 4 * TILE;

  Ring ring(room, bars, stages);
  AlongColumns walk = {last - first, 1 + K, row0 + tile * TILE, first};
  bool real = tile < row_tiles;
  if (group < 0) {
    fewer_registers<24>();
    if (threadIdx.x == 0) copy_all(ring, maps, walk);
  } else {
    more_registers<240>();
    int warp = threadIdx.x / 32 - 4, own = warp * 16;
    // A warp's rows are its own from here to their end.
    if (lane < 16)
      for (int set = 0; set <= K; set++) held[set * TILE + own + lane] = {-INFINITY, 0.0f, 0.0f};
    __syncwarp();
    float* columns = col_parts + (i64)(2 * tile + group) * (1 + 2 * K) * p.col_stride;
    Statistics<1, 16, float, GroupColumns> s = {
        p, targets, lane, walk.row0 + own, load(scale, 0) * LOG2E, dots != nullptr,
        held + own, TILE, {rooms + group * 2 * 4 * TILE, columns, p, 0}, 0.0f, 0.0f};
    for (int j = first; j < last; j++) {
      float x[1][16][4], y[1][16][4];
      multiply(ring, maps.dim[0], x);
      if (real) s.student(x, j * TILE);
      for (int k = 1; k <= K; k++) {
        multiply(ring, maps.dim[k], y);
        if (real) s.teacher(k, x, y, j * TILE);
      }
    }
    __syncwarp();
    if (real && lane < 16) {
      i64 stride = (i64)row_tiles * TILE;
      int row = own + lane;
      write_row(held + row, TILE, 1, 0, K, row_parts + part * (1 + 2 * K) * stride + tile * TILE + row, stride);
    }
    if (dots) {
      double row = warp_sum_wide(s.dot_row), col = warp_sum_wide(s.dot_col);
      double* to = dots + 2 * (8 * blockIdx.x + warp);
      if (lane == 0) to[0] = row, to[1] = col;
    }
  }
  // The other block may still arrive here.
  cluster_barrier();
}

// relational_gradient of relational.cu.
extern "C" __global__ void CLUSTER_OF_TWO __launch_bounds__(THREADS, 1)
    relational_gradient_sm90a(const __grid_constant__ Maps maps, const __grid_constant__ Problem p,
                              const __grid_constant__ Targets targets, View scale, View dout, const float* row_factors,
                              const float* col_factors, u16* g, i64 ld, double* sums, int row0, int col0, int high,
                              int wide, int fresh, int stages) {
  DYNAMIC_SHARED(shared);
  __shared__ double warps[32];
  __shared__ __align__(8) u64 bars[2 * MOST_STAGES];
  int lane = threadIdx.x & 31, group = threadIdx.x / GROUP_THREADS - 1;
  Weights w(p, dout, scale);
  // Without a weight the teachers' products are not asked for.
  int teachers = w.teacher == 0.0f ? 0 : p.teachers;
  Ring ring(aligned(shared), bars, stages);
  Bands walk(teachers, row0, col0, high, wide);
  Factors<float> factors = {row_factors, col_factors};
  double sum = 0.0;
  if (group < 0) {
    fewer_registers<24>();
    if (threadIdx.x == 0) copy_all(ring, maps, walk);
  } else {
    more_registers<240>();
    int own = group * 64 + (threadIdx.x / 32 & 3) * 16;
    for (int i = 0; i < walk.tiles; i++) {
      int row, col;
      walk.at(i, row, col);
      bool real = row < row0 + high * TILE;
      Slopes<1, 16, float> s = {p, factors, lane, row + own, col};
      float x[1][16][4], out[1][16][4] = {};
      for (int k = 1; k <= teachers; k++) {
        multiply(ring, maps.dim[k], x);
        if (real) s.both<true>(k, x, LOG2E, w.teacher, out);
      }
      multiply(ring, maps.dim[0], x);
      if (!real) continue;
      sum += gradient(s, targets, w, x, out);
#pragma unroll
      for (int r = 0; r < 2; r++) {
        u16* to = g + (row - row0 + own + 8 * r + (lane >> 2)) * ld + col - col0 + 2 * (lane & 3);
#pragma unroll
        for (int n = 0; n < 16; n++)
          *(u32*)(to + 8 * n) = pack_bf16(w.scale * out[0][n][2 * r], w.scale * out[0][n][2 * r + 1]);
      }
    }
  }
  __syncthreads();
  sum = block_sum_wide(sum, warps);
  if (threadIdx.x == 0) sums[blockIdx.x] = fresh ? sum : sums[blockIdx.x] + sum;
  cluster_barrier();
}
