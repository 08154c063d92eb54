// The probabilities of softmax attention as a value: map [B, H, N, N] = softmax(scale·Q·Kᵀ) of a packed qkv
// [B, N, 3, H, D] (0 where the causal mask hides a token), and the VJP from the map P and its gradient dP:
//   δ_i = Σ_j P_ij·dP_ij, dS = P ∘ (dP − δ), dq = scale·dS·K, dk = scale·dSᵀ·Q, dv = 0.
// The forward passes over the keys twice, for the rows' maxima and sums and for the values, so that nothing of the size of
// the map is read back.
#include "attention.cuh"

namespace attention_map {

constexpr float LOG2E = 1.44269504f;

template <class T, int DP>
__device__ __forceinline__ void forward(const View& qkv, const View& map, const AttentionDims& d) {
  constexpr int P = PITCH<T, DP>, NT = 4;
  DYNAMIC_SHARED(room);
  T* q_tile = (T*)room;
  T* k_tile = q_tile + TILE * P;
  int lane = threadIdx.x & 31, g = lane / 4, t = lane % 4;
  Place<1> w(d);
  TileRows<TILE> tile_rows(d, w.first_pair, w.span);
  load_tile<T, DP>(q_tile, tile_rows, d, qkv, 3, 0, w.block_token);
  clear_padding<T, DP>(q_tile, 2 * TILE, d.dim);
  int tiles = (d.tokens + TILE - 1) / TILE, most = d.causal ? w.token + 16 : d.tokens;
  float top[2] = {-INFINITY, -INFINITY}, sum[2] = {0.0f, 0.0f}, factor = d.scale * LOG2E;
  int limit[2];
#pragma unroll
  for (int h = 0; h < 2; h++) limit[h] = d.causal ? min(d.tokens, w.token + g + 8 * h + 1) : d.tokens;
  Left<T, DP, false> left[1];
  left[0].set(q_tile + w.own * P);
  for (int pass = 0; pass < 2; pass++) {
    for (int tile = 0; tile < tiles; tile++) {
      if (tiles > 1 || pass == 0) {
        load_tile<T, DP>(k_tile, tile_rows, d, qkv, 3, 1, tile * TILE);
        cp_async_commit();
        cp_async_wait<0>();
        __syncthreads();
      }
      int groups = w.rows == 0 ? 0 : (min(w.span, d.tokens - tile * TILE) + 15) / 16;
      for (int i = 0; i < groups; i += 2) {
        // A second group that is another pair's, or beyond the tile, is masked like any key beyond the last.
        int key = tile * TILE + 16 * i;
        float s[1][NT][4];
        if (i + 1 < groups) {
          scores<DP, 1, NT>(s, left, k_tile + (w.shared + 16 * i) * P);
        } else {
          float half[1][NT / 2][4];
          scores<DP, 1, NT / 2>(half, left, k_tile + (w.shared + 16 * i) * P);
#pragma unroll
          for (int j = 0; j < NT; j++)
#pragma unroll
            for (int e = 0; e < 4; e++) s[0][j][e] = j < NT / 2 ? half[0][j % (NT / 2)][e] : 0.0f;
        }
#pragma unroll
        for (int j = 0; j < NT; j++)
#pragma unroll
          for (int e = 0; e < 4; e++)
            if (key + 8 * j + 2 * t + e % 2 >= limit[e / 2]) s[0][j][e] = -INFINITY;
        if (pass == 0) {
          if (key >= most) continue;
#pragma unroll
          for (int h = 0; h < 2; h++) {
            float greatest = top[h];
#pragma unroll
            for (int j = 0; j < NT; j++) greatest = fmaxf(greatest, fmaxf(s[0][j][2 * h], s[0][j][2 * h + 1]));
            greatest = row_max(greatest);
            float at = greatest == -INFINITY ? 0.0f : greatest, part = 0.0f;
#pragma unroll
            for (int j = 0; j < NT; j++)
              part += exp2_fast((s[0][j][2 * h] - at) * factor) + exp2_fast((s[0][j][2 * h + 1] - at) * factor);
            sum[h] = sum[h] * exp2_fast((top[h] - at) * factor) + part;
            top[h] = greatest;
          }
        } else {
#pragma unroll
          for (int h = 0; h < 2; h++) {
            if (g + 8 * h >= w.rows) continue;
            i64 row = ((i64)w.pair * d.tokens + w.token + g + 8 * h) * d.tokens;
#pragma unroll
            for (int j = 0; j < NT; j++)
#pragma unroll
              for (int e = 0; e < 2; e++) {
                int column = key + 8 * j + 2 * t + e;
                float p = column < limit[h] ? exp2_fast((s[0][j][2 * h + e] - top[h]) * factor) * sum[h] : 0.0f;
                if (column < d.tokens && 8 * j < 16 * (groups - i)) store(map, row + column, p);
              }
          }
        }
      }
      __syncthreads();
    }
    if (pass == 0) {
#pragma unroll
      for (int h = 0; h < 2; h++) {
        sum[h] = 1.0f / row_sum(sum[h]);
        if (top[h] == -INFINITY) top[h] = 0.0f;
      }
    }
  }
}

// P ∘ (dP − δ) for one element; 0 outside the map.
__device__ __forceinline__ float slope(const View& map, const View& dmap, i64 at, float delta, bool inside) {
  return inside ? load(map, at) * (load(dmap, at) - delta) : 0.0f;
}

template <class T, int DP>
__device__ __forceinline__ void query_gradient(const View& qkv, const View& map, const View& dmap, const View& delta,
                                               const View& dqkv, const AttentionDims& d, int accumulate) {
  constexpr int P = PITCH<T, DP>, NT = 2;
  DYNAMIC_SHARED(room);
  T* q_tile = (T*)room;
  T* k_tile = q_tile + TILE * P;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
  float* stage = (float*)(k_tile + TILE * P) + warp * STAGE<NT>;
  Place<1> w(d);
  TileRows<TILE> tile_rows(d, w.first_pair, w.span);
  clear_padding<T, DP>(k_tile, TILE, d.dim);
  i64 row = (i64)w.pair * d.tokens + w.token;
  float sum = 0.0f, mean[2];
  for (int r = 0; r < w.rows; r++) {
    float part = 0.0f;
    for (int c = lane; c < d.tokens; c += 32) {
      i64 at = (row + r) * d.tokens + c;
      part += load(map, at) * load(dmap, at);
    }
    part = warp_sum(part);
    if (lane == r) sum = part;
  }
  if (lane < w.rows) store(delta, row + lane, sum);
#pragma unroll
  for (int h = 0; h < 2; h++) mean[h] = __shfl_sync(0xffffffffu, sum, g + 8 * h);

  float dq[1][DP / 8][4];
#pragma unroll
  for (int j = 0; j < DP / 8; j++) dq[0][j][0] = dq[0][j][1] = dq[0][j][2] = dq[0][j][3] = 0.0f;
  int tiles = (d.tokens + TILE - 1) / TILE;
  for (int tile = 0; tile < tiles; tile++) {
    load_tile<T, DP>(k_tile, tile_rows, d, qkv, 3, 1, tile * TILE);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    int groups = w.rows == 0 ? 0 : (min(w.span, d.tokens - tile * TILE) + 15) / 16;
    for (int i = 0; i < groups; i++) {
      float s[1][NT][4];
#pragma unroll
      for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          int r = g + e / 2 * 8, column = tile * TILE + 16 * i + 8 * j + 2 * t + e % 2;
          s[0][j][e] = slope(map, dmap, (row + r) * d.tokens + column, mean[e / 2], r < w.rows && column < d.tokens);
        }
      weighted<DP, 1, NT>(dq, s, k_tile + (w.shared + 16 * i) * P, stage);
    }
    __syncthreads();
  }
  if (w.rows == 0) return;
  i64 at = row_start(d, w.b * d.tokens + w.token, w.column, 3, 0);
  store_rows<DP>(q_tile + w.own * P, dq[0], d.scale, d.scale, dqkv, at, (i64)3 * d.heads * d.dim, w.rows, d.dim,
                 accumulate);
}

