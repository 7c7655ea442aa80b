"""Loss on held-out text."""

import math
from dataclasses import dataclass

import torch

from fused_megatron.assembly.assemble import Assembly
from fused_megatron.collectives.together import sum_over_ranks_
from fused_megatron.data.training_data import HeldOutData


@dataclass(frozen=True)
class Evaluation:
    """Result of a validation."""

    validation_loss: float
    """Mean loss in nats per predicted token."""
    bits_per_byte: float | None
    """Bits per UTF-8 byte of the text, comparable between tokenizers. None if no tokenizer is known, or for a masked
    language model, which predicts only some tokens."""
    validation_tokens: int
    """Number of predicted tokens."""

    @property
    def perplexity(self) -> float:
        """exp of the mean loss; infinite where it is beyond any float."""
        return math.exp(self.validation_loss) if self.validation_loss < 700 else math.inf

    def describe(self) -> str:
        """Return the result as one line of text."""
        bits = "" if self.bits_per_byte is None else f", {self.bits_per_byte:.3f} bits per byte"
        return f"held-out loss {self.validation_loss:.4f} nats per token{bits} over {self.validation_tokens:,} tokens"


def evaluate(assembly: Assembly, data: HeldOutData) -> Evaluation:
    """Compute the mean loss over the held-out samples, the same in every layout.

    A batch has the samples of a training step, so that the schedule fits.

    Args:
        assembly: of this rank; its stages must be in evaluation mode.
        data: source of the held-out samples.

    Communication:
        As PipelineExecutor.evaluate, and one all-reduce of 24 bytes over the data- and context-parallel ranks.
    """
    mesh, device = assembly.mesh, assembly.device
    global_batch_size = assembly.config.training.global_batch_size
    token_bytes = None
    if data.tokenizer is not None and data.masking is None:
        token_bytes = torch.from_numpy(data.tokenizer.token_bytes).to(device)
    totals = torch.zeros(3, dtype=torch.float64, device=device)
    for index in range(data.validation.num_batches(global_batch_size)):
        batch = data.validation_batch(index, global_batch_size, mesh.dp_rank, mesh.dp_size)
        inputs, targets, keywords = assembly.microbatches.of(batch, device)
        # Every rank of a pipeline has the same loss and counts the same targets.
        totals[0] += assembly.executor.evaluate(inputs, targets, stage_kwargs=keywords)
        for target in targets:
            predicted = target[target >= 0]
            totals[1] += predicted.numel()
            if token_bytes is not None:
                totals[2] += token_bytes[predicted].sum()
    sum_over_ranks_(totals, mesh.replicas.group)
    loss_sum, num_tokens, num_bytes = totals.tolist()
    bits = loss_sum / math.log(2) / num_bytes if num_bytes else None
    return Evaluation(loss_sum / max(1.0, num_tokens), bits, int(num_tokens))
