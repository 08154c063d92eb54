// Softmax attention over a packed qkv [B, N, 3, H, D]: O = softmax(scale·Q·Kᵀ)·V for each pair, and the rows' natural
// log-sum-exp L [B, H, N]. With `causal` token i sees tokens 0..=i only; where `last` isn't empty, batch entry b's keys are
// its tokens 0..=last[b].
//
// Keys pass in tiles; a row keeps its maximum m and its sum l so far, and O is rescaled when m grows, so that no [N, N]
// matrix is held (Milakov and Gimelshein, arXiv:1805.02867; Dao, FlashAttention-2, arXiv:2307.08691, algorithm 1):
//   m' = max(m, max_j s_j), l' = l·e^(m − m') + Σ_j e^(s_j − m'), O' = O·e^(m − m') + Σ_j e^(s_j − m')·v_j,
//   at the end O/l and L = m + log l.
#pragma once
#include "attention.cuh"

namespace attention_forward {

// A warp's state: MT times 16 queries.
template <class T, int DP, int MT, bool KEEP> struct Queries {
  Left<T, DP, KEEP> left[MT];
  float out[MT][DP / 8][4];
  float top[MT][2], sum[MT][2];  // of rows g and g + 8; scores before the scale; a lane's own share of the sum
  int limit[MT][2];              // keys that the row sees
  float factor;                  // scale·log2 e
};

// Takes in the keys `key` to key + 8·NT, whose rows in the tiles begin at k and v.
template <int NT, class T, int DP, int MT, bool KEEP>
__device__ __forceinline__ void take_keys(Queries<T, DP, MT, KEEP>& q, const T* k, const T* v, int key, int sure,
                                          float* stage) {
  float s[MT][NT][4];
  scores<DP, MT, NT>(s, q.left, k);
  int t = threadIdx.x & 3;
  if (key + 8 * NT > sure) {
#pragma unroll
    for (int m = 0; m < MT; m++)
#pragma unroll
      for (int j = 0; j < NT; j++)
#pragma unroll
        for (int i = 0; i < 4; i++)
          if (key + 8 * j + 2 * t + i % 2 >= q.limit[m][i / 2]) s[m][j][i] = -INFINITY;
  }
#pragma unroll
  for (int m = 0; m < MT; m++) {
    float base[2], fade[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float most = fmaxf(s[m][0][2 * h], s[m][0][2 * h + 1]);
#pragma unroll
      for (int j = 1; j < NT; j++) most = fmaxf(most, fmaxf(s[m][j][2 * h], s[m][j][2 * h + 1]));
      most = fmaxf(q.top[m][h], row_max(most));
      // A row that saw nothing but −∞ sums to 0, and 0/0 is NaN, as for the CPU.
      float at = most == -INFINITY ? 0.0f : most;
      fade[h] = exp2_fast((q.top[m][h] - at) * q.factor);
      q.top[m][h] = most;
      base[h] = at * q.factor;
      q.sum[m][h] *= fade[h];
    }
#pragma unroll
    for (int j = 0; j < NT; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) {
        s[m][j][i] = exp2_fast(s[m][j][i] * q.factor - base[i / 2]);
        q.sum[m][i / 2] += s[m][j][i];
      }
#pragma unroll
    for (int j = 0; j < DP / 8; j++)
#pragma unroll
      for (int i = 0; i < 4; i++) q.out[m][j][i] *= fade[i / 2];
  }
  weighted<DP, MT, NT>(q.out, s, v, stage);
}

template <class T, int DP, int MT, int STAGES>
__device__ __forceinline__ void forward(const View& qkv, const View& last, const View& out, const View& lse,
                                        const AttentionDims& d) {
  constexpr int P = PITCH<T, DP>, ROWS = TILE * MT;
  DYNAMIC_SHARED(room);
  T* q_tile = (T*)room;
  T* k_tile = q_tile + ROWS * P;
  T* v_tile = k_tile + STAGES * TILE * P;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
  float* stage = (float*)(v_tile + STAGES * TILE * P) + warp * STAGE<8>;

  Place<MT> w(d);
  int token = w.token, keys = w.rows > 0 ? visible_keys(last, w.b, d.tokens) : 0;
  int sure = d.causal ? min(keys, token + 1) : keys;  // all rows see keys below it
  int most = d.causal ? min(keys, token + 16 * MT) : keys;
  int block_keys = keys_of_block(last, d, w.span, w.first_pair, w.block_token + ROWS);
  int tiles = (block_keys + TILE - 1) / TILE;

  TileRows<TILE> kv_rows(d, w.first_pair, w.span);
  {
    TileRows<ROWS> q_rows(d, w.first_pair, MT == 1 ? w.span : ROWS);
    load_tile<T, DP>(q_tile, q_rows, d, qkv, 3, 0, w.block_token);
  }
  clear_padding<T, DP>(q_tile, ROWS + 2 * STAGES * TILE, d.dim);
  if (STAGES == 2) {
    load_tile<T, DP>(k_tile, kv_rows, d, qkv, 3, 1, 0);
    load_tile<T, DP>(v_tile, kv_rows, d, qkv, 3, 2, 0);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
  }

  // Where registers are short, Q is read again at each step.
  Queries<T, DP, MT, MT == 1 || DP <= 48> q;
  q.factor = d.scale * 1.44269504f;
#pragma unroll
  for (int m = 0; m < MT; m++) {
    q.left[m].set(q_tile + (w.own + 16 * m) * P);
#pragma unroll
    for (int h = 0; h < 2; h++) {
      q.top[m][h] = -INFINITY, q.sum[m][h] = 0.0f;
      q.limit[m][h] = d.causal ? min(keys, token + 16 * m + 8 * h + g + 1) : keys;
    }
#pragma unroll
    for (int j = 0; j < DP / 8; j++) q.out[m][j][0] = q.out[m][j][1] = q.out[m][j][2] = q.out[m][j][3] = 0.0f;
  }

  for (int tile = 0; tile < tiles; tile++) {
    int slot = 0;
    if (STAGES == 2) {
      slot = tile & 1;
      if (tile + 1 < tiles) {
        load_tile<T, DP>(k_tile + (1 - slot) * TILE * P, kv_rows, d, qkv, 3, 1, (tile + 1) * TILE);
        load_tile<T, DP>(v_tile + (1 - slot) * TILE * P, kv_rows, d, qkv, 3, 2, (tile + 1) * TILE);
      }
      cp_async_commit();
    } else {
      load_tile<T, DP>(k_tile, kv_rows, d, qkv, 3, 1, tile * TILE);
      load_tile<T, DP>(v_tile, kv_rows, d, qkv, 3, 2, tile * TILE);
      __syncthreads();
    }
    const T* k = k_tile + (slot * TILE + w.shared) * P;
    const T* v = v_tile + (slot * TILE + w.shared) * P;
    int key = tile * TILE, groups = min(TILE / 16, (most - key + 15) / 16);
    if (groups == TILE / 16) {
      take_keys<8>(q, k, v, key, sure, stage);
    } else {
      for (int i = 0; i < groups; i++) take_keys<2>(q, k + 16 * i * P, v + 16 * i * P, key + 16 * i, sure, stage);
    }
    cp_async_wait<0>();
    __syncthreads();
  }

  if (w.rows == 0) return;
#pragma unroll
  for (int m = 0; m < MT; m++) {
    float upper = row_sum(q.sum[m][0]), lower = row_sum(q.sum[m][1]);
    int row = token + 16 * m;
    if (t == 0) {
      i64 at = (i64)w.pair * d.tokens + row;
      if (row + g < d.tokens) store(lse, at + g, q.top[m][0] * d.scale + logf(upper));
      if (row + g + 8 < d.tokens) store(lse, at + g + 8, q.top[m][1] * d.scale + logf(lower));
    }
    i64 at = row_start(d, w.b * d.tokens + row, w.column, 1, 0);
    store_rows<DP>(q_tile + (w.own + 16 * m) * P, q.out[m], 1.0f / upper, 1.0f / lower, out, at, (i64)d.heads * d.dim,
                   d.tokens - row, d.dim, 0);
  }
}

}  // namespace attention_forward
