// Counts of the bytes of global memory that emulated kernels access.
//
// The unit is an access of a warp: the n-th time that its lanes reach one instruction. Bytes that several lanes request
// there count once, since the hardware merges them; bytes that another access requests again count again. Whole 32-byte
// sectors, which caches and memory move, are counted too.
#pragma once

#include <link.h>

#include <algorithm>
#include <compare>
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <unordered_map>
#include <vector>

namespace fm::emulation {

struct Kernel {
  std::string name, symbol;
  unsigned threads = 0;
  size_t dynamic_shared = 0;
  auto operator<=>(const Kernel&) const = default;
};

class Counts {
 public:
  bool active = false;

  void start(bool now_active) {
    active = now_active;
    if (active) totals_.clear();
  }

  void begin_launch(const Kernel& kernel, const void* shared, size_t shared_bytes, const void* stacks,
                    size_t stack_bytes) {
    launch_ = Totals{};
    kernel_ = kernel;
    private_.clear();
    const auto caller = reinterpret_cast<uintptr_t>(__builtin_frame_address(0));
    private_.push_back({caller, caller + (8 << 20)});  // the launch code's stack, where the arguments lie
    private_.push_back({reinterpret_cast<uintptr_t>(shared), reinterpret_cast<uintptr_t>(shared) + shared_bytes});
    private_.push_back({reinterpret_cast<uintptr_t>(stacks), reinterpret_cast<uintptr_t>(stacks) + stack_bytes});
    dl_iterate_phdr(add_own_image, this);
  }

  // Whether the address is neither shared memory, nor a thread's own, nor a constant.
  bool is_global(const void* address) const {
    const auto begin = reinterpret_cast<uintptr_t>(address);
    return std::none_of(private_.begin(), private_.end(),
                        [&](const Range& range) { return begin >= range.begin && begin < range.end; });
  }

  void add(const void* address, size_t bytes, bool is_store, const void* site, unsigned thread) {
    if (!is_global(address)) return;
    if (visits_.size() <= thread) visits_.resize(thread + 1);
    const auto place = reinterpret_cast<uintptr_t>(site);
    accesses_.push_back({place, reinterpret_cast<uintptr_t>(address), visits_[thread][place]++, thread / 32,
                         static_cast<uint16_t>(bytes), is_store});
  }

  // `run` of the launch's `blocks` blocks ran; their counts are scaled to all blocks.
  void end_launch(uint64_t blocks, uint64_t run) {
    if (!active) return;
    Totals& totals = totals_[kernel_];
    ++totals.launches;
    for (int store = 0; store < 2; ++store) {
      totals.bytes[store] += launch_.bytes[store] * blocks / run;
      totals.sector_bytes[store] += launch_.sector_bytes[store] * blocks / run;
      for (const auto& [width, bytes] : launch_.by_width[store]) {
        totals.by_width[store][width] += bytes * blocks / run;
      }
    }
  }

  void end_block() {
    if (!active) return;
    std::sort(accesses_.begin(), accesses_.end(), [](const Access& a, const Access& b) {
      if (a.site != b.site) return a.site < b.site;
      if (a.warp != b.warp) return a.warp < b.warp;
      if (a.visit != b.visit) return a.visit < b.visit;
      return a.begin < b.begin;
    });
    Totals& totals = launch_;
    for (size_t i = 0; i < accesses_.size(); ++i) {
      const Access& a = accesses_[i];
      const bool first = i == 0 || accesses_[i - 1].site != a.site || accesses_[i - 1].warp != a.warp ||
                         accesses_[i - 1].visit != a.visit;
      if (first) covered_ = sectors_ = 0;
      const uintptr_t end = a.begin + a.bytes, last_sector = (end - 1) / kSector + 1;
      const uintptr_t new_begin = std::max(a.begin, covered_), new_sector = std::max(a.begin / kSector, sectors_);
      const uint64_t bytes = end > new_begin ? end - new_begin : 0;
      const uint64_t sectors = last_sector > new_sector ? last_sector - new_sector : 0;
      covered_ = std::max(covered_, end);
      sectors_ = std::max(sectors_, last_sector);
      totals.bytes[a.is_store] += bytes;
      totals.sector_bytes[a.is_store] += sectors * kSector;
      totals.by_width[a.is_store][a.bytes] += bytes;
    }
    accesses_.clear();
    for (auto& visits : visits_) visits.clear();
  }

  // Returns a line for each kernel and direction, separated by tabs: the kernel's name and symbol, threads of a block,
  // bytes of dynamic shared memory, launches, "load" or "store", bytes, bytes in whole sectors, and "width:bytes" for
  // each width of a thread's access.
  const char* report() {
    report_.clear();
    for (const auto& [kernel, totals] : totals_) {
      for (int store = 0; store < 2; ++store) {
        report_ += kernel.name + "\t" + kernel.symbol + "\t" + std::to_string(kernel.threads) + "\t" +
                   std::to_string(kernel.dynamic_shared) + "\t" + std::to_string(totals.launches) + "\t" +
                   (store ? "store" : "load") + "\t" + std::to_string(totals.bytes[store]) + "\t" +
                   std::to_string(totals.sector_bytes[store]);
        for (const auto& [width, bytes] : totals.by_width[store]) {
          report_ += "\t" + std::to_string(width) + ":" + std::to_string(bytes);
        }
        report_ += "\n";
      }
    }
    return report_.c_str();
  }

 private:
  static constexpr uintptr_t kSector = 32;

  struct Range {
    uintptr_t begin, end;
  };
  struct Access {
    uintptr_t site, begin;
    uint32_t visit, warp;
    uint16_t bytes;
    bool is_store;
  };
  struct Totals {
    uint64_t launches = 0;
    uint64_t bytes[2] = {}, sector_bytes[2] = {};
    std::map<uint16_t, uint64_t> by_width[2];
  };

  // Constants and the emulation's own variables (threadIdx and others) are not global memory.
  static int add_own_image(dl_phdr_info* info, size_t, void* self) {
    static const char own = 0;
    const auto address = reinterpret_cast<uintptr_t>(&own);
    uintptr_t begin = UINTPTR_MAX, end = 0;
    for (int i = 0; i < info->dlpi_phnum; ++i) {
      if (info->dlpi_phdr[i].p_type != PT_LOAD) continue;
      begin = std::min<uintptr_t>(begin, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr);
      end = std::max<uintptr_t>(end, info->dlpi_addr + info->dlpi_phdr[i].p_vaddr + info->dlpi_phdr[i].p_memsz);
    }
    if (address < begin || address >= end) return 0;
    static_cast<Counts*>(self)->private_.push_back({begin, end});
    return 1;
  }

  Kernel kernel_;
  std::string report_;
  Totals launch_;
  std::map<Kernel, Totals> totals_;
  std::vector<Range> private_;
  std::vector<Access> accesses_;
  std::vector<std::unordered_map<uintptr_t, uint32_t>> visits_;
  uintptr_t covered_ = 0, sectors_ = 0;
};

}  // namespace fm::emulation
