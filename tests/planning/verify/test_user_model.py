"""Start here when `fm.verify` calls a user's right module wrong, or does not name the fault of a wrong module."""

import re
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.collectives import all_reduce_identity
from fused_megatron.tensor_parallel import ColumnParallelLinear, SequenceParallelLayerNorm, row_parallel_linear

WIDTH = 16
X = torch.randn(4, 6, WIDTH, generator=torch.Generator().manual_seed(1))
BATCH = {"x": X, "target": X.flip(0)}


class Block(nn.Module):
    """A norm, a column-parallel layer, GELU, a hand-written row-parallel product, a residual, and a loss."""

    def __init__(self, mesh: Any, sums: int = 1, passes_gradient: bool = True) -> None:
        super().__init__()
        self.group = None if mesh is None else mesh.tp_group
        self.sums, self.passes_gradient = sums, passes_gradient
        self.norm = SequenceParallelLayerNorm(WIDTH, tp_group=self.group)
        self.up = ColumnParallelLinear(WIDTH, 32, tp_group=self.group, init_std=0.3)
        self.down = fm.tensor_parallel.RowParallelLinear(32, WIDTH, bias=False, tp_group=self.group, init_std=0.3)

    def forward(self, x: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        if not self.passes_gradient:
            h = h.detach() + (h - h.detach()) / fm.collectives.group_size(self.group)
        h = F.gelu(self.up(h))
        if self.sums == 1:
            y = self.down(h)
        else:
            y = row_parallel_linear(h, self.down.weight, tp_group=None)
            for _ in range(self.sums):
                y = all_reduce_identity(y, self.group)
        return (x + y - target).square().mean()


def right(mesh: Any) -> nn.Module:
    return Block(mesh)


def summed_twice(mesh: Any) -> nn.Module:
    return Block(mesh, sums=2)


def not_summed(mesh: Any) -> nn.Module:
    return Block(mesh, sums=0)


def gradient_divided(mesh: Any) -> nn.Module:
    return Block(mesh, passes_gradient=False)


def average_over_replicas(model: nn.Module, mesh: Any) -> None:
    for parameter in model.parameters():
        if parameter.grad is not None:
            dist.all_reduce(parameter.grad, group=mesh.dp_group)
            parameter.grad /= mesh.dp_size


def test_a_hand_written_block_is_right_and_a_wrong_all_reduce_in_it_is_named() -> None:
    result = fm.verify(right, {"tp": 2}, BATCH)
    assert result and result.first_difference is None, result.table()
    for wrong in (summed_twice, not_summed):
        result = fm.verify(wrong, {"tensor_parallel_size": 2}, BATCH)
        assert not result and result.first_difference.described == "loss of step 1", result.table()
        assert "likely axis: tensor parallel" in result.table()
        assert "first output that differs: none (submodules compared: 1" in result.table()
    result = fm.verify(gradient_divided, {"tp": 2}, BATCH)
    assert result.first_difference.described == "gradient of norm.bias in step 1", result.table()


def test_gradients_that_replicas_do_not_average_are_found_and_the_axis_with_them() -> None:
    result = fm.verify(right, {"tp": 2, "dp": 2}, BATCH)
    assert not result and result.first_difference.kind == "gradient"
    assert "likely axis: data parallel; by itself right: tensor parallel" in result.table()
    assert fm.verify(right, {"dp": 2, "tp": 1}, BATCH, reduce_gradients=average_over_replicas)


def gpt2(mesh: Any) -> nn.Module:
    model = GPT2LMHeadModel(
        GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=61, n_positions=32, bos_token_id=0, eos_token_id=0)
    )
    return model if mesh is None else fm.parallelize(model, mesh)


def llama(mesh: Any) -> nn.Module:
    model = LlamaForCausalLM(
        LlamaConfig(
            num_hidden_layers=2,
            hidden_size=32,
            intermediate_size=48,
            num_attention_heads=4,
            num_key_value_heads=1,
            vocab_size=61,
        )
    )
    return model if mesh is None else fm.parallelize(model, mesh, sequence_parallel=True)


def wrongly_parallel(mesh: Any) -> nn.Module:
    """Return a right sharded model with a hook that wrongly scales the output of the last norm on every rank."""
    model = gpt2(mesh)
    if mesh is not None:
        model.transformer.ln_f.register_forward_hook(lambda module, inputs, output: mesh.tp_size * output)
    return model


@pytest.mark.parametrize("build_model", [gpt2, pytest.param(llama, marks=pytest.mark.slow)])
def test_a_hugging_face_model_in_shards_is_right(build_model: Any) -> None:
    ids = torch.arange(2 * 12).view(2, 12) * 7 % 61
    result = fm.verify(build_model, {"tp": 2}, {"input_ids": ids, "labels": ids})
    assert result, result.table()


@pytest.mark.slow
def test_what_is_wrong_in_a_hugging_face_model_is_named() -> None:
    ids = torch.arange(2 * 12).view(2, 12) * 7 % 61
    result = fm.verify(wrongly_parallel, {"tp": 2}, {"input_ids": ids, "labels": ids})
    assert not result and "first output that differs: output of transformer.ln_f" in result.table()


def returns_rows(mesh: Any) -> nn.Module:
    return nn.Linear(WIDTH, 1)


def test_bad_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*arguments: Any, **options: Any) -> str:
        with pytest.raises(InputError) as caught:
            fm.verify(*arguments, **options)
        return str(caught.value)

    assert "'xp' must be one of tp, dp, cp, ep, etp, pp" in said(right, {"xp": 2}, BATCH)
    assert "is 16 ranks: 2 to 8 wanted" in said(right, {"tp": 16}, BATCH)
    assert "is 1 ranks" in said(right, {"tp": 1}, BATCH)
    assert "pp must be 1" in said(right, {"pp": 2}, BATCH)
    assert "must be a whole number" in said(right, {"tp": 2.0}, BATCH)
    nested = said(lambda mesh: None, {"tp": 2}, X)
    assert re.search("build_model=.*lambda.* must be a function at the top level", nested)
    assert "build_model=3 must be a function" in said(3, {"tp": 2}, BATCH)
    assert "cannot be sent to the ranks" in said(right, {"tp": 2}, {"x": (i for i in range(3))})
    assert "build_model(None) on one process: raised on rank 0: InputError: the loss is (4, 6, 1)" in said(
        returns_rows, {"tp": 2}, X
    )
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "fm.verify starts its own ranks" in said(right, {"tp": 2}, BATCH)
