"""Settings of the training data.

The text below a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_megatron.checks import check, check_positive


@dataclass(frozen=True)
class DataConfig:
    """Training text and tokenizer."""

    path: str | None = None
    """Text file, .jsonl file (field `text`), folder of both, or indexed dataset. None: Python's standard library."""
    cache_folder: str | None = None
    """Folder of cached tokenizers and token files. None: $XDG_CACHE_HOME/fused_megatron or ~/.cache/fused_megatron."""
    tokenizer_vocab_size: int = 8192
    """Vocabulary entries of the byte-level BPE that is trained on the text."""
    tokenizer_path: str | None = None
    """tokenizer.json to use. None: train one on the text. For an indexed dataset: the tokenizer that made it."""
    validation_fraction: float = 0.05
    """Share of the documents that is held out for validation."""
    mask_fraction: float = 0.15
    """Share of the text tokens that a BERT predicts."""

    def __post_init__(self) -> None:
        check_positive("tokenizer_vocab_size", self.tokenizer_vocab_size)
        check(0 < self.mask_fraction <= 1, f"mask_fraction={self.mask_fraction} must be above 0 and at most 1")
        check(
            0 < self.validation_fraction <= 0.5,
            f"validation_fraction={self.validation_fraction} must be above 0 and at most 0.5",
        )