template <class T, int DP>
__device__ __forceinline__ void key_gradient(const View& qkv, const View& map, const View& dmap, const View& delta,
                                             const View& dqkv, const AttentionDims& d, int accumulate) {
  constexpr int P = PITCH<T, DP>, NT = 2;
  DYNAMIC_SHARED(room);
  T* k_tile = (T*)room;
  T* q_tile = k_tile + TILE * P;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, g = lane / 4, t = lane % 4;
  float* stage = (float*)(q_tile + TILE * P) + warp * STAGE<NT>;
  Place<1> w(d);
  TileRows<TILE> tile_rows(d, w.first_pair, w.span);
  clear_padding<T, DP>(q_tile, TILE, d.dim);
  i64 first = (i64)w.pair * d.tokens;
  float dk[1][DP / 8][4];
#pragma unroll
  for (int j = 0; j < DP / 8; j++) dk[0][j][0] = dk[0][j][1] = dk[0][j][2] = dk[0][j][3] = 0.0f;
  int tiles = (d.tokens + TILE - 1) / TILE;
  for (int tile = 0; tile < tiles; tile++) {
    load_tile<T, DP>(q_tile, tile_rows, d, qkv, 3, 0, tile * TILE);
    cp_async_commit();
    cp_async_wait<0>();
    __syncthreads();
    int groups = w.rows == 0 ? 0 : (min(w.span, d.tokens - tile * TILE) + 15) / 16;
    for (int i = 0; i < groups; i++) {
      float s[1][NT][4];
#pragma unroll
      for (int j = 0; j < NT; j++)
#pragma unroll
        for (int e = 0; e < 4; e++) {
          int key = g + e / 2 * 8, query = tile * TILE + 16 * i + 8 * j + 2 * t + e % 2;
          bool inside = key < w.rows && query < d.tokens;
          float mean = inside ? load(delta, first + query) : 0.0f;
          s[0][j][e] = slope(map, dmap, (first + query) * d.tokens + w.token + key, mean, inside);
        }
      weighted<DP, 1, NT>(dk, s, q_tile + (w.shared + 16 * i) * P, stage);
    }
    __syncthreads();
  }
  if (w.rows == 0) return;
  i64 at = row_start(d, w.b * d.tokens + w.token, w.column, 3, 1), width = (i64)d.heads * d.dim;
  store_rows<DP>(k_tile + w.own * P, dk[0], d.scale, d.scale, dqkv, at, 3 * width, w.rows, d.dim, accumulate);
  if (accumulate) return;
#pragma unroll
  for (int j = 0; j < DP / 8; j++) dk[0][j][0] = dk[0][j][1] = dk[0][j][2] = dk[0][j][3] = 0.0f;
  store_rows<DP>(k_tile + w.own * P, dk[0], 1.0f, 1.0f, dqkv, at + width, 3 * width, w.rows, d.dim, 0);
}

}  // namespace attention_map

extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_bf16_32(View qkv, View map, AttentionDims d) {
  attention_map::forward<u16, 32>(qkv, map, d);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_bf16_64(View qkv, View map, AttentionDims d) {
  attention_map::forward<u16, 64>(qkv, map, d);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_bf16_128(View qkv, View map, AttentionDims d) {
  attention_map::forward<u16, 128>(qkv, map, d);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_f32_32(View qkv, View map, AttentionDims d) {
  attention_map::forward<float, 32>(qkv, map, d);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_f32_64(View qkv, View map, AttentionDims d) {
  attention_map::forward<float, 64>(qkv, map, d);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_f32_128(View qkv, View map, AttentionDims d) {
  attention_map::forward<float, 128>(qkv, map, d);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_query_gradient_bf16_32(View qkv, View map, View dmap, View delta, View dqkv, AttentionDims d,
                                         int accumulate) {
  attention_map::query_gradient<u16, 32>(qkv, map, dmap, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_query_gradient_bf16_64(View qkv, View map, View dmap, View delta, View dqkv, AttentionDims d,
                                         int accumulate) {
  attention_map::query_gradient<u16, 64>(qkv, map, dmap, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_query_gradient_bf16_128(View qkv, View map, View dmap, View delta, View dqkv, AttentionDims d,
                                          int accumulate) {
  attention_map::query_gradient<u16, 128>(qkv, map, dmap, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_query_gradient_f32_32(View qkv, View map, View dmap, View delta, View dqkv, AttentionDims d,
                                        int accumulate) {
  attention_map::query_gradient<float, 32>(qkv, map, dmap, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_query_gradient_f32_64(View qkv, View map, View dmap, View delta, View dqkv, AttentionDims d,
                                        int accumulate) {
  attention_map::query_gradient<float, 64>(qkv, map, dmap, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_query_gradient_f32_128(View qkv, View map, View dmap, View delta, View dqkv, AttentionDims d,
                                         int accumulate) {
  attention_map::query_gradient<float, 128>(qkv, map, dmap, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_key_gradient_bf16_32(View qkv, View map, View dmap, View delta, View dqkv, AttentionDims d,
                                       int accumulate) {
  attention_map::key_gradient<u16, 32>(qkv, map, dmap, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_key_gradient_bf16_64(View qkv, View map, View dmap, View delta, View dqkv, AttentionDims d,
                                       int accumulate) {
  attention_map::key_gradient<u16, 64>(qkv, map, dmap, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_key_gradient_bf16_128(View qkv, View map, View dmap, View delta, View dqkv, AttentionDims d,
                                        int accumulate) {
  attention_map::key_gradient<u16, 128>(qkv, map, dmap, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_key_gradient_f32_32(View qkv, View map, View dmap, View delta, View dqkv, AttentionDims d,
                                      int accumulate) {
  attention_map::key_gradient<float, 32>(qkv, map, dmap, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_key_gradient_f32_64(View qkv, View map, View dmap, View delta, View dqkv, AttentionDims d,
                                      int accumulate) {
  attention_map::key_gradient<float, 64>(qkv, map, dmap, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_map_key_gradient_f32_128(View qkv, View map, View dmap, View delta, View dqkv, AttentionDims d,
                                       int accumulate) {
  attention_map::key_gradient<float, 128>(qkv, map, dmap, delta, dqkv, d, accumulate);
}
