"""Sharded embeddings with the options that existing models use: padding_idx, a scale, one column per attention head."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fused_megatron.collectives import Group, group_rank, group_size
from fused_megatron.tensor_parallel import ParameterShard, ShardedModule, VocabParallelEmbedding

# Token ids that embedding_scale looks up in an unknown embedding.
_NUM_TRIAL_IDS = 4


class Embedding(VocabParallelEmbedding):
    """An embedding sharded over the vocabulary, with the padding_idx of torch.nn.Embedding.

    Attributes:
        padding_idx: token id whose row gets no gradient; None for no such row.
        scale: factor of all rows (Gemma, BART); None for no factor.
    """

    padding_idx: int | None = None
    scale: torch.Tensor | None

    @torch.compiler.disable(reason="a collective of fused_megatron")
    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids [...]; returns their rows [..., H]."""
        y = super().forward(ids)
        if self.padding_idx is not None and y.requires_grad:
            # torch.nn.Embedding gives the row of padding_idx no gradient.
            y = y.where((ids != self.padding_idx).unsqueeze(-1), y.detach())
        return y if self.scale is None else y * self.scale


class ColumnEmbedding(ShardedModule):
    """A table with one column per attention head (T5's relative position bias); each rank has the columns of its heads.

    weight_shard [num_embeddings, num_heads / R].
    """

    def __init__(self, old: nn.Embedding, *, tp_group: Group) -> None:
        super().__init__()
        self.num_embeddings = old.num_embeddings
        self.tp_group = tp_group
        columns = old.embedding_dim // group_size(tp_group)
        shard = ParameterShard(tuple(old.weight.shape), (0, group_rank(tp_group) * columns))
        weight = torch.empty((old.num_embeddings, columns), device="meta", dtype=old.weight.dtype)
        self.register_shard("weight", nn.Parameter(weight), shard)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Look up ids [...]; returns this rank's columns [..., num_heads / R]."""
        weight: torch.Tensor = self.get_parameter("weight")
        return F.embedding(ids, weight)


def embedding_scale(module: nn.Module) -> torch.Tensor | None:
    """Return the factor by which an unknown subclass of nn.Embedding multiplies rows, in the dtype of its weight.

    Two trial look-ups with known weights find it. None: the module computes something else.
    """
    if not isinstance(module, nn.Embedding) or list(module._parameters) != ["weight"] or module._modules:
        return None
    if "forward" in module.__dict__ or any(b is None or b.is_meta for b in module._buffers.values()):
        return None
    width = module.embedding_dim
    dtype = module.weight.dtype
    device = next((b.device for b in module._buffers.values() if b is not None), torch.device("cpu"))
    ids = torch.arange(_NUM_TRIAL_IDS, device=device)
    ones = _look_up(module, torch.ones(_NUM_TRIAL_IDS, width, dtype=dtype, device=device), ids)
    if ones is None or not bool((ones == ones.flatten()[0]).all()):
        return None
    scale = ones.flatten()[0].clone()
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(_NUM_TRIAL_IDS, width, generator=generator, device="cpu").to(device, dtype)
    rows = _look_up(module, weight, ids)
    return scale if rows is not None and torch.equal(rows, weight * scale) else None


def _look_up(module: nn.Embedding, weight: torch.Tensor, ids: torch.Tensor) -> torch.Tensor | None:
    """Look up ids in a copy of the module that has this weight and no hooks; None if that fails."""
    own = nn.Module().__dict__
    twin: Any = type(module).__new__(type(module))
    twin.__dict__ = {**own, **{k: v for k, v in module.__dict__.items() if k not in own}, "training": False}
    twin._buffers = dict(module._buffers)
    twin.__dict__ |= {"num_embeddings": len(weight), "padding_idx": None}
    twin.weight = nn.Parameter(weight, requires_grad=False)
    try:
        result = twin(ids)
    except Exception:  # the forward is not ours and may raise anything: leave such a module as it is
        return None
    good = isinstance(result, torch.Tensor) and result.shape == weight.shape and result.dtype == weight.dtype
    return result if good else None
