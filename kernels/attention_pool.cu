// Attention of one query over the tokens of each batch entry: SigLIP's pooling head (Zhai et al., arXiv:2303.15343; timm's
// AttentionPoolLatent). q [H, D] is the same for every entry; kv is [B, N, 2, H, D].
//   p = softmax(scale·k·q) over the tokens, out = Σ p·v
//   dS = scale·p ∘ (dO·v − Σ p·(dO·v)), dk = dS·q, dv = p·dO, dq = Σ over entries and tokens of dS·k
// A block does one entry and head: 16 groups of 8 lanes take a token each, 8 elements a lane.
#include "common.cuh"

constexpr int GROUPS = 16;

// Elements c to c + 8 of a row of `dim` elements that starts at `at`; zeros beyond its end.
__device__ __forceinline__ void load_piece(const View& v, i64 at, int c, int dim, float (&x)[8]) {
  if (dim % 8 == 0 && c < dim) {
    load8(v, at + c, x);
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++) x[k] = c + k < dim ? load(v, at + c + k) : 0.0f;
  }
}

__device__ __forceinline__ void give_piece(const View& v, i64 at, int c, int dim, float (&x)[8], int accumulate) {
  if (dim % 8 == 0) {
    if (c < dim) give8_partial(v, at + c, at + dim, x, accumulate);
  } else {
#pragma unroll
    for (int k = 0; k < 8; k++)
      if (c + k < dim) give(v, at + c + k, x[k], accumulate);
  }
}

// score[n] = a·(row n), for rows of `dim` elements `stride` apart.
__device__ __forceinline__ void dots(float* score, const View& a, i64 a_at, const View& rows, i64 at, i64 stride,
                                     int tokens, int dim) {
  int lane = threadIdx.x & 7;
  for (int n0 = 0; n0 < tokens; n0 += GROUPS) {
    int n = n0 + (int)(threadIdx.x >> 3);
    float sum = 0.0f;
    if (n < tokens)
      for (int c = 8 * lane; c < dim; c += 64) {
        float x[8], y[8];
        load_piece(a, a_at, c, dim, x);
        load_piece(rows, at + n * stride, c, dim, y);
#pragma unroll
        for (int k = 0; k < 8; k++) sum += x[k] * y[k];
      }
#pragma unroll
    for (int o = 4; o > 0; o >>= 1) sum += __shfl_xor_sync(0xffffffffu, sum, o);
    if (lane == 0 && n < tokens) score[n] = sum;
  }
  __syncthreads();
}

// to[c] = Σ_n w[n]·(row n)[c], the groups' shares added in their order; `room` holds 16·64 floats.
__device__ __forceinline__ void combine(const View& to, i64 to_at, const float* w, const View& rows, i64 at, i64 stride,
                                        int tokens, int dim, float* room) {
  int lane = threadIdx.x & 7, group = threadIdx.x >> 3;
  for (int c0 = 0; c0 < dim; c0 += 64) {
    float sum[8] = {};
    int c = c0 + 8 * lane;
    if (c < dim)
      for (int n = group; n < tokens; n += GROUPS) {
        float x[8];
        load_piece(rows, at + n * stride, c, dim, x);
#pragma unroll
        for (int k = 0; k < 8; k++) sum[k] += w[n] * x[k];
      }
#pragma unroll
    for (int k = 0; k < 8; k++) room[group * 64 + 8 * lane + k] = sum[k];
    __syncthreads();
    if (threadIdx.x < 64 && c0 + (int)threadIdx.x < dim) {
      float all = 0.0f;
      for (int i = 0; i < GROUPS; i++) all += room[i * 64 + threadIdx.x];
      store(to, to_at + c0 + threadIdx.x, all);
    }
    __syncthreads();
  }
}

