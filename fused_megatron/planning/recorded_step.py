"""A recorded training step of one rank: on real ranks, or on fake tensors with a fake group of all ranks."""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore

from fused_megatron.assembly.assemble import Assembly, assemble
from fused_megatron.assembly.build import DTYPES, build_mesh, build_stages
from fused_megatron.assembly.microbatches import partition_of
from fused_megatron.assembly.pipeline_plan import plan_pipeline
from fused_megatron.assembly.training_step import training_step
from fused_megatron.checks import check
from fused_megatron.config import TrainConfig
from fused_megatron.data.batch import Batch
from fused_megatron.expert_parallel import ExpertMLP
from fused_megatron.mesh import Mesh
from fused_megatron.observe.kernel_counts import AttentionOfAGPU
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.pipeline.run.messages import HEADER_NUMBERS, TensorSpec, encode_header
from fused_megatron.planning.step_recorder import HEADER, RECEIVED, StepRecorder, Work

MODEL, ASSEMBLY, UPDATED, BATCH, STEP = "model", "assembly", "updated", "batch", "step"
"""Phases of the recorder."""

# Number of flags that the trainer's ranks sum in a step: damaged tokens, a failed save, and the reasons to stop.
_NUM_FLAGS = 7
_NUM_REFUSING = 2
_STEP = 1  # not step 0, in which stages also send the shapes of their messages


@dataclass(frozen=True)
class RecordedStep:
    """A rank after one training step, with its recorder.

    Attributes:
        assembly: the rank's parts, after the step.
        recorder: the recorder, which was on from the construction of the model.
        assembled: number of storage events before the step.
        assembled_bytes: bytes of all storages before the first step.
        held_bytes: bytes of all storages after the step.
    """

    assembly: Assembly
    recorder: StepRecorder
    assembled: int
    assembled_bytes: int
    held_bytes: int

    def work(self) -> Counter[Work]:
        """Return the work of the training step, over all its actions."""
        total: Counter[Work] = Counter()
        for (phase, _), done in self.recorder.work.items():
            total.update(done if phase == STEP else {})
        return total


