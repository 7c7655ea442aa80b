"""Settings of the layout over ranks.

The text under a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_megatron.checks import check, check_positive


@dataclass(frozen=True)
class ParallelConfig:
    """The layout over ranks: the product of the three sizes is the world size."""

    tensor_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_parallel_size: int = 1
    """Ranks that share the depth."""
    stages_per_rank: int | None = None
    """Pieces of the depth that each pipeline rank holds; as few as the schedule allows when not given."""
    schedule: str | None = None
    """Of the pipeline, as `fused-megatron schedule` names them; 1f1b, or interleaved_1f1b for several stages per rank,
    when not given."""
    pipeline_cut: tuple[int, ...] | None = None
    """Blocks of each stage; ranks of about equal cost when not given."""
    data_parallel_size: int | None = None
    """Replicas; what is left of the world when not given."""
    sequence_parallel: bool = False
    """Split activations between the tensor-parallel layers over the sequence."""
    overlap: bool | int = True
    """Cut the products of tensor-parallel layers into chunks and send one while the next is computed. True: as many as
    the cost model of the group finds best; a number: so many; False: none."""
    timeout_s: float = 120.0
    """Seconds without an answer from another rank before the run ends with an error."""

    def __post_init__(self) -> None:
        check_positive("tensor_parallel_size", self.tensor_parallel_size)
        check_positive("pipeline_parallel_size", self.pipeline_parallel_size)
        for name in ("stages_per_rank", "data_parallel_size"):
            if getattr(self, name) is not None:
                check_positive(name, getattr(self, name))
        if not isinstance(self.overlap, bool):
            check_positive("overlap", self.overlap)
        check(self.timeout_s > 0, f"timeout_s={self.timeout_s} must be above 0")
