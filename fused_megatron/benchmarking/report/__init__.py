"""The command `fused-megatron report`: results files of benchmarks as tables and plots, and comparison of two files."""
