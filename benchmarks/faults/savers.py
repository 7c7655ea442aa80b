"""Savers and loaders of one tensor that ranks share: ours and other libraries', each used as its manual says."""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from outcomes import NotHere
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from fused_megatron.checkpoint import TensorBox, checkpoint_to_resume, load_checkpoint, save_checkpoint

ROWS, COLUMNS = 256, 1024
NAME = "weight"


@dataclass(frozen=True)
class Saver:
    """A way to save.

    Attributes:
        save: (folder, this rank's rows, rank, ranks) to files.
        load: (folder, this rank's rows to load into, rank, ranks, name) to the rows as loaded; none where it looks for
            a checkpoint and finds none.
        in_python: its files are opened by Python, not by a library in C++ or Rust.
    """

    save: Callable[[Path, torch.Tensor, int, int], None]
    load: Callable[[Path, torch.Tensor, int, int, str], torch.Tensor]
    in_python: bool = True


def group_of(ranks: int) -> dist.ProcessGroup | None:
    return dist.group.WORLD if ranks > 1 else None


# ---- fused-megatron --------------------------------------------------------------------------------------------------


def box_of(rows: torch.Tensor, rank: int, ranks: int) -> TensorBox:
    count = rows.shape[0]
    return TensorBox(rows, (ranks * count, *rows.shape[1:]), (rank * count, *(0 for _ in rows.shape[1:])))


def save_ours(folder: Path, rows: torch.Tensor, rank: int, ranks: int) -> None:
    save_checkpoint(folder, 1, {NAME: box_of(rows, rank, ranks)}, state={}, group=group_of(ranks))


def load_ours(folder: Path, rows: torch.Tensor, rank: int, ranks: int, name: str) -> torch.Tensor:
    checkpoint = checkpoint_to_resume(folder, group=group_of(ranks))
    if checkpoint is None:
        return rows[:0]
    load_checkpoint(checkpoint, {name: box_of(rows, rank, ranks)}, group=group_of(ranks))
    return rows


# ---- torch.distributed.checkpoint ------------------------------------------------------------------------------------


def distributed(rows: torch.Tensor, ranks: int) -> DTensor:
    return DTensor.from_local(rows, init_device_mesh("cpu", (ranks,)), [Shard(0)])


def save_dcp(folder: Path, rows: torch.Tensor, rank: int, ranks: int) -> None:
    dcp.save({NAME: distributed(rows, ranks)}, checkpoint_id=folder)


def load_dcp(folder: Path, rows: torch.Tensor, rank: int, ranks: int, name: str) -> torch.Tensor:
    state = {name: distributed(rows, ranks)}
    dcp.load(state, checkpoint_id=folder)
    return state[name].to_local()


# ---- a file of each rank ---------------------------------------------------------------------------------------------


def save_torch(folder: Path, rows: torch.Tensor, rank: int, ranks: int) -> None:
    torch.save({NAME: rows}, folder / f"rank-{rank}.pt")


def load_torch(folder: Path, rows: torch.Tensor, rank: int, ranks: int, name: str) -> torch.Tensor:
    return into_module(torch.load(folder / f"rank-{rank}.pt"), rows, name)


def save_safetensors(folder: Path, rows: torch.Tensor, rank: int, ranks: int) -> None:
    safetensors.torch.save_file({NAME: rows}, folder / f"rank-{rank}.safetensors")


def load_safetensors(folder: Path, rows: torch.Tensor, rank: int, ranks: int, name: str) -> torch.Tensor:
    return into_module(safetensors.torch.load_file(folder / f"rank-{rank}.safetensors"), rows, name)


def into_module(state: dict[str, torch.Tensor], rows: torch.Tensor, name: str) -> torch.Tensor:
    module = nn.Module()
    module.register_parameter(name, nn.Parameter(rows))
    module.load_state_dict(state)
    return module.get_parameter(name).detach()


# ---- megatron-core ---------------------------------------------------------------------------------------------------


with contextlib.suppress(ImportError):  # here, before ranks are forked: it takes seconds
    import_module("megatron.core.dist_checkpointing")


def megatron(name: str) -> Any:
    """A module of megatron-core. It asks for a GPU in each save: there is nothing to wait for without one.

    Raises:
        NotHere: it is not installed.
    """
    if not torch.cuda.is_available():
        torch.cuda.synchronize = lambda *_: None
        torch.cuda.current_device = lambda: torch.device("cpu")
    try:
        return import_module(f"megatron.core{name}")
    except ImportError as error:
        raise NotHere("megatron-core is not installed") from error


def sharded(rows: torch.Tensor, rank: int, ranks: int, name: str = NAME) -> dict[str, Any]:
    tensor = megatron(".dist_checkpointing").ShardedTensor
    return {name: tensor.from_rank_offsets(name, rows, (0, rank, ranks))}


def save_megatron(folder: Path, rows: torch.Tensor, rank: int, ranks: int) -> None:
    megatron(".dist_checkpointing").save(sharded(rows, rank, ranks), str(folder))


def load_megatron(folder: Path, rows: torch.Tensor, rank: int, ranks: int, name: str) -> torch.Tensor:
    return megatron(".dist_checkpointing").load(sharded(rows, rank, ranks, name), str(folder))[name]


SAVERS = {
    "fused-megatron": Saver(save_ours, load_ours),
    "torch DCP": Saver(save_dcp, load_dcp),
    "torch.save": Saver(save_torch, load_torch, in_python=False),
    "safetensors": Saver(save_safetensors, load_safetensors, in_python=False),
    "megatron-core": Saver(save_megatron, load_megatron),
}
