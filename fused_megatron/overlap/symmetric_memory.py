"""Products fused with their collectives by torch, over memory that the ranks of one NVLink domain map from each other.

torch.ops.symm_mem cuts the product by rank, not by chunk: the copy engine copies one block while another is multiplied,
and no NCCL kernel holds SMs. It replaces the chunks under these conditions:

    group       reachable: NCCL, all ranks on one host, each pair of GPUs joined by NVLink, symmetric memory mapped
    operands    float32 or 16 bits, and the sequence is dim 0, so that blocks need no copy
    products    all_gather(x) @ w.T (column forward, row backward) and reduce_scatter(x @ w.T) (row forward, column
                backward); there is no fused op with an all-reduce
    choice      overlap=True, and the cost model would choose several chunks; a fixed number of chunks is kept
"""

import socket
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symm_mem

from fused_megatron.collectives.together import gather_json

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reaches(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether all ranks of a group can map each other's memory. All ranks call at once and get the same answer.

    Communication: one gather of host names; if they agree, the exchange of handles of 4 bytes of memory.
    """
    if device.type != "cuda" or torch.version.hip is not None or group._get_backend(device).name() != "nccl":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    ranks = gather_json([socket.gethostname(), index, _nvlinks()], group)
    if not _one_domain(ranks):
        return False
    mapped = True
    try:
        symm_mem.rendezvous(symm_mem.empty(1, dtype=torch.int32, device=torch.device("cuda", index)), group)
    except RuntimeError:  # a driver or container that does not export memory
        mapped = False
    return all(gather_json(mapped, group))


def applies(x: torch.Tensor, dim: int | None) -> bool:
    """Whether the fused ops accept x, gathered or scattered over dim, in a group that symmetric memory reaches."""
    return dim == 0 and x.dtype in _DTYPES and x.dim() >= 2


def gather_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: dist.ProcessGroup, keep_gathered: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Gather x of all ranks along dim 0, and return (gathered @ weight.T + bias, gathered or None)."""
    gathered, (y,) = torch.ops.symm_mem.fused_all_gather_matmul(
        x.contiguous(), [weight.t()], 0, group.group_name, return_A=keep_gathered
    )
    return y if bias is None else y.add_(bias), gathered if keep_gathered else None


def product_reduce_scatter(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: dist.ProcessGroup
) -> torch.Tensor:
    """Return this rank's block of dim 0 of the sum over ranks of x @ weight.T, + bias, the same on all ranks."""
    y: torch.Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(
        x.contiguous(), weight.t(), "sum", 0, group.group_name
    )
    return y if bias is None else y.add_(bias)


def _one_domain(ranks: list[list[Any]]) -> bool:
    """Whether NVLink joins every pair of ranks. For each rank: its host, its device, and the links of the host."""
    hosts, devices = {host for host, *_ in ranks}, {device for _, device, _ in ranks}
    if len(hosts) > 1 or len(devices) < len(ranks):  # two ranks with one index: each sees only its own GPU
        return False
    return all(
        max(devices) < len(links) and all(links[own][other] for other in devices - {own}) for _, own, links in ranks
    )


def _nvlinks() -> list[list[bool]]:
    """Return a table [a][b]: whether NVLink joins devices a and b of this host; empty if that is unknown."""
    try:
        found = torch._C._distributed_c10d._detect_dma_connectivity(  # type: ignore[attr-defined]
            torch._C._autograd.DeviceType.CUDA, "nvlink"
        )
    except (RuntimeError, AttributeError):  # no NVML, or a torch that has another name for it
        return []
    return [[links > 0 for links in row] for row in found.matrix]
