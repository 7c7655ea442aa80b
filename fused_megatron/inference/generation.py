"""Token sampling from a GPT; every tensor-parallel and pipeline rank draws the same tokens."""

from collections.abc import Callable, Collection, Sequence
from typing import Protocol

import torch

from fused_megatron.checks import check
from fused_megatron.collectives import Group, all_gather_split, group_size
from fused_megatron.collectives.together import gather_json
from fused_megatron.config import TransformerConfig
from fused_megatron.inference.sampling import Sampling, draw
from fused_megatron.models.key_value_cache import KeyValueCache
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

    def __call__(self, tokens: torch.Tensor, *, cache: KeyValueCache | None = None) -> torch.Tensor:
        """Return logits_shard [B, S, V_padded / R] for tokens [B, S]; with a cache [B, 1, V_padded / R]."""


def generate(
    model: LanguageModel,
    tokens: torch.Tensor,
    num_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    top_p: float = 1.0,
    seed: int = 0,
    end_tokens: Collection[int] = (),
    use_cache: bool = True,
) -> torch.Tensor:
    """Continue token sequences of one length by sampling. For sequences of several lengths see continue_prompts.

    Args:
        model: the model; it reads at most the last config.seq_len tokens.
        tokens: [B, S] int64, S at least 1.
        num_tokens: number of tokens to add to each sequence.
        temperature, top_k, top_p, seed: as in Sampling.
        end_tokens: ids that end a sequence.
        use_cache: as in continue_prompts.

    Returns:
        [B, S + num_tokens] int64, equal on all ranks with the same tokens. With end_tokens it has fewer columns if all
        sequences have ended, and a sequence that has ended is filled with its end token.

    Raises:
        InputError: tokens is not [B, S] with S above 0, or an argument is out of range.

    Communication, Memory: as continue_prompts.
    """
    check(
        tokens.dim() == 2 and tokens.shape[1] > 0, f"tokens.shape={tuple(tokens.shape)} must be [B, S] with S above 0"
    )
    added = continue_prompts(
        model,
        tokens.tolist(),
        num_tokens,
        Sampling(temperature, top_k, top_p, seed),
        end_tokens=end_tokens,
        device=tokens.device,
        use_cache=use_cache,
    )
    longest = max(map(len, added), default=0)
    filled = [row + row[-1:] * (longest - len(row)) for row in added]
    return torch.cat([tokens, torch.tensor(filled, dtype=tokens.dtype, device=tokens.device).view(-1, longest)], dim=1)


@torch.no_grad()
def continue_prompts(
    model: LanguageModel,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    sampling: Sampling | None = None,
    *,
    end_tokens: Collection[int] = (),
    device: torch.device | None = None,
    on_tokens: Callable[[list[int | None]], None] | None = None,
    use_cache: bool = True,
) -> list[list[int]]:
    """Continue prompts of any lengths, all at once; return the new tokens of each.

    A new token costs a forward over one position, since the keys and values of the tokens before it are kept. A token
    beyond reads_at_once() tokens costs a forward over the last config.seq_len tokens.

    Ranks that share experts may have other prompts, and another number of tokens to add. All of them must call; a rank
    that has finished goes on until the last one has, since its experts compute for the others.

    Args:
        model: the model. It is in evaluation mode meanwhile.
        prompts: token ids; each has at least one.
        num_tokens: most tokens to add to each prompt.
        sampling: how tokens are drawn; None: the defaults of Sampling.
        end_tokens: ids that end a sequence; the end token is the last one of its result.
        device: of the model; None: the CPU.
        on_tokens: called after each step with the new token of each sequence; None for a sequence that has ended.
        use_cache: False: no key-value cache. Every token costs a forward over all tokens before it.

    Returns:
        For each prompt its new tokens, equal on all ranks with the same prompts.

    Raises:
        InputError: no prompt, a prompt without tokens, or several lengths where padding would change a text: with
            config.capacity_factor, and with dynamic rotary scaling beyond the original length.

    Communication:
        Per new token the model's forward and one all-gather of the logits of each row's last position, 4 B V / R bytes
        per rank. With experts on several ranks, also an exchange of one bit.
    Memory: KeyValueCache; in the first forward the activations of the prompts.
    """
    check(len(prompts) > 0 and all(map(len, prompts)), "prompts must not be empty, and each must have a token")
    _check_lengths(model.config, sorted(set(map(len, prompts))), num_tokens)
    sampling = sampling or Sampling()
    rows = [list(prompt) for prompt in prompts]
    added: list[list[int]] = [[] for _ in prompts]
    generators = sampling.generators(len(rows))
    was_training = model.training
    model.eval()
    reader = _Reader(model, device or torch.device("cpu"), _capacity(model, rows, num_tokens) if use_cache else 0)
    ended = [False] * len(rows)
    ranks = expert_ranks(model) if isinstance(model, torch.nn.Module) else None
    groups = [group for group in (ranks.ep_group, ranks.etp_group) if group is not None] if ranks is not None else []
    try:
        while True:
            done = num_tokens <= max(map(len, added)) or all(ended)
            if _all_are_done(done, groups):
                break
            logits = reader.next_logits(rows)
            if done:
                continue
            drawn = draw(logits, sampling, generators)
            for row, new, token in zip(rows, added, drawn, strict=True):
                row.append(token)
                new.append(token)
            if on_tokens is not None:
                on_tokens([None if end else token for token, end in zip(drawn, ended, strict=True)])
            ended = [end or token in end_tokens for end, token in zip(ended, drawn, strict=True)]
    finally:
        model.train(was_training)
    return [_until_end(new, end_tokens) for new in added]


