"""Data parallelism: gradients in buckets, their division and reduction over ranks, and the optimizer.

placement.py defines what the ranks of a ZeRO stage share. bucket_layout.py assigns gradients to buckets.
gradient_bucket.py stores gradients, whole or by rows. gradient_division.py defines the divisor. reduction.py sums
gradients over ranks while backward runs. optimizer.py updates weights from gradients of the same names, by the rules of
update_rules.py and muon.py. A rank that updates only some rows of each parameter passes these rows to the optimizer,
under the name of the parameter. The other rows are gathered after an update by weight_gather.py (stages 1 and 2), or
around each use by sharded_weights.py (stage 3). shard_data_parallel.py and sharded_optimizer.py do all this in a user's
loop.
"""
