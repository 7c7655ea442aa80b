"""Sizes, layouts, batches and initial weights of the GPTs in training benchmarks."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from fused_megatron.config import GPTConfig
from fused_megatron.pipeline import Schedule

Weights = dict[str, torch.Tensor]
Batch = tuple[torch.Tensor, torch.Tensor]
LR, BETAS, EPS, WEIGHT_DECAY = 1e-3, (0.9, 0.95), 1e-8, 0.1


@dataclass(frozen=True)
class Size:
    """The sizes of a GPT with a tied head, and the number of sequences of a step."""

    num_layers: int
    hidden_size: int
    num_heads: int
    vocab_size: int
    seq_len: int
    num_sequences: int

    @property
    def config(self) -> GPTConfig:
        return GPTConfig(
            num_layers=self.num_layers,
            hidden_size=self.hidden_size,
            num_heads=self.num_heads,
            seq_len=self.seq_len,
            vocab_size=self.vocab_size,
        )

    def __str__(self) -> str:
        return (
            f"{self.num_layers} layers, hidden {self.hidden_size}, vocabulary {self.vocab_size}, "
            f"sequences of {self.seq_len}"
        )


SIZES = {
    "small": Size(num_layers=4, hidden_size=256, num_heads=4, vocab_size=8192, seq_len=256, num_sequences=8),
    "medium": Size(num_layers=8, hidden_size=512, num_heads=8, vocab_size=32768, seq_len=512, num_sequences=2),
    "tiny": Size(num_layers=4, hidden_size=32, num_heads=4, vocab_size=128, seq_len=16, num_sequences=2),
}


@dataclass(frozen=True)
class Layout:
    """The parallel layout of a step.

    Attributes:
        microbatches: number for each data-parallel rank and step.
        schedule: name of the pipeline schedule, as in `fused-megatron schedule`.
        stages_per_rank: pipeline stages; None: the fewest that the schedule allows.
        zero_stage: stage of ZeRO; None: the trainer's default.
    """

    tp: int = 1
    pp: int = 1
    dp: int = 1
    sequence_parallel: bool = False
    microbatches: int = 1
    schedule: str = "1f1b"
    stages_per_rank: int | None = None
    zero_stage: int | None = None

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def num_sequences(self, size: Size) -> int:
        """Return the sequences of a step: the size's, but at least one for each microbatch and data-parallel rank."""
        pieces = self.dp * self.microbatches
        return max(size.num_sequences, pieces) // pieces * pieces

    def __str__(self) -> str:
        words = [f"{axis}={n}" for axis, n in (("tp", self.tp), ("pp", self.pp), ("dp", self.dp)) if n > 1]
        text = " x ".join(words) or "one process"
        text += " + sp" if self.sequence_parallel else ""
        text += f" {self.schedule}" if self.pp > 1 else ""
        text += "" if self.zero_stage is None else f" ZeRO-{self.zero_stage}"
        return text + (f" m={self.microbatches}" if self.microbatches > 1 else "")


@dataclass
class TrainingStep:
    """A provider's training step for a size and a layout.

    Attributes:
        run: runs one step on the whole batch, on every rank; returns this rank's part of the loss, or None. The loss is
            the mean over the ranks that return one.
        schedule: pipeline schedule, or None.
        actions: (stage, kind, seconds) of the schedule's actions in the last step; kinds F, B, I and W.
        trains: False for a part of the work of a step, which has no loss to compare.
    """

    run: Callable[[torch.Tensor, torch.Tensor], torch.Tensor | None]
    schedule: Schedule | None = None
    actions: list[tuple[int, str, float]] = field(default_factory=list)
    trains: bool = True


Build = Callable[[Size, Layout, Weights], TrainingStep]


def batch_of(size: Size, layout: Layout) -> Batch:
    """Return tokens and targets [B, S], the same on every rank."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(size.vocab_size, (layout.num_sequences(size), size.seq_len + 1), generator=generator)
    return ids[:, :-1].contiguous(), ids[:, 1:].contiguous()


def own_rows(tensors: Batch, layout: Layout, dp_rank: int) -> list[Batch]:
    """Return the microbatches of a data-parallel rank."""
    tokens, target = (t.chunk(layout.dp)[dp_rank].chunk(layout.microbatches) for t in tensors)
    return list(zip(tokens, target, strict=True))


def full_weights(size: Size) -> Weights:
    """Return the full weights, by the names of our GPT."""
    generator = torch.Generator().manual_seed(2)

    def drawn(*shape: int, around: float = 0.0) -> torch.Tensor:
        return around + 0.02 * torch.randn(shape, generator=generator)

    hidden = size.hidden_size
    weights = {
        "token_embedding.weight": drawn(size.vocab_size, hidden),
        "position_embedding": drawn(size.seq_len, hidden),
    }
    linears = {
        "attention.query_key_value": (3 * hidden, hidden),
        "attention.projection": (hidden, hidden),
        "mlp.expansion": (4 * hidden, hidden),
        "mlp.projection": (hidden, 4 * hidden),
    }
    norms = [f"blocks.{i}.{norm}" for i in range(size.num_layers) for norm in ("attention_norm", "mlp_norm")]
    for name in (*norms, "final_norm"):
        weights |= {f"{name}.weight": drawn(hidden, around=1.0), f"{name}.bias": drawn(hidden)}
    for i in range(size.num_layers):
        for name, shape in linears.items():
            weights |= {f"blocks.{i}.{name}.weight": drawn(*shape), f"blocks.{i}.{name}.bias": drawn(shape[0])}
    return weights


def adamw(parameters: list[Any]) -> torch.optim.Optimizer:
    """Return AdamW that decays only matrices, as ours. DTensors and plain tensors need separate fused updates."""
    groups: dict[tuple[bool, type], list[Any]] = {}
    for p in parameters:
        groups.setdefault((p.dim() >= 2, type(p.data)), []).append(p)
    return torch.optim.AdamW(
        [{"params": some, "weight_decay": WEIGHT_DECAY * decayed} for (decayed, _), some in groups.items()],
        lr=LR,
        betas=BETAS,
        eps=EPS,
        fused=True,
    )
