// What the softmax attention kernels share: tiles of Q, K, V or gradients in shared memory, a warp's products on them,
// rows back to memory. The arithmetic is a template on the type T of the tiles: u16 (bf16 bits) multiplies on tensor
// cores; float takes plain multiply-adds in the same layout, from values of any type.
//
// Letters: B batch, N tokens, H heads, D size of a head, DP = D rounded up (the rest is zeros). A *pair* is a batch entry
// and a head, number b·H + h. A block of four warps works on tiles of 64 rows: one pair's tokens or, where N is 16 or 32
// at most, those of 4 or 2 pairs, `span` rows each. A warp owns 16 rows of one side of the products (or 2 times 16).
//
// A warp's [16, n] matrix lies in fragments as mma.m16n8k16 has it: lane 4g + t holds of columns 8j to 8j + 7
// x[j][0..2] = (g, 8j + 2t..) and x[j][2..4] = (g + 8, 8j + 2t..).
#pragma once
#include "mma.cuh"

constexpr int TILE = 64;

struct AttentionDims {
  int batch, tokens, heads, dim;
  int pairs;  // batch·heads
  int causal;
  float scale;
};

#ifndef MCPIPE_SHIM
// As cp_async_16.
__device__ __forceinline__ void cp_async_8(void* to, const void* from, bool valid) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;"
               :: "r"(shared_address(to)), "l"(from), "r"(valid ? 8 : 0) : "memory");
}
// 2^x to two units in the last place; 0 for what would be subnormal.
__device__ __forceinline__ float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
#else
static inline void cp_async_8(void* to, const void* from, bool valid) { mcpipe_shim::async_copy(to, from, 8, valid); }
static inline float exp2_fast(float x) { return exp2f(x); }
#endif

// Elements from one row of a tile to the next: 16 bytes more than the row, so that eight rows' 16-byte pieces lie in
// different banks.
template <class T, int DP> constexpr int PITCH = DP + 16 / (int)sizeof(T);

__device__ __forceinline__ float value(u16 x) { return bf16_to_float(x); }
__device__ __forceinline__ float value(float x) { return x; }

// Rows of a tile that each pair gets.
__device__ __forceinline__ int span_of(int tokens) { return tokens <= 16 ? 16 : tokens <= 32 ? 32 : TILE; }

// Keys that queries of batch entry b see: all, or those up to the entry's last token.
__device__ __forceinline__ int visible_keys(const View& last, int b, int tokens) {
  if (last.len == 0) return tokens;
  int i = load_int(last, b);
  return i < 0 ? 1 : min(tokens - 1, i) + 1;
}

// Keys that the queries of a block below `end` may see. Where a block has several pairs, all their keys are in one tile.
__device__ __forceinline__ int keys_of_block(const View& last, const AttentionDims& d, int span, int pair, int end) {
  if (span < TILE) return TILE;
  int keys = visible_keys(last, pair / d.heads, d.tokens);
  return d.causal ? min(keys, end) : keys;
}

// That a row of n elements exists; for the shim.
__device__ __forceinline__ void check_row(const View& v, i64 at, int n) {
  CHECK_INDEX(v, at, 1);
  CHECK_INDEX(v, at + n - 1, 1);
}

// Where a block and a warp work: the block on tile number blockIdx.x of MT·64 rows, the warp on 16·MT rows of it.
template <int MT> struct Place {
  int span;                     // rows of a tile that each pair gets; where MT is 2, of the tiles of 64 rows
  int first_pair, block_token;  // of the block's tile
  int own, shared;              // rows of a tile: the warp's first, and the first of its pair in a tile of 64
  int pair, b, column, token;   // the warp's pair, its batch entry and first column, and the warp's first token
  int rows;                     // of the warp's, those that are tokens; none where there is no pair

  __device__ __forceinline__ explicit Place(const AttentionDims& d) {
    constexpr int ROWS = TILE * MT;
    span = span_of(d.tokens);
    int own_span = MT == 1 ? span : ROWS, tiles = (d.tokens + ROWS - 1) / ROWS;
    first_pair = (int)(blockIdx.x / tiles) * (ROWS / own_span);
    block_token = (int)(blockIdx.x % tiles) * ROWS;
    own = (int)(threadIdx.x >> 5) * 16 * MT;
    shared = MT == 1 ? own / span * span : 0;
    pair = first_pair + own / own_span;
    b = pair / d.heads;
    column = (pair - b * d.heads) * d.dim;
    token = block_token + (own & (own_span - 1));
    rows = b < d.batch ? max(0, min(16 * MT, d.tokens - token)) : 0;
  }
};

