// Memory accesses of 128 bits where address and width allow it, and of one element elsewhere.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/numbers.cuh"

namespace fm {

template <typename T, bool kWide>
struct Access {
  static constexpr int kCount = kWide ? 16 / sizeof(T) : 1;
  using Raw = std::conditional_t<kWide, uint4, T>;

  static FM_DEVICE Raw load(const T* address) { return *reinterpret_cast<const Raw*>(address); }

  static FM_DEVICE void unpack(const Raw& raw, float (&values)[kCount]) {
    if constexpr (!kWide) {
      values[0] = to_float(raw);
    } else if constexpr (sizeof(T) == 4) {
      values[0] = word_to_float(raw.x);
      values[1] = word_to_float(raw.y);
      values[2] = word_to_float(raw.z);
      values[3] = word_to_float(raw.w);
    } else {
      unpack_pair<T>(raw.x, values[0], values[1]);
      unpack_pair<T>(raw.y, values[2], values[3]);
      unpack_pair<T>(raw.z, values[4], values[5]);
      unpack_pair<T>(raw.w, values[6], values[7]);
    }
  }

  static FM_DEVICE void store(T* address, const float (&values)[kCount]) {
    if constexpr (!kWide) {
      *address = from_float<T>(values[0]);
    } else if constexpr (sizeof(T) == 4) {
      *reinterpret_cast<uint4*>(address) = uint4{float_to_word(values[0]), float_to_word(values[1]),
                                                 float_to_word(values[2]), float_to_word(values[3])};
    } else {
      *reinterpret_cast<uint4*>(address) =
          uint4{pack_pair<T>(values[0], values[1]), pack_pair<T>(values[2], values[3]),
                pack_pair<T>(values[4], values[5]), pack_pair<T>(values[6], values[7])};
    }
  }

  // The same, always in one instruction: between other accesses the compiler stores the words of a uint4 one by one.
  static FM_DEVICE void store_whole(T* address, const float (&values)[kCount]) {
    if constexpr (!kWide) {
      store(address, values);
    } else if constexpr (sizeof(T) == 4) {
      __stwb(reinterpret_cast<uint4*>(address), make_uint4(float_to_word(values[0]), float_to_word(values[1]),
                                                           float_to_word(values[2]), float_to_word(values[3])));
    } else {
      __stwb(reinterpret_cast<uint4*>(address),
             make_uint4(pack_pair<T>(values[0], values[1]), pack_pair<T>(values[2], values[3]),
                        pack_pair<T>(values[4], values[5]), pack_pair<T>(values[6], values[7])));
    }
  }
};

// Returns kCount values of a parameter from `column` on, or `absent` if there is no parameter. Wide accesses need an
// address that is a multiple of 16 bytes and a column that is a multiple of kCount.
template <int kCount>
FM_DEVICE void load_parameter(ConstParameter parameter, int64_t column, float absent, float (&values)[kCount]) {
  if (parameter.data == nullptr) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) values[i] = absent;
  } else if (parameter.dtype == DType::kFloat32) {
    const float* address = static_cast<const float*>(parameter.data) + column;
    if constexpr (kCount == 1) {
      values[0] = *address;
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const float4 four = *reinterpret_cast<const float4*>(address + i);
        values[i] = four.x;
        values[i + 1] = four.y;
        values[i + 2] = four.z;
        values[i + 3] = four.w;
      }
    }
  } else {
    const uint16_t* address = static_cast<const uint16_t*>(parameter.data) + column;
    const bool is_bfloat16 = parameter.dtype == DType::kBFloat16;
    if constexpr (kCount == 1) {
      values[0] = is_bfloat16 ? to_float(BFloat16{*address}) : to_float(Float16{*address});
    } else {
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
        const uint2 four = *reinterpret_cast<const uint2*>(address + i);
        if (is_bfloat16) {
          unpack_pair<BFloat16>(four.x, values[i], values[i + 1]);
          unpack_pair<BFloat16>(four.y, values[i + 2], values[i + 3]);
        } else {
          unpack_pair<Float16>(four.x, values[i], values[i + 1]);
          unpack_pair<Float16>(four.y, values[i + 2], values[i + 3]);
        }
      }
    }
  }
}

inline bool is_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % 16 == 0; }

// Calls f(T{}) with the C++ type of a dtype.
template <typename F>
void for_device_dtype(DType dtype, const F& f) {
  if (dtype == DType::kFloat32) {
    f(float{});
  } else if (dtype == DType::kBFloat16) {
    f(BFloat16{});
  } else {
    f(Float16{});
  }
}

}  // namespace fm
