"""Start here when generated tokens differ between ranks or layouts."""

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.config import GPTConfig
from fused_megatron.inference.generation import generate
from fused_megatron.mesh import init_mesh
from fused_megatron.models import GPT
from fused_megatron.testing.run_on_ranks import run_on_ranks

CONFIG = GPTConfig(num_layers=1, hidden_size=16, num_heads=2, seq_len=8, vocab_size=21, init_std=0.5)
START = torch.tensor([[3, 1, 4], [1, 5, 9]])


def sampled(rank: int, world_size: int, sequence_parallel: bool, temperature: float, top_k: int) -> torch.Tensor:
    model = GPT(CONFIG, layout=init_mesh(world_size).layout(sequence_parallel=sequence_parallel), seed=1)
    return generate(model, START, 12, temperature=temperature, top_k=top_k, seed=7)


@pytest.mark.parametrize(("temperature", "top_k"), [(0.0, 0), (1.0, 0), (0.7, 5), (2.0, 100)])
def test_every_layout_draws_the_same(temperature: float, top_k: int) -> None:
    (one,) = run_on_ranks(sampled, 1, False, temperature, top_k)
    assert one.shape == (2, 15) and torch.equal(one[:, :3], START)
    assert int(one.max()) < 21  # never a padding entry of the vocabulary
    for sequence_parallel in (False, True):
        for other in run_on_ranks(sampled, 2, sequence_parallel, temperature, top_k):
            assert torch.equal(one, other)


def test_temperature_zero_takes_the_likeliest_and_top_1_too() -> None:
    model = GPT(CONFIG, seed=1)
    tokens = START
    for _ in range(10):
        logits = model(tokens[:, -8:])[:, -1, :21]
        tokens = torch.cat([tokens, logits.argmax(-1, keepdim=True)], dim=1)
    assert torch.equal(generate(model, START, 10, temperature=0.0), tokens)
    assert torch.equal(generate(model, START, 10, temperature=3.0, top_k=1), tokens)


def test_bad_input() -> None:
    model = GPT(CONFIG, seed=1)
    with pytest.raises(InputError, match=r"must be \[B, S\] with S above 0"):
        generate(model, torch.zeros(1, 0, dtype=torch.int64), 3)
    with pytest.raises(InputError, match="temperature=-1"):
        generate(model, START, 3, temperature=-1)


class Fixed(torch.nn.Module):
    """A model with the same logits at every position."""

    tp_group, sequence_parallel, vocab_size, config = None, False, 4, CONFIG

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return torch.tensor([2.0, 1.0, 1.9, 0.0]).expand(*tokens.shape, 4)


@pytest.mark.parametrize(
    ("top_k", "drawn"), [(1, {0}), (2, {0, 2}), (3, {0, 1, 2}), (4, {0, 1, 2, 3}), (0, {0, 1, 2, 3})]
)
def test_top_k_draws_from_the_likeliest_k_tokens(top_k: int, drawn: set[int]) -> None:
    tokens = generate(Fixed(), torch.zeros(50, 1, dtype=torch.int64), 4, temperature=2.0, top_k=top_k)
    assert set(tokens[:, 1:].flatten().tolist()) == drawn