// Which tokens of which pairs a tile's rows are: four threads copy a row, 32 rows at a time.
template <int ROWS> struct TileRows {
  int start[ROWS / 32];   // the batch entry's token 0, as a row of [B·N]
  int column[ROWS / 32];  // the head's first column
  int token[ROWS / 32];

  __device__ __forceinline__ TileRows(const AttentionDims& d, int first_pair, int span) {
#pragma unroll
    for (int i = 0; i < ROWS / 32; i++) {
      int row = 32 * i + (int)(threadIdx.x >> 2), pair = first_pair + row / span, b = pair / d.heads;
      start[i] = b * d.tokens;
      column[i] = (pair - b * d.heads) * d.dim;
      token[i] = b < d.batch ? row & (span - 1) : 1 << 29;
    }
  }
};

// Element where a pair's row begins in a tensor [B, N, parts, H, D].
__device__ __forceinline__ i64 row_start(const AttentionDims& d, int row, int column, int parts, int part) {
  return ((i64)row * parts + part) * d.heads * d.dim + column;
}

// A quarter of a row of `dim` elements; zeros where not valid. bf16 rows arrive asynchronously.
template <int DP> __device__ __forceinline__ void copy_row(u16* to, const View& v, i64 at, int dim, bool valid) {
  const u16* from = (const u16*)v.data + at;
  int lane = threadIdx.x & 3;
  if (dim % 8 == 0) {
#pragma unroll
    for (int c = 8 * lane; c < DP; c += 32)
      if (c < dim) cp_async_16(to + c, from + c, valid);
  } else if (dim % 4 == 0) {
#pragma unroll
    for (int c = 4 * lane; c < DP; c += 16)
      if (c < dim) cp_async_8(to + c, from + c, valid);
  } else {
    for (int c = lane; c < dim; c += 4) to[c] = valid ? from[c] : (u16)0;
  }
}

template <int DP> __device__ __forceinline__ void copy_row(float* to, const View& v, i64 at, int dim, bool valid) {
  int lane = threadIdx.x & 3;
  if (v.dtype == F32 && dim % 4 == 0) {
    const float4* from = (const float4*)((const float*)v.data + at);
    for (int c = lane; c < dim / 4; c += 4) ((float4*)to)[c] = valid ? from[c] : make_float4(0.0f, 0.0f, 0.0f, 0.0f);
  } else {
    for (int c = lane; c < dim; c += 4) to[c] = valid ? load(v, at + c) : 0.0f;
  }
}

// Tokens token0 on of one part of a packed tensor into a tile.
template <class T, int DP, int ROWS>
__device__ __forceinline__ void load_tile(T* tile, const TileRows<ROWS>& rows, const AttentionDims& d, const View& v,
                                          int parts, int part, int token0) {
#pragma unroll
  for (int i = 0; i < ROWS / 32; i++) {
    int token = rows.token[i] + token0;
    bool valid = token < d.tokens;
    i64 at = valid ? row_start(d, rows.start[i] + token, rows.column[i], parts, part) : 0;
    if (valid) check_row(v, at, d.dim);
    copy_row<DP>(tile + (32 * i + (threadIdx.x >> 2)) * PITCH<T, DP>, v, at, d.dim, valid);
  }
}

// Zeros in the columns from dim to DP, which load_tile leaves alone.
template <class T, int DP> __device__ __forceinline__ void clear_padding(T* tiles, int rows, int dim) {
  if (dim == DP) return;
  for (int r = threadIdx.x; r < rows; r += blockDim.x) {
    T* row = tiles + r * PITCH<T, DP>;
    if (sizeof(T) == 2 && dim % 4 == 0)
      for (int c = dim; c < DP; c += 4) *(uint2*)(row + c) = make_uint2(0, 0);
    else
      for (int c = dim; c < DP; c++) row[c] = (T)0;
  }
}

// The 16 rows of a tile that a warp owns, as the left operand; with KEEP in registers.
template <class T, int DP, bool KEEP> struct Left;

template <int DP, bool KEEP> struct Left<u16, DP, KEEP> {
  const u16* at;
  u32 kept[KEEP ? DP / 16 : 1][4];

  __device__ __forceinline__ void set(const u16* rows) {
    int lane = threadIdx.x & 31;
    at = rows + (lane % 16) * PITCH<u16, DP> + lane / 16 * 8;
    if constexpr (KEEP) {
#pragma unroll
      for (int k = 0; k < DP / 16; k++) ldmatrix_x4(kept[k], at + 16 * k);
    }
  }
  __device__ __forceinline__ void get(int k, u32 (&a)[4]) const {
    if constexpr (KEEP) {
#pragma unroll
      for (int i = 0; i < 4; i++) a[i] = kept[k][i];
    } else {
      ldmatrix_x4(a, at + 16 * k);
    }
  }
};

