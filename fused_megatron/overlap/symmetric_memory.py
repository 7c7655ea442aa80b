"""Products fused with their collective by torch, over memory that the ranks of one NVLink domain map from each other.

torch.ops.symm_mem cuts the product by rank, not by chunk: a block is copied by the copy engine, without a NCCL kernel
that holds SMs, while another is multiplied. It takes the place of the chunks where it applies:

    group       reached: NCCL, all ranks on one host, each pair of GPUs joined by NVLink, symmetric memory mapped
    operands    float32 or 16 bits, and a sequence that is dim 0, so that blocks need no copy
    products    all_gather(x) @ w.T (column forward, row backward) and reduce_scatter(x @ w.T) (row forward, column
                backward); an all-reduce has no fused op and stays with chunks
    choice      overlap=True, and chunks would pay, too; a fixed number of chunks is left alone
"""

import socket
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import _symmetric_memory as symm_mem

from fused_megatron.collectives.together import gather_json

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def reaches(group: dist.ProcessGroup, device: torch.device) -> bool:
    """Whether all ranks of a group can map each other's memory; the same answer on all of them, who ask at once.

    Communication: one gather of host names; where they agree, the exchange of handles of 4 bytes of memory.
    """
    if device.type != "cuda" or torch.version.hip is not None or group._get_backend(device).name() != "nccl":
        return False
    index = torch.cuda.current_device() if device.index is None else device.index
    places = gather_json([socket.gethostname(), index, _nvlinks()], group)
    if not _one_domain(places):
        return False
    mapped = True
    try:
        symm_mem.rendezvous(symm_mem.empty(1, dtype=torch.int32, device=torch.device("cuda", index)), group)
    except RuntimeError:  # a driver or container that does not export memory
        mapped = False
    return all(gather_json(mapped, group))


def applies(x: torch.Tensor, dim: int | None) -> bool:
    """Whether the fused ops take x, gathered or scattered over dim, in a group that symmetric memory reaches."""
    return dim == 0 and x.dtype in _DTYPES and x.dim() >= 2


def gather_product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: dist.ProcessGroup, keep_gathered: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(gathered @ weight.T + bias, gathered or None), gathered the x of all ranks along dim 0."""
    gathered, (y,) = torch.ops.symm_mem.fused_all_gather_matmul(
        x.contiguous(), [weight.t()], 0, group.group_name, return_A=keep_gathered
    )
    return y if bias is None else y.add_(bias), gathered if keep_gathered else None


def product_reduce_scatter(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, group: dist.ProcessGroup
) -> torch.Tensor:
    """This rank's block of dim 0 of the sum over ranks of x @ weight.T, and bias on top, which all ranks give."""
    y: torch.Tensor = torch.ops.symm_mem.fused_matmul_reduce_scatter(
        x.contiguous(), weight.t(), "sum", 0, group.group_name
    )
    return y if bias is None else y.add_(bias)


def _one_domain(places: list[list[Any]]) -> bool:
    """places: of every rank its host, its device, and for each device of the host which others NVLink joins it to."""
    hosts, devices = {host for host, *_ in places}, {device for _, device, _ in places}
    if len(hosts) > 1 or len(devices) < len(places):  # two ranks with one index: each sees only its own GPU
        return False
    return all(
        max(devices) < len(links) and all(links[own][other] for other in devices - {own}) for _, own, links in places
    )


def _nvlinks() -> list[list[bool]]:
    """[a][b]: whether NVLink joins devices a and b of this host."""
    try:
        found = torch._C._distributed_c10d._detect_dma_connectivity(  # type: ignore[attr-defined]
            torch._C._autograd.DeviceType.CUDA, "nvlink"
        )
    except (RuntimeError, AttributeError):  # no NVML, or a torch that has another name for it
        return []
    return [[links > 0 for links in row] for row in found.matrix]
