"""The benchmark GPT in plain torch, and with torch's own parallelism in every layout.

Tensor parallelism: DTensor's parallelize_module. Data parallelism: DistributedDataParallel, FSDP2's fully_shard.
Pipelines: torch.distributed.pipelining. They are combined as torch's tutorials combine them.
"""

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from gpt_layouts import Layout, Size, TrainingStep, Weights, adamw, own_rows
from torch import nn
from torch.distributed import pipelining
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor import parallel as tp
from torch.nn.parallel import DistributedDataParallel

from fused_megatron.pipeline import build_schedule
from fused_megatron.pipeline.schedule.action import stages_of

# By our name of the schedule. torch has no zb_h1: its interleaved zero-bubble schedule with one stage a rank equals it.
SCHEDULES = {
    "gpipe": "ScheduleGPipe",
    "1f1b": "Schedule1F1B",
    "interleaved_1f1b": "ScheduleInterleaved1F1B",
    "looped_breadth_first": "ScheduleLoopedBFS",
    "zb_h1": "ScheduleInterleavedZeroBubble",
    "interleaved_zero_bubble": "ScheduleInterleavedZeroBubble",
    "zb_v": "ScheduleZBVZeroBubble",
    "dual_pipe_v": "ScheduleDualPipeV",
}


class PlainEmbedding(nn.Module):
    """Token and position embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(size.vocab_size, size.hidden_size)
        self.position_embedding = nn.Embedding(size.seq_len, size.hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        return self.token_embedding(tokens) + self.position_embedding(positions)


class PlainAttention(nn.Module):
    """Causal attention. Rows of the fused weight are ordered head by head, so that a block of rows is whole heads."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.head_dim = hidden_size // num_heads
        self.query_key_value = nn.Linear(hidden_size, 3 * hidden_size)
        self.projection = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.query_key_value(x)
        query, key, value = qkv.view(*qkv.shape[:2], -1, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projection(context.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.expansion = nn.Linear(hidden_size, 4 * hidden_size)
        self.projection = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(F.gelu(self.expansion(x), approximate="tanh"))


class PlainBlock(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(size.hidden_size)
        self.attention = PlainAttention(size.hidden_size, size.num_heads)
        self.mlp_norm = nn.LayerNorm(size.hidden_size)
        self.mlp = PlainMLP(size.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class PlainGPT(nn.Module):
    """A GPT as a user of torch writes it, or a pipeline stage of it: [B, S] to logits [B, S, V].

    The head is the table of the embedding, or a copy of it if the embedding is on another stage.
    """

    def __init__(self, size: Size, start: int = 0, stop: int | None = None, last: bool = True) -> None:
        super().__init__()
        stop = size.num_layers if stop is None else stop
        self.embedding = PlainEmbedding(size) if start == 0 else None
        self.blocks = nn.ModuleDict({str(i): PlainBlock(size) for i in range(start, stop)})
        self.final_norm = nn.LayerNorm(size.hidden_size) if last else None
        self.head = nn.Linear(size.hidden_size, size.vocab_size, bias=False) if last else None
        self.tie()

    def tie(self) -> None:
        """Tie the head to the embedding; call again after weights were replaced."""
        if self.embedding is not None and self.head is not None:
            self.head.weight = self.embedding.token_embedding.weight

    def tied_weight(self) -> nn.Parameter | None:
        """Return this stage's copy of the token embedding table."""
        return self.embedding.token_embedding.weight if self.embedding else self.head.weight if self.head else None

    def load(self, weights: Weights) -> "PlainGPT":
        for name, parameter in self.named_parameters():
            name = name.removeprefix("embedding.").replace("position_embedding.weight", "position_embedding")
            parameter.detach().copy_(weights[name.replace("head.", "token_embedding.")])
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.embedding is not None:
            x = self.embedding(x)
        for block in self.blocks.values():
            x = block(x)
        return x if self.head is None or self.final_norm is None else self.head(self.final_norm(x))


def mean_loss(logits: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(logits.flatten(0, -2), target.flatten())


def step_of(model: nn.Module, loss_of: Callable[..., torch.Tensor], context: Any = contextlib.nullcontext) -> Any:
    """Build a training step as a user of torch writes it."""
    optimizer = adamw(list(model.parameters()))

    def run(tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with context():
            loss = loss_of(tokens, target)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return TrainingStep(run)


def plain_step(size: Size, layout: Layout, weights: Weights) -> TrainingStep:
    """Build the step of one rank: nothing sharded, the whole batch at once."""
    model = PlainGPT(size).load(weights)
    return step_of(model, lambda tokens, target: mean_loss(model(tokens), target))


# ---- tensor parallelism ----------------------------------------------------------------------------------------------


def shard_layers(model: PlainGPT, mesh: DeviceMesh, sequence_parallel: bool, loss_parallel: bool) -> None:
    """Shard the layers as in the tutorial of torch.distributed.tensor.parallel."""
    between = Shard(1) if sequence_parallel else Replicate()
    column, row = tp.ColwiseParallel(input_layouts=between), tp.RowwiseParallel(output_layouts=between)
    embedding = tp.RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
    plan: dict[str, Any] = {
        "blocks.*.attention.query_key_value": column,
        "blocks.*.attention.projection": row,
        "blocks.*.mlp.expansion": column,
        "blocks.*.mlp.projection": row,
    }
    if model.embedding is not None:
        plan |= {"embedding.token_embedding": embedding, "embedding.position_embedding": embedding}
    if model.head is not None:
        plan["head"] = tp.ColwiseParallel(
            input_layouts=between,
            output_layouts=Shard(-1) if loss_parallel else Replicate(),
            use_local_output=not loss_parallel,
        )
    if sequence_parallel:
        plan |= {name: tp.SequenceParallel() for name in ("blocks.*.attention_norm", "blocks.*.mlp_norm")}
        plan |= {"final_norm": tp.SequenceParallel()} if model.final_norm is not None else {}
    tp.parallelize_module(model, mesh, plan)
    model.tie()


# ---- data parallelism, and tensor parallelism beside it --------------------------------------------------------------


def torch_step(*, loss_parallel: bool = False, data: str = "", keep_gathered: bool = False) -> Any:
    """Return a builder of steps with DTensor, and data parallelism around it.

    Args:
        loss_parallel: keep the head's logits sharded.
        data: "ddp" or "fsdp2".
        keep_gathered: FSDP2 gathers weights once a step, as ZeRO-2 does.
    """

    def build(size: Size, layout: Layout, weights: Weights) -> TrainingStep:
        mesh = init_device_mesh("cpu", (layout.dp, layout.tp), mesh_dim_names=("dp", "tp"))
        model: Any = PlainGPT(size).load(weights)
        if layout.tp > 1:
            shard_layers(model, mesh["tp"], layout.sequence_parallel, loss_parallel)
        if data == "fsdp2":
            for block in model.blocks.values():
                fully_shard(block, mesh=mesh["dp"], reshard_after_forward=not keep_gathered)
            fully_shard(model, mesh=mesh["dp"], reshard_after_forward=not keep_gathered)
        if data == "ddp":
            model = DistributedDataParallel(model, process_group=mesh["dp"].get_group(), gradient_as_bucket_view=True)
        optimizer = adamw(list(model.parameters()))

        def run(tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            losses: list[float] = []
            pieces = own_rows((tokens, target), layout, mesh.get_local_rank("dp"))
            for i, (x, y) in enumerate(pieces):
                sharded_loss = tp.loss_parallel() if loss_parallel else contextlib.nullcontext()
                with reducing(model, i == len(pieces) - 1, keep_gathered), sharded_loss:
                    loss = mean_loss(model(x), y) / len(pieces)
                    loss.backward()
                losses.append(float(loss.detach()))
            optimizer.step()
            optimizer.zero_grad()
            return torch.tensor(sum(losses))

        return TrainingStep(run)

    return build


@contextlib.contextmanager
def reducing(model: Any, last: bool, keep_gathered: bool) -> Iterator[None]:
    """Accumulate gradients; sum them over the ranks in the last microbatch's backward."""
    if isinstance(model, DistributedDataParallel) and not last:
        with model.no_sync():
            yield
        return
    if hasattr(model, "set_requires_gradient_sync"):
        model.set_requires_gradient_sync(last)
        model.set_reshard_after_backward(last or not keep_gathered)
    yield


# ---- pipelines, and tensor parallelism within their stages -----------------------------------------------------------


def pipelined(cut: Sequence[int] | None = None) -> Any:
    """Return a builder of steps with torch.distributed.pipelining; cut: the number of blocks of each stage."""

    def build(size: Size, layout: Layout, weights: Weights) -> TrainingStep:
        mesh = init_device_mesh("cpu", (layout.pp, layout.tp), mesh_dim_names=("pp", "tp"))
        schedule = build_schedule(layout.schedule, layout.pp, layout.microbatches, layout.stages_per_rank)
        assert cut is not None and len(cut) == schedule.num_stages
        models = {
            i: PlainGPT(size, sum(cut[:i]), sum(cut[: i + 1]), i == len(cut) - 1).load(weights)
            for i in stages_of(schedule.placement, mesh.get_local_rank("pp"))
        }
        if layout.tp > 1:
            for model in models.values():
                shard_layers(model, mesh["tp"], layout.sequence_parallel, False)
        tie_gradients = tie_ends(models, len(cut) - 1, mesh)
        parameters = {id(p): p for model in models.values() for p in model.parameters()}
        optimizer = adamw(list(parameters.values()))
        group = mesh["pp"].get_group()
        wrapped = [
            pipelining.PipelineStage(model, i, len(cut), torch.device("cpu"), group=group)
            for i, model in models.items()
        ]
        step = TrainingStep(lambda tokens, target: None, schedule)
        for stage in wrapped:
            watch(stage, step.actions)
        kind = getattr(pipelining.schedules, SCHEDULES[layout.schedule])
        single = issubclass(kind, pipelining.schedules.PipelineScheduleSingle)
        # Divided here, since the engine would divide once for each stage: twice for a table that two stages share.
        engine = kind(
            wrapped[0] if single else wrapped,
            layout.microbatches,
            scale_grads=False,
            loss_fn=lambda logits, target: mean_loss(logits, target) / layout.microbatches,
        )

        def run(tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor | None:
            step.actions.clear()
            losses: list[torch.Tensor] = []
            inputs = (tokens,) if 0 in models else ()
            # By default torch keeps all logits until the end of the step.
            options: dict[str, Any] = {"return_outputs": False}
            if len(cut) - 1 in models:
                options |= {"target": target, "losses": losses}
            engine.step(*inputs, **options)
            tie_gradients()
            optimizer.step()
            optimizer.zero_grad()
            return torch.stack(losses).detach().sum() if losses else None

        step.run = run
        return step

    return build


def tie_ends(models: dict[int, PlainGPT], last: int, mesh: DeviceMesh) -> Callable[[], None]:
    """Tie the token tables of the first and the last stage; return the function that sums their gradients."""
    ends = [models[i] for i in (0, last) if i in models]
    if len(ends) == 2:  # on one rank
        ends[1].head.weight = ends[0].embedding.token_embedding.weight
        return lambda: None
    group = mesh["pp"].get_group()
    members = dist.get_process_group_ranks(group)
    both = dist.new_subgroups_by_enumeration([[members[0], members[-1]]])[0] if len(members) > 2 else group

    def sum_gradients() -> None:
        for model in ends:
            weight: Any = model.tied_weight()
            if isinstance(weight, DTensor):  # its gradient may have another placement
                weight.grad = weight.grad.redistribute(placements=weight.placements)
            gradient = weight.grad.to_local() if isinstance(weight, DTensor) else weight.grad
            dist.all_reduce(gradient, group=both)

    return sum_gradients


def watch(stage: Any, actions: list[tuple[int, str, float]]) -> None:
    """Record when torch's engine runs a stage."""

    def timed(method: Callable[..., Any], kind_of: Callable[..., str]) -> Callable[..., Any]:
        def call(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            result = method(*args, **options)
            actions.append((stage.stage_index, kind_of(**options), time.perf_counter() - start))
            return result

        return call

    stage.forward_one_chunk = timed(stage.forward_one_chunk, lambda **_: "F")
    stage.backward_one_chunk = timed(
        stage.backward_one_chunk, lambda full_backward=True, **_: "B" if full_backward else "I"
    )
    stage.backward_weight_one_chunk = timed(stage.backward_weight_one_chunk, lambda **_: "W")