def reads_at_once(config: TransformerConfig) -> int:
    """Return the number of tokens up to which a new token costs a forward over one position: 0, no cache, for some.

    Beyond seq_len a model reads a window, and a cached key would depend on tokens that have left it. Dynamic rotary
    scaling beyond the original length turns all keys anew with each token. With a capacity, the number of tokens of a
    forward decides which tokens an expert drops.
    """
    if _drops_tokens(config):
        return 0
    if config.rotary_scaling == "dynamic" and config.position == "rotary":
        return min(config.seq_len, config.rotary_original_seq_len or config.seq_len)
    return config.seq_len


def _check_lengths(config: TransformerConfig, lengths: Sequence[int], num_tokens: int) -> None:
    """Raise if prompts of these lengths cannot be padded to one length without a change of their texts."""
    reason = None
    if _drops_tokens(config):
        reason = f"capacity_factor={config.capacity_factor} counts padding when it drops tokens"
    elif lengths[-1] + num_tokens > reads_at_once(config) and config.rotary_scaling == "dynamic":
        reason = f"rotary_scaling='dynamic' counts padding beyond {reads_at_once(config)} tokens"
    check(
        len(lengths) == 1 or reason is None,
        f"prompts of {', '.join(map(str, lengths))} tokens must have one length, since {reason}: continue each alone",
    )


def _drops_tokens(config: TransformerConfig) -> bool:
    return config.capacity_factor is not None and config.num_experts is not None


def _capacity(model: LanguageModel, rows: Sequence[Sequence[int]], num_tokens: int) -> int:
    return min(reads_at_once(model.config), max(map(len, rows)) + num_tokens)


def _all_are_done(done: bool, groups: Sequence[Group]) -> bool:
    """Return whether this rank and all ranks of the groups, which share experts with it, are done."""
    for group in groups:
        done = all(gather_json(done, group))
    return done


def _until_end(tokens: list[int], end_tokens: Collection[int]) -> list[int]:
    first = next((i for i, token in enumerate(tokens) if token in end_tokens), len(tokens))
    return tokens[: first + 1]


class _Reader:
    """Forward passes over growing sequences.

    Args:
        model: the model.
        device: its device.
        capacity: most tokens of a sequence in the key-value cache.
    """

    def __init__(self, model: LanguageModel, device: torch.device, capacity: int) -> None:
        self._model, self._device, self._capacity = model, device, capacity
        self._cache: KeyValueCache | None = None

    def next_logits(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return float32 logits [B, V] of the token after each row, on the CPU, where tokens are drawn."""
        if max(map(len, rows)) > self._capacity:
            self._cache = None
            longest = self._model.config.seq_len
            windows = [row[-longest:] for row in rows]
            last = torch.tensor([len(window) - 1 for window in windows], device=self._device)
            logits_shard = self._model(self._padded(windows))
            return self._gathered(logits_shard[torch.arange(len(rows), device=self._device), last])
        ranks = group_size(self._model.tp_group) if self._model.sequence_parallel else 1
        if self._cache is None:
            self._cache = KeyValueCache(len(rows), self._capacity + ranks - 1)
        # A rank that is done reads its last token again, and again.
        kept = self._cache.lengths = [min(n, len(row) - 1) for row, n in zip(rows, self._cache.lengths, strict=True)]
        news = [row[n:] for row, n in zip(rows, kept, strict=True)]
        tokens = self._padded(news)
        self._cache.begin([len(new) for new in news], tokens.shape[1])
        logits_shard = self._model(tokens, cache=self._cache)
        self._cache.keep()
        return self._gathered(logits_shard[:, 0])

    def _padded(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """Return the rows as tokens [B, S]. The padding at their ends affects nothing: attention is causal."""
        longest = max(map(len, rows))
        if self._model.sequence_parallel:
            longest += -longest % group_size(self._model.tp_group)
        tokens = [[*row, *[0] * (longest - len(row))] for row in rows]
        return torch.tensor(tokens, dtype=torch.int64, device=self._device)

    def _gathered(self, logits_shard: torch.Tensor) -> torch.Tensor:
        gathered = all_gather_split(logits_shard.float(), -1, self._model.tp_group)
        return gathered[:, : self._model.vocab_size].cpu()
