// Random numbers on the CPU: many Philox blocks at a time, and a buffer of them.
//
// A 32 x 32 bit product is one instruction in a 64-bit lane whose upper half is ignored. Compilers do not see this, so
// the code names the instruction, in one function for each vector width.
#pragma once

#include <cstdint>

#include "cpu/multiversion.h"
#include "philox.h"

#if defined(__x86_64__) && defined(__GNUC__)
#include <immintrin.h>
#define FM_PHILOX_X86 1
#endif

namespace fm {
namespace {

// Blocks are filled in groups of this many: buffers hold whole groups.
inline constexpr int64_t kPhiloxGroup = 16;

void fill_philox_scalar(const PhiloxStream& stream, uint64_t first, int64_t blocks, uint32_t* words) {
  for (int64_t i = 0; i < blocks; ++i) philox_block(stream, first + static_cast<uint64_t>(i), words + 4 * i);
}

#ifdef FM_PHILOX_X86

// The rounds of kPhiloxGroup blocks in vectors of 64-bit lanes, one block a lane; upper halves hold garbage. Several
// vectors are in work, so that a product need not wait for the previous one. `order` assigns blocks to lanes such that
// the interleaved results of the lanes are in order. Shuffles move upper halves down, since shifts would compete with
// the products for one port of the processor.
#define FM_BRACES(...) {__VA_ARGS__}
#define FM_PHILOX_FILL(name, features, kBytes, order, product, high_half, xor3, interleave_low, interleave_high)     \
  __attribute__((target(features))) void name(const PhiloxStream& stream, uint64_t first, int64_t blocks,            \
                                              uint32_t* words) {                                                     \
    typedef uint64_t Lanes __attribute__((vector_size(kBytes)));                                                     \
    typedef uint64_t Unaligned __attribute__((vector_size(kBytes), aligned(4), may_alias));                          \
    constexpr int kLanes = kBytes / 8, kVectors = static_cast<int>(kPhiloxGroup) / kLanes;                           \
    const Lanes zero = {}, multiplier0 = zero + kPhiloxMultiplier0, multiplier1 = zero + kPhiloxMultiplier1;         \
    Lanes keys0[kPhiloxRounds], keys1[kPhiloxRounds];                                                                \
    for (int round = 0; round < kPhiloxRounds; ++round) {                                                            \
      keys0[round] = zero + (stream.key0 + static_cast<uint32_t>(round) * kPhiloxWeyl0);                             \
      keys1[round] = zero + (stream.key1 + static_cast<uint32_t>(round) * kPhiloxWeyl1);                             \
    }                                                                                                                \
    for (int64_t block = 0; block < blocks; block += kPhiloxGroup) {                                                 \
      Lanes c0[kVectors], c1[kVectors], c2[kVectors], c3[kVectors];                                                  \
      for (int v = 0; v < kVectors; ++v) {                                                                           \
        c0[v] = Lanes FM_BRACES order + (first + static_cast<uint64_t>(block + v * kLanes));                         \
        c1[v] = c0[v] >> 32;                                                                                         \
        c2[v] = zero + stream.offset0;                                                                               \
        c3[v] = zero + stream.offset1;                                                                               \
      }                                                                                                              \
      for (int round = 0; round < kPhiloxRounds; ++round) {                                                          \
        for (int v = 0; v < kVectors; ++v) {                                                                         \
          const Lanes product0 = product(c0[v], multiplier0), product1 = product(c2[v], multiplier1);                \
          c0[v] = xor3(high_half(product1), c1[v], keys0[round]);                                                    \
          c1[v] = product1;                                                                                          \
          c2[v] = xor3(high_half(product0), c3[v], keys1[round]);                                                    \
          c3[v] = product0;                                                                                          \
        }                                                                                                            \
      }                                                                                                              \
      for (int v = 0; v < kVectors; ++v) {                                                                           \
        const Lanes low = (c0[v] & 0xFFFFFFFFu) | (c1[v] << 32), high = (c2[v] & 0xFFFFFFFFu) | (c3[v] << 32);       \
        Unaligned* out = reinterpret_cast<Unaligned*>(words + 4 * (block + v * kLanes));                             \
        out[0] = interleave_low(low, high);                                                                          \
        out[1] = interleave_high(low, high);                                                                         \
      }                                                                                                              \
    }                                                                                                                \
  }

// The zero-masked forms: gcc warns about the undefined vector in its own plain forms.
#define FM_AVX512(intrinsic, a, b) (Lanes) _mm512_maskz_##intrinsic(0xFF, (__m512i)(a), (__m512i)(b))
#define FM_PRODUCT(a, b) FM_AVX512(mul_epu32, a, b)
#define FM_HIGH_HALF(a) (Lanes) _mm512_maskz_shuffle_epi32(0xFFFF, (__m512i)(a), (_MM_PERM_ENUM)0xF5)
#define FM_XOR3(a, b, c) (Lanes) _mm512_ternarylogic_epi64((__m512i)(a), (__m512i)(b), (__m512i)(c), 0x96)
#define FM_LOW(a, b) FM_AVX512(unpacklo_epi64, a, b)
#define FM_HIGH(a, b) FM_AVX512(unpackhi_epi64, a, b)
FM_PHILOX_FILL(fill_philox_avx512, "avx512f", 64, (0, 4, 1, 5, 2, 6, 3, 7), FM_PRODUCT, FM_HIGH_HALF, FM_XOR3, FM_LOW,
               FM_HIGH)
#undef FM_PRODUCT
#undef FM_HIGH_HALF
#undef FM_XOR3
#undef FM_LOW
#undef FM_HIGH
#undef FM_AVX512

#define FM_PRODUCT(a, b) (Lanes) _mm256_mul_epu32((__m256i)(a), (__m256i)(b))
#define FM_HIGH_HALF(a) (Lanes) _mm256_shuffle_epi32((__m256i)(a), 0xF5)
#define FM_XOR3(a, b, c) ((a) ^ (b) ^ (c))
#define FM_LOW(a, b) (Lanes) _mm256_unpacklo_epi64((__m256i)(a), (__m256i)(b))
#define FM_HIGH(a, b) (Lanes) _mm256_unpackhi_epi64((__m256i)(a), (__m256i)(b))
FM_PHILOX_FILL(fill_philox_avx2, "avx2", 32, (0, 2, 1, 3), FM_PRODUCT, FM_HIGH_HALF, FM_XOR3, FM_LOW, FM_HIGH)
#undef FM_PRODUCT
#undef FM_HIGH_HALF
#undef FM_XOR3
#undef FM_LOW
#undef FM_HIGH
#undef FM_PHILOX_FILL
#undef FM_BRACES

#endif  // FM_PHILOX_X86

// Fills the words of `blocks` blocks from block `first` on; `words` has room for the next multiple of kPhiloxGroup
// blocks.
inline void fill_philox(const PhiloxStream& stream, uint64_t first, int64_t blocks, uint32_t* words) {
#ifdef FM_PHILOX_X86
  if (__builtin_cpu_supports("avx512f")) return fill_philox_avx512(stream, first, blocks, words);
  if (__builtin_cpu_supports("avx2")) return fill_philox_avx2(stream, first, blocks, words);
#endif
  fill_philox_scalar(stream, first, blocks, words);
}

// 16 random bits. Words are little-endian, so that their halves lie in memory in the order of the elements.
typedef uint16_t RandomHalf __attribute__((may_alias));

// The random numbers of runs of elements with consecutive global indices.
class PhiloxBuffer {
 public:
  static constexpr int64_t kElements = 1024;

  // Returns n <= kElements numbers for the elements from global index `index` on, which need not be a multiple of 8.
  const RandomHalf* halves(const PhiloxStream& stream, int64_t index, int64_t n) {
    const uint64_t first = static_cast<uint64_t>(index) / 8;
    const int64_t skipped = index % 8;
    fill_philox(stream, first, (skipped + n + 7) / 8, words_);
    return reinterpret_cast<const RandomHalf*>(words_) + skipped;
  }

 private:
  alignas(64) uint32_t words_[kElements / 2 + 4 * kPhiloxGroup];
};

}  // namespace
}  // namespace fm
