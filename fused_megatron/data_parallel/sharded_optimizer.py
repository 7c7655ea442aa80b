"""ShardedOptimizer: a torch optimizer of the rows that this data-parallel rank owns."""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fused_megatron.checks import InputError, check
from fused_megatron.collectives.together import build_together
from fused_megatron.data_parallel.elementwise import check_elementwise
from fused_megatron.data_parallel.full_optimizer_state import gather_state, own_state
from fused_megatron.data_parallel.sharded_replica import ShardedReplica
from fused_megatron.sharding import GradScaler
from fused_megatron.sharding.replica_shards import replica_shards

Group = Mapping[str, Any]


class ShardedOptimizer(torch.optim.Optimizer):
    """Any elementwise torch optimizer, over this rank's rows of a model after shard_data_parallel.

    Schedulers, param_groups, step(), zero_grad(), state_dict() and load_state_dict() work as torch's. Parameters of
    lower precision have float32 main rows, which step() rounds to the weights.

        optimizer = fm.ShardedOptimizer(model, torch.optim.AdamW, lr=1e-3)
        optimizer = fm.ShardedOptimizer(
            model,
            torch.optim.AdamW,
            [{"params": ["head.weight"], "lr": 1e-4}, {"params": model.blocks.parameters()}],
            lr=1e-3,
        )

    Args:
        model: a model after shard_data_parallel.
        optimizer: an elementwise class of torch optimizers; a class that is not torch's own is tried on a small tensor.
        groups: parameters, or their names in the model, or groups {"params": .., option: ..} of these; None: all.
        options: options of the optimizer.

    Raises:
        InputError: on every rank, if the optimizer is not elementwise, the model is not sharded, or the model does not
            have one of the parameters.

    Communication: one small exchange. In stages 1 and 2 step() sends the weights to the other ranks; they arrive during
        the next forward.
    Memory: the state of the optimizer for this rank's rows, and 4 bytes an element for main rows.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: type[torch.optim.Optimizer],
        groups: Sequence[Any] | Iterable[Any] | None = None,
        **options: Any,
    ) -> None:
        world = dist.group.WORLD if dist.is_initialized() else None
        self._replica, rows, self._inner = build_together(world, lambda: _build(model, optimizer, groups, options))
        super().__init__(_named(rows), dict(self._inner.defaults))
        self._is_made = True
        self._share()
        self._replica.main = {parameter: main for group in rows for _, parameter, main in group["params"]}

    def _share(self) -> None:
        """Use the state and the groups of the inner optimizer: the same objects, not copies."""
        self.state, self.param_groups = self._inner.state, self._inner.param_groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Raise: pass all groups to the constructor."""
        if getattr(self, "_is_made", False):
            raise InputError("add_param_group: pass all groups when the ShardedOptimizer is made")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update this rank's rows. Every rank calls it.

        Args:
            closure: function that computes the loss and its gradients; it is called first.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._check_current()
        self._replica.settle()
        self._replica.weights.finish()  # weights that arrive later would overwrite the update
        self._inner.step()
        self._replica.updated()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Begin a step: no parameter of the model has a gradient. step() does not change parameters without one."""
        self._replica.zero_()

    def state_dict(self) -> dict[str, Any]:
        """Return the state of this rank's rows, with their main rows, for load_state_dict in the same layout.

        full_state_dict() has it for any layout.
        """
        found = self._inner.state_dict()
        main = {name: main.detach() for name, p, main in self._names_and_rows() if main.dtype != p.dtype}
        return {**found, "main": main, "rows": self._own_rows()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a result of state_dict() on the same rank of the same layout.

        Raises:
            InputError: the state belongs to other rows.
        """
        own = self._own_rows()
        found = list(state_dict.get("rows", own))
        check(
            found == own,
            f"the state has the rows {_rows_text(found)}, and this rank {_rows_text(own)} (full_state_dict() "
            "and load_full_state_dict() work in any layout)",
        )
        self._inner.load_state_dict({k: v for k, v in state_dict.items() if k not in ("main", "rows")})
        self._share()
        with torch.no_grad():
            for name, _, main in self._names_and_rows():
                if name in state_dict.get("main", {}):
                    main.copy_(state_dict["main"][name])

    def full_state_dict(self, *, rank0_only: bool = False) -> dict[str, Any]:
        """Gather the state of all rows by parameter name, for load_full_state_dict in any layout. Every rank calls it.

        Args:
            rank0_only: the other ranks return an empty dict.

        Communication: as full_optimizer_state.gather_state.
        """
        found = gather_state(self.state, self._names_and_rows(), self._replica.replicas, self._replica.tp_group)
        groups = [
            {k: v for k, v in group.items() if k != "params"} for group in self._inner.state_dict()["param_groups"]
        ]
        keeps = not rank0_only or not dist.is_initialized() or dist.get_rank() == 0
        return {**found, "param_groups": groups} if keeps else {}

    def load_full_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load what full_state_dict() returned, on every rank the same. The groups have the same parameters.

        Raises:
            InputError: other groups, or a tensor with another shape than its parameter; nothing was loaded.
        """
        own = self._names_and_rows()
        groups = self._inner.state_dict()["param_groups"]
        found, wanted = ([group["param_names"] for group in each] for each in (state["param_groups"], groups))
        check(found == wanted, f"the state has the groups {found!r:.200}, and this optimizer {wanted!r:.200}")
        values = own_state(state, own, self._replica.replicas.rows)
        main = {name: value.pop("main") for name, value in values.items() if "main" in value}
        indices = [
            (index, name) for group in groups for index, name in zip(group["params"], group["param_names"], strict=True)
        ]
        self.load_state_dict(
            {
                "state": {index: values[name] for index, name in indices if values[name]},
                "param_groups": [
                    {**saved, "params": group["params"]}
                    for saved, group in zip(state["param_groups"], groups, strict=True)
                ],
                "main": main,
            }
        )

    def _names_and_rows(self) -> list[tuple[str, nn.Parameter, nn.Parameter]]:
        names = {p: name for name, p in self._replica.parameters.items()}
        return [(names[p], p, main) for p, main in self._replica.main.items()]

    def _own_rows(self) -> list[int]:
        """Return the index and number of the row shards of dense parameters, and of experts where they differ.

        For experts the expert-parallel rank and the number of these ranks follow.
        """
        replicas, experts = self._replica.replicas, self._replica.experts
        found = [replicas.dense.rows.index, replicas.dense.rows.num_shards]
        if experts is None:
            return found
        return [*found, replicas.experts.rows.index, replicas.experts.rows.num_shards, experts.ep_rank, experts.ep_size]

    def _check_current(self) -> None:
        mine = {main for group in self.param_groups for main in group["params"]}
        check(
            mine == set(self._replica.main.values()),
            "step() of a ShardedOptimizer after another one was made for the same model (use the last)",
        )
        trainable = set(self._replica.trainable.values())
        for name, parameter in self._replica.parameters.items():
            check(
                parameter in trainable or not parameter.requires_grad,
                f"{name} was frozen when shard_data_parallel was called, and cannot be trained",
            )

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """Return whether step() unscales. torch's GradScaler reads it and is refused: it sees only one rank's rows."""
        scaler = sys._getframe(1).f_locals.get("self")
        if isinstance(scaler, torch.amp.GradScaler) and not isinstance(scaler, GradScaler):
            raise InputError(
                "torch.amp.GradScaler looks for infinities in one rank's rows only (fm.GradScaler(mesh) looks in all)"
            )
        return False


def _rows_text(rows: Sequence[int]) -> str:
    kinds = ("", "of experts ", "of expert-parallel ranks ")
    pairs = zip(rows[::2], rows[1::2], strict=True)
    return ", ".join(f"{kind}{index} of {count}" for kind, (index, count) in zip(kinds, pairs, strict=False))


def _build(
    model: nn.Module, optimizer: type[torch.optim.Optimizer], groups: Iterable[Any] | None, options: dict[str, Any]
) -> tuple[ShardedReplica, list[dict[str, Any]], torch.optim.Optimizer]:
    check_elementwise(optimizer, options)
    replica = replica_shards(model)
    if not isinstance(replica, ShardedReplica):
        raise InputError("ShardedOptimizer needs a model after fm.shard_data_parallel(model, mesh, zero_stage=..)")
    rows = [
        {**group, "params": [(name, p, _main_rows(replica, p)) for name, p in group["params"]]}
        for group in _resolved(replica, groups)
    ]
    make: Any = optimizer
    return replica, rows, make(_named(rows), **options)


def _named(rows: Sequence[Group]) -> list[dict[str, Any]]:
    """Return groups of (name, main rows), as torch's optimizers take them."""
    return [{**group, "params": [(name, main) for name, _, main in group["params"]]} for group in rows]


