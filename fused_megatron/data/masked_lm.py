"""Samples of a masked language model: [CLS] text [SEP], with some tokens masked and to be predicted."""

from dataclasses import dataclass

import numpy as np
import torch

from fused_megatron.checks import InputError
from fused_megatron.data.batch import Batch
from fused_megatron.data.token_dataset import PADDING
from fused_megatron.data.tokenizer import Tokenizer

# Shares of the chosen tokens that become [MASK], and that become a random token; the rest stay.
_MASKED, _REPLACED = 0.8, 0.1
# Streams of random numbers: a training sample and a held-out sample of the same number get different masks.
TRAINING_STREAM, VALIDATION_STREAM = 0, 1
# [CLS] and [SEP].
NUM_FRAME_TOKENS = 2
# Names of the special tokens in BERT, and in RoBERTa and similar models.
_NAMES = {"pad": ("[PAD]", "<pad>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")}


@dataclass(frozen=True)
class MaskedLM:
    """Turns rows of text into masked samples of seq_len tokens.

    Samples are packed: the text of a sample may continue from one document to the next, across the token that ends a
    document. Of n text tokens, max(1, round(mask_fraction n)) are chosen at random; ends of documents may be chosen,
    [CLS] and the last [SEP] may not. 80 % of the chosen tokens become [MASK], 10 % a random ordinary token, and 10 %
    stay. All full samples have the same number of targets, so the divisor of a step's loss is known in advance.

    The masks depend only on seed, sample number, and whether the sample is held out. They are the same for every
    layout, and in a resumed run.

    Args:
        pad: id of [PAD].
        cls: id of [CLS].
        sep: id of [SEP].
        mask: id of [MASK].
        ordinary: int64, the ids that may replace a token.
        seq_len: tokens of a sample, including [CLS] and [SEP].
        mask_fraction: share of the text tokens to predict.
        seed: seed of the masks.

    Paper: Devlin et al. 2018 (arXiv:1810.04805), section 3.1; packed samples: Liu et al. 2019 (arXiv:1907.11692), 4.2.
    """

    pad: int
    cls: int
    sep: int
    mask: int
    ordinary: np.ndarray
    seq_len: int
    mask_fraction: float
    seed: int

    @property
    def text_len(self) -> int:
        """Text tokens in a full sample."""
        return self.seq_len - NUM_FRAME_TOKENS

    def num_targets(self, num_tokens: int) -> int:
        """Return the number of targets among num_tokens text tokens."""
        return max(1, round(self.mask_fraction * num_tokens)) if num_tokens else 0

    def batch(self, rows: np.ndarray, first_sample: int, stream: int) -> Batch:
        """Make masked samples from rows of text.

        Args:
            rows: int64 [B, at least text_len], -100 after the last token of a row. Tokens beyond text_len are dropped.
            first_sample: sample number of the first row; the next rows have the next numbers.
            stream: TRAINING_STREAM or VALIDATION_STREAM.
        """
        inputs = np.full((len(rows), self.seq_len), self.pad, dtype=np.int64)
        targets = np.full_like(inputs, PADDING)
        lengths = (rows[:, : self.text_len] != PADDING).sum(axis=1)
        for row, length in enumerate(lengths):
            self._fill(inputs[row], targets[row], rows[row, :length], first_sample + row, stream)
        key_padding_mask = np.arange(self.seq_len) >= lengths[:, None] + NUM_FRAME_TOKENS
        padded = torch.from_numpy(key_padding_mask) if key_padding_mask.any() else None
        return Batch(torch.from_numpy(inputs), torch.from_numpy(targets), padded)

    def _fill(self, inputs: np.ndarray, targets: np.ndarray, text: np.ndarray, sample: int, stream: int) -> None:
        length = len(text)
        inputs[0], inputs[length + 1] = self.cls, self.sep
        inputs[1 : length + 1] = text
        # Raw numbers of a counter-based generator are the same on every machine and in every numpy version.
        generator = np.random.Philox(key=[self.seed, stream], counter=[0, sample, 0, 0])
        order, fate, replacement = generator.random_raw(3 * length).reshape(3, length)
        chosen = np.argsort(order, kind="stable")[: self.num_targets(length)]
        targets[1 + chosen] = text[chosen]
        share = (fate[chosen] >> np.uint64(11)) * 2.0**-53
        inputs[1 + chosen[share < _MASKED]] = self.mask
        replaced = chosen[(share >= _MASKED) & (share < _MASKED + _REPLACED)]
        inputs[1 + replaced] = self.ordinary[replacement[replaced] % np.uint64(len(self.ordinary))]


def masked_lm(
    tokenizer: Tokenizer | None, tokenizer_path: str | None, *, seq_len: int, mask_fraction: float, seed: int
) -> MaskedLM:
    """Make a MaskedLM with the special tokens of a tokenizer.

    Raises:
        InputError: there is no tokenizer, or it lacks a special token.
    """
    if tokenizer is None:
        raise InputError(
            "model.family='bert' needs to know the ids of [MASK] and the other special tokens: give "
            "data.tokenizer_path, the tokenizer that made the dataset"
        )
    ids = {}
    for what, names in _NAMES.items():
        found = [tokenizer.special_ids[name] for name in names if name in tokenizer.special_ids]
        if not found:
            raise InputError(
                f"{tokenizer_path}: the tokenizer has no token {' or '.join(names)}, which model.family='bert' needs "
                f"(leave data.tokenizer_path out to train one that has)"
            )
        ids[what] = found[0]
    ordinary = np.setdiff1d(np.arange(tokenizer.vocab_size), list(tokenizer.special_ids.values()))
    return MaskedLM(**ids, ordinary=ordinary, seq_len=seq_len, mask_fraction=mask_fraction, seed=seed)
