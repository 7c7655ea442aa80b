// Explicit memory traffic: prefetching, and stores that bypass the caches.
//
// An ordinary store first reads the line that it writes. For results that leave the caches before they are read again,
// this is a third of a copy's traffic.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/multiversion.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FM_CAN_STREAM 1
#endif

namespace fm {

inline constexpr int64_t kLineBytes = 64;
// Smaller results may still be in the second-level caches when the next op reads them.
inline constexpr int64_t kStreamFromBytes = int64_t{4} << 20;

inline bool is_line_aligned(const void* address) { return reinterpret_cast<uintptr_t>(address) % kLineBytes == 0; }

// Prefetches num_bytes that begin ahead_bytes after `address`; they may lie outside the tensor.
FM_INLINE void prefetch_lines(const void* address, int64_t ahead_bytes, int64_t num_bytes) {
#if defined(__GNUC__)
  const uintptr_t first = reinterpret_cast<uintptr_t>(address) + static_cast<uintptr_t>(ahead_bytes);
  for (int64_t i = 0; i < num_bytes; i += kLineBytes) {
    __builtin_prefetch(reinterpret_cast<const void*>(first + static_cast<uintptr_t>(i)));
  }
#endif
}

#ifdef FM_CAN_STREAM
// One store of a whole line is about twice as fast as four stores that the processor has to combine.
__attribute__((target("avx512f"))) inline void stream_lines_avx512(void* to, const void* from, int64_t num_lines) {
  auto* lines = static_cast<__m512i*>(to);
  for (int64_t i = 0; i < num_lines; ++i) _mm512_stream_si512(lines + i, _mm512_load_si512(static_cast<const __m512i*>(from) + i));
}
inline void stream_lines_sse2(void* to, const void* from, int64_t num_lines) {
  auto* pieces = static_cast<__m128i*>(to);
  for (int64_t i = 0; i < 4 * num_lines; ++i) _mm_stream_si128(pieces + i, _mm_load_si128(static_cast<const __m128i*>(from) + i));
}
inline const bool has_avx512 = __builtin_cpu_supports("avx512f");
#endif

// Copies past the caches; both addresses are multiples of kLineBytes.
inline void stream_copy(void* to, const void* from, int64_t num_bytes) {
  int64_t streamed = 0;
#ifdef FM_CAN_STREAM
  streamed = num_bytes / kLineBytes * kLineBytes;
  (has_avx512 ? stream_lines_avx512 : stream_lines_sse2)(to, from, num_bytes / kLineBytes);
#endif
  std::memcpy(static_cast<char*>(to) + streamed, static_cast<const char*>(from) + streamed, num_bytes - streamed);
}

// Orders streamed stores before the signal to other threads that this thread is done.
inline void finish_streaming() {
#ifdef FM_CAN_STREAM
  _mm_sfence();
#endif
}

}  // namespace fm
