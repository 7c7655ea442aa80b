"""The values of the CUDA layer norm, run on the host: every path, unaligned memory, redzones, orders of blocks."""

import ctypes

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.testing.cuda_emulation import compile_for_host, host_compiler
from fused_megatron.testing.poisoned_memory import PoisonedMemory
from fused_megatron.testing.tolerances import assert_close_to_reference

pytestmark = pytest.mark.skipif(host_compiler() is None, reason="no C++ compiler")

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
POINTER, INT, LONG, FLOAT = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64, ctypes.c_float


class Parameter(ctypes.Structure):
    _fields_ = (("data", POINTER), ("dtype", INT))


class Forward(ctypes.Structure):
    _fields_ = (
        ("dtype", INT), ("x", POINTER), ("weight", Parameter), ("bias", Parameter), ("y", POINTER), ("mean", POINTER),
        ("rstd", POINTER), ("rows", LONG), ("width", LONG), ("eps", FLOAT),
    )  # fmt: skip


class Backward(ctypes.Structure):
    _fields_ = (
        ("dtype", INT), ("dy", POINTER), ("x", POINTER), ("weight", Parameter), ("mean", POINTER), ("rstd", POINTER),
        ("dx", POINTER), ("partials", POINTER), ("rows", LONG), ("width", LONG), ("parts", LONG),
        ("dweight", Parameter), ("dbias", Parameter),
    )  # fmt: skip


@pytest.fixture(scope="module")
def kernels(request, tmp_path_factory):
    library = compile_for_host(request.path.with_name("layer_norm_emulation.cpp"), tmp_path_factory.mktemp("emulation"))
    library.parts.restype = LONG
    library.parts.argtypes = (LONG, LONG, INT, INT)
    return library


def parameter(tensor):
    return Parameter(None, 0) if tensor is None else Parameter(tensor.data_ptr(), DTYPE_CODES[tensor.dtype])


def run(kernels, x, weight, bias, dy, *, skip=0, parts=None, need_dx=True, seed=0):
    """(y, mean, rstd, dx, dweight, dbias) of the emulated kernels; every buffer lies `skip` elements off alignment."""
    rows, width = x.shape
    memory = PoisonedMemory()
    x, dy = memory.place(x, skip=skip, name="x"), memory.place(dy, skip=skip, name="dy")
    weight, bias = (None if p is None else memory.place(p, skip=skip, name="parameter") for p in (weight, bias))
    y, dx = (memory.empty((rows, width), x.dtype, skip=skip, name=name) for name in ("y", "dx"))
    mean, rstd = (memory.empty((rows,), torch.float32, name=name) for name in ("mean", "rstd"))
    dweight, dbias = (None if p is None else memory.empty((width,), p.dtype, name="sums") for p in (weight, bias))
    code = DTYPE_CODES[x.dtype]
    kernels.set_order_seed(seed)
    kernels.forward(
        ctypes.byref(
            Forward(
                code, x.data_ptr(), parameter(weight), parameter(bias), y.data_ptr(), mean.data_ptr(), rstd.data_ptr(),
                rows, width, 1e-5,
            )
        )
    )  # fmt: skip
    parts = parts or kernels.parts(rows, width, code, 3)
    partials = memory.empty((parts, 2, width), torch.float32, name="partials")
    need_sums = weight is not None or bias is not None
    kernels.backward(
        ctypes.byref(
            Backward(
                code, dy.data_ptr(), x.data_ptr(), parameter(weight), mean.data_ptr(), rstd.data_ptr(),
                dx.data_ptr() if need_dx else None, partials.data_ptr() if need_sums else None, rows, width, parts,
                parameter(dweight), parameter(dbias),
            )
        )
    )  # fmt: skip
    memory.check()
    return y, mean, rstd, dx, dweight, dbias


def draw(rows, width, dtype, parameter_dtype=None):
    generator = torch.Generator().manual_seed(rows * 1000003 + width)
    x, dy = (torch.randn(rows, width, generator=generator).to(dtype) for _ in range(2))
    weight, bias = (torch.randn(width, generator=generator).to(parameter_dtype or dtype) for _ in range(2))
    return x + 1, weight, bias, dy


