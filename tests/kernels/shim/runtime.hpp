// Threads of a block as fibers of one thread of the operating system; see runtime.cpp.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <type_traits>
#include <utility>

namespace mcpipe_shim {

struct Index {
  unsigned x = 1, y = 1, z = 1;
};
struct Place {
  unsigned x, y, z;
};

// What the running kernel thread sees of itself. One variable, so that poisoning the module's thread-local storage,
// where static shared memory lies, can leave it out.
struct Tls {
  Place thread, block, threads, blocks;
  unsigned linear;  // number of the thread in its block
  unsigned char* shared;
  struct Worker* worker;
};
extern __thread Tls tls;

// Ends the launch with a message.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));
[[noreturn]] void fail_index(const char* view, const void* data, long long len, unsigned dtype, long long i, int n);

static inline bool outside(const void* data, long long len, unsigned dtype, long long i, int n) {
  const unsigned bytes[4] = {4, 2, 4, 1};
  unsigned each = bytes[dtype & 3];
  uintptr_t wide = (uintptr_t)n * each < 16 ? (uintptr_t)n * each : 16;
  return i < 0 || i > len - n || (n > 1 && ((uintptr_t)data + (uintptr_t)i * each) % wide != 0);
}

// A block's barrier; `count` of its `threads` gave a true predicate.
struct Arrived {
  int count, threads;
};
Arrived barrier(int predicate);

// Waits for the lanes of a mask, then `merge` runs once over what they brought. A merge leaves each lane's result in
// that lane's payload.
using Merge = void (*)(void* const* payloads, unsigned lanes);
void collective(unsigned mask, Merge merge, void* payload, const char* what);

// An asynchronous copy to shared memory: not there until waited for.
void async_copy(void* to, const void* from, unsigned bytes, bool valid);
void async_commit();
void async_wait(unsigned groups);

// A barrier in shared memory whose phases count arrivals and bytes; `bytes` are asked for, or below 0 have come.
void phase_init(unsigned long long* bar, int arrivals);
void phase_arrive(unsigned long long* bar, int arrivals, int bytes);
void phase_wait(unsigned long long* bar, unsigned parity);
// A barrier with a number for `threads` threads of a block.
void group_barrier(int id, int threads);

unsigned long long ticks();

// ---- kernels ------------------------------------------------------------------------------------------------------

struct Kernel {
  const char* file;
  const char* name;
  unsigned most_threads;    // of __launch_bounds__; 0 where there is none
  void (*function)();
  void (*call)(void (*)(), void**);
  const unsigned* kinds;    // kind << 24 | bytes, one a parameter
  unsigned count;
  Kernel* next;
};
void add_kernel(Kernel* kernel);

// Float, integer (or address) or struct: what must agree with the launching side.
template <class T> constexpr unsigned kind() {
  unsigned letter = std::is_floating_point<T>::value ? 'f' : (std::is_class<T>::value ? 's' : 'i');
  return letter << 24 | (unsigned)sizeof(T);
}
template <class... P> struct Caller {
  template <size_t... I> static void call(void (*f)(), void** args, std::index_sequence<I...>) {
    ((void (*)(P...))f)(*(P*)args[I]...);
    (void)args;
  }
  static void call(void (*f)(), void** args) { call(f, args, std::index_sequence_for<P...>()); }
};
struct Register {
  Kernel kernel;
  template <class... P> Register(const char* file, const char* name, unsigned most_threads, void (*f)(P...)) {
    static const unsigned kinds[] = {kind<P>()..., 0};
    kernel = {file, name, most_threads, (void (*)())f, Caller<P...>::call, kinds, sizeof...(P), nullptr};
    add_kernel(&kernel);
  }
};

}  // namespace mcpipe_shim
