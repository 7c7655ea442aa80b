"""Reference implementation of every op in plain PyTorch, computed in fp32: it defines the correct result."""
