"""Faults of ranks: killed, stopped, in an endless loop, cut off, of other sizes, with a slow disk.

python benchmarks/faults/rank_faults.py LIBRARY RANK STORE     a rank of plain all-reduces, until one fails
"""

import os
import re
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from dataset_faults import write
from faulty_rank import KINDS, slow_fsync
from outcomes import Answer, NotHere, Outcome, Seen, ending_words, error_words, on_ranks, text_of
from processes import START_S, Ended, Ranks, watched
from savers import distributed, megatron
from torch.distributed import checkpoint as dcp

from fused_megatron.testing.two_hosts import DEVICE, TwoHosts, missing

TIMEOUT_S = 5.0
FAULTY, STEP, NUM_STEPS = 1, 20, 100_000
HERE = Path(__file__).parent
_SAID = "fused-megatron: error"
CONFIG = f"""
[model]
num_layers = 2
hidden_size = 32
num_heads = 2
seq_len = 16
[parallel]
timeout_s = {TIMEOUT_S:g}
tensor_parallel_size = 2
[training]
global_batch_size = 2
microbatch_size = 2
eval_batches = 1
eval_interval = {NUM_STEPS}
log_interval = 1
checkpoint_interval = {NUM_STEPS}
"""


# ---- fused-megatron: runs of `train` ---------------------------------------------------------------------------------


def train_ranks(
    folder: Path,
    fault: str,
    at: str,
    num_ranks: int,
    *,
    words: tuple[str, ...] = (),
    steps: int = NUM_STEPS,
    hosts: TwoHosts | None = None,
    other: tuple[str, ...] = (),
) -> Ranks:
    """A run whose ranks `at` have a fault; `other` are words of rank FAULTY only."""
    write(folder / "set")
    (folder / "run.toml").write_text(CONFIG)
    given = ["--data.path", str(folder / "set"), "--training.run_folder", str(folder / "run")]
    given += ["--training.num_steps", str(steps), *words]
    commands, environments = [], []
    for rank in range(num_ranks):
        own = [sys.executable, str(HERE / "faulty_rank.py"), fault, at, "3", "train", str(folder / "run.toml"), *given]
        commands.append([*(hosts.on(rank) if hosts else ()), *own, *(other if rank == FAULTY else ())])
        places = {"RANK": rank, "WORLD_SIZE": num_ranks}
        local = {"LOCAL_RANK": 0 if hosts else rank, "LOCAL_WORLD_SIZE": 1 if hosts else num_ranks}
        meeting = {"MASTER_ADDR": hosts.addresses[0] if hosts else "127.0.0.1", "MASTER_PORT": "29500"}
        # The namespaces share the memory of this machine, as two machines do not.
        apart = {"GLOO_SOCKET_IFNAME": DEVICE, "FUSED_MEGATRON_SHARED_MEMORY": "off"}
        network = apart if hosts else {"FUSED_MEGATRON_STORE": str(folder / "store")}
        environments.append({name: str(value) for name, value in (places | local | meeting | network).items()})
    return Ranks(folder, commands, environments)


def ours(fault: str, at: str, num_ranks: int, words: tuple[str, ...], folder: Path) -> str:
    """What the ranks without a fault do."""
    ill = {int(rank) for rank in at.split(",")}

    def happens(ranks: Ranks) -> set[int]:
        for rank in sorted(ill):
            ranks.wait_for(rank, f"fault: {fault}")
        return set(range(num_ranks)) - ill

    return ended_words(watched(train_ranks(folder, fault, at, num_ranks, words=words), happens), folder)


