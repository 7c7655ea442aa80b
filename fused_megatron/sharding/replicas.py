"""Comparison of weights that several ranks hold: ranks exchange a digest of each copy instead of its values."""

from collections import Counter
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.collectives import Group
from fused_megatron.collectives.together import gather_json
from fused_megatron.sharding.row_shards import WHOLE_ROWS, Rows

_INT64_BYTES = 8


def find_drift(
    parameters: Mapping[str, nn.Parameter],
    replicas: Group,
    others: Sequence[Group],
    own: Mapping[str, torch.Tensor] | None = None,
    rows: Rows = WHOLE_ROWS,
) -> str | None:
    """Describe a difference between ranks that hold the same part of a full parameter; None if there is none.

    All ranks of the groups must call it. The ranks of a group learn the differences within their group only.

    Args:
        parameters: this rank's parameters, by their names in the full model.
        replicas: ranks that hold the same parts of every parameter (data- and context-parallel ranks).
        others: groups in which several ranks hold some of the parts (tensor-parallel ranks, the stages of tied
            weights).
        own: the rows of each parameter that this rank holds, by the same names; None: whole parameters.
        rows: the numbers of these rows.

    Returns:
        The first parameter that differs, the global ranks whose values differ from most, and the number of other
        parameters that differ.

    Communication: over `replicas` one number from each rank; over the others a number and a name for each parameter.
    Memory: reads each weight once and keeps 8 bytes for each parameter. One wait for the device.
    """
    digests = parameter_digests(parameters, own, rows)
    total = sum(digests.values()) & (2**64 - 1)
    found = None
    if len(set(gather_json(total, replicas))) > 1:
        found = _difference(gather_json(digests, replicas), replicas)
    # Also after a difference was found: the ranks of the other groups do not know of it, and will call this, too.
    for group in others:
        every = gather_json(digests, group)
        found = found or _difference(every, group)
    return found


def parameter_digests(
    parameters: Mapping[str, nn.Parameter],
    own: Mapping[str, torch.Tensor] | None = None,
    rows: Rows = WHOLE_ROWS,
) -> dict[str, int]:
    """Return a digest for each part of a full parameter: the sum of its bits as 64-bit numbers. Arguments: find_drift.

    Any single change of a value changes the digest. The keys are the names of the full parameters, with the offset of
    the part unless it is the full parameter.
    """
    names, sums = [], []
    for name, parameter in parameters.items():
        for part in rows.of(parameter).own_parts(parameter):
            held = part.held(parameter.detach() if own is None else own[name])
            offset = "" if tuple(held.tensor.shape) == held.full_shape else f" at {held.offset}"
            names.append(part.full_name(name) + offset)
            sums.append(_sum_of_bits(held.tensor))
    return dict(zip(names, torch.stack(sums).tolist(), strict=True)) if sums else {}


def _sum_of_bits(tensor: torch.Tensor) -> torch.Tensor:
    """Sum the bits in one pass, as fast as memory is read: as integers of 8 bytes. Returns a 0-dim int64 tensor."""
    flat = tensor.reshape(-1).view(torch.uint8)
    if flat.storage_offset() % _INT64_BYTES:
        flat = flat.clone()
    whole = flat.numel() // _INT64_BYTES * _INT64_BYTES
    return flat[:whole].view(torch.int64).sum() + flat[whole:].sum(dtype=torch.int64)


def _difference(of_ranks: Sequence[Mapping[str, int]], group: Group) -> str | None:
    held: dict[str, dict[int, int]] = {}
    for rank, digests in enumerate(of_ranks):
        for name, digest in digests.items():
            held.setdefault(name, {})[rank] = digest
    differing = [name for name, digests in held.items() if len(set(digests.values())) > 1]
    if not differing:
        return None
    assert group is not None
    world = dist.get_process_group_ranks(group)
    of_first = held[differing[0]]
    common = Counter(of_first.values()).most_common(1)[0][0]
    odd, most = (
        ", ".join(str(world[rank]) for rank, digest in of_first.items() if (digest == common) is same)
        for same in (False, True)
    )
    more = f", and so do {len(differing) - 1} more of {len(held)} parameters" if len(differing) > 1 else ""
    return f"{differing[0]} on rank {odd} differs from rank {most}{more}"
