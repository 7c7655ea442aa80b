"""Settings of the training loop.

The text below a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fused_megatron.checks import check, check_one_of, check_positive

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2}
"""Bytes of an element, by the name of a dtype in a config."""
AUTO = "auto"
"""Value of training.dtype that the device decides."""
MATMUL_PRECISIONS = ("highest", "high", "medium")
"""Values of training.matmul_precision: the words of torch.set_float32_matmul_precision."""
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
    dtype: str = AUTO
    """Weights and activations: float32, or bfloat16 with fp32 main weights and gradients. auto: bfloat16 on a GPU,
    float32 on a CPU."""
    matmul_precision: str | None = None
    """Products of float32 tensors, as torch.set_float32_matmul_precision: highest, high (TF32 on a GPU) or medium.
    None: torch's own, highest."""
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
    bucket_mb: float | None = None
    """Size of a gradient bucket in MB (10^6 bytes); data-parallel ranks reduce buckets during backward. None: 25 on a
    CPU; on a GPU 160, or 4 for each replica if that is more."""
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
        check_one_of("dtype", self.dtype, (AUTO, *ELEMENT_BYTES))
        if self.matmul_precision is not None:
            check_one_of("matmul_precision", self.matmul_precision, MATMUL_PRECISIONS)
        check(self.seed >= 0, f"seed={self.seed} must be 0 or more")
        check(
            self.replica_check_interval >= 0, f"replica_check_interval={self.replica_check_interval} must be 0 or more"
        )
        for name in self.trackers:
            check_one_of("trackers", name, TRACKERS)
        check_one_of("cuda_graphs", self.cuda_graphs, CUDA_GRAPHS)
        check(self.profile_steps >= 0, f"profile_steps={self.profile_steps} must be 0 or more")
        check(self.bucket_mb is None or self.bucket_mb > 0, f"bucket_mb={self.bucket_mb} must be above 0")

    def for_device(self, device_type: str) -> TrainingConfig:
        """Return these settings with the values that a device of this type decides: "cuda", or any other."""
        dtype, bucket_mb = self.dtype, self.bucket_mb
        if dtype == AUTO:
            dtype = "bfloat16" if device_type == "cuda" else "float32"
        if bucket_mb is None and device_type != "cuda":
            bucket_mb = default_bucket_mb(device_type, 1)
        return replace(self, dtype=dtype, bucket_mb=bucket_mb)

    @property
    def weight_dtype(self) -> str:
        """Dtype of weights and activations. "auto" is float32 until for_device decides."""
        return "float32" if self.dtype == AUTO else self.dtype

    @property
    def element_bytes(self) -> int:
        """Bytes of an element of weights and activations."""
        return ELEMENT_BYTES[self.weight_dtype]

    def bucket_bytes(self, num_replicas: int) -> float:
        """Bytes of a bucket that this number of replicas reduce; None is the default of a GPU: see for_device."""
        return 1e6 * (default_bucket_mb("cuda", num_replicas) if self.bucket_mb is None else self.bucket_mb)


def default_bucket_mb(device_type: str, num_replicas: int) -> float:
    """Return the default size of a gradient bucket, in MB (10^6 bytes of float32).

    A ring of more ranks takes more time for the same bytes, while the network's share of the time should stay: Megatron
    takes 40 million parameters, or one million for each replica. On a CPU a bucket should stay in the caches.
    """
    return max(160.0, 4.0 * num_replicas) if device_type == "cuda" else 25.0
