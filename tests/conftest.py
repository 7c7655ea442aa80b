"""Settings for all tests."""

import os

# Inherited by the rank processes that tests start: several ranks on a few cores, one thread each.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

# Two threads in the process of the tests itself, so that the kernels' threaded paths run.
torch.set_num_threads(2)
