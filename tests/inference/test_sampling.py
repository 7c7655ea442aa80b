"""Start here when tokens are drawn that temperature, top-k or top-p exclude, or with the wrong probability."""

import pytest
import torch

from fused_megatron.checks import InputError
from fused_megatron.inference.sampling import Sampling, draw

# softmax: 0.5, 0.25, 0.15, 0.1
LOGITS = torch.tensor([0.25, 0.5, 0.1, 0.15]).log()


def shares(sampling: Sampling, count: int = 4000) -> list[float]:
    """Return how often each token is drawn."""
    drawn = draw(LOGITS.expand(count, 4), sampling, sampling.generators(count))
    return [drawn.count(token) / count for token in range(4)]


@pytest.mark.parametrize(
    ("sampling", "expected"),
    [
        (Sampling(1.0, 0), [0.25, 0.5, 0.1, 0.15]),
        (Sampling(1.0, 2), [1 / 3, 2 / 3, 0, 0]),
        (Sampling(1.0, 0, 0.5), [0, 1, 0, 0]),  # one token has all of top_p
        (Sampling(1.0, 0, 0.51), [1 / 3, 2 / 3, 0, 0]),
        (Sampling(1.0, 0, 0.76), [0.25 / 0.9, 0.5 / 0.9, 0, 0.15 / 0.9]),
        (Sampling(1.0, 3, 0.84), [0.25 / 0.9, 0.5 / 0.9, 0, 0.15 / 0.9]),  # 0.75 / 0.9 is below 0.84: top-k comes first
        (Sampling(0.5, 0), [4 / 25.8, 100 / 161.25, 4 / 161.25, 9 / 161.25]),
        (Sampling(0.0, 0), [0, 1, 0, 0]),
        (Sampling(9.0, 1), [0, 1, 0, 0]),
    ],
)
def test_tokens_come_with_their_probability(sampling: Sampling, expected: list[float]) -> None:
    if sampling.temperature == 0.5:
        squares = LOGITS.exp() ** 2
        expected = (squares / squares.sum()).tolist()
    for found, wanted in zip(shares(sampling), expected, strict=True):
        # Four standard deviations of a share of 4000 draws; an excluded token never comes.
        assert abs(found - wanted) <= 4 * (wanted * (1 - wanted) / 4000) ** 0.5, (sampling, found, wanted)


def test_a_sequence_has_random_numbers_of_its_own() -> None:
    sampling, logits = Sampling(1.0, 0, seed=3), torch.randn(5, 50, generator=torch.Generator().manual_seed(1))
    together = draw(logits, sampling, sampling.generators(5))
    for row in range(5):
        alone = Sampling(1.0, 0, seed=3 + row)
        assert draw(logits[row : row + 1], alone, alone.generators(1)) == together[row : row + 1]
    assert len(set(draw(torch.zeros(200, 50), sampling, sampling.generators(200)))) > 30


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"temperature": -1}, "temperature=-1 must be 0 or more"),
        ({"top_k": -1}, "top_k=-1 must be 0 or more"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1"),
        ({"top_p": 1.5}, "top_p=1.5 must be above 0 and at most 1"),
    ],
)
def test_bad_settings(fields: dict[str, float], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Sampling(**fields)