@contextmanager
def fake_ranks(rank: int, world_size: int) -> Iterator[None]:
    """Make a default process group of absent ranks: collectives return at once and change nothing.

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


def record_fake_step(config: TrainConfig, rank: int, device: torch.device, routes: str = "balanced") -> RecordedStep:
    """Build one rank of a layout on fake tensors, which take no memory, and run a training step.

    It runs the trainer's own parts and step, and the executor's actions. Only messages and values of other ranks are
    missing: a message arrives at once, a collective changes nothing.

    Args:
        config: the config of the run; model.vocab_size must be given.
        rank: global rank.
        device: device of the fake tensors. Tensors of "meta" stand for a GPU's: modules take the branches of a GPU, and
            the recorder counts the kernels.
        routes: as DryRun.

    Raises:
        InputError: as build_mesh, build_stages and assemble; there is a process group already.
    """
    with fake_ranks(rank, config.parallel.num_ranks):
        mesh = build_mesh(config, device.type)
        on_meta = device.type == "meta"
        recorder = StepRecorder(fake=True, on_meta=on_meta)
        # Tensors of the meta device have no memory either, and FakeTensorMode leaves them as they are.
        mode = AttentionOfAGPU() if on_meta else FakeTensorMode()
        # Otherwise backward on a GPU runs in threads of its own, where the dispatch modes are off.
        with torch.autograd.set_multithreading_enabled(False), mode, recorder:
            peers = _AbsentPeers(recorder, config, mesh)
            return _record(config, mesh, device, recorder, peers, lambda model: _assume_routes(model, routes))


def record_real_step(
    config: TrainConfig, device: torch.device, prepare: Callable[[nn.Module], None] = lambda model: None
) -> RecordedStep:
    """Build a real rank of the default process group and run the same step; the executor stays open.

    Args:
        config, device: as record_fake_step.
        prepare: changes the weights of the new model.

    Communication: as build_mesh, assemble and training_step.
    """
    mesh = build_mesh(config, device.type)
    recorder = StepRecorder(fake=False)
    with torch.autograd.set_multithreading_enabled(False), recorder:
        return _record(config, mesh, device, recorder, None, prepare)


def _assume_routes(model: nn.Module, routes: str) -> None:
    for module in model.modules():
        if isinstance(module, ExpertMLP):
            module.assumed_routes = routes


def _record(
    config: TrainConfig,
    mesh: Mesh,
    device: torch.device,
    recorder: StepRecorder,
    peers: "_AbsentPeers | None",
    prepare: Callable[[nn.Module], None],
) -> RecordedStep:
    plan = plan_pipeline(config)
    with recorder.phase(MODEL):
        model = build_stages(config, mesh, plan, device)
    prepare(model)
    with recorder.phase(ASSEMBLY):
        assembly = assemble(config, mesh, plan, model, transport=peers)
    for stage in model.stages.values():
        recorder.watch(stage)
    storages = recorder.storages
    assembled_bytes = storages.held_bytes()
    groups = [g for each in assembly.replicas.sets for g in (each.group, each.shard_group, each.copy_group)]
    recorder.replicas = {tuple(dist.get_process_group_ranks(group)) for group in groups if group is not None}
    with recorder.phase(UPDATED):  # as after the update of a previous step: gathering weights of other ranks has begun
        assembly.weights.start()
    assembled = storages.num_events

    def read_batch() -> Batch:
        with recorder.phase(BATCH):
            return _batch(config, mesh)

    with recorder.phase(STEP, lambda: assembly.executor.current_action):
        training_step(
            assembly,
            read_batch,
            step=_STEP,
            lr=config.optimizer.lr,
            num_targets=config.training.global_batch_size * config.model.seq_len,
            group=dist.group.WORLD if mesh.world_size > 1 else None,
            flags=lambda: [0.0] * _NUM_FLAGS,
            num_refusing=_NUM_REFUSING,
            judge=lambda sums: None,
        )
    return RecordedStep(assembly, recorder, assembled, assembled_bytes, storages.held_bytes())


def _batch(config: TrainConfig, mesh: Mesh) -> Batch:
    """Return a batch of tokens 0: their values change no shape. Each sample is one document, which is the most work."""
    rows = config.training.global_batch_size // mesh.dp_size
    inputs, targets, positions = (torch.zeros(rows, config.model.seq_len, dtype=torch.int64) for _ in range(3))
    return Batch(inputs, targets, positions=positions if config.data.resets_positions else None)


class _Done:
    """A handle of a message that is complete at once."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        pass


class _AbsentPeers:
    """A pipeline transport without peers.

    A received tensor has the shape that the peer would send: every stage of a transformer sends the residual stream.
    """

    def __init__(self, recorder: StepRecorder, config: TrainConfig, mesh: Mesh) -> None:
        rows = partition_of(config, AttentionMask()).sizes[mesh.cp_rank]
        rows //= mesh.tp_size if config.parallel.sequence_parallel else 1
        shape = (rows, config.training.microbatch_size, config.model.hidden_size)
        self._recorder = recorder
        self._header = encode_header([TensorSpec(shape, DTYPES[config.training.weight_dtype], True)])

    def send(self, tensor: torch.Tensor, peer: int, direction: str, tag: int) -> _Done:
        """As Transport."""
        if tensor.dtype == torch.int64:
            self._recorder.relabel(tensor, HEADER)
        return _Done()

    def receive(self, buffer: torch.Tensor, peer: int, direction: str, tag: int) -> _Done:
        """As Transport."""
        self._recorder.relabel(buffer, HEADER if buffer.dtype == torch.int64 else RECEIVED)
        if buffer.dtype == torch.int64:
            self._recorder.set_values(buffer, self._header if buffer.numel() == HEADER_NUMBERS else [0])
        return _Done()