def ended_words(found: dict[int, Ended], folder: Path) -> str:
    """Of ranks that should end soon, with a line each."""
    hang = [rank for rank, ended in found.items() if ended.code is None]
    if hang:
        return f"rank {hang[0]} {ending_words(('hangs', found[hang[0]].after_s))}"
    said = {rank: [line for line in ended.lines if line.startswith(_SAID)] for rank, ended in found.items()}
    slowest_s = max(ended.after_s for ended in found.values())
    every = f"all {len(found)} live ranks end" if len(found) > 1 else "the other rank ends"
    counts = [len(lines) for lines in said.values()]
    if max(counts) != 1:
        return f"{every} in {slowest_s:.1f} s, with {' / '.join(map(str, counts))} lines"
    line = next(lines[0] for lines in said.values() if lines).partition(": ")[2].partition(": ")[2]
    lines = "one line" if min(counts) else "one line for all"  # where all say the same, one does
    return f"{every} in {slowest_s:.1f} s with {lines}: `{shortened(line, folder)}`"


def shortened(line: str, folder: Path) -> str:
    return error_words(line.partition("; newest checkpoint")[0], folder).partition("`")[2].rpartition("`")[0]


def ours_cut_off(folder: Path) -> str:
    """Two machines of a rank each."""
    why = missing()
    if why:
        raise NotHere(why)
    with TwoHosts() as hosts:

        def happens(ranks: Ranks) -> set[int]:
            ranks.wait_for(0, "step 3/")
            hosts.pull_the_cable()
            return {0, 1}

        return ended_words(watched(train_ranks(folder, "none", "-", 2, hosts=hosts), happens), folder)


def ours_other_sizes(folder: Path) -> str:
    other = ("--model.seq_len", "32")
    found = watched(train_ranks(folder, "none", "-", 2, other=other), lambda _: {0, 1}, START_S)
    words = ended_words(found, folder)
    return re.sub(r"all 2 live ranks end in [\d.]+ s", "both ranks end before the first step", words)


def ours_slow_disk(folder: Path) -> str:
    found = watched(train_ranks(folder, "slow-fsync", str(FAULTY), 2, steps=2), lambda _: {0, 1}, START_S)
    saved = list((folder / "run" / "checkpoints").glob("step-*"))
    if saved and all(ended.code == 0 for ended in found.values()):
        return "waits, and saves step 2"
    return ended_words(found, folder)


# ---- torch.distributed, and the groups of megatron-core --------------------------------------------------------------


def group_of(library: str) -> dist.ProcessGroup:
    if library == "torch.distributed":
        group = dist.new_group(timeout=timedelta(seconds=TIMEOUT_S))
        assert group is not None
        return group
    state = megatron(".parallel_state")
    state.initialize_model_parallel(dist.get_world_size(), distributed_timeout_minutes=TIMEOUT_S / 60)
    return state.get_tensor_model_parallel_group()


def reduce_loop(rank: int, ranks: int, library: str, fault: str) -> Answer:
    """All-reduces, of which one fails; at STEP something happens to rank FAULTY."""
    group = group_of(library)
    for step in range(NUM_STEPS):
        if rank == FAULTY and step == STEP:
            KINDS[fault][0]()
        if step == STEP and fault == "none":
            print("begun", flush=True)
        begun = time.monotonic()
        try:
            dist.all_reduce(torch.ones(1000), group=group)
        except Exception as error:
            raise Seen("error", f"{time.monotonic() - begun:.1f}|{text_of(error)}") from None
        time.sleep(0.01)
    return "value", None


def theirs(library: str, fault: str, folder: Path) -> str:
    if library == "megatron-core":
        megatron(".parallel_state")
    answers = on_ranks(reduce_loop, 2, library, fault, limit_s=LIMIT_S)
    return waited_words(answers[1 - FAULTY], folder)


LIMIT_S = 30.0


def waited_words(answer: Answer, folder: Path) -> str:
    kind, value = answer
    if kind != "error":
        return ending_words(answer)
    seconds, _, text = str(value).partition("|")
    return f"the other rank raises after {seconds} s: {error_words(text, folder)}"


