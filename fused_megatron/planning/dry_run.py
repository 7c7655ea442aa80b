"""A dry run: what a rank of any layout holds, keeps and sends, on meta tensors with a fake group of all its ranks."""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_megatron.assembly.build import build_mesh, build_model, build_stages
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.checks import check
from fused_megatron.config import TrainConfig
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import Mesh
from fused_megatron.models import StageSpan
from fused_megatron.observe.record_communication import record_communication

_META = torch.device("meta")


@dataclass(frozen=True)
class MicrobatchFacts:
    """Forward and backward of one microbatch.

    Attributes:
        kept_bytes: of what is kept from forward for backward, weights left out.
        sent_bytes: of whole tensors, by kind of the tensor-parallel collective ("all_reduce", ..); as in
            record_communication.
        output_shape: of what is handed on: hidden states, before the loss.
    """

    kept_bytes: int
    sent_bytes: Mapping[str, int]
    output_shape: tuple[int, ...]

    def plus(self, other: "MicrobatchFacts", times: int = 1) -> "MicrobatchFacts":
        """With so many of another one beside it; negative: without them."""
        sent = Counter(self.sent_bytes)
        sent.update({kind: times * num_bytes for kind, num_bytes in other.sent_bytes.items()})
        sent_bytes = {kind: num_bytes for kind, num_bytes in sent.items() if num_bytes}
        return MicrobatchFacts(self.kept_bytes + times * other.kept_bytes, sent_bytes, self.output_shape)


@dataclass(frozen=True)
class RankFacts:
    """What one rank has to do with a training step.

    Attributes:
        groups: the ranks that it shares an axis with, by axis ("tp", "pp", "dp"); no entry for a length of 1.
        full_parameters: of its stages, over all tensor-parallel ranks.
        num_parameters: that this rank holds, padding of the vocabulary among them.
        parameter_bytes: of those.
        reduced_bytes: gradients that are summed over the data-parallel ranks, once a step.
        stages: a microbatch in each of its stages, by index.
        block: a microbatch in one block.
    """

    groups: Mapping[str, tuple[int, ...]]
    full_parameters: int
    num_parameters: int
    parameter_bytes: int
    reduced_bytes: int
    stages: Mapping[int, MicrobatchFacts]
    block: MicrobatchFacts


@contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """A default process group of ranks that are not there: collectives return at once, and change nothing.

    Raises:
        InputError: there is a process group already.
    """
    check(
        not dist.is_initialized(),
        "a dry run needs a process without a process group (destroy_process_group, or a process of its own)",
    )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=world_size)
    try:
        yield
    finally:
        dist.destroy_process_group()


class DryRun:
    """Builds ranks of GPT layouts without memory for their tensors, and runs a microbatch through their stages.

        facts = DryRun().rank(load_config(Path("gpt_1t.toml")), rank=1234)
        print(facts.num_parameters, facts.stages[0].kept_bytes, facts.block.sent_bytes)

    Blocks are all the same: stages of one and of two blocks are run, and what a block adds counts as often as there are
    blocks. The same object remembers what it has run for other ranks and configs.

    Memory: of Python objects only.
    """

    def __init__(self) -> None:
        self._known: dict[Any, MicrobatchFacts] = {}

    def rank(self, config: TrainConfig, rank: int) -> RankFacts:
        """What a rank of the layout has to do. Takes a second or so for the largest models.

        Args:
            config: of a GPT; model.vocab_size must be given. Without parallel.data_parallel_size it is 1.
            rank: below the product of the three sizes.

        Raises:
            InputError: sizes that do not fit; another family; no vocab_size; there is a process group already.
        """
        check(config.model.family == "gpt", f"model.family={config.model.family!r} must be 'gpt' for a dry run")
        parallel = config.parallel
        world_size = parallel.tensor_parallel_size * parallel.pipeline_parallel_size
        world_size *= parallel.data_parallel_size or 1
        check(0 <= rank < world_size, f"rank={rank} must be in [0, {world_size}), the ranks of the layout")
        plan = plan_pipeline(config)
        with fake_ranks(rank, world_size):
            mesh = build_mesh(config, device_type="cpu")
            model = build_stages(config, mesh, plan, _META)
            parameters = model.parameters_by_name().values()
            of_stages = {index: list(stage.parameters()) for index, stage in model.stages.items()}
            gradients = GradientBuckets(of_stages, mesh.dp_group)
            with record_communication() as ledger:
                gradients.finish()
            one = self._microbatch(config, mesh, first=False, last=False, num_blocks=1)
            two = self._microbatch(config, mesh, first=False, last=False, num_blocks=2)
            block = two.plus(one, -1)
            stages = {}
            for index in model.stages:
                span = model.spans[index]
                ends = self._microbatch(config, mesh, span.first, span.last, num_blocks=1)
                stages[index] = ends.plus(block, span.stop - span.start - 1)
            groups = {"tp": mesh.tp_group, "pp": mesh.pp_group, "dp": mesh.dp_group}
            return RankFacts(
                groups={axis: tuple(dist.get_process_group_ranks(g)) for axis, g in groups.items() if g is not None},
                full_parameters=model.num_parameters(),
                num_parameters=sum(parameter.numel() for parameter in parameters),
                parameter_bytes=sum(parameter.nbytes for parameter in parameters),
                reduced_bytes=ledger.num_bytes["all_reduce"],
                stages=stages,
                block=block,
            )

    def _microbatch(self, config: TrainConfig, mesh: Mesh, first: bool, last: bool, num_blocks: int) -> MicrobatchFacts:
        """In a stage with so many blocks, with the embedding (first) and the head (last)."""
        start = 0 if first else 1
        span = StageSpan(start, start + (1 if last else 2), start, start + num_blocks)
        few = dataclasses.replace(config, model=dataclasses.replace(config.model, num_layers=3))
        # No other part of the layout is seen from inside a stage.
        training = few.training.dtype, few.training.microbatch_size
        key = few.model, training, mesh.tp_size, few.parallel.sequence_parallel, span
        if key not in self._known:
            self._known[key] = _run_microbatch(few, mesh, span)
        return self._known[key]


def _run_microbatch(config: TrainConfig, mesh: Mesh, span: StageSpan) -> MicrobatchFacts:
    stage = build_model(config, mesh, _META, span)
    size, seq_len = config.training.microbatch_size, config.model.seq_len
    tokens = torch.zeros(size, seq_len, dtype=torch.int64, device=_META)
    rows = seq_len // mesh.tp_size if config.parallel.sequence_parallel else seq_len
    x = torch.zeros(rows, size, config.model.hidden_size, dtype=next(stage.parameters()).dtype, device=_META)
    x = tokens if span.first else x.requires_grad_()
    weights = {parameter.untyped_storage()._cdata for parameter in stage.parameters()}
    kept: dict[int, torch.Tensor] = {}

    def pack(saved: torch.Tensor) -> torch.Tensor:
        kept[saved.untyped_storage()._cdata] = saved
        return saved

    with record_communication() as ledger:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
            y = stage(x)
            shape = tuple(y.shape)
            if span.last:
                y = stage.loss(y, tokens, reduction="sum")
        y.backward(torch.empty_like(y))
    assert all(p.grad is not None and p.grad.shape == p.shape for p in stage.parameters())
    assert span.first or (x.grad is not None and x.grad.shape == x.shape)
    kept_bytes = sum(saved.untyped_storage().nbytes() for key, saved in kept.items() if key not in weights)
    return MicrobatchFacts(kept_bytes, dict(ledger.num_bytes), shape)
