"""Sampling text from a GPT, the same on every tensor-parallel rank."""

from typing import Protocol

import torch
import torch.nn.functional as F

from fused_megatron.checks import check
from fused_megatron.collectives import Group, all_gather_split, group_size
from fused_megatron.config import TransformerConfig


class LanguageModel(Protocol):
    """A GPT, whole or in the stages of a pipeline: what generate needs of it."""

    config: TransformerConfig
    vocab_size: int
    tp_group: Group
    sequence_parallel: bool
    training: bool

    def eval(self) -> object:
        """Switch dropout off."""

    def train(self, mode: bool = True) -> object:
        """Switch dropout on."""

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """logits_shard [B, S, V_padded / R] of tokens [B, S]."""


@torch.no_grad()
def generate(
    model: LanguageModel,
    tokens: torch.Tensor,
    num_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
) -> torch.Tensor:
    """Continue token sequences.

    Every new token costs a whole forward over at most seq_len tokens: there is no key-value cache.

    Args:
        model: it sees at most its config.seq_len last tokens.
        tokens: [B, S] int64, S at least 1.
        num_tokens: how many to add.
        temperature: logits are divided by it; 0 takes the likeliest token.
        top_k: only the likeliest k tokens are drawn from; 0 for all.
        seed: of the draws.

    Returns:
        [B, S + num_tokens] int64, equal on all ranks.

    Communication:
        Per token the model's forward and one all-gather of the last position's logits, 4 B V / R bytes a rank.
    """
    check(
        tokens.dim() == 2 and tokens.shape[1] > 0, f"tokens.shape={tuple(tokens.shape)} must be [B, S] with S above 0"
    )
    check(temperature >= 0, f"temperature={temperature} must be 0 or more")
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    for _ in range(num_tokens):
        logits = _last_logits(model, tokens[:, -model.config.seq_len :])
        if temperature == 0:
            drawn = logits.argmax(dim=-1, keepdim=True)
        else:
            logits = logits / temperature
            if 0 < top_k < logits.shape[-1]:
                kth = logits.topk(top_k, dim=-1).values[:, -1:]
                logits = logits.masked_fill(logits < kth, float("-inf"))
            drawn = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)
        tokens = torch.cat([tokens, drawn.to(tokens.device)], dim=1)
    model.train(was_training)
    return tokens


def _last_logits(model: LanguageModel, context: torch.Tensor) -> torch.Tensor:
    """[B, V] float32 logits of the last position, on the CPU, where the draws are made."""
    last = context.shape[1] - 1
    if model.sequence_parallel:
        # Causal attention: what stands behind the last position does not reach it.
        context = F.pad(context, (0, -context.shape[1] % group_size(model.tp_group)))
    logits_shard = model(context)[:, last].float()
    return all_gather_split(logits_shard, -1, model.tp_group)[:, : model.vocab_size].cpu()
