"""The report of parallelize: its text, and the errors for layers that stay replicated against the user's wish."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

from torch import distributed as dist

from fused_megatron.checks import InputError
from fused_megatron.collectives import group_size
from fused_megatron.interop.adapters import owners_of_names
from fused_megatron.interop.context_plan import ContextPlan
from fused_megatron.interop.preparation import Preparation
from fused_megatron.interop.split_experts import ParallelExperts
from fused_megatron.interop.units import Layer, modules_with_own_parameters
from fused_megatron.modules import Left, Replaced

# Reasons of layers that are whole as they should be.
BY_PLAN = "whole by the plan"
BESIDE_SHARDS = "whole, the other matrix of its adapter is in shards"
SUMMED = "whole, its gradient summed over the ranks"
MEANT = (BY_PLAN, BESIDE_SHARDS, SUMMED)
# A number that is a whole part of a dotted name.
_NUMBER = re.compile(r"(?<![^.\s])\d+(?![^.:\s])")


@dataclass(frozen=True)
class ParallelReport:
    """Report of what parallelize changed in a model; print it. parallelize stores it as model.parallel_report.

    str() is the text on rank 0, and one line on the other ranks, so that a program of many ranks prints the text once.

    Attributes:
        plan: origin of the plan, such as "LlamaForCausalLM's tp_plan".
        tensor_parallel_size: R.
        sequence_parallel: whether layers run on blocks of the sequence while gradients are recorded.
        sharded: layers whose weights are sharded now.
        fused: norms and activations that were replaced by fused ones; replicated.
        left: modules with parameters that are unchanged and replicated, each with a reason.
        unused: patterns of the plan that match no module.
        context_parallel_size: ranks that share each sequence while gradients are recorded.
        experts: the split of the experts over ranks, and their bytes; empty if no experts are split.
        context_parallel: the layers that hold own positions, and how they attend; empty for one rank.
        rank: the rank of this process among all.
    """

    plan: str
    tensor_parallel_size: int
    sequence_parallel: bool
    sharded: tuple[Replaced, ...]
    fused: tuple[Replaced, ...]
    left: tuple[Left, ...]
    unused: tuple[str, ...] = ()
    context_parallel_size: int = 1
    context_parallel: str = ""
    experts: str = ""
    rank: int = 0

    def __str__(self) -> str:
        return "parallel report: as on rank 0 (parallel_report.text)" if self.rank else self.text

    @property
    def text(self) -> str:
        """The whole report on any rank; layers with the same line but for their numbers share one."""
        blocks = ", activations in blocks of the sequence" if self.sequence_parallel else ""
        first = f"{len(self.sharded)} layers sharded over {self.tensor_parallel_size} ranks by {self.plan}{blocks}"
        lines = [first, *folded(f"  {one.name}: {one.was} -> {one.now}" for one in self.sharded)]
        if self.experts:
            lines += [self.experts]
        if self.context_parallel:
            lines += [f"sequences divided over {self.context_parallel_size} ranks: {self.context_parallel}"]
        if self.fused:
            lines += [f"{len(self.fused)} modules fused, whole on every rank"]
            lines += folded(f"  {one.name}: {one.was} -> {one.now}" for one in self.fused)
        if self.left:
            lines += [f"{len(self.left)} modules left as they are, whole on every rank"]
            lines += folded(f"  {one.name} ({one.kind}): {one.reason}" for one in self.left)
        if self.unused:
            lines += [f"patterns that match no module: {', '.join(self.unused)}"]
        return "\n".join(lines)


def folded(lines: Iterable[str]) -> list[str]:
    """Return the lines, with one in place of all that differ only in the numbers of layers: "layers.{0..31}.q_proj"."""
    groups: dict[str, list[tuple[int, ...]]] = {}
    for line in lines:
        groups.setdefault(_NUMBER.sub("{}", line), []).append(tuple(map(int, _NUMBER.findall(line))))
    result = []
    for template, numbers in groups.items():
        columns = list(zip(*numbers, strict=True))
        # A name may say the number of its layer twice.
        choices = prod(len(set(column)) for column in dict.fromkeys(columns))
        if choices == len(numbers):
            result.append(_filled(template, (_ranges(sorted(set(column))) for column in columns)))
        else:
            result += [_filled(template, map(str, each)) for each in numbers]
    return result


def _filled(template: str, texts: Iterable[str]) -> str:
    rest = iter(texts)
    return re.sub(r"\{\}", lambda _: next(rest), template)


def _ranges(numbers: list[int]) -> str:
    """Return "3" for one number, "{0..3}" or "{0..3,6}" for several in order."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    texts = [f"{run[0]}..{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs]
    return str(numbers[0]) if len(numbers) == 1 else f"{{{','.join(texts)}}}"


