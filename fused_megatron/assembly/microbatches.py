"""Microbatches of a rank: its samples, and with context parallelism its positions of each sequence."""

from typing import Any

import torch

from fused_megatron.assembly.model_stages import ModelStages
from fused_megatron.config import TrainConfig
from fused_megatron.context_parallel import partition_for
from fused_megatron.data.batch import Batch
from fused_megatron.data.documents import cumulative_lengths
from fused_megatron.mesh import Mesh
from fused_megatron.ops.attention import AttentionMask
from fused_megatron.sharding import SequencePartition


class Microbatches:
    """Cuts the samples of a data-parallel rank into microbatches, and each of them into the positions of this rank.

    With context parallelism the attention mask of a microbatch decides which positions each rank holds. All ranks have
    the whole microbatch in host memory, and so find the same partition without communication.

    Args:
        config: uses training.microbatch_size, model.seq_len and parallel.
        mesh: of all ranks.
        model: this rank's stages; they know the attention mask.
    """

    def __init__(self, config: TrainConfig, mesh: Mesh, model: ModelStages) -> None:
        self._config, self._mesh, self._model = config, mesh, model
        self._unmasked: SequencePartition | None = None

    def of(
        self, batch: Batch, device: torch.device
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[dict[str, Any]]]:
        """Return (inputs, targets, keyword arguments of the model) of each microbatch, on the device.

        Args:
            batch: the samples of this data-parallel rank, in host memory.
            device: of the stages.
        """
        size = self._config.training.microbatch_size
        if self._mesh.cp_size == 1:
            return batch.microbatches(size, device)
        inputs, targets, keywords = [], [], []
        for microbatch in batch.split(size):
            partition = self._partition(microbatch)
            own = microbatch.take(partition.layouts[self._mesh.cp_rank])
            (own_inputs,), (own_targets,), (keyword,) = own.microbatches(size, device)
            inputs.append(own_inputs)
            targets.append(own_targets)
            keywords.append({**keyword, "partition": partition})
        return inputs, targets, keywords

    def _partition(self, microbatch: Batch) -> SequencePartition:
        """Return the positions of each context-parallel rank for a whole microbatch."""
        num_samples, seq_len = microbatch.inputs.shape
        if microbatch.document_starts is not None:
            mask = self._model.attention_mask(documents=cumulative_lengths(microbatch.document_starts))
            return partition_of(self._config, mask, num_samples, seq_len)
        # The same for all microbatches: a partition does not depend on padding.
        if self._unmasked is None or self._unmasked.seq_len != seq_len:
            self._unmasked = partition_of(self._config, self._model.attention_mask(), num_samples, seq_len)
        return self._unmasked


def partition_of(
    config: TrainConfig, mask: AttentionMask, num_samples: int = 1, seq_len: int | None = None
) -> SequencePartition:
    """Return the positions of each context-parallel rank in a microbatch.

    Args:
        config: uses parallel and model.
        mask: the attention mask of the microbatch. The numbers of positions of the ranks do not depend on it.
        num_samples: samples of the microbatch.
        seq_len: S; None: model.seq_len.
    """
    parallel, model = config.parallel, config.model
    return partition_for(
        parallel.context_parallel_method,
        mask,
        num_samples,
        model.seq_len if seq_len is None else seq_len,
        parallel.context_parallel_size,
        num_heads=model.num_heads // parallel.tensor_parallel_size,
        num_kv_heads=max(1, model.kv_heads // parallel.tensor_parallel_size),
        multiple_of=parallel.row_multiple,
    )
