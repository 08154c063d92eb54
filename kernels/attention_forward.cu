// Softmax attention in bf16: attention_forward.cuh.
#include "attention_forward.cuh"

extern "C" __global__ void __launch_bounds__(128, 4)
    attention_forward_bf16_16(View qkv, View last, View out, View lse, AttentionDims d) {
  attention_forward::forward<u16, 16, 1, 2>(qkv, last, out, lse, d);
}
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_forward_bf16_32(View qkv, View last, View out, View lse, AttentionDims d) {
  attention_forward::forward<u16, 32, 1, 2>(qkv, last, out, lse, d);
}
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_forward_bf16_48(View qkv, View last, View out, View lse, AttentionDims d) {
  attention_forward::forward<u16, 48, 1, 2>(qkv, last, out, lse, d);
}
extern "C" __global__ void __launch_bounds__(128, 3)
    attention_forward_bf16_64(View qkv, View last, View out, View lse, AttentionDims d) {
  attention_forward::forward<u16, 64, 1, 2>(qkv, last, out, lse, d);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_bf16_80(View qkv, View last, View out, View lse, AttentionDims d) {
  attention_forward::forward<u16, 80, 1, 2>(qkv, last, out, lse, d);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_bf16_128(View qkv, View last, View out, View lse, AttentionDims d) {
  attention_forward::forward<u16, 128, 1, 2>(qkv, last, out, lse, d);
}
// 128 queries a block: K and V are read from shared memory half as often.
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_wide_bf16_48(View qkv, View last, View out, View lse, AttentionDims d) {
  attention_forward::forward<u16, 48, 2, 2>(qkv, last, out, lse, d);
}
extern "C" __global__ void __launch_bounds__(128, 2)
    attention_forward_wide_bf16_64(View qkv, View last, View out, View lse, AttentionDims d) {
  attention_forward::forward<u16, 64, 2, 2>(qkv, last, out, lse, d);
}