def theirs_cut_off(library: str, folder: Path) -> str:
    if library == "megatron-core":
        megatron(".parallel_state")
    why = missing()
    if why:
        raise NotHere(why)
    with TwoHosts() as hosts:
        words = [sys.executable, str(HERE / "rank_faults.py"), library]
        commands = [[*hosts.on(rank), *words, str(rank), str(folder / "store")] for rank in range(2)]

        def happens(ranks: Ranks) -> set[int]:
            ranks.wait_for(0, "begun")
            hosts.pull_the_cable()
            return {0, 1}

        ranks = Ranks(folder, commands, [{"GLOO_SOCKET_IFNAME": DEVICE}] * 2)
        found = watched(ranks, happens)
        if found[0].code is None:
            return ending_words(("hangs", found[0].after_s))
        return waited_words(("error", ranks.said(0).rpartition("answer: ")[2]), folder)


def rank_of_two(library: str, rank: int, store: str) -> None:
    wait = timedelta(seconds=TIMEOUT_S)
    dist.init_process_group("gloo", f"file://{store}", wait, rank=rank, world_size=2)
    try:
        reduce_loop(rank, 2, library, "none")
    except Seen as seen:
        print(f"answer: {seen.args[1]}", flush=True)
        os._exit(1)


def reduce_other_sizes(rank: int, ranks: int, library: str) -> Answer:
    group = group_of(library)
    try:
        dist.all_reduce(torch.ones(4 * (1 + rank)), group=group)
    except Exception as error:
        raise Seen("error", text_of(error)) from None
    return "value", "**sums them, silently**"


def theirs_other_sizes(library: str, folder: Path) -> str:
    if library == "megatron-core":
        megatron(".parallel_state")
    answers = on_ranks(reduce_other_sizes, 2, library, limit_s=LIMIT_S)
    died = [answer for answer in answers if answer[0] == "died"]
    kind, value = (died or answers)[0]
    if kind == "error":
        return error_words(str(value), folder)
    return str(value) if kind == "value" else ending_words((kind, value))


def save_slowly(rank: int, ranks: int, folder: Path) -> Answer:
    group = group_of("torch.distributed")
    if rank == FAULTY:
        slow_fsync()
    try:
        dcp.save({"weight": distributed(torch.ones(8, 8), ranks)}, checkpoint_id=folder, process_group=group)
    except Exception as error:
        raise Seen("error", text_of(error)) from None
    return "value", "waits, and saves"


def theirs_slow_disk(folder: Path) -> str:
    kind, value = on_ranks(save_slowly, 2, folder / "run", limit_s=LIMIT_S)[1 - FAULTY]
    return str(value) if kind == "value" else error_words(str(value), folder)


MESH = ("--parallel.pipeline_parallel_size", "2")


def row(fault: str, at: str = str(FAULTY), num_ranks: int = 2, words: tuple[str, ...] = ()) -> dict[str, Outcome]:
    return {
        "fused-megatron": partial(ours, fault, at, num_ranks, words),
        "torch.distributed": partial(theirs, "torch.distributed", fault),
        "megatron-core": partial(theirs, "megatron-core", fault),
    }


def in_both(function: Callable[[str, Path], str], own: Outcome) -> dict[str, Outcome]:
    others = {library: partial(function, library) for library in ("torch.distributed", "megatron-core")}
    return {"fused-megatron": own, **others}


FAULTS: dict[str, dict[str, Outcome]] = {
    "a rank is killed (SIGKILL)": row("kill"),
    "a rank is stopped (SIGSTOP); ours: rank 3 of tp 2 x pp 2": row("stop", "3", 4, MESH),
    "a rank is in an endless loop": row("spin"),
    "the cable between two machines is pulled": in_both(theirs_cut_off, ours_cut_off),
    "ranks have other sizes (ours: another seq_len; theirs: an all-reduce of 4 and 8 numbers)": in_both(
        theirs_other_sizes, ours_other_sizes
    ),
    "a sync of the disk takes 8 s in a save": {
        "fused-megatron": ours_slow_disk,
        "torch.distributed": theirs_slow_disk,
    },
}


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    rank_of_two(sys.argv[1], int(sys.argv[2]), sys.argv[3])
