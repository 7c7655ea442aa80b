"""Facts about the installation: requirements, torch, the compiled library and its kernels."""

import importlib
import importlib.metadata
import platform
import re
import sys
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from fused_megatron.checks import first_line
from fused_megatron.doctor.device_code import device_code, toolkit_release
from fused_megatron.doctor.facts import AttentionKernel, Installation, Library, OpKernels, Package, Torch

_PACKAGE = Path(__file__).parents[1]
_MESSAGE_CHARACTERS = 200  # longest error message
# Ops that are made of another op and of torch's own products; they run where the other op runs.
_COMPOSED = {"linear_cross_entropy": "cross_entropy"}
_OF_TORCH = {"attention", "permute_weights"}  # run on torch's kernels only
# Names of kernels that differ from the name of their op.
_KERNEL_NAMES = {
    "combine_tokens": "expert_combine",
    "order_by_expert": "expert_order",
    "permute_tokens": "expert_permute",
    "route_tokens": "expert_routing",
}


def find_installation() -> Installation:
    """Find our version and the installed version of every requirement."""
    root = _PACKAGE.parent
    checkout = root if (root / "csrc").is_dir() and (root / "pyproject.toml").is_file() else None
    version, texts = _declared_in_checkout(checkout) if checkout else _declared_in_metadata()
    return Installation(
        version=version,
        python=platform.python_version(),
        platform=f"{platform.system()} {platform.machine()}",
        checkout=str(checkout) if checkout else None,
        packages=tuple(_packages(texts)),
    )


