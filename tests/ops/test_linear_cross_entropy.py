"""Start here when linear_cross_entropy gives a wrong loss or gradient."""

import contextlib
import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import fused_megatron as fm
from fused_megatron.checks import InputError
from fused_megatron.ops import linear_cross_entropy_tile_shape as shapes
from fused_megatron.ops.linear_cross_entropy_tiles import TiledHead
from fused_megatron.testing.tolerances import assert_close_to_reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def inputs(
    num_tokens: int, hidden_size: int, num_entries: int, dtype: torch.dtype, bias: bool = True, scale: float = 1.0
) -> tuple[list[torch.Tensor | None], torch.Tensor]:
    """Return [hidden, weight, bias or None], and a target in which every fifth token is ignored."""
    torch.manual_seed(num_tokens + num_entries)
    hidden = (torch.randn(num_tokens, hidden_size) * scale).to(dtype).requires_grad_()
    weight = (torch.randn(num_entries, hidden_size) * hidden_size**-0.5).to(dtype).requires_grad_()
    parameters = [hidden, weight, torch.randn(num_entries).to(dtype).requires_grad_() if bias else None]
    target = torch.randint(0, num_entries, (num_tokens,))
    target[::5] = -100
    return parameters, target


def by_torch(
    operands: list[torch.Tensor | None],
    target: torch.Tensor,
    dtype: torch.dtype,
    upstream: torch.Tensor,
    **options: Any,
) -> list[torch.Tensor]:
    """Return [loss, gradients] from all logits in dtype, by torch's own ops."""
    reduction, vocab_size = options.get("reduction", "mean"), options.get("vocab_size")
    hidden, weight, bias = leaves = [None if x is None else x.detach().to(dtype).requires_grad_() for x in operands]
    logits = F.linear(hidden, weight, bias).flatten(0, -2)[:, :vocab_size]
    if options.get("softcap") is not None:
        logits = options["softcap"] * torch.tanh(logits / options["softcap"])
    ids = target.flatten()
    loss = F.cross_entropy(logits, ids, reduction="none", label_smoothing=options.get("label_smoothing", 0.0))
    loss = loss + options.get("z_loss", 0.0) * logits.logsumexp(1).square() * (ids != -100)
    loss = {"mean": lambda: loss.sum() / (ids != -100).sum(), "sum": loss.sum, "none": lambda: loss}[reduction]()
    present = [x for x in leaves if x is not None]
    gradients = torch.autograd.grad(loss, present, upstream.to(dtype).view(loss.shape))
    return [loss.detach(), *gradients]


def by_us(
    operands: list[torch.Tensor | None], target: torch.Tensor, upstream: torch.Tensor | None, **options: Any
) -> list[torch.Tensor]:
    hidden, weight, bias = leaves = [None if x is None else x.detach().requires_grad_() for x in operands]
    loss = fm.ops.linear_cross_entropy(hidden, weight, target, bias=bias, **options)
    upstream = torch.ones_like(loss) if upstream is None else upstream.to(loss.dtype)
    return [loss.detach(), *torch.autograd.grad(loss, [x for x in leaves if x is not None], upstream)]


def check_against_float64(
    operands: list[torch.Tensor | None], target: torch.Tensor, upstream: torch.Tensor, **options: Any
) -> None:
    dtype = operands[0].dtype
    ours = by_us(operands, target, upstream, **options)
    options.pop("chunk_tokens", None)
    upstream = upstream.to(dtype)
    exact = by_torch(operands, target, torch.float64, upstream, **options)
    torchs = by_torch(operands, target, dtype, upstream, **options)
    names = ["loss", "dhidden", "dweight", "dbias"]
    # Sums of some hundred products have a few float32 roundings more.
    floor = 32.0 if dtype == torch.float32 else None
    for name, our, right, their in zip(names, ours, exact, torchs, strict=False):
        assert_close_to_reference(our.view(right.shape), right, their, floor_ulps=floor, name=name)


@pytest.fixture(autouse=True)
def on_device(device: str) -> Iterator[None]:
    """Create every tensor of a test on its device."""
    with torch.device(device) if device != "cpu" else contextlib.nullcontext():
        yield


