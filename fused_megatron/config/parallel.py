"""Settings of the parallel layout.

The text below a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_megatron.checks import check, check_divisible, check_one_of, check_positive

CONTEXT_PARALLEL_METHODS = ("ring", "all_gather", "all_to_all", "all_to_all+ring")
"""Values of parallel.context_parallel_method."""
EXPERT_DISPATCHES = ("all_to_all", "all_gather")
"""Values of parallel.expert_dispatch."""


def cheapest_dispatch(ep: int, etp: int, num_selected: int) -> str:
    """Return the way that sends fewer bytes, "all_to_all" or "all_gather"; all_to_all if both send the same.

    In units of a row of H elements a rank sends, for each of its tokens, forward (backward the same):

        all_to_all   2 K (1 - 1 / ep) between ep ranks, and 2 K (etp - 1) between etp ranks
        all_gather   2 (ep - 1), and 2 ep (etp - 1)

    So all_gather is for tokens with more experts than there are ranks.

    Args:
        ep, etp: numbers of ranks that share the experts, and each expert.
        num_selected: K.
    """
    all_to_all, all_gather = num_selected * (ep * etp - 1), ep * (ep * etp - 1)
    return "all_gather" if all_gather < all_to_all else "all_to_all"


@dataclass(frozen=True)
class ParallelConfig:
    """Parallel layout: the product of the tensor-, context-, pipeline- and data-parallel size is the world size."""

    tensor_parallel_size: int = 1
    """Ranks that share each layer."""
    pipeline_parallel_size: int = 1
    """Ranks that share the layers: each holds some of the stages."""
    stages_per_rank: int | None = None
    """Pipeline stages of each rank. None: as few as the schedule allows."""
    schedule: str | None = None
    """Pipeline schedule; `fused-megatron schedule` lists them. None: 1f1b, or interleaved_1f1b with several stages."""
    steps_per_flush: int = 16
    """With schedule pipedream or pipedream_2bw: steps that overlap, until the pipeline drains for a pause. The numbers
    are the same for each value."""
    pipeline_cut: tuple[int, ...] | None = None
    """Number of blocks in each stage. None: a cut that gives all ranks about the same cost."""
    data_parallel_size: int | None = None
    """Ranks that train on different samples. None: world size / the product of the other sizes."""
    context_parallel_size: int = 1
    """Ranks that share each sequence, attention included: each holds some of its positions."""
    context_parallel_method: str = "ring"
    """How these ranks attend: ring, all_gather (of keys and values), all_to_all (heads for positions), or
    all_to_all+ring."""
    expert_parallel_size: int = 1
    """Ranks that share the experts of a layer. They are some of the data-, context- and tensor-parallel ranks."""
    expert_tensor_parallel_size: int = 1
    """Ranks that share each expert. They are some of the same ranks."""
    expert_dispatch: str | None = None
    """How tokens reach their experts: all_to_all or all_gather. None: the one that sends fewer bytes."""
    zero_stage: int | None = None
    """ZeRO stage: what replicas (data x context parallel ranks) share. 0: nothing; 1: moments and main weights; 2: also
    gradients; 3: also weights. The numbers are the same. None: 1 with several replicas, else 0."""
    zero_shard_size: int | None = None
    """Replicas that share what zero_stage says; the rest repeat it (HSDP). None: all replicas."""
    zero_gather: str = "block"
    """With zero_stage = 3, weights are gathered for each block, before its forward and backward, or once a step."""
    sequence_parallel: bool = False
    """Split the activations between tensor-parallel layers over the sequence."""
    overlap: bool | int = True
    """Chunks per tensor-parallel product; one is sent while the next is computed. True: by a cost model; False: off."""
    scatter_messages: bool = True
    """Without sequence_parallel, each tensor-parallel rank sends 1/tp of what a pipeline stage hands on, and the
    receivers gather it. False: each sends all of it."""
    timeout_s: float = 120.0
    """Seconds to wait for another rank before the run ends with an error."""

    @property
    def num_ranks(self) -> int:
        """Number of ranks of the layout; data_parallel_size=None counts as 1."""
        return self.tensor_parallel_size * self.pipeline_parallel_size * self.replicas(self.data_parallel_size or 1)

    def replicas(self, dp_size: int) -> int:
        """Return the number of ranks with the same weights: data-parallel times context-parallel ranks."""
        return dp_size * self.context_parallel_size

    def expert_replicas(self, dp_size: int) -> int:
        """Return the number of ranks with the same experts, of the data-, context- and tensor-parallel ranks."""
        ranks = self.replicas(dp_size) * self.tensor_parallel_size
        return ranks // (self.expert_parallel_size * self.expert_tensor_parallel_size)

    @property
    def sequence_text(self) -> str:
        """Division of sequences, for the line that describes a layout: " cp=2 (ring) sequence parallel", or ""."""
        context = f" cp={self.context_parallel_size} ({self.context_parallel_method})"
        return context * (self.context_parallel_size > 1) + " sequence parallel" * self.sequence_parallel

    @property
    def expert_text(self) -> str:
        """Division of experts, for the same line: " ep=2 etp=2", or ""."""
        sizes = {"ep": self.expert_parallel_size, "etp": self.expert_tensor_parallel_size}
        return "".join(f" {axis}={size}" for axis, size in sizes.items() if size > 1)

    @property
    def whole_products(self) -> bool:
        """Whether tensor-parallel products are never cut into chunks: overlap is False, or one chunk."""
        return self.overlap is not True and self.overlap <= 1

    @property
    def scatters_messages(self) -> bool:
        """Whether tensor-parallel ranks share the messages of a pipeline; sequence shards are parts already."""
        sizes = self.tensor_parallel_size > 1 and self.pipeline_parallel_size > 1
        return self.scatter_messages and sizes and not self.sequence_parallel

    @property
    def row_multiple(self) -> int:
        """Number that divides the positions of each context-parallel rank: sequence parallelism cuts them again."""
        return self.tensor_parallel_size if self.sequence_parallel else 1

    def check_shard_size(self, dp_size: int) -> None:
        """Raise unless zero_shard_size divides the number of replicas."""
        if self.zero_shard_size is None:
            return
        name = "data_parallel_size" + (" x context_parallel_size" if self.context_parallel_size > 1 else "")
        check_divisible(name, self.replicas(dp_size), "zero_shard_size", self.zero_shard_size)

    def __post_init__(self) -> None:
        check_positive("tensor_parallel_size", self.tensor_parallel_size)
        check_positive("pipeline_parallel_size", self.pipeline_parallel_size)
        check_positive("steps_per_flush", self.steps_per_flush)
        check_positive("context_parallel_size", self.context_parallel_size)
        check_positive("expert_parallel_size", self.expert_parallel_size)
        check_positive("expert_tensor_parallel_size", self.expert_tensor_parallel_size)
        check_one_of("context_parallel_method", self.context_parallel_method, CONTEXT_PARALLEL_METHODS)
        if self.expert_dispatch is not None:
            check_one_of("expert_dispatch", self.expert_dispatch, EXPERT_DISPATCHES)
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