def torch_results(x, weight, bias, dy):
    x = x.detach().requires_grad_()
    parameters = [None if p is None else p.detach().requires_grad_() for p in (weight, bias)]
    y = F.layer_norm(x, x.shape[1:], *parameters)
    grads = torch.autograd.grad(y, [t for t in (x, *parameters) if t is not None], dy)
    return [y, *grads]


def check(x, weight, bias, dy, results):
    y, mean, rstd, dx, dweight, dbias = results
    exact = torch_results(*(None if t is None else t.double() for t in (x, weight, bias, dy)))
    wide = torch_results(*(None if t is None else t.float() for t in (x, weight, bias, dy)))
    actual = [t for t in (y, dx, dweight, dbias) if t is not None]
    for name, a, e, z in zip(("y", "dx", "sums", "sums"), actual, exact, wide, strict=False):
        assert_close_to_reference(a, e, z.to(a.dtype), name=name)
    assert_close_to_reference(mean, x.double().mean(1), floor_ulps=8)
    assert_close_to_reference(
        rstd, ((x.double() - x.double().mean(1, keepdim=True)).square().mean(1) + 1e-5).rsqrt(), floor_ulps=8
    )


# (rows, width): for 16-bit and for float32 each width takes another kernel: a warp a row, several warps a row, the
# widest in registers, and the looped ones.
SHAPES = [(13, 8), (11, 256), (5, 512), (7, 1000), (4, 3072), (3, 8192), (2, 8200)]
ODD_SHAPES = [(5, 7), (9, 1), (3, 1023), (0, 16)]


@pytest.mark.parametrize("dtype", DTYPE_CODES)
@pytest.mark.parametrize("rows,width", SHAPES + ODD_SHAPES)
def test_values(kernels, rows, width, dtype):
    arguments = draw(rows, width, dtype)
    check(*arguments, run(kernels, *arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_too_wide_for_registers(kernels, dtype):
    arguments = draw(2, 33000 // dtype.itemsize * 2, dtype)
    check(*arguments, run(kernels, *arguments))


@pytest.mark.parametrize("skip", [1, 3])
@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_unaligned(kernels, dtype, skip):
    arguments = draw(6, 256, dtype)
    check(*arguments, run(kernels, *arguments, skip=skip))


@pytest.mark.parametrize("parameter_dtype", DTYPE_CODES)
@pytest.mark.parametrize("dtype", DTYPE_CODES)
def test_parameters_of_another_dtype(kernels, dtype, parameter_dtype):
    arguments = draw(6, 64, dtype, parameter_dtype)
    check(*arguments, run(kernels, *arguments))


@pytest.mark.parametrize("width", [64, 65])
def test_without_weight_or_bias(kernels, width):
    x, weight, bias, dy = draw(6, width, torch.bfloat16)
    for w, b in ((weight, None), (None, bias), (None, None)):
        check(x, w, b, dy, run(kernels, x, w, b, dy))


@pytest.mark.parametrize("width", [64, 2048, 33])
def test_any_number_of_parts(kernels, width):
    arguments = draw(21, width, torch.float32)
    for parts in (1, 2, 5, 21, 30):
        check(*arguments, run(kernels, *arguments, parts=parts))


@pytest.mark.parametrize("width", [64, 520, 3072, 33])
def test_bitwise_equal_for_any_order_of_blocks_and_threads(kernels, width):
    arguments = draw(19, width, torch.bfloat16)
    first = run(kernels, *arguments)
    for seed in (1, 6, 75):
        assert all(torch.equal(a, b) for a, b in zip(first, run(kernels, *arguments, seed=seed), strict=True))


def test_sums_alone(kernels):
    arguments = draw(10, 64, torch.float32)
    full, sums = run(kernels, *arguments), run(kernels, *arguments, need_dx=False)
    assert sums[3].isnan().all()  # untouched
    assert torch.equal(full[4], sums[4]) and torch.equal(full[5], sums[5])


def test_parts_stay_small_and_fill_the_gpu(kernels):
    for rows, width in ((8192, 8192), (32768, 4096), (262144, 1024), (2048, 768)):
        parts = kernels.parts(rows, width, 1, 132)
        traffic = 16 * parts * width / (6 * rows * width)
        assert parts <= 132 or traffic <= 0.02
        assert parts >= 132 or parts >= rows // 8
