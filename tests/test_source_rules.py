"""Start here when a file, a function or a name breaks a rule of the source."""

import ast
import re
import warnings
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("fused_megatron", "kernels", "csrc", "tests", "benchmarks", "examples")
FILE_LINES = {".py": 500, ".cpp": 300, ".cu": 300, ".h": 300, ".cuh": 300}
FUNCTION_LINES = 60
KERNEL_LINES = 120
# A Python file with more lines than this is a warning, not a fault.
MANY_LINES = 400
# Number of lines that are kept from the formatter in all sources. May only shrink: lower it when you remove one.
FMT_SKIPS = 96
FORBIDDEN_WORDS = {"util", "utils", "helper", "helpers", "misc", "common"}
# Stems of several files that all have the same subject: an op or its drop-in in each room, a command in each room, a
# model and its conversion, settings and the part that they set. Every other stem names one file of the package.
STEMS_OF_ONE_THING = {
    "__init__",
    "activation",
    "adamw",
    "attention",
    "bert",
    "bias_dropout_add",
    "bias_geglu",
    "bias_gelu",
    "bias_swiglu",
    "command",
    "cross_entropy",
    "expert_permutation",
    "expert_routing",
    "layer_norm",
    "linear_cross_entropy",
    "norm",
    "optimizer",
    "query_key_norm",
    "rms_norm",
    "rotary_embedding",
    "sample_index",
    "scaled_masked_softmax",
    "sum_of_squares",
    "vocab_embedding",
    "weighted_swiglu",
}


def sources() -> list[Path]:
    # fused_megatron/kernels is the development link to kernels/.
    found = (p for folder in FOLDERS for p in (ROOT / folder).rglob("*") if p.suffix in FILE_LINES)
    return sorted(p.relative_to(ROOT) for p in found if "fused_megatron/kernels" not in p.as_posix())


@cache
def rooms() -> dict[str, list[Path]]:
    """Return the sources by their first two folders."""
    found: dict[str, list[Path]] = {}
    for path in sources():
        found.setdefault("/".join(path.parent.parts[:2]), []).append(path)
    return found


def name_faults(path: Path) -> list[str]:
    words = {word for part in path.with_suffix("").parts for word in part.lower().split("_")}
    return [f"a name should say what is inside: {word!r}" for word in sorted(words & FORBIDDEN_WORDS)]


def repeated_stems(paths: list[Path]) -> set[str]:
    """Return the stems of more than one file of the package, without the listed ones."""
    stems = [path.stem for path in paths if path.suffix == ".py" and path.parts[0] in ("fused_megatron", "kernels")]
    return {stem for stem in stems if stems.count(stem) > 1} - STEMS_OF_ONE_THING


def checks_that_return(text: str) -> set[str]:
    """Return the names of functions check, check_* or _check_* that return a value; a context manager returns none."""
    functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    checks = [node for node in functions if node.name.lstrip("_").split("_")[0] == "check"]
    results = {node.name: ast.unparse(node.returns) for node in checks if node.returns}
    return {name for name, result in results.items() if result not in ("None", "Iterator[None]")}


def length_faults(suffix: str, text: str) -> list[str]:
    cap, lines = FILE_LINES[suffix], len(text.splitlines())
    return [f"{lines} lines, cap {cap}"] if lines > cap else []


def python_faults(tree: ast.Module) -> list[str]:
    return [fault for node in ast.walk(tree) for fault in node_faults(node)]


def node_faults(node: ast.AST) -> Iterator[str]:
    """Find faults of one function, class or module: a function that is too long, a docstring that is not ASCII."""
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef | ast.Module):
        return
    name, docstring = getattr(node, "name", "module"), ast.get_docstring(node)
    if docstring and not docstring.isascii():
        yield f"{name}: docstring with {sorted({c for c in docstring if not c.isascii()})}"
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        # The docstring does not count: a cap on its lines would only shorten the documentation.
        first = node.body[0]
        words = (first.end_lineno or 0) - first.lineno + 1 if docstring else 0
        lines = (node.end_lineno or 0) - node.lineno + 1 - words
        kernel = any("jit" in ast.unparse(decorator) for decorator in node.decorator_list)
        cap = KERNEL_LINES if kernel else FUNCTION_LINES
        if lines > cap:
            yield f"{name}: {lines} lines, cap {cap}"


def cuda_faults(text: str) -> list[str]:
    """Find kernels that are too long: from __global__ to the closing brace of the body."""
    found = []
    for start in (match.start() for match in re.finditer(r"__global__", text)):
        opening, semicolon = text.find("{", start), text.find(";", start)
        if opening < 0 or 0 <= semicolon < opening:  # a declaration
            continue
        depth, end = 1, opening + 1
        while depth and end < len(text):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            end += 1
        lines = text.count("\n", start, end) + 1
        if lines > KERNEL_LINES:
            found.append(f"kernel at line {text.count(chr(10), 0, start) + 1}: {lines} lines, cap {KERNEL_LINES}")
    return found


def docstring_faults(path: Path, tree: ast.Module) -> list[str]:
    """A test file must begin with the symptom that brings a reader to it."""
    if not (path.name.startswith("test_") and path.suffix == ".py"):
        return []
    first = (ast.get_docstring(tree) or "").partition("\n")[0]
    return [] if first.startswith("Start here when ") else ["the docstring must begin with 'Start here when ...'"]


