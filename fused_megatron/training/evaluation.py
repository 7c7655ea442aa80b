"""Loss on held-out text."""

import math
from dataclasses import dataclass

import torch

from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.data.training_data import TrainingData
from fused_megatron.mesh import Mesh
from fused_megatron.pipeline.run.executor import PipelineExecutor


@dataclass(frozen=True)
class Evaluation:
    """What a validation found."""

    validation_loss: float
    """Nats per token that was predicted."""
    bits_per_byte: float | None
    """Bits per UTF-8 byte of the text, comparable between tokenizers; None where no tokenizer is known, and of a
    masked language model, which predicts few of the tokens."""
    validation_tokens: int
    """Tokens that were predicted."""

    def describe(self) -> str:
        """One line."""
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.3f} bits per byte"
        return f"held-out loss {self.validation_loss:.4f} nats per token{bits} over {self.validation_tokens:,} tokens"


def evaluate(
    executor: PipelineExecutor,
    data: TrainingData,
    mesh: Mesh,
    global_batch_size: int,
    microbatch_size: int,
    device: torch.device,
) -> Evaluation:
    """Mean loss over the held-out samples: the same samples, and so the same numbers, at every layout.

    Args:
        executor: runs this rank's stages, in evaluation mode.
        data: where the held-out samples are.
        mesh: data-parallel ranks share the samples.
        global_batch_size: samples of a batch over all data-parallel ranks; those of a training step, so that the
            pipeline's grid is the same.
        microbatch_size: samples a rank works on at once.
        device: of the stages.

    Communication:
        The pipeline's, and one all-reduce of 24 bytes over the data-parallel group.
    """
    token_bytes = None
    if data.tokenizer is not None and data.masking is None:
        token_bytes = torch.from_numpy(data.tokenizer.token_bytes).to(device)
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for index in range(data.validation.num_batches(global_batch_size)):
        batch = data.validation_batch(index, global_batch_size, mesh.dp_rank, mesh.dp_size)
        inputs, targets, keywords = batch.microbatches(microbatch_size, device)
        # The loss is that of every rank of the pipeline; so are the targets that are counted beside it.
        totals[0] += executor.evaluate(inputs, targets, stage_kwargs=keywords)
        predicted = batch.targets[batch.targets >= 0].to(device)
        totals[1] += predicted.numel()
        if token_bytes is not None:
            totals[2] += token_bytes[predicted].sum()
    sum_over_ranks_(totals, mesh.dp_group)
    loss_sum, num_tokens, num_bytes = totals.tolist()
    bits = loss_sum / math.log(2) / num_bytes if num_bytes else None
    return Evaluation(loss_sum / max(1.0, num_tokens), bits, int(num_tokens))
