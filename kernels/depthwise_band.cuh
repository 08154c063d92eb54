// What the depthwise convolutions on tensor cores share: strips of eight columns, and pixels with their channels apart.
//
// An output row is cut into strips of eight columns. A strip reads 8 + K − 1 columns, at most 16: its own eight, which
// start at 8·strip − pad, and the first of the next strip's. Memory holds them once, in slots of eight columns: one for
// each strip, and one for the columns behind the last strip of each run of strips of one image.
#pragma once
#include "mma.cuh"

// `Band` of engine/cuda/src/ops/depthwise_band.rs. The image read is [batch, h, w, c], the one of the strips [batch, oh,
// ow, c].
// Memory is counted in units of eight channels, in 32 bits. Grid x: tiles of channels, fastest, then shares of the rows.
struct Band {
  int batch, h, w, oh, ow, c, pad_h, pad_w;
  int strips;     // of a row
  int slots;      // of a group at most
  int unit_bits;  // a block takes 2^unit_bits units
  int tiles;      // of channels
  int rows;       // of all groups of strips
};

#define ROWS_AHEAD 4

// The low, or the high, halves of two words.
__device__ __forceinline__ u32 low_halves(u32 a, u32 b) {
  return __byte_perm(a, b, 0x5410);
}

__device__ __forceinline__ u32 high_halves(u32 a, u32 b) {
  return __byte_perm(a, b, 0x7632);
}

// Words from a channel to the next where N (a multiple of 32) are used and a block has MOST units at most: neighbouring
// words of all units meet no bank twice.
template <int N, int MOST> struct Pitch {
  static constexpr int VALUE = N + (MOST == 4 ? 1 : 2);
};

// Eight channels of the pixels `a` and `b` into words of their own, `pitch` apart.
template <int pitch> __device__ __forceinline__ void part_channels(uint4 a, uint4 b, u32* to) {
  to[0 * pitch] = low_halves(a.x, b.x), to[1 * pitch] = high_halves(a.x, b.x);
  to[2 * pitch] = low_halves(a.y, b.y), to[3 * pitch] = high_halves(a.y, b.y);
  to[4 * pitch] = low_halves(a.z, b.z), to[5 * pitch] = high_halves(a.z, b.z);
  to[6 * pitch] = low_halves(a.w, b.w), to[7 * pitch] = high_halves(a.w, b.w);
}

// The reverse: eight channels of two pixels.
template <int pitch> __device__ __forceinline__ void join_channels(const u32* from, uint4& a, uint4& b) {
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

// With the slots of the runs' ends behind those of all MOST strips: the slot behind strip m's, and the place of slot j.
template <int MOST> __device__ __forceinline__ int slot_behind(const Strips& s, int m) {
  int at = s.place + m, run = at / s.strips;
  return at - run * s.strips + 1 == s.strips || m + 1 >= s.count ? MOST + run : m + 1;
}

template <int MOST>
__device__ __forceinline__ bool slot_place(const Strips& s, int j, int& image, int& place) {
  if (j < MOST) {
    slot_of(s, j, image, place);
    return j < s.count;
  }
  int run = j - MOST, end = s.place + s.count - run * s.strips;
  image = s.image + run, place = end < s.strips ? end : s.strips;
  return false;
}

// Where a block is in its rows: a range of rows oy0.. of one group of strips after the other. A range takes a step for
// each row `at` of x from the first that it reads to `last`; those behind `bottom` are outside the image.
struct Walk {
  int next, end;  // rows of all groups, not opened yet
  int oy0, oy1, at, bottom, last;
  Strips s;
  bool live;
};

// The first row of x is that of the padding with `outside`, else the first in the image.
template <int K>
__device__ __forceinline__ void open_range(Walk& k, const Band& d, int most, int total, bool outside) {
  k.live = k.next < k.end;
  if (!k.live) return;
  int group = k.next / d.oh;
  k.oy0 = k.next - group * d.oh;
  k.oy1 = k.end - k.next < d.oh - k.oy0 ? k.oy0 + k.end - k.next : d.oh;
  k.next += k.oy1 - k.oy0;
  k.at = k.oy0 - d.pad_h, k.last = k.oy1 - 1 - d.pad_h + K - 1;
  if (!outside && k.at < 0) k.at = 0;
  k.bottom = k.last < d.h ? k.last : d.h - 1;
  k.s = strips_of(group, most, total, d.strips);
}

template <int K>
__device__ __forceinline__ Walk walk_of(const Band& d, int most, int total, bool outside) {
  int shares = gridDim.x / d.tiles, share = blockIdx.x / d.tiles;
  Walk k;
  k.next = (int)((i64)d.rows * share / shares), k.end = (int)((i64)d.rows * (share + 1) / shares);
  open_range<K>(k, d, most, total, outside);
  return k;
}
