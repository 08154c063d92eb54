// Depthwise convolution of stride 1 on tensor cores, bf16, K·K taps, K = 3, 5, 7, and its gradient by x (the same with the
// taps turned around): y[b,oy,ox,c] = Σ x[b, oy + ky − p, ox + kx − p, c]·w[c,ky,kx] + bias[c], zeros outside.
//
// Of one channel, a row of taps is a banded Toeplitz matrix: T_ky[i, o] = w[ky, i − o] takes 16 columns of a row of x to
// the 8 columns of a strip of y. So Y[oy] = Σ_ky X[oy + ky − p]·T_ky, where the rows of X and Y are 16 strips: a product
// m16n8k16 for each ky, at 16·K multiply-adds an output instead of K², at the tensor cores' rate, which leaves memory as
// the bound. The taps are rounded to bf16, sums are f32. Zeros of the band times a NaN or an infinity are NaN: these
// spread over the 16 columns.
//
// A block takes some channels and goes down the rows of 16 strips; row iy of x reaches the K rows of y whose sums are in
// registers, and finishes one. Rows arrive by asynchronous copies as [slot][column][channel], are turned to [channel]
// [slot][pair of columns] for the products, and rows of y go back the same way.
#include "depthwise_band.cuh"

// CHANNELS of a warp, MOST units of a block.
template <int K, int CHANNELS, int MOST>
__device__ __forceinline__ void band(const View& x, const View& w, const View& bias, const View& y, const Band& d,
                                     int flip, int accumulate) {
  constexpr int PITCH = Pitch<128, MOST>::VALUE, OUT = Pitch<64, MOST>::VALUE;
  DYNAMIC_SHARED(memory);
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, g = lane / 4, q = lane % 4, threads = blockDim.x;
  const int bits = d.unit_bits, units = 1 << bits, tile = blockIdx.x % d.tiles * units, all = d.c / 8;
  const int width = 8 * units, row_units = d.slots * 8 * units, x_step = d.w * all, y_step = d.ow * all;
  // Two rows of y and of x with the channels apart, and the rows on their way: [slot][odd][column / 2][unit].
  u32* out = (u32*)memory;
  u32* parted = out + 2 * width * OUT;
  uint4* raw = (uint4*)(parted + 2 * width * PITCH);

  float* taps = (float*)memory;
  for (int i = t; i < units * 8 * K * K; i += threads)
    taps[i] = tile * 8 + i / (K * K) < d.c ? load(w, (i64)tile * 8 * K * K + i) : 0.0f;
  __syncthreads();
  // b[ky] = T_ky, see mma.cuh.
  u32 b[CHANNELS][K][2];
  float offset[CHANNELS];
#pragma unroll
  for (int i = 0; i < CHANNELS; i++) {
    int channel = warp * CHANNELS + i, c = tile * 8 + channel;
    offset[i] = bias.len && c < d.c ? load(bias, c) : 0.0f;
#pragma unroll
    for (int ky = 0; ky < K; ky++) {
#pragma unroll
      for (int j = 0; j < 2; j++) {
        float tap[2];
#pragma unroll
        for (int k = 0; k < 2; k++) {
          int kx = 2 * q + 8 * j + k - g, at = ky * K + kx;
          tap[k] = kx >= 0 && kx < K ? taps[channel * K * K + (flip ? K * K - 1 - at : at)] : 0.0f;
        }
        b[i][ky][j] = pack_bf16(tap[0], tap[1]);
      }
    }
  }
  __syncthreads();

  const int strips = d.batch * d.strips;
  Walk use = walk_of<K>(d, 16, strips, false), ahead = use;

  // The units that this thread copies: whether there, and where in the next row.
  const uint4* from = (const uint4*)x.data;
  const int copy_column = t >> bits & 7;
  const int copy_to = t - copy_column * units + ((copy_column & 1) * 4 + copy_column / 2) * units;
  int source[CHANNELS], there = 0;
  auto find_source = [&]() {
    there = 0;
#pragma unroll
    for (int n = 0; n < CHANNELS; n++) {
      int id = t + n * threads, u = tile + (id & (units - 1)), slot = id >> (bits + 3), image, place;
      bool full = slot_place<16>(ahead.s, slot, image, place);
      int column = id >> bits & 7, ix = 8 * place - d.pad_w + column;
      bool valid = image < d.batch && (full || column < K - 1) && ix >= 0 && ix < d.w && u < all;
      there |= (int)valid << n;
      source[n] = ((image * d.h + ahead.at) * d.w + ix) * all + u;
    }
  };
  auto copy = [&](int i) {
    if (ahead.live) {
      if (ahead.at <= ahead.bottom) {
        uint4* to = raw + i % ROWS_AHEAD * row_units + copy_to;
#pragma unroll
        for (int n = 0; n < CHANNELS; n++) {
          bool valid = there >> n & 1;
          if (valid) CHECK_INDEX(x, (i64)source[n] * 8, 8);
          if (t + n * threads < row_units) cp_async_16(to + n * threads, from + source[n], valid);
          source[n] += x_step;
        }
      }
      if (ahead.at++ == ahead.last) {
        open_range<K>(ahead, d, 16, strips, false);
        if (ahead.live) find_source();
      }
    }
    cp_async_commit();
  };

  // The pairs of pixels that it turns, from the last thread on: there is less for these to write.
  const int back = threads - 1 - t, back_u = back & (units - 1), turns = 4 * d.slots - (back >> bits);
  const uint4* turn_from = raw + 2 * back - (back & (4 * units - 1));
  u32* turn_to = parted + back_u * 8 * PITCH + (back >> bits);
  auto turn = [&](int i) {
#pragma unroll
    for (int n = 0; n < CHANNELS / 2; n++) {
      if (n * (threads >> bits) >= turns) continue;
      const uint4* pixel = turn_from + i % ROWS_AHEAD * row_units + n * 2 * threads;
      part_channels<PITCH>(pixel[0], pixel[4 * units], turn_to + (i & 1) * width * PITCH + n * (threads >> bits));
    }
  };

  // The pair of pixels that it writes (`target` in row 0, if there), and where this row's is.
  const int pair = t >> bits;
  const u32* write_from = out + (t & (units - 1)) * 8 * OUT + pair;
  int target = 0, row_target = -1;
  bool writes, second, row_second = false;
  // The fragments' rows are strips g and g + 8; the slots behind these.
  const int first = warp * CHANNELS * PITCH + g * 4 + q;
  int upper, lower;
  auto find_target = [&]() {
    int image, place, u = tile + (t & (units - 1));
    slot_of(use.s, pair / 4, image, place);
    int ox = 8 * place + 2 * (pair % 4);
    writes = pair < 4 * use.s.count && ox < d.ow && u < all, second = ox + 1 < d.ow;
    target = (image * d.oh * d.ow + ox) * all + u;
    upper = warp * CHANNELS * PITCH + slot_behind<16>(use.s, g) * 4 + q;
    lower = warp * CHANNELS * PITCH + slot_behind<16>(use.s, g + 8) * 4 + q;
  };
  auto put = [&](int at, uint4 v) {
    CHECK_INDEX(y, (i64)at * 8, 8);
    uint4* to = (uint4*)y.data + at;
    if (accumulate) {
      float sum[8], old[8];
      uint4 o = *to;
      unpack_bf16(v.x, sum[0], sum[1]), unpack_bf16(v.y, sum[2], sum[3]);
      unpack_bf16(v.z, sum[4], sum[5]), unpack_bf16(v.w, sum[6], sum[7]);
      unpack_bf16(o.x, old[0], old[1]), unpack_bf16(o.y, old[2], old[3]);
      unpack_bf16(o.z, old[4], old[5]), unpack_bf16(o.w, old[6], old[7]);
#pragma unroll
      for (int j = 0; j < 8; j++) sum[j] += old[j];
      v = make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]),
                     pack_bf16(sum[6], sum[7]));
    }
    *to = v;
  };
  auto write = [&](int i, int at, bool two) {
    if (at < 0) return;
    uint4 v[2];
    join_channels<OUT>(write_from + (i & 1) * width * OUT, v[0], v[1]);
    put(at, v[0]);
    if (two) put(at + all, v[1]);
  };

  // Row oy = iy + pad − (K − 1) + j of y is in acc[j].
  float acc[CHANNELS][K][4] = {};
  if (ahead.live) find_source();
