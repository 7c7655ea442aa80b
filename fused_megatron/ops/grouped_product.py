"""Matrix products of groups of rows, each with the weight of its group: the products of experts."""

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
import torch.nn.functional as F

from fused_megatron.ops.product import product

# Rows of each group: numbers on the host, or on a GPU a tensor on the device, which no host waits for.
Counts = Sequence[int] | torch.Tensor


def group_rows(counts: Sequence[int]) -> Iterator[tuple[int, slice]]:
    """Yield (group, its rows) of each group that has rows."""
    begin = 0
    for group, count in enumerate(counts):
        if count:
            yield group, slice(begin, begin + count)
        begin += count


def grouped_product(
    x: torch.Tensor,
    weight: torch.Tensor,
    counts: Counts,
    *,
    transposed: bool = False,
    out: torch.Tensor | None = None,
) -> torch.Tensor:
    """Multiply each row with the weight of its group.

        y[rows of g] = x[rows of g] @ weight[g].T        weight [G, O, I]
        transposed:    x[rows of g] @ weight[g]          weight [G, I, O]

    Args:
        x: [N, I]; the rows of group 0, then the rows of group 1, ...
        weight: [G, O, I], or [G, I, O] if transposed; in the dtype of x.
        counts: [G] numbers of rows, together N: ints of the host; on a GPU an int tensor of the device is enough.
        transposed: whether to multiply with the weight itself.
        out: [N, O] memory for the result, or None.

    Returns:
        [N, O]; `out` if it is given. Autograd does not see the products: the callers are autograd functions.

    Memory: saves nothing. Rows beyond the sum of counts on a device keep any value.
    """
    num_outputs = weight.shape[2 if transposed else 1]
    if isinstance(counts, torch.Tensor) or x.is_cuda:
        y = F.grouped_mm(x, weight if transposed else weight.transpose(1, 2), offs=_ends(counts, x.device))
        return y if out is None else out.copy_(y)
    y = x.new_empty((x.shape[0], num_outputs)) if out is None else out
    for group, rows in group_rows(counts):
        product(x[rows], weight[group].t() if transposed else weight[group], out=y[rows])
    return y


def grouped_weight_gradient(
    grad: torch.Tensor,
    x: torch.Tensor,
    counts: Counts,
    into: torch.Tensor | None = None,
    accumulate: bool = False,
) -> torch.Tensor:
    """Return the gradients of the weights of grouped_product: grad[rows of g].T @ x[rows of g] for each group.

    Args:
        grad: [N, O], the gradient of the result.
        x: [N, I], in the dtype of grad.
        counts: as in grouped_product.
        into: [G, O, I] memory for the result, in the dtype of grad or float32; None: allocated in the dtype of grad.
        accumulate: add the gradients to `into`. A group without rows then costs nothing.

    Returns:
        [G, O, I]; `into` if it is given. The gradient of a group without rows is 0.
    """
    if isinstance(counts, torch.Tensor) or x.is_cuda:
        ends = _ends(counts, x.device)
        gradient = F.grouped_mm(grad.t(), x, offs=ends)
        if into is None:
            return gradient
        return into.add_(gradient) if accumulate else into.copy_(gradient)
    assert into is not None or not accumulate, "there is nothing to add to"
    total = x.new_empty((len(counts), grad.shape[1], x.shape[1])) if into is None else into
    if not accumulate:
        for group, count in enumerate(counts):
            if not count:
                total[group].zero_()
    for group, rows in group_rows(counts):
        product(grad[rows].t(), x[rows].t(), out=total[group], add=accumulate)
    return total


def _ends(counts: Counts, device: torch.device) -> torch.Tensor:
    """Return the end of each group's rows, as torch's grouped products want it: int32 on the device."""
    if isinstance(counts, torch.Tensor):
        return counts.cumsum(0, dtype=torch.int32)
    if len(set(counts)) == 1:  # experts with a capacity: no copy from the host
        return torch.arange(1, len(counts) + 1, dtype=torch.int32, device=device) * counts[0]
    return torch.tensor(list(accumulate(counts)), dtype=torch.int32).to(device, non_blocking=True)
