"""Start here when a command or a program of README, CONTRIBUTING or docs/ fails, has no mark, or has a wrong name.

The first line of a block says how it is tested: ```sh run (executed), ```sh slow (executed by a slow test),
```sh parse: WHY (parsed by the real parsers, because it needs more than this machine), ```sh usage (its options are in
the help), ```python run (executed), ```python part (compiles, and its names exist). An indented block or one of
```text, right behind an executed block, is its output. The site shows blocks without marks (docs/site_hooks.py).
"""

import ast
import contextlib
import gzip
import importlib
import inspect
import io
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from torch.distributed.run import parse_args as parse_torchrun

import fused_megatron as fm
from fused_megatron import cli
from fused_megatron.benchmarking.report.command import ReportArguments
from fused_megatron.checks import InputError
from fused_megatron.config.arguments import parse_arguments
from fused_megatron.config.config_file import load_config
from fused_megatron.experiments.command import ExperimentArguments
from fused_megatron.training import launcher

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
MARKS = {"sh": r"run|slow|usage|parse: .+", "python": "run|part", "run": "", "toml": "", "text": ""}
BLOCK = re.compile(
    r"^```(\w*) ?([^\n]*)\n(.*?)^```\n(\n*```text\n.*?^```\n|(?:\n|    [^\n]*\n)*)", flags=re.MULTILINE | re.DOTALL
)
TOML = re.compile(r"^```toml[^\n]*\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)
# Programs in indented blocks, which nothing would test.
PROGRAM = re.compile(
    r"^    (?:\$ )?(?:fused-megatron|make|pip|python3?|torchrun|docker|git|sbatch|kubectl) .*", re.MULTILINE
)
# Programs of others: nothing of ours follows them.
OUTSIDE = ("cd", "export", "git", "kubectl", "sbatch")


class Block(NamedTuple):
    """A fenced block: its language, its mark, its lines, and the indented block behind it."""

    language: str
    mark: str
    code: str
    output: str


def blocks_of(page: Path, language: str = "", mark: str = "") -> list[Block]:
    """Return the blocks of a page with this language and this beginning of the mark."""
    found = [Block(*groups) for groups in BLOCK.findall(page.read_text(encoding="utf-8") + "\n")]
    return [each for each in found if each.language.startswith(language) and each.mark.startswith(mark)]


def pages_with(language: str, *marks: str) -> list[object]:
    """Return a parameter for each page that has such a block."""
    found = [page for page in PAGES if any(blocks_of(page, language, mark) for mark in marks)]
    return [pytest.param(page, id=page.relative_to(ROOT).as_posix()) for page in found]


def commands_of(code: str) -> Iterator[list[str]]:
    """Yield the words of each command, without comments and redirections."""
    for line in code.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&|;<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if {*word} <= {*"&|;"}:
                if words:
                    yield words[: words.index(">")] if ">" in words else words
                words = []
            else:
                words.append(word)


def check_command(words: list[str]) -> None:
    """Raise an error if a command is wrong: an option, a key, a target, a file, a package."""
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        assert f"{words[0].partition('=')[0]} ?=" in text_of("Makefile"), f"{words[0]} sets nothing"
        words = words[1:]
    program, *rest = words
    if program == "nsys":
        program, *rest = words[words.index("fused-megatron") :]
    if program.startswith(".venv/bin/"):
        assert f'"{program.rpartition("/")[2]}' in text_of("pyproject.toml"), f"{program} is no tool of the project"
    elif program not in OUTSIDE:
        CHECKS[program](rest)


def text_of(name: str) -> str:
    """Return the text of a file of the source."""
    return (ROOT / name).read_text(encoding="utf-8")


def check_own(words: list[str]) -> None:
    """Parse a command of the package, as it parses itself, without running it."""
    # The folder that all machines of a reader see is the folder of the test.
    command, *rest = [word.replace("/shared/", "") for word in words]
    PARSERS[command](rest)


def check_launch(words: list[str]) -> None:
    check_own(launcher.parse_arguments(words)[1])


def check_make(words: list[str]) -> None:
    """Check the targets, the variables, and the options that ARGS gives the program of the target."""
    variables = dict(word.split("=", 1) for word in words if "=" in word)
    targets = [word for word in words if "=" not in word]
    makefile = text_of("Makefile")
    for target in targets:
        recipe = re.search(rf"^{target}:[^\n]*\n((?:\t[^\n]*\n)*)", makefile, flags=re.MULTILINE)
        assert recipe is not None, f"make has no target {target}"
        assert [name for name in variables if f"$({name})" not in recipe[1]] == [], f"{target} has other variables"
        options = shlex.split(variables.get("ARGS", ""))
        if target == "train":
            default = re.search(r"^CONFIG \?= (.*)", makefile, flags=re.MULTILINE)
            assert default is not None
            check_own(["train", variables.get("CONFIG", default[1]), *options])
        elif options:
            script = re.search(r"benchmarks/[\w/]+\.py", recipe[1])
            assert script is not None, f"{target} runs no program whose options are known"
            known = text_of(script[0])
            own = [each for each in options if each.startswith("-")]
            assert [each for each in own if not re.search(rf"(?<![\w-]){each}(?![\w-])", known)] == [], script[0]


def check_pip(words: list[str]) -> None:
    assert words[0] == "install"
    for extra in re.findall(r"\.\[(\w+)\]", " ".join(words)):
        assert f"\n{extra} = [" in text_of("pyproject.toml"), f"no extra {extra}"


def check_python(words: list[str]) -> None:
    assert (ROOT / words[0]).is_file(), f"no file {words[0]}"


def check_torchrun(words: list[str]) -> None:
    try:
        parsed = parse_torchrun(words)
    except SystemExit:
        raise InputError(f"torchrun does not know {words}") from None
    if parsed.module:
        assert parsed.training_script == "fused_megatron"
        check_own(parsed.training_script_args)
    else:
        check_python([parsed.training_script])


def check_docker(words: list[str]) -> None:
    for name in re.findall(r"--build-arg (\w+)", " ".join(words)):
        assert f"\nARG {name}" in text_of("Dockerfile"), f"the Dockerfile has no argument {name}"


CHECKS: dict[str, Callable[[list[str]], None]] = {
    "fused-megatron": check_own,
    "make": check_make,
    "pip": check_pip,
    "python": check_python,
    "torchrun": check_torchrun,
    "docker": check_docker,
}
# Of the commands in blocks with the mark "parse"; the other commands of the package run.
PARSERS: dict[str, Callable[[list[str]], object]] = {
    "train": cli.parse_train,
    "launch": check_launch,
    "experiment": lambda words: parse_arguments(ExperimentArguments, words, source="experiment"),
    "report": lambda words: parse_arguments(ReportArguments, words, source="report"),
}


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the source, which commands may change, with a program fused-megatron that runs it."""
    folder = tmp_path_factory.mktemp("copy") / "tree"
    left_out = shutil.ignore_patterns(".git", ".venv", "build", "dist", "runs", "__pycache__", ".*_cache", "tests")
    shutil.copytree(ROOT, folder, symlinks=True, ignore=left_out)
    program = folder / "bin" / "fused-megatron"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {shlex.quote(sys.executable)} -m fused_megatron "$@"\n')
    program.chmod(0o755)
    return folder


@pytest.fixture
def reader(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Go to the folder of a reader, who has the source and the texts that the pages name."""
    folder = tmp_path / "reader"
    folder.mkdir()
    for name in ("benchmarks", "docs", "examples"):
        (folder / name).symlink_to(tree / name)
    monkeypatch.chdir(folder)
    texts = "".join(json.dumps({"text": page.read_text(encoding="utf-8")}) + "\n" for page in PAGES)
    for name in ("my_texts.jsonl", "texts.jsonl", "other.jsonl"):
        Path(name).write_text(texts)
    Path("more.jsonl.gz").write_bytes(gzip.compress(texts.encode()))
    Path("texts").mkdir()
    Path("texts/all.txt").write_text("\n".join(page.read_text(encoding="utf-8") for page in PAGES))
    shutil.copy(tree / "examples" / "gpt_tiny.toml", "my_run.toml")
    return folder


def execute(code: str, tree: Path) -> str:
    """Run a block in bash, which stops at the first command that fails; return what it prints."""
    environment = {**os.environ, "PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "COLUMNS": "150", "NO_COLOR": "1"}
    environment["PATH"] = f"{tree / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    command = ["bash", "-e", "-o", "pipefail", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, f"{code}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    return done.stdout


def check_output(block: Block, printed: str) -> None:
    """Check that the page shows what was printed; the last digit may differ between processors."""
    lines = {re.sub(r"(\.\d*)\d\b", r"\1", line).strip() for line in printed.splitlines()}
    shown = [line.strip() for line in block.output.splitlines() if line.strip() not in ("", "...", "```text", "```")]
    assert [line for line in shown if re.sub(r"(\.\d*)\d\b", r"\1", line) not in lines] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_block_of_commands_has_a_mark(page: Path) -> None:
    wrong = [
        f"```{block.language} {block.mark}".strip()
        for block in blocks_of(page)
        if not re.fullmatch(MARKS.get(block.language, "-"), block.mark)
    ]
    text = BLOCK.sub("", page.read_text(encoding="utf-8") + "\n")
    assert wrong == [] and re.findall(r"^ *```.*", text, flags=re.MULTILINE) == []
    assert PROGRAM.findall(text) == []


@pytest.mark.parametrize("page", pages_with("sh", "parse"))
def test_commands_that_need_more_than_this_machine_are_right(page: Path, reader: Path) -> None:
    assert cli.main(["init", "my.toml", "--like", "llama"]) == 0
    wrong = []
    for block in blocks_of(page, "sh", "parse"):
        for words in commands_of(block.code):
            try:
                check_command(words)
            except (InputError, AssertionError, KeyError) as error:
                wrong.append(f"{shlex.join(words)}: {error!r}")
    assert wrong == []


@pytest.mark.parametrize(
    "command",
    [
        "fused-megatron train examples/gpt_tiny.toml --model.no-such-key 1",
        "fused-megatron train examples/gone.toml",
        "fused-megatron launch --nproc-per-node 2 train examples/gpt_tiny.toml --training.num-steps many",
        "fused-megatron gone",
        "make gone",
        "make bench RANKS=2",
        'make bench ARGS="--gone"',
        'make train ARGS="--gone.key 1"',
        'pip install ".[gone]"',
        "python examples/gone.py && cd x",
        "cd x && torchrun --gone 2 examples/plain_loop.py",
        "torchrun --nproc-per-node 2 -m fused_megatron train examples/gone.toml",
        "docker build --build-arg GONE=1 .",
        "FUSED_MEGATRON_GONE=1 pip install torch",
        ".venv/bin/gone install",
    ],
)
def test_wrong_commands_are_found(command: str, reader: Path) -> None:
    with pytest.raises((InputError, AssertionError, KeyError)):
        for words in commands_of(command):
            check_command(words)


@pytest.mark.parametrize("page", pages_with("sh", "usage"))
def test_options_of_usage_are_in_the_help(page: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for block in blocks_of(page, "sh", "usage"):
        words = block.code.split()
        assert words[0] == "fused-megatron"
        assert cli.main([words[1], *(["--step=x"] if "--step" in words else []), "--help"]) == 0
        options = {*re.findall(r"--[\w-]+", block.code)} - {"--section"}
        shown = capsys.readouterr().out
        assert options and [option for option in sorted(options) if option not in shown] == []


@pytest.mark.parametrize("page", pages_with("sh", "run"))
def test_commands_run(page: Path, tree: Path, reader: Path) -> None:
    for block in blocks_of(page, "sh", "run"):
        check_output(block, execute(block.code, tree))


@pytest.mark.slow
@pytest.mark.parametrize("page", pages_with("sh", "slow"))
def test_long_commands_run(page: Path, tree: Path, reader: Path) -> None:
    """The blocks of a page follow each other: a run that one block trains is evaluated by the next."""
    for block in blocks_of(page, "sh"):
        if block.mark in ("run", "slow"):
            check_output(block, execute(block.code, tree))


@pytest.mark.parametrize("page", pages_with("python", "run"))
def test_programs_run(page: Path, reader: Path) -> None:
    for block in blocks_of(page, "python", "run"):
        if block.code.startswith("# torchrun"):
            assert page.name == "README.md"  # tests/test_readme.py runs it on two ranks
            continue
        Path("this_file.py").write_text(block.code)
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            runpy.run_path("this_file.py", run_name="__main__")
        check_output(block, printed.getvalue())


@pytest.mark.parametrize("page", pages_with("python", "part"))
def test_names_in_parts_of_programs_exist(page: Path) -> None:
    for block in blocks_of(page, "python", "part"):
        assert names_that_do_not_exist(block.code) == [], block.code


def names_that_do_not_exist(code: str) -> list[str]:
    """Return the names of the package in a program that do not exist, and arguments that its functions do not take."""
    wrong = []
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fused_megatron"):
            module = importlib.import_module(node.module or "")
            wrong += [f"{node.module}.{alias.name}" for alias in node.names if not hasattr(module, alias.name)]
        if isinstance(node, ast.Attribute) and ast.unparse(node).startswith("fm.") and _of_package(node) is None:
            wrong.append(ast.unparse(node))
        if isinstance(node, ast.Call) and (function := _of_package(node.func)) is not None:
            known = inspect.signature(function).parameters
            if not any(each.kind is each.VAR_KEYWORD for each in known.values()):
                wrong += [f"{ast.unparse(node.func)}({k.arg}=" for k in node.keywords if k.arg and k.arg not in known]
    return wrong


def _of_package(node: ast.expr) -> Callable[..., object] | None:
    """Return what the text fm.name.name is; None if it does not exist, or is no such text."""
    thing: object = fm
    names = ast.unparse(node).split(".")
    for name in names[1:]:
        thing = getattr(thing, name, None)
    return thing if names[0] == "fm" and callable(thing) else None


def test_wrong_names_are_found() -> None:
    assert names_that_do_not_exist("fm.parallelize(model, mesh, sequence_parallel=True)") == []
    assert names_that_do_not_exist("fm.gone(1)") == ["fm.gone"]
    assert names_that_do_not_exist("fm.parallelize(model, mesh, gone=1)") == ["fm.parallelize(gone="]
    assert names_that_do_not_exist("from fused_megatron.ops import gone") == ["fused_megatron.ops.gone"]


@pytest.mark.parametrize(
    "page", [pytest.param(page, id=page.name) for page in PAGES if TOML.search(page.read_text(encoding="utf-8"))]
)
def test_keys_of_configs_exist(page: Path, tmp_path: Path) -> None:
    for number, text in enumerate(TOML.findall(page.read_text(encoding="utf-8"))):
        config = tmp_path / f"{number}.toml"
        config.write_text(text)
        load_config(config, ["--model.num-heads", "8"])
