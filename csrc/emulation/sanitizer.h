// Queries of AddressSanitizer's allocator: whether bytes belong to a tensor.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>

// A function of AddressSanitizer's allocator; null if that is not loaded.
extern "C" __attribute__((weak)) void* __asan_region_is_poisoned(void* address, size_t bytes);
extern "C" __attribute__((weak)) const char* __asan_locate_address(void* address, char* name, size_t name_bytes,
                                                                   void** region, size_t* region_bytes);

namespace fm::emulation {

// Returns why these bytes must not be accessed; empty if they may, or if nothing is known.
inline std::string problem_with(const void* address, size_t bytes) {
  if (__asan_region_is_poisoned == nullptr) return {};
#if defined(__x86_64__) && defined(__linux__)
  // The usual case: AddressSanitizer's shadow byte for these 8 bytes (two for 16) says that all are allocated.
  const auto* shadow = reinterpret_cast<const char*>((reinterpret_cast<uintptr_t>(address) >> 3) + 0x7FFF8000);
  if (bytes <= 16 && shadow[0] == 0 && (bytes <= 8 || shadow[1] == 0)) return {};
#endif
  char* const bad = static_cast<char*>(__asan_region_is_poisoned(const_cast<void*>(address), bytes));
  if (bad == nullptr) return {};
  std::string what = std::to_string(bytes) + " bytes outside of any tensor";
  char name[8];
  void* region = nullptr;
  size_t region_bytes = 0;
  if (std::strncmp(__asan_locate_address(bad, name, sizeof(name), &region, &region_bytes), "heap", 4) == 0) {
    const ptrdiff_t offset = bad - static_cast<char*>(region);
    what += ": at byte " + std::to_string(offset) + " of a buffer of " + std::to_string(region_bytes);
  }
  return what;
}

}  // namespace fm::emulation
