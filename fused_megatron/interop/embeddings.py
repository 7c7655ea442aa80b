"""Embeddings in shards, of the kinds that models have: with a padding word, times a number, with a feature a head."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.tensor_parallel import ParameterShard, ShardedModule, VocabParallelEmbedding

# Words that the trial of a strange embedding looks up.
_WORDS = 4


class Embedding(VocabParallelEmbedding):
    """A model's embedding in shards of its vocabulary, with torch.nn.Embedding's padding_idx.

    Attributes:
        scale: what the rows are multiplied by (Gemma, BART); None where they are not.
    """

    padding_idx: int | None = None
    scale: torch.Tensor | None

    @torch.compiler.disable(reason="a collective of fused_megatron")
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] to their rows [..., H]."""
        y = super().forward(ids)
        if self.padding_idx is not None and y.requires_grad:
            # torch gives the padding word's row no gradient.
            y = y.where((ids != self.padding_idx).unsqueeze(-1), y.detach())
        return y if self.scale is None else y * self.scale


class ColumnEmbedding(ShardedModule):
    """A table with a column for every head, of which a rank has those of its heads: T5's bias of relative positions."""

    def __init__(self, old: nn.Embedding, *, tp_group: Group) -> None:
        super().__init__()
        self.num_embeddings, self.tp_group = old.num_embeddings, tp_group
        columns = old.embedding_dim // group_size(tp_group)
        shard = ParameterShard(tuple(old.weight.shape), (0, group_rank(tp_group) * columns))
        weight = torch.empty((old.num_embeddings, columns), device="meta", dtype=old.weight.dtype)
        self.register_shard("weight", nn.Parameter(weight), shard)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """ids [...] to this rank's features [..., heads / R]."""
        weight: torch.Tensor = self.get_parameter("weight")
        return F.embedding(ids, weight)


def embedding_scale(module: nn.Module) -> torch.Tensor | None:
    """The number that a strange embedding multiplies rows by, in the dtype of its weight; None if it does otherwise.

    Found by trial: a twin with another weight looks up a few words.
    """
    if not isinstance(module, nn.Embedding) or list(module._parameters) != ["weight"] or module._modules:
        return None
    if "forward" in module.__dict__ or any(b is None or b.is_meta for b in module._buffers.values()):
        return None
    width, dtype = module.embedding_dim, module.weight.dtype
    device = next((b.device for b in module._buffers.values() if b is not None), torch.device("cpu"))
    ids = torch.arange(_WORDS, device=device)
    ones = _looked_up(module, torch.ones(_WORDS, width, dtype=dtype, device=device), ids)
    if ones is None or not bool((ones == ones.flatten()[0]).all()):
        return None
    scale = ones.flatten()[0].clone()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_WORDS, width, generator=generator, device="cpu").to(device, dtype)
    rows = _looked_up(module, weight, ids)
    return scale if rows is not None and torch.equal(rows, weight * scale) else None


def _looked_up(module: nn.Embedding, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor | None:
    """What a twin of the module with this weight, and without its hooks, gives for the ids."""
    own = nn.Module().__dict__
    twin: Any = type(module).__new__(type(module))
    twin.__dict__ = {**own, **{k: v for k, v in module.__dict__.items() if k not in own}, "training": False}
    twin._buffers = dict(module._buffers)
    twin.__dict__ |= {"num_embeddings": len(weight), "padding_idx": None}
    twin.weight = nn.Parameter(weight, requires_grad=False)
    try:
        result = twin(ids)
    except Exception:  # whatever a stranger's forward raises: it is left as it is
        return None
    good = isinstance(result, torch.Tensor) and result.shape == weight.shape and result.dtype == weight.dtype
    return result if good else None
