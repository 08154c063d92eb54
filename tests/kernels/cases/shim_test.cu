// Kernels that test the shim and kernels/mma.cuh; not part of mcpipe.
#include "mma.cuh"

// d[16·gridDim.x, 8] = a[.., 64]·b[64, 8]: a in rows, b in rows of k (KN) or of n (NK).
extern "C" __global__ void __launch_bounds__(32) test_mma(View a, View b, View d, int b_is_nk) {
  __shared__ __align__(16) u16 at[2][16 * 16], bt[2][16 * 8];
  int l = threadIdx.x;
  const u16* rows = (const u16*)a.data + blockIdx.x * 16 * 64;
  float sum[4] = {};
  for (int k = 0; k <= 4; k++) {
    if (k < 4) {
      cp_async_16(&at[k % 2][l / 2 * 16 + l % 2 * 8], rows + l / 2 * 64 + k * 16 + l % 2 * 8, true);
      const u16* from = (const u16*)b.data;
      if (b_is_nk) from += l % 16 / 2 * 64 + k * 16 + l % 2 * 8;
      else from += (k * 16 + l % 16) * 8;
      if (l < 16) cp_async_16(&bt[k % 2][l * 8], from, true);
      cp_async_commit();
    }
    if (k == 0) continue;
    if (k < 4) cp_async_wait<1>();
    else cp_async_wait<0>();
    __syncwarp();
    u32 fa[4], fb[2];
    ldmatrix_x4(fa, &at[(k - 1) % 2][l % 16 * 16 + l / 16 * 8]);
    if (b_is_nk) ldmatrix_x2(fb, &bt[(k - 1) % 2][l % 8 * 16 + l / 8 % 2 * 8]);
    else ldmatrix_x2_trans(fb, &bt[(k - 1) % 2][l % 16 * 8]);
    mma_m16n8k16_bf16(sum, fa, fb);
    __syncwarp();
  }
  for (int j = 0; j < 4; j++) store(d, (blockIdx.x * 16 + l / 4 + j / 2 * 8) * 8 + l % 4 * 2 + j % 2, sum[j]);
}

// A block's sum of x, one value a block; some threads leave at once if `leave`.
extern "C" __global__ void __launch_bounds__(1024) test_block_sum(View x, View y, i64 n) {
  __shared__ float room[32];
  float sum = 0.0f;
  for (i64 i = blockIdx.x * (i64)blockDim.x + threadIdx.x; i < n; i += (i64)gridDim.x * blockDim.x) sum += load(x, i);
  sum = block_sum(sum, room);
  if (threadIdx.x == 0) store(y, blockIdx.x, sum);
}

// y[i] = x reversed within a block, by dynamic shared memory; threads of odd warps leave before the last barrier.
extern "C" __global__ void __launch_bounds__(1024) test_reverse(View x, View y) {
  DYNAMIC_SHARED(raw);
  float* room = (float*)raw;
  int i = threadIdx.x, n = blockDim.x;
  room[i] = load(x, blockIdx.x * n + i);
  __syncthreads();
  store(y, blockIdx.x * n + i, room[n - 1 - i]);
  if (i / 32 % 2) return;
  __syncthreads();
}

// What goes wrong, by number.
extern "C" __global__ void __launch_bounds__(64) test_fault(View x, View y, int which) {
  DYNAMIC_SHARED(raw);
  __shared__ float room[64];
  int i = threadIdx.x;
  switch (which) {
    case 0: store(y, i, load(x, i + 8)); break;                     // behind the end
    case 1: store(y, i, room[63 - i]); break;                       // shared memory that nobody wrote: NaN
    case 2: room[i] = load(x, i); store(y, i, room[63 - i]); break; // no barrier between
    case 3: if (i % 32 < 16) __syncwarp(); else i = __shfl_sync(~0u, i, 0); store(y, i, 0.0f); break; // lanes disagree
    case 4: raw[blockDim.x + i] = 1; break;                         // behind dynamic shared memory
    case 5: { float eight[8]; load8(x, i % 32 + 1, eight); break; } // not aligned
    case 6: if (i < 7) { float s = warp_sum(1.0f); store(y, i, s); } else __syncthreads(); break; // never together
    case 7: ((float*)y.data)[y.len] = 1.0f; break;                  // past the view, past the memory
    case 8: { // an asynchronous copy that nobody waits for
      float* to = (float*)raw + 4 * i;
      cp_async_16(to, (const float*)x.data + 4 * (i % 16), true);
      store(y, i, *to);
      break;
    }
    default: store(y, i, load(x, i));
  }
}
