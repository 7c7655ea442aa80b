"""The providers of gpt_against_peers.py: one GPT as several libraries train it, from the same full weights.

A provider is a function (size, full weights) -> step; step(tokens, target) makes one training step and returns its
loss. An ImportError says that the library is missing.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor import parallel as tp

from fused_megatron.config import GPTConfig, OptimizerConfig
from fused_megatron.models import GPT
from fused_megatron.tensor_parallel import parameter_parts
from fused_megatron.training.gradients import GradientBuckets
from fused_megatron.training.optimizer import Optimizer

Weights = dict[str, torch.Tensor]
Step = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


@dataclass(frozen=True)
class Size:
    """Of the model and its batch."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    seq_len: int
    batch_size: int

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers, hidden {self.hidden_size}, vocabulary {self.vocab_size}, "
            f"{self.batch_size} sequences of {self.seq_len}"
        )


Build = Callable[[Size, Weights], Step]


def of_world(world_size: int) -> dict[str, Build]:
    """By name; the first word is the library's."""
    if world_size == 1:
        return {"ours": ours(False), "Hugging Face GPT-2 eager": hugging_face_step, "plain torch": plain_step}
    ways: dict[str, Build] = {"ours": ours(False), "ours, sequence parallel": ours(True)}
    for sequence_parallel in (False, True):
        suffix = ", sequence parallel" * sequence_parallel
        ways[f"DTensor{suffix}"] = dtensor(sequence_parallel, False)
        ways[f"DTensor{suffix}, loss_parallel"] = dtensor(sequence_parallel, True)
    return ways | {"megatron-core": megatron(False), "megatron-core, sequence parallel": megatron(True)}


