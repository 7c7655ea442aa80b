"""Data parallelism: gradients in buckets, their division and reduction over ranks, and the optimizer.

bucket_layout.py assigns gradients to buckets; gradient_division.py defines the divisor; reduction.py sums the gradients
over ranks while backward runs; optimizer.py updates weights from gradients of the same names, by the rules of
update_rules.py and muon.py. A rank that updates only some rows of each parameter passes these rows to the optimizer,
under the name of the parameter.
"""
