"""Start here when cross_entropy goes wrong on the CPU only, or refuses an input."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import fused_megatron as fm
from fused_megatron.checks import InputError

pytestmark = pytest.mark.cpu_kernel
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
EVERYTHING: dict[str, Any] = {"label_smoothing": 0.3, "z_loss": 1e-2, "softcap": 5.0}


def inputs(num_rows, vocab_size, dtype):
    """Return logits, targets (some ignored), and an upstream gradient for each token."""
    torch.manual_seed(0)
    logits = (torch.randn(num_rows, vocab_size) * 3).to(dtype)
    target = torch.randint(0, vocab_size, (num_rows,))
    target[::5] = -100
    return logits, target, torch.randn(num_rows).to(dtype)


def run(loss_of, logits, target, upstream, **form):
    """Return (loss, gradient)."""
    x = logits.detach().requires_grad_()
    loss = loss_of(x, target, reduction="none", **form)
    return loss.detach(), torch.autograd.grad(loss, x, upstream.to(loss.dtype))[0]


@pytest.mark.parametrize("form", [{"label_smoothing": 0.1}, EVERYTHING], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gradients_too_large_for_caches(dtype, form):
    """Gradients of 32 MiB or more are written past the caches, with the same bits. An odd width: any row alignment."""
    logits, target, upstream = inputs(34 * 2**20 // dtype.itemsize // 8191, 8191, dtype)
    loss, gradient = run(fm.ops.cross_entropy, logits, target, upstream, **form)
    for rows in (slice(0, 19), slice(400, 417), slice(-18, None)):
        few_loss, few = run(fm.ops.cross_entropy, logits[rows], target[rows], upstream[rows], **form)
        assert torch.equal(loss[rows], few_loss) and torch.equal(gradient[rows], few)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_rounding_of_16_bits(dtype):
    """Gradients over the full range, with infinities and NaN, equal float32 gradients rounded to nearest even."""
    scale = torch.tensor([0.0, 1e-8, 3e-7, 6e-5, 1.0, 3e4, 7e4, 1e20, 3.4e38, torch.inf, torch.nan])
    logits, target, _ = inputs(len(scale), 1027, dtype)
    target.clamp_(min=0)
    wide = logits.float()
    lse = torch.stack((wide.logsumexp(dim=1), torch.zeros(len(scale))), dim=1)
    terms = fm.ops.LossTerms(1027)
    narrow = fm.ops.cross_entropy_gradient(scale, logits, target, lse, terms)
    expected = fm.ops.cross_entropy_gradient(scale, wide, target, lse, terms).to(dtype)
    torch.testing.assert_close(narrow, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_16_bits(dtype):
    """Each number is in a row of otherwise -inf, so that lse equals it."""
    every = torch.arange(-(2**15), 2**15).to(torch.int16).view(dtype)
    rows = torch.arange(2**16)
    logits = torch.full((2**16, 64), -torch.inf, dtype=dtype)
    logits[rows, rows % 64] = every
    lse = fm.ops.cross_entropy_statistics(logits, (rows + 1) % 64, fm.ops.LossTerms(64))[:, :2].sum(1)
    expected = every.float().masked_fill(every == torch.inf, torch.nan)  # as in torch
    assert torch.equal(lse.nan_to_num(nan=7), expected.nan_to_num(nan=7))


@pytest.mark.parametrize("form", [{"label_smoothing": 0.1}, EVERYTHING], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_bits_with_any_number_of_threads(dtype, form):
    arguments = inputs(67, 2051, dtype)
    before = torch.get_num_threads()
    try:
        results = []
        for num_threads in (1, 2, 3):
            torch.set_num_threads(num_threads)
            results.append(run(fm.ops.cross_entropy, *arguments, **form))
    finally:
        torch.set_num_threads(before)
    for loss, gradient in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(gradient, results[0][1])


def test_saves_the_logits_without_a_copy():
    logits, target, _ = inputs(11, 1025, torch.bfloat16)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
        fm.ops.cross_entropy(logits.requires_grad_(), target, reduction="none")
    assert [x.data_ptr() for x in saved if x.numel() > 2 * 11] == [logits.data_ptr()]


def test_gradcheck_in_float64():
    logits = torch.randn(4, 9, dtype=torch.float64, requires_grad=True)
    target = torch.tensor([1, -100, 6, 0])

    def loss(x):
        return fm.ops.cross_entropy(x, target, vocab_size=7, inplace_backward=True, **EVERYTHING)

    assert torch.autograd.gradcheck(loss, logits)
    assert torch.autograd.gradgradcheck(loss, logits)


def test_gradient_of_the_gradient_is_refused():
    logits, target, _ = inputs(3, 9, torch.float32)
    logits.requires_grad_()
    with pytest.raises(RuntimeError, match="cannot be differentiated again"):
        torch.autograd.grad(fm.ops.cross_entropy(logits, target), logits, create_graph=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_opcheck(dtype):
    logits, target, _ = inputs(5, 37, dtype)
    ops = torch.ops.fused_megatron
    scalars = fm.ops.LossTerms(60, 10, label_smoothing=0.1, z_loss=0.1, softcap=5.0).scalars()
    torch.library.opcheck(ops.cross_entropy_statistics, (logits, target, *scalars))
    torch.library.opcheck(ops.cross_entropy_merge, (torch.randn(3, 5, 3), target, 37, *scalars))
    arguments = (torch.randn(5), logits, target, torch.randn(5, 2), *scalars)
    torch.library.opcheck(ops.cross_entropy_gradient, arguments)
    torch.library.opcheck(ops.cross_entropy_gradient_, arguments)


@pytest.mark.parametrize("inplace_backward", [False, True])
def test_compiles_without_a_graph_break(inplace_backward):
    logits, target, _ = inputs(11, 1025, torch.float32)
    logits.requires_grad_()

    def step(x, target):
        options = {"inplace_backward": inplace_backward, "check_target": inplace_backward, **EVERYTHING}
        return fm.ops.cross_entropy(x * 2.0, target, **options)

    compiled_step = torch.compile(step, fullgraph=True, backend="aot_eager")
    eager, compiled = step(logits, target), compiled_step(logits, target)
    torch.testing.assert_close(compiled, eager)
    torch.testing.assert_close(torch.autograd.grad(compiled, logits), torch.autograd.grad(eager, logits))
    target[3] = 1025
    if inplace_backward:
        with pytest.raises(RuntimeError, match=r"target must be in \[0, 1025\) or ignore_index=-100"):
            compiled_step(logits, target)
    else:
        assert compiled_step(logits, target).isnan()


def test_autocast_returns_float32_as_torch():
    logits, target, _ = inputs(11, 37, torch.bfloat16)
    with torch.autocast("cpu"):
        ours, torchs = fm.ops.cross_entropy(logits, target), F.cross_entropy(logits, target)
    assert ours.dtype == torchs.dtype == torch.float32
    torch.testing.assert_close(ours, torchs)


@pytest.mark.parametrize("check_target", [None, True])
@pytest.mark.parametrize("bad", [-1, 9, -99])
def test_invalid_target(bad, check_target):
    logits, target = torch.randn(3, 12), torch.tensor([0, 1, bad])
    with pytest.raises(InputError, match=rf"target\[2\]={bad} must be in \[0, 9\) or ignore_index=-100"):
        fm.ops.cross_entropy(logits, target, vocab_size=9, check_target=check_target)
    with pytest.raises(InputError, match=rf"target\[2\]={bad} must be in \[0, 9\)"):
        fm.ops.cross_entropy_statistics(logits, target, fm.ops.LossTerms(9), check_target=check_target)


def test_targets_on_a_gpu_are_not_checked_by_default():
    """A fake tensor stands for a GPU's: reading its values is an error."""
    with torch._subclasses.FakeTensorMode():
        logits, target = torch.empty(3, 9, device="cuda"), torch.empty(3, dtype=torch.int64, device="cuda")
        assert fm.ops.cross_entropy(logits, target).device.type == "cuda"
        with pytest.raises(torch._subclasses.fake_tensor.DataDependentOutputException):
            fm.ops.cross_entropy(logits, target, check_target=True)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"reduction": "max"}, InputError, "reduction='max' must be one of: mean, sum, none"),
        ({"label_smoothing": 1.5}, InputError, r"label_smoothing=1.5 must be in \[0, 1\]"),
        ({"target": torch.zeros(4, dtype=torch.int64)}, InputError, r"target.shape=\(4,\) must be \(3,\)"),
        ({"target": torch.zeros(3)}, TypeError, "target.dtype=float32 must be one of: int64"),
        ({"logits": torch.zeros(3, 9, dtype=torch.int64)}, TypeError, "logits.dtype=int64 must be one of: float32"),
        ({"softcap": 0.0}, InputError, "softcap=0.0 must be above 0 and finite, or None for no cap"),
        ({"softcap": float("nan")}, InputError, "softcap=nan must be above 0"),
        ({"vocab_size": 10}, InputError, "vocab_size=10 must be at most the number of columns, 9"),
        ({"vocab_size": 0}, InputError, "vocab_size=0 must be at least 1"),
        ({"weight": torch.ones(9)}, InputError, "weight must be None: class weights are not supported"),
        ({"ignore_index": torch.ones(9)}, InputError, "weight must be None: class weights are not supported"),
    ],
    ids=str,
)
def test_mistakes(arguments: dict[str, Any], error: type[Exception], message: str):
    usual = {"logits": torch.randn(3, 9), "target": torch.zeros(3, dtype=torch.int64)}
    with pytest.raises(error, match=message):
        fm.ops.cross_entropy(**{**usual, **arguments})


