"""Start here when a block of the GPT launches more kernels than it did: an op, a copy or a sum of gradients is new."""

from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fused_megatron as fm
from fused_megatron.config import GPTConfig
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.mesh import ParallelLayout
from fused_megatron.models import GPT
from fused_megatron.models.dropout import BatchSlice
from fused_megatron.sharding import Replicas
from fused_megatron.tensor_parallel import VocabParallelEmbedding

# Ops without a kernel, although torch does not call them views.
_NO_KERNEL = ("aten::_unsafe_view", "aten::empty", "aten::new_empty", "aten::empty_like", "aten::detach")


class Kernels(TorchDispatchMode):
    """Count of the ops that launch a kernel on the meta device, which stands for a GPU; collectives are no kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        outputs = func(*args, **(kwargs or {}))
        name = func._schema.name
        on_device = any(isinstance(x, torch.Tensor) and x.is_meta for x in tree_leaves((args, kwargs, outputs)))
        if on_device and not func.is_view and name not in _NO_KERNEL and not name.startswith("c10d::"):
            self.counts[name] += 1
        return outputs


@pytest.fixture(autouse=True)
def attention_is_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let torch's attention choose the kernel that it chooses on a GPU; on the meta device it has no choice."""

    def attention(query: Any, key: Any, value: Any, *, is_causal: bool, **_: Any) -> Any:
        return torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, 0.0, is_causal)[0]

    monkeypatch.setattr(F, "scaled_dot_product_attention", attention)


@pytest.fixture
def two_fake_ranks() -> Any:
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield fm.init_mesh(tensor_parallel_size=2)
    dist.destroy_process_group()


def kernels_of_a_block(layout: ParallelLayout, form: dict[str, Any]) -> tuple[Counter[str], Counter[str]]:
    """Return the kernels that one more block adds to forward, and to backward."""
    found = []
    for num_layers in (2, 3):
        config = GPTConfig(num_layers=num_layers, hidden_size=64, num_heads=4, seq_len=16, vocab_size=104, **form)
        model = GPT(config, device="meta", dtype=torch.bfloat16, layout=layout)
        buckets = GradientBuckets(list(model.parameters()), Replicas())
        tokens = torch.zeros(16, 2, dtype=torch.int64, device="meta").t()
        with Kernels() as forward:
            loss = model(tokens, tokens, batch_slice=BatchSlice(0, 0, 2), reduction="sum")
        with Kernels() as backward:
            loss.backward()
        del buckets  # their hooks count, too
        found.append((forward.counts, backward.counts))
    (forward_2, backward_2), (forward_3, backward_3) = found
    return forward_3 - forward_2, backward_3 - backward_2


LLAMA = {
    "position": "rotary",
    "normalization": "rms_norm",
    "num_kv_heads": 2,
    "linear_biases": False,
    "activation": "swiglu",
}
# Kernels of a block in forward and in backward, the most that a change may leave.
MOST = {
    "gpt": ({}, 10, 29),
    "dropout": ({"hidden_dropout": 0.1}, 10, 29),
    "recomputed": ({"recompute": "full"}, 10, 39),
    "llama": (LLAMA, 9, 17),
    "head norms": ({**LLAMA, "query_key_norm": True}, 9, 18),
}


@pytest.mark.parametrize("sequence_parallel", [False, True])
@pytest.mark.parametrize("name", MOST)
def test_kernels_of_a_block(two_fake_ranks: Any, name: str, sequence_parallel: bool) -> None:
    form, in_forward, in_backward = MOST[name]
    layout = two_fake_ranks.layout(sequence_parallel=sequence_parallel)
    forward, backward = kernels_of_a_block(layout, form)
    assert (forward.total(), backward.total()) == (in_forward, in_backward), (forward, backward)
    # Every sum of two gradients of the residual stream is part of a norm's backward.
    assert not forward["aten::add"] and not backward["aten::add"]


def test_rotary_tables_cost_kernels_in_the_first_forward_only(two_fake_ranks: Any) -> None:
    layout = two_fake_ranks.layout(sequence_parallel=True)
    config = GPTConfig(num_layers=2, hidden_size=64, num_heads=4, seq_len=16, vocab_size=104, **LLAMA)
    model = GPT(config, device="meta", dtype=torch.bfloat16, layout=layout)
    tokens = torch.zeros(16, 2, dtype=torch.int64, device="meta").t()
    counts = []
    for _ in range(2):
        with Kernels() as forward:
            model(tokens, tokens, reduction="sum")
        counts.append(forward.counts)
    of_tables = counts[0] - counts[1]
    assert of_tables.total() == 14 and of_tables["aten::cos"] == of_tables["aten::sin"] == 1, of_tables
    assert not counts[1]["aten::cos"] and not counts[1]["aten::arange"]


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_kernels_of_an_embedding(two_fake_ranks: Any, sequence_parallel: bool) -> None:
    """Backward sorts the tokens, then adds them to main_grad: nothing of the size of the table is made."""
    group = two_fake_ranks.layout().tp_group
    embedding = VocabParallelEmbedding(
        104, 64, tp_group=group, sequence_parallel=sequence_parallel, device="meta", dtype=torch.bfloat16
    )
    buckets = GradientBuckets(list(embedding.parameters()), Replicas())
    ids = torch.zeros(16, 2, dtype=torch.int64, device="meta")
    with Kernels() as forward:
        y = embedding(ids)
    with Kernels() as backward:
        y.backward(torch.empty_like(y))
    del buckets
    assert forward.counts == {"fused_megatron::vocab_embedding_forward": 1}
    assert backward.counts == {"fused_megatron::vocab_embedding_backward_": 1}
