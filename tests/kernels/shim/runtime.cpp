// Runs kernels on the CPU: the threads of a block are fibers that one thread of the operating system takes in turn, each
// until it ends or waits for others. Blocks run one after the other.
//
// Environment, to show that results do not depend on an order that CUDA leaves open:
//   MCPIPE_SHIM_BLOCKS   forward | backward | shuffled   order of blocks
//   MCPIPE_SHIM_THREADS  forward | backward | shuffled   order in which the threads of a block go on
//   MCPIPE_SHIM_WORKERS  N                               blocks at a time, 1 if not set
#include "runtime.hpp"

#include <elf.h>
#include <link.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#include <atomic>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(__x86_64__) || defined(MCPIPE_SHIM_UCONTEXT)
#include <ucontext.h>
#endif

namespace mcpipe_shim {

__thread Tls tls;

constexpr unsigned MOST_THREADS = 1024, WARPS = MOST_THREADS / 32;
constexpr size_t STACK = 128 << 10, PAGE = 4096;
// Dynamic shared memory of a block of sm_90, and a border behind it that must stay as it is.
constexpr size_t MOST_SHARED = 227 << 10, BORDER = 1024;
constexpr unsigned char BORDER_BYTE = 0xa5;

enum class Order { Forward, Backward, Shuffled };

static Order order_of(const char* variable) {
  const char* text = getenv(variable);
  if (text && !strcmp(text, "backward")) return Order::Backward;
  if (text && !strcmp(text, "shuffled")) return Order::Shuffled;
  return Order::Forward;
}

// ---- fibers -------------------------------------------------------------------------------------------------------

#if defined(__x86_64__) && !defined(MCPIPE_SHIM_UCONTEXT)
extern "C" void mcpipe_shim_switch(void** from, void* to);
// The registers that a function must keep, and the stack. The floating-point environment is one for all.
asm(R"(
.text
.type mcpipe_shim_switch,@function
mcpipe_shim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size mcpipe_shim_switch, .-mcpipe_shim_switch
)");
struct Context {
  void* stack_pointer = nullptr;
  void start(char* stack, size_t bytes, void (*entry)()) {
    // As if a call had just pushed a return address: 8 below a multiple of 16 once entry runs.
    void** top = (void**)(stack + bytes) - 2;
    *top = (void*)entry;
    for (int i = 0; i < 6; i++) *--top = nullptr;
    stack_pointer = top;
  }
  static void go(Context& from, Context& to) { mcpipe_shim_switch(&from.stack_pointer, to.stack_pointer); }
};
#else
struct Context {
  ucontext_t context;
  void start(char* stack, size_t bytes, void (*entry)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = bytes;
    context.uc_link = nullptr;
    makecontext(&context, entry, 0);
  }
  static void go(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
};
#endif

struct Copy {
  void* to;
  const void* from;
  unsigned bytes;
  bool valid;
  unsigned group;
};

struct Fiber {
  Context context;
  Place place;
  unsigned mask;  // lanes it waits for
  Merge merge;
  void* payload;
  const char* what;
  std::vector<Copy> copies;
  unsigned group;  // of copies asked for now
};

struct Launch {
  const Kernel* kernel;
  void** args;
  Place grid, block;
  unsigned shared;
  unsigned long long total;
  Order blocks, threads;
  std::atomic<unsigned long long> next{0};
  std::atomic<bool> failed{false};
  std::mutex lock;
  char* error;
  size_t error_len;

  void report(const char* text) {
    std::lock_guard<std::mutex> hold(lock);
    if (!failed.exchange(true) && error_len) snprintf(error, error_len, "%s", text);
  }
};

static unsigned long long gcd(unsigned long long a, unsigned long long b) { return b ? gcd(b, a % b) : a; }

// What one thread of the operating system needs to run a block.
struct Worker {
  char* stacks;
  unsigned char* shared;
  Fiber fibers[MOST_THREADS];
  Context scheduler;
  Launch* launch = nullptr;
  unsigned threads = 0, current = 0;
  uint64_t random = 88172645463325252ull;
  // By warp, a bit a lane.
  unsigned alive[WARPS], ready[WARPS], at_barrier[WARPS], at_collective[WARPS], looks[WARPS];
  // Whether what `looks` threads wait for may have changed since they looked.
  bool news = false;
  struct { int arrived, turn; } groups[16];
  int living = 0, arrived = 0, count = 0;
  Arrived result = {0, 0};

