"""Start here when a CUDA kernel leaves multiprocessors idle: its blocks are no whole waves, or have unequal rows."""

import subprocess
from itertools import product
from pathlib import Path

import pytest

from fused_megatron.audit.cuda_emulation import CSRC, host_compiler

pytestmark = pytest.mark.skipif(host_compiler() is None, reason="no GCC")
# Blocks that fit on a multiprocessor, as the launch bounds of the kernels ask for: forward, backward.
OPS = {"activation": (2, 2), "gated": (2, 1), "bias_dropout_add": (2, 2), "query_key_norm": (8, 4)}
WIDTHS = [1024, 1792, 2048, 3072, 3584, 4096, 5120, 6144, 6656, 8192, 11008, 12288, 14336, 16384]
ROWS = [4096, 8192, 16384, 131072]


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    """Return a function from lines "op rows width multiprocessors" to the lines that the launch code answers."""
    program = tmp_path_factory.mktemp("grids") / "grids"
    folders = [CSRC, CSRC / "bias_dropout_add", CSRC / "query_key_norm"]
    flags = ["-std=c++20", "-O0", "-DFM_EMULATION", "-w", *(f"-I{folder}" for folder in folders)]
    source = Path(__file__).with_name("grids.cpp")
    subprocess.run([str(host_compiler()), *flags, str(source), "-o", str(program)], check=True)

    def answers(lines):
        output = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
        return [[int(number) for number in line.split()] for line in output.splitlines()]

    return answers


def busy_share(rows, grid, slots):
    """Return the time with all slots busy / the time that they need, in whole rows."""
    blocks_x, blocks_y = grid
    waves = -(-blocks_x * blocks_y // slots)
    return -(-rows * blocks_x // slots) / (waves * -(-rows // blocks_y))


@pytest.mark.parametrize("multiprocessors", [132, 148, 108])
def test_blocks_fill_whole_waves(ask, multiprocessors):
    cases = [
        (f"{op}_{step}", rows, width, plan[step == "backward"] * multiprocessors)
        for (op, plan), step, rows, width in product(OPS.items(), ["forward", "backward"], ROWS, WIDTHS)
    ]
    grids = ask([f"{op} {rows} {width} {multiprocessors}" for op, rows, width, _ in cases])
    shares = {
        f"{op}, {rows} rows of {width}: {grid} blocks": round(busy_share(rows, grid, slots), 3)
        for (op, rows, width, slots), grid in zip(cases, grids, strict=True)
    }
    assert not {case: share for case, share in shares.items() if share < 0.97}


@pytest.mark.parametrize(("rows", "blocks"), [(1, 1), (10, 4), (8192, 33), (1000, 1000), (131072, 1056), (3, 5)])
def test_every_row_is_in_one_block_and_blocks_differ_by_at_most_one_row(ask, rows, blocks):
    ((*begins, end),) = ask([f"shares {rows} {blocks} 0"])
    sizes = [after - begin for begin, after in zip(begins, [*begins[1:], end], strict=True)]
    assert begins[0] == 0 and end == rows and len(sizes) == blocks
    assert set(sizes) <= {rows // blocks, rows // blocks + 1}


@pytest.mark.parametrize("rows", [1, 2, 15, 16, 40, 100, 300])
def test_few_rows_have_no_block_without_rows(ask, rows):
    names = [f"{op}_{step}" for op, step in product(OPS, ["forward", "backward"])]
    grids = ask([f"{name} {rows} 1024 132" for name in names])
    assert not {name: grid for name, grid in zip(names, grids, strict=True) if not 1 <= grid[1] <= rows}
