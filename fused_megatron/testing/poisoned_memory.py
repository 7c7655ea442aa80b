"""Tensors between redzones, which reveal a kernel that reads or writes outside its tensors."""

import torch

_ZONE_BYTES = 512  # more than the widest access of a warp
_POISON = 0xFF  # NaN in every float dtype, -1 in every integer


class PoisonedMemory:
    """Allocates tensors in memory surrounded by NaN, and checks afterwards that nothing else was written.

    A read outside a tensor makes the result NaN; check() finds a write outside a tensor or into an input.
    """

    def __init__(self) -> None:
        self._buffers: list[tuple[str, torch.Tensor, int, int]] = []
        self._inputs: list[tuple[str, torch.Tensor, torch.Tensor]] = []

    def empty(
        self, shape: tuple[int, ...], dtype: torch.dtype, *, skip: int = 0, name: str = "output", device: str = "cpu"
    ) -> torch.Tensor:
        """Return a contiguous tensor of NaN (-1 for integers), `skip` elements past an address divisible by 64."""
        itemsize = dtype.itemsize
        begin = _ZONE_BYTES + skip * itemsize
        size = int(torch.Size(shape).numel()) * itemsize
        whole = torch.full((begin + size + _ZONE_BYTES + 64,), _POISON, dtype=torch.uint8, device=device)
        begin += -whole.data_ptr() % 64
        self._buffers.append((name, whole, begin, begin + size))
        return whole[begin : begin + size].view(dtype).view(shape)

    def place(self, tensor: torch.Tensor, *, skip: int = 0, name: str = "input") -> torch.Tensor:
        """Return a copy of an input between redzones; check() fails if the copy was written to."""
        placed = self.empty(tuple(tensor.shape), tensor.dtype, skip=skip, name=name, device=str(tensor.device))
        placed.copy_(tensor)
        self._inputs.append((name, placed, tensor.detach().clone()))
        return placed

    def check(self) -> None:
        """Raise AssertionError if a redzone or an input has changed."""
        for name, whole, begin, end in self._buffers:
            assert (whole[:begin] == _POISON).all(), f"{name}: written before its beginning"
            assert (whole[end:] == _POISON).all(), f"{name}: written past its end"
        for name, placed, original in self._inputs:
            same = torch.equal(placed.view(torch.uint8), original.contiguous().view(torch.uint8))
            assert same or placed.numel() == 0, f"{name}: an input was written to"
