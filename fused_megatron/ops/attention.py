"""Attention over the keys that a causal, windowed, padding or document mask leaves visible."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from fused_megatron.checks import InputError, check, check_dtype, check_shape
from fused_megatron.ops.attention_operands import KernelDropout, TileDropout
from fused_megatron.ops.attention_tiles import AttentionGradients, AttentionSum, sum_dtype
from fused_megatron.ops.autograd_function import AutogradFunction
from fused_megatron.ops.registration import define_composed_op
from fused_megatron.ops.scaled_masked_softmax import scaled_masked_softmax
from fused_megatron.ops.visible_pairs import PairTile, Visibility


@dataclass(frozen=True)
class AttentionMask:
    """The keys that each query may see: all keys that no part of the mask hides.

    Attributes:
        causal: hide the keys after the query.
        window: number of keys, up to and with the query's own, that a query sees; needs causal. None: no limit.
        key_padding_mask: [B, S] bool, True for keys that no query sees (as in torch); at least one key a row is False.
        documents: [n + 1] int32 or int64, from 0 to B S: cumulative lengths of the n documents that the B S tokens, row
            after row, consist of. A query sees only keys of its own document and row. None: each row is one document.
            The host reads it; give it as a CPU tensor, since reading a GPU tensor would synchronise.
    """

    causal: bool = False
    window: int | None = None
    key_padding_mask: torch.Tensor | None = None
    documents: torch.Tensor | None = None

    def __post_init__(self) -> None:
        check(self.window is None or self.causal, f"window={self.window} needs causal=True")
        check(self.window is None or self.window >= 1, f"window={self.window} must be at least 1 (None: no window)")

    def visibility(self, batch: int, seq_len: int) -> Visibility:
        """Return what queries see, without key_padding_mask, as numbers on the host.

        Raises:
            InputError: documents are no cumulative lengths of batch times seq_len tokens.
        """
        documents = None if self.documents is None else tuple(self.documents.tolist())
        return _visibility(self.causal, self.window, documents, batch, seq_len)


@lru_cache(maxsize=16)
def _visibility(
    causal: bool, window: int | None, documents: tuple[int, ...] | None, batch: int, seq_len: int
) -> Visibility:
    if documents is not None:
        check(
            documents[:1] == (0,) and documents[-1:] == (batch * seq_len,) and list(documents) == sorted(documents),
            f"documents={_shortened(documents)} must be cumulative lengths from 0 to the {batch} x {seq_len} tokens",
        )
    return Visibility.of_documents(causal, window, documents, batch, seq_len)


def attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    documents: torch.Tensor | Sequence[int] | None = None,
    causal: bool = False,
    window: int | None = None,
    scale: float | None = None,
    return_log_sum_exp: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Compute softmax(scale query key^T) value for each head, within each document.

    Equals torch.nn.functional.scaled_dot_product_attention document by document; the sequence is the first dim, the
    heads the last but one.

    Args:
        query: [S, B, N, D], or [T, N, D] for one row of tokens; float, any strides.
        key: [S, B, G, D]; G divides N, and N / G neighbouring query heads share a key head.
        value: [S, B, G, Dv].
        documents: [n + 1] ints from 0 to B S: cumulative lengths of the documents that the tokens, row after row,
            consist of. A query sees only keys of its document and row. None: each row is one document. Best a list or a
            CPU tensor: the host reads it.
        causal: hide the keys after the query.
        window: number of keys, up to and with the query's own, that a query sees; needs causal. None: no limit.
        scale: factor of the scores; None: D^-0.5.
        return_log_sum_exp: also return the logarithm of the sum of the exponentials of the scores.

    Returns:
        The context [S, B, N, Dv], dtype of query; with return_log_sum_exp also [S, B, N] float32 (float64 for float64),
        which has no gradient. The backward over blocks of keys with a log-sum-exp of all keys is
        ops.attention_tiles.AttentionGradients.

    Raises:
        InputError, TypeError: as attend.

    Communication, Memory: as attend.

    Example:
        >>> q, k, v = (torch.randn(10, 4, 8) for _ in range(3))
        >>> ops.attention(q, k, v, documents=[0, 3, 10], causal=True).shape
        torch.Size([10, 4, 8])
    """
    if documents is not None and not isinstance(documents, torch.Tensor):
        documents = torch.tensor(list(documents), dtype=torch.int64)
    shape = tuple(query.shape)
    check(len(shape) in (3, 4), f"query.shape={shape} must be (S, B, N, D) or (T, N, D)")
    packed = len(shape) == 3
    if packed:
        query, key, value = (t.unsqueeze(1) for t in (query, key, value))
    mask = AttentionMask(causal, window, None, documents)
    _check_shapes(query, key, value, mask)
    if return_log_sum_exp:
        context, log_sum_exp = _by_tiles(query, key, value, mask, scale, None)
        return (context.squeeze(1), log_sum_exp.squeeze(1)) if packed else (context, log_sum_exp)
    context = attend(query, key, value, mask, scale=scale)
    return context.squeeze(1) if packed else context


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask,
    *,
    scale: float | None = None,
    dropout: TileDropout | KernelDropout | None = None,
) -> torch.Tensor:
    """Compute softmax(scale query key^T) value for each head, over the keys that the mask leaves visible.

    Equals torch.nn.functional.scaled_dot_product_attention (which it calls when there is no dropout, window and
    documents) with the sequence as the first dim, the layout of the activations of this package.

    Args:
        query: [S, B, N, D] float, any strides.
        key: [S, B, G, D]; G divides N, and N / G neighbouring query heads share a key head.
        value: [S, B, G, Dv].
        mask: what each query sees.
        scale: factor of the scores; None: D^-0.5.
        dropout: maps the probabilities [b, N, q, k] of a tile, and the tile, to the kept and rescaled ones. It must
            draw the same mask at each call (as models/dropout.py does). A KernelDropout lets torch's kernel draw the
            mask; not with a window, documents, or a padding mask that is causal. None: no dropout.

    Returns:
        [S, B, N, Dv], dtype of query. A query that sees no key has 0.

    Raises:
        InputError: shapes that do not fit, N that G does not divide, or cumulative lengths that do not ascend from 0 to
            B S.
        TypeError: a key_padding_mask that is not bool, documents that are not integers.

    Communication: none.
    Memory: as torch's attention; windows and documents need no mask, but a log-sum-exp of S B N elements and a part of
        at most 512 rows of scores. With dropout and without documents, all scores and probabilities are stored:
        B N S S elements, and B N S S more after dropout. With both, 4 M of them exist at a time.
    """
    _check_shapes(query, key, value, mask)
    seq_len, batch = query.shape[:2]
    windowed = mask.window is not None and mask.window < seq_len
    of_tiles = None if isinstance(dropout, KernelDropout) else dropout
    if isinstance(dropout, KernelDropout) and (mask.documents is not None or windowed or _hides_dense(mask)):
        raise InputError(
            "attention dropout inside the kernel must come without window, documents and causal padding "
            "(attention_dropout_kernel='exact' has them)"
        )
    if mask.documents is not None or (dropout is None and (windowed or _hides_dense(mask))):
        return _by_tiles(query, key, value, mask, scale, of_tiles)[0]
    shared = query.shape[2] // key.shape[2]
    query, key, value = (t.permute(1, 2, 0, 3) for t in (query, key, value))
    hidden = None if mask.key_padding_mask is None else mask.key_padding_mask[:, None, None, :]
    if dropout is None or isinstance(dropout, KernelDropout):
        with nullcontext() if dropout is None else _seeded(query.device, dropout.seed):
            context = F.scaled_dot_product_attention(
                query,
                key,
                value,
                attn_mask=None if hidden is None else ~hidden,
                dropout_p=0.0 if dropout is None else dropout.p,
                is_causal=mask.causal,
                scale=scale,
                enable_gqa=shared > 1,
            )
        return context.permute(2, 0, 1, 3)
    if shared > 1:
        key, value = (t.repeat_interleave(shared, dim=1) for t in (key, value))
    scores = query @ key.transpose(-1, -2)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    probabilities = scaled_masked_softmax(scores, hidden, scale=scale, causal=mask.causal, window=mask.window)
    whole = PairTile((0, batch), (0, seq_len), (0, seq_len), 0, 0)
    return (dropout(probabilities, whole) @ value).permute(2, 0, 1, 3)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """Let torch's generator of the device draw from a seed while the context is open, and leave it as it was.

    The host sets numbers of the generator and waits for nothing.
    """
    is_cuda = device.type == "cuda"
    with torch.random.fork_rng(devices=[device] if is_cuda else []):
        generator = torch.cuda.default_generators[device.index or 0] if is_cuda else torch.default_generator
        generator.manual_seed(seed)
        yield


