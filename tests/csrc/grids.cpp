// Reads lines "op rows width multiprocessors" and prints the grid that the launch code of the op chooses: blocks along
// the columns, blocks along the rows. test_row_grid.py compiles it. "shares rows blocks 0" prints the first row of each block, then the number of rows.
#include <cstdio>
#include <iostream>
#include <string>

#include "activation/kernels.cuh"
#include "bias_dropout_add/bias_dropout_add_launch.cuh"
#include "query_key_norm/query_key_norm_backward.cuh"

dim3 gridDim, blockDim, blockIdx, threadIdx;

namespace fm::emulation {
// Prints the first grid of an op instead of running kernels; the second one adds partial sums.
static bool printed = false, rows_in_x = false;
void launch(const char*, const void*, dim3 grid, dim3, size_t, void (*)(const void*), const void*) {
  if (!printed) std::printf("%u %u\n", rows_in_x ? grid.y : grid.x, rows_in_x ? grid.x : grid.y);
  printed = true;
}
// No kernel runs, so nothing calls these.
void* shared_array(size_t) { return nullptr; }
void* dynamic_shared_memory() { return nullptr; }
void barrier() {}
void forget_checked_addresses() {}
unsigned lane() { return 0; }
const uint64_t* exchange(unsigned, uint64_t) { return nullptr; }
}  // namespace fm::emulation

namespace fm {

static float memory[4];  // any address that is not null

template <bool kGated>
void print_activation(bool backward, int64_t rows, int64_t width, int multiprocessors) {
  ActivationArguments a{};
  a.dtype = DType::kBFloat16;
  a.bias = {memory, a.dtype};
  a.count = rows * width;
  a.width = width;
  if (backward) {
    a.shares = activation_shares<kGated>(a, true, multiprocessors);
    a.partials = memory;
    launch_activation_backward<Silu, kGated>(a, nullptr);
  } else {
    launch_activation_forward<Silu, kGated>(a, multiprocessors, nullptr);
  }
}

static void print_dropout(bool backward, int64_t rows, int64_t width, int multiprocessors) {
  BiasDropoutAdd a{};
  a.x_dtype = a.dtype = DType::kBFloat16;
  a.bias = {memory, a.dtype};
  a.count = rows * width;
  a.width = width;
  if (backward) {
    a.dy = a.dx = memory;
    a.partials = memory;
    launch_bias_dropout_add_backward(a, multiprocessors, nullptr);
  } else {
    launch_bias_dropout_add_forward(a, multiprocessors, nullptr);
  }
}

// Heads of 128 elements, four of q to one of k.
static void print_query_key_norm(bool backward, int64_t rows, int64_t width, int multiprocessors) {
  QueryKeyNorm a{};
  a.dtype = DType::kBFloat16;
  a.tokens = rows;
  a.n1 = 1;
  a.head_dim = 128;
  a.half = 64;
  a.q.heads = width / 128;
  a.k.heads = width / 512;
  if (backward) {
    a.shares = query_key_norm_shares(a, multiprocessors);
    launch_query_key_norm_backward(a, {nullptr, a.dtype}, {nullptr, a.dtype}, nullptr);
  } else {
    launch_query_key_norm(a, multiprocessors, nullptr);
  }
}

}  // namespace fm

int main() {
  std::string op;
  long long rows, width;
  int multiprocessors;
  while (std::cin >> op >> rows >> width >> multiprocessors) {
    fm::emulation::printed = false;
    fm::emulation::rows_in_x = op.starts_with("query_key_norm");
    const bool backward = op.ends_with("backward");
    if (op == "shares") {
      const fm::RowShares shares = fm::RowShares::of(rows, width);
      for (int64_t block = 0; block <= width; ++block) std::printf("%lld ", static_cast<long long>(shares.begin(block)));
      std::printf("\n");
    } else if (op.starts_with("gated")) {
      fm::print_activation<true>(backward, rows, width, multiprocessors);
    } else if (op.starts_with("activation")) {
      fm::print_activation<false>(backward, rows, width, multiprocessors);
    } else if (op.starts_with("bias_dropout_add")) {
      fm::print_dropout(backward, rows, width, multiprocessors);
    } else if (op.starts_with("query_key_norm")) {
      fm::print_query_key_norm(backward, rows, width, multiprocessors);
    }
  }
}
