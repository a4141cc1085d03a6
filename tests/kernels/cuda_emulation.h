// Runs CUDA kernels on the CPU, so that their own source can be tested where there is no GPU.
//
// One block of threads at a time, each thread a fiber that runs until a barrier or a shuffle. The order of threads and blocks can
// be chosen. Shared memory is checked at every access: bounds, reads of what was never written, and races (two threads touch an
// element, one of them writes, and no __syncthreads lies between). What is found makes the launch return an error. Only what
// our kernels use is here: blocks in one dimension, full warps. It can't see bank conflicts, weak memory order or missing fences.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <string>
#include <type_traits>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace emulation {

struct Index {
  unsigned x;
};

enum class State { ready, at_barrier, at_shuffle, done };

struct Thread {
  ucontext_t context;
  char* stack = nullptr;
  void* sanitizer_stack = nullptr;
  Index index{};
  State state = State::done;
  int epoch = 0;     // barriers passed
  std::string site;  // of the barrier it waits at
};

// An element of shared memory: who wrote it last, who read it since.
struct History {
  int writer = -1, write_epoch = -1;
  int reader = -1, read_epoch = -1;  // reader -2: several
};

struct Storage {
  std::vector<char> bytes;
  std::vector<History> history;
};

enum class Order { ascending, descending, random };

struct Machine {
  Order order = Order::ascending;
  std::string skipped;             // the place, file:line, of a __syncthreads that is left out
  std::set<std::string> barriers;  // places seen
  std::string error;
  int launches = 0;
  bool dry = false;  // launches are counted, and do nothing
  std::mt19937 random{0};

  std::vector<Thread> threads;
  Thread* current = nullptr;
  ucontext_t scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  void* scheduler_sanitizer_stack = nullptr;
  std::function<void()> body;
  Index block{}, grid{};
  std::map<std::string, Storage> shared;  // by place and name
  std::vector<std::vector<char>> exchanged;  // a slot for each thread
};
inline Machine machine;

constexpr size_t kStack = size_t(256) << 10;

inline void fail(const std::string& what) {
  if (machine.error.empty()) {
    machine.error = what + " in block " + std::to_string(machine.block.x) +
                    (machine.current ? ", thread " + std::to_string(machine.current->index.x) : "");
  }
}

inline void leave() {
  Thread* thread = machine.current;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(thread->state == State::done ? nullptr : &thread->sanitizer_stack, machine.scheduler_stack,
                                 machine.scheduler_size);
#endif
  swapcontext(&thread->context, &machine.scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(thread->sanitizer_stack, nullptr, nullptr);
#endif
}

inline void start() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &machine.scheduler_stack, &machine.scheduler_size);
#endif
  machine.body();
  machine.current->state = State::done;
  leave();
}

inline void resume(Thread& thread) {
  machine.current = &thread;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&machine.scheduler_sanitizer_stack, thread.stack, kStack);
#endif
  swapcontext(&machine.scheduler, &thread.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(machine.scheduler_sanitizer_stack, nullptr, nullptr);
#endif
  machine.current = nullptr;
}

inline void barrier(const char* site) {
  machine.barriers.insert(site);
  if (site == machine.skipped) return;
  machine.current->state = State::at_barrier;
  machine.current->site = site;
  leave();
}

template <typename T>
T shuffle_down(unsigned mask, T value, unsigned offset) {
  if (mask != ~0u) fail("a shuffle of part of a warp");
  const unsigned self = machine.current->index.x, lane = self % 32;
  machine.exchanged[self].assign(reinterpret_cast<char*>(&value), reinterpret_cast<char*>(&value) + sizeof value);
  machine.current->state = State::at_shuffle;
  leave();
  const std::vector<char>& from = machine.exchanged[lane + offset < 32 ? self + offset : self];
  T result;
  std::memcpy(&result, from.data(), sizeof result);
  // Nobody overwrites its slot before all have read theirs.
  machine.current->state = State::at_shuffle;
  leave();
  return result;
}

// Lets those go on that all wait for each other; whether there were any.
inline bool release() {
  std::vector<Thread>& threads = machine.threads;
  bool released = false;
  for (size_t warp = 0; warp < threads.size(); warp += 32) {
    const auto begin = threads.begin() + warp, end = begin + 32;
    if (std::all_of(begin, end, [](const Thread& t) { return t.state == State::at_shuffle; })) {
      for (auto t = begin; t != end; ++t) t->state = State::ready;
      released = true;
    }
  }
  const std::string site = threads.front().site;
  if (std::all_of(threads.begin(), threads.end(), [](const Thread& t) { return t.state == State::at_barrier; })) {
    for (Thread& t : threads) {
      if (t.site != site) fail("threads wait at different __syncthreads");
      t.state = State::ready;
      ++t.epoch;
    }
    released = true;
  }
  return released;
}