  Worker() {
    size_t bytes = MOST_THREADS * (STACK + PAGE);
    void* p = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (p == MAP_FAILED) abort();
    stacks = (char*)p;
    // A page below each stack that may not be touched: an overflow stops instead of spreading.
    for (unsigned i = 0; i < MOST_THREADS; i++) mprotect(stacks + i * (STACK + PAGE), PAGE, PROT_NONE);
    shared = (unsigned char*)aligned_alloc(1024, (MOST_SHARED + BORDER + 1023) / 1024 * 1024);
    if (!shared) abort();
  }

  char* stack(unsigned i) { return stacks + i * (STACK + PAGE) + PAGE; }
  unsigned draw() {
    random ^= random << 13, random ^= random >> 7, random ^= random << 17;
    return (unsigned)(random >> 32);
  }

  void begin(unsigned long long block);
  bool run_block(unsigned long long block);
  void resume(unsigned i);
  void wait();
  void stuck();
  void leave();
  bool try_collective(unsigned warp, unsigned lane);
  void release_barrier();
};

namespace {

// This module's thread-local storage of this thread, where static shared memory lies.
struct Range {
  unsigned char *begin, *end;
};
int find_module(dl_phdr_info* info, size_t size, void* out) {
  if (size < offsetof(dl_phdr_info, dlpi_tls_data) + sizeof(void*) || !info->dlpi_tls_data) return 0;
  for (int i = 0; i < info->dlpi_phnum; i++) {
    if (info->dlpi_phdr[i].p_type != PT_TLS) continue;
    unsigned char* begin = (unsigned char*)info->dlpi_tls_data;
    unsigned char* end = begin + info->dlpi_phdr[i].p_memsz;
    if ((unsigned char*)&tls < begin || (unsigned char*)&tls >= end) continue;
    *(Range*)out = {begin, end};
    return 1;
  }
  return 0;
}
void poison_static_shared() {
  static __thread Range range;
  Range own = range;
  if (!own.begin && !dl_iterate_phdr(find_module, &own)) return;
  // `tls` and `range` are the only other thread-local variables here; both are put back.
  Tls kept = tls;
  memset(own.begin, 0xff, (size_t)(own.end - own.begin));
  tls = kept;
  range = own;
}

void fiber_main();

std::mutex idle_lock;
std::vector<Worker*> idle;

Worker* take_worker() {
  {
    std::lock_guard<std::mutex> hold(idle_lock);
    if (!idle.empty()) {
      Worker* w = idle.back();
      idle.pop_back();
      return w;
    }
  }
  return new Worker;
}
void give_worker(Worker* w) {
  std::lock_guard<std::mutex> hold(idle_lock);
  idle.push_back(w);
}

}  // namespace

void Worker::begin(unsigned long long block) {
  const Launch& l = *launch;
  poison_static_shared();
  memset(shared, 0xff, l.shared);
  memset(shared + l.shared, BORDER_BYTE, BORDER);
  tls.worker = this;
  tls.shared = shared;
  tls.threads = l.block;
  tls.blocks = l.grid;
  tls.block = {(unsigned)(block % l.grid.x), (unsigned)(block / l.grid.x % l.grid.y),
               (unsigned)(block / l.grid.x / l.grid.y)};
  threads = l.block.x * l.block.y * l.block.z;
  memset(alive, 0, sizeof alive);
  memset(at_barrier, 0, sizeof at_barrier);
  memset(at_collective, 0, sizeof at_collective);
  memset(looks, 0, sizeof looks);
  memset(groups, 0, sizeof groups);
  for (unsigned i = 0; i < threads; i++) {
    Fiber& f = fibers[i];
    f.place = {i % l.block.x, i / l.block.x % l.block.y, i / l.block.x / l.block.y};
    f.copies.clear();
    f.group = 0;
    // Not all at one place of a page: they would fight for the same lines of the cache.
    f.context.start(stack(i), STACK - i % 14 * 320, fiber_main);
    alive[i / 32] |= 1u << i % 32;
  }
  memcpy(ready, alive, sizeof ready);
  living = (int)threads, arrived = 0, count = 0;
}

bool Worker::run_block(unsigned long long block) {
  begin(block);
  unsigned warps = (threads + 31) / 32;
  while (living && !launch->failed.load(std::memory_order_relaxed)) {
    bool went_on = false;
    unsigned shift = launch->threads == Order::Shuffled ? draw() % warps : 0;
    for (unsigned i = 0; i < warps; i++) {
      unsigned w = launch->threads == Order::Backward ? warps - 1 - i : (i + shift) % warps;
      while (ready[w] && !launch->failed.load(std::memory_order_relaxed)) {
        unsigned lane = (unsigned)__builtin_ctz(ready[w]);
        if (launch->threads == Order::Backward) lane = 31 - (unsigned)__builtin_clz(ready[w]);
        if (launch->threads == Order::Shuffled)
          for (unsigned skip = draw() % (unsigned)__builtin_popcount(ready[w]), rest = ready[w]; skip--;)
            rest &= rest - 1, lane = (unsigned)__builtin_ctz(rest);
        went_on = true;
        resume(w * 32 + lane);
      }
    }
    // Threads that look again and again come after all others have gone on.
    if (!went_on && news) {
      news = false;
      for (unsigned w = 0; w < warps; w++) ready[w] |= looks[w], looks[w] = 0;
    } else if (!went_on && living) {
      stuck();
    }
  }
  if (launch->failed) return false;
  for (size_t i = 0; i < BORDER; i++)
    if (shared[launch->shared + i] != BORDER_BYTE) {
      char text[160];
      snprintf(text, sizeof text, "block (%u,%u,%u) wrote behind its %u bytes of dynamic shared memory, at byte %zu",
               tls.block.x, tls.block.y, tls.block.z, launch->shared, launch->shared + i);
      launch->report(text);
      return false;
    }
  return true;
}

void Worker::resume(unsigned i) {
  current = i;
  ready[i / 32] &= ~(1u << i % 32);
  tls.thread = fibers[i].place;
  tls.linear = i;
  Context::go(scheduler, fibers[i].context);
}

// Back to the scheduler, until made ready again.
void Worker::wait() { Context::go(fibers[current].context, scheduler); }

void Worker::stuck() {
  int barrier = 0, collective = 0, looking = 0, first = -1;
  for (unsigned i = 0; i < threads; i++) {
    looking += looks[i / 32] >> i % 32 & 1;
    barrier += at_barrier[i / 32] >> i % 32 & 1;
    bool waits = at_collective[i / 32] >> i % 32 & 1;
    collective += waits;
    if (waits && first < 0) first = (int)i;
  }
  char text[400];
  int n = snprintf(text, sizeof text, "block (%u,%u,%u) can't go on: of %u threads %d ended, %d wait at __syncthreads, "
                   "%d at a barrier in shared memory or of a group",
                   tls.block.x, tls.block.y, tls.block.z, threads, (int)threads - living, barrier, looking);
  if (first >= 0)
    snprintf(text + n, sizeof text - (size_t)n, ", %d at a warp's; thread %d at %s of lanes 0x%08x", collective, first,
             fibers[first].what, fibers[first].mask);
  launch->report(text);
}

void Worker::release_barrier() {
  result = {count, arrived};
  arrived = count = 0;
  for (unsigned w = 0; w < WARPS; w++) ready[w] |= at_barrier[w], at_barrier[w] = 0;
}

// Merges and releases if all living lanes that `lane` waits for are there.
bool Worker::try_collective(unsigned warp, unsigned lane) {
  const Fiber& f = fibers[warp * 32 + lane];
  unsigned wanted = f.mask & alive[warp];
  if ((at_collective[warp] & wanted) != wanted) return false;
  void* payloads[32];
  for (unsigned l = 0; l < 32; l++) {
    if (!(wanted >> l & 1)) continue;
    const Fiber& other = fibers[warp * 32 + l];
    if ((other.mask & alive[warp]) != wanted || other.merge != f.merge) {
      char text[240];
      snprintf(text, sizeof text, "lanes of warp %u disagree: lane %u is at %s of 0x%08x, lane %u at %s of 0x%08x", warp,
               lane, f.what, f.mask, l, other.what, other.mask);
      launch->report(text);
      return false;
    }
    payloads[l] = other.payload;
  }
  f.merge(payloads, wanted);
  at_collective[warp] &= ~wanted;
  ready[warp] |= wanted;
  return true;
}

// The running thread is done: it counts as arrived wherever others wait for it.
void Worker::leave() {
  unsigned warp = current / 32;
  alive[warp] &= ~(1u << current % 32);
  living--;
  if (arrived && arrived == living) release_barrier();
  for (unsigned l = 0; l < 32; l++)
    if (at_collective[warp] >> l & 1) try_collective(warp, l);
}

namespace {

void fiber_main() {
  Worker& w = *tls.worker;
  w.launch->kernel->call(w.launch->kernel->function, w.launch->args);
  Worker& same = *tls.worker;
  async_commit();
  async_wait(0);
  same.leave();
  same.wait();
  abort();
}

void work(Launch* launch) {
  Worker* w = take_worker();
  w->launch = launch;
  // A step that shares no factor with the number of blocks visits each once.
  unsigned long long step = launch->total * 5 / 8 | 1;
  while (gcd(step, launch->total) != 1) step += 2;
  for (;;) {
    unsigned long long i = launch->next.fetch_add(1);
    if (i >= launch->total) break;
    unsigned long long block = i;
    if (launch->blocks == Order::Backward) block = launch->total - 1 - i;
    if (launch->blocks == Order::Shuffled) block = (unsigned long long)((unsigned __int128)i * step % launch->total);
    if (!w->run_block(block)) break;
  }
  give_worker(w);
}

}  // namespace

void fail(const char* format, ...) {
  Worker& w = *tls.worker;
  char text[600];
  int n = snprintf(text, sizeof text, "block (%u,%u,%u), thread (%u,%u,%u): ", tls.block.x, tls.block.y, tls.block.z,
                   tls.thread.x, tls.thread.y, tls.thread.z);
  va_list rest;
  va_start(rest, format);
  vsnprintf(text + n, sizeof text - (size_t)n, format, rest);
  va_end(rest);
  w.launch->report(text);
  w.wait();  // for ever: the scheduler gives up
  abort();
}

void fail_index(const char* view, const void* data, long long len, unsigned dtype, long long i, int n) {
  const char* names[] = {"f32", "bf16", "i32", "u8"};
  if (i >= 0 && i + n <= len)
    fail("access to %d elements of %s (%s) at %lld, which is not aligned (view at %p)", n, view, names[dtype & 3], i, data);
  fail("access to %s[%lld..%lld], but it has %lld elements (%s)", view, i, i + n, len, names[dtype & 3]);
}

Arrived barrier(int predicate) {
  Worker& w = *tls.worker;
  w.arrived++;
  w.count += predicate;
  if (w.arrived == w.living) {
    w.release_barrier();
    return w.result;
  }
  w.at_barrier[w.current / 32] |= 1u << w.current % 32;
  w.wait();
  return w.result;
}

void collective(unsigned mask, Merge merge, void* payload, const char* what) {
  Worker& w = *tls.worker;
  unsigned warp = w.current / 32, bit = 1u << w.current % 32;
  if (!(mask & bit)) fail("lane %u calls %s of lanes 0x%08x, where it is not", w.current % 32, what, mask);
  Fiber& f = w.fibers[w.current];
  f.mask = mask, f.merge = merge, f.payload = payload, f.what = what;
  w.at_collective[warp] |= bit;
  if (w.try_collective(warp, w.current % 32)) {
    w.ready[warp] &= ~bit;
    return;
  }
  w.wait();
}

void async_copy(void* to, const void* from, unsigned bytes, bool valid) {
  if ((uintptr_t)to % bytes || (valid && (uintptr_t)from % bytes))
    fail("an asynchronous copy of %u bytes from %p to %p: not aligned", bytes, from, to);
  memset(to, 0xff, bytes);
  Fiber& f = tls.worker->fibers[tls.worker->current];
  f.copies.push_back({to, from, bytes, valid, f.group});
}

void async_commit() { tls.worker->fibers[tls.worker->current].group++; }

// All but the latest `groups` groups are done.
void async_wait(unsigned groups) {
  Fiber& f = tls.worker->fibers[tls.worker->current];
  size_t done = 0;
  while (done < f.copies.size() && f.copies[done].group + groups < f.group) {
    const Copy& c = f.copies[done++];
    if (c.valid) memcpy(c.to, c.from, c.bytes);
    else memset(c.to, 0, c.bytes);
  }
  f.copies.erase(f.copies.begin(), f.copies.begin() + (long)done);
}

// Lets others go on until something has changed.
static void look_again() {
  Worker& w = *tls.worker;
  w.looks[w.current / 32] |= 1u << w.current % 32;
  w.wait();
}

// A phase barrier's word: what a phase needs, what it still waits for, and its number.
struct Phase {
  int bytes;
  short arrivals, missing : 15;
  unsigned short turn : 1;
};
static_assert(sizeof(Phase) <= sizeof(unsigned long long), "a word");

static Phase get(const unsigned long long* bar) {
  Phase p;
  memcpy(&p, bar, sizeof p);
  return p;
}
static void put(unsigned long long* bar, const Phase& p) {
  memcpy(bar, &p, sizeof p);
  tls.worker->news = true;
}

void phase_init(unsigned long long* bar, int arrivals) {
  Phase p = {};
  p.arrivals = (short)arrivals, p.missing = (short)arrivals;
  put(bar, p);
}

void phase_arrive(unsigned long long* bar, int arrivals, int bytes) {
  Phase p = get(bar);
  if (p.missing < arrivals) fail("a barrier in shared memory has %d arrivals too many", arrivals - p.missing);
  p.missing = (short)(p.missing - arrivals), p.bytes += bytes;
  if (p.missing == 0 && p.bytes == 0) p.missing = p.arrivals, p.turn ^= 1;
  put(bar, p);
}

void phase_wait(unsigned long long* bar, unsigned parity) {
  while (get(bar).turn == (parity & 1)) look_again();
}

void group_barrier(int id, int threads) {
  Worker& w = *tls.worker;
  auto& g = w.groups[id & 15];
  int turn = g.turn;
  if (++g.arrived == threads) {
    g.arrived = 0, g.turn++;
    w.news = true;
    return;
  }
  while (g.turn == turn) look_again();
}

unsigned long long ticks() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (unsigned long long)t.tv_sec * 1000000000ull + (unsigned long long)t.tv_nsec;
}

static Kernel* kernels;
void add_kernel(Kernel* kernel) { kernel->next = kernels, kernels = kernel; }

}  // namespace mcpipe_shim

