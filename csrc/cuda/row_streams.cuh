// Reads and writes of a matrix by a kernel: neighbouring columns at a time, through shared memory.
//
// kCount columns wait in kSlots slots of shared memory between fetch and use. The slots of a thread lie `stride` slots
// apart, so that the slots of neighbouring threads are neighbours (no bank conflicts).
//
// A kernel moves an index from row to row: the columns of a thread are constant offsets from it. The compiler would
// rather compute each address and each condition anew, with 64-bit instructions; opaque() hides from it where a value
// came from.
#pragma once

#include <cstdint>

#include "cuda/async_copy.cuh"
#include "cuda/numbers.cuh"
#include "cuda/vector_access.cuh"

namespace fm {

#ifdef FM_EMULATION
template <typename T>
FM_DEVICE T opaque(T value) {
  return value;
}
#else
FM_DEVICE int opaque(int value) {
  asm volatile("" : "+r"(value));
  return value;
}
FM_DEVICE int64_t opaque(int64_t value) {
  asm volatile("" : "+l"(value));
  return value;
}
// For cp.async only: the compiler no longer knows that this is global memory.
template <typename T>
FM_DEVICE T* opaque(T* address) {
  asm volatile("" : "+l"(address));
  return address;
}
#endif

// Aligned matrices of T: accesses of 16 bytes, fetched past the registers.
template <typename T, int kColumns>
struct WideStream {
  static constexpr int kCount = kColumns;
  static constexpr int kSlots = kColumns * sizeof(T) / 16;
  static constexpr int kPerSlot = 16 / sizeof(T);
  using Slot = uint4;
  struct Raw {
    uint4 words[kSlots];
  };
  T* data;

  FM_DEVICE WideStream(const void* address, DType) : data(static_cast<T*>(const_cast<void*>(address))) {}

  using Source = const T*;
  FM_DEVICE Source source(int64_t index) const { return opaque(static_cast<const T*>(data + index)); }
  FM_DEVICE void fetch(Source from, int offset, uint4* slots, int stride) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) copy_async(slots + s * stride, from + (offset + s * kPerSlot));
  }
  static FM_DEVICE Raw take(const uint4* slots, int stride) {
    Raw raw;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) raw.words[s] = slots[s * stride];
    return raw;
  }
  FM_DEVICE void unpack(const Raw& raw, float (&values)[kCount]) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      float part[kPerSlot];
      Access<T, true>::unpack(raw.words[s], part);
#pragma unroll
      for (int k = 0; k < kPerSlot; ++k) values[s * kPerSlot + k] = part[k];
    }
  }
  FM_DEVICE Raw pack(const float (&values)[kCount]) const {
    Raw raw;
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      const float* v = values + s * kPerSlot;
      if constexpr (sizeof(T) == 4) {
        raw.words[s] = uint4{float_to_word(v[0]), float_to_word(v[1]), float_to_word(v[2]), float_to_word(v[3])};
      } else {
        raw.words[s] = uint4{pack_pair<T>(v[0], v[1]), pack_pair<T>(v[2], v[3]), pack_pair<T>(v[4], v[5]),
                             pack_pair<T>(v[6], v[7])};
      }
    }
    return raw;
  }
  FM_DEVICE void store(int64_t index, int offset, const Raw& raw) const {
#pragma unroll
    for (int s = 0; s < kSlots; ++s) {
      *reinterpret_cast<uint4*>(data + index + (offset + s * kPerSlot)) = raw.words[s];
    }
  }
};

// Matrices of any dtype and any address, a column at a time; the kernel looks up the dtype at run time.
struct AnyStream {
  static constexpr int kCount = 1, kSlots = 1;
  using Slot = float;
  struct Raw {
    float value;
  };
  void* data;
  DType dtype;

  FM_DEVICE AnyStream(const void* address, DType dtype_) : data(const_cast<void*>(address)), dtype(dtype_) {}

  FM_DEVICE float load(int64_t index) const {
    if (dtype == DType::kFloat32) return static_cast<const float*>(data)[index];
    if (dtype == DType::kBFloat16) return to_float(static_cast<const BFloat16*>(data)[index]);
    return to_float(static_cast<const Float16*>(data)[index]);
  }
  using Source = int64_t;  // an index
  FM_DEVICE Source source(int64_t index) const { return index; }
  FM_DEVICE void fetch(Source from, int offset, float* slots, int) const { *slots = load(from + offset); }
  static FM_DEVICE Raw take(const float* slots, int) { return {*slots}; }
  FM_DEVICE void unpack(const Raw& raw, float (&values)[1]) const { values[0] = raw.value; }
  // The value as it will be stored.
  FM_DEVICE Raw pack(const float (&values)[1]) const {
    if (dtype == DType::kFloat32) return {values[0]};
    if (dtype == DType::kBFloat16) return {to_float(from_float<BFloat16>(values[0]))};
    return {to_float(from_float<Float16>(values[0]))};
  }
  FM_DEVICE void store(int64_t begin, int offset, const Raw& raw) const {
    const int64_t index = begin + offset;
    if (dtype == DType::kFloat32) {
      static_cast<float*>(data)[index] = raw.value;
    } else if (dtype == DType::kBFloat16) {
      static_cast<BFloat16*>(data)[index] = from_float<BFloat16>(raw.value);
    } else {
      static_cast<Float16*>(data)[index] = from_float<Float16>(raw.value);
    }
  }
};

}  // namespace fm
