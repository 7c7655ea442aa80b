"""The optimizer of a rank: which parameters each update rule takes, and the ranks that share whole matrices."""

from collections.abc import Iterator, Mapping

import torch
from torch import nn

from fused_megatron.config import TrainConfig
from fused_megatron.data_parallel.muon import Muon
from fused_megatron.data_parallel.optimizer import Optimizer
from fused_megatron.data_parallel.reduction import GradientBuckets
from fused_megatron.data_parallel.stochastic_state import StochasticState
from fused_megatron.data_parallel.update_rules import UpdateRule
from fused_megatron.data_parallel.whole_matrices import WholeMatrices
from fused_megatron.mesh import Mesh
from fused_megatron.sharding import Replicas, parameter_record


def new_optimizer(
    config: TrainConfig,
    mesh: Mesh,
    parameters: Mapping[str, nn.Parameter],
    own: Mapping[str, torch.Tensor],
    gradients: GradientBuckets,
) -> Optimizer:
    """Build the optimizer of this rank's rows of the parameters. Every rank must call this together.

    Args:
        config: uses optimizer, and training.seed for state in bfloat16.
        mesh: of all ranks.
        parameters: this rank's parameters by their names in the whole model.
        own: the rows of each parameter that this rank updates, by the same names.
        gradients: of these parameters; their `replicas` state the rows of `own`.

    Communication: with Muon, creates the groups of the ranks that share the matrices of a stage, and of its experts.
    Memory: as Optimizer.
    """
    rules: dict[str, UpdateRule] = {}
    if config.optimizer.kind == "muon":
        for matrices in _matrices(config, mesh, parameters, gradients.replicas):
            muon = Muon(config.optimizer, matrices)
            rules |= dict.fromkeys(matrices.parameters, muon)
    rounding = None
    if config.optimizer.state_dtype != "float32":
        rows = gradients.replicas.rows
        parts = {name: rows.of(parameter).own_parts(parameter) for name, parameter in parameters.items()}
        rounding = StochasticState(parts, config.training.seed)
    return Optimizer(own, gradients.by_name(parameters), config.optimizer, rules, rounding)


def _matrices(
    config: TrainConfig, mesh: Mesh, parameters: Mapping[str, nn.Parameter], replicas: Replicas
) -> Iterator[WholeMatrices]:
    """Yield the matrices of dense parameters, and in a model with experts the matrices of experts."""
    found = {name: p for name, p in parameters.items() if is_block_matrix(name, p)}
    dense = {name: p for name, p in found.items() if parameter_record(p).experts is None}
    rows = replicas.dense.rows
    yield WholeMatrices(dense, rows, mesh.ranks_of_a_state(rows.num_shards).group, mesh.tp_size)
    if config.model.num_experts is not None:
        rows = replicas.experts.rows
        group = mesh.ranks_of_a_state(rows.num_shards, of_experts=True).group
        experts = {name: p for name, p in found.items() if name not in dense}
        yield WholeMatrices(experts, rows, group, mesh.expert_sizes["etp"])


def is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    """Whether Muon updates a parameter: a matrix of a transformer block; not embeddings, the head and vectors."""
    return name.startswith("blocks.") and parameter.dim() == 2
