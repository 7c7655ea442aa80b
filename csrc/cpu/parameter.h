// Parameters (weight, bias) as float32 arrays, scratch memory, and the choice of a C++ type by dtype.
#pragma once

#include <cstdint>
#include <memory>

#include "cpu/numbers.h"
#include "tensor_checks.h"

namespace fm {

// Calls f(T{}) with the C++ type of a kernel dtype.
template <typename F>
void for_cpu_dtype(ScalarType dtype, const F& f) {
  if (dtype == ScalarType::Float) {
    f(float{});
  } else if (dtype == ScalarType::BFloat16) {
    f(BFloat16{});
  } else {
    f(Float16{});
  }
}

// Uninitialised memory for intermediate float32 values.
using Scratch = std::unique_ptr<float[]>;
inline Scratch make_scratch(int64_t count) { return Scratch(new float[static_cast<size_t>(count)]); }

// A parameter as float32: the tensor's own memory if it is float32 already, else a copy. One copy a call spares the
// kernels a template argument for the dtype of every parameter.
class FloatParameter {
 public:
  FloatParameter(const OptionalTensor& parameter, int64_t width, float absent) {
    if (parameter && parameter->scalar_type() == ScalarType::Float) {
      data_ = static_cast<const float*>(parameter->const_data_ptr());
      return;
    }
    copy_ = make_scratch(width);
    data_ = copy_.get();
    if (!parameter) {
      for (int64_t i = 0; i < width; ++i) copy_[i] = absent;
      return;
    }
    for_cpu_dtype(parameter->scalar_type(), [&]<typename T>(T) {
      const T* values = static_cast<const T*>(parameter->const_data_ptr());
      for (int64_t i = 0; i < width; ++i) copy_[i] = to_float(values[i]);
    });
  }
  const float* data() const { return data_; }

 private:
  Scratch copy_;
  const float* data_;
};

}  // namespace fm
