// What compute capability 9.0 has for matrix products (files *_sm90a.cu): tiles copied by the tensor memory accelerator,
// barriers in shared memory that count its bytes, and the products of a warpgroup (four warps) from shared memory; for the
// shim the same by the documented layouts. PTX ISA: mbarrier, cp.async.bulk.tensor, wgmma, setmaxnreg.
//
// Tiles are rows of 64 bf16 (128 bytes) swizzled over 128 bytes: of each 8 rows (1,024 bytes, aligned so), 16-byte chunk c
// of row r lies at chunk c ^ (r % 8).
//
// wgmma.m64n128k16: D[64,128] += A[64,16]·B[128,16]ᵀ. Warp w of the group holds rows 16·w to 16·w + 15; of them lane l, with
// g = l / 4 and t = l % 4, holds in d[n][e] row g + 8·(e / 2), column 8·n + 2·t + e % 2.
#pragma once
#include "common.cuh"

constexpr int GROUP_THREADS = 128;

// cuTensorMapEncodeTiled's, 128 bytes; for the shim what `TensorMap` of engine/cuda/src/driver/shim says.
struct TensorMap {
  i64 words[16];
};

#ifndef MCPIPE_SHIM

// Blocks that share what is copied.
constexpr int CLUSTER = 2;
#define CLUSTER_OF_TWO __cluster_dims__(2, 1, 1)

__device__ __forceinline__ u32 shared_word(const void* p) { return (u32)__cvta_generic_to_shared(p); }

// All threads of the cluster's blocks; what was written to shared memory before is seen behind it.
__device__ __forceinline__ void cluster_barrier() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- barriers in shared memory: a phase ends with its last arrival and its last byte --------------------------------

__device__ __forceinline__ void barrier_init(u64* bar, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_word(bar)), "r"(arrivals) : "memory");
}
// Makes initialised barriers known to copies and to the cluster; before a cluster_barrier.
__device__ __forceinline__ void barrier_init_done() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }

// Arrives, and has this phase wait for so many bytes more.
__device__ __forceinline__ void barrier_expect(u64* bar, int bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_word(bar)), "r"(bytes) : "memory");
}
// Arrives at the barrier at this place in block `rank` of the cluster. Orders nothing for that block's ordinary accesses:
// a wider scope would cost a fence of the whole device each time.
__device__ __forceinline__ void barrier_arrive(u64* bar, int rank) {
  asm volatile("{\n.reg .b32 there;\nmapa.shared::cluster.u32 there, %0, %1;\n"
               "mbarrier.arrive.shared::cluster.b64 _, [there];\n}"
               :: "r"(shared_word(bar)), "r"(rank) : "memory");
}
// Waits for the end of the phase with this parity.
__device__ __forceinline__ void barrier_wait(u64* bar, u32 parity) {
  u32 done;
  do {
    asm volatile("{\n.reg .pred p;\nmbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2;\n"
                 "selp.u32 %0, 1, 0, p;\n}" : "=r"(done) : "r"(shared_word(bar)), "r"(parity) : "memory");
  } while (!done);
}

// The four warps of group `id` (1 to 15).
__device__ __forceinline__ void group_barrier(int id) {
  asm volatile("bar.sync %0, 128;" :: "r"(id) : "memory");
}

// Registers a thread of the rest of the kernel may use. All warps of a warpgroup.
template <int N> __device__ __forceinline__ void more_registers() { asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(N)); }
template <int N> __device__ __forceinline__ void fewer_registers() { asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(N)); }

// ---- copies ---------------------------------------------------------------------------------------------------------

// The map's box of rows from (column k, row) on, zeros outside the matrix; its bytes count at `bar`. With `everywhere` to
// the same place, and barrier, of all blocks of the cluster.
__device__ __forceinline__ void copy_box(const TensorMap* map, void* to, u64* bar, int k, int row, bool everywhere) {
  if (everywhere) {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
                 "[%0], [%1, {%3, %4}], [%2], %5;"
                 :: "r"(shared_word(to)), "l"(map), "r"(shared_word(bar)), "r"(k), "r"(row),
                    "h"((unsigned short)((1 << CLUSTER) - 1)) : "memory");
  } else {
    asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];"
                 :: "r"(shared_word(to)), "l"(map), "r"(shared_word(bar)), "r"(k), "r"(row) : "memory");
  }
}
// Has the map itself fetched.
__device__ __forceinline__ void fetch_map(const TensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory");
}

// ---- products -------------------------------------------------------------------------------------------------------

// PTX ISA, "Matrix Descriptor Format": address / 16, 1,024 bytes between groups of 8 rows, swizzled over 128 bytes.
__device__ __forceinline__ u64 tile_descriptor(const void* tile) {
  return (u64)(shared_word(tile) >> 4 & 0x3fff) | (u64)1 << 16 | (u64)64 << 32 | (u64)1 << 62;
}

