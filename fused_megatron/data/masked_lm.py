"""Samples of a masked language model: [CLS] text [SEP], of which some tokens are hidden and to be predicted."""

from dataclasses import dataclass

import numpy as np
import torch

from fused_megatron.checks import InputError
from fused_megatron.data.batch import Batch
from fused_megatron.data.token_dataset import PADDING
from fused_megatron.data.tokenizer import Tokenizer

# Of the tokens chosen: hidden behind [MASK], replaced by another token; the rest stays as it is.
_HIDDEN, _REPLACED = 0.8, 0.1
# Streams of random numbers, so that training and held-out samples of one number are not masked alike.
TRAINING_STREAM, VALIDATION_STREAM = 0, 1
# [CLS] and [SEP].
NUM_FRAME_TOKENS = 2
# What a token is called by BERT, and by RoBERTa and its kin.
_NAMES = {"pad": ("[PAD]", "<pad>"), "cls": ("[CLS]", "<s>"), "sep": ("[SEP]", "</s>"), "mask": ("[MASK]", "<mask>")}


@dataclass(frozen=True)
class MaskedLM:
    """Rows of text to samples of seq_len tokens.

    A sample is packed: its text may go on from one document to the next, over the token that ends a document. Of its
    n tokens of text max(1, round(mask_fraction n)) are chosen, whole documents' ends among them, [CLS] and the last
    [SEP] never; of the chosen 80 % become [MASK], 10 % a random ordinary token, 10 % stay. So every whole sample has
    as many targets as any other, and what a step's loss is divided by is known before it.

    What happens to a sample follows from (seed, its number, whether it is held out) alone: it is the same at every
    layout, and a run that resumes goes on as if it had never stopped.

    Args:
        pad, cls, sep, mask: token ids.
        ordinary: int64, the ids that a token may be replaced by.
        seq_len: tokens of a sample, [CLS] and [SEP] among them.
        mask_fraction: of the tokens of text.
        seed: of the choice.

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
        """Tokens of text in a whole sample."""
        return self.seq_len - NUM_FRAME_TOKENS

    def num_targets(self, num_tokens: int) -> int:
        """Tokens to predict of so many tokens of text."""
        return max(1, round(self.mask_fraction * num_tokens)) if num_tokens else 0

    def batch(self, rows: np.ndarray, first_sample: int, stream: int) -> Batch:
        """Samples of rows of text.

        Args:
            rows: int64 [B, at least text_len], -100 behind the last token of a row; more than text_len is left out.
            first_sample: number of the first row; the others follow.
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
        # Raw numbers of a counter-based generator: the same on every machine and with every numpy.
        generator = np.random.Philox(key=[self.seed, stream], counter=[0, sample, 0, 0])
        order, fate, replacement = generator.random_raw(3 * length).reshape(3, length)
        chosen = np.argsort(order, kind="stable")[: self.num_targets(length)]
        targets[1 + chosen] = text[chosen]
        share = (fate[chosen] >> np.uint64(11)) * 2.0**-53
        inputs[1 + chosen[share < _HIDDEN]] = self.mask
        replaced = chosen[(share >= _HIDDEN) & (share < _HIDDEN + _REPLACED)]
        inputs[1 + replaced] = self.ordinary[replacement[replaced] % np.uint64(len(self.ordinary))]


def masked_lm(
    tokenizer: Tokenizer | None, tokenizer_path: str | None, *, seq_len: int, mask_fraction: float, seed: int
) -> MaskedLM:
    """Masking with the special tokens of a tokenizer.

    Raises:
        InputError: no tokenizer, or one that lacks such a token.
    """
    if tokenizer is None:
        raise InputError(
            "model.family='bert' needs to know [MASK] and its kin: give data.tokenizer_path, the tokenizer that made "
            "the dataset"
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
