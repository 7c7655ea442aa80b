"""What overlap hides: a tensor-parallel MLP on two ranks that are joined by a link of a known rate.

    make bench-overlap                        (root, Linux: two network namespaces and a veth pair limited by tc tbf)
    python benchmarks/overlap_on_a_slow_link.py --rates 300 1000 --chunks 4 8

The link costs wall time and no CPU, as a network card does. For every rate and layout, milliseconds (medians) of one
forward + backward: compute alone (the shard's products, no group), communication alone (the collectives of the plain
path), the plain path, and the overlapped one; and how far that is from max(compute, communication).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron import ops
from fused_megatron.collectives import Group
from fused_megatron.collectives.transfers import start_all_gather, start_all_reduce_, start_reduce_scatter
from fused_megatron.tensor_parallel import ColumnParallelLinear, RowParallelLinear

SEQUENCE, HIDDEN, FFN = 2048, 1024, 4096
RANKS = 2
NAMESPACES = [f"fm-overlap-{rank}" for rank in range(RANKS)]
ADDRESSES = [f"10.231.77.{rank + 1}" for rank in range(RANKS)]
DEVICE = "veth0"


class MLP(nn.Module):
    def __init__(self, ffn: int, group: Group, sequence_parallel: bool, overlap: bool | int) -> None:
        super().__init__()
        options = {"tp_group": group, "sequence_parallel": sequence_parallel, "overlap": overlap}
        self.up = ColumnParallelLinear(HIDDEN, ffn, skip_bias_add=True, **options)
        self.down = RowParallelLinear(ffn, HIDDEN, **options)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(ops.bias_gelu(*self.up(x)))


def step_of(model: nn.Module, rows: int) -> Callable[[], None]:
    x = torch.randn(rows, 1, HIDDEN, requires_grad=True)
    dy = torch.randn(rows, 1, HIDDEN)

    def step() -> None:
        model.zero_grad(set_to_none=True)
        x.grad = None
        model(x).backward(dy)

    return step


def collectives_of(group: Group, sequence_parallel: bool) -> Callable[[], None]:
    """What the plain path sends, and nothing else."""
    full, shard = torch.zeros(SEQUENCE, 1, HIDDEN), torch.zeros(SEQUENCE // RANKS, 1, HIDDEN)

    def step() -> None:
        if not sequence_parallel:
            for _ in range(2):  # of y forward, of dx backward
                start_all_reduce_(full, group).wait()
            return
        for _ in range(3):  # of x forward, and of x and dy backward
            start_all_gather(shard, 0, group).wait()
        for _ in range(2):  # of y forward, of dx backward
            start_reduce_scatter(full, 0, group).wait()

    return step


def median_ms(step: Callable[[], None], rounds: int) -> float:
    times = []
    step()
    for _ in range(rounds):
        dist.barrier()
        start = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - start))
    return statistics.median(times)


def run_rank(rank: int, folder: Path, chunks: list[int], rounds: int) -> None:
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = DEVICE
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    group, rows = dist.group.WORLD, {False: SEQUENCE, True: SEQUENCE // RANKS}
    results = []
    compute_ms = median_ms(step_of(MLP(FFN // RANKS, None, False, False), SEQUENCE), rounds)
    for sequence_parallel in (False, True):
        result: dict[str, float | str | int] = {
            "layout": "TP + SP" if sequence_parallel else "TP",
            "compute_ms": compute_ms,
            "communication_ms": median_ms(collectives_of(group, sequence_parallel), rounds),
        }
        choices: dict[str, bool | int] = {"plain": False, "auto": True, **{f"{c} chunks": c for c in chunks}}
        for name, overlap in choices.items():
            model = MLP(FFN, group, sequence_parallel, overlap)
            result[name] = median_ms(step_of(model, rows[sequence_parallel]), rounds)
        results.append(result)
    if rank == 0:
        (folder / "results.json").write_text(json.dumps(results))
    dist.destroy_process_group()


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


def remove_link() -> None:
    for name in NAMESPACES:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True)


def make_link() -> None:
    remove_link()
    for name in NAMESPACES:
        ip("netns", "add", name)
    ip("link", "add", DEVICE, "netns", NAMESPACES[0], "type", "veth", "peer", "name", DEVICE, "netns", NAMESPACES[1])
    for name, address in zip(NAMESPACES, ADDRESSES, strict=True):
        ip("-n", name, "address", "add", f"{address}/24", "dev", DEVICE)
        ip("-n", name, "link", "set", DEVICE, "up")
        ip("-n", name, "link", "set", "lo", "up")


def set_rate(mbit_per_s: int) -> None:
    for name in NAMESPACES:
        limit = ["rate", f"{mbit_per_s}mbit", "burst", "256kb", "latency", "50ms"]
        command = ["tc", "-n", name, "qdisc", "replace", "dev", DEVICE, "root", "tbf", *limit]
        subprocess.run(command, check=True, capture_output=True)


def measure(mbit_per_s: int, chunks: list[int], rounds: int) -> list[dict[str, float | str]]:
    set_rate(mbit_per_s)
    with tempfile.TemporaryDirectory() as folder:
        ranks = []
        for rank, name in enumerate(NAMESPACES):
            # One core a rank, as on a machine of its own.
            pin = ["taskset", "-c", str(rank)] if shutil.which("taskset") else []
            own = [sys.executable, __file__, "--rank", str(rank), "--folder", folder, "--rounds", str(rounds)]
            command = ["ip", "netns", "exec", name, *pin, *own, "--chunks", *map(str, chunks)]
            ranks.append(subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        codes = [process.wait() for process in ranks]
        if any(codes):
            sys.exit(f"a rank failed: exit codes {codes}")
        return json.loads((Path(folder) / "results.json").read_text())


def missing() -> str | None:
    """Why it cannot run here."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need root on Linux"
    absent = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    return f"{' and '.join(absent)} not found (Debian: apt-get install iproute2)" if absent else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=int, nargs="+", default=[200, 300, 450, 700, 1500], help="Mbit/s")
    parser.add_argument("--chunks", type=int, nargs="*", default=[4, 8])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank is not None:
        return run_rank(options.rank, options.folder, options.chunks, options.rounds)
    reason = missing()
    if reason is not None:
        print(f"bench-overlap skipped: {reason}")
        return None
    columns = ["plain", "auto", *(f"{c} chunks" for c in options.chunks)]
    print(
        f"MLP [{SEQUENCE}, {HIDDEN}] x {FFN}, fp32, {RANKS} ranks of one thread, forward + backward, ms; in brackets:"
    )
    print("how many times max(compute, communication)")
    print("| Mbit/s | layout | compute | communication | " + " | ".join(columns) + " |")
    print("|---" * (4 + len(columns)) + "|")
    try:
        make_link()
        for rate in options.rates:
            for row in measure(rate, options.chunks, options.rounds):
                compute_ms, communication_ms = float(row["compute_ms"]), float(row["communication_ms"])
                bound = max(compute_ms, communication_ms)
                cells = [f"{float(row[c]):.0f} ({float(row[c]) / bound:.2f})" for c in columns]
                numbers = [str(rate), str(row["layout"]), f"{compute_ms:.0f}", f"{communication_ms:.0f}", *cells]
                print("| " + " | ".join(numbers) + " |", flush=True)
    finally:
        remove_link()
    return None


if __name__ == "__main__":
    main()