#pragma unroll
  for (int i = 0; i < ROWS_AHEAD; i++) copy(i);
  cp_async_wait<ROWS_AHEAD - 1>();
  __syncthreads();
  turn(0);
  if (use.live) find_target();
  int i = 0;
#pragma unroll 1
  for (; use.live; i++) {
    // Row i + 1 is there and row i turned, for all threads; row i − 1 of y lies in `out`.
    cp_async_wait<ROWS_AHEAD - 2>();
    __syncthreads();
    copy(i + ROWS_AHEAD);
    turn(i + 1);
    const int oy = use.at + d.pad_h - (K - 1);
    u32 a[CHANNELS][4] = {};
    if (use.at <= use.bottom) {
      const u32* at = parted + (i & 1) * width * PITCH;
#pragma unroll
      for (int n = 0; n < CHANNELS; n++) {
        a[n][0] = at[n * PITCH + first], a[n][1] = at[n * PITCH + first + 32];
        a[n][2] = at[n * PITCH + upper], a[n][3] = at[n * PITCH + lower];
      }
    }
#pragma unroll
    for (int j = 0; j < K; j++) {
#pragma unroll
      for (int n = 0; n < CHANNELS; n++) {
        const float zero[4] = {};
        if (j + 1 < K) mma_m16n8k16_bf16(acc[n][j], a[n], b[n][K - 1 - j], acc[n][j + 1]);
        else mma_m16n8k16_bf16(acc[n][j], a[n], b[n][K - 1 - j], zero);
      }
    }
    write(i - 1, row_target, row_second);
    row_target = -1;
    if (oy >= use.oy0) {
      u32* to = out + ((i & 1) * width + warp * CHANNELS) * OUT + g * 4 + q;
#pragma unroll
      for (int n = 0; n < CHANNELS; n++) {
        to[n * OUT] = pack_bf16(acc[n][0][0] + offset[n], acc[n][0][1] + offset[n]);
        to[n * OUT + 32] = pack_bf16(acc[n][0][2] + offset[n], acc[n][0][3] + offset[n]);
      }
      if (writes) row_target = target + oy * y_step, row_second = second;
    }
    if (use.at++ == use.last) {
      // Sums of rows below this range's stay behind.
#pragma unroll
      for (int n = 0; n < CHANNELS * K * 4; n++) acc[n / (4 * K)][n / 4 % K][n % 4] = 0.0f;
      open_range<K>(use, d, 16, strips, false);
      if (use.live) find_target();
    }
  }
  __syncthreads();
  write(i - 1, row_target, row_second);
  cp_async_wait<0>();
}

extern "C" __global__ void __launch_bounds__(256, 2)
    depthwise_band_3(View x, View w, View bias, View y, Band d, int flip, int accumulate) {
  band<3, 4, 4>(x, w, bias, y, d, flip, accumulate);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    depthwise_band_5(View x, View w, View bias, View y, Band d, int flip, int accumulate) {
  band<5, 2, 2>(x, w, bias, y, d, flip, accumulate);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    depthwise_band_7(View x, View w, View bias, View y, Band d, int flip, int accumulate) {
  band<7, 2, 2>(x, w, bias, y, d, flip, accumulate);
}
