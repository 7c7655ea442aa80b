#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

// A CUDA grid on one host thread, for tests of kernel values on machines without a GPU. Every thread of a block is a
// fiber that runs until a barrier or a shuffle. Blocks and threads are taken in an order that the test can change:
// a kernel whose result depends on it has a race. What the hardware would hang on or leave undefined aborts with a
// message. Not emulated: time, memory spaces, atomics, partial warp masks.
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
using cudaStream_t = void*;

#define __global__
#define __device__
#define __launch_bounds__(...)
#define __forceinline__ inline

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace fm::emulation {

inline constexpr unsigned kLanes = 32;
inline constexpr size_t kStackBytes = 64 * 1024;
inline constexpr size_t kSharedBytes = 228 * 1024;

enum class State { kRunning, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  State state;
  dim3 index;
  size_t shared_offset;
  unsigned shuffles;
};

struct Machine {
  uint32_t order_seed = 0;
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::vector<uint32_t> shuffled;  // two slots a thread: a lane may be one shuffle ahead of its warp
  std::unique_ptr<char[]> shared{new char[kSharedBytes]};
  ucontext_t scheduler;
  const std::function<void()>* body = nullptr;
  unsigned current = 0, threads = 0;
};
inline Machine machine;

[[noreturn]] inline void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s (block %u,%u thread %u)\n", what, blockIdx.x, blockIdx.y, machine.current);
  std::abort();
}

inline void wait(State state) {
  Fiber& fiber = *machine.fibers[machine.current];
  fiber.state = state;
  swapcontext(&fiber.context, &machine.scheduler);
}

// Each thread declares the same arrays in the same order, so its n-th declaration is everyone's n-th.
template <typename T>
T* shared_memory(size_t count) {
  Fiber& fiber = *machine.fibers[machine.current];
  const size_t offset = (fiber.shared_offset + 15) / 16 * 16;
  fiber.shared_offset = offset + count * sizeof(T);
  if (fiber.shared_offset > kSharedBytes) fail("too much shared memory");
  return reinterpret_cast<T*>(machine.shared.get() + offset);
}

inline void run_fiber() {
  (*machine.body)();
  machine.fibers[machine.current]->state = State::kDone;
}

// The i-th of n in an order that visits each once: backwards for odd seeds, starting anywhere.
inline unsigned permuted(unsigned i, unsigned n) {
  const unsigned start = machine.order_seed / 2 % n;
  const unsigned shifted = (i + start) % n;
  return machine.order_seed % 2 ? n - 1 - shifted : shifted;
}

// Runs one warp to the next barrier or to its end, before any other warp moves: the most uneven progress that the
// hardware could make, so that memory reused without a barrier shows.
inline void run_warp(unsigned first) {
  Machine& m = machine;
  for (unsigned at_shuffle = kLanes; at_shuffle > 0;) {
    at_shuffle = 0;
    for (unsigned i = 0; i < kLanes; ++i) {
      const unsigned t = first + permuted(i, kLanes);
      Fiber& fiber = *m.fibers[t];
      if (fiber.state != State::kRunning) continue;
      m.current = t;
      threadIdx = fiber.index;
      swapcontext(&m.scheduler, &fiber.context);
      at_shuffle += fiber.state == State::kAtShuffle;
    }
    if (at_shuffle % kLanes) fail("a shuffle that not all 32 lanes reach");
    for (unsigned t = first; at_shuffle > 0 && t < first + kLanes; ++t) m.fibers[t]->state = State::kRunning;
  }
}

inline void run_block() {
  Machine& m = machine;
  std::memset(m.shared.get(), 0xFF, kSharedBytes);  // NaN: reading before writing shows
  for (unsigned t = 0; t < m.threads; ++t) {
    Fiber& fiber = *m.fibers[t];
    fiber.state = State::kRunning;
    fiber.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
    fiber.shared_offset = 0;
    fiber.shuffles = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStackBytes;
    fiber.context.uc_link = &m.scheduler;
    makecontext(&fiber.context, run_fiber, 0);
  }
  for (bool done = false; !done;) {
    unsigned at_barrier = 0, finished = 0;
    for (unsigned i = 0; i < m.threads; i += kLanes) {
      run_warp(permuted(i / kLanes, m.threads / kLanes) * kLanes);
    }
    for (auto& fiber : m.fibers) {
      at_barrier += fiber->state == State::kAtBarrier;
      finished += fiber->state == State::kDone;
    }
    done = finished == m.threads;
    if (!done && at_barrier != m.threads) fail("a __syncthreads that not all threads reach");
    for (auto& fiber : m.fibers) fiber->state = State::kRunning;
  }
}

inline void launch(dim3 grid, dim3 block, const std::function<void()>& body) {
  Machine& m = machine;
  m.body = &body;
  m.threads = block.x * block.y * block.z;
  if (m.threads == 0 || m.threads > 1024 || m.threads % kLanes) fail("bad block size");
  if (grid.x == 0 || grid.y == 0 || grid.y > 65535 || grid.z != 1) fail("bad grid size");
  m.fibers.clear();
  for (unsigned t = 0; t < m.threads; ++t) m.fibers.push_back(std::make_unique<Fiber>());
  m.shuffled.assign(2 * m.threads, 0);
  gridDim = grid;
  blockDim = block;
  const unsigned blocks = grid.x * grid.y;
  for (unsigned i = 0; i < blocks; ++i) {
    const unsigned b = permuted(i, blocks);
    blockIdx = dim3(b % grid.x, b / grid.x);
    run_block();
  }
}

}  // namespace fm::emulation

inline void __syncthreads() { fm::emulation::wait(fm::emulation::State::kAtBarrier); }

inline float __shfl_xor_sync(unsigned mask, float value, int offset) {
  using namespace fm::emulation;
  if (mask != 0xFFFFFFFFu) fail("only full warp masks are emulated");
  Fiber& fiber = *machine.fibers[machine.current];
  const unsigned me = machine.current;
  uint32_t* slots = machine.shuffled.data() + (fiber.shuffles++ % 2) * machine.threads;
  std::memcpy(&slots[me], &value, sizeof(value));
  wait(State::kAtShuffle);
  float result;
  std::memcpy(&result, &slots[me ^ static_cast<unsigned>(offset)], sizeof(result));
  return result;
}

// The test that loads a compiled kernel sets the order of blocks and threads.
extern "C" inline __attribute__((used, visibility("default"))) void set_order_seed(uint32_t seed) {
  fm::emulation::machine.order_seed = seed;
}
