// KL(t ‖ q) of a target t [I, N, N] and an image's mean attention map q, the mean over rows. An image has S sequences of
// H heads (MiniLM's loss with heads averaged; Wang et al. 2020), so a group of G = S·H pairs:
//   P_k = softmax(scale·Q_k·K_kᵀ), q = 1/G Σ_k P_k, L = 1/(I·N) Σ t·ln(t/q)
// and backward, with g = −t/(q·I·N·G) (one for the group) and δ_k,i = Σ_j P_k,ij·g_ij:
//   dS_k = P_k ∘ (g − δ_k), dq_k = dl·scale·dS_k·K_k, dk_k = dl·scale·dS_kᵀ·Q_k, dv = 0.
// No P_k is stored: the forward leaves each row's maximum and reciprocal sum, and g; the backward computes P_k again.
// Blocks, tiles and fragments are those of attention.cuh, one pair a tile.
#include "attention.cuh"
#include "rows.cuh"

namespace map_loss {

constexpr float LOG2E = 1.44269504f;

// Where a block and a warp work: 64 tokens of one image or pair, 16 of them.
struct Rows {
  int tiles, one, block_token, own, token, count;

  __device__ __forceinline__ explicit Rows(const AttentionDims& d) {
    tiles = (d.tokens + TILE - 1) / TILE;
    one = (int)blockIdx.x / tiles;
    block_token = (int)blockIdx.x % tiles * TILE;
    own = (int)(threadIdx.x >> 5) * 16;
    token = block_token + own;
    count = max(0, min(16, d.tokens - token));
  }
};

// Part `part` (0 queries, 1 keys) of 64 tokens of a pair, on its way to a tile.
template <class T, int DP>
__device__ __forceinline__ void ask(T* tile, const AttentionDims& d, const View& qkv, int pair, int part, int token) {
  load_tile<T, DP>(tile, TileRows<TILE>(d, pair, TILE), d, qkv, 3, part, token);
}

// Waits for what was asked for before the last `cp_async_commit`, or for all of it.
__device__ __forceinline__ void arrive(bool all) {
  if (all) cp_async_wait<0>();
  else cp_async_wait<1>();
  __syncthreads();
}

template <class T, int DP>
__device__ __forceinline__ void forward(const View& qkv, const View& target, const View& rows, const View& slopes,
                                        const View& parts, const AttentionDims& d, int group) {
  constexpr int P = PITCH<T, DP>, NT = TILE / 8;
  DYNAMIC_SHARED(room);
  __shared__ double sums[32];
  T* q_tiles = (T*)room;
  T* k_tiles = q_tiles + 2 * TILE * P;
  int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  Rows w(d);
  clear_padding<T, DP>(q_tiles, 4 * TILE, d.dim);
  float factor = d.scale * LOG2E, top[2], sum[2], mean[NT][4];
  int limit[2];
#pragma unroll
  for (int h = 0; h < 2; h++) limit[h] = d.causal ? min(d.tokens, w.token + g + 8 * h + 1) : d.tokens;
  // First over the pairs, each over its keys, for the rows' maxima and sums; then over the keys, each over the pairs.
  int half = group * w.tiles, steps = 2 * half;
  auto pair_of = [&](int s) { return s < half ? s / w.tiles : (s - half) % group; };
  auto tile_of = [&](int s) { return s < half ? s % w.tiles : (s - half) / group; };
  int q_slot = 0, next_slot = 0;
  auto load_step = [&](int s) {
    int k = pair_of(s), pair = w.one * group + k;
    next_slot = q_slot;
    if (s == 0 || k != pair_of(s - 1)) {
      next_slot = s == 0 ? 0 : q_slot ^ 1;
      ask<T, DP>(q_tiles + next_slot * TILE * P, d, qkv, pair, 0, w.block_token);
    }
    ask<T, DP>(k_tiles + (s & 1) * TILE * P, d, qkv, pair, 1, tile_of(s) * TILE);
    cp_async_commit();
  };
  load_step(0);
  double loss = 0.0;
  for (int s = 0; s < steps; s++) {
    q_slot = next_slot;
    if (s + 1 < steps) load_step(s + 1);
    arrive(s + 1 == steps);
    int k = pair_of(s), tile = tile_of(s);
    if (w.count > 0) {
      i64 row = (i64)(w.one * group + k) * d.tokens + w.token + g;
      Left<T, DP, false> left[1];
      float x[1][NT][4];
      left[0].set(q_tiles + (q_slot * TILE + w.own) * P);
      scores<DP, 1, NT>(x, left, k_tiles + (s & 1) * TILE * P);
#pragma unroll
      for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++)
          if (tile * TILE + 8 * j + 2 * t + e % 2 >= limit[e / 2]) x[0][j][e] = -INFINITY;
      if (s < half) {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          if (tile == 0) top[h] = -INFINITY, sum[h] = 0.0f;
          float greatest = top[h], part = 0.0f;
#pragma unroll
          for (int j = 0; j < NT; j++) greatest = fmaxf(greatest, fmaxf(x[0][j][2 * h], x[0][j][2 * h + 1]));
          greatest = row_max(greatest);
          float at = greatest == -INFINITY ? 0.0f : greatest;
#pragma unroll
          for (int j = 0; j < NT; j++)
            part += exp2_fast((x[0][j][2 * h] - at) * factor) + exp2_fast((x[0][j][2 * h + 1] - at) * factor);
          sum[h] = sum[h] * exp2_fast((top[h] - at) * factor) + part;
          top[h] = greatest;
          if (tile + 1 == w.tiles) {
            float inverse = 1.0f / row_sum(sum[h]);
            if (t == 0 && g + 8 * h < w.count) {
              store(rows, 2 * (row + 8 * h), top[h] == -INFINITY ? 0.0f : top[h]);
              store(rows, 2 * (row + 8 * h) + 1, inverse);
            }
          }
        }
      } else {
#pragma unroll
        for (int h = 0; h < 2; h++) {
          if (g + 8 * h >= w.count) continue;
          float at = load(rows, 2 * (row + 8 * h)), inverse = load(rows, 2 * (row + 8 * h) + 1);
#pragma unroll
          for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; e++) {
              // Where all keys are −∞ the reciprocal is ∞, and this NaN.
              float p = exp2_fast((x[0][j][e] - at) * factor) * inverse;
              mean[j][e] = k == 0 ? p : mean[j][e] + p;
            }
          if (k + 1 < group) continue;
          i64 at_row = ((i64)w.one * d.tokens + w.token + g + 8 * h) * d.tokens;
          float own = 0.0f, share = 1.0f / (float)group, weight = -share / ((float)(gridDim.x / w.tiles) * d.tokens);
#pragma unroll
          for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 2 * h; e < 2 * h + 2; e++) {
              int column = tile * TILE + 8 * j + 2 * t + e % 2;
              if (column >= d.tokens) continue;
              float q = mean[j][e] * share, p = load(target, at_row + column);
              own += divergence(p, q);
              store(slopes, at_row + column, finite(weight * p / (q < LEAST_NORMAL ? LEAST_NORMAL : q)));
            }
          loss += (double)own;
        }
      }
    }
    __syncthreads();
  }
  loss = block_sum_f64(loss, sums);
  if (threadIdx.x == 0) ((double*)parts.data)[blockIdx.x] = loss;
}

