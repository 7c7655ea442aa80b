"""Settings of the parallel layout.

The text below a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_megatron.checks import check, check_divisible, check_one_of, check_positive


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel layout: the product of the tensor-, pipeline- and data-parallel size is the world size."""

    tensor_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_parallel_size: int = 1
    """Ranks that share the layers: each holds some of the stages."""
    stages_per_rank: int | None = None
    """Pipeline stages of each rank. None: as few as the schedule allows."""
    schedule: str | None = None
    """Pipeline schedule; `fused-megatron schedule` lists them. None: 1f1b, or interleaved_1f1b with several stages."""
    pipeline_cut: tuple[int, ...] | None = None
    """Number of blocks in each stage. None: a cut that gives all ranks about the same cost."""
    data_parallel_size: int | None = None
    """Replicas of the model. None: world size / (tensor_parallel_size x pipeline_parallel_size)."""
    zero_stage: int | None = None
    """ZeRO stage: what replicas share. 0: nothing; 1: moments and main weights; 2: also gradients; 3: also weights. The
    numbers are the same. None: 1 with several replicas, else 0."""
    zero_shard_size: int | None = None
    """Replicas that share what zero_stage says; the rest repeat it (HSDP). None: all replicas."""
    zero_gather: str = "block"
    """With zero_stage = 3, weights are gathered for each block, before its forward and backward, or once a step."""
    sequence_parallel: bool = False
    """Split the activations between tensor-parallel layers over the sequence."""
    overlap: bool | int = True
    """Chunks per tensor-parallel product; one is sent while the next is computed. True: by a cost model; False: off."""
    timeout_s: float = 120.0
    """Seconds to wait for another rank before the run ends with an error."""

    @property
    def num_ranks(self) -> int:
        """Number of ranks of the layout; data_parallel_size=None counts as 1."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * (self.data_parallel_size or 1)

    def check_shard_size(self, dp_size: int) -> None:
        """Raise unless zero_shard_size divides the number of replicas."""
        if self.zero_shard_size is not None:
            check_divisible("data_parallel_size", dp_size, "zero_shard_size", self.zero_shard_size)

    def __post_init__(self) -> None:
        check_positive("tensor_parallel_size", self.tensor_parallel_size)
        check_positive("pipeline_parallel_size", self.pipeline_parallel_size)
        for name in ("stages_per_rank", "data_parallel_size", "zero_shard_size"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        check(self.zero_stage in (None, 0, 1, 2, 3), f"zero_stage={self.zero_stage} must be 0, 1, 2 or 3")
        check_one_of("zero_gather", self.zero_gather, ("block", "step"))
        check(
            self.zero_gather == "block" or self.zero_stage == 3,
            f"zero_gather={self.zero_gather!r} needs zero_stage=3, which shards weights (zero_stage={self.zero_stage})",
        )
        check(
            self.zero_shard_size is None or self.zero_stage != 0,
            f"zero_shard_size={self.zero_shard_size} needs zero_stage=1, 2 or 3: stage 0 shares nothing",
        )
        if self.data_parallel_size is not None:
            self.check_shard_size(self.data_parallel_size)
        if not isinstance(self.overlap, bool):
            check_positive("overlap", self.overlap)
        check(0 < self.timeout_s <= 1e6, f"timeout_s={self.timeout_s} must be above 0, and at most 1e6")  # 11 days
