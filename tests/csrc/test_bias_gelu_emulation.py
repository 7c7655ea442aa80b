"""The values of the CUDA bias_gelu, run on the host: every path, unaligned memory, redzones, orders of blocks."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.testing.cuda_emulation import compile_for_host, host_compiler
from fused_megatron.testing.poisoned_memory import PoisonedMemory
from fused_megatron.testing.tolerances import assert_close_to_reference

pytestmark = pytest.mark.skipif(host_compiler() is None, reason="no C++ compiler")

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
POINTER, INT, LONG = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
FORMS = ["tanh", "none"]


class Parameter(ctypes.Structure):
    _fields_ = (("data", POINTER), ("dtype", INT))


class BiasGelu(ctypes.Structure):
    _fields_ = (
        ("dtype", INT), ("tanh", INT), ("x", POINTER), ("bias", Parameter), ("count", LONG), ("width", LONG),
        ("y", POINTER), ("dy", POINTER), ("dx", POINTER), ("partials", POINTER), ("parts", LONG), ("dbias", Parameter),
    )  # fmt: skip


@pytest.fixture(scope="module")
def kernels(request, tmp_path_factory):
    library = compile_for_host(request.path.with_name("bias_gelu_emulation.cpp"), tmp_path_factory.mktemp("emulation"))
    library.parts.restype = LONG
    return library


def run(kernels, x, bias, dy, *, form="tanh", skip=0, parts=None, need_dx=True, seed=0):
    """(y, dx, dbias) of the emulated kernels; every buffer lies `skip` elements off alignment."""
    memory = PoisonedMemory()
    x, dy = memory.place(x, skip=skip, name="x"), memory.place(dy, skip=skip, name="dy")
    bias = None if bias is None else memory.place(bias, skip=skip, name="bias")
    y, dx = (memory.empty(tuple(x.shape), x.dtype, skip=skip, name=name) for name in ("y", "dx"))
    dbias = None if bias is None else memory.empty(tuple(bias.shape), bias.dtype, name="dbias")
    a = BiasGelu(DTYPE_CODES[x.dtype], form == "tanh", x.data_ptr())
    a.count, a.width = x.numel(), 4096 if bias is None else bias.numel()
    a.y = y.data_ptr()
    if bias is not None:
        a.bias = Parameter(bias.data_ptr(), DTYPE_CODES[bias.dtype])
        a.dbias = Parameter(dbias.data_ptr(), DTYPE_CODES[bias.dtype])
    kernels.set_order_seed(seed)
    kernels.forward(ctypes.byref(a))
    a.y, a.dy, a.dx = None, dy.data_ptr(), dx.data_ptr() if need_dx else None
    a.parts = parts or kernels.parts(ctypes.byref(a), 3)
    partials = memory.empty((a.parts, a.width), torch.float32, name="partials")
    a.partials = None if bias is None else partials.data_ptr()
    kernels.backward(ctypes.byref(a))
    memory.check()
    return y, dx, dbias


def draw(rows, width, dtype, bias_dtype=None, has_bias=True):
    generator = torch.Generator().manual_seed(rows * 1000003 + width)
    x, dy = (torch.randn(rows, width, generator=generator).mul(2).to(dtype) for _ in range(2))
    bias = torch.randn(width, generator=generator).to(bias_dtype or dtype) if has_bias else None
    return x, bias, dy


def torch_results(x, bias, dy, form):
    leaves = [t.detach().requires_grad_() for t in (x, bias) if t is not None]
    y = F.gelu(sum(leaves), approximate=form)
    return [y, *torch.autograd.grad(y, leaves, dy)]


def check(x, bias, dy, results, form="tanh"):
    exact = torch_results(*(None if t is None else t.double() for t in (x, bias, dy)), form)
    wide = torch_results(*(None if t is None else t.float() for t in (x, bias, dy)), form)
    for name, a, e, z in zip(("y", "dx", "dbias"), (t for t in results if t is not None), exact, wide, strict=False):
        assert_close_to_reference(a, e, z.to(a.dtype), name=name)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("dtype", DTYPE_CODES)
@pytest.mark.parametrize("rows,width", [(13, 8), (70, 264), (5, 2056), (3, 4096), (5, 7), (9, 1), (3, 1023), (0, 16)])
def test_values(kernels, rows, width, dtype, form):
    arguments = draw(rows, width, dtype)
    check(*arguments, run(kernels, *arguments, form=form), form)


@pytest.mark.parametrize("dtype", DTYPE_CODES)
@pytest.mark.parametrize("rows,width", [(1, 1), (3, 7), (5, 4096), (3, 2056), (9, 1023)])
def test_without_bias(kernels, rows, width, dtype):
    arguments = draw(rows, width, dtype, has_bias=False)
    check(*arguments, run(kernels, *arguments))


@pytest.mark.parametrize("skip", [1, 3])
@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_unaligned(kernels, dtype, skip):
    arguments = draw(6, 256, dtype)
    check(*arguments, run(kernels, *arguments, skip=skip))


@pytest.mark.parametrize("bias_dtype", DTYPE_CODES)
@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_bias_of_another_dtype(kernels, dtype, bias_dtype):
    arguments = draw(6, 64, dtype, bias_dtype)
    check(*arguments, run(kernels, *arguments))


@pytest.mark.parametrize("width", [64, 33])
def test_any_number_of_parts(kernels, width):
    arguments = draw(45, width, torch.float32)
    for parts in (1, 2, 5, 45, 50):
        check(*arguments, run(kernels, *arguments, parts=parts))


@pytest.mark.parametrize("width", [64, 2056, 33])
def test_bitwise_equal_for_any_order_of_blocks_and_threads(kernels, width):
    arguments = draw(50, width, torch.bfloat16)
    first = run(kernels, *arguments)
    for seed in (1, 6, 75):
        assert all(torch.equal(a, b) for a, b in zip(first, run(kernels, *arguments, seed=seed), strict=True))


def test_dbias_alone(kernels):
    arguments = draw(10, 64, torch.float32)
    full, sums = run(kernels, *arguments), run(kernels, *arguments, need_dx=False)
    assert sums[1].isnan().all()  # untouched
    assert torch.equal(full[2], sums[2])


@pytest.mark.parametrize("form", FORMS)
def test_nan_inf_and_huge(kernels, form):
    nan, inf = float("nan"), float("inf")
    x = torch.tensor([[1.0, nan, inf, -inf, 1e20, -1e20, 88.0, -88.0]])
    y, dx, _ = run(kernels, x, torch.zeros(8), torch.ones(1, 8), form=form)
    assert_close_to_reference(y, F.gelu(x.double(), approximate=form))
    assert dx[0, 1:4].isnan().all()
    torch.testing.assert_close(dx[0, 4:], torch.tensor([1.0, 0.0, 1.0, 0.0]), rtol=0, atol=1e-30)