extern "C" __global__ void __launch_bounds__(128, 8)
    attention_pool(View q, View kv, View out, View probs, int tokens, int heads, int dim, float scale) {
  DYNAMIC_SHARED(shared);
  float *room = (float*)shared, *score = room + 32 + GROUPS * 64;
  int b = blockIdx.x / heads, h = blockIdx.x % heads;
  i64 width = (i64)heads * dim, keys = (i64)b * tokens * 2 * width + h * dim;
  dots(score, q, (i64)h * dim, kv, keys, 2 * width, tokens, dim);
  float top = -INFINITY, sum = 0.0f;
  for (int n = threadIdx.x; n < tokens; n += blockDim.x) top = max_nan(top, scale * score[n]);
  top = block_max(top, room);
  for (int n = threadIdx.x; n < tokens; n += blockDim.x) {
    score[n] = expf(scale * score[n] - top);
    sum += score[n];
  }
  sum = block_sum(sum, room);
  for (int n = threadIdx.x; n < tokens; n += blockDim.x) {
    score[n] /= sum;
    store(probs, (i64)blockIdx.x * tokens + n, score[n]);
  }
  __syncthreads();
  combine(out, (i64)b * width + h * dim, score, kv, keys + width, 2 * width, tokens, dim, room + 32);
}

// dkv where there is one, and each entry's share of dq, parts [B, H, D], where there is one.
extern "C" __global__ void __launch_bounds__(128, 8)
    attention_pool_vjp(View q, View kv, View probs, View dout, View dkv, View parts, int tokens, int heads, int dim,
                       float scale, int accumulate) {
  DYNAMIC_SHARED(shared);
  float *room = (float*)shared, *slope = room + 32 + GROUPS * 64;
  int b = blockIdx.x / heads, h = blockIdx.x % heads;
  i64 width = (i64)heads * dim, keys = (i64)b * tokens * 2 * width + h * dim, own = (i64)b * width + h * dim;
  i64 first = (i64)blockIdx.x * tokens;
  dots(slope, dout, own, kv, keys + width, 2 * width, tokens, dim);
  float mean = 0.0f;
  for (int n = threadIdx.x; n < tokens; n += blockDim.x) mean += load(probs, first + n) * slope[n];
  mean = block_sum(mean, room);
  for (int n = threadIdx.x; n < tokens; n += blockDim.x) slope[n] = scale * load(probs, first + n) * (slope[n] - mean);
  __syncthreads();
  if (dkv.len > 0) {
    int lane = threadIdx.x & 7;
    for (int c = 8 * lane; c < dim; c += 64) {
      float x[8], g[8], y[8];
      load_piece(q, (i64)h * dim, c, dim, x);
      load_piece(dout, own, c, dim, g);
      for (int n = threadIdx.x >> 3; n < tokens; n += GROUPS) {
        float s = slope[n], p = load(probs, first + n);
        i64 at = keys + n * 2 * width;
#pragma unroll
        for (int k = 0; k < 8; k++) y[k] = s * x[k];
        give_piece(dkv, at, c, dim, y, accumulate);
#pragma unroll
        for (int k = 0; k < 8; k++) y[k] = p * g[k];
        give_piece(dkv, at + width, c, dim, y, accumulate);
      }
    }
  }
  if (parts.len > 0) combine(parts, own, slope, kv, keys, 2 * width, tokens, dim, room + 32);
}

// dq (+)= Σ_b parts[b]: 32 columns a block, eight warps over the entries.
extern "C" __global__ void __launch_bounds__(256)
    attention_pool_query(View parts, View dq, int batch, int width, int accumulate) {
  __shared__ float room[8][32];
  int lane = threadIdx.x & 31, warp = threadIdx.x >> 5, c = blockIdx.x * 32 + lane;
  float sum = 0.0f;
  if (c < width)
    for (int b = warp; b < batch; b += 8) sum += load(parts, (i64)b * width + c);
  room[warp][lane] = sum;
  __syncthreads();
  if (warp > 0 || c >= width) return;
  for (int i = 1; i < 8; i++) sum += room[i][lane];
  give(dq, c, sum, accumulate);
}
