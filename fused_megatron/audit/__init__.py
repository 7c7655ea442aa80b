"""Costs of the GPU kernels, found without a GPU: registers, spills, occupancy, access widths, bytes issued."""
