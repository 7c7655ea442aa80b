// The machine behind emulation/cuda.h: it runs a CUDA grid on one host thread. Every thread of a block is a fiber that
// runs until a barrier or a shuffle. The order of blocks and threads changes with every launch: a kernel whose result
// depends on it has a race. Behaviour that hangs the hardware or is undefined there is an error.
//
// Kernels are compiled so that they call the functions at the end of this file before each access of memory. These ask
// AddressSanitizer, if its allocator is loaded, whether the bytes belong to a tensor.
#include "emulation/cuda.h"

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulation/counts.h"
#include "emulation/fibers.h"
#include "emulation/names.h"
#include "emulation/sanitizer.h"

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace fm::emulation {
namespace {

constexpr unsigned kLanes = 32;
constexpr size_t kSharedBytes = 227 * 1024, kStaticSharedBytes = 48 * 1024;  // Hopper; without opt-in

enum class State { kRunning, kAtBarrier, kAtShuffle, kDone };

struct Fiber {
  Context context;
  State state;
  dim3 index;
  size_t shared_offset;
  unsigned exchanges;
};

struct Machine {
  uint32_t seed = 0, order = 0;
  int multiprocessors = 3;
  unsigned last_blocks = 0, sampled_blocks = 0;  // 0: all
  std::unique_ptr<Stacks> stacks;
  std::vector<Fiber> fibers{kMaxThreads};
  uint64_t exchanged[2][kMaxThreads] = {};  // two: a lane may be one exchange ahead of its warp
  std::unique_ptr<char[]> shared{new char[kSharedBytes + 16]};
  size_t shared_used = 0, dynamic_bytes = 0;
  std::map<const void*, size_t> dynamic_allowed;
  Context scheduler;
  void (*call)(const void*) = nullptr;
  const void* body = nullptr;
  bool running = false;  // whether a fiber runs
  unsigned current = 0, threads = 0;
  const char* name = "";
  const void* kernel = nullptr;
  std::string error;
  Counts counts;
};
Machine machine;

char* shared_begin() {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(machine.shared.get()) + 15) / 16 * 16);
}

std::string at(dim3 index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " + std::to_string(index.z) + ")";
}

[[noreturn]] void fail(const std::string& what) {
  throw std::runtime_error("CUDA emulation: " + name_of(symbol_of(machine.kernel, machine.name)) + ": " + what);
}

std::string here() {
  return " (block " + at(blockIdx) + ", thread " + at(machine.fibers[machine.current].index) + ")";
}

void to_scheduler(State state) {
  Fiber& fiber = machine.fibers[machine.current];
  fiber.state = state;
  machine.running = false;
  switch_context(fiber.context, machine.scheduler);
}

// Called from a fiber: an exception cannot cross its stack, so the scheduler throws.
void fail_in_fiber(const std::string& what) {
  machine.error = what + here();
  to_scheduler(State::kDone);
  std::abort();  // not resumed
}

void run_fiber() {
  machine.call(machine.body);
  to_scheduler(State::kDone);
}

// The i-th of n in an order that visits each once: from any start, and backwards for odd orders.
unsigned permuted(unsigned i, unsigned n) {
  const unsigned shifted = (i + machine.order / 2 % n) % n;
  return machine.order % 2 ? n - 1 - shifted : shifted;
}

void resume(unsigned thread) {
  Fiber& fiber = machine.fibers[thread];
  machine.current = thread;
  threadIdx = fiber.index;
  machine.running = true;
  switch_context(machine.scheduler, fiber.context);
  machine.running = false;
  if (!machine.error.empty()) fail(machine.error);
}

// Runs one warp to the next barrier or to its end, before any other warp moves. This is the most uneven progress that
// the hardware could make, so memory that is reused without a barrier shows.
void run_warp(unsigned first) {
  Machine& m = machine;
  for (bool again = true; again;) {
    unsigned at_shuffle = 0;
    for (unsigned i = 0; i < kLanes; ++i) {
      const unsigned t = first + permuted(i, kLanes);
      if (m.fibers[t].state == State::kRunning) resume(t);
      at_shuffle += m.fibers[t].state == State::kAtShuffle;
    }
    again = at_shuffle > 0;
    for (unsigned t = first; again && t < first + kLanes; ++t) {
      m.current = t;
      if (m.fibers[t].state != State::kAtShuffle) fail("a shuffle that not all 32 lanes reach" + here());
      if (m.fibers[t].exchanges != m.fibers[first].exchanges) fail("lanes at different shuffles" + here());
      m.fibers[t].state = State::kRunning;
    }
  }
}