def make_report(work: Preparation, context: ContextPlan | None = None) -> ParallelReport:
    """Make the report, from a preparation that was not committed yet."""
    reasons = work.kept_whole()
    taken = {replacement.layer.module for replacement in work.replacements}
    taken |= {exchange.module for exchange in work.exchanges}
    adapters = {module for parts in work.adapters.values() for module in parts.modules}
    owners = owners_of_names(work.model)
    left = []
    for name, module in modules_with_own_parameters(work.model):
        if module not in taken:
            outer = owners.get(name, name)
            reason = reasons.get(outer, "no pattern of the plan names it")
            if work.plan.styles.get(outer) == "replicate":
                reason = BY_PLAN
            if module in adapters:
                reason = BESIDE_SHARDS
            if module in work.summed:
                reason = SUMMED
            left.append(Left(name or type(work.model).__name__, type(module).__name__, reason))
    named = {owners.get(one.name, one.name) for one in left}
    left += [
        Left(layer.name, type(layer.module).__name__, reasons[layer.name])
        for layer in work.layers
        if layer.name in reasons and layer.name not in named
    ]
    return ParallelReport(
        plan=work.plan.origin,
        tensor_parallel_size=group_size(work.tp_group),
        sequence_parallel=bool(work.stacks),
        sharded=tuple(
            Replaced(_name_of(r.layer), type(r.layer.module).__name__, type(r.module).__name__)
            for r in work.replacements
        ),
        fused=tuple(exchange.described() for exchange in work.exchanges),
        left=tuple(left),
        unused=work.plan.unused,
        context_parallel_size=1 if context is None else group_size(context.region.group),
        context_parallel="" if context is None else context.text,
        experts=_describe_experts(work),
        rank=dist.get_rank() if dist.is_available() and dist.is_initialized() else 0,
    )


def _name_of(layer: Layer) -> str:
    """Return all names of a layer; of a module to save and its original, with the path inside the wrapper."""
    return " = ".join(layer.names if layer.inside == "base_layer" else layer.paths)


def _describe_experts(work: Preparation) -> str:
    """Return what becomes of the experts; empty if they are not split."""
    split = [r.module for r in work.replacements if isinstance(r.module, ParallelExperts)]
    if not split:
        return ""
    first, ranks = split[0], work.expert_split
    own = sum(p.numel() * p.itemsize for module in split for p in module.parameters()) / 1e6
    whole = first.ffn_shard == first.intermediate_dim
    features = "" if whole else f"{first.ffn_shard} of {first.intermediate_dim} features of "
    how = (
        f"tokens move between {group_size(ranks.ep_group)} ranks of ep x {group_size(ranks.etp_group)} of etp"
        if ranks.moves_tokens
        else f"results are summed over {group_size(ranks.tp_group)} ranks of tp"
    )
    return (
        f"{len(split)} layers with {first.num_experts} experts: a rank holds {features}{len(first.own_experts)} of "
        f"them, {own:.4g} of {own * ranks.size:.4g} MB; {how}"
    )


def refuse_left(report: ParallelReport, work: Preparation) -> None:
    """Raise what strict=True raises: a planned layer cannot be sharded, or no plan names a module with a matrix."""
    reasons = work.kept_whole()
    for one in report.left:
        module = dict(work.model.named_modules()).get(one.name, work.model)
        matrix = any(p is not None and p.dim() > 1 for p in module._parameters.values())
        if one.name in reasons or (matrix and one.reason not in MEANT):
            raise InputError(
                f"strict=True: {one.name} ({one.kind}) would stay whole: {one.reason} "
                "(name it in plan, as 'replicate' where that is meant; or strict=False)"
            )


def refuse_blocked(work: Preparation) -> None:
    """Raise if the user's own plan asks to shard a layer that cannot be sharded."""
    for name, reason in work.kept_whole().items():
        if name not in work.plan.asked:
            continue
        pattern = work.plan.patterns.get(name, name)
        raise InputError(f"plan[{pattern!r}]: {name} cannot be {work.plan.styles.get(name)!r}: {reason}")
