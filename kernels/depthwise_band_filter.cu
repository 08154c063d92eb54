// The gradient of a depthwise convolution of stride 1 by its weights, on tensor cores, bf16: dw[c,ky,kx] = Σ dy[b,oy,ox,c]·
// x[b, oy + ky − p, ox + kx − p, c], and by its bias, Σ dy.
//
// Of one channel, a strip of eight columns of dy meets 16 columns of x in D_ky[i, o] = Σ x[oy + ky − p, i]·dy[oy, o], summed
// over rows and strips; dw[ky,kx] is the sum of its diagonal i − o = kx. 16 strips are the inner dimension of a product
// m16n8k16 for each ky, whose sums stay in registers over all of a block's rows: 16·K multiply-adds an element of dy
// instead of K². Exact products, sums in f32; other diagonals are not used.
//
// The strips are those of eight places in the first half of the batch and the same eight in its second half, so that a
// word holds one column of both. A block takes some channels and a share of the rows and leaves a partial [taps + 1, C]
// (the last line the bias's), which depthwise_filter_merge adds up in order.
#include "depthwise_band.cuh"

template <int K, int CHANNELS>
__device__ __forceinline__ void band_filter(const View& x, const View& dy, const View& partials, const Band& d) {
  DYNAMIC_SHARED(memory);
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, g = lane / 4, q = lane % 4, threads = blockDim.x;
  const int bits = d.unit_bits, units = 1 << bits, width = units * 8, c_first = blockIdx.x % d.tiles * width;
  // A row of x, then of dy: [half][slot or strip][column][unit].
  const int x_units = d.slots * 8 * units, dy_units = 64 * units, row_units = 2 * (x_units + dy_units);
  const int pitch = channel_pitch(8 * d.slots, bits), dy_pitch = channel_pitch(64, bits);
  uint4* raw = (uint4*)memory;
  u32* parted = (u32*)(raw + ROWS_AHEAD * row_units);
  const int buffer = width * (pitch + dy_pitch);
  const int half = (d.batch + 1) / 2, x_step = d.w * (d.c / 8), dy_step = d.ow * (d.c / 8);

  float acc[CHANNELS][K][4] = {}, bias[CHANNELS][4] = {};
  i64 begin, end;
  share_of(d, begin, end);
  while (begin < end) {
    int group = (int)(begin / d.oh), oy0 = (int)(begin - (i64)group * d.oh);
    int oy1 = end - begin < d.oh - oy0 ? oy0 + (int)(end - begin) : d.oh;
    begin += oy1 - oy0;
    const Strips s = strips_of(group, 8, half * d.strips, d.strips);
    const int slots = slots_of(s), top = oy0 - d.pad_h, steps = oy1 - oy0 + K - 1;

    int source[CHANNELS], dy_source[CHANNELS / 2];
#pragma unroll
    for (int n = 0; n < CHANNELS; n++) {
      int id = t + n * threads, which = id >= x_units, at = id - which * x_units, u = at & (units - 1);
      int column = at >> bits & 7, slot = at >> (bits + 3), image, place;
      bool full = slot_is_strip(s, slot, image, place);
      image += which * half;
      int ix = 8 * place - d.pad_w + column, c = c_first + 8 * u;
      bool there = id < 2 * x_units && slot < slots && image < d.batch && (full || column < K - 1) && ix >= 0 &&
                   ix < d.w && c < d.c;
      source[n] = there ? (image * d.h * d.w + ix) * (d.c / 8) + c / 8 : -1;
    }
#pragma unroll
    for (int n = 0; n < CHANNELS / 2; n++) {
      int id = t + n * threads, which = id >= dy_units, at = id - which * dy_units, u = at & (units - 1);
      int m = at >> (bits + 3), image, place;
      slot_of(s, m, image, place);
      image += which * half;
      int ox = 8 * place + (at >> bits & 7), c = c_first + 8 * u;
      bool there = m < s.count && image < d.batch && ox < d.ow && c < d.c;
      dy_source[n] = there ? ((image * d.oh + oy0) * d.ow + ox) * (d.c / 8) + c / 8 : -1;
    }
    auto copy = [&](int i) {
      uint4* to = raw + i % ROWS_AHEAD * row_units;
      if (i < steps && top + i >= 0 && top + i < d.h) {
#pragma unroll
        for (int n = 0; n < CHANNELS; n++) {
          int id = t + n * threads;
          if (id < 2 * x_units) copy_unit(to + id, x, source[n] < 0 ? -1 : source[n] + (top + i) * x_step);
        }
      }
      if (oy0 + i < oy1) {
#pragma unroll
        for (int n = 0; n < CHANNELS / 2; n++)
          copy_unit(to + 2 * x_units + t + n * threads, dy, dy_source[n] < 0 ? -1 : dy_source[n] + i * dy_step);
      }
      cp_async_commit();
    };
    auto turn = [&](int i) {
      const uint4* row = raw + i % ROWS_AHEAD * row_units;
      u32* to = parted + (i & 1) * buffer;
      if (i < steps && top + i >= 0 && top + i < d.h) {
#pragma unroll
        for (int n = 0; n < CHANNELS / 2; n++) {
          int id = t + n * threads;
          if (id < 8 * slots * units) {
            part_channels(row[id], row[id + x_units], to + (id & (units - 1)) * 8 * pitch + (id >> bits), pitch);
          }
        }
      }
      int id = threads - 1 - t;
      if (oy0 + i < oy1 && id < dy_units) {
        row += 2 * x_units, to += width * pitch;
        part_channels(row[id], row[id + dy_units], to + (id & (units - 1)) * 8 * dy_pitch + (id >> bits), dy_pitch);
      }
    };

    // Strips q and q + 4 of either half, or any where these are not there (dy is zero for them).
    int image, place, lower = slot_of(s, q < s.count ? q : 0, image, place) * 8 + g;
    int upper = slot_of(s, q + 4 < s.count ? q + 4 : 0, image, place) * 8 + g;
    // Row oy = iy + p − ky of dy.
    u32 window[CHANNELS][K][2] = {};
    __syncthreads();
#pragma unroll
    for (int i = 0; i < ROWS_AHEAD; i++) copy(i);
    cp_async_wait<ROWS_AHEAD - 1>();
    __syncthreads();
    turn(0);
#pragma unroll 1
    for (int i = 0; i < steps; i++) {
      cp_async_wait<ROWS_AHEAD - 2>();
      __syncthreads();
      copy(i + ROWS_AHEAD);
      turn(i + 1);
      const bool within = top + i >= 0 && top + i < d.h, fresh = oy0 + i < oy1;
#pragma unroll
      for (int n = 0; n < CHANNELS; n++) {
        const u32* row = parted + (i & 1) * buffer;
        const int channel = warp * CHANNELS + n;
#pragma unroll
        for (int ky = K - 1; ky > 0; ky--) {
          window[n][ky][0] = window[n][ky - 1][0], window[n][ky][1] = window[n][ky - 1][1];
        }
        window[n][0][0] = window[n][0][1] = 0;
        if (fresh) {
          const u32* at = row + width * pitch + channel * dy_pitch + q * 8 + g;
          const u32 ones[4] = {0x3f803f80u, 0x3f803f80u, 0x3f803f80u, 0x3f803f80u};
          window[n][0][0] = at[0], window[n][0][1] = at[32];
          mma_m16n8k16_bf16(bias[n], ones, window[n][0]);
        }
        if (within) {
          const u32* at = row + channel * pitch;
          u32 a[4] = {at[lower], at[lower + 8], at[upper], at[upper + 8]};
#pragma unroll
          for (int ky = 0; ky < K; ky++) mma_m16n8k16_bf16(acc[n][ky], a, window[n][ky]);
        }
      }
    }
    cp_async_wait<0>();
  }

  // Diagonals, by way of shared memory of each warp's own.
  __syncthreads();
  float* room = (float*)memory + warp * 16 * 9;
  i64 line = (i64)(blockIdx.x / d.tiles) * (K * K + 1);
#pragma unroll
  for (int n = 0; n < CHANNELS; n++) {
    int c = c_first + warp * CHANNELS + n;
#pragma unroll
    for (int ky = 0; ky < K; ky++) {
      __syncwarp();
      room[g * 9 + 2 * q] = acc[n][ky][0], room[g * 9 + 2 * q + 1] = acc[n][ky][1];
      room[(g + 8) * 9 + 2 * q] = acc[n][ky][2], room[(g + 8) * 9 + 2 * q + 1] = acc[n][ky][3];
      __syncwarp();
      if (lane < K && c < d.c) {
        float sum = 0.0f;
#pragma unroll
        for (int o = 0; o < 8; o++) sum += room[(o + lane) * 9 + o];
        store(partials, (line + ky * K + lane) * d.c + c, sum);
      }
    }
    float sum = bias[n][0] + bias[n][1];
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (lane == 0 && c < d.c) store(partials, (line + K * K) * d.c + c, sum);
  }
}

extern "C" __global__ void __launch_bounds__(256, 3)
    depthwise_band_filter_3(View x, View dy, View partials, Band d) {
  band_filter<3, 2>(x, dy, partials, d);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    depthwise_band_filter_5(View x, View dy, View partials, Band d) {
  band_filter<5, 2>(x, dy, partials, d);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    depthwise_band_filter_7(View x, View dy, View partials, Band d) {
  band_filter<7, 2>(x, dy, partials, d);
}
