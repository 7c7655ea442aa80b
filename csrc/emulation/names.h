// Symbols of kernels and their readable names.
#pragma once

#include <cxxabi.h>
#include <dlfcn.h>

#include <cstdlib>
#include <memory>
#include <string>

namespace fm::emulation {

// The symbol, the same as nvcc's, if the linker kept it; else the name in the launch.
inline std::string symbol_of(const void* kernel, const char* launched_as) {
  Dl_info info;
  return dladdr(kernel, &info) != 0 && info.dli_saddr == kernel ? info.dli_sname : launched_as;
}

// The name as in the source, without parameters: "fm::kernel<float, true>".
inline std::string name_of(const std::string& symbol) {
  int status = 0;
  std::unique_ptr<char, void (*)(void*)> full(abi::__cxa_demangle(symbol.c_str(), nullptr, nullptr, &status), std::free);
  const std::string text = status == 0 ? full.get() : symbol;
  const size_t begin = text.find("fm::") == std::string::npos ? 0 : text.find("fm::");
  size_t end = begin;
  for (int depth = 0; end < text.size() && (text[end] != '(' || depth > 0); ++end) {
    depth += (text[end] == '<') - (text[end] == '>');
  }
  return text.substr(begin, end - begin);
}

}  // namespace fm::emulation
