"""save_pretrained of a parallel model: it writes full tensors or raises, and never writes shards."""

from typing import Any

from torch import nn

from fused_megatron.checks import InputError
from fused_megatron.collectives import group_size
from fused_megatron.interop.full_state import FullStateLoading, check_full_state, full_state_dict
from fused_megatron.interop.split_experts import expert_split
from fused_megatron.sharding import parallel_group
from fused_megatron.sharding.replica_shards import replica_shards

_WAY_OUT = "state = full_state_dict(model) on all ranks, then model.save_pretrained(folder, state_dict=state)"


class SavePretrained:
    """Replacement of save_pretrained in a parallel model.

    On one rank it saves the model. On several ranks the caller must pass the full state_dict: gathering needs all
    ranks, and save_pretrained is usually called on one rank, which would wait for the others forever.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def __call__(self, save_directory: Any, *args: Any, state_dict: Any = None, **options: Any) -> Any:
        ranks = group_size(parallel_group(self.model)) * group_size(expert_split(self.model).all_groups)
        if state_dict is None and ranks == 1 and replica_shards(self.model) is None:
            state_dict = full_state_dict(self.model)
        if state_dict is None:
            raise InputError(f"save_pretrained would write the shards of one rank ({_WAY_OUT} on rank 0)")
        try:
            check_full_state(self.model, state_dict, strict=False)
        except InputError as error:
            raise InputError(f"{error}: it is no whole state ({_WAY_OUT} on rank 0)") from None
        kind: Any = type(self.model)
        return kind.save_pretrained(self.model, save_directory, *args, state_dict=state_dict, **options)


def guard_saving(model: nn.Module) -> None:
    """Replace the save_pretrained of a transformers model, and make its load_state_dict take full tensors."""
    model.register_load_state_dict_pre_hook(FullStateLoading())
    if callable(getattr(model, "save_pretrained", None)):
        model.save_pretrained = SavePretrained(model)  # type: ignore[assignment]
