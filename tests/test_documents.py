"""Start here when a document names a file, a module or a function that does not exist (any more)."""

import ast
import dataclasses
import importlib
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import pytest

from fused_megatron.config import TrainConfig

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "fused_megatron"
FOLDERS = ("fused_megatron", "kernels", "csrc", "tests", "benchmarks", "docs", "examples")
# "mesh" is the name of the object in examples.
ROOMS = {path.stem for path in PACKAGE.iterdir() if path.suffix in ("", ".py")} - {"__init__", "__main__", "mesh"}
WRITTEN_BY_COMMANDS = {"benchmarks/results/plots"}
FILES = [
    PurePosixPath(path.relative_to(ROOT))
    for path in [*ROOT.iterdir(), *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*"))]
]
# docs/api is made of names that mkdocs looks up.
PAGES = [path for path in sorted((ROOT / "docs").rglob("*.md")) if path.parent.name != "api"]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *PAGES]

# <op> and <family> stand for any name; text after a bracket or a star is part of the same name.
FILE = re.compile(r"(?<![\w<>*./{}-])[\w<>*./-]+\.(?:py|md|h|cuh|cu|cpp|toml)\b")
SPAN = re.compile(r"`([^`\n]+)`")
DOTTED = re.compile(r"(\w+)((?:\.\w+)+)")


def without_examples(text: str) -> str:
    """Remove the Python programs of a document: they may use any names."""
    return re.sub(r"```python[^\n]*\n.*?```", "", text, flags=re.DOTALL)


def exists(name: str) -> bool:
    """Return whether the path of a file or folder of the tree ends with this name."""
    pattern = re.sub(r"<\w+>", "*", name.rstrip("/"))
    return any(path.match(pattern) for path in FILES)


def named_paths(text: str) -> Iterator[str]:
    """Return named files (by their ending), our folders in backticks, and links; without files of the user."""
    for name in FILE.findall(text):
        first = name.split("/")[0]
        if not name.endswith(".toml") or first in FOLDERS:
            yield name
    for span in SPAN.findall(text):
        is_path = "/" in span and re.fullmatch(r"[\w<>*/-]+", span)
        if is_path and span.split("/")[0] in {*FOLDERS, *ROOMS} and span not in WRITTEN_BY_COMMANDS:
            yield span
    yield from re.findall(r"\]\(([^)#:]+)\)", text)


def named_objects(text: str) -> Iterator[str]:
    """Return the dotted names of the package: fm.ops.layer_norm, fused_megatron.audit.emulated, checks.InputError."""
    for span in re.findall(r"\bfused_megatron(?:\.\w+)+", text) + SPAN.findall(text):
        found = DOTTED.match(span)
        if found and not span.endswith((".py", ".json")) and found[1] in {"fm", "fused_megatron", *ROOMS}:
            yield found[0]


def is_config_key(name: str) -> bool:
    """Return whether the name is section.key of a run's config."""
    section, _, key = name.partition(".")
    sections = {field.name: field.type for field in dataclasses.fields(TrainConfig)}
    return section in sections and key in {f.name for f in dataclasses.fields(getattr(TrainConfig(), section))}


def resolves(name: str) -> bool:
    """Return whether a dotted name is a module of the package, or an attribute of one."""
    parts = name.split(".")
    parts = ["fused_megatron", *(parts[1:] if parts[0] in ("fm", "fused_megatron") else parts)]
    thing: object = importlib.import_module(parts[0])
    for position, part in enumerate(parts[1:], start=2):
        if not hasattr(thing, part):
            try:
                importlib.import_module(".".join(parts[:position]))
            except ImportError:
                return False
        thing = getattr(thing, part)
    return True


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_and_folders_exist(document: Path) -> None:
    text = without_examples(document.read_text(encoding="utf-8"))
    missing = [name for name in named_paths(text) if not exists(name) and not (document.parent / name).exists()]
    assert not missing


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_modules_and_functions_exist(document: Path) -> None:
    text = without_examples(document.read_text(encoding="utf-8"))
    missing = [name for name in named_objects(text) if not resolves(name) and not is_config_key(name)]
    assert not missing


def test_the_map_names_what_stands_in_its_files() -> None:
    section = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Where is ...")[1].split("\n## ")[0]
    rows = [line.split("|")[1:-1] for line in section.splitlines() if line.startswith("|") and "`" in line]
    assert len(rows) >= 12
    for question, files, names in rows:
        guesses = SPAN.findall(files)
        assert 1 <= len(guesses) <= 2, question
        text = "".join((PACKAGE / guess).read_text(encoding="utf-8") for guess in guesses if "<" not in guess)
        wanted = [name.split(".")[-1] for name in SPAN.findall(names) if not FILE.fullmatch(name)]
        assert [name for name in wanted if name not in text] == [], question


# Texts in brackets in docstrings that are no shapes.
TEXT_IN_BRACKETS = {"CLS", "SEP", "MASK", "PAD"}
LETTER = re.compile(r"(?<![\w.])[A-Z](?:[a-z]|_[a-z]+|rot)?(?!\w)'?")


def public_docstrings(tree: ast.Module) -> Iterator[str]:
    """Return the docstrings of a module and of its public functions, classes and methods."""
    nodes: list[ast.AST] = [tree]
    for node in nodes:
        yield ast.get_docstring(node) or ""  # type: ignore[arg-type]
        inner = [child for child in node.body if isinstance(child, ast.ClassDef | ast.FunctionDef)]
        nodes += [child for child in inner if not child.name.startswith("_")]


def shape_letters(docstring: str) -> Iterator[str]:
    """Return the letters in brackets: S and R in `[S / R, B, H]`."""
    for shape in re.findall(r"(?<![\w\]])\[([^][]+)\]", docstring):
        yield from (letter for letter in LETTER.findall(shape) if shape not in TEXT_IN_BRACKETS)


def test_every_shape_letter_is_in_the_glossary() -> None:
    section = (ROOT / "docs" / "glossary.md").read_text(encoding="utf-8").split("\n## ")[1]
    rows = [line.split("|")[1] for line in section.splitlines() if line.startswith("| ")]
    known = {letter for row in rows for letter in re.findall(r"[\w']+", row)}
    used: dict[str, str] = {}
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "kernels").glob("*.py")):
        for docstring in public_docstrings(ast.parse(path.read_text(encoding="utf-8"))):
            used |= {letter: path.name for letter in shape_letters(docstring)}
    assert len(used) > 10 and {letter: file for letter, file in used.items() if letter not in known} == {}
