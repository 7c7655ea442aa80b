"""A data-parallel rank's rows of a step's global batch, with the counts that depend on them."""

from typing import NamedTuple

import torch

from fused_megatron.config import TrainConfig
from fused_megatron.data.batch import Batch
from fused_megatron.data.documents import num_visible_pairs
from fused_megatron.data.training_data import TrainingData
from fused_megatron.mesh import Mesh, coordinates


class StepRows(NamedTuple):
    """Rows of a global batch.

    Attributes:
        batch: the rows of this rank; in pinned memory if the run is on a GPU.
        num_targets: targets of the global batch, over all data-parallel ranks.
        visible_pairs: pairs that attention leaves visible in the rows, with data.mask_documents, on the first of the
            ranks that read the same rows; otherwise 0.
    """

    batch: Batch
    num_targets: int
    visible_pairs: int


def read_step_rows(data: TrainingData, config: TrainConfig, mesh: Mesh, device: torch.device, first: int) -> StepRows:
    """Read this rank's rows of the global batch that begins with sample `first`.

    Raises:
        InputError: as TokenDataset.rows.
    """
    size = config.training.global_batch_size
    batch = data.training_batch(first, size, mesh.dp_rank, mesh.dp_size)
    # Only one of the ranks that read the same rows counts them.
    first_of_rows = not any(i for axis, i in coordinates(mesh.rank, mesh.sizes).items() if axis != "dp")
    pairs = 0
    if batch.document_starts is not None and first_of_rows:
        pairs = num_visible_pairs(batch.document_starts, config.model.sliding_window)
    batch = batch.pinned() if device.type == "cuda" else batch
    return StepRows(batch, data.num_targets(first, size), pairs)
