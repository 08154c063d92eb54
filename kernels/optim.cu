// The optimiser over all parameters at once: norm of the gradient, finite check and clip factor, AdamW or SGD, running
// averages, bf16 copies. Formulas: engine/cpu/src/optim.rs (Loshchilov and Hutter 2019, eq. 12, as torch's AdamW; torch's
// SGD).
//
// Tensors lie anywhere; a table in device memory names them, a list of pieces cuts them into CHUNK elements, a block each.
// What changes from step to step is in `values`, so that a recorded graph of the launches can be replayed:
// [0] −lr/(1 − β₁ᵗ), or SGD's lr  [1] 1/√(1 − β₂ᵗ)  [2] 1 − lr·weight decay  [3] SGD's momentum, 0 at the first step
// [4] greatest norm  [8...] momenta of the averages.
// What a step found is in `found`: [0] norm  [1] 1 where all is finite, else 0  [2] clip factor.
#include "vector.cuh"

#define CHUNK 4096

// engine/cuda/src/optim.rs mirrors these.
struct Tensor {
  // Without a gradient the parameter stays (running statistics) and only its averages move.
  View param, grad, slots[2], shadow;
  float most;
  int decay;
};

struct Pair {
  View from, to;
};

// Elements i..n of a tensor that piece k holds.
__device__ __forceinline__ int piece_of(const View& pieces, i64 k, i64& begin) {
  begin = (i64)load_int(pieces, 2 * k + 1) * CHUNK;
  return load_int(pieces, 2 * k);
}

__device__ __forceinline__ void read8(const View& v, i64 i, i64 n, float (&x)[8]) {
  if (i + 8 <= n) unpack8(v, fetch8(v, i), x);
  else load8_partial(v, i, n, x);
}

// parts[piece] = Σ g²
extern "C" __global__ void __launch_bounds__(256) gradient_squares(View tensors, View pieces, View parts) {
  __shared__ double room[256];
  i64 begin;
  const Tensor& t = ((const Tensor*)tensors.data)[piece_of(pieces, blockIdx.x, begin)];
  View grad = t.grad;
  double sum = 0.0;
  float x[2][8];
#pragma unroll
  for (int u = 0; u < 2; u++) {
    i64 i = begin + 8 * (i64)(u * 256 + threadIdx.x);
#pragma unroll
    for (int k = 0; k < 8; k++) x[u][k] = 0.0f;
    if (i < grad.len) read8(grad, i, grad.len, x[u]);
  }
#pragma unroll
  for (int u = 0; u < 2; u++) {
    float own = 0.0f;
#pragma unroll
    for (int k = 0; k < 8; k++) own += x[u][k] * x[u][k];
    sum += (double)own;
  }
  room[threadIdx.x] = sum;
  for (int half = 128; half > 0; half /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
  }
  if (threadIdx.x == 0) ((double*)parts.data)[blockIdx.x] = room[0];
}

// The norm, whether it and the loss are finite, the clip factor; one block
extern "C" __global__ void __launch_bounds__(1024)
    judge_step(View parts, i64 n, View loss, View values, View found) {
  __shared__ double room[1024];
  double sum = 0.0;
  for (i64 i = threadIdx.x; i < n; i += 1024) sum += ((const double*)parts.data)[i];
  room[threadIdx.x] = sum;
  for (int half = 512; half > 0; half /= 2) {
    __syncthreads();
    if ((int)threadIdx.x < half) room[threadIdx.x] += room[threadIdx.x + half];
  }
  if (threadIdx.x != 0) return;
  double norm = sqrt(room[0]), most = (double)load(values, 4);
  float total = loss.len ? load(loss, 0) : 0.0f;
  // x − x is 0 for finite x only.
  bool finite = norm - norm == 0.0 && total - total == 0.0f;
  store(found, 0, (float)norm);
  store(found, 1, finite ? 1.0f : 0.0f);
  store(found, 2, norm > most ? (float)(most / (norm + 1e-6)) : 1.0f);
}