template <int DP, bool KEEP> struct Left<float, DP, KEEP> {
  const float* at;

  __device__ __forceinline__ void set(const float* rows) { at = rows + (threadIdx.x & 31) / 4 * PITCH<float, DP>; }
};

// s = A·Rᵀ, A the left operands [16, D], R the 8·NT rows of a tile from `rows` on.
template <int DP, int MT, int NT, bool KEEP>
__device__ __forceinline__ void scores(float (&s)[MT][NT][4], const Left<u16, DP, KEEP> (&left)[MT], const u16* rows) {
  constexpr int P = PITCH<u16, DP>;
  int lane = threadIdx.x & 31;
  const u16* at = rows + (lane / 16 * 8 + lane % 8) * P + lane / 8 % 2 * 8;
#pragma unroll
  for (int m = 0; m < MT; m++)
#pragma unroll
    for (int j = 0; j < NT; j++) s[m][j][0] = s[m][j][1] = s[m][j][2] = s[m][j][3] = 0.0f;
#pragma unroll
  for (int k = 0; k < DP / 16; k++) {
    u32 a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++) left[m].get(k, a[m]);
#pragma unroll
    for (int j = 0; j < NT; j += 2) {
      u32 r[4];
      ldmatrix_x4(r, at + 8 * j * P + 16 * k);
      u32 b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma_m16n8k16_bf16(s[m][j], a[m], b0);
        mma_m16n8k16_bf16(s[m][j + 1], a[m], b1);
      }
    }
  }
}

template <int DP, int MT, int NT, bool KEEP>
__device__ __forceinline__ void scores(float (&s)[MT][NT][4], const Left<float, DP, KEEP> (&left)[MT],
                                       const float* rows) {
  constexpr int P = PITCH<float, DP>;
  const float* at = rows + (threadIdx.x & 3) * 2 * P;
#pragma unroll
  for (int m = 0; m < MT; m++) {
#pragma unroll
    for (int j = 0; j < NT; j++) s[m][j][0] = s[m][j][1] = s[m][j][2] = s[m][j][3] = 0.0f;
#pragma unroll 2
    for (int k = 0; k < DP; k += 4) {
      float4 a[2] = {*(const float4*)(left[m].at + k), *(const float4*)(left[m].at + 8 * P + k)};
#pragma unroll
      for (int j = 0; j < NT; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float4 b = *(const float4*)(at + (8 * j + i % 2) * P + k);
          s[m][j][i] += a[i / 2].x * b.x + a[i / 2].y * b.y + a[i / 2].z * b.z + a[i / 2].w * b.w;
        }
    }
  }
}

// Floats of shared memory that a warp's `weighted` needs for T = float.
template <int NT> constexpr int STAGE = 16 * (8 * NT + 4);

// out += W·R, W the weights [16, 8·NT] in fragments, R the 8·NT rows of a tile from `rows` on.
template <int DP, int MT, int NT>
__device__ __forceinline__ void weighted(float (&out)[MT][DP / 8][4], const float (&w)[MT][NT][4], const u16* rows,
                                         float*) {
  constexpr int P = PITCH<u16, DP>;
  int lane = threadIdx.x & 31;
  const u16* at = rows + (lane % 16) * P + lane / 16 * 8;
#pragma unroll
  for (int k = 0; k < NT / 2; k++) {
    u32 a[MT][4];
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        const float* pair = &w[m][2 * k + i / 2][i % 2 * 2];
        a[m][i] = pack_bf16(pair[0], pair[1]);
      }
#pragma unroll
    for (int j = 0; j < DP / 8; j += 2) {
      u32 r[4];
      ldmatrix_x4_trans(r, at + 16 * k * P + 8 * j);
      u32 b0[2] = {r[0], r[1]}, b1[2] = {r[2], r[3]};
#pragma unroll
      for (int m = 0; m < MT; m++) {
        mma_m16n8k16_bf16(out[m][j], a[m], b0);
        mma_m16n8k16_bf16(out[m][j + 1], a[m], b1);
      }
    }
  }
}

