"""Stochastic rounding of optimizer state to bfloat16, with random bits that are the same in every layout."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from math import prod

import torch

from fused_megatron.checks import has_values
from fused_megatron.reference.philox import rows_of_random_words
from fused_megatron.reference.stochastic_rounding import round_to_bfloat16
from fused_megatron.sharding import ShardPart, TensorBox

_RUN_ELEMENTS = {"cpu": 1 << 16, "cuda": 1 << 22}
"""Most elements with random words at a time, unless one row has more: they fit into a CPU's cache, and fill a GPU."""


class StochasticState:
    """Rounds new state of parameters to bfloat16.

    The random bits of an element depend only on the seed of the run, the name of the full parameter, the element's
    index in it and the step. So every layout and every resumed run has the same bits. Each element has 32 random bits
    (reference.philox): 16 bits for each of two state tensors.

    Args:
        parts: for each parameter, the parts of full parameters in this rank's tensor.
        seed: seed of the run.
    """

    def __init__(self, parts: Mapping[str, Sequence[ShardPart]], seed: int) -> None:
        self._parts = parts
        self._seeds = {
            part.full_name(name): _seed(seed, part.full_name(name)) for name, held in parts.items() for part in held
        }

    def store(self, name: str, step: int, wide: Sequence[torch.Tensor], narrow: Sequence[torch.Tensor]) -> None:
        """Round the state tensors of a parameter.

        Args:
            name: name of the parameter.
            step: number of the update.
            wide: at most two float32 tensors in the shape of this rank's tensor.
            narrow: bfloat16 tensors that receive them.

        Memory: about 100 bytes for each of 2^16 elements (2^22 on a GPU), or for each element of a longer row.
        """
        assert len(wide) <= 2
        if not has_values(wide[0]):
            return
        for part in self._parts[name]:
            # Filled on the device: a copy of a list would make the host wait for the device.
            numbers = (self._seeds[part.full_name(name)], step)
            rng_state = torch.cat([torch.full((1,), number, device=wide[0].device) for number in numbers])
            sources, targets = ([part.held(tensor) for tensor in tensors] for tensors in (wide, narrow))
            for starts, views in _runs(sources[0], [box.tensor for box in (*sources, *targets)]):
                words = rows_of_random_words(rng_state, starts, views[0].shape[1])
                halves = (words & 0xFFFF, words >> 16)
                for source, target, bits in zip(views[: len(wide)], views[len(wide) :], halves, strict=False):
                    target.copy_(round_to_bfloat16(source, bits))


def _seed(seed: int, name: str) -> int:
    """Return 63 random bits for a full parameter of a run with this seed."""
    digest = hashlib.sha256(f"optimizer state {seed} {name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _runs(box: TensorBox, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[torch.Tensor, list[torch.Tensor]]]:
    """Cut contiguous tensors in the shape of a box into rows [n, length] of consecutive elements of the full tensor.

    Yields the indices [n] of the first elements in the full tensor, and views of the tensors.
    """
    shape, full = tuple(box.tensor.shape), box.full_shape
    if prod(shape) == 0:
        return
    device = box.tensor.device
    most = _RUN_ELEMENTS.get(device.type, _RUN_ELEMENTS["cuda"])
    strides = [prod(full[dim + 1 :]) for dim in range(len(full))]
    first = sum(start * stride for start, stride in zip(box.offset, strides, strict=True))
    if shape[1:] == full[1:]:  # one run, also of a 0-dim tensor
        flat = [tensor.view(-1) for tensor in tensors]
        for start in range(0, flat[0].numel(), most):
            yield torch.full((1,), first + start, device=device), [f[start : start + most][None] for f in flat]
        return
    starts = torch.full((1,), first, device=device)
    for size, stride in zip(shape[:-1], strides[:-1], strict=True):
        starts = (starts[:, None] + stride * torch.arange(size, device=device)).view(-1)
    rows = [tensor.view(-1, shape[-1]) for tensor in tensors]
    step = max(1, most // shape[-1])
    for row in range(0, len(starts), step):
        yield starts[row : row + step], [r[row : row + step] for r in rows]
