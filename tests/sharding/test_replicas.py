"""Start here when weights on several ranks drift apart unnoticed, or equal weights are reported as different."""

import pytest
import torch
from torch import nn

import fused_megatron as fm
from fused_megatron.config import GPTConfig
from fused_megatron.models import GPT
from fused_megatron.sharding.replicas import find_drift, parameter_digests
from fused_megatron.testing.run_on_ranks import run_on_ranks

# Both tensor-parallel ranks hold the key-value head; the last of 4 vocabulary shards has padding only.
CONFIG = GPTConfig(
    num_layers=1,
    hidden_size=16,
    num_heads=4,
    num_kv_heads=1,
    seq_len=8,
    vocab_size=33,
    pad_vocab_size_to_multiple_of=32,
)


def drifts(rank, world_size):
    """Return the difference that this rank finds, by the parameter that rank 3 changes."""
    found = {}
    for tp in (1, 2, 4):
        mesh = fm.init_mesh(tensor_parallel_size=tp)
        model = GPT(CONFIG, layout=mesh.layout())
        parameters = dict(model.named_parameters())
        groups = mesh.dp_group, (mesh.tp_group, mesh.pp_group)
        assert find_drift(parameters, *groups) is None
        names = ("final_norm.weight", "blocks.0.attention.query_key_value.weight", "token_embedding.weight")
        for name in names:
            with torch.no_grad():
                row = -1 if "attention" in name else 0  # the last row belongs to the value
                before = parameters[name][row].clone()
                parameters[name][row] += 0.5 * (rank == 3)
            found[tp, name.split(".")[-2]] = find_drift(parameters, *groups)
            parameters[name].data[row] = before
    return found


def test_what_differs_is_named_on_the_ranks_that_hold_it():
    every = run_on_ranks(drifts, 4, timeout_s=100)
    value = "blocks.0.attention.query_key_value.weight.value"
    for rank, found in enumerate(every):
        # At tp=1 all ranks are replicas; at tp=2 only the ranks with the parts of tensor-parallel rank 1 are.
        for name, key in (("final_norm.weight", "final_norm"), ("token_embedding.weight", "token_embedding")):
            assert found[1, key] == f"{name} on rank 3 differs from rank 0, 1, 2"
        assert found[1, "query_key_value"] == f"{value} on rank 3 differs from rank 0, 1, 2"
        assert (found[2, "token_embedding"] is None) == (rank in (0, 2)), found
        assert found[4, "final_norm"] == "final_norm.weight on rank 3 differs from rank 0, 1, 2"
        assert found[4, "query_key_value"] == f"{value} on rank 3 differs from rank 0, 1, 2"
        assert found[4, "token_embedding"] is None
    assert every[3][2, "token_embedding"].endswith(" on rank 3 differs from rank 1")
    assert every[1] == every[3]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_single_bit_changes_the_digest(dtype):
    """Flip a bit anywhere in tensors of several sizes and memory offsets."""
    memory = torch.randn(64).to(dtype)
    for start, size in ((0, 1), (1, 5), (3, 16), (2, 0), (5, 33)):
        weight = nn.Parameter(memory[start : start + size])
        before = parameter_digests({"weight": weight})
        assert list(before) == ["weight"]
        bits = weight.data.view(torch.uint8)
        for position in range(bits.numel()):
            bits[position] ^= 4
            assert parameter_digests({"weight": weight}) != before
            bits[position] ^= 4
        assert parameter_digests({"weight": weight}) == before