// P of one element; `hidden` keys have none.
__device__ __forceinline__ float weight_of(float score, float top, float inverse, float factor, bool hidden) {
  return hidden ? 0.0f : exp2_fast((score - top) * factor) * inverse;
}

template <class T, int DP>
__device__ __forceinline__ void query_gradient(const View& qkv, const View& rows, const View& slopes, const View& dl,
                                               const View& delta, const View& dqkv, const AttentionDims& d, int group,
                                               int accumulate) {
  constexpr int P = PITCH<T, DP>, NT = 4;
  DYNAMIC_SHARED(room);
  T* q_tile = (T*)room;
  T* k_tiles = q_tile + TILE * P;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
  float* stage = (float*)(k_tiles + 2 * TILE * P) + warp * STAGE<NT>;
  Rows w(d);
  clear_padding<T, DP>(q_tile, 3 * TILE, d.dim);
  i64 row = (i64)w.one * d.tokens + w.token + g, slope_row = ((i64)(w.one / group) * d.tokens + w.token + g) * d.tokens;
  float factor = d.scale * LOG2E, top[2], inverse[2], mean[2] = {0.0f, 0.0f}, dq[1][DP / 8][4];
  int limit[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    bool there = g + 8 * h < w.count;
    top[h] = there ? load(rows, 2 * (row + 8 * h)) : 0.0f, inverse[h] = there ? load(rows, 2 * (row + 8 * h) + 1) : 0.0f;
    limit[h] = there ? (d.causal ? min(d.tokens, w.token + g + 8 * h + 1) : d.tokens) : 0;
  }
#pragma unroll
  for (int j = 0; j < DP / 8; j++) dq[0][j][0] = dq[0][j][1] = dq[0][j][2] = dq[0][j][3] = 0.0f;
  Left<T, DP, false> left[1];
  left[0].set(q_tile + w.own * P);
  ask<T, DP>(q_tile, d, qkv, w.one, 0, w.block_token);
  ask<T, DP>(k_tiles, d, qkv, w.one, 1, 0);
  cp_async_commit();
  // Over the keys for δ, and again for the gradient.
  int steps = 2 * w.tiles;
  for (int s = 0; s < steps; s++) {
    int tile = s % w.tiles;
    if (s + 1 < steps) {
      ask<T, DP>(k_tiles + ((s + 1) & 1) * TILE * P, d, qkv, w.one, 1, (s + 1) % w.tiles * TILE);
      cp_async_commit();
    }
    arrive(s + 1 == steps);
    if (s == w.tiles) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        mean[h] = row_sum(mean[h]);
        if (t == 0 && g + 8 * h < w.count) store(delta, row + 8 * h, mean[h]);
      }
    }
    int pieces = w.count == 0 ? 0 : (min(TILE, d.tokens - tile * TILE) + 31) / 32;
    for (int i = 0; i < pieces; i++) {
      const T* keys = k_tiles + ((s & 1) * TILE + 32 * i) * P;
      float x[1][NT][4];
      scores<DP, 1, NT>(x, left, keys);
#pragma unroll
      for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          int h = e / 2, column = tile * TILE + 32 * i + 8 * j + 2 * t + e % 2;
          bool hidden = column >= limit[h];
          float p = weight_of(x[0][j][e], top[h], inverse[h], factor, hidden);
          float slope = hidden ? 0.0f : load(slopes, slope_row + 8 * h * (i64)d.tokens + column);
          if (s < w.tiles) mean[h] += p * slope;
          else x[0][j][e] = p * (slope - mean[h]);
        }
      if (s >= w.tiles) weighted<DP, 1, NT>(dq, x, keys, stage);
    }
    __syncthreads();
  }
  if (w.count == 0) return;
  int b = w.one / d.heads, column = (w.one - b * d.heads) * d.dim;
  float scale = d.scale * load(dl, 0);
  i64 at = row_start(d, b * d.tokens + w.token, column, 3, 0);
  store_rows<DP>(q_tile + w.own * P, dq[0], scale, scale, dqkv, at, (i64)3 * d.heads * d.dim, w.count, d.dim, accumulate);
}

