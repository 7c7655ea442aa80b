"""The methods of context parallelism, and the partition of the sequence that each of them works on."""

from fused_megatron.checks import InputError, check_one_of
from fused_megatron.config.parallel import CONTEXT_PARALLEL_METHODS
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.sharding import SequencePartition, balanced_partition
from fused_megatron.sharding.sequence_partition import partition_sizes

METHODS = CONTEXT_PARALLEL_METHODS
"""Names of the methods, as in parallel.context_parallel_method."""


def exchange_size(method: str, num_ranks: int, num_heads: int, num_kv_heads: int) -> int:
    """Return the number of neighbouring ranks that exchange heads for rows; the groups of them form a ring.

    1 for "ring" and "all_gather", and num_ranks for "all_to_all". For "all_to_all+ring" the largest divisor of
    num_ranks, other than 1 and itself, that divides num_heads; one that divides num_kv_heads too is preferred, since
    no key is sent twice then. Without such a divisor it is 1: a ring only.

    Args:
        method: one of METHODS.
        num_ranks: size of the context-parallel group.
        num_heads, num_kv_heads: heads of a rank: N and G divided by the tensor-parallel ranks.

    Raises:
        InputError: an unknown method, or "all_to_all" with heads that num_ranks does not divide.
    """
    check_one_of("context_parallel_method", method, METHODS)
    if method == "all_to_all+ring":
        divisors = [d for d in range(2, num_ranks) if num_ranks % d == 0 and num_heads % d == 0]
        return max(divisors, key=lambda d: (num_kv_heads % d == 0, d), default=1)
    if method != "all_to_all":
        return 1
    if num_heads % num_ranks:
        raise InputError(
            f"context_parallel_method='all_to_all' must divide num_heads={num_heads} of a tensor-parallel rank by "
            f"context_parallel_size={num_ranks} (use 'ring', 'all_gather' or 'all_to_all+ring')"
        )
    return num_ranks


def partition_for(
    method: str,
    mask: AttentionMask,
    batch: int,
    seq_len: int,
    num_ranks: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    multiple_of: int = 1,
) -> SequencePartition:
    """Return the positions of each context-parallel rank for a microbatch.

    "ring" and "all_gather": equal tokens and equal visible pairs. "all_to_all": one block of neighbouring positions for
    each rank, since each rank attends over the whole sequence. "all_to_all+ring": equal pairs for the groups of ranks
    that exchange heads, and an equal block of the group's rows for each rank. The sizes of the ranks depend on seq_len,
    num_ranks, multiple_of and the heads only.

    Args:
        method: one of METHODS.
        mask: what each query sees; documents on the CPU. key_padding_mask is not read.
        batch: B, the samples of the microbatch.
        seq_len: S.
        num_ranks: size of the context-parallel group.
        num_heads, num_kv_heads: heads of a rank: N and G divided by the tensor-parallel ranks.
        multiple_of: divisor of each rank's number of positions, for example the tensor-parallel ranks under sequence
            parallelism.

    Raises:
        InputError: as exchange_size, and if a rank would have no position or multiple_of does not divide seq_len.

    Communication: none. All ranks compute the same partition from the same mask.
    """
    neighbours = exchange_size(method, num_ranks, num_heads, num_kv_heads)
    partition_sizes(seq_len, num_ranks, multiple_of)  # raises
    if neighbours == num_ranks:
        return SequencePartition.contiguous(seq_len, num_ranks, multiple_of)
    work = mask.visibility(batch, seq_len).pairs_of_positions()
    return balanced_partition(work, num_ranks // neighbours, multiple_of).blocks(neighbours, multiple_of)
