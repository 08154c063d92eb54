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

template <int K, int CHANNELS>
__device__ __forceinline__ void band(const View& x, const View& w, const View& bias, const View& y, const Band& d,
                                     int flip, int accumulate) {
  DYNAMIC_SHARED(memory);
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, g = lane / 4, q = lane % 4, threads = blockDim.x;
  const int bits = d.unit_bits, units = 1 << bits, width = units * 8, c_first = blockIdx.x % d.tiles * width;
  const int row_units = d.slots * 8 * units, pitch = channel_pitch(4 * d.slots, bits), out_pitch = channel_pitch(64, bits);
  uint4* raw = (uint4*)memory;
  u32* parted = (u32*)(raw + ROWS_AHEAD * row_units);
  u32* out = parted + 2 * width * pitch;
  const int x_step = d.w * (d.c / 8), y_step = d.ow * (d.c / 8);

  float* taps = (float*)memory;
  for (int i = t; i < width * K * K; i += threads)
    taps[i] = c_first + i / (K * K) < d.c ? load(w, (i64)c_first * K * K + i) : 0.0f;
  __syncthreads();
  // b[ky] = T_ky, see mma.cuh.
  u32 b[CHANNELS][K][2];
  float offset[CHANNELS];
#pragma unroll
  for (int i = 0; i < CHANNELS; i++) {
    int channel = warp * CHANNELS + i, c = c_first + channel;
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

  i64 begin, end;
  share_of(d, begin, end);
  while (begin < end) {
    int group = (int)(begin / d.oh), oy0 = (int)(begin - (i64)group * d.oh);
    int oy1 = end - begin < d.oh - oy0 ? oy0 + (int)(end - begin) : d.oh;
    begin += oy1 - oy0;
    const Strips s = strips_of(group, 16, d.batch * d.strips, d.strips);
    const int slots = slots_of(s), top = oy0 > d.pad_h ? oy0 - d.pad_h : 0, last = oy1 - 1 - d.pad_h + K - 1;
    const int bottom = last < d.h ? last : d.h - 1;

    // What this thread copies, turns, and writes.
    int source[CHANNELS];
#pragma unroll
    for (int n = 0; n < CHANNELS; n++) {
      int id = t + n * threads, u = id & (units - 1), column = id >> bits & 7, slot = id >> (bits + 3), image, place;
      bool full = slot_is_strip(s, slot, image, place);
      int ix = 8 * place - d.pad_w + column, c = c_first + 8 * u;
      bool there = slot < slots && image < d.batch && (full || column < K - 1) && ix >= 0 && ix < d.w && c < d.c;
      source[n] = there ? ((image * d.h + top) * d.w + ix) * (d.c / 8) + c / 8 : -1;
    }
    auto copy = [&](int i) {
      if (top + i <= bottom) {
#pragma unroll
        for (int n = 0; n < CHANNELS; n++) {
          int id = t + n * threads;
          if (id < slots * 8 * units)
            copy_unit(raw + i % ROWS_AHEAD * row_units + id, x, source[n] < 0 ? -1 : source[n] + i * x_step);
        }
      }
      cp_async_commit();
    };
    auto turn = [&](int i) {
      if (top + i > bottom) return;
#pragma unroll
      for (int n = 0; n < CHANNELS / 2; n++) {
        int id = threads - 1 - t + n * threads, u = id & (units - 1), pair = id >> bits;
        if (pair >= 4 * slots) continue;
        const uint4* pixel = raw + i % ROWS_AHEAD * row_units + 2 * pair * units + u;
        part_channels(pixel[0], pixel[units], parted + ((i & 1) * width + 8 * u) * pitch + pair, pitch);
      }
    };
    const int out_u = t & (units - 1), out_pair = t >> bits;
    int out_image, out_place;
    slot_of(s, out_pair / 4, out_image, out_place);
    const int out_x = 8 * out_place + 2 * (out_pair % 4), out_c = c_first + 8 * out_u;
    const bool writes = out_pair < 4 * s.count && out_x < d.ow && out_c < d.c, second = out_x + 1 < d.ow;
    const int target = (out_image * d.oh * d.ow + out_x) * (d.c / 8) + out_c / 8;
    auto write = [&](int i) {
      int oy = top + i + d.pad_h - (K - 1);
      if (!writes || oy < oy0) return;
      uint4 v[2];
      join_channels(out + ((i & 1) * width + 8 * out_u) * out_pitch + out_pair, out_pitch, v[0], v[1]);
      int at = target + oy * y_step;
#pragma unroll
      for (int k = 0; k < 2; k++) {
        if (k == 1 && !second) continue;
        CHECK_INDEX(y, (i64)at * 8 + k * d.c, 8);
        uint4* to = (uint4*)y.data + at + k * (d.c / 8);
        if (accumulate) {
          float sum[8], old[8];
          uint4 before = *to;
          unpack_bf16(v[k].x, sum[0], sum[1]), unpack_bf16(v[k].y, sum[2], sum[3]);
          unpack_bf16(v[k].z, sum[4], sum[5]), unpack_bf16(v[k].w, sum[6], sum[7]);
          unpack_bf16(before.x, old[0], old[1]), unpack_bf16(before.y, old[2], old[3]);
          unpack_bf16(before.z, old[4], old[5]), unpack_bf16(before.w, old[6], old[7]);
#pragma unroll
          for (int j = 0; j < 8; j++) sum[j] += old[j];
          v[k] = make_uint4(pack_bf16(sum[0], sum[1]), pack_bf16(sum[2], sum[3]), pack_bf16(sum[4], sum[5]),
                            pack_bf16(sum[6], sum[7]));
        }
        *to = v[k];
      }
    };

    // The fragments' rows: strips g and g + 8, or any where these are not there.
    int image, place, upper = slot_of(s, g < s.count ? g : 0, image, place) * 4 + q;
    int lower = slot_of(s, g + 8 < s.count ? g + 8 : 0, image, place) * 4 + q;
    // Row oy = iy + pad − (K − 1) + j of y is in acc[j].
    float acc[CHANNELS][K][4] = {};
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ROWS_AHEAD; i++) copy(i);
    cp_async_wait<ROWS_AHEAD - 1>();
    __syncthreads();
    turn(0);
    const int steps = last - top + 1;
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
      // Row i + 1 is there and row i turned, for all threads; row i − 1 of y lies in `out`.
      cp_async_wait<ROWS_AHEAD - 2>();
      __syncthreads();
      copy(i + ROWS_AHEAD);
      turn(i + 1);
      const bool within = top + i <= bottom, finished = top + i + d.pad_h - (K - 1) >= oy0;
#pragma unroll
      for (int n = 0; n < CHANNELS; n++) {
        const int channel = (i & 1) * width + warp * CHANNELS + n;
        const float zero[4] = {};
        u32 a[4] = {};
        if (within) {
          const u32* at = parted + channel * pitch;
          a[0] = at[upper], a[1] = at[lower], a[2] = at[upper + 4], a[3] = at[lower + 4];
        }
#pragma unroll
        for (int j = 0; j + 1 < K; j++) mma_m16n8k16_bf16(acc[n][j], a, b[n][K - 1 - j], acc[n][j + 1]);
        mma_m16n8k16_bf16(acc[n][K - 1], a, b[n][0], zero);
        if (finished) {
          u32* to = out + channel * out_pitch + g * 4 + q;
          to[0] = pack_bf16(acc[n][0][0] + offset[n], acc[n][0][1] + offset[n]);
          to[32] = pack_bf16(acc[n][0][2] + offset[n], acc[n][0][3] + offset[n]);
        }
      }
      if (i > 0) write(i - 1);
    }
    __syncthreads();
    write(steps - 1);
    cp_async_wait<0>();
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    depthwise_band_3(View x, View w, View bias, View y, Band d, int flip, int accumulate) {
  band<3, 4>(x, w, bias, y, d, flip, accumulate);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    depthwise_band_5(View x, View w, View bias, View y, Band d, int flip, int accumulate) {
  band<5, 2>(x, w, bias, y, d, flip, accumulate);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    depthwise_band_7(View x, View w, View bias, View y, Band d, int flip, int accumulate) {
  band<7, 2>(x, w, bias, y, d, flip, accumulate);
}
