"""Settings of the training loop.

The text below a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_megatron.checks import check, check_one_of, check_positive

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of an element, by the name of a dtype in a config."""
TRACKERS = ("wandb", "trackio")
"""Values of training.trackers."""
CUDA_GRAPHS = ("off", "block")
"""Values of training.cuda_graphs."""
_POSITIVE = (
    "num_steps",
    "global_batch_size",
    "microbatch_size",
    "eval_interval",
    "eval_batches",
    "log_interval",
    "checkpoint_interval",
    "keep_checkpoints",
)


@dataclass(frozen=True)
class TrainingConfig:
    """Training loop."""

    num_steps: int = 300
    """Optimizer steps of the whole run."""
    global_batch_size: int = 16
    """Sequences per step, over all data-parallel ranks and microbatches."""
    microbatch_size: int = 16
    """Sequences in one forward of a rank; gradients accumulate over microbatches."""
    dtype: str = "float32"
    """Weights and activations: float32, or bfloat16 with fp32 main weights and gradients."""
    seed: int = 1234
    """Seed of the initial weights and of the order of the data."""
    run_folder: str | None = None
    """Folder of config, metrics, loss.png and checkpoints. None: runs/<name of the config file>."""
    eval_interval: int = 100
    """Steps between validations."""
    eval_batches: int = 8
    """Global batches of held-out text in a validation; fewer if there is less text."""
    log_interval: int = 10
    """Steps between log lines if the output is not a terminal."""
    replica_check_interval: int = 100
    """Steps between checks that ranks with the same weights still agree, by a digest. 0: never."""
    checkpoint_interval: int = 100
    """Steps between checkpoints; the last step always writes one."""
    keep_checkpoints: int = 2
    """Number of valid checkpoints to keep; older ones are removed."""
    async_checkpoint: bool = True
    """Copy the tensors of a checkpoint and write them while training goes on; false: training waits for the disk."""
    tensorboard: bool = False
    """Also write the metrics as TensorBoard events (pip install "tensorboard>=2.16")."""
    trackers: tuple[str, ...] = ()
    """Also send the metrics to wandb or trackio, or both: each is a package of its own. wandb without a network:
    WANDB_MODE=offline."""
    profile_steps: int = 0
    """Record this number of steps, from the fourth on, with torch's profiler into the folder profile of the run folder:
    a trace, and on a GPU a snapshot of its memory. 0: none. On the command line also --profile."""
    named_ranges: bool = False
    """Name steps, pipeline actions, layers and collectives for Nsight Systems (NVTX) on a GPU; on a CPU for the trace
    of profile_steps."""
    bucket_mb: float = 25.0
    """Size of a gradient bucket in MB (10^6 bytes); data-parallel ranks reduce buckets during backward."""
    read_metrics_late: bool = False
    """Read loss, gradient norm and flags of a step after the next step has begun, so that a GPU does not wait for the
    host between two steps. A loss that is not finite then ends the run a step later, with the same weights."""
    cuda_graphs: str = "off"
    """CUDA graphs, which replay many kernels by one launch: off, or block (forward and backward of each block of a GPT:
    for small models, whose launches take longer than their kernels)."""
    cluster: str | None = None
    """Cluster whose predicted step is logged beside the measured steps: a name such as h100, or a file that
    `fused-megatron calibrate` wrote. None: no prediction."""

    def __post_init__(self) -> None:
        for name in _POSITIVE:
            check_positive(name, getattr(self, name))
        check(
            self.dtype in ("float32", "bfloat16"),
            f"dtype={self.dtype!r} must be 'float32' or 'bfloat16'",
        )
        check(self.seed >= 0, f"seed={self.seed} must be 0 or more")
        check(
            self.replica_check_interval >= 0, f"replica_check_interval={self.replica_check_interval} must be 0 or more"
        )
        for name in self.trackers:
            check_one_of("trackers", name, TRACKERS)
        check_one_of("cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        check(self.profile_steps >= 0, f"profile_steps={self.profile_steps} must be 0 or more")
        check(self.bucket_mb > 0, f"bucket_mb={self.bucket_mb} must be above 0")

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of weights and activations."""
        return ELEMENT_BYTES[self.dtype]
