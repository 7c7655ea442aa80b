"""fm.ops.cross_entropy and its three building blocks against float64."""

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.reference import cross_entropy as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# Odd, unaligned, one column, a block of the CPU kernel and its neighbours, several blocks and a rest.
VOCAB_SIZES = [1, 2, 37, 1023, 1024, 1025, 5003]


def _inputs(num_rows: int, vocab_size: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    logits = (torch.randn(num_rows, vocab_size) * 3).to(dtype).requires_grad_()
    target = torch.randint(0, vocab_size, (num_rows,))
    target[::5] = -100
    return logits, target


def _loss_and_gradient(
    loss_of: Any, logits: torch.Tensor, target: torch.Tensor, upstream: torch.Tensor, **arguments: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.detach().requires_grad_()
    loss = loss_of(logits, target, reduction="none", **arguments)
    (gradient,) = torch.autograd.grad(loss, logits, upstream.to(loss.dtype))
    return loss.detach(), gradient


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
@pytest.mark.parametrize("vocab_size", VOCAB_SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradient(dtype: torch.dtype, vocab_size: int, label_smoothing: float) -> None:
    logits, target = _inputs(11, vocab_size, dtype)
    upstream = torch.randn(11).to(dtype)
    ours = _loss_and_gradient(fm.ops.cross_entropy, logits, target, upstream, label_smoothing=label_smoothing)
    torchs = _loss_and_gradient(F.cross_entropy, logits, target, upstream, label_smoothing=label_smoothing)
    exact = _loss_and_gradient(
        F.cross_entropy, logits.double(), target, upstream.double(), label_smoothing=label_smoothing
    )
    # An absolute term for what torch gets exactly right by luck: a few roundings of float32 at the size of the logits.
    for name, our, their, right in zip(("loss", "gradient"), ours, torchs, exact, strict=True):
        assert our.dtype == dtype
        error, torch_error = ((x.double() - right).abs().max().item() for x in (our, their))
        assert error <= 2 * torch_error + 3e-6, f"{name}: error {error}, torch's {torch_error}"


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("shape", [(37,), (5, 37), (5, 37, 3), (2, 37, 3, 4)], ids=str)
def test_layouts_and_reductions(shape: tuple[int, ...], reduction: str) -> None:
    torch.manual_seed(0)
    logits = torch.randn(shape, requires_grad=True)
    target = torch.randint(0, 37, shape[:1] * (len(shape) > 1) + shape[2:])
    if target.dim():
        target.view(-1)[1] = -100
    ours = fm.ops.cross_entropy(logits, target, reduction=reduction)
    torchs = F.cross_entropy(logits, target, reduction=reduction)
    torch.testing.assert_close(ours, torchs, rtol=1e-6, atol=1e-6)
    upstream = torch.randn_like(ours)
    gradients = [torch.autograd.grad(loss, logits, upstream)[0] for loss in (ours, torchs)]
    torch.testing.assert_close(*gradients, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("view", ["rows with a stride", "transposed", "unaligned"])
def test_non_contiguous_logits(view: str) -> None:
    torch.manual_seed(0)
    base = torch.randn(8, 400)
    views = {"rows with a stride": base[::2, 5:105], "transposed": base.t()[:100], "unaligned": base[:, 1:]}
    logits = views[view].detach()
    target = torch.randint(0, logits.shape[1], logits.shape[:1])
    upstream = torch.randn(logits.shape[0])
    ours = _loss_and_gradient(fm.ops.cross_entropy, logits, target, upstream)
    exact = _loss_and_gradient(F.cross_entropy, logits.double(), target, upstream.double())
    for our, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), right, rtol=1e-6, atol=2e-6)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_gradients_too_large_for_caches(dtype: torch.dtype) -> None:
    # 34 MB: the CPU kernel writes past the caches from 32 MiB on. An odd width leaves every row aligned differently.
    logits, target = _inputs(34 * 2**20 // dtype.itemsize // 8191, 8191, dtype)
    upstream = torch.randn(len(logits))
    loss, gradient = _loss_and_gradient(fm.ops.cross_entropy, logits, target, upstream, label_smoothing=0.1)
    upstream = upstream.to(dtype).double()
    right_loss, right = _loss_and_gradient(F.cross_entropy, logits.double(), target, upstream, label_smoothing=0.1)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(loss.double(), right_loss, rtol=rounding, atol=1e-6)
    torch.testing.assert_close(gradient.double(), right, rtol=rounding, atol=1e-6)


def test_z_loss() -> None:
    logits, target = _inputs(11, 1025, torch.float32)
    upstream = torch.randn(11)
    wide = logits.detach().double().requires_grad_()
    right = reference.cross_entropy(wide, target, -100, 0.1, 1e-2)
    ours = _loss_and_gradient(fm.ops.cross_entropy, logits, target, upstream, label_smoothing=0.1, z_loss=1e-2)
    torch.testing.assert_close(ours[0].double(), right.detach(), rtol=1e-6, atol=1e-6)
    (gradient,) = torch.autograd.grad(right, wide, upstream.double())
    torch.testing.assert_close(ours[1].double(), gradient, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_rows", [0, 3])
def test_nothing_to_learn(num_rows: int, reduction: str) -> None:
    """An empty batch, and a batch of ignored tokens whose logits are all NaN."""
    logits = torch.full((num_rows, 7), torch.nan, requires_grad=True)
    target = torch.full((num_rows,), -100)
    loss = fm.ops.cross_entropy(logits, target, reduction=reduction)
    expected = F.cross_entropy(logits.detach().nan_to_num(), target, reduction=reduction)
    torch.testing.assert_close(loss.detach(), expected, equal_nan=True)
    loss.sum().backward()
    assert logits.grad is not None and torch.equal(logits.grad, torch.zeros(num_rows, 7))


@pytest.mark.parametrize("column", [0, 2000, 4999])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 1e4, -1e4])
@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_extreme_logits(value: float, column: int, label_smoothing: float) -> None:
    torch.manual_seed(0)
    logits = torch.randn(2, 5000)
    logits[:, column] = value
    target = torch.tensor([column, 77])
    upstream = torch.randn(2)
    ours = _loss_and_gradient(fm.ops.cross_entropy, logits, target, upstream, label_smoothing=label_smoothing)
    exact = _loss_and_gradient(
        F.cross_entropy, logits.double(), target, upstream.double(), label_smoothing=label_smoothing
    )
    for our, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), right, rtol=2e-6, atol=2e-6, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_logits_that_grow_along_the_row(dtype: torch.dtype) -> None:
    """Every block lies far above all before it, and the last ones are -inf alone."""
    logits = torch.linspace(-1e4, 1e4, 6000).repeat(2, 1).to(dtype)
    logits[1] = logits[1].flip(0)
    logits[:, -1500:] = -torch.inf
    target = torch.tensor([4400, 10])
    ours = _loss_and_gradient(fm.ops.cross_entropy, logits.float(), target, torch.tensor([2.0, -3.0]))
    exact = _loss_and_gradient(F.cross_entropy, logits.double(), target, torch.tensor([2.0, -3.0]).double())
    # lse is about 1e4, where float32 has a spacing of 1e-3: that is the relative error of each probability.
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=2e-3)
    torch.testing.assert_close(ours[1].double(), exact[1], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_logits_minus_infinity(dtype: torch.dtype) -> None:
    loss = fm.ops.cross_entropy(torch.full((1, 9), -torch.inf, dtype=dtype), torch.tensor([3]))
    assert loss.isnan()


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_rounding_of_16_bits(dtype: torch.dtype) -> None:
    """Gradients over the whole range of the format, with infinities and NaN, are float32's, rounded to nearest even."""
    scale = torch.tensor([0.0, 1e-8, 3e-7, 6e-5, 1.0, 3e4, 7e4, 1e20, 3.4e38, torch.inf, torch.nan])
    logits, target = _inputs(len(scale), 1027, dtype)
    target.clamp_(min=0)
    wide = logits.detach().float()
    lse = wide.logsumexp(dim=1)
    options = {"vocab_start": 0, "vocab_size": 1027}
    narrow = fm.ops.cross_entropy_gradient(scale, logits.detach(), target, lse, **options)
    expected = fm.ops.cross_entropy_gradient(scale, wide, target, lse, **options).to(dtype)
    torch.testing.assert_close(narrow, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits(dtype: torch.dtype) -> None:
    """Each one alone in a row of zeros, whose sum it then is."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    rows = torch.arange(2**16)
    logits = torch.zeros(2**16, 64, dtype=dtype)
    logits[rows, rows % 64] = every
    arguments = {"vocab_start": 0, "vocab_size": 64, "label_smoothing": 1.0}
    stats = fm.ops.cross_entropy_statistics(logits, (rows + 1) % 64, **arguments)
    assert torch.equal((-64 * stats[:, 1]).nan_to_num(nan=7), every.float().nan_to_num(nan=7))
    assert torch.equal(stats[:, 1].isnan(), every.isnan())


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("bounds", [(0, 1024, 2048, 3072), (0, 7, 1500, 2100), (0, 2048, 2304, 4096)], ids=str)
def test_shards_equal_the_whole(bounds: tuple[int, ...], dtype: torch.dtype) -> None:
    """Uneven shards, padding within a shard, and a shard of padding alone, whose logits are NaN to prove the point."""
    vocab_size = 2050
    logits, target = _inputs(11, vocab_size, dtype)
    padded = F.pad(logits.detach(), (0, bounds[-1] - vocab_size), value=torch.nan)
    upstream, arguments = torch.randn(11), {"ignore_index": -100, "label_smoothing": 0.1}
    shards = [padded[:, start:end] for start, end in itertools.pairwise(bounds)]
    places = [{"vocab_start": start, "vocab_size": vocab_size} for start in bounds[:-1]]
    stats = torch.stack(
        [fm.ops.cross_entropy_statistics(x, target, **p, **arguments) for x, p in zip(shards, places, strict=True)]
    )
    loss, lse = fm.ops.cross_entropy_merge(stats, target, ignore_index=-100, z_loss=1e-3)
    gradient = torch.cat(
        [
            fm.ops.cross_entropy_gradient(upstream, x, target, lse, z_loss=1e-3, **p, **arguments)
            for x, p in zip(shards, places, strict=True)
        ],
        dim=1,
    )
    wide = logits.detach().double().requires_grad_()
    right = reference.cross_entropy(wide, target, -100, 0.1, 1e-3)
    (right_gradient,) = torch.autograd.grad(right, wide, upstream.double())
    assert gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), right.detach(), rtol=1e-6, atol=1e-6)
    rounding = 2e-6 if dtype.itemsize > 2 else torch.finfo(dtype).eps / 2
    subnormal = 3e-8  # half of float16's smallest number
    torch.testing.assert_close(
        gradient[:, :vocab_size].double(), right_gradient, rtol=rounding + 1e-5, atol=subnormal + 1e-8
    )
    assert torch.equal(gradient[:, vocab_size:], torch.zeros_like(gradient[:, vocab_size:]))


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_twice_and_with_any_number_of_threads(dtype: torch.dtype) -> None:
    logits, target = _inputs(67, 2051, dtype)
    upstream = torch.randn(67)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3, 3):
            torch.set_num_threads(num_threads)
            results.append(_loss_and_gradient(fm.ops.cross_entropy, logits, target, upstream, label_smoothing=0.1))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


@pytest.mark.cpu_kernel
def test_saves_nothing_but_the_logits_themselves() -> None:
    logits, target = _inputs(11, 1025, torch.bfloat16)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fm.ops.cross_entropy(logits, target, reduction="none")
    assert [x.data_ptr() for x in saved if x.numel() > 11] == [logits.data_ptr()]


def test_gradcheck_in_float64() -> None:
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 8, 0])

    def loss(x: torch.Tensor) -> torch.Tensor:
        return fm.ops.cross_entropy(x, target, label_smoothing=0.1, z_loss=0.1)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


def test_gradient_of_the_gradient_is_refused() -> None:
    logits, target = _inputs(3, 9, torch.float32)
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(fm.ops.cross_entropy(logits, target), logits, create_graph=True)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype: torch.dtype) -> None:
    logits, target = _inputs(5, 37, dtype)
    logits = logits.detach()
    ops = torch.ops.fused_megatron
    torch.library.opcheck(ops.cross_entropy_statistics, (logits, target, 10, 60, -100, 0.1))
    torch.library.opcheck(ops.cross_entropy_merge, (torch.randn(3, 5, 2), target, -100, 0.1))
    arguments = (torch.randn(5), logits, target, torch.randn(5), 10, 60, -100, 0.1, 0.1)
    torch.library.opcheck(ops.cross_entropy_gradient, arguments)


@pytest.mark.cpu_kernel
def test_compiles_without_a_graph_break() -> None:
    logits, target = _inputs(11, 1025, torch.float32)

    def step(x: torch.Tensor) -> torch.Tensor:
        return fm.ops.cross_entropy(x * 2.0, target, label_smoothing=0.1, z_loss=1e-3)

    eager, compiled = step(logits), torch.compile(step, fullgraph=True)(logits)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, logits), torch.autograd.grad(eager, logits))


def test_autocast_returns_float32_as_torch() -> None:
    logits, target = _inputs(11, 37, torch.bfloat16)
    with torch.autocast("cpu"):
        ours, torchs = fm.ops.cross_entropy(logits, target), F.cross_entropy(logits, target)
    assert ours.dtype == torchs.dtype == torch.float32
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("bad", [-1, 9, -99])
def test_target_that_is_no_class(bad: int) -> None:
    logits, target = torch.randn(3, 9), torch.tensor([0, 1, bad])
    with pytest.raises(InputError, match=rf"target\[2\]={bad} must be in \[0, 9\) or ignore_index=-100"):
        fm.ops.cross_entropy(logits, target)
    with pytest.raises(InputError, match=rf"target\[2\]={bad} must be in \[0, 9\)"):
        fm.ops.cross_entropy_statistics(logits, target, vocab_start=0, vocab_size=9)
    # Where nobody looks (a GPU, torch.compile), the loss and the gradient of that token must not look sane.
    stats = torch.ops.fused_megatron.cross_entropy_statistics(logits, target, 0, 9, -100, 0.0)
    loss, lse = fm.ops.cross_entropy_merge(stats[None], target)
    assert loss.isnan().tolist() == [False, False, True]
    arguments = (torch.ones(3), logits, target, lse, 0, 9, -100, 0.0, 0.0)
    gradient = torch.ops.fused_megatron.cross_entropy_gradient(*arguments)
    assert gradient.isnan().all(dim=1).tolist() == gradient.isnan().any(dim=1).tolist() == [False, False, True]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reduction": "max"}, InputError, "reduction='max' must be one of: mean, sum, none"),
        ({"label_smoothing": 1.5}, InputError, r"label_smoothing=1.5 must be in \[0, 1\]"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, InputError, r"target.shape=\(4,\) must be \(3,\)"),
        ({"target": torch.zeros(3)}, TypeError, "target.dtype=float32 must be one of: int64"),
        ({"logits": torch.zeros(3, 9, dtype=torch.int64)}, TypeError, "logits.dtype=int64 must be one of: float32"),
    ],
    ids=str,
)
def test_mistakes(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    usual = {"logits": torch.randn(3, 9), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        fm.ops.cross_entropy(**{**usual, **arguments})
