"""Start here when a GPT cut into pipeline stages is not bit for bit the whole GPT."""

from typing import Any

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig
from fused_megatron.mesh import init_mesh
from fused_megatron.models import GPT, BatchSlice, StageSpan, cut_stages
from fused_megatron.testing.run_on_ranks import run_on_ranks

SIZES: dict[str, Any] = {
    "num_layers": 5, "hidden_size": 24, "num_heads": 4, "seq_len": 12, "ffn_hidden_size": 44, "vocab_size": 101,
    "pad_vocab_size_to_multiple_of": 48, "init_std": 0.1,
}  # fmt: skip
DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.2, "embedding_dropout": 0.2}
LLAMA: dict[str, Any] = {
    "activation": "swiglu", "normalization": "rms_norm", "position": "rotary", "num_kv_heads": 2,
    "tied_embeddings": False, "recompute": "full",
}  # fmt: skip
PACKED = "packed"  # not a field of GPTConfig: the rows consist of documents
COPY = "token_embedding.weight"


def batch_of_tokens() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens, targets (some ignored) and a random upstream gradient, each [B, S]."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(101, (3, 9), generator=generator)
    target = tokens[:, 1:].clone()
    target[0, 3] = -100
    return tokens[:, :-1], target, torch.randn(3, 8, generator=generator)


def chained_equals_whole(rank: int, world_size: int, cut: list[int], changes: dict[str, Any]) -> int:
    """Compare chained stages with the whole model on every rank; return the number of gradients compared."""
    config = GPTConfig(**{**SIZES, **{name: value for name, value in changes.items() if name != PACKED}})
    keywords: dict[str, Any] = {"batch_slice": BatchSlice(step=7, first_sample=2, global_batch_size=6)}
    if changes.get(PACKED):
        keywords["documents"] = torch.tensor([0, 3, 8, 9, 16, 18, 24])
        keywords["positions"] = torch.cat([torch.arange(n) for n in (3, 5, 1, 7, 2, 6)]).view(3, 8)
    layout: dict[str, Any] = {"seed": 3}
    if world_size > 1:
        layout |= {"layout": init_mesh(world_size).layout(sequence_parallel=True)}
    whole = GPT(config, **layout)
    stages = [GPT(config, stage=span, **layout) for span in cut_stages(config, len(cut), cut)]
    weights = dict(whole.named_parameters())
    names = [name for stage in stages for name, _ in stage.named_parameters()]
    assert set(names) == set(weights)
    assert len(names) == len(weights) + (config.tied_embeddings and len(cut) > 1)
    for stage in stages:
        for name, parameter in stage.named_parameters():
            assert torch.equal(parameter, weights[name]), name
    assert sum(stage.num_parameters() for stage in stages) == whole.num_parameters()

    tokens, target, upstream = batch_of_tokens()
    expected = whole(tokens, target, **keywords)
    expected.backward(upstream)
    inputs, outputs = [], []
    x = tokens
    for stage in stages:
        inputs.append(x)
        outputs.append(stage(x, **keywords))
        x = outputs[-1].detach().requires_grad_()
    losses = stages[-1].loss(x, target)
    assert torch.equal(losses, expected)
    losses.backward(upstream)
    for output, received in zip(reversed(outputs), [x, *reversed(inputs[1:])], strict=True):
        output.backward(received.grad)
    for name, weight in weights.items():
        found = [
            dict(stage.named_parameters())[name].grad for stage in stages if name in dict(stage.named_parameters())
        ]
        assert len(found) == 1 + (name == COPY and config.tied_embeddings and len(cut) > 1)
        assert torch.equal(sum(found), weight.grad), name
    with torch.no_grad():
        logits = stages[-1].eval().logits(x)
        whole.train(not config.has_dropout)
        if not config.has_dropout:
            assert torch.equal(logits, whole(tokens, **keywords))
    return len(weights)


@pytest.mark.parametrize(("cut", "changes"), [
    ([5], DROPOUT), ([2, 3], DROPOUT), ([1, 1, 2, 1], {}), ([3, 2, 0], DROPOUT), ([3, 2], LLAMA),
    ([1, 3, 1], {**LLAMA, **DROPOUT}), ([2, 3], {"recompute": "selective", "embedding_dropout": 0.3}),
    ([2, 3], {**LLAMA, "linear_biases": False, "recompute_blocks": 1}), ([5], {**LLAMA, "linear_biases": False}),
    ([2, 3], {**DROPOUT, PACKED: True}), ([2, 3], {**LLAMA, PACKED: True}),
], ids=str)  # fmt: skip
def test_chained_stages_equal_the_whole(cut: list[int], changes: dict[str, Any]) -> None:
    assert chained_equals_whole(0, 1, cut, changes) > 30


