// VJP of softmax attention (attention_forward.cuh) from qkv, the output O, its gradient dO and the rows' log-sum-exp L:
//   P_ij = e^(scale·q_i·k_j − L_i), dP_ij = dO_i·v_j, δ_i = Σ_j P_ij·dP_ij = dO_i·O_i, dS = P ∘ (dP − δ),
//   dq_i = scale·Σ_j dS_ij·k_j, dk_j = scale·Σ_i dS_ij·q_i, dv_j = Σ_i P_ij·dO_i
// (Dao, FlashAttention-2, arXiv:2307.08691, §3.1.2). Two kernels, each with its sums in registers in a fixed order: one
// holds queries, passes over the keys and writes dq and δ; the other, launched behind it, holds keys, passes over the
// queries and writes dk and dv. P is made anew in both.
#pragma once
#include "attention.cuh"

namespace attention_backward {

constexpr float LOG2E = 1.44269504f;

// A warp's 16 queries.
template <class T, int DP, bool KEEP> struct Queries {
  Left<T, DP, KEEP> q[1], dout[1];
  float dq[1][DP / 8][4];
  float lse[2], delta[2];  // of rows g and g + 8; L times log2 e
  int limit[2];
  float factor;
};

template <int NT, class T, int DP, bool KEEP>
__device__ __forceinline__ void take_keys(Queries<T, DP, KEEP>& q, const T* k, const T* v, int key, int sure,
                                          float* stage) {
  float s[1][NT][4], dp[1][NT][4];
  scores<DP, 1, NT>(s, q.q, k);
  scores<DP, 1, NT>(dp, q.dout, v);
  int t = threadIdx.x & 3;
  bool all = key + 8 * NT <= sure;
#pragma unroll
  for (int j = 0; j < NT; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) {
      float p = exp2_fast(s[0][j][i] * q.factor - q.lse[i / 2]);
      bool seen = all || key + 8 * j + 2 * t + i % 2 < q.limit[i / 2];
      s[0][j][i] = seen ? p * (dp[0][j][i] - q.delta[i / 2]) : 0.0f;
    }
  weighted<DP, 1, NT>(q.dq, s, k, stage);
}

template <class T, int DP, bool KEEP, int STAGES>
__device__ __forceinline__ void query_gradient(const View& qkv, const View& last, const View& out, const View& dout,
                                               const View& lse, const View& delta, const View& dqkv,
                                               const AttentionDims& d, int accumulate) {
  constexpr int P = PITCH<T, DP>;
  DYNAMIC_SHARED(room);
  T* q_tile = (T*)room;
  T* dout_tile = q_tile + TILE * P;
  T* k_tile = dout_tile + TILE * P;
  T* v_tile = k_tile + STAGES * TILE * P;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
  float* stage = (float*)(v_tile + STAGES * TILE * P) + warp * STAGE<4>;

  Place<1> w(d);
  int own = w.own, token = w.token, rows = w.rows, keys = rows > 0 ? visible_keys(last, w.b, d.tokens) : 0;
  int sure = d.causal ? min(keys, token + 1) : keys;
  int most = d.causal ? min(keys, token + 16) : keys;
  int block_keys = keys_of_block(last, d, w.span, w.first_pair, w.block_token + TILE);
  int tiles = (block_keys + TILE - 1) / TILE;

  TileRows<TILE> tile_rows(d, w.first_pair, w.span);
  T* o_tile = v_tile + (STAGES - 1) * TILE * P;
  load_tile<T, DP>(q_tile, tile_rows, d, qkv, 3, 0, w.block_token);
  load_tile<T, DP>(dout_tile, tile_rows, d, dout, 1, 0, w.block_token);
  load_tile<T, DP>(o_tile, tile_rows, d, out, 1, 0, w.block_token);
  clear_padding<T, DP>(q_tile, (2 + 2 * STAGES) * TILE, d.dim);
  if (STAGES == 2) {
    load_tile<T, DP>(k_tile, tile_rows, d, qkv, 3, 1, 0);
    load_tile<T, DP>(v_tile, tile_rows, d, qkv, 3, 2, 0);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  Queries<T, DP, KEEP> q;
  q.factor = d.scale * LOG2E;
  q.q[0].set(q_tile + own * P);
  q.dout[0].set(dout_tile + own * P);
#pragma unroll
  for (int h = 0; h < 2; h++) {
    int row = token + 8 * h + g;
    const T* o = o_tile + (own + 8 * h + g) * P;
    const T* grad = dout_tile + (own + 8 * h + g) * P;
    float sum = 0.0f;
#pragma unroll
    for (int c = 2 * t; c < DP; c += 8) sum += value(o[c]) * value(grad[c]) + value(o[c + 1]) * value(grad[c + 1]);
    q.delta[h] = row_sum(sum);
    q.limit[h] = d.causal ? min(keys, row + 1) : keys;
    q.lse[h] = 0.0f;
    if (8 * h + g < rows) {
      i64 at = (i64)w.pair * d.tokens + row;
      q.lse[h] = load(lse, at) * LOG2E;
      if (t == 0) store(delta, at, q.delta[h]);
    }
  }
#pragma unroll
  for (int j = 0; j < DP / 8; j++) q.dq[0][j][0] = q.dq[0][j][1] = q.dq[0][j][2] = q.dq[0][j][3] = 0.0f;
  __syncthreads();

  for (int tile = 0; tile < tiles; tile++) {
    int slot = 0;
    if (STAGES == 2) {
      slot = tile & 1;
      if (tile + 1 < tiles) {
        load_tile<T, DP>(k_tile + (1 - slot) * TILE * P, tile_rows, d, qkv, 3, 1, (tile + 1) * TILE);
        load_tile<T, DP>(v_tile + (1 - slot) * TILE * P, tile_rows, d, qkv, 3, 2, (tile + 1) * TILE);
      }
      cp_async_commit();
    } else {
      load_tile<T, DP>(k_tile, tile_rows, d, qkv, 3, 1, tile * TILE);
      load_tile<T, DP>(v_tile, tile_rows, d, qkv, 3, 2, tile * TILE);
      __syncthreads();
    }
    const T* k = k_tile + (slot * TILE + w.shared) * P;
    const T* v = v_tile + (slot * TILE + w.shared) * P;
    int key = tile * TILE, groups = min(TILE / 16, (most - key + 15) / 16), i = 0;
    for (; i + 2 <= groups; i += 2) take_keys<4>(q, k + 16 * i * P, v + 16 * i * P, key + 16 * i, sure, stage);
    if (i < groups) take_keys<2>(q, k + 16 * i * P, v + 16 * i * P, key + 16 * i, sure, stage);
    cp_async_wait<0>();
    __syncthreads();
  }

  if (rows == 0) return;
  i64 at = row_start(d, w.b * d.tokens + token, w.column, 3, 0);
  store_rows<DP>(q_tile + own * P, q.dq[0], d.scale, d.scale, dqkv, at, (i64)3 * d.heads * d.dim, rows, d.dim,
                 accumulate);
}

// A warp's 16 keys.
template <class T, int DP, bool KEEP> struct Keys {
  Left<T, DP, KEEP> k[1], v[1];
  float dk[1][DP / 8][4], dv[1][DP / 8][4];
  float factor;
};

// Takes in 8·NT queries, whose rows in the tiles begin at q and dout, with their L and δ; `after`, the first key's token
// less the first query's, where the mask is causal, else below −16.
template <int NT, class T, int DP, bool KEEP>
__device__ __forceinline__ void take_queries(Keys<T, DP, KEEP>& k, const T* q, const T* dout, const float* lse,
                                             const float* delta, int after, float* stage) {
  float p[1][NT][4], ds[1][NT][4];
  scores<DP, 1, NT>(p, k.k, q);
  scores<DP, 1, NT>(ds, k.v, dout);
  int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < NT; j++) {
    float2 l = *(const float2*)(lse + 8 * j + 2 * t), mean = *(const float2*)(delta + 8 * j + 2 * t);
#pragma unroll
    for (int i = 0; i < 4; i++) {
      bool seen = after + g + i / 2 * 8 <= 8 * j + 2 * t + i % 2;
      p[0][j][i] = seen ? exp2_fast(p[0][j][i] * k.factor - (i % 2 ? l.y : l.x) * LOG2E) : 0.0f;
      ds[0][j][i] = seen ? p[0][j][i] * (ds[0][j][i] - (i % 2 ? mean.y : mean.x)) : 0.0f;
    }
  }
  weighted<DP, 1, NT>(k.dv, p, dout, stage);
  weighted<DP, 1, NT>(k.dk, ds, q, stage);
}

// L or δ of a tile's rows; zeros where there is no token. Then P is e^0 there, and meets rows of zeros.
__device__ __forceinline__ void load_column(float* to, const View& v, const AttentionDims& d, int first_pair, int span,
                                            int token0) {
  int row = threadIdx.x;
  if (row >= TILE) return;
  int pair = first_pair + row / span, token = token0 + (row & (span - 1));
  bool valid = pair < d.pairs && token < d.tokens;
  to[row] = valid ? load(v, (i64)pair * d.tokens + token) : 0.0f;
}

template <class T, int DP, bool KEEP, int STAGES>
__device__ __forceinline__ void key_gradient(const View& qkv, const View& last, const View& dout, const View& lse,
                                             const View& delta, const View& dqkv, const AttentionDims& d,
                                             int accumulate) {
  constexpr int P = PITCH<T, DP>;
  DYNAMIC_SHARED(room);
  T* k_tile = (T*)room;
  T* v_tile = k_tile + TILE * P;
  T* q_tile = v_tile + TILE * P;
  T* dout_tile = q_tile + STAGES * TILE * P;
  float* lse_tile = (float*)(dout_tile + STAGES * TILE * P);
  float* delta_tile = lse_tile + STAGES * TILE;
  int warp = threadIdx.x >> 5, lane = threadIdx.x & 31;
  float* stage = delta_tile + STAGES * TILE + warp * STAGE<4>;

  Place<1> w(d);
  int own = w.own, token = w.token, rows = w.rows, keys = rows > 0 ? visible_keys(last, w.b, d.tokens) : 0;
  // Queries from here on may see the warp's keys, if those are visible at all.
  int least = d.causal ? token : 0;
  bool some = token < keys;

  TileRows<TILE> tile_rows(d, w.first_pair, w.span);
  int first = d.causal ? w.block_token / TILE : 0, tiles = (d.tokens + TILE - 1) / TILE;
  load_tile<T, DP>(k_tile, tile_rows, d, qkv, 3, 1, w.block_token);
  load_tile<T, DP>(v_tile, tile_rows, d, qkv, 3, 2, w.block_token);
  clear_padding<T, DP>(k_tile, (2 + 2 * STAGES) * TILE, d.dim);
  if (STAGES == 2) {
    load_tile<T, DP>(q_tile, tile_rows, d, qkv, 3, 0, first * TILE);
    load_tile<T, DP>(dout_tile, tile_rows, d, dout, 1, 0, first * TILE);
    load_column(lse_tile, lse, d, w.first_pair, w.span, first * TILE);
    load_column(delta_tile, delta, d, w.first_pair, w.span, first * TILE);
  }
  cp_async_commit();
  cp_async_wait<0>();
  __syncthreads();

  Keys<T, DP, KEEP> k;
  k.factor = d.scale * LOG2E;
  k.k[0].set(k_tile + own * P);
  k.v[0].set(v_tile + own * P);
#pragma unroll
  for (int j = 0; j < DP / 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++) k.dk[0][j][i] = k.dv[0][j][i] = 0.0f;

  for (int tile = first; tile < tiles; tile++) {
    int slot = 0, next = tile + 1;
    if (STAGES == 2) {
      slot = (tile - first) & 1;
      if (next < tiles) {
        load_tile<T, DP>(q_tile + (1 - slot) * TILE * P, tile_rows, d, qkv, 3, 0, next * TILE);
        load_tile<T, DP>(dout_tile + (1 - slot) * TILE * P, tile_rows, d, dout, 1, 0, next * TILE);
        load_column(lse_tile + (1 - slot) * TILE, lse, d, w.first_pair, w.span, next * TILE);
        load_column(delta_tile + (1 - slot) * TILE, delta, d, w.first_pair, w.span, next * TILE);
      }
      cp_async_commit();
    } else {
      load_tile<T, DP>(q_tile, tile_rows, d, qkv, 3, 0, tile * TILE);
      load_tile<T, DP>(dout_tile, tile_rows, d, dout, 1, 0, tile * TILE);
      load_column(lse_tile, lse, d, w.first_pair, w.span, tile * TILE);
      load_column(delta_tile, delta, d, w.first_pair, w.span, tile * TILE);
      __syncthreads();
    }
    int base = slot * TILE + w.shared, query = tile * TILE;
    int groups = some ? min(TILE / 16, (d.tokens - query + 15) / 16) : 0, i = max(0, least - query) / 16;
    const T *q = q_tile + base * P, *grad = dout_tile + base * P;
    constexpr int STEP = DP <= 80 ? 2 : 1;  // groups at a time, as registers allow
    for (; i + STEP <= groups; i += STEP) {
      int after = d.causal ? token - query - 16 * i : -64;
      take_queries<2 * STEP>(k, q + 16 * i * P, grad + 16 * i * P, lse_tile + base + 16 * i, delta_tile + base + 16 * i, after,
                      stage);
    }
    if (i < groups) {
      int after = d.causal ? token - query - 16 * i : -64;
      take_queries<2>(k, q + 16 * i * P, grad + 16 * i * P, lse_tile + base + 16 * i, delta_tile + base + 16 * i, after,
                      stage);
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  if (rows == 0) return;
  // A hidden key's rows hold what it would have got.
  bool upper = token + lane / 4 < keys, lower = token + lane / 4 + 8 < keys;
#pragma unroll
  for (int j = 0; j < DP / 8; j++)
#pragma unroll
    for (int i = 0; i < 4; i++)
      if (!(i < 2 ? upper : lower)) k.dk[0][j][i] = k.dv[0][j][i] = 0.0f;
  i64 at = row_start(d, w.b * d.tokens + token, w.column, 3, 1), width = (i64)d.heads * d.dim;
  store_rows<DP>(k_tile + own * P, k.dk[0], d.scale, d.scale, dqkv, at, 3 * width, rows, d.dim, accumulate);
  store_rows<DP>(v_tile + own * P, k.dv[0], 1.0f, 1.0f, dqkv, at + width, 3 * width, rows, d.dim, accumulate);
}

}  // namespace attention_backward
