// Copies of 16 bytes from global to shared memory that bypass the registers (cp.async).
//
// A thread requests rows that it needs later, and uses no registers for them meanwhile. It sees its own copies after
// wait_for_copies, without a barrier.
#pragma once

#include "cuda/launch.h"

namespace fm {

#ifdef FM_EMULATION

FM_DEVICE void copy_async(uint4* shared, const void* global) { *shared = *static_cast<const uint4*>(global); }
FM_DEVICE void commit_copies() {}
FM_DEVICE void wait_for_copies(int) {}

#else

FM_DEVICE void copy_async(uint4* shared, const void* global) {
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(address), "l"(global) : "memory");
}

FM_DEVICE void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
FM_DEVICE void wait_for_all_but() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Waits until at most `pending` (0 to 3) of this thread's committed groups of copies are in flight.
FM_DEVICE void wait_for_copies(int pending) {
  if (pending == 0) {
    wait_for_all_but<0>();
  } else if (pending == 1) {
    wait_for_all_but<1>();
  } else if (pending == 2) {
    wait_for_all_but<2>();
  } else {
    wait_for_all_but<3>();
  }
}

#endif

}  // namespace fm
