// One row of scores on the CPU: its softmax and the gradient. Only scaled_masked_softmax_cpu.cpp includes this file.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <limits>

#include "cpu/multiversion.h"
#include "cpu/numbers.h"

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace fm {
namespace {

inline constexpr float kInfinity = std::numeric_limits<float>::infinity();
// A block has 64 columns: four vectors of the largest width with separate sums, so that an addition need not wait for
// the previous one. The order of additions is the same for every vector width. The last, partial block is processed
// like a whole one: element by element it would cost as much as the rest of a short row.
inline constexpr int kLanes = 64;

#define FM_LAMBDA __attribute__((always_inline))

struct Row {
  int64_t begin, end, columns;  // the row has `columns` keys; the causal form lets the query see [begin, end)
  float scale;
  bool stream;      // write past the caches
  int64_t to_next;  // elements from this row to the row that is next in work
};

// 2^z for z <= 0, to about 2^-22; 0 where the result would be subnormal, so that 2^-inf is 0; NaN stays NaN.
FM_INLINE float exp2_of_negative(float z) {
  // Adding 1.5 * 2^23 leaves round(z) in the low bits of the sum.
  constexpr float kRounder = 12582912.0f;
  const float rounded = z + kRounder;
  const float fraction = z - (rounded - kRounder);
  // 2^fraction on [-1/2, 1/2]: the Taylor terms ln(2)^k / k!; the last ones are changed to spread the error evenly.
  float p = 0.00015353362f;
  p = p * fraction + 0.0013398875f;
  p = p * fraction + 0.00961843692f;
  p = p * fraction + 0.0555033237f;
  p = p * fraction + 0.240226477f;
  p = p * fraction + 0.693147182f;
  p = p * fraction + 1.0f;
  const float power = std::bit_cast<float>((std::bit_cast<uint32_t>(rounded) << 23) + (127u << 23));
  return z < -126.0f ? 0.0f : p * power;
}

FM_INLINE void prefetch(const void* from, int64_t num_bytes) {
#if defined(__GNUC__)
  for (int64_t i = 0; i < num_bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i, 0, 2);
#endif
}

// Copies whole lines of 64 bytes past the caches; `to` is aligned to 64 bytes.
FM_INLINE void stream_lines(void* to, const void* from, int64_t num_bytes) {
#if defined(__SSE2__)
  auto* destination = static_cast<__m128i*>(to);
  const auto* source = static_cast<const __m128i*>(from);
  for (int64_t i = 0; i < num_bytes / 16; ++i) _mm_stream_si128(destination + i, _mm_load_si128(source + i));
#else
  std::memcpy(to, from, static_cast<size_t>(num_bytes));
#endif
}

template <typename T>
FM_INLINE void copy(T* to, const T* from, int64_t count) {
  std::memcpy(static_cast<void*>(to), from, static_cast<size_t>(count) * sizeof(T));
}

// Number of elements from row[begin] to the next line of 64 bytes.
template <typename T>
FM_INLINE int64_t to_line(const T* row, int64_t begin) {
  const auto misaligned = static_cast<int64_t>(reinterpret_cast<uintptr_t>(row + begin) % 64 / sizeof(T));
  return (static_cast<int64_t>(64 / sizeof(T)) - misaligned) % static_cast<int64_t>(64 / sizeof(T));
}

// Writes columns [begin, end) of a row, past the caches if `stream`. block(column, result[kLanes]) computes a whole
// block of results; results beyond `end` are dropped.
template <typename T, typename Block>
FM_INLINE void write_columns(T* row, int64_t begin, int64_t end, bool stream, const Block& block) {
  alignas(64) T result[kLanes];
  int64_t j = begin;
  const int64_t head = stream ? std::min(end - begin, to_line(row, begin)) : 0;
  if (head > 0) {
    block(j, result);
    copy(row + j, result, head);
    j += head;
  }
  for (; j + kLanes <= end; j += kLanes) {
    block(j, result);
    if (stream) {
      stream_lines(row + j, result, sizeof(result));
    } else {
      copy(row + j, result, kLanes);
    }
  }
  if (j < end) {
    block(j, result);
    copy(row + j, result, end - j);
  }
}

template <typename T>
FM_INLINE void write_zeros(T* row, int64_t begin, int64_t end, bool stream) {
  const auto zero = [&](int64_t first, int64_t last) FM_LAMBDA {
    std::memset(static_cast<void*>(row + first), 0, static_cast<size_t>(last - first) * sizeof(T));
  };
  if (!stream) return zero(begin, end);
  const int64_t lines = std::min(end, begin + to_line(row, begin));
  zero(begin, lines);
  constexpr int64_t kPerLine = 64 / sizeof(T);
  const int64_t rest = lines + (end - lines) / kPerLine * kPerLine;
#if defined(__SSE2__)
  for (int64_t j = lines; j < rest; j += 16 / sizeof(T)) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(row + j), _mm_setzero_si128());
  }
#else
  zero(lines, rest);
#endif
  zero(rest, end);
}

FM_INLINE float sum_of(float (&lanes)[kLanes]) {
  for (int half = kLanes / 2; half > 0; half /= 2) {
#pragma omp simd
    for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
  }
  return lanes[0];
}

