"""Every op in plain PyTorch, fp32 inside: the definition of right."""
