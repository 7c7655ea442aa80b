"""Parts of a model whose weights data-parallel ranks gather together: blocks, and modules outside of the blocks."""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from fused_megatron.tensor_parallel import VocabParallelEmbedding

_LISTS = (nn.ModuleList, nn.ModuleDict, nn.Sequential)


@dataclass(frozen=True)
class WeightUnit:
    """A module and the parameters that it needs at once.

    Attributes:
        module: the module whose forward needs the parameters.
        parameters: parameters of the module and its children; only its own parameters if it surrounds other units.
        surrounds: whether the module contains other units, so that its own parameters may be needed at any time.
        backward_reads: whether backward needs the values of the parameters. An embedding's backward does not.
    """

    module: nn.Module
    parameters: tuple[nn.Parameter, ...]
    surrounds: bool = False
    backward_reads: bool = True


def weight_units(module: nn.Module) -> Iterator[WeightUnit]:
    """Yield the units of a model, in the order of its modules.

    Each member of a list of modules (ModuleList, ModuleDict, Sequential) is a unit. So is each other module that
    contains no such list. A module that contains a list is a unit of its own parameters only.
    """
    if isinstance(module, _LISTS) or not any(isinstance(inner, _LISTS) for inner in module.modules()):
        yield from [_unit(member) for member in module.children()] if isinstance(module, _LISTS) else [_unit(module)]
        return
    own = tuple(module.parameters(recurse=False))
    if own:
        yield WeightUnit(module, own, surrounds=True)
    for child in module.children():
        yield from weight_units(child)


def _unit(module: nn.Module) -> WeightUnit:
    embedding = isinstance(module, nn.Embedding | VocabParallelEmbedding)
    return WeightUnit(module, tuple(module.parameters()), backward_reads=not embedding)