def header_faults(text: str) -> list[str]:
    """A C++ or CUDA header must begin with one line that says what it is."""
    title, _, rest = text.partition("\n")
    titled = title.startswith("// ") and title.endswith(".") and rest.startswith(("//\n", "#pragma once\n"))
    return [] if titled else ["the first line of a header is a comment that says what it is, then // or #pragma once"]


def file_faults(path: Path) -> list[str]:
    text = (ROOT / path).read_text(encoding="utf-8")
    found = name_faults(path) + length_faults(path.suffix, text)
    if path.suffix == ".py":
        tree = ast.parse(text)
        found += python_faults(tree) + docstring_faults(path, tree)
        if (lines := len(text.splitlines())) > MANY_LINES:
            warnings.warn(f"{path}: {lines} lines; can it be two files of one idea each?", stacklevel=1)
    else:
        found += cuda_faults(text)
    if path.suffix in (".h", ".cuh"):
        found += header_faults(text)
    return [f"{path}: {fault}" for fault in found]


@pytest.mark.parametrize("room", rooms())
def test_files_keep_the_rules(room):
    assert [fault for path in rooms()[room] for fault in file_faults(path)] == []


def test_no_more_lines_are_kept_from_the_formatter():
    skip = "# fmt: " + "skip"
    found = sum((ROOT / path).read_text(encoding="utf-8").count(skip) for path in sources() if path.suffix == ".py")
    assert found <= FMT_SKIPS, "let ruff format it: a long call reads well with an argument a line"


def test_no_stem_names_two_different_things():
    assert repeated_stems(sources()) == set(), "rename one stem so that it says what its file does"


def test_a_check_returns_nothing():
    package = [path for path in sources() if path.suffix == ".py" and path.parts[0] in ("fused_megatron", "kernels")]
    found = {name for path in package for name in checks_that_return((ROOT / path).read_text(encoding="utf-8"))}
    assert found == set(), "check_* raises or returns None; what returns a value has another verb"


def test_repeated_stem_is_found():
    names = ("fused_megatron/a/report.py", "kernels/report.py", "fused_megatron/plots.py", "tests/plots.py")
    assert repeated_stems([Path(name) for name in names]) == {"report"}
    assert repeated_stems([Path("fused_megatron/ops/norm.py"), Path("fused_megatron/reference/norm.py")]) == set()


def test_check_that_returns_is_found():
    assert checks_that_return("def check_a() -> int: ...\ndef _check_b() -> bool: ...") == {"check_a", "_check_b"}
    assert checks_that_return("def check_a() -> None: ...\ndef check_b() -> Iterator[None]: ...") == set()


def test_a_test_file_without_its_symptom_is_found():
    path = Path("tests/ops/test_norm.py")
    assert docstring_faults(path, ast.parse('"""Start here when it breaks."""')) == []
    assert docstring_faults(Path("tests/conftest.py"), ast.parse("x = 1")) == []
    for text in ('"""It works."""', "x = 1"):
        assert len(docstring_faults(path, ast.parse(text))) == 1


def faults_of(text: str) -> list[str]:
    return python_faults(ast.parse(text))


def function(lines: int, docstring: str = "", decorator: str = "") -> str:
    """Return the source of a function with this number of lines, its docstring not counted."""
    words = f'    """{docstring}"""\n' if docstring else ""
    return f"{decorator}def f():\n{words}" + "    pass\n" * (lines - 1)


@pytest.mark.parametrize("name", ["utils.py", "ops/tensor_utils.py", "helpers/io.py", "csrc/common.h", "Misc.cu"])
def test_forbidden_name_is_found(name):
    assert len(name_faults(Path(name))) == 1


@pytest.mark.parametrize(("suffix", "cap"), FILE_LINES.items())
def test_long_file_is_found(suffix, cap):
    assert length_faults(suffix, "\n" * cap) == []
    assert len(length_faults(suffix, "\n" * (cap + 1))) == 1


def test_long_function_is_found():
    assert faults_of(function(60)) == []
    assert faults_of(function(60, docstring="One.\n\n    Two.\n    ")) == []
    assert len(faults_of(function(61))) == 1
    assert len(faults_of("class A:\n" + "".join(f"    {line}\n" for line in function(61).splitlines()))) == 1
    assert len(faults_of("async " + function(61))) == 1


def test_kernels_may_be_longer():
    assert faults_of(function(120, decorator="@triton.jit\n")) == []
    assert len(faults_of(function(121, decorator="@triton.jit\n"))) == 1


def test_docstring_beyond_ascii_is_found():
    assert faults_of('"""plain"""\nx = "\u00e9"') == []
    assert len(faults_of('"""caf\u00e9"""')) == 1
    assert len(faults_of(function(3, docstring="a \u2192 b"))) == 1


def test_long_cuda_kernel_is_found():
    def kernel(lines: int) -> str:
        return "__global__ void k(int* x) {\n" + "if (x) { }\n" * (lines - 2) + "}\n"

    assert cuda_faults("__global__ void k(int* x);\n" + kernel(120)) == []
    assert len(cuda_faults(kernel(121))) == 1


def test_header_without_a_title_is_found():
    assert header_faults("// Sums along a row.\n#pragma once\n") == []
    assert header_faults("// Sums along a row.\n//\n// In order.\n#pragma once\n") == []
    for text in ("#pragma once\n", "// Sums along a row, and in\n// order.\n#pragma once\n", "// Sums\n#pragma once\n"):
        assert len(header_faults(text)) == 1
