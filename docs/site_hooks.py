"""Additions of the site to the pages: outputs of commands, links between pages, and a page of all error messages.

mkdocs calls the functions on_*. A block that opens with ```run has a command in each line; on the site the output of
today follows each command. A command that fails, fails the build; with "! " before it, the exit code must be 1.
"| head -N" shows the first N lines. The marks of other blocks ("```sh slow") are for tests/test_commands_of_pages.py.
"""

import ast
import os
import posixpath
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "fused_megatron"
ERRORS = "errors.md"
# Characters of a line of an output. A table is no wider: the commands are told this width.
WIDTH = 110
_RUN = re.compile(r"^```run\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_MARK = re.compile(r"^```(sh|python) .+$", flags=re.MULTILINE)
_PAGE = re.compile(r"`docs/([\w/]+\.md)`(?!\])")


def on_files(files: Any, config: Any) -> Any:
    """Add the page of error messages, pages that the menu lacks, and outputs: as many commands at once as cores."""
    pages = [file.content_string for file in files if file.src_uri.endswith(".md")]
    lines = dict.fromkeys(line for page in pages for line in lines_of(page))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(output_of, lines))
    files.append(File.generated(config, ERRORS, content=error_page()))
    if others := sorted({file.src_uri for file in files.documentation_pages()} - {*named_in(config.nav)}):
        config.nav.append({"More": others})
    return files


def named_in(nav: Any) -> list[str]:
    """Return the pages of a menu: a page, a list, or mappings from titles to these."""
    if isinstance(nav, str):
        return [nav]
    values = nav.values() if isinstance(nav, dict) else nav
    return [name for value in values for name in named_in(value)]


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Run the commands of a page, remove the marks of blocks, and turn the names of pages into links."""
    known = {file.src_uri for file in files}
    here = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        name = match[1]
        return f"[{match[0]}]({posixpath.relpath(name, here or '.')})" if name in known else match[0]

    return _PAGE.sub(link, with_outputs(_MARK.sub(r"```\1", markdown)))


def with_outputs(markdown: str) -> str:
    """Return a page with the output below each command of its run blocks."""

    def run(match: re.Match[str]) -> str:
        shown = "```console\n"
        for line in match[1].strip().splitlines():
            output = output_of(line)
            shown += f"{command_of(line.removeprefix('! '))}\n"
            # A report is Markdown, and its tables become tables of the page.
            shown += f"```\n\n{output}\n\n```console\n" if "\n| ---" in output else f"{output}\n"
        return f"{shown}```".replace("\n\n```console\n```", "")

    return _RUN.sub(run, markdown)


def command_of(line: str) -> str:
    """Return a command as a shell shows it, with new lines before options where it is wider than the page."""
    rows = ["$"]
    for words in re.split(r" (?=--)", line):
        if len(rows[-1]) + len(words) > WIDTH:
            rows[-1] += " \\"
            rows.append("   ")
        rows[-1] += " " + words
    return "\n".join(rows)


def wrapped(line: str) -> str:
    """Return a line of an output, with new lines where it is wider than the page, indented to its second column."""
    # A row of a table, and of a timeline, stays whole.
    if line.startswith("|") or len(re.findall(r"\S {2,}(?=\S)", line)) > 2:
        return line
    start = re.match(r" *\S+ {2,}| *", line)
    indent = " " * (start.end() if start and start.end() else 2)
    return "\n".join(textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False)) or line


def lines_of(markdown: str) -> list[str]:
    """Return the lines of the run blocks of a page."""
    return [line for block in _RUN.findall(markdown) for line in block.strip().splitlines()]


@cache
def output_of(line: str) -> str:
    """Run a line of a run block in the root of the source, and return the output that is shown.

    Raises:
        RuntimeError: it is no such line, or has another exit code.
    """
    match = re.fullmatch(r"(! )?fused-megatron ([^|]*)(?:\| head -(\d+))?", line)
    if match is None:
        raise RuntimeError(f"a run block has only lines such as `fused-megatron plan ... | head -9`, not {line!r}")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "COLUMNS": str(WIDTH),
        "NO_COLOR": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, "-m", "fused_megatron", *shlex.split(match[2])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode != (1 if match[1] else 0):
        raise RuntimeError(f"{line}: exit code {done.returncode}: {done.stderr.strip() or done.stdout.strip()}")
    lines = done.stdout.rstrip().splitlines()
    most = int(match[3] or len(lines))
    return "\n".join([wrapped(each) for each in lines[:most]] + ["..."] * (len(lines) > most))


def error_page() -> str:
    """Return the page of the messages, in the order of their first words."""
    lines = [
        "# Error messages",
        "",
        "All errors that the package raises for its users, by their first words. `{..}` stands for a value. Most begin",
        "with the name of an argument or a key of a config. Each message says what is wanted, and a way out.",
        "",
        "| message | raised in |",
        "|---|---|",
    ]
    for message, place in sorted({each for each in messages() if len(each[0]) > 8}, key=lambda each: _first(each[0])):
        shown = message.replace("|", "\\|").replace("`", "'").replace("\n", " ")
        lines.append(f"| `{shown}` | `{place}` |")
    return "\n".join(lines) + "\n"


def messages() -> Iterator[tuple[str, str]]:
    """Yield the message of each check and each error for users, with its file."""
    for path in sorted(PACKAGE.rglob("*.py")):
        place = path.relative_to(PACKAGE).as_posix()
        if place.startswith(("kernels/", "testing/", "audit/", "benchmarking/")):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = _message(node)
            if text:
                yield text, place


def _message(node: ast.AST) -> str | None:
    """Return the message of a call check(condition, message) or SomeError(message); None for any other node."""
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Name):
        return None
    name = node.func.id
    place = 1 if name == "check" else 0 if name.endswith(("InputError", "TrainingError", "CheckpointError")) else None
    if place is None or len(node.args) <= place:
        return None
    return _text(node.args[place])


def _text(node: ast.expr) -> str | None:
    """Return a text, with {name} for each value in it; None if it is no text."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(_text(part) or "" for part in node.values)
    if isinstance(node, ast.FormattedValue):
        value = node.value
        return f"{{{ast.unparse(value)}}}" if isinstance(value, ast.Name | ast.Attribute) else "{..}"
    return None


def _first(message: str) -> str:
    """Return a message without braces, for sorting."""
    return re.sub(r"[{}.]", "", message).lower()
