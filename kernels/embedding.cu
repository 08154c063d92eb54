// The gradient of an embedding table: dtable[ids[i]] += dy[i], where equal ids add up in their order.
//
// The positions are sorted by id (a radix sort by bytes, stable, so that the result is one and the same each time); the
// rows of equal ids are then neighbours. A block sums the runs of equal ids within CHUNK sorted positions; runs that
// cross its ends leave partial sums, which `embedding_merge` adds in order.
#include "vector.cuh"

// Positions of a block that counts or places, and of one that sums.
#define SORTED 1024
#define CHUNK 32

// The id at position i; those outside 0..rows sort behind the others and are dropped.
__device__ __forceinline__ u32 sort_key(const View& keys, i64 i, int rows) {
  int id = load_int(keys, i);
  return id < 0 || id > rows ? (u32)rows : (u32)id;
}

// counts[digit, block] = positions of the block whose byte at `shift` is the digit
extern "C" __global__ void __launch_bounds__(256) sort_count(View keys, View counts, i64 n, int rows, int shift) {
  __shared__ int bins[256];
  bins[threadIdx.x] = 0;
  __syncthreads();
  for (int k = 0; k < SORTED; k += 256) {
    i64 i = (i64)blockIdx.x * SORTED + k + threadIdx.x;
    if (i < n) atomicAdd(&bins[sort_key(keys, i, rows) >> shift & 255], 1);
  }
  __syncthreads();
  ((int*)counts.data)[(i64)threadIdx.x * gridDim.x + blockIdx.x] = bins[threadIdx.x];
}

// counts ← the sum of all before each; one block
extern "C" __global__ void __launch_bounds__(1024) sort_scan(View counts, i64 n) {
  __shared__ int sums[1024];
  int* values = (int*)counts.data;
  i64 share = (n + 1023) / 1024, begin = threadIdx.x * share, end = begin + share < n ? begin + share : n;
  int own = 0;
  for (i64 i = begin; i < end; i++) own += values[i];
  sums[threadIdx.x] = own;
  for (int step = 1; step < 1024; step *= 2) {
    __syncthreads();
    int before = (int)threadIdx.x >= step ? sums[threadIdx.x - step] : 0;
    __syncthreads();
    sums[threadIdx.x] += before;
  }
  int sum = sums[threadIdx.x] - own;
  for (i64 i = begin; i < end; i++) {
    int count = values[i];
    values[i] = sum;
    sum += count;
  }
}

// Keys and positions to their places, in order. At first the positions are 0..n.
extern "C" __global__ void __launch_bounds__(256)
    sort_place(View keys, View positions, View counts, View to_keys, View to_positions, i64 n, int rows, int shift,
               int first) {
  __shared__ int base[256];
  __shared__ u32 digits[256];
  base[threadIdx.x] = ((int*)counts.data)[(i64)threadIdx.x * gridDim.x + blockIdx.x];
  for (int k = 0; k < SORTED; k += 256) {
    i64 i = (i64)blockIdx.x * SORTED + k + threadIdx.x;
    bool there = i < n;
    u32 key = there ? sort_key(keys, i, rows) : 0, digit = there ? key >> shift & 255 : 256;
    digits[threadIdx.x] = digit;
    __syncthreads();
    int before = 0, all = 0;
    for (int j = 0; j < 256; j++) {
      int same = digits[j] == digit;
      all += same;
      before += same && j < (int)threadIdx.x;
    }
    int place = there ? base[digit] + before : 0;
    __syncthreads();
    if (there) {
      if (before == all - 1) base[digit] += all;
      ((int*)to_keys.data)[place] = (int)key;
      ((int*)to_positions.data)[place] = first ? (int)i : load_int(positions, i);
    }
    __syncthreads();
  }
}

// Sums of the runs in CHUNK sorted positions. A run that began before goes to head[chunk], one that begins here and goes
// on to tail[chunk], the others to the table. Grid: chunks, tiles of 256 columns.
extern "C" __global__ void __launch_bounds__(256)
    embedding_sums(View keys, View positions, View dy, View dtable, View heads, View tails, i64 n, i64 width, int rows) {
  i64 column = (i64)blockIdx.y * 256 + threadIdx.x;
  i64 begin = (i64)blockIdx.x * CHUNK, end = begin + CHUNK < n ? begin + CHUNK : n;
  if (column >= width) return;
  int id = load_int(keys, begin);
  bool continued = begin > 0 && load_int(keys, begin - 1) == id;
  float sum = 0.0f;
  for (i64 i = begin; i < end; i++) {
    sum += load(dy, (i64)load_int(positions, i) * width + column);
    int next = i + 1 < n ? load_int(keys, i + 1) : -1;
    if (next == id && i + 1 < end) continue;
    if (id < rows) {
      if (continued) store(heads, (i64)blockIdx.x * width + column, sum);
      else if (next == id) store(tails, (i64)blockIdx.x * width + column, sum);
      else give(dtable, (i64)id * width + column, sum, 1);
    }
    sum = 0.0f, id = next, continued = false;
  }
}

// dtable[id] += tail[chunk] + head[chunk + 1] + ... of the run that begins in a chunk and goes on behind it. Grid as above.
extern "C" __global__ void __launch_bounds__(256)
    embedding_merge(View keys, View dtable, View heads, View tails, i64 n, i64 width, int rows) {
  i64 column = (i64)blockIdx.y * 256 + threadIdx.x;
  i64 begin = (i64)blockIdx.x * CHUNK, end = begin + CHUNK;
  if (column >= width || end >= n) return;
  int id = load_int(keys, end - 1);
  if (id >= rows || load_int(keys, end) != id) return;
  // The run began before: another block's.
  if (load_int(keys, begin) == id && begin > 0 && load_int(keys, begin - 1) == id) return;
  float sum = load(tails, (i64)blockIdx.x * width + column);
  for (i64 chunk = blockIdx.x + 1; chunk * CHUNK < n && load_int(keys, chunk * CHUNK) == id; chunk++)
    sum += load(heads, chunk * width + column);
  give(dtable, (i64)id * width + column, sum, 1);
}
