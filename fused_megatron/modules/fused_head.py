"""FusedHead: a linear head whose cross-entropy is computed without all logits."""

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from fused_megatron.modules.deferred_logits import DeferredLogits, LogitsHead, defer
from fused_megatron.ops.autograd_function import transform_is_active

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Sizes of the trial of a loss function: sequences, tokens, hidden size, vocabulary.
_BATCH, _TOKENS, _WIDTH, _VOCAB = 2, 5, 3, 7


class FusedHead(nn.Linear):
    """torch.nn.Linear for a head: while gradients are recorded, its result is computed when it is read.

    The loss that F.cross_entropy computes of it, directly or through a model's loss function, then runs on tiles of
    the logits (ops.linear_cross_entropy). Whatever else reads the logits gets them: the same tensor with its gradient,
    computed at that moment. They must be read before the weights change, which is an error otherwise. Without
    gradients, under torch.compile, and with hooks or weights that are no plain parameters (FSDP around the head only)
    it is torch.nn.Linear.

    replace_modules changes the class of a model's head in place.

    Communication: none. Memory, Numerics: as fused_megatron.ops.linear_cross_entropy.
    """

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Map input [..., H] to logits [..., V] of the same dtype, not computed yet."""
        if torch.compiler.is_compiling() or not can_defer(self, input):
            return super().forward(input)
        return defer(LogitsHead(input, self.weight, self.bias), input)


def can_defer(head: Any, x: torch.Tensor) -> bool:
    """Return whether the logits that a head computes of x [..., H] may be computed later."""
    weight = head.weight
    if not torch.is_grad_enabled() or not (x.requires_grad or weight.requires_grad):
        return False
    if type(x) is not torch.Tensor or type(weight) is not nn.Parameter or any(getattr(head, h) for h in _HOOKS):
        return False
    # Other dtypes and sizes: torch.nn.Linear says what is wrong, now.
    fits = x.dim() >= 2 and x.shape[-1] == weight.shape[1] and x.device == weight.device and not x.is_meta
    same = x.dtype == weight.dtype or (not x.is_meta and torch.is_autocast_enabled(x.device.type))
    return fits and same and not x.is_inference() and not weight.is_inference() and not transform_is_active()


def head_of(model: nn.Module) -> tuple[nn.Linear, None] | tuple[None, str] | None:
    """Return the linear from the hidden size to the vocabulary; or why a model with a vocabulary has none.

    The vocabulary is the largest torch.nn.Embedding; the head is the one linear with as many outputs.
    """
    tables = [module.num_embeddings for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables or isinstance(model, nn.Embedding):
        return None
    heads = [module for module in model.modules() if type(module) is nn.Linear and module.out_features == max(tables)]
    if len(heads) > 1:
        return None, f"{len(heads)} linears have as many outputs as the vocabulary has entries, {max(tables)}"
    return (heads[0], None) if heads else None


def loss_obstacle(model: Any) -> str:
    """Return why the model's `loss_function` does not run on tiles of the logits; empty if it does, or has none.

    The function runs on a few logits, once deferred and once computed: only its results matter, not its name.
    """
    function = getattr(model, "loss_function", None)
    if not callable(function) or isinstance(function, nn.Module):
        return ""
    name = getattr(function, "__name__", type(function).__name__)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(_BATCH, _TOKENS, _WIDTH, generator=generator, dtype=torch.float32, device="cpu")
    weight = torch.randn(_VOCAB, _WIDTH, generator=generator, dtype=torch.float32, device="cpu", requires_grad=True)
    labels = torch.randint(_VOCAB, (_BATCH, _TOKENS), generator=generator, device="cpu")
    deferred: DeferredLogits = defer(LogitsHead(hidden, weight, None), hidden)
    results = []
    try:
        for logits in (deferred, F.linear(hidden, weight)):
            loss = function(logits=logits, labels=labels, vocab_size=_VOCAB)
            results.append([loss, *torch.autograd.grad(loss, weight)])
    except Exception as error:  # a foreign function may raise anything
        return f"{name} could not be tried: {type(error).__name__}: {error}"
    if deferred.is_computed:
        return f"{name} does more with the logits than F.cross_entropy of all their rows: it gets the whole logits"
    agrees = all(torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(*results, strict=True))
    return "" if agrees else f"{name} computes another loss from tiles of the logits"
