// Softmax attention and its VJP in f32, for values of any type: attention_forward.cuh, attention_backward.cuh.
#include "attention_backward.cuh"
#include "attention_forward.cuh"

extern "C" __global__ void __launch_bounds__(128, 3)
    attention_forward_f32_32(View qkv, View last, View out, View lse, AttentionDims d) {
  attention_forward::forward<float, 32, 1, 1>(qkv, last, out, lse, d);
}
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_forward_f32_64(View qkv, View last, View out, View lse, AttentionDims d) {
  attention_forward::forward<float, 64, 1, 1>(qkv, last, out, lse, d);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_f32_128(View qkv, View last, View out, View lse, AttentionDims d) {
  attention_forward::forward<float, 128, 1, 1>(qkv, last, out, lse, d);
}
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_query_gradient_f32_32(View qkv, View last, View out, View dout, View lse, View delta, View dqkv,
                                    AttentionDims d, int accumulate) {
  attention_backward::query_gradient<float, 32, false, 1>(qkv, last, out, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_query_gradient_f32_64(View qkv, View last, View out, View dout, View lse, View delta, View dqkv,
                                    AttentionDims d, int accumulate) {
  attention_backward::query_gradient<float, 64, false, 1>(qkv, last, out, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 1)
    attention_query_gradient_f32_128(View qkv, View last, View out, View dout, View lse, View delta, View dqkv,
                                     AttentionDims d, int accumulate) {
  attention_backward::query_gradient<float, 128, false, 1>(qkv, last, out, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_key_gradient_f32_32(View qkv, View last, View dout, View lse, View delta, View dqkv, AttentionDims d,
                                  int accumulate) {
  attention_backward::key_gradient<float, 32, false, 1>(qkv, last, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_key_gradient_f32_64(View qkv, View last, View dout, View lse, View delta, View dqkv, AttentionDims d,
                                  int accumulate) {
  attention_backward::key_gradient<float, 64, false, 1>(qkv, last, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 1)
    attention_key_gradient_f32_128(View qkv, View last, View dout, View lse, View delta, View dqkv, AttentionDims d,
                                   int accumulate) {
  attention_backward::key_gradient<float, 128, false, 1>(qkv, last, dout, lse, delta, dqkv, d, accumulate);
}
