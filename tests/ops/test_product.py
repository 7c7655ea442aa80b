"""Start here when a layer multiplies matrices by another function than ops/product.py."""

import ast
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from fused_megatron.ops.product import product

PACKAGE = Path(__file__).parents[2] / "fused_megatron"
ROOMS = ("ops", "overlap", "tensor_parallel", "context_parallel", "expert_parallel", "models", "interop")
PRODUCTS = {"linear", "mm", "bmm", "mv", "addmm", "addbmm", "baddbmm", "addmv", "einsum", "tensordot"}
PRODUCTS |= {"scaled_mm", "grouped_mm"}
# Products that a recipe for linear layers does not replace, or replaces by another op of the same file.
ALLOWED = {
    "ops/product.py": "the one",
    "ops/attention.py": "scores and context of attention: no weight among the operands",
    "ops/attention_kernels.py": "the same for a part of the scores",
    "ops/grouped_product.py": "torch's product of all groups in one kernel on a GPU",
    "overlap/symmetric_memory.py": "torch's products fused with their collective, which have scaled twins of their own",
}


def direct_products(source: str) -> list[tuple[int, str]]:
    """Return (line, text) of every matrix product in a source file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
            found.append((node.lineno, ast.unparse(node)))
        names = []
        if isinstance(node, ast.Attribute):
            names = [node.attr]
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            names = [node.func.id]
        elif isinstance(node, ast.ImportFrom):
            names = [alias.name for alias in node.names]
        if any(name.strip("_") in PRODUCTS or "matmul" in name for name in names):
            found.append((node.lineno, ast.unparse(node)))
    return found


def test_layers_call_no_other_product():
    paths = sorted(path for room in ROOMS for path in (PACKAGE / room).rglob("*.py"))
    found = {path.relative_to(PACKAGE).as_posix(): direct_products(path.read_text(encoding="utf-8")) for path in paths}
    assert {path for path, products in found.items() if products} == set(ALLOWED), found


@pytest.mark.parametrize(
    "source",
    [
        "y = a @ b",
        "a @= b",
        "F.linear(x, w)",
        "x.addmm_(a, b)",
        "f = torch.mm",
        "linear(x, w)",
        "a.matmul(b)",
        "from torch import mm",
    ],
)
def test_the_search_finds(source):
    assert direct_products(source)


def test_the_search_lets_pass():
    assert not direct_products("nn.Linear(2, 2); column_linear(x, linear); x.linears; a * b")


def operands(dtype):
    generator = torch.Generator().manual_seed(5)
    shapes = {"x": (37, 24), "weight": (40, 24), "bias": (40,), "total": (37, 40)}
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_equals_torch_bit_for_bit(dtype):
    x, weight, bias, total = operands(dtype).values()
    y, dy = F.linear(x, weight, bias), total
    assert torch.equal(product(x, weight, bias), y)
    assert torch.equal(product(x.view(37, 1, 24), weight, bias).view_as(y), y)
    assert torch.equal(product(dy, weight.t()), dy @ weight) and torch.equal(product(dy.t(), x.t()), dy.t() @ x)
    out = torch.full_like(y, torch.nan)
    assert product(x, weight, bias, out=out) is out and torch.equal(out, torch.addmm(bias, x, weight.t()))
    assert torch.equal(product(x, weight, out=out), torch.mm(x, weight.t()))
    assert torch.equal(product(x, weight, out=total.clone(), add=True), torch.addmm(total, x, weight.t()))


def test_a_wider_sum_of_16_bit_operands():
    x, weight, _, total = operands(torch.bfloat16).values()
    rounded = torch.mm(x, weight.t()).float()
    out = torch.full(total.shape, torch.nan)
    assert torch.equal(product(x, weight, out=out), rounded)
    assert torch.equal(product(x, weight, out=total.float(), add=True), total.float() + rounded)


def test_gradients_equal_linear():
    leaves = [operand.requires_grad_() for operand in list(operands(torch.float64).values())[:3]]
    assert torch.autograd.gradcheck(product, leaves)