@pytest.fixture(params=["tiles as chosen", "products in 16 bits"])
def any_product(request: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also test products in the operands' dtype, as on a GPU or a CPU with matrix units."""
    if request.param == "products in 16 bits":
        monkeypatch.setattr(shapes, "product_dtype", lambda operand: operand.dtype)


@pytest.mark.parametrize("chunk_tokens", [None, 1, 5], ids=lambda n: f"chunk_tokens={n}")
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_loss_and_gradients(dtype: torch.dtype, reduction: str, chunk_tokens: int | None, any_product: None) -> None:
    operands, target = inputs(13, 24, 77, dtype)
    upstream = torch.randn(13) if reduction == "none" else torch.randn(())
    check_against_float64(operands, target, upstream, reduction=reduction, chunk_tokens=chunk_tokens)


@pytest.mark.parametrize(
    "options",
    [
        {"label_smoothing": 0.1},
        {"z_loss": 1e-2},
        {"softcap": 2.0},
        {"vocab_size": 70},
        {"label_smoothing": 0.3, "z_loss": 1e-3, "vocab_size": 65, "softcap": 3.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_options(options: dict[str, Any], dtype: torch.dtype, reduction: str, any_product: None) -> None:
    operands, target = inputs(9, 16, 77, dtype, bias=False)
    target.clamp_(max=64)
    upstream = torch.randn(9) if reduction == "none" else torch.randn(())
    check_against_float64(operands, target, upstream, reduction=reduction, chunk_tokens=4, **options)


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("num_tokens", [64, 200])  # one chunk and no accumulator; several, the last one smaller
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_blocks_of_entries(dtype: torch.dtype, num_tokens: int, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """CPUs without matrix units cast blocks of entries to float32 for 16-bit operands."""
    monkeypatch.setattr(shapes, "product_dtype", lambda operand: torch.float32)
    monkeypatch.setattr(shapes, "_CAST_TILE_BYTES", 1)
    monkeypatch.setattr(shapes, "_CAST_TOKENS", 64)
    operands, target = inputs(num_tokens, 24, 150, dtype, bias)
    for reduction, upstream in [("mean", torch.randn(())), ("none", torch.randn(num_tokens))]:
        check_against_float64(
            operands, target.clamp(max=139), upstream, reduction=reduction, label_smoothing=0.1, vocab_size=140
        )


@pytest.mark.cpu_kernel
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("common", [0.0, 1e4, -1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_offset_of_all_logits_costs_no_precision(
    dtype: torch.dtype, common: float, smoothing: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In one block of entries and, for 16-bit operands, in several."""
    monkeypatch.setattr(shapes, "product_dtype", lambda operand: torch.float32)
    monkeypatch.setattr(shapes, "_CAST_TILE_BYTES", 1)
    torch.manual_seed(0)
    # float32 represents the products exactly, so that only the loss can have errors.
    hidden, weight = (torch.randint(-4, 5, (n, 16)).to(dtype) / 2 for n in (90, 300))
    bias, target = torch.full((300,), common).to(dtype), torch.randint(0, 300, (90,))
    head = TiledHead(hidden, weight, bias, target, fm.ops.LossTerms(300, label_smoothing=smoothing), chunk_tokens=64)
    loss, lse, _ = head.forward()
    dhidden, *_ = head.backward(torch.ones(90), lse, (True, False, False))
    operands, upstream = [hidden, weight, bias], torch.ones(90)
    exact = by_torch(operands, target, torch.float64, upstream, reduction="none", label_smoothing=smoothing)
    torch.testing.assert_close(loss.double(), exact[0], rtol=1e-6, atol=1e-6)
    rtol = 1e-5 if dtype == torch.float32 else 2**-8
    torch.testing.assert_close(dhidden.double(), exact[1], rtol=rtol, atol=1e-5)


@pytest.mark.cpu_kernel
def test_blocks_of_entries_leave_only_the_last_rounding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither logits nor partial sums are rounded to 16 bits: the error is much smaller than torch's."""
    monkeypatch.setattr(shapes, "product_dtype", lambda operand: torch.float32)
    monkeypatch.setattr(shapes, "_CAST_TILE_BYTES", 1)
    operands, target = inputs(90, 24, 300, torch.bfloat16, bias=False)
    ours = by_us(operands, target, torch.ones(()))
    exact = by_torch(operands, target, torch.float64, torch.ones(()))
    for our, right in zip(ours, exact, strict=True):
        torch.testing.assert_close(our.double(), right, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize(
    ("hidden_dtype", "weight_dtype", "product"),
    [
        (torch.bfloat16, torch.float32, torch.float32),
        (torch.float32, torch.bfloat16, torch.float32),
        (torch.float16, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_mixed_dtypes(
    hidden_dtype: torch.dtype, weight_dtype: torch.dtype, product: torch.dtype, reduction: str
) -> None:
    (hidden, weight, bias), target = inputs(9, 16, 40, torch.float32)
    operands = [hidden.detach().to(hidden_dtype), weight.detach().to(weight_dtype), bias.detach().to(weight_dtype)]
    upstream = torch.randn(9) if reduction == "none" else torch.randn(())
    ours = by_us(operands, target, upstream, reduction=reduction, chunk_tokens=4)
    exact = by_torch(operands, target, torch.float64, upstream, reduction=reduction)
    assert ours[0].dtype == product
    for our, right, operand in zip(ours[1:], exact[1:], operands, strict=True):
        assert our.dtype == operand.dtype
        # Only the last rounding is to 16 bits.
        torch.testing.assert_close(our.double(), right, rtol=torch.finfo(our.dtype).eps, atol=2e-6)
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_autocast(reduction: str, any_product: None, device: str) -> None:
    operands, target = inputs(9, 16, 40, torch.float32)
    with torch.autocast(device, torch.bfloat16):
        ours = by_us(operands, target, None, reduction=reduction, chunk_tokens=4)
    rounded = [x.detach().bfloat16() for x in operands]
    upstream = torch.ones(9 if reduction == "none" else ())
    exact = by_torch(rounded, target, torch.float64, upstream, reduction=reduction)
    torchs = by_torch(rounded, target, torch.bfloat16, upstream, reduction=reduction)
    for our, right, their in zip(ours, exact, torchs, strict=True):
        assert our.dtype == torch.float32
        assert_close_to_reference(our, right, their)


def test_layouts_of_hidden_and_target() -> None:
    (hidden, weight, _), target = inputs(12, 16, 40, torch.float32, bias=False)
    exact = by_torch([hidden, weight, None], target, torch.float64, torch.ones(12), reduction="none")
    layouts = [
        (hidden.detach().view(3, 4, 16).transpose(0, 1), target.view(3, 4).t()),
        (hidden.detach().repeat(1, 2)[:, :16].view(2, 6, 16), target.view(2, 6)),
        (hidden.detach()[0], target[0]),
    ]
    for x, ids in layouts[:2]:
        loss, dhidden, dweight = by_us([x, weight, None], ids, None, reduction="none")
        assert loss.shape == ids.shape and dhidden.shape == x.shape
        torch.testing.assert_close(dweight.double(), exact[2], rtol=1e-5, atol=1e-6)
    x, ids = layouts[0]
    loss, dhidden, _ = by_us([x, weight, None], ids, None, reduction="none")
    torch.testing.assert_close(loss.double(), exact[0].view(3, 4).t(), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dhidden.double(), exact[1].view(3, 4, 16).transpose(0, 1), rtol=1e-5, atol=1e-6)
    assert fm.ops.linear_cross_entropy(hidden[1], weight, target[1]).shape == ()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("num_tokens", [0, 3])
def test_nothing_to_learn(num_tokens: int, reduction: str, dtype: torch.dtype) -> None:
    """An empty batch, and a batch of only ignored tokens."""
    operands, target = inputs(num_tokens, 8, 11, dtype)
    loss, *gradients = by_us(operands, torch.full_like(target, -100), None, reduction=reduction)
    expected = F.cross_entropy(torch.zeros(num_tokens, 11), torch.full_like(target, -100), reduction=reduction)
    torch.testing.assert_close(loss, expected.to(dtype), equal_nan=True)
    for gradient, operand in zip(gradients, operands, strict=True):
        assert torch.equal(gradient, torch.zeros_like(operand))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_padding_is_not_read(dtype: torch.dtype, any_product: None) -> None:
    operands, target = inputs(9, 16, 40, dtype)
    target.clamp_(max=32)
    right = by_us(operands, target, None, vocab_size=33, label_smoothing=0.1)
    for parameter in operands[1:]:
        parameter.data[33:] = torch.nan
    for ours, expected in zip(by_us(operands, target, None, vocab_size=33, label_smoothing=0.1), right, strict=True):
        assert torch.equal(ours, expected)
    assert not right[2][33:].any() and not right[3][33:].any()


@pytest.mark.parametrize("scale", [1e4, torch.inf, torch.nan])
def test_extreme_logits(scale: float) -> None:
    operands, target = inputs(6, 8, 20, torch.float32, bias=False)
    operands[0].data[1] *= scale
    ours = by_us(operands, target, None, reduction="none", chunk_tokens=2)
    exact = by_torch(operands, target, torch.float64, torch.ones(6), reduction="none")
    for our, right in zip(ours, exact, strict=True):
        finite = right.isfinite()
        assert torch.equal(our.isfinite(), finite)
        torch.testing.assert_close(our.double()[finite], right[finite], rtol=1e-4, atol=1e-3)


def test_small_gradients_of_float16_do_not_vanish() -> None:
    """1 / T times a probability of 1e-5 is below the range of float16; it is applied in float32."""
    operands, target = inputs(60, 8, 3000, torch.float16, bias=False, scale=0.01)
    ours = by_us(operands, target, torch.tensor(4096.0))  # a scale of the loss
    exact = by_torch(operands, target, torch.float64, torch.tensor(4096.0))
    torch.testing.assert_close(ours[2].double(), exact[2], rtol=2e-2, atol=1e-6)


class CountedProducts(TorchDispatchMode):
    """Counts products, and records the elements of the largest tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.count, self.largest = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.count += func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm, torch.ops.aten.addmm_)
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize(
    ("needs", "one_pass", "two_passes"),
    [([1, 1, 1], 3, 4), ([1, 0, 0], 2, 3), ([0, 1, 1], 2, 3), ([0, 0, 1], 1, 2)],
    ids=str,
)
def test_only_needed_products_and_never_whole_logits(needs: list[int], one_pass: int, two_passes: int) -> None:
    (hidden, weight, bias), target = inputs(40, 8, 128, torch.float32)
    wanted = [bool(n) for n in needs]
    with torch.no_grad():
        head = TiledHead(hidden, weight, bias, target, fm.ops.LossTerms(128), chunk_tokens=10)
        with CountedProducts() as seen:
            loss, lse, gradients = head.forward(torch.ones(()), wanted)
        assert seen.count == one_pass * 4 and seen.largest < 40 * 128 / 3
        with CountedProducts() as seen:
            other_loss, other_lse, nothing = head.forward()
            others = head.backward(torch.ones(40), lse, wanted)
        assert seen.count == two_passes * 4 and seen.largest < 40 * 128 / 3
    assert nothing == [None, None, None]
    assert torch.equal(loss, other_loss) and torch.equal(lse, other_lse)
    for gradient, other, needed in zip(gradients, others, wanted, strict=True):
        assert (gradient is not None) == needed
        assert not needed or torch.equal(gradient, other)


@pytest.mark.parametrize("frozen", [(0,), (1,), (2,), (0, 1), (0, 2), (1, 2)], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_frozen_operands(frozen: tuple[int, ...], reduction: str) -> None:
    operands, target = inputs(9, 8, 20, torch.float32)
    _, *right = by_us(operands, target, None, reduction=reduction)
    (hidden, weight, bias) = leaves = [x.detach().requires_grad_(i not in frozen) for i, x in enumerate(operands)]
    ours = fm.ops.linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction)
    ours.sum().backward()
    for i, leaf in enumerate(leaves):
        assert (leaf.grad is None) if i in frozen else torch.equal(leaf.grad, right[i])


@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_twice_and_backward_again(dtype: torch.dtype, reduction: str, any_product: None) -> None:
    operands, target = inputs(23, 16, 70, dtype)
    (hidden, weight, bias) = operands
    for _ in range(2):
        loss = fm.ops.linear_cross_entropy(hidden, weight, target, bias=bias, reduction=reduction, chunk_tokens=5)
        upstream = torch.full_like(loss, 0.7)
        first = torch.autograd.grad(loss, operands, upstream, retain_graph=True)
        again = torch.autograd.grad(loss, operands, upstream)
        for one, two in zip(first, again, strict=True):
            # The second backward recomputes the logits and applies 1 / T to them: other roundings.
            torch.testing.assert_close(one, two, rtol=8 * torch.finfo(dtype).eps, atol=1e-5)
        runs = [by_us(operands, target, upstream, reduction=reduction, chunk_tokens=5) for _ in range(2)]
        for one, two, kept in zip(*(run[1:] for run in runs), first, strict=True):
            assert torch.equal(one, two) and torch.equal(one, kept)


def test_no_grad_gives_only_the_loss() -> None:
    operands, target = inputs(9, 8, 20, torch.float32)
    right = by_us(operands, target, None)[0]
    with torch.no_grad():
        loss = fm.ops.linear_cross_entropy(operands[0], operands[1], target, bias=operands[2])
    assert not loss.requires_grad
    torch.testing.assert_close(loss, right, rtol=1e-6, atol=0)


def test_second_derivative() -> None:
    operands, target = inputs(4, 5, 7, torch.float32, bias=False)
    for reduction in ("mean", "none"):
        loss = fm.ops.linear_cross_entropy(operands[0], operands[1], target, reduction=reduction).sum()
        with pytest.raises(RuntimeError, match="cannot be differentiated again"):
            torch.autograd.grad(loss, operands[0], create_graph=True)
    hidden, weight = (x.detach().double().requires_grad_() for x in operands[:2])
    bias = torch.randn(7, dtype=torch.float64, requires_grad=True)

    def loss_of(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return fm.ops.linear_cross_entropy(
            hidden, weight, target, bias=bias, reduction="none", label_smoothing=0.2, z_loss=1e-2
        )

    assert torch.autograd.gradcheck(loss_of, (hidden, weight, bias))
    assert torch.autograd.gradgradcheck(loss_of, (hidden, weight, bias))


def test_shape_of_tiles() -> None:
    wide, half = torch.float32, torch.bfloat16
    assert shapes.tile_shape(4096, 50304, wide, wide, "cpu", None) == (512, 50304)  # 98 MiB
    assert shapes.tile_shape(4096, 50304, half, wide, "cpu", None) == (4096, 512)  # 8 MiB
    assert shapes.tile_shape(8192, 128256, half, half, "cuda", None) == (1024, 128256)  # 250 MiB
    assert shapes.tile_shape(100000, 1000, half, wide, "cpu", None) == (7744, 256)
    assert shapes.tile_shape(10, 1000, wide, wide, "cpu", None) == (10, 1000)
    assert shapes.tile_shape(10, 10**9, wide, wide, "cuda", None) == (10, 10**9)
    assert shapes.tile_shape(0, 0, half, wide, "cpu", None) == (1, 1)
    assert shapes.tile_shape(4096, 50304, wide, wide, "cpu", 100) == (100, 50304)
    for tokens, entries in itertools.product([1, 65, 1000, 4097], [3, 70, 5000]):
        t, v = shapes.tile_shape(tokens, entries, half, wide, "cpu", None)
        assert t >= 1 and v >= 1 and (t % 64 == 0 or t == tokens) and (v % 64 == 0 or v == entries)


def test_errors() -> None:
    hidden, weight, target = torch.randn(2, 3, 8), torch.randn(20, 8), torch.ones(2, 3, dtype=torch.int64)
    call = fm.ops.linear_cross_entropy
    for message, change in [
        ("weight.shape=(20,) must be (vocabulary, hidden_size)", {"weight": weight[:, 0]}),
        ("hidden.shape=(2, 3, 8) must end in hidden_size=7 (weight.shape=(20, 7))", {"weight": weight[:, :7]}),
        ("target.shape=(3,) must be (2, 3)", {"target": target[0]}),
        ("bias.shape=(19,) must be (20,)", {"bias": torch.randn(19)}),
        ("reduction='max' must be one of: mean, sum, none", {"reduction": "max"}),
        ("label_smoothing=1.5 must be in [0, 1]", {"label_smoothing": 1.5}),
        ("softcap=0.0 must be above 0 and finite, or None for no cap", {"softcap": 0.0}),
        ("chunk_tokens=0 must be at least 1, or None", {"chunk_tokens": 0}),
        ("vocab_size=21 must be in [1, weight.shape[0]=20]", {"vocab_size": 21}),
        ("target[4]=20 must be in [0, 20) or ignore_index=-100", {"target": torch.tensor([[1, 1, 1], [1, 20, 1]])}),
    ]:
        arguments = {"hidden": hidden, "weight": weight, "target": target, **change}
        with pytest.raises(InputError) as info:
            call(**arguments)
        assert str(info.value) == message
    for name, change in [("target", {"target": target.float()}), ("hidden", {"hidden": hidden.long()})]:
        with pytest.raises(TypeError, match=f"{name}.dtype="):
            call(**{"hidden": hidden, "weight": weight, "target": target, **change})


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_dtype_of_the_loss(reduction):
    """A loss of 16-bit operands may stay in float32: models convert their logits before the loss."""
    torch.manual_seed(0)
    hidden, weight, target = torch.randn(6, 8).bfloat16(), torch.randn(11, 8).bfloat16(), torch.arange(6)
    wide = fm.ops.linear_cross_entropy(hidden, weight, target, reduction=reduction, dtype=torch.float32)
    assert wide.dtype == torch.float32 and not torch.equal(wide, wide.bfloat16().float())
    narrow = fm.ops.linear_cross_entropy(hidden, weight, target, reduction=reduction)
    assert narrow.dtype == torch.bfloat16 and torch.equal(narrow, wide.bfloat16())