void run_block() {
  Machine& m = machine;
  std::memset(shared_begin(), 0xFF, m.shared_used);  // NaN, so that a read before a write shows
  for (unsigned t = 0; t < m.threads; ++t) {
    Fiber& fiber = m.fibers[t];
    fiber.state = State::kRunning;
    fiber.index = dim3(t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y));
    fiber.shared_offset = m.dynamic_bytes;
    fiber.exchanges = 0;
    make_context(fiber.context, m.stacks->of(t), run_fiber, m.scheduler);
  }
  for (bool done = false; !done;) {
    unsigned at_barrier = 0, finished = 0;
    for (unsigned i = 0; i < m.threads; i += kLanes) run_warp(permuted(i / kLanes, m.threads / kLanes) * kLanes);
    for (unsigned t = 0; t < m.threads; ++t) {
      at_barrier += m.fibers[t].state == State::kAtBarrier;
      finished += m.fibers[t].state == State::kDone;
    }
    done = finished == m.threads;
    for (unsigned t = 0; !done && t < m.threads; ++t) {
      m.current = t;
      if (m.fibers[t].state != State::kAtBarrier) fail("a __syncthreads that not all threads reach" + here());
      m.fibers[t].state = State::kRunning;
    }
  }
  m.counts.end_block();
}

void check_access(const void* address, size_t bytes, bool is_store, const void* site) {
  Machine& m = machine;
  if (!m.running) return;  // the launch code around kernels runs
  // In other memory structs of 16 bytes may be aligned to 8.
  if (bytes <= 16 && reinterpret_cast<uintptr_t>(address) % bytes != 0 && m.counts.is_global(address)) {
    fail_in_fiber("a misaligned access of " + std::to_string(bytes) + " bytes");
  }
  if (m.counts.active) m.counts.add(address, bytes, is_store, site, m.current);
  const std::string problem = problem_with(address, bytes);
  if (!problem.empty()) fail_in_fiber((is_store ? "writes " : "reads ") + problem);
}

}  // namespace

unsigned lane() { return machine.current % kLanes; }
int multiprocessors() { return machine.multiprocessors; }
void forget_checked_addresses() {}
void barrier() { to_scheduler(State::kAtBarrier); }

void* shared_array(size_t bytes) {
  Fiber& fiber = machine.fibers[machine.current];
  const size_t offset = (fiber.shared_offset + 15) / 16 * 16;
  fiber.shared_offset = offset + bytes;
  if (fiber.shared_offset - machine.dynamic_bytes > kStaticSharedBytes || fiber.shared_offset > kSharedBytes) {
    fail_in_fiber("too much shared memory: " + std::to_string(fiber.shared_offset) + " bytes");
  }
  if (fiber.shared_offset > machine.shared_used) {
    std::memset(shared_begin() + machine.shared_used, 0xFF, fiber.shared_offset - machine.shared_used);
    machine.shared_used = fiber.shared_offset;
  }
  return shared_begin() + offset;
}

void* dynamic_shared_memory() { return shared_begin(); }
void allow_dynamic_shared(const void* kernel, size_t bytes) { machine.dynamic_allowed[kernel] = bytes; }

const uint64_t* exchange(unsigned mask, uint64_t value) {
  Machine& m = machine;
  if (mask != 0xFFFFFFFFu) fail_in_fiber("only full warp masks are emulated");
  const unsigned me = m.current;
  uint64_t* row = m.exchanged[m.fibers[me].exchanges++ % 2];
  row[me] = value;
  to_scheduler(State::kAtShuffle);
  return row + me / kLanes * kLanes;
}

