"""The benchmark GPT in other libraries, and the table of providers for each layout."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import import_module
from unittest.mock import patch

import torch
import torch.distributed as dist
from gpt_layouts import Build, Layout, Size, TrainingStep, Weights
from gpt_of_ours import our_step, train_config
from gpt_of_torch import SCHEDULES, mean_loss, pipelined, plain_step, step_of, torch_step
from products_alone import products_alone, products_and_copies
from torch import nn

from fused_megatron.benchmarking.side_by_side import BOUND, OURS, Bars
from fused_megatron.models.stage_cut import block_cost, cut_stages
from fused_megatron.pipeline import build_schedule


@dataclass(frozen=True)
class Rival:
    """A comparison: ours must be at least `bar` times as fast as the best of these providers.

    Attributes:
        bound: the most times that ours takes of the provider BOUND.
    """

    ways: dict[str, Build]
    bar: float | None = None
    bound: float | None = None


def rivals_of(size: Size, layout: Layout) -> dict[str, Rival]:
    """Return the rivals by name. The first is torch's own equivalent of the layout; for one process, Hugging Face."""
    bars = layout.ranks <= 2
    if layout.ranks == 1:
        return {
            "": Rival({"Hugging Face GPT-2": hugging_face_step}, 1.2),
            "plain torch": Rival({"plain torch": plain_step}),
            LIMIT: Rival(limits(), bound=1.08),
        }
    if layout.pp > 1:
        cuts = cuts_for_torch(size, layout)
        name = f"torch.distributed.pipelining{' + DTensor' * (layout.tp > 1)}"
        known = layout.schedule in SCHEDULES
        return {
            "": Rival(
                {f"{name}, blocks {'+'.join(map(str, cut))}": pipelined(cut) for cut in cuts * known},
                1.05 if bars else None,
            )
        }
    suffix = " + DTensor" * (layout.tp > 1)
    ways = {
        f"FSDP2{suffix}": torch_step(data="fsdp2"),
        f"FSDP2{suffix}, gathered once a step": torch_step(data="fsdp2", keep_gathered=True),
    }
    if layout.zero_stage in (2, 3):
        # FSDP2 in its form with the same memory; one microbatch, since it reduces gradients once a step.
        name, bar = list(ways)[3 - layout.zero_stage], {2: 1.2, 3: 1.3}[layout.zero_stage]
        return {"": Rival({name: ways[name]}, bar if bars else None)}
    if layout.dp > 1:
        return {"": Rival(ways if layout.tp > 1 else {"DDP": torch_step(data="ddp"), **ways}, 1.0 if bars else None)}
    dtensor = {"DTensor": torch_step(), "DTensor, loss_parallel": torch_step(loss_parallel=True)}
    return {
        "": Rival(dtensor, 1.3 if bars else None),
        "megatron-core": Rival({"megatron-core": megatron_step}, 1.15 if bars else None),
        LIMIT: Rival(limits(), bound=1.2 if bars else None),
    }


LIMIT = "products and attention"


def limits() -> dict[str, Build]:
    """Return the parts of our step that no other program of it could leave out."""
    return {"products and attention alone": products_alone, BOUND: products_and_copies}


def ways_of(size: Size, layout: Layout) -> dict[str, Build]:
    """Return ours and all other providers, by name."""
    ways: dict[str, Build] = {OURS: our_step}
    for rival in rivals_of(size, layout).values():
        ways |= rival.ways
    return ways


def bars_of(rival: Rival) -> Bars:
    return Bars(best=rival.bar, bound=rival.bound)


def cuts_for_torch(size: Size, layout: Layout) -> list[tuple[int, ...]]:
    """Return stage cuts (blocks of each stage): our trainer's, and the cuts that minimise the most expensive rank.

    torch's stages may have no blocks. The head costs its product, or 1.5 times that with a loss that is not fused.
    """
    config = train_config(size, layout).model
    placement = build_schedule(layout.schedule, layout.pp, layout.microbatches, layout.stages_per_rank).placement
    cuts = [tuple(span.stop - span.start for span in cut_stages(config, len(placement), placement=placement))]
    for share in (1.0, 1.5):
        head = share * size.hidden_size * size.vocab_size / block_cost(config)
        best = cheapest_cut(size.num_layers, placement, head)
        cuts += [best] if best not in cuts else []
    return cuts


def cheapest_cut(num_layers: int, placement: tuple[int, ...], head: float) -> tuple[int, ...]:
    """Minimise the cost of the most expensive rank, then stage; costs in blocks. The first stage has a block."""
    best: tuple[tuple[float, float], tuple[int, ...]] | None = None
    for cut in cuts_of(num_layers, len(placement)):
        costs = [*cut[:-1], cut[-1] + head]
        ranks = [sum(c for c, owner in zip(costs, placement, strict=True) if owner == r) for r in set(placement)]
        found = ((max(ranks), max(costs)), cut)
        if cut[0] and (best is None or found < best):
            best = found
    assert best is not None
    return best[1]