def batch(size: Size) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens and targets [B, S], the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size.vocab_size, (size.batch_size, size.seq_len + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def full_weights(size: Size) -> Weights:
    """By the names of PlainGPT."""
    generator = torch.Generator().manual_seed(2)
    with torch.device("meta"):
        shapes = {name: p.shape for name, p in PlainGPT(size).named_parameters()}
    weights = {}
    for name, shape in shapes.items():
        drawn = 0.02 * torch.randn(shape, generator=generator)
        weights[name] = drawn + 1.0 if "norm" in name and name.endswith("weight") else drawn
    return weights


def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """As ours: matrices alone decay. DTensors and plain tensors cannot share a fused update."""
    groups: dict[tuple[bool, type], list[nn.Parameter]] = {}
    for p in parameters:
        groups.setdefault((p.dim() >= 2, type(p.data)), []).append(p)
    return torch.optim.AdamW(
        [{"params": some, "weight_decay": WEIGHT_DECAY * decayed} for (decayed, _), some in groups.items()],
        lr=LR, betas=BETAS, eps=EPS, fused=True,
    )  # fmt: skip


def step_of(model: nn.Module, loss_of: Callable[..., torch.Tensor], backward_context: Any = None) -> Step:
    """A training step as a user of torch writes it."""
    optimizer = adamw(list(model.parameters()))

    def step(tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        with backward_context() if backward_context else contextlib.nullcontext():
            loss = loss_of(tokens, target)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


# ---- ours ------------------------------------------------------------------------------------------------------------


def ours(sequence_parallel: bool) -> Build:
    """The GPT, the gradient buckets and the optimizer of the trainer."""

    def build(size: Size, weights: Weights) -> Step:
        group = dist.group.WORLD if dist.get_world_size() > 1 else None
        config = GPTConfig(
            num_layers=size.num_layers, hidden_size=size.hidden_size, num_heads=size.num_heads, seq_len=size.seq_len,
            vocab_size=size.vocab_size,
        )  # fmt: skip
        model = GPT(config, tp_group=group, sequence_parallel=sequence_parallel)
        for name, parameter in model.named_parameters():
            (part,) = parameter_parts(parameter)
            box = tuple(slice(*edges) for edges in part.shard.box(parameter.shape))
            parameter.detach().copy_(weights[name if name in weights else f"{name}.weight"][box])
        gradients = GradientBuckets(list(model.parameters()), None)
        settings = OptimizerConfig(lr=LR, beta1=BETAS[0], beta2=BETAS[1], eps=EPS, weight_decay=WEIGHT_DECAY)
        optimizer = Optimizer(dict(model.named_parameters()), gradients, settings)

        def step(tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            gradients.zero_()
            gradients.reduce_after_backwards(1)
            loss = model(tokens, target, reduction="sum") / target.numel()
            loss.backward()
            gradients.finish()
            optimizer.step(LR)
            return loss.detach()

        return step

    return build


# ---- plain torch, and its DTensor ------------------------------------------------------------------------------------


class PlainEmbedding(nn.Module):
    """Tokens and positions."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(size.vocab_size, size.hidden_size)
        self.position_embedding = nn.Embedding(size.seq_len, size.hidden_size)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(tokens.shape[1]).unsqueeze(0)
        return self.token_embedding(tokens) + self.position_embedding(positions)


class PlainAttention(nn.Module):
    """Causal; rows of the fused weight are ordered head by head, so that a block of rows is whole heads."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.head_dim = size.hidden_size // size.num_heads
        self.query_key_value = nn.Linear(size.hidden_size, 3 * size.hidden_size)
        self.projection = nn.Linear(size.hidden_size, size.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        qkv = self.query_key_value(x)
        query, key, value = qkv.view(*qkv.shape[:2], -1, 3, self.head_dim).permute(3, 0, 2, 1, 4)
        context = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.projection(context.transpose(1, 2).flatten(2))


class PlainMLP(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.expansion = nn.Linear(size.hidden_size, 4 * size.hidden_size)
        self.projection = nn.Linear(4 * size.hidden_size, size.hidden_size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.projection(F.gelu(self.expansion(x), approximate="tanh"))


class PlainBlock(nn.Module):
    def __init__(self, size: Size) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(size.hidden_size)
        self.attention = PlainAttention(size)
        self.mlp_norm = nn.LayerNorm(size.hidden_size)
        self.mlp = PlainMLP(size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class PlainGPT(nn.Module):
    """As a user of torch writes it: [B, S] to logits [B, S, V]; the head is the table of the embedding."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.embedding = PlainEmbedding(size)
        self.blocks = nn.ModuleList(PlainBlock(size) for _ in range(size.num_layers))
        self.final_norm = nn.LayerNorm(size.hidden_size)
        self.head = nn.Linear(size.hidden_size, size.vocab_size, bias=False)
        self.tie()

    def tie(self) -> None:
        """Again after the weights were replaced."""
        self.head.weight = self.embedding.token_embedding.weight

    def named_parameters(self, *args: Any, **options: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """By the names of our GPT, but for .weight of the positions."""
        for name, parameter in super().named_parameters(*args, **options):
            yield name.removeprefix("embedding."), parameter

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.final_norm(x))


def plain_model(size: Size, weights: Weights) -> PlainGPT:
    model = PlainGPT(size)
    for name, parameter in model.named_parameters():
        parameter.detach().copy_(weights[name])
    return model


def mean_loss(model: nn.Module) -> Callable[..., torch.Tensor]:
    return lambda tokens, target: F.cross_entropy(model(tokens).flatten(0, 1), target.flatten())


def plain_step(size: Size, weights: Weights) -> Step:
    """One rank, nothing sharded."""
    model = plain_model(size, weights)
    return step_of(model, mean_loss(model))


def dtensor(sequence_parallel: bool, loss_parallel: bool) -> Build:
    """PlainGPT by torch.distributed.tensor.parallel.parallelize_module, as its tutorial has it."""

    def build(size: Size, weights: Weights) -> Step:
        mesh = init_device_mesh("cpu", (dist.get_world_size(),))
        model = plain_model(size, weights)
        between = Shard(1) if sequence_parallel else Replicate()
        column, row = tp.ColwiseParallel(input_layouts=between), tp.RowwiseParallel(output_layouts=between)
        embedding = tp.RowwiseParallel(input_layouts=Replicate(), output_layouts=between)
        plan: dict[str, Any] = {
            "embedding.token_embedding": embedding,
            "embedding.position_embedding": embedding,
            "blocks.*.attention.query_key_value": column,
            "blocks.*.attention.projection": row,
            "blocks.*.mlp.expansion": column,
            "blocks.*.mlp.projection": row,
            "head": tp.ColwiseParallel(
                input_layouts=between,
                output_layouts=Shard(-1) if loss_parallel else Replicate(),
                use_local_output=not loss_parallel,
            ),
        }
        if sequence_parallel:
            plan |= {name: tp.SequenceParallel() for name in ("blocks.*.attention_norm", "blocks.*.mlp_norm")}
            plan["final_norm"] = tp.SequenceParallel()
        tp.parallelize_module(model, mesh, plan)
        model.tie()
        return step_of(model, mean_loss(model), tp.loss_parallel if loss_parallel else None)

    return build


# ---- megatron-core ---------------------------------------------------------------------------------------------------


def megatron(sequence_parallel: bool) -> Build:
    """megatron-core's GPTModel of its local layers, which need neither Apex nor TransformerEngine."""

    def build(size: Size, weights: Weights) -> Step:
        with on_the_cpu():
            model = megatron_model(size, sequence_parallel)
            for name, parameter in model.named_parameters():
                load_megatron(name, parameter, weights)
        positions = torch.arange(size.seq_len).expand(size.batch_size, -1)
        future = torch.ones(1, 1, size.seq_len, size.seq_len, dtype=torch.bool).triu(1)

        def loss_of(tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            return model(tokens, positions, future, labels=target).mean()

        return step_of(model, loss_of, on_the_cpu)

    return build


def megatron_model(size: Size, sequence_parallel: bool) -> nn.Module:
    parallel_state = import_module("megatron.core.parallel_state")
    gpt = import_module("megatron.core.models.gpt")
    specs = import_module("megatron.core.models.gpt.gpt_layer_specs")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=dist.get_world_size())
    config = import_module("megatron.core.transformer").TransformerConfig(
        num_layers=size.num_layers, hidden_size=size.hidden_size, num_attention_heads=size.num_heads,
        tensor_model_parallel_size=dist.get_world_size(), sequence_parallel=sequence_parallel, hidden_dropout=0.0,
        attention_dropout=0.0, use_cpu_initialization=True, gradient_accumulation_fusion=False,
        bias_activation_fusion=True, bias_dropout_fusion=True, masked_softmax_fusion=False,
    )  # fmt: skip
    spec = specs.get_gpt_layer_local_spec()
    return gpt.GPTModel(config, spec, size.vocab_size, size.seq_len, share_embeddings_and_output_weights=True)


_MEGATRON_NAMES = {
    "embedding.word_embeddings": "token_embedding",
    "embedding.position_embeddings": "position_embedding",
    "decoder.layers": "blocks",
    "input_layernorm": "attention_norm",
    "self_attention.linear_qkv": "attention.query_key_value",
    "self_attention.linear_proj": "attention.projection",
    "pre_mlp_layernorm": "mlp_norm",
    "linear_fc1": "expansion",
    "linear_fc2": "projection",
    "decoder.final_layernorm": "final_norm",
}


def load_megatron(name: str, parameter: nn.Parameter, weights: Weights) -> None:
    """This rank's shard: a block of the one dim in which the shapes differ."""
    for theirs, ours_name in _MEGATRON_NAMES.items():
        name = name.replace(theirs, ours_name)
    full = weights[name]
    for dim, (local, whole) in enumerate(zip(parameter.shape, full.shape, strict=True)):
        full = full if local == whole else full.narrow(dim, dist.get_rank() * local, local)
    parameter.detach().copy_(full)


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """megatron-core asks CUDA for its device and its generators everywhere: the answers for a CPU, without dropout."""
    random = import_module("megatron.core.tensor_parallel.random")
    no_fork = patch.object(random.CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
    with patch("torch.cuda.current_device", lambda: torch.device("cpu")), no_fork:
        yield


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face_step(size: Size, weights: Weights) -> Step:
    """GPT-2 of transformers, without torch.compile, with torch's attention kernel."""
    library = import_module("transformers")
    config = library.GPT2Config(
        vocab_size=size.vocab_size, n_positions=size.seq_len, n_embd=size.hidden_size, n_layer=size.num_layers,
        n_head=size.num_heads, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False,
        attn_implementation="sdpa", bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    model = library.GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        for theirs, ours_name in _HUGGING_FACE_NAMES.items():
            name = name.replace(theirs, ours_name)
        full = weights[name]
        if "query_key_value" in name:  # its rows: all queries, all keys, all values
            by_head = full.unflatten(0, (size.num_heads, 3, -1))
            full = by_head.transpose(0, 1).flatten(0, 2)
        # Its matrices stand the other way round.
        parameter.detach().copy_(full.t() if full.dim() == 2 and "embedding" not in name else full)

    def loss_of(tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(model(tokens).logits.flatten(0, 1), target.flatten())

    return step_of(model, loss_of)


_HUGGING_FACE_NAMES = {
    "transformer.wte": "token_embedding",
    "transformer.wpe": "position_embedding",
    "transformer.h": "blocks",
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.query_key_value",
    "attn.c_proj": "attention.projection",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.expansion",
    "mlp.c_proj": "mlp.projection",
    "transformer.ln_f": "final_norm",
}
