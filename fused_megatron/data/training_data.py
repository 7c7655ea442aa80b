"""Training and validation batches of a run, and the tokenizer of its data."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from fused_megatron.checks import check
from fused_megatron.config import TrainConfig
from fused_megatron.data.batch import Batch
from fused_megatron.data.blend import BlendedDataset, BlendedValidation
from fused_megatron.data.corpus import PreparedCorpus
from fused_megatron.data.corpus_blend import BlendedCorpus, prepare_data
from fused_megatron.data.documents import positions_in_documents
from fused_megatron.data.masked_lm import NUM_FRAME_TOKENS, TRAINING_STREAM, VALIDATION_STREAM, MaskedLM, masked_lm
from fused_megatron.data.token_dataset import TokenDataset, ValidationDataset, inputs_and_targets
from fused_megatron.data.token_digest import TokenCheck
from fused_megatron.data.tokenizer import END_OF_DOCUMENT, MASKED_LM_TOKENS, Tokenizer

Samples = TokenDataset | ValidationDataset | BlendedDataset | BlendedValidation


@dataclass(frozen=True, kw_only=True)
class HeldOutData:
    """Text on which a model is evaluated.

    Attributes:
        description: name of the text, for messages.
        fingerprint: hash of the tokens.
        vocab_size: number of token ids that the model needs.
        tokenizer: the tokenizer of the data; None for an indexed dataset without one.
        tokenizer_path: its JSON file, or None.
        validation: the held-out samples.
        masking: makes the samples of a masked language model; None: each target is the next token.
        content: hashes of the data, to find ranks that read other data, and the paths of the files.
        mask_documents: True if batches say where documents start, and no target is the first token of a document.
        reset_positions: True if positions are counted from the first token of each document.
    """

    description: str
    fingerprint: str
    vocab_size: int
    tokenizer: Tokenizer | None
    tokenizer_path: str | None
    validation: ValidationDataset | BlendedValidation
    masking: MaskedLM | None = None
    content: Mapping[str, str] = field(default_factory=dict)
    mask_documents: bool = False
    reset_positions: bool = False

    def validation_batch(self, index: int, batch_size: int, dp_rank: int, dp_size: int) -> Batch:
        """Return this data-parallel rank's rows of held-out batch `index`; a target is -100 where there is no token."""
        rows = self.validation.batch(index, batch_size, dp_rank, dp_size)
        first = index * batch_size + dp_rank * len(rows)
        return self._batch(rows, self.validation, first, VALIDATION_STREAM)

    def _batch(self, rows: np.ndarray, source: Samples, first_sample: int, stream: int) -> Batch:
        if self.masking is not None:
            return self.masking.batch(rows, first_sample, stream)
        starts = source.document_starts(first_sample, len(rows)) if self.mask_documents else None
        inputs, targets = (torch.from_numpy(part) for part in inputs_and_targets(rows, starts))
        if starts is None:
            return Batch(inputs, targets)
        document_starts = torch.from_numpy(np.ascontiguousarray(starts[:, :-1]))
        positions = positions_in_documents(document_starts) if self.reset_positions else None
        return Batch(inputs, targets, document_starts=document_starts, positions=positions)


@dataclass(frozen=True, kw_only=True)
class TrainingData(HeldOutData):
    """The data of a run.

    Attributes:
        training: the training samples.
        token_check: checks large files during the run; None if there are none.
    """

    training: TokenDataset | BlendedDataset
    token_check: TokenCheck | None = None

    @property
    def targets_per_sample(self) -> int:
        """Number of targets of a training sample; the same for all unless mask_documents leaves some out."""
        return self.training.seq_len if self.masking is None else self.masking.num_targets(self.training.seq_len)

    def num_targets(self, samples_consumed: int, global_batch_size: int) -> int:
        """Return the number of targets of the next global batch, over all data-parallel ranks.

        Every rank computes it from the index of the samples, without a token and without communication.
        """
        targets = global_batch_size * self.targets_per_sample
        if self.mask_documents:
            targets -= self.training.num_document_starts(samples_consumed, global_batch_size)
        return targets

    def training_batch(self, samples_consumed: int, global_batch_size: int, dp_rank: int, dp_size: int) -> Batch:
        """Return this data-parallel rank's rows of the next global batch."""
        count = global_batch_size // dp_size
        first = samples_consumed + dp_rank * count
        return self._batch(self.training.rows(first, count), self.training, first, TRAINING_STREAM)


