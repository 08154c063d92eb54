// MobileViTv2's separable self-attention (Mehta and Rastegari, arXiv:2206.02680, §3.2) on a packed qkv [B, N, 1 + 2·D]: a
// row holds the query (one number), the key and the value.
//   p = softmax over N of the queries, c = Σ_n p_n·k_n, y_n = relu(v_n)·c
//   dc = Σ_n dy_n·relu(v_n), dv_n = dy_n·c where v_n > 0, dk_n = p_n·dc, dp_n = k_n·dc, dq_n = p_n·(dp_n − Σ p·dp)
// A block of eight warps does one batch entry; a warp takes every eighth token. Rows have odd lengths, so that elements
// are read one by one, neighbours by neighbouring lanes; four columns a lane and four tokens at a time are under way.
#include "common.cuh"

constexpr int WARPS = 8, COLUMNS = 4, TOKENS = 4;

// max(v, 0); NaN stays NaN.
__device__ __forceinline__ float relu(float v) { return v < 0.0f ? 0.0f : v; }

// to[c] = Σ over the warps of their sums in columns c0 to c0 + 128, in order; `room` holds 8·128 floats.
__device__ __forceinline__ void merge_columns(const float (&sum)[COLUMNS], float* to, int c0, int dim, float* room) {
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
#pragma unroll
  for (int i = 0; i < COLUMNS; i++) room[warp * 128 + 32 * i + lane] = sum[i];
  __syncthreads();
  if (threadIdx.x < 128 && c0 + (int)threadIdx.x < dim) {
    float all = 0.0f;
    for (int w = 0; w < WARPS; w++) all += room[w * 128 + threadIdx.x];
    to[c0 + threadIdx.x] = all;
  }
  __syncthreads();
}

extern "C" __global__ void __launch_bounds__(256)
    separable_attention(View qkv, View y, View p, View context, int tokens, int dim) {
  DYNAMIC_SHARED(shared);
  float *room = (float*)shared, *small = room + WARPS * 128, *c_shared = small + 32, *weight = c_shared + dim;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  i64 stride = 1 + 2 * (i64)dim, first = (i64)blockIdx.x * tokens, base = first * stride;

  float top = -INFINITY, total = 0.0f;
  for (int n = threadIdx.x; n < tokens; n += blockDim.x) {
    weight[n] = load(qkv, base + n * stride);
    top = max_nan(top, weight[n]);
  }
  top = block_max(top, small);
  for (int n = threadIdx.x; n < tokens; n += blockDim.x) {
    weight[n] = expf(weight[n] - top);
    total += weight[n];
  }
  total = block_sum(total, small);
  for (int n = threadIdx.x; n < tokens; n += blockDim.x) {
    weight[n] /= total;
    store(p, first + n, weight[n]);
  }
  __syncthreads();

  for (int c0 = 0; c0 < dim; c0 += 128) {
    float sum[COLUMNS] = {};
    for (int n0 = warp; n0 < tokens; n0 += WARPS * TOKENS) {
      float k[TOKENS][COLUMNS];
#pragma unroll
      for (int j = 0; j < TOKENS; j++)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
          int n = n0 + WARPS * j, c = c0 + 32 * i + lane;
          k[j][i] = n < tokens && c < dim ? load(qkv, base + n * stride + 1 + c) : 0.0f;
        }
#pragma unroll
      for (int j = 0; j < TOKENS; j++)
        if (n0 + WARPS * j < tokens)
#pragma unroll
          for (int i = 0; i < COLUMNS; i++) sum[i] += weight[n0 + WARPS * j] * k[j][i];
    }
    merge_columns(sum, c_shared, c0, dim, room);
  }
  for (int c = threadIdx.x; c < dim; c += blockDim.x) store(context, (i64)blockIdx.x * dim + c, c_shared[c]);

  for (int c0 = 0; c0 < dim; c0 += 128)
    for (int n0 = warp; n0 < tokens; n0 += WARPS * TOKENS) {
      float v[TOKENS][COLUMNS];
#pragma unroll
      for (int j = 0; j < TOKENS; j++)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
          int n = n0 + WARPS * j, c = c0 + 32 * i + lane;
          v[j][i] = n < tokens && c < dim ? load(qkv, base + n * stride + 1 + dim + c) : 0.0f;
        }