def _hides_dense(mask: AttentionMask) -> bool:
    """Return whether torch would need an S x S mask: it takes a mask or is_causal, not both."""
    return mask.causal and mask.key_padding_mask is not None


def _by_tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: AttentionMask,
    scale: float | None,
    dropout: TileDropout | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    numbers = (mask.causal, mask.window, scale)
    found: tuple[torch.Tensor, torch.Tensor] = _Attention.apply(
        query, key, value, mask.documents, mask.key_padding_mask, numbers, dropout
    )
    return found


def _tiles(
    query: torch.Tensor, documents: torch.Tensor | None, causal: bool, window: int | None
) -> tuple[PairTile, ...]:
    seq_len, batch = query.shape[:2]
    return _tiles_of(AttentionMask(causal, window, None, documents).visibility(batch, seq_len))


@lru_cache(maxsize=16)
def _tiles_of(visibility: Visibility) -> tuple[PairTile, ...]:
    """Plan the tiles of a whole sequence; all layers of a microbatch have the same."""
    ranges = ((0, visibility.seq_len),)
    return visibility.tiles(ranges, ranges)


def _forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: TileDropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    total = AttentionSum(query, scale, dropout)
    total.add(key, value, _tiles(query, documents, causal, window), key_padding_mask)
    return total.result()