inline void run_block() {
  std::vector<Thread>& threads = machine.threads;
  machine.shared.clear();
  for (Thread& thread : threads) {
    thread.state = State::ready;
    thread.epoch = 0;
    getcontext(&thread.context);
    thread.context.uc_stack.ss_sp = thread.stack;
    thread.context.uc_stack.ss_size = kStack;
    thread.context.uc_link = nullptr;
    makecontext(&thread.context, start, 0);
  }
  std::vector<size_t> order(threads.size());
  std::iota(order.begin(), order.end(), size_t(0));
  if (machine.order == Order::descending) std::reverse(order.begin(), order.end());
  while (std::any_of(threads.begin(), threads.end(), [](const Thread& t) { return t.state != State::done; })) {
    if (machine.order == Order::random) std::shuffle(order.begin(), order.end(), machine.random);
    bool progress = false;
    for (const size_t i : order) {
      if (threads[i].state == State::ready) {
        resume(threads[i]);
        progress = true;
      }
    }
    if (!release() && !progress) return fail("a deadlock: some threads wait where others never come");
  }
}

template <typename Body>
void launch(int64_t blocks, int threads, Body&& body) {
  if (blocks < 1 || blocks > INT32_MAX || threads % 32 != 0 || threads > 1024) return fail("a grid that can't be launched");
  ++machine.launches;
  if (machine.dry) return;
  machine.body = body;
  machine.grid.x = static_cast<unsigned>(blocks);
  machine.threads.resize(threads);
  machine.exchanged.resize(threads);
  for (int i = 0; i < threads; ++i) {
    machine.threads[i].index.x = i;
    if (!machine.threads[i].stack) {
      void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      machine.threads[i].stack = static_cast<char*>(stack);
    }
  }
  std::vector<unsigned> order(blocks);
  std::iota(order.begin(), order.end(), 0u);
  if (machine.order == Order::descending) std::reverse(order.begin(), order.end());
  if (machine.order == Order::random) std::shuffle(order.begin(), order.end(), machine.random);
  for (const unsigned block : order) {
    machine.block.x = block;
    run_block();
    if (!machine.error.empty()) return;
  }
}

// A __shared__ array as one thread sees it.
template <typename T>
class Shared {
 public:
  Shared(const char* place, int count) : count_(count) {
    Storage& storage = machine.shared[place];
    if (storage.history.empty()) {
      storage.bytes.assign(count * sizeof(T), static_cast<char>(0xff));
      storage.history.resize(count);
    }
    data_ = reinterpret_cast<T*>(storage.bytes.data());
    history_ = storage.history.data();
  }

  class Element {
   public:
    Element(T* value, History* history) : value_(value), history_(history) {}
    operator T() const {
      if (!history_) return T();
      const int self = machine.current->index.x, epoch = machine.current->epoch;
      if (history_->writer == -1) fail("a read of shared memory that was never written");
      if (history_->write_epoch == epoch && history_->writer != self) fail("a race: read after a write without a barrier");
      history_->reader = history_->read_epoch == epoch && history_->reader != self ? -2 : self;
      history_->read_epoch = epoch;
      return *value_;
    }
    Element& operator=(T value) {
      if (!history_) return *this;
      const int self = machine.current->index.x, epoch = machine.current->epoch;
      if (history_->write_epoch == epoch && history_->writer != self) fail("a race: two writes without a barrier");
      if (history_->read_epoch == epoch && history_->reader != self) fail("a race: write after a read without a barrier");
      history_->writer = self;
      history_->write_epoch = epoch;
      *value_ = value;
      return *this;
    }
    Element& operator=(const Element& other) { return *this = static_cast<T>(other); }

   private:
    T* value_;
    History* history_;
  };

  Element operator[](int64_t i) const {
    if (i < 0 || i >= count_) {
      fail("shared memory of " + std::to_string(count_) + " elements used at " + std::to_string(i));
      return {nullptr, nullptr};
    }
    return {data_ + i, history_ + i};
  }

 private:
  int64_t count_;
  T* data_;
  History* history_;
};

}  // namespace emulation

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define threadIdx (emulation::machine.current->index)
#define blockIdx (emulation::machine.block)
#define gridDim (emulation::machine.grid)
#define LID_TEXT_OF(value) #value
#define LID_TEXT(value) LID_TEXT_OF(value)
#define LID_PLACE __FILE_NAME__ ":" LID_TEXT(__LINE__)
#define __syncthreads() emulation::barrier(LID_PLACE)
#define LID_SHARED(type, name, count) emulation::Shared<type> name(LID_PLACE #name, (count))
#define LID_LAUNCH(kernel, blocks, threads, stream, ...) \
  emulation::launch(blocks, threads, [&] { kernel(__VA_ARGS__); })

using __half = _Float16;
inline float __half2float(__half value) { return value; }
inline __half __float2half(float value) { return static_cast<__half>(value); }

inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset) {
  return emulation::shuffle_down(mask, value, offset);
}

inline int cudaGetLastError() { return emulation::machine.error.empty() ? 0 : 1; }
