// VJP of softmax attention in bf16: attention_backward.cuh.
#include "attention_backward.cuh"

extern "C" __global__ void __launch_bounds__(128, 4)
    attention_query_gradient_bf16_16(View qkv, View last, View out, View dout, View lse, View delta, View dqkv,
                                     AttentionDims d, int accumulate) {
  attention_backward::query_gradient<u16, 16, true, 2>(qkv, last, out, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 4)
    attention_query_gradient_bf16_32(View qkv, View last, View out, View dout, View lse, View delta, View dqkv,
                                     AttentionDims d, int accumulate) {
  attention_backward::query_gradient<u16, 32, true, 2>(qkv, last, out, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_query_gradient_bf16_48(View qkv, View last, View out, View dout, View lse, View delta, View dqkv,
                                     AttentionDims d, int accumulate) {
  attention_backward::query_gradient<u16, 48, true, 2>(qkv, last, out, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_query_gradient_bf16_64(View qkv, View last, View out, View dout, View lse, View delta, View dqkv,
                                     AttentionDims d, int accumulate) {
  attention_backward::query_gradient<u16, 64, true, 2>(qkv, last, out, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_query_gradient_bf16_80(View qkv, View last, View out, View dout, View lse, View delta, View dqkv,
                                     AttentionDims d, int accumulate) {
  attention_backward::query_gradient<u16, 80, true, 2>(qkv, last, out, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_query_gradient_bf16_128(View qkv, View last, View out, View dout, View lse, View delta, View dqkv,
                                      AttentionDims d, int accumulate) {
  attention_backward::query_gradient<u16, 128, false, 2>(qkv, last, out, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_key_gradient_bf16_16(View qkv, View last, View dout, View lse, View delta, View dqkv, AttentionDims d,
                                   int accumulate) {
  attention_backward::key_gradient<u16, 16, true, 2>(qkv, last, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_key_gradient_bf16_32(View qkv, View last, View dout, View lse, View delta, View dqkv, AttentionDims d,
                                   int accumulate) {
  attention_backward::key_gradient<u16, 32, true, 2>(qkv, last, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_key_gradient_bf16_48(View qkv, View last, View dout, View lse, View delta, View dqkv, AttentionDims d,
                                   int accumulate) {
  attention_backward::key_gradient<u16, 48, true, 2>(qkv, last, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_key_gradient_bf16_64(View qkv, View last, View dout, View lse, View delta, View dqkv, AttentionDims d,
                                   int accumulate) {
  attention_backward::key_gradient<u16, 64, true, 2>(qkv, last, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_key_gradient_bf16_80(View qkv, View last, View dout, View lse, View delta, View dqkv, AttentionDims d,
                                   int accumulate) {
  attention_backward::key_gradient<u16, 80, true, 2>(qkv, last, dout, lse, delta, dqkv, d, accumulate);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_key_gradient_bf16_128(View qkv, View last, View dout, View lse, View delta, View dqkv, AttentionDims d,
                                    int accumulate) {
  attention_backward::key_gradient<u16, 128, false, 2>(qkv, last, dout, lse, delta, dqkv, d, accumulate);
}
