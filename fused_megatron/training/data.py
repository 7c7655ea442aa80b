"""What the loop reads: batches for training, held-out batches, and the tokenizer that made them."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch

from fused_megatron.checks import check
from fused_megatron.config import TrainConfig
from fused_megatron.training.corpus import prepare_corpus
from fused_megatron.training.token_dataset import TokenDataset, ValidationDataset, inputs_and_targets
from fused_megatron.training.tokenizer import Tokenizer

Batch = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class TrainingData:
    """Tokens of a run.

    Attributes:
        description: what the user would call the text.
        fingerprint: hash of the tokens.
        vocab_size: ids that the model must know.
        tokenizer, tokenizer_path: None for a dataset of ids alone.
    """

    description: str
    fingerprint: str
    vocab_size: int
    tokenizer: Tokenizer | None
    tokenizer_path: str | None
    training: TokenDataset
    validation: ValidationDataset

    def training_batch(self, samples_consumed: int, global_batch_size: int, dp_rank: int, dp_size: int) -> Batch:
        """This data-parallel rank's rows of the next global batch: inputs and targets [B, S] int64."""
        count = global_batch_size // dp_size
        return _tensors(self.training.rows(samples_consumed + dp_rank * count, count))

    def validation_batch(self, index: int, batch_size: int, dp_rank: int, dp_size: int) -> Batch:
        """This data-parallel rank's rows of held-out batch `index`; targets are -100 where there is no token."""
        return _tensors(self.validation.batch(index, batch_size, dp_rank, dp_size))


def open_training_data(config: TrainConfig, on_progress: Callable[[str, int, int], None]) -> TrainingData:
    """Prepare the text that config names (quick when it was done before) and open it.

    Raises:
        InputError: missing, damaged or too little data; ids beyond model.vocab_size.
    """
    corpus = prepare_corpus(
        config.data.path,
        config.data.cache_folder,
        config.data.tokenizer_vocab_size,
        config.data.validation_fraction,
        tokenizer_path=config.data.tokenizer_path,
        on_progress=on_progress,
    )
    vocab_size = config.model.vocab_size or corpus.vocab_size
    check(
        vocab_size >= corpus.vocab_size,
        f"model.vocab_size={vocab_size} must be at least {corpus.vocab_size}, the token ids of {corpus.description} "
        f"(leave it out to take that)",
    )
    training = config.training
    return TrainingData(
        description=corpus.description,
        fingerprint=corpus.fingerprint,
        vocab_size=vocab_size,
        tokenizer=corpus.tokenizer(),
        tokenizer_path=corpus.tokenizer_path,
        training=corpus.train_dataset(config.model.seq_len, training.seed),
        validation=corpus.validation_dataset(
            config.model.seq_len, max_samples=training.eval_batches * training.global_batch_size
        ),
    )


def _tensors(rows: np.ndarray) -> Batch:
    inputs, targets = inputs_and_targets(rows)
    return torch.from_numpy(inputs), torch.from_numpy(targets)
