"""Shards of parameters along dim 0: the rows of each parameter that one rank of a group owns."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from fused_megatron.sharding.parameter_record import parameter_parts, parameter_record
from fused_megatron.sharding.parameter_shard import ShardPart


@dataclass(frozen=True)
class RowShards:
    """Cuts every parameter into blocks of ceil(rows / num_shards) rows, the last ones shorter or empty.

    A 0-dim parameter is one row. With one shard the rank owns whole parameters.

    Attributes:
        num_shards: ranks that share each parameter.
        index: this rank among them.
    """

    num_shards: int = 1
    index: int = 0

    def of(self, parameter: torch.Tensor) -> "RowShards":
        """Return the rows of a parameter: the same for all. See ModelRows."""
        return self

    def rows_per_shard(self, shape: Sequence[int]) -> int:
        """Number of rows of a full block of a parameter of this shape."""
        return -(-num_rows(shape) // self.num_shards)

    def rows(self, shape: Sequence[int], index: int | None = None) -> slice:
        """The rows that a rank owns of a parameter of this shape.

        Args:
            index: of the rank among those that share the parameter; None for this rank.
        """
        block, total = self.rows_per_shard(shape), num_rows(shape)
        start = min(total, block * (self.index if index is None else index))
        return slice(start, min(total, start + block))

    def own_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Return the shape of the tensor that own() returns of a tensor of this shape."""
        rows = self.rows(shape)
        if len(shape) == 0:
            return () if rows.stop > rows.start else (0,)
        return (rows.stop - rows.start, *shape[1:])

    def own(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's rows of a tensor in the shape of the parameter, a view; a 0-dim tensor where it owns that."""
        rows = self.rows(tensor.shape)
        if tensor.dim() == 0:
            return tensor if rows.stop > rows.start else tensor.view(1)[:0]
        return tensor[rows]

    def own_parts(self, parameter: torch.Tensor, parts: Sequence[ShardPart] | None = None) -> tuple[ShardPart, ...]:
        """The parts of full parameters that this rank's rows hold, as parts of the tensor that own() returns.

        Args:
            parts: of the parameter; None: all.
        """
        if self.num_shards == 1:
            return parameter_parts(parameter) if parts is None else tuple(parts)
        start = self.rows(parameter.shape).start
        cut = self.cut(parameter_parts(parameter) if parts is None else parts, parameter.shape)
        return cut if parameter.dim() == 0 else tuple(_moved(part, -start) for part in cut)

    def cut(self, parts: Sequence[ShardPart], shape: Sequence[int]) -> tuple[ShardPart, ...]:
        """What this rank's rows hold of parts of a parameter, as parts of the whole parameter.

        Args:
            parts: of a parameter of this shape.
        """
        own = self.rows(shape)
        if len(shape) == 0:
            return tuple(parts) if own.stop > own.start else ()
        found = []
        for part in parts:
            begin, end, _ = part.rows.indices(shape[0])
            start, stop = max(begin, own.start), min(end, own.stop)
            if start < stop:
                offset = (part.shard.offset[0] + start - begin, *part.shard.offset[1:])
                found.append(ShardPart(part.name, slice(start, stop), replace(part.shard, offset=offset)))
        return tuple(found)


WHOLE_ROWS = RowShards()
"""Of a rank that owns every parameter as a whole."""


@dataclass(frozen=True)
class ModelRows:
    """Rows of a model whose experts may have other replicas than its dense parameters.

    Attributes:
        dense: rows of dense parameters.
        experts: rows of the parameters of experts.
    """

    dense: RowShards = WHOLE_ROWS
    experts: RowShards = WHOLE_ROWS

    def of(self, parameter: torch.Tensor) -> RowShards:
        """Return the rows of a parameter that this rank owns."""
        return self.dense if parameter_record(parameter).experts is None else self.experts


Rows = RowShards | ModelRows
"""Rows of the parameters of a model: the same cut for all, or another for experts."""


def num_rows(shape: Sequence[int]) -> int:
    """Rows of a parameter of this shape; 1 for a 0-dim one."""
    return shape[0] if len(shape) else 1


def _moved(part: ShardPart, by: int) -> ShardPart:
    return replace(part, rows=slice(part.rows.start + by, part.rows.stop + by))
