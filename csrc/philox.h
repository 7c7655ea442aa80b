// The random numbers of dropout, written once for the CPU and the GPU.
//
// fused_megatron/reference/philox.py is the same in PyTorch; all give the same bits.
//
// Philox4x32-7 (Salmon, Moraes, Dror and Shaw, Parallel random numbers: as easy as 1, 2, 3, SC 2011). The 128-bit
// counter of a block is (block, offset), low words first, and the key is the seed. The element with global index g has
// 16 bits: half g % 8 of block g / 8, where a word's low half comes before its high half.
#pragma once

#include <cstdint>

#include "inlining.h"

namespace fm {

inline constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53u, kPhiloxMultiplier1 = 0xCD9E8D57u;
inline constexpr uint32_t kPhiloxWeyl0 = 0x9E3779B9u, kPhiloxWeyl1 = 0xBB67AE85u;
inline constexpr int kPhiloxRounds = 7;

// rng_state as the words that the rounds take.
struct PhiloxStream {
  uint32_t key0, key1, offset0, offset1;
};

FM_INLINE PhiloxStream philox_stream(const int64_t* rng_state) {
  const uint64_t seed = static_cast<uint64_t>(rng_state[0]), offset = static_cast<uint64_t>(rng_state[1]);
  return {static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32), static_cast<uint32_t>(offset),
          static_cast<uint32_t>(offset >> 32)};
}

FM_INLINE void philox_block(const PhiloxStream& stream, uint64_t block, uint32_t* words) {
  uint32_t c0 = static_cast<uint32_t>(block), c1 = static_cast<uint32_t>(block >> 32);
  uint32_t c2 = stream.offset0, c3 = stream.offset1;
  uint32_t key0 = stream.key0, key1 = stream.key1;
#ifdef __CUDACC__
#pragma unroll
#else
#pragma GCC unroll 7
#endif
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * kPhiloxMultiplier0;
    const uint64_t product1 = static_cast<uint64_t>(c2) * kPhiloxMultiplier1;
    c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ key0;
    c1 = static_cast<uint32_t>(product1);
    c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ key1;
    c3 = static_cast<uint32_t>(product0);
    key0 += kPhiloxWeyl0;
    key1 += kPhiloxWeyl1;
  }
  words[0] = c0;
  words[1] = c1;
  words[2] = c2;
  words[3] = c3;
}

// An element is kept if its 16 bits are not below this threshold: p is rounded to a multiple of 2^-16, and only p = 1
// drops everything.
inline uint32_t dropout_threshold(double p) {
  const double rounded = p * 65536.0 + 0.5;
  return rounded < 65536.0 ? static_cast<uint32_t>(rounded) : 65535u;
}

// The factor of kept elements: 1 / (1 - p) for the rounded p.
inline float dropout_scale(double p) {
  return p < 1.0 ? static_cast<float>(65536.0 / (65536u - dropout_threshold(p))) : 0.0f;
}

}  // namespace fm
