"""Token sampling from a GPT; every tensor-parallel rank draws the same tokens."""

from typing import Protocol

import torch
import torch.nn.functional as F

from fused_megatron.checks import check
from fused_megatron.collectives import Group, all_gather_split, group_size
from fused_megatron.collectives.together import gather_json
from fused_megatron.config import TransformerConfig
from fused_megatron.sharding import expert_ranks


class LanguageModel(Protocol):
    """The interface that generate needs: a GPT, or all pipeline stages of one."""

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
        """Return logits_shard [B, S, V_padded / R] for tokens [B, S]."""


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
    """Continue token sequences by sampling.

    There is no key-value cache: every new token costs a forward over the last seq_len tokens (or fewer).

    Ranks that share experts may have other tokens, and another number of them to add. All of them must call; a rank
    that has finished goes on until the last one has, since its experts compute for the others.

    Args:
        model: the model; it reads at most the last config.seq_len tokens.
        tokens: [B, S] int64, S at least 1.
        num_tokens: number of tokens to add to each sequence.
        temperature: divisor of the logits; 0 takes the most likely token.
        top_k: sample from the k most likely tokens only; 0 for all tokens.
        seed: seed of the sampling.

    Returns:
        [B, S + num_tokens] int64, equal on all ranks with the same tokens.

    Raises:
        InputError: tokens is not [B, S] with S above 0, or temperature is negative.

    Communication:
        Per new token, the model's forward and one all-gather of the last position's logits, 4 B V / R bytes per rank.
        With experts on several ranks, one exchange of a number before.
    """
    check(
        tokens.dim() == 2 and tokens.shape[1] > 0, f"tokens.shape={tuple(tokens.shape)} must be [B, S] with S above 0"
    )
    check(temperature >= 0, f"temperature={temperature} must be 0 or more")
    was_training = model.training
    model.eval()
    generator = torch.Generator().manual_seed(seed)
    for i in range(_most_tokens(model, num_tokens)):
        logits = _last_logits(model, tokens[:, -model.config.seq_len :])
        if i >= num_tokens:
            continue
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


def _most_tokens(model: LanguageModel, num_tokens: int) -> int:
    """Return the largest num_tokens of the ranks that share experts with this rank."""
    ranks = expert_ranks(model) if isinstance(model, torch.nn.Module) else None
    for group in (ranks.ep_group, ranks.etp_group) if ranks is not None else ():
        num_tokens = max(gather_json(num_tokens, group))
    return num_tokens


def _last_logits(model: LanguageModel, context: torch.Tensor) -> torch.Tensor:
    """Return float32 logits [B, V] of the last position, on the CPU, where sampling happens."""
    last = context.shape[1] - 1
    if model.sequence_parallel:
        # The padding after the last position does not affect it: attention is causal.
        context = F.pad(context, (0, -context.shape[1] % group_size(model.tp_group)))
    logits_shard = model(context)[:, last].float()
    return all_gather_split(logits_shard, -1, model.tp_group)[:, : model.vocab_size].cpu()
