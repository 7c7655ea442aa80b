"""Start here when the count of a step's kernels is wrong: launches, bytes or kind of an op on the meta device."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from fused_megatron import ops
from fused_megatron.audit import cost_table
from fused_megatron.observe import kernel_counts
from fused_megatron.observe.kernel_counts import AttentionOfAGPU, Kernels, kernels_of

ROOT = Path(__file__).parents[2]


class Counted(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.found: dict[str, list[Kernels]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        kernels = kernels_of(func, args, kwargs or {}, results)
        if kernels is not None:
            self.found.setdefault(func.overloadpacket.__name__, []).append(kernels)
        return results


def counted(run):
    with Counted() as counts:
        run()
    return counts.found


def on_meta(*shape, dtype=torch.bfloat16, grad=False):
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def test_bytes_of_what_is_read_and_written():
    x, weight, table = on_meta(5, 3), on_meta(7, 3), on_meta(100, 3)
    total = on_meta(5, 7, dtype=torch.float32)
    ids = torch.zeros(5, dtype=torch.int64, device="meta")
    for run, num_bytes in [
        (lambda: F.linear(x, weight), 2 * (15 + 21 + 35)),
        (lambda: total.add_(1.0), 4 * 2 * 35),
        (lambda: total.zero_(), 4 * 35),
        (lambda: total.copy_(on_meta(5, 7)), (4 + 2) * 35),
        (lambda: torch.mm(x, weight.t(), out=on_meta(5, 7)), 2 * (15 + 21 + 35)),
        (lambda: torch.add(x.new_empty(1, 3).expand(5, 3), x), 2 * (3 + 15 + 15)),
        (lambda: F.embedding(ids, table), 2 * 2 * 15),
        (lambda: on_meta(100, 3, dtype=torch.float32).index_add_(0, ids, x.float()), 4 * 3 * 15),
    ]:
        *_, (kernels,) = counted(run).values()
        assert kernels.num_bytes == num_bytes, run
        assert kernels.launches == 1


def test_views_empty_tensors_and_the_host_have_no_kernels():
    x = on_meta(4, 6)
    assert counted(lambda: (x.view(6, 4).t()[1:].detach(), torch.empty_like(x), x.split(2))) == {}
    assert counted(lambda: on_meta(0, 3).add_(1)) == {}
    assert counted(lambda: torch.ones(3).add_(1)) == {}


def test_attention_is_one_kernel():
    query, key, value = (on_meta(2, heads, 16, 8, grad=True) for heads in (4, 2, 2))

    def run(context):
        with context:
            y = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)
        y.sum().backward()

    found = counted(lambda: run(AttentionOfAGPU()))
    (forward,) = found["_scaled_dot_product_flash_attention"]
    (backward,) = found["_scaled_dot_product_flash_attention_backward"]
    assert (forward.launches, backward.launches) == (1, 5) and forward.kind == backward.kind == "attention"
    mask = torch.zeros(16, 16, dtype=torch.bool, device="meta")  # FlashAttention takes none
    with AttentionOfAGPU():
        found = counted(lambda: F.scaled_dot_product_attention(query, query, query, attn_mask=mask))
    assert "_scaled_dot_product_flash_attention" not in found


def test_adamw_writes_gradients_only_to_zero_them():
    main, first, second, gradient = ([on_meta(8, dtype=torch.float32)] for _ in range(4))
    low, one = [on_meta(8)], torch.ones((), device="meta")
    for zero, num_bytes in [(False, 4 * (3 * 2 + 1) + 2), (True, 4 * 4 * 2 + 2)]:
        arguments = (main, first, second, gradient, low, one, None, 0.1, 0.9, 0.99, 1e-8, 0.0, 1, zero)
        op = torch.ops.fused_megatron.adamw_.default
        assert kernels_of(op, arguments, {}, None) == Kernels("optimizer", 1, 8 * num_bytes + one.nbytes)
    many = 65 * [main[0]], 65 * [first[0]], 65 * [second[0]], 65 * [gradient[0]], [], *arguments[5:]
    kernels = kernels_of(op, many, {}, None)
    assert kernels is not None and kernels.launches == 2


FORMS = {
    "layer_norm": lambda x, weight, bias: ops.layer_norm(x, weight, bias),
    "rms_norm": lambda x, weight, bias: ops.rms_norm(x, weight),
    "bias_gelu": lambda x, weight, bias: ops.bias_gelu(x, bias),
    "bias_swiglu": lambda x, weight, bias: ops.bias_swiglu(x, bias),
    "bias_geglu": lambda x, weight, bias: ops.bias_geglu(x, bias),
    "bias_dropout_add": lambda x, weight, bias: ops.bias_dropout_add(x, bias, x.detach(), 0.0),
}


@pytest.mark.parametrize("op", FORMS)
def test_launches_are_the_kernels_that_ran(op):
    """The ledger of kernels (docs/kernel_ledger.md) has a row for each kernel that a direction launches."""
    x, weight, bias = on_meta(4, 6, grad=True), on_meta(6, grad=True), on_meta(6, grad=True)
    found = counted(lambda: FORMS[op](x, weight, bias).sum().backward())
    rows = cost_table.parsed((ROOT / "docs" / "kernel_ledger.md").read_text())
    for step in ("forward", "backward"):
        shown = {row[2] for row in rows if row[0] == op and row[1] == step and row[3:5] == ("4096", "bf16")}
        (kernels,) = found[f"{op}_{step}"]
        assert kernels.launches == len(shown) > 0
    x = x.detach().requires_grad_()
    found = counted(lambda: FORMS[op](x, None if "norm" in op else weight.detach(), None).sum().backward())
    assert [kernels.launches for kernels in found.get(f"{op}_backward", [])] in ([1], [])


def test_tensors_of_a_launch():
    def constant(name, file):
        return int(re.search(rf"{name} = (\d+);", (ROOT / "csrc" / file).read_text())[1])

    assert constant("kAdamwTensors", "adamw/kernels.cuh") == kernel_counts.ADAMW_TENSORS
    assert constant("kSquaresTensors", "sum_of_squares/kernels.cuh") == kernel_counts.SQUARES_TENSORS


def test_every_op_has_a_kind():
    names = {
        schema.name.partition("::")[2]
        for schema in torch._C._jit_get_all_schemas()
        if schema.name.startswith("fused_megatron::") and not schema.name.endswith("_in_a_test")
    }
    assert names and [name for name in names if kernel_counts.kind_of(name) == kernel_counts.OTHER] == []