#pragma unroll
      for (int j = 0; j < TOKENS; j++)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
          int n = n0 + WARPS * j, c = c0 + 32 * i + lane;
          if (n < tokens && c < dim) store(y, (first + n) * dim + c, relu(v[j][i]) * c_shared[c]);
        }
    }
}

extern "C" __global__ void __launch_bounds__(256)
    separable_attention_vjp(View qkv, View p, View context, View dy, View dqkv, int tokens, int dim, int accumulate) {
  DYNAMIC_SHARED(shared);
  float *room = (float*)shared, *small = room + WARPS * 128, *dc = small + 32, *dp = dc + dim;
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  i64 stride = 1 + 2 * (i64)dim, first = (i64)blockIdx.x * tokens, base = first * stride;

  for (int c0 = 0; c0 < dim; c0 += 128) {
    float sum[COLUMNS] = {}, ctx[COLUMNS];
#pragma unroll
    for (int i = 0; i < COLUMNS; i++) {
      int c = c0 + 32 * i + lane;
      ctx[i] = c < dim ? load(context, (i64)blockIdx.x * dim + c) : 0.0f;
    }
    for (int n0 = warp; n0 < tokens; n0 += WARPS * TOKENS) {
      float v[TOKENS][COLUMNS], g[TOKENS][COLUMNS];
#pragma unroll
      for (int j = 0; j < TOKENS; j++)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
          int n = n0 + WARPS * j, c = c0 + 32 * i + lane;
          bool there = n < tokens && c < dim;
          v[j][i] = there ? load(qkv, base + n * stride + 1 + dim + c) : 0.0f;
          g[j][i] = there ? load(dy, (first + n) * dim + c) : 0.0f;
        }
#pragma unroll
      for (int j = 0; j < TOKENS; j++)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
          int n = n0 + WARPS * j, c = c0 + 32 * i + lane;
          sum[i] += g[j][i] * relu(v[j][i]);
          float d = v[j][i] > 0.0f ? g[j][i] * ctx[i] : (v[j][i] == v[j][i] ? 0.0f : v[j][i]);
          if (n < tokens && c < dim) give(dqkv, base + n * stride + 1 + dim + c, d, accumulate);
        }
    }
    merge_columns(sum, dc, c0, dim, room);
  }

  for (int n0 = warp; n0 < tokens; n0 += WARPS * TOKENS) {
    float dot[TOKENS] = {};
    for (int c0 = 0; c0 < dim; c0 += 128) {
      float k[TOKENS][COLUMNS];
#pragma unroll
      for (int j = 0; j < TOKENS; j++)
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
          int n = n0 + WARPS * j, c = c0 + 32 * i + lane;
          k[j][i] = n < tokens && c < dim ? load(qkv, base + n * stride + 1 + c) : 0.0f;
        }
#pragma unroll
      for (int j = 0; j < TOKENS; j++) {
        int n = n0 + WARPS * j;
        float weight = n < tokens ? load(p, first + n) : 0.0f;
#pragma unroll
        for (int i = 0; i < COLUMNS; i++) {
          int c = c0 + 32 * i + lane;
          if (n >= tokens || c >= dim) continue;
          dot[j] += k[j][i] * dc[c];
          give(dqkv, base + n * stride + 1 + c, weight * dc[c], accumulate);
        }
      }
    }
#pragma unroll
    for (int j = 0; j < TOKENS; j++) {
      float sum = warp_sum(dot[j]);
      if (lane == 0 && n0 + WARPS * j < tokens) dp[n0 + WARPS * j] = sum;
    }
  }
  __syncthreads();
  float along = 0.0f;
  for (int n = threadIdx.x; n < tokens; n += blockDim.x) along += load(p, first + n) * dp[n];
  along = block_sum(along, small);
  for (int n = threadIdx.x; n < tokens; n += blockDim.x)
    give(dqkv, base + n * stride, load(p, first + n) * (dp[n] - along), accumulate);
}
