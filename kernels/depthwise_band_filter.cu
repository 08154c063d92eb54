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

// CHANNELS of a warp, MOST units of a block.
template <int K, int CHANNELS, int MOST>
__device__ __forceinline__ void band_filter(const View& x, const View& dy, const View& partials, const Band& d) {
  constexpr int PITCH = Pitch<128, MOST>::VALUE, OUT = Pitch<64, MOST>::VALUE;
  DYNAMIC_SHARED(memory);
  const int t = threadIdx.x, warp = t / 32, lane = t % 32, g = lane / 4, q = lane % 4, threads = blockDim.x;
  const int bits = d.unit_bits, units = 1 << bits, tile = blockIdx.x % d.tiles * units, all = d.c / 8;
  // A row of x on its way is [half][slot][column][unit], one of dy [half][strip][column][unit].
  const int x_units = d.slots * 8 * units, dy_units = 64 * units, row_units = 2 * (x_units + dy_units);
  const int x_step = d.w * all, dy_step = d.ow * all, half = (d.batch + 1) / 2, strips = half * d.strips;
  const int width = 8 * units, buffer = width * (PITCH + OUT);
  u32* parted = (u32*)memory;
  uint4* raw = (uint4*)(parted + 2 * buffer);

  Walk use = walk_of<K>(d, 8, strips, true), ahead = use;
  int source[CHANNELS], dy_source[CHANNELS / 2], there = 0;
  auto find_source = [&]() {
    there = 0;
#pragma unroll
    for (int n = 0; n < CHANNELS; n++) {
      int id = t + n * threads, which = id >= x_units, at = id - which * x_units, u = tile + (at & (units - 1));
      int column = at >> bits & 7, slot = at >> (bits + 3), image, place;
      bool full = slot_is_strip(ahead.s, slot, image, place);
      image += which * half;
      int ix = 8 * place - d.pad_w + column;
      bool valid = image < (which ? d.batch : half) && (full || column < K - 1) && ix >= 0 && ix < d.w && u < all;
      there |= (int)valid << n;
      source[n] = ((image * d.h + ahead.at) * d.w + ix) * all + u;
    }
#pragma unroll
    for (int n = 0; n < CHANNELS / 2; n++) {
      int id = t + n * threads, which = id >= dy_units, at = id - which * dy_units, u = tile + (at & (units - 1));
      int m = at >> (bits + 3), image, place;
      slot_of(ahead.s, m, image, place);
      image += which * half;
      int ox = 8 * place + (at >> bits & 7);
      bool valid = m < ahead.s.count && image < d.batch && ox < d.ow && u < all;
      there |= (int)valid << (CHANNELS + n);
      dy_source[n] = ((image * d.oh + ahead.oy0) * d.ow + ox) * all + u;
    }
  };
  auto copy = [&](int i) {
    if (ahead.live) {
      uint4* to = raw + i % ROWS_AHEAD * row_units + t;
      const bool within = ahead.at >= 0 && ahead.at <= ahead.bottom;
#pragma unroll
      for (int n = 0; n < CHANNELS; n++) {
        bool valid = there >> n & 1;
        if (within && t + n * threads < 2 * x_units) {
          if (valid) CHECK_INDEX(x, (i64)source[n] * 8, 8);
          cp_async_16(to + n * threads, (const uint4*)x.data + source[n], valid);
        }
        source[n] += x_step;
      }
      if (ahead.at + d.pad_h < ahead.oy1) {
#pragma unroll
        for (int n = 0; n < CHANNELS / 2; n++) {
          bool valid = there >> (CHANNELS + n) & 1;
          if (valid) CHECK_INDEX(dy, (i64)dy_source[n] * 8, 8);
          cp_async_16(to + 2 * x_units + n * threads, (const uint4*)dy.data + dy_source[n], valid);
          dy_source[n] += dy_step;
        }
      }
      if (ahead.at++ == ahead.last) {
        open_range<K>(ahead, d, 8, strips, true);
        if (ahead.live) find_source();
      }
    }
    cp_async_commit();
  };

  // The pixels that this thread turns: of x, and from the last thread on of dy.
  const int turns = 8 * d.slots - (t >> bits), back = threads - 1 - t, back_u = back & (units - 1);
  u32* turn_to = parted + (t & (units - 1)) * 8 * PITCH + (t >> bits);
  u32* dy_turn_to = parted + width * PITCH + back_u * 8 * OUT + (back >> bits);
  auto turn = [&](int i) {
    const uint4* row = raw + i % ROWS_AHEAD * row_units;
    const int side = (i & 1) * buffer;
#pragma unroll
    for (int n = 0; n < CHANNELS / 2; n++) {
      if (n * (threads >> bits) >= turns) continue;
      const uint4* pixel = row + t + n * threads;
      part_channels<PITCH>(pixel[0], pixel[x_units], turn_to + side + n * (threads >> bits));
    }
    if (back < dy_units) {
      const uint4* pixel = row + 2 * x_units + back;
      part_channels<OUT>(pixel[0], pixel[dy_units], dy_turn_to + side);
    }
  };

  // Strips q and q + 4 of either half; dy is zero for those that are not there, but x may not be.
  int lower, upper;
  auto find_rows = [&]() {
    int image, place, most = use.s.count - 1;
    lower = slot_of(use.s, q < most ? q : most, image, place) * 8 + g;
    upper = slot_of(use.s, q + 4 < most ? q + 4 : most, image, place) * 8 + g;
  };

  float acc[CHANNELS][K][4] = {}, bias[CHANNELS] = {};
  // Row oy = iy + p − ky of dy.
  u32 window[CHANNELS][K][2] = {};
  if (ahead.live) find_source();
#pragma unroll
  for (int i = 0; i < ROWS_AHEAD; i++) copy(i);
  cp_async_wait<ROWS_AHEAD - 1>();
  __syncthreads();
  turn(0);
  if (use.live) find_rows();
#pragma unroll 1
  for (int i = 0; use.live; i++) {
    // Row i + 1 is there and row i turned, for all threads.
    cp_async_wait<ROWS_AHEAD - 2>();
    __syncthreads();
    copy(i + ROWS_AHEAD);
    turn(i + 1);
    const u32* row = parted + (i & 1) * buffer + warp * CHANNELS * PITCH;
    const u32* dy_row = parted + (i & 1) * buffer + width * PITCH + warp * CHANNELS * OUT + q * 8 + g;
    const bool fresh = use.at + d.pad_h < use.oy1, within = use.at >= 0 && use.at <= use.bottom;
#pragma unroll
    for (int n = 0; n < CHANNELS; n++) {
#pragma unroll
      for (int ky = K - 1; ky > 0; ky--) {
        window[n][ky][0] = window[n][ky - 1][0], window[n][ky][1] = window[n][ky - 1][1];
      }
      window[n][0][0] = fresh ? dy_row[n * OUT] : 0, window[n][0][1] = fresh ? dy_row[n * OUT + 32] : 0;
      float v[4];
      unpack_bf16(window[n][0][0], v[0], v[1]), unpack_bf16(window[n][0][1], v[2], v[3]);
      bias[n] += (v[0] + v[1]) + (v[2] + v[3]);
    }
    u32 a[CHANNELS][4];
    if (within) {
#pragma unroll
      for (int n = 0; n < CHANNELS; n++) {
        a[n][0] = row[n * PITCH + lower], a[n][1] = row[n * PITCH + lower + 8];
        a[n][2] = row[n * PITCH + upper], a[n][3] = row[n * PITCH + upper + 8];
      }
    }
    if (within) {
#pragma unroll
      for (int ky = 0; ky < K; ky++) {
#pragma unroll
        for (int n = 0; n < CHANNELS; n++) mma_m16n8k16_bf16(acc[n][ky], a[n], window[n][ky]);
      }
    }
    if (use.at++ == use.last) {
#pragma unroll
      for (int n = 0; n < CHANNELS * K * 2; n++) window[n / (2 * K)][n / 2 % K][n % 2] = 0;
      open_range<K>(use, d, 8, strips, true);
      if (use.live) find_rows();
    }
  }
  cp_async_wait<0>();

  // Diagonals, by way of shared memory of each warp's own.
  __syncthreads();
  float* room = (float*)memory + warp * 16 * 9;
  i64 line = (i64)(blockIdx.x / d.tiles) * (K * K + 1);
#pragma unroll
  for (int n = 0; n < CHANNELS; n++) {
    int c = tile * 8 + warp * CHANNELS + n;
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
    float sum = warp_sum(bias[n]);
    if (lane == 0 && c < d.c) store(partials, (line + K * K) * d.c + c, sum);
  }
}

extern "C" __global__ void __launch_bounds__(256, 2)
    depthwise_band_filter_3(View x, View dy, View partials, Band d) {
  band_filter<3, 2, 2>(x, dy, partials, d);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    depthwise_band_filter_5(View x, View dy, View partials, Band d) {
  band_filter<5, 2, 2>(x, dy, partials, d);
}

extern "C" __global__ void __launch_bounds__(256, 2)
    depthwise_band_filter_7(View x, View dy, View partials, Band d) {
  band_filter<7, 2, 2>(x, dy, partials, d);
}