def _backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    documents: torch.Tensor | None,
    key_padding_mask: torch.Tensor | None,
    context: torch.Tensor,
    log_sum_exp: torch.Tensor,
    causal: bool,
    window: int | None,
    scale: float,
    dropout: TileDropout | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    gradients = AttentionGradients(grad, query, context, log_sum_exp, scale, dropout)
    grad_key, grad_value = gradients.add(key, value, _tiles(query, documents, causal, window), key_padding_mask)
    return gradients.grad_query(), grad_key, grad_value


_attention_forward = define_composed_op(
    "attention_forward(Tensor query, Tensor key, Tensor value, Tensor? documents, Tensor? key_padding_mask,"
    " bool causal, int? window, float scale) -> (Tensor context, Tensor log_sum_exp)",
    implementation=_forward,
    fake=lambda query, key, value, *rest: (
        query.new_empty((*query.shape[:3], value.shape[-1])),
        query.new_empty(query.shape[:3], dtype=sum_dtype(query.dtype)),
    ),
)
_attention_backward = define_composed_op(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor? documents,"
    " Tensor? key_padding_mask, Tensor context, Tensor log_sum_exp, bool causal, int? window, float scale)"
    " -> (Tensor grad_query, Tensor grad_key, Tensor grad_value)",
    implementation=_backward,
    fake=lambda grad, query, key, value, *rest: tuple(t.new_empty(t.shape) for t in (query, key, value)),
)


class _Attention(AutogradFunction):
    op = "ops.attention"
    float64_is_plain = False

    @staticmethod
    def forward(
        ctx: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: torch.Tensor | None,
        key_padding_mask: torch.Tensor | None,
        numbers: tuple[bool, int | None, float],
        dropout: TileDropout | None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        operands = (query, key, value, documents, key_padding_mask)
        if dropout is None:
            context, log_sum_exp = _attention_forward(*operands, *numbers)
        else:
            context, log_sum_exp = _forward(*operands, *numbers, dropout)
        ctx.save_for_backward(*operands, context, log_sum_exp)
        ctx.mark_non_differentiable(log_sum_exp)
        ctx.numbers, ctx.dropout = numbers, dropout
        return context, log_sum_exp

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor, _: torch.Tensor) -> Any:
        run = _attention_backward if ctx.dropout is None else partial(_backward, dropout=ctx.dropout)
        gradients = run(grad, *ctx.saved_tensors, *ctx.numbers)
        return *gradients, None, None, None, None


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: AttentionMask) -> None:
    check(query.dim() == 4, f"query.shape={tuple(query.shape)} must be (S, B, N, D)")
    seq_len, batch, heads, head_dim = query.shape
    check(key.dim() == 4, f"key.shape={tuple(key.shape)} must be (S, B, G, D)")
    check_shape("key", key, (seq_len, batch, key.shape[2], head_dim))
    check_shape("value", value, (*key.shape[:3], value.shape[-1]))
    if key.shape[2] == 0 or heads % key.shape[2]:
        raise InputError(
            f"query.shape={tuple(query.shape)} has {heads} heads, not a multiple of the {key.shape[2]} of key"
        )
    if mask.key_padding_mask is not None:
        check_dtype("key_padding_mask", mask.key_padding_mask, (torch.bool,))
        check_shape("key_padding_mask", mask.key_padding_mask, (batch, seq_len))
    if mask.documents is not None:
        check_dtype("documents", mask.documents, (torch.int32, torch.int64))
        check(mask.documents.dim() == 1, f"documents.shape={tuple(mask.documents.shape)} must have 1 dim")


def _shortened(documents: tuple[int, ...]) -> str:
    if len(documents) <= 8:
        return str(list(documents))
    return f"[{', '.join(map(str, documents[:4]))}, ..., {documents[-1]}]"
