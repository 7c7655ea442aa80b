"""Settings of the text that a run reads.

The text under a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_megatron.checks import check, check_positive


@dataclass(frozen=True)
class DataConfig:
    """Where the text comes from."""

    path: str | None = None
    """Text, a folder of text, .jsonl (field `text`) or an indexed dataset; the Python standard library's sources when
    not given."""
    cache_folder: str | None = None
    """Where tokenizers and token files are cached; ~/.cache/fused_megatron (or $XDG_CACHE_HOME) when not given."""
    tokenizer_vocab_size: int = 8192
    """Entries of the byte-level BPE that is trained on the text."""
    tokenizer_path: str | None = None
    """A tokenizer.json to use instead of training one; for an indexed dataset the one that made it."""
    validation_fraction: float = 0.05
    """Share of the documents held out."""
    mask_fraction: float = 0.15
    """Share of the tokens that a BERT is to predict."""

    def __post_init__(self) -> None:
        check_positive("tokenizer_vocab_size", self.tokenizer_vocab_size)
        check(0 < self.mask_fraction <= 1, f"mask_fraction={self.mask_fraction} must be above 0 and at most 1")
        check(
            0 < self.validation_fraction <= 0.5,
            f"validation_fraction={self.validation_fraction} must be above 0 and at most 0.5",
        )