def open_training_data(
    config: TrainConfig, on_progress: Callable[[str, int, int], None], share: int = 0, of: int = 1
) -> TrainingData:
    """Prepare the text that config names, and open it. Prepared data is cached.

    Args:
        config: config of the run.
        on_progress: as in prepare_corpus.
        share: share of the large files that this rank checks, as in TokenCheck.
        of: number of shares.

    Raises:
        InputError: the data is missing, damaged or too small; a token id is beyond model.vocab_size; a masked language
            model has no [MASK] token; no document has two tokens, which mask_documents needs.
    """
    corpus, seq_len, common = _open(config, on_progress)
    training = config.training
    train_dataset = corpus.train_dataset(seq_len, training.seed)
    check(
        not config.data.mask_documents or train_dataset.longest_document >= 2,
        f"{corpus.description}: mask_documents=True leaves no target: each document is one token long",
    )
    return TrainingData(
        training=train_dataset,
        validation=corpus.validation_dataset(seq_len, max_samples=training.eval_batches * training.global_batch_size),
        token_check=TokenCheck(large, share, of) if (large := corpus.large_files()) else None,
        **common,
    )


def open_held_out_data(
    config: TrainConfig, on_progress: Callable[[str, int, int], None], *, everything: bool, max_samples: int | None
) -> HeldOutData:
    """Prepare the text that config names, to evaluate a model on it. Prepared data is cached.

    Args:
        config: config of the run.
        on_progress: as in prepare_corpus.
        everything: take the whole text; False: the part that a run holds out.
        max_samples: most samples to read, evenly spread; None: all.

    Raises:
        InputError: as open_training_data.
    """
    corpus, seq_len, common = _open(config, on_progress)
    dataset = corpus.whole_dataset if everything else corpus.validation_dataset
    return HeldOutData(validation=dataset(seq_len, max_samples), **common)


def _open(
    config: TrainConfig, on_progress: Callable[[str, int, int], None]
) -> tuple[PreparedCorpus | BlendedCorpus, int, dict[str, Any]]:
    """Return the prepared text, the tokens of a sample, and what training and evaluation have in common."""
    masked = config.model.traits.predicts == "masked_tokens"
    special_tokens = MASKED_LM_TOKENS if masked else (END_OF_DOCUMENT,)
    corpus = prepare_data(config.data, special_tokens, on_progress)
    vocab_size = config.model.vocab_size or corpus.vocab_size
    check(
        vocab_size >= corpus.vocab_size,
        f"model.vocab_size={vocab_size} must be at least {corpus.vocab_size}, the token ids of {corpus.description} "
        f"(leave it out to take that; where no such id was meant, the data is damaged)",
    )
    seq_len = config.model.seq_len
    tokenizer = corpus.tokenizer()
    masking = None
    if masked:
        named = config.data.tokenizer_path or corpus.tokenizer_path
        fraction, seed = config.data.mask_fraction, config.training.seed
        masking = masked_lm(tokenizer, named, seq_len=seq_len, mask_fraction=fraction, seed=seed)
        seq_len -= NUM_FRAME_TOKENS
    common = {
        "description": corpus.description,
        "fingerprint": corpus.fingerprint,
        "vocab_size": vocab_size,
        "tokenizer": tokenizer,
        "tokenizer_path": corpus.tokenizer_path,
        "masking": masking,
        "content": {
            **corpus.content(),
            "vocabulary": str(vocab_size),
            "vocabulary_source": "the config" if config.model.vocab_size else corpus.vocabulary,
            "tokens_path": corpus.tokens_path,
            "tokenizer_path": corpus.tokenizer_path or "none",
        },
        "mask_documents": config.data.mask_documents,
        "reset_positions": config.data.resets_positions,
    }
    return corpus, seq_len, common