def test_stages_of_tensor_and_sequence_parallel_ranks() -> None:
    assert min(run_on_ranks(chained_equals_whole, 2, [2, 3], {**LLAMA, **DROPOUT, "tied_embeddings": True})) > 30


def test_a_middle_stage_holds_its_blocks_alone() -> None:
    config = GPTConfig(**SIZES)
    stage = GPT(config, stage=StageSpan(1, 3, 2, 4))
    assert {name.rpartition(".")[0].split(".")[1] for name, _ in stage.named_parameters()} == {"2", "3"}
    with pytest.raises(InputError, match="only the last stage has a head"):
        stage.loss(torch.zeros(8, 3, 24), torch.zeros(3, 8, dtype=torch.int64))
    with pytest.raises(InputError, match="target must be given to the loss"):
        stage(torch.zeros(8, 3, 24), torch.zeros(3, 8, dtype=torch.int64))


def counts(
    num_stages: int, cut: list[int] | None = None, placement: tuple[int, ...] | None = None, **changes: Any
) -> list[int]:
    spans = cut_stages(GPTConfig(**{**SIZES, **changes}), num_stages, cut, placement=placement)
    return [span.stop - span.start for span in spans]


def test_the_head_weighs_as_much_as_its_products() -> None:
    # A block of these sizes costs 24 x (4 x 24 + 2 x 44 + 12) = 24 x 196 multiplications.
    assert counts(2, num_layers=8, vocab_size=1) == [4, 4]
    assert counts(2, num_layers=8, vocab_size=2 * 196) == [5, 3]
    assert counts(4, num_layers=10, vocab_size=2 * 196) == [3, 3, 3, 1]
    # If the head costs more than all blocks, or than all blocks of each other stage, the last stage holds no block.
    assert counts(3, num_layers=7, vocab_size=50 * 196) == [3, 4, 0]
    assert counts(2, num_layers=4, vocab_size=4 * 196) == [4, 0]
    assert counts(1, num_layers=2, vocab_size=50 * 196) == [2]
    # Remaining blocks go to the middle, and there to late stages, which hold fewer microbatches.
    assert counts(5, num_layers=6, vocab_size=1) == [1, 1, 1, 2, 1]
    assert counts(3, [4, 2, 2], num_layers=8) == [4, 2, 2]


def test_it_is_ranks_that_are_made_even_and_then_their_stages() -> None:
    # The head costs 2.7 blocks: rank 1, which has it, holds only one block in all.
    assert counts(4, placement=(0, 1, 0, 1), num_layers=4, vocab_size=27 * 196 // 10) == [1, 1, 2, 0]
    assert counts(4, placement=(0, 1, 1, 0), num_layers=4, vocab_size=27 * 196 // 10) == [1, 1, 2, 0]
    assert counts(4, placement=(0, 1, 0, 1), num_layers=8, vocab_size=1) == [2, 2, 2, 2]
    assert counts(4, placement=(0, 1, 0, 1), num_layers=9, vocab_size=2 * 196) == [2, 3, 3, 1]


@pytest.mark.parametrize(("num_stages", "cut", "message"), [
    (7, None, "num_layers=5 must be at least 6: of the 7 pipeline stages each needs a block, but for the last"),
    (0, None, "num_stages=0 must be 1 or more"),
    (2, [2, 2], r"pipeline_cut=\[2, 2\] has 4 blocks: the sum must be num_layers=5"),
    (3, [2, 3], r"pipeline_cut=\[2, 3\] must have one number of blocks for each of the 3 stages, not 2"),
    (2, [0, 5], r"pipeline_cut=\[0, 5\] must give every stage 1 block or more"),
    (1, [0], r"pipeline_cut=\[0\] must give every stage 1 block or more"),
    (2, [6, -1], r"pipeline_cut=\[6, -1\] must give every stage 1 block or more"),
])  # fmt: skip
def test_cuts_that_do_not_fit(num_stages: int, cut: list[int] | None, message: str) -> None:
    with pytest.raises(InputError, match=message):
        counts(num_stages, cut)
