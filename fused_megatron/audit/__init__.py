"""What the GPU kernels cost, known without a GPU: registers, spills, occupancy, widths of accesses, bytes issued."""
