"""Data parallelism: gradients in buckets, their division and reduction over ranks, and the optimizer.

bucket_layout.py says which gradient lies where, gradient_division.py by what gradients are divided, reduction.py sums
them over ranks while backward goes on, optimizer.py updates named weights from named gradients. The last two take what
they are given: a rank that updates only some rows of each parameter gives those rows, under the same names.
"""