template <class T, int DP>
__device__ __forceinline__ void key_gradient(const View& qkv, const View& rows, const View& slopes, const View& dl,
                                             const View& delta, const View& dqkv, const AttentionDims& d, int group,
                                             int accumulate) {
  constexpr int P = PITCH<T, DP>, NT = 4;
  DYNAMIC_SHARED(room);
  T* k_tile = (T*)room;
  T* q_tiles = k_tile + TILE * P;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
  float* stage = (float*)(q_tiles + 2 * TILE * P) + warp * STAGE<NT>;
  Rows w(d);
  clear_padding<T, DP>(k_tile, 3 * TILE, d.dim);
  i64 first = (i64)w.one * d.tokens, slopes_at = (i64)(w.one / group) * d.tokens * d.tokens;
  float factor = d.scale * LOG2E, dk[1][DP / 8][4];
#pragma unroll
  for (int j = 0; j < DP / 8; j++) dk[0][j][0] = dk[0][j][1] = dk[0][j][2] = dk[0][j][3] = 0.0f;
  Left<T, DP, false> left[1];
  left[0].set(k_tile + w.own * P);
  ask<T, DP>(k_tile, d, qkv, w.one, 1, w.block_token);
  ask<T, DP>(q_tiles, d, qkv, w.one, 0, 0);
  cp_async_commit();
  for (int tile = 0; tile < w.tiles; tile++) {
    if (tile + 1 < w.tiles) {
      ask<T, DP>(q_tiles + ((tile + 1) & 1) * TILE * P, d, qkv, w.one, 0, (tile + 1) * TILE);
      cp_async_commit();
    }
    arrive(tile + 1 == w.tiles);
    int pieces = w.count == 0 ? 0 : (min(TILE, d.tokens - tile * TILE) + 31) / 32;
    for (int i = 0; i < pieces; i++) {
      const T* queries = q_tiles + ((tile & 1) * TILE + 32 * i) * P;
      float x[1][NT][4];
      scores<DP, 1, NT>(x, left, queries);
#pragma unroll
      for (int j = 0; j < NT; j++)
#pragma unroll
        for (int c = 0; c < 2; c++) {
          int query = tile * TILE + 32 * i + 8 * j + 2 * t + c;
          bool there = query < d.tokens;
          float top = there ? load(rows, 2 * (first + query)) : 0.0f;
          float inverse = there ? load(rows, 2 * (first + query) + 1) : 0.0f;
          float mean = there ? load(delta, first + query) : 0.0f;
#pragma unroll
          for (int h = 0; h < 2; h++) {
            int own = g + 8 * h, key = w.token + own;
            bool hidden = !there || own >= w.count || (d.causal && key > query);
            float p = weight_of(x[0][j][2 * h + c], top, inverse, factor, hidden);
            float slope = hidden ? 0.0f : load(slopes, slopes_at + (i64)query * d.tokens + key);
            x[0][j][2 * h + c] = p * (slope - mean);
          }
        }
      weighted<DP, 1, NT>(dk, x, queries, stage);
    }
    __syncthreads();
  }
  if (w.count == 0) return;
  int b = w.one / d.heads, column = (w.one - b * d.heads) * d.dim;
  float scale = d.scale * load(dl, 0);
  i64 at = row_start(d, b * d.tokens + w.token, column, 3, 1), width = (i64)d.heads * d.dim;
  store_rows<DP>(k_tile + w.own * P, dk[0], scale, scale, dqkv, at, 3 * width, w.count, d.dim, accumulate);
  if (accumulate) return;
#pragma unroll
  for (int j = 0; j < DP / 8; j++) dk[0][j][0] = dk[0][j][1] = dk[0][j][2] = dk[0][j][3] = 0.0f;
  store_rows<DP>(k_tile + w.own * P, dk[0], 1.0f, 1.0f, dqkv, at + width, 3 * width, w.count, d.dim, 0);
}

}  // namespace map_loss

extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_bf16_32(View qkv, View target, View rows, View slopes, View parts, AttentionDims d, int group) {
  map_loss::forward<u16, 32>(qkv, target, rows, slopes, parts, d, group);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_bf16_64(View qkv, View target, View rows, View slopes, View parts, AttentionDims d, int group) {
  map_loss::forward<u16, 64>(qkv, target, rows, slopes, parts, d, group);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_bf16_128(View qkv, View target, View rows, View slopes, View parts, AttentionDims d, int group) {
  map_loss::forward<u16, 128>(qkv, target, rows, slopes, parts, d, group);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_f32_32(View qkv, View target, View rows, View slopes, View parts, AttentionDims d, int group) {
  map_loss::forward<float, 32>(qkv, target, rows, slopes, parts, d, group);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_f32_64(View qkv, View target, View rows, View slopes, View parts, AttentionDims d, int group) {
  map_loss::forward<float, 64>(qkv, target, rows, slopes, parts, d, group);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_f32_128(View qkv, View target, View rows, View slopes, View parts, AttentionDims d, int group) {
  map_loss::forward<float, 128>(qkv, target, rows, slopes, parts, d, group);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_query_gradient_bf16_32(View qkv, View rows, View slopes, View dl, View delta, View dqkv, AttentionDims d,
                                    int group, int accumulate) {
  map_loss::query_gradient<u16, 32>(qkv, rows, slopes, dl, delta, dqkv, d, group, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_query_gradient_bf16_64(View qkv, View rows, View slopes, View dl, View delta, View dqkv, AttentionDims d,
                                    int group, int accumulate) {
  map_loss::query_gradient<u16, 64>(qkv, rows, slopes, dl, delta, dqkv, d, group, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_query_gradient_bf16_128(View qkv, View rows, View slopes, View dl, View delta, View dqkv, AttentionDims d,
                                     int group, int accumulate) {
  map_loss::query_gradient<u16, 128>(qkv, rows, slopes, dl, delta, dqkv, d, group, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_query_gradient_f32_32(View qkv, View rows, View slopes, View dl, View delta, View dqkv, AttentionDims d,
                                   int group, int accumulate) {
  map_loss::query_gradient<float, 32>(qkv, rows, slopes, dl, delta, dqkv, d, group, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_query_gradient_f32_64(View qkv, View rows, View slopes, View dl, View delta, View dqkv, AttentionDims d,
                                   int group, int accumulate) {
  map_loss::query_gradient<float, 64>(qkv, rows, slopes, dl, delta, dqkv, d, group, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_query_gradient_f32_128(View qkv, View rows, View slopes, View dl, View delta, View dqkv, AttentionDims d,
                                    int group, int accumulate) {
  map_loss::query_gradient<float, 128>(qkv, rows, slopes, dl, delta, dqkv, d, group, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_key_gradient_bf16_32(View qkv, View rows, View slopes, View dl, View delta, View dqkv, AttentionDims d,
                                  int group, int accumulate) {
  map_loss::key_gradient<u16, 32>(qkv, rows, slopes, dl, delta, dqkv, d, group, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_key_gradient_bf16_64(View qkv, View rows, View slopes, View dl, View delta, View dqkv, AttentionDims d,
                                  int group, int accumulate) {
  map_loss::key_gradient<u16, 64>(qkv, rows, slopes, dl, delta, dqkv, d, group, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_key_gradient_bf16_128(View qkv, View rows, View slopes, View dl, View delta, View dqkv, AttentionDims d,
                                   int group, int accumulate) {
  map_loss::key_gradient<u16, 128>(qkv, rows, slopes, dl, delta, dqkv, d, group, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_key_gradient_f32_32(View qkv, View rows, View slopes, View dl, View delta, View dqkv, AttentionDims d,
                                 int group, int accumulate) {
  map_loss::key_gradient<float, 32>(qkv, rows, slopes, dl, delta, dqkv, d, group, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_key_gradient_f32_64(View qkv, View rows, View slopes, View dl, View delta, View dqkv, AttentionDims d,
                                 int group, int accumulate) {
  map_loss::key_gradient<float, 64>(qkv, rows, slopes, dl, delta, dqkv, d, group, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    map_loss_key_gradient_f32_128(View qkv, View rows, View slopes, View dl, View delta, View dqkv, AttentionDims d,
                                  int group, int accumulate) {
  map_loss::key_gradient<float, 128>(qkv, rows, slopes, dl, delta, dqkv, d, group, accumulate);
}
