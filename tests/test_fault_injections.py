"""Start here when `make faults` fails, or when docs/reliability.md says what is not so."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "faults"
ONE_LINE = r"(the other rank ends|all \d live ranks end) in (\d+\.\d) s with one line: `(.*)`"


@pytest.fixture(scope="module")
def faults() -> Iterator[ModuleType]:
    """The command's modules."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("run_all")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture(scope="module")
def page(faults: ModuleType) -> dict[str, dict[str, str]]:
    """The cells of docs/reliability.md by fault and system."""
    written = faults.PAGE.read_text(encoding="utf-8")
    return faults.read_page(faults.PAGE, re.search(f"{faults.WITH}(.*);", written)[1])


def test_the_page_has_a_cell_for_every_injection(faults: ModuleType, page: dict[str, dict[str, str]]) -> None:
    wanted = {fault: set(systems) for each in faults.SECTIONS.values() for fault, systems in each.items()}
    assert {fault: set(cells) for fault, cells in page.items()} == wanted
    assert not any("THE INJECTION FAILED" in cell for cells in page.values() for cell in cells.values())
    # The promise: nothing of ours is silently wrong, crashes or hangs.
    assert [fault for fault, cells in page.items() if "**" in cells["fused-megatron"]] == []


@pytest.mark.parametrize("system", ["fused-megatron", "safetensors"])
def test_a_flipped_bit_gives_what_the_page_says(
    faults: ModuleType, page: dict[str, dict[str, str]], tmp_path: Path, system: str
) -> None:
    checkpoints = faults.checkpoint_faults
    (tmp_path / "run").mkdir()
    assert checkpoints.save(0, 1, system, tmp_path / "run", "A") == ("value", None)
    assert checkpoints.loaded_words([checkpoints.load(0, 1, system, tmp_path / "run")], tmp_path) == "loads step A"
    checkpoints.flip_a_bit(checkpoints.files_of(tmp_path / "run")[0])
    found = checkpoints.loaded_words([checkpoints.load(0, 1, system, tmp_path / "run")], tmp_path)
    assert found == page["one flipped bit in a tensor"][system]


def test_pointers_that_are_off_give_what_the_page_says(
    faults: ModuleType, page: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    datasets = faults.dataset_faults
    datasets.write(tmp_path / "set")
    before = datasets.words(datasets.read(0, 1, "fused-megatron", tmp_path / "set"), tmp_path)
    assert before == "reads what was written"
    datasets.shift_pointers(tmp_path / "set")
    found = datasets.words(datasets.read(0, 1, "fused-megatron", tmp_path / "set"), tmp_path)
    assert found == page["pointers of the .idx file are 3 bytes off"]["fused-megatron"]


def test_ranks_that_load_different_steps_are_a_silent_mix(faults: ModuleType, tmp_path: Path) -> None:
    words = faults.checkpoint_faults.loaded_words
    assert words([("value", (1.0,)), ("value", (1.0,))], tmp_path) == "loads step A"
    assert words([("value", (2.0,)), ("value", (1.0,))], tmp_path).startswith("**silent mix**: rank 0 has step B, ")
    assert words([("value", (1.0, 3.0))], tmp_path) == "**loads damaged values, silently**"
    assert words([("error", "two\nlines"), ("value", (1.0,))], tmp_path) == "error of 2 lines, the last: `lines`"
    assert words([("value", (1.0,)), ("died", -11)], tmp_path) == "**crash** (SIGSEGV)"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "says"),
    [
        ("a rank is stopped (SIGSTOP); ours: rank 3 of tp 2 x pp 2", r"lost contact with rank 3 .*"),
        ("a rank is in an endless loop", r"rank 1 did not come in time: rank 1 is in spin .*"),
        ("the cable between two machines is pulled", r"lost contact with rank 1 .*"),
    ],
)
def test_ranks_end_in_time_with_a_line_that_names_the_rank(
    faults: ModuleType, tmp_path: Path, fault: str, says: str
) -> None:
    try:
        words = faults.SECTIONS["Ranks"][fault]["fused-megatron"](tmp_path)
    except faults.NotHere as missing:
        pytest.skip(str(missing))
    found = re.fullmatch(ONE_LINE, words)
    assert found and re.fullmatch(says, found[3]), words
    assert float(found[2]) <= faults.rank_faults.TIMEOUT_S + 5


@pytest.mark.slow
def test_a_slow_disk_is_waited_for(faults: ModuleType, tmp_path: Path) -> None:
    words = faults.SECTIONS["Ranks"]["a sync of the disk takes 8 s in a save"]["fused-megatron"](tmp_path)
    assert words == "waits, and saves step 2"


@pytest.mark.slow
def test_the_command_writes_rows_anew_beside_others_of_the_same_versions(faults: ModuleType, tmp_path: Path) -> None:
    page = tmp_path / "reliability.md"
    page.write_text(f"before\n{faults.BEGIN}\nold\n{faults.END}\nafter\n")
    command = [sys.executable, str(FOLDER / "run_all.py"), "--page", str(page), "--only"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}

    def run(text: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, text], env=environment, capture_output=True, text=True, timeout=600)

    done = run("outlives")
    assert done.returncode == 2 and "no fault has 'outlives' in its title: " in done.stdout
    done = run("another magic")
    assert done.returncode == 2 and "was written with other versions than Python " in done.stdout
    faults.write_page(page, {"a document is used when its dataset is gone": {"fused-megatron": "good"}})
    done = run("another magic")
    assert done.returncode == 0 and "[1/1] the .idx file begins with another magic" in done.stdout
    assert "  fused-megatron: at the start: error: `" in done.stdout and "1 rows are new" in done.stdout
    cells = faults.read_page(page)
    assert cells["a document is used when its dataset is gone"] == {"fused-megatron": "good"}
    assert cells["the .idx file begins with another magic"]["fused-megatron"].startswith("at the start: error: `")
    assert re.fullmatch(r"before\n<.*>\nafter\n", page.read_text(), re.DOTALL)
