"""`fused-megatron report`: a benchmark's results file as tables and pictures, and two of them compared."""