def _declared_in_checkout(checkout: Path) -> tuple[str | None, list[str]]:
    """Return version and requirements from pyproject.toml; a checkout's metadata may be old or missing."""
    try:
        toml: Any = importlib.import_module("tomllib" if sys.version_info >= (3, 11) else "tomli")
        project = toml.loads((checkout / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    except ImportError:  # Python 3.10 without its dependencies
        return _declared_in_metadata()
    extras: dict[str, list[str]] = project.get("optional-dependencies", {})
    texts = [*project["dependencies"]]
    texts += [f'{text}; extra == "{extra}"' for extra, asked in extras.items() for text in asked]
    return project["version"], texts


def _declared_in_metadata() -> tuple[str | None, list[str]]:
    try:
        return importlib.metadata.version("fused-megatron"), importlib.metadata.requires("fused-megatron") or []
    except importlib.metadata.PackageNotFoundError:
        return None, ["torch>=2.13", "numpy"]


def _packages(texts: Iterable[str]) -> Iterable[Package]:
    """Parse requirements in the forms that we use: a name, one lower bound, markers of Python, system and extra."""
    for text in texts:
        requirement, _, marker = text.partition(";")
        found = re.match(r"\s*([\w.-]+)\s*(?:>=\s*([\w.]+))?", requirement)
        if found is None or found[1] == "fused-megatron" or not _is_meant(marker):
            continue
        extra = re.search(r"extra == ['\"]([\w-]+)['\"]", marker)
        if extra is not None and extra[1] == "dev":  # developers run `make setup`
            continue
        yield Package(found[1], found[2] or "", _installed_version(found[1]), extra[1] if extra else None)


def _is_meant(marker: str) -> bool:
    system = re.search(r"platform_system == ['\"](\w+)['\"]", marker)
    older = re.search(r"python_version < ['\"]3\.(\d+)['\"]", marker)
    return (system is None or system[1] == platform.system()) and (older is None or sys.version_info[1] < int(older[1]))


def _installed_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def find_torch() -> Torch:
    """Import torch, since only an import shows whether it works."""
    try:
        torch = importlib.import_module("torch")
        dist = importlib.import_module("torch.distributed")
        build = f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"
        if getattr(torch.version, "hip", None):
            build = f"ROCm {torch.version.hip}"
        backends = {"gloo": False, "nccl": False}
        if dist.is_available():
            backends = {"gloo": dist.is_gloo_available(), "nccl": dist.is_nccl_available()}
        with warnings.catch_warnings():  # torch warns about the driver; the findings report that
            warnings.simplefilter("ignore")
            gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
        return Torch(None, build, backends, gpus, torch.get_num_threads())
    except Exception as error:  # a broken installation may raise anything
        return Torch(error=first_line(error)[:_MESSAGE_CHARACTERS])


def find_library(torch_works: bool, chosen: str | None) -> Library:
    """Find the compiled library, load it, and list its kernels and GPU architectures.

    Args:
        torch_works: load the library; False: only look at the file.
        chosen: value of FUSED_MEGATRON_LIBRARY; None if it is not set.
    """
    path = _PACKAGE / "_torch_ops.so" if not chosen else Path(chosen)
    exists = path.is_file() and chosen != ""
    loads, reason, ops = _loaded() if torch_works else (False, "" if exists else "is not built", ())
    return Library(
        path=str(path),
        exists=exists,
        loads=loads,
        reason=reason,
        device_code=device_code(path) if exists else (),
        toolkit=toolkit_release(path) if exists else None,
        changed_since=_newer_source(path) if exists and not chosen else None,
        ops=ops,
        attention=_attention_kernels() if torch_works else (),
    )


def _loaded() -> tuple[bool, str, tuple[OpKernels, ...]]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            extension = importlib.import_module("fused_megatron.extension")
            loads = extension.load_library()
            ops = _op_kernels()
        except Exception as error:  # torch may be too old
            return False, first_line(error)[:_MESSAGE_CHARACTERS], ()
    messages = "".join(str(warning.message) for warning in caught)
    reason = re.search(r"the compiled library (.*?); all ops", messages, re.DOTALL)
    return loads, "" if loads else reason[1] if reason else messages, ops


def _op_kernels() -> tuple[OpKernels, ...]:
    torch = importlib.import_module("torch")
    ops = importlib.import_module("fused_megatron.ops")
    triton = importlib.import_module("fused_megatron.ops.registration").TRITON_LAUNCHERS
    registered = [name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if "fused_megatron" in name]
    kinds: dict[str, OpKernels] = {}
    for op in sorted(ops.__all__):
        if (
            op in _OF_TORCH
            or isinstance(getattr(ops, op), type)
            or any(op.startswith(f"{shorter}_") for shorter in kinds)
        ):
            continue  # the type of an argument, or a part of an op that is listed
        kernel = _KERNEL_NAMES.get(op, op)
        names = [name for name in registered if name == kernel or name.startswith(f"{kernel}_")]

        def has(key: str, names: list[str] = names) -> bool:
            has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
            return bool(names) and all(has_kernel(f"fused_megatron::{name}", key) for name in names)

        gpu = "Triton" if names and all(name in triton for name in names) else "CUDA" if has("CUDA") else "reference"
        kinds[op] = OpKernels(op, "kernel" if has("CPU") else "reference", gpu)
    for op, part in _COMPOSED.items():
        if op in kinds and part in kinds:
            kinds[op] = OpKernels(op, kinds[part].cpu, kinds[part].gpu)
    return tuple(kinds.values())


def _attention_kernels() -> tuple[AttentionKernel, ...]:
    torch: Any = importlib.import_module("torch")
    kernels: Any = importlib.import_module("fused_megatron.ops.attention_kernels")
    found = []
    for device, dtype, dropout in (
        ("cpu", torch.float32, False),
        ("cpu", torch.float32, True),
        ("cuda", torch.bfloat16, False),
        ("cuda", torch.float32, False),
    ):
        kernel, reason = kernels.kernel_for(device, dtype, 128, 128, dropout=dropout)
        inputs = f"{'GPU' if device == 'cuda' else 'CPU'}, {str(dtype).removeprefix('torch.')}"
        found.append(AttentionKernel(f"{inputs}{', dropout' if dropout else ''}", kernel.name, reason))
    return tuple(found)


def _newer_source(library: Path) -> str | None:
    sources = _PACKAGE.parent / "csrc"
    built = library.stat().st_mtime
    newer = (p for p in sources.rglob("*") if p.suffix in (".cpp", ".h", ".cu", ".cuh") and p.stat().st_mtime > built)
    return next((str(path.relative_to(sources.parent)) for path in sorted(newer)), None)