template <int DP, int MT, int NT>
__device__ __forceinline__ void weighted(float (&out)[MT][DP / 8][4], const float (&w)[MT][NT][4], const float* rows,
                                         float* stage) {
  constexpr int P = PITCH<float, DP>, S = 8 * NT + 4;
  int g = (threadIdx.x & 31) / 4, t = threadIdx.x & 3;
#pragma unroll
  for (int m = 0; m < MT; m++) {
    __syncwarp();
#pragma unroll
    for (int j = 0; j < NT; j++) {
      *(float2*)(stage + g * S + 8 * j + 2 * t) = make_float2(w[m][j][0], w[m][j][1]);
      *(float2*)(stage + (g + 8) * S + 8 * j + 2 * t) = make_float2(w[m][j][2], w[m][j][3]);
    }
    __syncwarp();
#pragma unroll 4
    for (int k = 0; k < 8 * NT; k++) {
      float upper = stage[g * S + k], lower = stage[(g + 8) * S + k];
#pragma unroll
      for (int j = 0; j < DP / 8; j++) {
        float2 r = *(const float2*)(rows + k * P + 8 * j + 2 * t);
        out[m][j][0] += upper * r.x, out[m][j][1] += upper * r.y;
        out[m][j][2] += lower * r.x, out[m][j][3] += lower * r.y;
      }
    }
  }
}

// A warp's 16 rows of D values, each times its factor, to memory: row r at element at + r·stride, the first `count`
// rows only. They pass through `own`, 16 rows of a tile that no other warp reads, so that whole pieces of rows are
// written.
template <int DP>
__device__ __forceinline__ void store_rows(u16* own, const float (&x)[DP / 8][4], float upper, float lower,
                                           const View& v, i64 at, i64 stride, int count, int dim, int accumulate) {
  constexpr int P = PITCH<u16, DP>;
  int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < DP / 8; j++) {
    *(u32*)(own + g * P + 8 * j + 2 * t) = pack_bf16(x[j][0] * upper, x[j][1] * upper);
    *(u32*)(own + (g + 8) * P + 8 * j + 2 * t) = pack_bf16(x[j][2] * lower, x[j][3] * lower);
  }
  __syncwarp();
#pragma unroll
  for (int r = g; r < 16; r += 8) {
    if (r >= count) break;
    const u16* from = own + r * P;
    i64 to = at + r * stride;
    check_row(v, to, dim);
    if (dim % 8 == 0) {
      for (int c = 8 * t; c < dim; c += 32) {
        float y[8];
        uint4 raw = *(const uint4*)(from + c);
        unpack_bf16(raw.x, y[0], y[1]), unpack_bf16(raw.y, y[2], y[3]);
        unpack_bf16(raw.z, y[4], y[5]), unpack_bf16(raw.w, y[6], y[7]);
        give8_partial(v, to + c, to + dim, y, accumulate);
      }
    } else if (dim % 4 == 0) {
      for (int c = 4 * t; c < dim; c += 16) {
        uint2* place = (uint2*)((u16*)v.data + to + c);
        uint2 y = *(const uint2*)(from + c);
        if (accumulate) {
          uint2 old = *place;
          float a, b, e, f;
          unpack_bf16(y.x, a, b), unpack_bf16(old.x, e, f), y.x = pack_bf16(a + e, b + f);
          unpack_bf16(y.y, a, b), unpack_bf16(old.y, e, f), y.y = pack_bf16(a + e, b + f);
        }
        *place = y;
      }
    } else {
      for (int c = t; c < dim; c += 4) give(v, to + c, bf16_to_float(from[c]), accumulate);
    }
  }
  __syncwarp();
}

template <int DP>
__device__ __forceinline__ void store_rows(float* own, const float (&x)[DP / 8][4], float upper, float lower,
                                           const View& v, i64 at, i64 stride, int count, int dim, int accumulate) {
  constexpr int P = PITCH<float, DP>;
  int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  __syncwarp();
#pragma unroll
  for (int j = 0; j < DP / 8; j++) {
    *(float2*)(own + g * P + 8 * j + 2 * t) = make_float2(x[j][0] * upper, x[j][1] * upper);
    *(float2*)(own + (g + 8) * P + 8 * j + 2 * t) = make_float2(x[j][2] * lower, x[j][3] * lower);
  }
  __syncwarp();
  for (int r = 0; r < min(count, 16); r++)
    for (int c = lane; c < dim; c += 32) give(v, at + r * stride + c, own[r * P + c], accumulate);
  __syncwarp();
}

// Over the four lanes that hold a fragment's row.
__device__ __forceinline__ float row_sum(float x) {
  x += __shfl_xor_sync(0xffffffffu, x, 1);
  return x + __shfl_xor_sync(0xffffffffu, x, 2);
}

// A NaN is passed over: where only the maximum matters, the exponentials carry it on.
__device__ __forceinline__ float row_max(float x) {
  x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 1));
  return fmaxf(x, __shfl_xor_sync(0xffffffffu, x, 2));
}
