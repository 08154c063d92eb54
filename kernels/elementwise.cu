// Element-wise ops, eight elements a thread.
#include "activation.cuh"

#define EIGHT (8 * ((i64)blockIdx.x * blockDim.x + threadIdx.x))

// y = a + b
extern "C" __global__ void __launch_bounds__(256) add(View a, View b, View y, i64 n) {
  i64 i = EIGHT;
  if (i >= n) return;
  float u[8], v[8];
  load8_partial(a, i, n, u);
  load8_partial(b, i, n, v);
#pragma unroll
  for (int k = 0; k < 8; k++) u[k] += v[k];
  store8_partial(y, i, n, u);
}

// y = act(x)
extern "C" __global__ void __launch_bounds__(256) activation(View x, View y, i64 n, int act) {
  i64 i = EIGHT;
  if (i >= n) return;
  float u[8];
  load8_partial(x, i, n, u);
#pragma unroll
  for (int k = 0; k < 8; k++) u[k] = act_value(act, u[k]);
  store8_partial(y, i, n, u);
}

// dx (+)= dy · act'(x)
extern "C" __global__ void __launch_bounds__(256)
    activation_vjp(View x, View dy, View dx, i64 n, int act, int accumulate) {
  i64 i = EIGHT;
  if (i >= n) return;
  float u[8], g[8];
  load8_partial(x, i, n, u);
  load8_partial(dy, i, n, g);
#pragma unroll
  for (int k = 0; k < 8; k++) g[k] *= act_slope(act, u[k]);
  give8_partial(dx, i, n, g, accumulate);
}

// to (+)= from, converted
extern "C" __global__ void __launch_bounds__(256) copy(View from, View to, i64 n, int add) {
  i64 i = EIGHT;
  if (i >= n) return;
  float u[8];
  load8_partial(from, i, n, u);
  give8_partial(to, i, n, u, add);
}
