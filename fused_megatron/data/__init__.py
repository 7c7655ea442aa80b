"""Training data: text, tokenizers, indexed token datasets, samples, and the batches of each rank."""
