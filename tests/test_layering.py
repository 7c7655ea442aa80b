"""Start here when an import goes up in the picture of the layers (docs/architecture.md)."""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# From top to bottom. Add a new folder or top-level file to its row.
LAYERS = [
    {"__main__"},
    {"cli"},
    {"__init__"},
    {"experiments"},
    {"training", "audit", "benchmarking", "doctor"},
    {"planning"},
    {"assembly", "hugging_face"},
    {"testing", "inference"},
    {"models", "interop", "data_parallel", "pipeline"},
    {"context_parallel", "expert_parallel", "tensor_parallel"},
    {"modules", "overlap", "checkpoint", "data"},
    {"sharding"},
    {"collectives", "mesh"},
    {"ops", "observe"},
    {
        "kernels",
        "extension",
        "reference",
        "config",
        "weight_files",
        "durable",
        "kept_pages",
        "terminal_tables",
    },
    {"untrusted_files"},
    {"checks", "deprecation", "optional_packages"},
]
HEIGHT = {name: -row for row, names in enumerate(LAYERS) for name in names}
# Forbidden imports of rows below: the pipeline knows no model and no tensor parallelism.
FORBIDDEN = {"pipeline": {"models", "tensor_parallel"}}
DISTRIBUTED = {
    "observe",
    "mesh",
    "collectives",
    "sharding",
    "overlap",
    "checkpoint",
    "tensor_parallel",
    "context_parallel",
    "expert_parallel",
    "data_parallel",
    "pipeline",
    "interop",
    "hugging_face",
    "assembly",
    "planning",
    "training",
    "testing",
    "benchmarking",
    "doctor",
    "experiments",
}
TRITON = {"kernels", "audit"}
NO_MODULES = {"ops", "kernels"}


def layer_of(path: Path) -> str:
    """Return the layer of a source file, by its path relative to the repository."""
    parts = path.with_suffix("").parts
    return parts[0] if parts[0] == "kernels" else parts[1]


def imported_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Find (line, dotted name) of every import and of every use of torch.distributed and nn.Module."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            prefix = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{prefix}.{alias.name}") for alias in node.names)
        elif isinstance(node, ast.Attribute):
            name = ast.unparse(node)
            if name.startswith(("torch.distributed", "fused_megatron.")) or name.endswith("nn.Module"):
                yield node.lineno, name
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith(("import_module", "__import__")):
            yield from ((node.lineno, str(arg.value)) for arg in node.args[:1] if isinstance(arg, ast.Constant))


def fault(layer: str, name: str) -> str | None:
    """Return why a file of the layer must not use the dotted name, or None."""
    parts = name.split(".")
    if name.startswith("."):
        return "relative import"
    if parts[0] == "kernels":
        return "import kernels as fused_megatron.kernels"
    if parts[:2] == ["torch", "distributed"] and layer not in DISTRIBUTED:
        return "torch.distributed has no place in this layer"
    if parts[0] == "triton" and layer not in TRITON:
        return "triton has no place in this layer"
    if (name.endswith("nn.Module") or name.endswith("nn.modules.Module")) and layer in NO_MODULES:
        return "nn.Module has no place in this layer"
    if parts[0] != "fused_megatron":
        return None
    # Names of the top package itself (fused_megatron.init_mesh) come from its __init__.
    target = parts[1] if len(parts) > 1 and parts[1] in HEIGHT else "__init__"
    if target == layer:
        return None
    if HEIGHT[target] >= HEIGHT[layer] or target in FORBIDDEN.get(layer, ()):
        return f"{layer} must not import {target}"
    return None


def faults(layer: str, source: str) -> list[str]:
    """Return every breach of the picture in a source text of the layer, as "line: reason"."""
    if layer not in HEIGHT:
        return [f"0: no layer {layer!r} in LAYERS"]
    found = {(line, fault(layer, name)) for line, name in imported_names(ast.parse(source))}
    return [f"{line}: {reason}" for line, reason in sorted(found, key=str) if reason]


@cache
def sources() -> list[Path]:
    package = [p for p in (ROOT / "fused_megatron").rglob("*.py") if "kernels" not in p.parts]
    return [p.relative_to(ROOT) for p in sorted([*package, *(ROOT / "kernels").rglob("*.py")])]


@pytest.mark.parametrize("layer", sorted({layer_of(path) for path in sources()}))
def test_files_keep_the_picture(layer):
    paths = [path for path in sources() if layer_of(path) == layer]
    texts = {path: (ROOT / path).read_text(encoding="utf-8") for path in paths}
    assert [f"{path}: {fault}" for path, text in texts.items() for fault in faults(layer, text)] == []


def test_kernels_are_one_flat_folder_without_init():
    assert [p.name for p in (ROOT / "kernels").iterdir() if p.is_dir() and p.name != "__pycache__"] == []
    assert not (ROOT / "kernels" / "__init__.py").exists()


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("ops", "from fused_megatron.modules import layer_norm"),
        ("ops", "from fused_megatron import modules"),
        ("ops", "import fused_megatron.modules.layer_norm as m"),
        ("ops", "def f():\n    from fused_megatron.modules import layer_norm"),
        ("ops", "import importlib\nimportlib.import_module('fused_megatron.modules')"),
        ("ops", "from fused_megatron import mesh"),
        ("ops", "import fused_megatron"),
        ("ops", "from fused_megatron import init_mesh"),
        ("ops", "from . import registration"),
        ("ops", "from .registration import define_op"),
        ("ops", "import kernels.cross_entropy"),
        ("ops", "import torch.distributed as dist"),
        ("ops", "from torch import distributed"),
        ("ops", "from torch.distributed import ProcessGroup"),
        ("ops", "import torch\ntorch.distributed.barrier()"),
        ("models", "import torch.distributed as dist"),
        ("ops", "import triton"),
        ("training", "from triton import language as tl"),
        ("ops", "from torch import nn\nclass A(nn.Module): pass"),
        ("kernels", "from torch.nn import Module"),
        ("pipeline", "from fused_megatron.tensor_parallel import ColumnParallelLinear"),
        ("pipeline", "from fused_megatron.models import gpt"),
        ("testing", "from fused_megatron.training import trainer"),
        ("sharding", "from fused_megatron.overlap import column_linear"),
        ("collectives", "from fused_megatron import mesh"),
        ("checks", "from fused_megatron import config"),
        ("training", "from fused_megatron import cli"),
        ("training", "import fused_megatron"),
        ("__init__", "from fused_megatron import cli"),
        ("brand_new_folder", "import torch"),
    ],
)
def test_checker_finds_fault(layer, source):
    assert len(faults(layer, source)) == 1


@pytest.mark.parametrize(
    ("layer", "source"),
    [
        ("ops", "from fused_megatron import extension\nfrom fused_megatron.ops.registration import define_op"),
        ("ops", "from fused_megatron.kernels import cross_entropy"),
        ("kernels", "import triton\nimport triton.language as tl"),
        ("modules", "import torch\nclass LayerNorm(torch.nn.LayerNorm): pass"),
        ("pipeline", "import torch.distributed as dist\nfrom fused_megatron import mesh"),
        ("training", "from fused_megatron.models import gpt\nfrom fused_megatron.pipeline import executor"),
        ("config", "from fused_megatron.checks import check"),
        ("__main__", "from fused_megatron.cli import main"),
        ("__init__", "from fused_megatron import ops, training"),
        ("cli", "import fused_megatron\nfrom fused_megatron.testing import audit"),
    ],
)
def test_checker_passes_what_is_allowed(layer, source):
    assert faults(layer, source) == []
