"""Training runs: training loop, launching and watching of ranks, resuming; the commands train, generate and convert."""