def _main_rows(replica: ShardedReplica, parameter: nn.Parameter) -> nn.Parameter:
    """Return the float32 rows that step() updates: the weights themselves if they are float32."""
    own = replica.own(parameter)
    return nn.Parameter(own if own.dtype == torch.float32 else own.float())


def _resolved(replica: ShardedReplica, groups: Iterable[Any] | None) -> list[dict[str, Any]]:
    """Return groups of (name, parameter), without frozen parameters."""
    members: list[Any] = list(replica.trainable) if groups is None else list(groups)
    listed = members if members and isinstance(members[0], Mapping) else [{"params": members}]
    found: list[dict[str, Any]] = []
    for group in listed:
        params = group["params"]
        names = [_name_of(replica, each) for each in ([params] if isinstance(params, str | torch.Tensor) else params)]
        pairs = [(name, replica.trainable[name]) for name in names if name in replica.trainable]
        found.append({**group, "params": pairs})
    return found


def _name_of(replica: ShardedReplica, member: Any) -> str:
    """Return the name of a parameter; the argument is the parameter, its name, or (name, parameter)."""
    member = member[1] if isinstance(member, tuple) else member
    if isinstance(member, str):
        name = member if member in replica.parameters else None
    else:
        name = next((name for name, p in replica.parameters.items() if p is member), None)
    if name is None:
        what = repr(member) if isinstance(member, str) else f"a tensor of shape {tuple(member.shape)}"
        raise InputError(f"groups: {what} is no parameter of the model")
    return name