// One step of a piece, then its averages avg ← m·avg + (1 − m)·p. f(p, g, m, v) updates an element and its slots.
template <int SLOTS, class F>
__device__ __forceinline__ void step_piece(const View& tensors, const View& pieces, const View& averages, int count,
                                           const View& values, float clip, F f) {
  i64 begin;
  int index = piece_of(pieces, blockIdx.x, begin);
  const Tensor& t = ((const Tensor*)tensors.data)[index];
  View param = t.param;
  i64 n = param.len;
#pragma unroll 1
  for (i64 i = begin + 8 * (i64)threadIdx.x; i < n && i < begin + CHUNK; i += 8 * 256) {
    float p[8];
    read8(param, i, n, p);
    if (t.grad.len) {
      float g[8], m[8], v[8];
      read8(t.grad, i, n, g);
      read8(t.slots[0], i, n, m);
      if (SLOTS > 1) read8(t.slots[1], i, n, v);
#pragma unroll
      for (int k = 0; k < 8; k++) {
        p[k] = f(p[k], g[k] * clip, m[k], v[k], t.decay);
        if (p[k] > t.most) p[k] = t.most;
      }
      store8_partial(param, i, n, p);
      store8_partial(t.slots[0], i, n, m);
      if (SLOTS > 1) store8_partial(t.slots[1], i, n, v);
      if (t.shadow.len) store8_partial(t.shadow, i, n, p);
    }
#pragma unroll 1
    for (int j = 0; j < count; j++) {
      View average = ((const View*)averages.data)[(i64)index * count + j];
      if (!average.len) continue;
      float x[8], momentum = load(values, 8 + j);
      read8(average, i, n, x);
#pragma unroll
      for (int k = 0; k < 8; k++) x[k] = momentum * x[k] + (1.0f - momentum) * p[k];
      store8_partial(average, i, n, x);
    }
  }
}

// m ← β₁m + (1−β₁)g, v ← β₂v + (1−β₂)g², p ← p·decay + step·m/(√v·root + ε); nothing where the step is not finite
extern "C" __global__ void __launch_bounds__(256, 3)
    update_adamw(View tensors, View pieces, View averages, int count, View values, View found, float beta1, float beta2,
                 float eps) {
  if (load(found, 1) == 0.0f) return;
  float step = load(values, 0), root = load(values, 1), keep = load(values, 2);
  step_piece<2>(tensors, pieces, averages, count, values, load(found, 2),
                [&](float p, float g, float& m, float& v, int decay) {
                  m = fmaf(1.0f - beta1, g, beta1 * m);
                  v = fmaf(1.0f - beta2, g * g, beta2 * v);
                  return fmaf(step, m / fmaf(sqrtf(v), root, eps), decay ? p * keep : p);
                });
}

// g ← g + wd·p, v ← keep·v + g, p ← p − lr·v, or with Nesterov's look ahead p − lr·(g + momentum·v)
extern "C" __global__ void __launch_bounds__(256, 3)
    update_sgd(View tensors, View pieces, View averages, int count, View values, View found, float momentum,
               float weight_decay, int nesterov) {
  if (load(found, 1) == 0.0f) return;
  float lr = load(values, 0), keep = load(values, 3);
  step_piece<1>(tensors, pieces, averages, count, values, load(found, 2),
                [&](float p, float g, float& v, float&, int decay) {
                  if (decay) g += weight_decay * p;
                  if (momentum != 0.0f) {
                    v = keep * v + g;
                    g = nesterov ? g + momentum * v : v;
                  }
                  return p - lr * g;
                });
}

// to ← from for each pair, converted; with `found`, only where the step was not finite (to put back what it changed)
extern "C" __global__ void __launch_bounds__(256) copy_pairs(View pairs, View pieces, View found) {
  if (found.len && load(found, 1) != 0.0f) return;
  i64 begin;
  const Pair& t = ((const Pair*)pairs.data)[piece_of(pieces, blockIdx.x, begin)];
  View from = t.from, to = t.to;
#pragma unroll
  for (int u = 0; u < 2; u++) {
    i64 i = begin + 8 * (i64)(u * 256 + threadIdx.x);
    float x[8];
    if (i < to.len) {
      read8(from, i, to.len, x);
      store8_partial(to, i, to.len, x);
    }
  }
}
