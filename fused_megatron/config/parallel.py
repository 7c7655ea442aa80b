"""Settings of the parallel layout.

The text below a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_megatron.checks import check, check_positive


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
    sequence_parallel: bool = False
    """Split the activations between tensor-parallel layers over the sequence."""
    overlap: bool | int = True
    """Chunks per tensor-parallel product; one is sent while the next is computed. True: by a cost model; False: off."""
    timeout_s: float = 120.0
    """Seconds to wait for another rank before the run ends with an error."""

    def __post_init__(self) -> None:
        check_positive("tensor_parallel_size", self.tensor_parallel_size)
        check_positive("pipeline_parallel_size", self.pipeline_parallel_size)
        for name in ("stages_per_rank", "data_parallel_size"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if not isinstance(self.overlap, bool):
            check_positive("overlap", self.overlap)
        check(self.timeout_s > 0, f"timeout_s={self.timeout_s} must be above 0")
