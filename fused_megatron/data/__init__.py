"""Text, tokenizers, indexed datasets, samples, and the batches that ranks read."""
