"""The executor and its parts: the only code of the pipeline that touches tensors.

In the order of a run: executor.py (checks, by executor_checks.py), handshake.py (the first bytes that ranks send each
other), connections.py and channels.py (every connection, made and used once), step_table.py (before each step), then
action_loop.py with messages.py (tensors between ranks), stage_compute.py, stage_hooks.py (reduce, unshard, reshard,
update), tied_weights.py, stashed_weights.py; faults.py says what went wrong where.
"""
