// From a batch of decoded images to the models' inputs: crop, flip, Mixup (Zhang et al. 2018) or CutMix (Yun et al.
// 2019), each model's normalisation, in one launch for all models. Definitions: `model_input` in engine/data/src/mix.rs
// and `Normalize` in engine/data/src/transform.rs.
#include "common.cuh"

// engine/cuda/src/batch.rs mirrors these.
struct Sample {
  // Row that is mixed in, and the crop's corner in the image.
  int partner, flip, top, left;
  // CutMix: rows and columns of the pasted box in cells of a grid of `grid` a side; 0 cells: Mixup.
  int grid, first_row, first_column, last_row, last_column;
  // Share of the own image.
  float lambda;
};

struct Output {
  View to;
  // A part of the view: corner, height, width.
  int top, left, h, w;
  // value = byte · factor + offset
  float factor[3], offset[3];
  // 3, or 8 of which the last five are 0.
  int channels, pad;
};

struct Outputs {
  Output of[4];
  int count, pad;
};

// A cell's edge in pixels of an output of `size`.
__device__ __forceinline__ int edge(int cells, int size, int grid) { return (cells * size + grid / 2) / grid; }

struct Row {
  const u8 *own, *other;
  int width, flip, other_flip, low, high;
  float lambda;
};

// Channel k of the row's pixel x (counted in the view), pixel o of the output's row: mixed and normalised.
__device__ __forceinline__ float value_at(const Row& r, const Output& out, int x, int o, int k) {
  float factor = out.factor[k], offset = out.offset[k];
  int here = 3 * (r.flip ? r.width - 1 - x : x) + k, there = 3 * (r.other_flip ? r.width - 1 - x : x) + k;
  if (r.high > 0) return (float)(o >= r.low && o < r.high ? r.other[there] : r.own[here]) * factor + offset;
  float v = (float)r.own[here];
  if (r.lambda != 1.0f) v = r.lambda * v + (1.0f - r.lambda) * (float)r.other[there];
  return v * factor + offset;
}

// images [batch, h, w, 3] bytes; the view of a sample is `height` rows of `width` from its corner. A block takes a row of
// a view and writes it to every output that holds it: the bytes come from memory once. Grid: batch · height.
extern "C" __global__ void __launch_bounds__(256)
    model_inputs(View images, View samples, Outputs outputs, int h, int w, int height, int width) {
  int b = blockIdx.x / height, y = blockIdx.x - b * height;
  const Sample& own = ((const Sample*)samples.data)[b];
  const Sample& other = ((const Sample*)samples.data)[own.partner];
  Row r;
  const u8* bytes = (const u8*)images.data;
  r.own = bytes + (((i64)b * h + own.top + y) * w + own.left) * 3;
  r.other = bytes + (((i64)own.partner * h + other.top + y) * w + other.left) * 3;
  r.width = width, r.flip = own.flip, r.other_flip = other.flip, r.lambda = own.lambda;
  for (int j = 0; j < outputs.count; j++) {
    const Output& out = outputs.of[j];
    int row = y - out.top;
    if (row < 0 || row >= out.h) continue;
    // With a box lambda is only the targets' share; outside its rows there is nothing to paste.
    r.low = 0, r.high = 0, r.lambda = own.lambda;
    if (own.grid > 0) {
      r.lambda = 1.0f;
      if (row >= edge(own.first_row, out.h, own.grid) && row < edge(own.last_row, out.h, own.grid))
        r.low = edge(own.first_column, out.w, own.grid), r.high = edge(own.last_column, out.w, own.grid);
    }
    i64 base = ((i64)b * out.h + row) * out.w;
    if (out.channels == 8) {
      for (int x = threadIdx.x; x < out.w; x += 256) {
        float v[8];
#pragma unroll
        for (int k = 0; k < 8; k++) v[k] = k < 3 ? value_at(r, out, out.left + x, x, k) : 0.0f;
        store8(out.to, (base + x) * 8, v);
      }
    } else if (out.w % 8 == 0) {
      // Eight values a thread, so that stores are whole; they begin at channel 8·i mod 3.
      for (int i = 8 * threadIdx.x; i < 3 * out.w; i += 8 * 256) {
        float v[8];
        int x = i / 3, k = i - 3 * x;
#pragma unroll
        for (int e = 0; e < 8; e++) {
          v[e] = value_at(r, out, out.left + x, x, k);
          if (++k == 3) k = 0, x++;
        }
        store8(out.to, base * 3 + i, v);
      }
    } else {
      for (int i = threadIdx.x; i < 3 * out.w; i += 256)
        store(out.to, base * 3 + i, value_at(r, out, out.left + i / 3, i / 3, i % 3));
    }
  }
}
