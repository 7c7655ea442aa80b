"""Start here when print(model.parallel_report) repeats lines, misses a layer, or prints on every rank."""

import ast
import re

import pytest
import torch
import transformers as hf
import transformers.modeling_utils  # takes seconds: ranks are forked from a process that has it
from torch import nn

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.interop.parallel_report import folded
from fused_megatron.testing import run_on_ranks

# SmolLM2-135M has 9 heads of 64 and 3 key-value heads; here with small heads.
SMOL = {
    "hidden_size": 36,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "vocab_size": 50,
    "max_position_embeddings": 16,
    "tie_word_embeddings": True,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        (["a.0.b", "a.1.b", "a.2.b"], ["a.{0..2}.b"]),
        (["a.0.b", "x", "a.2.b", "a.3.b", "a.9.b"], ["a.{0,2..3,9}.b", "x"]),
        (["a.0.b: 1", "a.1.b: 2"], ["a.0.b: 1", "a.1.b: 2"]),
        (["a.4.b.1", "a.5.b.1"], ["a.{4..5}.b.1"]),
        (["a.0.e.0", "a.0.e.1", "a.1.e.0", "a.1.e.1"], ["a.{0..1}.e.{0..1}"]),
        (["a.0.e.0", "a.0.e.1", "a.1.e.1"], ["a.0.e.0", "a.0.e.1", "a.1.e.1"]),
        (["a.0.q: a.0.x fails", "a.1.q: a.1.x fails"], ["a.{0..1}.q: a.{0..1}.x fails"]),
        (["conv1: size=2", "conv2: size=2"], ["conv1: size=2", "conv2: size=2"]),
        ([], []),
    ],
)
def test_lines_that_differ_in_the_numbers_of_layers_are_one(lines, expected):
    assert folded(lines) == expected


def smol():
    torch.manual_seed(0)
    return hf.LlamaForCausalLM(hf.LlamaConfig(**SMOL))


def printed(rank, world_size):
    mesh = fm.init_mesh(tensor_parallel_size=world_size)
    with pytest.raises(
        InputError, match="num_attention_heads=9 must be divisible by tensor_parallel_size=2"
    ) as refused:
        fm.parallelize(smol(), mesh)
    # The hint, literally, shards everything else.
    plan = ast.literal_eval(re.search(r"plan=(\{.*?\})", str(refused.value)).group(1))
    assert plan == {"*": "default", "self_attn.*": "replicate"}
    original = smol()
    model = fm.parallelize(smol(), mesh, plan, strict=True)
    names = {one.name.rpartition(".")[2] for one in model.parallel_report.sharded}
    assert names == {"gate_proj", "up_proj", "down_proj", "embed_tokens", "lm_head"}, names
    ids = torch.arange(3, 11).view(2, 4)
    ours, theirs = model(ids, labels=ids).loss, original(ids, labels=ids).loss
    torch.testing.assert_close(ours, theirs)

    layer = nn.ModuleDict({"linear1": nn.Linear(6, 9), "linear2": nn.Linear(9, 6)})  # numbered itself: "0.linear1"
    with pytest.raises(InputError, match=r"or plan=\{.., 'linear1': 'replicate', 'linear2': 'replicate'\} keeps it wh"):
        fm.parallelize(nn.ModuleList([layer]), mesh, {"linear1": "colwise", "linear2": "rowwise"})
    return str(model.parallel_report), model.parallel_report.text


def test_the_report_is_short_and_printed_once_and_its_hint_works():
    (first, text), (second, other) = run_on_ranks(printed, 2)
    assert first == text == other and second == "parallel report: as on rank 0 (parallel_report.text)"
    assert "  model.layers.{0..2}.mlp.gate_proj: Linear -> ColumnLinear\n" in text
    assert "  model.layers.{0..2}.self_attn.q_proj (Linear): whole by the plan" in text
    assert len(text.splitlines()) < 20, text
