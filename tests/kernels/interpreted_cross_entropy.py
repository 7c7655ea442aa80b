"""The Triton kernels of cross_entropy against float64, interpreted or on a GPU: run by test_cross_entropy.py.

Not named test_*, since the interpreter has to be chosen before triton is imported: it takes a process of its own.
"""

import contextlib
import os
from collections.abc import Iterator

import pytest
import torch

from fused_megatron.kernels import cross_entropy as kernels
from fused_megatron.reference import cross_entropy as reference
from fused_megatron.testing.triton_interpreter import interpreter

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@contextlib.contextmanager
def _checked(grid_seed: int | None = None) -> Iterator[None]:
    with interpreter(grid_seed) if INTERPRETED else contextlib.nullcontext():
        yield


def _inputs(num_rows: int, num_columns: int, vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    # Rows with a stride, NaN around and between them: a stray read would show.
    stride = num_columns + 5
    buffer = torch.full((num_rows * stride + 16,), torch.nan).to(dtype)
    logits = buffer[16:].view(num_rows, stride)[:, :num_columns]
    logits.copy_(torch.randn(num_rows, num_columns) * 3)
    target = torch.randint(0, vocab_size, (num_rows,))
    target[::5] = -100
    return buffer.to(DEVICE)[16:].view(num_rows, stride)[:, :num_columns], target.to(DEVICE)


def _all(
    logits: torch.Tensor, target: torch.Tensor, grad_loss: torch.Tensor, vocab: tuple[int, int], **options: float
) -> tuple[torch.Tensor, ...]:
    """(statistics, loss, lse, gradient) as the kernels give them."""
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    stats = kernels.cross_entropy_statistics(logits, target, *vocab, -100, smoothing)
    loss, lse = kernels.cross_entropy_merge(stats.unsqueeze(0), target, -100, z_loss)
    gradient = kernels.cross_entropy_gradient(grad_loss, logits, target, lse, *vocab, -100, smoothing, z_loss)
    return stats, loss, lse, gradient


def _all_exact(
    logits: torch.Tensor, target: torch.Tensor, grad_loss: torch.Tensor, vocab: tuple[int, int], **options: float
) -> tuple[torch.Tensor, ...]:
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    wide = logits.double()
    stats = reference.cross_entropy_statistics(wide, target, *vocab, -100, smoothing)
    loss, lse = reference.cross_entropy_merge(stats.unsqueeze(0), target, -100, z_loss)
    gradient = reference.cross_entropy_gradient(
        grad_loss.double(), wide, target, lse, *vocab, -100, smoothing, z_loss
    )  # fmt: skip
    return stats, loss, lse, gradient


def _assert_close(got: tuple[torch.Tensor, ...], exact: tuple[torch.Tensor, ...]) -> None:
    for ours, right in zip(got[:3], exact[:3], strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=2e-6, atol=2e-6, equal_nan=True)
    dtype = got[3].dtype
    rounding = torch.finfo(dtype).eps / 2 if dtype != torch.float32 else 0.0
    subnormal = 3e-8 if dtype == torch.float16 else 0.0  # half of its smallest number
    torch.testing.assert_close(
        got[3].double(), exact[3], rtol=rounding + 1e-5, atol=subnormal + 1e-6 * (dtype == torch.float32) + 1e-7
    )


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize(
    ("num_columns", "vocab"),
    [(1, (0, 1)), (37, (0, 37)), (2048, (0, 2048)), (4101, (0, 4101)), (2304, (1000, 3200)), (64, (500, 400))],
    ids=["one", "small", "tile", "tiles and a rest", "shard with padding", "padding alone"],
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values(dtype: torch.dtype, num_columns: int, vocab: tuple[int, int], label_smoothing: float) -> None:
    logits, target = _inputs(6, num_columns, vocab[1], dtype)
    grad_loss = torch.randn(6, device=DEVICE)
    options = {"label_smoothing": label_smoothing, "z_loss": 1e-3}
    if vocab[0] >= vocab[1]:  # no column of this shard counts: lse is that of the other shards
        options["z_loss"] = 0.0
    with _checked():
        got = _all(logits, target, grad_loss, vocab, **options)
    _assert_close(got, _all_exact(logits, target, grad_loss, vocab, **options))
    num_real = max(0, min(num_columns, vocab[1] - vocab[0]))
    assert torch.equal(got[3][:, num_real:], torch.zeros_like(got[3][:, num_real:]))
    assert torch.equal(got[3][::5], torch.zeros_like(got[3][::5]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_split_over_programs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_num_splits", lambda *_: 3)
    logits, target = _inputs(3, 7000, 6900, dtype)
    grad_loss = torch.randn(3, device=DEVICE)
    with _checked():
        got = _all(logits, target, grad_loss, (0, 6900), label_smoothing=0.1)
    _assert_close(got, _all_exact(logits, target, grad_loss, (0, 6900), label_smoothing=0.1))


def test_how_rows_are_split() -> None:
    assert kernels._num_splits(8192, 64, 132) == 1
    assert kernels._num_splits(1, 64, 132) == 64  # never more programs than tiles
    assert kernels._num_splits(100, 64, 132) == 6
    assert kernels._num_splits(4, 0, 132) == 1  # padding alone


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e4, -1e4])
@pytest.mark.parametrize("column", [0, 1500, 2999])
def test_extreme_logits(value: float, column: int) -> None:
    logits, target = _inputs(3, 3000, 3000, torch.float32)
    logits[:, column] = value
    target[1] = column
    grad_loss = torch.randn(3, device=DEVICE)
    with _checked():
        got = _all(logits, target, grad_loss, (0, 3000), label_smoothing=0.1)
    exact = _all_exact(logits, target, grad_loss, (0, 3000), label_smoothing=0.1)
    for ours, right in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=2e-6, atol=2e-6, equal_nan=True)


def test_target_that_is_no_word_gives_nan() -> None:
    logits, target = _inputs(4, 40, 40, torch.float32)
    target[1], target[2] = 40, -1
    with _checked():
        _, loss, _, gradient = _all(logits, target, torch.ones(4, device=DEVICE), (0, 40))
    assert loss.isnan().tolist() == gradient.isnan().all(dim=1).tolist() == [False, True, True, False]
    assert gradient.isnan().any(dim=1).tolist() == [False, True, True, False]


def test_many_shards_merge() -> None:
    torch.manual_seed(0)
    stats = torch.randn(5, 200, 2, device=DEVICE) * 10
    stats[2, :, 0] = -torch.inf  # a shard of padding alone
    target = torch.randint(0, 9, (200,), device=DEVICE)
    target[::7] = -100
    with _checked():
        got = kernels.cross_entropy_merge(stats, target, -100, 1e-2)
    exact = reference.cross_entropy_merge(stats.double(), target, -100, 1e-2)
    for ours, right in zip(got, exact, strict=True):
        torch.testing.assert_close(ours.double(), right, rtol=2e-6, atol=2e-6)


def test_empty_batch() -> None:
    logits, target = torch.empty(0, 9, device=DEVICE), torch.empty(0, dtype=torch.int64, device=DEVICE)
    with _checked():
        stats, loss, lse, gradient = _all(logits, target, torch.ones(0, device=DEVICE), (0, 9))
    assert [tuple(x.shape) for x in (stats, loss, lse, gradient)] == [(0, 2), (0,), (0,), (0, 9)]


@pytest.mark.skipif(not INTERPRETED, reason="a GPU orders the programs as it likes")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_in_any_order_of_the_programs(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_num_splits", lambda *_: 2)
    logits, target = _inputs(6, 5000, 5000, dtype)
    results = []
    for grid_seed in (None, 0, 1):
        with _checked(grid_seed):
            results.append(_all(logits, target, torch.linspace(-1, 1, 6), (0, 5000), label_smoothing=0.1))
    for result in results[1:]:
        assert all(torch.equal(ours, first) for ours, first in zip(result, results[0], strict=True))


@pytest.mark.skipif(INTERPRETED, reason="what GPUs alone have: two runs")
def test_same_bits_twice() -> None:
    logits, target = _inputs(64, 50257, 50257, torch.bfloat16)
    grad_loss = torch.randn(64, device=DEVICE)
    first, second = (_all(logits, target, grad_loss, (0, 50257), label_smoothing=0.1) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