def cuts_of(num_layers: int, num_stages: int) -> Iterator[tuple[int, ...]]:
    if num_stages == 1:
        yield (num_layers,)
        return
    for first in range(num_layers + 1):
        for rest in cuts_of(num_layers - first, num_stages - 1):
            yield (first, *rest)


# ---- megatron-core ---------------------------------------------------------------------------------------------------


def megatron_step(size: Size, layout: Layout, weights: Weights) -> TrainingStep:
    """Build megatron-core's GPTModel from its local layers, which need neither Apex nor TransformerEngine."""
    with on_the_cpu():
        model = megatron_model(size, layout)
        for name, parameter in model.named_parameters():
            load_megatron(name, parameter, weights)
    positions = torch.arange(size.seq_len).expand(layout.num_sequences(size), -1)
    future = torch.ones(1, 1, size.seq_len, size.seq_len, dtype=torch.bool).triu(1)

    def loss_of(tokens: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        return model(tokens, positions, future, labels=target).mean()

    return step_of(model, loss_of, on_the_cpu)


def megatron_model(size: Size, layout: Layout) -> nn.Module:
    parallel_state = import_module("megatron.core.parallel_state")
    gpt = import_module("megatron.core.models.gpt")
    specs = import_module("megatron.core.models.gpt.gpt_layer_specs")
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=layout.tp)
    config = import_module("megatron.core.transformer").TransformerConfig(
        num_layers=size.num_layers,
        hidden_size=size.hidden_size,
        num_attention_heads=size.num_heads,
        tensor_model_parallel_size=layout.tp,
        sequence_parallel=layout.sequence_parallel,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_activation_fusion=True,
        bias_dropout_fusion=True,
        masked_softmax_fusion=False,
    )
    spec = specs.get_gpt_layer_local_spec()
    return gpt.GPTModel(config, spec, size.vocab_size, size.seq_len, share_embeddings_and_output_weights=True)


_MEGATRON_NAMES = {
    "embedding.word_embeddings": "token_embedding",
    "embedding.position_embeddings.weight": "position_embedding",
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
    """Load this rank's shard: a block of the only dim in which the shapes differ."""
    for theirs, ours_name in _MEGATRON_NAMES.items():
        name = name.replace(theirs, ours_name)
    full = weights[name]
    for dim, (local, whole) in enumerate(zip(parameter.shape, full.shape, strict=True)):
        full = full if local == whole else full.narrow(dim, dist.get_rank() * local, local)
    parameter.detach().copy_(full)


@contextlib.contextmanager
def on_the_cpu() -> Iterator[None]:
    """Answer megatron-core's calls of CUDA (device, generators) for a CPU, without dropout."""
    random = import_module("megatron.core.tensor_parallel.random")
    no_fork = patch.object(random.CudaRNGStatesTracker, "fork", lambda *_: contextlib.nullcontext())
    with patch("torch.cuda.current_device", lambda: torch.device("cpu")), no_fork:
        yield


# ---- Hugging Face ----------------------------------------------------------------------------------------------------


def hugging_face_step(size: Size, layout: Layout, weights: Weights) -> TrainingStep:
    """Build GPT-2 of transformers, without torch.compile, with torch's attention kernel."""
    library = import_module("transformers")
    config = library.GPT2Config(
        vocab_size=size.vocab_size,
        n_positions=size.seq_len,
        n_embd=size.hidden_size,
        n_layer=size.num_layers,
        n_head=size.num_heads,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        attn_implementation="sdpa",
        bos_token_id=0,
        eos_token_id=0,
    )
    model = library.GPT2LMHeadModel(config)
    for name, parameter in model.named_parameters():
        for theirs, ours_name in _HUGGING_FACE_NAMES.items():
            name = name.replace(theirs, ours_name)
        full = weights[name]
        if "query_key_value" in name:  # rows: all queries, all keys, all values
            by_head = full.unflatten(0, (size.num_heads, 3, -1))
            full = by_head.transpose(0, 1).flatten(0, 2)
        # Its matrices are transposed.
        parameter.detach().copy_(full.t() if full.dim() == 2 and "embedding" not in name else full)
    return step_of(model, lambda tokens, target: mean_loss(model(tokens).logits, target))


_HUGGING_FACE_NAMES = {
    "transformer.wte": "token_embedding",
    "transformer.wpe.weight": "position_embedding",
    "transformer.h": "blocks",
    "ln_1": "attention_norm",
    "attn.c_attn": "attention.query_key_value",
    "attn.c_proj": "attention.projection",
    "ln_2": "mlp_norm",
    "mlp.c_fc": "mlp.expansion",
    "mlp.c_proj": "mlp.projection",
    "transformer.ln_f": "final_norm",
}
