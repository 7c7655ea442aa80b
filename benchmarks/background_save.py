"""Time that training waits for a checkpoint: saved at once, and behind training.

    make bench-save
    make bench-save ARGS="--ranks 2 --megabytes 800 --rounds 7 --folder /mnt/shared"

Each rank saves its shard of float32 tensors, --megabytes of them. In every round, one after the other:

at once: save_checkpoint. behind: BackgroundSave.start, which is all that training waits for (not in the first round,
which takes the memory of the copy). copy: copy_ of the same tensors into memory that is there already, below which no
save behind training can come on a CPU. work: products that a rank computes, without and with a save behind them; the
difference says how much the thread takes from them. Medians of the slowest rank. The bar: "behind" is at most 10 % of
"at once", or within 1.5 times the copy.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

from fused_megatron.checkpoint import BackgroundSave, TensorBox, save_checkpoint
from fused_megatron.testing import run_on_ranks

BAR = 0.1
NEAR_COPY = 1.5
ROWS, COLUMNS = 4096, 1024  # a tensor of 16 MB


def seconds(function: Callable[[], object]) -> float:
    """Return the time of function, after all ranks have come here."""
    dist.barrier()
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def measure(rank: int, world_size: int, folder: Path, megabytes: int, rounds: int) -> dict[str, list[float]]:
    """Return the times of each round in seconds, by name."""
    torch.set_num_threads(1)
    count = max(1, megabytes * 10**6 // (ROWS * COLUMNS * 4))
    full, offset = (ROWS * world_size, COLUMNS), (ROWS * rank, 0)
    tensors = {f"w{i}": TensorBox(torch.randn(ROWS, COLUMNS), full, offset) for i in range(count)}
    memory = [torch.zeros(ROWS, COLUMNS) for _ in range(count)]
    x = torch.randn(512, 512)

    def work(num_products: int) -> Callable[[], None]:
        return lambda: [torch.mm(x, x) for _ in range(num_products)] and None

    product_s = seconds(work(50)) / 50
    saver = BackgroundSave(dist.new_group(backend="gloo"))
    times: dict[str, list[float]] = defaultdict(list)
    for step in range(0, 2 * rounds + 2, 2):
        at_once = seconds(lambda s=step: save_checkpoint(folder, s, tensors, state={}, group=dist.group.WORLD, keep=1))
        num_products = int(1.5 * at_once / product_s)  # longer than the save
        alone = seconds(work(num_products))
        behind = seconds(lambda s=step + 1: saver.start(folder, s, tensors, state={}, keep=1))
        beside = seconds(work(num_products))
        saver.finish()
        copy = seconds(lambda: [target.copy_(box.tensor) for target, box in zip(memory, tensors.values(), strict=True)])
        if step:  # the first round takes memory and opens files for the first time
            found = {"at once": at_once, "behind": behind, "copy": copy, "alone": alone, "beside": beside}
            for name, value in found.items():
                times[name].append(value)
    return times


def main() -> int:
    """Print the medians; return 1 if the bar is missed."""
    parser = argparse.ArgumentParser(description="time that training waits for a checkpoint")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--megabytes", type=int, default=400, help="of each rank")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: a temporary folder")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        arguments = (Path(folder), options.megabytes, options.rounds)
        by_rank = run_on_ranks(measure, options.ranks, *arguments, timeout_s=3600)
    ms = {
        name: 1e3 * statistics.median(max(of_rank) for of_rank in zip(*(t[name] for t in by_rank), strict=True))
        for name in by_rank[0]
    }
    share, slower = ms["behind"] / ms["at once"], (ms["beside"] - ms["alone"]) / ms["at once"]
    met = share <= BAR or ms["behind"] <= NEAR_COPY * ms["copy"]
    print(f"{options.ranks} ranks, {options.megabytes} MB each, {options.rounds} rounds")
    print(f"at once {ms['at once']:.0f} ms   behind {ms['behind']:.0f} ms   copy {ms['copy']:.0f} ms")
    print(f"training waits {100 * share:.1f} % of a save at once; bar {100 * BAR:.0f} %: {'met' if met else 'MISSED'}")
    print(f"work beside the thread takes {100 * slower:.1f} % of a save at once longer")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
