// A warp's matrix products on tensor cores (sm_80 and later), and asynchronous copies to shared memory: the PTX
// instructions, and for the shim the same by the documented fragment layouts.
//
// mma.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16 with floating point type"): D[16,8] += A[16,16]·B[16,8]. Lane
// l holds, with g = l / 4 and t = l % 4 (two bf16 a word, the lower index in the low half):
//   a[0] = A[g, 2t..]   a[1] = A[g + 8, 2t..]   a[2] = A[g, 2t + 8..]   a[3] = A[g + 8, 2t + 8..]
//   b[0] = B[2t.., g]   b[1] = B[2t + 8.., g]
//   d[0], d[1] = D[g, 2t], D[g, 2t + 1]         d[2], d[3] = D[g + 8, 2t], D[g + 8, 2t + 1]
// ldmatrix: lanes 8j to 8j + 7 give the addresses of the rows (8 bf16, 16-byte aligned) of the 8×8 matrix j. r[j] of lane
// l is row g, columns 2t and 2t + 1; with `trans` it is column g, rows 2t and 2t + 1.
// So from A[16,16] in rows, ldmatrix_x4 with lane l at row l % 16, column l / 16 · 8 gives a[0..4]; from B stored as
// [n][k] in rows, ldmatrix_x2 with lane l at row l % 8, column l / 8 % 2 · 8 gives b[0..2]; from B stored as [k][n],
// ldmatrix_x2_trans with lane l at row l % 16.
#pragma once
#include "common.cuh"

#ifndef MCPIPE_SHIM

__device__ __forceinline__ u32 shared_address(const void* p) { return (u32)__cvta_generic_to_shared(p); }

__device__ __forceinline__ void ldmatrix_x4(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(u32 (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(u32 (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(u32 (&r)[2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1]) : "r"(shared_address(row)) : "memory");
}

__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%0, %1, %2, %3};"
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d = a·b + c.
__device__ __forceinline__ void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2],
                                                  const float (&c)[4]) {
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
               "{%10, %11, %12, %13};"
               : "=f"(d[0]), "=f"(d[1]), "=f"(d[2]), "=f"(d[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "f"(c[0]), "f"(c[1]), "f"(c[2]),
                 "f"(c[3]));
}

// 16 bytes from global to shared memory, both addresses 16-byte aligned; zeros where not valid, and then `from` is not
// read. There only after cp_async_wait, and for other threads after a barrier behind that.
__device__ __forceinline__ void cp_async_16(void* to, const void* from, bool valid) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}

// Ends a group of copies.
__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the N latest groups of this thread are under way.
template <int N> __device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" :: "n"(N) : "memory");
}

#else

namespace mcpipe_shim {

struct MatrixLoad {
  const u16* row;
  u32* out;
};
template <int MATRICES, bool TRANS> static void merge_load(void* const* payloads, unsigned lanes) {
  u16 m[MATRICES][8][8];
  if (lanes != 0xffffffffu) fail("ldmatrix by the lanes 0x%08x only", lanes);
  for (int i = 0; i < 8 * MATRICES; i++) {
    const u16* row = ((MatrixLoad*)payloads[i])->row;
    if ((uintptr_t)row % 16) fail("ldmatrix: lane %d's row at %p is not aligned", i, (const void*)row);
    memcpy(m[i / 8][i % 8], row, 16);
  }
  for (int l = 0; l < 32; l++)
    for (int j = 0; j < MATRICES; j++) {
      int g = l / 4, t = l % 4;
      u32 lo = TRANS ? m[j][2 * t][g] : m[j][g][2 * t], hi = TRANS ? m[j][2 * t + 1][g] : m[j][g][2 * t + 1];
      ((MatrixLoad*)payloads[l])->out[j] = lo | hi << 16;
    }
}
template <int MATRICES, bool TRANS> static inline void load_matrices(u32* out, const void* row) {
  MatrixLoad load = {(const u16*)row, out};
  collective(0xffffffffu, merge_load<MATRICES, TRANS>, &load, "ldmatrix");
}

struct MatrixProduct {
  float* d;
  const u32 *a, *b;
};
static inline void merge_product(void* const* payloads, unsigned lanes) {
  if (lanes != 0xffffffffu) fail("mma by the lanes 0x%08x only", lanes);
  float a[16][16], b[16][8], d[16][8];
  for (int l = 0; l < 32; l++) {
    const MatrixProduct& p = *(const MatrixProduct*)payloads[l];
    int g = l / 4, t = 2 * (l % 4);
    for (int j = 0; j < 4; j++) unpack_bf16(p.a[j], a[g + j % 2 * 8][t + j / 2 * 8], a[g + j % 2 * 8][t + j / 2 * 8 + 1]);
    for (int j = 0; j < 2; j++) unpack_bf16(p.b[j], b[t + j * 8][g], b[t + j * 8 + 1][g]);
    for (int j = 0; j < 2; j++) d[g + j * 8][t] = p.d[2 * j], d[g + j * 8][t + 1] = p.d[2 * j + 1];
  }
  for (int i = 0; i < 16; i++)
    for (int k = 0; k < 16; k++)
      for (int j = 0; j < 8; j++) d[i][j] += a[i][k] * b[k][j];
  for (int l = 0; l < 32; l++) {
    const MatrixProduct& p = *(const MatrixProduct*)payloads[l];
    int g = l / 4, t = 2 * (l % 4);
    for (int j = 0; j < 2; j++) p.d[2 * j] = d[g + j * 8][t], p.d[2 * j + 1] = d[g + j * 8][t + 1];
  }
}

}  // namespace mcpipe_shim

static inline void ldmatrix_x4(u32 (&r)[4], const void* row) { mcpipe_shim::load_matrices<4, false>(r, row); }
static inline void ldmatrix_x4_trans(u32 (&r)[4], const void* row) { mcpipe_shim::load_matrices<4, true>(r, row); }
static inline void ldmatrix_x2(u32 (&r)[2], const void* row) { mcpipe_shim::load_matrices<2, false>(r, row); }
static inline void ldmatrix_x2_trans(u32 (&r)[2], const void* row) { mcpipe_shim::load_matrices<2, true>(r, row); }
static inline void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2]) {
  mcpipe_shim::MatrixProduct p = {d, a, b};
  mcpipe_shim::collective(0xffffffffu, mcpipe_shim::merge_product, &p, "mma");
}
static inline void mma_m16n8k16_bf16(float (&d)[4], const u32 (&a)[4], const u32 (&b)[2], const float (&c)[4]) {
  float sum[4] = {c[0], c[1], c[2], c[3]};
  mma_m16n8k16_bf16(sum, a, b);
  for (int i = 0; i < 4; i++) d[i] = sum[i];
}
static inline void cp_async_16(void* to, const void* from, bool valid) { mcpipe_shim::async_copy(to, from, 16, valid); }
static inline void cp_async_commit() { mcpipe_shim::async_commit(); }
template <int N> static inline void cp_async_wait() { mcpipe_shim::async_wait(N); }

#endif
