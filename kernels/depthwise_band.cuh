// What the depthwise convolutions on tensor cores share: strips of eight columns, and pixels with their channels apart.
//
// An output row is cut into strips of eight columns. A strip reads 8 + K − 1 columns, at most 16: its own eight, which
// start at 8·strip − pad, and the first of the next strip's. Memory holds them once, in slots of eight columns: those of
// a run of strips of one image, and a last slot for the columns behind the run's last strip.
#pragma once
#include "mma.cuh"

// `Band` of engine/cuda/src/ops/depthwise_band.rs. The image read is [batch, h, w, c], the one of the strips [batch, oh,
// ow, c].
struct Band {
  int batch, h, w, oh, ow, c, pad_h, pad_w;
  int strips;  // of a row
  int slots;   // room for so many
  int unit_bits;  // a block takes 2^unit_bits groups of eight channels; grid x: channel tiles, fastest, then shares of the rows
  int tiles;
  i64 rows;    // rows of all groups of strips
  // Elements are counted in 32 bits, in groups of eight.
};

#define ROWS_AHEAD 4

// Copies the eight channels at `unit` (counted in groups of eight) of x, or zeros where that is negative.
__device__ __forceinline__ void copy_unit(uint4* to, const View& x, int unit) {
  if (unit >= 0) CHECK_INDEX(x, (i64)unit * 8, 8);
  cp_async_16(to, (const uint4*)x.data + (unit >= 0 ? unit : 0), unit >= 0);
}

// The low, or the high, halves of two words.
__device__ __forceinline__ u32 low_halves(u32 a, u32 b) {
  return __byte_perm(a, b, 0x5410);
}

__device__ __forceinline__ u32 high_halves(u32 a, u32 b) {
  return __byte_perm(a, b, 0x7632);
}

// Words from a channel to the next where `n` (a multiple of four) are used: 32 neighbouring words of the units meet no
// bank twice.
__device__ __forceinline__ int channel_pitch(int n, int unit_bits) { return n + (unit_bits == 2 ? 1 : 2); }

// Eight channels of the pixels `a` and `b` into words of their own, `pitch` apart.
__device__ __forceinline__ void part_channels(uint4 a, uint4 b, u32* to, int pitch) {
  to[0 * pitch] = low_halves(a.x, b.x), to[1 * pitch] = high_halves(a.x, b.x);
  to[2 * pitch] = low_halves(a.y, b.y), to[3 * pitch] = high_halves(a.y, b.y);
  to[4 * pitch] = low_halves(a.z, b.z), to[5 * pitch] = high_halves(a.z, b.z);
  to[6 * pitch] = low_halves(a.w, b.w), to[7 * pitch] = high_halves(a.w, b.w);
}

// The reverse: eight channels of two pixels.
__device__ __forceinline__ void join_channels(const u32* from, int pitch, uint4& a, uint4& b) {
  u32 v[8];
#pragma unroll
  for (int i = 0; i < 8; i++) v[i] = from[i * pitch];
  a = make_uint4(low_halves(v[0], v[1]), low_halves(v[2], v[3]), low_halves(v[4], v[5]), low_halves(v[6], v[7]));
  b = make_uint4(high_halves(v[0], v[1]), high_halves(v[2], v[3]), high_halves(v[4], v[5]), high_halves(v[6], v[7]));
}

// A group of strips: the `count` from `first` on, over all images.
struct Strips {
  int first, count, strips;
  int image, place;  // of the first
};

__device__ __forceinline__ Strips strips_of(int group, int most, int total, int strips) {
  Strips s;
  s.first = group * most, s.strips = strips;
  s.count = total - s.first < most ? total - s.first : most;
  s.image = s.first / strips, s.place = s.first - s.image * strips;
  return s;
}

// The slot of strip m of the group, its image and its place in the row.
__device__ __forceinline__ int slot_of(const Strips& s, int m, int& image, int& place) {
  int at = s.place + m, run = at / s.strips;
  image = s.image + run, place = at - run * s.strips;
  return m + run;
}

// Where slot j's columns are. Whether all eight may be used, or only those that reach a strip before it.
__device__ __forceinline__ bool slot_is_strip(const Strips& s, int j, int& image, int& place) {
  int at = s.place + j, run = at / (s.strips + 1);
  image = s.image + run, place = at - run * (s.strips + 1);
  return place < s.strips && j - run < s.count;
}

// Slots of the group in use.
__device__ __forceinline__ int slots_of(const Strips& s) {
  int image, place;
  return slot_of(s, s.count - 1, image, place) + 2;
}

// The rows [begin, end) of a block, of `rows` in all.
__device__ __forceinline__ void share_of(const Band& d, i64& begin, i64& end) {
  i64 shares = gridDim.x / d.tiles, share = blockIdx.x / d.tiles;
  begin = d.rows * share / shares, end = d.rows * (share + 1) / shares;
}