// Registers of a product may not be touched from its begin to its end: these hold the compiler to it.
__device__ __forceinline__ void pin_registers(float (&d)[16][4]) {
#pragma unroll
  for (int n = 0; n < 16; n++)
#pragma unroll
    for (int e = 0; e < 4; e++) asm volatile("" : "+f"(d[n][e])::"memory");
}
__device__ __forceinline__ void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void products_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
// Waits until at most N groups of products are under way.
template <int N> __device__ __forceinline__ void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(N) : "memory");
}

// d (+)= a·bᵀ for 16 of the inner dimension, from chunk 2·step of both tiles' rows on.
__device__ __forceinline__ void multiply_tiles(float (&d)[16][4], const void* a, const void* b, int step, bool add) {
  asm volatile(
      "{\n.reg .pred p;\nsetp.ne.b32 p, %66, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, "
      "%64, %65, p, 1, 1, 0, 0;\n}"
#define FOUR(n) "+f"(d[n][0]), "+f"(d[n][1]), "+f"(d[n][2]), "+f"(d[n][3])
      : FOUR(0), FOUR(1), FOUR(2), FOUR(3), FOUR(4), FOUR(5), FOUR(6), FOUR(7), FOUR(8), FOUR(9), FOUR(10), FOUR(11),
        FOUR(12), FOUR(13), FOUR(14), FOUR(15)
#undef FOUR
      : "l"(tile_descriptor(a) + 2 * step), "l"(tile_descriptor(b) + 2 * step), "r"((int)add));
}

#else

// Blocks run one after the other: each copies for itself.
constexpr int CLUSTER = 1;
#define CLUSTER_OF_TWO

static inline void cluster_barrier() { __syncthreads(); }
static inline void barrier_init(u64* bar, int arrivals) { mcpipe_shim::phase_init(bar, arrivals); }
static inline void barrier_init_done() {}
static inline void barrier_expect(u64* bar, int bytes) { mcpipe_shim::phase_arrive(bar, 1, bytes); }
static inline void barrier_arrive(u64* bar, int) { mcpipe_shim::phase_arrive(bar, 1, 0); }
static inline void barrier_wait(u64* bar, u32 parity) { mcpipe_shim::phase_wait(bar, parity); }
static inline void group_barrier(int id) { mcpipe_shim::group_barrier(id, GROUP_THREADS); }
template <int N> static inline void more_registers() {}
template <int N> static inline void fewer_registers() {}

// As engine/cuda/src/driver/shim fills it in: address, columns, rows, bytes between rows, rows of a box.
static inline void copy_box(const TensorMap* map, void* to, u64* bar, int k, int row, bool) {
  i64 columns = map->words[1], rows = map->words[2], box = map->words[4];
  if ((uintptr_t)to % 1024) mcpipe_shim::fail("a tile at %p, which is not aligned", to);
  for (int r = 0; r < box; r++)
    for (int c = 0; c < 8; c++) {
      u16 chunk[8] = {};
      for (int e = 0; e < 8; e++)
        if (row + r < rows && k + 8 * c + e < columns)
          chunk[e] = ((const u16*)(map->words[0] + (row + r) * map->words[3]))[k + 8 * c + e];
      memcpy((unsigned char*)to + r * 128 + ((c ^ (r & 7)) << 4), chunk, 16);
    }
  mcpipe_shim::phase_arrive(bar, 0, -(int)box * 128);
}
static inline void fetch_map(const TensorMap*) {}

static inline void pin_registers(float (&)[16][4]) {}
static inline void products_begin() {}
static inline void products_commit() {}
template <int N> static inline void products_wait() {}

// A warp does its 16 rows at once.
static inline void multiply_tiles(float (&d)[16][4], const void* a, const void* b, int step, bool add) {
  auto at = [](const void* tile, int row, int k) {
    return bf16_to_float(*(const u16*)((const unsigned char*)tile + row * 128 + ((k / 8 ^ (row & 7)) << 4) + k % 8 * 2));
  };
  int lane = threadIdx.x & 31, first = (threadIdx.x >> 5 & 3) * 16;
  for (int n = 0; n < 16; n++)
    for (int e = 0; e < 4; e++) {
      int row = first + (lane >> 2) + 8 * (e / 2), col = 8 * n + 2 * (lane & 3) + e % 2;
      float sum = add ? d[n][e] : 0.0f;
      for (int k = 16 * step; k < 16 * step + 16; k++) sum += at(a, row, k) * at(b, col, k);
      d[n][e] = sum;
    }
}

#endif
