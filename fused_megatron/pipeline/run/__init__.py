"""Executor of pipeline schedules and its parts, the only code of the pipeline that touches tensors.

In the order of a run: executor.py, which checks its arguments by executor_checks.py; handshake.py, the first bytes
between ranks; connections.py and channels.py, which make and use every connection once; step_table.py, before each
step; action_loop.py with messages.py (tensors between ranks), stage_compute.py, stage_hooks.py (reduce, unshard,
reshard, update), tied_weights.py and stashed_weights.py. faults.py reports the first fault to every rank.
"""
