"""Gradients over data-parallel ranks: buckets, their reduction, and the optimizer."""