// Runs a kernel to its end. `kinds` says of each argument what it is, as Kernel::kinds. 0, or 1 and a message.
extern "C" __attribute__((visibility("default"))) int mcpipe_launch(const char* file, const char* name,
                                                                    const unsigned grid[3], const unsigned block[3],
                                                                    unsigned shared, void** args, const unsigned* kinds,
                                                                    unsigned count, char* error, size_t error_len) {
  using namespace mcpipe_shim;
  const Kernel* kernel = kernels;
  while (kernel && (strcmp(kernel->name, name) || strcmp(kernel->file, file))) kernel = kernel->next;
  if (!kernel) {
    snprintf(error, error_len, "the library has no kernel %s of kernels/%s.cu; is it up to date?", name, file);
    return 1;
  }
  Launch launch;
  launch.kernel = kernel, launch.args = args;
  launch.grid = {grid[0], grid[1], grid[2]}, launch.block = {block[0], block[1], block[2]};
  launch.shared = shared;
  launch.total = (unsigned long long)grid[0] * grid[1] * grid[2];
  launch.blocks = order_of("MCPIPE_SHIM_BLOCKS"), launch.threads = order_of("MCPIPE_SHIM_THREADS");
  launch.error = error, launch.error_len = error_len;
  char text[200];
  unsigned long long threads = (unsigned long long)block[0] * block[1] * block[2];
  if (threads == 0 || threads > MOST_THREADS || (kernel->most_threads && threads > kernel->most_threads)) {
    snprintf(text, sizeof text, "%llu threads a block, at most %u", threads,
             kernel->most_threads ? kernel->most_threads : MOST_THREADS);
    launch.report(text);
  } else if (shared > MOST_SHARED) {
    snprintf(text, sizeof text, "%u bytes of dynamic shared memory, at most %zu", shared, MOST_SHARED);
    launch.report(text);
  } else if (launch.total == 0 || grid[0] > 0x7fffffffu || grid[1] > 65535 || grid[2] > 65535) {
    snprintf(text, sizeof text, "a grid of (%u,%u,%u)", grid[0], grid[1], grid[2]);
    launch.report(text);
  } else if (count != kernel->count) {
    snprintf(text, sizeof text, "%u arguments, but it has %u parameters", count, kernel->count);
    launch.report(text);
  }
  for (unsigned i = 0; i < count && !launch.failed; i++)
    if (kinds[i] != kernel->kinds[i]) {
      snprintf(text, sizeof text, "argument %u is %c%u, the parameter %c%u (kind and bytes)", i, (char)(kinds[i] >> 24),
               (kinds[i] & 0xffffffu), (char)(kernel->kinds[i] >> 24), (kernel->kinds[i] & 0xffffffu));
      launch.report(text);
    }
  if (launch.failed) return 1;

  const char* wish = getenv("MCPIPE_SHIM_WORKERS");
  unsigned workers = wish ? (unsigned)atoi(wish) : 1;
  if (launch.total < workers) workers = (unsigned)launch.total;
  std::vector<std::thread> others;
  for (unsigned i = 1; i < workers; i++) others.emplace_back(work, &launch);
  work(&launch);
  for (auto& t : others) t.join();
  return launch.failed ? 1 : 0;
}