// mask: one byte for each column of the whole row, or null. memory: room for a row of floats and kLanes more.
template <typename T>
FM_INLINE void softmax_row(const T* x, const uint8_t* mask, const Row& row, float* memory, T* y) {
  const int64_t count = row.end - row.begin;
  const T* seen = x + row.begin;
  const uint8_t* hidden = mask == nullptr ? nullptr : mask + row.begin;
  // The largest score belongs to the largest x, or to the largest -x if the scale is negative.
  const float sign = row.scale < 0.0f ? -1.0f : 1.0f;
  const float factor = row.scale * 1.44269504f;
  float maximum = -kInfinity;
  if (mask == nullptr) {
#pragma omp simd reduction(max : maximum)
    for (int64_t j = 0; j < count; ++j) {
      const float value = to_float(seen[j]) * sign;
      maximum = maximum < value ? value : maximum;
    }
  } else {
#pragma omp simd reduction(max : maximum)
    for (int64_t j = 0; j < count; ++j) {
      const float value = hidden[j] ? -kInfinity : to_float(seen[j]) * sign;
      maximum = maximum < value ? value : maximum;
    }
  }
  // -inf minus -inf would be NaN: a row of only -inf is shifted by 0, and its exponentials are 0. (Any shift is
  // correct, so the rounding of the shift is no error.)
  const float shift = maximum == -kInfinity ? 0.0f : maximum * sign * factor;
  float lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= count; j += kLanes) {
    if (row.to_next != 0) prefetch(seen + j + row.to_next, kLanes * sizeof(T));
    if (mask == nullptr) {
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) {
        const float e = exp2_of_negative(to_float(seen[j + lane]) * factor - shift);
        memory[j + lane] = e;
        lanes[lane] += e;
      }
    } else {
#pragma omp simd
      for (int lane = 0; lane < kLanes; ++lane) {
        const float e = exp2_of_negative(to_float(seen[j + lane]) * factor - shift);
        memory[j + lane] = hidden[j + lane] ? 0.0f : e;
        lanes[lane] += hidden[j + lane] ? 0.0f : e;
      }
    }
  }
  if (j < count) {
    T last[kLanes] = {};
    uint8_t last_hidden[kLanes];
    const int rest = static_cast<int>(count - j);
    if (row.to_next != 0) prefetch(seen + j + row.to_next, rest * sizeof(T));
    copy(last, seen + j, rest);
    std::memset(last_hidden, 1, kLanes);
    if (mask != nullptr) {
      copy(last_hidden, hidden + j, rest);
    } else {
      std::memset(last_hidden, 0, static_cast<size_t>(rest));
    }
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      const float e = exp2_of_negative(to_float(last[lane]) * factor - shift);
      memory[j + lane] = last_hidden[lane] ? 0.0f : e;
      lanes[lane] += last_hidden[lane] ? 0.0f : e;
    }
  }
  const float total = sum_of(lanes);
  const float inverse = total == 0.0f ? 0.0f : 1.0f / total;
  write_zeros(y, 0, row.begin, row.stream);
  write_columns(y, row.begin, row.end, row.stream, [&](int64_t column, T(&result)[kLanes]) FM_LAMBDA {
    const float* e = memory + (column - row.begin);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) result[lane] = from_float<T>(e[lane] * inverse);
  });
  write_zeros(y, row.end, row.columns, row.stream);
  // 0 times NaN is NaN: in a row with a NaN, hidden keys must stay 0.
  if (mask != nullptr && inverse != inverse) {
    for (int64_t k = row.begin; k < row.end; ++k) {
      if (mask[k]) y[k] = T{};
    }
  }
}

template <typename T>
FM_INLINE void softmax_gradient_row(const T* dy, const T* y, const Row& row, T* dx) {
  float lanes[kLanes] = {};
  int64_t j = row.begin;
  for (; j + kLanes <= row.end; j += kLanes) {
    if (row.to_next != 0) prefetch(y + j + row.to_next, kLanes * sizeof(T));
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += to_float(dy[j + lane]) * to_float(y[j + lane]);
  }
  // The last block, filled up with zeros.
  T last_dy[kLanes] = {}, last_y[kLanes] = {};
  copy(last_dy, dy + j, row.end - j);
  copy(last_y, y + j, row.end - j);
#pragma omp simd
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += to_float(last_dy[lane]) * to_float(last_y[lane]);
  const float mean = sum_of(lanes), scale = row.scale;
  write_zeros(dx, 0, row.begin, row.stream);
  write_columns(dx, row.begin, row.end, row.stream, [&](int64_t column, T(&result)[kLanes]) FM_LAMBDA {
    const T *from_dy = dy + column, *from_y = y + column;
    if (column + kLanes > row.end) {
      copy(last_dy, dy + column, row.end - column);
      copy(last_y, y + column, row.end - column);
      from_dy = last_dy;
      from_y = last_y;
    } else if (row.to_next != 0) {
      prefetch(from_dy + row.to_next, kLanes * sizeof(T));
    }
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) {
      result[lane] = from_float<T>(scale * (to_float(from_y[lane]) * (to_float(from_dy[lane]) - mean)));
    }
  });
  write_zeros(dx, row.end, row.columns, row.stream);
}

#define FM_SOFTMAX_ROWS(T)                                                                                          \
  FM_MULTIVERSION void forward_row(const T* x, const uint8_t* mask, const Row* row, float* memory, T* y) {          \
    softmax_row(x, mask, *row, memory, y);                                                                          \
  }                                                                                                                 \
  FM_MULTIVERSION void backward_row(const T* dy, const T* y, const Row* row, T* dx) {                               \
    softmax_gradient_row(dy, y, *row, dx);                                                                          \
  }
FM_SOFTMAX_ROWS(float)
FM_SOFTMAX_ROWS(BFloat16)
FM_SOFTMAX_ROWS(Float16)
#undef FM_SOFTMAX_ROWS

}  // namespace
}  // namespace fm