void launch(const char* name, const void* kernel, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
            void (*call)(const void*), const void* body) {
  Machine& m = machine;
  m.name = name;
  m.kernel = kernel;
  m.call = call;
  m.body = body;
  m.error.clear();
  m.threads = block.x * block.y * block.z;
  m.order = (m.seed + 1) * 2654435761u >> 7;
  ++m.seed;
  if (m.threads == 0 || m.threads > kMaxThreads || m.threads % kLanes) fail("bad block size " + at(block));
  if (grid.x == 0 || grid.x > 0x7FFFFFFF || grid.y == 0 || grid.y > 65535 || grid.z == 0 || grid.z > 65535) {
    fail("bad grid size " + at(grid));
  }
  const auto allowed = m.dynamic_allowed.find(kernel);
  if (dynamic_shared_bytes > std::max(kStaticSharedBytes, allowed == m.dynamic_allowed.end() ? 0 : allowed->second) ||
      dynamic_shared_bytes > kSharedBytes) {
    fail("dynamic shared memory without cudaFuncSetAttribute: " + std::to_string(dynamic_shared_bytes) + " bytes");
  }
  if (m.stacks == nullptr) m.stacks = std::make_unique<Stacks>();
  m.dynamic_bytes = m.shared_used = dynamic_shared_bytes;
  const std::string symbol = symbol_of(kernel, name);
  m.counts.begin_launch({name_of(symbol), symbol, m.threads, dynamic_shared_bytes}, shared_begin(), kSharedBytes,
                        m.stacks->memory, Stacks::kBytes);
  gridDim = grid;
  blockDim = block;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  uint64_t first = 0, run = blocks;
  if (m.last_blocks > 0 && m.last_blocks < blocks) {
    first = blocks - m.last_blocks;
    run = m.last_blocks;
  }
  const bool sampled = m.sampled_blocks > 0 && m.sampled_blocks < run;
  if (sampled) run = m.sampled_blocks;
  for (uint64_t i = 0; i < run; ++i) {
    const uint64_t place = permuted(static_cast<unsigned>(i), static_cast<unsigned>(run));
    const uint64_t b = sampled ? (2 * place + 1) * blocks / (2 * run) : first + place;
    blockIdx = dim3(static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                    static_cast<unsigned>(b / grid.x / grid.y));
    run_block();
  }
  m.counts.end_launch(blocks, run);
}

}  // namespace fm::emulation

using fm::emulation::machine;

#define FM_EXPORT extern "C" __attribute__((used, visibility("default")))

// The order of blocks and threads is a function of this seed and of the number of launches since.
FM_EXPORT void fm_emulation_set_seed(uint32_t seed) { machine.seed = seed; }
FM_EXPORT void fm_emulation_set_multiprocessors(int count) { machine.multiprocessors = count; }
// Runs only the last `count` blocks of each grid (0: all), so that a tensor of more than 2^31 elements needs few pages.
FM_EXPORT void fm_emulation_set_last_blocks(unsigned count) { machine.last_blocks = count; }
// Runs `count` blocks of each grid, evenly spread (0: all); counts are scaled to the whole grid.
FM_EXPORT void fm_emulation_set_sampled_blocks(unsigned count) { machine.sampled_blocks = count; }
FM_EXPORT void fm_emulation_count(bool active) { machine.counts.start(active); }
FM_EXPORT const char* fm_emulation_counted() { return machine.counts.report(); }

#define FM_HIDDEN extern "C" __attribute__((used, visibility("hidden")))

#define FM_ACCESS(kind, is_store, bytes)                                                \
  FM_HIDDEN void __asan_##kind##bytes##_noabort(void* address) {                        \
    fm::emulation::check_access(address, bytes, is_store, __builtin_return_address(0)); \
  }
#define FM_ACCESSES(kind, is_store)                                                     \
  FM_ACCESS(kind, is_store, 1)                                                          \
  FM_ACCESS(kind, is_store, 2)                                                          \
  FM_ACCESS(kind, is_store, 4)                                                          \
  FM_ACCESS(kind, is_store, 8)                                                          \
  FM_ACCESS(kind, is_store, 16)                                                         \
  FM_HIDDEN void __asan_##kind##N_noabort(void* address, size_t bytes) {                \
    fm::emulation::check_access(address, bytes, is_store, __builtin_return_address(0)); \
  }
FM_ACCESSES(load, false)
FM_ACCESSES(store, true)
FM_HIDDEN void __asan_handle_no_return() {}
FM_HIDDEN void __asan_before_dynamic_init(const char*) {}
FM_HIDDEN void __asan_after_dynamic_init() {}
