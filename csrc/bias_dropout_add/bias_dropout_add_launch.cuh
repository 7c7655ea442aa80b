// Grids and launches of the CUDA kernels of bias_dropout_add.
#pragma once

#include "bias_dropout_add_kernels.cuh"

namespace fm {

struct DropoutGrid {
  int threads_x, threads_y;
  unsigned blocks_x;
  RowShares shares;  // of the blocks along the rows, each of which leaves a row of partial sums
  // bytes: of a row and column. Besides, a block reads its bias, or writes partial sums that are read once more.
  DropoutGrid(const BiasDropoutAdd& a, int64_t elements_per_run, int64_t bytes, int multiprocessors) {
    const int64_t runs = (a.width + elements_per_run - 1) / elements_per_run;
    const int64_t rows = a.width > 0 ? (a.count + a.width - 1) / a.width : 0;
    threads_x = 4;
    while (threads_x < 32 && threads_x < runs) threads_x *= 2;
    threads_y = kDropoutThreads / threads_x;
    blocks_x = static_cast<unsigned>((runs + threads_x - 1) / threads_x);
    const int64_t slots = static_cast<int64_t>(kDropoutBlocksPerMultiprocessor) * multiprocessors;
    const int64_t extra = a.dy != nullptr ? 8 : a.bias.data != nullptr ? 4 : 0;
    shares = RowGrid{rows, threads_y, kDropoutRows, std::max<int64_t>(1, blocks_x), slots, bytes, extra}.shares();
  }
};

inline bool dropout_is_aligned(const GlobalRows& rows, int64_t width, int64_t elements_per_run) {
  const int64_t begins = rows.inner == 0 ? width : rows.start | rows.stride0 | (rows.inner == 1 ? 0 : rows.stride1);
  return begins % elements_per_run == 0;
}

// Calls f(TX{}, T{}, count, aligned, grid) with the types of the dtypes, to pick the kernel.
template <typename F>
void for_dropout_kernel(const BiasDropoutAdd& a, int multiprocessors, const F& f) {
  const auto with_types = [&]<typename TX, typename T>(TX x_element, T element) {
    constexpr int kWide = 16 / sizeof(T);
    const bool wide = a.width % kWide == 0 && a.count % kWide == 0 && is_aligned(a.x) && is_aligned(a.bias.data) &&
                      is_aligned(a.residual) && is_aligned(a.y) && is_aligned(a.dy) && is_aligned(a.dx);
    const int64_t bytes = a.dy != nullptr ? (a.dx != nullptr ? sizeof(TX) : 0) + sizeof(T) : sizeof(TX) + 2 * sizeof(T);
    const auto grid = [&](int64_t per_run) { return DropoutGrid(a, per_run, bytes, multiprocessors); };
    const auto aligned = std::true_type{};
    const auto unaligned = std::false_type{};
    if (!wide) {
      f(x_element, element, std::integral_constant<int, 1>{}, unaligned, grid(1));
    } else if (a.rng_state == nullptr || dropout_is_aligned(a.rows, a.width, kWide)) {
      f(x_element, element, std::integral_constant<int, kWide>{}, aligned, grid(kWide));
    } else {
      f(x_element, element, std::integral_constant<int, kWide>{}, unaligned, grid(kWide));
    }
  };
  for_device_dtype(a.x_dtype, [&]<typename TX>(TX x_element) {
    if (a.x_dtype == a.dtype) {
      with_types(x_element, x_element);
    } else {
      with_types(x_element, float{});
    }
  });
}

inline void launch_bias_dropout_add_forward(BiasDropoutAdd a, int multiprocessors, cudaStream_t stream) {
  if (a.count == 0) return;
  for_dropout_kernel(a, multiprocessors,
                     [&]<typename TX, typename T, typename Count, typename Aligned>(TX, T, Count, Aligned,
                                                                                    const DropoutGrid& grid) {
                       a.shares = grid.shares;
                       auto* kernel = bias_dropout_add_forward_kernel<TX, T, Count::value, Aligned::value>;
                       FM_LAUNCH(kernel, dim3(grid.blocks_x, static_cast<unsigned>(grid.shares.blocks)),
                                 dim3(grid.threads_x, grid.threads_y), stream, a);
                     });
}

inline int64_t bias_dropout_add_parts(const BiasDropoutAdd& a, int multiprocessors) {
  int64_t parts = 1;
  for_dropout_kernel(a, multiprocessors,
                     [&](auto, auto, auto, auto, const DropoutGrid& grid) { parts = grid.shares.blocks; });
  return parts;
}

inline void launch_bias_dropout_add_backward(BiasDropoutAdd a, int multiprocessors, cudaStream_t stream) {
  for_dropout_kernel(a, multiprocessors,
                     [&]<typename TX, typename T, typename Count, typename Aligned>(TX, T, Count, Aligned,
                                                                                    const DropoutGrid& grid) {
                       a.shares = grid.shares;
                       auto* kernel = bias_dropout_add_backward_kernel<TX, T, Count::value, Aligned::value>;
                       FM_LAUNCH(kernel, dim3(grid.blocks_x, static_cast<unsigned>(grid.shares.blocks)),
                                 dim3(grid.threads_x, grid.threads_y), stream, a);
                     });
  if (a.partials == nullptr) return;
  launch_finish_column_sums({a.partials, a.shares.blocks, a.width, a.width, {a.dbias, {nullptr, a.dtype}}}, stream);
}

}  // namespace fm
