// Activations and their derivatives, numbered in the order of engine/cpu's `Activation::ALL`; formulas as there.
#pragma once
#include "common.cuh"

enum Act : int { IDENTITY, RELU, RELU6, SILU, GELU, GELU_TANH, QUICK_GELU, HARD_SWISH, HARD_SIGMOID, SIGMOID, TANH };

// 2^x and 1/x of the special function unit, to about a unit in the last place. What is below the least normal number
// reads and comes out as 0; without that each takes three instructions more.
__device__ __forceinline__ float power_of_2(float x) {
#ifndef MCPIPE_SHIM
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return exp2f(x);
#endif
}

__device__ __forceinline__ float reciprocal(float x) {
#ifndef MCPIPE_SHIM
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
#else
  return 1.0f / x;
#endif
}

// 1/(1 + e^-x); finite for every x.
__device__ __forceinline__ float sigmoid(float x) { return reciprocal(1.0f + power_of_2(-1.44269504f * x)); }

// Φ(x), the normal distribution function, and e^(−x²/2) on the way. erf by Abramowitz and Stegun 1964, 7.1.26: error
// at most 1.5e-7, in a third of erff's instructions.
__device__ __forceinline__ float normal_cdf(float x, float& bell) {
  bell = power_of_2(-0.72134752f * (x * x));
  float t = reciprocal(1.0f + 0.3275911f * 0.70710678f * fabsf(x));
  float tail = t * (0.254829592f + t * (-0.284496736f + t * (1.421413741f + t * (-1.453152027f + t * 1.061405429f))));
  float half = 0.5f * tail * bell;
  return x < 0.0f ? half : 1.0f - half;
}

// relu(NaN) is NaN, unlike fmaxf.
__device__ __forceinline__ float clamp_nan(float x, float lo, float hi) { return x < lo ? lo : (x > hi ? hi : x); }

__device__ __forceinline__ float act_value(int act, float x) {
  switch (act) {
    case RELU: return x < 0.0f ? 0.0f : x;
    case RELU6: return clamp_nan(x, 0.0f, 6.0f);
    case SILU: return x * sigmoid(x);
    case GELU: {
      float bell;
      return x * normal_cdf(x, bell);
    }
    case GELU_TANH: {
      float u = 0.79788456f * (x + 0.044715f * x * x * x);
      return x * sigmoid(2.0f * u);
    }
    case QUICK_GELU: return x * sigmoid(1.702f * x);
    case HARD_SWISH: return x * clamp_nan(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f);
    case HARD_SIGMOID: return clamp_nan(x + 3.0f, 0.0f, 6.0f) * (1.0f / 6.0f);
    case SIGMOID: return sigmoid(x);
    case TANH: return tanhf(x);
    default: return x;
  }
}

// d act(x) / dx.
__device__ __forceinline__ float act_slope(int act, float x) {
  switch (act) {
    case RELU: return x > 0.0f ? 1.0f : (x != x ? x : 0.0f);
    case RELU6: return x != x ? x : (x > 0.0f && x < 6.0f ? 1.0f : 0.0f);
    case SILU: {
      float s = sigmoid(x);
      return s * (1.0f + x * (1.0f - s));
    }
    case GELU: {
      float bell, cdf = normal_cdf(x, bell);
      return cdf + x * 0.39894228f * bell;
    }
    case GELU_TANH: {
      float u = 0.79788456f * (x + 0.044715f * x * x * x);
      float s = sigmoid(2.0f * u);
      return s + x * s * (1.0f - s) * 2.0f * 0.79788456f * (1.0f + 0.134145f * x * x);
    }
    case QUICK_GELU: {
      float s = sigmoid(1.702f * x);
      return s * (1.0f + 1.702f * x * (1.0f - s));
    }
    case HARD_SWISH: return x != x ? x : (x <= -3.0f ? 0.0f : (x >= 3.0f ? 1.0f : x * (1.0f / 3.0f) + 0.5f));
    case HARD_SIGMOID: return x != x ? x : (x > -3.0f && x < 3.0f ? 1.0f / 6.0f : 0.0f);
    case SIGMOID: {
      float s = sigmoid(x);
      return s * (1.0f - s);
    }
    case TANH: {
      float t = tanhf(x);
      return 1.0f - t * t;
    }
    default: return 1.0f;
  }
}