def test_gradient_is_not_written_over_rows_that_overlap():
    logits, target = torch.randn(1, 9).expand(3, 9), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(InputError, match=r"logits_shard.stride\(\)=\(0, 1\) must have dense rows that do not overlap"):
        fm.ops.cross_entropy_gradient_(torch.ones(3), logits, target, torch.ones(3, 2), fm.ops.LossTerms(9))


def test_raw_ops_refuse_tensors_that_are_too_small():
    logits, target, lse = torch.randn(3, 9), torch.zeros(3, dtype=torch.int64), torch.ones(3, 2)
    ops, terms = torch.ops.fused_megatron, fm.ops.LossTerms(9).scalars()
    with pytest.raises(RuntimeError, match="target must be contiguous, one for every token"):
        ops.cross_entropy_statistics(logits, target[:2], *terms)
    with pytest.raises(RuntimeError, match=r"logits must be \[tokens, columns\], the columns side by side"):
        ops.cross_entropy_statistics(logits.t(), torch.zeros(9, dtype=torch.int64), *terms)
    with pytest.raises(RuntimeError, match="lse must be contiguous float32, two for every token"):
        ops.cross_entropy_gradient(torch.ones(3), logits, target, lse[:2], *terms)
    with pytest.raises(RuntimeError, match="logits must be float32, bfloat16 or float16"):
        ops.cross_entropy_statistics(logits.double(), target, *terms)
