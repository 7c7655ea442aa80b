"""Data parallelism: gradients in buckets, their division and reduction over ranks, and the optimizer.

placement.py says what the ranks of a ZeRO stage share. bucket_layout.py assigns gradients to buckets;
gradient_bucket.py keeps them, whole or by rows; gradient_division.py defines the divisor; reduction.py sums the
gradients over ranks while backward runs; optimizer.py updates weights from gradients of the same names, by the rules of
update_rules.py and muon.py. A rank that updates only some rows of each parameter passes these rows to the optimizer,
under the name of the parameter. weight_gather.py gathers the others after an update (stages 1 and 2),
sharded_weights.py around each use (stage 3). shard_data_parallel.py and sharded_optimizer.py do this for a user's loop.
"""
