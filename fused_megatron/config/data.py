"""Settings of the training data.

The text below a field is its help on the command line.
"""

from __future__ import annotations

from dataclasses import dataclass

from fused_megatron.checks import check, check_positive


@dataclass(frozen=True)
class DataConfig:
    """Training text and tokenizer."""

    path: str | tuple[str, ...] | None = None
    """Text or .jsonl file (also .gz), .parquet, .csv or .json (pip install datasets), folder of them, or indexed
    dataset (.bin and .idx); or a list of several. None: Python's standard library."""
    weights: tuple[float, ...] | None = None
    """Share of the samples of each path of a list. None: as many as it has tokens."""
    text_field: str = "text"
    """Field of a line of .jsonl, or column of a table, that holds the text."""
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
    mask_documents: bool = False
    """A token attends only to tokens of its document, and does not predict the first token of the next document."""
    reset_positions: bool | None = None
    """Count positions from the first token of each document, not of the sample. None: as mask_documents."""

    def __post_init__(self) -> None:
        check_positive("tokenizer_vocab_size", self.tokenizer_vocab_size)
        paths = len(self.paths)
        check(self.path != () and "" not in self.paths, f"path={self.path!r} must name a file or folder")
        check(
            self.weights is None or len(self.weights) == paths > 1,
            f"weights={list(self.weights or ())} must have one number for each path of a list of several (paths: "
            f"{paths})",
        )
        check(
            all(0 < weight < float("inf") for weight in self.weights or ()),
            f"weights={list(self.weights or ())} must all be above 0: leave out the path that is not wanted",
        )
        check(0 < self.mask_fraction <= 1, f"mask_fraction={self.mask_fraction} must be above 0 and at most 1")
        check(
            0 < self.validation_fraction <= 0.5,
            f"validation_fraction={self.validation_fraction} must be above 0 and at most 0.5",
        )
        check(
            self.mask_documents or not self.reset_positions,
            "reset_positions=True needs mask_documents=True: tokens of two documents with the same positions must not "
            "see each other",
        )

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths, also of a single one; none for the standard library."""
        return () if self.path is None else (self.path,) if isinstance(self.path, str) else tuple(self.path)

    @property
    def resets_positions(self) -> bool:
        """True if positions are counted from the first token of each document."""
        return self.mask_documents if self.reset_positions is None else self.reset_positions
